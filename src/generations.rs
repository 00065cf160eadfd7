//! Detects lookup results that are out of date because of a later event for the same name, in constant memory.
//!
//! A caller reads the current [`Generation`] before a lookup starts. The result may be used if no event for its name has occurred
//! since: [`Generations::is_current`]. Names share a fixed number of buckets, so that names chosen by clients do not use memory. A
//! collision only discards a result that is still valid.

use std::hash::{BuildHasher as _, RandomState};

/// Number of buckets: 8 KiB.
const BUCKETS: usize = 1024;

/// A moment in the order of events.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Generation(u64);

/// The last event of each bucket of names, and of all names.
#[derive(Debug)]
pub(crate) struct Generations {
    now: u64,
    /// The last event that concerned every name.
    all: u64,
    by_name: Box<[u64; BUCKETS]>,
    /// Random per process, so that no client can choose names that collide with another user's.
    hasher: RandomState,
}

impl Default for Generations {
    fn default() -> Self {
        Self { now: 0, all: 0, by_name: Box::new([0; BUCKETS]), hasher: RandomState::new() }
    }
}

impl Generations {
    /// The current generation, to be read before a lookup starts.
    pub(crate) fn current(&self) -> Generation {
        Generation(self.now)
    }

    /// Makes everything that was looked up for `name` before now out of date.
    pub(crate) fn invalidate(&mut self, name: &str) {
        self.now += 1;
        let bucket = self.bucket(name);
        self.by_name[bucket] = self.now;
    }

    /// Makes everything that was looked up before now out of date.
    pub(crate) fn invalidate_all(&mut self) {
        self.now += 1;
        self.all = self.now;
    }

    /// Whether what was looked up for `name` since `since` may still be used.
    pub(crate) fn is_current(&self, name: &str, since: Generation) -> bool {
        since.0 >= self.all && since.0 >= self.by_name[self.bucket(name)]
    }

    fn bucket(&self, name: &str) -> usize {
        // The modulus fits a usize, whatever its width.
        usize::try_from(self.hasher.hash_one(name) % BUCKETS as u64).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn event_outdates_lookups_that_began_before_it() {
        let mut generations = Generations::default();
        let before = generations.current();
        assert!(generations.is_current("alice", before));
        generations.invalidate("alice");
        assert!(!generations.is_current("alice", before));
        let after = generations.current();
        assert!(generations.is_current("alice", after));
        // Another name is affected only if it shares the bucket.
        let other = (0..).map(|number| format!("user{number}"));
        let other = other.into_iter().find(|name| generations.bucket(name) != generations.bucket("alice")).unwrap();
        assert!(generations.is_current(&other, before));
        generations.invalidate_all();
        assert!(!generations.is_current(&other, after) && !generations.is_current("alice", after));
        assert!(generations.is_current("alice", generations.current()));
    }

    #[test]
    fn memory_does_not_grow_with_names() {
        let mut generations = Generations::default();
        let before = generations.current();
        for number in 0..100_000 {
            generations.invalidate(&format!("attacker{number}"));
        }
        assert!(!generations.is_current("alice", before), "a collision discards a valid result");
        assert_eq!(size_of_val(&*generations.by_name), 8192);
    }
}
