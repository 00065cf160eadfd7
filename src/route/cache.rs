//! Caches the results of one directory. The caller passes the time.
//!
//! A user may be forgotten, and a configuration replaced, while a lookup is in flight. Its result may be older than that
//! event and is not cached: see [`Cache::insert_if_current`].
//!
//! A found user is fresh for `ttl`; in the last fifth of it, a lookup in the background renews the entry. After that the entry is
//! stale: it is used only while the directory fails, for `stale` longer. An unknown user is fresh for `negative` and never used
//! stale: a user who was created since then would be refused as if the directory did not know the user.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use quick_cache::sync;

use super::decision::{LookupResult, RouteDecision};
use crate::config;
use crate::generations::{Generation, Generations};

/// The cached result of a lookup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct CacheEntry {
    /// `None` if the user is unknown.
    pub(super) decision: Option<Arc<RouteDecision>>,
    /// When the directory answered.
    pub(super) queried_at: Instant,
}

impl CacheEntry {
    pub(super) fn result(&self) -> LookupResult {
        self.decision.clone().map_or(LookupResult::Unknown, LookupResult::Found)
    }
}

/// What the cache contains for a user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum CacheLookup {
    Fresh(CacheEntry),
    /// Fresh, but to be renewed in the background.
    Ageing(CacheEntry),
    /// To be used only if the directory fails.
    Stale(CacheEntry),
    Missing,
}

/// At most `entries` results of one directory; those used least are evicted first.
#[derive(Debug)]
pub(super) struct Cache {
    config: config::CacheConfig,
    entries: sync::Cache<Arc<str>, CacheEntry>,
    /// Which lookups in flight are out of date. Locked while an entry is inserted or removed.
    generations: Mutex<Generations>,
    file_writes: Mutex<()>,
}

impl Cache {
    pub(super) fn new(config: config::CacheConfig) -> Self {
        let entries = sync::Cache::new(config.entries);
        Self { entries, config, generations: Mutex::default(), file_writes: Mutex::default() }
    }

    pub(super) fn get(&self, user: &str, now: Instant) -> CacheLookup {
        let Some(entry) = self.entries.get(user) else { return CacheLookup::Missing };
        let age = now.saturating_duration_since(entry.queried_at);
        if entry.decision.is_none() {
            return if age < self.config.negative { CacheLookup::Fresh(entry) } else { CacheLookup::Missing };
        }
        if age < self.config.ttl / 5 * 4 {
            CacheLookup::Fresh(entry)
        } else if age < self.config.ttl {
            CacheLookup::Ageing(entry)
        } else if age < self.config.ttl + self.config.stale {
            CacheLookup::Stale(entry)
        } else {
            CacheLookup::Missing
        }
    }

    pub(super) fn insert(&self, user: Arc<str>, decision: Option<Arc<RouteDecision>>, queried_at: Instant) {
        self.entries.insert(user, CacheEntry { decision, queried_at });
    }

    /// The current generation, to be read before the directory is queried.
    pub(super) fn generation(&self) -> Generation {
        self.generations().current()
    }

    /// Inserts the result of a lookup that began at `since`, unless the user was forgotten or all lookups became out of date
    /// since then.
    pub(super) fn insert_if_current(
        &self,
        user: Arc<str>,
        decision: Option<Arc<RouteDecision>>,
        queried_at: Instant,
        since: Generation,
    ) {
        let generations = self.generations();
        if generations.is_current(&user, since) {
            self.insert(user, decision, queried_at);
        }
    }

    /// Removes a user's entry, and prevents lookups in flight from inserting one.
    pub(super) fn forget(&self, user: &str) {
        let mut generations = self.generations();
        generations.invalidate(user);
        self.entries.remove(user);
    }

    /// Prevents all lookups in flight from inserting their results.
    pub(super) fn invalidate_lookups(&self) {
        self.generations().invalidate_all();
    }

    /// Locks the file for writing: two configurations that share the cache write one file.
    pub(super) fn lock_file(&self) -> MutexGuard<'_, ()> {
        self.file_writes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn generations(&self) -> MutexGuard<'_, Generations> {
        // A poisoned lock is safe: every state of the numbers is valid.
        self.generations.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    /// The entries that a file may contain: found users without secrets, each with the age of its entry.
    pub(super) fn storable(&self, now: Instant) -> Vec<(Arc<str>, Arc<RouteDecision>, Duration)> {
        let storable = self.entries.iter().filter_map(|(user, entry)| {
            let decision = entry.decision.filter(|decision| !decision.has_secret())?;
            let age = now.saturating_duration_since(entry.queried_at);
            (age < self.config.ttl + self.config.stale).then_some((user, decision, age))
        });
        storable.collect()
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
        let config =
            config::CacheConfig { ttl: seconds(100), negative: seconds(10), stale: seconds(1000), entries, file: None };
        Cache::new(config)
    }

    #[test]
    fn entry_of_a_found_user_ages_and_becomes_stale() {
        let cache = cache(10);
        let now = Instant::now();
        let decision = Arc::new(RouteDecision::backend(BackendId(0)));
        cache.insert("alice".into(), Some(decision.clone()), now);
        let entry = CacheEntry { decision: Some(decision), queried_at: now };
        for (after, expected) in [
            (0, CacheLookup::Fresh(entry.clone())),
            (79, CacheLookup::Fresh(entry.clone())),
            (80, CacheLookup::Ageing(entry.clone())),
            (99, CacheLookup::Ageing(entry.clone())),
            (100, CacheLookup::Stale(entry.clone())),
            (1099, CacheLookup::Stale(entry)),
            (1100, CacheLookup::Missing),
        ] {
            assert_eq!(cache.get("alice", now + seconds(after)), expected, "after {after} s");
        }
        assert_eq!(cache.get("bob", now), CacheLookup::Missing);
    }

    #[test]
    fn entry_of_an_unknown_user_is_never_stale() {
        let cache = cache(10);
        let now = Instant::now();
        cache.insert("mallory".into(), None, now);
        assert!(matches!(
            cache.get("mallory", now + seconds(9)),
            CacheLookup::Fresh(CacheEntry { decision: None, .. })
        ));
        assert_eq!(cache.get("mallory", now + seconds(10)), CacheLookup::Missing);
    }

    #[test]
    fn result_older_than_an_invalidation_is_not_inserted() {
        let cache = cache(10);
        let now = Instant::now();
        let decision = || Some(Arc::new(RouteDecision::backend(BackendId(0))));
        let before = cache.generation();
        cache.forget("alice");
        cache.insert_if_current("alice".into(), decision(), now, before);
        assert_eq!(cache.get("alice", now), CacheLookup::Missing);
        cache.insert_if_current("alice".into(), decision(), now, cache.generation());
        assert!(matches!(cache.get("alice", now), CacheLookup::Fresh(_)));
        let before = cache.generation();
        cache.invalidate_lookups();
        cache.insert_if_current("bob".into(), decision(), now, before);
        cache.insert_if_current("mallory".into(), None, now, before);
        assert_eq!((cache.get("bob", now), cache.get("mallory", now)), (CacheLookup::Missing, CacheLookup::Missing));
        assert!(matches!(cache.get("alice", now), CacheLookup::Fresh(_)), "existing entries stay");
    }

    #[test]
    fn cache_stays_within_its_limit() {
        let cache = cache(100);
        let now = Instant::now();
        for user in 0..10_000 {
            cache.insert(format!("user{user}").into(), None, now);
        }
        assert!(cache.len() <= 100, "{}", cache.len());
    }

    #[test]
    fn secrets_and_unknown_users_are_not_storable() {
        let cache = cache(10);
        let now = Instant::now();
        let mut decision = RouteDecision::backend(BackendId(1));
        cache.insert("alice".into(), Some(Arc::new(decision.clone())), now);
        cache.insert("bob".into(), None, now);
        if let RouteDecision::Destination(destination) = &mut decision {
            let password = crate::identity::Secret::new(b"x".to_vec());
            destination.credentials = Some(crate::route::IssuedCredentials { master: None, password });
        }
        cache.insert("carol".into(), Some(Arc::new(decision)), now);
        let stored = cache.storable(now + seconds(7));
        assert_eq!(stored.len(), 1);
        assert_eq!((&*stored[0].0, stored[0].2), ("alice", seconds(7)));
        assert!(cache.storable(now + seconds(1100)).is_empty());
    }
}
