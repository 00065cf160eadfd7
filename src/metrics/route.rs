//! Metrics of one route: lookups, and for a route that queries a service, queries and cached results.

use std::sync::Arc;
use std::time::Duration;

use prometheus::{Histogram, IntCounter, IntGauge};

use super::families::Families;

/// The result of a lookup.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LookupOutcome {
    /// The route knows the user.
    Found,
    /// The route does not know the user.
    Unknown,
    /// The lookup failed.
    Failed,
}

impl LookupOutcome {
    const ALL: [Self; 3] = [Self::Found, Self::Unknown, Self::Failed];

    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Found => "found",
            Self::Unknown => "unknown",
            Self::Failed => "failed",
        }
    }
}

/// Metrics of one route, shared by its clones.
#[derive(Debug, Clone)]
pub struct RouteMetrics(Arc<Handles>);

#[derive(Debug)]
struct Handles {
    label: Box<str>,
    lookup: Histogram,
    results: [IntCounter; LookupOutcome::ALL.len()],
    users: IntGauge,
    load_failed: IntGauge,
    query: Histogram,
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
            results: LookupOutcome::ALL
                .map(|result| families.route_lookups.with_label_values(&[name, result.as_str()])),
            users: families.table_users.with_label_values(&[name]),
            load_failed: families.table_load_failed.with_label_values(&[name]),
            query: families.route_query.with_label_values(&[name]),
            cache_hit: cache("hit"),
            cache_miss: cache("miss"),
            cache_stale: cache("stale"),
            cached: families.route_cached.with_label_values(&[name]),
            failing: families.route_failing.with_label_values(&[name]),
        }))
    }

    /// Removes the series of the route's state.
    pub(super) fn forget(&self, families: &Families) {
        let label = &[self.label()];
        for family in
            [&families.table_users, &families.table_load_failed, &families.route_cached, &families.route_failing]
        {
            // An error means that the series does not exist.
            let _ = family.remove_label_values(label);
        }
    }

    /// Name of the route in metrics and logs.
    pub fn label(&self) -> &str {
        &self.0.label
    }

    /// Records the result of a lookup.
    pub fn answered(&self, result: LookupOutcome, took: Duration) {
        self.0.results[result as usize].inc();
        self.0.lookup.observe(took.as_secs_f64());
    }

    /// Sets the number of entries in the route's table.
    pub fn set_users(&self, users: usize) {
        self.0.users.set(i64::try_from(users).unwrap_or(i64::MAX));
    }

    /// Sets whether the newest version of the route's file is unusable.
    pub fn set_load_failed(&self, failed: bool) {
        self.0.load_failed.set(failed.into());
    }

    /// Records the duration of a query.
    pub fn queried(&self, took: Duration) {
        self.0.query.observe(took.as_secs_f64());
    }

    /// Counts a lookup that was answered from the cache.
    pub fn cache_hit(&self) {
        self.0.cache_hit.inc();
    }

    /// Counts a lookup without a cached result.
    pub fn cache_missed(&self) {
        self.0.cache_miss.inc();
    }

    /// Counts a lookup that was answered with an expired result because the service fails.
    pub fn cache_stale(&self) {
        self.0.cache_stale.inc();
    }

    /// Sets the number of cached results.
    pub fn set_cached(&self, users: usize) {
        self.0.cached.set(i64::try_from(users).unwrap_or(i64::MAX));
    }

    /// Sets whether the last query failed.
    pub fn set_failing(&self, failing: bool) {
        self.0.failing.set(failing.into());
    }
}
