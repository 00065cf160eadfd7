//! Token buckets, each one number: the time at which it is full again (the generic cell rate algorithm).
//!
//! A bucket holds `events` tokens and gets one more every `per / events`. An event takes one; without one it is over the
//! rate, and takes nothing. Called by the tables of [`super::Guard`].

use super::table::Value;
use crate::config::Rate;

/// A bucket: microseconds on the guard's clock until which it is not full.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Bucket(u64);

impl Value for Bucket {
    fn worth(self, now: u64) -> u64 {
        // A full bucket is what one that is forgotten begins with.
        self.0.saturating_sub(now)
    }
}

impl Bucket {
    /// Takes a token at `now`. The bucket afterwards, and whether there was one.
    pub(super) fn take(self, rate: Rate, now: u64) -> (Self, bool) {
        let per = u64::try_from(rate.per.as_micros()).unwrap_or(u64::MAX / 4);
        let one = (per / u64::from(rate.events.max(1))).max(1);
        let after = self.0.max(now) + one;
        // All tokens together are worth `per`, or a little less where it does not divide evenly.
        let fits = after - now <= one * u64::from(rate.events);
        (if fits { Self(after) } else { self }, fits)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    const SECOND: u64 = 1_000_000;

    fn taken(bucket: &mut Bucket, rate: Rate, now: u64) -> bool {
        let (after, fits) = bucket.take(rate, now);
        *bucket = after;
        fits
    }

    #[test]
    fn a_burst_then_one_at_a_time() {
        let rate = Rate { events: 3, per: Duration::from_secs(60) };
        let mut bucket = Bucket::default();
        let began = 7 * SECOND;
        assert_eq!([0; 4].map(|_| taken(&mut bucket, rate, began)), [true, true, true, false]);
        assert!(!taken(&mut bucket, rate, began + 19 * SECOND));
        assert!(taken(&mut bucket, rate, began + 20 * SECOND));
        assert!(
            !taken(&mut bucket, rate, began + 39 * SECOND),
            "what is over the rate takes nothing, and gives nothing"
        );
        assert!(taken(&mut bucket, rate, began + 40 * SECOND));
        assert_eq!(bucket.worth(began + 1000 * SECOND), 0);
    }

    proptest! {
        /// In no stretch of time are more let through than the bucket holds and what was filled in meanwhile.
        #[test]
        fn never_more_than_burst_and_refill(
            events in 1u32..50,
            seconds in 1u64..100,
            steps in prop::collection::vec(0u64..5 * SECOND, 1..200),
        ) {
            let rate = Rate { events, per: Duration::from_secs(seconds) };
            let (mut bucket, mut now, mut let_through) = (Bucket::default(), 0, Vec::new());
            for step in steps {
                now += step;
                if taken(&mut bucket, rate, now) {
                    let_through.push(now);
                }
            }
            let one = seconds * SECOND / u64::from(events);
            for (first, from) in let_through.iter().enumerate() {
                for (last, to) in let_through.iter().enumerate().skip(first) {
                    let filled = (to - from) / one;
                    prop_assert!((last - first + 1) as u64 <= u64::from(events) + filled + 1);
                }
            }
        }

        /// Who keeps to the rate is never refused.
        #[test]
        fn who_keeps_to_it_is_let_through(events in 1u32..50, seconds in 1u64..100, count in 1u64..200) {
            let rate = Rate { events, per: Duration::from_secs(seconds) };
            let one = seconds * SECOND / u64::from(events);
            let mut bucket = Bucket::default();
            for number in 0..count {
                prop_assert!(taken(&mut bucket, rate, number * one));
            }
        }
    }
}
