//! Metrics of admission, which are read when metrics are collected and so cost logins nothing, and labels of the authentication
//! policy service.

use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{IntGauge, IntGaugeVec};

/// Gauges that are read from admission whenever metrics are collected.
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

/// A command to the policy service.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PolicyCommand {
    /// Asks whether a login is allowed.
    Allow,
    /// Reports the outcome of a login.
    Report,
}

impl PolicyCommand {
    pub(super) const ALL: [Self; 2] = [Self::Allow, Self::Report];

    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Allow => "allow",
            Self::Report => "report",
        }
    }
}

/// An answer of the policy service.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PolicyAnswer {
    /// The login is allowed, or the report was accepted.
    Allowed,
    /// The login is allowed after a delay.
    Delayed,
    /// The login is denied.
    Denied,
    /// No valid answer was received.
    Failed,
}

impl PolicyAnswer {
    pub(super) const ALL: [Self; 4] = [Self::Allowed, Self::Delayed, Self::Denied, Self::Failed];

    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Allowed => "allowed",
            Self::Delayed => "delayed",
            Self::Denied => "denied",
            Self::Failed => "failed",
        }
    }
}
