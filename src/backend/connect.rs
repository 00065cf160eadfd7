//! Reach one server and log in there.
//!
//! Dial, PROXY header, TLS, then the dialogue that `imap::backend_login` decides. The whole attempt has one deadline;
//! until the server's first byte the shorter `limits.connect` holds, so that a dead machine is noticed soon. What failed is told in
//! one word, with the server's health informed where the server is to blame; which server comes next is the session's
//! decision. Called by `session`.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time;
use zeroize::Zeroizing;

use super::health::Blow;
use super::reach::{encrypt, reach};
use super::{Backend, Server};
use crate::config::{ClientInfo, Limits, TlsMode};
use crate::deadline::Deadline;
use crate::failure::Reason;
use crate::identity::ServerLogin;
use crate::imap::backend_login::{Attempt, BackendLogin, Offer, Referral, ServerFault, ServerStep};
use crate::imap::client_id::ClientId;
use crate::imap::tag::Tag;
use crate::relay::Leg;
use crate::stream::{Stream, TlsFacts};

/// One read from a server before login: its lines are short.
const READ: usize = 4096;

/// A login to be made.
#[derive(Debug)]
pub struct Request<'a> {
    /// What to log in with; none: only to see what the server offers.
    pub login: Option<ServerLogin<'a>>,
    /// Who asks.
    pub purpose: Purpose,
    /// The client's tag: the server's answer is given under it.
    pub tag: &'a Tag,
    /// The client's own ID pairs.
    pub client_id: &'a ClientId,
    /// Whom the server shall see.
    pub client: SocketAddr,
    /// Where the client connected to.
    pub listener: SocketAddr,
    /// How the client came, where it came over TLS.
    pub tls: Option<&'a TlsFacts>,
    /// One id in our log and the server's.
    pub session_id: &'a str,
    /// Deadlines and caps.
    pub limits: &'a Limits,
}

/// What a connection to a server is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// A client's login, from which the server's health is learnt.
    Session,
    /// A check: the login ends with LOGOUT.
    Check,
    /// A check that has seen enough when TLS stands.
    CheckTls,
}

/// How one server answered.
#[derive(Debug)]
pub enum Outcome<'a> {
    /// Logged in.
    Accepted(Established),
    /// The server said no: a complete line for the client, and whether it counts as a failed login.
    Refused {
        /// Ends with CRLF, carries the client's tag.
        reply: Vec<u8>,
        /// Against `limits.failed_logins`.
        counts: bool,
    },
    /// It asks the client something, in these words, and waits for [`Paused::respond`].
    Challenged(Box<Paused<'a>>, Vec<u8>),
    /// It sends the user elsewhere.
    Referred(Referral),
    /// It was only looked at, or logged in to for a check.
    Seen(Seen),
    /// It could not answer.
    Unavailable(Fault),
}

/// What a check has seen.
#[derive(Debug, Default)]
pub struct Seen {
    /// What the server offers before login.
    pub offer: Option<Offer>,
    /// When its certificate ends, in seconds since 1970.
    pub certificate_ends: Option<i64>,
    /// Whether the server lets a session change its user (RFC 8437).
    pub unauthenticate: bool,
}

/// A logged-in connection.
#[derive(Debug)]
pub struct Established {
    /// To the server.
    pub leg: Leg<TcpStream>,
    /// What the client gets first: untagged lines, the tagged OK, and what followed it.
    pub to_client: Vec<u8>,
    /// Which of the server's addresses it is.
    pub address: SocketAddr,
    /// How long the connection took, implicit TLS included.
    pub connect: Duration,
    /// How long the login took from there.
    pub login: Duration,
}

/// Why a server could not answer.
#[derive(Debug)]
pub struct Fault {
    /// The word for metrics.
    pub reason: Reason,
    /// The sentence for logs; never for the client.
    pub detail: String,
    /// Whether another server may do better.
    pub try_next: bool,
    /// How the server's health suffers; `None` for what a client can provoke.
    pub(super) blow: Option<Blow>,
}

impl Fault {
    /// The backend has no server to try.
    pub fn no_server() -> Self {
        let detail = "the backend has no server just now".to_owned();
        Self { reason: Reason::NoServer, detail, try_next: false, blow: None }
    }

    /// A referral that is not followed.
    pub fn referral(detail: String) -> Self {
        Self { reason: Reason::Referral, detail, try_next: false, blow: None }
    }

    /// All servers that could take the login have as many sessions as they may.
    pub fn full() -> Self {
        let detail = "all servers are full, and no place came free in time".to_owned();
        Self { reason: Reason::ServersFull, detail, try_next: false, blow: None }
    }

    /// The operator, or the user's other sessions, end this login.
    pub fn told(reason: Reason, detail: String, try_next: bool) -> Self {
        Self { reason, detail, try_next, blow: None }
    }

    /// Something that this machine lacks. A user of a sticky backend is not sent to another server for it.
    pub(super) fn of_this_machine(backend: &Backend, reason: Reason, detail: String) -> Self {
        Self { reason, detail, try_next: !backend.serves_a_user_by_one_server(), blow: None }
    }

    /// Whether it is for something that this machine lacks, so that it says nothing about the server.
    pub(super) fn is_local(&self) -> bool {
        matches!(self.reason, Reason::LocalPorts | Reason::System)
    }

    pub(super) fn of_server(reason: Reason, detail: impl ToString) -> Self {
        Self { reason, detail: detail.to_string(), try_next: true, blow: Some(Blow::Other) }
    }
}

impl From<ServerFault> for Fault {
    fn from(fault: ServerFault) -> Self {
        let reason = match fault {
            ServerFault::Greeting => Reason::Greeting,
            ServerFault::Bye => Reason::Bye,
            ServerFault::StartTlsNotOffered | ServerFault::StartTlsRefused => Reason::StartTlsUnavailable,
            ServerFault::StartTlsResidue => Reason::StartTlsResidue,
            ServerFault::Protocol | ServerFault::TooMuchUntagged => Reason::Protocol,
            ServerFault::LoginDisabled => Reason::LoginDisabled,
            ServerFault::Overloaded => Reason::Overloaded,
            ServerFault::LoginBad => Reason::LoginBad,
            ServerFault::AuthzidUnsupported => Reason::AuthzidUnsupported,
            ServerFault::MechanismUnsupported => Reason::MechanismUnsupported,
            ServerFault::TooManyChallenges => Reason::Protocol,
        };
        Self {
            reason,
            detail: fault.as_str().to_owned(),
            try_next: fault.try_next_server(),
            blow: fault.blames_server().then_some(Blow::Other),
        }
    }
}

/// Logs in on `server`, within `deadline`.
pub async fn login<'a>(
    backend: &'a Backend,
    server: &Arc<Server>,
    request: &'a Request<'a>,
    deadline: time::Instant,
) -> Outcome<'a> {
    let is_session = request.purpose == Purpose::Session;
    let deadline = Deadline::at(deadline);
    // A check has a deadline of its own.
    let first_byte = if is_session { deadline.min(Deadline::after(request.limits.connect)) } else { deadline };
    let began = Instant::now();
    match reach(backend, server, request, first_byte).await {
        Err(fault) => {
            if let Some(blow) = fault.blow.filter(|_| is_session) {
                server.failed(blow, &fault.detail);
            }
            Outcome::Unavailable(fault)
        }
        Ok((stream, address)) => {
            let connect = began.elapsed();
            if is_session {
                backend.metrics.backend(backend.id.0).server_connected(connect);
            }
            server.prefer(address);
            if request.purpose == Purpose::CheckTls && matches!(stream, Stream::Tls(_)) {
                return Outcome::Seen(seen_and_left(stream, None, deadline).await);
            }
            Dialogue::new(backend, server, request, stream, address, connect).run(first_byte, deadline).await
        }
    }
}

/// Nothing more is wanted of this connection.
async fn seen_and_left(mut stream: Stream, offer: Option<Offer>, deadline: Deadline) -> Seen {
    let certificate_ends = stream.peer_certificate().and_then(crate::tls::ends);
    let _ = deadline.limit(stream.shutdown()).await;
    Seen { offer, certificate_ends, unauthenticate: false }
}

/// A login that waits for the client's answer to a challenge.
pub struct Paused<'a>(Dialogue<'a>);

impl std::fmt::Debug for Paused<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Paused").field("server", &self.0.server.name).finish_non_exhaustive()
    }
}

impl<'a> Paused<'a> {
    /// Goes on with what the client said, as it stands in its line, within `deadline`.
    pub async fn respond(mut self, line: &[u8], deadline: time::Instant) -> Outcome<'a> {
        self.0.machine.respond(line);
        let deadline = Deadline::at(deadline);
        self.0.run(deadline, deadline).await
    }
}

/// The words exchanged with a server until it has answered the login.
struct Dialogue<'a> {
    backend: &'a Backend,
    server: Arc<Server>,
    session_id: &'a str,
    machine: BackendLogin<'a>,
    stream: Stream,
    address: SocketAddr,
    /// How long the connection took, and since when it stands.
    connect: Duration,
    connected: Instant,
    purpose: Purpose,
    /// What it offers before login, for a check.
    offer: Option<Offer>,
}

impl<'a> Dialogue<'a> {
    fn new(
        backend: &'a Backend,
        server: &Arc<Server>,
        request: &'a Request<'a>,
        stream: Stream,
        address: SocketAddr,
        connect: Duration,
    ) -> Self {
        let id = match backend.client_info {
            ClientInfo::None => Vec::new(),
            ClientInfo::ProxyV1 | ClientInfo::ProxyV2 => request.client_id.pairs().to_vec(),
            ClientInfo::Id => identified(backend, request),
        };
        let machine = BackendLogin::new(Attempt {
            login: request.login,
            tag: request.tag,
            starttls: backend.mode == TlsMode::StartTls,
            id,
            max_line: request.limits.line,
            max_untagged_lines: request.limits.untagged_lines,
            max_untagged_bytes: request.limits.untagged_bytes,
        });
        Self {
            backend,
            server: server.clone(),
            session_id: request.session_id,
            machine,
            stream,
            address,
            connect,
            connected: Instant::now(),
            purpose: request.purpose,
            offer: None,
        }
    }

    /// The first byte must come before `first_byte`, the answer before `deadline`.
    async fn run(self, first_byte: Deadline, deadline: Deadline) -> Outcome<'a> {
        let (backend, server, connected, purpose) = (self.backend, self.server.clone(), self.connected, self.purpose);
        let outcome = self.talk(first_byte, deadline).await;
        if purpose == Purpose::Session {
            match &outcome {
                Outcome::Accepted(_) | Outcome::Refused { .. } | Outcome::Referred(_) => {
                    backend.metrics.backend(backend.id.0).server_answered(connected.elapsed());
                    server.answered();
                }
                Outcome::Unavailable(Fault { blow: Some(blow), detail, .. }) => server.failed(*blow, detail),
                // It has shown all that its breaker is about, and no slow client shall keep others from it.
                Outcome::Challenged(..) => server.answered(),
                Outcome::Unavailable(_) | Outcome::Seen(_) => {}
            }
        }
        outcome
    }

    async fn talk(mut self, first_byte: Deadline, deadline: Deadline) -> Outcome<'a> {
        let is_hurried = first_byte.due() < deadline.due();
        let mut due = first_byte;
        let mut is_first = true;
        loop {
            let mut out = Zeroizing::new(Vec::with_capacity(READ));
            let step = self.machine.step(&mut out);
            tracing::trace!(session = self.session_id, server = %self.server.name, state = self.machine.state(), "login dialogue");
            let exchange = self.exchange(&out, matches!(step, ServerStep::NeedInput));
            match due.limit(exchange).await {
                Err(_) => return Outcome::Unavailable(self.timed_out(is_first && is_hurried)),
                Ok(Err(fault)) => return Outcome::Unavailable(self.pardoned(fault)),
                Ok(Ok(())) => {}
            }
            match step {
                ServerStep::NeedInput => {
                    (due, is_first) = (deadline, false);
                    // Once an account is logged in, capabilities are others.
                    self.offer = self.offer.or_else(|| self.machine.offer());
                }
                ServerStep::StartTls => match self.start_tls(deadline).await {
                    Ok(encrypted) if encrypted.purpose == Purpose::CheckTls => {
                        return Outcome::Seen(seen_and_left(encrypted.stream, None, deadline).await);
                    }
                    Ok(encrypted) => self = encrypted,
                    Err(fault) => return Outcome::Unavailable(fault),
                },
                ServerStep::Challenge(line) => return Outcome::Challenged(Box::new(Paused(self)), line),
                ServerStep::Accepted { .. } if self.purpose == Purpose::Check => {
                    let _ = deadline.limit(self.exchange(b"Q LOGOUT\r\n", true)).await;
                    let unauthenticate = self.machine.advertises_unauthenticate();
                    let seen = seen_and_left(self.stream, self.offer, deadline).await;
                    return Outcome::Seen(Seen { unauthenticate, ..seen });
                }
                ServerStep::Accepted { to_client } => {
                    self.judge_id();
                    self.server.set_unauthenticate(self.machine.advertises_unauthenticate());
                    return match deadline.limit(self.established(to_client)).await {
                        Ok(Ok(established)) => Outcome::Accepted(established),
                        Ok(Err(fault)) => Outcome::Unavailable(fault),
                        Err(_) => Outcome::Unavailable(Fault::of_server(Reason::LoginTimeout, "no end of TLS in time")),
                    };
                }
                ServerStep::Refused { reply, counts } => {
                    self.judge_id();
                    self.leave(deadline).await;
                    return Outcome::Refused { reply, counts };
                }
                ServerStep::Referred(referral) => {
                    self.leave(deadline).await;
                    return Outcome::Referred(referral);
                }
                ServerStep::Seen(offer) => {
                    let unauthenticate = self.machine.advertises_unauthenticate();
                    let seen = seen_and_left(self.stream, Some(offer), deadline).await;
                    return Outcome::Seen(Seen { unauthenticate, ..seen });
                }
                ServerStep::Unavailable(fault) => return Outcome::Unavailable(self.explained(fault)),
            }
        }
    }

    /// Nothing more is wanted of this connection, and whether the server hears of it is its concern.
    async fn leave(&mut self, deadline: Deadline) {
        let _ = deadline.limit(self.stream.shutdown()).await;
    }

    fn judge_id(&self) {
        if let Some(answer) = self.machine.id_answer().filter(|_| self.backend.client_info == ClientInfo::Id) {
            self.server.answered_id(answer);
        }
    }

    /// The connection without rustls. What rustls had decrypted beyond the answer goes to the client too.
    async fn established(self, mut to_client: Vec<u8>) -> Result<Established, Fault> {
        let (leg, more) = self.stream.into_leg().await.map_err(|error| Fault::of_server(Reason::ServerTls, error))?;
        to_client.extend(more);
        let login = self.connected.elapsed();
        Ok(Established { leg, to_client, address: self.address, connect: self.connect, login })
    }

    /// Sends what the machine said, then reads once where it asks for more.
    async fn exchange(&mut self, out: &[u8], read: bool) -> Result<(), Fault> {
        let broken = |error: std::io::Error| Fault::of_server(Reason::Bye, error);
        if !out.is_empty() {
            self.stream.write_all(out).await.map_err(broken)?;
            self.stream.flush().await.map_err(broken)?;
        }
        if read {
            let mut buffer = Vec::with_capacity(READ);
            if self.stream.read_buf(&mut buffer).await.map_err(broken)? == 0 {
                let detail = format!("the server closed the connection ({})", self.machine.state());
                return Err(Fault::of_server(Reason::Bye, detail));
            }
            self.machine.input(&buffer);
        }
        Ok(())
    }

    async fn start_tls(mut self, deadline: Deadline) -> Result<Self, Fault> {
        let Stream::Plain(socket) = self.stream else {
            return Err(Fault::of_server(Reason::Protocol, "TLS is already active"));
        };
        self.stream = encrypt(self.backend, &self.server, socket, deadline).await?;
        self.machine.tls_established();
        self.offer = None;
        Ok(self)
    }

    fn timed_out(&self, before_first_byte: bool) -> Fault {
        let detail = format!("no answer within the deadline ({})", self.machine.state());
        // A server that greets but is slow with this login may be waiting for what only this user needs.
        let blow = before_first_byte.then_some(Blow::Other);
        Fault { reason: Reason::LoginTimeout, detail, try_next: true, blow }
    }

    fn explained(&self, fault: ServerFault) -> Fault {
        let mut fault = Fault::from(fault);
        fault.detail = format!("{} ({})", fault.detail, self.machine.state());
        self.pardoned(fault)
    }

    /// What happens once the login is sent may be the client's doing (a password over the server's line limit, say), and no
    /// client shall be able to make servers look dead.
    fn pardoned(&self, mut fault: Fault) -> Fault {
        fault.blow = fault.blow.filter(|_| !self.machine.login_sent());
        fault
    }
}

/// What a proxy tells the next one: how many more may follow. Dovecot begins with as many.
const FIRST_TTL: u8 = 6;

/// The client's own pairs and what we add: the names are Dovecot's, which honours them from `login_trusted_networks`.
fn identified(backend: &Backend, request: &Request<'_>) -> Vec<(Vec<u8>, Option<Vec<u8>>)> {
    if request.login.is_none() {
        return Vec::new();
    }
    let client = request.client.ip().to_canonical();
    let listener = request.listener.ip().to_canonical();
    let ttl = request.client_id.ttl().map_or(FIRST_TTL, |ttl| ttl.saturating_sub(1));
    let ours = [
        ("x-session-id", Some(request.session_id.to_owned())),
        ("x-originating-ip", Some(client.to_string())),
        ("x-originating-port", Some(request.client.port().to_string())),
        ("x-connected-ip", Some(listener.to_string())),
        ("x-connected-port", Some(request.listener.port().to_string())),
        ("x-proxy-ttl", Some(ttl.to_string())),
        ("x-client-transport", Some(if request.tls.is_some() { "TLS" } else { "insecure" }.to_owned())),
        ("x-connected-name", request.tls.and_then(|tls| tls.server_name.as_deref()).map(str::to_owned)),
    ];
    let ours = ours.into_iter().filter_map(|(key, value)| Some((key.as_bytes().to_vec(), Some(value?.into_bytes()))));
    let forward = backend.forward.iter();
    let forward =
        forward.map(|(key, value)| (format!("x-forward-{key}").into_bytes(), Some(value.clone().into_bytes())));
    request.client_id.pairs().iter().cloned().chain(ours).chain(forward).collect()
}
