//! What the guard has to say of a session before its login, in the words of a session.
//!
//! A failed login leaves one record at once, which fail2ban reads (`deploy/fail2ban`), and is answered late: the wait is a
//! timer, and nothing of the attempt is held meanwhile, neither a password nor a server's connection. It is counted from
//! the command, as is the wait of [`super::pace`], so that the later of the two is all that can be seen from outside.

use std::future::pending;
use std::time::Instant;

use tokio::time;

use super::Session;
use super::attempt::Attempted;
use crate::config::BackendId;
use crate::failure::Reason;
use crate::guard::Limited;
use crate::identity::{Mechanism, UserName};
use crate::imap::prelogin::LoginRequest;
use crate::imap::reply;
use crate::imap::tag::Tag;
use crate::metrics::LoginOutcome;

impl Session {
    /// Ready when the connection is told to go, as the oldest of too many.
    pub(super) async fn shed(&self) {
        match &self.ticket {
            Some(ticket) => ticket.shed().await,
            None => pending().await,
        }
    }

    /// Asked before anybody else is troubled. `None`: it may.
    pub(super) fn may_try(&mut self, tag: &Tag, user: &str) -> Option<Attempted> {
        let limited = self.live.guard.may_try(Instant::now(), self.record.client(), user).err()?;
        Some(self.limited(tag, limited, None))
    }

    /// Asked once a server has taken the password: before, anybody could keep a user out by trying. `None`: it may.
    pub(super) fn may_have_one_more(&mut self, tag: &Tag, user: &str, backend: BackendId) -> Option<Attempted> {
        let client = self.record.client();
        self.live.guard.succeeded(Instant::now(), client, user);
        let limited = self.held.seat.take_for(client, user).err()?;
        Some(self.limited(tag, limited, Some(backend)))
    }

    fn limited(&mut self, tag: &Tag, limited: Limited, backend: Option<BackendId>) -> Attempted {
        let (reason, key, text) = match limited {
            Limited::AddressRate => {
                (Reason::LoginRate, "login_rate_per_address", "Too many logins from your address, wait a little.")
            }
            Limited::UserRate => (Reason::LoginRate, "login_rate_per_user", "Too many logins, wait a little."),
            Limited::User => (Reason::SessionLimit, "sessions_per_user", "Too many connections of this user."),
            Limited::UserAndAddress => (
                Reason::SessionLimit,
                "sessions_per_user_and_address",
                "Too many connections of this user from your address.",
            ),
        };
        self.record.detail(format!("limits.{key}"));
        self.record.attempt_failed(reason, LoginOutcome::Limited, backend);
        Attempted::Limited { reply: reply::limit(tag, text) }
    }

    /// A login has failed that was begun at `began`: says so to the log, and returns when the client may know.
    pub(super) async fn failed_login(&mut self, login: LoginRequest, began: Instant) {
        let client = self.record.client();
        let user = match self.live.naming.names(login.credentials.mailbox_user()) {
            Ok(names) => names.routing,
            Err(_) => login.credentials.mailbox_user().as_str().into(),
        };
        // With the password, which nobody needs any more.
        drop(login);
        let (mechanism, name, reason) = self.record.last_attempt();
        tracing::info!(
            target: "vestibule::login",
            client = %client,
            session = self.record.session().as_str(),
            mechanism = mechanism.map(Mechanism::as_str),
            reason = reason.map_or("password", Reason::as_str),
            user = name.map(UserName::as_str),
            "login failed"
        );
        let due = time::Instant::from_std(began + self.live.guard.failed(Instant::now(), client, &user));
        tokio::select! {
            () = time::sleep_until(due.min(self.login_by)) => {}
            // Both are told what is to be told after the answer.
            () = self.drain.begun().cancelled() => {}
            () = self.shed() => {}
        }
    }
}
