//! Finds the backend of a user: sources are looked up in order, and the first that knows the user decides.
//!
//! A lookup that fails ends the search: going on would let a default route send a user to the wrong backend during an
//! outage. Only [`LookupResult::Unknown`] continues with the next source. A decision names declared backends only: no source can
//! introduce a network address, except within the networks that its configuration allows. This module does not select servers.
//!
//! A new source is a file in `sources`. A source that answers from memory is a variant of `Source`; a source that queries another
//! program is a variant of `Directory`, and `CachedDirectory` caches, limits and merges its lookups.

mod answer;
mod cache;
mod cache_file;
mod cached_directory;
mod decision;
mod directory;
mod idle_connections;
mod input_digest;
mod password_verification;
mod request;
mod source;
mod sources;

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use self::answer::DeclaredBackends;
use self::cached_directory::CachedDirectory;
pub use self::decision::{
    Destination, IssuedCredentials, LookupOrigin, LookupResult, NextAttempt, RouteDecision, ServerChoice, WrongPassword,
};
pub use self::password_verification::PasswordVerification;
pub use self::request::{LoginContext, LoginTls, LookupRequest};
use self::source::Source;
use crate::config::{self, Config, Problem};
use crate::metrics::{LookupOutcome, Metrics};

/// The routes of one configuration.
#[derive(Debug)]
pub struct Router {
    /// Label and source of each route.
    routes: Vec<(Arc<str>, Source)>,
}

/// The decision for a user.
#[derive(Debug, Clone)]
pub struct RouteMatch<'a> {
    /// What the route decides.
    pub decision: Arc<RouteDecision>,
    /// Label of the route that knows the user.
    pub route: &'a Arc<str>,
}

/// Reason why a user could not be routed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RouteError {
    /// No lookup failed, and no source knows the user.
    #[error("no route knows the user")]
    Unknown,
    /// The lookup in a source failed.
    #[error("route {route}: {reason}")]
    Failed {
        /// Label of the route.
        route: String,
        /// Why the lookup failed.
        reason: String,
    },
}

/// One lookup, as the command `route` shows it.
#[derive(Debug)]
pub struct ExplainedLookup<'a> {
    /// Label of the route.
    pub route: &'a str,
    /// Result of the lookup.
    pub result: LookupResult,
    /// Where the result comes from.
    pub origin: LookupOrigin,
    /// Duration of the lookup.
    pub duration: Duration,
}

/// Returns the labels of the configured routes, in order: the kind, followed by a number from the second of a kind on.
pub fn labels(routes: &[config::Route]) -> Vec<String> {
    let kinds: Vec<&str> = routes.iter().map(kind).collect();
    let numbered = |index: usize| match kinds[..index].iter().filter(|kind| **kind == kinds[index]).count() {
        0 => kinds[index].to_owned(),
        before => format!("{}-{}", kinds[index], before + 1),
    };
    (0..kinds.len()).map(numbered).collect()
}

fn kind(route: &config::Route) -> &'static str {
    match route {
        config::Route::Table(_) => "table",
        config::Route::Domain(_) => "domain",
        config::Route::Regex(_) => "regex",
        config::Route::Hash { .. } => "hash",
        config::Route::Default(_) => "default",
        config::Route::Sql(_) => "sql",
        config::Route::Ldap(_) => "ldap",
        config::Route::Http(_) => "http",
        config::Route::Redis(_) => "redis",
        config::Route::Dns(_) => "dns",
    }
}

impl Router {
    /// Builds all sources and reads their files, without connecting to a directory. Caches and unchanged tables are taken over from
    /// `previous`, a configuration and its router.
    ///
    /// # Errors
    /// The problems of all sources, such as an unreadable table or an invalid line.
    pub fn build(config: &Config, metrics: &Metrics, previous: Option<(&Config, &Self)>) -> Result<Self, Vec<Problem>> {
        let declared = DeclaredBackends::new(config);
        // Decisions contain indexes of backends: they stay valid only if the backends are the same.
        let previous = previous.filter(|(before, _)| DeclaredBackends::new(before) == declared);
        let mut problems = Vec::new();
        let mut routes = Vec::new();
        for (index, (label, route)) in labels(&config.routes).into_iter().zip(&config.routes).enumerate() {
            let previous_source = previous.and_then(|(before, router)| {
                let index = before.routes.iter().position(|other| other == route)?;
                router.routes.get(index).map(|(_, source)| source)
            });
            match Source::build(config, route, &declared, metrics.route(index), previous_source) {
                Ok(source) => routes.push((Arc::from(label), source)),
                Err(found) => problems.extend(found),
            }
        }
        if problems.is_empty() { Ok(Self { routes }) } else { Err(problems) }
    }

    /// Prepares the router for a command that exits after its lookups: cache files are read but not written, and tables are not watched.
    pub fn start_read_only(&self, runtime: &Handle) {
        for directory in self.directories() {
            directory.start(runtime.clone());
            directory.read_cache_file();
        }
    }

    /// Starts on `runtime`, until `stop`, to watch tables and to write cache files; lookups of a directory run on its own thread.
    pub fn start(&self, metrics: &Metrics, runtime: &Handle, tasks: &TaskTracker, stop: &CancellationToken) {
        for (index, (_, source)) in self.routes.iter().enumerate() {
            let metrics = metrics.route(index);
            match source {
                Source::Table(table) => {
                    metrics.set_users(table.len());
                    let watch = table.clone().watch(metrics.clone());
                    let stop = stop.clone();
                    tasks.spawn_on(async move { stop.run_until_cancelled(watch).await }, runtime);
                }
                Source::Directory(directory, _) => {
                    directory.start_on_thread(runtime);
                    directory.read_cache_file();
                    tasks.spawn_on(directory.clone().write_cache_file_regularly(stop.clone()), runtime);
                    directory.close_expired(stop.clone());
                }
                Source::Domain(domains) => metrics.set_users(domains.len()),
                Source::Regex(rules) => metrics.set_users(rules.len()),
                Source::Hash(_) | Source::Default(_) => {}
            }
        }
    }

    /// Removes a user from all caches: the next lookup queries the directories.
    pub fn forget(&self, user: &str) {
        self.directories().for_each(|directory| directory.forget(user));
    }

    /// Closes the connections of directories that `successor` does not use. Lookups in progress are completed.
    pub fn retire(&self, successor: &Self) {
        for directory in self.directories() {
            let is_reused = successor.directories().any(|other| Arc::ptr_eq(other.directory(), directory.directory()));
            if !is_reused {
                directory.retire_directory();
            }
        }
    }

    /// Stops writing cache files, because the successor of this process writes them now.
    pub fn stop_writing_files(&self) {
        self.directories().for_each(|directory| directory.stop_writing_cache_file());
    }

    /// Reloads tables whose files have changed, and waits for reloads in progress.
    ///
    /// # Errors
    /// The problems of tables that cannot be loaded; their previous content stays in use.
    pub async fn refresh(&self, metrics: &Metrics) -> Result<(), String> {
        let mut problems = Vec::new();
        for (index, (_, source)) in self.routes.iter().enumerate() {
            if let Source::Table(table) = source {
                problems.extend(table.refresh(metrics.route(index)).await.err());
            }
        }
        if problems.is_empty() { Ok(()) } else { Err(problems.join("; ")) }
    }

    /// Whether a source decides by more than the user name.
    pub fn needs_login_context(&self) -> bool {
        self.directories().any(|directory| directory.needs_login_context())
    }

    /// Looks the user up in the sources, in order. The caller sets the deadline.
    ///
    /// # Errors
    /// [`RouteError::Unknown`] if no source knows the user, and [`RouteError::Failed`] if a lookup failed before a source knew the user.
    pub async fn route(&self, request: &LookupRequest, metrics: &Metrics) -> Result<RouteMatch<'_>, RouteError> {
        for (index, (label, source)) in self.routes.iter().enumerate() {
            let began = Instant::now();
            let (result, _) = source.lookup(request).await;
            metrics.route(index).answered(outcome(&result), began.elapsed());
            match result {
                LookupResult::Found(decision) => return Ok(RouteMatch { decision, route: label }),
                LookupResult::Unknown => {}
                LookupResult::Failed(reason) => return Err(RouteError::Failed { route: label.to_string(), reason }),
            }
        }
        Err(RouteError::Unknown)
    }

    /// Looks the user up as [`Router::route`] does, and returns every lookup.
    pub async fn explain(&self, request: &LookupRequest) -> Vec<ExplainedLookup<'_>> {
        let mut lookups = Vec::new();
        for (label, source) in &self.routes {
            let began = Instant::now();
            let (result, origin) = source.lookup(request).await;
            let is_last = result != LookupResult::Unknown;
            lookups.push(ExplainedLookup { route: label, result, origin, duration: began.elapsed() });
            if is_last {
                break;
            }
        }
        lookups
    }

    fn directories(&self) -> impl Iterator<Item = &Arc<CachedDirectory>> {
        self.routes.iter().filter_map(|(_, source)| source.directory())
    }
}

fn outcome(result: &LookupResult) -> LookupOutcome {
    match result {
        LookupResult::Found(_) => LookupOutcome::Found,
        LookupResult::Unknown => LookupOutcome::Unknown,
        LookupResult::Failed(_) => LookupOutcome::Failed,
    }
}
