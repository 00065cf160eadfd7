//! Logins that are refused without asking a server.

use std::time::Instant;

use tokio::time;

use super::attempt::Attempted;
use super::record::bounded;
use super::{Session, pace};
use crate::config::BackendId;
use crate::failure::Reason;
use crate::imap::prelogin::InvalidLogin;
use crate::imap::reply;
use crate::imap::tag::Tag;
use crate::metrics::LoginOutcome;
use crate::route::Target;

impl Session {
    pub(super) async fn no_such_user(&mut self, tag: &Tag, reason: Reason, began: Instant) -> Attempted {
        let refused = self.refused_late(tag, began).await;
        // After the wait, which may end with the attempt: it is counted once.
        self.record.attempt_failed(reason, LoginOutcome::UnknownUser, None);
        refused
    }

    /// The client may not open the mailbox it asked for.
    pub(super) fn not_authorised(&mut self, tag: &Tag) -> Attempted {
        self.record.attempt_failed(Reason::AuthzidRefused, LoginOutcome::Refused, None);
        Attempted::Refused { reply: reply::authorization_failed(tag), counts: true }
    }

    /// Refuses a login with an empty password without asking a server, as late as if one had been asked.
    pub(super) async fn empty_password(&mut self, tag: &Tag, backend: Option<BackendId>, began: Instant) -> Attempted {
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
    pub(super) async fn verdict(&mut self, tag: &Tag, target: &Target) -> Attempted {
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
        let refused = self.refused_late(&login.tag, began).await;
        self.failed_login(&[], None, began).await;
        match refused {
            Attempted::Refused { reply, .. } => reply,
            _ => Vec::new(),
        }
    }
}
