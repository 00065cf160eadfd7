//! Spreads client disconnects when a server dies, to prevent a reconnect stampede.
//!
//! All clients of a server that dies would reconnect at the same moment, to fewer servers than before. So a client whose
//! server has closed its session without being asked stays connected for a while, each one longer than the one before,
//! evenly over `limits.max_disconnect_delay`, but at least [`MIN_RATE`] clients are disconnected per second. Two things
//! together show that a server dies: it has closed other sessions just before, and its number of sessions has fallen by
//! that many. The end of a single session, for example by a timeout or by the server's operator, is passed on at once, and
//! so is any end on a server that receives new logins as fast as it closes sessions.
//!
//! This module only decides; it does not wait. Nothing is random: processes that each spread their own clients evenly are
//! even together.

use std::time::{Duration, Instant};

/// Sessions that are closed within this time after another belong to the same burst.
const MAX_GAP: Duration = Duration::from_secs(1);
/// A burst that lasts longer is spread already, and is treated as several ones.
const MAX_BURST: Duration = Duration::from_secs(10);
/// Minimum number of disconnects per second. So few are not a stampede, whatever the number of sessions and the delay.
const MIN_RATE: u32 = 10;
/// Shorter delays are not worth a timer.
const MIN_DELAY: Duration = Duration::from_millis(100);

/// The sessions of one server, of all workers together.
#[derive(Debug, Default)]
pub(super) struct DisconnectSpreader {
    sessions: u32,
    burst: Option<Burst>,
}

/// Sessions that a server has closed shortly after one another.
#[derive(Debug)]
struct Burst {
    started: Instant,
    last: Instant,
    /// Number of sessions at the start.
    sessions_before: u32,
    /// Number of sessions closed.
    closed: u32,
    /// Whether it was reported that half of the sessions were closed.
    half_reported: bool,
}

/// What happens to the client of a session that the server has closed.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct SpreadDisconnect {
    /// Time for which the client stays connected.
    pub(super) delay: Duration,
    /// Number of sessions at the start of the burst, if this session is the one that makes it half of them.
    pub(super) half_of: Option<u32>,
}

impl DisconnectSpreader {
    /// A session begins.
    pub(super) fn session_opened(&mut self) {
        self.sessions += 1;
    }

    /// A session ends, but not because the server has closed it.
    pub(super) fn session_ended(&mut self) {
        self.sessions = self.sessions.saturating_sub(1);
    }

    /// The server has closed a session without being asked.
    pub(super) fn session_cut_off(&mut self, now: Instant, max_delay: Duration) -> SpreadDisconnect {
        let sessions = self.sessions.max(1);
        let continues =
            |burst: &Burst| now.duration_since(burst.last) <= MAX_GAP && now.duration_since(burst.started) < MAX_BURST;
        let burst = match self.burst.take().filter(continues) {
            Some(burst) => self.burst.insert(Burst { last: now, ..burst }),
            None => self.burst.insert(Burst {
                started: now,
                last: now,
                sessions_before: sessions,
                closed: 0,
                half_reported: false,
            }),
        };
        let fewer = burst.sessions_before.saturating_sub(sessions);
        let interval = (max_delay / burst.sessions_before).min(Duration::from_secs(1) / MIN_RATE);
        let lost = burst.closed.min(fewer);
        let delay = interval * lost;
        burst.closed += 1;
        self.sessions = sessions - 1;
        let is_half = burst.sessions_before > 1 && lost + 1 >= burst.sessions_before.div_ceil(2);
        let is_reported = is_half && !burst.half_reported;
        burst.half_reported |= is_half;
        SpreadDisconnect {
            delay: if delay < MIN_DELAY { Duration::ZERO } else { delay },
            half_of: is_reported.then_some(burst.sessions_before),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAX_DELAY: Duration = Duration::from_secs(30);

    fn with(sessions: u32) -> DisconnectSpreader {
        DisconnectSpreader { sessions, burst: None }
    }

    /// Closes all sessions, a millisecond after one another, and returns the delays.
    fn close_all(spreader: &mut DisconnectSpreader, now: Instant, max_delay: Duration) -> Vec<Duration> {
        (0..spreader.sessions)
            .map(|index| spreader.session_cut_off(now + Duration::from_millis(index.into()), max_delay).delay)
            .collect()
    }

    #[test]
    fn clients_of_a_dying_server_are_disconnected_evenly_over_the_time() {
        let delays = close_all(&mut with(900), Instant::now(), MAX_DELAY);
        for second in 0..30 {
            let leaving = delays.iter().filter(|delay| delay.as_secs() == second).count();
            assert!((29..=31).contains(&leaving), "{leaving} in second {second}");
        }
        assert_eq!(delays[..3], [Duration::ZERO; 3], "the first delays are not worth a timer");
        assert!(delays.is_sorted() && *delays.last().unwrap() < MAX_DELAY);
    }

    #[test]
    fn few_clients_are_disconnected_at_the_minimum_rate() {
        let now = Instant::now();
        assert_eq!(close_all(&mut with(1), now, MAX_DELAY), [Duration::ZERO]);
        assert_eq!(close_all(&mut with(3), now, MAX_DELAY), [0, 100, 200].map(Duration::from_millis));
        let delays = close_all(&mut with(100), now, MAX_DELAY);
        assert_eq!(*delays.last().unwrap(), Duration::from_millis(9900));
        let delays = close_all(&mut with(100), now, Duration::from_secs(2));
        assert_eq!(*delays.last().unwrap(), Duration::from_millis(1980));
    }

    #[test]
    fn single_ends_are_passed_on_at_once() {
        let (mut spreader, mut now) = (with(5), Instant::now());
        for _ in 0..5 {
            assert_eq!(spreader.session_cut_off(now, MAX_DELAY).delay, Duration::ZERO);
            now += MAX_GAP + Duration::from_millis(1);
        }
        // The same applies to a few together if there are many sessions.
        let mut spreader = with(100_000);
        for _ in 0..300 {
            assert_eq!(spreader.session_cut_off(now, MAX_DELAY).delay, Duration::ZERO);
        }
    }

    #[test]
    fn server_that_closes_many_short_sessions_is_not_dying() {
        let (mut spreader, now) = (with(20), Instant::now());
        for end in 0..2000 {
            let disconnect = spreader.session_cut_off(now + Duration::from_millis(10 * end), MAX_DELAY);
            assert_eq!(disconnect, SpreadDisconnect { delay: Duration::ZERO, half_of: None }, "{end}");
            spreader.session_opened();
        }
    }

    #[test]
    fn sessions_that_clients_end_are_not_part_of_a_burst() {
        let (mut spreader, now) = (with(1000), Instant::now());
        spreader.session_cut_off(now, MAX_DELAY);
        (0..500).for_each(|_| spreader.session_ended());
        assert_eq!(spreader.session_cut_off(now, MAX_DELAY).delay, Duration::ZERO);
    }

    #[test]
    fn server_that_dies_again_begins_a_new_burst() {
        let (mut spreader, now) = (with(300), Instant::now());
        assert_eq!(close_all(&mut spreader, now, MAX_DELAY).len(), 300);
        (0..10).for_each(|_| spreader.session_opened());
        let delays = close_all(&mut spreader, now + Duration::from_secs(3), MAX_DELAY);
        assert_eq!(*delays.last().unwrap(), Duration::from_millis(900), "by the number of sessions now");
    }

    #[test]
    fn long_burst_is_counted_in_parts() {
        let (mut spreader, started) = (with(100_000), Instant::now());
        let delay = |spreader: &mut DisconnectSpreader, second: u64| {
            spreader.session_cut_off(started + Duration::from_secs(second), MAX_DELAY).delay
        };
        // The server closes one session per second, while many clients log out.
        for second in 0..2400 {
            assert_eq!(delay(&mut spreader, second), Duration::ZERO, "{second}");
            (0..30).for_each(|_| spreader.session_ended());
        }
    }

    #[test]
    fn half_of_the_sessions_is_reported_once() {
        let (mut spreader, now) = (with(7), Instant::now());
        let reported: Vec<_> = (0..7).filter_map(|_| spreader.session_cut_off(now, MAX_DELAY).half_of).collect();
        assert_eq!(reported, [7]);
        assert_eq!(with(1).session_cut_off(now, MAX_DELAY).half_of, None);
    }
}
