//! Which backend serves this user: sources asked in order, the first that knows the user wins.
//!
//! A source that cannot tell (`Failed`) ends the search: asking on would let a default route send a user to the wrong
//! shard during an outage. Only "unknown" goes on to the next source. Answers name declared backends and nothing else:
//! no source can make up a network address, but for the networks its configuration allows. This room does not know
//! servers. Called by `session` for every login and by the command `route` to explain.
//!
//! A new source is a file of its own here. One that answers from memory is a variant of [`Source`]; one that asks
//! somebody is a variant of [`directory::Directory`], and `asked` keeps, bounds and repeats its questions.

mod cache;
mod cache_file;
mod cached_directory;
mod decision;
mod directory;
mod idle;
mod password_verification;
mod request;
mod reuse;
mod sources;

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use self::cached_directory::CachedDirectory;
use self::decision::Declared;
pub use self::decision::{Destination, IssuedCredentials, NextAttempt, RouteDecision, ServerChoice, WrongPassword};
use self::directory::Directory;
pub use self::password_verification::PasswordVerification;
pub use self::request::{LoginContext, LoginTls, LookupRequest};
use self::reuse::Inputs;
use crate::config::{self, Config, Problem};
use crate::metrics::{LookupOutcome, Metrics};

/// What a source says of a user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LookupResult {
    /// The source knows the user.
    Found(Arc<RouteDecision>),
    /// The source does not know the user.
    Unknown,
    /// The source could not tell, for the reason given (never shown to clients).
    Failed(String),
}

/// Where an answer is from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LookupOrigin {
    /// From memory.
    Memory,
    /// The directory was asked.
    Directory,
    /// It said so this long ago.
    Cache(Duration),
    /// It said so this long ago, and does not answer now.
    Stale(Duration),
}

/// A closed set: one variant a source, one file each.
#[derive(Debug)]
enum Source {
    Table(Arc<sources::table::Table>),
    Domain(sources::domain::Domains),
    Regex(sources::regex::Rules),
    Hash(sources::hash::Hash),
    Default(Arc<RouteDecision>),
    CachedDirectory(Arc<CachedDirectory>, Option<Inputs>),
}

impl Source {
    async fn lookup(&self, question: &LookupRequest) -> (LookupResult, LookupOrigin) {
        let user = &*question.user;
        let answer = match self {
            Self::Table(table) => table.lookup(user),
            Self::Domain(domains) => domains.lookup(user),
            Self::Regex(rules) => rules.lookup(user),
            Self::Hash(hash) => hash.lookup(user),
            Self::Default(target) => LookupResult::Found(target.clone()),
            Self::CachedDirectory(asked, _) => return asked.lookup(question.clone()).await,
        };
        (answer, LookupOrigin::Memory)
    }
}

/// The routes of one configuration.
#[derive(Debug)]
pub struct Router {
    routes: Vec<(Arc<str>, Source)>,
}

/// Where a user belongs, and which route said so.
#[derive(Debug, Clone)]
pub struct RouteMatch<'a> {
    /// The answer.
    pub decision: Arc<RouteDecision>,
    /// Label of the route that answered.
    pub route: &'a Arc<str>,
}

/// Why a user could not be routed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RouteError {
    /// Every source answered, and none knows the user.
    #[error("no route knows the user")]
    Unknown,
    /// A source could not tell.
    #[error("route {route}: {reason}")]
    Failed {
        /// Label of the route.
        route: String,
        /// What it met.
        reason: String,
    },
}

/// One source's answer, for the command `route`.
#[derive(Debug)]
pub struct ExplainedLookup<'a> {
    /// Label of the route.
    pub route: &'a str,
    /// Its result.
    pub result: LookupResult,
    /// Where the result comes from.
    pub origin: LookupOrigin,
    /// Duration of the lookup.
    pub duration: Duration,
}

/// Labels of the configured routes, in order: the kind, with a number from the second of a kind on.
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
    /// Loads every file and connects to nobody. Of `previous`, a configuration and its routes, kept answers of the same
    /// question and tables that have not changed are taken over.
    ///
    /// # Errors
    /// All problems of all sources: a table that cannot be read, a line of it that is wrong.
    pub fn build(config: &Config, metrics: &Metrics, previous: Option<(&Config, &Self)>) -> Result<Self, Vec<Problem>> {
        let declared = Declared::new(config);
        // Answers name backends by their places.
        let previous = previous.filter(|(before, _)| Declared::new(before) == declared);
        let mut problems = Vec::new();
        let mut routes = Vec::new();
        for (index, (label, route)) in labels(&config.routes).into_iter().zip(&config.routes).enumerate() {
            let known = previous.and_then(|(before, router)| {
                let at = before.routes.iter().position(|other| other == route)?;
                router.routes.get(at).map(|(_, source)| source)
            });
            match source(config, route, &declared, metrics, index, known) {
                Ok(source) => routes.push((Arc::from(label), source)),
                Err(found) => problems.extend(found),
            }
        }
        if problems.is_empty() { Ok(Self { routes }) } else { Err(problems) }
    }

    /// For a command that asks and ends: kept answers are read and not written, and nothing is watched.
    pub fn start_read_only(&self, runtime: &Handle) {
        for (_, source) in &self.routes {
            if let Source::CachedDirectory(asked, _) = source {
                asked.start(runtime.clone());
                asked.read_file();
            }
        }
    }

    /// Starts watching tables and writing caches to their files on `runtime`, and lookups on threads of their own, until `stop`.
    pub fn start(&self, metrics: &Metrics, runtime: &Handle, tasks: &TaskTracker, stop: &CancellationToken) {
        for (index, (_, source)) in self.routes.iter().enumerate() {
            let metrics = metrics.route(index);
            match source {
                Source::Table(table) => {
                    metrics.set_users(table.len());
                    let follow = table.clone().follow(metrics.clone());
                    let stop = stop.clone();
                    tasks.spawn_on(async move { stop.run_until_cancelled(follow).await }, runtime);
                }
                Source::CachedDirectory(asked, _) => {
                    asked.start_on_thread(runtime);
                    asked.read_file();
                    tasks.spawn_on(asked.clone().keep_file(stop.clone()), runtime);
                    asked.close_expired(stop.clone());
                }
                Source::Domain(domains) => metrics.set_users(domains.len()),
                Source::Regex(rules) => metrics.set_users(rules.len()),
                Source::Hash(_) | Source::Default(_) => {}
            }
        }
    }

    /// What was kept of a user is forgotten: the next question is asked.
    pub fn forget(&self, user: &str) {
        for (_, source) in &self.routes {
            if let Source::CachedDirectory(asked, _) = source {
                asked.forget(user);
            }
        }
    }

    /// Closes connections to directories that `successor` does not have. Lookups under way end with their answers.
    pub fn retire(&self, successor: &Self) {
        for (_, source) in &self.routes {
            let Source::CachedDirectory(asked, _) = source else { continue };
            let is_used_on = successor.routes.iter().any(|(_, other)| {
                matches!(other, Source::CachedDirectory(other, _) if Arc::ptr_eq(other.directory(), asked.directory()))
            });
            if !is_used_on {
                asked.retire_directory();
            }
        }
    }

    /// Writes kept answers to their files no more: a successor of this process does.
    pub fn stop_writing_files(&self) {
        for (_, source) in &self.routes {
            if let Source::CachedDirectory(asked, _) = source {
                asked.leave_file();
            }
        }
    }

    /// Loads tables whose files have changed, and waits for those that are being loaded.
    ///
    /// # Errors
    /// Tables that cannot be loaded, with what is wrong: their old answers stay in use.
    pub async fn refresh(&self, metrics: &Metrics) -> Result<(), String> {
        let mut wrong = Vec::new();
        for (index, (_, source)) in self.routes.iter().enumerate() {
            if let Source::Table(table) = source {
                wrong.extend(table.refresh(metrics.route(index)).await.err());
            }
        }
        if wrong.is_empty() { Ok(()) } else { Err(wrong.join("; ")) }
    }

    /// Whether any source decides by more than the user.
    pub fn needs_login_context(&self) -> bool {
        self.routes
            .iter()
            .any(|(_, source)| matches!(source, Source::CachedDirectory(asked, _) if asked.needs_login_context()))
    }

    /// Asks the sources in order. The caller sets the deadline.
    ///
    /// # Errors
    /// [`RouteError::Unknown`] and [`RouteError::Failed`] are never mixed: see the module's text.
    pub async fn route(&self, question: &LookupRequest, metrics: &Metrics) -> Result<RouteMatch<'_>, RouteError> {
        for (index, (label, source)) in self.routes.iter().enumerate() {
            let asked = Instant::now();
            let (answer, _) = source.lookup(question).await;
            metrics.route(index).answered(result(&answer), asked.elapsed());
            match answer {
                LookupResult::Found(target) => return Ok(RouteMatch { decision: target, route: label }),
                LookupResult::Unknown => {}
                LookupResult::Failed(reason) => return Err(RouteError::Failed { route: label.to_string(), reason }),
            }
        }
        Err(RouteError::Unknown)
    }

    /// Asks the sources as [`Router::route`] does, and keeps every answer.
    pub async fn explain(&self, request: &LookupRequest) -> Vec<ExplainedLookup<'_>> {
        let mut explained = Vec::new();
        for (label, source) in &self.routes {
            let began = Instant::now();
            let (result, origin) = source.lookup(request).await;
            let last = result != LookupResult::Unknown;
            explained.push(ExplainedLookup { route: label, result, origin, duration: began.elapsed() });
            if last {
                break;
            }
        }
        explained
    }
}

fn source(
    config: &Config,
    route: &config::Route,
    declared: &Declared,
    metrics: &Metrics,
    index: usize,
    known: Option<&Source>,
) -> Result<Source, Vec<Problem>> {
    let inputs = Inputs::of(config, route);
    let known_asked =
        if let Some(Source::CachedDirectory(asked, inputs)) = known { Some((asked, *inputs)) } else { None };
    let used_on = known_asked.filter(|(_, before)| inputs.is_some() && *before == inputs);
    let asked = |build: &dyn Fn() -> Result<Directory, Vec<Problem>>, asking: &config::LookupConfig| {
        let directory = match used_on {
            Some((asked, _)) => asked.directory().clone(),
            None => build()?.into(),
        };
        let asked = CachedDirectory::new(directory, asking, declared.clone(), metrics.route(index).clone());
        let asked = asked.with_answers_of(known_asked.map(|(asked, _)| &**asked));
        let asked = asked.with_thread_of(used_on.map(|(asked, _)| &**asked));
        Ok::<_, Vec<Problem>>(Source::CachedDirectory(asked.into(), inputs))
    };
    Ok(match route {
        config::Route::Table(path) => match known {
            Some(Source::Table(table)) if table.is_current(&path.value, declared) => Source::Table(table.clone()),
            _ => Source::Table(Arc::new(sources::table::Table::load(path, declared)?)),
        },
        config::Route::Domain(domains) => Source::Domain(sources::domain::Domains::new(domains)),
        config::Route::Regex(rules) => Source::Regex(sources::regex::Rules::build(rules, declared)?),
        config::Route::Hash { style, shares } => Source::Hash(sources::hash::Hash::new(config, *style, shares)),
        config::Route::Default(backend) => Source::Default(RouteDecision::backend(*backend).into()),
        config::Route::Sql(sql) => {
            asked(&|| Ok(Directory::Sql(Box::new(sources::sql::Sql::build(sql, declared)?))), &sql.lookup)?
        }
        config::Route::Ldap(ldap) => {
            asked(&|| Ok(Directory::Ldap(Box::new(sources::ldap::Directory::build(ldap, declared)?))), &ldap.lookup)?
        }
        config::Route::Http(http) => {
            asked(&|| Ok(Directory::Http(Box::new(sources::http::Http::build(config, http, declared)?))), &http.lookup)?
        }
        config::Route::Redis(redis) => {
            asked(&|| Ok(Directory::Redis(Box::new(sources::redis::Redis::build(redis, declared)?))), &redis.lookup)?
        }
        config::Route::Dns(dns) => {
            asked(&|| Ok(Directory::Dns(Box::new(sources::dns::Dns::new(config, dns, declared)))), &dns.lookup)?
        }
    })
}

fn result(answer: &LookupResult) -> LookupOutcome {
    match answer {
        LookupResult::Found(_) => LookupOutcome::Found,
        LookupResult::Unknown => LookupOutcome::Unknown,
        LookupResult::Failed(_) => LookupOutcome::Failed,
    }
}
