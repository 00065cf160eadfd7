//! Carries out the dialogue with a server that `imap::backend_login` decides: reads, writes, STARTTLS, reconnects.
//!
//! Logins of clients ([`login`](super::login)) and checks ([`probe`](super::probe)) use it and decide what each step means for
//! them.

use std::net::SocketAddr;
use std::sync::Arc;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use zeroize::Zeroizing;

use super::dial::{dial, encrypt};
use super::fault::{Fault, reason};
use super::request::Origin;
use super::{Backend, Server};
use crate::config::{ClientInfo, Limits, TlsMode};
use crate::deadline::Deadline;
use crate::failure::Reason;
use crate::identity::{Mechanism, ServerLogin};
use crate::protocol::imap::backend_login::{
    BackendLogin, DialogueRules, LoginAttempt, LoginStep, ServerFault, Unavailable,
};
use crate::protocol::imap::client_id::IdPair;
use crate::protocol::imap::tag::Tag;
use crate::stream::Stream;

/// Size of one read before the login: a server's lines are short then.
const READ_SIZE: usize = 4096;

/// A connection to a server, and the state of the dialogue on it.
pub(super) struct Dialogue<'a> {
    pub(super) backend: &'a Backend,
    pub(super) server: Arc<Server>,
    pub(super) machine: BackendLogin<'a>,
    pub(super) stream: Stream,
    pub(super) address: SocketAddr,
    origin: Origin<'a>,
    session_id: &'a str,
}

/// What is sent to the server, and on whose behalf.
pub(super) struct Parameters<'a> {
    pub(super) origin: Origin<'a>,
    /// `None`: the dialogue ends with the server's capabilities.
    pub(super) login: Option<ServerLogin<'a>>,
    /// The command that the client used; `None` for a login of the proxy itself.
    pub(super) mechanism: Option<Mechanism>,
    pub(super) tag: &'a Tag,
    pub(super) id: Vec<IdPair>,
    pub(super) session_id: &'a str,
    pub(super) limits: &'a Limits,
}

/// What the server has to send next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Expected {
    /// Its greeting, for which it has had `limits.connect` when the time is over.
    Greeting,
    Answer,
}

impl<'a> Dialogue<'a> {
    pub(super) fn new(
        backend: &'a Backend,
        server: &Arc<Server>,
        (stream, address): (Stream, SocketAddr),
        parameters: Parameters<'a>,
    ) -> Self {
        let Parameters { origin, login, mechanism, tag, id, session_id, limits } = parameters;
        let machine = BackendLogin::new(LoginAttempt {
            login,
            tag,
            starttls: backend.tls_mode == TlsMode::StartTls,
            id,
            max_line: limits.line,
            max_untagged_lines: limits.untagged_lines,
            max_untagged_bytes: limits.untagged_bytes,
            rules: DialogueRules {
                login_with: backend.login_rules.login_with,
                client: mechanism,
                one_server_per_user: backend.is_sticky(),
                unavailable_texts: &backend.login_rules.unavailable_texts,
                limit_texts: &backend.login_rules.limit_texts,
                unsupported_forms: server.unsupported_forms(),
            },
        });
        Self { backend, server: server.clone(), machine, stream, address, origin, session_id }
    }

    /// Lets the machine decide the next step. What it wants to send is in the returned buffer.
    pub(super) fn next_step(&mut self) -> (LoginStep, Zeroizing<Vec<u8>>) {
        let mut out = Zeroizing::new(Vec::with_capacity(READ_SIZE));
        let step = self.machine.step(&mut out);
        let state = self.machine.state();
        tracing::trace!(session = self.session_id, server = %self.server.name, state, "login dialogue");
        (step, out)
    }

    /// Sends `out`, and reads if the step needs input. Returns the step, or a fault in its place if the server did not
    /// send what was `expected` until `due`.
    pub(super) async fn carry_out(
        &mut self,
        step: LoginStep,
        out: &[u8],
        due: Deadline,
        expected: Expected,
    ) -> LoginStep {
        let needs_input = matches!(step, LoginStep::NeedInput);
        let (fault, error) = match due.limit(self.exchange(out, needs_input)).await {
            Ok(Ok(())) => return step,
            // What the server sent before its connection broke is an answer too.
            Ok(Err(_)) | Err(_) if !needs_input => return step,
            Ok(Err(error)) => (ServerFault::Closed, Some(error)),
            Err(_) => match expected {
                Expected::Greeting if self.server.has_many_pending_logins() => (ServerFault::Crowded, None),
                Expected::Greeting => (ServerFault::Silent, None),
                Expected::Answer => (ServerFault::Timeout, None),
            },
        };
        LoginStep::Unavailable(Unavailable { excerpt: error, ..self.machine.failed(fault) })
    }

    async fn exchange(&mut self, out: &[u8], needs_input: bool) -> Result<(), String> {
        self.write(out).await?;
        if needs_input { self.read().await } else { Ok(()) }
    }

    async fn write(&mut self, out: &[u8]) -> Result<(), String> {
        if out.is_empty() {
            return Ok(());
        }
        self.stream.write_all(out).await.map_err(|error| error.to_string())?;
        self.stream.flush().await.map_err(|error| error.to_string())
    }

    async fn read(&mut self) -> Result<(), String> {
        let mut buffer = Vec::with_capacity(READ_SIZE);
        if self.stream.read_buf(&mut buffer).await.map_err(|error| error.to_string())? == 0 {
            return Err("end of the connection".to_owned());
        }
        self.machine.input(&buffer);
        Ok(())
    }

    /// Ends the login of a check. The server's answer is of no interest.
    pub(super) async fn log_out(&mut self, deadline: Deadline) {
        let _ = deadline.limit(self.exchange(b"Q LOGOUT\r\n", true)).await;
    }

    /// Closes the connection.
    pub(super) async fn close(&mut self, deadline: Deadline) {
        // Whether the server notices is not our concern.
        let _ = deadline.limit(self.stream.shutdown()).await;
    }

    /// Records whether the server trusts our ID.
    pub(super) fn record_id_answer(&self) {
        let answer = self.machine.id_answer().filter(|_| self.backend.client_info == ClientInfo::Id);
        if let Some(answer) = answer {
            self.server.record_id_answer(answer);
        }
    }

    /// Connects to the same server again, which has closed the connection after a command that it did not understand.
    pub(super) async fn reconnect(mut self, deadline: Deadline) -> Result<Self, Fault> {
        match dial(self.backend, &self.server, self.origin, deadline).await {
            Ok((stream, address)) => {
                (self.stream, self.address) = (stream, address);
                self.machine.reconnected();
                Ok(self)
            }
            Err(fault) => {
                let verdict = self.machine.failed(ServerFault::Unreachable).verdict;
                Err(Fault::with_verdict(fault.reason, fault.detail, verdict))
            }
        }
    }

    /// Makes the TLS handshake after the server's answer to STARTTLS.
    pub(super) async fn start_tls(mut self, deadline: Deadline) -> Result<Self, Fault> {
        let Stream::Plain(socket) = self.stream else {
            return Err(Fault::of_server(Reason::Protocol, "TLS is already active"));
        };
        // After a reconnect the server may have the login already, so the verdict depends on the dialogue.
        let verdict = self.machine.failed(ServerFault::Unreachable).verdict;
        match encrypt(self.backend, &self.server, socket, deadline).await {
            Ok(stream) => self.stream = stream,
            Err(fault) => return Err(Fault::with_verdict(fault.reason, fault.detail, verdict)),
        }
        self.machine.tls_established();
        Ok(self)
    }

    /// The fault with a text for logs.
    pub(super) fn fault(&self, unavailable: Unavailable) -> Fault {
        let Unavailable { fault, verdict, reply, excerpt } = unavailable;
        let excerpt = excerpt.map(|excerpt| format!(": {excerpt}")).unwrap_or_default();
        let detail = format!("{} ({}){excerpt}", fault.as_str(), self.machine.state());
        Fault::with_verdict(reason(fault), detail, verdict).with_reply(reply)
    }
}
