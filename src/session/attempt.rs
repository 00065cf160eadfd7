//! Steps 3 to 5 of a session, for one login command: who is it, where does the mailbox lie, and will a server have it.
//!
//! Nothing of an attempt outlives it but its answer and what the record keeps. Called by `session`.

use std::sync::Arc;
use std::time::Instant;

use tokio::time::{self, timeout, timeout_at};
use zeroize::Zeroizing;

use super::{Session, close};
use crate::backend::connect::{self, Established, Outcome, Request};
use crate::backend::{Backend, Server};
use crate::failure::Reason;
use crate::identity::{Credentials, Names, PasswordLogin, Proof, Secret, ServerLogin, UserName};
use crate::imap::prelogin::{LoginRequest, Prelogin, Step};
use crate::imap::tag::Tag;
use crate::imap::{reply, sasl};
use crate::metrics::LoginOutcome;
use crate::route::{Place, Question, RouteError, Routed, Target, Visitor};
use crate::server::Live;
use crate::stream::Stream;

/// A user may be sent on this often.
const MAX_REFERRALS: usize = 2;

/// How a login attempt ended.
pub(super) enum Attempted {
    Accepted {
        backend: Arc<Backend>,
        server: Arc<Server>,
        established: Box<Established>,
    },
    Refused {
        reply: Vec<u8>,
        counts: bool,
    },
    /// By a limit or rate of ours.
    Limited {
        reply: Vec<u8>,
    },
    Unavailable,
}

/// How the servers tried have answered, and the one that did.
type Answered<'a> = (Outcome<'a>, Option<(Arc<Backend>, Arc<Server>)>);

impl Session {
    /// `None`: the session is over.
    pub(super) async fn attempt(
        &mut self,
        login: &mut LoginRequest,
        stream: &mut Stream,
        prelogin: &mut Prelogin,
    ) -> Option<Attempted> {
        let began = Instant::now();
        let live = self.live.clone();
        split_master(&live, &mut login.credentials);
        let login = &*login;
        let names = match live.naming.names(login.credentials.mailbox_user()) {
            Ok(names) => names,
            Err(_) => {
                self.record.attempt(login.credentials.mailbox_user(), login.credentials.mechanism);
                return Some(self.no_such_user(&login.tag, Reason::NameRefused, began).await);
            }
        };
        self.record.attempt(&names.log, login.credentials.mechanism);
        if let Some(limited) = self.may_try(&login.tag, &names.routing) {
            return Some(limited);
        }
        let client_id = prelogin.client_id().clone();
        if let Some(refused) = self.policy_refuses(login, &client_id, began).await {
            return Some(refused);
        }
        if client_id.ttl() == Some(0) {
            self.record.attempt_failed(Reason::ProxyLoop, LoginOutcome::Unavailable, None);
            return Some(Attempted::Unavailable);
        }
        let question = self.question(&names, login);
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
                return Some(self.no_such_user(&login.tag, Reason::UnknownUser, began).await);
            }
            Ok(Err(error)) => return Some(self.lookup_failed(&error.to_string())),
            Err(_) => return Some(self.lookup_failed("no answer within limits.lookup")),
        };
        let Target::Place(place) = &*target else { return Some(self.verdict(&login.tag, &target).await) };
        let backend = live.backends.backend(place.backend);
        if login.credentials.authzid.is_some() && !(backend.allows_authzid && live.allows_masters_from(self.peer.ip()))
        {
            self.record.attempt_failed(Reason::AuthzidRefused, LoginOutcome::Refused, Some(backend.id));
            return Some(Attempted::Refused { reply: reply::authorization_failed(&login.tag), counts: true });
        }
        let renamed = renamed(&login.credentials, place, &names);
        let server_login = server_login(&login.credentials, place, &names, backend, renamed.as_ref());
        let Some(server_login) = server_login else {
            self.record.attempt_failed(Reason::MechanismUnsupported, LoginOutcome::Unavailable, Some(backend.id));
            return Some(Attempted::Unavailable);
        };
        let session_id = self.record.session();
        let tls = self.record.tls().cloned();
        let request = Request {
            login: Some(server_login),
            tag: &login.tag,
            client_id: &client_id,
            client: self.peer,
            listener: self.local,
            tls: tls.as_ref(),
            session_id: session_id.as_str(),
            limits: &live.limits,
        };
        let (mut outcome, answered) = log_in_somewhere(&live, place, &names.routing, &request).await;
        while let Outcome::Challenged(paused, challenge) = outcome {
            let response = self.ask(&login.tag, &challenge, stream, prelogin).await?;
            outcome = paused.respond(&response, time::Instant::now() + live.limits.server_login).await;
            if let Outcome::Unavailable(fault) = &outcome {
                live.metrics.failure(fault.reason);
            }
        }
        if matches!(outcome, Outcome::Accepted(_))
            && let Some(limited) = self.may_have_one_more(&login.tag, &names.routing, backend.id)
        {
            return Some(limited);
        }
        Some(self.answered(outcome, answered, backend, began))
    }

    fn answered(
        &mut self,
        outcome: Outcome<'_>,
        answered: Option<(Arc<Backend>, Arc<Server>)>,
        routed: &Backend,
        began: Instant,
    ) -> Attempted {
        let took = began.elapsed();
        match (outcome, answered) {
            (Outcome::Accepted(established), Some((backend, server))) => {
                self.live.metrics.backend(backend.id.0).logged_in(took);
                self.record.accepted(&backend, &server.name, &established, took);
                Attempted::Accepted { backend, server, established: Box::new(established) }
            }
            (Outcome::Refused { reply, counts }, answered) => {
                if counts {
                    self.live.refusals.add(took);
                }
                self.record.refused(routed.id, answered.as_ref().map(|(_, server)| &server.name));
                Attempted::Refused { reply, counts }
            }
            // Not followed: the client may know better.
            (Outcome::Referred(referral), answered) => {
                self.record.refused(routed.id, answered.as_ref().map(|(_, server)| &server.name));
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
                Step::Login(_) | Step::StartTls => return None,
            }
        }
    }

    fn question(&self, names: &Names, login: &LoginRequest) -> Question {
        let visitor = self.live.router.wants_visitor().then(|| {
            Arc::new(Visitor {
                client: self.peer,
                listener: self.local,
                session: self.record.session().as_str().into(),
                tls: self.record.tls().map(|tls| tls.version),
                attempt: self.record.attempts(),
                credentials: login.credentials.clone(),
            })
        });
        Question { user: names.routing.clone(), visitor }
    }

    /// Says so as late as a server says that a password is wrong: nobody shall learn from the clock who exists.
    async fn no_such_user(&mut self, tag: &Tag, reason: Reason, began: Instant) -> Attempted {
        self.record.attempt_failed(reason, LoginOutcome::UnknownUser, None);
        let late = self.live.refusals.any_of(self.record.session().as_str());
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
                Attempted::Refused { reply: reply::authentication_failed(tag, denied.text.as_deref()), counts: true }
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
        && let Some((mailbox, master)) = live.naming.split_master(&credentials.user)
    {
        credentials.authzid = Some(mailbox);
        credentials.user = master;
    }
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

/// Step 4: the user's servers in order, until one gives an answer that counts for all of them; and where it sends the
/// user, if that is a declared server.
async fn log_in_somewhere<'a>(live: &'a Live, place: &Place, user: &str, request: &'a Request<'a>) -> Answered<'a> {
    let deadline = time::Instant::now() + live.limits.server_login;
    let known_by = deadline.min(time::Instant::now() + live.limits.connect);
    let backend = live.backends.backend(place.backend);
    let servers = timeout_at(known_by, live.servers(place, user)).await.unwrap_or_default();
    let mut outcome = Outcome::Unavailable(connect::Fault::no_server());
    for (tried, server) in servers.iter().enumerate() {
        let now = time::Instant::now();
        // While there is another server, one that hangs gets half of what is left.
        let due = if tried + 1 < servers.len() { now + (deadline - now) / 2 } else { deadline };
        outcome = connect::login(backend, server, request, due).await;
        match &outcome {
            Outcome::Unavailable(fault) => {
                report(live, server, request, fault);
                if !fault.try_next || time::Instant::now() >= deadline {
                    break;
                }
            }
            Outcome::Referred(_) => return follow(live, outcome, backend, server, request, deadline).await,
            _ => return (outcome, Some((backend.clone(), server.clone()))),
        }
    }
    (outcome, None)
}

/// To where a server sends the user, as far as its backend allows.
async fn follow<'a>(
    live: &'a Live,
    mut outcome: Outcome<'a>,
    backend: &'a Arc<Backend>,
    server: &Arc<Server>,
    request: &'a Request<'a>,
    deadline: time::Instant,
) -> Answered<'a> {
    let (mut backend, mut server) = (backend, server.clone());
    let mut visited = vec![server.name.clone()];
    while let Outcome::Referred(referral) = &outcome {
        if !backend.follows_referrals {
            break;
        }
        let place = format!("{}:{}", referral.host, referral.port);
        let next = live.backends.find(&referral.host, referral.port);
        let fault = match next {
            None => connect::Fault::referral(format!("{} refers to {place}, which is no declared server", server.name)),
            Some((_, next)) if visited.contains(&next.name) || visited.len() > MAX_REFERRALS => {
                connect::Fault::referral(format!("referrals go in a circle: {} refers to {place}", server.name))
            }
            Some((next_backend, next)) => {
                (backend, server) = (next_backend, next);
                visited.push(server.name.clone());
                outcome = connect::login(backend, &server, request, deadline).await;
                if let Outcome::Unavailable(fault) = &outcome {
                    report(live, &server, request, fault);
                }
                continue;
            }
        };
        report(live, &server, request, &fault);
        return (Outcome::Unavailable(fault), None);
    }
    (outcome, Some((backend.clone(), server)))
}

fn report(live: &Live, server: &Server, request: &Request<'_>, fault: &connect::Fault) {
    tracing::info!(session = request.session_id, server = %server.name, reason = fault.reason.as_str(), detail = %fault.detail, "server could not take the login");
    live.metrics.failure(fault.reason);
}
