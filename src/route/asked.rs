//! A directory and what keeps it from being asked too much: a bound on questions at a time, a deadline, one question in
//! flight a user, answers kept (see `cache`), and stale ones used while it is down.
//!
//! Sessions run on many threads and end whenever their clients like. Questions therefore run elsewhere, on the runtime
//! this is started with: what is under way is finished and kept although nobody waits any more. Called by `route`.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use tokio::runtime::Handle;
use tokio::sync::{Semaphore, watch};
use tokio::time::{Instant as Due, timeout, timeout_at};
use tokio_util::sync::CancellationToken;

use super::cache::{Cache, Kept, Looked};
use super::directory::Directory;
use super::question::Question;
use super::target::Declared;
use super::{Answer, Origin, warm};
use crate::config;
use crate::hedge::Budget;
use crate::metrics::RouteMetrics;

/// A directory that failed is left alone for this long by those who have a stale answer.
const REST: Duration = Duration::from_secs(1);
/// A wait for a connection that is worth a word.
const BUSY: Duration = Duration::from_millis(100);
/// How often answers are written to their file.
const SAVE: Duration = Duration::from_secs(60);
/// How often connections that have not been used for long are closed.
const CLOSE_EXPIRED: Duration = Duration::from_secs(20);

/// A directory, asked with care.
#[derive(Debug)]
pub(super) struct Asked {
    directory: Arc<Directory>,
    declared: Declared,
    /// Of one question, waiting for a place included.
    timeout: Duration,
    places: Semaphore,
    cache: Option<Arc<Cache>>,
    /// Where answers are kept for the next start.
    file: Option<PathBuf>,
    flights: Mutex<HashMap<Arc<str>, Flight>>,
    /// When it failed last, if nothing has succeeded since.
    failed: Mutex<Option<Instant>>,
    runtime: OnceLock<Handle>,
    metrics: RouteMetrics,
}

/// A question under way: the answer, once it is there.
type Flight = watch::Receiver<Option<Answer>>;

impl Asked {
    /// Asks nothing yet.
    pub(super) fn new(
        directory: impl Into<Arc<Directory>>,
        asking: &config::Asking,
        declared: Declared,
        metrics: RouteMetrics,
    ) -> Self {
        Self {
            directory: directory.into(),
            declared,
            timeout: asking.timeout,
            places: Semaphore::new(asking.connections),
            cache: asking.cache.clone().map(|rules| Arc::new(Cache::new(rules))),
            file: asking.cache.as_ref().and_then(|cache| cache.file.clone()),
            flights: Mutex::default(),
            failed: Mutex::default(),
            runtime: OnceLock::new(),
            metrics,
        }
    }

    /// The directory, for a next configuration that has it too.
    pub(super) fn directory(&self) -> &Arc<Directory> {
        &self.directory
    }

    /// Closes connections that have not been used for long, until `stop`.
    pub(super) async fn close_expired(self: Arc<Self>, stop: CancellationToken) {
        while timeout(CLOSE_EXPIRED, stop.cancelled()).await.is_err() {
            self.directory.close_expired();
        }
    }

    /// With the answers that `previous`, which asked the same question, has kept.
    pub(super) fn with_answers_of(self, previous: Option<&Self>) -> Self {
        let kept = previous.and_then(|previous| previous.cache.clone());
        Self { cache: kept.or(self.cache), ..self }
    }

    /// Where questions run from now on.
    pub(super) fn start(&self, runtime: Handle) {
        // Once: a second start would be with the same runtime.
        let _ = self.runtime.set(runtime);
    }

    /// Reads the file of kept answers.
    pub(super) fn read_file(&self) {
        let (Some(path), Some(cache)) = (&self.file, &self.cache) else { return };
        // What is in memory is younger than the file.
        if cache.len() > 0 {
            return;
        }
        match warm::load(path, cache, &self.declared) {
            Ok(users) => {
                self.metrics.set_cached(cache.len());
                tracing::info!(route = self.metrics.label(), users, "answers kept from the last run");
            }
            Err(error) => {
                tracing::error!(file = %path.display(), %error, "kept answers could not be read");
            }
        }
    }

    /// Writes the file now and then, and once more at `stop`.
    pub(super) async fn keep_file(self: Arc<Self>, stop: CancellationToken) {
        while self.file.is_some() {
            let stopped = timeout(SAVE, stop.cancelled()).await.is_ok();
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
        if let Err(error) = warm::save(path, cache, &self.declared) {
            tracing::error!(file = %path.display(), %error, "kept answers could not be written");
        }
    }

    /// Nothing is known of the user any more, and a question under way is not waited for.
    pub(super) fn forget(&self, user: &str) {
        self.flights.lock().unwrap_or_else(PoisonError::into_inner).remove(user);
        if let Some(cache) = &self.cache {
            cache.forget(user);
        }
    }

    /// Whether the answer may depend on more than the user.
    pub(super) fn wants_visitor(&self) -> bool {
        self.cache.is_none()
    }

    /// The answer, and where it is from.
    pub(super) async fn lookup(self: &Arc<Self>, question: Question) -> (Answer, Origin) {
        let Some(cache) = &self.cache else { return (landed(self.ask_elsewhere(question)).await, Origin::Asked) };
        let user = question.user;
        let now = Instant::now();
        match cache.look(&user, now) {
            Looked::Fresh(kept) => (self.kept(&kept), Origin::Cache(now - kept.asked)),
            Looked::Ageing(kept) => {
                self.fly(&user);
                (self.kept(&kept), Origin::Cache(now - kept.asked))
            }
            Looked::Stale(kept) if self.is_resting(now) => (self.stale(&kept), Origin::Stale(now - kept.asked)),
            Looked::Stale(kept) => match landed(self.fly(&user)).await {
                Answer::Failed(_) => (self.stale(&kept), Origin::Stale(now - kept.asked)),
                answer => (answer, Origin::Asked),
            },
            Looked::Nothing => {
                self.metrics.cache_missed();
                (landed(self.fly(&user)).await, Origin::Asked)
            }
        }
    }

    fn kept(&self, kept: &Kept) -> Answer {
        self.metrics.cache_hit();
        answer(kept)
    }

    fn stale(&self, kept: &Kept) -> Answer {
        self.metrics.stale_answer();
        answer(kept)
    }

    /// The question for `user` that is under way, or a new one.
    fn fly(self: &Arc<Self>, user: &Arc<str>) -> Flight {
        let mut flights = self.flights.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(flight) = flights.get(user) {
            return flight.clone();
        }
        let (sender, flight) = watch::channel(None);
        flights.insert(user.clone(), flight.clone());
        drop(flights);
        let landing = Landing { asked: self.clone(), user: user.clone(), flight: flight.clone() };
        self.spawn(async move {
            let asked = &landing.asked;
            let answer = asked.ask(&Question { user: landing.user.clone(), visitor: None }).await;
            if let Some(cache) = asked.cache.as_ref().filter(|_| landing.is_awaited()) {
                match &answer {
                    Answer::Found(target) => cache.keep(landing.user.clone(), Some(target.clone()), Instant::now()),
                    Answer::Unknown => cache.keep(landing.user.clone(), None, Instant::now()),
                    Answer::Failed(_) => {}
                }
                asked.metrics.set_cached(cache.len());
            }
            // Taken off before the answer is told, so that who asks then does not get an old one.
            drop(landing);
            sender.send_replace(Some(answer));
        });
        flight
    }

    fn ask_elsewhere(self: &Arc<Self>, question: Question) -> Flight {
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
    async fn ask(&self, question: &Question) -> Answer {
        let began = Instant::now();
        let due = Due::now() + self.timeout;
        let budget = Budget::until(due);
        let mut waited = self.timeout;
        let answer = timeout_at(due, async {
            let _place = self.places.acquire().await;
            waited = began.elapsed();
            self.directory.ask(question, &budget).await
        });
        let answer = answer.await.unwrap_or_else(|_| {
            let busy =
                if waited < BUSY { String::new() } else { format!(", {waited:.1?} of it for a free connection") };
            let stage = if budget.is_connecting() { ": the connection was not established" } else { "" };
            Answer::Failed(format!("no answer within {:?}{busy}{stage}", self.timeout))
        });
        self.metrics.asked(began.elapsed());
        let mut failed = self.failed.lock().unwrap_or_else(PoisonError::into_inner);
        if let Answer::Failed(reason) = &answer {
            if failed.is_none() {
                tracing::warn!(route = self.metrics.label(), %reason, "a route's source fails");
            }
            *failed = Some(Instant::now());
        } else if failed.take().is_some() {
            tracing::info!(route = self.metrics.label(), "the route's source answers again");
        }
        self.metrics.set_failing(failed.is_some());
        answer
    }

    fn is_resting(&self, now: Instant) -> bool {
        let failed = self.failed.lock().unwrap_or_else(PoisonError::into_inner);
        failed.is_some_and(|failed| now.saturating_duration_since(failed) < REST)
    }
}

/// Takes a question off the list of those under way, whatever ends it.
struct Landing {
    asked: Arc<Asked>,
    user: Arc<str>,
    flight: Flight,
}

impl Landing {
    /// Unless the user was forgotten meanwhile: then the answer may be older than what it was forgotten for.
    fn is_awaited(&self) -> bool {
        let flights = self.asked.flights.lock().unwrap_or_else(PoisonError::into_inner);
        flights.get(&self.user).is_some_and(|flight| flight.same_channel(&self.flight))
    }
}

impl Drop for Landing {
    fn drop(&mut self) {
        if self.is_awaited() {
            self.asked.flights.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.user);
        }
    }
}

async fn landed(mut flight: Flight) -> Answer {
    let answer = flight.wait_for(Option::is_some).await.ok().and_then(|answer| answer.clone());
    answer.unwrap_or_else(|| Answer::Failed("the question was given up".to_owned()))
}

fn answer(kept: &Kept) -> Answer {
    kept.target.clone().map_or(Answer::Unknown, Answer::Found)
}
