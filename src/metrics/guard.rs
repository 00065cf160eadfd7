//! What the guard remembers, read when somebody looks, so that nothing is counted twice on the way of a login; and words
//! for what the policy service says.

use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{IntGauge, IntGaugeVec};

/// Gauges that are read from the guard whenever they are collected.
pub(super) struct Measured<E, M> {
    pub(super) entries: IntGaugeVec,
    pub(super) memory: IntGauge,
    pub(super) read_entries: E,
    pub(super) read_memory: M,
}

impl<E, M> Collector for Measured<E, M>
where
    E: Fn() -> Vec<(&'static str, usize)> + Send + Sync,
    M: Fn() -> usize + Send + Sync,
{
    fn desc(&self) -> Vec<&Desc> {
        self.entries.desc().into_iter().chain(self.memory.desc()).collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let number = |entries: usize| i64::try_from(entries).unwrap_or(i64::MAX);
        for (table, entries) in (self.read_entries)() {
            self.entries.with_label_values(&[table]).set(number(entries));
        }
        self.memory.set(number((self.read_memory)()));
        self.entries.collect().into_iter().chain(self.memory.collect()).collect()
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
