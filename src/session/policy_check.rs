//! The part of a login that the policy service (`auth_policy`) takes: it allows or refuses the login, and receives the result.

use std::time::{Duration, Instant};

use tokio::time;

use super::Session;
use super::attempt_result::Interrupt;
use crate::auth_policy::{LoginResult, PolicyDecision};
use crate::failure::Reason;
use crate::metrics::LoginOutcome;
use crate::protocol::imap::client_id::ClientId;
use crate::protocol::imap::prelogin::LoginRequest;

/// Maximum number of bytes of the client's ID that are sent to the policy service.
const MAX_DEVICE: usize = 1024;

impl Session {
    /// Asks the policy service whether the login may continue, if a service is configured. It may require a delay.
    pub(super) async fn check_policy(
        &mut self,
        login: &LoginRequest,
        client_id: &ClientId,
        began: Instant,
    ) -> Result<(), Interrupt> {
        let Some(policy) = self.snapshot.auth_policy.clone() else { return Ok(()) };
        let (tls, session) = (self.record.tls().is_some(), self.record.session());
        let attempt =
            policy.attempt(&login.credentials, self.record.client(), tls, device(client_id), session.as_str());
        match policy.allow(&attempt, &self.snapshot.metrics).await {
            PolicyDecision::Allowed(delay) => {
                self.pending_report = Some(Box::new(attempt));
                if delay > Duration::ZERO {
                    self.pause(time::Instant::now() + delay).await;
                }
                Ok(())
            }
            PolicyDecision::Denied => {
                policy.report(attempt, LoginResult::RejectedByPolicy, &self.snapshot.metrics);
                self.record.attempt_failed(Reason::PolicyDenied, LoginOutcome::Refused, None);
                Err(self.refused_with_delay(&login.tag, None, began).into())
            }
            PolicyDecision::Unavailable => {
                self.record.attempt_failed(Reason::PolicyFailed, LoginOutcome::Unavailable, None);
                Err(Interrupt::Unavailable)
            }
        }
    }

    /// Reports the result of a login that the policy service has allowed.
    pub(super) fn report(&mut self, result: LoginResult) {
        if let (Some(policy), Some(attempt)) = (&self.snapshot.auth_policy, self.pending_report.take()) {
            policy.report(*attempt, result, &self.snapshot.metrics);
        }
    }
}

/// The client's ID in the format of Dovecot.
fn device(client_id: &ClientId) -> String {
    let escaped = |bytes: &[u8]| String::from_utf8_lossy(bytes).replace('\\', "\\\\").replace('"', "\\\"");
    let mut text = String::new();
    for (key, value) in client_id.pairs() {
        let value = value.as_ref().map_or_else(|| "NIL".to_owned(), |value| format!("\"{}\"", escaped(value)));
        let pair = format!("\"{}\" {value}", escaped(key));
        if text.len() + pair.len() > MAX_DEVICE {
            break;
        }
        if !text.is_empty() {
            text.push(' ');
        }
        text.push_str(&pair);
    }
    text
}
