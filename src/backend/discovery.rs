//! Resolves the names of servers and SRV records in the background.
//!
//! One resolver serves the process. Each server with a name and each SRV record has one task that queries DNS, publishes
//! the answer, and sleeps until the answer expires. A login waits for DNS only before the first answer. If DNS fails, the last
//! good answer stays in use. Answers are untrusted: addresses of our own listeners are ignored, and the number of servers of an
//! SRV record is bounded.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use hickory_resolver::TokioResolver;
use hickory_resolver::proto::rr::RData;
use tokio_rustls::rustls::pki_types::ServerName;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::listener_addresses::ListenerAddresses;
use super::server::ServerState;
use super::server_group::ServerGroup;
use super::{Backend, Server};
use crate::config::{self, Host};
use crate::failure::Reason;
use crate::lookup::dns;

/// Maximum number of servers of an SRV record. Further ones are ignored without a log entry: those at the end of the answer,
/// whatever their priorities are.
const MAX_SRV_SERVERS: usize = 64;
/// Minimum time between two queries, however short the time to live is.
const MIN_REFRESH: Duration = Duration::from_secs(1);
/// Maximum time between two queries, so that a change is noticed within an hour.
const MAX_REFRESH: Duration = Duration::from_secs(3600);
/// Delay before the first retry of a failed query. It doubles with each failure, up to [`MAX_RETRY`].
const FIRST_RETRY: Duration = Duration::from_secs(1);
const MAX_RETRY: Duration = Duration::from_secs(30);

/// The DNS resolver of the process.
#[derive(Debug, Clone)]
pub(super) struct Resolver(TokioResolver);

/// One server of an SRV record.
#[derive(Debug, Clone, PartialEq, Eq)]
struct SrvTarget {
    host: String,
    port: u16,
    priority: u16,
    weight: u32,
}

impl Resolver {
    pub(super) fn build(config: &config::ResolverConfig) -> Result<Self, String> {
        dns::resolver(&config.servers, config.timeout).map(Self)
    }

    async fn look_up_addresses(&self, name: &str) -> Result<(Vec<IpAddr>, Instant), String> {
        let answer = self.0.lookup_ip(name).await.map_err(|error| error.to_string())?;
        Ok((answer.iter().collect(), answer.valid_until()))
    }

    /// Returns the servers in the order of the answer. Records that differ only in priority or weight are separate servers.
    async fn look_up_srv(&self, name: &str) -> Result<(Vec<SrvTarget>, Instant), String> {
        let answer = self.0.srv_lookup(name).await.map_err(|error| error.to_string())?;
        let targets = answer.answers().iter().filter_map(|record| match &record.data {
            // RFC 2782: a target of "." means that the service does not exist.
            RData::SRV(srv) if !srv.target.is_root() => Some(SrvTarget {
                host: srv.target.to_ascii().trim_end_matches('.').to_ascii_lowercase(),
                port: srv.port,
                priority: srv.priority,
                weight: u32::from(srv.weight).max(1),
            }),
            _ => None,
        });
        Ok((targets.take(MAX_SRV_SERVERS).collect(), answer.valid_until()))
    }
}

/// Starts the lookups of a backend, which run until `stop`.
pub(super) fn start(
    resolver: &Resolver,
    backend: &Arc<Backend>,
    listeners: &ListenerAddresses,
    tasks: &TaskTracker,
    stop: &CancellationToken,
) {
    let discovery = Discovery { resolver: resolver.clone(), backend: backend.clone(), listeners: listeners.clone() };
    for (group_index, group) in backend.groups.iter().enumerate() {
        if let Some(srv_name) = group.srv_name.clone() {
            let (discovery, stop) = (discovery.clone(), stop.clone());
            tasks.spawn(async move { stop.run_until_cancelled(discovery.refresh_group(group_index, srv_name)).await });
        } else {
            for server in group.current() {
                let (discovery, stop) = (discovery.clone(), stop.clone());
                tasks.spawn(async move { stop.run_until_cancelled(discovery.refresh_server(server)).await });
            }
        }
    }
}

/// The lookups of a backend.
#[derive(Clone)]
struct Discovery {
    resolver: Resolver,
    backend: Arc<Backend>,
    listeners: ListenerAddresses,
}

impl Discovery {
    /// Keeps the addresses of a server with a name up to date.
    async fn refresh_server(self, server: Arc<Server>) {
        let Host::Name(name) = &server.host else { return };
        let mut schedule = RefreshSchedule::default();
        loop {
            let answer = self.resolver.look_up_addresses(name).await;
            match &answer {
                Ok((addresses, _)) => server.set_addresses(self.reject_own_listeners(addresses, &server)),
                Err(_) => server.stop_waiting_for_first_answer(),
            }
            schedule.wait(&self.backend.name, name, answer.map(|(_, valid_until)| valid_until)).await;
        }
    }

    /// Keeps the servers of an SRV record up to date.
    async fn refresh_group(self, group_index: usize, srv_name: String) {
        let group = &self.backend.groups[group_index];
        let mut schedule = RefreshSchedule::default();
        loop {
            let answer = self.look_up_group(group, &srv_name).await;
            if answer.is_err() {
                group.stop_waiting_for_first_answer();
            }
            schedule.wait(&self.backend.name, &srv_name, answer).await;
        }
    }

    /// Looks up an SRV record, and the addresses of its servers one after another. Returns when the answers expire.
    async fn look_up_group(&self, group: &ServerGroup, srv_name: &str) -> Result<Instant, String> {
        let (targets, mut valid_until) = self.resolver.look_up_srv(srv_name).await?;
        let known = group.current();
        let mut servers = Vec::with_capacity(targets.len());
        for target in targets {
            let server = self.reuse_or_create(group, srv_name, &target, &known);
            match self.resolver.look_up_addresses(&target.host).await {
                Ok((addresses, until)) => {
                    server.set_addresses(self.reject_own_listeners(&addresses, &server));
                    valid_until = valid_until.min(until);
                }
                Err(error) => {
                    tracing::warn!(
                        backend = %self.backend.name,
                        server = %server.name,
                        %error,
                        "cannot resolve a server of an SRV record; its last known addresses stay in use, if any"
                    );
                    server.stop_waiting_for_first_answer();
                    valid_until = valid_until.min(Instant::now() + MAX_RETRY);
                }
            }
            servers.push(server);
        }
        self.replace(group, servers);
        Ok(valid_until)
    }

    /// Returns the server of an SRV target: the known one if it has not changed, or a new one, which takes over the state of a
    /// known server with the same host and port.
    fn reuse_or_create(
        &self,
        group: &ServerGroup,
        srv_name: &str,
        target: &SrvTarget,
        known: &[Arc<Server>],
    ) -> Arc<Server> {
        let host = Host::Name(target.host.clone());
        let mut known_state = None;
        for server in known.iter().filter(|server| server.port == target.port && server.host == host) {
            if server.weight == target.weight && server.priority == target.priority {
                return server.clone();
            }
            known_state.get_or_insert_with(|| server.state.clone());
        }
        let name = format!("{}:{}", target.host, target.port);
        let state = known_state.unwrap_or_else(|| {
            let (metrics, state_override) = (self.backend.server_metrics(&name), self.backend.state_override(&name));
            ServerState::new(&host, target.port, metrics, state_override)
        });
        Arc::new(Server {
            name: name.into(),
            backend: self.backend.name.clone(),
            host,
            port: target.port,
            weight: target.weight,
            priority: target.priority,
            tls_name: tls_name(srv_name),
            settings: group.settings,
            state,
        })
    }

    /// Publishes the servers of an SRV record.
    fn replace(&self, group: &ServerGroup, servers: Vec<Arc<Server>>) {
        for old in group.current() {
            if !servers.iter().any(|server| server.name == old.name) {
                tracing::info!(backend = %self.backend.name, server = %old.name, "server removed: no longer in the SRV record");
                self.backend.forget_server(&old.name);
            }
        }
        for server in &servers {
            server.update_gauges();
        }
        group.replace(servers);
    }

    /// Returns `addresses` without those of our own listeners, which are logged and counted as failures.
    fn reject_own_listeners(&self, addresses: &[IpAddr], server: &Server) -> Vec<SocketAddr> {
        let all = addresses.iter().map(|ip| SocketAddr::new(*ip, server.port));
        let (ours, others): (Vec<_>, Vec<_>) = all.partition(|address| self.listeners.contains(*address));
        if !ours.is_empty() {
            self.backend.metrics.failure(Reason::Loop);
            let ours = ours.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
            tracing::error!(server = %server.name, ours, "DNS resolves this server to a listener of this proxy; the address is ignored to avoid a loop");
        }
        others
    }
}

/// The name for which the certificate of an SRV record's server must be valid: see `tls::upstream`.
fn tls_name(srv_name: &str) -> ServerName<'static> {
    // The configuration has validated the name. The fallback 0.0.0.0 matches no certificate, so that TLS would fail.
    ServerName::try_from(service_domain(srv_name).to_owned())
        .unwrap_or_else(|_| ServerName::from(IpAddr::from([0, 0, 0, 0])))
}

/// The domain of a service name: `example.org` for `_imap._tcp.example.org`.
fn service_domain(service: &str) -> &str {
    let mut rest = service;
    while let Some((_, parent)) = rest.split_once('.').filter(|(label, _)| label.starts_with('_')) {
        rest = parent;
    }
    rest.trim_end_matches('.')
}

/// When DNS is queried again: when the answer expires, or after a failure with exponential backoff.
#[derive(Default)]
struct RefreshSchedule {
    failures: u32,
}

impl RefreshSchedule {
    async fn wait(&mut self, backend: &str, name: &str, answer: Result<Instant, String>) {
        let pause = match answer {
            Ok(valid_until) => {
                self.failures = 0;
                valid_until.saturating_duration_since(Instant::now()).clamp(MIN_REFRESH, MAX_REFRESH)
            }
            Err(error) => {
                if self.failures == 0 {
                    tracing::warn!(%backend, %name, %error, "DNS lookup failed; the last good answer stays in use, if any; retrying");
                }
                // The bound only prevents an overflow of the shift.
                let pause = FIRST_RETRY.saturating_mul(1 << self.failures.min(10)).min(MAX_RETRY);
                self.failures += 1;
                pause
            }
        };
        tokio::time::sleep(pause).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn service_domain_is_the_name_without_service_labels() {
        assert_eq!(service_domain("_imap._tcp.shard-a.internal"), "shard-a.internal");
        assert_eq!(service_domain("_imaps._tcp.example.org."), "example.org");
        assert_eq!(service_domain("example.org"), "example.org");
    }
}
