//! Step 4 of a session: the lookup of the backend, and the checks before and after it.

use std::sync::Arc;

use super::Session;
use super::attempt::{Login, Progress};
use super::attempt_result::Interrupt;
use crate::backend::Backend;
use crate::deadline::Deadline;
use crate::failure::Reason;
use crate::identity::UserNames;
use crate::metrics::LoginOutcome;
use crate::protocol::imap::prelogin::LoginRequest;
use crate::route::{Destination, LoginContext, LoginTls, LookupRequest, RouteDecision, RouteError, RouteMatch};
use crate::snapshot::Snapshot;
use crate::stream::Stream;

impl Session {
    /// Refuses logins that need no lookup, so that the answer does not depend on whether the mailbox exists. The lookup uses the
    /// configuration that is newest after these checks.
    pub(super) async fn check_before_lookup(
        &mut self,
        login: &Login<'_>,
        progress: &mut Progress,
    ) -> Result<(), Interrupt> {
        if !progress.is_allowed {
            self.check_policy(login.request, &login.client_id, login.began).await?;
            progress.is_allowed = true;
        }
        if login.client_id.ttl() == Some(0) {
            self.record.attempt_failed(Reason::ProxyLoop, LoginOutcome::Unavailable, None);
            return Err(Interrupt::Unavailable);
        }
        self.update_snapshot();
        let snapshot = &self.snapshot;
        let may_act_for_another =
            snapshot.allows_masters_from(self.peer.ip()) && snapshot.backends.any_allows_authzid();
        if login.request.credentials.authzid.is_some() && !may_act_for_another {
            return Err(self.not_authorised(&login.request.tag).into());
        }
        Ok(())
    }

    /// Queries the routes within `limits.lookup`.
    pub(super) async fn look_up(
        &mut self,
        snapshot: &Snapshot,
        login: &Login<'_>,
        stream: &Stream,
    ) -> Result<Arc<RouteDecision>, Interrupt> {
        // Its copy of the credentials is dropped after the lookup.
        let request = self.lookup_request(login.names, login.request, stream);
        let lookup = snapshot.router.route(&request, &snapshot.metrics);
        match Deadline::after(snapshot.limits.lookup).limit(lookup).await {
            Ok(Ok(RouteMatch { decision, route })) => {
                let backend = match &*decision {
                    RouteDecision::Destination(destination) => {
                        Some(&snapshot.backends.backend(destination.backend).name)
                    }
                    RouteDecision::Refuse(_)
                    | RouteDecision::WrongPassword(_)
                    | RouteDecision::Maintenance(_)
                    | RouteDecision::PasswordNeeded => None,
                };
                self.record.routed(route, backend, login.began.elapsed());
                Ok(decision)
            }
            Ok(Err(RouteError::Unknown)) => {
                Err(self.unknown_user(&login.request.tag, Reason::UnknownUser, login.began).into())
            }
            Ok(Err(error)) => Err(self.lookup_failed(&error.to_string())),
            Err(_) => Err(self.lookup_failed("no answer within limits.lookup")),
        }
    }

    /// Refuses a login that may not be sent to the backend that the route names.
    pub(super) fn check_destination(
        &mut self,
        login: &Login<'_>,
        destination: &Destination,
        backend: &Backend,
    ) -> Result<(), Interrupt> {
        let has_separator = |user: &str| self.snapshot.config.naming.has_master_separator(user);
        if destination.user.as_ref().is_some_and(|user| has_separator(user.as_str())) {
            return Err(self.lookup_failed("the route's user contains users.masters.separator"));
        }
        let credentials = &login.request.credentials;
        if credentials.authzid.is_some() && !backend.allows_authzid {
            // Another backend allows it, so that users of this backend must get the same answer as unknown users.
            self.record.attempt_failed(Reason::AuthzidRefused, LoginOutcome::Refused, Some(backend.id));
            return Err(self.refused_with_delay(&login.request.tag, Some(backend), login.began).into());
        }
        if credentials.has_empty_password() && !backend.allows_empty_passwords() {
            return Err(self.empty_password(&login.request.tag, Some(backend), login.began).into());
        }
        Ok(())
    }

    fn lookup_request(&self, names: &UserNames, login: &LoginRequest, stream: &Stream) -> LookupRequest {
        let asks_certificate = || self.snapshot.tls.as_ref().is_some_and(|tls| tls.requests_certificate(self.listener));
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
