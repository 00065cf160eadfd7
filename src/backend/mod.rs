//! The mailbox servers: which exist, which is alive, which comes first for a user, and how to log in there.
//!
//! A backend is a named set of equivalent servers, from the configuration or from an SRV record. This room does not
//! know why a user belongs to a backend (`route` does) and speaks to no client. Called by `server`, which builds and
//! starts it, and by `session` for each login.

pub mod connect;
mod discover;
mod health;
mod proxy_header;
mod select;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use tokio::sync::watch;
use tokio_rustls::rustls::pki_types::ServerName;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub use self::discover::OwnAddresses;
use self::discover::Resolver;
use self::health::Health;
use self::select::Candidate;
use crate::config::{self, BackendId, ClientInfo, Config, Host, Problem, TlsMode, Trust};
use crate::metrics::{Metrics, ServerMetrics};
use crate::tls::client::ClientTls;

/// Undeclared servers that routes may name, a backend. Each is a label of metrics.
const MAX_GUESTS: usize = 256;

/// All backends of one configuration.
#[derive(Debug)]
pub struct Backends {
    list: Vec<Arc<Backend>>,
    resolver: Option<Resolver>,
}

impl Backends {
    /// Builds everything; connects to nothing and asks DNS nothing yet.
    ///
    /// # Errors
    /// All problems: `ca` files, server names, a system without resolver configuration.
    pub fn build(config: &Config, metrics: &Arc<Metrics>) -> Result<Self, Vec<Problem>> {
        let mut problems = Vec::new();
        let mut list = Vec::new();
        for (index, backend) in config.backends.iter().enumerate() {
            match Backend::build(config, backend, BackendId(index), metrics.clone()) {
                Ok(backend) => list.push(Arc::new(backend)),
                Err(problem) => problems.push(problem),
            }
        }
        let resolver = if list.iter().any(|backend| backend.needs_dns()) {
            Resolver::build(&config.resolver)
                .map_err(|error| {
                    let place = &config.backends[0].place;
                    problems.push(
                        config.problem(place, format!("servers are given by name, but DNS cannot be used: {error}")),
                    );
                })
                .ok()
        } else {
            None
        };
        if problems.is_empty() { Ok(Self { list, resolver }) } else { Err(problems) }
    }

    /// Begins to resolve names, until `stop`.
    pub fn start(&self, own: &OwnAddresses, tasks: &TaskTracker, stop: &CancellationToken) {
        let Some(resolver) = &self.resolver else { return };
        for backend in &self.list {
            for (index, group) in backend.groups.iter().enumerate() {
                if group.service.is_some() {
                    let service =
                        discover::follow_service(resolver.clone(), backend.clone(), index, own.clone(), stop.clone());
                    tasks.spawn(service);
                    continue;
                }
                for server in group.current() {
                    tasks.spawn(discover::follow_server(
                        resolver.clone(),
                        backend.clone(),
                        server,
                        own.clone(),
                        stop.clone(),
                    ));
                }
            }
        }
    }

    /// The backend a route named: ids come from the same configuration.
    pub fn backend(&self, id: BackendId) -> &Arc<Backend> {
        &self.list[id.0]
    }
}

/// A named set of equivalent servers.
#[derive(Debug)]
pub struct Backend {
    /// As configured.
    pub name: Arc<str>,
    /// Its place in the configuration.
    pub id: BackendId,
    /// TLS towards the servers, and how it begins.
    tls: Option<ClientTls>,
    mode: TlsMode,
    /// What servers learn of the client.
    client_info: ClientInfo,
    /// Whether a client may ask for another user's mailbox.
    pub allows_authzid: bool,
    groups: Vec<Group>,
    /// Servers that a route names by their addresses.
    guests: Mutex<HashMap<SocketAddr, Arc<Server>>>,
    metrics: Arc<Metrics>,
}

impl Backend {
    fn build(
        config: &Config,
        backend: &config::Backend,
        id: BackendId,
        metrics: Arc<Metrics>,
    ) -> Result<Self, Problem> {
        let tls = ClientTls::build(config, backend)?;
        let own = metrics.backend(id.0);
        own.set_insecure(backend.tls.mode != TlsMode::None && matches!(backend.tls.trust, Trust::Insecure));
        let mut fixed = Vec::new();
        let mut groups = Vec::new();
        for server in &backend.servers {
            match server {
                config::Server::Srv { name, .. } => groups.push(Group::service(name.clone())),
                config::Server::Address { name, host, port, weight, place } => {
                    let tls_name = tls_name(host).map_err(|message| config.problem(place, message))?;
                    fixed.push(Arc::new(Server::new(
                        name.clone(),
                        host.clone(),
                        *port,
                        *weight,
                        0,
                        tls_name,
                        own.server(name),
                    )));
                }
            }
        }
        groups.push(Group::fixed(fixed));
        Ok(Self {
            name: backend.name.as_str().into(),
            id,
            tls,
            mode: backend.tls.mode,
            client_info: backend.client_info,
            allows_authzid: backend.authzid,
            groups,
            guests: Mutex::default(),
            metrics,
        })
    }

    /// The servers to try for `user`, in order; waits for DNS only while it has never answered.
    pub async fn candidates(&self, user: &str) -> Vec<Arc<Server>> {
        let mut servers = Vec::new();
        for group in &self.groups {
            servers.extend(group.first_known().await);
        }
        let now = Instant::now();
        let candidates: Vec<Candidate<'_>> = servers.iter().map(|server| server.candidate(now)).collect();
        select::order(user, &candidates).into_iter().map(|index| servers[index].clone()).collect()
    }

    /// A server that is not declared, which a route's configuration allows. `None`: [`MAX_GUESTS`] of them have sessions.
    pub fn at(&self, address: SocketAddr) -> Option<Arc<Server>> {
        let mut guests = self.guests.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = guests.get(&address) {
            return Some(known.clone());
        }
        let own = self.metrics.backend(self.id.0);
        if guests.len() >= MAX_GUESTS {
            guests.retain(|_, server| {
                let in_use = Arc::strong_count(server) > 1 || server.metrics.sessions() > 0;
                if !in_use {
                    own.forget_server(&server.name);
                }
                in_use
            });
        }
        if guests.len() >= MAX_GUESTS {
            tracing::error!(backend = %self.name, %address, "a route names more servers than {MAX_GUESTS} at a time");
            return None;
        }
        let (name, host) = (address.to_string(), Host::Ip(address.ip()));
        let (tls_name, metrics) = (ServerName::from(address.ip()), own.server(&name));
        let server = Arc::new(Server::new(name, host, address.port(), 1, 0, tls_name, metrics));
        guests.insert(address, server.clone());
        Some(server)
    }

    fn needs_dns(&self) -> bool {
        self.groups.iter().any(|group| {
            group.service.is_some() || group.current().iter().any(|server| matches!(server.host, Host::Name(_)))
        })
    }

    /// A server that an SRV record names. Its certificate must be for the domain that was asked for: see `tls::client`.
    fn discovered(&self, service: &str, target: &str, port: u16, priority: u16, weight: u32) -> Server {
        let name = format!("{target}:{port}");
        // The configuration was checked: it is a name. Were it none, no certificate would be for this address.
        let tls_name = ServerName::try_from(service_domain(service).to_owned())
            .unwrap_or_else(|_| ServerName::from(std::net::IpAddr::from([0, 0, 0, 0])));
        let metrics = self.metrics.backend(self.id.0).server(&name);
        Server::new(name, Host::Name(target.to_owned()), port, weight, priority, tls_name, metrics)
    }

    /// The servers of an SRV entry are now these.
    fn replace(&self, group: usize, servers: Vec<Arc<Server>>) {
        for old in self.groups[group].current() {
            if !servers.iter().any(|server| server.name == old.name) {
                tracing::info!(backend = %self.name, server = %old.name, "server is gone from DNS");
                self.metrics.backend(self.id.0).forget_server(&old.name);
            }
        }
        self.groups[group].servers.send_replace(Some(servers));
    }
}

/// Servers that come and go together: the fixed ones, or those of one SRV entry.
#[derive(Debug)]
struct Group {
    service: Option<String>,
    /// `None` until DNS answered or failed for the first time.
    servers: watch::Sender<Option<Vec<Arc<Server>>>>,
}

impl Group {
    fn fixed(servers: Vec<Arc<Server>>) -> Self {
        Self { service: None, servers: watch::Sender::new(Some(servers)) }
    }

    fn service(name: String) -> Self {
        Self { service: Some(name), servers: watch::Sender::new(None) }
    }

    fn current(&self) -> Vec<Arc<Server>> {
        self.servers.borrow().clone().unwrap_or_default()
    }

    async fn first_known(&self) -> Vec<Arc<Server>> {
        first_known(&self.servers).await
    }

    fn publish_if_first(&self) {
        publish_if_first(&self.servers);
    }
}

/// One mailbox server.
#[derive(Debug)]
pub struct Server {
    /// As configured, or `target:port` of an SRV record: the label of metrics and logs.
    pub name: Arc<str>,
    host: Host,
    port: u16,
    weight: u32,
    priority: u16,
    tls_name: ServerName<'static>,
    /// `None` until DNS answered or failed for the first time.
    addresses: watch::Sender<Option<Vec<SocketAddr>>>,
    health: Mutex<Health>,
    /// Its gauges.
    pub metrics: ServerMetrics,
}

impl Server {
    fn new(
        name: String,
        host: Host,
        port: u16,
        weight: u32,
        priority: u16,
        tls_name: ServerName<'static>,
        metrics: ServerMetrics,
    ) -> Self {
        let addresses = match &host {
            Host::Ip(ip) => Some(vec![SocketAddr::new(*ip, port)]),
            Host::Name(_) => None,
        };
        let addresses = watch::Sender::new(addresses);
        let name = name.into();
        Self { name, host, port, weight, priority, tls_name, addresses, health: Mutex::default(), metrics }
    }

    /// Its addresses, the one that answered last in front; waits for DNS only while it has never answered.
    pub async fn addresses(&self) -> Vec<SocketAddr> {
        first_known(&self.addresses).await
    }

    /// Whether it comes before failing servers just now.
    pub fn is_available(&self) -> bool {
        self.health().is_available(Instant::now())
    }

    /// A session could not use it.
    fn failed(&self, error: &str) {
        if self.health().failed(Instant::now()) {
            tracing::warn!(server = %self.name, %error, "server is failing and passed over for a while");
        }
        self.metrics.set_up(false);
    }

    /// It answered a login, whichever way.
    fn answered(&self) {
        if self.health().answered() {
            tracing::info!(server = %self.name, "server answers again");
            self.metrics.set_up(true);
        }
    }

    /// `address` answered: it is tried first from now on.
    fn prefer(&self, address: SocketAddr) {
        self.addresses.send_if_modified(|known| match known {
            Some(known) if known.first() != Some(&address) => {
                known.sort_by_key(|other| *other != address);
                true
            }
            _ => false,
        });
    }

    fn publish(&self, addresses: Vec<SocketAddr>) {
        let first = self.addresses.borrow().as_ref().and_then(|known| known.first().copied());
        self.addresses.send_replace(Some(addresses));
        if let Some(first) =
            first.filter(|first| self.addresses.borrow().as_ref().is_some_and(|now| now.contains(first)))
        {
            self.prefer(first);
        }
    }

    fn publish_if_first(&self) {
        publish_if_first(&self.addresses);
    }

    fn candidate(&self, now: Instant) -> Candidate<'_> {
        Candidate {
            name: &self.name,
            weight: self.weight,
            priority: self.priority,
            available: self.health().is_available(now),
        }
    }

    fn health(&self) -> std::sync::MutexGuard<'_, Health> {
        // A panic elsewhere leaves two plain fields behind, which are valid whatever they hold.
        self.health.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn tls_name(host: &Host) -> Result<ServerName<'static>, String> {
    match host {
        Host::Ip(ip) => Ok(ServerName::from(*ip)),
        Host::Name(name) => ServerName::try_from(name.clone()).map_err(|_| format!("{name:?} is not a host name")),
    }
}

/// `_imap._tcp.example.org` asks about `example.org`.
fn service_domain(service: &str) -> &str {
    let mut rest = service;
    while let Some((label, parent)) = rest.split_once('.').filter(|(label, _)| label.starts_with('_')) {
        debug_assert!(label.starts_with('_'));
        rest = parent;
    }
    rest.trim_end_matches('.')
}

async fn first_known<T: Clone>(published: &watch::Sender<Option<Vec<T>>>) -> Vec<T> {
    let known = published.subscribe().wait_for(Option::is_some).await.map(|known| known.clone());
    // The sender is ours, so the channel is open, and what was waited for is there.
    known.ok().flatten().unwrap_or_default()
}

fn publish_if_first<T>(published: &watch::Sender<Option<Vec<T>>>) {
    published.send_if_modified(|known| known.is_none().then(|| *known = Some(Vec::new())).is_some());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_domain_of_a_service() {
        assert_eq!(service_domain("_imap._tcp.shard-a.internal"), "shard-a.internal");
        assert_eq!(service_domain("_imaps._tcp.example.org."), "example.org");
        assert_eq!(service_domain("example.org"), "example.org");
    }
}
