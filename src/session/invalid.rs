//! Login commands whose credentials cannot be right: refused without asking a route or a server, as a wrong password is.

use std::time::Instant;

use super::Session;
use super::attempt::Attempted;
use crate::failure::Reason;
use crate::imap::prelogin::InvalidLogin;
use crate::metrics::LoginOutcome;

impl Session {
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
