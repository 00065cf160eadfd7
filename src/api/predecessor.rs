//! The successor's side of a hand-over: finds the process whose place is to be taken, receives its listening sockets, and takes
//! its place.
//!
//! Nothing waits without a deadline. Whatever fails before the predecessor retires leaves it as it was.

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

use super::hand_over::SERVING_DEADLINE;
use super::link::{FromPredecessor, FromSuccessor, Link, PROTOCOL, TRANSFER_DEADLINE};
use super::place::{self, Occupant};
use super::{Answer, Command};
use crate::backend::state_override::StoredOverride;

/// Timeout of the request for a hand-over. A process that answers does so at once.
const REQUEST_DEADLINE: Duration = Duration::from_secs(10);

/// A process whose place is being taken.
pub(crate) struct Predecessor {
    path: PathBuf,
    trusted: Vec<u32>,
    /// `None`: it has died since it handed its sockets over.
    link: Option<Link>,
    ready: Option<Instant>,
    /// Whether the path leads to this process already.
    is_published: bool,
}

impl Predecessor {
    /// Asks the process at `path` for its listening sockets, on which it goes on serving too.
    ///
    /// # Errors
    /// It refuses, does not answer, or is not trusted.
    pub(crate) async fn take_over(path: &Path, trusted: Vec<u32>) -> anyhow::Result<(Self, Vec<TcpListener>)> {
        let link = timeout(REQUEST_DEADLINE, request(path)).await.with_context(|| {
            format!(
                "the running process does not answer at {} within {}: stop it, or let it go on if it is stopped",
                path.display(),
                humantime::format_duration(REQUEST_DEADLINE)
            )
        })??;
        let receive = async {
            let mut link = link;
            link.write(&FromSuccessor::Send).await?;
            link.receive_sockets(trusted.clone()).await
        };
        let (link, sockets) = receive.await.context("the listening sockets could not be received")?;
        Ok((Self { path: path.to_owned(), trusted, link: Some(link), ready: None, is_published: false }, sockets))
    }

    /// Everything is bound, and privileges are dropped: asks for the permission to start. Returns the administrative states of
    /// servers to start with; `None`: the predecessor has died, or its states are invalid.
    ///
    /// # Errors
    /// The predecessor refuses or does not answer.
    pub(crate) async fn ready(&mut self) -> anyhow::Result<Option<Vec<StoredOverride>>> {
        self.ready = Some(Instant::now());
        let message = FromSuccessor::Ready { version: env!("CARGO_PKG_VERSION").to_owned() };
        match self.exchange(message).await? {
            Some(FromPredecessor::Go { states }) => Ok(valid(states)),
            Some(other) => bail!("the running process sent {other:?} out of order"),
            None => Ok(None),
        }
    }

    /// Whether the name of the control socket may still be taken. The predecessor does not wait for ever, and a process can be
    /// stopped at any point.
    ///
    /// # Errors
    /// Too much time has passed.
    pub(crate) fn check_time(&self) -> anyhow::Result<()> {
        let passed = self.ready.map(|ready| ready.elapsed()).unwrap_or_default();
        if self.link.is_some() && passed > SERVING_DEADLINE.mul_f64(0.8) {
            bail!("the hand-over took too long: {passed:.0?}");
        }
        Ok(())
    }

    /// The name of the control socket is taken: waits until the predecessor retires. The sockets at the addresses in `unused` are
    /// its alone from now on. Returns the administrative states of servers at that moment, which the predecessor changes no more;
    /// `None`: those of [`Predecessor::ready`] are the last.
    ///
    /// # Errors
    /// The predecessor refuses, and so goes on.
    pub(crate) async fn serving(mut self, unused: Vec<SocketAddr>) -> anyhow::Result<Option<Vec<StoredOverride>>> {
        self.is_published = true;
        match self.exchange(FromSuccessor::Serving { unused }).await? {
            Some(FromPredecessor::Retiring { states }) => {
                tracing::info!("the process before this one retires");
                Ok(valid(states))
            }
            Some(other) => bail!("the running process sent {other:?} out of order"),
            None => Ok(None),
        }
    }

    /// `None`: the predecessor has died.
    async fn exchange(&mut self, message: FromSuccessor) -> anyhow::Result<Option<FromPredecessor>> {
        let Some(link) = &mut self.link else { return Ok(None) };
        let answer = async {
            link.write(&message).await?;
            link.read(TRANSFER_DEADLINE).await
        };
        match answer.await {
            Ok(FromPredecessor::Refused { text }) => bail!("the running process does not hand over: {text}"),
            Ok(answer) => Ok(Some(answer)),
            Err(error) if is_gone(&error) && self.has_died() => {
                tracing::warn!("the process before this one has died during the hand-over; this one goes on alone");
                self.link = None;
                Ok(None)
            }
            Err(error) => Err(error).context("the running process has broken off the hand-over"),
        }
    }

    /// Nothing listens at the path any more, as far as that can be known. A process that goes on says so before it closes the
    /// connection.
    fn has_died(&self) -> bool {
        self.is_published
            || place::occupant(&self.path, &self.trusted).is_ok_and(|occupant| occupant != Occupant::Process)
    }
}

/// The states, if all are valid.
fn valid(states: Vec<StoredOverride>) -> Option<Vec<StoredOverride>> {
    match states.iter().try_for_each(StoredOverride::validate) {
        Ok(()) => Some(states),
        Err(error) => {
            tracing::error!(%error, "the running process sent invalid states of servers, which are ignored");
            None
        }
    }
}

fn is_gone(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
    matches!(error.kind(), UnexpectedEof | BrokenPipe | ConnectionReset)
}

/// The request and its answer, up to the point from which the connection belongs to the hand-over.
async fn request(path: &Path) -> anyhow::Result<Link> {
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
    let response = sender.send_request(request).await.context("the running process does not answer")?;
    if response.status() != StatusCode::SWITCHING_PROTOCOLS {
        let text = response.into_body().collect().await?.to_bytes();
        let answer: Answer = serde_json::from_slice(&text).context("the running process sent an unknown answer")?;
        bail!("the running process does not hand over: {}", answer.text);
    }
    let upgraded = hyper::upgrade::on(response).await?;
    match upgraded.downcast::<TokioIo<UnixStream>>() {
        Ok(parts) if parts.read_buf.is_empty() => Ok(Link::new(parts.io.into_inner())),
        _ => bail!("the running process sent more than was asked for"),
    }
}
