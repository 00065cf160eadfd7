//! One mailbox server: what the configuration (or an SRV record) says of it, and what is learnt of it.
//!
//! The first is as old as the configuration; the second ([`ServerState`]) is handed on to the next one, so that a reload
//! forgets neither who is down nor how many sessions a server has. Called by `backend`.

use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio_rustls::rustls::pki_types::ServerName;

use super::awaited::{Awaited, AwaitedAnswer};
use super::capacity::{ServerCapacity, ServerPermit};
use super::disconnect_spreader::DisconnectSpreader;
use super::exchanges::Exchanges;
use super::health::{Depth, FailureKind, Health, HealthChange, Standing, Thresholds, Trial};
use super::request::Fault;
use super::select::Candidate;
use super::state_override::{OverrideCell, StateOverride};
use super::{first_known, publish_if_first};
use crate::admin_state::AdminState;
use crate::config::{self, Host};
use crate::metrics::ServerMetrics;
use crate::protocol::imap::backend_login::{IdAnswer, UnsupportedForms};
use crate::protocol::imap::capability::ServerCapabilities;

/// One mailbox server.
#[derive(Debug)]
pub struct Server {
    /// As configured, or `target:port` of an SRV record: the label of metrics and logs.
    pub name: Arc<str>,
    /// The backend it is one of.
    pub backend: Arc<str>,
    pub(super) host: Host,
    pub(super) port: u16,
    pub(super) weight: u32,
    pub(super) priority: u16,
    pub(super) tls_name: ServerName<'static>,
    pub(super) terms: ServerSettings,
    pub(super) state: Arc<ServerState>,
}

/// On what terms a server is used.
#[derive(Debug, Clone, Copy)]
pub(super) struct ServerSettings {
    /// Sessions at a time, logins under way included.
    pub(super) max_sessions: Option<u32>,
    /// The configured administrative state.
    pub(super) state: AdminState,
    pub(super) thresholds: Thresholds,
    pub(super) slow_start: Option<Duration>,
}

impl ServerSettings {
    pub(super) fn new(care: &config::BalancingConfig, max_sessions: Option<u32>, state: AdminState) -> Self {
        // Without checks nobody asks for their thresholds.
        let (rise, fall) = care.check.as_ref().map_or((1, 1), |check| (check.rise, check.fall));
        let thresholds = Thresholds { failures: care.failures, rise, fall };
        Self { max_sessions, state, thresholds, slow_start: care.slow_start }
    }

    #[cfg(test)]
    fn open() -> Self {
        let thresholds = Thresholds { failures: 3, rise: 2, fall: 3 };
        Self { max_sessions: None, state: AdminState::Up, thresholds, slow_start: None }
    }
}

/// An error that a login or a check met at a server.
#[derive(Debug, Clone)]
pub struct LastError {
    /// A sentence without anything secret.
    pub text: Arc<str>,
    /// When it happened.
    pub at: Instant,
}

/// How a login is received.
#[derive(Debug)]
pub(super) enum Admission {
    /// It may try.
    ServerPermit(ServerPermit),
    /// There is no place just now.
    Full,
    /// The server is failing, or somebody else tries it out: a last resort.
    Failing,
    /// The operator wants no login here.
    Shut,
}

/// What is learnt of a server; outlives a configuration.
#[derive(Debug)]
pub(super) struct ServerState {
    /// `None` until DNS answered or failed for the first time.
    addresses: watch::Sender<Option<Vec<SocketAddr>>>,
    health: Mutex<Health>,
    /// What it offered before login when it was last asked.
    offer: Mutex<Option<ServerCapabilities>>,
    /// Whether the server has said that it trusts our ID.
    has_trusted: AtomicBool,
    /// Whether it was logged that the server no longer says so.
    distrust_logged: AtomicBool,
    /// Whether the server lets a session change its user (RFC 8437), which is logged once.
    unauthenticate: AtomicBool,
    learned: Mutex<Option<UnsupportedForms>>,
    last_error: Mutex<Option<LastError>>,
    /// The state that an operator has set, over the configuration's.
    admin: OverrideCell,
    pub(super) slots: ServerCapacity,
    pub(super) exchanges: Exchanges,
    awaited: Awaited,
    departures: Mutex<DisconnectSpreader>,
    pub(super) metrics: ServerMetrics,
}

impl ServerState {
    /// Of a server that has just been heard of.
    pub(super) fn new(host: &Host, port: u16, metrics: ServerMetrics, admin: OverrideCell) -> Arc<Self> {
        let addresses = match host {
            Host::Ip(ip) => Some(vec![SocketAddr::new(*ip, port)]),
            Host::Name(_) => None,
        };
        Arc::new(Self {
            addresses: watch::Sender::new(addresses),
            health: Mutex::default(),
            offer: Mutex::default(),
            has_trusted: AtomicBool::new(false),
            distrust_logged: AtomicBool::new(false),
            unauthenticate: AtomicBool::new(false),
            learned: Mutex::default(),
            last_error: Mutex::default(),
            admin,
            slots: ServerCapacity::default(),
            exchanges: Exchanges::default(),
            awaited: Awaited::default(),
            departures: Mutex::default(),
            metrics,
        })
    }

    /// Where nothing was learnt from a trial, the next login may try.
    pub(super) fn end_trial(&self, trial: Trial) {
        let mut health = self.health();
        health.end_trial(trial);
        self.metrics.set_breaker(health.breaker() as i64);
    }

    pub(super) fn departures(&self) -> MutexGuard<'_, DisconnectSpreader> {
        // Nothing in there panics halfway through a change.
        self.departures.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn health(&self) -> MutexGuard<'_, Health> {
        // A panic elsewhere leaves plain fields behind, which are valid whatever they hold.
        self.health.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Server {
    /// The same server, of a configuration with other terms.
    pub(super) fn on(&self, terms: ServerSettings) -> Arc<Self> {
        Arc::new(Self {
            name: self.name.clone(),
            backend: self.backend.clone(),
            host: self.host.clone(),
            port: self.port,
            weight: self.weight,
            priority: self.priority,
            tls_name: self.tls_name.clone(),
            terms,
            state: self.state.clone(),
        })
    }

    /// A server for tests of other rooms.
    #[cfg(test)]
    pub(crate) fn named(backend: &str, name: &str) -> Self {
        let names = crate::metrics::Names { backends: vec![backend.to_owned()], ..Default::default() };
        let host = Host::Ip([127, 0, 0, 1].into());
        let metrics = crate::metrics::Metrics::new(&names).backend(0).server(name);
        Self {
            name: name.into(),
            backend: backend.into(),
            state: ServerState::new(&host, 143, metrics, OverrideCell::default()),
            host,
            port: 143,
            weight: 1,
            priority: 0,
            tls_name: ServerName::from(IpAddr::from([127, 0, 0, 1])),
            terms: ServerSettings::open(),
        }
    }

    /// Its gauges.
    pub fn metrics(&self) -> &ServerMetrics {
        &self.state.metrics
    }

    /// Its addresses, the one that answered last in front; waits for DNS only while it has never answered.
    pub async fn addresses(&self) -> Vec<SocketAddr> {
        first_known(&self.state.addresses).await
    }

    /// Whether logins go there sooner than to servers that are failing.
    pub fn is_available(&self) -> bool {
        self.state.health().standing(Instant::now()) != Standing::Failing
    }

    /// Sessions it has, logins under way included.
    pub fn sessions(&self) -> u32 {
        self.state.slots.taken()
    }

    /// Sessions it may have.
    pub fn max_sessions(&self) -> Option<u32> {
        self.terms.max_sessions
    }

    /// Its share among the backend's servers.
    pub fn weight(&self) -> u32 {
        self.weight
    }

    /// The state that an operator has set, or else the configured one.
    pub fn admin_state(&self) -> AdminState {
        self.state.admin.state().unwrap_or(self.terms.state)
    }

    /// Whether it is meant to get logins: it is neither drained nor down.
    pub fn takes_logins(&self) -> bool {
        self.admin_state() == AdminState::Up
    }

    /// The state that an operator has set: see [`StateOverrides`](super::state_override::StateOverrides).
    pub fn state_override(&self) -> Option<StateOverride> {
        self.state.admin.get()
    }

    /// Sets or resets the administrative state on behalf of the program that embeds this library.
    pub fn set_admin_state(&self, state: Option<AdminState>) {
        let set = |state| StateOverride { state, by: "vestibule".to_owned(), since: 0, reason: None };
        self.state.admin.set(state.map(set));
        self.show();
    }

    /// Sets its gauges, for what the configuration says may be new.
    pub(super) fn show(&self) {
        let (health, state) = (self.state.health(), self.admin_state());
        self.state.metrics.set_up(health.is_alive() && state != AdminState::Down);
        self.state.metrics.set_breaker(health.breaker() as i64);
        self.state.metrics.set_admin_state(state);
    }

    /// A login asks for a place, or, with incomplete credentials, whether there is one.
    pub(super) fn admit(&self, needs_place: bool) -> Admission {
        if self.admin_state() != AdminState::Up {
            return Admission::Shut;
        }
        let now = Instant::now();
        if self.state.health().standing(now) == Standing::Failing {
            return Admission::Failing;
        }
        let slot = if needs_place {
            ServerPermit::take(self)
        } else {
            self.has_place().then(|| ServerPermit::without_place(self))
        };
        let Some(slot) = slot else { return Admission::Full };
        let mut health = self.state.health();
        if health.standing(now) == Standing::Alive {
            return Admission::ServerPermit(slot);
        }
        let trial = health.begin_trial(now);
        self.state.metrics.set_breaker(health.breaker() as i64);
        drop(health);
        if trial.is_some() { Admission::ServerPermit(slot.on_trial(trial)) } else { Admission::Failing }
    }

    /// A login was greeted, and waits for the server's answer until the guard drops.
    pub(super) fn greeted(&self) -> AwaitedAnswer {
        self.state.awaited.greeted()
    }

    /// Whether so many logins wait for its answer that a missing greeting means overload.
    pub(super) fn is_crowded(&self) -> bool {
        self.state.awaited.is_crowded()
    }

    fn has_place(&self) -> bool {
        self.terms.max_sessions.is_none_or(|most| self.state.slots.taken() < most)
    }

    pub(super) fn is_at(&self, host: &str) -> bool {
        let address: Option<IpAddr> = host.parse().ok();
        let resolved = || self.state.addresses.borrow().iter().flatten().any(|known| Some(known.ip()) == address);
        match &self.host {
            Host::Name(name) => name == host || resolved(),
            Host::Ip(ip) => Some(ip.to_canonical()) == address.map(|address| address.to_canonical()),
        }
    }

    pub(super) fn offer(&self) -> Option<ServerCapabilities> {
        *self.state.offer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn offers(&self, offer: Option<ServerCapabilities>) {
        *self.state.offer.lock().unwrap_or_else(PoisonError::into_inner) = offer;
    }

    /// Judges the server's answer to an ID with the client's address in it. Only Dovecot 2.4 says that it trusts it, and
    /// only of a server that has said so is silence distrust: Dovecot 2.3 answers the same either way.
    pub(super) fn answered_id(&self, answer: IdAnswer) {
        let state = &self.state;
        if answer == IdAnswer::Trusted {
            state.has_trusted.store(true, Ordering::Relaxed);
            state.distrust_logged.store(false, Ordering::Relaxed);
            return state.metrics.set_trusts(true);
        }
        if !state.has_trusted.load(Ordering::Relaxed) {
            return;
        }
        state.metrics.set_trusts(false);
        if !state.distrust_logged.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                backend = %self.backend,
                server = %self.name,
                "the server no longer trusts our ID: see login_trusted_networks there"
            );
        }
    }

    /// Whether it has UNAUTHENTICATE, with which a client could log in as a user of another backend.
    pub fn has_unauthenticate(&self) -> bool {
        self.state.unauthenticate.load(Ordering::Relaxed)
    }

    /// Its capabilities were seen, with or without UNAUTHENTICATE.
    pub(super) fn set_unauthenticate(&self, advertised: bool) {
        if self.state.unauthenticate.swap(advertised, Ordering::Relaxed) != advertised && advertised {
            tracing::warn!(
                backend = %self.backend,
                server = %self.name,
                "the server has UNAUTHENTICATE (RFC 8437): a client may change its user there without routing, limits or a record; disable it on the server"
            );
        }
    }

    /// A login ended without the server's yes or no.
    pub(super) fn could_not_answer(&self, fault: &Fault) {
        match fault.blow {
            Some(blow) => self.failed(blow, &fault.detail),
            None if fault.answered => self.answered(),
            None => {}
        }
        if !fault.answered {
            self.note_error(&fault.detail);
        }
    }

    /// The last error met here, and when.
    pub fn last_error(&self) -> Option<LastError> {
        self.state.last_error.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn note_error(&self, text: &str) {
        let error = LastError { text: text.into(), at: Instant::now() };
        *self.state.last_error.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
    }

    /// LoginForms of the login that it does not understand although it lists them.
    pub(super) fn learned(&self) -> Option<UnsupportedForms> {
        *self.state.learned.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A login has shown which forms it does not understand; `None`: nothing new.
    pub(super) fn learns(&self, learned: Option<UnsupportedForms>) {
        if learned.is_some() && learned != self.learned() {
            let (backend, server) = (&self.backend, &self.name);
            tracing::info!(%backend, %server, "server answers BAD to a form of login that its capabilities list; another form is used");
            *self.state.learned.lock().unwrap_or_else(PoisonError::into_inner) = learned;
        }
    }

    /// A login could not use it.
    pub(super) fn failed(&self, blow: FailureKind, error: &str) {
        let news = self.state.health().failed(blow, Instant::now(), self.terms.thresholds);
        self.tell(news, error);
    }

    /// It answered a login, whichever way.
    pub(super) fn answered(&self) {
        let news = self.state.health().answered(Instant::now());
        self.tell(news, "");
    }

    /// A check ended; an error says that it failed.
    pub(super) fn checked(&self, result: Result<(), &str>, depth: Depth) {
        if let Err(error) = result {
            self.note_error(error);
        }
        let news = self.state.health().checked(result.is_ok(), depth, Instant::now(), self.terms.thresholds);
        self.tell(news, result.err().unwrap_or_default());
    }

    fn tell(&self, news: HealthChange, error: &str) {
        let (backend, server) = (&self.backend, &self.name);
        match news {
            Some(false) => tracing::warn!(%backend, %server, %error, "server is failing and passed over"),
            Some(true) => tracing::info!(%backend, %server, "server is alive again"),
            None => {}
        }
        self.show();
    }

    /// `address` answered: it is tried first from now on.
    pub(super) fn prefer(&self, address: SocketAddr) {
        self.state.addresses.send_if_modified(|known| match known {
            Some(known) if known.first() != Some(&address) => {
                known.sort_by_key(|other| *other != address);
                true
            }
            _ => false,
        });
    }

    pub(super) fn publish(&self, addresses: Vec<SocketAddr>) {
        let first = self.state.addresses.borrow().as_ref().and_then(|known| known.first().copied());
        self.state.addresses.send_replace(Some(addresses));
        if let Some(first) =
            first.filter(|first| self.state.addresses.borrow().as_ref().is_some_and(|now| now.contains(first)))
        {
            self.prefer(first);
        }
    }

    pub(super) fn publish_if_first(&self) {
        publish_if_first(&self.state.addresses);
    }

    pub(super) fn candidate(&self, now: Instant) -> Candidate<'_> {
        let health = self.state.health();
        Candidate {
            name: &self.name,
            weight: self.weight,
            priority: self.priority,
            available: health.standing(now) != Standing::Failing,
            sessions: self.state.slots.taken(),
            ramp: health.ramp(now, self.terms.slow_start),
        }
    }

    /// A server that has but so many places.
    #[cfg(test)]
    pub(super) fn for_tests(name: &str, max_sessions: Option<u32>) -> Arc<Self> {
        Self::named("b", name).on(ServerSettings { max_sessions, ..ServerSettings::open() })
    }
}
