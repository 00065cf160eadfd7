//! The mailbox servers: which exist, which is alive, which comes first for a user, and how to log in there.
//!
//! A backend is a named set of equivalent servers, from the configuration or from an SRV record. This room does not
//! know why a user belongs to a backend (`route` does) and speaks to no client. Called by `server`, which builds and
//! starts it, and by `session` for each login.

mod awaited;
mod capacity;
mod checks;
pub mod connect;
mod dial;
mod disconnect_spreader;
mod discovery;
mod exchanges;
mod failover;
mod health;
mod offer;
pub mod request;
mod select;
mod server;
mod source;
pub mod state_override;

use std::collections::{BTreeMap, HashMap};
use std::hash::{BuildHasher as _, RandomState};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use tokio::sync::watch;
use tokio_rustls::rustls::pki_types::ServerName;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use self::capacity::LoginQueue;
pub use self::capacity::{DelayedDisconnect, ServerPermit, SessionSlot};
use self::checks::HealthChecker;
pub use self::discovery::OwnAddresses;
use self::discovery::{Resolver, Service};
pub use self::failover::{Failover, NextServer};
use self::select::{Candidate, SelectionState};
pub use self::server::{LastError, Server};
use self::server::{ServerSettings, ServerState};
use self::source::Sources;
use self::state_override::StateOverrides;
use crate::admin_state::AdminState;
use crate::config::{self, BackendId, Balance, ClientInfo, Config, Host, Limits, Problem, TlsMode, Trust};
use crate::identity::{Secret, UserName};
use crate::metrics::Metrics;
use crate::protocol::imap::capability::ServerCapabilities;
use crate::tls::client::UpstreamTls;

/// Undeclared servers that routes may name, a backend. Each is a label of metrics.
const MAX_GUESTS: usize = 256;

/// All backends of one configuration.
#[derive(Debug)]
pub struct Backends {
    list: Vec<Arc<Backend>>,
    resolver: Option<Resolver>,
    /// An [`ServerCapabilities`]: see [`offer::packed`].
    offered: AtomicU64,
    state_overrides: StateOverrides,
}

impl Backends {
    /// Builds everything; connects to nothing and asks DNS nothing yet. What was learnt of servers that stay is taken over
    /// from `previous`.
    ///
    /// # Errors
    /// All problems: `ca` files, server names, a system without resolver configuration.
    pub fn build(config: &Config, metrics: &Arc<Metrics>, previous: Option<&Self>) -> Result<Self, Vec<Problem>> {
        let state_overrides = previous.map(|previous| previous.state_overrides.clone()).unwrap_or_default();
        let mut problems = Vec::new();
        let mut list = Vec::new();
        for (index, backend) in config.backends.iter().enumerate() {
            let previous = previous.and_then(|previous| previous.named(&backend.name));
            match Backend::build(backend, BackendId(index), (metrics, &state_overrides), previous) {
                Ok(backend) => list.push(Arc::new(backend)),
                Err(problem) => problems.push(problem),
            }
        }
        let resolver = if list.iter().any(|backend| backend.needs_dns()) {
            Resolver::build(&config.resolver)
                .map_err(|error| {
                    let location = &config.backends[0].location;
                    problems
                        .push(location.problem(format!("servers are given by name, but DNS cannot be used: {error}")));
                })
                .ok()
        } else {
            None
        };
        if !problems.is_empty() {
            return Err(problems);
        }
        let offered = AtomicU64::new(offer::packed(offer::PASSWORDS_ONLY));
        let backends = Self { list, resolver, offered, state_overrides };
        backends.consider_offers();
        Ok(backends)
    }

    /// Begins to check servers, until `stop`.
    pub fn watch(self: &Arc<Self>, limits: &Arc<Limits>, tasks: &TaskTracker, stop: &CancellationToken) {
        for backend in self.list.iter().filter(|backend| backend.watch.is_some()) {
            let (stop, watching) = (stop.clone(), checks::follow(self.clone(), backend.clone(), limits.clone()));
            tasks.spawn(async move { stop.run_until_cancelled(watching).await });
        }
    }

    /// Begins to resolve names, until `stop`.
    pub fn start(&self, own: &OwnAddresses, tasks: &TaskTracker, stop: &CancellationToken) {
        self.show_states();
        let Some(resolver) = &self.resolver else { return };
        for backend in &self.list {
            for (index, group) in backend.groups.iter().enumerate() {
                if group.service.is_some() {
                    let service =
                        discovery::follow_service(resolver.clone(), backend.clone(), index, own.clone(), stop.clone());
                    tasks.spawn(service);
                    continue;
                }
                for server in group.current() {
                    tasks.spawn(discovery::follow_server(
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

    /// The declared server that a referral names, and its backend.
    pub fn find(&self, host: &str, port: u16) -> Option<(&Arc<Backend>, Arc<Server>)> {
        self.list.iter().find_map(|backend| {
            let servers = backend.groups.iter().flat_map(Group::current);
            servers
                .filter(|server| server.port == port)
                .find(|server| server.is_at(host))
                .map(|server| (backend, server))
        })
    }

    /// What clients are offered before login: ways to log in and extensions that the servers of all backends have, as far as they are
    /// known.
    pub fn offered(&self) -> ServerCapabilities {
        offer::unpacked(self.offered.load(Ordering::Relaxed))
    }

    fn consider_offers(&self) {
        let backends = self.list.iter().map(|backend| {
            let servers = backend.groups.iter().flat_map(Group::current).filter_map(|server| server.offer());
            (backend.login.is_some(), servers.collect())
        });
        self.offered.store(offer::packed(offer::common(backends)), Ordering::Relaxed);
    }

    /// Whether a client may ask for another user's mailbox on any of them.
    pub fn any_allows_authzid(&self) -> bool {
        self.list.iter().any(|backend| backend.allows_authzid)
    }

    /// Whether a login with an empty password may be meant for one of them.
    pub fn any_allows_empty_passwords(&self) -> bool {
        self.list.iter().any(|backend| backend.allows_empty_passwords())
    }

    /// The backend of that name.
    pub fn named(&self, name: &str) -> Option<&Arc<Backend>> {
        self.list.iter().find(|backend| &*backend.name == name)
    }

    /// All backends, in the configuration's order.
    pub fn list(&self) -> &[Arc<Backend>] {
        &self.list
    }

    /// Ends the series of servers that `successor` does not have.
    pub fn retire(&self, successor: &Self) {
        for backend in &self.list {
            let stays = successor.named(&backend.name);
            for server in backend.servers() {
                if !stays.is_some_and(|stays| stays.servers().iter().any(|other| other.name == server.name)) {
                    backend.metrics.backend(backend.id.0).forget_server(&server.name);
                }
            }
        }
    }

    /// The states that operators have set; shared with the configurations before and after this one.
    pub fn state_overrides(&self) -> &StateOverrides {
        &self.state_overrides
    }

    /// Updates the gauges of all servers after administrative states have changed.
    pub fn show_states(&self) {
        for server in self.list.iter().flat_map(|backend| backend.servers()) {
            server.show();
        }
    }

    /// The backend a route named: ids come from the same configuration.
    pub fn backend(&self, id: BackendId) -> &Arc<Backend> {
        &self.list[id.0]
    }
}

/// Credentials of the proxy's own.
#[derive(Debug)]
pub struct OwnLogin {
    /// Who logs in on behalf of the user; `None`: the user, whose password is always this.
    pub master: Option<UserName>,
    /// The password.
    pub password: Secret,
}

impl OwnLogin {
    fn read(login: &config::MasterLogin) -> Result<Self, Problem> {
        let password = login.password.read_secret()?;
        Ok(Self { master: login.master.clone(), password: Secret::new(password.as_bytes().to_vec()) })
    }
}

/// A named set of equivalent servers.
#[derive(Debug)]
pub struct Backend {
    /// As configured.
    pub name: Arc<str>,
    /// Its place in the configuration.
    pub id: BackendId,
    sources: Sources,
    /// TLS towards the servers, and how it begins.
    tls: Option<UpstreamTls>,
    mode: TlsMode,
    /// What servers learn of the client.
    client_info: ClientInfo,
    /// Whether a client may ask for another user's mailbox.
    pub allows_authzid: bool,
    /// What servers are logged in with where the client's identity is proven and it has no password for them.
    pub login: Option<OwnLogin>,
    /// Whether a server's referral is followed.
    pub follows_referrals: bool,
    /// How passwords are sent to its servers, and how their answers are understood.
    answers: config::LoginRules,
    /// Sent with ID as `x-forward-KEY`.
    forward: BTreeMap<String, String>,
    /// Which server comes first.
    pub balance: Balance,
    watch: Option<HealthChecker>,
    queue: LoginQueue,
    queue_limits: config::Queue,
    /// How far each server is behind its turn, by name.
    credits: Mutex<HashMap<Arc<str>, f64>>,
    /// Of servers that a route names by address.
    guest_terms: ServerSettings,
    groups: Vec<Group>,
    /// Servers that a route names by their addresses.
    guests: Mutex<HashMap<SocketAddr, Arc<Server>>>,
    metrics: Arc<Metrics>,
    state_overrides: StateOverrides,
}

impl Backend {
    fn build(
        backend: &config::Backend,
        id: BackendId,
        (metrics, state_overrides): (&Arc<Metrics>, &StateOverrides),
        previous: Option<&Arc<Self>>,
    ) -> Result<Self, Problem> {
        let tls = UpstreamTls::build(backend)?;
        let label: Arc<str> = backend.name.as_str().into();
        let own = metrics.backend(id.0);
        own.set_insecure(backend.tls.mode != TlsMode::None && matches!(backend.tls.trust, Trust::Insecure));
        let mut fixed = Vec::new();
        let mut groups = Vec::new();
        for server in &backend.servers {
            match server {
                config::Server::Srv { name, max_sessions, state, .. } => {
                    let terms = ServerSettings::new(&backend.balancing, *max_sessions, *state);
                    let known = previous.and_then(|previous| {
                        let group = previous.groups.iter().find(|group| group.service.as_ref() == Some(name))?;
                        group.servers.borrow().clone()
                    });
                    let known = known.map(|servers| servers.iter().map(|server| server.on(terms)).collect());
                    groups.push(Group::service(name.clone(), terms, known));
                }
                config::Server::Address { name, host, port, weight, max_sessions, state: admin_state, location } => {
                    let tls_name = tls_name(host).map_err(|message| location.problem(message))?;
                    let known = previous.and_then(|previous| previous.fixed(name));
                    let state = known.map(|known| known.state.clone());
                    fixed.push(Arc::new(Server {
                        name: name.as_str().into(),
                        backend: label.clone(),
                        host: host.clone(),
                        port: *port,
                        weight: *weight,
                        priority: 0,
                        tls_name,
                        terms: ServerSettings::new(&backend.balancing, *max_sessions, *admin_state),
                        state: state.unwrap_or_else(|| {
                            ServerState::new(host, *port, own.server(name), state_overrides.cell(&backend.name, name))
                        }),
                    }));
                }
            }
        }
        let guest_terms = ServerSettings::new(&backend.balancing, None, AdminState::Up);
        groups.push(Group::fixed(fixed, guest_terms));
        let guests = previous.map(|previous| previous.lock_guests().clone()).unwrap_or_default();
        let guests = guests.into_iter().map(|(address, server)| (address, server.on(guest_terms))).collect();
        Ok(Self {
            name: label,
            id,
            sources: Sources::new(&backend.source_addresses),
            tls,
            mode: backend.tls.mode,
            client_info: backend.client_info,
            allows_authzid: backend.authzid,
            login: backend.login.as_ref().map(|login| OwnLogin::read(login)).transpose()?,
            follows_referrals: backend.follows_referrals,
            answers: backend.login_rules.clone(),
            forward: backend.forward.clone(),
            balance: backend.balancing.balance,
            watch: backend.balancing.check.as_ref().map(|check| HealthChecker::build(check)).transpose()?,
            queue: LoginQueue::default(),
            queue_limits: backend.balancing.queue,
            credits: Mutex::default(),
            guest_terms,
            groups,
            guests: Mutex::new(guests),
            metrics: metrics.clone(),
            state_overrides: state_overrides.clone(),
        })
    }

    /// All servers that are known just now, those that routes named by address too.
    pub fn servers(&self) -> Vec<Arc<Server>> {
        let guests: Vec<Arc<Server>> = self.lock_guests().values().cloned().collect();
        self.groups.iter().flat_map(Group::current).chain(guests).collect()
    }

    /// The server that the configuration calls so.
    fn fixed(&self, name: &str) -> Option<Arc<Server>> {
        let fixed = self.groups.iter().filter(|group| group.service.is_none());
        fixed.flat_map(Group::current).find(|server| &*server.name == name)
    }

    fn lock_guests(&self) -> MutexGuard<'_, HashMap<SocketAddr, Arc<Server>>> {
        // Nothing in here panics halfway through a change.
        self.guests.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a login with an empty password goes to its servers.
    pub fn allows_empty_passwords(&self) -> bool {
        self.answers.allow_empty_password
    }

    /// Whether all sessions of a user must be on one server: two that share a mailbox's storage would damage its index.
    pub fn serves_a_user_by_one_server(&self) -> bool {
        self.balance.is_sticky()
    }

    /// The servers to try for `user`, in order, without those that are drained or down; waits for DNS only while it has
    /// never answered.
    pub async fn candidates(&self, user: &str) -> Vec<Arc<Server>> {
        let mut servers = Vec::new();
        for group in &self.groups {
            servers.extend(group.first_known().await);
        }
        servers.retain(|server| server.admin_state() == AdminState::Up);
        let now = Instant::now();
        let candidates: Vec<Candidate<'_>> = servers.iter().map(|server| server.candidate(now)).collect();
        let order = self.ordered(user, &candidates, &servers);
        order.into_iter().map(|index| servers[index].clone()).collect()
    }

    fn ordered(&self, user: &str, candidates: &[Candidate<'_>], servers: &[Arc<Server>]) -> Vec<usize> {
        if self.balance != Balance::RoundRobin {
            let mut luck = SelectionState { chance: &mut chance, credits: &mut [] };
            return select::order(self.balance, user, candidates, &mut luck);
        }
        // What is lost with a panic elsewhere is whose turn it is.
        let mut known = self.credits.lock().unwrap_or_else(PoisonError::into_inner);
        let mut credits: Vec<f64> =
            servers.iter().map(|server| known.get(&server.name).copied().unwrap_or_default()).collect();
        let order = select::order(
            self.balance,
            user,
            candidates,
            &mut SelectionState { chance: &mut chance, credits: &mut credits },
        );
        *known = servers.iter().map(|server| server.name.clone()).zip(credits).collect();
        order
    }

    /// A server that is not declared, which a route's configuration allows. `None`: [`MAX_GUESTS`] of them have sessions.
    pub fn at(&self, address: SocketAddr) -> Option<Arc<Server>> {
        let mut guests = self.lock_guests();
        if let Some(known) = guests.get(&address) {
            return Some(known.clone());
        }
        let own = self.metrics.backend(self.id.0);
        if guests.len() >= MAX_GUESTS {
            guests.retain(|_, server| {
                let in_use = Arc::strong_count(server) > 1 || server.sessions() > 0;
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
        let server = Arc::new(Server {
            state: ServerState::new(
                &host,
                address.port(),
                own.server(&name),
                self.state_overrides.cell(&self.name, &name),
            ),
            name: name.into(),
            backend: self.name.clone(),
            host,
            port: address.port(),
            weight: 1,
            priority: 0,
            tls_name: ServerName::from(address.ip()),
            terms: self.guest_terms,
        });
        guests.insert(address, server.clone());
        Some(server)
    }

    fn needs_dns(&self) -> bool {
        self.groups.iter().any(|group| {
            group.service.is_some() || group.current().iter().any(|server| matches!(server.host, Host::Name(_)))
        })
    }

    /// A server that an SRV record names. Its certificate must be for the domain that was asked for: see `tls::client`.
    /// `known` is what was learnt of it before.
    fn discovered(&self, group: &Group, name: &str, service: &Service, known: Option<Arc<ServerState>>) -> Server {
        // The configuration was checked: it is a name. Were it none, no certificate would be for this address.
        let tls_name = ServerName::try_from(service_domain(name).to_owned())
            .unwrap_or_else(|_| ServerName::from(std::net::IpAddr::from([0, 0, 0, 0])));
        let Service { target, port, priority, weight } = service.clone();
        let (name, host) = (format!("{target}:{port}"), Host::Name(target));
        let state = known.unwrap_or_else(|| {
            let admin = self.state_overrides.cell(&self.name, &name);
            ServerState::new(&host, port, self.metrics.backend(self.id.0).server(&name), admin)
        });
        let (backend, terms) = (self.name.clone(), group.terms);
        Server { name: name.into(), backend, host, port, weight, priority, tls_name, terms, state }
    }

    /// The servers of an SRV entry are now these.
    fn replace(&self, group: usize, servers: Vec<Arc<Server>>) {
        for old in self.groups[group].current() {
            if !servers.iter().any(|server| server.name == old.name) {
                tracing::info!(backend = %self.name, server = %old.name, "server is gone from DNS");
                self.metrics.backend(self.id.0).forget_server(&old.name);
            }
        }
        for server in &servers {
            server.show();
        }
        self.groups[group].servers.send_replace(Some(servers));
    }
}

/// From 0 up to 1. Good enough for sharing out: the standard library's own random state, which nobody can foresee.
fn chance() -> f64 {
    let bits = RandomState::new().hash_one(0_u8);
    #[expect(clippy::cast_precision_loss, reason = "53 bits fit an f64 exactly")]
    let chance = (bits >> 11) as f64 / (1_u64 << 53) as f64;
    chance
}

/// Servers that come and go together: the fixed ones, or those of one SRV entry.
#[derive(Debug)]
struct Group {
    service: Option<String>,
    terms: ServerSettings,
    /// `None` until DNS answered or failed for the first time.
    servers: watch::Sender<Option<Vec<Arc<Server>>>>,
}

impl Group {
    fn fixed(servers: Vec<Arc<Server>>, terms: ServerSettings) -> Self {
        Self { service: None, terms, servers: watch::Sender::new(Some(servers)) }
    }

    fn service(name: String, terms: ServerSettings, known: Option<Vec<Arc<Server>>>) -> Self {
        Self { service: Some(name), terms, servers: watch::Sender::new(known) }
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
mod tests;
