//! Steps 5 and 6 of a session: tries the servers of a routed login in order, until one gives an answer that counts.
//!
//! A login has no effect on the user's other sessions before a server has accepted it. If the backend serves a user by one server
//! at a time, the accepted login then waits until the user's sessions on other servers have ended, and fails if they do not. A
//! login with incomplete credentials uses no permit of a server's `max_sessions`. Every wait ends when the future is dropped,
//! which the caller does when the login is cancelled.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use super::CLOSE_TIMEOUT;
use super::server_credentials::uses_own_login;
use crate::backend::fault::Fault;
use crate::backend::login::{self, LoginResponse, PausedLogin};
use crate::backend::request::Request;
use crate::backend::{Backend, Failover, NextServer, Server, ServerPermit};
use crate::config::BackendId;
use crate::deadline::Deadline;
use crate::generations::Generation;
use crate::identity::{Credentials, Mechanism};
use crate::protocol::imap::backend_login::Referral;
use crate::protocol::imap::sasl;
use crate::route::Destination;
use crate::session_registry::{RegisterError, SessionHandle};
use crate::snapshot::{ListenerConfig, Snapshot};

/// Maximum number of referrals followed per login.
const MAX_REFERRALS: usize = 2;

/// Minimum time that an accepted login waits for the user's other sessions to end. Each closes within [`CLOSE_TIMEOUT`].
const MIN_WAIT: Duration = CLOSE_TIMEOUT.saturating_add(Duration::from_secs(1));

/// A routed login for which a server is sought.
pub(super) struct Placement<'a, 's> {
    pub(super) snapshot: &'a Snapshot,
    /// Receives the next configuration; the one in use is marked as seen.
    pub(super) listener_config: watch::Receiver<ListenerConfig>,
    pub(super) handle: &'s SessionHandle,
    /// The generation of holds before the routes were queried.
    pub(super) since: Generation,
    /// The name of the user's mailbox.
    pub(super) mailbox: Arc<str>,
    pub(super) request: &'a Request<'a>,
    pub(super) restrictions: Restrictions,
}

/// Properties of a login because of which a referral to another backend may not be followed.
#[derive(Debug, Clone, Copy)]
pub(super) struct Restrictions {
    /// The backend that the route named.
    pub(super) routed: BackendId,
    /// Whether the client asked for another user's mailbox.
    authzid: bool,
    /// Whether a password of the route or the configuration replaces the client's credentials.
    own_login: bool,
    empty_password: bool,
}

impl Restrictions {
    pub(super) fn of(credentials: &Credentials, destination: &Destination) -> Self {
        Self {
            routed: destination.backend,
            authzid: credentials.authzid.is_some(),
            own_login: uses_own_login(credentials, destination),
            empty_password: credentials.has_empty_password(),
        }
    }

    fn allow(&self, backend: &Backend) -> bool {
        backend.id == self.routed
            || !self.own_login
                && (!self.authzid || backend.allows_authzid)
                && (!self.empty_password || backend.allows_empty_passwords())
    }
}

/// The server that answered, and the login's permit there.
pub(super) struct PlacedLogin {
    pub(super) backend: Arc<Backend>,
    pub(super) server: Arc<Server>,
    pub(super) server_permit: ServerPermit,
}

/// Whether a challenge of a server has been sent to the client.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(super) enum Exchange {
    #[default]
    NotBegun,
    Begun,
}

/// The answer of the last server, and which server it was. An error means that the login must be routed again.
type Answer<'a> = Result<(LoginResponse<'a>, Option<PlacedLogin>), RegisterError>;

impl<'a> Placement<'a, '_> {
    /// Tries the user's servers in order, until one gives an answer that holds for all of them. Follows referrals to declared
    /// servers.
    pub(super) async fn log_in(&self, destination: &Destination) -> Answer<'a> {
        let limits = &self.snapshot.limits;
        let deadline = Deadline::after(limits.server_login);
        let discovery_deadline = deadline.min(Deadline::after(limits.connect));
        let backend = self.snapshot.backends.backend(destination.backend);
        let servers = self.snapshot.servers(destination, &self.mailbox);
        let servers = discovery_deadline.limit(servers).await.unwrap_or_default();
        let mut failover = self.failover(backend, servers);
        let mut outcome = LoginResponse::Unavailable(Fault::no_server());
        loop {
            let (server, server_permit) = match failover.next(deadline).await {
                NextServer::Try(server, server_permit) => (server, server_permit),
                NextServer::AllFull => return Ok((LoginResponse::Unavailable(Fault::full()), None)),
                NextServer::Exhausted => return Ok((outcome, None)),
            };
            if !self.register_server(&server)? {
                continue;
            }
            // If there is another server, this one gets half of the remaining time, in case it hangs.
            let due = if failover.has_more() { Deadline::after(deadline.left() / 2) } else { deadline };
            let placed = PlacedLogin { backend: backend.clone(), server, server_permit };
            let (answer, placed) = self.log_in_on(backend, placed, due, deadline).await;
            outcome = answer;
            match &outcome {
                LoginResponse::Unavailable(fault) => {
                    self.report(&placed.server, fault);
                    if !fault.allows_next_server() || deadline.has_expired() {
                        return Ok((outcome, None));
                    }
                }
                LoginResponse::Referred(_) => return self.follow_referrals(outcome, placed, deadline).await,
                _ => return Ok((outcome, Some(placed))),
            }
        }
    }

    /// UserNames the server in the registry. Returns whether it accepts logins: while the login waited for a permit, the server may
    /// have been taken out of service.
    ///
    /// # Errors
    /// The configuration has been replaced, or the user is on hold.
    fn register_server(&self, server: &Arc<Server>) -> Result<bool, RegisterError> {
        if self.listener_config.has_changed().is_ok_and(|changed| changed) {
            return Err(RegisterError::Outdated);
        }
        self.handle.set_server(&self.mailbox, server, self.since)?;
        Ok(server.takes_logins())
    }

    /// The servers to try. A login with incomplete credentials uses no permit yet.
    fn failover<'b>(&self, backend: &'b Backend, servers: Vec<Arc<Server>>) -> Failover<'b> {
        let failover = Failover::new(backend, servers);
        let is_complete = self.request.login.is_complete();
        if is_complete { failover } else { failover.for_exchange() }
    }

    /// Logs in on one server: connects and authenticates until `due`, and waits for sessions on other servers until `deadline`.
    async fn log_in_on(
        &self,
        backend: &'a Backend,
        mut placed: PlacedLogin,
        due: Deadline,
        deadline: Deadline,
    ) -> (LoginResponse<'a>, PlacedLogin) {
        let outcome = tokio::select! {
            biased;
            () = placed.server_permit.displaced() => LoginResponse::Unavailable(Fault::full()),
            outcome = login::login(backend, &placed.server, self.request, due) => outcome,
        };
        let outcome = self.wait_for_other_sessions(outcome, &mut placed, deadline).await;
        (outcome, placed)
    }

    /// To be called before a challenge is sent to the client. The login has no permit of the server while the client answers,
    /// unless it is SCRAM's last challenge, after which only the server's OK is missing. That can only be a later challenge than
    /// the first, because before the client has answered one the server cannot have seen a proof.
    pub(super) fn before_challenge(&self, placed: &mut PlacedLogin, challenge: &[u8], exchange: Exchange) {
        let is_scram = matches!(self.request.mechanism, Mechanism::ScramSha1 | Mechanism::ScramSha256);
        if !(is_scram && exchange == Exchange::Begun && sasl::is_scram_signature(challenge)) {
            placed.server_permit.begin_exchange(&placed.server);
        }
    }

    /// Continues with the client's response to a challenge. If that completes the credentials, the login first takes a permit.
    pub(super) async fn respond(
        &self,
        paused: Box<PausedLogin<'a>>,
        placed: &mut PlacedLogin,
        response: &[u8],
    ) -> LoginResponse<'a> {
        let deadline = Deadline::after(self.snapshot.limits.server_login);
        let is_abort = response == b"*";
        let completes = !is_abort && !self.request.login.is_complete();
        if completes && !take_permit(placed, deadline).await {
            return LoginResponse::Unavailable(Fault::full());
        }
        let outcome = paused.respond(response, deadline).await;
        if let LoginResponse::Unavailable(fault) = &outcome {
            self.count(fault);
        }
        self.wait_for_other_sessions(outcome, placed, deadline).await
    }

    /// Delays an accepted login until the user has no session on another server of the backend, if the backend requires that.
    async fn wait_for_other_sessions(
        &self,
        outcome: LoginResponse<'a>,
        placed: &mut PlacedLogin,
        deadline: Deadline,
    ) -> LoginResponse<'a> {
        if !matches!(outcome, LoginResponse::Accepted(_)) {
            return outcome;
        }
        if !take_permit(placed, deadline).await {
            return LoginResponse::Unavailable(Fault::full());
        }
        if !placed.backend.is_sticky() {
            self.handle.accept();
            return outcome;
        }
        self.handle.accept_exclusively();
        let others_ended = self.snapshot.session_registry.wait_until(|_| !self.handle.has_sessions_elsewhere());
        // The other sessions were cancelled for this login, which therefore waits until they can have closed their connections.
        let until = deadline.max(Deadline::after(MIN_WAIT));
        match until.limit(others_ended).await {
            Ok(()) => outcome,
            Err(_) => LoginResponse::Unavailable(Fault::sessions_elsewhere()),
        }
    }

    /// Follows referrals as far as the backends allow it.
    async fn follow_referrals(
        &self,
        mut outcome: LoginResponse<'a>,
        mut placed: PlacedLogin,
        deadline: Deadline,
    ) -> Answer<'a> {
        let mut visited = Vec::new();
        while let LoginResponse::Referred(referral) = &outcome {
            visited.push(placed.server.name.clone());
            if !placed.backend.follows_referrals {
                break;
            }
            let (backend, server) = match self.referred_server(referral, &placed.server, &visited) {
                Ok(referred) => referred,
                Err(fault) => return Ok(self.unavailable(&placed.server, fault)),
            };
            match self.failover(backend, vec![server]).next(deadline).await {
                NextServer::Try(server, server_permit) if self.register_server(&server)? => {
                    // This releases the permit of the server that refers.
                    placed = PlacedLogin { backend: backend.clone(), server, server_permit };
                    (outcome, placed) = self.log_in_on(backend, placed, deadline, deadline).await;
                    if let LoginResponse::Unavailable(fault) = &outcome {
                        self.report(&placed.server, fault);
                    }
                }
                NextServer::AllFull => return Ok((LoginResponse::Unavailable(Fault::full()), None)),
                NextServer::Try(..) | NextServer::Exhausted => {
                    let (from, host, port) = (&placed.server.name, &referral.host, referral.port);
                    let detail = format!("{from} refers to {host}:{port}, which accepts no logins at present");
                    return Ok(self.unavailable(&placed.server, Fault::referral(detail)));
                }
            }
        }
        Ok((outcome, Some(placed)))
    }

    /// The declared server that a referral of `from` names.
    ///
    /// # Errors
    /// The referral cannot be followed.
    fn referred_server(
        &self,
        referral: &Referral,
        from: &Server,
        visited: &[Arc<str>],
    ) -> Result<(&'a Arc<Backend>, Arc<Server>), Fault> {
        let (from, address) = (&from.name, format!("{}:{}", referral.host, referral.port));
        match self.snapshot.backends.find(&referral.host, referral.port) {
            None => Err(Fault::referral(format!("{from} refers to {address}, which is not a declared server"))),
            Some((_, server)) if visited.contains(&server.name) || visited.len() > MAX_REFERRALS => {
                Err(Fault::referral(format!("referral loop: {from} refers to {address}")))
            }
            Some((backend, _)) if !self.restrictions.allow(backend) => Err(Fault::referral(format!(
                "{from} refers to {address} of backend {}, which does not allow this login",
                backend.name
            ))),
            Some(referred) => Ok(referred),
        }
    }

    fn unavailable(&self, server: &Server, fault: Fault) -> (LoginResponse<'a>, Option<PlacedLogin>) {
        self.report(server, &fault);
        (LoginResponse::Unavailable(fault), None)
    }

    /// Counts a fault of the server that was tried.
    fn count(&self, fault: &Fault) {
        if fault.is_counted_at_server() {
            self.snapshot.metrics.failure(fault.reason);
        }
    }

    fn report(&self, server: &Server, fault: &Fault) {
        let (session, reason) = (self.request.client.session_id, fault.reason.as_str());
        tracing::info!(session, server = %server.name, reason, detail = %fault.detail, "server could not accept the login");
        self.count(fault);
    }
}

/// Takes a permit of the server, unless the login has one. Returns whether it has one then.
async fn take_permit(placed: &mut PlacedLogin, deadline: Deadline) -> bool {
    placed.backend.end_exchange(&placed.server, &mut placed.server_permit, deadline).await.is_ok()
}
