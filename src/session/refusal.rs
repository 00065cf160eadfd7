//! Logins that are refused without asking a server.

use std::time::Instant;

use super::Session;
use super::attempt::Attempted;
use super::log_record::bounded;
use crate::admission::refusal_latency;
use crate::backend::Backend;
use crate::failure::Reason;
use crate::metrics::LoginOutcome;
use crate::protocol::imap::prelogin::InvalidLogin;
use crate::protocol::imap::refusal::RefusalKind;
use crate::protocol::imap::reply;
use crate::protocol::imap::tag::Tag;
use crate::route::{NextAttempt, RouteDecision};

impl Session {
    /// No route knows the user, or the name cannot be one.
    pub(super) fn no_such_user(&mut self, tag: &Tag, reason: Reason, began: Instant) -> Attempted {
        self.record.attempt_failed(reason, LoginOutcome::UnknownUser, None);
        self.refused_late(tag, None, began)
    }

    /// The client may not open the mailbox it asked for.
    pub(super) fn not_authorised(&mut self, tag: &Tag) -> Attempted {
        self.record.attempt_failed(Reason::AuthzidRefused, LoginOutcome::Refused, None);
        Attempted::Refused { reply: reply::authorization_failed(tag), kind: RefusalKind::FailedLogin, not_before: None }
    }

    /// Refuses a login with an empty password without asking a server, as late as if one had been asked.
    pub(super) fn empty_password(&mut self, tag: &Tag, backend: Option<&Backend>, began: Instant) -> Attempted {
        self.record.attempt_failed(Reason::EmptyPassword, LoginOutcome::Refused, backend.map(|backend| backend.id));
        self.refused_late(tag, backend, began)
    }

    /// Refuses the login after a sampled server latency and in a server's words, so that neither the response time nor the
    /// text reveals whether the user exists. `routed`: the backend that the route named, if one was asked.
    pub(super) fn refused_late(&self, tag: &Tag, routed: Option<&Backend>, began: Instant) -> Attempted {
        let user = self.routing_name.as_deref().unwrap_or_default();
        let routed = routed.map(|backend| &*backend.name);
        let not_before = Some(began + self.snapshot.refusal_latency.draw(routed, user, refusal_latency::random()));
        let reply = match self.snapshot.refusal_latency.answer(routed, user) {
            Some(answer) => reply::with_tag(tag, &answer),
            None => reply::authentication_failed(tag, None),
        };
        Attempted::Refused { reply, kind: RefusalKind::FailedLogin, not_before }
    }

    /// The route's answer if it names no server.
    pub(super) fn verdict(&mut self, tag: &Tag, target: &RouteDecision) -> Attempted {
        match target {
            RouteDecision::Refuse(text) => {
                self.record.attempt_failed(Reason::RouteRefused, LoginOutcome::Refused, None);
                Attempted::Refused {
                    reply: reply::contact_admin(tag, text),
                    kind: RefusalKind::NotCounted,
                    not_before: None,
                }
            }
            RouteDecision::WrongPassword(denied) => {
                self.record.denied();
                let reply = reply::authentication_failed(tag, denied.text.as_deref());
                match denied.next_attempt {
                    NextAttempt::OnNewConnection => {
                        Attempted::Dismissed { reply: reply::refusal_with_bye(reply), kind: RefusalKind::FailedLogin }
                    }
                    NextAttempt::After(delay) => Attempted::Refused {
                        reply,
                        kind: RefusalKind::FailedLogin,
                        not_before: Some(Instant::now() + delay),
                    },
                }
            }
            RouteDecision::Maintenance(text) => {
                self.record.attempt_failed(Reason::RouteMaintenance, LoginOutcome::Unavailable, None);
                Attempted::Refused {
                    reply: reply::maintenance(tag, text),
                    kind: RefusalKind::NotCounted,
                    not_before: None,
                }
            }
            RouteDecision::PasswordNeeded => {
                self.record
                    .detail("the route decides by the client's password, and this mechanism carries none".to_owned());
                self.record.attempt_failed(Reason::MechanismUnsupported, LoginOutcome::Unavailable, None);
                Attempted::Unavailable
            }
            RouteDecision::Destination(_) => Attempted::Unavailable,
        }
    }

    pub(super) fn lookup_failed(&mut self, error: &str) -> Attempted {
        let error = bounded(error.to_owned());
        tracing::warn!(session = self.record.session().as_str(), %error, "route lookup failed");
        self.record.detail(error);
        self.record.attempt_failed(Reason::LookupFailed, LoginOutcome::Unavailable, None);
        Attempted::Unavailable
    }

    /// Refuses the login late and counts it as a failed one, for the client's address alone: there is no user it could count for.
    /// Returns the reply.
    pub(super) async fn refuse_invalid(&mut self, login: InvalidLogin, began: Instant) -> Vec<u8> {
        self.routing_name = None;
        self.record.attempt(None, login.mechanism);
        if let Some(Attempted::Limited { reply }) = self.may_try(&login.tag, &[]) {
            return reply;
        }
        self.record.detail(login.fault.to_string());
        self.record.attempt_failed(Reason::InvalidCredentials, LoginOutcome::Refused, None);
        let Attempted::Refused { reply, not_before, .. } = self.refused_late(&login.tag, None, began) else {
            return Vec::new();
        };
        self.failed_login(&[], None, began, not_before).await;
        reply
    }
}
