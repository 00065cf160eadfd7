//! How long servers take to say that a password is wrong, so that we take as long to say that there is no such user.
//!
//! Servers answer a wrong password late on purpose, each by its own rule. Whatever the rule is, an answer that comes after
//! a duration drawn from their last ones tells nothing. Called by `attempt`.

use std::hash::{BuildHasher as _, RandomState};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// As many of the last ones are remembered.
const REMEMBERED: usize = 32;
/// Longer ones are outages, not answers.
const LONGEST: Duration = Duration::from_secs(30);

/// The last durations.
#[derive(Debug, Default)]
pub struct Refusals {
    last: Mutex<Ring>,
    /// Of this process alone: nobody outside can tell which one is drawn.
    hasher: RandomState,
}

#[derive(Debug, Default)]
struct Ring {
    durations: Vec<Duration>,
    next: usize,
}

impl Refusals {
    /// A server refused a login after `took`.
    pub(super) fn add(&self, took: Duration) {
        let mut ring = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let took = took.min(LONGEST);
        let next = ring.next;
        match ring.durations.get_mut(next) {
            Some(old) => *old = took,
            None => ring.durations.push(took),
        }
        ring.next = (next + 1) % REMEMBERED;
    }

    /// One of the last, the same for the same `key`. Nothing where no server has refused anybody yet.
    pub(super) fn any_of(&self, key: &str) -> Duration {
        let ring = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let Ok(known) = u64::try_from(ring.durations.len()) else { return Duration::ZERO };
        if known == 0 {
            return Duration::ZERO;
        }
        let drawn = self.hasher.hash_one(key) % known;
        usize::try_from(drawn).map_or(Duration::ZERO, |drawn| ring.durations[drawn])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_last_are_drawn_from() {
        let refusals = Refusals::default();
        assert_eq!(refusals.any_of("a"), Duration::ZERO);
        for seconds in 0..100 {
            refusals.add(Duration::from_secs(seconds));
        }
        let drawn: std::collections::BTreeSet<Duration> =
            (0..1000).map(|key| refusals.any_of(&key.to_string())).collect();
        assert_eq!(drawn.last(), Some(&LONGEST));
        assert_eq!(refusals.any_of("x"), refusals.any_of("x"));
        for seconds in 5..37 {
            refusals.add(Duration::from_millis(seconds));
        }
        let drawn: std::collections::BTreeSet<Duration> =
            (0..10_000).map(|key| refusals.any_of(&key.to_string())).collect();
        assert_eq!(drawn.len(), REMEMBERED);
    }
}
