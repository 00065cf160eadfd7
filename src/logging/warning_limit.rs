//! A limit for warnings that one fault would otherwise log for every connection.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Time between two warnings.
const INTERVAL: Duration = Duration::from_secs(600);

/// Allows one warning per ten minutes.
#[derive(Debug, Default)]
pub struct WarningLimit(Mutex<Option<Instant>>);

impl WarningLimit {
    /// Whether the caller may log the warning at `now`. If so, the next interval begins.
    pub(crate) fn allows(&self, now: Instant) -> bool {
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let is_due = last.is_none_or(|last| now.saturating_duration_since(last) >= INTERVAL);
        if is_due {
            *last = Some(now);
        }
        is_due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_warning_per_interval_is_allowed() {
        let (limit, now) = (WarningLimit::default(), Instant::now());
        assert!(limit.allows(now));
        assert!(!limit.allows(now));
        assert!(!limit.allows(now + INTERVAL - Duration::from_secs(1)));
        assert!(limit.allows(now + INTERVAL));
        assert!(!limit.allows(now + INTERVAL));
    }
}
