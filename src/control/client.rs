//! The other end of the control socket: a command to the running process, and its answer. Called by `operate`.

use std::path::Path;
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
/// Timeout of the answer to a command that only reads or changes what is in memory.
const SHORT_DEADLINE: Duration = Duration::from_secs(30);
/// Timeout of the answer to a command that waits for directories and for sessions to end.
const MOVE_DEADLINE: Duration = Duration::from_secs(10 * 60);
/// Timeout of the answer to a command that reads tables, which may have millions of lines.
const RELOAD_DEADLINE: Duration = Duration::from_secs(10 * 60);

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
    let shown = path.display();
    let connected = timeout(CONNECT_DEADLINE, Line::connect(path)).await;
    let connected = connected.unwrap_or_else(|_| bail!("its queue of connections is full"));
    let mut line = connected.with_context(|| {
        format!("no running process answers at {shown} (admin.control of its configuration, --control of this command)")
    })?;
    let deadline = deadline(command);
    let answer = timeout(deadline, line.ask(command)).await;
    let answer = answer.with_context(|| {
        format!("the process at {shown} does not answer within {}", humantime::format_duration(deadline))
    })??;
    Ok(Reply { answer, _line: line })
}

fn deadline(command: &Command) -> Duration {
    match command {
        Command::Status
        | Command::Sessions { .. }
        | Command::Kick { .. }
        | Command::Server { .. }
        | Command::HandOver { .. } => SHORT_DEADLINE,
        Command::Move { .. } | Command::Hold { .. } => MOVE_DEADLINE,
        Command::Reload => RELOAD_DEADLINE,
        // The running process ends the successor at that time, and reports it.
        Command::Upgrade { timeout } => {
            Duration::try_from_secs_f64(*timeout).unwrap_or_default().saturating_add(SHORT_DEADLINE)
        }
    }
}

/// An answer, which may hold as long as the connection does.
pub struct Reply {
    /// What was said.
    pub answer: Answer,
    _line: Line,
}

/// A connection to a running process.
struct Line {
    sender: http1::SendRequest<Full<Bytes>>,
    /// Of the last answer, as long as more may come.
    body: Option<Incoming>,
    _connection: AbortOnDropHandle<()>,
}

impl Line {
    async fn connect(path: &Path) -> anyhow::Result<Self> {
        let (sender, connection) = http1::handshake(TokioIo::new(UnixStream::connect(path).await?)).await?;
        // How it ends is seen by whoever waits for an answer.
        let connection = tokio::spawn(async move { drop(connection.await) });
        Ok(Self { sender, body: None, _connection: AbortOnDropHandle::new(connection) })
    }

    async fn ask(&mut self, command: &Command) -> anyhow::Result<Answer> {
        let body = Full::new(Bytes::from(serde_json::to_vec(command)?));
        let request = Request::builder().method(Method::POST).uri("/").header("host", "vestibule").body(body)?;
        let mut body = self.sender.send_request(request).await?.into_body();
        let mut pending = Vec::new();
        loop {
            while let Some(end) = pending.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = pending.drain(..=end).collect();
                match serde_json::from_slice::<Progress>(&line) {
                    Ok(Progress { progress }) => eprintln!("{progress}"),
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
