//! Which backend serves this user: sources asked in order, the first that knows the user wins.
//!
//! A source that cannot tell (`Failed`) ends the search: asking on would let a default route send a user to the wrong
//! shard during an outage. Only "unknown" goes on to the next source. Answers name declared backends and nothing else:
//! no source can make up a network address. This room does not know servers. Called by `session` for every login and
//! by the command `route` to explain.
//!
//! A new source is a file of its own here and a variant of [`Source`].

mod domain;
mod hash;
mod table;

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::config::{self, BackendId, Config, Problem};
use crate::identity::UserName;
use crate::metrics::{LookupResult, Metrics};

/// What a source says of a user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// The user's mailbox is in this backend.
    Found(BackendId),
    /// The source does not know the user.
    Unknown,
    /// The source could not tell, for the reason given (never shown to clients).
    Failed(String),
}

/// A closed set: one variant a source, one file each.
#[derive(Debug)]
enum Source {
    Table(table::Table),
    Domain(domain::Domains),
    Hash(hash::Hash),
    Default(BackendId),
}

impl Source {
    /// Asynchronous for the sources that ask a directory over the network; the ones of today answer from memory.
    async fn lookup(&self, key: &str) -> Answer {
        match self {
            Self::Table(table) => table.lookup(key),
            Self::Domain(domains) => domains.lookup(key),
            Self::Hash(hash) => hash.lookup(key),
            Self::Default(backend) => Answer::Found(*backend),
        }
    }
}

/// The routes of one configuration.
#[derive(Debug)]
pub struct Router {
    routes: Vec<(Arc<str>, Source)>,
}

/// Where a user belongs, and which route said so.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Routed<'a> {
    /// The backend.
    pub backend: BackendId,
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
pub struct Explained<'a> {
    /// Label of the route.
    pub route: &'a str,
    /// What it said.
    pub answer: Answer,
    /// How long it took.
    pub took: Duration,
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
        config::Route::Hash(_) => "hash",
        config::Route::Default(_) => "default",
    }
}

impl Router {
    /// Loads every source.
    ///
    /// # Errors
    /// All problems of all sources: a table that cannot be read, a line of it that is wrong.
    pub fn build(config: &Config) -> Result<Self, Vec<Problem>> {
        let mut problems = Vec::new();
        let mut routes = Vec::new();
        for (label, route) in labels(&config.routes).into_iter().zip(&config.routes) {
            let source = match route {
                config::Route::Table(path) => match table::Table::load(config, path) {
                    Ok(table) => Source::Table(table),
                    Err(found) => {
                        problems.extend(found);
                        continue;
                    }
                },
                config::Route::Domain(domains) => Source::Domain(domain::Domains::new(domains.clone())),
                config::Route::Hash(backends) => Source::Hash(hash::Hash::new(config, backends)),
                config::Route::Default(backend) => Source::Default(*backend),
            };
            routes.push((Arc::from(label), source));
        }
        if problems.is_empty() { Ok(Self { routes }) } else { Err(problems) }
    }

    /// Sets the gauges that do not change until the next load.
    pub fn publish(&self, metrics: &Metrics) {
        for (index, (_, source)) in self.routes.iter().enumerate() {
            match source {
                Source::Table(table) => metrics.route(index).set_users(table.len()),
                Source::Domain(domains) => metrics.route(index).set_users(domains.len()),
                Source::Hash(_) | Source::Default(_) => {}
            }
        }
    }

    /// Asks the sources in order. The caller sets the deadline.
    ///
    /// # Errors
    /// [`RouteError::Unknown`] and [`RouteError::Failed`] are never mixed: see the module's text.
    pub async fn route(&self, user: &UserName, metrics: &Metrics) -> Result<Routed<'_>, RouteError> {
        let key = user.routing_key();
        for (index, (label, source)) in self.routes.iter().enumerate() {
            let asked = Instant::now();
            let answer = source.lookup(&key).await;
            metrics.route(index).answered(result(&answer), asked.elapsed());
            match answer {
                Answer::Found(backend) => return Ok(Routed { backend, route: label }),
                Answer::Unknown => {}
                Answer::Failed(reason) => return Err(RouteError::Failed { route: label.to_string(), reason }),
            }
        }
        Err(RouteError::Unknown)
    }

    /// Asks the sources as [`Router::route`] does, and keeps every answer.
    pub async fn explain(&self, user: &UserName) -> Vec<Explained<'_>> {
        let key = user.routing_key();
        let mut explained = Vec::new();
        for (label, source) in &self.routes {
            let asked = Instant::now();
            let answer = source.lookup(&key).await;
            let last = answer != Answer::Unknown;
            explained.push(Explained { route: label, answer, took: asked.elapsed() });
            if last {
                break;
            }
        }
        explained
    }
}

fn result(answer: &Answer) -> LookupResult {
    match answer {
        Answer::Found(_) => LookupResult::Found,
        Answer::Unknown => LookupResult::Unknown,
        Answer::Failed(_) => LookupResult::Failed,
    }
}
