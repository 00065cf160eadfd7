//! The record of a session: filled in as it proceeds, logged when the login succeeds ("logged in"), and once more, with how it
//! ended, when it drops ("session ended"), whatever ended the session.
//!
//! Attempts and failures are counted here too, so that a metric and the record never tell different stories. No secret
//! reaches this file: it is handed names and words.

use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::backend::login::Established;
use crate::backend::{Backend, DelayedDisconnect, ServerPermit, SessionPermit};
use crate::config::BackendId;
use crate::failure::{Reason, Side};
use crate::identity::{Mechanism, UserName};
use crate::metrics::{GaugeGuard, LoginOutcome};
use crate::relay::{ByteCounters, BytesMoved, RelayEnd};
use crate::session::established::SessionEnd;
use crate::session::id::SessionId;
use crate::session_registry::CancelReason;
use crate::snapshot::SessionSettings;
use crate::stream::TlsFacts;

/// Bytes of [`Record::detail`].
const MAX_DETAIL: usize = 512;

/// Logs a [`Record`]: the fields that "logged in" and "session ended" have in common, and the given ones before and after the
/// times of the phases.
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
            tls_ms = $record.times.tls.map(Took::milliseconds),
            route_ms = $record.times.route.map(Took::milliseconds),
            connect_ms = $record.times.connect.map(Took::milliseconds),
            server_login_ms = $record.times.server_login.map(Took::milliseconds),
            login_ms = $record.times.login.map(Took::milliseconds),
            $($after_times)*
            $message
        )
    };
}

/// What is known of a session so far. It is most of what an idle session keeps, so it is packed: a test holds its size.
pub(super) struct Record {
    settings: Arc<SessionSettings>,
    began: Instant,
    session: SessionId,
    client: Address,
    listener: Address,
    tls: Option<TlsFacts>,
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
    is_check: bool,
    times: Times,
    moved: BytesMoved,
    relaying: Option<Relaying>,
}

/// Whose doing the end was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum EndedBy {
    Client,
    Server,
    Proxy,
    Idle,
    Drain,
}

impl EndedBy {
    fn as_str(self) -> &'static str {
        match self {
            Self::Client => "client",
            Self::Server => "server",
            Self::Proxy => "proxy",
            Self::Idle => "idle",
            Self::Drain => "drained",
        }
    }
}

/// An address in two thirds of a [`SocketAddr`]'s poller.
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

/// Gauges of a relayed session, and the backend it counts for.
struct Relaying {
    backend: u16,
    _backend_sessions: GaugeGuard,
    slot: SessionPermit,
}

/// How long each phase took.
#[derive(Default)]
struct Times {
    tls: Option<Took>,
    route: Option<Took>,
    connect: Option<Took>,
    server_login: Option<Took>,
    login: Option<Took>,
}

/// Microseconds, at least one, up to 71 minutes.
#[derive(Clone, Copy)]
struct Took(NonZeroU32);

impl From<Duration> for Took {
    fn from(duration: Duration) -> Self {
        let micros = u32::try_from(duration.as_micros()).unwrap_or(u32::MAX);
        Self(NonZeroU32::new(micros).unwrap_or(NonZeroU32::MIN))
    }
}

impl Took {
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
            is_check: false,
            times: Times::default(),
            moved: BytesMoved::default(),
            relaying: None,
        }
    }

    pub(super) fn session(&self) -> SessionId {
        self.session
    }

    /// The client's address.
    pub(super) fn client(&self) -> IpAddr {
        self.client.ip
    }

    /// Of the last attempt: what it was made with, whose it was, and why it failed if not for the password.
    pub(super) fn last_attempt(&self) -> (Option<Mechanism>, Option<&UserName>, Option<Reason>) {
        (self.mechanism, self.user.as_ref(), self.failure)
    }

    /// Login commands so far, the one under way included.
    pub(super) fn attempts(&self) -> u32 {
        self.attempts
    }

    pub(super) fn tls(&self) -> Option<&TlsFacts> {
        self.tls.as_ref()
    }

    /// A balancer has said whose connection it is, and how that client came to it.
    pub(super) fn introduced(
        &mut self,
        session: SessionId,
        client: SocketAddr,
        listener: SocketAddr,
        tls: Option<TlsFacts>,
    ) {
        (self.session, self.client, self.listener, self.tls) = (session, client.into(), listener.into(), tls);
    }

    /// A balancer only looks whether we are alive, which it does all day: it may leave when it has seen enough, and its
    /// record is for those who look for it.
    pub(super) fn is_check(&mut self) {
        self.is_check = true;
    }

    pub(super) fn encrypted(&mut self, took: Duration, facts: Option<TlsFacts>) {
        self.times.tls = Some(took.into());
        self.tls = facts;
    }

    /// A login command is complete. What an earlier one left is forgotten: the record tells of the last.
    /// `None`: the credentials have no usable name.
    pub(super) fn attempt(&mut self, user: Option<&UserName>, mechanism: Mechanism) {
        self.attempts += 1;
        self.user = user.cloned();
        self.mechanism = Some(mechanism);
        (self.route, self.backend, self.server, self.failure, self.detail) = (None, None, None, None, None);
        (self.outcome, self.times.route) = (None, None);
    }

    pub(super) fn routed(&mut self, route: &Arc<str>, backend: Option<&Arc<str>>, took: Duration) {
        self.route = Some(route.clone());
        self.backend = backend.cloned();
        self.times.route = Some(took.into());
    }

    /// The attempt ended without an answer of a server.
    pub(super) fn attempt_failed(&mut self, reason: Reason, outcome: LoginOutcome, backend: Option<BackendId>) {
        self.settings.metrics.failure(reason);
        self.attempt_ended(reason, outcome, backend);
    }

    /// The attempt ended for a reason that was counted already.
    pub(super) fn attempt_ended(&mut self, reason: Reason, outcome: LoginOutcome, backend: Option<BackendId>) {
        self.failure = Some(reason);
        self.answered(outcome, backend);
    }

    /// The route has checked the password, and it was wrong.
    pub(super) fn denied(&mut self) {
        self.answered(LoginOutcome::Refused, None);
    }

    pub(super) fn refused(&mut self, backend: BackendId, server: Option<&Arc<str>>) {
        self.server = server.cloned();
        self.answered(LoginOutcome::Refused, Some(backend));
    }

    pub(super) fn accepted(&mut self, backend: &Backend, server: &Arc<str>, established: &Established, took: Duration) {
        // A referral may have led to another than the route named.
        self.backend = Some(backend.name.clone());
        self.server = Some(server.clone());
        self.address = Some(established.address.into());
        self.times.connect = Some(established.connect.into());
        self.times.server_login = Some(established.login.into());
        self.times.login = Some(took.into());
        self.answered(LoginOutcome::Accepted, Some(backend.id));
    }

    /// The connection ended, or must end, before the attempt had an answer; `backend` is the one whose server was asked.
    pub(super) fn abandoned(&mut self, backend: Option<BackendId>) {
        self.answered(LoginOutcome::Abandoned, backend);
    }

    /// Counts the attempt, once: a refused token stays refused, however the exchange ends after that.
    fn answered(&mut self, outcome: LoginOutcome, backend: Option<BackendId>) {
        if self.outcome.is_some() && outcome != LoginOutcome::Accepted {
            return;
        }
        self.outcome = Some(outcome);
        if let Some(mechanism) = self.mechanism {
            self.settings.metrics.login(backend.map(|id| id.0), mechanism, outcome);
        }
    }

    /// The session ends for this reason.
    pub(super) fn failed(&mut self, reason: Reason) {
        if self.is_check && self.attempts == 0 && matches!(reason, Reason::Disconnected | Reason::Handshake) {
            return;
        }
        self.settings.metrics.failure(reason);
        self.failure = Some(reason);
    }

    /// A sentence for the operator.
    pub(super) fn detail(&mut self, detail: String) {
        self.detail = Some(bounded(detail).into());
    }

    pub(super) fn ended_by(&mut self, side: EndedBy) {
        self.ended_by = side;
    }

    /// The login is done: counts for the backend and the server until the record drops.
    pub(super) fn open_on(&mut self, backend: BackendId, slot: ServerPermit) {
        self.relaying = Some(Relaying {
            backend: backend.0 as u16,
            _backend_sessions: self.settings.metrics.backend(backend.0).session_established(),
            slot: slot.established(),
        });
    }

    /// Logs the successful login at once, because the final record may be days away, or lost with the process.
    pub(super) fn log_login(&self) {
        log_record!(self, info, "logged in", {}, {});
    }

    /// Another configuration holds from now on.
    pub(super) fn now_under(&mut self, settings: Arc<SessionSettings>) {
        self.settings = settings;
    }

    /// The settings at the session's last login.
    pub(super) fn settings(&self) -> &SessionSettings {
        &self.settings
    }

    /// Where bytes of the relay are counted: to the client, to the server.
    pub(super) fn byte_counters(&self) -> ByteCounters {
        let backend = self.relaying.as_ref().map_or(0, |relaying| relaying.backend);
        let (to_client, to_server) = self.settings.metrics.backend(backend.into()).byte_counters();
        ByteCounters { to_client, to_server }
    }

    /// The server has closed without being asked: it counts the session no more. `None`: the client is not kept.
    pub(super) fn cut_off(&mut self) -> Option<DelayedDisconnect> {
        let over = self.settings.limits.max_disconnect_delay?;
        let cut_off = self.relaying.as_mut()?.slot.closed_by_server(over)?;
        if let Some(sessions) = cut_off.half_of {
            let (backend, server) = (self.backend.as_deref(), self.server.as_deref());
            tracing::warn!(
                backend,
                server,
                sessions,
                "the server closes all sessions: their clients are closed one by one"
            );
        }
        self.failed(Reason::ServerGone);
        Some(cut_off)
    }

    pub(super) fn relayed(&mut self, over: SessionEnd, moved: BytesMoved) {
        self.moved = moved;
        let end = match over {
            SessionEnd::Ended(end) => end,
            SessionEnd::Told(why) => return self.cancelled(why),
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
                self.detail(violation.to_string());
                Reason::TlsViolation
            }
            RelayEnd::ServerTls(violation) => {
                self.detail(violation.to_string());
                Reason::ServerTlsViolation
            }
        };
        self.failed(reason);
    }

    /// The session is cancelled.
    pub(super) fn cancelled(&mut self, why: CancelReason) {
        self.ended_by = EndedBy::Drain;
        self.failed(reason(why));
    }

    /// The system would not let the session rest, or come back.
    pub(super) fn lost(&mut self, error: &std::io::Error) {
        self.ended_by = EndedBy::Proxy;
        self.detail(error.to_string());
        self.failed(Reason::System);
    }
}

/// The word for a session that was told to end.
pub(super) fn reason(why: CancelReason) -> Reason {
    match why {
        CancelReason::Stopped => Reason::Drain,
        CancelReason::Kicked => Reason::Kicked,
        CancelReason::Moved | CancelReason::Replaced => Reason::Moved,
        CancelReason::Drained => Reason::ServerDrained,
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        let length = self.began.elapsed();
        if let Some(relaying) = &self.relaying {
            self.settings.metrics.backend(relaying.backend.into()).session_ended(length);
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
                        seconds = length.as_secs_f64(),
                        to_client = self.moved.to_client,
                        to_server = self.moved.to_server,
                    }
                )
            };
        }
        let is_answer =
            |reason| matches!(reason, Reason::UnknownUser | Reason::RouteRefused | Reason::RouteMaintenance);
        match self.failure.map(Reason::side) {
            None if self.is_check && self.attempts == 0 => ended!(debug),
            None | Some(Side::Client | Side::Shutdown) => ended!(info),
            // A limit of one user concerns that user.
            Some(Side::Backend) if self.failure == Some(Reason::UserLimit) => ended!(info),
            Some(Side::Directory) if self.failure.is_some_and(is_answer) => ended!(info),
            Some(Side::Directory | Side::Backend) => ended!(warn),
            Some(Side::Internal) => ended!(error),
        }
    }
}

/// The text, or the beginning of one that is too long: directories and servers have a say in it, and a session keeps it.
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
    fn a_detail_of_the_record_is_bounded() {
        assert_eq!(bounded("as it is".to_owned()), "as it is");
        assert_eq!(bounded("x".repeat(512)), "x".repeat(512));
        assert_eq!(bounded("\u{e4}".repeat(300)), format!("{}…", "\u{e4}".repeat(254)));
    }

    #[test]
    fn a_record_is_small() {
        assert!(size_of::<Record>() <= 320, "{}", size_of::<Record>());
    }
}
