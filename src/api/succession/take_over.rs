//! The successor's side of a handover: receives the listening sockets of the running process, and replaces it.
//!
//! Every wait has a deadline. After a failure before the predecessor retires, the predecessor continues as before.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Bytes;
use hyper::client::conn::http1;
use hyper::header::{CONNECTION, HOST, UPGRADE};
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tokio::time::timeout;
use tokio_util::task::AbortOnDropHandle;

use super::super::control_socket::{self, PathState};
use super::super::message::{Command, Response};
use super::connection::{
    FromPredecessor, FromSuccessor, HandoverConnection, PROTOCOL, SERVING_TIMEOUT, TRANSFER_TIMEOUT,
};
use crate::backend::state_override::StoredOverride;

/// Timeout of the request for a handover, to which a running process responds at once.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

/// The process that is being replaced.
pub(crate) struct Predecessor {
    path: PathBuf,
    trusted: Vec<u32>,
    /// `None` if the predecessor has died after the transfer of its sockets.
    connection: Option<HandoverConnection>,
    /// The time at which this process sent [`FromSuccessor::Ready`].
    ready_at: Option<Instant>,
    /// Whether the control path already leads to this process.
    is_published: bool,
}

impl Predecessor {
    /// Requests the listening sockets of the process at `path`, which continues to serve on them too.
    ///
    /// # Errors
    /// The process refuses, does not answer, or belongs to a user that is not in `trusted`.
    pub(crate) async fn take_over(path: &Path, trusted: Vec<u32>) -> anyhow::Result<(Self, Vec<TcpListener>)> {
        let connection = timeout(REQUEST_TIMEOUT, request(path)).await.with_context(|| {
            format!(
                "the running process does not answer at {} within {}: stop it, or resume it if it is suspended",
                path.display(),
                humantime::format_duration(REQUEST_TIMEOUT)
            )
        })??;
        let receive = async {
            let mut connection = connection;
            connection.write(&FromSuccessor::RequestSockets).await?;
            connection.receive_sockets(trusted.clone()).await
        };
        let (connection, sockets) = receive.await.context("the listening sockets could not be received")?;
        Ok((
            Self { path: path.to_owned(), trusted, connection: Some(connection), ready_at: None, is_published: false },
            sockets,
        ))
    }

    /// Requests permission to start, after everything is bound and privileges are dropped. Returns the administrative states of
    /// servers, or `None` if the predecessor has died or its states are invalid.
    ///
    /// # Errors
    /// The predecessor refuses or does not answer.
    pub(crate) async fn request_permission(&mut self) -> anyhow::Result<Option<Vec<StoredOverride>>> {
        self.ready_at = Some(Instant::now());
        let message = FromSuccessor::Ready { version: env!("CARGO_PKG_VERSION").to_owned() };
        match self.exchange(message).await? {
            Some(FromPredecessor::Go { states }) => Ok(valid(states)),
            Some(other) => bail!("the running process sent {other:?} out of order"),
            None => Ok(None),
        }
    }

    /// Checks that there is enough time left to take over the path of the control socket. The predecessor's wait has a deadline,
    /// and this process may have been suspended.
    ///
    /// # Errors
    /// Too much time has passed.
    pub(crate) fn check_time(&self) -> anyhow::Result<()> {
        let passed = self.ready_at.map(|ready_at| ready_at.elapsed()).unwrap_or_default();
        if self.connection.is_some() && passed > SERVING_TIMEOUT.mul_f64(0.8) {
            bail!("the handover took too long: {passed:.0?}");
        }
        Ok(())
    }

    /// Reports that this process serves and has taken over the path of the control socket, and waits until the predecessor
    /// retires. This process does not use the sockets at the addresses in `unused_addresses`. Returns the final administrative states, or
    /// `None` if those of [`Predecessor::request_permission`] are final.
    ///
    /// # Errors
    /// The predecessor refuses, and so continues.
    pub(crate) async fn report_serving(
        mut self,
        unused_addresses: Vec<SocketAddr>,
    ) -> anyhow::Result<Option<Vec<StoredOverride>>> {
        self.is_published = true;
        match self.exchange(FromSuccessor::Serving { unused: unused_addresses }).await? {
            Some(FromPredecessor::Retiring { states }) => {
                tracing::info!("the predecessor retires");
                Ok(valid(states))
            }
            Some(other) => bail!("the running process sent {other:?} out of order"),
            None => Ok(None),
        }
    }

    /// Sends `message` and returns the answer, or `None` if the predecessor has died.
    async fn exchange(&mut self, message: FromSuccessor) -> anyhow::Result<Option<FromPredecessor>> {
        let Some(connection) = &mut self.connection else { return Ok(None) };
        let answer = async {
            connection.write(&message).await?;
            connection.read(TRANSFER_TIMEOUT).await
        };
        match answer.await {
            Ok(FromPredecessor::Refused { reason }) => bail!("the running process does not hand over: {reason}"),
            Ok(answer) => Ok(Some(answer)),
            Err(error) if is_closed(&error) && self.has_died() => {
                tracing::warn!("the predecessor has died during the handover; this process continues alone");
                self.connection = None;
                Ok(None)
            }
            Err(error) => Err(error).context("the running process has aborted the handover"),
        }
    }

    /// Whether the predecessor has died, as far as this process can find out: it refuses before it closes the connection if it is
    /// alive, and its control socket has a listener.
    fn has_died(&self) -> bool {
        self.is_published
            || control_socket::path_state(&self.path, &self.trusted).is_ok_and(|state| state != PathState::Listening)
    }
}

/// Returns the states if all of them are valid.
fn valid(states: Vec<StoredOverride>) -> Option<Vec<StoredOverride>> {
    match states.iter().try_for_each(StoredOverride::validate) {
        Ok(()) => Some(states),
        Err(error) => {
            tracing::error!(%error, "the running process sent invalid server states; they are ignored");
            None
        }
    }
}

fn is_closed(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
    matches!(error.kind(), UnexpectedEof | BrokenPipe | ConnectionReset)
}

/// Sends the command `hand-over`, and returns the connection after the HTTP upgrade.
async fn request(path: &Path) -> anyhow::Result<HandoverConnection> {
    let socket = UnixStream::connect(path).await.with_context(|| path.display().to_string())?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(socket)).await?;
    let _connection = AbortOnDropHandle::new(tokio::spawn(connection.with_upgrades()));
    let body = Full::new(Bytes::from(serde_json::to_vec(&Command::HandOver { pid: std::process::id() })?));
    let request = Request::builder()
        .method(Method::POST)
        .uri("/")
        .header(HOST, "vestibule")
        .header(CONNECTION, "upgrade")
        .header(UPGRADE, PROTOCOL)
        .body(body)?;
    let reply = sender.send_request(request).await.context("the running process does not answer")?;
    if reply.status() != StatusCode::SWITCHING_PROTOCOLS {
        let text = reply.into_body().collect().await?.to_bytes();
        let response: Response =
            serde_json::from_slice(&text).context("the running process sent an unexpected reply")?;
        bail!("the running process does not hand over: {}", response.text);
    }
    let upgraded = hyper::upgrade::on(reply).await?;
    match upgraded.downcast::<TokioIo<UnixStream>>() {
        Ok(parts) if parts.read_buf.is_empty() => Ok(HandoverConnection::new(parts.io.into_inner())),
        _ => bail!("the running process sent data before the handover began"),
    }
}
