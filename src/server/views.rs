//! What operators are shown of a process: plain values, as JSON on the control socket and between a process and its predecessors.

use serde::{Deserialize, Serialize};

use crate::admin_state::AdminState;
use crate::backend::state_override::{StateOverride, StoredOverride};

/// State of one process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessStatus {
    /// Version of the program.
    pub version: String,
    /// Process id.
    pub pid: u32,
    /// The configuration file.
    pub file: String,
    /// Addresses of the listeners.
    pub listeners: Vec<String>,
    /// All servers.
    pub servers: Vec<ServerStatus>,
    /// Administrative states of servers that the configuration does not have.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub unused_states: Vec<StoredOverride>,
    /// Sessions, logins in progress included.
    pub sessions: usize,
}

/// State of one server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServerStatus {
    /// Its backend.
    pub backend: String,
    /// Its name.
    pub server: String,
    /// The administrative state that applies.
    pub state: AdminState,
    /// Whether it answers.
    pub up: bool,
    /// Sessions on it, logins in progress included.
    pub sessions: usize,
    /// Whether it lets a session change its user (RFC 8437).
    #[serde(default)]
    pub unauthenticate: bool,
    /// The last failure of a login or check there.
    #[serde(default)]
    pub last_error: Option<ServerError>,
    /// The administrative state, if one is set.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub set: Option<StateOverride>,
}

/// A failure of a login or check on a server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServerError {
    /// Seconds since it happened.
    pub seconds_ago: u64,
    /// A sentence without anything secret.
    pub text: String,
}

/// One session, or login in progress.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionView {
    /// The user, as routes know it.
    pub user: String,
    /// The client's address.
    pub client: String,
    /// The session's id in log records.
    pub session: String,
    /// The backend; absent until the user is routed.
    #[serde(default)]
    pub backend: Option<String>,
    /// The server; absent until one is chosen.
    #[serde(default)]
    pub server: Option<String>,
    /// Seconds since the login began.
    pub seconds: u64,
    /// Whether the login has succeeded.
    pub settled: bool,
    /// Whether only the client is still connected.
    pub cut_off: bool,
    /// Process id of the predecessor that serves it; absent: the process that was asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub predecessor: Option<u32>,
}

/// Sessions, as many as are listed at a time.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionList {
    /// The sessions.
    pub sessions: Vec<SessionView>,
    /// Number of sessions that were left out.
    pub left_out: usize,
}
