//! Steps 5 and 6 of a session: the servers of a routed login in order, until one gives an answer that counts.
//!
//! A login has no effect on the user's other sessions until a server has accepted it. Where a user must be served by one
//! server at a time, the accepted login is then held back until the sessions on other servers have ended, or is given up.
//! A login with incomplete credentials takes no place of a server's `max_sessions`. Every wait here ends with the future:
//! the caller drops it when the login is cancelled. Called by `attempt`.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use super::FAREWELL;
use super::server_credentials::has_own_login;
use crate::backend::fault::Fault;
use crate::backend::login::{self, LoginResponse, PausedLogin};
use crate::backend::request::Request;
use crate::backend::{Backend, Failover, NextServer, Server, ServerPermit};
use crate::config::BackendId;
use crate::deadline::Deadline;
use crate::generations::Generation;
use crate::identity::{Credentials, Mechanism};
use crate::protocol::imap::sasl;
use crate::route::Destination;
use crate::session_registry::{RegisterError, SessionHandle};
use crate::snapshot::{ListenerConfig, Snapshot};

/// Maximum number of referrals followed per login.
const MAX_REFERRALS: usize = 2;

/// Time that an accepted login leaves the user's other sessions to end, each of which closes within [`FAREWELL`].
const CLOSING: Duration = FAREWELL.saturating_add(Duration::from_secs(1));

/// A login that is routed and looks for a server.
pub(super) struct Placing<'a, 's> {
    pub(super) snapshot: &'a Snapshot,
    /// Where the next configuration appears; the one that is used has been seen.
    pub(super) listener_config: watch::Receiver<ListenerConfig>,
    pub(super) seat: &'s SessionHandle,
    /// The holds that came before the routes were asked.
    pub(super) since: Generation,
    /// The name of the user's mailbox.
    pub(super) mailbox: Arc<str>,
    pub(super) request: &'a Request<'a>,
    pub(super) carries: Carried,
}

/// What the request holds that not every backend may be sent.
#[derive(Debug, Clone, Copy)]
pub(super) struct Carried {
    /// The backend that the route named.
    pub(super) routed: BackendId,
    /// The client asked for another user's mailbox.
    pub(super) authzid: bool,
    /// A password that the route or the backend's configuration holds, in place of the client's credentials.
    pub(super) own_login: bool,
    pub(super) empty_password: bool,
}

impl Carried {
    pub(super) fn of(credentials: &Credentials, place: &Destination) -> Self {
        Self {
            routed: place.backend,
            authzid: credentials.authzid.is_some(),
            own_login: has_own_login(credentials, place),
            empty_password: credentials.has_empty_password(),
        }
    }

    fn may_be_sent_to(&self, backend: &Backend) -> bool {
        backend.id == self.routed
            || !self.own_login
                && (!self.authzid || backend.allows_authzid)
                && (!self.empty_password || backend.allows_empty_passwords())
    }
}

/// The server that answered, and the login's place there.
pub(super) struct Placed {
    pub(super) backend: Arc<Backend>,
    pub(super) server: Arc<Server>,
    pub(super) slot: ServerPermit,
}

/// The last server's answer, and which server that was. An error: the login must be routed again.
type Answered<'a> = Result<(LoginResponse<'a>, Option<Placed>), RegisterError>;

impl<'a> Placing<'a, '_> {
    /// Tries the user's servers in order, until one gives an answer that counts for all of them; follows a referral to a
    /// declared server.
    pub(super) async fn log_in_somewhere(&self, place: &Destination) -> Answered<'a> {
        let limits = &self.snapshot.limits;
        let deadline = Deadline::after(limits.server_login);
        let known_by = deadline.min(Deadline::after(limits.connect));
        let backend = self.snapshot.backends.backend(place.backend);
        let servers = known_by.limit(self.snapshot.servers(place, &self.mailbox)).await.unwrap_or_default();
        let mut tour = self.tour(backend, servers);
        let mut outcome = LoginResponse::Unavailable(Fault::no_server());
        loop {
            let (server, slot) = match tour.next(deadline).await {
                NextServer::Try(server, slot) => (server, slot),
                NextServer::AllFull => return Ok((LoginResponse::Unavailable(Fault::full()), None)),
                NextServer::Exhausted => return Ok((outcome, None)),
            };
            if !self.may_use(&server)? {
                continue;
            }
            // While there is another server, one that hangs gets half of what is left.
            let due = if tour.has_more() { Deadline::after(deadline.left() / 2) } else { deadline };
            let placed = Placed { backend: backend.clone(), server, slot };
            let (answer, placed) = self.log_in_at(backend, placed, due, deadline).await;
            outcome = answer;
            match &outcome {
                LoginResponse::Unavailable(fault) => {
                    self.report(&placed.server, fault);
                    if !fault.allows_next_server() || deadline.has_expired() {
                        return Ok((outcome, None));
                    }
                }
                LoginResponse::Referred(_) => return self.follow(outcome, placed, deadline).await,
                _ => return Ok((outcome, Some(placed))),
            }
        }
    }

    /// Names the server in the registry; returns whether it takes logins. While the login waited for a place, another
    /// configuration may have come, or the server may have been taken out of service.
    fn may_use(&self, server: &Arc<Server>) -> Result<bool, RegisterError> {
        if self.listener_config.has_changed().is_ok_and(|changed| changed) {
            return Err(RegisterError::Outdated);
        }
        self.seat.set_server(&self.mailbox, server, self.since)?;
        Ok(server.takes_logins())
    }

    /// The servers to try; a login with incomplete credentials takes no place there yet.
    fn tour<'b>(&self, backend: &'b Backend, servers: Vec<Arc<Server>>) -> Failover<'b> {
        let tour = Failover::new(backend, servers);
        let is_complete = self.request.login.is_complete();
        if is_complete { tour } else { tour.for_exchange() }
    }

    /// Logs in on one server: dial and dialogue until `due`, the wait for sessions elsewhere until `deadline`.
    async fn log_in_at(
        &self,
        backend: &'a Backend,
        mut placed: Placed,
        due: Deadline,
        deadline: Deadline,
    ) -> (LoginResponse<'a>, Placed) {
        let outcome = tokio::select! {
            biased;
            () = placed.slot.displaced() => LoginResponse::Unavailable(Fault::full()),
            outcome = login::login(backend, &placed.server, self.request, due) => outcome,
        };
        let outcome = self.alone(outcome, &mut placed, deadline).await;
        (outcome, placed)
    }

    /// Before a challenge is sent to the client: the login holds no place while the client answers, unless it is SCRAM's last
    /// challenge, after which only the server's OK is missing. `has_answered`: the client has answered an earlier challenge, so that
    /// the server can have seen a proof.
    pub(super) fn asks_client(&self, placed: &mut Placed, challenge: &[u8], has_answered: bool) {
        let is_scram = matches!(self.request.mechanism, Mechanism::ScramSha1 | Mechanism::ScramSha256);
        if !(is_scram && has_answered && sasl::is_scram_signature(challenge)) {
            placed.slot.begin_exchange(&placed.server);
        }
    }

    /// Goes on with the client's answer to a challenge. Where that completes the credentials, the login takes its place
    /// first.
    pub(super) async fn respond(
        &self,
        paused: Box<PausedLogin<'a>>,
        placed: &mut Placed,
        response: &[u8],
    ) -> LoginResponse<'a> {
        let deadline = Deadline::after(self.snapshot.limits.server_login);
        let is_abort = response == b"*";
        let completes = !is_abort && !self.request.login.is_complete();
        if completes && placed.backend.end_exchange(&placed.server, &mut placed.slot, deadline).await.is_err() {
            return LoginResponse::Unavailable(Fault::full());
        }
        let outcome = paused.respond(response, deadline).await;
        if let LoginResponse::Unavailable(fault) = &outcome {
            self.count(fault);
        }
        self.alone(outcome, placed, deadline).await
    }

    /// Holds an accepted login back until the user has no session on another server of the backend, where that must be.
    async fn alone(&self, outcome: LoginResponse<'a>, placed: &mut Placed, deadline: Deadline) -> LoginResponse<'a> {
        if !matches!(outcome, LoginResponse::Accepted(_)) {
            return outcome;
        }
        if placed.backend.end_exchange(&placed.server, &mut placed.slot, deadline).await.is_err() {
            return LoginResponse::Unavailable(Fault::full());
        }
        let alone = placed.backend.is_sticky();
        if alone {
            self.seat.accept_exclusively();
        } else {
            self.seat.accept();
        }
        let others_ended = self.snapshot.session_registry.wait_until(|_| !alone || !self.seat.has_sessions_elsewhere());
        // The others were ended for this login: it does not fail before they can have closed their connections.
        let until = deadline.max(Deadline::after(CLOSING));
        if until.limit(others_ended).await.is_err() {
            return LoginResponse::Unavailable(Fault::sessions_elsewhere());
        }
        outcome
    }

    /// Follows referrals, as far as the backends allow it.
    async fn follow(&self, mut outcome: LoginResponse<'a>, mut at: Placed, deadline: Deadline) -> Answered<'a> {
        let mut visited = Vec::new();
        while let LoginResponse::Referred(referral) = &outcome {
            visited.push(at.server.name.clone());
            if !at.backend.follows_referrals {
                break;
            }
            let place = format!("{}:{}", referral.host, referral.port);
            let next = self.snapshot.backends.find(&referral.host, referral.port);
            let gets_no_logins = format!("{} refers to {place}, which gets no logins now", at.server.name);
            let fault = match next {
                None => Fault::referral(format!("{} refers to {place}, which is no declared server", at.server.name)),
                Some((_, next)) if visited.contains(&next.name) || visited.len() > MAX_REFERRALS => {
                    Fault::referral(format!("referrals go in a circle: {} refers to {place}", at.server.name))
                }
                Some((backend, _)) if !self.carries.may_be_sent_to(backend) => {
                    let (from, name) = (&at.server.name, &backend.name);
                    Fault::referral(format!(
                        "{from} refers to {place} of backend {name}, which does not allow this login"
                    ))
                }
                Some((backend, next)) => match self.tour(backend, vec![next]).next(deadline).await {
                    NextServer::Try(server, slot) if self.may_use(&server)? => {
                        // With this the place at the server that refers is given back.
                        at = Placed { backend: backend.clone(), server, slot };
                        (outcome, at) = self.log_in_at(backend, at, deadline, deadline).await;
                        if let LoginResponse::Unavailable(fault) = &outcome {
                            self.report(&at.server, fault);
                        }
                        continue;
                    }
                    NextServer::AllFull => return Ok((LoginResponse::Unavailable(Fault::full()), None)),
                    NextServer::Try(..) | NextServer::Exhausted => Fault::referral(gets_no_logins),
                },
            };
            self.report(&at.server, &fault);
            return Ok((LoginResponse::Unavailable(fault), None));
        }
        Ok((outcome, Some(at)))
    }

    /// Counts a fault that belongs to the server that was tried.
    fn count(&self, fault: &Fault) {
        if fault.is_counted_at_server() {
            self.snapshot.metrics.failure(fault.reason);
        }
    }

    fn report(&self, server: &Server, fault: &Fault) {
        let (session, reason) = (self.request.client.session_id, fault.reason.as_str());
        tracing::info!(session, server = %server.name, reason, detail = %fault.detail, "server could not take the login");
        self.count(fault);
    }
}
