//! The client of the control socket: sends a command to a running process and reads the response.

use std::fmt::Write as _;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use http_body_util::{BodyExt as _, Full};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1;
use hyper::{Method, Request};
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tokio::time::timeout;
use tokio_util::task::AbortOnDropHandle;

use super::message::{Command, Progress, Response, Scope};

/// Timeout of connecting. The queue of a process that is stopped may be full.
const CONNECT_DEADLINE: Duration = Duration::from_secs(5);
/// Timeout of `status`, which also queries predecessors.
const STATUS_DEADLINE: Duration = Duration::from_secs(15);
/// Timeout of a command about a user or a server, which may also query directories.
const COMMAND_DEADLINE: Duration = Duration::from_secs(60);
/// Timeout of a hold, and of a move without its wait for the routes: sessions must end in all processes.
const MOVE_DEADLINE: Duration = Duration::from_secs(120);
/// Timeout of a reload, which may read tables of millions of lines.
const RELOAD_DEADLINE: Duration = Duration::from_secs(10 * 60);
/// Added to the time after which the running process terminates a successor that does not serve.
const UPGRADE_MARGIN: Duration = Duration::from_secs(30);

/// The control socket belongs to another user.
#[derive(Debug, thiserror::Error)]
#[error("{} may be opened by root and by the user that the process runs as, only", .0.display())]
pub(crate) struct NotPermitted(PathBuf);

/// Sends `command` to the process at `path`, and returns its response.
///
/// # Errors
/// No process answers at `path`, or it is not a Vestibule.
pub(crate) async fn send(path: &Path, command: &Command) -> anyhow::Result<Response> {
    Ok(send_and_keep_open(path, command).await?.response)
}

/// As [`send`], and leaves the connection open: see [`Command::Hold`].
///
/// # Errors
/// As [`send`].
pub(crate) async fn send_and_keep_open(path: &Path, command: &Command) -> anyhow::Result<OpenResponse> {
    let shown = path.display();
    let connected = timeout(CONNECT_DEADLINE, UnixStream::connect(path)).await;
    let connected = connected.unwrap_or_else(|_| Err(io::Error::other("its connection queue is full")));
    if let Err(error) = &connected
        && error.kind() == io::ErrorKind::PermissionDenied
    {
        return Err(NotPermitted(path.to_owned()).into());
    }
    let socket = connected.with_context(|| {
        format!("no running process answers at {shown} (admin.control of its configuration, --control of this command)")
    })?;
    let deadline = deadline(command);
    let response = timeout(deadline, send_over(socket, Scope::AllProcesses, command)).await;
    let response = response.with_context(|| {
        format!("the process at {shown} does not respond within {}", humantime::format_duration(deadline))
    })?;
    response.map_err(|error| match error.downcast::<UnexpectedReply>() {
        Ok(reply) => anyhow::anyhow!("{shown} is not a Vestibule control socket: {reply}"),
        Err(error) => error,
    })
}

/// Sends `command` over an open connection, which stays open.
pub(super) async fn send_over(socket: UnixStream, scope: Scope, command: &Command) -> anyhow::Result<OpenResponse> {
    let (mut sender, connection) = http1::handshake(TokioIo::new(socket)).await?;
    // An error of the connection also ends the request.
    let connection = AbortOnDropHandle::new(tokio::spawn(async move { drop(connection.await) }));
    let body = Full::new(Bytes::from(serde_json::to_vec(command)?));
    let request = Request::builder().method(Method::POST).uri(scope.path()).header("host", "vestibule").body(body)?;
    let mut body = sender.send_request(request).await?.into_body();
    let mut pending = Vec::new();
    loop {
        while let Some(end) = pending.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = pending.drain(..=end).collect();
            if let Ok(Progress { progress }) = serde_json::from_slice(&line) {
                eprintln!("{}", printable(&progress));
                continue;
            }
            let response = serde_json::from_slice(&line).map_err(UnexpectedReply)?;
            return Ok(OpenResponse { response, connection, _sender: sender, _body: body });
        }
        let frame = body.frame().await.context("the process has closed the connection without a response")?;
        pending.extend_from_slice(frame?.data_ref().map_or(&[], |data| &data[..]));
    }
}

/// The reply is not a [`Response`].
#[derive(Debug, thiserror::Error)]
#[error("unexpected reply ({0})")]
struct UnexpectedReply(serde_json::Error);

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

/// A response whose connection is still open. A hold lasts until the connection is closed.
pub(crate) struct OpenResponse {
    /// The response.
    pub response: Response,
    connection: AbortOnDropHandle<()>,
    _sender: http1::SendRequest<Full<Bytes>>,
    _body: Incoming,
}

impl OpenResponse {
    /// Whether the process at the other end still keeps the connection open.
    pub(crate) fn is_open(&self) -> bool {
        !self.connection.is_finished()
    }

    /// Turns a failure into an error with its text.
    pub(super) fn into_success(self) -> Result<Self, String> {
        if self.response.ok { Ok(self) } else { Err(self.response.text) }
    }
}

/// Escapes the characters in `text` that control a terminal or change the direction of writing, because user names and server
/// texts are not trusted. The escapes are those of JSON, so that a JSON document keeps its meaning.
pub(crate) fn printable(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for char in text.chars() {
        let changes_direction =
            matches!(char, '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
        if (char.is_control() && char != '\n') || changes_direction {
            // All of them are below U+10000. Writing to a String cannot fail.
            let _ = write!(escaped, "\\u{:04x}", u32::from(char));
        } else {
            escaped.push(char);
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn printable_text_has_no_terminal_control_characters() {
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
