//! What the guard remembers, read when somebody looks, so that nothing is counted twice on the way of a login; and words
//! for what the policy service says.

use prometheus::IntGaugeVec;
use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;

/// A gauge that asks.
pub(super) struct Measured<F> {
    gauges: IntGaugeVec,
    read: F,
}

impl<F: Fn() -> Vec<(&'static str, usize)> + Send + Sync> Measured<F> {
    pub(super) fn new(gauges: IntGaugeVec, read: F) -> Self {
        Self { gauges, read }
    }
}

impl<F: Fn() -> Vec<(&'static str, usize)> + Send + Sync> Collector for Measured<F> {
    fn desc(&self) -> Vec<&Desc> {
        self.gauges.desc()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        for (table, entries) in (self.read)() {
            self.gauges.with_label_values(&[table]).set(i64::try_from(entries).unwrap_or(i64::MAX));
        }
        self.gauges.collect()
    }
}

/// What the policy service is asked or told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PolicyCommand {
    /// Whether a login may be tried.
    Allow,
    /// How it ended.
    Report,
}

impl PolicyCommand {
    pub(super) const ALL: [Self; 2] = [Self::Allow, Self::Report];

    /// Label text.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Allow => "allow",
            Self::Report => "report",
        }
    }
}

/// What it says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PolicyAnswer {
    /// Go on; a report is taken.
    Allowed,
    /// Go on, later.
    Delayed,
    /// Do not.
    Denied,
    /// Nothing that can be used.
    Failed,
}

impl PolicyAnswer {
    pub(super) const ALL: [Self; 4] = [Self::Allowed, Self::Delayed, Self::Denied, Self::Failed];

    /// Label text.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Allowed => "allowed",
            Self::Delayed => "delayed",
            Self::Denied => "denied",
            Self::Failed => "failed",
        }
    }
}
