//! Metrics of one route: look-ups, and where it asks a directory, its questions and kept answers.

use std::sync::Arc;
use std::time::Duration;

use prometheus::{Histogram, IntCounter, IntGauge};

use super::families::Families;

/// What a route said.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LookupOutcome {
    /// It knows the user.
    Found,
    /// It does not.
    Unknown,
    /// It could not tell.
    Failed,
}

impl LookupOutcome {
    const ALL: [Self; 3] = [Self::Found, Self::Unknown, Self::Failed];

    /// Label text.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Found => "found",
            Self::Unknown => "unknown",
            Self::Failed => "failed",
        }
    }
}

/// Metrics of one route. Clones count together.
#[derive(Debug, Clone)]
pub struct RouteMetrics(Arc<Handles>);

#[derive(Debug)]
struct Handles {
    label: Box<str>,
    lookup: Histogram,
    results: [IntCounter; LookupOutcome::ALL.len()],
    users: IntGauge,
    load_failed: IntGauge,
    asked: Histogram,
    cache_hit: IntCounter,
    cache_miss: IntCounter,
    cache_stale: IntCounter,
    cached: IntGauge,
    failing: IntGauge,
}

impl RouteMetrics {
    pub(super) fn new(families: &Families, name: &str) -> Self {
        let cache = |state| families.route_cache.with_label_values(&[name, state]);
        Self(Arc::new(Handles {
            label: name.into(),
            lookup: families.route_lookup.with_label_values(&[name]),
            results: LookupOutcome::ALL.map(|result| families.lookups.with_label_values(&[name, result.as_str()])),
            users: families.table_users.with_label_values(&[name]),
            load_failed: families.load_failed.with_label_values(&[name]),
            asked: families.route_asked.with_label_values(&[name]),
            cache_hit: cache("hit"),
            cache_miss: cache("miss"),
            cache_stale: cache("stale"),
            cached: families.route_cached.with_label_values(&[name]),
            failing: families.route_failing.with_label_values(&[name]),
        }))
    }

    /// The route is no longer there: the series of its state end.
    pub(super) fn forget(&self, families: &Families) {
        let label = &[self.label()];
        for family in [&families.table_users, &families.load_failed, &families.route_cached, &families.route_failing] {
            // An error says that the series does not exist, which is what is asked for.
            let _ = family.remove_label_values(label);
        }
    }

    /// What the route is called in metrics and logs.
    pub fn label(&self) -> &str {
        &self.0.label
    }

    /// The route answered after `took`.
    pub fn answered(&self, result: LookupOutcome, took: Duration) {
        self.0.results[result as usize].inc();
        self.0.lookup.observe(took.as_secs_f64());
    }

    /// The route holds this many entries.
    pub fn set_users(&self, users: usize) {
        self.0.users.set(i64::try_from(users).unwrap_or(i64::MAX));
    }

    /// Whether the newest version of its file could not be used.
    pub fn set_load_failed(&self, failed: bool) {
        self.0.load_failed.set(failed.into());
    }

    /// Its source was asked, and the answer took this long.
    pub fn asked(&self, took: Duration) {
        self.0.asked.observe(took.as_secs_f64());
    }

    /// A kept answer served.
    pub fn cache_hit(&self) {
        self.0.cache_hit.inc();
    }

    /// No kept answer served.
    pub fn cache_missed(&self) {
        self.0.cache_miss.inc();
    }

    /// A kept answer served that is over its time, as the source is down.
    pub fn stale_answer(&self) {
        self.0.cache_stale.inc();
    }

    /// It keeps this many answers.
    pub fn set_cached(&self, users: usize) {
        self.0.cached.set(i64::try_from(users).unwrap_or(i64::MAX));
    }

    /// Whether the last question failed.
    pub fn set_failing(&self, failing: bool) {
        self.0.failing.set(failing.into());
    }
}
