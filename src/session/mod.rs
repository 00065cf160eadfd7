//! One client connection from accept to close: the story.
//!
//! | step | where | deadline | when it fails |
//! |---|---|---|---|
//! | 1 whose connection it is | `proxy_protocol` in [`introduction`], where a balancer is in front | `limits.proxy_header` | the connection closes |
//! | 2 TLS handshake | [`Session::encrypt`] | `limits.handshake` | the connection closes |
//! | 3 who is it | `imap::prelogin` in [`Session::log_in`] | `limits.login`, from accept | BYE |
//! | 4 which backend | `route` in [`attempt`] | `limits.lookup` | NO `[UNAVAILABLE]`, or refused when unknown |
//! | 5 which server | `backend` in [`attempt`] | `limits.server_login`, over all servers | next server, then NO `[UNAVAILABLE]` |
//! | 6 log in there | `backend::connect` | a share of the above | the server's NO is passed on, never retried |
//! | 7 answer the client | [`relayed::Relayed`] | none | |
//! | 8 relay | `relay`, `waiting` | `limits.idle`, `limits.stall`, `limits.half_close` | |
//! | 9 log lines | [`record::Record`]: one at the login, one at the end | always | |
//!
//! This file and `attempt` alone know the order. After a refusal nothing of the attempt is left: the next login is parsed, routed and
//! sent to a server connection of its own. Called by `listener`.

mod attempt;
mod defence;
mod id;
mod introduction;
mod pace;
mod record;
mod relayed;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::{self, timeout, timeout_at};
use zeroize::Zeroizing;

use self::attempt::{Attempted, Seated};
pub use self::defence::turn_away;
pub use self::pace::Refusals;
use self::record::{EndedBy, Record};
pub use self::relayed::Quiet;
use self::relayed::{Kept, Relayed};
use crate::backend::connect::Established;
use crate::config::ListenerTls;
use crate::failure::Reason;
use crate::guard::{Pass, Ticket};
use crate::imap::prelogin::{Bye, CloseReason, Policy, Prelogin, Step, Transport};
use crate::metrics::OpenGuard;
use crate::occupancy::Occupant;
use crate::policy;
use crate::server::{Desk, Live};
use crate::shutdown::Drain;
use crate::stream::{Encrypted, Stream};
use crate::tls::handover::Secrets;
use crate::waiting::WaitingRoom;

/// One read from a client before login.
const READ: usize = 4096;
/// A client that is told BYE has this long to take it.
const FAREWELL: Duration = Duration::from_secs(2);

/// An accepted connection and what it needs.
pub struct Arrival {
    /// As accepted.
    pub socket: TcpStream,
    /// The client.
    pub peer: SocketAddr,
    /// What the listener is bound to.
    pub local: SocketAddr,
    /// Place of the listener in the configuration.
    pub listener: usize,
    /// How TLS begins there.
    pub tls: ListenerTls,
    /// The configuration that holds now.
    pub live: Arc<Live>,
    /// Where the next one appears.
    pub desk: watch::Receiver<Desk>,
    /// When to stop.
    pub drain: Drain,
    /// Where it waits while it is silent.
    pub room: Arc<Room>,
    /// Its place among those who have not logged in.
    pub ticket: Ticket,
    /// Its share of what is limited and counted.
    pub held: Held,
}

/// What a session holds as long as it lives.
#[derive(Debug)]
pub struct Held {
    /// Of `limits.sessions`.
    pub occupant: Occupant,
    /// In the listener's gauge.
    pub open: OpenGuard,
    /// What it counts for at the guard.
    pub pass: Pass,
}

/// Where silent sessions wait.
pub type Room = WaitingRoom<Quiet>;

/// Serves a connection until it is logged in, or to its end.
pub async fn serve(arrival: Arrival) {
    let tls = arrival.tls;
    let (session, socket) = Session::new(arrival);
    let Some(relayed) = session.log_in(socket, tls).await else { return };
    // A task of its own, so that nothing of the login phase stays allocated while bytes are relayed.
    tokio::spawn(relayed.run());
}

/// A client that has not logged in yet.
struct Session {
    live: Arc<Live>,
    desk: watch::Receiver<Desk>,
    drain: Drain,
    room: Arc<Room>,
    ticket: Option<Ticket>,
    /// What the policy service knows of the login under way.
    told: Option<Box<policy::Attempt>>,
    held: Held,
    peer: SocketAddr,
    local: SocketAddr,
    listener: usize,
    login_by: time::Instant,
    record: Record,
}

impl Session {
    fn new(arrival: Arrival) -> (Self, TcpStream) {
        let Arrival { socket, peer, local, listener, live, desk, drain, room, ticket, held, .. } = arrival;
        // A socket bound to one address has no other; of `[::]` only the connection knows.
        let local = if local.ip().is_unspecified() { socket.local_addr().unwrap_or(local) } else { local };
        let login_by = time::Instant::now() + live.limits.login;
        let record = Record::new(id::new(peer), peer, local, live.clone());
        (
            Self {
                live,
                desk,
                drain,
                room,
                ticket: Some(ticket),
                told: None,
                held,
                peer,
                local,
                listener,
                login_by,
                record,
            },
            socket,
        )
    }

    /// Steps 1 to 6: talks to the client until a server has accepted it, or until it is gone.
    async fn log_in(mut self, mut socket: TcpStream, tls: ListenerTls) -> Option<Relayed> {
        self.introduced(&mut socket).await?;
        let (mut stream, transport) = match tls {
            ListenerTls::Implicit => (self.encrypt(socket).await?, Transport::Tls),
            ListenerTls::StartTls => (Stream::Plain(socket), Transport::StartTls),
            ListenerTls::None => (Stream::Plain(socket), Transport::Plain),
        };
        let mut prelogin = Prelogin::new(self.policy(transport, &stream));
        let mut out = Vec::new();
        prelogin.greet(&mut out);
        loop {
            let step = prelogin.step(&mut out);
            self.send(&mut stream, &mut out).await?;
            let began = Instant::now();
            self.told = None;
            match step {
                Step::NeedInput => self.receive(&mut stream, &mut prelogin).await?,
                Step::StartTls => {
                    let Stream::Plain(socket) = stream else { return None };
                    stream = self.encrypt(socket).await?;
                    // Nothing learnt in clear is believed: a new parser, new counters, no ID.
                    prelogin = Prelogin::new(self.policy(Transport::Tls, &stream));
                }
                Step::Login(mut request) => match self.attempt(&mut request, &mut stream, &mut prelogin).await? {
                    Attempted::Accepted { seated, established } => {
                        self.report(true);
                        return self.relayed(stream, prelogin.into_leftover(), seated, *established).await;
                    }
                    Attempted::Refused { reply, counts } => {
                        if counts {
                            self.failed_login(request, began).await;
                        }
                        prelogin.refused(&reply, counts, &mut out);
                    }
                    Attempted::Limited { reply } => prelogin.refused(&reply, true, &mut out),
                    Attempted::Dismissed { mut reply } => {
                        self.send(&mut stream, &mut reply).await?;
                        self.record.ended_by(EndedBy::Proxy);
                        close(&mut stream).await;
                        return None;
                    }
                    Attempted::Unavailable => prelogin.unavailable(&request.tag, &mut out),
                },
                Step::Close(reason) => {
                    self.closed(reason);
                    close(&mut stream).await;
                    return None;
                }
                // Only `attempt` passes challenges on, and it takes what comes back.
                Step::Response(_) => {}
            }
        }
    }

    fn policy(&self, transport: Transport, stream: &Stream) -> Policy {
        let limits = &self.live.limits;
        let tls = self.live.tls.as_ref();
        let certificate = stream.peer_certificate().and_then(|certificate| tls?.owner(self.listener, certificate));
        Policy {
            transport,
            max_line: limits.line,
            max_literal: limits.literal,
            max_bad_commands: limits.bad_commands,
            max_failed_logins: limits.failed_logins,
            mechanisms: self.live.mechanisms(self.listener),
            certificate,
        }
    }

    /// A login is routed by the configuration that holds when it is made; all else stays as the client was greeted with.
    fn up_to_date(&mut self) {
        // A listener that is gone has no place in the next configuration: the last it had a place in goes on.
        if self.desk.has_changed().is_ok_and(|changed| changed) {
            let Desk { live, index } = self.desk.borrow_and_update().clone();
            (self.live, self.listener) = (live.clone(), index);
            self.record.now_under(live);
        }
    }

    /// Step 2.
    async fn encrypt(&mut self, socket: TcpStream) -> Option<Stream> {
        let began = Instant::now();
        let due = self.login_by.min(time::Instant::now() + self.live.limits.handshake);
        let tls = self.live.tls.as_ref()?;
        let secrets = Arc::new(Secrets::default());
        let turns = self.live.guard.handshakes();
        let accepting = secrets.clone();
        let handshake = async {
            // Whoever says nothing takes no turn from those who do; that a socket may be readable is not enough to know.
            socket.peek(&mut [0]).await?;
            let _turn = turns.acquire_owned().await.map_err(io::Error::other)?;
            tls.accept(self.listener, socket, accepting).await
        };
        let error = tokio::select! {
            accepted = timeout_at(due, handshake) => match accepted {
                Ok(Ok(tls)) => {
                    let stream = Stream::Tls(Box::new(Encrypted { tls, secrets }));
                    let took = began.elapsed();
                    self.live.metrics.listener(self.listener).tls_handshake(took);
                    self.record.encrypted(took, stream.tls_facts());
                    return Some(stream);
                }
                Ok(Err(error)) => error,
                Err(_) => io::ErrorKind::TimedOut.into(),
            },
            () = self.drain.begun().cancelled() => {
                self.record.failed(Reason::Drain);
                return None;
            }
            () = self.shed() => {
                self.record.failed(Reason::Shed);
                return None;
            }
        };
        self.record.detail(error.to_string());
        self.record.failed(Reason::Handshake);
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
        let due = self.login_by.max(time::Instant::now() + FAREWELL);
        let result = timeout_at(due, write).await;
        out.clear();
        match result {
            Ok(Ok(())) => Some(()),
            Ok(Err(_)) => self.gone(Reason::Disconnected),
            Err(_) => self.gone(Reason::LoginDeadline),
        }
    }

    /// Reads once. `None`: the session is over, and the client has been told where it could be.
    async fn receive(&mut self, stream: &mut Stream, prelogin: &mut Prelogin) -> Option<()> {
        let mut buffer = Zeroizing::new(Vec::with_capacity(READ));
        let (bye, reason) = tokio::select! {
            read = timeout_at(self.login_by, stream.read_buf(&mut *buffer)) => match read {
                Ok(Ok(read)) if read > 0 => {
                    prelogin.input(&buffer);
                    return Some(());
                }
                Ok(_) => return self.gone(Reason::Disconnected),
                Err(_) => (Bye::LoginDeadline, Reason::LoginDeadline),
            },
            () = self.drain.begun().cancelled() => (Bye::Shutdown, Reason::Drain),
            () = self.shed() => (Bye::Shed, Reason::Shed),
        };
        let mut out = Vec::new();
        prelogin.bye(bye, &mut out);
        // The session ends whether or not the client takes its farewell.
        let farewell = async {
            stream.write_all(&out).await?;
            stream.shutdown().await
        };
        let _ = timeout(FAREWELL, farewell).await;
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

    fn gone(&mut self, reason: Reason) -> Option<()> {
        self.record.ended_by(EndedBy::Client);
        self.record.failed(reason);
        None
    }

    /// The end of the login: rustls lets go of the client's connection, and all that is kept is packed up.
    async fn relayed(
        mut self,
        stream: Stream,
        mut to_server: Vec<u8>,
        seated: Seated,
        established: Established,
    ) -> Option<Relayed> {
        // Nobody who is logged in is told to go.
        self.ticket = None;
        let due = self.login_by.max(time::Instant::now() + FAREWELL);
        let Ok(Ok((client, more))) = timeout_at(due, stream.into_leg()).await else {
            return self.gone(Reason::Disconnected).and(None);
        };
        to_server.extend(more);
        self.record.open_on(seated.backend.id, seated.slot);
        seated.seat.settle();
        self.record.log_login();
        let kept = Kept {
            _counted: self.drain.count(),
            keepalive_set: false,
            room: self.room,
            seat: seated.seat,
            record: self.record,
            _held: self.held,
        };
        Some(Relayed::new(client, established.leg, established.to_client, to_server, kept))
    }
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
