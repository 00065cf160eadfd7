//! How the process stops: a signal, a drain, a bounded wait.
//!
//! A drain has two edges. At the first, listeners stop and clients that have not logged in are told BYE. Relayed sessions
//! cannot be spoken into safely (they may be inside a literal), so they run on until they end or until the second
//! edge, when the grace time is over. Called by `server`, watched by `listener` and `session`.

use std::future::Future;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;

/// How a process stops.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum DrainMode {
    /// Clients that have not logged in are told to come back.
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

    /// A session that the drain waits for as long as this is held, whichever task it is in.
    pub(crate) fn count(&self) -> TaskTrackerToken {
        self.0.sessions.token()
    }

    /// Readiness checks fail from now on, so that balancers send clients elsewhere; all else goes on.
    pub(crate) fn announce(&self) {
        self.0.announced.cancel();
    }

    /// Cancelled when the stop is announced, and at the latest when it begins.
    pub(crate) fn announced(&self) -> &CancellationToken {
        &self.0.announced
    }

    /// The first edge: no new sessions, no new logins.
    pub(crate) fn begun(&self) -> &CancellationToken {
        &self.0.begun
    }

    /// The second edge: the grace time is over.
    pub(crate) fn over(&self) -> &CancellationToken {
        &self.0.over
    }

    /// Sessions under way.
    pub(crate) fn open_sessions(&self) -> usize {
        self.0.sessions.len()
    }

    /// Drains: begins, waits up to `grace` or until `hurry` for sessions to end by themselves, then ends the rest.
    /// Returns how many had to be ended.
    pub(crate) async fn run(&self, grace: Duration, hurry: impl Future<Output = ()>, manner: DrainMode) -> usize {
        if manner == DrainMode::Stop {
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

/// What the operator asks for by a signal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Asked {
    /// SIGTERM or SIGINT.
    Stop,
    /// SIGHUP.
    Reload,
}

/// The signals, each time one arrives.
#[derive(Debug)]
pub(crate) struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
}

impl Signals {
    /// Takes the signals over from their default action.
    ///
    /// # Errors
    /// The system refuses a handler.
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hangup: signal(SignalKind::hangup())?,
        })
    }

    /// Waits for the next one.
    pub(crate) async fn next(&mut self) -> Asked {
        tokio::select! {
            _ = self.terminate.recv() => Asked::Stop,
            _ = self.interrupt.recv() => Asked::Stop,
            _ = self.hangup.recv() => Asked::Reload,
        }
    }

    /// Waits for the next that stops.
    pub(crate) async fn stop(&mut self) {
        while self.next().await != Asked::Stop {}
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
    async fn the_rest_is_ended_after_the_grace_time() {
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
