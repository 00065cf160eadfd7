//! The servers that one login tries, one after the other, with a slot at each.
//!
//! In the order that `select` found. A server that is failing, or that somebody else tries out just now, comes when
//! there is no other; one that is full is passed over where another has a place, and where none has one, the login waits in
//! the backend's queue. Only where a user must not be served by two servers at once (`user-hash`) does it wait for its own
//! server sooner than go elsewhere. A login with incomplete credentials waits nowhere and takes no place; it asks for one
//! when they are complete ([`Backend::take_place`]). Called by `session`.

use std::collections::VecDeque;
use std::sync::Arc;

use super::capacity::ServerPermit;
use super::server::Admission;
use super::{Backend, Server};
use crate::admin_state::AdminState;
use crate::deadline::Deadline;

/// See the module.
#[derive(Debug)]
pub struct Failover<'a> {
    backend: &'a Backend,
    ahead: VecDeque<Arc<Server>>,
    last_resort: VecDeque<Arc<Server>>,
    full: Vec<Arc<Server>>,
    /// How long this login may wait in the queue.
    queue_until: Option<Deadline>,
    needs_place: bool,
}

/// What comes next.
#[derive(Debug)]
pub enum NextServer {
    /// This server, where there is a slot.
    At(Arc<Server>, ServerPermit),
    /// No server has a place, and none came free in time.
    Full,
    /// There is no other server.
    End,
}

impl<'a> Failover<'a> {
    /// Of `servers`, which are the backend's.
    pub fn new(backend: &'a Backend, servers: Vec<Arc<Server>>) -> Self {
        let (last_resort, full) = (VecDeque::new(), Vec::new());
        Self { backend, ahead: servers.into(), last_resort, full, queue_until: None, needs_place: true }
    }

    /// For a login with incomplete credentials, which takes no place yet.
    #[must_use]
    pub fn without_place(self) -> Self {
        Self { needs_place: false, ..self }
    }

    /// Whether there may be another server after the last one.
    pub fn has_more(&self) -> bool {
        !(self.ahead.is_empty() && self.last_resort.is_empty() && self.full.is_empty())
    }

    /// The next server; waits for a place no longer than the queue allows, and not beyond `due`.
    pub async fn next(&mut self, due: Deadline) -> NextServer {
        while let Some(server) = self.ahead.pop_front() {
            match server.admit(self.needs_place) {
                Admission::ServerPermit(slot) => return NextServer::At(server, slot),
                Admission::Full if self.backend.balance.is_sticky() => return self.wait(&[server], due).await,
                Admission::Full => self.full.push(server),
                Admission::Failing => self.last_resort.push_back(server),
                Admission::Shut => {}
            }
        }
        if !self.full.is_empty() {
            let full = std::mem::take(&mut self.full);
            let stop = self.wait(&full, due).await;
            if let NextServer::At(there, _) = &stop {
                self.full = full.into_iter().filter(|server| !Arc::ptr_eq(server, there)).collect();
            }
            return stop;
        }
        while let Some(server) = self.last_resort.pop_front() {
            if server.admin_state() != AdminState::Up {
                continue;
            }
            return match self.needs_place.then(|| ServerPermit::take(&server)).flatten() {
                Some(slot) => NextServer::At(server, slot),
                None => self.wait(&[server], due).await,
            };
        }
        NextServer::End
    }

    async fn wait(&mut self, servers: &[Arc<Server>], due: Deadline) -> NextServer {
        if let Some(first) = servers.first().filter(|_| !self.needs_place) {
            return NextServer::At(first.clone(), ServerPermit::without_place(first));
        }
        let until = *self.queue_until.get_or_insert_with(|| Deadline::after(self.backend.queue_limits.timeout));
        let Some(queue) = self.backend.queue.join(self.backend.queue_limits.length) else { return NextServer::Full };
        let _counted = self.backend.metrics.backend(self.backend.id.0).login_queued();
        match queue.wait(servers, until.min(due)).await {
            Some((server, slot)) => NextServer::At(server, slot),
            None => NextServer::Full,
        }
    }
}

impl Backend {
    /// Makes sure that `slot`, which is at `server`, has a place; waits for one no longer than the queue allows, and not
    /// beyond `due`. Returns whether it has.
    pub async fn take_place(&self, server: &Arc<Server>, slot: &mut ServerPermit, due: Deadline) -> bool {
        if slot.has_place() {
            return true;
        }
        let servers = vec![server.clone()];
        let place = match ServerPermit::take(server) {
            Some(place) => Some(place),
            None => match Failover::new(self, Vec::new()).wait(&servers, due).await {
                NextServer::At(_, place) => Some(place),
                NextServer::Full | NextServer::End => None,
            },
        };
        place.map(|place| slot.take_place_of(place)).is_some()
    }
}
