//! Resolves the names of servers and SRV records in the background.
//!
//! One resolver serves the process. Each server with a name and each SRV record has one task that queries DNS, publishes
//! the answer, and sleeps until its time to live is over. A login waits for DNS only before the first answer. If DNS fails,
//! the last good answer stays in use. Answers are untrusted: an address of one of our own listeners is left out, and the
//! number of servers of an SRV record is bounded.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use hickory_resolver::TokioResolver;
use hickory_resolver::proto::rr::RData;
use tokio_rustls::rustls::pki_types::ServerName;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::server::ServerState;
use super::server_group::ServerGroup;
use super::{Backend, Server};
use crate::config::{self, Host, is_local};
use crate::failure::Reason;
use crate::lookup::dns;

/// Maximum number of servers of an SRV record; further ones are ignored.
const MAX_SRV_SERVERS: usize = 64;
/// Minimum time between two queries, however short the time to live is.
const MIN_REFRESH: Duration = Duration::from_secs(1);
/// Maximum time between two queries, so that a change is noticed within an hour.
const MAX_REFRESH: Duration = Duration::from_secs(3600);
/// Time until a failed query is repeated, which doubles up to [`MAX_RETRY`].
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

    async fn addresses(&self, name: &str) -> Result<(Vec<IpAddr>, Instant), String> {
        let answer = self.0.lookup_ip(name).await.map_err(|error| error.to_string())?;
        Ok((answer.iter().collect(), answer.valid_until()))
    }

    async fn srv_targets(&self, name: &str) -> Result<(Vec<SrvTarget>, Instant), String> {
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

/// Addresses of our own listeners, to which no server name may resolve.
#[derive(Debug, Clone, Default)]
pub struct ListenerAddresses(Arc<Vec<SocketAddr>>);

impl ListenerAddresses {
    /// The addresses of all listeners, as bound.
    pub fn new(listeners: Vec<SocketAddr>) -> Self {
        Self(Arc::new(listeners))
    }

    /// Whether one of the listeners receives connections to `address`.
    pub fn contains(&self, address: SocketAddr) -> bool {
        let ip = address.ip().to_canonical();
        self.0.iter().any(|own| {
            own.port() == address.port() && (own.ip().to_canonical() == ip || own.ip().is_unspecified() && is_local(ip))
        })
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
    for index in 0..backend.groups.len() {
        let lookup = Lookup { resolver: resolver.clone(), backend: backend.clone(), listeners: listeners.clone() };
        let group = &backend.groups[index];
        if let Some(name) = group.srv_name.clone() {
            let stop = stop.clone();
            tasks.spawn(async move { stop.run_until_cancelled(lookup.refresh_group(index, name)).await });
            continue;
        }
        for server in group.current() {
            let (lookup, stop) = (lookup.clone(), stop.clone());
            tasks.spawn(async move { stop.run_until_cancelled(lookup.refresh_server(server)).await });
        }
    }
}

/// What every lookup of a backend needs.
#[derive(Clone)]
struct Lookup {
    resolver: Resolver,
    backend: Arc<Backend>,
    listeners: ListenerAddresses,
}

impl Lookup {
    /// Keeps the addresses of a server with a name up to date.
    async fn refresh_server(self, server: Arc<Server>) {
        let Host::Name(name) = &server.host else { return };
        let mut schedule = RefreshSchedule::default();
        loop {
            let answer = self.resolver.addresses(name).await;
            match &answer {
                Ok((addresses, _)) => server.set_addresses(self.without_listeners(addresses, &server)),
                Err(_) => server.first_lookup_failed(),
            }
            schedule.wait(name, answer.map(|(_, valid_until)| valid_until)).await;
        }
    }

    /// Keeps the servers of an SRV record up to date.
    async fn refresh_group(self, group: usize, name: String) {
        let group = &self.backend.groups[group];
        let mut schedule = RefreshSchedule::default();
        loop {
            let answer = self.look_up_group(group, &name).await;
            if answer.is_err() {
                group.first_lookup_failed();
            }
            schedule.wait(&name, answer).await;
        }
    }

    /// Looks up an SRV record and the addresses of its servers. Returns how long the answer is valid.
    async fn look_up_group(&self, group: &ServerGroup, name: &str) -> Result<Instant, String> {
        let (targets, mut valid_until) = self.resolver.srv_targets(name).await?;
        let known = group.current();
        let mut servers = Vec::with_capacity(targets.len());
        for target in targets {
            let server = self.server(group, name, &target, &known);
            match self.resolver.addresses(&target.host).await {
                Ok((addresses, until)) => {
                    server.set_addresses(self.without_listeners(&addresses, &server));
                    valid_until = valid_until.min(until);
                }
                Err(error) => {
                    tracing::warn!(server = %server.name, %error, "no address for a server that an SRV record names");
                    server.first_lookup_failed();
                    valid_until = valid_until.min(Instant::now() + MAX_RETRY);
                }
            }
            servers.push(server);
        }
        self.replace(group, servers);
        Ok(valid_until)
    }

    /// The server of an SRV target: one of `known` if it has not changed, else a new one with the state of the known one.
    fn server(&self, group: &ServerGroup, srv_name: &str, target: &SrvTarget, known: &[Arc<Server>]) -> Arc<Server> {
        let host = Host::Name(target.host.clone());
        let same: Vec<_> = known.iter().filter(|server| server.port == target.port && server.host == host).collect();
        let is_unchanged =
            |server: &&&Arc<Server>| server.weight == target.weight && server.priority == target.priority;
        if let Some(server) = same.iter().find(|server| is_unchanged(server)) {
            return Arc::clone(server);
        }
        let name = format!("{}:{}", target.host, target.port);
        let new = || {
            let (metrics, state_override) = (self.backend.server_metrics(&name), self.backend.state_override(&name));
            ServerState::new(&host, target.port, metrics, state_override)
        };
        let state = same.first().map_or_else(new, |server| server.state.clone());
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
                tracing::info!(backend = %self.backend.name, server = %old.name, "server is gone from DNS");
                self.backend.forget_server(&old.name);
            }
        }
        for server in &servers {
            server.update_gauges();
        }
        group.replace(servers);
    }

    fn without_listeners(&self, addresses: &[IpAddr], server: &Server) -> Vec<SocketAddr> {
        let all = addresses.iter().map(|ip| SocketAddr::new(*ip, server.port));
        let (ours, others): (Vec<_>, Vec<_>) = all.partition(|address| self.listeners.contains(*address));
        if !ours.is_empty() {
            self.backend.metrics.failure(Reason::Loop);
            let ours = ours.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
            tracing::error!(server = %server.name, ours, "DNS points a server at our own listener: address left out");
        }
        others
    }
}

/// The name for which the certificate of an SRV record's server must be valid: see `tls::upstream`.
fn tls_name(srv_name: &str) -> ServerName<'static> {
    // The configuration has checked that it is a name. Otherwise no certificate would be valid for this address.
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

/// When DNS is queried again: when the answer's time to live is over, or some time after a failure.
#[derive(Default)]
struct RefreshSchedule {
    failures: u32,
}

impl RefreshSchedule {
    async fn wait(&mut self, name: &str, answer: Result<Instant, String>) {
        let pause = match answer {
            Ok(valid_until) => {
                self.failures = 0;
                valid_until.saturating_duration_since(Instant::now()).clamp(MIN_REFRESH, MAX_REFRESH)
            }
            Err(error) => {
                if self.failures == 0 {
                    tracing::warn!(%name, %error, "DNS has no answer; the last good one stays in use");
                }
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
    fn listener_addresses_contain_all_addresses_of_a_wildcard() {
        let own = ListenerAddresses::new(vec!["0.0.0.0:143".parse().unwrap(), "127.0.0.1:993".parse().unwrap()]);
        for ours in ["127.0.0.1:143", "127.0.0.2:143", "127.0.0.1:993", "[::ffff:127.0.0.1]:993"] {
            assert!(own.contains(ours.parse().unwrap()), "{ours}");
        }
        // 192.0.2.0/24 is reserved for documentation, so no machine has it.
        for other in ["192.0.2.1:143", "127.0.0.1:144", "127.0.0.2:993"] {
            assert!(!own.contains(other.parse().unwrap()), "{other}");
        }
    }

    #[test]
    fn service_domain_is_the_name_without_service_labels() {
        assert_eq!(service_domain("_imap._tcp.shard-a.internal"), "shard-a.internal");
        assert_eq!(service_domain("_imaps._tcp.example.org."), "example.org");
        assert_eq!(service_domain("example.org"), "example.org");
    }
}
