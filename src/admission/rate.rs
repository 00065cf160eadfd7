//! Token buckets, each stored as one number: the time at which it is full again (generic cell rate algorithm).
//!
//! A bucket holds `events` tokens and gets one more every `per / events`. An event takes a token; an event that finds none exceeds
//! the rate and changes nothing.

use super::table::TableValue;
use crate::config::Rate;

/// The time at which the bucket is full again, in microseconds since the start of admission control.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Bucket(u64);

impl TableValue for Bucket {
    fn retention_priority(self, now: u64) -> u64 {
        // A full bucket can be forgotten: a new one starts full.
        self.0.saturating_sub(now)
    }
}

impl Bucket {
    /// Takes a token at `now`. Returns the new bucket, and whether there was a token.
    pub(super) fn take(self, rate: Rate, now: u64) -> (Self, bool) {
        let per = u64::try_from(rate.per.as_micros()).unwrap_or(u64::MAX / 4);
        let refill = (per / u64::from(rate.events.max(1))).max(1);
        let after = self.0.max(now) + refill;
        // All tokens together take `per` to refill, or a little less if it does not divide evenly.
        let fits = after - now <= refill * u64::from(rate.events);
        (if fits { Self(after) } else { self }, fits)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    const SECOND: u64 = 1_000_000;

    fn take(bucket: &mut Bucket, rate: Rate, now: u64) -> bool {
        let (after, fits) = bucket.take(rate, now);
        *bucket = after;
        fits
    }

    #[test]
    fn bucket_allows_a_burst_and_then_one_event_per_refill() {
        let rate = Rate { events: 3, per: Duration::from_secs(60) };
        let mut bucket = Bucket::default();
        let began = 7 * SECOND;
        assert_eq!([0; 4].map(|_| take(&mut bucket, rate, began)), [true, true, true, false]);
        assert!(!take(&mut bucket, rate, began + 19 * SECOND));
        assert!(take(&mut bucket, rate, began + 20 * SECOND));
        assert!(!take(&mut bucket, rate, began + 39 * SECOND), "an event over the rate takes no token");
        assert!(take(&mut bucket, rate, began + 40 * SECOND));
        assert_eq!(bucket.retention_priority(began + 1000 * SECOND), 0);
    }

    proptest! {
        /// In any interval the bucket allows at most its capacity and the tokens refilled in the interval.
        #[test]
        fn bucket_allows_at_most_a_burst_and_the_refill(
            events in 1u32..50,
            seconds in 1u64..100,
            gaps in prop::collection::vec(0u64..5 * SECOND, 1..200),
        ) {
            let rate = Rate { events, per: Duration::from_secs(seconds) };
            let (mut bucket, mut now, mut allowed) = (Bucket::default(), 0, Vec::new());
            for gap in gaps {
                now += gap;
                if take(&mut bucket, rate, now) {
                    allowed.push(now);
                }
            }
            let refill = seconds * SECOND / u64::from(events);
            for (first, from) in allowed.iter().enumerate() {
                for (last, to) in allowed.iter().enumerate().skip(first) {
                    let refilled = (to - from) / refill;
                    prop_assert!((last - first + 1) as u64 <= u64::from(events) + refilled + 1);
                }
            }
        }

        /// Events at the configured rate are never refused.
        #[test]
        fn bucket_allows_every_event_at_the_rate(events in 1u32..50, seconds in 1u64..100, count in 1u64..200) {
            let rate = Rate { events, per: Duration::from_secs(seconds) };
            let refill = seconds * SECOND / u64::from(events);
            let mut bucket = Bucket::default();
            for event in 0..count {
                prop_assert!(take(&mut bucket, rate, event * refill));
            }
        }
    }
}
