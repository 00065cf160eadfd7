//! How the sessions of one server leave it, and how long the client of one that was cut off is kept.
//!
//! When a server dies, all its clients would come back at the same moment, to servers that are fewer than before. So one
//! whose server has closed without being asked is kept for a while, each longer than the one before it, evenly over
//! `limits.max_disconnect_delay`, though never fewer than [`LEAST_PACE`] leave in a second. A server that dies is known by
//! two things together: it has cut off others just before, and has so many sessions fewer. A lone end (a timeout, a session
//! that is ended at the server) is passed on at once; so is any on a server that gets new logins as fast as it closes
//! sessions.
//!
//! The place in this line is all there is to decide; nothing here waits, and nothing is drawn at random: several processes
//! that spread their own clients evenly are even together. Called by `slots`.

use std::time::{Duration, Instant};

/// Cut off within this time after another: together.
const TOGETHER: Duration = Duration::from_secs(1);
/// What takes longer is spread already: it is looked at in parts.
const LONGEST: Duration = Duration::from_secs(10);
/// So few clients in a second are no stampede, however few sessions the server had and however long they may be kept.
pub(super) const LEAST_PACE: u32 = 10;
/// Who would be kept shorter than this is not kept at all.
const SHORT: Duration = Duration::from_millis(100);

/// The sessions of one server, all workers' together.
#[derive(Debug, Default)]
pub(super) struct DisconnectSpreader {
    sessions: u32,
    line: Option<Burst>,
}

/// Sessions that were cut off together.
#[derive(Debug)]
struct Burst {
    began: Instant,
    last: Instant,
    /// Sessions there were when it began.
    had: u32,
    /// Sessions in it.
    cut_off: u32,
    /// That it is half of them has been told.
    told: bool,
}

/// What is to be done with the client of a session that was cut off.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct SpreadDisconnect {
    /// It is kept so long; zero: not at all.
    pub(super) wait: Duration,
    /// Of so many sessions this was the one that makes it a half. `None` for all others.
    pub(super) half_of: Option<u32>,
}

impl DisconnectSpreader {
    /// A session begins.
    pub(super) fn arrived(&mut self) {
        self.sessions += 1;
    }

    /// One ends in the ordinary way.
    pub(super) fn left(&mut self) {
        self.sessions = self.sessions.saturating_sub(1);
    }

    /// One ends because the server has closed it.
    pub(super) fn cut_off(&mut self, now: Instant, over: Duration) -> SpreadDisconnect {
        let sessions = self.sessions.max(1);
        let goes_on =
            |line: &Burst| now.duration_since(line.last) <= TOGETHER && now.duration_since(line.began) < LONGEST;
        let line = match self.line.take().filter(goes_on) {
            Some(line) => self.line.insert(Burst { last: now, ..line }),
            None => self.line.insert(Burst { began: now, last: now, had: sessions, cut_off: 0, told: false }),
        };
        let fewer = line.had.saturating_sub(sessions);
        let pace = (over / line.had).min(Duration::from_secs(1) / LEAST_PACE);
        let gone = line.cut_off.min(fewer);
        let wait = pace * gone;
        line.cut_off += 1;
        self.sessions = sessions - 1;
        let is_half = line.had > 1 && gone + 1 >= line.had.div_ceil(2) && !line.told;
        line.told |= is_half;
        SpreadDisconnect {
            wait: if wait < SHORT { Duration::ZERO } else { wait },
            half_of: is_half.then_some(line.had),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OVER: Duration = Duration::from_secs(30);

    fn with(sessions: u32) -> DisconnectSpreader {
        DisconnectSpreader { sessions, line: None }
    }

    /// All sessions end, a millisecond after each other: how long their clients are kept.
    fn death(departures: &mut DisconnectSpreader, now: Instant, over: Duration) -> Vec<Duration> {
        (0..departures.sessions)
            .map(|place| departures.cut_off(now + Duration::from_millis(place.into()), over).wait)
            .collect()
    }

    #[test]
    fn a_server_that_dies_is_left_evenly_over_the_time() {
        let waits = death(&mut with(900), Instant::now(), OVER);
        for second in 0..30 {
            let leaving = waits.iter().filter(|wait| wait.as_secs() == second).count();
            assert!((29..=31).contains(&leaving), "{leaving} in second {second}");
        }
        assert_eq!(waits[..3], [Duration::ZERO; 3], "the first are not worth a timer");
        assert!(waits.is_sorted() && *waits.last().unwrap() < OVER);
    }

    #[test]
    fn few_clients_are_kept_no_longer_than_they_must() {
        let now = Instant::now();
        assert_eq!(death(&mut with(1), now, OVER), [Duration::ZERO]);
        assert_eq!(death(&mut with(3), now, OVER), [0, 100, 200].map(Duration::from_millis));
        let waits = death(&mut with(100), now, OVER);
        assert_eq!(*waits.last().unwrap(), Duration::from_millis(9900));
        let waits = death(&mut with(100), now, Duration::from_secs(2));
        assert_eq!(*waits.last().unwrap(), Duration::from_millis(1980));
    }

    #[test]
    fn lone_ends_are_passed_on_at_once() {
        let (mut departures, mut now) = (with(5), Instant::now());
        for _ in 0..5 {
            assert_eq!(departures.cut_off(now, OVER).wait, Duration::ZERO);
            now += TOGETHER + Duration::from_millis(1);
        }
        // And when there are many sessions, also a few together.
        let mut departures = with(100_000);
        for _ in 0..300 {
            assert_eq!(departures.cut_off(now, OVER).wait, Duration::ZERO);
        }
    }

    #[test]
    fn a_server_that_closes_many_short_sessions_is_not_dying() {
        let (mut departures, now) = (with(20), Instant::now());
        for end in 0..2000 {
            let departure = departures.cut_off(now + Duration::from_millis(10 * end), OVER);
            assert_eq!(departure, SpreadDisconnect { wait: Duration::ZERO, half_of: None }, "{end}");
            departures.arrived();
        }
    }

    #[test]
    fn sessions_that_end_at_their_own_wish_are_no_part_of_it() {
        let (mut departures, now) = (with(1000), Instant::now());
        departures.cut_off(now, OVER);
        (0..500).for_each(|_| departures.left());
        assert_eq!(departures.cut_off(now, OVER).wait, Duration::ZERO);
    }

    #[test]
    fn a_server_that_dies_again_begins_again() {
        let (mut departures, now) = (with(300), Instant::now());
        assert_eq!(death(&mut departures, now, OVER).len(), 300);
        (0..10).for_each(|_| departures.arrived());
        let waits = death(&mut departures, now + Duration::from_secs(3), OVER);
        assert_eq!(*waits.last().unwrap(), Duration::from_millis(900), "of those that are there now");
    }

    #[test]
    fn ends_that_never_cease_are_counted_anew_now_and_then() {
        let (mut departures, began) = (with(100_000), Instant::now());
        let wait = |departures: &mut DisconnectSpreader, second: u64| {
            departures.cut_off(began + Duration::from_secs(second), OVER).wait
        };
        // One in a second, at an hour at which everybody goes home.
        for second in 0..2400 {
            assert_eq!(wait(&mut departures, second), Duration::ZERO, "{second}");
            (0..30).for_each(|_| departures.left());
        }
    }

    #[test]
    fn the_half_is_told_once() {
        let (mut departures, now) = (with(7), Instant::now());
        let told: Vec<_> = (0..7).filter_map(|_| departures.cut_off(now, OVER).half_of).collect();
        assert_eq!(told, [7]);
        assert_eq!(with(1).cut_off(now, OVER).half_of, None);
    }
}
