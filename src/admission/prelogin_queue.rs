//! Connections before their login: each has a [`PreloginTicket`], and a [`Charge`] for each larger buffer it holds.
//!
//! `places` decides who may stay; this module keeps its state behind a lock, and signals the connections.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use tokio::sync::Notify;

use super::places::{Entered, Held, Number, Places};

/// Bytes of buffers that every connection may hold without using the budget. A login with a password, and the TLS handshake of a client
/// without a certificate, need less.
const ALLOWANCE: usize = 8 * 1024;

/// See the module.
#[derive(Debug)]
pub(super) struct PreloginQueue(Mutex<State>);

#[derive(Debug)]
struct State {
    places: Places,
    shares: BTreeMap<Number, Arc<Share>>,
}

/// What a connection and the lobby both know.
#[derive(Debug)]
struct Share {
    number: Number,
    /// A [`Standing`].
    standing: AtomicU8,
    changed: Notify,
    /// Bytes of all its charges.
    held: AtomicUsize,
    /// Bytes of these that the client has sent.
    sent: AtomicUsize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Standing {
    Waits,
    Inside,
    ShedForPlace,
    ShedForMemory,
}

impl Standing {
    fn shed(self) -> Option<Shed> {
        match self {
            Self::Waits | Self::Inside => None,
            Self::ShedForPlace => Some(Shed::Place),
            Self::ShedForMemory => Some(Shed::Memory),
        }
    }
}

/// Why a connection must go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shed {
    /// `limits.before_login`.
    Place,
    /// `limits.before_login_memory`.
    Memory,
}

/// The budget `limits.before_login_memory` is used up, and no connection holds more than this one would.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("limits.before_login_memory is used up")]
pub struct OutOfMemory;

/// A place in the lobby, until dropped.
#[derive(Debug)]
pub struct PreloginTicket {
    lobby: Arc<PreloginQueue>,
    share: Arc<Share>,
}

/// Reports that a connection must go.
#[derive(Debug)]
pub struct ShedSignal(Arc<Share>);

/// Bytes of buffers that a connection holds before its login, until dropped.
#[derive(Debug)]
pub struct Charge {
    lobby: Arc<PreloginQueue>,
    share: Arc<Share>,
    held: Held,
}

impl Share {
    fn standing(&self) -> Standing {
        match self.standing.load(Ordering::Acquire) {
            0 => Standing::Waits,
            1 => Standing::Inside,
            2 => Standing::ShedForPlace,
            _ => Standing::ShedForMemory,
        }
    }

    fn set(&self, standing: Standing) {
        self.standing.store(standing as u8, Ordering::Release);
        self.changed.notify_waiters();
    }

    /// Waits for a standing of which `answer` makes something.
    async fn until<T>(&self, answer: impl Fn(Standing) -> Option<T>) -> T {
        loop {
            // Registered before the look, so that no change between the two is missed.
            let mut changed = std::pin::pin!(self.changed.notified());
            changed.as_mut().enable();
            if let Some(answer) = answer(self.standing()) {
                return answer;
            }
            changed.await;
        }
    }
}

impl PreloginQueue {
    pub(super) fn new(places: usize, memory: usize) -> Self {
        Self(Mutex::new(State { places: Places::new(places, memory), shares: BTreeMap::new() }))
    }

    /// Other limits from the next connection on.
    pub(super) fn set_limits(&self, places: usize, memory: usize) {
        let mut state = self.lock();
        let admitted = state.places.set_limits(places, memory);
        state.admit(&admitted);
    }

    /// A new connection. `None`: it is to be refused.
    pub(super) fn enter(self: &Arc<Self>, now: Instant) -> Option<PreloginTicket> {
        let mut state = self.lock();
        let mut shed = Vec::new();
        let entered = state.places.enter(now, &mut shed);
        state.shed(&shed, Standing::ShedForPlace);
        let (number, standing) = match entered {
            Entered::Inside(number) => (number, Standing::Inside),
            Entered::Waits(number) => (number, Standing::Waits),
            Entered::Refused => return None,
        };
        let standing = AtomicU8::new(standing as u8);
        let (held, sent) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let share = Arc::new(Share { number, standing, changed: Notify::new(), held, sent });
        state.shares.insert(number, share.clone());
        drop(state);
        Some(PreloginTicket { lobby: self.clone(), share })
    }

    /// Connections with a place.
    pub(super) fn len(&self) -> usize {
        self.lock().places.inside()
    }

    /// Bytes of the budget in use.
    pub(super) fn memory(&self) -> usize {
        self.lock().places.memory()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // No change of the state panics halfway.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn shed(&self, numbers: &[Number], standing: Standing) {
        numbers.iter().filter_map(|number| self.shares.get(number)).for_each(|share| share.set(standing));
    }

    fn admit(&self, numbers: &[Number]) {
        numbers.iter().filter_map(|number| self.shares.get(number)).for_each(|share| share.set(Standing::Inside));
    }
}

impl PreloginTicket {
    /// Ready when the connection has a place, or is shed while it waits for one. Before, nothing may be read from it.
    pub async fn admitted(&self) {
        self.share.until(|standing| (standing != Standing::Waits).then_some(())).await;
    }

    /// Reports when the connection must go, without borrowing the ticket.
    pub fn shed_signal(&self) -> ShedSignal {
        ShedSignal(self.share.clone())
    }

    /// Whether it must go.
    pub fn is_shed(&self) -> Option<Shed> {
        self.share.standing().shed()
    }

    /// The client has sent complete credentials: the connection is shed last until [`PreloginTicket::login_ended`].
    pub fn login_begun(&self, now: Instant) {
        self.lobby.lock().places.login_begun(self.share.number, now);
    }

    /// The login was answered, or waits for the client.
    pub fn login_ended(&self) {
        self.lobby.lock().places.login_ended(self.share.number);
    }

    /// A charge of nothing yet.
    pub fn charge(&self) -> Charge {
        Charge { lobby: self.lobby.clone(), share: self.share.clone(), held: Held::default() }
    }
}

impl ShedSignal {
    /// Ready when the connection must go, and from then on.
    pub async fn shed(&self) -> Shed {
        self.0.until(Standing::shed).await
    }
}

impl Drop for PreloginTicket {
    fn drop(&mut self) {
        let mut state = self.lobby.lock();
        state.shares.remove(&self.share.number);
        let admitted = state.places.leave(self.share.number);
        state.admit(&admitted);
    }
}

impl Charge {
    /// The buffer has, or is about to have, `bytes` that the client sent.
    ///
    /// # Errors
    /// The budget does not allow it: the buffer must not grow. A smaller number is always allowed.
    pub fn resize(&mut self, bytes: usize) -> Result<(), OutOfMemory> {
        self.set(Held { bytes, sent: bytes })
    }

    /// There are `copies` of `bytes` that the client sent.
    ///
    /// # Errors
    /// As [`Charge::resize`].
    pub fn resize_copies(&mut self, bytes: usize, copies: usize) -> Result<(), OutOfMemory> {
        self.set(Held { bytes: bytes * copies, sent: bytes })
    }

    fn set(&mut self, held: Held) -> Result<(), OutOfMemory> {
        let before = self.share.held.load(Ordering::Relaxed);
        let bytes = before - self.held.bytes + held.bytes;
        let sent = self.share.sent.load(Ordering::Relaxed) - self.held.sent + held.sent;
        if before.max(bytes) > ALLOWANCE {
            let over = Held { bytes: bytes.saturating_sub(ALLOWANCE), sent };
            let mut state = self.lobby.lock();
            let mut shed = Vec::new();
            let granted = state.places.charge(self.share.number, over, &mut shed);
            state.shed(&shed, Standing::ShedForMemory);
            if !granted {
                return Err(OutOfMemory);
            }
        }
        // All charges of a connection belong to its task.
        self.share.held.store(bytes, Ordering::Relaxed);
        self.share.sent.store(sent, Ordering::Relaxed);
        self.held = held;
        Ok(())
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        // Less is always allowed.
        let _ = self.resize(0);
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    #[tokio::test]
    async fn a_connection_waits_for_the_one_that_was_shed_to_be_gone() {
        let (lobby, now) = (Arc::new(PreloginQueue::new(1, 1 << 20)), Instant::now());
        let first = lobby.enter(now).unwrap();
        assert_eq!(first.admitted().now_or_never(), Some(()));
        assert_eq!(first.shed_signal().shed().now_or_never(), None);
        let second = lobby.enter(now).unwrap();
        assert_eq!(first.shed_signal().shed().now_or_never(), Some(Shed::Place));
        assert_eq!(second.admitted().now_or_never(), None);
        assert_eq!(lobby.len(), 1);
        let third = lobby.enter(now).unwrap();
        assert_eq!(second.admitted().now_or_never(), Some(()));
        assert_eq!(second.is_shed(), Some(Shed::Place), "by one that came later");
        let leaves = async {
            tokio::task::yield_now().await;
            drop((first, second));
        };
        tokio::join!(third.admitted(), leaves);
        assert_eq!((third.is_shed(), lobby.len()), (None, 1));
        third.login_begun(now);
        assert!(lobby.enter(now).is_none());
        drop(third);
        assert_eq!(lobby.len(), 0);
    }

    #[test]
    fn only_what_is_over_the_allowance_uses_the_budget() {
        let (lobby, now) = (Arc::new(PreloginQueue::new(10, 1 << 20)), Instant::now());
        let ticket = lobby.enter(now).unwrap();
        let (mut one, mut other) = (ticket.charge(), ticket.charge());
        one.resize(ALLOWANCE - 1).unwrap();
        other.resize(1).unwrap();
        assert_eq!(lobby.memory(), 0);
        other.resize(1001).unwrap();
        assert_eq!(lobby.memory(), 1000);
        assert_eq!(other.resize(2 << 20), Err(OutOfMemory));
        assert_eq!(lobby.memory(), 1000);
        drop(one);
        assert_eq!(lobby.memory(), 0);
        other.resize(ALLOWANCE + 5).unwrap();
        assert_eq!(lobby.memory(), 5);
        drop(ticket);
        assert_eq!(lobby.memory(), 0, "a connection that has logged in uses no budget");
        drop(other);
        assert_eq!(lobby.memory(), 0);
    }

    #[test]
    fn a_client_that_needs_little_sheds_the_one_that_holds_most() {
        let (lobby, now) = (Arc::new(PreloginQueue::new(10, 1 << 20)), Instant::now());
        let (attacker, client) = (lobby.enter(now).unwrap(), lobby.enter(now).unwrap());
        let (mut held, mut needed) = (attacker.charge(), client.charge());
        held.resize(900 * 1024).unwrap();
        needed.resize(40 * 1024).unwrap();
        assert_eq!(attacker.shed_signal().shed().now_or_never(), Some(Shed::Memory));
        assert_eq!(client.shed_signal().shed().now_or_never(), None);
    }
}
