//! One client connection from accept to close: the story.
//!
//! | step | where | deadline | when it fails |
//! |---|---|---|---|
//! | 1 whose connection it is | `proxy_protocol` in [`proxy_header`], where a balancer is in front | `limits.proxy_header` | the connection closes |
//! | 2 TLS handshake | [`Session::encrypt`] | `limits.handshake` | the connection closes |
//! | 3 who is it | `imap::prelogin` in [`Session::log_in`] | `limits.login`, from accept | BYE |
//! | 4 which backend | `route` in [`attempt`] | `limits.lookup` | NO `[UNAVAILABLE]`, or refused when unknown |
//! | 5 which server | `backend` in [`placement`] | `limits.server_login`, over all servers | next server, then NO `[UNAVAILABLE]` |
//! | 6 log in there, and wait for the user's sessions elsewhere to end | `backend::login`, [`placement`] | a share of the above | the server's NO is passed on, never retried |
//! | 7 answer the client | [`established::Relayed`] | none | |
//! | 8 relay | `relay`, `waiting` | `limits.idle`, `limits.stall`, `limits.half_close` | |
//! | 9 log lines | [`log_record::Record`]: one at the login, one at the end | always | |
//!
//! This file, `attempt` and `placement` alone know the order. From step 4 on the login is in the session registry and ends when it is
//! cancelled; at every step it ends with the process, and when it is shed. After a refusal nothing of the attempt is left: the next login is parsed, routed and
//! sent to a server connection of its own. Called by `listener`.

mod attempt;
mod established;
mod id;
mod log_record;
mod placement;
mod proxy_header;
mod proxy_header_warning;
mod refusal;
mod server_credentials;
mod throttling;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::timeout;
use zeroize::Zeroizing;

use self::attempt::Attempted;
pub(crate) use self::established::ParkedSession;
use self::established::Relayed;
use self::log_record::{EndedBy, Record};
pub(crate) use self::proxy_header::unknown_balancer;
use self::proxy_header_warning::{Opening, is_header_before_tls};
pub(crate) use self::throttling::turn_away;
use crate::admission::connection_limit::ConnectionPermit;
use crate::admission::{ConnectionCount, MemoryBudgetExceeded, MemoryCharge, PreloginTicket};
use crate::auth_policy;
use crate::config::TlsMode;
use crate::deadline::Deadline;
use crate::failure::Reason;
use crate::metrics::GaugeGuard;
use crate::process::drain::Drain;
use crate::protocol::imap::capability::Transport;
use crate::protocol::imap::prelogin::{ByeReason, CloseReason, LoginRequest, Prelogin, PreloginSettings, PreloginStep};
use crate::protocol::imap::refusal::RefusalKind;
use crate::relay::idle_poller::IdlePoller;
use crate::snapshot::{ListenerConfig, Snapshot};
use crate::stream::{Encrypted, Stream};
use crate::tls::downstream::HandshakeError;
use crate::tls::extraction::TrafficSecrets;

/// One read from a client before login.
const READ: usize = 4096;
/// A client that is told BYE has this long to take it.
const FAREWELL: Duration = Duration::from_secs(2);
/// As long as that of a client whose memory others need.
const SHORT_FAREWELL: Duration = Duration::from_millis(100);
/// Bytes of memory for each byte of credentials during a login. An HTTP route that is sent passwords needs most: the credentials, its
/// own copy of them, and JSON, in which a byte may take six. The dialogue with a server needs five: the credentials, the same under the
/// name that the server knows, base64, and the records of TLS.
const COPIES: usize = 9;

/// An accepted connection and what it needs.
pub(crate) struct AcceptedConnection {
    /// As accepted.
    pub socket: TcpStream,
    /// The client.
    pub peer: SocketAddr,
    /// What the listener is bound to.
    pub local: SocketAddr,
    /// Place of the listener in the configuration.
    pub listener: usize,
    /// How TLS begins there.
    pub tls: TlsMode,
    /// The configuration that holds now.
    pub snapshot: Arc<Snapshot>,
    /// Where the next one appears.
    pub listener_config: watch::Receiver<ListenerConfig>,
    /// When to stop.
    pub drain: Drain,
    /// Where it waits while it is silent.
    pub poller: Arc<SessionPoller>,
    /// Its place among those who have not logged in.
    pub prelogin_ticket: PreloginTicket,
    /// Its share of what is limited and counted.
    pub permits: ConnectionPermits,
}

/// What a session holds as long as it lives.
#[derive(Debug)]
pub(crate) struct ConnectionPermits {
    /// Of `limits.sessions`.
    #[expect(dead_code, reason = "it counts until it is dropped")]
    pub connection: ConnectionPermit,
    /// In the listener's gauge.
    #[expect(dead_code, reason = "it counts until it is dropped")]
    pub open_gauge: GaugeGuard,
    /// What it counts for at the guard.
    pub count: ConnectionCount,
}

/// Where silent sessions wait.
pub(crate) type SessionPoller = IdlePoller<ParkedSession>;

/// Serves a connection until it is logged in, or to its end.
pub(crate) async fn serve(arrival: AcceptedConnection) {
    let tls = arrival.tls;
    let (session, socket) = Session::new(arrival);
    let Some(relayed) = session.log_in(socket, tls).await else { return };
    // A task of its own, so that nothing of the login phase stays allocated while bytes are relayed.
    tokio::spawn(relayed.run());
}

/// A client that has not logged in yet.
struct Session {
    snapshot: Arc<Snapshot>,
    listener_config: watch::Receiver<ListenerConfig>,
    drain: Drain,
    poller: Arc<SessionPoller>,
    prelogin_ticket: Option<PreloginTicket>,
    /// What the client has said.
    memory: MemoryCharge,
    /// The copies of its credentials.
    login_memory: MemoryCharge,
    /// The user of the login under way, by the name in the routes; `None` while it is not known.
    routing_name: Option<Arc<str>>,
    /// What the policy service knows of the login under way.
    told: Option<Box<auth_policy::Attempt>>,
    permits: ConnectionPermits,
    peer: SocketAddr,
    local: SocketAddr,
    /// Whether both addresses are those of a PROXY header.
    is_proxied: bool,
    listener: usize,
    login_by: Deadline,
    opening: Opening,
    record: Record,
}

impl Session {
    fn new(arrival: AcceptedConnection) -> (Self, TcpStream) {
        let AcceptedConnection {
            socket,
            peer,
            local,
            listener,
            snapshot,
            listener_config,
            drain,
            poller,
            prelogin_ticket,
            permits,
            ..
        } = arrival;
        // A socket bound to one address has no other; of `[::]` only the connection knows.
        let local = if local.ip().is_unspecified() { socket.local_addr().unwrap_or(local) } else { local };
        let login_by = Deadline::after(snapshot.limits.login);
        let record = Record::new(id::new(peer), peer, local, snapshot.session_settings.clone());
        let (memory, login_memory) = (prelogin_ticket.charge(), prelogin_ticket.charge());
        (
            Self {
                snapshot,
                listener_config,
                drain,
                poller,
                prelogin_ticket: Some(prelogin_ticket),
                memory,
                login_memory,
                routing_name: None,
                told: None,
                permits,
                peer,
                local,
                is_proxied: false,
                listener,
                login_by,
                opening: Opening::default(),
                record,
            },
            socket,
        )
    }

    /// Steps 1 to 6: talks to the client until a server has accepted it, or until it is gone.
    async fn log_in(mut self, socket: TcpStream, tls: TlsMode) -> Option<Relayed> {
        let (mut stream, transport) = self.connected(socket, tls).await?;
        let mut prelogin = Prelogin::new(self.policy(transport, &stream));
        let mut out = Vec::new();
        prelogin.greet(&mut out);
        loop {
            let step = prelogin.step(&mut out);
            self.send(&mut stream, &mut out).await?;
            let began = Instant::now();
            self.told = None;
            match step {
                PreloginStep::NeedInput => self.receive(&mut stream, &mut prelogin).await?,
                PreloginStep::Send => {}
                PreloginStep::StartTls => {
                    let Stream::Plain(socket) = stream else { return None };
                    stream = self.encrypt(socket).await?;
                    // Nothing learnt in clear is believed: a new parser, new counters, no ID.
                    prelogin = Prelogin::new(self.policy(Transport::Tls, &stream));
                }
                PreloginStep::Login(mut request) => {
                    match self.bounded_attempt(&mut request, &mut stream, &mut prelogin).await? {
                        Attempted::Accepted { seated, established } => {
                            self.report(auth_policy::LoginResult::Success);
                            return self
                                .relayed(&request.tag, stream, prelogin.into_leftover(), seated, *established)
                                .await;
                        }
                        Attempted::Refused { reply, kind, not_before } => {
                            if kind == RefusalKind::FailedLogin {
                                self.refused_login(request, began, not_before).await;
                            }
                            prelogin.refused(&reply, kind, &mut out);
                        }
                        Attempted::Limited { reply } | Attempted::TokenRefused { reply } => {
                            prelogin.refused(&reply, RefusalKind::FailedLogin, &mut out)
                        }
                        Attempted::Dismissed { mut reply, kind } => {
                            if kind == RefusalKind::FailedLogin {
                                self.refused_login(request, began, None).await;
                            }
                            self.send(&mut stream, &mut reply).await?;
                            self.record.ended_by(EndedBy::Proxy);
                            close(&mut stream).await;
                            return None;
                        }
                        Attempted::Unavailable => prelogin.unavailable(&request.tag, &mut out),
                    }
                }
                PreloginStep::InvalidLogin(login) => {
                    let reply = self.refuse_invalid(login, began).await;
                    prelogin.refused(&reply, RefusalKind::FailedLogin, &mut out);
                }
                PreloginStep::Close(reason) => {
                    self.closed(reason);
                    close(&mut stream).await;
                    return None;
                }
            }
        }
    }

    /// Steps 1 and 2: waits for a place, the PROXY header and the handshake.
    async fn connected(&mut self, mut socket: TcpStream, tls: TlsMode) -> Option<(Stream, Transport)> {
        self.admitted(&socket).await?;
        self.introduced(&mut socket).await?;
        let (stream, transport) = match tls {
            TlsMode::Implicit => (self.encrypt(socket).await?, Transport::Tls),
            TlsMode::StartTls => (Stream::Plain(socket), Transport::StartTls),
            TlsMode::None => (Stream::Plain(socket), Transport::Plain),
        };
        if transport != Transport::Tls && self.snapshot.config.listeners[self.listener].proxy_protocol.is_none() {
            self.opening = Opening::expected();
        }
        Some((stream, transport))
    }

    /// Charges a login whose longest message has `length` bytes.
    fn holds_for_login(&mut self, length: usize) -> Result<(), MemoryBudgetExceeded> {
        self.login_memory.resize_copies(length, COPIES)
    }

    /// A login with complete credentials is under way since then: the connection is among the last to be shed.
    fn login_under_way(&self, since: Option<Instant>) {
        match (&self.prelogin_ticket, since) {
            (Some(ticket), Some(since)) => ticket.login_begun(since),
            (Some(ticket), None) => ticket.login_ended(),
            (None, _) => {}
        }
    }

    fn policy(&self, transport: Transport, stream: &Stream) -> PreloginSettings {
        let limits = &self.snapshot.limits;
        let tls = self.snapshot.tls.as_ref();
        let certificate = stream.peer_certificate().and_then(|certificate| tls?.owner(self.listener, certificate));
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

    /// A login is routed by the configuration that holds when it is made; all else stays as the client was greeted with.
    fn up_to_date(&mut self) {
        // A listener that is gone has no place in the next configuration: the last it had a place in goes on.
        if self.listener_config.has_changed().is_ok_and(|changed| changed) {
            let ListenerConfig { snapshot, index } = self.listener_config.borrow_and_update().clone();
            (self.snapshot, self.listener) = (snapshot.clone(), index);
            self.record.now_under(snapshot.session_settings.clone());
        }
    }

    /// Step 2. `None`: the session is over.
    async fn encrypt(&mut self, socket: TcpStream) -> Option<Stream> {
        let began = Instant::now();
        let due = self.login_by.min(Deadline::after(self.snapshot.limits.handshake));
        let tls = self.snapshot.tls.as_ref()?;
        let secrets = Arc::new(TrafficSecrets::default());
        let turns = self.snapshot.admission.handshake_permits();
        let (accepting, memory) = (secrets.clone(), self.prelogin_ticket.as_ref().map(PreloginTicket::charge));
        let handshake = async {
            // Silent clients take no handshake permit: wait for a byte first. That the socket may be readable is not enough.
            socket.peek(&mut [0]).await.map_err(|error| HandshakeError::of_system(&error))?;
            let closed = |_| HandshakeError::of_system(&io::ErrorKind::Other.into());
            let _turn = turns.acquire_owned().await.map_err(closed)?;
            tls.accept(self.listener, socket, accepting, memory).await
        };
        let failed = tokio::select! {
            accepted = due.limit(handshake) => match accepted {
                Ok(Ok(tls)) => {
                    let stream = Stream::Tls(Box::new(Encrypted { tls, secrets }));
                    let took = began.elapsed();
                    self.snapshot.metrics.listener(self.listener).tls_handshake(took);
                    self.record.encrypted(took, stream.tls_facts());
                    return Some(stream);
                }
                Ok(Err(error)) => error,
                Err(_) => HandshakeError::of_system(&io::ErrorKind::TimedOut.into()),
            },
            () = self.drain.begun().cancelled() => {
                self.record.failed(Reason::Drain);
                return None;
            }
            () = self.shed() => {
                let (_, reason) = self.why_shed();
                self.record.failed(reason);
                return None;
            }
        };
        if is_header_before_tls(&failed.first_bytes) {
            self.unexpected_proxy_header();
            return None;
        }
        let is_out_of_memory = is_out_of_memory(failed.kind());
        self.record.detail(failed.to_string());
        self.record.failed(if is_out_of_memory { Reason::ShedForMemory } else { Reason::Handshake });
        None
    }

    /// Sends what is in `out` and empties it. `None`: the session is over.
    async fn send(&mut self, stream: &mut Stream, out: &mut Vec<u8>) -> Option<()> {
        if out.is_empty() {
            return Some(());
        }
        let write = async {
            stream.write_all(out).await?;
            stream.flush().await
        };
        // Replies are short: a client that does not take them within the deadline takes nothing at all.
        let due = self.login_by.max(Deadline::after(FAREWELL));
        let result = tokio::select! {
            biased;
            result = due.limit(write) => result,
            // In the middle of a write nothing more can be said.
            () = self.drain.begun().cancelled() => return self.ended(Reason::Drain),
            () = self.shed() => return self.ended(self.why_shed().1),
        };
        // A client that falls silent now holds no buffer.
        *out = Vec::new();
        match result {
            Ok(Ok(())) => Some(()),
            Ok(Err(_)) => self.gone(Reason::Disconnected),
            Err(_) => self.gone(Reason::LoginDeadline),
        }
    }

    /// A login attempt, unless the process stops or the connection is shed first: whatever the attempt waits for, that
    /// ends it, with its connection to a server. While it is under way with complete credentials, the connection is among the
    /// last to be shed; the copies of the credentials are charged to the memory budget. `None`: the session is over.
    async fn bounded_attempt(
        &mut self,
        request: &mut LoginRequest,
        stream: &mut Stream,
        prelogin: &mut Prelogin,
    ) -> Option<Attempted> {
        if self.holds_for_login(request.credentials.proof_size()).is_err() {
            return self.farewell(stream, prelogin, (ByeReason::Memory, Reason::ShedForMemory)).await;
        }
        self.login_under_way(request.credentials.is_complete().then(Instant::now));
        let (drain, shed) = (self.drain.begun().clone(), self.shed());
        let ending = tokio::select! {
            biased;
            attempted = self.attempt(request, stream, prelogin) => {
                if attempted.is_none() {
                    self.record.abandoned(None);
                }
                self.login_under_way(None);
                // Less is always allowed.
                let _ = self.login_memory.resize(0);
                return attempted;
            }
            () = drain.cancelled() => (ByeReason::Shutdown, Reason::Drain),
            () = shed => self.why_shed(),
        };
        self.record.abandoned(None);
        self.farewell(stream, prelogin, ending).await
    }

    /// Reads once. `None`: the session is over, and the client was sent the reason if that was possible.
    async fn receive(&mut self, stream: &mut Stream, prelogin: &mut Prelogin) -> Option<()> {
        let (drain, shed) = (self.drain.begun().clone(), self.shed());
        let ending = tokio::select! {
            read = self.read(stream, prelogin) => match read {
                Ok(()) => return Some(()),
                Err(unread) => return self.not_read(unread, stream, prelogin).await,
            },
            () = drain.cancelled() => (ByeReason::Shutdown, Reason::Drain),
            () = shed => self.why_shed(),
        };
        self.farewell(stream, prelogin, ending).await
    }

    /// Reads once, within the deadline of the login and the budget of memory.
    async fn read(&mut self, stream: &mut Stream, prelogin: &mut Prelogin) -> Result<(), Unread> {
        self.memory.resize(prelogin.memory())?;
        let mut buffer = Zeroizing::new(Vec::with_capacity(READ));
        match self.login_by.limit(stream.read_buf(&mut *buffer)).await {
            Ok(Ok(read)) if read > 0 => {
                if self.opening.is_header(&buffer) {
                    return Err(Unread::ProxyHeader);
                }
                self.memory.resize(prelogin.memory_with(read))?;
                prelogin.input(&buffer);
                Ok(())
            }
            Ok(Err(error)) if is_out_of_memory(error.kind()) => Err(Unread::OutOfMemory),
            Ok(_) => Err(Unread::Gone),
            Err(_) => Err(Unread::Late),
        }
    }

    /// Ends the session because nothing could be read. Returns `None`, for its callers to return.
    async fn not_read<T>(&mut self, unread: Unread, stream: &mut Stream, prelogin: &Prelogin) -> Option<T> {
        let ending = match unread {
            Unread::Gone => return self.gone(Reason::Disconnected),
            Unread::Late => (ByeReason::LoginDeadline, Reason::LoginDeadline),
            Unread::OutOfMemory => (ByeReason::Memory, Reason::ShedForMemory),
            Unread::ProxyHeader => {
                self.unexpected_proxy_header();
                return None;
            }
        };
        self.farewell(stream, prelogin, ending).await
    }

    /// Ends the session with a BYE, whether or not the client takes it. Returns `None`, for its callers to return.
    async fn farewell<T>(
        &mut self,
        stream: &mut Stream,
        prelogin: &Prelogin,
        ending: (ByeReason, Reason),
    ) -> Option<T> {
        let (bye, reason) = ending;
        let mut out = Vec::new();
        prelogin.bye(bye, &mut out);
        let farewell = async {
            stream.write_all(&out).await?;
            stream.shutdown().await
        };
        let patience = if bye == ByeReason::Memory { SHORT_FAREWELL } else { FAREWELL };
        let _ = timeout(patience, farewell).await;
        self.record.ended_by(EndedBy::Proxy);
        self.record.failed(reason);
        None
    }

    fn closed(&mut self, reason: CloseReason) {
        if let Some(reason) = failure(reason) {
            self.record.failed(reason);
        }
        self.record.ended_by(EndedBy::Proxy);
    }

    /// The proxy ends the session without a word.
    fn ended(&mut self, reason: Reason) -> Option<()> {
        self.record.ended_by(EndedBy::Proxy);
        self.record.failed(reason);
        None
    }

    fn gone<T>(&mut self, reason: Reason) -> Option<T> {
        self.record.ended_by(EndedBy::Client);
        self.record.failed(reason);
        None
    }
}

/// Why nothing was read from a client.
enum Unread {
    /// The client has closed the connection, or it broke.
    Gone,
    /// `limits.login` is over.
    Late,
    /// `limits.before_login_memory` is used up.
    OutOfMemory,
    /// A balancer has sent a PROXY header to a listener that expects none.
    ProxyHeader,
}

impl From<MemoryBudgetExceeded> for Unread {
    fn from(_: MemoryBudgetExceeded) -> Self {
        Self::OutOfMemory
    }
}

/// Whether a read failed because `limits.before_login_memory` is used up.
fn is_out_of_memory(error: io::ErrorKind) -> bool {
    error == io::ErrorKind::OutOfMemory
}

/// Says goodbye at the TLS level, to a peer that may no longer listen.
async fn close(stream: &mut Stream) {
    // Whatever the result, the socket closes when the stream drops here.
    let _ = timeout(FAREWELL, stream.shutdown()).await;
}

/// The fault in a close, where it is one.
fn failure(reason: CloseReason) -> Option<Reason> {
    match reason {
        CloseReason::Logout => None,
        CloseReason::TooManyBadCommands => Some(Reason::TooManyBadCommands),
        CloseReason::TooManyFailedLogins => Some(Reason::TooManyFailedLogins),
        CloseReason::LineTooLong => Some(Reason::LineTooLong),
        CloseReason::LiteralTooLong => Some(Reason::LiteralTooLong),
        CloseReason::StartTlsInjection => Some(Reason::StartTlsInjection),
        CloseReason::ForeignProtocol => Some(Reason::ForeignProtocol),
        CloseReason::TlsOnPlainPort => Some(Reason::TlsOnPlainPort),
    }
}
