//! The other end of the control socket: a command to the running process, and its answer. Called by `operate`.

use std::fmt::Write as _;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, bail};
use http_body_util::{BodyExt as _, Full};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1;
use hyper::{Method, Request};
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tokio::time::timeout;
use tokio_util::task::AbortOnDropHandle;

use super::{Answer, Command, Progress};

/// Timeout of the connection. A process that is stopped has a queue that may be full.
const CONNECT_DEADLINE: Duration = Duration::from_secs(5);
/// Timeout of the state of a process, for which predecessors are asked.
const STATUS_DEADLINE: Duration = Duration::from_secs(15);
/// Timeout of a command about a user or a server, for which directories are asked too.
const COMMAND_DEADLINE: Duration = Duration::from_secs(60);
/// Timeout of a hold, and of a move without the wait for the routes: sessions must end in all processes.
const MOVE_DEADLINE: Duration = Duration::from_secs(120);
/// Timeout of the answer to a command that reads tables, which may have millions of lines.
const RELOAD_DEADLINE: Duration = Duration::from_secs(10 * 60);
/// Added to the time that the running process gives a successor before it ends it.
const UPGRADE_MARGIN: Duration = Duration::from_secs(30);

/// The processes that a command is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scope {
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

/// The control socket belongs to another user.
#[derive(Debug, thiserror::Error)]
#[error("{} may be opened by the user that the process runs as, and by root, only", .0.display())]
pub(crate) struct NotPermitted(PathBuf);

/// Asks the process at `path`.
///
/// # Errors
/// Nobody answers there, or something else than a running Vestibule.
pub(crate) async fn ask(path: &Path, command: &Command) -> anyhow::Result<Answer> {
    Ok(begin(path, command).await?.answer)
}

/// Asks, and leaves the connection open: see [`Command::Hold`].
///
/// # Errors
/// As [`ask`].
pub(crate) async fn begin(path: &Path, command: &Command) -> anyhow::Result<Reply> {
    let shown = path.display();
    let connected = timeout(CONNECT_DEADLINE, Line::connect(path)).await;
    let connected = connected.unwrap_or_else(|_| bail!("its queue of connections is full"));
    if let Err(error) = &connected
        && error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::PermissionDenied)
    {
        return Err(NotPermitted(path.to_owned()).into());
    }
    let mut line = connected.with_context(|| {
        format!("no running process answers at {shown} (admin.control of its configuration, --control of this command)")
    })?;
    let deadline = deadline(command);
    let answer = timeout(deadline, line.ask(Scope::All, command)).await;
    let answer = answer.with_context(|| {
        format!("the process at {shown} does not answer within {}", humantime::format_duration(deadline))
    })??;
    Ok(Reply { answer, line })
}

/// Asks over a connection that is open already, and leaves it open.
pub(super) async fn ask_over(socket: UnixStream, scope: Scope, command: &Command) -> anyhow::Result<Reply> {
    let mut line = Line::over(socket).await?;
    let answer = line.ask(scope, command).await?;
    Ok(Reply { answer, line })
}

fn deadline(command: &Command) -> Duration {
    let seconds = |seconds: f64| Duration::try_from_secs_f64(seconds).unwrap_or_default();
    match command {
        Command::Status => STATUS_DEADLINE,
        Command::Sessions { .. } | Command::Kick { .. } | Command::Server { .. } | Command::HandOver { .. } => {
            COMMAND_DEADLINE
        }
        Command::Hold { .. } => MOVE_DEADLINE,
        Command::Move { wait, .. } => MOVE_DEADLINE.saturating_add(seconds(wait.unwrap_or_default())),
        Command::Reload => RELOAD_DEADLINE,
        Command::Upgrade { timeout } => UPGRADE_MARGIN.saturating_add(seconds(*timeout)),
    }
}

/// An answer, which may hold as long as the connection does.
pub(crate) struct Reply {
    /// What was said.
    pub answer: Answer,
    line: Line,
}

impl Reply {
    /// Whether the process at the other end still keeps the connection open.
    pub(crate) fn is_open(&self) -> bool {
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
        let mut pending = Vec::new();
        loop {
            while let Some(end) = pending.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = pending.drain(..=end).collect();
                match serde_json::from_slice::<Progress>(&line) {
                    Ok(Progress { progress }) => eprintln!("{}", printable(&progress)),
                    Err(_) => {
                        self.body = Some(body);
                        return serde_json::from_slice(&line).context("what answers there is no Vestibule");
                    }
                }
            }
            let frame = body.frame().await.context("the process has closed the connection without an answer")?;
            pending.extend_from_slice(frame?.data_ref().map_or(&[], |data| &data[..]));
        }
    }
}

/// `text` without characters that a terminal acts on or that turn the direction of writing, for user names and server texts are
/// chosen by others. The escapes are JSON's, so that JSON stays the same document.
pub(crate) fn printable(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for char in text.chars() {
        let turns = matches!(char, '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
        if (char.is_control() && char != '\n') || turns {
            // All of them are below U+10000. Writing to a string cannot fail.
            let _ = write!(shown, "\\u{:04x}", u32::from(char));
        } else {
            shown.push(char);
        }
    }
    shown
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn what_is_printed_cannot_command_a_terminal() {
        assert_eq!(
            printable("alice\u{1b}[2J\u{7f}\u{9b}31m\u{202e}x\ty\nz"),
            "alice\\u001b[2J\\u007f\\u009b31m\\u202ex\\u0009y\nz"
        );
        assert_eq!(printable("Grüße 漢字 🙂"), "Grüße 漢字 🙂");
        let value = json!({"user": "a\u{9b}b\u{202e}"});
        let text = printable(&serde_json::to_string_pretty(&value).unwrap());
        assert_eq!(serde_json::from_str::<Value>(&text).unwrap(), value);
    }
}
