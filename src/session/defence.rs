//! What the guard has to say of a session before its login, in the words of a session.
//!
//! A failed login leaves one record at once, which fail2ban reads (`deploy/fail2ban`), and is answered late: the wait is a
//! timer, and nothing of the attempt is held meanwhile, neither a password nor a server's connection. It is counted from
//! the command, as is the wait of [`super::pace`], so that the later of the two is all that can be seen from outside.

use std::future::pending;
use std::time::{Duration, Instant};

use tokio::net::TcpStream;
use tokio::time;

use super::attempt::Attempted;
use super::{EndedBy, Session};
use crate::config::{BackendId, ListenerTls};
use crate::failure::Reason;
use crate::guard::{Limited, Turned};
use crate::identity::{Mechanism, UserName};
use crate::imap::client_id::ClientId;
use crate::imap::prelogin::LoginRequest;
use crate::imap::reply;
use crate::imap::tag::Tag;
use crate::metrics::{LoginOutcome, Refusal};
use crate::policy::Verdict;
use crate::server::Live;

/// Bytes of what a client says of itself that are told to the policy service.
const MAX_DEVICE: usize = 1024;

/// Counts a connection that is turned away, and tells its client where anything can be said before TLS. It is closed
/// either way.
pub fn turn_away(socket: &TcpStream, turned: Turned, live: &Live, listener: usize) -> Refusal {
    let (refusal, bye) = match turned {
        Turned::Denied => (Refusal::Denied, "* BYE Connections from your address are not allowed.\r\n"),
        Turned::Rate => (Refusal::Rate, "* BYE [UNAVAILABLE] Too many connections in a short time, wait a little.\r\n"),
        Turned::Address => (Refusal::Address, "* BYE [UNAVAILABLE] Too many connections from your address.\r\n"),
        Turned::Network => (Refusal::Network, "* BYE [UNAVAILABLE] Too many connections from your network.\r\n"),
    };
    live.metrics.listener(listener).refused(refusal);
    if live.config.listeners[listener].tls != ListenerTls::Implicit {
        let _ = socket.try_write(bye.as_bytes());
    }
    refusal
}

impl Session {
    /// Behind a balancer the client is known only now. `None`: it may not come in.
    pub(super) fn may_come_in(&mut self, socket: &TcpStream) -> Option<()> {
        match self.live.guard.admit(Instant::now(), self.peer.ip()) {
            Ok(pass) => {
                self.held.pass = pass;
                Some(())
            }
            Err(turned) => {
                let refusal = turn_away(socket, turned, &self.live, self.listener);
                self.record.ended_by(EndedBy::Proxy);
                self.record.detail(format!("turned away: {}", refusal.as_str()));
                None
            }
        }
    }

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
        let limited = self.held.pass.take_for(client, user).err()?;
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
        let user = match self.live.config.naming.names(login.credentials.mailbox_user()) {
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
        self.report(false);
        let due = time::Instant::from_std(began + self.live.guard.failed(Instant::now(), client, &user));
        self.pause(due).await;
    }

    /// Asks the policy service, if there is one. `None`: the login goes on.
    pub(super) async fn policy_refuses(
        &mut self,
        login: &LoginRequest,
        client_id: &ClientId,
        began: Instant,
    ) -> Option<Attempted> {
        let policy = self.live.policy.clone()?;
        let (tls, session) = (self.record.tls().is_some(), self.record.session());
        let attempt =
            policy.attempt(&login.credentials, self.record.client(), tls, device(client_id), session.as_str());
        match policy.allow(&attempt, &self.live.metrics).await {
            Verdict::Allowed(delay) => {
                self.told = Some(Box::new(attempt));
                if delay > Duration::ZERO {
                    self.pause(time::Instant::now() + delay).await;
                }
                None
            }
            Verdict::Denied => {
                policy.report(attempt, false, true, &self.live.metrics);
                let refused = self.refused_late(&login.tag, began).await;
                // After the wait, which may end with the attempt: it is counted once.
                self.record.attempt_failed(Reason::PolicyDenied, LoginOutcome::Refused, None);
                Some(refused)
            }
            Verdict::Unavailable => {
                self.record.attempt_failed(Reason::PolicyFailed, LoginOutcome::Unavailable, None);
                Some(Attempted::Unavailable)
            }
        }
    }

    /// Tells the policy service how the login ended that it allowed.
    pub(super) fn report(&mut self, success: bool) {
        if let (Some(policy), Some(attempt)) = (&self.live.policy, self.told.take()) {
            policy.report(*attempt, success, false, &self.live.metrics);
        }
    }

    /// Waits, but not beyond what ends the session.
    async fn pause(&self, until: time::Instant) {
        tokio::select! {
            () = time::sleep_until(until.min(self.login_by)) => {}
            // Both are told what is to be told after the answer.
            () = self.drain.begun().cancelled() => {}
            () = self.shed() => {}
        }
    }
}

/// What a client says of itself, as Dovecot writes it.
fn device(client_id: &ClientId) -> String {
    let quoted = |bytes: &[u8]| String::from_utf8_lossy(bytes).replace('\\', "\\\\").replace('"', "\\\"");
    let mut text = String::new();
    for (key, value) in client_id.pairs() {
        let value = value.as_ref().map_or_else(|| "NIL".to_owned(), |value| format!("\"{}\"", quoted(value)));
        let pair = format!("\"{}\" {value}", quoted(key));
        if text.len() + pair.len() > MAX_DEVICE {
            break;
        }
        if !text.is_empty() {
            text.push(' ');
        }
        text.push_str(&pair);
    }
    text
}
