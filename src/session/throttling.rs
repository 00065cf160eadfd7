//! What the guard has to say of a session before its login, in the words of a session.
//!
//! A failed login leaves one record at once, which fail2ban reads (`deploy/fail2ban`), and is answered late: the wait is a
//! timer, and nothing of the attempt is held meanwhile, neither a password nor a server's connection. It is counted from
//! the command, as is the wait of [`crate::admission::refusal_latency`], so that the later of the two is all that can be seen from outside.

use std::future::pending;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::net::TcpStream;
use tokio::time;

use super::attempt::Attempted;
use super::{EndedBy, FAREWELL, Session};
use crate::admission::{ConnectionRefused, LoginThrottled, PreloginTicket, ShedReason};
use crate::auth_policy::{LoginResult, PolicyDecision};
use crate::backend::login::LoginResponse;
use crate::config::{BackendId, TlsMode};
use crate::failure::Reason;
use crate::identity::{Credentials, Mechanism, NamingRules, UserName};
use crate::metrics::{LoginOutcome, Refusal};
use crate::protocol::imap::client_id::ClientId;
use crate::protocol::imap::prelogin::{ByeReason, LoginRequest};
use crate::protocol::imap::reply;
use crate::protocol::imap::tag::Tag;
use crate::snapshot::Snapshot;

/// A new connection waits this long for the place of one that must go, and that takes [`FAREWELL`] at most.
const ADMISSION: Duration = FAREWELL.saturating_add(Duration::from_secs(1));
/// Bytes of what a client says of itself that are told to the policy service.
const MAX_DEVICE: usize = 1024;

/// Counts a connection that is turned away, and tells its client where anything can be said before TLS. It is closed
/// either way.
pub(crate) fn turn_away(
    socket: &TcpStream,
    turned: ConnectionRefused,
    snapshot: &Snapshot,
    listener: usize,
) -> Refusal {
    let (refusal, bye) = match turned {
        ConnectionRefused::Denied => (Refusal::Denied, "* BYE Connections from your address are not allowed.\r\n"),
        ConnectionRefused::Rate => {
            (Refusal::Rate, "* BYE [UNAVAILABLE] Too many connections in a short time, wait a little.\r\n")
        }
        ConnectionRefused::Address => {
            (Refusal::Address, "* BYE [UNAVAILABLE] Too many connections from your address.\r\n")
        }
        ConnectionRefused::Network => {
            (Refusal::Network, "* BYE [UNAVAILABLE] Too many connections from your network.\r\n")
        }
        ConnectionRefused::BeforeLogin => {
            (Refusal::BeforeLogin, "* BYE [UNAVAILABLE] Too many connections are logging in, try again later.\r\n")
        }
    };
    snapshot.metrics.listener(listener).refused(refusal);
    if snapshot.config.listeners[listener].tls != TlsMode::Implicit {
        let _ = socket.try_write(bye.as_bytes());
    }
    refusal
}

impl Session {
    /// Behind a balancer the client is known only now. `None`: it may not come in.
    pub(super) fn may_come_in(&mut self, socket: &TcpStream) -> Option<()> {
        match self.snapshot.admission.admit(Instant::now(), self.peer.ip()) {
            Ok(pass) => {
                self.permits.count = pass;
                Some(())
            }
            Err(turned) => {
                let refusal = turn_away(socket, turned, &self.snapshot, self.listener);
                self.record.ended_by(EndedBy::Proxy);
                self.record.detail(format!("turned away: {}", refusal.as_str()));
                None
            }
        }
    }

    /// Waits for a place among the connections before their login, while the one that must go for it goes. `None`: none came free.
    pub(super) async fn admitted(&mut self, socket: &TcpStream) -> Option<()> {
        let Some(ticket) = &self.prelogin_ticket else { return Some(()) };
        tokio::select! {
            biased;
            () = ticket.admitted() => {
                if ticket.shed_reason().is_none() {
                    return Some(());
                }
            }
            () = self.drain.begun().cancelled() => {
                self.record.failed(Reason::Drain);
                return None;
            }
            () = time::sleep(ADMISSION) => {}
        }
        turn_away(socket, ConnectionRefused::BeforeLogin, &self.snapshot, self.listener);
        self.record.ended_by(EndedBy::Proxy);
        self.record.failed(Reason::Shed);
        None
    }

    /// Ready when the connection must go: [`Session::why_shed`] says why. The future does not borrow the session.
    pub(super) fn shed(&self) -> impl Future<Output = ()> + use<> {
        let signal = self.prelogin_ticket.as_ref().map(PreloginTicket::shed_signal);
        async move {
            match signal {
                Some(signal) => drop(signal.wait().await),
                None => pending().await,
            }
        }
    }

    /// What a connection that must go is sent, and what is recorded.
    pub(super) fn why_shed(&self) -> (ByeReason, Reason) {
        match self.prelogin_ticket.as_ref().and_then(PreloginTicket::shed_reason) {
            Some(ShedReason::Memory) => (ByeReason::Memory, Reason::ShedForMemory),
            Some(ShedReason::Capacity) | None => (ByeReason::Shed, Reason::Shed),
        }
    }

    /// Whether the attempt is within the rates of its address and of `users`, see [`counted_users`]. `None`: it is.
    pub(super) fn may_try(&mut self, tag: &Tag, users: &[Arc<str>]) -> Option<Attempted> {
        let limited = self.snapshot.admission.check_login_rate(Instant::now(), self.record.client(), users).err()?;
        Some(self.limited(tag, limited, None))
    }

    /// Asked once a server has taken the password: before, anybody could keep a user out by trying. `None`: it may.
    pub(super) fn may_have_one_more(
        &mut self,
        tag: &Tag,
        users: &[Arc<str>],
        mailbox: &str,
        backend: BackendId,
    ) -> Option<Attempted> {
        let client = self.record.client();
        self.snapshot.admission.record_login(Instant::now(), client, users);
        let limited = self.permits.count.count_user(client, mailbox).err()?;
        Some(self.limited(tag, limited, Some(backend)))
    }

    fn limited(&mut self, tag: &Tag, limited: LoginThrottled, backend: Option<BackendId>) -> Attempted {
        let (reason, key, text) = match limited {
            LoginThrottled::AddressRate => {
                (Reason::LoginRate, "login_rate_per_address", "Too many logins from your address, wait a little.")
            }
            LoginThrottled::UserRate => (Reason::LoginRate, "login_rate_per_user", "Too many logins, wait a little."),
            LoginThrottled::User => (Reason::SessionLimit, "sessions_per_user", "Too many connections of this user."),
            LoginThrottled::UserAndAddress => (
                Reason::SessionLimit,
                "sessions_per_user_and_address",
                "Too many connections of this user from your address.",
            ),
        };
        self.record.detail(format!("limits.{key}"));
        self.record.attempt_failed(reason, LoginOutcome::Limited, backend);
        Attempted::Limited { reply: reply::limit(tag, text) }
    }

    /// A server or the proxy has refused a login that began at `began`: logs it, and returns when the client may be answered.
    pub(super) async fn refused_login(&mut self, login: LoginRequest, began: Instant, not_before: Option<Instant>) {
        let (users, authcid) = self.names_of_failed(&login.credentials);
        // With the password, which is not needed any more.
        drop(login);
        self.failed_login(&users, authcid, began, not_before).await;
    }

    /// A server has refused the token of a login that began at `began` by a challenge that says why: the login has failed, whether or
    /// not the client stays for the answer. Logs it, and returns when the client may get the challenge.
    pub(super) async fn token_refused(&mut self, credentials: &Credentials, began: Instant) {
        let (users, authcid) = self.names_of_failed(credentials);
        self.failed_login(&users, authcid, began, None).await;
    }

    /// The users that a failed login counts for, and who tried to log in, if the mailbox is another user's.
    fn names_of_failed(&self, credentials: &Credentials) -> (Vec<Arc<str>>, Option<UserName>) {
        let naming = &self.snapshot.config.naming;
        let of_another = credentials.authzid.is_some();
        let authcid = of_another.then(|| naming.names(&credentials.user).map(|names| names.log)).transpose();
        (counted_users(naming, credentials), authcid.unwrap_or_else(|_| Some(credentials.user.clone())))
    }

    /// Logs a failed login, and returns when the client may be answered. `users` are counted for; `authcid` is who tried to log in, if
    /// the mailbox is another user's. An answer without a server is sent not before `not_before`.
    pub(super) async fn failed_login(
        &mut self,
        users: &[Arc<str>],
        authcid: Option<UserName>,
        began: Instant,
        not_before: Option<Instant>,
    ) {
        let client = self.record.client();
        let (mechanism, name, reason) = self.record.last_attempt();
        tracing::info!(
            target: "vestibule::login",
            client = %client,
            session = self.record.session().as_str(),
            mechanism = mechanism.map(Mechanism::as_str),
            reason = reason.map_or("password", Reason::as_str),
            user = name.map(UserName::as_str),
            authcid = authcid.as_ref().map(UserName::as_str),
            "login failed"
        );
        self.report(LoginResult::Failure);
        let due = began + self.snapshot.admission.record_failed_login(Instant::now(), client, users);
        self.pause(time::Instant::from_std(not_before.map_or(due, |not_before| due.max(not_before)))).await;
    }

    /// Asks the policy service, if there is one. `None`: the login goes on.
    pub(super) async fn policy_refuses(
        &mut self,
        login: &LoginRequest,
        client_id: &ClientId,
        began: Instant,
    ) -> Option<Attempted> {
        let policy = self.snapshot.auth_policy.clone()?;
        let (tls, session) = (self.record.tls().is_some(), self.record.session());
        let attempt =
            policy.attempt(&login.credentials, self.record.client(), tls, device(client_id), session.as_str());
        match policy.allow(&attempt, &self.snapshot.metrics).await {
            PolicyDecision::Allowed(delay) => {
                self.told = Some(Box::new(attempt));
                if delay > Duration::ZERO {
                    self.pause(time::Instant::now() + delay).await;
                }
                None
            }
            PolicyDecision::Denied => {
                policy.report(attempt, LoginResult::RejectedByPolicy, &self.snapshot.metrics);
                self.record.attempt_failed(Reason::PolicyDenied, LoginOutcome::Refused, None);
                Some(self.refused_late(&login.tag, None, began))
            }
            PolicyDecision::Unavailable => {
                self.record.attempt_failed(Reason::PolicyFailed, LoginOutcome::Unavailable, None);
                Some(Attempted::Unavailable)
            }
        }
    }

    /// Tells the policy service how the login ended that it allowed.
    pub(super) fn report(&mut self, result: LoginResult) {
        if let (Some(policy), Some(attempt)) = (&self.snapshot.auth_policy, self.told.take()) {
            policy.report(*attempt, result, &self.snapshot.metrics);
        }
    }

    /// Waits, but not beyond what ends the session.
    async fn pause(&self, until: time::Instant) {
        tokio::select! {
            () = time::sleep_until(until.min(self.login_by.due())) => {}
            // Both are told what is to be told after the answer.
            () = self.drain.begun().cancelled() => {}
            () = self.shed() => {}
        }
    }
}

/// The users that a login attempt counts for, by their routing names: whose password is tried, and whose mailbox is asked for, if that
/// is another's. A name that the rules refuse counts as it was sent.
pub(super) fn counted_users(naming: &NamingRules, credentials: &Credentials) -> Vec<Arc<str>> {
    let routing = |name: &UserName| naming.names(name).map_or_else(|_| name.as_str().into(), |names| names.routing);
    let mut users = vec![routing(&credentials.user)];
    users.extend(credentials.authzid.as_ref().map(routing).filter(|mailbox| *mailbox != users[0]));
    users
}

/// The reply that ends an exchange in which the token was refused.
pub(super) fn reply_to_refused_token(outcome: LoginResponse<'_>, tag: &Tag) -> Vec<u8> {
    let reply = match outcome {
        LoginResponse::Refused { reply, .. } => Some(reply),
        LoginResponse::Referred(referral) => Some(referral.reply),
        LoginResponse::Unavailable(fault) => fault.reply,
        LoginResponse::Accepted(_) | LoginResponse::Challenged(..) => None,
    };
    reply.unwrap_or_else(|| reply::authentication_failed(tag, None))
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::{Proof, Secret, UnicodeRule};

    #[test]
    fn a_login_counts_for_the_password_and_for_the_mailbox() {
        let naming = NamingRules { detail: Some('+'), unicode: UnicodeRule::Refuse, ..NamingRules::default() };
        let counted = |user: &str, authzid: Option<&str>| {
            let name = |text: &str| UserName::new(text.as_bytes()).unwrap();
            let credentials = Credentials {
                user: name(user),
                authzid: authzid.map(name),
                mechanism: Mechanism::SaslPlain,
                proof: Proof::Password(Secret::new(b"x".to_vec())),
            };
            counted_users(&naming, &credentials).iter().map(|user| user.to_string()).collect::<Vec<_>>()
        };
        assert_eq!(counted("Alice+x@A.test", None), ["alice@a.test"]);
        assert_eq!(counted("Admin", Some("BOB+y@b.test")), ["admin", "bob@b.test"]);
        assert_eq!(counted("alice@a.test", Some("alice+z@a.test")), ["alice@a.test"], "once, if it is one user");
        assert_eq!(counted("Zo\u{eb}", Some("bob")), ["Zo\u{eb}", "bob"], "a refused name counts as it was sent");
    }
}
