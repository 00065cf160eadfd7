//! Idle connections to a directory.
//!
//! [`CachedDirectory`](super::cached_directory::CachedDirectory) limits the connections in use; this list limits the number and the age of
//! idle ones. The caller passes the time.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// A connection that has been idle for this long is closed, because firewalls on the path may have dropped its state.
const MAX_IDLE: Duration = Duration::from_secs(60);

/// The idle connections of one directory; the most recently used one is taken first.
pub(super) struct IdleConnections<C> {
    limit: usize,
    list: Mutex<List<C>>,
}

struct List<C> {
    /// Each with the time of its last use, oldest first.
    connections: Vec<(C, Instant)>,
    is_closed: bool,
}

impl<C> IdleConnections<C> {
    /// Creates a list of at most `limit` connections.
    pub(super) fn new(limit: usize) -> Self {
        Self { limit, list: Mutex::new(List { connections: Vec::new(), is_closed: false }) }
    }

    /// Takes the most recently used connection, unless it has been idle for too long.
    pub(super) fn take(&self, now: Instant) -> Option<C> {
        let (connection, used) = self.lock().connections.pop()?;
        (now.saturating_duration_since(used) < MAX_IDLE).then_some(connection)
    }

    /// Adds a connection whose last answer has been read. Returns the connection if the list is full or closed.
    pub(super) fn put(&self, connection: C, now: Instant) -> Option<C> {
        let mut list = self.lock();
        if list.is_closed || list.connections.len() >= self.limit {
            return Some(connection);
        }
        list.connections.push((connection, now));
        None
    }

    /// Removes connections last used before `time`, because a connection of that age has failed.
    pub(super) fn remove_older_than(&self, time: Instant) -> Vec<C> {
        let connections = &mut self.lock().connections;
        let end = connections.partition_point(|(_, used)| *used < time);
        connections.drain(..end).map(|(connection, _)| connection).collect()
    }

    /// Removes connections that have been idle for too long.
    pub(super) fn remove_expired(&self, now: Instant) -> Vec<C> {
        now.checked_sub(MAX_IDLE).map_or_else(Vec::new, |time| self.remove_older_than(time))
    }

    /// Removes all connections and accepts no more.
    pub(super) fn close(&self) -> Vec<C> {
        let mut list = self.lock();
        list.is_closed = true;
        list.connections.drain(..).map(|(connection, _)| connection).collect()
    }

    fn lock(&self) -> MutexGuard<'_, List<C>> {
        // A poisoned lock is safe: no critical section can panic halfway through a change.
        self.list.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn most_recent_connection_is_taken_first_and_expired_ones_are_removed() {
        let idle = IdleConnections::new(3);
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        for (connection, seconds) in [(1, 0), (2, 10), (3, 20)] {
            assert_eq!(idle.put(connection, at(seconds)), None);
        }
        assert_eq!(idle.put(4, at(30)), Some(4), "the list is full");
        assert_eq!(idle.take(at(30)), Some(3));
        assert_eq!(idle.remove_expired(at(65)), [1]);
        assert_eq!(idle.take(at(70)), None, "it has been idle for 60 s");
        assert_eq!(idle.take(at(70)), None);
    }

    #[test]
    fn failure_removes_older_connections_and_a_closed_list_accepts_none() {
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
