//! How many sessions there are of each kind: exact, as large as there are sessions, and empty when they are gone.
//!
//! A session is told a slot, four bytes, with which it counts down at its end whatever the limits are by then.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

use slab::Slab;

/// A place in [`Counts`], or none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Slot(u32);

impl Slot {
    /// Counted nowhere.
    pub(super) const NONE: Self = Self(u32::MAX);
}

/// Sessions by 64 bits of a keyed hash of whatever they have in common.
#[derive(Debug, Default)]
pub(super) struct Counts {
    slots: HashMap<u64, u32, BuildHasherDefault<Hashed>>,
    counts: Slab<Count>,
}

#[derive(Debug)]
struct Count {
    key: u64,
    sessions: u32,
}

impl Counts {
    /// One more of `key`, unless there are `limit` already.
    pub(super) fn enter(&mut self, key: u64, limit: u32) -> Option<Slot> {
        if let Some(slot) = self.slots.get(&key) {
            let count = &mut self.counts[*slot as usize];
            let fits = count.sessions < limit;
            count.sessions += u32::from(fits);
            return fits.then_some(Slot(*slot));
        }
        // 4,294,967,295 sessions are more than a machine has descriptors.
        let slot = u32::try_from(self.counts.vacant_key()).ok().filter(|slot| limit > 0 && *slot != u32::MAX)?;
        self.counts.insert(Count { key, sessions: 1 });
        self.slots.insert(key, slot);
        Some(Slot(slot))
    }

    /// One less.
    pub(super) fn leave(&mut self, slot: Slot) {
        let Some(count) = self.counts.get_mut(slot.0 as usize) else { return };
        count.sessions -= 1;
        if count.sessions == 0 {
            let key = count.key;
            self.counts.remove(slot.0 as usize);
            self.slots.remove(&key);
            self.give_back();
        }
    }

    /// Different keys.
    pub(super) fn len(&self) -> usize {
        self.slots.len()
    }

    /// After a peak; not each time, for it looks at all that is left.
    fn give_back(&mut self) {
        let left = self.slots.len();
        if (left == 0 || left.is_power_of_two()) && left * 4 + 1024 < self.slots.capacity().max(self.counts.capacity())
        {
            self.slots.shrink_to_fit();
            // As far as the last one in use.
            self.counts.shrink_to_fit();
        }
    }
}

/// Keys are hashes already.
#[derive(Debug, Default)]
struct Hashed(u64);

impl Hasher for Hashed {
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
    fn up_to_the_limit_and_again_after_one_has_left() {
        let mut counts = Counts::default();
        let first = counts.enter(7, 2).unwrap();
        assert!(counts.enter(7, 2).is_some());
        assert!(counts.enter(7, 2).is_none());
        assert!(counts.enter(8, 2).is_some(), "a neighbour");
        counts.leave(first);
        assert!(counts.enter(7, 2).is_some());
        assert!(counts.enter(9, 0).is_none());
        counts.leave(Slot::NONE);
        assert_eq!(counts.len(), 2);
    }

    #[test]
    fn a_peak_leaves_nothing_behind() {
        let mut counts = Counts::default();
        let slots: Vec<Slot> = (0..100_000).filter_map(|key| counts.enter(key, 1)).collect();
        assert_eq!((slots.len(), counts.len()), (100_000, 100_000));
        for slot in slots {
            counts.leave(slot);
        }
        assert_eq!(counts.len(), 0);
        assert!(
            counts.slots.capacity() < 4096 && counts.counts.capacity() < 4096,
            "{} {}",
            counts.slots.capacity(),
            counts.counts.capacity()
        );
    }

    proptest! {
        /// Whatever comes and goes, with whatever limits: nobody is over the limit that was asked with, and at the end
        /// nothing is left.
        #[test]
        fn as_a_map(steps in prop::collection::vec((0u64..5, 0u32..6, any::<prop::sample::Index>(), any::<bool>()), 0..300)) {
            let mut counts = Counts::default();
            let mut inside: Vec<(u64, Slot)> = Vec::new();
            for (key, limit, which, leaves) in steps {
                if leaves && !inside.is_empty() {
                    let (_, slot) = inside.swap_remove(which.index(inside.len()));
                    counts.leave(slot);
                } else {
                    let before = inside.iter().filter(|(other, _)| *other == key).count();
                    let slot = counts.enter(key, limit);
                    prop_assert_eq!(slot.is_some(), before < limit as usize);
                    inside.extend(slot.map(|slot| (key, slot)));
                }
                let keys: std::collections::BTreeSet<u64> = inside.iter().map(|(key, _)| *key).collect();
                prop_assert_eq!(counts.len(), keys.len());
            }
            for (_, slot) in inside {
                counts.leave(slot);
            }
            prop_assert_eq!((counts.len(), counts.counts.len()), (0, 0));
        }
    }
}
