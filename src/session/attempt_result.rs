//! The result of a login attempt, and what interrupts one.

use std::sync::Arc;
use std::time::Instant;

use super::SessionEnded;
use crate::backend::login::Established;
use crate::backend::{Backend, ServerPermit};
use crate::protocol::imap::refusal::RefusalKind;
use crate::session_registry::{RegisterError, SessionHandle};

/// The result of a login attempt. In every case the client has not been answered yet.
pub(super) enum AttemptResult {
    Accepted(AcceptedLogin),
    Refused(Refusal),
    /// The client is answered that the mailbox is temporarily unavailable.
    Unavailable,
}

/// A login that a server has accepted.
pub(super) struct AcceptedLogin {
    pub(super) backend: Arc<Backend>,
    pub(super) server_permit: ServerPermit,
    pub(super) handle: SessionHandle,
    pub(super) established: Box<Established>,
}

/// A login that was not accepted, with the complete reply for the client.
pub(super) struct Refusal {
    pub(super) reply: Vec<u8>,
    pub(super) failed_login: FailedLogin,
    pub(super) connection: Connection,
}

/// Whether a refused login is a failed one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum FailedLogin {
    /// It counts for nothing.
    No,
    /// It counts against `limits.failed_logins`. It needs no log record and no delay, or already has them.
    Counted,
    /// It counts against `limits.failed_logins`, is logged, and is answered after a delay, and not earlier than `not_before`.
    LoggedAndDelayed { not_before: Option<Instant> },
}

impl FailedLogin {
    pub(super) fn kind(self) -> RefusalKind {
        match self {
            Self::No => RefusalKind::NotCounted,
            Self::Counted | Self::LoggedAndDelayed { .. } => RefusalKind::FailedLogin,
        }
    }
}

/// What happens to the connection after a refusal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Connection {
    StaysOpen,
    Closes,
}

impl Refusal {
    /// A refusal that does not count as a failed login.
    pub(super) fn uncounted(reply: Vec<u8>) -> Self {
        Self { reply, failed_login: FailedLogin::No, connection: Connection::StaysOpen }
    }

    /// A refusal that counts against `limits.failed_logins` and needs no log record.
    pub(super) fn counted(reply: Vec<u8>) -> Self {
        Self { reply, failed_login: FailedLogin::Counted, connection: Connection::StaysOpen }
    }

    /// A failed login, answered not earlier than `not_before`.
    pub(super) fn failed(reply: Vec<u8>, not_before: Option<Instant>) -> Self {
        let failed_login = FailedLogin::LoggedAndDelayed { not_before };
        Self { reply, failed_login, connection: Connection::StaysOpen }
    }

    pub(super) fn and_close(self) -> Self {
        Self { connection: Connection::Closes, ..self }
    }
}

/// Why a login attempt does not continue with its next step.
pub(super) enum Interrupt {
    SessionEnded,
    Refused(Refusal),
    Unavailable,
    /// The login must be routed again.
    Reroute(RegisterError),
}

impl From<SessionEnded> for Interrupt {
    fn from(_: SessionEnded) -> Self {
        Self::SessionEnded
    }
}

impl From<Refusal> for Interrupt {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

impl From<RegisterError> for Interrupt {
    fn from(error: RegisterError) -> Self {
        Self::Reroute(error)
    }
}
