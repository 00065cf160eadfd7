//! Connections to a directory that wait for their next lookup.
//!
//! The number of connections in use is bounded elsewhere (by the places of `asked`); this list bounds those that wait, and
//! their age. Decides by the time passed in.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// A connection that was unused for this long is closed: firewalls on the way may have forgotten it.
const LONGEST: Duration = Duration::from_secs(60);

/// The connections of one directory; the last one used is the first one taken.
pub(super) struct IdleConnections<C> {
    limit: usize,
    list: Mutex<List<C>>,
}

struct List<C> {
    /// With the time each was last used, oldest first.
    connections: Vec<(C, Instant)>,
    is_closed: bool,
}

impl<C> IdleConnections<C> {
    /// Keeps `limit` connections at most.
    pub(super) fn new(limit: usize) -> Self {
        Self { limit, list: Mutex::new(List { connections: Vec::new(), is_closed: false }) }
    }

    /// The connection that was used last, unless that is too long ago.
    pub(super) fn take(&self, now: Instant) -> Option<C> {
        let (connection, used) = self.lock().connections.pop()?;
        (now.saturating_duration_since(used) < LONGEST).then_some(connection)
    }

    /// Keeps a connection whose last answer has been read. Returns it if it cannot be kept.
    pub(super) fn put(&self, connection: C, now: Instant) -> Option<C> {
        let mut list = self.lock();
        if list.is_closed || list.connections.len() >= self.limit {
            return Some(connection);
        }
        list.connections.push((connection, now));
        None
    }

    /// Removes connections last used before `time`. Called when another that was as old has failed.
    pub(super) fn remove_older_than(&self, time: Instant) -> Vec<C> {
        let connections = &mut self.lock().connections;
        let kept_from = connections.partition_point(|(_, used)| *used < time);
        connections.drain(..kept_from).map(|(connection, _)| connection).collect()
    }

    /// Removes connections that are too old to be used again.
    pub(super) fn remove_expired(&self, now: Instant) -> Vec<C> {
        now.checked_sub(LONGEST).map_or_else(Vec::new, |time| self.remove_older_than(time))
    }

    /// Removes all connections, and keeps none from now on.
    pub(super) fn close(&self) -> Vec<C> {
        let mut list = self.lock();
        list.is_closed = true;
        list.connections.drain(..).map(|(connection, _)| connection).collect()
    }

    fn lock(&self) -> MutexGuard<'_, List<C>> {
        // No operation above can panic between two changes.
        self.list.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_used_is_taken_first_and_old_ones_are_not_used() {
        let idle = IdleConnections::new(3);
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        for (connection, seconds) in [(1, 0), (2, 10), (3, 20)] {
            assert_eq!(idle.put(connection, at(seconds)), None);
        }
        assert_eq!(idle.put(4, at(30)), Some(4), "there is a limit");
        assert_eq!(idle.take(at(30)), Some(3));
        assert_eq!(idle.remove_expired(at(65)), [1]);
        assert_eq!(idle.take(at(70)), None, "60 s after its last use");
        assert_eq!(idle.take(at(70)), None);
    }

    #[test]
    fn a_failure_removes_those_as_old_and_a_closed_list_keeps_none() {
        let idle = IdleConnections::new(8);
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        for seconds in 0..4 {
            idle.put(seconds, at(seconds));
        }
        assert_eq!(idle.remove_older_than(at(2)), [0, 1]);
        assert_eq!(idle.close(), [2, 3]);
        assert_eq!(idle.put(5, at(5)), Some(5));
        assert_eq!(idle.take(at(5)), None);
    }
}
