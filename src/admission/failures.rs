//! How late a failed login is answered: twice as late with each more of the same user from the same address.

use std::time::Duration;

use super::table::Value;

/// Failures are forgotten after so much time without another.
const FORGET: u64 = 15 * 60 * 1_000_000;

/// Failed logins in a row.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Failures {
    /// Microseconds on the guard's clock.
    last: u64,
    count: u32,
}

impl Value for Failures {
    fn worth(self, now: u64) -> u64 {
        let left = (self.last + FORGET).saturating_sub(now);
        // Many failures before late ones.
        if self.count == 0 { 0 } else { left.saturating_mul(u64::from(self.count)) }
    }
}

impl Failures {
    /// One more; and how many there are in a row.
    pub(super) fn another(self, now: u64) -> (Self, u32) {
        let before = if self.last + FORGET < now { 0 } else { self.count };
        let count = before.saturating_add(1);
        (Self { last: now, count }, count)
    }
}

/// When to answer the failure with this number, the first being 1, counted from the command. `random` moves it by a fifth
/// up or down, so that nothing can be read from it.
pub(super) fn delay(number: u32, first: Duration, most: Duration, random: u64) -> Duration {
    let doubled = first.saturating_mul(1 << number.saturating_sub(1).min(16));
    let late = doubled.min(most);
    late * 4 / 5 + (late * 2 / 5).mul_f64((random >> 11) as f64 / (1u64 << 53) as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_doubles_up_to_the_most() {
        let delays: Vec<u64> = (1..=7)
            .map(|number| delay(number, Duration::from_secs(1), Duration::from_secs(15), 1 << 63).as_millis() as u64)
            .collect();
        assert_eq!(delays, [1000, 2000, 4000, 8000, 15_000, 15_000, 15_000]);
        assert_eq!(delay(u32::MAX, Duration::from_secs(60), Duration::from_secs(60), 0), Duration::from_secs(48));
    }

    #[test]
    fn it_is_never_off_by_more_than_a_fifth() {
        let of = |random| delay(1, Duration::from_secs(10), Duration::from_secs(10), random).as_secs_f64();
        assert!((of(0) - 8.0).abs() < 0.001 && (of(u64::MAX) - 12.0).abs() < 0.001);
    }

    #[test]
    fn old_failures_are_forgotten() {
        let (failures, number) = Failures::default().another(5);
        let (failures, next) = failures.another(6);
        assert_eq!((number, next), (1, 2));
        assert_eq!(failures.another(6 + FORGET).1, 3);
        assert_eq!(failures.another(7 + FORGET).1, 1);
        assert!(failures.worth(6) > Failures::default().another(6).0.worth(6));
        assert_eq!(failures.worth(7 + FORGET), 0);
    }
}
