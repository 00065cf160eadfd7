//! Hedged requests: a request over an idle connection gets a second attempt on a fresh connection.
//!
//! A firewall or a peer that died silently leaves connections that look open and carry nothing. A client that waits for an answer
//! cannot distinguish such a connection from a slow peer, so the second attempt does not end the first: the first answer
//! is used, and a slow peer costs one more request instead of a failure.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::deadline::Deadline;

/// Deadline and progress of one request.
#[derive(Debug)]
pub(crate) struct Budget {
    deadline: Deadline,
    /// Number of connections that are being established.
    connecting: AtomicU32,
}

impl Budget {
    /// Budget of a request that ends `time` from now.
    pub(crate) fn of(time: Duration) -> Self {
        Self { deadline: Deadline::after(time), connecting: AtomicU32::new(0) }
    }

    /// Runs the request until the deadline.
    ///
    /// # Errors
    /// The deadline has expired. Time in which the process was not scheduled does not count.
    pub(crate) async fn limit<F: Future>(&self, request: F) -> Result<F::Output, Expired> {
        let mut request = std::pin::pin!(request);
        let result = self.deadline.limit(&mut request).await;
        // The request is dropped after this, and its connection attempts with it.
        result.map_err(|_| Expired { is_connecting: self.is_connecting() })
    }

    /// How long the first attempt runs alone: half of the remaining time.
    pub(crate) fn patience(&self) -> Deadline {
        Deadline::after(self.deadline.due().saturating_duration_since(Instant::now()) / 2)
    }

    /// Runs `connect`. Until it ends or is dropped, [`Budget::is_connecting`] returns true.
    pub(crate) async fn connecting<T>(&self, connect: impl Future<Output = T>) -> T {
        let _connecting = Connecting::new(&self.connecting);
        connect.await
    }

    /// Whether a connection is being established.
    fn is_connecting(&self) -> bool {
        self.connecting.load(Ordering::Relaxed) > 0
    }
}

/// The deadline of a request has expired.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Expired {
    /// Whether a connection was being established then.
    pub is_connecting: bool,
}

/// Counts a connection that is being established, until it is dropped: also if the attempt is cancelled.
struct Connecting<'a>(&'a AtomicU32);

impl<'a> Connecting<'a> {
    fn new(count: &'a AtomicU32) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(count)
    }
}

impl Drop for Connecting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Runs `first` alone until `patience`, then `second` beside it; `second` runs at once if `first` fails. The first success
/// is the result, and the other attempt is dropped with its connection. If both fail, the error is that of `second`.
///
/// `on_dead` is called when the connection of `first` has failed, or when `second` is answered first: the caller then discards connections
/// of that age. If the first attempt is slow, and answers or times out, no other connection is discarded.
///
/// The errors are failures of a connection. Any answer of a peer, also an error, is a success here.
pub(crate) async fn hedged<T, E>(
    first: impl Future<Output = Result<T, E>>,
    patience: Deadline,
    second: impl Future<Output = Result<T, E>>,
    on_dead: impl FnOnce(),
) -> Result<T, E> {
    let (mut first, mut second) = (std::pin::pin!(first), std::pin::pin!(second));
    match patience.limit(&mut first).await {
        Ok(Ok(answer)) => return Ok(answer),
        Ok(Err(_)) => {
            on_dead();
            return second.await;
        }
        Err(_) => {}
    }
    tokio::select! {
        result = &mut first => match result {
            Ok(answer) => Ok(answer),
            Err(_) => {
                on_dead();
                second.await
            }
        },
        result = &mut second => match result {
            Ok(answer) => {
                on_dead();
                Ok(answer)
            }
            Err(error) => first.await.map_err(|_| {
                on_dead();
                error
            }),
        },
    }
}

/// A connection that requests share, and a spare one for the second attempts of requests on it.
///
/// The spare connection replaces the current one when that has proved to be dead. A slow answer alone does not replace it.
#[derive(Debug)]
pub(crate) struct SharedConnection<C>(Mutex<Pair<C>>);

#[derive(Debug)]
struct Pair<C> {
    current: Option<Arc<C>>,
    spare: Option<Arc<C>>,
}

impl<C> Default for SharedConnection<C> {
    fn default() -> Self {
        Self(Mutex::new(Pair { current: None, spare: None }))
    }
}

impl<C> SharedConnection<C> {
    /// Returns the connection for a first attempt.
    pub(crate) fn current(&self) -> Option<Arc<C>> {
        self.lock().current.clone()
    }

    /// Returns a connection for the second attempt of a request whose first attempt used `old`.
    pub(crate) fn other_than(&self, old: &Arc<C>) -> Option<Arc<C>> {
        let pair = self.lock();
        pair.current.as_ref().filter(|current| !Arc::ptr_eq(current, old)).or(pair.spare.as_ref()).cloned()
    }

    /// Adds a new connection: as the spare one if there is a current one.
    pub(crate) fn put(&self, connection: Arc<C>) {
        let mut pair = self.lock();
        let slot = if pair.current.is_none() { &mut pair.current } else { &mut pair.spare };
        *slot = Some(connection);
    }

    /// Discards a connection that has failed.
    pub(crate) fn discard(&self, dead: &Arc<C>) {
        self.discard_spare(dead);
        let mut pair = self.lock();
        if pair.current.as_ref().is_some_and(|current| Arc::ptr_eq(current, dead)) {
            pair.current = pair.spare.take();
        }
    }

    /// Discards a connection if it is the spare one.
    pub(crate) fn discard_spare(&self, unused: &Arc<C>) {
        self.lock().spare.take_if(|spare| Arc::ptr_eq(spare, unused));
    }

    pub(crate) fn clear(&self) {
        *self.lock() = Pair { current: None, spare: None };
    }

    fn lock(&self) -> MutexGuard<'_, Pair<C>> {
        // A poisoned lock is safe: no critical section can panic halfway through a change.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Discards a connection when dropped, unless the request on it was answered.
pub(crate) struct DiscardUnlessAnswered<F: FnMut()> {
    /// `None` once the request was answered.
    pub discard: Option<F>,
}

impl<F: FnMut()> Drop for DiscardUnlessAnswered<F> {
    fn drop(&mut self) {
        if let Some(discard) = &mut self.discard {
            discard();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::pending;

    use tokio::time::sleep;

    use super::*;

    type Attempt = Result<&'static str, &'static str>;

    async fn after(seconds: u64, result: Attempt) -> Attempt {
        sleep(Duration::from_secs(seconds)).await;
        result
    }

    /// Returns the result and its duration in seconds. The first attempt runs alone for ten seconds.
    async fn run(first: impl Future<Output = Attempt>, second: impl Future<Output = Attempt>) -> (Attempt, u64) {
        let (result, seconds, _) = run_all(first, second).await;
        (result, seconds)
    }

    /// Also returns whether the first connection counts as dead.
    async fn run_all(
        first: impl Future<Output = Attempt>,
        second: impl Future<Output = Attempt>,
    ) -> (Attempt, u64, bool) {
        let began = Instant::now();
        let mut is_dead = false;
        let result = hedged(first, Deadline::after(Duration::from_secs(10)), second, || is_dead = true).await;
        (result, began.elapsed().as_secs(), is_dead)
    }

    #[tokio::test(start_paused = true)]
    async fn cancelled_connection_attempt_is_no_longer_counted() {
        let budget = Budget::of(Duration::from_secs(10));
        tokio::select! {
            biased;
            () = budget.connecting(pending()) => {}
            () = async { assert!(budget.is_connecting()) } => {}
        }
        assert!(!budget.is_connecting());
        let expired = budget.limit(budget.connecting(pending::<()>())).await.unwrap_err();
        assert!(expired.is_connecting, "the deadline expired during the attempt");
        assert!(!budget.is_connecting());
        budget.connecting(async { assert!(budget.is_connecting()) }).await;
        assert!(!budget.is_connecting());
    }

    #[tokio::test(start_paused = true)]
    async fn second_attempt_begins_when_the_first_fails_or_is_silent() {
        assert_eq!(run(after(9, Ok("first")), async { panic!("must not be started") }).await, (Ok("first"), 9));
        assert_eq!(run(after(1, Err("reset")), after(2, Ok("second"))).await, (Ok("second"), 3));
        assert_eq!(run(pending(), after(2, Ok("second"))).await, (Ok("second"), 12));
    }

    #[tokio::test(start_paused = true)]
    async fn slow_first_answer_is_used() {
        assert_eq!(run(after(11, Ok("first")), after(5, Ok("second"))).await, (Ok("first"), 11));
        assert_eq!(run(after(14, Ok("first")), after(2, Err("refused"))).await, (Ok("first"), 14));
        assert_eq!(run(after(11, Err("reset")), after(5, Ok("second"))).await, (Ok("second"), 15));
        assert_eq!(run(after(14, Err("reset")), after(2, Err("refused"))).await, (Err("refused"), 14));
    }

    #[tokio::test(start_paused = true)]
    async fn connection_is_dead_if_it_failed_or_another_was_faster_and_not_if_it_was_slow() {
        let is_dead = async |first: Option<(u64, Attempt)>, second: (u64, Attempt)| {
            let first = async {
                match first {
                    Some((seconds, result)) => after(seconds, result).await,
                    None => pending().await,
                }
            };
            run_all(first, after(second.0, second.1)).await.2
        };
        assert!(!is_dead(Some((9, Ok("first"))), (1, Ok("second"))).await);
        assert!(!is_dead(Some((11, Ok("first"))), (5, Ok("second"))).await, "the connection was only slow");
        assert!(!is_dead(Some((14, Ok("first"))), (2, Err("refused"))).await);
        assert!(is_dead(Some((1, Err("reset"))), (2, Err("refused"))).await);
        assert!(is_dead(Some((11, Err("reset"))), (5, Ok("second"))).await);
        assert!(is_dead(Some((14, Err("reset"))), (2, Err("refused"))).await);
        assert!(is_dead(None, (2, Ok("second"))).await);
    }

    #[test]
    fn spare_connection_is_only_used_by_second_attempts_until_the_current_one_is_dead() {
        let shared = SharedConnection::default();
        let [first, spare, third] = [1, 2, 3].map(Arc::new);
        shared.put(first.clone());
        assert_eq!(shared.other_than(&first), None);
        shared.put(spare.clone());
        assert_eq!((shared.current(), shared.other_than(&first)), (Some(first.clone()), Some(spare.clone())));
        shared.discard(&first);
        assert_eq!((shared.current(), shared.other_than(&first)), (Some(spare.clone()), Some(spare.clone())));
        assert_eq!(shared.other_than(&spare), None);
        shared.put(third.clone());
        shared.discard_spare(&spare);
        assert_eq!(shared.other_than(&spare), Some(third.clone()), "the current connection is not a spare one");
        shared.discard_spare(&third);
        assert_eq!(shared.other_than(&spare), None);
        shared.discard(&spare);
        assert_eq!(shared.current(), None);
    }
}
