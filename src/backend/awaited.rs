//! Logins at one server that it has greeted and not answered yet.
//!
//! Clients cause these logins, and a server has a bounded number of processes for them (Dovecot's default is 100). While
//! there are many, a server that does not greet another login in time is overloaded, which is no evidence that it has
//! failed. A server that has stopped working greets nobody, so this state ends with the deadlines of the logins there.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

/// From this number on, a missing greeting is taken for overload.
const CROWDED: u32 = 16;

/// The number of such logins at one server.
#[derive(Debug, Default)]
pub(super) struct Awaited(Arc<AtomicU32>);

impl Awaited {
    /// Counts a login until the guard drops.
    pub(super) fn greeted(&self) -> AwaitedAnswer {
        self.0.fetch_add(1, Ordering::Relaxed);
        AwaitedAnswer(self.0.clone())
    }

    /// Whether there are so many that a missing greeting means overload.
    pub(super) fn is_crowded(&self) -> bool {
        self.0.load(Ordering::Relaxed) >= CROWDED
    }
}

/// One login that waits for the server's answer.
#[derive(Debug)]
pub(super) struct AwaitedAnswer(Arc<AtomicU32>);

impl Drop for AwaitedAnswer {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sixteen_logins_without_an_answer_are_a_crowd() {
        let awaited = Awaited::default();
        let mut logins: Vec<AwaitedAnswer> = (0..CROWDED).map(|_| awaited.greeted()).collect();
        assert!(awaited.is_crowded());
        logins.pop();
        assert!(!awaited.is_crowded());
    }
}
