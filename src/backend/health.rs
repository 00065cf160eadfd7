//! Is a server alive? Decided from what sessions met, and from time handed in.
//!
//! A server that failed is passed over for a while, one second at first, doubling to half a minute; then the next login
//! tries it again. It is passed over, not shut out: when no other server is left it is tried all the same. This room
//! touches no socket and no clock. Called by `backend`.

use std::time::{Duration, Instant};

const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// What is known of one server.
#[derive(Debug, Default)]
pub(super) struct Health {
    failing: Option<Failing>,
}

#[derive(Debug)]
struct Failing {
    retry_at: Instant,
    pause: Duration,
}

impl Health {
    /// A session could not use the server. Says whether that is news.
    ///
    /// Failures within a pause (logins that were under way together) do not lengthen it.
    pub(super) fn failed(&mut self, now: Instant) -> bool {
        let news = self.failing.is_none();
        let pause = match &self.failing {
            None => FIRST_PAUSE,
            Some(failing) if now < failing.retry_at => return false,
            Some(failing) => (failing.pause * 2).min(LONGEST_PAUSE),
        };
        self.failing = Some(Failing { retry_at: now + pause, pause });
        news
    }

    /// The server answered a login, whichever way. Says whether that is news.
    pub(super) fn answered(&mut self) -> bool {
        self.failing.take().is_some()
    }

    /// Whether the server comes before those that are failing.
    pub(super) fn is_available(&self, now: Instant) -> bool {
        self.failing.as_ref().is_none_or(|failing| now >= failing.retry_at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_and_end() {
        let mut health = Health::default();
        let mut now = Instant::now();
        assert!(health.failed(now));
        for seconds in [1, 2, 4, 8, 16, 30, 30] {
            assert!(!health.failed(now), "a failure within the pause is no news");
            assert!(!health.is_available(now + Duration::from_millis(seconds * 1000 - 1)), "{seconds} s");
            now += Duration::from_secs(seconds);
            assert!(health.is_available(now), "{seconds} s");
            assert!(!health.failed(now));
        }
        assert!(health.answered());
        assert!(!health.answered());
        assert!(health.is_available(now));
        assert!(health.failed(now));
        assert!(health.is_available(now + FIRST_PAUSE));
    }
}
