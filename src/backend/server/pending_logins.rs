//! Logins at one server that it has greeted but not answered yet.
//!
//! Clients cause these logins, and a server has a bounded number of processes for them (Dovecot's default is 100). While
//! there are many, a server that does not greet another login in time is overloaded, which is not evidence that it has
//! failed. A server that has stopped working greets no login, so this state ends with the deadlines of the pending ones.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

/// From this number of pending logins on, a missing greeting means overload.
const MANY: u32 = 16;

/// The number of pending logins at one server.
#[derive(Debug, Default)]
pub(super) struct PendingLogins(Arc<AtomicU32>);

impl PendingLogins {
    /// Counts a login until the guard drops.
    pub(super) fn begin(&self) -> PendingLogin {
        self.0.fetch_add(1, Ordering::Relaxed);
        PendingLogin(self.0.clone())
    }

    /// Whether a missing greeting means overload.
    pub(super) fn are_many(&self) -> bool {
        self.0.load(Ordering::Relaxed) >= MANY
    }
}

/// A login that waits for the server's answer.
#[derive(Debug)]
pub(in crate::backend) struct PendingLogin(Arc<AtomicU32>);

impl Drop for PendingLogin {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sixteen_pending_logins_are_many() {
        let pending = PendingLogins::default();
        let mut logins: Vec<PendingLogin> = (0..MANY).map(|_| pending.begin()).collect();
        assert!(pending.are_many());
        logins.pop();
        assert!(!pending.are_many());
    }
}
