//! Which addresses exist: names become addresses through DNS, in the background.
//!
//! One resolver serves the process. Each server with a name, and each SRV entry, has one task that asks, publishes the
//! answer, and sleeps until its time to live is over. A login never waits for DNS but before the very first answer. When
//! DNS fails, the last good answer stays in use. Answers are untrusted: an address that leads back to one of our own
//! listeners is left out, and the number of servers an SRV record may name is bounded.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use hickory_resolver::TokioResolver;
use hickory_resolver::proto::rr::RData;
use tokio_util::sync::CancellationToken;

use super::{Backend, Server};
use crate::config::{self, Host, is_local};
use crate::failure::Reason;
use crate::lookup::dns;

/// An SRV answer may name this many servers; further ones are ignored.
const MAX_SERVICES: usize = 64;
/// A shorter time to live would ask DNS more than once a second.
const SHORTEST_REFRESH: Duration = Duration::from_secs(1);
/// A longer one would miss a change for more than an hour.
const LONGEST_REFRESH: Duration = Duration::from_secs(3600);
/// After a failure, doubling from the first to the last.
const RETRY: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(30)];

/// The process's way to DNS.
#[derive(Debug, Clone)]
pub(super) struct Resolver(TokioResolver);

/// One line of an SRV answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Service {
    pub(super) target: String,
    pub(super) port: u16,
    pub(super) priority: u16,
    pub(super) weight: u32,
}

impl Resolver {
    /// See [`dns::resolver`].
    pub(super) fn build(config: &config::ResolverConfig) -> Result<Self, String> {
        dns::resolver(&config.servers, config.timeout).map(Self)
    }

    async fn addresses(&self, name: &str) -> Result<(Vec<IpAddr>, Instant), String> {
        let answer = self.0.lookup_ip(name).await.map_err(|error| error.to_string())?;
        Ok((answer.iter().collect(), answer.valid_until()))
    }

    async fn services(&self, name: &str) -> Result<(Vec<Service>, Instant), String> {
        let answer = self.0.srv_lookup(name).await.map_err(|error| error.to_string())?;
        let services = answer.answers().iter().filter_map(|record| match &record.data {
            // RFC 2782: a target of "." says that the service does not exist.
            RData::SRV(srv) if !srv.target.is_root() => Some(Service {
                target: srv.target.to_ascii().trim_end_matches('.').to_ascii_lowercase(),
                port: srv.port,
                priority: srv.priority,
                weight: u32::from(srv.weight).max(1),
            }),
            _ => None,
        });
        Ok((services.take(MAX_SERVICES).collect(), answer.valid_until()))
    }
}

/// Addresses that would lead a connection back to ourselves.
#[derive(Debug, Clone, Default)]
pub struct OwnAddresses(Arc<Vec<SocketAddr>>);

impl OwnAddresses {
    /// `listeners` as bound.
    pub fn new(listeners: Vec<SocketAddr>) -> Self {
        Self(Arc::new(listeners))
    }

    /// Whether one of our listeners answers there.
    pub fn contains(&self, address: SocketAddr) -> bool {
        let ip = address.ip().to_canonical();
        self.0.iter().any(|own| {
            own.port() == address.port() && (own.ip().to_canonical() == ip || own.ip().is_unspecified() && is_local(ip))
        })
    }
}

/// Keeps the addresses of a server with a name up to date until `stop`.
pub(super) async fn follow_server(
    resolver: Resolver,
    backend: Arc<Backend>,
    server: Arc<Server>,
    own: OwnAddresses,
    stop: CancellationToken,
) {
    let Host::Name(name) = &server.host else { return };
    let mut schedule = Schedule::default();
    let keep = async {
        loop {
            let answer = resolver.addresses(name).await;
            if let Ok((addresses, _)) = &answer {
                server.publish(own_left_out(addresses, &backend, &server, &own));
            } else {
                server.publish_if_first();
            }
            schedule.wait(name, answer.map(|(_, until)| until)).await;
        }
    };
    stop.run_until_cancelled(keep).await;
}

/// Keeps the servers behind an SRV name up to date until `stop`.
pub(super) async fn follow_service(
    resolver: Resolver,
    backend: Arc<Backend>,
    group: usize,
    own: OwnAddresses,
    stop: CancellationToken,
) {
    let Some(name) = backend.groups[group].service.clone() else { return };
    let mut schedule = Schedule::default();
    let keep = async {
        loop {
            let answer = refresh_service(&resolver, &backend, group, &name, &own).await;
            if answer.is_err() {
                backend.groups[group].publish_if_first();
            }
            schedule.wait(&name, answer).await;
        }
    };
    stop.run_until_cancelled(keep).await;
}

/// Asks for the services and the addresses of each; says until when the answer holds.
async fn refresh_service(
    resolver: &Resolver,
    backend: &Backend,
    group: usize,
    name: &str,
    own: &OwnAddresses,
) -> Result<Instant, String> {
    let (services, mut until) = resolver.services(name).await?;
    let known = backend.groups[group].current();
    let mut servers = Vec::with_capacity(services.len());
    for service in services {
        let same = |server: &&Arc<Server>| {
            server.port == service.port
                && server.weight == service.weight
                && server.priority == service.priority
                && matches!(&server.host, Host::Name(host) if *host == service.target)
        };
        let server = match known.iter().find(same) {
            Some(server) => server.clone(),
            None => {
                // Of the same server with another weight everything is known already.
                let is_it = |server: &&Arc<Server>| {
                    server.port == service.port && server.host == Host::Name(service.target.clone())
                };
                let state = known.iter().find(is_it).map(|server| server.state.clone());
                Arc::new(backend.discovered(&backend.groups[group], name, &service, state))
            }
        };
        match resolver.addresses(&service.target).await {
            Ok((addresses, valid)) => {
                server.publish(own_left_out(&addresses, backend, &server, own));
                until = until.min(valid);
            }
            Err(error) => {
                tracing::warn!(server = %server.name, %error, "no address for a server that an SRV record names");
                server.publish_if_first();
                until = until.min(Instant::now() + RETRY[1]);
            }
        }
        servers.push(server);
    }
    backend.replace(group, servers);
    Ok(until)
}

fn own_left_out(addresses: &[IpAddr], backend: &Backend, server: &Server, own: &OwnAddresses) -> Vec<SocketAddr> {
    let all = addresses.iter().map(|ip| SocketAddr::new(*ip, server.port));
    let (ours, theirs): (Vec<_>, Vec<_>) = all.partition(|address| own.contains(*address));
    if !ours.is_empty() {
        backend.metrics.failure(Reason::Loop);
        tracing::error!(server = %server.name, ?ours, "DNS points a server at our own listener: address left out");
    }
    theirs
}

/// When to ask again: when the answer's time is over, or a while after a failure.
#[derive(Default)]
struct Schedule {
    failures: u32,
}

impl Schedule {
    async fn wait(&mut self, name: &str, answer: Result<Instant, String>) {
        let pause = match answer {
            Ok(until) => {
                self.failures = 0;
                until.saturating_duration_since(Instant::now()).clamp(SHORTEST_REFRESH, LONGEST_REFRESH)
            }
            Err(error) => {
                if self.failures == 0 {
                    tracing::warn!(%name, %error, "DNS has no answer; the last good one stays in use");
                }
                let pause = RETRY[0].saturating_mul(1 << self.failures.min(10)).min(RETRY[1]);
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
    fn own_addresses_are_recognised() {
        let own = OwnAddresses::new(vec!["0.0.0.0:143".parse().unwrap(), "127.0.0.1:993".parse().unwrap()]);
        for ours in ["127.0.0.1:143", "127.0.0.2:143", "127.0.0.1:993", "[::ffff:127.0.0.1]:993"] {
            assert!(own.contains(ours.parse().unwrap()), "{ours}");
        }
        // 192.0.2.0/24 is for documentation: no machine has it.
        for other in ["192.0.2.1:143", "127.0.0.1:144", "127.0.0.2:993"] {
            assert!(!own.contains(other.parse().unwrap()), "{other}");
        }
    }
}
