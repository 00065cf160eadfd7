//! Exact session counts by key, in memory proportional to the number of sessions.
//!
//! A session stores a [`CountSlot`] of four bytes, by which it leaves the count at its end whatever the limits are by then.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::num::NonZeroU32;

use slab::Slab;

/// Identifies the count of a key in [`Counts`]; the number is one above its index in the slab, so that an `Option` needs no more memory.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct CountSlot(NonZeroU32);

impl CountSlot {
    fn of(index: usize) -> Option<Self> {
        u32::try_from(index).ok()?.checked_add(1).and_then(NonZeroU32::new).map(Self)
    }

    fn index(&self) -> usize {
        self.0.get() as usize - 1
    }
}

/// Number of sessions by key. Keys are 64 bits of a keyed hash of what the sessions have in common.
#[derive(Debug, Default)]
pub(super) struct Counts {
    /// Indexes into `counts`.
    indexes: HashMap<u64, usize, BuildHasherDefault<IdentityHasher>>,
    counts: Slab<Count>,
}

#[derive(Debug)]
struct Count {
    key: u64,
    sessions: u32,
}

impl Counts {
    /// Adds a session to the count of `key`; returns `None` if it has reached `limit`.
    pub(super) fn increment(&mut self, key: u64, limit: u32) -> Option<CountSlot> {
        if let Some(index) = self.indexes.get(&key) {
            let count = &mut self.counts[*index];
            if count.sessions >= limit {
                return None;
            }
            count.sessions += 1;
            return CountSlot::of(*index);
        }
        // `CountSlot::of` fails at 4,294,967,295 keys, more than a machine has file descriptors.
        let index = self.counts.vacant_key();
        let slot = CountSlot::of(index).filter(|_| limit > 0)?;
        self.counts.insert(Count { key, sessions: 1 });
        self.indexes.insert(key, index);
        Some(slot)
    }

    /// Removes a session from its count.
    pub(super) fn decrement(&mut self, slot: CountSlot) {
        let Some(count) = self.counts.get_mut(slot.index()) else { return };
        count.sessions -= 1;
        if count.sessions == 0 {
            let key = count.key;
            self.counts.remove(slot.index());
            self.indexes.remove(&key);
            self.shrink();
        }
    }

    /// Number of keys with at least one session.
    pub(super) fn len(&self) -> usize {
        self.indexes.len()
    }

    /// Returns memory after a peak. Only at powers of two, because shrinking visits every remaining entry.
    fn shrink(&mut self) {
        let left = self.indexes.len();
        if (left == 0 || left.is_power_of_two())
            && left * 4 + 1024 < self.indexes.capacity().max(self.counts.capacity())
        {
            self.indexes.shrink_to_fit();
            // The slab shrinks to its last entry in use.
            self.counts.shrink_to_fit();
        }
    }
}

/// Passes keys through, because they are hashes already.
#[derive(Debug, Default)]
struct IdentityHasher(u64);

impl Hasher for IdentityHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = self.0.rotate_left(8) ^ u64::from(*byte);
        }
    }

    fn write_u64(&mut self, key: u64) {
        self.0 = key;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn count_stops_at_its_limit_and_grows_again_after_a_decrement() {
        let mut counts = Counts::default();
        let first = counts.increment(7, 2).unwrap();
        assert!(counts.increment(7, 2).is_some());
        assert!(counts.increment(7, 2).is_none());
        assert!(counts.increment(8, 2).is_some(), "another key");
        counts.decrement(first);
        assert!(counts.increment(7, 2).is_some());
        assert!(counts.increment(9, 0).is_none());
        assert_eq!(counts.len(), 2);
        assert_eq!(size_of::<Option<CountSlot>>(), 4);
    }

    #[test]
    fn memory_shrinks_after_a_peak() {
        let mut counts = Counts::default();
        let slots: Vec<CountSlot> = (0..100_000).filter_map(|key| counts.increment(key, 1)).collect();
        assert_eq!((slots.len(), counts.len()), (100_000, 100_000));
        for slot in slots {
            counts.decrement(slot);
        }
        assert_eq!(counts.len(), 0);
        let (indexes, counts) = (counts.indexes.capacity(), counts.counts.capacity());
        assert!(indexes < 4096 && counts < 4096, "{indexes} {counts}");
    }

    proptest! {
        /// In any order and with any limits: no count exceeds the limit of its last increment, and nothing remains at the end.
        #[test]
        fn counts_agree_with_a_list(operations in prop::collection::vec((0u64..5, 0u32..6, any::<prop::sample::Index>(), any::<bool>()), 0..300)) {
            let mut counts = Counts::default();
            let mut sessions: Vec<(u64, CountSlot)> = Vec::new();
            for (key, limit, which, ends) in operations {
                if ends && !sessions.is_empty() {
                    let (_, slot) = sessions.swap_remove(which.index(sessions.len()));
                    counts.decrement(slot);
                } else {
                    let before = sessions.iter().filter(|(other, _)| *other == key).count();
                    let slot = counts.increment(key, limit);
                    prop_assert_eq!(slot.is_some(), before < limit as usize);
                    sessions.extend(slot.map(|slot| (key, slot)));
                }
                let keys: std::collections::BTreeSet<u64> = sessions.iter().map(|(key, _)| *key).collect();
                prop_assert_eq!(counts.len(), keys.len());
            }
            for (_, slot) in sessions {
                counts.decrement(slot);
            }
            prop_assert_eq!((counts.len(), counts.counts.len()), (0, 0));
        }
    }
}
