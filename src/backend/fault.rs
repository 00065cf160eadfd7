//! Why a server could not answer a login, what happens to the login, and what the server's health learns from it.

use super::Backend;
use super::health::FailureKind;
use crate::failure::{Reason, Side};
use crate::protocol::imap::backend_login::ServerFault;
use crate::protocol::imap::backend_login::verdict::{self, Action, HealthEffect, LoginStage, ServerAnswer, Verdict};

/// Why a server could not answer a login.
#[derive(Debug)]
pub(crate) struct Fault {
    /// Reason for metrics and log records.
    pub reason: Reason,
    /// Text for logs; never sent to the client.
    pub detail: String,
    /// The server's own answer: a complete line under the client's tag.
    pub reply: Option<Vec<u8>>,
    action: FaultAction,
    pub(super) evidence: Evidence,
}

/// What happens to a login after a fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum FaultAction {
    TryNextServer,
    GiveUp,
    /// The login counts as failed, as if the server had refused it.
    Refuse,
}

/// What a fault shows about the server's health.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Evidence {
    /// Nothing, for example because the client can cause the fault.
    None,
    Works,
    Fails(FailureKind),
}

impl Fault {
    /// The backend has no server to try.
    pub(crate) fn no_server() -> Self {
        Self::of_proxy(Reason::NoServer, "the backend has no server at the moment", FaultAction::GiveUp)
    }

    /// A referral that is not followed.
    pub(crate) fn referral(detail: String) -> Self {
        Self::of_proxy(Reason::Referral, detail, FaultAction::GiveUp)
    }

    /// Every server that could take the login has `max_sessions`.
    pub(crate) fn full() -> Self {
        Self::of_proxy(
            Reason::ServersFull,
            "all servers have max_sessions, and none had a free place in time",
            FaultAction::GiveUp,
        )
    }

    /// A server has accepted the login, but the user's sessions on other servers of the backend did not end in time.
    pub(crate) fn sessions_elsewhere() -> Self {
        Self::of_proxy(
            Reason::Moved,
            "the user's sessions on another server of the backend did not end in time",
            FaultAction::GiveUp,
        )
    }

    fn of_proxy(reason: Reason, detail: impl Into<String>, action: FaultAction) -> Self {
        Self { reason, detail: detail.into(), reply: None, action, evidence: Evidence::None }
    }

    /// This machine lacks something, for example a free port. The login of a user whose sessions must all be on one server
    /// is not sent to another one because of that.
    pub(super) fn of_this_machine(backend: &Backend, reason: Reason, detail: String) -> Self {
        let action = if backend.is_sticky() { FaultAction::GiveUp } else { FaultAction::TryNextServer };
        Self::of_proxy(reason, detail, action)
    }

    /// The server cannot be reached, or TLS with it fails: nothing of the client was sent.
    pub(super) fn of_server(reason: Reason, detail: impl ToString) -> Self {
        let answer = ServerAnswer::Fault(ServerFault::Unreachable);
        Self::with_verdict(reason, detail.to_string(), verdict::decide(answer, LoginStage::BeforeLogin, false))
    }

    /// The server refused the TCP connection.
    pub(super) fn connection_refused(detail: String) -> Self {
        Self { evidence: Evidence::Fails(FailureKind::Refused), ..Self::of_server(Reason::Connect, detail) }
    }

    /// The server cannot be reached in time while many logins are pending there.
    pub(super) fn overloaded(backend: &Backend, detail: &str) -> Self {
        let fault = ServerFault::Crowded;
        let verdict = verdict::decide(ServerAnswer::Fault(fault), LoginStage::BeforeLogin, backend.is_sticky());
        Self::with_verdict(reason(fault), format!("{detail}; {}", fault.as_str()), verdict)
    }

    /// A fault for which `verdict` has been decided.
    pub(super) fn with_verdict(reason: Reason, detail: String, verdict: Verdict) -> Self {
        let action = match verdict.action {
            Action::TryAnotherServer => FaultAction::TryNextServer,
            Action::Refuse(_) => FaultAction::Refuse,
            Action::FollowReferral | Action::GiveUp | Action::TryAnotherForm | Action::Reconnect => FaultAction::GiveUp,
        };
        let evidence = match verdict.health {
            HealthEffect::Success => Evidence::Works,
            HealthEffect::Failure => Evidence::Fails(FailureKind::Other),
            HealthEffect::Unchanged => Evidence::None,
        };
        Self { reason, detail, reply: None, action, evidence }
    }

    /// The same fault with the server's own answer for the client.
    pub(super) fn with_reply(mut self, reply: Option<Vec<u8>>) -> Self {
        self.reply = reply;
        self
    }

    /// The same fault, without a consequence for the server's health if it would be a bad one.
    pub(super) fn not_blamed_on_server(mut self) -> Self {
        if matches!(self.evidence, Evidence::Fails(_)) {
            self.evidence = Evidence::None;
        }
        self
    }

    /// Whether another server may be tried.
    pub(crate) fn allows_next_server(&self) -> bool {
        self.action == FaultAction::TryNextServer
    }

    /// Whether the login counts as failed, as if the server had refused it.
    pub(crate) fn is_refusal(&self) -> bool {
        self.action == FaultAction::Refuse
    }

    /// Whether the cause is in this machine, so that it shows nothing about the server.
    pub(super) fn is_local(&self) -> bool {
        matches!(self.reason, Reason::LocalPorts | Reason::System)
    }

    /// Whether the fault is counted when the server is tried. All others are counted with the result of the login.
    pub(crate) fn is_counted_at_server(&self) -> bool {
        let is_of_all_servers = matches!(self.reason, Reason::NoServer | Reason::ServersFull);
        self.reason.side() == Side::Backend && !is_of_all_servers || self.is_local()
    }
}

/// The reason of a server's fault for metrics and log records.
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
