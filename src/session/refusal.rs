//! Logins that are refused without asking a server.

use std::time::Instant;

use super::Session;
use super::attempt_result::{FailedLogin, Interrupt, Refusal};
use super::log_record::bounded;
use crate::admission::refusal_latency;
use crate::backend::Backend;
use crate::failure::Reason;
use crate::metrics::LoginOutcome;
use crate::protocol::imap::prelogin::InvalidLogin;
use crate::protocol::imap::reply;
use crate::protocol::imap::tag::Tag;
use crate::route::{NextAttempt, RouteDecision};

impl Session {
    /// No route knows the user, or the name is invalid.
    pub(super) fn unknown_user(&mut self, tag: &Tag, reason: Reason, began: Instant) -> Refusal {
        self.record.attempt_failed(reason, LoginOutcome::UnknownUser, None);
        self.refused_with_delay(tag, None, began)
    }

    /// The client may not open the mailbox that it asked for.
    pub(super) fn not_authorised(&mut self, tag: &Tag) -> Refusal {
        self.record.attempt_failed(Reason::AuthzidRefused, LoginOutcome::Refused, None);
        Refusal::failed(reply::authorization_failed(tag), None)
    }

    /// The password is empty. The refusal takes as long as that of a server.
    pub(super) fn empty_password(&mut self, tag: &Tag, backend: Option<&Backend>, began: Instant) -> Refusal {
        self.record.attempt_failed(Reason::EmptyPassword, LoginOutcome::Refused, backend.map(|backend| backend.id));
        self.refused_with_delay(tag, backend, began)
    }

    /// Delays the refusal by a sampled server latency and uses a server's text, so that neither the response time nor the text
    /// reveals whether the user exists. `routed` is the backend that the route named, if a route was queried.
    pub(super) fn refused_with_delay(&self, tag: &Tag, routed: Option<&Backend>, began: Instant) -> Refusal {
        let user = self.routing_name.as_deref().unwrap_or_default();
        let routed = routed.map(|backend| &*backend.name);
        let not_before = began + self.snapshot.refusal_latency.draw(routed, user, refusal_latency::random());
        let reply = match self.snapshot.refusal_latency.common_reply(routed, user) {
            Some(answer) => reply::with_tag(tag, &answer),
            None => reply::authentication_failed(tag, None),
        };
        Refusal::failed(reply, Some(not_before))
    }

    /// The decision of a route that names no backend.
    pub(super) fn refused_by_route(&mut self, tag: &Tag, decision: &RouteDecision) -> Interrupt {
        match decision {
            RouteDecision::Refuse(text) => {
                self.record.attempt_failed(Reason::RouteRefused, LoginOutcome::Refused, None);
                Refusal::uncounted(reply::contact_admin(tag, text)).into()
            }
            RouteDecision::WrongPassword(denied) => {
                self.record.denied();
                let reply = reply::authentication_failed(tag, denied.text.as_deref());
                let refusal = match denied.next_attempt {
                    NextAttempt::OnNewConnection => Refusal::failed(reply::refusal_with_bye(reply), None).and_close(),
                    NextAttempt::After(delay) => Refusal::failed(reply, Some(Instant::now() + delay)),
                };
                refusal.into()
            }
            RouteDecision::Maintenance(text) => {
                self.record.attempt_failed(Reason::RouteMaintenance, LoginOutcome::Unavailable, None);
                Refusal::uncounted(reply::maintenance(tag, text)).into()
            }
            RouteDecision::PasswordNeeded => {
                let detail = "the route decides by the client's password, and this mechanism sends none";
                self.record.set_detail(detail.to_owned());
                self.record.attempt_failed(Reason::MechanismUnsupported, LoginOutcome::Unavailable, None);
                Interrupt::Unavailable
            }
            RouteDecision::Destination(_) => Interrupt::Unavailable,
        }
    }

    pub(super) fn lookup_failed(&mut self, error: &str) -> Interrupt {
        let error = bounded(error.to_owned());
        tracing::warn!(session = self.record.session().as_str(), %error, "route lookup failed");
        self.record.set_detail(error);
        self.record.attempt_failed(Reason::LookupFailed, LoginOutcome::Unavailable, None);
        Interrupt::Unavailable
    }

    /// Refuses a login with invalid credentials after a delay. It counts as failed for the client's address only, because there is
    /// no user. Returns the reply.
    pub(super) async fn refuse_invalid(&mut self, login: InvalidLogin, began: Instant) -> Vec<u8> {
        self.routing_name = None;
        self.record.attempt(None, login.mechanism);
        if let Err(refusal) = self.check_rate(&login.tag, &[]) {
            return refusal.reply;
        }
        self.record.set_detail(login.fault.to_string());
        self.record.attempt_failed(Reason::InvalidCredentials, LoginOutcome::Refused, None);
        let refusal = self.refused_with_delay(&login.tag, None, began);
        if let FailedLogin::LoggedAndDelayed { not_before } = refusal.failed_login {
            self.failed_login(&[], None, began, not_before).await;
        }
        refusal.reply
    }
}
