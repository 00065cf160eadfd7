//! Steps 4 to 6 of a session, for one login command: normalise the user, route, log in on a server.
//!
//! A login is registered (`sessions`) before it is routed, and everything it waits for from then on ends when it is
//! cancelled. The user is moved, or its server drained: the login is routed again, a bounded number of times. Nothing of an
//! attempt outlives it but its answer and what the record keeps. Called by `session`.

use std::sync::Arc;
use std::time::Instant;

use tokio::time::{self, timeout_at};
use zeroize::Zeroizing;

use super::defence::{counted_users, reply_to_refused_token};
use super::placement::{Placed, Placing};
use super::record::{bounded, reason};
use super::{Session, close, pace};
use crate::backend::connect::{Established, Outcome, Purpose, Request};
use crate::backend::{Backend, Server, Slot};
use crate::config::BackendId;
use crate::deadline::Deadline;
use crate::failure::Reason;
use crate::generations::Generation;
use crate::identity::{
    Credentials, Mechanism, Names, PasswordLogin, Proof, Secret, ServerLogin, UserName, authorise_certificate,
};
use crate::imap::prelogin::{Bye, LoginRequest, Prelogin, Step};
use crate::imap::tag::Tag;
use crate::imap::{reply, sasl};
use crate::metrics::LoginOutcome;
use crate::route::{Place, Question, RouteError, Routed, Target, Visitor, VisitorTls};
use crate::server::Live;
use crate::sessions::{Guest, NoSeat, Seat, Why};
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
        counts: bool,
    },
    /// Refused, and the connection ends.
    Dismissed {
        reply: Vec<u8>,
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
    pub(super) slot: Slot,
    /// Among the user's sessions.
    pub(super) seat: Seat,
}

/// A registered login.
struct Registered {
    seat: Seat,
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
        let live = self.live.clone();
        split_master(&live, &mut login.credentials);
        let delegated =
            authorise_certificate(&mut login.credentials, &live.config.naming, live.delegations(self.listener));
        let login = &*login;
        let names = live.config.naming.names(login.credentials.mailbox_user());
        let name_as_sent = || login.credentials.mailbox_user().as_str().into();
        self.routing_name = Some(names.as_ref().map_or_else(|_| name_as_sent(), |names| names.routing.clone()));
        let names = match names {
            Ok(names) => names,
            Err(_) => {
                self.record.attempt(Some(login.credentials.mailbox_user()), login.credentials.mechanism);
                return Some(self.no_such_user(&login.tag, Reason::NameRefused, began).await);
            }
        };
        self.record.attempt(Some(&names.log), login.credentials.mechanism);
        let users = counted_users(&live.config.naming, &login.credentials);
        if let Some(limited) = self.may_try(&login.tag, &users) {
            return Some(limited);
        }
        // Before any lookup, so that the answer is the same whether the mailbox exists.
        if delegated.is_err() {
            return Some(self.not_authorised(&login.tag));
        }
        if has_separator(&live, &login.credentials) {
            return Some(self.no_such_user(&login.tag, Reason::NameRefused, began).await);
        }
        if login.credentials.has_empty_password() && !live.backends.any_allows_empty_passwords() {
            return Some(self.empty_password(&login.tag, None, began).await);
        }
        self.registered_attempt(login, &names, stream, prelogin, began).await
    }

    /// Registers the login and routes it, again when a move or a drained server has made the first answer out of date.
    async fn registered_attempt(
        &mut self,
        login: &LoginRequest,
        names: &Names,
        stream: &mut Stream,
        prelogin: &mut Prelogin,
        began: Instant,
    ) -> Option<Attempted> {
        let sessions = self.live.sessions.clone();
        let due = time::Instant::now() + self.live.limits.server_login;
        let guest = Guest {
            user: names.routing.clone(),
            client: self.peer.ip().to_canonical(),
            session: self.record.session().bytes(),
        };
        let mut held = names.routing.clone();
        let mut ended_by = Why::Moved;
        let mut progress = Progress::default();
        let mut routings = 0;
        while routings < MAX_ROUTINGS && time::Instant::now() < due {
            // A user who is being moved comes in when that is done.
            let released = sessions.changed(|sessions| !sessions.is_held(&names.routing) && !sessions.is_held(&held));
            if timeout_at(due, released).await.is_err() {
                break;
            }
            let since = sessions.generation();
            let Ok(seat) = sessions.take(guest.clone()) else { continue };
            let call = seat.call().clone();
            let registered = Registered { seat, since };
            let routed = tokio::select! {
                biased;
                why = call.told() => Err(why),
                routed = self.routed_attempt(login, names, registered, stream, prelogin, began, &mut progress) => Ok(routed?),
            };
            routings += 1;
            match routed {
                Ok(Ok(attempted)) => return Some(attempted),
                Ok(Err(NoSeat::Held(name))) => held = name,
                Ok(Err(NoSeat::Outdated)) => {}
                Err(why) => {
                    ended_by = why;
                    if progress.in_exchange {
                        self.record.attempt_failed(reason(why), LoginOutcome::Unavailable, None);
                        return Some(Attempted::Dismissed { reply: reply::ended(&login.tag) });
                    }
                    if matches!(why, Why::Kicked | Why::Stopped) {
                        break;
                    }
                }
            }
        }
        self.record.attempt_failed(reason(ended_by), LoginOutcome::Unavailable, None);
        Some(Attempted::Unavailable)
    }

    /// Asks the policy service once, then the routes, and logs in where they say. An error: the login must be routed again.
    #[expect(clippy::too_many_arguments, reason = "it is the middle of one story, and keeps nothing")]
    async fn routed_attempt(
        &mut self,
        login: &LoginRequest,
        names: &Names,
        registered: Registered,
        stream: &mut Stream,
        prelogin: &mut Prelogin,
        began: Instant,
        progress: &mut Progress,
    ) -> Option<Result<Attempted, NoSeat>> {
        let client_id = prelogin.client_id().clone();
        if !progress.is_allowed {
            if let Some(refused) = self.policy_refuses(login, &client_id, began).await {
                return Some(Ok(refused));
            }
            progress.is_allowed = true;
        }
        if client_id.ttl() == Some(0) {
            self.record.attempt_failed(Reason::ProxyLoop, LoginOutcome::Unavailable, None);
            return Some(Ok(Attempted::Unavailable));
        }
        self.up_to_date();
        let live = self.live.clone();
        // Before anybody is looked up: the answer shall be the same whether the mailbox exists.
        let may_ask = live.allows_masters_from(self.peer.ip()) && live.backends.any_allows_authzid();
        if login.credentials.authzid.is_some() && !may_ask {
            return Some(Ok(self.not_authorised(&login.tag)));
        }
        let question = self.question(names, login, stream);
        let lookup = live.router.route(&question, &live.metrics);
        let target = match Deadline::after(live.limits.lookup).limit(lookup).await {
            Ok(Ok(Routed { target, route })) => {
                let backend = match &*target {
                    Target::Place(place) => Some(&live.backends.backend(place.backend).name),
                    Target::Refuse(_) | Target::Denied(_) | Target::Maintenance(_) | Target::PasswordNeeded => None,
                };
                self.record.routed(route, backend, began.elapsed());
                target
            }
            Ok(Err(RouteError::Unknown)) => {
                return Some(Ok(self.no_such_user(&login.tag, Reason::UnknownUser, began).await));
            }
            Ok(Err(error)) => return Some(Ok(self.lookup_failed(&error.to_string()))),
            Err(_) => return Some(Ok(self.lookup_failed("no answer within limits.lookup"))),
        };
        // Its copy of the credentials is not needed any more.
        drop(question);
        let Target::Place(place) = &*target else { return Some(Ok(self.verdict(&login.tag, &target).await)) };
        let backend = live.backends.backend(place.backend);
        if login.credentials.authzid.is_some() && !backend.allows_authzid {
            // Others allow it: those who are asked for there, and those who do not exist, get one answer.
            let refused = self.refused_late(&login.tag, began).await;
            self.record.attempt_failed(Reason::AuthzidRefused, LoginOutcome::Refused, Some(backend.id));
            return Some(Ok(refused));
        }
        if login.credentials.has_empty_password() && !backend.allows_empty_passwords() {
            return Some(Ok(self.empty_password(&login.tag, Some(backend.id), began).await));
        }
        let renamed = renamed(&login.credentials, place, names);
        let server_login = server_login(&login.credentials, place, names, backend, renamed.as_ref());
        let Some(server_login) = server_login else {
            self.record.attempt_failed(Reason::MechanismUnsupported, LoginOutcome::Unavailable, Some(backend.id));
            return Some(Ok(Attempted::Unavailable));
        };
        let session_id = self.record.session();
        let tls = self.record.tls().cloned();
        let request = Request {
            login: Some(server_login),
            mechanism: Some(login.credentials.mechanism),
            purpose: Purpose::Session,
            tag: &login.tag,
            client_id: &client_id,
            client: self.peer,
            listener: self.local,
            tls: tls.as_ref(),
            session_id: session_id.as_str(),
            limits: &live.limits,
            deadline: Some(time::Instant::now() + live.limits.server_login),
        };
        let (mailbox, Registered { seat, since }) = (place.mailbox(&names.routing), registered);
        let desk = self.desk.clone();
        let placing = Placing { live: &live, desk, seat: &seat, since, mailbox, request: &request };
        let (mut outcome, mut placed) = match placing.log_in_somewhere(place).await {
            Ok(answered) => answered,
            Err(again) => return Some(Err(again)),
        };
        let mut is_token_refused = false;
        while let Outcome::Challenged(paused, challenge) = outcome {
            let Some(placed) = &mut placed else { return Some(Ok(Attempted::Unavailable)) };
            placing.asks_client(placed, &challenge, progress.in_exchange);
            progress.in_exchange = true;
            if sasl::is_token_refusal(login.credentials.mechanism, &challenge) && !is_token_refused {
                is_token_refused = true;
                self.record.refused(backend.id, Some(&placed.server.name));
                self.token_refused(&login.credentials, began).await;
            }
            let response = tokio::select! {
                biased;
                response = self.ask(&login.tag, &challenge, stream, prelogin) => match response {
                    Some(response) => response,
                    None => {
                        self.record.abandoned(Some(backend.id));
                        return None;
                    }
                },
                () = placed.slot.displaced() => {
                    self.record.attempt_failed(Reason::ServersFull, LoginOutcome::Unavailable, Some(backend.id));
                    return Some(Ok(Attempted::Dismissed { reply: reply::ended(&login.tag) }));
                }
            };
            outcome = placing.respond(paused, placed, &response).await;
        }
        if is_token_refused && !matches!(outcome, Outcome::Accepted(_)) {
            return Some(Ok(Attempted::TokenRefused { reply: reply_to_refused_token(outcome, &login.tag) }));
        }
        if matches!(outcome, Outcome::Accepted(_))
            && let users = counted_users(&live.config.naming, &login.credentials)
            && let Some(limited) = self.may_have_one_more(&login.tag, &users, &names.routing, backend.id)
        {
            return Some(Ok(limited));
        }
        let seated = placed.map(|Placed { backend, server, slot }| Seated { backend, server, slot, seat });
        Some(Ok(self.answered(outcome, seated, backend, began)))
    }

    fn answered(
        &mut self,
        outcome: Outcome<'_>,
        answered: Option<Seated>,
        routed: &Backend,
        began: Instant,
    ) -> Attempted {
        let took = began.elapsed();
        match (outcome, answered) {
            (Outcome::Accepted(established), Some(seated)) => {
                self.live.metrics.backend(seated.backend.id.0).logged_in(took);
                self.record.accepted(&seated.backend, &seated.server.name, &established, took);
                Attempted::Accepted { seated, established: Box::new(established) }
            }
            (Outcome::Refused { reply, counts }, answered) => {
                // A client takes its turns in a relayed mechanism as slowly as it likes.
                if counts && !self.record.last_attempt().0.is_some_and(Mechanism::is_relayed) {
                    self.live.refusals.add(&routed.name, took);
                    if let (Some(user), Some(answer)) = (&self.routing_name, reply::without_tag(&reply)) {
                        self.live.refusals.observe_answer(&routed.name, user, answer);
                    }
                }
                self.record.refused(routed.id, answered.as_ref().map(|answered| &answered.server.name));
                Attempted::Refused { reply, counts }
            }
            // Not followed: the client may know better.
            (Outcome::Referred(referral), answered) => {
                self.record.refused(routed.id, answered.as_ref().map(|answered| &answered.server.name));
                Attempted::Refused { reply: referral.reply, counts: false }
            }
            (Outcome::Unavailable(fault), _) => {
                let is_limit = fault.reason == Reason::UserLimit;
                let outcome = if is_limit { LoginOutcome::Limited } else { LoginOutcome::Unavailable };
                self.record.detail(fault.detail);
                self.record.attempt_failed(fault.reason, outcome, Some(routed.id));
                match fault.reply {
                    Some(reply) => Attempted::Refused { reply, counts: false },
                    None => Attempted::Unavailable,
                }
            }
            // A server is named with every acceptance, challenges are answered before, and none is only looked at.
            (Outcome::Accepted(_) | Outcome::Challenged(..) | Outcome::Seen(_), _) => Attempted::Unavailable,
        }
    }

    /// Passes a server's challenge to the client, and brings back what it says.
    async fn ask(
        &mut self,
        tag: &Tag,
        challenge: &[u8],
        stream: &mut Stream,
        prelogin: &mut Prelogin,
    ) -> Option<Zeroizing<Vec<u8>>> {
        let mut out = Vec::new();
        prelogin.challenge(tag, challenge, &mut out);
        // A login that waits for its client has no complete credentials, and may be shed.
        self.login_under_way(None);
        loop {
            self.send(stream, &mut out).await?;
            match prelogin.step(&mut out) {
                // The drain and shedding end the whole attempt.
                Step::NeedInput => {
                    if let Err(unread) = self.read(stream, prelogin).await {
                        return self.not_read(unread, stream, prelogin).await;
                    }
                }
                Step::Send => {}
                Step::Response(response) => {
                    if self.holds_for_login(response.len()).is_err() {
                        return self.farewell(stream, prelogin, (Bye::Memory, Reason::ShedForMemory)).await;
                    }
                    self.login_under_way(Some(Instant::now()));
                    return Some(response);
                }
                Step::Close(reason) => {
                    self.send(stream, &mut out).await?;
                    self.closed(reason);
                    close(stream).await;
                    return None;
                }
                // A response is waited for, and nothing else is read.
                Step::Login(_) | Step::InvalidLogin(_) | Step::StartTls => return None,
            }
        }
    }

    fn question(&self, names: &Names, login: &LoginRequest, stream: &Stream) -> Question {
        let asks_certificate = || self.live.tls.as_ref().is_some_and(|tls| tls.asks_certificate(self.listener));
        let visitor = self.live.router.wants_visitor().then(|| {
            Arc::new(Visitor {
                client: self.peer,
                listener: self.local,
                is_proxied: self.is_proxied,
                session: self.record.session().as_str().into(),
                tls: self.record.tls().map(|tls| VisitorTls {
                    version: tls.version.as_str(),
                    cipher: stream.cipher(),
                    asks_certificate: asks_certificate(),
                    certificate: stream.peer_certificate().map(Into::into),
                }),
                attempt: self.record.attempts(),
                credentials: login.credentials.clone(),
            })
        });
        Question { user: names.routing.clone(), visitor }
    }

    async fn no_such_user(&mut self, tag: &Tag, reason: Reason, began: Instant) -> Attempted {
        let refused = self.refused_late(tag, began).await;
        // After the wait, which may end with the attempt: it is counted once.
        self.record.attempt_failed(reason, LoginOutcome::UnknownUser, None);
        refused
    }

    /// The client may not open the mailbox it asked for.
    fn not_authorised(&mut self, tag: &Tag) -> Attempted {
        self.record.attempt_failed(Reason::AuthzidRefused, LoginOutcome::Refused, None);
        Attempted::Refused { reply: reply::authorization_failed(tag), counts: true }
    }

    /// Refuses a login with an empty password without asking a server, as late as if one had been asked.
    async fn empty_password(&mut self, tag: &Tag, backend: Option<BackendId>, began: Instant) -> Attempted {
        let refused = self.refused_late(tag, began).await;
        self.record.attempt_failed(Reason::EmptyPassword, LoginOutcome::Refused, backend);
        refused
    }

    /// Refuses the login after a sampled server latency and in a server's words, so that neither the response time nor the
    /// text reveals whether the user exists.
    pub(super) async fn refused_late(&mut self, tag: &Tag, began: Instant) -> Attempted {
        let user = self.routing_name.as_deref().unwrap_or_default();
        let late = self.live.refusals.draw(user, pace::random());
        time::sleep(late.saturating_sub(began.elapsed())).await;
        let user = self.routing_name.as_deref().unwrap_or_default();
        let reply = match self.live.refusals.answer(user) {
            Some(answer) => reply::with_tag(tag, &answer),
            None => reply::authentication_failed(tag, None),
        };
        Attempted::Refused { reply, counts: true }
    }

    /// The route's own word, instead of a server's.
    async fn verdict(&mut self, tag: &Tag, target: &Target) -> Attempted {
        match target {
            Target::Refuse(text) => {
                self.record.attempt_failed(Reason::RouteRefused, LoginOutcome::Refused, None);
                Attempted::Refused { reply: reply::contact_admin(tag, text), counts: false }
            }
            Target::Denied(denied) => {
                time::sleep(denied.wait).await;
                self.record.denied();
                let reply = reply::authentication_failed(tag, denied.text.as_deref());
                match denied.closes {
                    true => Attempted::Dismissed { reply: reply::dismissed(reply) },
                    false => Attempted::Refused { reply, counts: true },
                }
            }
            Target::Maintenance(text) => {
                self.record.attempt_failed(Reason::RouteMaintenance, LoginOutcome::Unavailable, None);
                Attempted::Refused { reply: reply::maintenance(tag, text), counts: false }
            }
            Target::PasswordNeeded => {
                self.record
                    .detail("the route decides by the client's password, and this mechanism carries none".to_owned());
                self.record.attempt_failed(Reason::MechanismUnsupported, LoginOutcome::Unavailable, None);
                Attempted::Unavailable
            }
            Target::Place(_) => Attempted::Unavailable,
        }
    }

    fn lookup_failed(&mut self, error: &str) -> Attempted {
        let error = bounded(error.to_owned());
        tracing::warn!(session = self.record.session().as_str(), %error, "route lookup failed");
        self.record.detail(error);
        self.record.attempt_failed(Reason::LookupFailed, LoginOutcome::Unavailable, None);
        Attempted::Unavailable
    }
}

/// `alice*admin` asks for alice's mailbox with admin's password, as PLAIN can say too.
fn split_master(live: &Live, credentials: &mut Credentials) {
    if credentials.authzid.is_none()
        && matches!(credentials.proof, Proof::Password(_))
        && let Some((mailbox, master)) = live.config.naming.split_master(&credentials.user)
    {
        credentials.authzid = Some(mailbox);
        credentials.user = master;
    }
}

/// Whether a name has a separator although it was, or cannot be, taken apart: a server that takes it apart could open another mailbox
/// than the one that is routed by, or check another master user's password than the one that is counted for.
fn has_separator(live: &Live, credentials: &Credentials) -> bool {
    let mut names = std::iter::once(&credentials.user).chain(&credentials.authzid);
    names.any(|name| live.config.naming.has_separator(name))
}

/// A token's message under the name the user has there, where that is another.
fn renamed(credentials: &Credentials, place: &Place, names: &Names) -> Option<Secret> {
    let Proof::Message(message) = &credentials.proof else { return None };
    let there = place.user.as_ref().unwrap_or(&names.server);
    if there == &credentials.user { None } else { sasl::renamed(credentials.mechanism, message, there) }
}

/// What the server is logged in with. `None`: there is nothing that would show it who it is.
fn server_login<'a>(
    credentials: &'a Credentials,
    place: &'a Place,
    names: &'a Names,
    backend: &'a Backend,
    renamed: Option<&'a Secret>,
) -> Option<ServerLogin<'a>> {
    let mailbox = place.user.as_ref().unwrap_or(&names.server);
    let on_behalf = |master: Option<&'a UserName>, password: &'a Secret| {
        ServerLogin::Password(PasswordLogin {
            user: master.unwrap_or(mailbox),
            authzid: master.is_some().then_some(mailbox),
            password,
        })
    };
    // Credentials that a route hands out would open the mailbox to any password if nothing had verified the client's. A
    // verified client is verified under its own name: whether it may act for another is the server's decision.
    let is_verified = place.identity.is_confirmed() || matches!(credentials.proof, Proof::Certificate);
    if let Some(login) = place.login.as_ref().filter(|_| is_verified && credentials.authzid.is_none()) {
        return Some(on_behalf(login.master.as_ref(), &login.password));
    }
    match &credentials.proof {
        Proof::Password(password) => Some(ServerLogin::Password(PasswordLogin {
            user: if credentials.authzid.is_some() { &credentials.user } else { mailbox },
            authzid: credentials.authzid.is_some().then_some(mailbox),
            password,
        })),
        Proof::Message(first) => {
            // SCRAM proves a password for one name: under another it would prove nothing.
            let first = match (renamed, &place.user) {
                (Some(renamed), _) => renamed,
                (None, Some(user)) if *user != credentials.user => return None,
                (None, _) => first,
            };
            Some(ServerLogin::Relayed { mechanism: credentials.mechanism, first })
        }
        Proof::Certificate => backend.login.as_ref().map(|own| on_behalf(own.master.as_ref(), &own.password)),
    }
}
