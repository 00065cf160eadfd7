//! A table of fixed size: whoever floods it with keys makes it forget, never grow.
//!
//! Keys are 64 bits of a keyed hash, so that nobody outside can choose where they fall. Each has eight places it may be in;
//! where all are taken, the one goes whose memory is worth least: an offender outlives a flood of strangers. Nothing is
//! allocated before the first entry.

/// Places a key may be in.
const WAYS: usize = 8;

/// What is remembered of a key.
pub(super) trait Value: Copy + Default {
    /// What would be lost were it forgotten at `now`; 0: nothing.
    fn worth(self, now: u64) -> u64;
}

#[derive(Debug, Clone, Copy, Default)]
struct Entry<V> {
    /// 0: free.
    key: u64,
    value: V,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Table<V> {
    /// Empty until the first entry.
    entries: Vec<Entry<V>>,
    groups: usize,
    used: usize,
}

impl<V: Value> Table<V> {
    /// Of at least `capacity` places, rounded up to the next multiple of eight.
    pub(super) fn new(capacity: usize) -> Self {
        Self { entries: Vec::new(), groups: capacity.div_ceil(WAYS).max(1), used: 0 }
    }

    /// Places.
    pub(super) fn capacity(&self) -> usize {
        self.groups * WAYS
    }

    /// Places in use, by entries that are over their time too.
    pub(super) fn len(&self) -> usize {
        self.used
    }

    /// What is remembered of `key`.
    pub(super) fn get(&self, key: u64) -> Option<V> {
        let key = key.max(1);
        let group = self.entries.get(self.group(key))?;
        group.iter().find(|entry| entry.key == key).map(|entry| entry.value)
    }

    /// Forgets `key`.
    pub(super) fn remove(&mut self, key: u64) {
        let key = key.max(1);
        let range = self.group(key);
        let Some(group) = self.entries.get_mut(range) else { return };
        if let Some(entry) = group.iter_mut().find(|entry| entry.key == key) {
            *entry = Entry::default();
            self.used -= 1;
        }
    }

    /// Replaces what is remembered of `key` by what `change` makes of it, and hands out what that says.
    pub(super) fn update<R>(&mut self, key: u64, now: u64, change: impl FnOnce(V) -> (V, R)) -> R {
        let key = key.max(1);
        if self.entries.is_empty() {
            self.entries = vec![Entry::default(); self.capacity()];
        }
        let range = self.group(key);
        let group = &mut self.entries[range];
        let place = group.iter().position(|entry| entry.key == key).unwrap_or_else(|| {
            let worth = |entry: &Entry<V>| if entry.key == 0 { (0, 0) } else { (1, entry.value.worth(now)) };
            let least = group.iter().enumerate().min_by_key(|(_, entry)| worth(entry));
            let place = least.map_or(0, |(place, _)| place);
            if group[place].key == 0 {
                self.used += 1;
            }
            group[place] = Entry { key, value: V::default() };
            place
        });
        let (value, said) = change(group[place].value);
        group[place].value = value;
        said
    }

    fn group(&self, key: u64) -> std::ops::Range<usize> {
        // The hash is as good as random: its upper bits choose, without a division.
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
    struct Until(u64);

    impl Value for Until {
        fn worth(self, now: u64) -> u64 {
            self.0.saturating_sub(now)
        }
    }

    /// A million addresses that each come once: the table stays as large as it is, and whoever was over the rate before
    /// still is.
    #[test]
    fn a_flood_of_addresses_neither_grows_it_nor_frees_an_offender() {
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
        assert_eq!(size_of::<Entry<Bucket>>(), 16, "a megabyte for 65,536");
    }

    #[test]
    fn nothing_is_allocated_before_it_is_used() {
        let mut table = Table::<Until>::new(1000);
        assert_eq!((table.get(7), table.len(), table.entries.capacity()), (None, 0, 0));
        table.remove(7);
        table.update(0, 0, |_| (Until(1), ()));
        assert_eq!((table.get(0), table.len()), (Some(Until(1)), 1), "0 is a hash like any other");
        table.remove(0);
        assert_eq!((table.get(0), table.len()), (None, 0));
    }

    proptest! {
        /// As a map as long as no group overflows, and never more than it can hold.
        #[test]
        fn as_a_map(changes in prop::collection::vec((0u64..64, 1u64..1000, any::<bool>()), 0..500)) {
            let mut table = Table::<Until>::new(64);
            let mut map = std::collections::HashMap::new();
            for (number, until, removed) in changes {
                // Spread as a hash would be: eight numbers a group.
                let key = (number % 8) << 61 | number;
                if removed {
                    table.remove(key);
                    map.remove(&key);
                } else {
                    table.update(key, 0, |_| (Until(until), ()));
                    map.insert(key, Until(until));
                }
                prop_assert_eq!(table.len(), map.len());
                prop_assert!(map.iter().all(|(key, until)| table.get(*key) == Some(*until)));
            }
        }

        /// What makes room is what is worth least.
        #[test]
        fn the_least_worth_goes(worths in prop::collection::vec(1u64..1_000_000, WAYS)) {
            let mut table = Table::<Until>::new(WAYS);
            for (key, until) in worths.iter().enumerate() {
                table.update(key as u64 + 1, 0, |_| (Until(*until), ()));
            }
            table.update(1000, 0, |_| (Until(1), ()));
            prop_assert_eq!(table.len(), WAYS);
            let lost: Vec<u64> =
                worths.iter().enumerate().filter(|(key, _)| table.get(*key as u64 + 1).is_none()).map(|(_, until)| *until).collect();
            prop_assert_eq!(lost, vec![*worths.iter().min().unwrap()]);
        }
    }
}
