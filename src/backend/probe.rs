//! Connects to a server without a client, to test it and to read its capabilities.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use tokio::io::AsyncWriteExt as _;

use super::dial::{connect, dial};
use super::dialogue::{Dialogue, Expected, Parameters};
use super::fault::Fault;
use super::id_fields::id_fields;
use super::request::{ClientDetails, Origin};
use super::{Backend, Server};
use crate::config::Limits;
use crate::deadline::Deadline;
use crate::failure::Reason;
use crate::identity::{PasswordLogin, Secret, ServerLogin, UserName};
use crate::protocol::imap::backend_login::LoginStep;
use crate::protocol::imap::backend_login::verdict::Action;
use crate::protocol::imap::capability::ServerCapabilities;
use crate::protocol::imap::client_id::ClientId;
use crate::protocol::imap::tag::Tag;
use crate::stream::Stream;

/// Takes the place of a session's id in traces and in the server's log.
const SESSION_ID: &str = "check";

/// How much of a server is tested.
#[derive(Debug)]
pub(super) enum Probe {
    /// A TCP connection.
    Tcp,
    /// A TLS handshake with verification of the certificate.
    Tls,
    /// The greeting and the capabilities.
    Imap,
    /// The login of an account.
    Login { user: UserName, password: Secret },
}

/// What a probe has found out about a server.
#[derive(Debug, Default)]
pub(super) struct Observation {
    /// The capabilities before login, if they were read.
    pub(super) capabilities: Option<ServerCapabilities>,
    /// Expiry of its certificate as Unix time.
    pub(super) certificate_expiry: Option<i64>,
    /// Whether the server lets a session change its user (RFC 8437).
    pub(super) has_unauthenticate: bool,
}

/// A probe that failed.
#[derive(Debug)]
pub(super) struct ProbeFailure {
    /// Text for the operator.
    pub(super) detail: String,
    pub(super) cause: FailureCause,
}

/// Where a probe failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum FailureCause {
    /// This machine could not make the connection.
    ThisMachine,
    /// TLS with the server.
    Tls,
    /// Anything else about the server.
    Server,
}

impl From<Fault> for ProbeFailure {
    fn from(fault: Fault) -> Self {
        let cause = match fault.reason {
            _ if fault.is_local() => FailureCause::ThisMachine,
            Reason::ServerTls | Reason::StartTlsUnavailable => FailureCause::Tls,
            _ => FailureCause::Server,
        };
        Self { detail: fault.detail, cause }
    }
}

impl From<&str> for ProbeFailure {
    fn from(detail: &str) -> Self {
        Self { detail: detail.to_owned(), cause: FailureCause::Server }
    }
}

/// Tests `server` within `timeout`.
pub(super) async fn probe(
    backend: &Backend,
    server: &Arc<Server>,
    probe: &Probe,
    limits: &Limits,
    timeout: Duration,
) -> Result<Observation, ProbeFailure> {
    let deadline = Deadline::after(timeout);
    let login = match probe {
        Probe::Tcp => {
            connect(backend, server, deadline).await?;
            return Ok(Observation::default());
        }
        Probe::Tls | Probe::Imap => None,
        Probe::Login { user, password } => Some(ServerLogin::Password(PasswordLogin { user, authzid: None, password })),
    };
    let (stream, address) = dial(backend, server, Origin::Proxy, deadline).await?;
    server.prefer_address(address);
    if matches!((probe, &stream), (Probe::Tls, Stream::Tls(_))) {
        return Ok(observe(stream, None, deadline).await);
    }
    let tag = Tag::new(b"check").ok_or("no tag")?;
    let (unspecified, client_id) = (SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)), ClientId::default());
    let no_client = ClientDetails {
        address: unspecified,
        listener: unspecified,
        tls: None,
        session_id: SESSION_ID,
        id: &client_id,
    };
    let parameters = Parameters {
        origin: Origin::Proxy,
        id: if login.is_some() { id_fields(backend, &no_client) } else { Vec::new() },
        login,
        mechanism: None,
        tag: &tag,
        session_id: SESSION_ID,
        limits,
    };
    run(Dialogue::new(backend, server, (stream, address), parameters), probe, deadline).await
}

async fn run(mut dialogue: Dialogue<'_>, probe: &Probe, deadline: Deadline) -> Result<Observation, ProbeFailure> {
    // Only the capabilities before login: others apply after it.
    let mut capabilities = None;
    loop {
        let (step, out) = dialogue.next_step();
        match dialogue.carry_out(step, &out, deadline, Expected::Answer).await {
            LoginStep::NeedInput => capabilities = capabilities.or_else(|| dialogue.machine.server_capabilities()),
            LoginStep::StartTls => {
                dialogue = dialogue.start_tls(deadline).await?;
                capabilities = None;
                if matches!(probe, Probe::Tls) {
                    return Ok(observe(dialogue.stream, None, deadline).await);
                }
            }
            LoginStep::Probed(capabilities) => {
                let has_unauthenticate = dialogue.machine.advertises_unauthenticate();
                return Ok(Observation {
                    has_unauthenticate,
                    ..observe(dialogue.stream, Some(capabilities), deadline).await
                });
            }
            LoginStep::Accepted { .. } => {
                dialogue.server.set_unsupported_forms(dialogue.machine.unsupported_forms());
                dialogue.log_out(deadline).await;
                let has_unauthenticate = dialogue.machine.advertises_unauthenticate();
                return Ok(Observation {
                    has_unauthenticate,
                    ..observe(dialogue.stream, capabilities, deadline).await
                });
            }
            LoginStep::Refused { .. } => {
                dialogue.record_id_answer();
                dialogue.close(deadline).await;
                return Err("the server refused the login of the check's account".into());
            }
            LoginStep::Referred(_) => {
                dialogue.close(deadline).await;
                return Err("the server refers the check's account to another server".into());
            }
            LoginStep::Challenge(_) => return Err("the server sent an unexpected challenge".into()),
            LoginStep::Unavailable(unavailable) if unavailable.verdict.action == Action::Reconnect => {
                dialogue = dialogue.reconnect(deadline).await?;
            }
            LoginStep::Unavailable(unavailable) => return Err(dialogue.fault(unavailable).into()),
        }
    }
}

/// Closes the connection and returns what it has shown.
async fn observe(mut stream: Stream, capabilities: Option<ServerCapabilities>, deadline: Deadline) -> Observation {
    let certificate_expiry = stream.peer_certificate().and_then(crate::tls::certificate_expiry);
    // Whether the server notices is not our concern.
    let _ = deadline.limit(stream.shutdown()).await;
    Observation { capabilities, certificate_expiry, has_unauthenticate: false }
}
