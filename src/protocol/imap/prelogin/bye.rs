//! The last line sent to a client whose connection the proxy closes.

/// Why the proxy closes a connection although the client did nothing wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ByeReason {
    /// The client has not logged in within `limits.login`.
    LoginDeadline,
    /// The process shuts down.
    Shutdown,
    /// Too many connections have not logged in, and this one has the lowest priority.
    Shed,
    /// Connections before login need too much memory, and this one holds the most.
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
