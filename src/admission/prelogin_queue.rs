//! Connections that have not logged in: each holds a [`PreloginTicket`], and a [`MemoryCharge`] for each larger buffer.
//!
//! [`PreloginPolicy`] decides which connections may stay; this module keeps it behind a lock and signals the connections.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use tokio::sync::Notify;

use super::prelogin_policy::{Arrival, ConnectionId, HeldMemory, MemoryBudgetExceeded, PreloginPolicy};

/// Bytes of buffers that every connection may hold without using the budget. A login with a password, and the TLS handshake of a client
/// without a certificate, need less.
const ALLOWANCE: usize = 8 * 1024;

/// The policy and the connections it decides about.
#[derive(Debug)]
pub(super) struct PreloginQueue(Mutex<State>);

#[derive(Debug)]
struct State {
    policy: PreloginPolicy,
    entries: BTreeMap<ConnectionId, Arc<Entry>>,
}

/// State of one connection, shared by the queue and the connection's task.
#[derive(Debug)]
struct Entry {
    id: ConnectionId,
    /// An [`EntryState`] as a number.
    state: AtomicU8,
    state_changed: Notify,
    /// Bytes of all memory charges of the connection.
    held: AtomicUsize,
    /// Bytes of these that the client has sent.
    sent: AtomicUsize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum EntryState {
    Waiting,
    Admitted,
    ShedForCapacity,
    ShedForMemory,
}

impl EntryState {
    fn shed_reason(self) -> Option<ShedReason> {
        match self {
            Self::Waiting | Self::Admitted => None,
            Self::ShedForCapacity => Some(ShedReason::Capacity),
            Self::ShedForMemory => Some(ShedReason::Memory),
        }
    }
}

/// Limit for whose sake a connection is shed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ShedReason {
    /// The connection was shed because of `limits.before_login`.
    Capacity,
    /// The connection was shed because of `limits.before_login_memory`.
    Memory,
}

/// Membership of one connection in the queue; dropping it leaves the queue.
#[derive(Debug)]
pub struct PreloginTicket {
    queue: Arc<PreloginQueue>,
    entry: Arc<Entry>,
}

/// Signals that a connection has been shed and must close.
#[derive(Debug)]
pub struct ShedSignal(Arc<Entry>);

/// Memory that one buffer of a connection uses before the login; dropping it returns the memory to the budget.
#[derive(Debug)]
pub struct MemoryCharge {
    queue: Arc<PreloginQueue>,
    entry: Arc<Entry>,
    held: HeldMemory,
}

impl Entry {
    fn state(&self) -> EntryState {
        match self.state.load(Ordering::Acquire) {
            0 => EntryState::Waiting,
            1 => EntryState::Admitted,
            2 => EntryState::ShedForCapacity,
            _ => EntryState::ShedForMemory,
        }
    }

    fn set_state(&self, state: EntryState) {
        self.state.store(state as u8, Ordering::Release);
        self.state_changed.notify_waiters();
    }

    /// Waits for a state for which `select` returns a value.
    async fn wait_for<T>(&self, select: impl Fn(EntryState) -> Option<T>) -> T {
        loop {
            // Registered before the state is read, so that no change in between is missed.
            let mut changed = std::pin::pin!(self.state_changed.notified());
            changed.as_mut().enable();
            if let Some(selected) = select(self.state()) {
                return selected;
            }
            changed.await;
        }
    }
}

impl PreloginQueue {
    pub(super) fn new(max_connections: usize, memory_budget: usize) -> Self {
        let policy = PreloginPolicy::new(max_connections, memory_budget);
        Self(Mutex::new(State { policy, entries: BTreeMap::new() }))
    }

    /// Changes the limits. Connections over a lower limit are shed when the next connection arrives.
    pub(super) fn set_limits(&self, max_connections: usize, memory_budget: usize) {
        let mut state = self.lock();
        let admitted = state.policy.set_limits(max_connections, memory_budget);
        state.set_states(&admitted, EntryState::Admitted);
    }

    /// Adds a new connection. Returns `None` if it must be refused.
    pub(super) fn enter(self: &Arc<Self>, now: Instant) -> Option<PreloginTicket> {
        let mut state = self.lock();
        let mut shed = Vec::new();
        let arrival = state.policy.enter(now, &mut shed);
        state.set_states(&shed, EntryState::ShedForCapacity);
        let (id, entry_state) = match arrival {
            Arrival::Admitted(id) => (id, EntryState::Admitted),
            Arrival::Waiting(id) => (id, EntryState::Waiting),
            Arrival::Refused => return None,
        };
        let entry = Arc::new(Entry {
            id,
            state: AtomicU8::new(entry_state as u8),
            state_changed: Notify::new(),
            held: AtomicUsize::new(0),
            sent: AtomicUsize::new(0),
        });
        state.entries.insert(id, entry.clone());
        drop(state);
        Some(PreloginTicket { queue: self.clone(), entry })
    }

    /// Number of admitted connections, without those that wait to be admitted.
    pub(super) fn len(&self) -> usize {
        self.lock().policy.admitted()
    }

    /// Bytes of the memory budget in use.
    pub(super) fn memory(&self) -> usize {
        self.lock().policy.memory()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A poisoned lock is safe: no critical section can panic halfway through a change.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn set_states(&self, connections: &[ConnectionId], state: EntryState) {
        connections.iter().filter_map(|id| self.entries.get(id)).for_each(|entry| entry.set_state(state));
    }
}

impl PreloginTicket {
    /// Completes when the connection is admitted, or shed while it waits. Nothing may be read from the connection before.
    pub async fn admitted(&self) {
        self.entry.wait_for(|state| (state != EntryState::Waiting).then_some(())).await;
    }

    /// Returns a signal for shedding that does not borrow the ticket.
    pub fn shed_signal(&self) -> ShedSignal {
        ShedSignal(self.entry.clone())
    }

    /// Why the connection has been shed; `None` if it has not.
    pub fn shed_reason(&self) -> Option<ShedReason> {
        self.entry.state().shed_reason()
    }

    /// The client has sent complete credentials: the connection is shed last until [`PreloginTicket::login_ended`].
    pub fn login_begun(&self, now: Instant) {
        self.queue.lock().policy.login_begun(self.entry.id, now);
    }

    /// The login was answered, or waits for the client.
    pub fn login_ended(&self) {
        self.queue.lock().policy.login_ended(self.entry.id);
    }

    /// Returns a memory charge of zero bytes.
    pub fn charge(&self) -> MemoryCharge {
        MemoryCharge { queue: self.queue.clone(), entry: self.entry.clone(), held: HeldMemory::default() }
    }
}

impl ShedSignal {
    /// Completes when the connection has been shed, at once if that was before.
    pub async fn wait(&self) -> ShedReason {
        self.0.wait_for(EntryState::shed_reason).await
    }
}

impl Drop for PreloginTicket {
    fn drop(&mut self) {
        let mut state = self.queue.lock();
        state.entries.remove(&self.entry.id);
        let admitted = state.policy.leave(self.entry.id);
        state.set_states(&admitted, EntryState::Admitted);
    }
}

impl MemoryCharge {
    /// Sets the charge for a buffer that has, or is about to have, `bytes` that the client sent.
    ///
    /// # Errors
    /// The budget does not allow it: the buffer must not grow. A smaller number is always allowed.
    pub fn resize(&mut self, bytes: usize) -> Result<(), MemoryBudgetExceeded> {
        self.set(HeldMemory { bytes, sent: bytes })
    }

    /// Sets the charge for `copies` of `bytes` that the client sent.
    ///
    /// # Errors
    /// The same as of [`MemoryCharge::resize`].
    pub fn resize_copies(&mut self, bytes: usize, copies: usize) -> Result<(), MemoryBudgetExceeded> {
        self.set(HeldMemory { bytes: bytes * copies, sent: bytes })
    }

    fn set(&mut self, held: HeldMemory) -> Result<(), MemoryBudgetExceeded> {
        let before = self.entry.held.load(Ordering::Relaxed);
        let bytes = before - self.held.bytes + held.bytes;
        let sent = self.entry.sent.load(Ordering::Relaxed) - self.held.sent + held.sent;
        if before.max(bytes) > ALLOWANCE {
            let over = HeldMemory { bytes: bytes.saturating_sub(ALLOWANCE), sent };
            let mut state = self.queue.lock();
            let mut shed = Vec::new();
            let charged = state.policy.charge(self.entry.id, over, &mut shed);
            state.set_states(&shed, EntryState::ShedForMemory);
            charged?;
        }
        // Relaxed is enough: all charges of a connection belong to its task.
        self.entry.held.store(bytes, Ordering::Relaxed);
        self.entry.sent.store(sent, Ordering::Relaxed);
        self.held = held;
        Ok(())
    }
}

impl Drop for MemoryCharge {
    fn drop(&mut self) {
        // A smaller charge is always granted.
        let _ = self.resize(0);
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    #[tokio::test]
    async fn connection_waits_until_a_shed_connection_has_left() {
        let (queue, now) = (Arc::new(PreloginQueue::new(1, 1 << 20)), Instant::now());
        let first = queue.enter(now).unwrap();
        assert_eq!(first.admitted().now_or_never(), Some(()));
        assert_eq!(first.shed_signal().wait().now_or_never(), None);
        let second = queue.enter(now).unwrap();
        assert_eq!(first.shed_signal().wait().now_or_never(), Some(ShedReason::Capacity));
        assert_eq!(second.admitted().now_or_never(), None);
        assert_eq!(queue.len(), 1);
        let third = queue.enter(now).unwrap();
        assert_eq!(second.admitted().now_or_never(), Some(()));
        assert_eq!(second.shed_reason(), Some(ShedReason::Capacity), "shed for a later connection");
        let leaves = async {
            tokio::task::yield_now().await;
            drop((first, second));
        };
        tokio::join!(third.admitted(), leaves);
        assert_eq!((third.shed_reason(), queue.len()), (None, 1));
        third.login_begun(now);
        assert!(queue.enter(now).is_none());
        drop(third);
        assert_eq!(queue.len(), 0);
    }

    #[test]
    fn charges_up_to_the_allowance_use_no_budget() {
        let (queue, now) = (Arc::new(PreloginQueue::new(10, 1 << 20)), Instant::now());
        let ticket = queue.enter(now).unwrap();
        let (mut one, mut other) = (ticket.charge(), ticket.charge());
        one.resize(ALLOWANCE - 1).unwrap();
        other.resize(1).unwrap();
        assert_eq!(queue.memory(), 0);
        other.resize(1001).unwrap();
        assert_eq!(queue.memory(), 1000);
        assert_eq!(other.resize(2 << 20), Err(MemoryBudgetExceeded));
        assert_eq!(queue.memory(), 1000);
        drop(one);
        assert_eq!(queue.memory(), 0);
        other.resize(ALLOWANCE + 5).unwrap();
        assert_eq!(queue.memory(), 5);
        drop(ticket);
        assert_eq!(queue.memory(), 0, "a connection that has logged in uses no budget");
        drop(other);
        assert_eq!(queue.memory(), 0);
    }

    #[test]
    fn small_charge_sheds_the_connection_with_the_largest() {
        let (queue, now) = (Arc::new(PreloginQueue::new(10, 1 << 20)), Instant::now());
        let (attacker, client) = (queue.enter(now).unwrap(), queue.enter(now).unwrap());
        let (mut held, mut needed) = (attacker.charge(), client.charge());
        held.resize(900 * 1024).unwrap();
        needed.resize(40 * 1024).unwrap();
        assert_eq!(attacker.shed_signal().wait().now_or_never(), Some(ShedReason::Memory));
        assert_eq!(client.shed_signal().wait().now_or_never(), None);
    }
}
