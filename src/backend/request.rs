//! A login to be made on a server, and how the server answered.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::net::TcpStream;

use super::Backend;
use super::connect::Paused;
use super::health::FailureKind;
use crate::config::Limits;
use crate::deadline::Deadline;
use crate::failure::{Reason, Side};
use crate::identity::{Mechanism, ServerLogin};
use crate::protocol::imap::backend_login::verdict::{self, Action, HealthEffect, LoginStage, ServerAnswer, Verdict};
use crate::protocol::imap::backend_login::{Referral, ServerFault};
use crate::protocol::imap::capability::ServerCapabilities;
use crate::protocol::imap::client_id::ClientId;
use crate::protocol::imap::tag::Tag;
use crate::relay::Leg;
use crate::stream::TlsFacts;

/// A login to be made.
#[derive(Debug)]
pub struct Request<'a> {
    /// What to log in with; none: only to see what the server offers.
    pub login: Option<ServerLogin<'a>>,
    /// The command that the client used; `None`: a login of the proxy's own.
    pub mechanism: Option<Mechanism>,
    /// Who asks.
    pub purpose: Purpose,
    /// The client's tag: the server's answer is given under it.
    pub tag: &'a Tag,
    /// The client's own ID pairs.
    pub client_id: &'a ClientId,
    /// Whom the server shall see.
    pub client: SocketAddr,
    /// Where the client connected to.
    pub listener: SocketAddr,
    /// How the client came, where it came over TLS.
    pub tls: Option<&'a TlsFacts>,
    /// One id in our log and the server's.
    pub session_id: &'a str,
    /// Deadlines and caps.
    pub limits: &'a Limits,
    /// When the login must be over, whichever servers are tried; `None`: at the deadline of the one server.
    pub deadline: Option<Deadline>,
}

/// What a connection to a server is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// A client's login, from which the server's health is learnt.
    Session,
    /// A check: the login ends with LOGOUT.
    Check,
    /// A check that has seen enough when TLS stands.
    CheckTls,
}

/// How one server answered.
#[derive(Debug)]
pub enum Outcome<'a> {
    /// Logged in.
    Accepted(Established),
    /// The server said no: a complete line for the client, and whether it counts as a failed login.
    Refused {
        /// Ends with CRLF, carries the client's tag.
        reply: Vec<u8>,
        /// Against `limits.failed_logins`.
        counts: bool,
    },
    /// It asks the client something, in these words, and waits for [`Paused::respond`].
    Challenged(Box<Paused<'a>>, Vec<u8>),
    /// It sends the user elsewhere.
    Referred(Referral),
    /// It was only looked at, or logged in to for a check.
    Seen(Seen),
    /// It could not answer.
    Unavailable(Fault),
}

/// What a check has seen.
#[derive(Debug, Default)]
pub struct Seen {
    /// What the server offers before login.
    pub offer: Option<ServerCapabilities>,
    /// When its certificate ends, in seconds since 1970.
    pub certificate_ends: Option<i64>,
    /// Whether the server lets a session change its user (RFC 8437).
    pub unauthenticate: bool,
}

/// A logged-in connection.
#[derive(Debug)]
pub struct Established {
    /// To the server.
    pub leg: Leg<TcpStream>,
    /// What the client gets first: untagged lines, the tagged OK, and what followed it.
    pub to_client: Vec<u8>,
    /// Which of the server's addresses it is.
    pub address: SocketAddr,
    /// How long the connection took, implicit TLS included.
    pub connect: Duration,
    /// How long the login took from there.
    pub login: Duration,
}

/// Why a server could not answer.
#[derive(Debug)]
pub struct Fault {
    /// The word for metrics.
    pub reason: Reason,
    /// The sentence for logs; never for the client.
    pub detail: String,
    /// The server's own words for the client: a complete line under its tag.
    pub reply: Option<Vec<u8>>,
    /// Whether another server may do better.
    pub try_next: bool,
    /// Whether the login is a failed one for the client, as if the server had refused it.
    pub is_refusal: bool,
    /// Whether the fault shows that the server works.
    pub(super) answered: bool,
    /// How the server's health suffers; `None` for what a client can provoke.
    pub(super) blow: Option<FailureKind>,
}

impl Fault {
    /// The backend has no server to try.
    pub fn no_server() -> Self {
        Self::of_proxy(Reason::NoServer, "the backend has no server just now", false)
    }

    /// A referral that is not followed.
    pub fn referral(detail: String) -> Self {
        Self::of_proxy(Reason::Referral, detail, false)
    }

    /// All servers that could take the login have as many sessions as they may.
    pub fn full() -> Self {
        Self::of_proxy(Reason::ServersFull, "all servers are full, and no place came free in time", false)
    }

    /// A server has accepted the login, and the user's sessions on other servers of the backend do not end in time.
    pub fn sessions_elsewhere() -> Self {
        Self::of_proxy(Reason::Moved, "the user's sessions on another server of the backend do not end", false)
    }

    fn of_proxy(reason: Reason, detail: impl Into<String>, try_next: bool) -> Self {
        Self { reason, detail: detail.into(), reply: None, try_next, is_refusal: false, answered: false, blow: None }
    }

    /// Something that this machine lacks. A user of a sticky backend is not sent to another server for it.
    pub(super) fn of_this_machine(backend: &Backend, reason: Reason, detail: String) -> Self {
        Self::of_proxy(reason, detail, !backend.serves_a_user_by_one_server())
    }

    /// Whether it is for something that this machine lacks, so that it says nothing about the server.
    pub(super) fn is_local(&self) -> bool {
        matches!(self.reason, Reason::LocalPorts | Reason::System)
    }

    /// Whether the fault is counted when the server is tried; the record of the login counts all others.
    pub fn is_counted_at_server(&self) -> bool {
        let is_of_all_servers = matches!(self.reason, Reason::NoServer | Reason::ServersFull);
        self.reason.side() == Side::Backend && !is_of_all_servers || self.is_local()
    }

    /// A server that cannot be reached, or with which there is no TLS: nothing of the client's was sent.
    pub(super) fn of_server(reason: Reason, detail: impl ToString) -> Self {
        let answer = ServerAnswer::Fault(ServerFault::Unreachable);
        Self::decided(reason, detail.to_string(), verdict::decide(answer, LoginStage::BeforeLogin, false))
    }

    /// A server that cannot be reached in time while it is loaded with logins.
    pub(super) fn crowded(backend: &Backend, detail: &str) -> Self {
        let fault = ServerFault::Crowded;
        let alone = backend.serves_a_user_by_one_server();
        let verdict = verdict::decide(ServerAnswer::Fault(fault), LoginStage::BeforeLogin, alone);
        Self::decided(reason(fault), format!("{detail}; {}", fault.as_str()), verdict)
    }

    pub(super) fn decided(reason: Reason, detail: String, verdict: Verdict) -> Self {
        Self {
            reason,
            detail,
            reply: None,
            try_next: verdict.action == Action::TryAnotherServer,
            is_refusal: matches!(verdict.action, Action::Refuse { .. }),
            answered: verdict.health == HealthEffect::Success,
            blow: (verdict.health == HealthEffect::Failure).then_some(FailureKind::Other),
        }
    }
}

/// The reason of a fault for metrics and log records.
pub(super) fn reason(fault: ServerFault) -> Reason {
    match fault {
        ServerFault::Unreachable => Reason::Connect,
        ServerFault::Greeting => Reason::Greeting,
        ServerFault::Bye | ServerFault::Closed => Reason::Bye,
        ServerFault::StartTlsNotOffered | ServerFault::StartTlsRefused => Reason::StartTlsUnavailable,
        ServerFault::StartTlsResidue => Reason::StartTlsResidue,
        ServerFault::Protocol | ServerFault::TooMuchUntagged | ServerFault::TooManyChallenges => Reason::Protocol,
        ServerFault::LoginDisabled | ServerFault::TlsRequired => Reason::LoginDisabled,
        ServerFault::Overloaded | ServerFault::Crowded => Reason::Overloaded,
        ServerFault::UserLimit => Reason::UserLimit,
        ServerFault::LoginBad => Reason::LoginBad,
        ServerFault::AuthzidUnsupported => Reason::AuthzidUnsupported,
        ServerFault::MechanismUnsupported => Reason::MechanismUnsupported,
        ServerFault::Silent | ServerFault::Timeout => Reason::LoginTimeout,
    }
}
