//! What a server's answer to a login means: for the client, for the backend's other servers, and for the server's health.
//!
//! [`decide`] is the only place that decides this. `backend_login` reports what the server did and at which point of the
//! dialogue, and carries out the verdict. `docs/server-answers.md` shows the same table to operators; a test compares the
//! two. The principle: once a server has the client's credentials, the client can cause whatever the server does next,
//! so nothing after that point makes a server look unhealthy, and nothing moves a user whose sessions must all be on one
//! server to another one.

use super::fault::ServerFault;
use crate::protocol::imap::refusal::RefusalKind;

/// Passwords with more bytes are longer than servers take: many end the connection instead of refusing such a password.
pub const LONG_PASSWORD: usize = 4096;

/// What a server did instead of accepting a login.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ServerAnswer {
    /// NO without a response code, or with a code that means neither an outage nor a limit.
    Refusal,
    /// NO `[CONTACTADMIN]`: the account is closed, whatever its password.
    AccountClosed,
    /// NO `[REFERRAL imap://…]` (RFC 2221).
    Referral,
    /// BAD: the server did not understand the command, or the client's answer to a challenge.
    Bad,
    /// An empty continuation request for the response that the command already carried.
    EmptyContinuation,
    /// The server could not answer.
    Fault(ServerFault),
}

/// How far the dialogue has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LoginStage {
    /// Nothing that the client sent has reached the server.
    BeforeLogin,
    /// The login command was sent, in whole or in part.
    LoginSent,
    /// The login command was sent, in whole or in part, in any form, with a password longer than [`LONG_PASSWORD`].
    LongPasswordSent,
    /// The login was sent in another form after the server had answered BAD on the same connection.
    Retried,
    /// The client has seen a challenge of the server.
    Challenged,
}

/// What happens to the login.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// The client gets the server's answer.
    Refuse(RefusalKind),
    /// The login goes to the server that the answer names, or the client gets the answer.
    FollowReferral,
    /// The backend's next server is tried; the client gets `NO [UNAVAILABLE]` if there is none.
    TryAnotherServer,
    /// The client gets `NO`, with the server's code and text if it gave any. No other server is tried.
    GiveUp,
    /// The login is sent again in the next form; if there is none, [`ServerFault::LoginBad`] applies.
    TryAnotherForm,
    /// The login is sent again to the same server, in the same form, on a new connection.
    Reconnect,
}

/// What the server's health learns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HealthEffect {
    /// The server works: its breaker closes.
    Success,
    /// Nothing.
    Unchanged,
    /// The server is at fault: counts towards its breaker.
    Failure,
}

/// The decision about one answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Verdict {
    /// What happens to the login.
    pub action: Action,
    /// What the server's health learns.
    pub health: HealthEffect,
}

/// Decides what `answer` means at `point`. `one_server_per_user`: all sessions of a user must be on one server
/// (`balance: user-hash`).
pub fn decide(answer: ServerAnswer, stage: LoginStage, one_server_per_user: bool) -> Verdict {
    let verdict = |action, health| Verdict { action, health };
    match answer {
        ServerAnswer::Refusal => verdict(Action::Refuse(RefusalKind::FailedLogin), HealthEffect::Success),
        ServerAnswer::AccountClosed => verdict(Action::Refuse(RefusalKind::NotCounted), HealthEffect::Success),
        ServerAnswer::Referral => verdict(Action::FollowReferral, HealthEffect::Success),
        // The client cancelled the exchange, or answered the challenge with something invalid.
        ServerAnswer::Bad if stage == LoginStage::Challenged => {
            verdict(Action::Refuse(RefusalKind::FailedLogin), HealthEffect::Success)
        }
        ServerAnswer::Bad | ServerAnswer::EmptyContinuation => verdict(Action::TryAnotherForm, HealthEffect::Unchanged),
        ServerAnswer::Fault(fault) => of_fault(fault, stage, one_server_per_user),
    }
}

fn of_fault(fault: ServerFault, stage: LoginStage, one_server_per_user: bool) -> Verdict {
    let is_bound = match stage {
        LoginStage::BeforeLogin => false,
        LoginStage::LoginSent | LoginStage::LongPasswordSent | LoginStage::Retried => one_server_per_user,
        // The exchange with the client cannot be repeated with another server.
        LoginStage::Challenged => true,
    };
    let another = if is_bound { Action::GiveUp } else { Action::TryAnotherServer };
    let blamed = if stage == LoginStage::BeforeLogin { HealthEffect::Failure } else { HealthEffect::Unchanged };
    let (action, health) = match fault {
        // As an outage, it would show that the user exists, and guesses with such passwords would not be counted. That the
        // client can cause it says nothing about the server.
        ServerFault::Bye
        | ServerFault::Closed
        | ServerFault::Protocol
        | ServerFault::TooMuchUntagged
        | ServerFault::LoginBad
            if stage == LoginStage::LongPasswordSent =>
        {
            (Action::Refuse(RefusalKind::FailedLogin), HealthEffect::Unchanged)
        }
        // The load may be caused by clients that have not logged in, so it is neither evidence against the server nor a
        // reason to move a user.
        ServerFault::Crowded if one_server_per_user => (Action::GiveUp, HealthEffect::Unchanged),
        ServerFault::Crowded => (another, HealthEffect::Unchanged),
        // Some servers close after a command that they did not understand.
        ServerFault::Bye | ServerFault::Closed if stage == LoginStage::Retried => {
            (Action::Reconnect, HealthEffect::Unchanged)
        }
        ServerFault::Unreachable
        | ServerFault::Silent
        | ServerFault::Greeting
        | ServerFault::StartTlsNotOffered
        | ServerFault::StartTlsRefused
        | ServerFault::StartTlsResidue
        | ServerFault::LoginDisabled
        | ServerFault::Protocol
        | ServerFault::TooMuchUntagged
        | ServerFault::Bye
        | ServerFault::Closed => (another, blamed),
        // A server that greets but is slow with this login may be waiting for something that only this user needs.
        ServerFault::Timeout
        | ServerFault::AuthzidUnsupported
        | ServerFault::MechanismUnsupported
        | ServerFault::Overloaded => (another, HealthEffect::Unchanged),
        // The server has decided, and evading a limit by way of another server would defeat it.
        ServerFault::UserLimit => (Action::GiveUp, HealthEffect::Success),
        // The other servers of the backend are configured alike.
        ServerFault::TlsRequired => (Action::GiveUp, HealthEffect::Unchanged),
        ServerFault::LoginBad | ServerFault::TooManyChallenges => (Action::GiveUp, HealthEffect::Unchanged),
    };
    Verdict { action, health }
}

#[cfg(test)]
mod tests;
