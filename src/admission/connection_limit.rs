//! How many connections are open, over all listeners and workers. Called by `listener`; held by `session`.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct ConnectionLimit(AtomicUsize);

impl ConnectionLimit {
    /// One more, unless there are `limit` already.
    pub(crate) fn enter(self: &Arc<Self>, limit: usize) -> Option<ConnectionPermit> {
        let more = |open: usize| (open < limit).then_some(open + 1);
        self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).ok().map(|_| ConnectionPermit(self.clone()))
    }
}

/// One open connection, until dropped.
#[derive(Debug)]
pub(crate) struct ConnectionPermit(Arc<ConnectionLimit>);

impl Drop for ConnectionPermit {
    fn drop(&mut self) {
        self.0.0.fetch_sub(1, Ordering::Relaxed);
    }
}
