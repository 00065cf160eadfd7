//! A directory and what keeps it from being asked too much: a bound on questions at a time, a deadline, one question in
//! flight a user, answers kept (see `cache`), and stale ones used while it is down.
//!
//! Sessions run on many threads and end whenever their clients like. Lookups therefore run on a thread of their own, one for
//! each directory: a lookup that has begun is finished and its answer cached although its session has ended. A directory
//! whose client library does not return in time makes its own lookups fail, and nothing else. Called by `route`.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use tokio::runtime::Handle;
use tokio::sync::{Notify, Semaphore, watch};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::cache::{Cache, Kept, Looked};
use super::decision::Declared;
use super::directory::Directory;
use super::request::LookupRequest;
use super::{LookupOrigin, LookupResult, cache_file};
use crate::config;
use crate::deadline::Deadline;
use crate::lookup::hedge::Budget;
use crate::lookup::thread::{GRACE, LookupThread};
use crate::metrics::RouteMetrics;

/// A directory that failed is left alone for this long by those who have a stale answer.
const REST: Duration = Duration::from_secs(1);
/// A wait for a connection that is worth a word.
const BUSY: Duration = Duration::from_millis(100);
/// How often answers are written to their file.
const SAVE: Duration = Duration::from_secs(60);
/// How often connections that have not been used for long are closed.
const CLOSE_EXPIRED: Duration = Duration::from_secs(20);
/// Time from a forgotten user to the next write: a restart must not bring its old answer back. Many at once are one write.
const SAVE_FORGOTTEN: Duration = Duration::from_secs(1);

/// A directory, asked with care.
#[derive(Debug)]
pub(super) struct CachedDirectory {
    directory: Arc<Directory>,
    declared: Declared,
    /// Of one question, waiting for a place included.
    timeout: Duration,
    places: Semaphore,
    cache: Option<Arc<Cache>>,
    /// Where answers are kept for the next start.
    file: Option<PathBuf>,
    /// The file is another process's from now on.
    leaves_file: AtomicBool,
    /// The answers are those of the configuration before: in memory they are newer than in the file.
    has_inherited: bool,
    forgotten: Notify,
    flights: Mutex<HashMap<Arc<str>, InFlight>>,
    /// When it failed last, if nothing has succeeded since.
    failed: Mutex<Option<Instant>>,
    runtime: OnceLock<Handle>,
    /// The thread of the directory: connections belong to its runtime. Shared with the next configuration's lookups.
    thread: Arc<OnceLock<LookupThread>>,
    metrics: RouteMetrics,
}

/// A question under way: the answer, once it is there.
type InFlight = watch::Receiver<Option<LookupResult>>;

impl CachedDirectory {
    /// Asks nothing yet.
    pub(super) fn new(
        directory: impl Into<Arc<Directory>>,
        asking: &config::LookupConfig,
        declared: Declared,
        metrics: RouteMetrics,
    ) -> Self {
        Self {
            directory: directory.into(),
            declared,
            timeout: asking.timeout,
            places: Semaphore::new(asking.connections),
            cache: asking.cache.clone().map(|rules| Arc::new(Cache::new(rules))),
            file: asking.cache.as_ref().and_then(|cache| cache.file.as_ref().map(|file| file.value.clone())),
            leaves_file: AtomicBool::new(false),
            has_inherited: false,
            forgotten: Notify::new(),
            flights: Mutex::default(),
            failed: Mutex::default(),
            runtime: OnceLock::new(),
            thread: Arc::default(),
            metrics,
        }
    }

    /// The directory, for a next configuration that has it too.
    pub(super) fn directory(&self) -> &Arc<Directory> {
        &self.directory
    }

    /// Closes connections that have not been used for long, until `stop`.
    pub(super) fn close_expired(self: &Arc<Self>, stop: CancellationToken) {
        let asked = self.clone();
        self.spawn(async move {
            while timeout(CLOSE_EXPIRED, stop.cancelled()).await.is_err() {
                asked.directory.close_expired();
            }
        });
    }

    /// With the answers that `previous`, which asked the same question, has kept.
    pub(super) fn with_answers_of(self, previous: Option<&Self>) -> Self {
        let kept = previous.and_then(|previous| previous.cache.clone());
        Self { has_inherited: kept.is_some(), cache: kept.or(self.cache), ..self }
    }

    /// Uses the directory's thread of `previous`, which has the same directory.
    pub(super) fn with_thread_of(self, previous: Option<&Self>) -> Self {
        Self { thread: previous.map_or(self.thread, |previous| previous.thread.clone()), ..self }
    }

    /// Starts lookups on the directory's own thread, or on `fallback` if the system cannot start one.
    pub(super) fn start_on_thread(&self, fallback: &Handle) {
        if self.thread.get().is_none() {
            match LookupThread::start(self.metrics.label()) {
                // Another configuration's start with the same directory may have been first.
                Ok(thread) => drop(self.thread.set(thread)),
                Err(error) => {
                    tracing::error!(route = self.metrics.label(), %error, "no thread for the lookups of a route");
                }
            }
        }
        self.start(self.thread.get().map_or(fallback, LookupThread::handle).clone());
    }

    /// Closes all connections of the directory that are not in use.
    pub(super) fn retire_directory(&self) {
        let _on_runtime = self.runtime.get().map(Handle::enter);
        self.directory.retire();
    }

    /// Where questions run from now on. Lookups that began before, under another configuration, are not kept.
    pub(super) fn start(&self, runtime: Handle) {
        // Once: a second start would be with the same runtime.
        let _ = self.runtime.set(runtime);
        self.flights().clear();
        if let Some(cache) = &self.cache {
            cache.outdate_lookups();
        }
    }

    /// Reads the file of kept answers.
    pub(super) fn read_file(&self) {
        let (Some(path), Some(cache)) = (&self.file, &self.cache) else { return };
        if self.has_inherited {
            return;
        }
        match cache_file::load(path, cache, &self.declared) {
            Ok(users) => {
                self.metrics.set_cached(cache.len());
                tracing::info!(route = self.metrics.label(), users, "answers kept from the last run");
            }
            Err(error) => {
                tracing::error!(file = %path.display(), %error, "kept answers could not be read");
            }
        }
    }

    /// Writes the file now and then, soon after a user was forgotten, and once more at `stop`.
    pub(super) async fn keep_file(self: Arc<Self>, stop: CancellationToken) {
        while self.file.is_some() {
            let forgotten = async {
                self.forgotten.notified().await;
                sleep(SAVE_FORGOTTEN).await;
            };
            let stopped = tokio::select! {
                () = stop.cancelled() => true,
                () = sleep(SAVE) => false,
                () = forgotten => false,
            };
            let asked = self.clone();
            // Off the thread that asks: a disk may be slow.
            let written = tokio::task::spawn_blocking(move || asked.write_file()).await;
            if stopped || written.is_err() {
                return;
            }
        }
    }

    fn write_file(&self) {
        let (Some(path), Some(cache)) = (&self.file, &self.cache) else { return };
        let _one = cache.saving();
        if self.leaves_file.load(Ordering::Acquire) {
            return;
        }
        if let Err(error) = cache_file::save(path, cache, &self.declared) {
            tracing::error!(file = %path.display(), %error, "kept answers could not be written");
        }
    }

    /// Writes the file no more: a successor of this process does.
    pub(super) fn leave_file(&self) {
        self.leaves_file.store(true, Ordering::Release);
    }

    /// Forgets the answer for a user. A lookup in flight is not joined any more, and its answer is not kept.
    pub(super) fn forget(&self, user: &str) {
        self.flights().remove(user);
        if let Some(cache) = &self.cache {
            cache.forget(user);
        }
        self.forgotten.notify_one();
    }

    fn flights(&self) -> MutexGuard<'_, HashMap<Arc<str>, InFlight>> {
        // Nothing in here panics halfway through a change.
        self.flights.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the answer may depend on more than the user.
    pub(super) fn needs_login_context(&self) -> bool {
        self.cache.is_none()
    }

    /// The answer, and where it is from.
    pub(super) async fn lookup(self: &Arc<Self>, question: LookupRequest) -> (LookupResult, LookupOrigin) {
        let Some(cache) = &self.cache else {
            return (self.landed(self.ask_elsewhere(question)).await, LookupOrigin::Directory);
        };
        let user = question.user;
        let now = Instant::now();
        match cache.look(&user, now) {
            Looked::Fresh(kept) => (self.kept(&kept), LookupOrigin::Cache(now - kept.asked)),
            Looked::Ageing(kept) => {
                self.fly(&user);
                (self.kept(&kept), LookupOrigin::Cache(now - kept.asked))
            }
            Looked::Stale(kept) if self.is_resting(now) => (self.stale(&kept), LookupOrigin::Stale(now - kept.asked)),
            Looked::Stale(kept) => match self.landed(self.fly(&user)).await {
                LookupResult::Failed(_) => (self.stale(&kept), LookupOrigin::Stale(now - kept.asked)),
                answer => (answer, LookupOrigin::Directory),
            },
            Looked::Nothing => {
                self.metrics.cache_missed();
                (self.landed(self.fly(&user)).await, LookupOrigin::Directory)
            }
        }
    }

    fn kept(&self, kept: &Kept) -> LookupResult {
        self.metrics.cache_hit();
        answer(kept)
    }

    fn stale(&self, kept: &Kept) -> LookupResult {
        self.metrics.cache_stale();
        answer(kept)
    }

    /// Whether a lookup of a directory with `connections` is in flight, joined by new ones or not.
    #[cfg(test)]
    pub(super) fn is_asking(&self, connections: usize) -> bool {
        self.places.available_permits() < connections
    }

    /// Keeps an answer that the directory gave `age` ago.
    #[cfg(test)]
    pub(super) fn keep_since(&self, user: &str, target: super::RouteDecision, age: Duration) {
        let asked = Instant::now().checked_sub(age).unwrap();
        self.cache.as_ref().unwrap().keep(user.into(), Some(target.into()), asked);
    }

    /// The question for `user` that is under way, or a new one.
    fn fly(self: &Arc<Self>, user: &Arc<str>) -> InFlight {
        let mut flights = self.flights();
        if let Some(flight) = flights.get(user) {
            return flight.clone();
        }
        if self.is_stalled() {
            return watch::channel(Some(self.stalled())).1;
        }
        let since = self.cache.as_ref().map(|cache| cache.generation());
        let (sender, flight) = watch::channel(None);
        flights.insert(user.clone(), flight.clone());
        drop(flights);
        let landing = InFlightGuard { asked: self.clone(), user: user.clone(), flight: flight.clone() };
        self.spawn(async move {
            let asked = &landing.asked;
            let answer = asked.ask(&LookupRequest { user: landing.user.clone(), login_context: None }).await;
            if let (Some(cache), Some(since)) = (&asked.cache, since) {
                let user = landing.user.clone();
                match &answer {
                    LookupResult::Found(target) => {
                        cache.keep_current(user, Some(target.clone()), Instant::now(), since)
                    }
                    LookupResult::Unknown => cache.keep_current(user, None, Instant::now(), since),
                    LookupResult::Failed(_) => {}
                }
                asked.metrics.set_cached(cache.len());
            }
            // Taken off before the answer is told, so that who asks then does not get an old one.
            drop(landing);
            sender.send_replace(Some(answer));
        });
        flight
    }

    fn ask_elsewhere(self: &Arc<Self>, question: LookupRequest) -> InFlight {
        if self.is_stalled() {
            return watch::channel(Some(self.stalled())).1;
        }
        let (sender, flight) = watch::channel(None);
        let asked = self.clone();
        self.spawn(async move {
            let answer = asked.ask(&question).await;
            sender.send_replace(Some(answer));
        });
        flight
    }

    fn spawn(&self, question: impl Future<Output = ()> + Send + 'static) {
        match self.runtime.get() {
            Some(runtime) => drop(runtime.spawn(question)),
            None => drop(tokio::spawn(question)),
        }
    }

    /// One question, within the deadline.
    async fn ask(&self, question: &LookupRequest) -> LookupResult {
        let began = Instant::now();
        let budget = Budget::of(self.timeout);
        let mut waited = self.timeout;
        let answer = budget.limit(async {
            let _place = self.places.acquire().await;
            waited = began.elapsed();
            self.directory.ask(question, &budget).await
        });
        let answer = answer.await.unwrap_or_else(|expired| {
            let busy =
                if waited < BUSY { String::new() } else { format!(", {waited:.1?} of it for a free connection") };
            let stage = if expired.is_connecting { ": the connection was not established" } else { "" };
            LookupResult::Failed(format!("no answer within {:?}{busy}{stage}", self.timeout))
        });
        self.metrics.queried(began.elapsed());
        self.note(&answer);
        answer
    }

    /// Waits for the answer of a lookup, or until its thread has not even reported the timeout.
    async fn landed(&self, mut flight: InFlight) -> LookupResult {
        let due = Deadline::after(self.timeout + GRACE);
        let Ok(answer) = due.limit(flight.wait_for(Option::is_some)).await else {
            if let Some(thread) = self.thread.get() {
                thread.set_stalled();
            }
            let answer = self.stalled();
            self.note(&answer);
            return answer;
        };
        let answer = answer.ok().and_then(|answer| answer.clone());
        answer.unwrap_or_else(|| LookupResult::Failed("the question was given up".to_owned()))
    }

    fn is_stalled(&self) -> bool {
        self.thread.get().is_some_and(LookupThread::is_stalled)
    }

    fn stalled(&self) -> LookupResult {
        LookupResult::Failed(format!(
            "no answer within {:?}: the thread of the directory does not respond",
            self.timeout
        ))
    }

    /// Reports the first failure and the first success after it.
    fn note(&self, answer: &LookupResult) {
        let mut failed = self.failed.lock().unwrap_or_else(PoisonError::into_inner);
        if let LookupResult::Failed(reason) = answer {
            if failed.is_none() {
                tracing::warn!(route = self.metrics.label(), %reason, "a route's source fails");
            }
            *failed = Some(Instant::now());
        } else if failed.take().is_some() {
            tracing::info!(route = self.metrics.label(), "the route's source answers again");
        }
        self.metrics.set_failing(failed.is_some());
    }

    fn is_resting(&self, now: Instant) -> bool {
        let failed = self.failed.lock().unwrap_or_else(PoisonError::into_inner);
        failed.is_some_and(|failed| now.saturating_duration_since(failed) < REST)
    }
}

/// Takes a question off the list of those under way, whatever ends it.
struct InFlightGuard {
    asked: Arc<CachedDirectory>,
    user: Arc<str>,
    flight: InFlight,
}

impl Drop for InFlightGuard {
    fn drop(&mut self) {
        let mut flights = self.asked.flights();
        // Another one may have taken its place, after the user was forgotten.
        if flights.get(&self.user).is_some_and(|flight| flight.same_channel(&self.flight)) {
            flights.remove(&self.user);
        }
    }
}

fn answer(kept: &Kept) -> LookupResult {
    kept.target.clone().map_or(LookupResult::Unknown, LookupResult::Found)
}

#[cfg(test)]
pub(super) mod tests;
