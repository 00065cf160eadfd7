//! Limits, rates and delays of a connection before its login: what `admission` decides, as steps of a session.
//!
//! A failed login writes one log line at once, which fail2ban reads (`deploy/fail2ban`), and is answered after a delay. During the
//! delay only a timer is kept, but no password and no connection to a server. The delay begins with the command, as that of
//! [`crate::admission::refusal_latency`] does, so that only the later of the two can be observed.

use std::future::pending;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::net::TcpStream;
use tokio::time;

use super::attempt_result::Refusal;
use super::client_io::Ending;
use super::log_record::EndedBy;
use super::{CLOSE_TIMEOUT, Session, SessionEnded};
use crate::admission::{ConnectionRefused, LoginThrottled, PreloginTicket, ShedReason};
use crate::auth_policy::LoginResult;
use crate::config::{BackendId, TlsMode};
use crate::failure::Reason;
use crate::identity::{Credentials, Mechanism, NamingRules, UserName};
use crate::metrics::{self, LoginOutcome};
use crate::protocol::imap::prelogin::LoginRequest;
use crate::protocol::imap::reply;
use crate::protocol::imap::tag::Tag;
use crate::snapshot::Snapshot;

/// Maximum time that a new connection waits for a place in the prelogin queue. The connection that is shed for it closes within
/// [`CLOSE_TIMEOUT`].
const ADMISSION_TIMEOUT: Duration = CLOSE_TIMEOUT.saturating_add(Duration::from_secs(1));

/// Counts a connection that is refused, and sends the reason to its client, except with implicit TLS, which has not begun yet. The
/// caller closes the connection.
pub(crate) fn refuse_connection(
    socket: &TcpStream,
    refused: ConnectionRefused,
    snapshot: &Snapshot,
    listener: usize,
) -> metrics::Refusal {
    let (refusal, bye) = match refused {
        ConnectionRefused::Denied => {
            (metrics::Refusal::Denied, "* BYE Connections from your address are not allowed.\r\n")
        }
        ConnectionRefused::Rate => {
            (metrics::Refusal::Rate, "* BYE [UNAVAILABLE] Too many connections in a short time, wait a little.\r\n")
        }
        ConnectionRefused::Address => {
            (metrics::Refusal::Address, "* BYE [UNAVAILABLE] Too many connections from your address.\r\n")
        }
        ConnectionRefused::Network => {
            (metrics::Refusal::Network, "* BYE [UNAVAILABLE] Too many connections from your network.\r\n")
        }
        ConnectionRefused::BeforeLogin => (
            metrics::Refusal::BeforeLogin,
            "* BYE [UNAVAILABLE] Too many connections are logging in, try again later.\r\n",
        ),
    };
    snapshot.metrics.listener(listener).refused(refusal);
    if snapshot.config.listeners[listener].tls != TlsMode::Implicit {
        let _ = socket.try_write(bye.as_bytes());
    }
    refusal
}

impl Session {
    /// Applies the limits by address to the client that a PROXY header names.
    pub(super) fn admit_proxied_client(&mut self, socket: &TcpStream) -> Result<(), SessionEnded> {
        match self.snapshot.admission.admit(Instant::now(), self.peer.ip()) {
            Ok(count) => {
                self.permits.count = count;
                Ok(())
            }
            Err(refused) => {
                let refusal = refuse_connection(socket, refused, &self.snapshot, self.listener);
                self.record.set_ended_by(EndedBy::Proxy);
                self.record.set_detail(format!("connection refused: {}", refusal.as_str()));
                Err(SessionEnded)
            }
        }
    }

    /// Waits for a place in the prelogin queue, until the connection that is shed for it has closed.
    pub(super) async fn wait_for_admission(&mut self, socket: &TcpStream) -> Result<(), SessionEnded> {
        let Some(ticket) = &self.prelogin_ticket else { return Ok(()) };
        tokio::select! {
            biased;
            () = ticket.admitted() => {
                if ticket.shed_reason().is_none() {
                    return Ok(());
                }
            }
            () = self.drain.begun().cancelled() => {
                self.record.record_failure(Reason::Drain);
                return Err(SessionEnded);
            }
            () = time::sleep(ADMISSION_TIMEOUT) => {}
        }
        refuse_connection(socket, ConnectionRefused::BeforeLogin, &self.snapshot, self.listener);
        Err(self.ended(EndedBy::Proxy, Reason::Shed))
    }

    /// Ready when the process stops or the connection is shed. The future does not borrow the session.
    pub(super) fn termination(&self) -> impl Future<Output = Ending> + use<> {
        let drain = self.drain.begun().clone();
        let signal = self.prelogin_ticket.as_ref().map(PreloginTicket::shed_signal);
        let shed = async move {
            match signal {
                Some(signal) => signal.wait().await,
                None => pending().await,
            }
        };
        async move {
            tokio::select! {
                biased;
                () = drain.cancelled() => Ending::SHUTDOWN,
                reason = shed => match reason {
                    ShedReason::Memory => Ending::MEMORY,
                    ShedReason::Capacity => Ending::SHED,
                },
            }
        }
    }

    /// Checks the rates of the client's address and of `users`, see [`counted_users`].
    pub(super) fn check_rate(&mut self, tag: &Tag, users: &[Arc<str>]) -> Result<(), Refusal> {
        let result = self.snapshot.admission.check_login_rate(Instant::now(), self.record.client(), users);
        result.map_err(|throttled| self.throttled(tag, throttled, None))
    }

    /// Checks the limits of sessions per user. Only a login that a server has accepted counts, because otherwise attempts of others
    /// could lock a user out.
    pub(super) fn check_user_limits(
        &mut self,
        tag: &Tag,
        users: &[Arc<str>],
        mailbox: &str,
        backend: BackendId,
    ) -> Result<(), Refusal> {
        let client = self.record.client();
        self.snapshot.admission.record_login(Instant::now(), client, users);
        let result = self.permits.count.count_user(client, mailbox);
        result.map_err(|throttled| self.throttled(tag, throttled, Some(backend)))
    }

    fn throttled(&mut self, tag: &Tag, throttled: LoginThrottled, backend: Option<BackendId>) -> Refusal {
        let (reason, key, text) = match throttled {
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
        self.record.set_detail(format!("limits.{key}"));
        self.record.attempt_failed(reason, LoginOutcome::Limited, backend);
        Refusal::counted(reply::limit(tag, text))
    }

    /// Logs a login that a server or the proxy has refused, and returns when the client may be answered.
    pub(super) async fn refused_login(&mut self, login: LoginRequest, began: Instant, not_before: Option<Instant>) {
        let (users, authcid) = self.failed_users(&login.credentials);
        // The password is not needed any more and is not kept during the delay.
        drop(login);
        self.failed_login(&users, authcid, began, not_before).await;
    }

    /// Logs a login whose token the server has refused with a challenge that states the reason, and returns when the client may
    /// receive the challenge. The login has failed whether or not the client waits for the final answer.
    pub(super) async fn token_refused(&mut self, credentials: &Credentials, began: Instant) {
        let (users, authcid) = self.failed_users(credentials);
        self.failed_login(&users, authcid, began, None).await;
    }

    /// The users that a failed login counts for, and the user who tried to log in if the mailbox is another user's.
    fn failed_users(&self, credentials: &Credentials) -> (Vec<Arc<str>>, Option<UserName>) {
        let naming = &self.snapshot.config.naming;
        let is_on_behalf = credentials.authzid.is_some();
        let authcid = is_on_behalf.then(|| naming.names(&credentials.user).map(|names| names.log)).transpose();
        (counted_users(naming, credentials), authcid.unwrap_or_else(|_| Some(credentials.user.clone())))
    }

    /// Logs a failed login that counts for `users`, and returns when the client may be answered: after the delay for failed logins,
    /// and not before `not_before`. `authcid` is the user who tried to log in if the mailbox is another user's.
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

    /// Waits until the given time, but not longer than the session may last.
    pub(super) async fn pause(&self, until: time::Instant) {
        tokio::select! {
            () = time::sleep_until(until.min(self.login_deadline.due())) => {}
            // The BYE is sent after the answer that is waited for.
            _ = self.termination() => {}
        }
    }
}

/// The users that a login attempt counts for, by their routing names: the user whose password is tried, and the user of the mailbox
/// if that is another. An invalid name counts as it was sent.
pub(super) fn counted_users(naming: &NamingRules, credentials: &Credentials) -> Vec<Arc<str>> {
    let routing = |name: &UserName| naming.names(name).map_or_else(|_| name.as_str().into(), |names| names.routing);
    let mut users = vec![routing(&credentials.user)];
    users.extend(credentials.authzid.as_ref().map(routing).filter(|mailbox| *mailbox != users[0]));
    users
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::{Proof, Secret, UnicodeRule};

    #[test]
    fn login_counts_for_the_user_of_the_password_and_of_the_mailbox() {
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
        assert_eq!(counted("alice@a.test", Some("alice+z@a.test")), ["alice@a.test"], "one user counts once");
        assert_eq!(counted("Zo\u{eb}", Some("bob")), ["Zo\u{eb}", "bob"], "an invalid name counts as it was sent");
    }
}
