//! The mailbox servers: which exist, which are alive, which comes first for a user, and how to log in there.
//!
//! A backend is a named set of equivalent servers, from the configuration or from an SRV record. This module does not know
//! why a user belongs to a backend, which `route` decides, and it does not communicate with clients.

mod build;
mod capacity;
mod credentials;
mod dial;
mod dialogue;
mod disconnect_spreader;
mod discovery;
mod failover;
pub(crate) mod fault;
mod first_value;
mod health;
mod health_checker;
mod id_fields;
mod listener_addresses;
pub(crate) mod login;
mod offer;
mod probe;
mod random;
pub(crate) mod request;
mod select;
mod server;
mod server_group;
mod source_addresses;
pub(crate) mod state_override;
mod tls_faults;
mod undeclared_servers;

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use self::capacity::QueueLength;
pub use self::credentials::ProxyCredentials;
use self::discovery::Resolver;
pub use self::failover::{Failover, NextServer};
use self::health_checker::CheckSettings;
pub use self::listener_addresses::ListenerAddresses;
use self::random::random_fraction;
use self::select::{Candidate, SelectionState};
pub use self::server::{DelayedDisconnect, LastError, Server, ServerPermit, SessionPermit};
use self::server_group::ServerGroup;
use self::source_addresses::SourceAddresses;
use self::state_override::{OverrideCell, StateOverrides};
pub use self::tls_faults::TlsFault;
use self::undeclared_servers::UndeclaredServers;
use crate::config::{self, BackendId, Balance, ClientInfo, Limits, TlsMode};
use crate::metrics::{Metrics, ServerMetrics};
use crate::protocol::imap::capability::ServerCapabilities;
use crate::tls::upstream::UpstreamTls;

/// All backends of one configuration.
#[derive(Debug)]
pub struct Backends {
    list: Vec<Arc<Backend>>,
    resolver: Option<Resolver>,
    /// The common [`ServerCapabilities`] of all servers: see [`offer::pack`].
    offer: AtomicU64,
    state_overrides: StateOverrides,
}

impl Backends {
    /// Starts the checks of servers, which run until `stop`.
    pub fn start_checks(self: &Arc<Self>, limits: &Arc<Limits>, tasks: &TaskTracker, stop: &CancellationToken) {
        for backend in &self.list {
            let Some(settings) = backend.check_settings.clone() else { continue };
            let checks = health_checker::run_checks(self.clone(), backend.clone(), settings, limits.clone());
            let stop = stop.clone();
            tasks.spawn(async move { stop.run_until_cancelled(checks).await });
        }
    }

    /// Starts the lookups of server names, which run until `stop`. A server's address that is one of our own `listeners` is
    /// not used.
    pub fn start_discovery(&self, listeners: &ListenerAddresses, tasks: &TaskTracker, stop: &CancellationToken) {
        self.update_gauges();
        if let Some(resolver) = &self.resolver {
            for backend in &self.list {
                discovery::start(resolver, backend, listeners, tasks, stop);
            }
        }
    }

    /// The declared server that a referral names, and its backend.
    pub fn find(&self, host: &str, port: u16) -> Option<(&Arc<Backend>, Arc<Server>)> {
        self.list.iter().find_map(|backend| {
            let mut servers = backend.groups.iter().flat_map(ServerGroup::current);
            servers.find(|server| server.port == port && server.is_at(host)).map(|server| (backend, server))
        })
    }

    /// What clients are offered before login: mechanisms and extensions that all servers have, as far as they are known.
    pub fn offer(&self) -> ServerCapabilities {
        offer::unpack(self.offer.load(Ordering::Relaxed))
    }

    fn update_offer(&self) {
        let backends = self.list.iter().map(|backend| offer::BackendOffers {
            has_credentials: backend.credentials.is_some(),
            servers: backend
                .groups
                .iter()
                .flat_map(ServerGroup::current)
                .filter_map(|server| server.capabilities())
                .collect(),
        });
        self.offer.store(offer::pack(offer::common(backends)), Ordering::Relaxed);
    }

    /// Whether any backend allows a client to log in on behalf of another user.
    pub fn any_allows_authzid(&self) -> bool {
        self.list.iter().any(|backend| backend.allows_authzid)
    }

    /// Whether any backend allows an empty password.
    pub fn any_allows_empty_passwords(&self) -> bool {
        self.list.iter().any(|backend| backend.allows_empty_passwords())
    }

    /// The backend with this name.
    pub fn named(&self, name: &str) -> Option<&Arc<Backend>> {
        self.list.iter().find(|backend| &*backend.name == name)
    }

    /// All backends, in the order of the configuration.
    pub fn list(&self) -> &[Arc<Backend>] {
        &self.list
    }

    /// The backend with this id, which must come from the same configuration.
    pub fn backend(&self, id: BackendId) -> &Arc<Backend> {
        &self.list[id.0]
    }

    /// Removes the metrics of servers that `successor` does not have.
    pub fn remove_stale_metrics(&self, successor: &Self) {
        for backend in &self.list {
            let remaining = successor.named(&backend.name).map(|backend| backend.servers()).unwrap_or_default();
            for server in backend.servers() {
                if !remaining.iter().any(|other| other.name == server.name) {
                    backend.forget_server(&server.name);
                }
            }
        }
    }

    /// The states that operators have set; shared with the previous and the next configuration.
    pub fn state_overrides(&self) -> &StateOverrides {
        &self.state_overrides
    }

    /// Updates the gauges of all servers after administrative states have changed.
    pub fn update_gauges(&self) {
        for server in self.list.iter().flat_map(|backend| backend.servers()) {
            server.update_gauges();
        }
    }
}

/// A named set of equivalent servers.
#[derive(Debug)]
pub struct Backend {
    /// Name in the configuration.
    pub name: Arc<str>,
    /// Position in the configuration.
    pub id: BackendId,
    source_addresses: SourceAddresses,
    tls: Option<UpstreamTls>,
    tls_mode: TlsMode,
    client_info: ClientInfo,
    /// Whether a client may log in on behalf of another user.
    pub allows_authzid: bool,
    /// Credentials for clients whose identity is verified but who have no password for the servers.
    pub credentials: Option<ProxyCredentials>,
    /// Whether a server's referral is followed.
    pub follows_referrals: bool,
    /// How passwords are sent to the servers, and how their answers are interpreted.
    login_rules: config::LoginRules,
    /// Values that are sent with ID as `x-forward-KEY`.
    forward: BTreeMap<String, String>,
    /// Which server a login goes to.
    pub balance: Balance,
    check_settings: Option<Arc<CheckSettings>>,
    queue_length: QueueLength,
    queue_limits: config::Queue,
    /// Credits of each server for `round-robin`, by name.
    round_robin_credits: Mutex<HashMap<Arc<str>, f64>>,
    groups: Vec<ServerGroup>,
    undeclared_servers: UndeclaredServers,
    metrics: Arc<Metrics>,
    state_overrides: StateOverrides,
}

impl Backend {
    /// All servers that are known now, undeclared ones included.
    pub fn servers(&self) -> Vec<Arc<Server>> {
        self.groups.iter().flat_map(ServerGroup::current).chain(self.undeclared_servers.current()).collect()
    }

    /// The declared servers. Waits for DNS only before its first answer.
    async fn known_servers(&self) -> Vec<Arc<Server>> {
        let mut servers = Vec::new();
        for group in &self.groups {
            servers.extend(group.first_known().await);
        }
        servers
    }

    /// Whether a login with an empty password is sent to the servers.
    pub fn allows_empty_passwords(&self) -> bool {
        self.login_rules.empty_password == config::EmptyPassword::Allow
    }

    /// Whether all sessions of a user must be on one server, because two servers that share the storage of a mailbox would
    /// damage its index.
    pub fn is_sticky(&self) -> bool {
        self.balance.is_sticky()
    }

    /// The servers to try for `user`, in order, without those that are drained or down. Waits for DNS only before its first
    /// answer.
    pub async fn candidates(&self, user: &str) -> Vec<Arc<Server>> {
        let mut servers = self.known_servers().await;
        servers.retain(|server| server.takes_logins());
        let now = Instant::now();
        let candidates: Vec<Candidate<'_>> = servers.iter().map(|server| server.candidate(now)).collect();
        let order = self.order(user, &candidates, &servers);
        order.into_iter().map(|index| servers[index].clone()).collect()
    }

    fn order(&self, user: &str, candidates: &[Candidate<'_>], servers: &[Arc<Server>]) -> Vec<usize> {
        let mut random = random_fraction;
        if self.balance != Balance::RoundRobin {
            let mut state = SelectionState { random: &mut random, credits: &mut [] };
            return select::order(self.balance, user, candidates, &mut state);
        }
        // After a panic elsewhere only the order of turns is lost.
        let mut known = self.round_robin_credits.lock().unwrap_or_else(PoisonError::into_inner);
        let mut credits: Vec<f64> =
            servers.iter().map(|server| known.get(&server.name).copied().unwrap_or_default()).collect();
        let mut state = SelectionState { random: &mut random, credits: &mut credits };
        let order = select::order(self.balance, user, candidates, &mut state);
        *known = servers.iter().map(|server| server.name.clone()).zip(credits).collect();
        order
    }

    /// The server at an address that a route names and the configuration does not list. `None` if too many of them have
    /// sessions.
    pub fn undeclared_server(&self, address: SocketAddr) -> Option<Arc<Server>> {
        self.undeclared_servers.get(self, address)
    }

    fn server_metrics(&self, server: &str) -> ServerMetrics {
        self.metrics.backend(self.id.0).server(server)
    }

    fn state_override(&self, server: &str) -> OverrideCell {
        self.state_overrides.cell(&self.name, server)
    }

    fn forget_server(&self, server: &str) {
        self.metrics.backend(self.id.0).forget_server(server);
    }
}

#[cfg(test)]
mod tests;
