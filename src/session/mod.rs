//! One client connection from accept to close.
//!
//! | step | module | deadline | if it fails |
//! |---|---|---|---|
//! | 1 wait for a permit, read a PROXY header | [`throttling`], [`proxy_header`] | `limits.proxy_header` | the connection closes |
//! | 2 TLS handshake | [`tls_handshake`] | `limits.handshake` | the connection closes |
//! | 3 commands until a login is complete | `imap::prelogin`, driven by [`Session::log_in`] | `limits.login`, from the accept | BYE |
//! | 4 which backend | [`attempt`], `route` | `limits.lookup` | NO `[UNAVAILABLE]`, or refused if the user is unknown |
//! | 5 which server | [`placement`], `backend` | `limits.server_login`, for all servers | the next server, then NO `[UNAVAILABLE]` |
//! | 6 log in there, and wait for the user's sessions on other servers to end | [`placement`], `backend::login` | a share of step 5's | the server's NO is passed on and not retried |
//! | 7 answer the client | [`established`] | none | |
//! | 8 relay, park while silent | [`established`], `relay` | `limits.idle`, `limits.stall`, `limits.half_close` | the session ends |
//! | 9 log records, one at the login and one at the end | [`log_record`] | | always written |
//!
//! Only this file, `attempt` and `placement` know the order. From step 4 on the login is in the session registry and ends when it is
//! cancelled there. At every step before 7 it ends when the process stops or the connection is shed. Nothing of a refused attempt is
//! kept: the next login is parsed, routed and sent to a new server connection.

mod attempt;
mod attempt_result;
mod client_io;
mod established;
mod id;
mod log_record;
mod placement;
mod policy_check;
mod proxy_header;
mod proxy_header_warning;
mod refusal;
mod routing;
mod sasl_exchange;
mod server_credentials;
mod throttling;
mod tls_handshake;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::net::TcpStream;
use tokio::sync::watch;

use self::attempt_result::{AttemptResult, Connection, FailedLogin, Refusal};
use self::client_io::{Ending, close};
pub(crate) use self::established::ParkedSession;
use self::established::RelayedSession;
use self::log_record::{EndedBy, Record};
pub(crate) use self::proxy_header::log_unknown_balancer;
use self::proxy_header_warning::ProxyHeaderDetector;
pub(crate) use self::throttling::refuse_connection;
use crate::admission::connection_limit::ConnectionPermit;
use crate::admission::{ConnectionCount, MemoryBudgetExceeded, MemoryCharge, PreloginTicket};
use crate::auth_policy::{self, LoginResult};
use crate::config::TlsMode;
use crate::deadline::Deadline;
use crate::metrics::GaugeGuard;
use crate::process::drain::Drain;
use crate::protocol::imap::capability::Transport;
use crate::protocol::imap::prelogin::{LoginRequest, Prelogin, PreloginSettings, PreloginStep};
use crate::protocol::imap::refusal::RefusalKind;
use crate::relay::idle_poller::IdlePoller;
use crate::snapshot::{ListenerConfig, Snapshot};
use crate::stream::Stream;

/// Maximum time to send BYE or close_notify to a client before its socket closes.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);
/// Bytes of memory for each byte of credentials during a login. An HTTP route that receives passwords needs most: the credentials,
/// its own copy of them, and JSON, in which a byte may take six. The dialogue with a server needs five: the credentials, the same
/// under the name that the server knows, base64, and the TLS records.
const COPIES: usize = 9;

/// An accepted connection and what it is served with.
pub(crate) struct AcceptedConnection {
    pub socket: TcpStream,
    pub peer: SocketAddr,
    /// The address that the listener is bound to.
    pub local: SocketAddr,
    /// Index of the listener in the configuration.
    pub listener: usize,
    pub tls: TlsMode,
    pub snapshot: Arc<Snapshot>,
    /// Receives the next configuration of the listener.
    pub listener_config: watch::Receiver<ListenerConfig>,
    pub drain: Drain,
    pub poller: Arc<SessionPoller>,
    pub prelogin_ticket: PreloginTicket,
    pub permits: ConnectionPermits,
}

/// The permits and counts of a connection, released when it closes.
#[derive(Debug)]
pub(crate) struct ConnectionPermits {
    /// Permit of `limits.sessions`.
    #[expect(dead_code, reason = "it counts until it is dropped")]
    pub connection: ConnectionPermit,
    /// Adds the connection to the gauge of the listener.
    #[expect(dead_code, reason = "it counts until it is dropped")]
    pub open_gauge: GaugeGuard,
    /// Share of the limits by address, network and user.
    pub count: ConnectionCount,
}

/// The poller of silent sessions of a worker.
pub(crate) type SessionPoller = IdlePoller<ParkedSession>;

/// The session has ended, and the client has been notified if that was possible. There is nothing left to do for the caller.
#[derive(Debug)]
struct SessionEnded;

/// Serves a connection until it is logged in, or to its end.
pub(crate) async fn serve(accepted: AcceptedConnection) {
    let tls = accepted.tls;
    let (session, socket) = Session::new(accepted);
    let Ok(relayed) = session.log_in(socket, tls).await else { return };
    // In a new task, so that nothing of the login phase stays allocated while bytes are relayed.
    tokio::spawn(relayed.run());
}

/// The connection of a client that has not logged in yet.
struct Session {
    snapshot: Arc<Snapshot>,
    listener_config: watch::Receiver<ListenerConfig>,
    drain: Drain,
    poller: Arc<SessionPoller>,
    prelogin_ticket: Option<PreloginTicket>,
    /// Charge for the input of the client.
    memory: MemoryCharge,
    /// Charge for the copies of the client's credentials.
    login_memory: MemoryCharge,
    /// The routing name of the user of the current login; `None` while it is not known.
    routing_name: Option<Arc<str>>,
    /// The request that the policy service has allowed and whose result it has not received yet.
    pending_report: Option<Box<auth_policy::Attempt>>,
    permits: ConnectionPermits,
    peer: SocketAddr,
    local: SocketAddr,
    /// Whether both addresses are from a PROXY header.
    is_proxied: bool,
    /// Index of the listener in the configuration.
    listener: usize,
    login_deadline: Deadline,
    header_detector: ProxyHeaderDetector,
    record: Record,
}

impl Session {
    fn new(accepted: AcceptedConnection) -> (Self, TcpStream) {
        let AcceptedConnection { socket, peer, local, listener, snapshot, prelogin_ticket, .. } = accepted;
        // The address of a listener bound to `[::]` is known only from the connection.
        let local = if local.ip().is_unspecified() { socket.local_addr().unwrap_or(local) } else { local };
        let session = Self {
            login_deadline: Deadline::after(snapshot.limits.login),
            record: Record::new(id::new(peer), peer, local, snapshot.session_settings.clone()),
            snapshot,
            listener_config: accepted.listener_config,
            drain: accepted.drain,
            poller: accepted.poller,
            memory: prelogin_ticket.charge(),
            login_memory: prelogin_ticket.charge(),
            prelogin_ticket: Some(prelogin_ticket),
            routing_name: None,
            pending_report: None,
            permits: accepted.permits,
            peer,
            local,
            is_proxied: false,
            listener,
            header_detector: ProxyHeaderDetector::default(),
        };
        (session, socket)
    }

    /// Steps 1 to 7: talks to the client until a server has accepted a login.
    async fn log_in(mut self, socket: TcpStream, tls: TlsMode) -> Result<RelayedSession, SessionEnded> {
        let (mut stream, transport) = self.connect(socket, tls).await?;
        let mut prelogin = Prelogin::new(self.prelogin_settings(transport, &stream));
        let mut out = Vec::new();
        prelogin.greet(&mut out);
        loop {
            let step = prelogin.step(&mut out);
            self.send(&mut stream, &mut out).await?;
            let began = Instant::now();
            self.pending_report = None;
            match step {
                PreloginStep::NeedInput => self.receive(&mut stream, &mut prelogin).await?,
                PreloginStep::Send => {}
                PreloginStep::StartTls => (stream, prelogin) = self.start_tls(stream).await?,
                PreloginStep::Login(mut request) => {
                    match self.bounded_attempt(&mut request, &mut stream, &mut prelogin).await? {
                        AttemptResult::Accepted(accepted) => {
                            self.report(LoginResult::Success);
                            let leftover = prelogin.into_leftover();
                            return self.establish(&request.tag, stream, leftover, accepted).await;
                        }
                        AttemptResult::Refused(refusal) => {
                            out = self.refuse(refusal, request, began, &mut stream, &mut prelogin).await?;
                        }
                        AttemptResult::Unavailable => prelogin.unavailable(&request.tag, &mut out),
                    }
                }
                PreloginStep::InvalidLogin(login) => {
                    let reply = self.refuse_invalid(login, began).await;
                    prelogin.refused(&reply, RefusalKind::FailedLogin, &mut out);
                }
                PreloginStep::Close(reason) => return self.close_as_requested(reason, &mut stream).await,
            }
        }
    }

    /// Steps 1 and 2: waits for a permit, the PROXY header and the handshake.
    async fn connect(&mut self, mut socket: TcpStream, tls: TlsMode) -> Result<(Stream, Transport), SessionEnded> {
        self.wait_for_admission(&socket).await?;
        self.read_proxy_header(&mut socket).await?;
        let (stream, transport) = match tls {
            TlsMode::Implicit => (self.encrypt(socket).await?, Transport::Tls),
            TlsMode::StartTls => (Stream::Plain(socket), Transport::StartTls),
            TlsMode::None => (Stream::Plain(socket), Transport::Plain),
        };
        if transport != Transport::Tls && self.snapshot.config.listeners[self.listener].proxy_protocol.is_none() {
            self.header_detector = ProxyHeaderDetector::on();
        }
        Ok((stream, transport))
    }

    /// Step 2 after STARTTLS. Nothing that was received before is trusted: parser, counters and ID start anew.
    async fn start_tls(&mut self, stream: Stream) -> Result<(Stream, Prelogin), SessionEnded> {
        let Stream::Plain(socket) = stream else { return Err(SessionEnded) };
        let stream = self.encrypt(socket).await?;
        let prelogin = Prelogin::new(self.prelogin_settings(Transport::Tls, &stream));
        Ok((stream, prelogin))
    }

    /// What the dialogue with the client offers and accepts.
    fn prelogin_settings(&self, transport: Transport, stream: &Stream) -> PreloginSettings {
        let limits = &self.snapshot.limits;
        let tls = self.snapshot.tls.as_ref();
        let certificate =
            stream.peer_certificate().and_then(|certificate| tls?.certificate_user(self.listener, certificate));
        PreloginSettings {
            transport,
            max_line: limits.line,
            max_literal: limits.literal,
            max_bad_commands: limits.bad_commands,
            max_failed_logins: limits.failed_logins,
            mechanisms: self.snapshot.mechanisms(self.listener),
            certificate,
            extensions: self.snapshot.backends.offer().extensions,
            issuers: self.snapshot.config.token_issuers.clone(),
        }
    }

    /// Steps 4 to 6: one login attempt. It ends early, with its connection to a server, when the process stops or the connection is
    /// shed. While it is under way with complete credentials, the connection is among the last to be shed. The copies of the
    /// credentials are charged to the memory budget.
    async fn bounded_attempt(
        &mut self,
        request: &mut LoginRequest,
        stream: &mut Stream,
        prelogin: &mut Prelogin,
    ) -> Result<AttemptResult, SessionEnded> {
        if self.charge_login(request.credentials.proof_size()).is_err() {
            return Err(self.end(stream, prelogin, Ending::MEMORY).await);
        }
        self.set_login_began(request.credentials.is_complete().then(Instant::now));
        let termination = self.termination();
        let ending = tokio::select! {
            biased;
            result = self.attempt(request, stream, prelogin) => {
                if result.is_err() {
                    self.record.abandoned(None);
                }
                self.set_login_began(None);
                // A smaller charge never exceeds the budget.
                let _ = self.login_memory.resize(0);
                return result;
            }
            ending = termination => ending,
        };
        self.record.abandoned(None);
        Err(self.end(stream, prelogin, ending).await)
    }

    /// Answers a login that was refused, and closes the connection if the refusal requires it. Returns what is to be sent.
    async fn refuse(
        &mut self,
        refusal: Refusal,
        request: LoginRequest,
        began: Instant,
        stream: &mut Stream,
        prelogin: &mut Prelogin,
    ) -> Result<Vec<u8>, SessionEnded> {
        let Refusal { mut reply, failed_login, connection } = refusal;
        if let FailedLogin::LoggedAndDelayed { not_before } = failed_login {
            self.refused_login(request, began, not_before).await;
        }
        match connection {
            Connection::StaysOpen => {
                let mut out = Vec::new();
                prelogin.refused(&reply, failed_login.kind(), &mut out);
                Ok(out)
            }
            Connection::Closes => {
                self.send(stream, &mut reply).await?;
                self.record.set_ended_by(EndedBy::Proxy);
                close(stream).await;
                Err(SessionEnded)
            }
        }
    }

    /// Charges a login whose longest message has `length` bytes.
    fn charge_login(&mut self, length: usize) -> Result<(), MemoryBudgetExceeded> {
        self.login_memory.resize_copies(length, COPIES)
    }

    /// Reports since when a login with complete credentials is under way: such a connection is among the last to be shed.
    fn set_login_began(&self, began: Option<Instant>) {
        match (&self.prelogin_ticket, began) {
            (Some(ticket), Some(began)) => ticket.login_begun(began),
            (Some(ticket), None) => ticket.login_ended(),
            (None, _) => {}
        }
    }

    /// Takes the newest configuration, with which a login is routed. What the client was greeted with stays as it is.
    fn update_snapshot(&mut self) {
        // A removed listener has no index in a newer configuration and keeps its last one.
        if self.listener_config.has_changed().is_ok_and(|changed| changed) {
            let ListenerConfig { snapshot, index } = self.listener_config.borrow_and_update().clone();
            self.record.set_settings(snapshot.session_settings.clone());
            (self.snapshot, self.listener) = (snapshot, index);
        }
    }
}
