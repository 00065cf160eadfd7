//! Input of the login dialogue with a server, and the steps that it returns.

use super::command::LoginForms;
use super::fault::ServerFault;
use super::verdict::Verdict;
use crate::identity::{LoginWith, Mechanism, ServerLogin};
use crate::protocol::imap::capability::ServerCapabilities;
use crate::protocol::imap::client_id::IdPair;
use crate::protocol::imap::refusal::RefusalKind;
use crate::protocol::imap::tag::Tag;

/// A login to be made on one connection.
#[derive(Debug)]
pub struct LoginAttempt<'a> {
    /// The credentials. `None`: only the server's capabilities are queried.
    pub login: Option<ServerLogin<'a>>,
    /// The client's tag, which replaces the tag of the server's answer.
    pub tag: &'a Tag,
    /// Whether STARTTLS is required before the login.
    pub starttls: bool,
    /// Fields of the ID command, which is not sent if there are none.
    pub id: Vec<IdPair>,
    /// Maximum size of a line in bytes.
    pub max_line: usize,
    /// Maximum number of untagged lines before the answer.
    pub max_untagged_lines: usize,
    /// Maximum total size of the untagged lines before the answer, in bytes.
    pub max_untagged_bytes: usize,
    /// The backend's rules for logins.
    pub rules: DialogueRules<'a>,
}

/// A backend's rules: how the proxy logs in on its servers, and how their answers are interpreted.
#[derive(Debug, Clone, Copy, Default)]
pub struct DialogueRules<'a> {
    /// The form in which a password is sent.
    pub login_with: LoginWith,
    /// The command that the client used, or `None` for a login of the proxy itself.
    pub client: Option<Mechanism>,
    /// Whether all sessions of a user must be on one server.
    pub one_server_per_user: bool,
    /// Parts of refusal texts that mean an outage, in lower case, in addition to the built-in ones.
    pub unavailable_texts: &'a [String],
    /// Parts of refusal texts that mean a limit of the user, likewise.
    pub limit_texts: &'a [String],
    /// Forms that the server rejected in earlier logins.
    pub unsupported_forms: Option<UnsupportedForms>,
}

/// Forms of the login that a server rejects although its capabilities list them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UnsupportedForms {
    /// Fingerprint of the capabilities. If they change, the server may be another one.
    pub(super) capabilities: u64,
    pub(super) forms: LoginForms,
}

/// What the caller must do next, after it has sent the bytes in `out`.
#[derive(Debug)]
pub enum LoginStep {
    /// Read from the server, and pass the bytes to `BackendLogin::input`.
    NeedInput,
    /// Perform the TLS handshake, then call `BackendLogin::tls_established`.
    StartTls,
    /// The server has accepted the login.
    Accepted {
        /// Bytes for the client: untagged lines, the OK under the client's tag, and the bytes that followed it.
        to_client: Vec<u8>,
    },
    /// The server has refused the login.
    Refused {
        /// A complete line for the client, under its tag.
        reply: Vec<u8>,
        /// Whether it is a failed login.
        kind: RefusalKind,
    },
    /// The server has sent this challenge, which the client must answer: pass the response to `BackendLogin::respond`.
    Challenge(Vec<u8>),
    /// The server refers the user to another server.
    Referred(Referral),
    /// The server's capabilities, if there were no credentials.
    Probed(ServerCapabilities),
    /// The server could not verify the login.
    Unavailable(Unavailable),
}

/// A login that the server could not verify, and the verdict.
#[derive(Debug, PartialEq, Eq)]
pub struct Unavailable {
    /// The fault.
    pub fault: ServerFault,
    /// Whether another server or this one again is tried, and the effect on the server's health.
    pub verdict: Verdict,
    /// The server's text as a complete line for the client, under its tag.
    pub reply: Option<Vec<u8>>,
    /// The beginning of the server's line for logs: escaped, and without secrets.
    pub excerpt: Option<String>,
}

/// The server to which a login is referred (RFC 2221).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Referral {
    /// An address or a DNS name, in lower case.
    pub host: String,
    /// The port, 143 by default (RFC 5092 section 2).
    pub port: u16,
    /// The server's answer for the client, for referrals that are not followed.
    pub reply: Vec<u8>,
}

/// A server's answer to an ID with fields that only trusted proxies may send.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IdAnswer {
    /// "Trusted ID completed.", which Dovecot sends since 2.4.
    Trusted,
    /// Any other answer. Dovecot before 2.4 sends the same answer to trusted and untrusted clients.
    Ambiguous,
}
