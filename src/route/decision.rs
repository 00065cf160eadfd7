//! Results of route lookups: where a user's mailbox is, or why the login is refused.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use super::password_verification::PasswordVerification;
use crate::config::BackendId;
use crate::identity::{Secret, UserName};

/// Result of one lookup in a source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LookupResult {
    /// The source knows the user.
    Found(Arc<RouteDecision>),
    /// The source does not know the user.
    Unknown,
    /// The lookup failed, for the reason given, which is never sent to clients.
    Failed(String),
}

/// Where the result of a lookup comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LookupOrigin {
    /// A source in memory.
    Memory,
    /// A query to the directory.
    Directory,
    /// The cache, with the age of the entry.
    Cache(Duration),
    /// An expired cache entry of this age, used because the directory failed.
    Stale(Duration),
}

/// What a source decides for a user it knows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RouteDecision {
    /// The login continues at this destination.
    Destination(Destination),
    /// The login is refused permanently: NO `[CONTACTADMIN]` with this text.
    Refuse(Box<str>),
    /// The source checked the password, and it was wrong: NO `[AUTHENTICATIONFAILED]`.
    WrongPassword(WrongPassword),
    /// The login is refused temporarily: NO `[UNAVAILABLE]` with this text.
    Maintenance(Box<str>),
    /// The source decides by the client's password, and the mechanism of the login carries none.
    PasswordNeeded,
}

/// Where a mailbox is, and how to log in there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Destination {
    /// A declared backend.
    pub backend: BackendId,
    /// Which of its servers may be used.
    pub server: ServerChoice,
    /// The user's name on the server, if it differs from the normalised name.
    pub user: Option<UserName>,
    /// Credentials to log in with instead of the client's. They are used only if the client's identity is verified: otherwise any
    /// password would open the mailbox.
    pub credentials: Option<IssuedCredentials>,
    /// Whether the source has verified the client's password.
    pub verification: PasswordVerification,
}

impl Destination {
    /// The name that identifies the mailbox: the user's name on the server, or the `routed` name if there is no other.
    pub fn mailbox(&self, routed: &Arc<str>) -> Arc<str> {
        self.user.as_ref().map_or_else(|| routed.clone(), |user| user.as_str().into())
    }
}

/// Which servers of a backend may be used.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum ServerChoice {
    /// Any server, selected by the backend.
    #[default]
    Any,
    /// Only the server with this name in the configuration.
    Server(Box<str>),
    /// Only this address, which no server declares and the networks of the route contain.
    Address(SocketAddr),
}

/// A source's reply to a wrong password.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct WrongPassword {
    /// Text for the client; `None` for the default text.
    pub text: Option<Box<str>>,
    /// When the client may try again.
    pub next_attempt: NextAttempt,
}

/// When a client whose password was wrong may try again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NextAttempt {
    /// On the same connection, after the reply, which is sent after this delay.
    After(Duration),
    /// On another connection: this one is closed after the reply.
    OnNewConnection,
}

impl Default for NextAttempt {
    fn default() -> Self {
        Self::After(Duration::ZERO)
    }
}

/// Credentials that a source provides.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IssuedCredentials {
    /// A master user; `None` for the user's own name.
    pub master: Option<UserName>,
    /// The password of that user.
    pub password: Secret,
}

impl RouteDecision {
    /// Any server of a backend, with the client's own name and credentials.
    pub fn backend(backend: BackendId) -> Self {
        Self::Destination(Destination {
            backend,
            server: ServerChoice::Any,
            user: None,
            credentials: None,
            verification: PasswordVerification::Unverified,
        })
    }

    /// Whether it contains a secret, which must not be written to a file.
    pub fn has_secret(&self) -> bool {
        matches!(self, Self::Destination(Destination { credentials: Some(_), .. }))
    }
}

/// The checked answer of a source; `None` if the answer is empty.
impl From<Result<Option<RouteDecision>, String>> for LookupResult {
    fn from(checked: Result<Option<RouteDecision>, String>) -> Self {
        match checked {
            Ok(Some(decision)) => Self::Found(decision.into()),
            Ok(None) => Self::Unknown,
            Err(reason) => Self::Failed(reason),
        }
    }
}
