//! The administrative state of a server, from the configuration and the command line to the API and the metrics.

use serde::{Deserialize, Serialize};

/// Whether the operator wants a server to receive logins.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AdminState {
    /// The server receives logins.
    #[default]
    Up,
    /// The server receives no new logins; its sessions continue.
    Drain,
    /// The server receives no new logins and no checks, because it is under maintenance.
    Down,
}

impl AdminState {
    /// The name in the configuration, on the command line and in the API.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Up => "up",
            Self::Drain => "drain",
            Self::Down => "down",
        }
    }
}
