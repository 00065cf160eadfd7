//! The drain that stops a process.
//!
//! It has two edges. At the first, listeners stop accepting and clients that have not logged in are sent BYE. Nothing can be
//! inserted into a relayed session safely, because it may be inside a literal, so relayed sessions continue until they end or
//! until the second edge, when the grace time is over.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;

/// The reason for a drain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum DrainMode {
    /// Clients that have not logged in are sent BYE.
    Stop,
    /// A successor takes new clients; those that are logging in may finish.
    Retire,
}

/// The state of a drain, shared by everything that must stop.
#[derive(Debug, Clone, Default)]
pub(crate) struct Drain(Arc<DrainState>);

#[derive(Debug, Default)]
struct DrainState {
    announced: CancellationToken,
    begun: CancellationToken,
    over: CancellationToken,
    sessions: TaskTracker,
}

impl Drain {
    /// Runs a session that the drain waits for.
    pub(crate) fn spawn(&self, session: impl Future<Output = ()> + Send + 'static) {
        self.0.sessions.spawn(session);
    }

    /// Makes the drain wait until the token is dropped, for a session without a task of its own.
    pub(crate) fn count(&self) -> TaskTrackerToken {
        self.0.sessions.token()
    }

    /// Lets readiness checks fail from now on, so that balancers send clients elsewhere. Everything else continues.
    pub(crate) fn announce(&self) {
        self.0.announced.cancel();
    }

    /// Cancelled when the stop is announced, and at the latest when it begins.
    pub(crate) fn announced(&self) -> &CancellationToken {
        &self.0.announced
    }

    /// Cancelled at the first edge: no new connections, no new logins.
    pub(crate) fn begun(&self) -> &CancellationToken {
        &self.0.begun
    }

    /// Cancelled at the second edge: the grace time is over.
    pub(crate) fn over(&self) -> &CancellationToken {
        &self.0.over
    }

    /// Number of sessions that have not ended.
    pub(crate) fn open_sessions(&self) -> usize {
        self.0.sessions.len()
    }

    /// Begins the drain, waits until all sessions have ended, `grace` has passed or `hurry` completes, and then ends the
    /// remaining sessions. Returns their number.
    pub(crate) async fn run(&self, grace: Duration, hurry: impl Future<Output = ()>, mode: DrainMode) -> usize {
        if mode == DrainMode::Stop {
            self.0.announced.cancel();
            self.0.begun.cancel();
        }
        self.0.sessions.close();
        tokio::select! {
            () = self.0.sessions.wait() => return 0,
            () = tokio::time::sleep(grace) => {}
            () = hurry => {}
        }
        let forced = self.0.sessions.len();
        self.0.announced.cancel();
        self.0.begun.cancel();
        self.0.over.cancel();
        self.0.sessions.wait().await;
        forced
    }
}

#[cfg(test)]
mod tests {
    use std::future::pending;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn sessions_that_end_in_time_are_not_forced() {
        let drain = Drain::default();
        let begun = drain.begun().clone();
        drain.spawn(async move { begun.cancelled().await });
        drain.announce();
        assert!(!drain.begun().is_cancelled(), "an announcement ends nothing");
        assert_eq!(drain.run(Duration::from_secs(60), pending(), DrainMode::Stop).await, 0);
        assert!(drain.announced().is_cancelled() && !drain.over().is_cancelled());
    }

    #[tokio::test(start_paused = true)]
    async fn remaining_sessions_are_ended_after_the_grace_time() {
        let drain = Drain::default();
        let over = drain.over().clone();
        drain.spawn(async move { over.cancelled().await });
        let began = tokio::time::Instant::now();
        assert_eq!(drain.run(Duration::from_secs(60), pending(), DrainMode::Stop).await, 1);
        assert_eq!(began.elapsed(), Duration::from_secs(60));
        assert_eq!(drain.open_sessions(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_second_signal_ends_the_grace_time() {
        let drain = Drain::default();
        let over = drain.over().clone();
        drain.spawn(async move { over.cancelled().await });
        assert_eq!(drain.run(Duration::from_secs(60), async {}, DrainMode::Stop).await, 1);
    }
}
