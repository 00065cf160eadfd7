//! A directory with everything that limits its load: a cache, one lookup in flight per user, a limit of concurrent queries, and a
//! deadline. Stale cache entries are used while the directory fails.
//!
//! Sessions run on many threads and end at any time. Lookups therefore run on a separate thread for each directory: a lookup that
//! has begun is completed and cached although its session has ended, and a directory whose client library does not return in time
//! delays only its own lookups.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use tokio::runtime::Handle;
use tokio::sync::{Notify, Semaphore, watch};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::answer::DeclaredBackends;
use super::cache::{Cache, CacheEntry, CacheLookup};
use super::cache_file;
use super::decision::{LookupOrigin, LookupResult};
use super::directory::Directory;
use super::request::LookupRequest;
use crate::config;
use crate::deadline::Deadline;
use crate::lookup::hedge::Budget;
use crate::lookup::thread::{GRACE, LookupThread};
use crate::metrics::RouteMetrics;

/// After a failure, lookups with a stale cache entry do not query the directory for this long.
const FAILURE_BACKOFF: Duration = Duration::from_secs(1);
/// A longer wait for a free connection is mentioned in the reason of a timeout.
const LONG_WAIT: Duration = Duration::from_millis(100);
/// Interval between two writes of the cache file.
const WRITE_INTERVAL: Duration = Duration::from_secs(60);
/// Delay between forgetting a user and the next write, which combines several users: a restart must not restore the old entry.
const WRITE_DELAY_AFTER_FORGET: Duration = Duration::from_secs(1);
/// Interval between two checks for connections that have been idle for long.
const CLOSE_EXPIRED_INTERVAL: Duration = Duration::from_secs(20);

/// A directory and its cache.
#[derive(Debug)]
pub(super) struct CachedDirectory {
    directory: Arc<Directory>,
    declared: DeclaredBackends,
    /// Timeout of one lookup, including the wait for a permit.
    timeout: Duration,
    query_permits: Semaphore,
    cache: Option<Arc<Cache>>,
    cache_file: Option<PathBuf>,
    /// Set when another process has taken over the cache file.
    is_file_handed_over: AtomicBool,
    /// The cache is that of the previous configuration, which is newer than the file.
    has_inherited_cache: bool,
    user_forgotten: Notify,
    in_flight: Mutex<HashMap<Arc<str>, InFlight>>,
    /// Time of the last failure, if no query has succeeded since.
    last_failure: Mutex<Option<Instant>>,
    runtime: OnceLock<Handle>,
    /// The thread of the directory: connections belong to its runtime. Shared with the next configuration if it has the same directory.
    thread: Arc<OnceLock<LookupThread>>,
    metrics: RouteMetrics,
}

/// A lookup in flight: receives the result.
type InFlight = watch::Receiver<Option<LookupResult>>;

impl CachedDirectory {
    pub(super) fn new(
        directory: impl Into<Arc<Directory>>,
        lookup: &config::LookupConfig,
        declared: DeclaredBackends,
        metrics: RouteMetrics,
    ) -> Self {
        Self {
            directory: directory.into(),
            declared,
            timeout: lookup.timeout,
            query_permits: Semaphore::new(lookup.connections),
            cache: lookup.cache.clone().map(|cache| Arc::new(Cache::new(cache))),
            cache_file: lookup.cache.as_ref().and_then(|cache| cache.file.as_ref().map(|file| file.value.clone())),
            is_file_handed_over: AtomicBool::new(false),
            has_inherited_cache: false,
            user_forgotten: Notify::new(),
            in_flight: Mutex::default(),
            last_failure: Mutex::default(),
            runtime: OnceLock::new(),
            thread: Arc::default(),
            metrics,
        }
    }

    /// The directory, to be shared with the next configuration.
    pub(super) fn directory(&self) -> &Arc<Directory> {
        &self.directory
    }

    /// Uses the cache of `previous`, which has the same section of the configuration.
    pub(super) fn with_cache_of(self, previous: Option<&Self>) -> Self {
        let cache = previous.and_then(|previous| previous.cache.clone());
        Self { has_inherited_cache: cache.is_some(), cache: cache.or(self.cache), ..self }
    }

    /// Uses the thread of `previous`, which has the same directory.
    pub(super) fn with_thread_of(self, previous: Option<&Self>) -> Self {
        Self { thread: previous.map_or(self.thread, |previous| previous.thread.clone()), ..self }
    }

    /// Starts lookups on the directory's own thread, or on `fallback` if the system cannot start one.
    pub(super) fn start_on_thread(&self, fallback: &Handle) {
        if self.thread.get().is_none() {
            match LookupThread::start(self.metrics.label()) {
                // A concurrent start of another configuration with the same directory may have been first.
                Ok(thread) => drop(self.thread.set(thread)),
                Err(error) => {
                    tracing::error!(route = self.metrics.label(), %error, "cannot start a thread for the lookups of a route");
                }
            }
        }
        self.start(self.thread.get().map_or(fallback, LookupThread::handle).clone());
    }

    /// Sets the runtime of lookups. Lookups that began before, under another configuration, are not cached.
    pub(super) fn start(&self, runtime: Handle) {
        // A second start would set the same runtime.
        let _ = self.runtime.set(runtime);
        self.in_flight().clear();
        if let Some(cache) = &self.cache {
            cache.invalidate_lookups();
        }
    }

    /// Closes connections that have been idle for long, until `stop`.
    pub(super) fn close_expired(self: &Arc<Self>, stop: CancellationToken) {
        let this = self.clone();
        self.spawn(async move {
            while timeout(CLOSE_EXPIRED_INTERVAL, stop.cancelled()).await.is_err() {
                this.directory.close_expired();
            }
        });
    }

    /// Closes all idle connections of the directory.
    pub(super) fn retire_directory(&self) {
        let _on_runtime = self.runtime.get().map(Handle::enter);
        self.directory.retire();
    }

    /// Fills the cache from its file, unless it was inherited.
    pub(super) fn read_cache_file(&self) {
        let (Some(path), Some(cache)) = (&self.cache_file, &self.cache) else { return };
        if self.has_inherited_cache {
            return;
        }
        match cache_file::load(path, cache, &self.declared) {
            Ok(users) => {
                self.metrics.set_cached(cache.len());
                tracing::info!(route = self.metrics.label(), users, "cache file loaded");
            }
            Err(error) => {
                tracing::error!(file = %path.display(), %error, "the cache file cannot be read");
            }
        }
    }

    /// Writes the cache file regularly, soon after a user was forgotten, and once more at `stop`.
    pub(super) async fn write_cache_file_regularly(self: Arc<Self>, stop: CancellationToken) {
        while self.cache_file.is_some() {
            let forgotten = async {
                self.user_forgotten.notified().await;
                sleep(WRITE_DELAY_AFTER_FORGET).await;
            };
            let stopped = tokio::select! {
                () = stop.cancelled() => true,
                () = sleep(WRITE_INTERVAL) => false,
                () = forgotten => false,
            };
            let this = self.clone();
            // A slow disk must not block the runtime.
            let written = tokio::task::spawn_blocking(move || this.write_cache_file()).await;
            if stopped || written.is_err() {
                return;
            }
        }
    }

    fn write_cache_file(&self) {
        let (Some(path), Some(cache)) = (&self.cache_file, &self.cache) else { return };
        let _lock = cache.lock_file();
        if self.is_file_handed_over.load(Ordering::Acquire) {
            return;
        }
        if let Err(error) = cache_file::save(path, cache, &self.declared) {
            tracing::error!(file = %path.display(), %error, "the cache file cannot be written");
        }
    }

    /// Stops writing the cache file, because the successor of this process writes it now.
    pub(super) fn stop_writing_cache_file(&self) {
        self.is_file_handed_over.store(true, Ordering::Release);
    }

    /// Removes a user from the cache. New lookups do not join one in flight, whose result is not cached.
    pub(super) fn forget(&self, user: &str) {
        self.in_flight().remove(user);
        if let Some(cache) = &self.cache {
            cache.forget(user);
        }
        self.user_forgotten.notify_one();
    }

    /// Whether results may depend on more than the user: only if they are not cached.
    pub(super) fn needs_login_context(&self) -> bool {
        self.cache.is_none()
    }

    pub(super) async fn lookup(self: &Arc<Self>, request: LookupRequest) -> (LookupResult, LookupOrigin) {
        let Some(cache) = &self.cache else {
            return (self.wait_for(self.start_lookup(request)).await, LookupOrigin::Directory);
        };
        let user = request.user;
        let now = Instant::now();
        match cache.get(&user, now) {
            CacheLookup::Fresh(entry) => self.fresh(&entry, now),
            CacheLookup::Ageing(entry) => {
                // Renews the entry in the background.
                self.join_or_start_lookup(&user);
                self.fresh(&entry, now)
            }
            CacheLookup::Stale(entry) if self.is_backing_off(now) => self.stale(&entry, now),
            CacheLookup::Stale(entry) => match self.wait_for(self.join_or_start_lookup(&user)).await {
                LookupResult::Failed(_) => self.stale(&entry, now),
                result => (result, LookupOrigin::Directory),
            },
            CacheLookup::Missing => {
                self.metrics.cache_missed();
                (self.wait_for(self.join_or_start_lookup(&user)).await, LookupOrigin::Directory)
            }
        }
    }

    fn fresh(&self, entry: &CacheEntry, now: Instant) -> (LookupResult, LookupOrigin) {
        self.metrics.cache_hit();
        (entry.result(), LookupOrigin::Cache(now - entry.queried_at))
    }

    fn stale(&self, entry: &CacheEntry, now: Instant) -> (LookupResult, LookupOrigin) {
        self.metrics.cache_stale();
        (entry.result(), LookupOrigin::Stale(now - entry.queried_at))
    }

    /// Returns the lookup of `user` that is in flight, or starts one whose result is cached.
    fn join_or_start_lookup(self: &Arc<Self>, user: &Arc<str>) -> InFlight {
        let mut in_flight = self.in_flight();
        if let Some(lookup) = in_flight.get(user) {
            return lookup.clone();
        }
        if self.is_stalled() {
            return watch::channel(Some(self.stalled())).1;
        }
        let since = self.cache.as_ref().map(|cache| cache.generation());
        let (sender, lookup) = watch::channel(None);
        in_flight.insert(user.clone(), lookup.clone());
        drop(in_flight);
        let guard = InFlightGuard { owner: self.clone(), user: user.clone(), lookup: lookup.clone() };
        self.spawn(async move {
            let this = &guard.owner;
            let result = this.query(&LookupRequest { user: guard.user.clone(), login_context: None }).await;
            if let (Some(cache), Some(since)) = (&this.cache, since) {
                let (user, now) = (guard.user.clone(), Instant::now());
                match &result {
                    LookupResult::Found(decision) => cache.insert_if_current(user, Some(decision.clone()), now, since),
                    LookupResult::Unknown => cache.insert_if_current(user, None, now, since),
                    LookupResult::Failed(_) => {}
                }
                this.metrics.set_cached(cache.len());
            }
            // Removes the entry in flight before the result is published, so that later lookups start a new query.
            drop(guard);
            sender.send_replace(Some(result));
        });
        lookup
    }

    /// Starts a lookup whose result is not cached.
    fn start_lookup(self: &Arc<Self>, request: LookupRequest) -> InFlight {
        if self.is_stalled() {
            return watch::channel(Some(self.stalled())).1;
        }
        let (sender, lookup) = watch::channel(None);
        let this = self.clone();
        self.spawn(async move {
            let result = this.query(&request).await;
            sender.send_replace(Some(result));
        });
        lookup
    }

    fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        match self.runtime.get() {
            Some(runtime) => drop(runtime.spawn(task)),
            None => drop(tokio::spawn(task)),
        }
    }

    /// Queries the directory, within the timeout.
    async fn query(&self, request: &LookupRequest) -> LookupResult {
        let began = Instant::now();
        let budget = Budget::of(self.timeout);
        let mut waited = self.timeout;
        let result = budget.limit(async {
            let _permit = self.query_permits.acquire().await;
            waited = began.elapsed();
            self.directory.query(request, &budget).await
        });
        let result = result.await.unwrap_or_else(|expired| {
            let wait =
                if waited < LONG_WAIT { String::new() } else { format!(", {waited:.1?} of it for a free connection") };
            let stage = if expired.is_connecting { ": the connection was not established" } else { "" };
            LookupResult::Failed(format!("no answer within {:?}{wait}{stage}", self.timeout))
        });
        self.metrics.queried(began.elapsed());
        self.record_result(&result);
        result
    }

    /// Waits for the result of a lookup. If its thread does not report the timeout in time either, the thread is marked as stalled.
    async fn wait_for(&self, mut lookup: InFlight) -> LookupResult {
        let deadline = Deadline::after(self.timeout + GRACE);
        let Ok(result) = deadline.limit(lookup.wait_for(Option::is_some)).await else {
            if let Some(thread) = self.thread.get() {
                thread.set_stalled();
            }
            let result = self.stalled();
            self.record_result(&result);
            return result;
        };
        let result = result.ok().and_then(|result| result.clone());
        result.unwrap_or_else(|| LookupResult::Failed("the lookup was aborted".to_owned()))
    }

    fn is_stalled(&self) -> bool {
        self.thread.get().is_some_and(LookupThread::is_stalled)
    }

    fn stalled(&self) -> LookupResult {
        let timeout = self.timeout;
        LookupResult::Failed(format!("no answer within {timeout:?}: the thread of the directory does not respond"))
    }

    /// Updates the metrics, and logs the first failure and the first success after it.
    fn record_result(&self, result: &LookupResult) {
        let mut last_failure = self.last_failure();
        if let LookupResult::Failed(reason) = result {
            if last_failure.is_none() {
                tracing::warn!(route = self.metrics.label(), %reason, "lookups of a route fail");
            }
            *last_failure = Some(Instant::now());
        } else if last_failure.take().is_some() {
            tracing::info!(route = self.metrics.label(), "lookups of the route succeed again");
        }
        self.metrics.set_failing(last_failure.is_some());
    }

    fn is_backing_off(&self, now: Instant) -> bool {
        self.last_failure().is_some_and(|failure| now.saturating_duration_since(failure) < FAILURE_BACKOFF)
    }

    fn last_failure(&self) -> MutexGuard<'_, Option<Instant>> {
        // A poisoned lock is safe: every value is valid.
        self.last_failure.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn in_flight(&self) -> MutexGuard<'_, HashMap<Arc<str>, InFlight>> {
        // A poisoned lock is safe: no critical section can panic halfway through a change.
        self.in_flight.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a query of a directory with this number of `connections` is in progress.
    #[cfg(test)]
    fn is_querying(&self, connections: usize) -> bool {
        self.query_permits.available_permits() < connections
    }

    /// Inserts a cache entry of this age.
    #[cfg(test)]
    fn insert_with_age(&self, user: &str, decision: super::RouteDecision, age: Duration) {
        let queried_at = Instant::now().checked_sub(age).unwrap();
        self.cache.as_ref().unwrap().insert(user.into(), Some(decision.into()), queried_at);
    }
}

/// Removes a lookup from those in flight, however it ends.
struct InFlightGuard {
    owner: Arc<CachedDirectory>,
    user: Arc<str>,
    lookup: InFlight,
}

impl Drop for InFlightGuard {
    fn drop(&mut self) {
        let mut in_flight = self.owner.in_flight();
        // After the user was forgotten, another lookup may have taken its place.
        if in_flight.get(&self.user).is_some_and(|lookup| lookup.same_channel(&self.lookup)) {
            in_flight.remove(&self.user);
        }
    }
}

#[cfg(test)]
pub(super) mod tests;
