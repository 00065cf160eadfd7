//! Steps 4 to 6 of a session, for one login command: who is it, where does the mailbox lie, and will a server have it.
//!
//! Nothing of an attempt outlives it but its answer and what the record keeps. Called by `session`.

use std::future::poll_fn;
use std::sync::Arc;
use std::time::Instant;

use tokio::time::{self, timeout, timeout_at};
use zeroize::Zeroizing;

use super::defence::counted_users;
use super::record::reason;
use super::{Session, close, pace};
use crate::backend::connect::{self, Established, Fault, Outcome, Purpose, Request};
use crate::backend::{Backend, Server, Slot, Stop, Tour};
use crate::failure::Reason;
use crate::identity::{
    Credentials, Mechanism, Names, PasswordLogin, Proof, Secret, ServerLogin, UserName, authorise_certificate,
};
use crate::imap::prelogin::{LoginRequest, Prelogin, Step};
use crate::imap::tag::Tag;
use crate::imap::{reply, sasl};
use crate::metrics::LoginOutcome;
use crate::route::{Place, Question, RouteError, Routed, Target, Visitor, VisitorTls};
use crate::server::Live;
use crate::sessions::{Guest, NoSeat, Seat, Why};
use crate::stream::Stream;

/// A user may be sent on this often.
const MAX_REFERRALS: usize = 2;

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

/// How the servers tried have answered, and the one that did.
type Answered<'a> = (Outcome<'a>, Option<Seated>);

/// The user is being moved: wait, and route again.
struct Held;

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
        let client_id = prelogin.client_id().clone();
        if let Some(refused) = self.policy_refuses(login, &client_id, began).await {
            return Some(refused);
        }
        if client_id.ttl() == Some(0) {
            self.record.attempt_failed(Reason::ProxyLoop, LoginOutcome::Unavailable, None);
            return Some(Attempted::Unavailable);
        }
        let due = time::Instant::now() + live.limits.server_login;
        loop {
            // A user who is being moved comes in when that is done.
            let free = live.sessions.changed(|sessions| !sessions.is_held(&names.routing));
            if timeout_at(due, free).await.is_err() {
                self.record.attempt_failed(Reason::Moved, LoginOutcome::Unavailable, None);
                return Some(Attempted::Unavailable);
            }
            if let Ok(attempted) = self.routed_attempt(login, &names, stream, prelogin, began).await? {
                return Some(attempted);
            }
        }
    }

    /// One look at the routes and what follows from it.
    async fn routed_attempt(
        &mut self,
        login: &LoginRequest,
        names: &Names,
        stream: &mut Stream,
        prelogin: &mut Prelogin,
        began: Instant,
    ) -> Option<Result<Attempted, Held>> {
        self.up_to_date();
        let live = self.live.clone();
        // Before anybody is looked up: the answer shall be the same whether the mailbox exists.
        let may_ask = live.allows_masters_from(self.peer.ip()) && live.backends.any_allows_authzid();
        if login.credentials.authzid.is_some() && !may_ask {
            return Some(Ok(self.not_authorised(&login.tag)));
        }
        let question = self.question(names, login, stream);
        let target = match timeout(live.limits.lookup, live.router.route(&question, &live.metrics)).await {
            Ok(Ok(Routed { target, route })) => {
                let backend = match &*target {
                    Target::Place(place) => Some(&live.backends.backend(place.backend).name),
                    Target::Refuse(_) | Target::Denied(_) | Target::Maintenance(_) => None,
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
        let Target::Place(place) = &*target else { return Some(Ok(self.verdict(&login.tag, &target).await)) };
        let backend = live.backends.backend(place.backend);
        if login.credentials.authzid.is_some() && !backend.allows_authzid {
            // Others allow it: those who are asked for there, and those who do not exist, get one answer.
            self.record.attempt_failed(Reason::AuthzidRefused, LoginOutcome::Refused, Some(backend.id));
            return Some(Ok(self.refused_late(&login.tag, began).await));
        }
        let renamed = renamed(&login.credentials, place, names);
        let server_login = server_login(&login.credentials, place, names, backend, renamed.as_ref());
        let Some(server_login) = server_login else {
            self.record.attempt_failed(Reason::MechanismUnsupported, LoginOutcome::Unavailable, Some(backend.id));
            return Some(Ok(Attempted::Unavailable));
        };
        let (client_id, session_id) = (prelogin.client_id().clone(), self.record.session());
        let tls = self.record.tls().cloned();
        let request = Request {
            login: Some(server_login),
            purpose: Purpose::Session,
            tag: &login.tag,
            client_id: &client_id,
            client: self.peer,
            listener: self.local,
            tls: tls.as_ref(),
            session_id: session_id.as_str(),
            limits: &live.limits,
        };
        let guest = Guest {
            user: place.mailbox(&names.routing),
            client: self.peer.ip().to_canonical(),
            session: session_id.bytes(),
        };
        let (mut outcome, answered) = match log_in_somewhere(&live, place, guest, &request).await {
            Ok(answered) => answered,
            Err(Held) => return Some(Err(Held)),
        };
        while let Outcome::Challenged(paused, challenge) = outcome {
            let response = self.ask(&login.tag, &challenge, stream, prelogin).await?;
            if let Some(why) = answered.as_ref().and_then(|answered| answered.seat.call().why()) {
                outcome = Outcome::Unavailable(told(why));
                break;
            }
            outcome = paused.respond(&response, time::Instant::now() + live.limits.server_login).await;
            if let Outcome::Unavailable(fault) = &outcome {
                live.metrics.failure(fault.reason);
            }
        }
        if matches!(outcome, Outcome::Accepted(_))
            && let users = counted_users(&live.config.naming, &login.credentials)
            && let Some(limited) = self.may_have_one_more(&login.tag, &users, &names.routing, backend.id)
        {
            return Some(Ok(limited));
        }
        Some(Ok(self.answered(outcome, answered, backend, began)))
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
                self.record.detail(fault.detail);
                self.record.attempt_failed(fault.reason, LoginOutcome::Unavailable, Some(routed.id));
                Attempted::Unavailable
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
        loop {
            self.send(stream, &mut out).await?;
            match prelogin.step(&mut out) {
                Step::NeedInput => self.receive(stream, prelogin).await?,
                Step::Response(response) => return Some(response),
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
        self.record.attempt_failed(reason, LoginOutcome::UnknownUser, None);
        self.refused_late(tag, began).await
    }

    /// The client may not open the mailbox it asked for.
    fn not_authorised(&mut self, tag: &Tag) -> Attempted {
        self.record.attempt_failed(Reason::AuthzidRefused, LoginOutcome::Refused, None);
        Attempted::Refused { reply: reply::authorization_failed(tag), counts: true }
    }

    /// Refuses the login after a sampled server latency, so that the response time does not reveal whether the user exists.
    pub(super) async fn refused_late(&mut self, tag: &Tag, began: Instant) -> Attempted {
        let user = self.routing_name.as_deref().unwrap_or_default();
        let late = self.live.refusals.draw(user, pace::random());
        time::sleep(late.saturating_sub(began.elapsed())).await;
        Attempted::Refused { reply: reply::authentication_failed(tag, None), counts: true }
    }

    /// The route's own word, instead of a server's.
    async fn verdict(&mut self, tag: &Tag, target: &Target) -> Attempted {
        match target {
            Target::Refuse(text) => {
                self.record.attempt_failed(Reason::RouteRefused, LoginOutcome::Refused, None);
                Attempted::Refused { reply: reply::contact_admin(tag, text), counts: false }
            }
            Target::Denied(denied) => {
                self.record.denied();
                time::sleep(denied.wait).await;
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
            Target::Place(_) => Attempted::Unavailable,
        }
    }

    fn lookup_failed(&mut self, error: &str) -> Attempted {
        tracing::warn!(session = self.record.session().as_str(), %error, "route lookup failed");
        self.record.detail(error.to_owned());
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
    let is_proven = place.proven || matches!(credentials.proof, Proof::Certificate);
    // What a route hands out to somebody who has shown nothing would open every mailbox to every password.
    if let Some(login) = place.login.as_ref().filter(|_| is_proven) {
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

/// Step 5: the user's servers in order, until one gives an answer that counts for all of them; and where it sends the
/// user, if that is a declared server.
async fn log_in_somewhere<'a>(
    live: &'a Live,
    place: &Place,
    guest: Guest,
    request: &'a Request<'a>,
) -> Result<Answered<'a>, Held> {
    let deadline = time::Instant::now() + live.limits.server_login;
    let known_by = deadline.min(time::Instant::now() + live.limits.connect);
    let backend = live.backends.backend(place.backend);
    let servers = timeout_at(known_by, live.servers(place, &guest.user)).await.unwrap_or_default();
    let mut tour = Tour::new(backend, servers);
    let mut outcome = Outcome::Unavailable(Fault::no_server());
    loop {
        let (server, slot) = match tour.next(deadline).await {
            Stop::At(server, slot) => (server, slot),
            Stop::Full => return Ok((Outcome::Unavailable(Fault::full()), None)),
            Stop::End => return Ok((outcome, None)),
        };
        let now = time::Instant::now();
        // While there is another server, one that hangs gets half of what is left.
        let due = if tour.has_more() { now + deadline.saturating_duration_since(now) / 2 } else { deadline };
        let (answer, seated) = log_in_at(live, backend, (server.clone(), slot), &guest, request, due).await?;
        outcome = answer;
        match &outcome {
            Outcome::Unavailable(fault) => {
                report(live, &server, request, fault);
                if !fault.try_next || time::Instant::now() >= deadline {
                    return Ok((outcome, None));
                }
            }
            Outcome::Referred(_) => return follow(live, outcome, seated, guest, request, deadline).await,
            _ => return Ok((outcome, seated)),
        }
    }
}

/// Step 6, in a place of the user's on that server: where its users must be served by one server at a time, their sessions
/// on others end first.
async fn log_in_at<'a>(
    live: &'a Live,
    backend: &'a Arc<Backend>,
    (server, slot): (Arc<Server>, Slot),
    guest: &Guest,
    request: &'a Request<'a>,
    due: time::Instant,
) -> Result<Answered<'a>, Held> {
    let mut taken = Err(NoSeat::Elsewhere);
    let alone = backend.serves_a_user_by_one_server();
    let tried = live.sessions.changed(|_| {
        taken = live.sessions.take(guest.clone(), &server, alone);
        !matches!(taken, Err(NoSeat::Elsewhere))
    });
    // Whatever the result, `taken` says what there is.
    let _ = timeout_at(due, tried).await;
    let seat = match taken {
        Ok(seat) => seat,
        Err(NoSeat::Held) => return Err(Held),
        Err(NoSeat::Elsewhere) => {
            let detail = "the user's sessions on another server of the backend do not end".to_owned();
            return Ok((Outcome::Unavailable(Fault::told(Reason::Moved, detail, false)), None));
        }
    };
    let outcome = tokio::select! {
        biased;
        why = poll_fn(|context| seat.call().poll(context)) => Outcome::Unavailable(told(why)),
        outcome = connect::login(backend, &server, request, due) => outcome,
    };
    Ok((outcome, Some(Seated { backend: backend.clone(), server, slot, seat })))
}

/// A login that was told to end like the sessions it would have become one of.
fn told(why: Why) -> Fault {
    let elsewhere = matches!(why, Why::Moved | Why::Drained);
    Fault::told(reason(why), "the operator, or a login of this user elsewhere, ended it".to_owned(), elsewhere)
}

/// To where a server sends the user, as far as its backend allows.
async fn follow<'a>(
    live: &'a Live,
    mut outcome: Outcome<'a>,
    mut seated: Option<Seated>,
    guest: Guest,
    request: &'a Request<'a>,
    deadline: time::Instant,
) -> Result<Answered<'a>, Held> {
    let mut visited = Vec::new();
    while let (Outcome::Referred(referral), Some(at)) = (&outcome, &seated) {
        visited.push(at.server.name.clone());
        if !at.backend.follows_referrals {
            break;
        }
        let place = format!("{}:{}", referral.host, referral.port);
        let next = live.backends.find(&referral.host, referral.port);
        let fault = match next {
            None => Fault::referral(format!("{} refers to {place}, which is no declared server", at.server.name)),
            Some((_, next)) if visited.contains(&next.name) || visited.len() > MAX_REFERRALS => {
                Fault::referral(format!("referrals go in a circle: {} refers to {place}", at.server.name))
            }
            Some((backend, next)) => match Tour::new(backend, vec![next]).next(deadline).await {
                Stop::At(server, slot) => {
                    // The user is not served there, and shall not count as if.
                    drop(seated.take());
                    let at = (server.clone(), slot);
                    (outcome, seated) = log_in_at(live, backend, at, &guest, request, deadline).await?;
                    if let Outcome::Unavailable(fault) = &outcome {
                        report(live, &server, request, fault);
                    }
                    continue;
                }
                Stop::Full => return Ok((Outcome::Unavailable(Fault::full()), None)),
                Stop::End => Fault::referral(format!("{} refers to {place}, which gets no logins now", at.server.name)),
            },
        };
        report(live, &at.server, request, &fault);
        return Ok((Outcome::Unavailable(fault), None));
    }
    Ok((outcome, seated))
}

fn report(live: &Live, server: &Server, request: &Request<'_>, fault: &Fault) {
    tracing::info!(session = request.session_id, server = %server.name, reason = fault.reason.as_str(), detail = %fault.detail, "server could not take the login");
    live.metrics.failure(fault.reason);
}
