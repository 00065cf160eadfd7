//! A second attempt on a fresh connection, for requests over a connection that was idle before.
//!
//! A firewall or a peer that died without a word leaves connections that look open and carry nothing. Waiting for an answer
//! cannot tell such a connection from a slow peer, so the second attempt does not end the first: whichever answers first
//! wins, and a slow peer costs one more request instead of a failure.

use std::sync::atomic::{AtomicU32, Ordering};

use tokio::time::{Instant, timeout_at};

/// Deadline and progress of one request.
#[derive(Debug)]
pub struct Budget {
    due: Instant,
    /// Connections that are being established.
    connecting: AtomicU32,
}

impl Budget {
    /// A request that its caller ends at `due`.
    pub fn until(due: Instant) -> Self {
        Self { due, connecting: AtomicU32::new(0) }
    }

    /// Until when an attempt on a connection that was idle is waited for alone: half of the time that is left.
    pub fn patience(&self) -> Instant {
        let now = Instant::now();
        now + self.due.saturating_duration_since(now) / 2
    }

    /// Runs `connect`; until it ends or is dropped, [`Budget::is_connecting`] is true.
    pub async fn connecting<T>(&self, connect: impl Future<Output = T>) -> T {
        let _connecting = Connecting::new(&self.connecting);
        connect.await
    }

    /// Whether the deadline, if it passes now, passes while a connection is being established.
    pub fn is_connecting(&self) -> bool {
        self.connecting.load(Ordering::Relaxed) > 0
    }
}

/// One connection that is being established. Its drop ends the count, also if the attempt is cancelled.
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
/// The errors are failures of a connection. What a peer answers, whatever it is, is a success here.
pub async fn hedged<T, E>(
    first: impl Future<Output = Result<T, E>>,
    patience: Instant,
    second: impl Future<Output = Result<T, E>>,
) -> Result<T, E> {
    let (mut first, mut second) = (std::pin::pin!(first), std::pin::pin!(second));
    match timeout_at(patience, &mut first).await {
        Ok(Ok(answer)) => return Ok(answer),
        Ok(Err(_)) => return second.await,
        Err(_) => {}
    }
    tokio::select! {
        result = &mut first => match result {
            Ok(answer) => Ok(answer),
            Err(_) => second.await,
        },
        result = &mut second => match result {
            Ok(answer) => Ok(answer),
            Err(error) => first.await.map_err(|_| error),
        },
    }
}

#[cfg(test)]
mod tests {
    use std::future::pending;
    use std::time::Duration;

    use tokio::time::sleep;

    use super::*;

    type Attempt = Result<&'static str, &'static str>;

    async fn after(seconds: u64, result: Attempt) -> Attempt {
        sleep(Duration::from_secs(seconds)).await;
        result
    }

    /// Result and seconds it took, with a patience of ten seconds.
    async fn run(first: impl Future<Output = Attempt>, second: impl Future<Output = Attempt>) -> (Attempt, u64) {
        let began = Instant::now();
        let result = hedged(first, began + Duration::from_secs(10), second).await;
        (result, began.elapsed().as_secs())
    }

    #[tokio::test(start_paused = true)]
    async fn a_cancelled_connection_attempt_is_not_counted_any_more() {
        let budget = Budget::until(Instant::now() + Duration::from_secs(10));
        tokio::select! {
            biased;
            () = budget.connecting(pending()) => {}
            () = async { assert!(budget.is_connecting()) } => {}
        }
        assert!(!budget.is_connecting());
        budget.connecting(async { assert!(budget.is_connecting()) }).await;
        assert!(!budget.is_connecting());
    }

    #[tokio::test(start_paused = true)]
    async fn the_second_attempt_begins_when_the_first_fails_or_is_silent() {
        assert_eq!(run(after(9, Ok("first")), async { panic!("not needed") }).await, (Ok("first"), 9));
        assert_eq!(run(after(1, Err("reset")), after(2, Ok("second"))).await, (Ok("second"), 3));
        assert_eq!(run(pending(), after(2, Ok("second"))).await, (Ok("second"), 12));
    }

    #[tokio::test(start_paused = true)]
    async fn a_slow_first_answer_counts() {
        assert_eq!(run(after(11, Ok("first")), after(5, Ok("second"))).await, (Ok("first"), 11));
        assert_eq!(run(after(14, Ok("first")), after(2, Err("refused"))).await, (Ok("first"), 14));
        assert_eq!(run(after(11, Err("reset")), after(5, Ok("second"))).await, (Ok("second"), 15));
        assert_eq!(run(after(14, Err("reset")), after(2, Err("refused"))).await, (Err("refused"), 14));
    }
}
