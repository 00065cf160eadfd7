//! Counts open connections of all listeners and workers, up to a limit.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Number of open connections.
#[derive(Debug, Default)]
pub(crate) struct ConnectionLimit(AtomicUsize);

impl ConnectionLimit {
    /// Adds a connection; returns `None` if there are `limit` already.
    pub(crate) fn acquire(self: &Arc<Self>, limit: usize) -> Option<ConnectionPermit> {
        let increment = |open: usize| (open < limit).then_some(open + 1);
        self.0
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, increment)
            .ok()
            .map(|_| ConnectionPermit(self.clone()))
    }
}

/// Counts one open connection until it is dropped.
#[derive(Debug)]
pub(crate) struct ConnectionPermit(Arc<ConnectionLimit>);

impl Drop for ConnectionPermit {
    fn drop(&mut self) {
        self.0.0.fetch_sub(1, Ordering::Relaxed);
    }
}
