//! Metrics of admission, which are read when metrics are rendered and so cost logins nothing, and labels of the authentication
//! policy service.

use std::fmt;

use super::families::Families;

/// Reads the state of admission for its gauges.
pub(super) struct AdmissionReader {
    /// Reads the number of entries of each table.
    pub(super) entries: Box<dyn Fn() -> Vec<(&'static str, usize)> + Send + Sync>,
    /// Reads the bytes of `limits.before_login_memory` in use.
    pub(super) memory: Box<dyn Fn() -> usize + Send + Sync>,
}

impl AdmissionReader {
    pub(super) fn update(&self, families: &Families) {
        let number = |count: usize| i64::try_from(count).unwrap_or(i64::MAX);
        for (table, entries) in (self.entries)() {
            families.admission_entries.with_label_values(&[table]).set(number(entries));
        }
        families.before_login_memory.set(number((self.memory)()));
    }
}

impl fmt::Debug for AdmissionReader {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("AdmissionReader").finish_non_exhaustive()
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
