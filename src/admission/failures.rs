//! Delay of the reply to a failed login: doubled with each further failure of the same user from the same address.

use std::time::Duration;

use super::table::TableValue;

/// Failures are forgotten after this many microseconds without another.
const FORGET_AFTER: u64 = 15 * 60 * 1_000_000;

/// Consecutive failed logins.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Failures {
    /// Time of the last failure, in microseconds since the start of admission control.
    last: u64,
    count: u32,
}

impl TableValue for Failures {
    fn retention_priority(self, now: u64) -> u64 {
        let left = (self.last + FORGET_AFTER).saturating_sub(now);
        // The number of failures counts more than their age.
        if self.count == 0 { 0 } else { left.saturating_mul(u64::from(self.count)) }
    }
}

impl Failures {
    /// Adds a failure; also returns the number of consecutive failures.
    pub(super) fn increment(self, now: u64) -> (Self, u32) {
        let before = if self.last + FORGET_AFTER < now { 0 } else { self.count };
        let count = before.saturating_add(1);
        (Self { last: now, count }, count)
    }
}

/// The delay after `count` consecutive failures, counted from the command. `random` changes it by up to a fifth, so that its
/// exact length reveals nothing.
pub(super) fn delay(count: u32, first: Duration, max: Duration, random: u64) -> Duration {
    let doubled = first.saturating_mul(1 << count.saturating_sub(1).min(16));
    let delay = doubled.min(max);
    delay * 4 / 5 + (delay * 2 / 5).mul_f64((random >> 11) as f64 / (1u64 << 53) as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delay_doubles_up_to_its_maximum() {
        let delays: Vec<u64> = (1..=7)
            .map(|count| delay(count, Duration::from_secs(1), Duration::from_secs(15), 1 << 63).as_millis() as u64)
            .collect();
        assert_eq!(delays, [1000, 2000, 4000, 8000, 15_000, 15_000, 15_000]);
        assert_eq!(delay(u32::MAX, Duration::from_secs(60), Duration::from_secs(60), 0), Duration::from_secs(48));
    }

    #[test]
    fn delay_varies_by_a_fifth_at_most() {
        let seconds = |random| delay(1, Duration::from_secs(10), Duration::from_secs(10), random).as_secs_f64();
        assert!((seconds(0) - 8.0).abs() < 0.001 && (seconds(u64::MAX) - 12.0).abs() < 0.001);
    }

    #[test]
    fn old_failures_are_forgotten() {
        let (failures, first) = Failures::default().increment(5);
        let (failures, second) = failures.increment(6);
        assert_eq!((first, second), (1, 2));
        assert_eq!(failures.increment(6 + FORGET_AFTER).1, 3);
        assert_eq!(failures.increment(7 + FORGET_AFTER).1, 1);
        assert!(failures.retention_priority(6) > Failures::default().increment(6).0.retention_priority(6));
        assert_eq!(failures.retention_priority(7 + FORGET_AFTER), 0);
    }
}
