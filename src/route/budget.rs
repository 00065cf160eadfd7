//! The time that one lookup has, and whether it is still connecting.

use std::sync::atomic::{AtomicU32, Ordering};

use tokio::time::Instant;

/// Deadline and progress of one lookup.
#[derive(Debug)]
pub(super) struct Budget {
    due: Instant,
    /// Connections that are being established.
    connecting: AtomicU32,
}

impl Budget {
    pub(super) fn until(due: Instant) -> Self {
        Self { due, connecting: AtomicU32::new(0) }
    }

    pub(super) fn due(&self) -> Instant {
        self.due
    }

    /// Until when an attempt on a connection that was idle is waited for alone: half of the time that is left.
    pub(super) fn patience(&self) -> Instant {
        let now = Instant::now();
        now + self.due.saturating_duration_since(now) / 2
    }

    /// Runs `connect`; until it ends, [`Budget::is_connecting`] is true.
    pub(super) async fn connecting<T>(&self, connect: impl Future<Output = T>) -> T {
        self.connecting.fetch_add(1, Ordering::Relaxed);
        let connected = connect.await;
        self.connecting.fetch_sub(1, Ordering::Relaxed);
        connected
    }

    /// Whether the deadline, if it passes now, passes while a connection is being established.
    pub(super) fn is_connecting(&self) -> bool {
        self.connecting.load(Ordering::Relaxed) > 0
    }
}
