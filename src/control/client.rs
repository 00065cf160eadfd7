//! The other end: a command to the running process, and a successor's talk with the process before it. Called by `main`.

use std::fs;
use std::io;
use std::net::TcpListener;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, bail};
use http_body_util::{BodyExt as _, Full};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1;
use hyper::{Method, Request};
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tokio_util::task::AbortOnDropHandle;

use super::{Answer, Command, beside};
use crate::backend::admin_state::StoredState;
use crate::inherit;

/// A predecessor that has not sent its sockets by then will not.
const HAND_OVER: Duration = Duration::from_secs(20);

/// The processes that a command is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// The process that is asked, and its predecessors.
    All,
    /// The process that is asked, alone.
    Process,
}

impl Scope {
    /// The request's path.
    pub(super) fn path(self) -> &'static str {
        match self {
            Self::All => "/",
            Self::Process => "/process",
        }
    }
}

/// Asks the process at `path`.
///
/// # Errors
/// Nobody answers there, or something else than a running Vestibule.
pub async fn ask(path: &Path, command: &Command) -> anyhow::Result<Answer> {
    Ok(begin(path, command).await?.answer)
}

/// Asks, and leaves the connection open: see [`Command::Hold`].
///
/// # Errors
/// As [`ask`].
pub async fn begin(path: &Path, command: &Command) -> anyhow::Result<Reply> {
    let mut line = Line::connect(path).await.with_context(|| {
        let shown = path.display();
        format!("no running process answers at {shown} (admin.control of its configuration, --control of this command)")
    })?;
    let answer = line.ask(Scope::All, command).await?;
    Ok(Reply { answer, line })
}

/// Asks over a connection that is open already, and leaves it open.
pub(super) async fn ask_over(socket: UnixStream, scope: Scope, command: &Command) -> anyhow::Result<Reply> {
    let mut line = Line::over(socket).await?;
    let answer = line.ask(scope, command).await?;
    Ok(Reply { answer, line })
}

/// An answer, which may hold as long as the connection does.
pub struct Reply {
    /// What was said.
    pub answer: Answer,
    line: Line,
}

impl Reply {
    /// Whether the process at the other end still keeps the connection open.
    pub fn is_open(&self) -> bool {
        !self.line.connection.is_finished()
    }
}

/// A connection to a running process.
struct Line {
    sender: http1::SendRequest<Full<Bytes>>,
    /// Of the last answer, as long as more may come.
    body: Option<Incoming>,
    connection: AbortOnDropHandle<()>,
}

impl Line {
    async fn connect(path: &Path) -> anyhow::Result<Self> {
        Self::over(UnixStream::connect(path).await?).await
    }

    async fn over(socket: UnixStream) -> anyhow::Result<Self> {
        let (sender, connection) = http1::handshake(TokioIo::new(socket)).await?;
        // How it ends is seen by whoever waits for an answer.
        let connection = tokio::spawn(async move { drop(connection.await) });
        Ok(Self { sender, body: None, connection: AbortOnDropHandle::new(connection) })
    }

    async fn ask(&mut self, scope: Scope, command: &Command) -> anyhow::Result<Answer> {
        let body = Full::new(Bytes::from(serde_json::to_vec(command)?));
        let request =
            Request::builder().method(Method::POST).uri(scope.path()).header("host", "vestibule").body(body)?;
        let mut body = self.sender.send_request(request).await?.into_body();
        let mut line = Vec::new();
        while !line.ends_with(b"\n") {
            let Some(frame) = body.frame().await else { break };
            line.extend_from_slice(frame?.data_ref().map_or(&[], |data| &data[..]));
        }
        self.body = Some(body);
        serde_json::from_slice(&line).context("what answers there is no Vestibule")
    }
}

/// A process whose place is to be taken. The connection is made before its socket's name is, for then nobody would find it.
pub struct Predecessor {
    path: PathBuf,
    line: tokio::sync::Mutex<Line>,
}

impl Predecessor {
    /// The process at `path`, if there is one.
    pub async fn at(path: &Path) -> Option<Self> {
        let line = Line::connect(path).await.ok()?;
        Some(Self { path: path.to_owned(), line: tokio::sync::Mutex::new(line) })
    }

    /// Its listening sockets, on which it goes on serving too.
    ///
    /// # Errors
    /// It does not hand over.
    pub async fn sockets(&self) -> anyhow::Result<Vec<TcpListener>> {
        let mut waiting = beside(&self.path, std::process::id()).into_os_string();
        waiting.push(".sockets");
        let waiting = PathBuf::from(waiting);
        let _ = fs::remove_file(&waiting);
        let listener =
            UnixListener::bind(&waiting).with_context(|| format!("{} cannot be bound", waiting.display()))?;
        let receiving = tokio::task::spawn_blocking(move || receive(&listener));
        let asked = self.line.lock().await.ask(Scope::Process, &Command::HandOver { path: waiting.clone() }).await;
        let _ = fs::remove_file(&waiting);
        let answer = asked?;
        if !answer.ok {
            bail!("the running process does not hand over: {}", answer.text);
        }
        receiving.await.context("sockets could not be received")?.context("sockets could not be received")
    }

    /// The administrative states of servers there. `None`: it does not hand them over.
    pub async fn states(&self) -> Option<Vec<StoredState>> {
        let answer = self.line.lock().await.ask(Scope::Process, &Command::States).await;
        states(answer.ok()?)
    }

    /// We serve: it may go. Returns the administrative states of servers at that moment.
    pub async fn retire(self) -> Option<Vec<StoredState>> {
        let retire = Command::Retire { pid: std::process::id() };
        match self.line.into_inner().ask(Scope::Process, &retire).await {
            Ok(answer) if answer.ok => {
                tracing::info!("the process before this one retires");
                return states(answer);
            }
            Ok(answer) => {
                tracing::error!(answer = %answer.text, "the process before this one does not retire: stop it")
            }
            Err(error) => tracing::error!(%error, "the process before this one cannot be told to retire: stop it"),
        }
        None
    }
}

/// Valid states in an answer.
fn states(answer: Answer) -> Option<Vec<StoredState>> {
    let states: Vec<StoredState> = serde_json::from_value(answer.data).ok().filter(|_| answer.ok)?;
    states.iter().all(|stored| stored.validate().is_ok()).then_some(states)
}

fn receive(listener: &UnixListener) -> io::Result<Vec<TcpListener>> {
    listener.set_nonblocking(false)?;
    let poll = rustix::event::PollFd::new(listener, rustix::event::PollFlags::IN);
    let timeout = rustix::event::Timespec { tv_sec: HAND_OVER.as_secs().cast_signed(), tv_nsec: 0 };
    if rustix::event::poll(&mut [poll], Some(&timeout))? == 0 {
        return Err(io::ErrorKind::TimedOut.into());
    }
    let (stream, _) = listener.accept()?;
    stream.set_read_timeout(Some(HAND_OVER))?;
    inherit::receive(&stream)
}
