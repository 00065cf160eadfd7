//! A hash table of fixed size: a flood of keys evicts entries and never grows the table.
//!
//! Keys are 64 bits of a keyed hash, so that clients cannot choose a group. Each key belongs to a group of eight entries; when the group
//! is full, the entry with the lowest retention priority is evicted, so that the entry of an offender survives a flood of new clients.
//! Nothing is allocated before the first entry.

/// Entries of a group.
const WAYS: usize = 8;

/// A value of a [`Table`]; its default is the value of an unknown key.
pub(super) trait TableValue: Copy + Default {
    /// The higher, the later the entry is evicted; 0 if nothing is lost by forgetting it at `now`.
    fn retention_priority(self, now: u64) -> u64;
}

#[derive(Debug, Clone, Copy, Default)]
struct Entry<V> {
    /// 0 if the entry is free.
    key: u64,
    value: V,
}

/// The values by key.
#[derive(Debug)]
pub(super) struct Table<V> {
    /// Empty until the first entry.
    entries: Vec<Entry<V>>,
    groups: usize,
    used: usize,
}

impl<V: TableValue> Table<V> {
    /// Creates a table for `capacity` entries, rounded up to the next multiple of eight.
    pub(super) fn new(capacity: usize) -> Self {
        Self { entries: Vec::new(), groups: capacity.div_ceil(WAYS).max(1), used: 0 }
    }

    /// Number of entries that fit.
    pub(super) fn capacity(&self) -> usize {
        self.groups * WAYS
    }

    /// Number of entries in use, including expired ones that were not evicted.
    pub(super) fn len(&self) -> usize {
        self.used
    }

    pub(super) fn get(&self, key: u64) -> Option<V> {
        let key = key.max(1);
        let group = self.entries.get(self.group(key))?;
        group.iter().find(|entry| entry.key == key).map(|entry| entry.value)
    }

    pub(super) fn remove(&mut self, key: u64) {
        let key = key.max(1);
        let range = self.group(key);
        let Some(group) = self.entries.get_mut(range) else { return };
        if let Some(entry) = group.iter_mut().find(|entry| entry.key == key) {
            *entry = Entry::default();
            self.used -= 1;
        }
    }

    /// Replaces the value of `key` by the first result of `change`, and returns the second.
    pub(super) fn update<R>(&mut self, key: u64, now: u64, change: impl FnOnce(V) -> (V, R)) -> R {
        let key = key.max(1);
        if self.entries.is_empty() {
            self.entries = vec![Entry::default(); self.capacity()];
        }
        let range = self.group(key);
        let group = &mut self.entries[range];
        let index = group.iter().position(|entry| entry.key == key).unwrap_or_else(|| {
            let rank =
                |entry: &Entry<V>| if entry.key == 0 { (0, 0) } else { (1, entry.value.retention_priority(now)) };
            let lowest = group.iter().enumerate().min_by_key(|(_, entry)| rank(entry));
            let index = lowest.map_or(0, |(index, _)| index);
            if group[index].key == 0 {
                self.used += 1;
            }
            group[index] = Entry { key, value: V::default() };
            index
        });
        let (value, result) = change(group[index].value);
        group[index].value = value;
        result
    }

    fn group(&self, key: u64) -> std::ops::Range<usize> {
        // The hash is uniformly distributed: multiplying chooses the group by its upper bits, without a division.
        let group = ((u128::from(key) * self.groups as u128) >> 64) as usize;
        group * WAYS..(group + 1) * WAYS
    }
}

#[cfg(test)]
mod tests {
    use std::hash::{BuildHasher as _, RandomState};
    use std::time::Duration;

    use proptest::prelude::*;

    use super::super::rate::Bucket;
    use super::*;
    use crate::config::Rate;

    #[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
    struct Expiry(u64);

    impl TableValue for Expiry {
        fn retention_priority(self, now: u64) -> u64 {
            self.0.saturating_sub(now)
        }
    }

    /// After a million addresses with one event each the table has its initial size, and an address over its rate still is.
    #[test]
    fn flood_of_addresses_neither_grows_the_table_nor_evicts_an_offender() {
        let hasher = RandomState::new();
        let mut table = Table::<Bucket>::new(65_536);
        let rate = Rate { events: 5, per: Duration::from_secs(60) };
        let offender = hasher.hash_one("offender");
        while table.update(offender, 0, |bucket| bucket.take(rate, 0)) {}
        for address in 0..1_000_000u32 {
            assert!(table.update(hasher.hash_one(address), 1, |bucket| bucket.take(rate, 1)), "{address}");
        }
        assert!(!table.update(offender, 2, |bucket| bucket.take(rate, 2)));
        assert_eq!((table.len(), table.entries.capacity()), (65_536, 65_536));
        assert_eq!(size_of::<Entry<Bucket>>(), 16, "one megabyte for 65,536 entries");
    }

    #[test]
    fn table_allocates_nothing_before_its_first_entry() {
        let mut table = Table::<Expiry>::new(1000);
        assert_eq!((table.get(7), table.len(), table.entries.capacity()), (None, 0, 0));
        table.remove(7);
        table.update(0, 0, |_| (Expiry(1), ()));
        assert_eq!((table.get(0), table.len()), (Some(Expiry(1)), 1), "0 is a valid hash");
        table.remove(0);
        assert_eq!((table.get(0), table.len()), (None, 0));
    }

    proptest! {
        /// The table agrees with a map if no group overflows.
        #[test]
        fn table_agrees_with_a_map(changes in prop::collection::vec((0u64..64, 1u64..1000, any::<bool>()), 0..500)) {
            let mut table = Table::<Expiry>::new(64);
            let mut map = std::collections::HashMap::new();
            for (number, until, removed) in changes {
                // Eight numbers a group, as evenly as a hash spreads them.
                let key = (number % 8) << 61 | number;
                if removed {
                    table.remove(key);
                    map.remove(&key);
                } else {
                    table.update(key, 0, |_| (Expiry(until), ()));
                    map.insert(key, Expiry(until));
                }
                prop_assert_eq!(table.len(), map.len());
                prop_assert!(map.iter().all(|(key, until)| table.get(*key) == Some(*until)));
            }
        }

        #[test]
        fn entry_with_the_lowest_priority_is_evicted(priorities in prop::collection::vec(1u64..1_000_000, WAYS)) {
            let mut table = Table::<Expiry>::new(WAYS);
            for (key, until) in priorities.iter().enumerate() {
                table.update(key as u64 + 1, 0, |_| (Expiry(*until), ()));
            }
            table.update(1000, 0, |_| (Expiry(1), ()));
            prop_assert_eq!(table.len(), WAYS);
            let lost: Vec<u64> =
                priorities.iter().enumerate().filter(|(key, _)| table.get(*key as u64 + 1).is_none()).map(|(_, until)| *until).collect();
            prop_assert_eq!(lost, vec![*priorities.iter().min().unwrap()]);
        }
    }
}
