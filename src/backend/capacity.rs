//! A limited number of permits for logins, granted in the order of requests.
//!
//! Each owner has a [`Capacity`]; a [`Permit`] is one unit of it, until it drops. A returned permit goes directly to the login
//! that has waited longest, so that a newcomer cannot overtake. The limit is an argument, because it may change with the
//! configuration, and only a request checks it: while logins wait, returned permits are passed on even if a lowered limit is
//! exceeded, and a raised limit does not wake them.

use std::collections::VecDeque;
use std::ops::Deref;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

use crate::deadline::Deadline;

/// Lets a [`Permit`] find the capacity of its owner.
pub(super) trait HasCapacity: Sized {
    fn capacity(&self) -> &Capacity<Self>;
}

/// The permits of one owner.
#[derive(Debug)]
pub(super) struct Capacity<T: HasCapacity>(Mutex<Inner<T>>);

#[derive(Debug)]
struct Inner<T: HasCapacity> {
    taken: u32,
    waiting: VecDeque<Arc<Waiter<T>>>,
}

impl<T: HasCapacity> Inner<T> {
    /// Takes a unit unless `limit` of them are in use; without a limit, always. Returns whether it was taken.
    fn take(&mut self, limit: Option<u32>) -> bool {
        let is_free = limit.is_none_or(|limit| self.taken < limit);
        if is_free {
            self.taken += 1;
        }
        is_free
    }
}

/// A login in the queues of one or several owners.
#[derive(Debug)]
struct Waiter<T: HasCapacity> {
    /// `None` once a permit was sent, or the login has stopped waiting.
    sender: Mutex<Option<oneshot::Sender<Permit<T>>>>,
}

impl<T: HasCapacity> Waiter<T> {
    fn take_sender(&self) -> Option<oneshot::Sender<Permit<T>>> {
        self.sender.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

impl<T: HasCapacity> Default for Capacity<T> {
    fn default() -> Self {
        Self(Mutex::new(Inner { taken: 0, waiting: VecDeque::new() }))
    }
}

impl<T: HasCapacity> Capacity<T> {
    /// Number of permits in use.
    pub(super) fn taken(&self) -> u32 {
        self.lock().taken
    }

    fn lock(&self) -> MutexGuard<'_, Inner<T>> {
        // No code panics while it holds the lock, so the value of a poisoned one is consistent.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    #[cfg(test)]
    pub(super) fn has_waiters(&self) -> bool {
        !self.lock().waiting.is_empty()
    }
}

/// One unit of the owner's capacity; derefs to the owner.
#[derive(Debug)]
pub(super) struct Permit<T: HasCapacity>(Arc<T>);

impl<T: HasCapacity> Permit<T> {
    /// Takes a permit, unless `limit` of them are in use.
    pub(super) fn try_take(owner: &Arc<T>, limit: Option<u32>) -> Option<Self> {
        owner.capacity().lock().take(limit).then(|| Self(owner.clone()))
    }

    /// Takes a permit even if that exceeds the limit.
    pub(super) fn take_over_limit(owner: &Arc<T>) -> Self {
        owner.capacity().lock().taken += 1;
        Self(owner.clone())
    }

    /// Takes a permit, or adds `waiter` to the owner's queue in the same step.
    fn take_or_wait(LimitedOwner { owner, limit }: &LimitedOwner<T>, waiter: &Arc<Waiter<T>>) -> Option<Self> {
        let mut inner = owner.capacity().lock();
        if inner.take(*limit) {
            return Some(Self(owner.clone()));
        }
        inner.waiting.push_back(waiter.clone());
        None
    }

    /// Whether this is a permit of `owner`.
    pub(super) fn is_of(&self, owner: &Arc<T>) -> bool {
        Arc::ptr_eq(&self.0, owner)
    }
}

impl<T: HasCapacity> Deref for Permit<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0
    }
}

impl<T: HasCapacity> Drop for Permit<T> {
    /// Passes the unit to the login that has waited longest, or returns it.
    fn drop(&mut self) {
        loop {
            let mut inner = self.0.capacity().lock();
            let Some(waiter) = inner.waiting.pop_front() else {
                inner.taken -= 1;
                return;
            };
            drop(inner);
            let Some(sender) = waiter.take_sender() else { continue };
            // If the receiver is gone, dropping the permit in the error passes it to the next waiter.
            drop(sender.send(Self(self.0.clone())));
            return;
        }
    }
}

/// Number of logins that wait for permits, which has an upper limit. Their order is kept by each [`Capacity`].
#[derive(Debug, Default)]
pub(super) struct QueueLength(AtomicU32);

impl QueueLength {
    /// Counts one more login, unless `max_length` of them wait.
    pub(super) fn enter(&self, max_length: u32) -> Option<QueueEntry<'_>> {
        let enter = |length| (length < max_length).then_some(length + 1);
        self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, enter).ok()?;
        Some(QueueEntry(self))
    }
}

/// A login that [`QueueLength`] counts, until it drops.
pub(super) struct QueueEntry<'a>(&'a QueueLength);

/// An owner at which a login waits.
pub(super) struct LimitedOwner<T> {
    pub(super) owner: Arc<T>,
    /// Maximum number of permits; `None` if unlimited.
    pub(super) limit: Option<u32>,
}

impl QueueEntry<'_> {
    /// Waits until `deadline` for a permit of any of `owners`.
    pub(super) async fn wait<T: HasCapacity>(
        self,
        owners: &[LimitedOwner<T>],
        deadline: Deadline,
    ) -> Option<Permit<T>> {
        let (sender, receiver) = oneshot::channel();
        let guard = WaitGuard { waiter: Arc::new(Waiter { sender: Mutex::new(Some(sender)) }), owners };
        for owner in owners {
            if let Some(permit) = Permit::take_or_wait(owner, &guard.waiter) {
                return Some(permit);
            }
        }
        deadline.limit(receiver).await.ok()?.ok()
    }
}

impl Drop for QueueEntry<'_> {
    fn drop(&mut self) {
        self.0.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Removes a waiter from the queues of all owners when it drops.
struct WaitGuard<'a, T: HasCapacity> {
    waiter: Arc<Waiter<T>>,
    owners: &'a [LimitedOwner<T>],
}

impl<T: HasCapacity> Drop for WaitGuard<'_, T> {
    fn drop(&mut self) {
        drop(self.waiter.take_sender());
        for LimitedOwner { owner, .. } in self.owners {
            owner.capacity().lock().waiting.retain(|waiter| !Arc::ptr_eq(waiter, &self.waiter));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::Instant;

    use super::*;

    #[derive(Debug, Default)]
    struct Owner(Capacity<Self>);

    impl HasCapacity for Owner {
        fn capacity(&self) -> &Capacity<Self> {
            &self.0
        }
    }

    const LIMIT: Option<u32> = Some(1);

    fn owner() -> Arc<Owner> {
        Arc::default()
    }

    fn limited(owner: &Arc<Owner>) -> LimitedOwner<Owner> {
        LimitedOwner { owner: owner.clone(), limit: LIMIT }
    }

    fn later() -> Deadline {
        Deadline::after(Duration::from_secs(60))
    }

    #[tokio::test(start_paused = true)]
    async fn permits_are_passed_on_in_order_of_arrival() {
        let (owner, queue) = (owner(), QueueLength::default());
        let owners = [limited(&owner)];
        let permit = Permit::try_take(&owner, LIMIT).unwrap();
        assert!(Permit::try_take(&owner, LIMIT).is_none());
        let mut first = Box::pin(queue.enter(2).unwrap().wait(&owners, later()));
        let mut second = Box::pin(queue.enter(2).unwrap().wait(&owners, later()));
        assert!(futures_util::poll!(&mut first).is_pending() && futures_util::poll!(&mut second).is_pending());
        assert!(queue.enter(2).is_none(), "the queue is bounded");
        drop(permit);
        assert!(Permit::try_take(&owner, LIMIT).is_none(), "a newcomer does not overtake");
        let permit = first.await.unwrap();
        assert!(futures_util::poll!(&mut second).is_pending());
        drop(permit);
        let permit = second.await.unwrap();
        assert!(permit.is_of(&owner));
        assert_eq!(owner.0.taken(), 1);
        drop(permit);
        assert_eq!(owner.0.taken(), 0);
        assert!(queue.enter(1).is_some(), "both have left the queue");
    }

    #[tokio::test(start_paused = true)]
    async fn waiter_that_gives_up_is_skipped() {
        let (owner, queue) = (owner(), QueueLength::default());
        let owners = [limited(&owner)];
        let permit = Permit::try_take(&owner, LIMIT).unwrap();
        let started = Instant::now();
        let deadline = Deadline::after(Duration::from_secs(5));
        let mut patient = Box::pin(queue.enter(9).unwrap().wait(&owners, later()));
        {
            let mut dropped = Box::pin(queue.enter(9).unwrap().wait(&owners, later()));
            assert!(futures_util::poll!(&mut dropped).is_pending());
        }
        assert!(queue.enter(9).unwrap().wait(&owners, deadline).await.is_none());
        assert_eq!(started.elapsed().as_secs(), 5);
        assert!(futures_util::poll!(&mut patient).is_pending());
        drop(permit);
        assert!(patient.await.is_some());
        assert_eq!(owner.0.taken(), 0);
        assert!(!owner.0.has_waiters());
    }

    #[tokio::test(start_paused = true)]
    async fn waiter_at_several_owners_gets_the_first_free_permit() {
        let (one, other, queue) = (owner(), owner(), QueueLength::default());
        let owners = [limited(&one), limited(&other)];
        let (_taken, freed) = (Permit::try_take(&one, LIMIT).unwrap(), Permit::try_take(&other, LIMIT).unwrap());
        let mut waiting = Box::pin(queue.enter(9).unwrap().wait(&owners, later()));
        assert!(futures_util::poll!(&mut waiting).is_pending());
        drop(freed);
        assert!(waiting.await.unwrap().is_of(&other));
        assert_eq!((one.0.taken(), other.0.taken()), (1, 0));
        assert!(!one.0.has_waiters(), "the waiter has left the other owner too");
    }

    #[tokio::test(start_paused = true)]
    async fn permit_sent_to_a_dropped_waiter_is_not_lost() {
        let (owner, queue) = (owner(), QueueLength::default());
        let owners = [limited(&owner)];
        let permit = Permit::try_take(&owner, LIMIT).unwrap();
        let mut waiting = Box::pin(queue.enter(9).unwrap().wait(&owners, later()));
        assert!(futures_util::poll!(&mut waiting).is_pending());
        drop(permit);
        // The permit was sent, and the future is not polled again.
        drop(waiting);
        assert_eq!(owner.0.taken(), 0);
        assert!(Permit::try_take(&owner, LIMIT).is_some());
    }
}
