//! What the dialogue with a server is given, and the steps that it returns.

use super::command::LoginForms;
use super::fault::ServerFault;
use super::verdict::Verdict;
use crate::identity::{LoginWith, Mechanism, ServerLogin};
use crate::protocol::imap::capability::ServerCapabilities;
use crate::protocol::imap::client_id::IdPair;
use crate::protocol::imap::refusal::RefusalKind;
use crate::protocol::imap::tag::Tag;

/// One login to be made on one connection.
#[derive(Debug)]
pub struct LoginAttempt<'a> {
    /// What to log in with; none: only to see what the server offers.
    pub login: Option<ServerLogin<'a>>,
    /// What the answer is given under.
    pub tag: &'a Tag,
    /// Demand TLS before anything else.
    pub starttls: bool,
    /// Pairs for ID; none: no ID is sent.
    pub id: Vec<IdPair>,
    /// Bytes of a line.
    pub max_line: usize,
    /// Untagged lines before the answer.
    pub max_untagged_lines: usize,
    /// Bytes of them together.
    pub max_untagged_bytes: usize,
    /// How the backend wants its servers logged in to, and their answers understood.
    pub rules: DialogueRules<'a>,
}

/// How a backend's servers are logged in to, and how their answers are understood.
#[derive(Debug, Clone, Copy, Default)]
pub struct DialogueRules<'a> {
    /// The form in which a password is sent.
    pub login_with: LoginWith,
    /// The command that the client used; `None`: the login is the proxy's own.
    pub client: Option<Mechanism>,
    /// Whether all sessions of a user must be on one server.
    pub one_server_per_user: bool,
    /// Texts of a refusal that mean an outage, in lower case, beside those that are built in.
    pub unavailable_texts: &'a [String],
    /// Texts of a refusal that mean a limit of the user.
    pub limit_texts: &'a [String],
    /// What earlier logins have shown about the server.
    pub unsupported_forms: Option<UnsupportedForms>,
}

/// LoginForms of the login that a server does not understand although its capabilities list them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UnsupportedForms {
    /// Fingerprint of the capabilities: other ones may mean another server.
    pub(super) capabilities: u64,
    pub(super) rejected: LoginForms,
}

/// What the caller does next; what is in `out` is sent first.
#[derive(Debug)]
pub enum LoginStep {
    /// Read more.
    NeedInput,
    /// Perform the handshake, then call `BackendLogin::tls_established`.
    StartTls,
    /// Logged in: these bytes are the client's.
    Accepted {
        /// Untagged lines, the OK under the client's tag, and what followed it.
        to_client: Vec<u8>,
    },
    /// The server said no.
    Refused {
        /// A complete line under the client's tag.
        reply: Vec<u8>,
        /// Whether it is a failed login.
        kind: RefusalKind,
    },
    /// The server asks the client something: this is what follows `+ `. The answer goes to `BackendLogin::respond`.
    Challenge(Vec<u8>),
    /// The server knows where the user is: elsewhere.
    Referred(Referral),
    /// There was nothing to log in with, and this is what the server offers.
    Probed(ServerCapabilities),
    /// The server could not answer.
    Unavailable(Unavailable),
}

/// A login that the server could not answer, and what follows from that.
#[derive(Debug, PartialEq, Eq)]
pub struct Unavailable {
    /// What went wrong.
    pub fault: ServerFault,
    /// Whether another server is tried, or this one again, and what its health learns.
    pub verdict: Verdict,
    /// The server's own words as a complete line under the client's tag.
    pub reply: Option<Vec<u8>>,
    /// The beginning of the server's line, for logs: escaped, and without anything secret.
    pub excerpt: Option<String>,
}

/// Where a server sends a user to (RFC 2221).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Referral {
    /// An address or a DNS name, in lower case.
    pub host: String,
    /// 143 where none is given (RFC 5092 section 2).
    pub port: u16,
    /// The server's answer for the client, should it not be followed.
    pub reply: Vec<u8>,
}

/// What the server said to an ID with fields that only trusted proxies may send.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IdAnswer {
    /// "Trusted ID completed.", as Dovecot has it since 2.4.
    Trusted,
    /// Anything else. Dovecot before 2.4 answers the same whether or not it trusts.
    Ambiguous,
}
