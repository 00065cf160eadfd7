//! Places at a server: who has one, who waits for one. First come, first served.
//!
//! A login takes a [`ServerPermit`] before it connects, and keeps it for as long as the session lives; dropping it is giving it
//! back. A server without `max_sessions` always has another. A slot that is given back goes from hand to hand to who has
//! waited longest, so that no newcomer overtakes. A login without complete credentials (SCRAM before the client's proof)
//! has a slot without a place: it cannot keep others out of a server. Called by `tour`.

use std::collections::VecDeque;
use std::future::pending;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::Instant;

use super::disconnect_spreader::SpreadDisconnect;
use super::exchanges::Exchange;
use super::health::Trial;
use super::server::{Server, ServerState};
use crate::deadline::Deadline;
use crate::metrics::GaugeGuard;

/// The places of one server.
#[derive(Debug, Default)]
pub(super) struct ServerCapacity(Mutex<Inner>);

#[derive(Debug, Default)]
struct Inner {
    taken: u32,
    waiting: VecDeque<Arc<Waiter>>,
}

/// A login that waits, at one server or several.
#[derive(Debug)]
struct Waiter {
    /// `None` once it has a slot, or has given up.
    hand: Mutex<Option<oneshot::Sender<ServerPermit>>>,
}

impl ServerCapacity {
    /// How many are taken.
    pub(super) fn taken(&self) -> u32 {
        self.lock().taken
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Nothing in here panics halfway through a change.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self, max: Option<u32>, otherwise: impl FnOnce(&mut Inner)) -> bool {
        let mut inner = self.lock();
        if max.is_none_or(|max| inner.taken < max) {
            inner.taken += 1;
            true
        } else {
            otherwise(&mut inner);
            false
        }
    }
}

/// A login's place at a server, and whether it is the one that tries it out.
#[derive(Debug)]
pub struct ServerPermit {
    /// `None` only while it changes hands.
    state: Option<Arc<ServerState>>,
    trial: Option<Trial>,
    /// Whether it counts against `max_sessions`.
    has_place: bool,
    /// Without a place it counts among the server's exchanges.
    exchange: Option<Exchange>,
}

impl ServerPermit {
    /// A place at `server`, where it has one.
    pub(super) fn take(server: &Server) -> Option<Self> {
        let has_one = server.state.slots.take(server.terms.max_sessions, |_| {});
        has_one.then(|| Self::at(&server.state))
    }

    /// For a login at `server` whose credentials are not complete: it does not count against `max_sessions`.
    pub(super) fn without_place(server: &Server) -> Self {
        let exchange = Some(server.state.exchanges.enter(server.terms.max_sessions));
        Self { state: Some(server.state.clone()), trial: None, has_place: false, exchange }
    }

    /// Gives the place at `server` back while the client is asked for the rest of its credentials.
    pub fn release_place(&mut self, server: &Server) {
        if let Some(state) = self.state.as_ref().filter(|_| std::mem::take(&mut self.has_place)) {
            self.exchange = Some(state.exchanges.enter(server.terms.max_sessions));
            give_back(state);
        }
    }

    /// Waits until the exchange must end, because there are too many newer ones; for ever if it has a place.
    pub async fn displaced(&self) {
        match &self.exchange {
            Some(exchange) => exchange.ended().await,
            None => pending().await,
        }
    }

    /// Whether it counts against `max_sessions`.
    pub(super) fn has_place(&self) -> bool {
        self.has_place
    }

    /// Takes over the place of `other`, which is at the same server.
    pub(super) fn take_place_of(&mut self, mut other: Self) {
        debug_assert!(!self.has_place, "a place would be lost");
        self.has_place = std::mem::take(&mut other.has_place);
        self.leave_exchanges();
    }

    fn leave_exchanges(&mut self) {
        if let Some((state, exchange)) = self.state.as_ref().zip(self.exchange.take()) {
            state.exchanges.leave(&exchange);
        }
    }

    /// This login tries the server out: nobody else does, until it drops.
    pub(super) fn on_trial(mut self, trial: Option<Trial>) -> Self {
        self.trial = trial;
        self
    }

    /// The login was taken: the place is the session's.
    pub fn established(mut self) -> SessionSlot {
        self.end_trial();
        self.leave_exchanges();
        // A slot has its state until it drops, or becomes this.
        let state = self.state.take();
        if let Some(state) = &state {
            if !self.has_place {
                // Callers make sure of a place. One without would be given back and never have been taken.
                state.slots.take(None, |_| {});
            }
            state.metrics.session_opened();
            state.departures().arrived();
        }
        SessionSlot(state)
    }

    fn at(state: &Arc<ServerState>) -> Self {
        Self { state: Some(state.clone()), trial: None, has_place: true, exchange: None }
    }

    fn end_trial(&mut self) {
        if let Some((state, trial)) = self.state.as_ref().zip(self.trial.take()) {
            state.end_trial(trial);
        }
    }
}

impl Drop for ServerPermit {
    fn drop(&mut self) {
        self.end_trial();
        self.leave_exchanges();
        if let Some(state) = self.state.take().filter(|_| self.has_place) {
            give_back(&state);
        }
    }
}

/// A session's place at its server: a pointer, for it is kept with every idle session.
#[derive(Debug)]
pub struct SessionSlot(Option<Arc<ServerState>>);

/// What becomes of a client whose server has closed without being asked.
#[derive(Debug)]
pub struct DelayedDisconnect {
    /// It is kept so long.
    pub wait: Duration,
    /// The server has just cut off one half of so many sessions. `None` for all but one of them.
    pub half_of: Option<u32>,
    /// Shown among those that are kept.
    pub shown: GaugeGuard,
}

impl SessionSlot {
    /// The server has closed the session without being asked: the place is free at once. `None`: the client is not kept.
    /// `over`: the longest that any is.
    pub fn cut_off(&mut self, over: Duration) -> Option<DelayedDisconnect> {
        let state = self.0.take()?;
        let SpreadDisconnect { wait, half_of } = state.departures().cut_off(Instant::now().into_std(), over);
        let cut_off =
            (!wait.is_zero()).then(|| DelayedDisconnect { wait, half_of, shown: state.metrics.disconnect_pending() });
        state.metrics.session_closed();
        give_back(&state);
        cut_off
    }
}

impl Drop for SessionSlot {
    fn drop(&mut self) {
        if let Some(state) = self.0.take() {
            state.departures().left();
            state.metrics.session_closed();
            give_back(&state);
        }
    }
}

/// To who has waited longest, or to nobody.
fn give_back(state: &Arc<ServerState>) {
    loop {
        let mut inner = state.slots.lock();
        let Some(waiter) = inner.waiting.pop_front() else {
            inner.taken -= 1;
            return;
        };
        drop(inner);
        let hand = waiter.hand.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(hand) = hand else { continue };
        match hand.send(ServerPermit::at(state)) {
            Ok(()) => return,
            // It has just given up. The slot is still ours to give.
            Err(mut refused) => drop(refused.state.take()),
        }
    }
}

/// Who waits at a backend's servers.
#[derive(Debug, Default)]
pub(super) struct LoginQueue {
    length: AtomicU32,
}

impl LoginQueue {
    /// A place in the queue, unless `longest` are there already.
    pub(super) fn join(&self, longest: u32) -> Option<InQueue<'_>> {
        let join = |length| (length < longest).then_some(length + 1);
        self.length.fetch_update(Ordering::Relaxed, Ordering::Relaxed, join).ok()?;
        Some(InQueue(self))
    }
}

/// A place in a queue, until it drops.
pub(super) struct InQueue<'a>(&'a LoginQueue);

impl InQueue<'_> {
    /// Waits for a slot at any of `servers` until `due`.
    pub(super) async fn wait(self, servers: &[Arc<Server>], due: Deadline) -> Option<(Arc<Server>, ServerPermit)> {
        let (hand, slot) = oneshot::channel();
        let waiting = AtServers { waiter: Arc::new(Waiter { hand: Mutex::new(Some(hand)) }), servers };
        for server in servers {
            let wait = |inner: &mut Inner| inner.waiting.push_back(waiting.waiter.clone());
            if server.state.slots.take(server.terms.max_sessions, wait) {
                return Some((server.clone(), ServerPermit::at(&server.state)));
            }
        }
        let slot = due.limit(slot).await.ok()?.ok()?;
        let is_there = |server: &&Arc<Server>| slot.state.as_ref().is_some_and(|at| Arc::ptr_eq(at, &server.state));
        servers.iter().find(is_there).cloned().map(|server| (server, slot))
    }
}

impl Drop for InQueue<'_> {
    fn drop(&mut self) {
        self.0.length.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Leaves nothing of a waiter behind, however its waiting ends.
struct AtServers<'a> {
    waiter: Arc<Waiter>,
    servers: &'a [Arc<Server>],
}

impl Drop for AtServers<'_> {
    fn drop(&mut self) {
        self.waiter.hand.lock().unwrap_or_else(PoisonError::into_inner).take();
        for server in self.servers {
            server.state.slots.lock().waiting.retain(|waiter| !Arc::ptr_eq(waiter, &self.waiter));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    fn soon() -> Deadline {
        Deadline::after(LONG)
    }

    #[tokio::test(start_paused = true)]
    async fn slots_go_from_hand_to_hand_in_order() {
        let (server, queue) = (Server::for_tests("a", Some(1)), LoginQueue::default());
        let servers = [server.clone()];
        let slot = ServerPermit::take(&server).unwrap();
        assert!(ServerPermit::take(&server).is_none());
        let mut first = Box::pin(queue.join(2).unwrap().wait(&servers, soon()));
        let mut second = Box::pin(queue.join(2).unwrap().wait(&servers, soon()));
        assert!(futures_util::poll!(&mut first).is_pending() && futures_util::poll!(&mut second).is_pending());
        assert!(queue.join(2).is_none(), "the queue is bounded");
        drop(slot);
        assert!(ServerPermit::take(&server).is_none(), "a newcomer does not overtake");
        let (_, slot) = first.await.unwrap();
        assert!(futures_util::poll!(&mut second).is_pending());
        drop(slot.established());
        let (at, slot) = second.await.unwrap();
        assert_eq!((&*at.name, server.state.slots.taken()), ("a", 1));
        drop(slot);
        assert_eq!(server.state.slots.taken(), 0);
        assert!(queue.join(1).is_some(), "both have left the queue");
    }

    #[tokio::test(start_paused = true)]
    async fn who_gives_up_is_passed_over() {
        let (server, queue) = (Server::for_tests("a", Some(1)), LoginQueue::default());
        let servers = [server.clone()];
        let slot = ServerPermit::take(&server).unwrap();
        let began = Instant::now();
        let due = Deadline::after(Duration::from_secs(5));
        let mut patient = Box::pin(queue.join(9).unwrap().wait(&servers, soon()));
        {
            let mut gone = Box::pin(queue.join(9).unwrap().wait(&servers, soon()));
            assert!(futures_util::poll!(&mut gone).is_pending());
        }
        assert!(queue.join(9).unwrap().wait(&servers, due).await.is_none());
        assert_eq!(began.elapsed().as_secs(), 5);
        assert!(futures_util::poll!(&mut patient).is_pending());
        drop(slot);
        assert!(patient.await.is_some());
        assert_eq!(server.state.slots.taken(), 0);
        assert!(server.state.slots.lock().waiting.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn the_first_of_several_servers_to_have_a_slot_is_taken() {
        let (one, other, queue) =
            (Server::for_tests("a", Some(1)), Server::for_tests("b", Some(1)), LoginQueue::default());
        let servers = [one.clone(), other.clone()];
        let (_kept, freed) = (ServerPermit::take(&one).unwrap(), ServerPermit::take(&other).unwrap());
        let mut waiting = Box::pin(queue.join(9).unwrap().wait(&servers, soon()));
        assert!(futures_util::poll!(&mut waiting).is_pending());
        drop(freed);
        assert_eq!(&*waiting.await.unwrap().0.name, "b");
        assert_eq!((one.state.slots.taken(), other.state.slots.taken()), (1, 0));
        assert!(one.state.slots.lock().waiting.is_empty(), "nobody waits there any more");
    }

    #[tokio::test(start_paused = true)]
    async fn a_slot_handed_to_somebody_who_has_just_gone_is_not_lost() {
        let (server, queue) = (Server::for_tests("a", Some(1)), LoginQueue::default());
        let servers = [server.clone()];
        let slot = ServerPermit::take(&server).unwrap();
        let mut waiting = Box::pin(queue.join(9).unwrap().wait(&servers, soon()));
        assert!(futures_util::poll!(&mut waiting).is_pending());
        drop(slot);
        // It has the slot in its hand and is never asked again.
        drop(waiting);
        assert_eq!(server.state.slots.taken(), 0);
        assert!(ServerPermit::take(&server).is_some());
    }

    #[test]
    fn a_session_that_was_cut_off_gives_its_place_back_once() {
        let server = Server::for_tests("a", Some(2));
        let mut slots = [(); 2].map(|()| ServerPermit::take(&server).unwrap().established());
        let over = Duration::from_secs(30);
        assert!(slots[0].cut_off(over).is_none(), "a lone one");
        let kept = slots[1].cut_off(over).unwrap();
        assert_eq!((kept.wait, kept.half_of), (Duration::from_millis(100), None));
        assert_eq!(server.state.slots.taken(), 0);
        drop((slots, kept));
        assert_eq!((server.state.slots.taken(), server.metrics().sessions()), (0, 0));
        assert!(ServerPermit::take(&server).is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn a_slot_without_a_place_keeps_nobody_out() {
        let (server, queue) = (Server::for_tests("a", Some(1)), LoginQueue::default());
        let mut exchanges: Vec<ServerPermit> = (0..20).map(|_| ServerPermit::without_place(&server)).collect();
        assert!(futures_util::poll!(Box::pin(exchanges[18].displaced())).is_ready(), "newer ones take its turn");
        assert!(futures_util::poll!(Box::pin(exchanges[19].displaced())).is_pending());
        assert_eq!(server.state.slots.taken(), 0);
        let mut first = ServerPermit::take(&server).unwrap();
        let servers = [server.clone()];
        let mut waiting = Box::pin(queue.join(9).unwrap().wait(&servers, soon()));
        assert!(futures_util::poll!(&mut waiting).is_pending());
        // While its client is asked, the place is the next login's.
        first.release_place(&server);
        first.release_place(&server);
        let (_, second) = waiting.await.unwrap();
        assert_eq!(server.state.slots.taken(), 1);
        drop(first);
        assert_eq!(server.state.slots.taken(), 1, "it had no place to give back");
        let mut complete = exchanges.pop().unwrap();
        complete.take_place_of(second);
        assert_eq!(server.state.slots.taken(), 1);
        drop(exchanges);
        assert!(futures_util::poll!(Box::pin(complete.displaced())).is_pending());
        drop(complete.established());
        assert_eq!(server.state.slots.taken(), 0);
    }

    #[test]
    fn a_sessions_slot_is_a_pointer() {
        assert_eq!(size_of::<SessionSlot>(), size_of::<usize>());
    }
}
