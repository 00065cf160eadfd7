//! The log record of a session. It is filled in while the session proceeds, written when the login succeeds ("logged in"), and
//! written again with the reason of the end when it is dropped ("session ended"), so that every session has a record.
//!
//! Login attempts and failures are counted here too, so that metrics and log records agree. No secrets are passed to this module.

use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::id::SessionId;
use crate::backend::login::Established;
use crate::backend::{Backend, DelayedDisconnect, ServerPermit, SessionPermit};
use crate::config::BackendId;
use crate::failure::{Reason, Side};
use crate::identity::{Mechanism, UserName};
use crate::metrics::{GaugeGuard, LoginOutcome};
use crate::relay::{ByteCounters, BytesMoved, RelayEnd};
use crate::session_registry::CancelReason;
use crate::snapshot::SessionSettings;
use crate::stream::TlsInfo;

/// Maximum length of the detail of a record, in bytes.
const MAX_DETAIL: usize = 512;

/// Logs a [`Record`] with the fields that "logged in" and "session ended" share, and the given fields before and after the times of
/// the phases.
macro_rules! log_record {
    ($record:expr, $level:ident, $message:literal, { $($before_times:tt)* }, { $($after_times:tt)* }) => {
        tracing::$level!(
            target: "vestibule::session",
            session = $record.session.as_str(),
            client = %$record.client,
            listener = %$record.listener,
            tls = $record.tls.as_ref().map(|tls| tls.version.as_str()),
            sni = $record.tls.as_ref().and_then(|tls| tls.server_name.as_deref()),
            user = $record.user.as_ref().map(UserName::as_str),
            mechanism = $record.mechanism.map(Mechanism::as_str),
            attempts = $record.attempts,
            route = $record.route.as_deref(),
            backend = $record.backend.as_deref(),
            server = $record.server.as_deref(),
            address = $record.address.map(tracing::field::display),
            $($before_times)*
            tls_ms = $record.times.tls.map(PhaseDuration::milliseconds),
            route_ms = $record.times.route.map(PhaseDuration::milliseconds),
            connect_ms = $record.times.connect.map(PhaseDuration::milliseconds),
            server_login_ms = $record.times.server_login.map(PhaseDuration::milliseconds),
            login_ms = $record.times.login.map(PhaseDuration::milliseconds),
            $($after_times)*
            $message
        )
    };
}

/// The log record. It is most of the memory of an idle session; a test checks its size.
pub(super) struct Record {
    settings: Arc<SessionSettings>,
    began: Instant,
    session: SessionId,
    client: Address,
    listener: Address,
    tls: Option<TlsInfo>,
    user: Option<UserName>,
    mechanism: Option<Mechanism>,
    route: Option<Arc<str>>,
    backend: Option<Arc<str>>,
    server: Option<Arc<str>>,
    address: Option<Address>,
    attempts: u32,
    outcome: Option<LoginOutcome>,
    failure: Option<Reason>,
    detail: Option<Box<str>>,
    ended_by: EndedBy,
    is_balancer_check: bool,
    times: Times,
    moved: BytesMoved,
    relaying: Option<Relaying>,
}

/// Which side ended the session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum EndedBy {
    Client,
    Server,
    Proxy,
    /// The proxy, because of `limits.idle`.
    Idle,
    /// The proxy, because the session was cancelled.
    Cancelled,
}

/// How an established session ended.
pub(super) enum SessionEnd {
    Relay(RelayEnd),
    Cancelled(CancelReason),
}

impl EndedBy {
    fn as_str(self) -> &'static str {
        match self {
            Self::Client => "client",
            Self::Server => "server",
            Self::Proxy => "proxy",
            Self::Idle => "idle",
            Self::Cancelled => "drained",
        }
    }
}

/// A socket address in two thirds of the size of a [`SocketAddr`].
#[derive(Debug, Clone, Copy)]
struct Address {
    ip: IpAddr,
    port: u16,
}

impl From<SocketAddr> for Address {
    fn from(address: SocketAddr) -> Self {
        Self { ip: address.ip().to_canonical(), port: address.port() }
    }
}

impl std::fmt::Display for Address {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        SocketAddr::new(self.ip, self.port).fmt(f)
    }
}

/// Gauges of an established session, and the backend it counts for.
struct Relaying {
    backend: u16,
    _backend_sessions: GaugeGuard,
    server_session: SessionPermit,
}

/// Durations of the phases.
#[derive(Default)]
struct Times {
    tls: Option<PhaseDuration>,
    route: Option<PhaseDuration>,
    connect: Option<PhaseDuration>,
    server_login: Option<PhaseDuration>,
    login: Option<PhaseDuration>,
}

/// A duration in microseconds: at least 1, at most 71 minutes.
#[derive(Clone, Copy)]
struct PhaseDuration(NonZeroU32);

impl From<Duration> for PhaseDuration {
    fn from(duration: Duration) -> Self {
        let micros = u32::try_from(duration.as_micros()).unwrap_or(u32::MAX);
        Self(NonZeroU32::new(micros).unwrap_or(NonZeroU32::MIN))
    }
}

impl PhaseDuration {
    fn milliseconds(self) -> f64 {
        f64::from(self.0.get()) / 1000.0
    }
}

impl Record {
    pub(super) fn new(
        session: SessionId,
        client: SocketAddr,
        listener: SocketAddr,
        settings: Arc<SessionSettings>,
    ) -> Self {
        Self {
            settings,
            began: Instant::now(),
            session,
            client: client.into(),
            listener: listener.into(),
            tls: None,
            user: None,
            mechanism: None,
            route: None,
            backend: None,
            server: None,
            address: None,
            attempts: 0,
            outcome: None,
            failure: None,
            detail: None,
            ended_by: EndedBy::Client,
            is_balancer_check: false,
            times: Times::default(),
            moved: BytesMoved::default(),
            relaying: None,
        }
    }

    pub(super) fn session(&self) -> SessionId {
        self.session
    }

    pub(super) fn client(&self) -> IpAddr {
        self.client.ip
    }

    /// Mechanism and user of the last attempt, and why it failed if not because of the password.
    pub(super) fn last_attempt(&self) -> (Option<Mechanism>, Option<&UserName>, Option<Reason>) {
        (self.mechanism, self.user.as_ref(), self.failure)
    }

    /// Number of login commands, including the current one.
    pub(super) fn attempts(&self) -> u32 {
        self.attempts
    }

    pub(super) fn tls(&self) -> Option<&TlsInfo> {
        self.tls.as_ref()
    }

    /// Takes the addresses and TLS properties of the client from a PROXY header.
    pub(super) fn set_proxied(
        &mut self,
        session: SessionId,
        client: SocketAddr,
        listener: SocketAddr,
        tls: Option<TlsInfo>,
    ) {
        (self.session, self.client, self.listener, self.tls) = (session, client.into(), listener.into(), tls);
    }

    /// The connection is a health check of a balancer. Such connections are frequent: they may end at any time without a failure,
    /// and their record is logged at level debug.
    pub(super) fn set_balancer_check(&mut self) {
        self.is_balancer_check = true;
    }

    pub(super) fn encrypted(&mut self, duration: Duration, info: Option<TlsInfo>) {
        self.times.tls = Some(duration.into());
        self.tls = info;
    }

    /// A login command is complete. The record contains only the last one. `user` is `None` if the credentials are invalid.
    pub(super) fn attempt(&mut self, user: Option<&UserName>, mechanism: Mechanism) {
        self.attempts += 1;
        self.user = user.cloned();
        self.mechanism = Some(mechanism);
        (self.route, self.backend, self.server, self.failure, self.detail) = (None, None, None, None, None);
        (self.outcome, self.times.route) = (None, None);
    }

    pub(super) fn routed(&mut self, route: &Arc<str>, backend: Option<&Arc<str>>, duration: Duration) {
        self.route = Some(route.clone());
        self.backend = backend.cloned();
        self.times.route = Some(duration.into());
    }

    /// The attempt ended without an answer of a server, for a reason that has not been counted yet.
    pub(super) fn attempt_failed(&mut self, reason: Reason, outcome: LoginOutcome, backend: Option<BackendId>) {
        self.settings.metrics.failure(reason);
        self.attempt_ended(reason, outcome, backend);
    }

    /// The attempt ended for a reason that has been counted.
    pub(super) fn attempt_ended(&mut self, reason: Reason, outcome: LoginOutcome, backend: Option<BackendId>) {
        self.failure = Some(reason);
        self.answered(outcome, backend);
    }

    /// The route has checked the password and refused it.
    pub(super) fn denied(&mut self) {
        self.answered(LoginOutcome::Refused, None);
    }

    pub(super) fn refused(&mut self, backend: BackendId, server: Option<&Arc<str>>) {
        self.server = server.cloned();
        self.answered(LoginOutcome::Refused, Some(backend));
    }

    pub(super) fn accepted(
        &mut self,
        backend: &Backend,
        server: &Arc<str>,
        established: &Established,
        duration: Duration,
    ) {
        // After a referral it may be another backend than the route named.
        self.backend = Some(backend.name.clone());
        self.server = Some(server.clone());
        self.address = Some(established.address.into());
        self.times.connect = Some(established.connect.into());
        self.times.server_login = Some(established.login.into());
        self.times.login = Some(duration.into());
        self.answered(LoginOutcome::Accepted, Some(backend.id));
    }

    /// The connection ended before the attempt had an answer. `backend` is the one whose server was asked.
    pub(super) fn abandoned(&mut self, backend: Option<BackendId>) {
        self.answered(LoginOutcome::Abandoned, backend);
    }

    /// Counts the attempt once. A refused token stays refused, however the exchange ends.
    fn answered(&mut self, outcome: LoginOutcome, backend: Option<BackendId>) {
        if self.outcome.is_some() && outcome != LoginOutcome::Accepted {
            return;
        }
        self.outcome = Some(outcome);
        if let Some(mechanism) = self.mechanism {
            self.settings.metrics.login(backend.map(|id| id.0), mechanism, outcome);
        }
    }

    /// Counts and records the reason of the end of the session.
    pub(super) fn record_failure(&mut self, reason: Reason) {
        if self.is_balancer_check && self.attempts == 0 && matches!(reason, Reason::Disconnected | Reason::Handshake) {
            return;
        }
        self.settings.metrics.failure(reason);
        self.failure = Some(reason);
    }

    /// Sets an explanation for the operator.
    pub(super) fn set_detail(&mut self, detail: String) {
        self.detail = Some(bounded(detail).into());
    }

    pub(super) fn set_ended_by(&mut self, side: EndedBy) {
        self.ended_by = side;
    }

    /// The login is complete: the session counts for the backend and the server until the record is dropped.
    pub(super) fn set_relaying(&mut self, backend: BackendId, permit: ServerPermit) {
        self.relaying = Some(Relaying {
            backend: backend.0 as u16,
            _backend_sessions: self.settings.metrics.backend(backend.0).session_established(),
            server_session: permit.established(),
        });
    }

    /// Logs the successful login at once, because the final record may be written days later, or never if the process is killed.
    pub(super) fn log_login(&self) {
        log_record!(self, info, "logged in", {}, {});
    }

    /// Uses the settings of a newer configuration.
    pub(super) fn set_settings(&mut self, settings: Arc<SessionSettings>) {
        self.settings = settings;
    }

    /// The settings of the configuration that the last login used.
    pub(super) fn settings(&self) -> &SessionSettings {
        &self.settings
    }

    pub(super) fn byte_counters(&self) -> ByteCounters {
        let backend = self.relaying.as_ref().map_or(0, |relaying| relaying.backend);
        let (to_client, to_server) = self.settings.metrics.backend(backend.into()).byte_counters();
        ByteCounters { to_client, to_server }
    }

    /// The server has closed during silence, and the session does not count for it any more. Returns `None` if the client is
    /// disconnected at once.
    pub(super) fn server_closed(&mut self) -> Option<DelayedDisconnect> {
        let max_delay = self.settings.limits.max_disconnect_delay?;
        let disconnect = self.relaying.as_mut()?.server_session.closed_by_server(max_delay)?;
        if let Some(sessions) = disconnect.half_of {
            let (backend, server) = (self.backend.as_deref(), self.server.as_deref());
            tracing::warn!(
                backend,
                server,
                sessions,
                "the server closes all sessions; their clients are disconnected one after the other"
            );
        }
        self.record_failure(Reason::ServerGone);
        Some(disconnect)
    }

    pub(super) fn relayed(&mut self, end: SessionEnd, moved: BytesMoved) {
        self.moved = moved;
        let end = match end {
            SessionEnd::Relay(end) => end,
            SessionEnd::Cancelled(reason) => {
                self.ended_by = EndedBy::Cancelled;
                return self.record_failure(failure_reason(reason));
            }
        };
        self.ended_by = match end {
            RelayEnd::Client | RelayEnd::ClientStalled | RelayEnd::ClientTls(_) => EndedBy::Client,
            RelayEnd::Server | RelayEnd::ServerStalled | RelayEnd::ServerTls(_) => EndedBy::Server,
            RelayEnd::Idle => EndedBy::Idle,
        };
        let reason = match end {
            RelayEnd::Client | RelayEnd::Server | RelayEnd::Idle => return,
            RelayEnd::ClientStalled => Reason::Stalled,
            RelayEnd::ServerStalled => Reason::ServerStalled,
            RelayEnd::ClientTls(violation) => {
                self.set_detail(violation.to_string());
                Reason::TlsViolation
            }
            RelayEnd::ServerTls(violation) => {
                self.set_detail(violation.to_string());
                Reason::ServerTlsViolation
            }
        };
        self.record_failure(reason);
    }

    /// The session ended because it could not be parked or unparked.
    pub(super) fn lost(&mut self, error: &std::io::Error) {
        self.ended_by = EndedBy::Proxy;
        self.set_detail(error.to_string());
        self.record_failure(Reason::System);
    }
}

/// The reason of failure of a session that was cancelled.
pub(super) fn failure_reason(reason: CancelReason) -> Reason {
    match reason {
        CancelReason::Stopped => Reason::Drain,
        CancelReason::Kicked => Reason::Kicked,
        CancelReason::Moved | CancelReason::Replaced => Reason::Moved,
        CancelReason::Drained => Reason::ServerDrained,
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        let duration = self.began.elapsed();
        if let Some(relaying) = &self.relaying {
            self.settings.metrics.backend(relaying.backend.into()).session_ended(duration);
        }
        if std::thread::panicking() {
            self.failure = Some(Reason::Panic);
            self.settings.metrics.failure(Reason::Panic);
            self.ended_by = EndedBy::Proxy;
        }
        // A macro, because the level must be a constant.
        macro_rules! ended {
            ($level:ident) => {
                log_record!(
                    self,
                    $level,
                    "session ended",
                    {
                        outcome = self.outcome.map_or("none", LoginOutcome::as_str),
                        ended_by = self.ended_by.as_str(),
                        side = self.failure.map(|reason| reason.side().as_str()),
                        reason = self.failure.map(Reason::as_str),
                        detail = self.detail.as_deref(),
                    },
                    {
                        seconds = duration.as_secs_f64(),
                        to_client = self.moved.to_client,
                        to_server = self.moved.to_server,
                    }
                )
            };
        }
        // Directories that work as intended.
        let is_decision =
            |reason| matches!(reason, Reason::UnknownUser | Reason::RouteRefused | Reason::RouteMaintenance);
        match self.failure.map(Reason::side) {
            None if self.is_balancer_check && self.attempts == 0 => ended!(debug),
            None | Some(Side::Client | Side::Shutdown) => ended!(info),
            // A limit of one user needs no action of the operator.
            Some(Side::Backend) if self.failure == Some(Reason::UserLimit) => ended!(info),
            Some(Side::Directory) if self.failure.is_some_and(is_decision) => ended!(info),
            Some(Side::Directory | Side::Backend) => ended!(warn),
            Some(Side::Internal) => ended!(error),
        }
    }
}

/// Truncates a text that is too long: it may come from a directory or a server, and is kept until the session ends.
pub(super) fn bounded(mut text: String) -> String {
    if text.len() > MAX_DETAIL {
        text.truncate(text.floor_char_boundary(MAX_DETAIL - "…".len()));
        text.push('…');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn detail_is_bounded() {
        assert_eq!(bounded("short".to_owned()), "short");
        assert_eq!(bounded("x".repeat(512)), "x".repeat(512));
        assert_eq!(bounded("\u{e4}".repeat(300)), format!("{}…", "\u{e4}".repeat(254)));
    }

    #[test]
    fn record_is_small() {
        assert!(size_of::<Record>() <= 320, "{}", size_of::<Record>());
    }
}
