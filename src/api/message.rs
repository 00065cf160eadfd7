//! The messages on the control socket: a command, and the response to it.
//!
//! Processes of different versions exchange them during an upgrade, so the names of fields and commands do not change.

use std::fmt;

use hyper::body::Bytes;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::admin_state::AdminState;

/// A request to the running process.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) enum Command {
    /// Reload the configuration.
    Reload,
    /// Return the state of the process and its servers.
    Status,
    /// List sessions.
    Sessions {
        /// List only this user's sessions.
        user: Option<String>,
    },
    /// End a user's sessions.
    Kick {
        /// The user whose sessions are ended.
        user: String,
    },
    /// Set a server's administrative state.
    Server {
        /// The server's name, for all backends that have it, or `BACKEND/SERVER`.
        name: String,
        /// The new state; `None` returns to the configured one.
        state: Option<AdminState>,
        /// End the server's sessions too, spread over this number of seconds.
        over: Option<f64>,
        /// The operator's reason.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        reason: Option<String>,
        /// The user who called sudo(8). The client reports it, so it is not verified.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        sudo_user: Option<String>,
    },
    /// End a user's sessions, and delay new logins until the routes name another backend.
    Move {
        /// The user to move.
        user: String,
        /// The backend that the routes must name.
        backend: String,
        /// Number of seconds to wait for the routes. Default: 10.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        wait: Option<f64>,
    },
    /// End a user's sessions, and delay new logins until the client closes the connection.
    Hold {
        /// The user whose logins are delayed.
        user: String,
    },
    /// Hand the listening sockets to a successor over this connection, and retire when it serves.
    HandOver {
        /// The successor's process id, for systems that do not report that of a socket's peer.
        pid: u32,
    },
    /// Start the installed binary as successor, and respond when it serves or has failed.
    Upgrade {
        /// Number of seconds after which a successor that does not serve is terminated.
        timeout: f64,
    },
}

/// The command and its arguments, as the log shows them.
impl fmt::Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Reload => f.write_str("reload"),
            Self::Status => f.write_str("status"),
            Self::Sessions { user: None } => f.write_str("sessions"),
            Self::Sessions { user: Some(user) } => write!(f, "sessions {user}"),
            Self::Kick { user } => write!(f, "kick {user}"),
            Self::Server { name, state, over, reason, sudo_user } => {
                write!(f, "server {name} {}", state.map_or("reset", AdminState::as_str))?;
                over.map_or(Ok(()), |seconds| write!(f, " over {seconds} s"))?;
                reason.as_ref().map_or(Ok(()), |reason| write!(f, ", reason: {reason}"))?;
                sudo_user.as_ref().map_or(Ok(()), |user| write!(f, ", sudo user: {user}"))
            }
            Self::Move { user, backend, wait: None } => write!(f, "move {user} to {backend}"),
            Self::Move { user, backend, wait: Some(wait) } => write!(f, "move {user} to {backend} within {wait} s"),
            Self::Hold { user } => write!(f, "hold {user}"),
            Self::HandOver { pid } => write!(f, "hand over to process {pid}"),
            Self::Upgrade { timeout } => write!(f, "upgrade within {timeout} s"),
        }
    }
}

/// The processes that a command applies to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scope {
    /// The process that receives the command, and its predecessors.
    AllProcesses,
    /// The process that receives the command.
    ThisProcess,
}

impl Scope {
    /// The path of the request.
    pub(super) fn path(self) -> &'static str {
        match self {
            Self::AllProcesses => "/",
            Self::ThisProcess => "/process",
        }
    }

    pub(super) fn of_path(path: &str) -> Self {
        if path == Self::ThisProcess.path() { Self::ThisProcess } else { Self::AllProcesses }
    }
}

/// A line before the response to a command that takes long.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Progress {
    pub(super) progress: String,
}

/// The response to a command.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Response {
    /// Whether the command succeeded.
    pub ok: bool,
    /// The result as text of one or more lines, or the error.
    pub text: String,
    /// The result as JSON.
    #[serde(default)]
    pub data: Value,
    /// Warnings, one line each.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
}

impl Response {
    pub(super) fn success(text: impl Into<String>) -> Self {
        Self { ok: true, text: text.into(), data: Value::Null, notes: Vec::new() }
    }

    pub(super) fn failure(text: impl Into<String>) -> Self {
        Self { ok: false, text: text.into(), data: Value::Null, notes: Vec::new() }
    }
}

/// Encodes a response or a progress message as one line.
pub(super) fn encode(message: &impl Serialize) -> Bytes {
    // Strings and JSON values can always be serialized.
    let mut line = serde_json::to_vec(message).unwrap_or_default();
    line.push(b'\n');
    line.into()
}
