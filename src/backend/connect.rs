//! Reach one server and log in there.
//!
//! Dial, PROXY header, TLS, then the dialogue that `imap::backend_login` decides. The whole attempt has one deadline;
//! until the server's first byte the shorter `limits.connect` holds, so that a dead machine is noticed soon. What the
//! server's answer means, and whether its health suffers, is decided by `imap::login_answer`; which server comes next is
//! the session's decision. Called by `session`.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use zeroize::Zeroizing;

use super::awaited::AwaitedAnswer;
use super::dial::{encrypt, reach};
use super::request::{Established, Fault, Outcome, Purpose, Request, Seen, reason};
use super::{Backend, Server};
use crate::config::{ClientInfo, TlsMode};
use crate::deadline::Deadline;
use crate::failure::Reason;
use crate::protocol::imap::backend_login::verdict::{Action, Verdict};
use crate::protocol::imap::backend_login::{
    BackendLogin, DialogueRules, LoginAttempt, LoginStep, ServerFault, Unavailable,
};
use crate::protocol::imap::capability::ServerCapabilities;
use crate::stream::Stream;

/// One read from a server before login: its lines are short.
const READ: usize = 4096;

/// Logs in on `server`, within `deadline`.
pub async fn login<'a>(
    backend: &'a Backend,
    server: &Arc<Server>,
    request: &'a Request<'a>,
    deadline: Deadline,
) -> Outcome<'a> {
    let is_session = request.purpose == Purpose::Session;
    // A check has a deadline of its own.
    let first_byte = if is_session { deadline.min(Deadline::after(request.limits.connect)) } else { deadline };
    let is_hurried = is_hurried(request, deadline);
    let began = Instant::now();
    match reach(backend, server, request, first_byte).await {
        Err(mut fault) => {
            if is_hurried && first_byte.has_expired() {
                fault.blow = None;
            }
            if is_session && first_byte.has_expired() && !fault.is_local() && server.is_crowded() {
                fault = Fault::crowded(backend, &fault.detail);
            }
            if is_session {
                server.could_not_answer(&fault);
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

/// Whether a client's login leaves a server less time than `limits.connect`, so that a deadline that it misses says
/// nothing about it.
fn is_hurried(request: &Request<'_>, deadline: Deadline) -> bool {
    request.purpose == Purpose::Session && deadline.left() < request.limits.connect
}

/// Nothing more is wanted of this connection.
async fn seen_and_left(mut stream: Stream, offer: Option<ServerCapabilities>, deadline: Deadline) -> Seen {
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
    pub async fn respond(mut self, line: &[u8], deadline: Deadline) -> Outcome<'a> {
        self.0.machine.respond(line);
        self.0.run(deadline, deadline).await
    }
}

/// The words exchanged with a server until it has answered the login.
struct Dialogue<'a> {
    backend: &'a Backend,
    server: Arc<Server>,
    request: &'a Request<'a>,
    machine: BackendLogin<'a>,
    stream: Stream,
    address: SocketAddr,
    /// How long the connection took, and since when it stands.
    connect: Duration,
    connected: Instant,
    /// What it offers before login, for a check.
    offer: Option<ServerCapabilities>,
    /// Set once a client's login was greeted.
    awaited: Option<AwaitedAnswer>,
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
        let machine = BackendLogin::new(LoginAttempt {
            login: request.login,
            tag: request.tag,
            starttls: backend.mode == TlsMode::StartTls,
            id,
            max_line: request.limits.line,
            max_untagged_lines: request.limits.untagged_lines,
            max_untagged_bytes: request.limits.untagged_bytes,
            rules: DialogueRules {
                login_with: backend.answers.login_with,
                client: request.mechanism,
                one_server_per_user: backend.serves_a_user_by_one_server(),
                unavailable_texts: &backend.answers.unavailable_texts,
                limit_texts: &backend.answers.limit_texts,
                unsupported_forms: server.learned(),
            },
        });
        Self {
            backend,
            server: server.clone(),
            request,
            machine,
            stream,
            address,
            connect,
            connected: Instant::now(),
            offer: None,
            awaited: None,
        }
    }

    /// The first byte must come before `first_byte`, the answer before `deadline`.
    async fn run(self, first_byte: Deadline, deadline: Deadline) -> Outcome<'a> {
        let (backend, server, connected, purpose) =
            (self.backend, self.server.clone(), self.connected, self.request.purpose);
        let outcome = self.talk(first_byte, deadline).await;
        if purpose == Purpose::Session {
            match &outcome {
                Outcome::Accepted(_) | Outcome::Refused { .. } | Outcome::Referred(_) => {
                    backend.metrics.backend(backend.id.0).server_answered(connected.elapsed());
                    server.answered();
                }
                Outcome::Unavailable(fault) => {
                    if fault.answered {
                        backend.metrics.backend(backend.id.0).server_answered(connected.elapsed());
                    }
                    server.could_not_answer(fault);
                }
                // It has shown all that its breaker is about, and no slow client shall keep others from it.
                Outcome::Challenged(..) => server.answered(),
                Outcome::Seen(_) => {}
            }
        }
        outcome
    }

    async fn talk(mut self, first_byte: Deadline, mut deadline: Deadline) -> Outcome<'a> {
        let extended = self.request.deadline.unwrap_or(deadline);
        // A server that got less than limits.connect to greet is not at fault.
        let has_connect_time = first_byte.due() < deadline.due();
        let mut due = first_byte;
        let mut is_first = true;
        loop {
            let mut out = Zeroizing::new(Vec::with_capacity(READ));
            let step = self.machine.step(&mut out);
            // Time that was kept back for other servers is this one's when none of them can be tried any more.
            if self.machine.is_bound_to_server() {
                deadline = deadline.max(extended);
                (due, is_first) = (deadline, false);
            }
            tracing::trace!(session = self.request.session_id, server = %self.server.name, state = self.machine.state(), "login dialogue");
            let step = self.carry_out(step, &out, due, is_first && has_connect_time).await;
            match step {
                LoginStep::NeedInput => {
                    (due, is_first) = (deadline, false);
                    if self.request.purpose == Purpose::Session {
                        self.awaited.get_or_insert_with(|| self.server.greeted());
                    }
                    // Once an account is logged in, capabilities are others.
                    self.offer = self.offer.or_else(|| self.machine.offer());
                }
                LoginStep::StartTls => match self.start_tls(deadline).await {
                    Ok(encrypted) if encrypted.request.purpose == Purpose::CheckTls => {
                        return Outcome::Seen(seen_and_left(encrypted.stream, None, deadline).await);
                    }
                    Ok(encrypted) => self = encrypted,
                    Err(fault) => return Outcome::Unavailable(fault),
                },
                LoginStep::Challenge(line) => return Outcome::Challenged(Box::new(Paused(self)), line),
                LoginStep::Accepted { .. } if self.request.purpose == Purpose::Check => {
                    return Outcome::Seen(self.logged_in_for_check(deadline).await);
                }
                LoginStep::Accepted { to_client } => return self.accepted(to_client, deadline).await,
                LoginStep::Refused { reply, counts } => {
                    self.judge_id();
                    self.leave(deadline).await;
                    return Outcome::Refused { reply, counts };
                }
                LoginStep::Referred(referral) => {
                    self.leave(deadline).await;
                    return Outcome::Referred(referral);
                }
                LoginStep::Probed(offer) => {
                    let unauthenticate = self.machine.advertises_unauthenticate();
                    let seen = seen_and_left(self.stream, Some(offer), deadline).await;
                    return Outcome::Seen(Seen { unauthenticate, ..seen });
                }
                LoginStep::Unavailable(unavailable) if unavailable.verdict.action == Action::Reconnect => {
                    match self.reconnect(deadline).await {
                        Ok(reconnected) => self = reconnected,
                        Err(fault) => return Outcome::Unavailable(fault),
                    }
                }
                LoginStep::Unavailable(unavailable) => return Outcome::Unavailable(self.explained(unavailable)),
            }
        }
    }

    /// Sends what the machine said, and reads if it needs input. `is_connecting`: the server has not greeted yet, and has
    /// had `limits.connect` for it when `due` comes.
    async fn carry_out(&mut self, step: LoginStep, out: &[u8], due: Deadline, is_connecting: bool) -> LoginStep {
        let needs_input = matches!(step, LoginStep::NeedInput);
        let (fault, error) = match due.limit(self.exchange(out, needs_input)).await {
            Ok(Ok(())) => return step,
            // What the server sent before its connection broke is an answer too.
            Ok(Err(_)) | Err(_) if !needs_input => return step,
            Ok(Err(error)) => (ServerFault::Closed, Some(error)),
            Err(_) if is_connecting && self.server.is_crowded() => (ServerFault::Crowded, None),
            Err(_) if is_connecting => (ServerFault::Silent, None),
            Err(_) => (ServerFault::Timeout, None),
        };
        LoginStep::Unavailable(Unavailable { excerpt: error, ..self.machine.failed(fault) })
    }

    /// The server has accepted the login of a check, which ends with LOGOUT.
    async fn logged_in_for_check(mut self, deadline: Deadline) -> Seen {
        self.server.learns(self.machine.unsupported_forms());
        let _ = deadline.limit(self.exchange(b"Q LOGOUT\r\n", true)).await;
        let unauthenticate = self.machine.advertises_unauthenticate();
        Seen { unauthenticate, ..seen_and_left(self.stream, self.offer, deadline).await }
    }

    /// The server has accepted the login: takes over the connection.
    async fn accepted(self, to_client: Vec<u8>, deadline: Deadline) -> Outcome<'a> {
        self.judge_id();
        self.server.learns(self.machine.unsupported_forms());
        self.server.set_unauthenticate(self.machine.advertises_unauthenticate());
        let timeout = self.machine.failed(ServerFault::Timeout).verdict;
        match deadline.limit(self.established(to_client)).await {
            Ok(Ok(established)) => Outcome::Accepted(established),
            Ok(Err((verdict, error))) => Outcome::Unavailable(Fault::decided(Reason::ServerTls, error, verdict)),
            Err(_) => {
                let detail = "the TLS connection could not be taken over within the deadline".to_owned();
                Outcome::Unavailable(Fault::decided(Reason::LoginTimeout, detail, timeout))
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
    async fn established(self, mut to_client: Vec<u8>) -> Result<Established, (Verdict, String)> {
        let closed = self.machine.failed(ServerFault::Closed).verdict;
        let (leg, more) = self.stream.into_leg().await.map_err(|error| (closed, error.to_string()))?;
        to_client.extend(more);
        let login = self.connected.elapsed();
        Ok(Established { leg, to_client, address: self.address, connect: self.connect, login })
    }

    /// Sends what the machine said, then reads once if it asks for more. An error means that the connection has ended.
    async fn exchange(&mut self, out: &[u8], read: bool) -> Result<(), String> {
        if !out.is_empty() {
            self.stream.write_all(out).await.map_err(|error| error.to_string())?;
            self.stream.flush().await.map_err(|error| error.to_string())?;
        }
        if read {
            let mut buffer = Vec::with_capacity(READ);
            if self.stream.read_buf(&mut buffer).await.map_err(|error| error.to_string())? == 0 {
                return Err("end of the connection".to_owned());
            }
            self.machine.input(&buffer);
        }
        Ok(())
    }

    /// Connects to the same server again, which has closed the connection after a command that it did not understand.
    async fn reconnect(mut self, deadline: Deadline) -> Result<Self, Fault> {
        match reach(self.backend, &self.server, self.request, deadline).await {
            Ok((stream, address)) => {
                (self.stream, self.address) = (stream, address);
                self.machine.reconnected();
                Ok(self)
            }
            Err(Fault { reason, detail, .. }) => {
                Err(Fault::decided(reason, detail, self.machine.failed(ServerFault::Unreachable).verdict))
            }
        }
    }

    async fn start_tls(mut self, deadline: Deadline) -> Result<Self, Fault> {
        let Stream::Plain(socket) = self.stream else {
            return Err(Fault::of_server(Reason::Protocol, "TLS is already active"));
        };
        // After a reconnect the server may have the login already.
        let verdict = self.machine.failed(ServerFault::Unreachable).verdict;
        let is_hurried = is_hurried(self.request, deadline);
        let encrypted = encrypt(self.backend, &self.server, socket, deadline).await;
        self.stream = encrypted.map_err(|fault| {
            let fault = Fault::decided(fault.reason, fault.detail, verdict);
            let blow = fault.blow.filter(|_| !(is_hurried && deadline.has_expired()));
            Fault { blow, ..fault }
        })?;
        self.machine.tls_established();
        self.offer = None;
        Ok(self)
    }

    fn explained(&self, unavailable: Unavailable) -> Fault {
        let Unavailable { fault, verdict, reply, excerpt } = unavailable;
        let excerpt = excerpt.map(|excerpt| format!(": {excerpt}")).unwrap_or_default();
        let detail = format!("{} ({}){excerpt}", fault.as_str(), self.machine.state());
        Fault { reply, ..Fault::decided(reason(fault), detail, verdict) }
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
