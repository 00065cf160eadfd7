//! The last line for a client whose connection the proxy ends.

/// Why the proxy ends a connection that did nothing wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ByeReason {
    /// Not logged in in time.
    LoginDeadline,
    /// The process stops.
    Shutdown,
    /// Too many connections have not logged in, and this one is the first to go.
    Shed,
    /// Connections before their login need too much memory, and this one holds most of it.
    Memory,
}

impl ByeReason {
    pub(super) fn text(self) -> &'static str {
        match self {
            Self::LoginDeadline => "Login took too long.",
            Self::Shutdown => "[UNAVAILABLE] Server shutting down, connect again.",
            Self::Shed => "[UNAVAILABLE] Too many connections without a login, connect again.",
            Self::Memory => "[UNAVAILABLE] Logins need too much memory at the moment, try again later.",
        }
    }
}
