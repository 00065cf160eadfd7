//! What a directory said, kept for a while. Decides by the time handed in; asks nobody. Called by `asked`.
//!
//! A user may be forgotten, and a configuration replaced, while a lookup is in flight. Its answer may be older than that
//! event and is not kept: see [`Cache::keep_current`].
//!
//! A found user is fresh for `ttl`; in its last fifth it is asked for again while the old answer is used. After that the
//! answer is stale: good only while the directory is down, for `stale` longer. An unknown user is fresh for `negative`
//! and never used stale: who was added meanwhile would be turned away as if by a directory that answers.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use quick_cache::sync;

use super::decision::RouteDecision;
use crate::config;
use crate::generations::{Generation, Generations};

/// A kept answer; `None`: the user is unknown.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Kept {
    pub(super) target: Option<Arc<RouteDecision>>,
    pub(super) asked: Instant,
}

/// What is there for a user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Looked {
    /// Good, no question needed.
    Fresh(Kept),
    /// Good, and soon not: ask again meanwhile.
    Ageing(Kept),
    /// Good only if the directory is down.
    Stale(Kept),
    /// Nothing that may be used.
    Nothing,
}

/// Answers of one directory, at most `entries` of them; those asked for least go first.
#[derive(Debug)]
pub(super) struct Cache {
    rules: config::CacheConfig,
    kept: sync::Cache<Arc<str>, Kept>,
    /// What makes lookups in flight out of date. Locked while an answer is kept or forgotten.
    events: Mutex<Generations>,
    saving: Mutex<()>,
}

impl Cache {
    pub(super) fn new(rules: config::CacheConfig) -> Self {
        let kept = sync::Cache::new(rules.entries);
        Self { kept, rules, events: Mutex::default(), saving: Mutex::default() }
    }

    pub(super) fn look(&self, user: &str, now: Instant) -> Looked {
        let Some(kept) = self.kept.get(user) else { return Looked::Nothing };
        let age = now.saturating_duration_since(kept.asked);
        if kept.target.is_none() {
            return if age < self.rules.negative { Looked::Fresh(kept) } else { Looked::Nothing };
        }
        if age < self.rules.ttl / 5 * 4 {
            Looked::Fresh(kept)
        } else if age < self.rules.ttl {
            Looked::Ageing(kept)
        } else if age < self.rules.ttl + self.rules.stale {
            Looked::Stale(kept)
        } else {
            Looked::Nothing
        }
    }

    pub(super) fn keep(&self, user: Arc<str>, target: Option<Arc<RouteDecision>>, asked: Instant) {
        self.kept.insert(user, Kept { target, asked });
    }

    /// The current generation, to be taken before the directory is asked.
    pub(super) fn generation(&self) -> Generation {
        self.events().current()
    }

    /// Keeps the answer of a lookup that began at `since`, unless the user was forgotten or all lookups became out of date
    /// since then.
    pub(super) fn keep_current(
        &self,
        user: Arc<str>,
        target: Option<Arc<RouteDecision>>,
        asked: Instant,
        since: Generation,
    ) {
        let events = self.events();
        if events.is_current(&user, since) {
            self.keep(user, target, asked);
        }
    }

    /// Removes a user's answer. Answers of lookups in flight are not kept.
    pub(super) fn forget(&self, user: &str) {
        let mut events = self.events();
        events.invalidate(user);
        self.kept.remove(user);
    }

    /// Answers of lookups in flight are not kept.
    pub(super) fn outdate_lookups(&self) {
        self.events().invalidate_all();
    }

    /// Held while the file is written: two configurations that share the cache write one file.
    pub(super) fn saving(&self) -> MutexGuard<'_, ()> {
        self.saving.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn events(&self) -> MutexGuard<'_, Generations> {
        // Plain numbers, valid whatever they hold.
        self.events.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Number of answers held.
    pub(super) fn len(&self) -> usize {
        self.kept.len()
    }

    /// Found users whose answers a file may keep, and how old each is.
    pub(super) fn storable(&self, now: Instant) -> Vec<(Arc<str>, Arc<RouteDecision>, Duration)> {
        let stored = self.kept.iter().filter_map(|(user, kept)| {
            let target = kept.target.filter(|target| !target.is_secret())?;
            let age = now.saturating_duration_since(kept.asked);
            (age < self.rules.ttl + self.rules.stale).then_some((user, target, age))
        });
        stored.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::BackendId;

    fn seconds(count: u64) -> Duration {
        Duration::from_secs(count)
    }

    fn cache(entries: usize) -> Cache {
        let rules =
            config::CacheConfig { ttl: seconds(100), negative: seconds(10), stale: seconds(1000), entries, file: None };
        Cache::new(rules)
    }

    #[test]
    fn a_found_user_ages_and_goes_stale() {
        let cache = cache(10);
        let now = Instant::now();
        let target = Arc::new(RouteDecision::backend(BackendId(0)));
        cache.keep("alice".into(), Some(target.clone()), now);
        let kept = Kept { target: Some(target), asked: now };
        for (after, expected) in [
            (0, Looked::Fresh(kept.clone())),
            (79, Looked::Fresh(kept.clone())),
            (80, Looked::Ageing(kept.clone())),
            (99, Looked::Ageing(kept.clone())),
            (100, Looked::Stale(kept.clone())),
            (1099, Looked::Stale(kept)),
            (1100, Looked::Nothing),
        ] {
            assert_eq!(cache.look("alice", now + seconds(after)), expected, "after {after} s");
        }
        assert_eq!(cache.look("bob", now), Looked::Nothing);
    }

    #[test]
    fn an_unknown_user_is_never_stale() {
        let cache = cache(10);
        let now = Instant::now();
        cache.keep("mallory".into(), None, now);
        assert!(matches!(cache.look("mallory", now + seconds(9)), Looked::Fresh(Kept { target: None, .. })));
        assert_eq!(cache.look("mallory", now + seconds(10)), Looked::Nothing);
    }

    #[test]
    fn an_answer_older_than_what_outdated_it_is_not_kept() {
        let cache = cache(10);
        let now = Instant::now();
        let target = || Some(Arc::new(RouteDecision::backend(BackendId(0))));
        let before = cache.generation();
        cache.forget("alice");
        cache.keep_current("alice".into(), target(), now, before);
        assert_eq!(cache.look("alice", now), Looked::Nothing);
        cache.keep_current("alice".into(), target(), now, cache.generation());
        assert!(matches!(cache.look("alice", now), Looked::Fresh(_)));
        let before = cache.generation();
        cache.outdate_lookups();
        cache.keep_current("bob".into(), target(), now, before);
        cache.keep_current("mallory".into(), None, now, before);
        assert_eq!((cache.look("bob", now), cache.look("mallory", now)), (Looked::Nothing, Looked::Nothing));
        assert!(matches!(cache.look("alice", now), Looked::Fresh(_)), "what is kept stays");
    }

    #[test]
    fn it_stays_within_its_bound() {
        let cache = cache(100);
        let now = Instant::now();
        for user in 0..10_000 {
            cache.keep(format!("user{user}").into(), None, now);
        }
        assert!(cache.len() <= 100, "{}", cache.len());
    }

    #[test]
    fn no_secret_and_no_unknown_user_is_stored() {
        let cache = cache(10);
        let now = Instant::now();
        let mut place = RouteDecision::backend(BackendId(1));
        cache.keep("alice".into(), Some(Arc::new(place.clone())), now);
        cache.keep("bob".into(), None, now);
        if let RouteDecision::Destination(place) = &mut place {
            let password = crate::identity::Secret::new(b"x".to_vec());
            place.credentials = Some(super::super::decision::IssuedCredentials { master: None, password });
        }
        cache.keep("carol".into(), Some(Arc::new(place)), now);
        let stored = cache.storable(now + seconds(7));
        assert_eq!(stored.len(), 1);
        assert_eq!((&*stored[0].0, stored[0].2), ("alice", seconds(7)));
        assert!(cache.storable(now + seconds(1100)).is_empty());
    }
}
