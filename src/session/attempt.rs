//! Steps 4 to 6 of a session, for one login command: normalise the user, route, log in on a server.
//!
//! A login is registered (`sessions`) before it is routed, and everything it waits for from then on ends when it is
//! cancelled. The user is moved, or its server drained: the login is routed again, a bounded number of times. Nothing of an
//! attempt outlives it but its answer and what the record keeps. Called by `session`.

use std::sync::Arc;
use std::time::Instant;

use zeroize::Zeroizing;

use super::log_record::reason;
use super::placement::{Carried, Placed, Placing};
use super::server_credentials::{server_login, split_master, with_user};
use super::throttling::{counted_users, reply_to_refused_token};
use super::{Session, close};
use crate::admission::AddressBlock;
use crate::backend::login::{Established, LoginResponse};
use crate::backend::request::{ClientDetails, Request};
use crate::backend::{Backend, Server, ServerPermit};
use crate::deadline::Deadline;
use crate::failure::Reason;
use crate::generations::Generation;
use crate::identity::{Mechanism, UserName, UserNames, authorise_certificate};
use crate::metrics::LoginOutcome;
use crate::protocol::imap::client_id::ClientId;
use crate::protocol::imap::prelogin::{ByeReason, ChallengeStep, LoginRequest, Prelogin};
use crate::protocol::imap::refusal::RefusalKind;
use crate::protocol::imap::tag::Tag;
use crate::protocol::imap::{reply, sasl};
use crate::route::{LoginContext, LoginTls, LookupRequest, RouteDecision, RouteError, RouteMatch};
use crate::session_registry::{CancelReason, RegisterError, SessionHandle, SessionInfo};
use crate::snapshot::Snapshot;
use crate::stream::Stream;

/// Maximum number of times that one login is routed: again whenever its user is moved or its server drained meanwhile.
const MAX_ROUTINGS: usize = 8;

/// How a login attempt ended.
pub(super) enum Attempted {
    Accepted {
        seated: Seated,
        established: Box<Established>,
    },
    Refused {
        reply: Vec<u8>,
        kind: RefusalKind,
        /// The client gets the reply of a login that counts as failed no sooner.
        not_before: Option<Instant>,
    },
    /// Refused, and the connection ends.
    Dismissed {
        reply: Vec<u8>,
        kind: RefusalKind,
    },
    /// By a limit or rate of ours.
    Limited {
        reply: Vec<u8>,
    },
    /// A server has refused the token; the failed login is logged and delayed already.
    TokenRefused {
        reply: Vec<u8>,
    },
    Unavailable,
}

/// The server that answered, and the place there.
pub(super) struct Seated {
    pub(super) backend: Arc<Backend>,
    pub(super) server: Arc<Server>,
    /// Of the server's places.
    pub(super) slot: ServerPermit,
    /// Among the user's sessions.
    pub(super) seat: SessionHandle,
}

/// A login command whose user is known.
struct Login<'a> {
    request: &'a LoginRequest,
    names: &'a UserNames,
    /// The users that the attempt counts for: see [`counted_users`].
    users: Vec<Arc<str>>,
    /// The name for servers of the user who logs in, if that is on behalf of another.
    authcid: &'a UserName,
    client_id: ClientId,
    began: Instant,
}

/// A registered login.
struct Registered {
    seat: SessionHandle,
    /// The holds that came before the routes are asked.
    since: Generation,
}

/// How far an attempt has come when it is cancelled.
#[derive(Debug, Default)]
struct Progress {
    /// The policy service has let the login go on.
    is_allowed: bool,
    /// A server's challenge was sent to the client: the login cannot begin again without it.
    in_exchange: bool,
}

impl Session {
    /// `None`: the session is over.
    pub(super) async fn attempt(
        &mut self,
        login: &mut LoginRequest,
        stream: &mut Stream,
        prelogin: &mut Prelogin,
    ) -> Option<Attempted> {
        let began = Instant::now();
        self.up_to_date();
        let snapshot = self.snapshot.clone();
        split_master(&snapshot, &mut login.credentials);
        let delegated =
            authorise_certificate(&mut login.credentials, &snapshot.config.naming, snapshot.delegations(self.listener));
        let login = &*login;
        let names = snapshot.config.naming.names(login.credentials.mailbox_user());
        let name_as_sent = || login.credentials.mailbox_user().as_str().into();
        self.routing_name = Some(names.as_ref().map_or_else(|_| name_as_sent(), |names| names.routing.clone()));
        let logged = names.as_ref().map_or_else(|_| login.credentials.mailbox_user(), |names| &names.log);
        self.record.attempt(Some(logged), login.credentials.mechanism);
        let users = counted_users(&snapshot.config.naming, &login.credentials);
        if let Some(limited) = self.may_try(&login.tag, &users) {
            return Some(limited);
        }
        let authcid = snapshot.config.naming.authcid(&login.credentials.user);
        let (Ok(names), Ok(authcid)) = (names, authcid) else {
            return Some(self.no_such_user(&login.tag, Reason::NameRefused, began));
        };
        // Before any lookup, so that the answer is the same whether the mailbox exists.
        if delegated.is_err() {
            return Some(self.not_authorised(&login.tag));
        }
        if login.credentials.has_empty_password() && !snapshot.backends.any_allows_empty_passwords() {
            return Some(self.empty_password(&login.tag, None, began));
        }
        let client_id = prelogin.client_id().clone();
        let login = Login { request: login, names: &names, users, authcid: &authcid, client_id, began };
        self.registered_attempt(&login, stream, prelogin).await
    }

    /// Registers the login and routes it, again when a move or a drained server has made the first answer out of date.
    async fn registered_attempt(
        &mut self,
        login: &Login<'_>,
        stream: &mut Stream,
        prelogin: &mut Prelogin,
    ) -> Option<Attempted> {
        let routing = &login.names.routing;
        let sessions = self.snapshot.session_registry.clone();
        let due = Deadline::after(self.snapshot.limits.server_login);
        let guest = SessionInfo {
            user: routing.clone(),
            client: self.peer.ip().to_canonical(),
            session: self.record.session().bytes(),
        };
        let mut held = routing.clone();
        let mut ended_by = CancelReason::Moved;
        let mut progress = Progress::default();
        let mut routings = 0;
        while routings < MAX_ROUTINGS && !due.has_expired() {
            // A user who is being moved comes in when that is done.
            let released = sessions.wait_until(|sessions| !sessions.is_on_hold(routing) && !sessions.is_on_hold(&held));
            if due.limit(released).await.is_err() {
                break;
            }
            let since = sessions.generation();
            let Ok(seat) = sessions.register(guest.clone()) else { continue };
            let call = seat.cancel_signal().clone();
            let registered = Registered { seat, since };
            let routed = tokio::select! {
                biased;
                why = call.cancelled() => Err(why),
                routed = self.routed_attempt(login, registered, stream, prelogin, &mut progress) => Ok(routed?),
            };
            routings += 1;
            match routed {
                Ok(Ok(attempted)) => return Some(attempted),
                Ok(Err(RegisterError::OnHold(name))) => held = name,
                Ok(Err(RegisterError::Outdated)) => {}
                Err(why) => {
                    ended_by = why;
                    if progress.in_exchange {
                        self.record.attempt_failed(reason(why), LoginOutcome::Unavailable, None);
                        let reply = reply::exchange_cancelled(&login.request.tag);
                        return Some(Attempted::Dismissed { reply, kind: RefusalKind::NotCounted });
                    }
                    // A login that lost to a later one would end that one in turn if it was routed again.
                    if matches!(why, CancelReason::Kicked | CancelReason::Stopped | CancelReason::Replaced) {
                        break;
                    }
                }
            }
        }
        self.record.attempt_failed(reason(ended_by), LoginOutcome::Unavailable, None);
        Some(Attempted::Unavailable)
    }

    /// Asks the policy service once, then the routes, and logs in where they say. An error: the login must be routed again.
    async fn routed_attempt(
        &mut self,
        login: &Login<'_>,
        registered: Registered,
        stream: &mut Stream,
        prelogin: &mut Prelogin,
        progress: &mut Progress,
    ) -> Option<Result<Attempted, RegisterError>> {
        if let Some(refused) = self.may_be_routed(login, progress).await {
            return Some(Ok(refused));
        }
        let snapshot = self.snapshot.clone();
        let target = match self.look_up(&snapshot, login, stream).await {
            Ok(target) => target,
            Err(refused) => return Some(Ok(refused)),
        };
        let (tag, credentials) = (&login.request.tag, &login.request.credentials);
        let RouteDecision::Destination(place) = &*target else { return Some(Ok(self.verdict(tag, &target))) };
        if place.user.as_ref().is_some_and(|user| snapshot.config.naming.has_master_separator(user.as_str())) {
            return Some(Ok(self.lookup_failed("the route's user contains users.masters.separator")));
        }
        let backend = snapshot.backends.backend(place.backend);
        if let Some(refused) = self.may_be_sent_to(backend, login) {
            return Some(Ok(refused));
        }
        let with_other_user = with_user(credentials, place, login.names);
        let Some(server_login) =
            server_login(credentials, place, login.names, login.authcid, backend, with_other_user.as_ref())
        else {
            self.record.attempt_failed(Reason::MechanismUnsupported, LoginOutcome::Unavailable, Some(backend.id));
            return Some(Ok(Attempted::Unavailable));
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
        let (mailbox, Registered { seat, since }) = (place.mailbox(&login.names.routing), registered);
        let (listener_config, carries) = (self.listener_config.clone(), Carried::of(credentials, place));
        let placing =
            Placing { snapshot: &snapshot, listener_config, seat: &seat, since, mailbox, request: &request, carries };
        let answered = match placing.log_in_somewhere(place).await {
            Ok(answered) => answered,
            Err(again) => return Some(Err(again)),
        };
        let (outcome, placed) = match self.exchange(login, &placing, answered, stream, prelogin, progress).await? {
            Ok(answered) => answered,
            Err(ended) => return Some(Ok(ended)),
        };
        if matches!(outcome, LoginResponse::Accepted(_))
            && let Some(limited) =
                self.may_have_one_more(&login.request.tag, &login.users, &login.names.routing, backend.id)
        {
            return Some(Ok(limited));
        }
        let seated = placed.map(|Placed { backend, server, slot }| Seated { backend, server, slot, seat });
        Some(Ok(self.answered(tag, outcome, seated, backend, login.began)))
    }

    /// Refuses a login before any lookup, so that the answer is the same whether the mailbox exists. `None`: it goes on,
    /// under the configuration that holds now.
    async fn may_be_routed(&mut self, login: &Login<'_>, progress: &mut Progress) -> Option<Attempted> {
        if !progress.is_allowed {
            let refused = self.policy_refuses(login.request, &login.client_id, login.began).await;
            if refused.is_some() {
                return refused;
            }
            progress.is_allowed = true;
        }
        if login.client_id.ttl() == Some(0) {
            self.record.attempt_failed(Reason::ProxyLoop, LoginOutcome::Unavailable, None);
            return Some(Attempted::Unavailable);
        }
        self.up_to_date();
        let may_ask = self.snapshot.allows_masters_from(self.peer.ip()) && self.snapshot.backends.any_allows_authzid();
        let is_refused = login.request.credentials.authzid.is_some() && !may_ask;
        is_refused.then(|| self.not_authorised(&login.request.tag))
    }

    /// Asks the routes. An error: the login is answered with that.
    async fn look_up(
        &mut self,
        snapshot: &Snapshot,
        login: &Login<'_>,
        stream: &Stream,
    ) -> Result<Arc<RouteDecision>, Attempted> {
        // Its copy of the credentials is dropped with the lookup.
        let question = self.question(login.names, login.request, stream);
        let lookup = snapshot.router.route(&question, &snapshot.metrics);
        match Deadline::after(snapshot.limits.lookup).limit(lookup).await {
            Ok(Ok(RouteMatch { decision: target, route })) => {
                let backend = match &*target {
                    RouteDecision::Destination(place) => Some(&snapshot.backends.backend(place.backend).name),
                    RouteDecision::Refuse(_)
                    | RouteDecision::WrongPassword(_)
                    | RouteDecision::Maintenance(_)
                    | RouteDecision::PasswordNeeded => None,
                };
                self.record.routed(route, backend, login.began.elapsed());
                Ok(target)
            }
            Ok(Err(RouteError::Unknown)) => {
                Err(self.no_such_user(&login.request.tag, Reason::UnknownUser, login.began))
            }
            Ok(Err(error)) => Err(self.lookup_failed(&error.to_string())),
            Err(_) => Err(self.lookup_failed("no answer within limits.lookup")),
        }
    }

    /// Refuses a login that `backend` does not allow. `None`: it may be sent there.
    fn may_be_sent_to(&mut self, backend: &Backend, login: &Login<'_>) -> Option<Attempted> {
        let credentials = &login.request.credentials;
        if credentials.authzid.is_some() && !backend.allows_authzid {
            // Another backend allows it: users of this one and unknown users get the same answer.
            self.record.attempt_failed(Reason::AuthzidRefused, LoginOutcome::Refused, Some(backend.id));
            return Some(self.refused_late(&login.request.tag, Some(backend), login.began));
        }
        let is_refused = credentials.has_empty_password() && !backend.allows_empty_passwords();
        is_refused.then(|| self.empty_password(&login.request.tag, Some(backend), login.began))
    }

    /// Passes challenges to the client and its responses to the server until the server has answered the login. An error:
    /// the exchange was ended, and the login is answered with that. `None`: the session is over.
    async fn exchange<'a>(
        &mut self,
        login: &Login<'_>,
        placing: &Placing<'a, '_>,
        (mut outcome, mut placed): (LoginResponse<'a>, Option<Placed>),
        stream: &mut Stream,
        prelogin: &mut Prelogin,
        progress: &mut Progress,
    ) -> Option<Result<(LoginResponse<'a>, Option<Placed>), Attempted>> {
        let backend = Some(placing.carries.routed);
        let mut is_token_refused = false;
        while let LoginResponse::Challenged(paused, challenge) = outcome {
            let Some(placed) = &mut placed else { return Some(Err(Attempted::Unavailable)) };
            placing.asks_client(placed, &challenge, progress.in_exchange);
            progress.in_exchange = true;
            let credentials = &login.request.credentials;
            if sasl::is_token_refusal(credentials.mechanism, &challenge) && !is_token_refused {
                is_token_refused = true;
                self.record.refused(placing.carries.routed, Some(&placed.server.name));
                self.token_refused(credentials, login.began).await;
            }
            let response = tokio::select! {
                biased;
                response = self.ask(login.request, &challenge, stream, prelogin) => match response {
                    Some(response) => response,
                    None => {
                        self.record.abandoned(backend);
                        return None;
                    }
                },
                () = placed.slot.displaced() => {
                    self.record.attempt_failed(Reason::ServersFull, LoginOutcome::Unavailable, backend);
                    let reply = reply::exchange_cancelled(&login.request.tag);
                    return Some(Err(Attempted::Dismissed { reply, kind: RefusalKind::NotCounted }));
                }
            };
            outcome = placing.respond(paused, placed, &response).await;
        }
        if is_token_refused && !matches!(outcome, LoginResponse::Accepted(_)) {
            let reply = reply_to_refused_token(outcome, &login.request.tag);
            return Some(Err(Attempted::TokenRefused { reply }));
        }
        Some(Ok((outcome, placed)))
    }

    fn answered(
        &mut self,
        tag: &Tag,
        outcome: LoginResponse<'_>,
        answered: Option<Seated>,
        routed: &Backend,
        began: Instant,
    ) -> Attempted {
        let took = began.elapsed();
        match (outcome, answered) {
            (LoginResponse::Accepted(established), Some(seated)) => {
                self.snapshot.metrics.backend(seated.backend.id.0).logged_in(took);
                self.record.accepted(&seated.backend, &seated.server.name, &established, took);
                Attempted::Accepted { seated, established: Box::new(established) }
            }
            (LoginResponse::Refused { reply, kind }, answered) => {
                // A client takes its turns in a relayed mechanism as slowly as it likes.
                if kind == RefusalKind::FailedLogin && !self.record.last_attempt().0.is_some_and(Mechanism::is_relayed)
                {
                    let client = AddressBlock::of(self.peer.ip());
                    self.snapshot.refusal_latency.add(&routed.name, client, took);
                    if let (Some(user), Some(answer)) = (&self.routing_name, reply::without_tag(&reply)) {
                        self.snapshot.refusal_latency.observe_answer(&routed.name, user, client, answer);
                    }
                }
                self.record.refused(routed.id, answered.as_ref().map(|answered| &answered.server.name));
                Attempted::Refused { reply, kind, not_before: None }
            }
            // Not followed: the client may know better.
            (LoginResponse::Referred(referral), answered) => {
                self.record.refused(routed.id, answered.as_ref().map(|answered| &answered.server.name));
                Attempted::Refused { reply: referral.reply, kind: RefusalKind::NotCounted, not_before: None }
            }
            (LoginResponse::Unavailable(fault), answered) if fault.is_refusal() => {
                self.record.refused(routed.id, answered.as_ref().map(|answered| &answered.server.name));
                self.record.detail(fault.detail);
                self.refused_late(tag, Some(routed), began)
            }
            (LoginResponse::Unavailable(fault), _) => {
                let is_limit = fault.reason == Reason::UserLimit;
                let outcome = if is_limit { LoginOutcome::Limited } else { LoginOutcome::Unavailable };
                if fault.is_counted_at_server() {
                    self.record.attempt_ended(fault.reason, outcome, Some(routed.id));
                } else {
                    self.record.attempt_failed(fault.reason, outcome, Some(routed.id));
                }
                self.record.detail(fault.detail);
                match fault.reply {
                    Some(reply) => Attempted::Refused { reply, kind: RefusalKind::NotCounted, not_before: None },
                    None => Attempted::Unavailable,
                }
            }
            // A server is named with every acceptance, challenges are answered before, and none is only looked at.
            (LoginResponse::Accepted(_) | LoginResponse::Challenged(..), _) => Attempted::Unavailable,
        }
    }

    /// Passes a server's challenge to the client, and brings back what it says.
    async fn ask(
        &mut self,
        login: &LoginRequest,
        challenge: &[u8],
        stream: &mut Stream,
        prelogin: &mut Prelogin,
    ) -> Option<Zeroizing<Vec<u8>>> {
        let mut out = Vec::new();
        prelogin.challenge(challenge, &mut out);
        // A login that waits for its client has no complete credentials, and may be shed.
        self.login_under_way(None);
        loop {
            self.send(stream, &mut out).await?;
            match prelogin.challenge_step(&login.tag, &mut out) {
                // The drain and shedding end the whole attempt.
                ChallengeStep::NeedInput => {
                    if let Err(unread) = self.read(stream, prelogin).await {
                        return self.not_read(unread, stream, prelogin).await;
                    }
                }
                ChallengeStep::Response(response) => {
                    // The first message is held until the login ends.
                    let longest = response.len().max(login.credentials.proof_size());
                    if self.holds_for_login(longest).is_err() {
                        return self.farewell(stream, prelogin, (ByeReason::Memory, Reason::ShedForMemory)).await;
                    }
                    self.login_under_way(Some(Instant::now()));
                    return Some(response);
                }
                ChallengeStep::Close(reason) => {
                    self.send(stream, &mut out).await?;
                    self.closed(reason);
                    close(stream).await;
                    return None;
                }
            }
        }
    }

    fn question(&self, names: &UserNames, login: &LoginRequest, stream: &Stream) -> LookupRequest {
        let asks_certificate = || self.snapshot.tls.as_ref().is_some_and(|tls| tls.asks_certificate(self.listener));
        let login_context = self.snapshot.router.needs_login_context().then(|| {
            Arc::new(LoginContext {
                client: self.peer,
                listener: self.local,
                is_proxied: self.is_proxied,
                session: self.record.session().as_str().into(),
                tls: self.record.tls().map(|tls| LoginTls {
                    version: tls.version.as_str(),
                    cipher: stream.cipher(),
                    asks_certificate: asks_certificate(),
                    certificate: stream.peer_certificate().map(Into::into),
                }),
                attempt: self.record.attempts(),
                credentials: login.credentials.clone(),
            })
        });
        LookupRequest { user: names.routing.clone(), login_context }
    }
}
