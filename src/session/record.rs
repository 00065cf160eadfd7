//! The one record a session leaves: filled in on the way, written when it drops, whatever ended the session.
//!
//! Attempts and failures are counted here too, so that a metric and the record never tell different stories. No secret
//! reaches this file: it is handed names and words.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::backend::connect::Established;
use crate::config::BackendId;
use crate::failure::{Reason, Side};
use crate::identity::{Mechanism, UserName};
use crate::metrics::{LoginOutcome, Metrics, OpenGuard};
use crate::relay::End;
use crate::stream::TlsFacts;

/// What is known of a session so far.
pub(super) struct Record {
    metrics: Arc<Metrics>,
    began: Instant,
    session: String,
    client: SocketAddr,
    listener: SocketAddr,
    tls: Option<TlsFacts>,
    user: Option<UserName>,
    mechanism: Option<Mechanism>,
    route: Option<Box<str>>,
    backend: Option<Box<str>>,
    relayed_on: Option<BackendId>,
    server: Option<Box<str>>,
    address: Option<SocketAddr>,
    attempts: u32,
    outcome: Option<LoginOutcome>,
    failure: Option<Reason>,
    detail: Option<Box<str>>,
    ended_by: &'static str,
    times: Times,
    to_client: u64,
    to_server: u64,
    open: Option<(OpenGuard, OpenGuard)>,
}

/// How long each phase took.
#[derive(Default)]
struct Times {
    tls: Option<Duration>,
    route: Option<Duration>,
    connect: Option<Duration>,
    server_login: Option<Duration>,
    login: Option<Duration>,
}

impl Record {
    pub(super) fn new(session: String, client: SocketAddr, listener: SocketAddr, metrics: Arc<Metrics>) -> Self {
        Self {
            metrics,
            began: Instant::now(),
            session,
            client: SocketAddr::new(client.ip().to_canonical(), client.port()),
            listener: SocketAddr::new(listener.ip().to_canonical(), listener.port()),
            tls: None,
            user: None,
            mechanism: None,
            route: None,
            backend: None,
            relayed_on: None,
            server: None,
            address: None,
            attempts: 0,
            outcome: None,
            failure: None,
            detail: None,
            ended_by: "client",
            times: Times::default(),
            to_client: 0,
            to_server: 0,
            open: None,
        }
    }

    pub(super) fn session_id(&self) -> &str {
        &self.session
    }

    pub(super) fn encrypted(&mut self, took: Duration, facts: Option<TlsFacts>) {
        self.times.tls = Some(took);
        self.tls = facts;
    }

    /// A login command is complete. What an earlier one left is forgotten: the record tells of the last.
    pub(super) fn attempt(&mut self, user: &UserName, mechanism: Mechanism) {
        self.attempts += 1;
        self.user = Some(user.clone());
        self.mechanism = Some(mechanism);
        (self.route, self.backend, self.server, self.failure, self.detail) = (None, None, None, None, None);
        self.times.route = None;
    }

    pub(super) fn routed(&mut self, route: &str, backend: &str, took: Duration) {
        self.route = Some(route.into());
        self.backend = Some(backend.into());
        self.times.route = Some(took);
    }

    /// The attempt ended without an answer of a server.
    pub(super) fn attempt_failed(&mut self, reason: Reason, outcome: LoginOutcome, backend: Option<BackendId>) {
        // A failure of a server was counted when that server was tried.
        if reason.side() != Side::Backend || reason == Reason::NoServer {
            self.metrics.failure(reason);
        }
        self.failure = Some(reason);
        self.answered(outcome, backend);
    }

    pub(super) fn refused(&mut self, backend: BackendId, server: Option<&str>) {
        self.server = server.map(Into::into);
        self.answered(LoginOutcome::Refused, Some(backend));
    }

    pub(super) fn accepted(&mut self, backend: BackendId, server: &str, established: &Established, took: Duration) {
        self.server = Some(server.into());
        self.address = Some(established.address);
        self.times.connect = Some(established.connect);
        self.times.server_login = Some(established.login);
        self.times.login = Some(took);
        self.relayed_on = Some(backend);
        self.answered(LoginOutcome::Accepted, Some(backend));
    }

    fn answered(&mut self, outcome: LoginOutcome, backend: Option<BackendId>) {
        self.outcome = Some(outcome);
        if let Some(mechanism) = self.mechanism {
            self.metrics.login(backend.map(|id| id.0), mechanism, outcome);
        }
    }

    /// The session ends for this reason.
    pub(super) fn failed(&mut self, reason: Reason) {
        self.metrics.failure(reason);
        self.failure = Some(reason);
    }

    /// A sentence for the operator.
    pub(super) fn detail(&mut self, detail: String) {
        self.detail = Some(detail.into());
    }

    pub(super) fn ended_by(&mut self, side: &'static str) {
        self.ended_by = side;
    }

    /// Gauges of the backend and the server, until the record drops.
    pub(super) fn open_on(&mut self, backend: OpenGuard, server: OpenGuard) {
        self.open = Some((backend, server));
    }

    pub(super) fn relayed(&mut self, end: End, to_client: u64, to_server: u64) {
        (self.to_client, self.to_server) = (to_client, to_server);
        self.ended_by = end.as_str();
        let reason = match end {
            End::Client | End::Server | End::Idle => return,
            End::ClientStalled => Reason::Stalled,
            End::ServerStalled => Reason::ServerStalled,
            End::ClientTls(violation) => {
                self.detail(violation.to_string());
                Reason::TlsViolation
            }
            End::ServerTls(violation) => {
                self.detail(violation.to_string());
                Reason::ServerTlsViolation
            }
            End::Drained => Reason::Drain,
        };
        self.failed(reason);
    }

    /// The system would not let the session rest, or come back.
    pub(super) fn lost(&mut self, error: &std::io::Error) {
        self.ended_by = "proxy";
        self.detail(error.to_string());
        self.failed(Reason::System);
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        let length = self.began.elapsed();
        if let Some(backend) = self.relayed_on {
            self.metrics.backend(backend.0).session_ended(length);
        }
        if std::thread::panicking() {
            self.failure = Some(Reason::Panic);
            self.metrics.failure(Reason::Panic);
            self.ended_by = "proxy";
        }
        macro_rules! emit {
            ($level:ident) => {
                tracing::$level!(
                    target: "vestibule::session",
                    session = self.session,
                    client = %self.client,
                    listener = %self.listener,
                    tls = self.tls.as_ref().map(|tls| tls.version),
                    sni = self.tls.as_ref().and_then(|tls| tls.server_name.as_deref()),
                    user = self.user.as_ref().map(UserName::as_str),
                    mechanism = self.mechanism.map(Mechanism::as_str),
                    attempts = self.attempts,
                    route = self.route.as_deref(),
                    backend = self.backend.as_deref(),
                    server = self.server.as_deref(),
                    address = self.address.map(tracing::field::display),
                    outcome = self.outcome.map_or("none", LoginOutcome::as_str),
                    ended_by = self.ended_by,
                    side = self.failure.map(|reason| reason.side().as_str()),
                    reason = self.failure.map(Reason::as_str),
                    detail = self.detail.as_deref(),
                    tls_ms = self.times.tls.map(milliseconds),
                    route_ms = self.times.route.map(milliseconds),
                    connect_ms = self.times.connect.map(milliseconds),
                    server_login_ms = self.times.server_login.map(milliseconds),
                    login_ms = self.times.login.map(milliseconds),
                    seconds = length.as_secs_f64(),
                    to_client = self.to_client,
                    to_server = self.to_server,
                    "session ended"
                )
            };
        }
        match self.failure.map(Reason::side) {
            None | Some(Side::Client | Side::Shutdown) => emit!(info),
            Some(Side::Directory) if self.failure == Some(Reason::UnknownUser) => emit!(info),
            Some(Side::Directory | Side::Backend) => emit!(warn),
            Some(Side::Internal) => emit!(error),
        }
    }
}

fn milliseconds(duration: Duration) -> f64 {
    // To the microsecond: more digits say nothing.
    (duration.as_secs_f64() * 1_000_000.0).round() / 1000.0
}
