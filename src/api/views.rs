//! The results of operations: plain values, which are also the JSON on the control socket.
//!
//! Processes of different versions exchange them during an upgrade, so the names of fields do not change.

use serde::{Deserialize, Serialize};

use crate::admin_state::AdminState;
use crate::backend::state_override::{StateOverride, StoredOverride};

/// The state of a process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessStatus {
    /// Version of the program.
    pub version: String,
    /// Process id.
    pub pid: u32,
    /// Path of the configuration file.
    pub file: String,
    /// Addresses of the listeners.
    pub listeners: Vec<String>,
    /// State of each server.
    pub servers: Vec<ServerStatus>,
    /// Administrative states of servers that the configuration does not have.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub unused_states: Vec<StoredOverride>,
    /// Number of sessions, including logins in progress.
    pub sessions: usize,
}

/// The state of a server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServerStatus {
    /// Name of the backend.
    pub backend: String,
    /// Name of the server.
    pub server: String,
    /// The administrative state that applies.
    pub state: AdminState,
    /// Whether the server is considered alive.
    pub up: bool,
    /// Number of sessions on the server, including logins in progress.
    pub sessions: usize,
    /// Whether the server offers UNAUTHENTICATE (RFC 8437), by which a session can change its user.
    #[serde(default)]
    pub unauthenticate: bool,
    /// The last failed login or check.
    #[serde(default)]
    pub last_error: Option<ServerError>,
    /// The operator's override of the configured state, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub set: Option<StateOverride>,
}

/// A failed login or check on a server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServerError {
    /// Seconds since it happened.
    pub seconds_ago: u64,
    /// The error. It contains no secrets.
    pub text: String,
}

/// A session or a login in progress.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionView {
    /// The user name that was routed.
    pub user: String,
    /// Address of the client.
    pub client: String,
    /// Id of the session in the log.
    pub session: String,
    /// Name of the backend. Absent before the user is routed.
    #[serde(default)]
    pub backend: Option<String>,
    /// Name of the server. Absent before a server is selected.
    #[serde(default)]
    pub server: Option<String>,
    /// Seconds since the login began.
    pub seconds: u64,
    /// Whether the login has succeeded.
    pub settled: bool,
    /// Whether the server has closed its connection, while the client is still connected.
    pub cut_off: bool,
    /// Process id of the predecessor that serves the session. Absent for sessions of the queried process.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub predecessor: Option<u32>,
}

/// A list of sessions, cut at a maximum number.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionList {
    /// The listed sessions.
    pub sessions: Vec<SessionView>,
    /// Number of sessions that are not in the list.
    pub left_out: usize,
}

/// The result of a move.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MoveResult {
    /// Number of sessions that were ended.
    pub ended: usize,
    /// The backend that the routes name now.
    pub backend: String,
}
