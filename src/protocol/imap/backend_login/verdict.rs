//! The meaning of a server's answer to a login: for the client, for the backend's other servers, and for the server's health.
//!
//! Only [`decide`] decides this. `backend_login` reports the server's answer and the stage of the dialogue, and carries out the
//! verdict. `docs/server-answers.md` shows the same table to operators, and a test compares the two. The principle: once a server
//! has received a client's credentials, the client can cause everything that the server does. So nothing after that stage marks a
//! server as failed or moves a user of `balance: user-hash` to another server.

use super::fault::ServerFault;
use crate::protocol::imap::refusal::RefusalKind;

/// Passwords longer than this, in bytes, exceed the limits of servers, many of which close the connection instead of refusing them.
pub const LONG_PASSWORD: usize = 4096;

/// A server's reaction to a login that it does not accept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ServerAnswer {
    /// NO without a response code, or with a code that means neither an outage nor a limit.
    Refusal,
    /// NO `[CONTACTADMIN]`: the account is closed.
    AccountClosed,
    /// NO `[REFERRAL imap://…]` (RFC 2221).
    Referral,
    /// BAD: the server did not understand the command, or the client's response to a challenge.
    Bad,
    /// An empty continuation request although the command contained the response.
    EmptyContinuation,
    /// The server could not verify the login.
    Fault(ServerFault),
}

/// How far the dialogue has proceeded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LoginStage {
    /// The server has received nothing from the client.
    BeforeLogin,
    /// The login command was sent, completely or in part.
    LoginSent,
    /// The login command was sent, completely or in part, with a password longer than [`LONG_PASSWORD`].
    LongPasswordSent,
    /// The login was sent again in another form, after BAD on the same connection.
    Retried,
    /// The client has received a challenge from the server.
    Challenged,
}

/// How the login proceeds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// The client receives the server's answer.
    Refuse(RefusalKind),
    /// The login continues on the server that the answer names, or the client receives the answer.
    FollowReferral,
    /// The backend's next server is tried. If there is none, the client receives `NO [UNAVAILABLE]`.
    TryAnotherServer,
    /// The client receives `NO`, with the server's code and text if it sent any. No other server is tried.
    GiveUp,
    /// The login is sent again in the next form; if there is none, [`ServerFault::LoginBad`] applies.
    TryAnotherForm,
    /// The login is sent again to the same server, in the same form, on a new connection.
    Reconnect,
}

/// The effect on the server's health.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HealthEffect {
    /// The server works, which closes its breaker.
    Success,
    /// The answer shows nothing about the server's health.
    Unchanged,
    /// The server has failed, which its breaker counts.
    Failure,
}

/// The decision about one answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Verdict {
    /// How the login proceeds.
    pub action: Action,
    /// The effect on the server's health.
    pub health: HealthEffect,
}

/// Decides about `answer` at `stage`. With `one_server_per_user` all sessions of a user must be on one server (`balance:
/// user-hash`).
pub fn decide(answer: ServerAnswer, stage: LoginStage, one_server_per_user: bool) -> Verdict {
    let verdict = |action, health| Verdict { action, health };
    match answer {
        ServerAnswer::Refusal => verdict(Action::Refuse(RefusalKind::FailedLogin), HealthEffect::Success),
        ServerAnswer::AccountClosed => verdict(Action::Refuse(RefusalKind::NotCounted), HealthEffect::Success),
        ServerAnswer::Referral => verdict(Action::FollowReferral, HealthEffect::Success),
        // The client has cancelled the exchange, or its response to the challenge is invalid.
        ServerAnswer::Bad if stage == LoginStage::Challenged => {
            verdict(Action::Refuse(RefusalKind::FailedLogin), HealthEffect::Success)
        }
        ServerAnswer::Bad | ServerAnswer::EmptyContinuation => verdict(Action::TryAnotherForm, HealthEffect::Unchanged),
        ServerAnswer::Fault(fault) => of_fault(fault, stage, one_server_per_user),
    }
}

fn of_fault(fault: ServerFault, stage: LoginStage, one_server_per_user: bool) -> Verdict {
    let is_bound_to_server = match stage {
        LoginStage::BeforeLogin => false,
        LoginStage::LoginSent | LoginStage::LongPasswordSent | LoginStage::Retried => one_server_per_user,
        // The exchange with the client cannot be repeated with another server.
        LoginStage::Challenged => true,
    };
    let another = if is_bound_to_server { Action::GiveUp } else { Action::TryAnotherServer };
    let counted = if stage == LoginStage::BeforeLogin { HealthEffect::Failure } else { HealthEffect::Unchanged };
    let (action, health) = match fault {
        // An outage would reveal that the user exists, and guesses with such passwords would not be counted. It is caused by the
        // client, so it shows nothing about the server.
        ServerFault::Bye
        | ServerFault::Closed
        | ServerFault::Protocol
        | ServerFault::TooMuchUntagged
        | ServerFault::LoginBad
            if stage == LoginStage::LongPasswordSent =>
        {
            (Action::Refuse(RefusalKind::FailedLogin), HealthEffect::Unchanged)
        }
        // Clients that have not logged in can cause the load, so it neither marks the server as failed nor moves a user.
        ServerFault::Crowded if one_server_per_user => (Action::GiveUp, HealthEffect::Unchanged),
        ServerFault::Crowded => (another, HealthEffect::Unchanged),
        // Some servers close the connection after a command that they do not understand.
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
        | ServerFault::Closed => (another, counted),
        // A server that greets but does not answer this login may be waiting for something that only this user needs.
        ServerFault::Timeout
        | ServerFault::AuthzidUnsupported
        | ServerFault::MechanismUnsupported
        | ServerFault::Overloaded => (another, HealthEffect::Unchanged),
        // The server has decided, and trying another server would evade the limit.
        ServerFault::UserLimit => (Action::GiveUp, HealthEffect::Success),
        // The backend's other servers have the same configuration.
        ServerFault::TlsRequired => (Action::GiveUp, HealthEffect::Unchanged),
        ServerFault::LoginBad | ServerFault::TooManyChallenges => (Action::GiveUp, HealthEffect::Unchanged),
    };
    Verdict { action, health }
}

#[cfg(test)]
mod tests;
