//! The servers that one login tries, one after another, with a permit at each.
//!
//! The order is that of `select`. A server that is failing, or that another login tries out, comes last. A full server is
//! skipped while another has a free permit; if none has, the login waits in the backend's queue. Only if all sessions of a
//! user must be on one server (`user-hash`) does it wait for its own server rather than use another. A login with incomplete
//! credentials does not wait and does not count as a session; it asks for that when its credentials are complete
//! ([`Backend::end_exchange`]).

use std::collections::VecDeque;
use std::sync::Arc;

use super::capacity::LimitedOwner;
use super::server::{PermitKind, PermitResult, ServerPermit};
use super::{Backend, Server};
use crate::deadline::Deadline;

/// The servers that one login tries.
#[derive(Debug)]
pub struct Failover<'a> {
    backend: &'a Backend,
    untried: VecDeque<Arc<Server>>,
    failing: VecDeque<Arc<Server>>,
    full: Vec<Arc<Server>>,
    /// End of the time that this login may spend in the queue.
    queue_until: Option<Deadline>,
    kind: PermitKind,
}

/// What a login tries next.
#[derive(Debug)]
pub enum NextServer {
    /// This server, with a permit there.
    Try(Arc<Server>, ServerPermit),
    /// Every server has `max_sessions`, and no permit was returned in time.
    AllFull,
    /// All servers have been tried.
    Exhausted,
}

impl<'a> Failover<'a> {
    /// The order in which `servers` of this backend are tried.
    pub fn new(backend: &'a Backend, servers: Vec<Arc<Server>>) -> Self {
        let (failing, full) = (VecDeque::new(), Vec::new());
        Self { backend, untried: servers.into(), failing, full, queue_until: None, kind: PermitKind::Session }
    }

    /// The same for a login with incomplete credentials, which does not count as a session yet.
    #[must_use]
    pub fn for_exchange(self) -> Self {
        Self { kind: PermitKind::Exchange, ..self }
    }

    /// Whether there may be another server after the last one.
    pub fn has_more(&self) -> bool {
        !(self.untried.is_empty() && self.failing.is_empty() && self.full.is_empty())
    }

    /// The next server. Waits for a permit no longer than the queue allows, and not beyond `deadline`.
    pub async fn next(&mut self, deadline: Deadline) -> NextServer {
        while let Some(server) = self.untried.pop_front() {
            match server.request_permit(self.kind) {
                PermitResult::Granted(permit) => return NextServer::Try(server, permit),
                PermitResult::Full if self.backend.is_sticky() => return self.wait(&[server], deadline).await,
                PermitResult::Full => self.full.push(server),
                PermitResult::Failing => self.failing.push_back(server),
                PermitResult::NoLogins => {}
            }
        }
        if !self.full.is_empty() {
            let full = std::mem::take(&mut self.full);
            let next = self.wait(&full, deadline).await;
            if let NextServer::Try(granted, _) = &next {
                self.full = full.into_iter().filter(|server| !Arc::ptr_eq(server, granted)).collect();
            }
            return next;
        }
        while let Some(server) = self.failing.pop_front() {
            if !server.takes_logins() {
                continue;
            }
            let permit = match self.kind {
                PermitKind::Session => ServerPermit::try_take(&server, PermitKind::Session),
                // Without a limit, because no other server is left.
                PermitKind::Exchange => Some(ServerPermit::exchange(&server)),
            };
            return match permit {
                Some(permit) => NextServer::Try(server, permit),
                None => self.wait(&[server], deadline).await,
            };
        }
        NextServer::Exhausted
    }

    async fn wait(&mut self, servers: &[Arc<Server>], deadline: Deadline) -> NextServer {
        if let (PermitKind::Exchange, Some(first)) = (self.kind, servers.first()) {
            return NextServer::Try(first.clone(), ServerPermit::exchange(first));
        }
        let until = *self.queue_until.get_or_insert_with(|| Deadline::after(self.backend.queue_limits.timeout));
        let Some(entry) = self.backend.queue_length.enter(self.backend.queue_limits.length) else {
            return NextServer::AllFull;
        };
        let _gauge = self.backend.metrics.backend(self.backend.id.0).login_queued();
        let limited =
            |server: &Arc<Server>| LimitedOwner { owner: server.state.clone(), limit: server.settings.max_sessions };
        let owners: Vec<_> = servers.iter().map(limited).collect();
        let Some(permit) = entry.wait(&owners, until.min(deadline)).await else { return NextServer::AllFull };
        match servers.iter().find(|server| permit.is_of(&server.state)) {
            Some(server) => NextServer::Try(server.clone(), ServerPermit::session(server, permit)),
            None => NextServer::AllFull,
        }
    }
}

impl Backend {
    /// Makes a login at `server` count as a session after its SASL exchange. Waits for a permit no longer than the queue
    /// allows, and not beyond `deadline`.
    ///
    /// # Errors
    /// The server has `max_sessions`.
    pub async fn end_exchange(
        &self,
        server: &Arc<Server>,
        login: &mut ServerPermit,
        deadline: Deadline,
    ) -> Result<(), ServerFull> {
        if login.is_session() {
            return Ok(());
        }
        let session = match ServerPermit::try_take(server, PermitKind::Session) {
            Some(session) => session,
            None => match Failover::new(self, Vec::new()).wait(std::slice::from_ref(server), deadline).await {
                NextServer::Try(_, session) => session,
                NextServer::AllFull | NextServer::Exhausted => return Err(ServerFull),
            },
        };
        login.end_exchange(session);
        Ok(())
    }
}

/// The server has `max_sessions`, and no permit was returned in time.
#[derive(Debug)]
pub struct ServerFull;
