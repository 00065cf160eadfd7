//! One mailbox server: its settings, from the configuration or an SRV record, and its runtime state.
//!
//! Settings belong to one configuration. The state ([`ServerState`]) is passed on to the next one, so that a reload keeps
//! the health and the number of sessions of a server.

mod pending_logins;
mod permit;
mod sasl_exchanges;
mod state;

use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use tokio_rustls::rustls::pki_types::ServerName;

pub(super) use self::pending_logins::PendingLogin;
pub(super) use self::permit::PermitKind;
pub use self::permit::{DelayedDisconnect, ServerPermit, SessionPermit};
use self::sasl_exchanges::SaslExchange;
pub use self::state::LastError;
pub(super) use self::state::ServerState;
use super::fault::{Evidence, Fault};
use super::first_value::{first_value, set_empty_if_unset};
use super::health::{Availability, CheckDepth, FailureKind, HealthChange, Thresholds};
use super::select::Candidate;
use super::state_override::StateOverride;
use crate::admin_state::AdminState;
use crate::config::{self, Host};
use crate::metrics::ServerMetrics;
use crate::protocol::imap::backend_login::{IdAnswer, UnsupportedForms};
use crate::protocol::imap::capability::ServerCapabilities;

/// One mailbox server.
#[derive(Debug)]
pub struct Server {
    /// The name in the configuration, or `target:port` of an SRV record. It is the label of metrics and log records.
    pub name: Arc<str>,
    /// Name of the backend that the server belongs to.
    pub backend: Arc<str>,
    pub(super) host: Host,
    pub(super) port: u16,
    pub(super) weight: u32,
    pub(super) priority: u16,
    pub(super) tls_name: ServerName<'static>,
    pub(super) settings: ServerSettings,
    pub(super) state: Arc<ServerState>,
}

/// Settings of a server that a reload may change.
#[derive(Debug, Clone, Copy)]
pub(super) struct ServerSettings {
    /// Maximum number of sessions, logins in progress included.
    pub(super) max_sessions: Option<u32>,
    /// The configured administrative state.
    pub(super) state: AdminState,
    pub(super) thresholds: Thresholds,
    pub(super) slow_start: Option<Duration>,
}

impl ServerSettings {
    pub(super) fn new(balancing: &config::BalancingConfig, max_sessions: Option<u32>, state: AdminState) -> Self {
        // The thresholds of checks are not used if there are none.
        let (rise, fall) = balancing.check.as_ref().map_or((1, 1), |check| (check.rise, check.fall));
        let thresholds = Thresholds { failures: balancing.failures, rise, fall };
        Self { max_sessions, state, thresholds, slow_start: balancing.slow_start }
    }

    #[cfg(test)]
    fn for_tests() -> Self {
        let thresholds = Thresholds { failures: 3, rise: 2, fall: 3 };
        Self { max_sessions: None, state: AdminState::Up, thresholds, slow_start: None }
    }
}

/// A server's answer to a login that asks for a permit.
#[derive(Debug)]
pub(super) enum PermitResult {
    /// The login may connect.
    Granted(ServerPermit),
    /// The server has `max_sessions`.
    Full,
    /// The server is failing, or another login tries it out: it is used as a last resort.
    Failing,
    /// The server receives no logins because of its administrative state.
    NoLogins,
}

impl Server {
    /// The same server with the settings of another configuration.
    pub(super) fn with_settings(&self, settings: ServerSettings) -> Arc<Self> {
        Arc::new(Self {
            name: self.name.clone(),
            backend: self.backend.clone(),
            host: self.host.clone(),
            port: self.port,
            weight: self.weight,
            priority: self.priority,
            tls_name: self.tls_name.clone(),
            settings,
            state: self.state.clone(),
        })
    }

    /// A server for tests of other modules.
    #[cfg(test)]
    pub(crate) fn named(backend: &str, name: &str) -> Self {
        let names = crate::metrics::Names { backends: vec![backend.to_owned()], ..Default::default() };
        let host = Host::Ip([127, 0, 0, 1].into());
        let metrics = crate::metrics::Metrics::new(&names).backend(0).server(name);
        Self {
            name: name.into(),
            backend: backend.into(),
            state: ServerState::new(&host, 143, metrics, super::state_override::OverrideCell::default()),
            host,
            port: 143,
            weight: 1,
            priority: 0,
            tls_name: ServerName::from(IpAddr::from([127, 0, 0, 1])),
            settings: ServerSettings::for_tests(),
        }
    }

    /// A server with this limit of sessions.
    #[cfg(test)]
    pub(super) fn for_tests(name: &str, max_sessions: Option<u32>) -> Arc<Self> {
        Self::named("b", name).with_settings(ServerSettings { max_sessions, ..ServerSettings::for_tests() })
    }

    /// Metrics of this server.
    pub fn metrics(&self) -> &ServerMetrics {
        &self.state.metrics
    }

    /// Addresses of the server, with the one that answered last at the front. Waits for DNS only before its first answer.
    pub async fn addresses(&self) -> Vec<SocketAddr> {
        first_value(&self.state.addresses).await
    }

    /// Whether the server is not failing, so that logins prefer it to servers that are.
    pub fn is_available(&self) -> bool {
        self.state.health().availability(Instant::now()) != Availability::Failing
    }

    /// Number of sessions on the server, logins in progress included.
    pub fn sessions(&self) -> u32 {
        self.state.capacity.taken()
    }

    /// Maximum number of sessions.
    pub fn max_sessions(&self) -> Option<u32> {
        self.settings.max_sessions
    }

    /// Share of users among the backend's servers.
    pub fn weight(&self) -> u32 {
        self.weight
    }

    /// The state that an operator has set, or else the configured one.
    pub fn admin_state(&self) -> AdminState {
        self.state.state_override.state().unwrap_or(self.settings.state)
    }

    /// Whether the administrative state allows logins.
    pub fn takes_logins(&self) -> bool {
        self.admin_state() == AdminState::Up
    }

    /// The state that an operator has set: see [`StateOverrides`](super::state_override::StateOverrides).
    pub fn state_override(&self) -> Option<StateOverride> {
        self.state.state_override.get()
    }

    /// Sets or resets the administrative state on behalf of the program that embeds this library.
    pub fn set_admin_state(&self, state: Option<AdminState>) {
        let set = |state| StateOverride { state, by: "vestibule".to_owned(), since: 0, reason: None };
        self.state.state_override.set(state.map(set));
        self.update_gauges();
    }

    /// Sets the gauges that depend on health and administrative state.
    pub(super) fn update_gauges(&self) {
        let (health, state) = (self.state.health(), self.admin_state());
        self.state.metrics.set_up(health.is_alive() && state != AdminState::Down);
        self.state.metrics.set_breaker(health.breaker());
        self.state.metrics.set_admin_state(state);
    }

    /// Asks for a permit for a login.
    pub(super) fn request_permit(&self, kind: PermitKind) -> PermitResult {
        if !self.takes_logins() {
            return PermitResult::NoLogins;
        }
        let now = Instant::now();
        if self.state.health().availability(now) == Availability::Failing {
            return PermitResult::Failing;
        }
        let Some(permit) = ServerPermit::try_take(self, kind) else { return PermitResult::Full };
        let mut health = self.state.health();
        if health.availability(now) == Availability::Alive {
            return PermitResult::Granted(permit);
        }
        let trial = health.begin_trial(now);
        self.state.metrics.set_breaker(health.breaker());
        drop(health);
        trial.map_or(PermitResult::Failing, |trial| PermitResult::Granted(permit.with_trial(trial)))
    }

    /// Counts a login that the server has greeted, until the server has answered it and the guard drops.
    pub(super) fn begin_pending_login(&self) -> PendingLogin {
        self.state.pending_logins.begin()
    }

    /// Whether enough logins are pending for a missing greeting to mean overload.
    pub(super) fn has_many_pending_logins(&self) -> bool {
        self.state.pending_logins.are_many()
    }

    fn enter_exchange(&self) -> SaslExchange {
        self.state.sasl_exchanges.enter(self.settings.max_sessions)
    }

    /// Whether `host` is the server's name or one of its addresses.
    pub(super) fn is_at(&self, host: &str) -> bool {
        let address: Option<IpAddr> = host.parse().ok();
        let is_resolved = || self.state.addresses.borrow().iter().flatten().any(|known| Some(known.ip()) == address);
        match &self.host {
            Host::Name(name) => name == host || is_resolved(),
            Host::Ip(ip) => Some(ip.to_canonical()) == address.map(|address| address.to_canonical()),
        }
    }

    /// The capabilities before login that the last check has read.
    pub(super) fn capabilities(&self) -> Option<ServerCapabilities> {
        *self.state.capabilities.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn set_capabilities(&self, capabilities: Option<ServerCapabilities>) {
        *self.state.capabilities.lock().unwrap_or_else(PoisonError::into_inner) = capabilities;
    }

    /// Evaluates the answer to an ID with the client's address. Only Dovecot 2.4 and newer confirm that they trust it; 2.3
    /// answers the same either way. So a missing confirmation is a problem only if the server has confirmed before.
    pub(super) fn record_id_answer(&self, answer: IdAnswer) {
        let state = &self.state;
        if answer == IdAnswer::Trusted {
            state.has_trusted_id.store(true, Ordering::Relaxed);
            state.distrust_logged.store(false, Ordering::Relaxed);
            return state.metrics.set_trusts_id(true);
        }
        if !state.has_trusted_id.load(Ordering::Relaxed) {
            return;
        }
        state.metrics.set_trusts_id(false);
        if !state.distrust_logged.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                backend = %self.backend,
                server = %self.name,
                "the server no longer trusts our ID: see login_trusted_networks there"
            );
        }
    }

    /// Whether the server has UNAUTHENTICATE, with which a client could log in as a user of another backend.
    pub fn has_unauthenticate(&self) -> bool {
        self.state.unauthenticate.load(Ordering::Relaxed)
    }

    /// Records whether the server advertises UNAUTHENTICATE, and warns once if it does.
    pub(super) fn set_unauthenticate(&self, is_advertised: bool) {
        if self.state.unauthenticate.swap(is_advertised, Ordering::Relaxed) != is_advertised && is_advertised {
            tracing::warn!(
                backend = %self.backend,
                server = %self.name,
                "the server has UNAUTHENTICATE (RFC 8437): a client may change its user there without routing, limits or a record; disable it on the server"
            );
        }
    }

    /// Forms of login that the server lists in its capabilities but rejects.
    pub(super) fn unsupported_forms(&self) -> Option<UnsupportedForms> {
        *self.state.unsupported_forms.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Remembers which forms of login the server has rejected; `None` means that it has rejected none.
    pub(super) fn set_unsupported_forms(&self, rejected: Option<UnsupportedForms>) {
        if rejected.is_some() && rejected != self.unsupported_forms() {
            let (backend, server) = (&self.backend, &self.name);
            tracing::info!(%backend, %server, "server answers BAD to a form of login that its capabilities list; another form is used");
            *self.state.unsupported_forms.lock().unwrap_or_else(PoisonError::into_inner) = rejected;
        }
    }

    /// The error of the last login or check that failed.
    pub fn last_error(&self) -> Option<LastError> {
        self.state.last_error.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set_last_error(&self, text: &str) {
        let error = LastError { text: text.into(), at: Instant::now() };
        *self.state.last_error.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
    }

    /// Records a login that ended without an answer of the server.
    pub(super) fn record_fault(&self, fault: &Fault) {
        match fault.evidence {
            Evidence::Works => return self.record_answer(),
            Evidence::Fails(kind) => self.record_failure(kind, &fault.detail),
            Evidence::None => {}
        }
        self.set_last_error(&fault.detail);
    }

    /// Records a failed login.
    pub(super) fn record_failure(&self, kind: FailureKind, error: &str) {
        let change = self.state.health().login_failed(kind, Instant::now(), self.settings.thresholds);
        self.report_health(change, error);
    }

    /// Records that the server has answered a login, whether it accepted or refused it.
    pub(super) fn record_answer(&self) {
        let change = self.state.health().login_answered(Instant::now());
        self.report_health(change, "");
    }

    /// Records the result of a check.
    pub(super) fn record_check(&self, result: Result<(), &str>, depth: CheckDepth) {
        let (now, thresholds) = (Instant::now(), self.settings.thresholds);
        let change = match result {
            Ok(()) => self.state.health().check_passed(depth, now, thresholds),
            Err(error) => {
                self.set_last_error(error);
                self.state.health().check_failed(now, thresholds)
            }
        };
        self.report_health(change, result.err().unwrap_or_default());
    }

    fn report_health(&self, change: Option<HealthChange>, error: &str) {
        let (backend, server) = (&self.backend, &self.name);
        match change {
            Some(HealthChange::Failed) => {
                tracing::warn!(%backend, %server, %error, "server is failing and passed over")
            }
            Some(HealthChange::Recovered) => tracing::info!(%backend, %server, "server is alive again"),
            None => {}
        }
        self.update_gauges();
    }

    /// Moves the address that has answered to the front.
    pub(super) fn prefer_address(&self, address: SocketAddr) {
        self.state.addresses.send_if_modified(|known| match known {
            Some(known) if known.first() != Some(&address) => {
                known.sort_by_key(|other| *other != address);
                true
            }
            _ => false,
        });
    }

    /// Replaces the addresses by those of a DNS answer, and keeps the preferred one at the front.
    pub(super) fn set_addresses(&self, addresses: Vec<SocketAddr>) {
        let preferred = self.state.addresses.borrow().as_ref().and_then(|known| known.first().copied());
        let preferred = preferred.filter(|preferred| addresses.contains(preferred));
        self.state.addresses.send_replace(Some(addresses));
        if let Some(preferred) = preferred {
            self.prefer_address(preferred);
        }
    }

    /// Ends the wait of logins for the first DNS answer, because a lookup has failed. Has no effect after an answer.
    pub(super) fn stop_waiting_for_first_answer(&self) {
        set_empty_if_unset(&self.state.addresses);
    }

    /// The server as an input of the selection.
    pub(super) fn candidate(&self, now: Instant) -> Candidate<'_> {
        let health = self.state.health();
        Candidate {
            name: &self.name,
            weight: self.weight,
            priority: self.priority,
            is_available: health.availability(now) != Availability::Failing,
            sessions: self.state.capacity.taken(),
            ramp: health.ramp(now, self.settings.slow_start),
        }
    }
}
