//! Steps 4 to 6 of a session, for one login command: normalise the user, route, log in on a server.
//!
//! A login is registered in the session registry before it is routed, and from then on ends when it is cancelled. If the user is
//! moved or the server drained during the login, it is routed again, a limited number of times. Nothing of an attempt is kept but
//! its result and the log record.

use std::sync::Arc;
use std::time::Instant;

use super::attempt_result::{AcceptedLogin, AttemptResult, Interrupt, Refusal};
use super::log_record::failure_reason;
use super::placement::{Exchange, PlacedLogin, Placement, Restrictions};
use super::server_credentials::{server_login, split_master, with_user};
use super::throttling::counted_users;
use super::{Session, SessionEnded};
use crate::admission::AddressBlock;
use crate::backend::Backend;
use crate::backend::fault::Fault;
use crate::backend::login::LoginResponse;
use crate::backend::request::{ClientDetails, Request};
use crate::deadline::Deadline;
use crate::failure::Reason;
use crate::generations::Generation;
use crate::identity::{Mechanism, UserName, UserNames, authorise_certificate};
use crate::metrics::LoginOutcome;
use crate::protocol::imap::client_id::ClientId;
use crate::protocol::imap::prelogin::{LoginRequest, Prelogin};
use crate::protocol::imap::refusal::RefusalKind;
use crate::protocol::imap::reply;
use crate::route::{Destination, RouteDecision};
use crate::session_registry::{CancelReason, RegisterError, SessionHandle, SessionInfo};
use crate::stream::Stream;

/// Maximum number of times that one login is routed, because its user is moved or its server drained in the meantime.
const MAX_ROUTINGS: usize = 8;

/// A login command whose user name is valid.
pub(super) struct Login<'a> {
    pub(super) request: &'a LoginRequest,
    pub(super) names: &'a UserNames,
    /// The users that the attempt counts for: see [`counted_users`].
    users: Vec<Arc<str>>,
    /// The name that servers know of the user who logs in, if that is on behalf of another.
    authcid: &'a UserName,
    pub(super) client_id: ClientId,
    pub(super) began: Instant,
}

struct Registered {
    handle: SessionHandle,
    /// The generation of holds before the routes are queried.
    since: Generation,
}

/// What has been done for a login, over all its routings.
#[derive(Debug, Default)]
pub(super) struct Progress {
    /// Whether the policy service has allowed the login.
    pub(super) is_allowed: bool,
    /// Once it has begun, the login cannot begin again without the client.
    pub(super) exchange: Exchange,
}

impl Session {
    /// Makes one login attempt.
    pub(super) async fn attempt(
        &mut self,
        request: &mut LoginRequest,
        stream: &mut Stream,
        prelogin: &mut Prelogin,
    ) -> Result<AttemptResult, SessionEnded> {
        let began = Instant::now();
        self.update_snapshot();
        let snapshot = self.snapshot.clone();
        let naming = &snapshot.config.naming;
        split_master(&snapshot, &mut request.credentials);
        let delegated = authorise_certificate(&mut request.credentials, naming, snapshot.delegations(self.listener));
        let request = &*request;
        let credentials = &request.credentials;
        let names = naming.names(credentials.mailbox_user());
        let name_as_sent = || credentials.mailbox_user().as_str().into();
        self.routing_name = Some(names.as_ref().map_or_else(|_| name_as_sent(), |names| names.routing.clone()));
        let logged = names.as_ref().map_or_else(|_| credentials.mailbox_user(), |names| &names.log);
        self.record.attempt(Some(logged), credentials.mechanism);
        let users = counted_users(naming, credentials);
        if let Err(refusal) = self.check_rate(&request.tag, &users) {
            return Ok(AttemptResult::Refused(refusal));
        }
        let (Ok(names), Ok(authcid)) = (names, naming.authcid(&credentials.user)) else {
            return Ok(AttemptResult::Refused(self.unknown_user(&request.tag, Reason::NameRefused, began)));
        };
        // Before any lookup, so that the answer does not depend on whether the mailbox exists.
        if delegated.is_err() {
            return Ok(AttemptResult::Refused(self.not_authorised(&request.tag)));
        }
        if credentials.has_empty_password() && !snapshot.backends.any_allows_empty_passwords() {
            return Ok(AttemptResult::Refused(self.empty_password(&request.tag, None, began)));
        }
        let client_id = prelogin.client_id().clone();
        let login = Login { request, names: &names, users, authcid: &authcid, client_id, began };
        self.registered_attempt(&login, stream, prelogin).await
    }

    /// Registers the login and routes it. If a hold, a move or a drained server makes the result out of date, begins again.
    async fn registered_attempt(
        &mut self,
        login: &Login<'_>,
        stream: &mut Stream,
        prelogin: &mut Prelogin,
    ) -> Result<AttemptResult, SessionEnded> {
        let user = &login.names.routing;
        let registry = self.snapshot.session_registry.clone();
        let deadline = Deadline::after(self.snapshot.limits.server_login);
        let (client, session) = (self.peer.ip().to_canonical(), self.record.session().bytes());
        let info = SessionInfo { user: user.clone(), client, session };
        let mut name_on_hold = user.clone();
        let mut cancel_reason = CancelReason::Moved;
        let mut progress = Progress::default();
        let mut routings = 0;
        while routings < MAX_ROUTINGS && !deadline.has_expired() {
            // A user who is being moved may log in when that is done.
            let released =
                registry.wait_until(|registry| !registry.is_on_hold(user) && !registry.is_on_hold(&name_on_hold));
            if deadline.limit(released).await.is_err() {
                break;
            }
            let since = registry.generation();
            let Ok(handle) = registry.register(info.clone()) else { continue };
            let cancel_signal = handle.cancel_signal().clone();
            let registered = Registered { handle, since };
            let result = tokio::select! {
                biased;
                reason = cancel_signal.cancelled() => Err(reason),
                result = self.routed_attempt(login, registered, stream, prelogin, &mut progress) => Ok(result),
            };
            routings += 1;
            match result {
                Ok(Ok(accepted)) => return Ok(AttemptResult::Accepted(accepted)),
                Ok(Err(Interrupt::SessionEnded)) => return Err(SessionEnded),
                Ok(Err(Interrupt::Refused(refusal))) => return Ok(AttemptResult::Refused(refusal)),
                Ok(Err(Interrupt::Unavailable)) => return Ok(AttemptResult::Unavailable),
                Ok(Err(Interrupt::Reroute(RegisterError::OnHold(name)))) => name_on_hold = name,
                Ok(Err(Interrupt::Reroute(RegisterError::Outdated))) => {}
                Err(reason) => {
                    cancel_reason = reason;
                    if progress.exchange == Exchange::Begun {
                        self.record.attempt_failed(failure_reason(reason), LoginOutcome::Unavailable, None);
                        let refusal = Refusal::uncounted(reply::exchange_cancelled(&login.request.tag)).and_close();
                        return Ok(AttemptResult::Refused(refusal));
                    }
                    // A login that was replaced by a later one would end that one in turn if it was routed again.
                    if matches!(reason, CancelReason::Kicked | CancelReason::Stopped | CancelReason::Replaced) {
                        break;
                    }
                }
            }
        }
        self.record.attempt_failed(failure_reason(cancel_reason), LoginOutcome::Unavailable, None);
        Ok(AttemptResult::Unavailable)
    }

    /// Asks the policy service once, queries the routes, and logs in on a server of the backend that they name.
    async fn routed_attempt(
        &mut self,
        login: &Login<'_>,
        registered: Registered,
        stream: &mut Stream,
        prelogin: &mut Prelogin,
        progress: &mut Progress,
    ) -> Result<AcceptedLogin, Interrupt> {
        self.check_before_lookup(login, progress).await?;
        let snapshot = self.snapshot.clone();
        let decision = self.look_up(&snapshot, login, stream).await?;
        let RouteDecision::Destination(destination) = &*decision else {
            return Err(self.refused_by_route(&login.request.tag, &decision));
        };
        let backend = snapshot.backends.backend(destination.backend);
        self.check_destination(login, destination, backend)?;
        self.log_in_on_server(login, destination, registered, stream, prelogin, progress).await
    }

    async fn log_in_on_server(
        &mut self,
        login: &Login<'_>,
        destination: &Destination,
        registered: Registered,
        stream: &mut Stream,
        prelogin: &mut Prelogin,
        progress: &mut Progress,
    ) -> Result<AcceptedLogin, Interrupt> {
        let (tag, credentials) = (&login.request.tag, &login.request.credentials);
        let snapshot = self.snapshot.clone();
        let backend = snapshot.backends.backend(destination.backend);
        let with_other_user = with_user(credentials, destination, login.names);
        let server_login =
            server_login(credentials, destination, login.names, login.authcid, backend, with_other_user.as_ref());
        let Some(server_login) = server_login else {
            self.record.attempt_failed(Reason::MechanismUnsupported, LoginOutcome::Unavailable, Some(backend.id));
            return Err(Interrupt::Unavailable);
        };
        let (session_id, tls) = (self.record.session(), self.record.tls().cloned());
        let request = Request {
            login: server_login,
            mechanism: credentials.mechanism,
            tag,
            client: ClientDetails {
                address: self.peer,
                listener: self.local,
                tls: tls.as_ref(),
                session_id: session_id.as_str(),
                id: &login.client_id,
            },
            limits: &snapshot.limits,
            deadline: Deadline::after(snapshot.limits.server_login),
        };
        let Registered { handle, since } = registered;
        let placement = Placement {
            snapshot: &snapshot,
            listener_config: self.listener_config.clone(),
            handle: &handle,
            since,
            mailbox: destination.mailbox(&login.names.routing),
            request: &request,
            restrictions: Restrictions::of(credentials, destination),
        };
        let answer = placement.log_in(destination).await?;
        let (outcome, placed) = self.exchange(login, &placement, answer, stream, prelogin, progress).await?;
        if matches!(outcome, LoginResponse::Accepted(_)) {
            self.check_user_limits(tag, &login.users, &login.names.routing, backend.id)?;
        }
        self.conclude(login, outcome, placed, handle, backend)
    }

    /// Records the answer of the last server. `routed` is the backend that the route named.
    fn conclude(
        &mut self,
        login: &Login<'_>,
        outcome: LoginResponse<'_>,
        placed: Option<PlacedLogin>,
        handle: SessionHandle,
        routed: &Backend,
    ) -> Result<AcceptedLogin, Interrupt> {
        let duration = login.began.elapsed();
        match (outcome, placed) {
            (LoginResponse::Accepted(established), Some(PlacedLogin { backend, server, server_permit })) => {
                self.snapshot.metrics.backend(backend.id.0).logged_in(duration);
                self.record.accepted(&backend, &server.name, &established, duration);
                Ok(AcceptedLogin { backend, server_permit, handle, established: Box::new(established) })
            }
            (LoginResponse::Refused { reply, kind }, placed) => {
                // The duration of a relayed mechanism depends on the client.
                if kind == RefusalKind::FailedLogin && !self.record.last_attempt().0.is_some_and(Mechanism::is_relayed)
                {
                    let client = AddressBlock::of(self.peer.ip());
                    self.snapshot.refusal_latency.add(&routed.name, client, duration);
                    if let (Some(user), Some(answer)) = (&self.routing_name, reply::without_tag(&reply)) {
                        self.snapshot.refusal_latency.observe_reply(&routed.name, user, client, answer);
                    }
                }
                self.record.refused(routed.id, placed.as_ref().map(|placed| &placed.server.name));
                let refusal = match kind {
                    RefusalKind::FailedLogin => Refusal::failed(reply, None),
                    RefusalKind::NotCounted => Refusal::uncounted(reply),
                };
                Err(refusal.into())
            }
            // A referral that was not followed is passed on, because the client may be able to follow it.
            (LoginResponse::Referred(referral), placed) => {
                self.record.refused(routed.id, placed.as_ref().map(|placed| &placed.server.name));
                Err(Refusal::uncounted(referral.reply).into())
            }
            (LoginResponse::Unavailable(fault), placed) if fault.is_refusal() => {
                self.record.refused(routed.id, placed.as_ref().map(|placed| &placed.server.name));
                self.record.set_detail(fault.detail);
                Err(self.refused_with_delay(&login.request.tag, Some(routed), login.began).into())
            }
            (LoginResponse::Unavailable(fault), _) => Err(self.no_server_answered(fault, routed)),
            // A server is named with every acceptance, and challenges have been answered.
            (LoginResponse::Accepted(_) | LoginResponse::Challenged(..), _) => Err(Interrupt::Unavailable),
        }
    }

    fn no_server_answered(&mut self, fault: Fault, routed: &Backend) -> Interrupt {
        let is_limit = fault.reason == Reason::UserLimit;
        let outcome = if is_limit { LoginOutcome::Limited } else { LoginOutcome::Unavailable };
        if fault.is_counted_at_server() {
            self.record.attempt_ended(fault.reason, outcome, Some(routed.id));
        } else {
            self.record.attempt_failed(fault.reason, outcome, Some(routed.id));
        }
        self.record.set_detail(fault.detail);
        match fault.reply {
            Some(reply) => Refusal::uncounted(reply).into(),
            None => Interrupt::Unavailable,
        }
    }
}
