//! Logs a client in on one server.
//!
//! Dials, then runs the dialogue until the server has answered. The whole login has one deadline; until the server's first
//! byte the shorter `limits.connect` applies, so that a dead machine is noticed early. What an answer means is decided by
//! `imap::backend_login`, and which server comes next by the session.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::net::TcpStream;

use super::dial::dial;
use super::dialogue::{Dialogue, Expected, Parameters};
use super::fault::{Evidence, Fault};
use super::id_fields::id_fields;
use super::request::{Origin, Request};
use super::server::PendingLogin;
use super::{Backend, Server};
use crate::deadline::Deadline;
use crate::failure::Reason;
use crate::protocol::imap::backend_login::verdict::{Action, Verdict};
use crate::protocol::imap::backend_login::{LoginStep, Referral, ServerFault};
use crate::protocol::imap::refusal::RefusalKind;
use crate::relay::Leg;

/// How one server answered a login.
#[derive(Debug)]
pub(crate) enum LoginResponse<'a> {
    /// The server accepted the login.
    Accepted(Established),
    /// The server refused the login.
    Refused {
        /// A complete line under the client's tag.
        reply: Vec<u8>,
        /// Whether the login counts as failed in `limits.failed_logins`.
        kind: RefusalKind,
    },
    /// The server sent this challenge, and waits for the client's response: see [`PausedLogin::respond`].
    Challenged(Box<PausedLogin<'a>>, Vec<u8>),
    /// The server refers the user to another one.
    Referred(Referral),
    /// The server could not answer.
    Unavailable(Fault),
}

/// A logged-in connection to a server.
#[derive(Debug)]
pub(crate) struct Established {
    /// The connection.
    pub leg: Leg<TcpStream>,
    /// What is sent to the client first: untagged lines, the tagged OK, and what followed it.
    pub to_client: Vec<u8>,
    /// The address of the server that was used.
    pub address: SocketAddr,
    /// Time until the connection was established, implicit TLS included.
    pub connect: Duration,
    /// Time from then until the login was accepted.
    pub login: Duration,
}

/// Logs in on `server`, within `deadline`.
pub(crate) async fn login<'a>(
    backend: &'a Backend,
    server: &Arc<Server>,
    request: &'a Request<'a>,
    deadline: Deadline,
) -> LoginResponse<'a> {
    let first_byte = deadline.min(Deadline::after(request.limits.connect));
    let is_short = is_shorter_than_connect(request, deadline);
    let started = Instant::now();
    let connection = match dial(backend, server, Origin::Client(request.client), first_byte).await {
        Ok(connection) => connection,
        Err(mut fault) => {
            if is_short && first_byte.has_expired() {
                fault = fault.not_blamed_on_server();
            }
            if first_byte.has_expired() && !fault.is_local() && server.has_many_pending_logins() {
                fault = Fault::overloaded(backend, &fault.detail);
            }
            server.record_fault(&fault);
            return LoginResponse::Unavailable(fault);
        }
    };
    let connect = started.elapsed();
    backend.metrics.backend(backend.id.0).server_connected(connect);
    server.prefer_address(connection.1);
    let parameters = Parameters {
        origin: Origin::Client(request.client),
        login: Some(request.login),
        mechanism: Some(request.mechanism),
        tag: request.tag,
        id: id_fields(backend, &request.client),
        session_id: request.client.session_id,
        limits: request.limits,
    };
    let dialogue = Dialogue::new(backend, server, connection, parameters);
    let login = Login { dialogue, request, connect, connected: Instant::now(), pending: None };
    login.run(first_byte, deadline).await
}

/// Whether the server gets less time than `limits.connect`, so that a missed deadline shows nothing about it.
fn is_shorter_than_connect(request: &Request<'_>, deadline: Deadline) -> bool {
    deadline.left() < request.limits.connect
}

/// A login that waits for the client's response to a challenge.
pub(crate) struct PausedLogin<'a>(Login<'a>);

impl std::fmt::Debug for PausedLogin<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PausedLogin").field("server", &self.0.dialogue.server.name).finish_non_exhaustive()
    }
}

impl<'a> PausedLogin<'a> {
    /// Sends the client's response, a line without its end, and continues until `deadline`.
    pub(crate) async fn respond(mut self, line: &[u8], deadline: Deadline) -> LoginResponse<'a> {
        self.0.dialogue.machine.respond(line);
        self.0.run(deadline, deadline).await
    }
}

/// A login on a connected server.
struct Login<'a> {
    dialogue: Dialogue<'a>,
    request: &'a Request<'a>,
    connect: Duration,
    connected: Instant,
    /// Set as soon as the server has sent its first bytes.
    pending: Option<PendingLogin>,
}

impl<'a> Login<'a> {
    /// Continues until the server has answered, and records the result. The first byte must arrive before `first_byte`,
    /// the answer before `deadline`.
    async fn run(self, first_byte: Deadline, deadline: Deadline) -> LoginResponse<'a> {
        let (backend, server, connected) = (self.dialogue.backend, self.dialogue.server.clone(), self.connected);
        let result = self.advance(first_byte, deadline).await;
        let answered = || backend.metrics.backend(backend.id.0).server_answered(connected.elapsed());
        match &result {
            LoginResponse::Accepted(_) | LoginResponse::Refused { .. } | LoginResponse::Referred(_) => {
                answered();
                server.record_answer();
            }
            LoginResponse::Unavailable(fault) => {
                if fault.evidence == Evidence::Works {
                    answered();
                }
                server.record_fault(fault);
            }
            // The server works. A slow client must not keep other logins from it.
            LoginResponse::Challenged(..) => server.record_answer(),
        }
        result
    }

    async fn advance(mut self, first_byte: Deadline, mut deadline: Deadline) -> LoginResponse<'a> {
        // A server that gets less than limits.connect for its greeting is not at fault.
        let has_connect_time = first_byte.due() < deadline.due();
        let mut expected = if has_connect_time { Expected::Greeting } else { Expected::Answer };
        let mut due = first_byte;
        loop {
            let (step, out) = self.dialogue.next_step();
            // The login gets the time reserved for other servers if none of them may be tried any more.
            if self.dialogue.machine.is_bound_to_server() {
                deadline = deadline.max(self.request.deadline);
                (due, expected) = (deadline, Expected::Answer);
            }
            match self.dialogue.carry_out(step, &out, due, expected).await {
                LoginStep::NeedInput => {
                    (due, expected) = (deadline, Expected::Answer);
                    self.pending.get_or_insert_with(|| self.dialogue.server.begin_pending_login());
                }
                LoginStep::StartTls => match self.start_tls(deadline).await {
                    Ok(encrypted) => self = encrypted,
                    Err(fault) => return LoginResponse::Unavailable(fault),
                },
                LoginStep::Challenge(line) => return LoginResponse::Challenged(Box::new(PausedLogin(self)), line),
                LoginStep::Accepted { to_client } => return self.accepted(to_client, deadline).await,
                LoginStep::Refused { reply, kind } => {
                    self.dialogue.record_id_answer();
                    self.dialogue.close(deadline).await;
                    return LoginResponse::Refused { reply, kind };
                }
                LoginStep::Referred(referral) => {
                    self.dialogue.close(deadline).await;
                    return LoginResponse::Referred(referral);
                }
                LoginStep::Unavailable(unavailable) if unavailable.verdict.action == Action::Reconnect => {
                    match self.dialogue.reconnect(deadline).await {
                        Ok(reconnected) => self.dialogue = reconnected,
                        Err(fault) => return LoginResponse::Unavailable(fault),
                    }
                }
                LoginStep::Unavailable(unavailable) => {
                    return LoginResponse::Unavailable(self.dialogue.fault(unavailable));
                }
                // Only a dialogue without credentials ends with the server's offer.
                LoginStep::Probed(_) => {
                    let unexpected = self.dialogue.machine.failed(ServerFault::Protocol);
                    return LoginResponse::Unavailable(self.dialogue.fault(unexpected));
                }
            }
        }
    }

    async fn start_tls(mut self, deadline: Deadline) -> Result<Self, Fault> {
        let is_short = is_shorter_than_connect(self.request, deadline);
        match self.dialogue.start_tls(deadline).await {
            Ok(dialogue) => self.dialogue = dialogue,
            Err(fault) if is_short && deadline.has_expired() => return Err(fault.not_blamed_on_server()),
            Err(fault) => return Err(fault),
        }
        Ok(self)
    }

    /// The server has accepted the login: takes over the connection from rustls.
    async fn accepted(self, to_client: Vec<u8>, deadline: Deadline) -> LoginResponse<'a> {
        let Dialogue { server, machine, .. } = &self.dialogue;
        self.dialogue.record_id_answer();
        server.set_unsupported_forms(machine.unsupported_forms());
        server.set_unauthenticate(machine.advertises_unauthenticate());
        let timeout = machine.failed(ServerFault::Timeout).verdict;
        match deadline.limit(self.established(to_client)).await {
            Ok(Ok(established)) => LoginResponse::Accepted(established),
            Ok(Err((verdict, error))) => {
                LoginResponse::Unavailable(Fault::with_verdict(Reason::ServerTls, error, verdict))
            }
            Err(_) => {
                let detail = "the TLS connection could not be taken over within the deadline".to_owned();
                LoginResponse::Unavailable(Fault::with_verdict(Reason::LoginTimeout, detail, timeout))
            }
        }
    }

    /// The connection without rustls. What rustls has decrypted beyond the answer is sent to the client too.
    async fn established(self, mut to_client: Vec<u8>) -> Result<Established, (Verdict, String)> {
        let closed = self.dialogue.machine.failed(ServerFault::Closed).verdict;
        let (leg, more) = self.dialogue.stream.into_leg().await.map_err(|error| (closed, error.to_string()))?;
        to_client.extend(more);
        let login = self.connected.elapsed();
        Ok(Established { leg, to_client, address: self.dialogue.address, connect: self.connect, login })
    }
}
