//! Deadlines that do not count the time in which this process was not scheduled.
//!
//! A process that was stopped (SIGSTOP, a suspended or migrated virtual machine, a starved container) finds its timers
//! expired and its peers' answers unread, although the peers are not late. A thread ticks at intervals; a gap between two
//! ticks that is much longer than the interval is time in which the process did not run, and every [`Deadline`] is extended
//! by it. The gap is detected even if a deadline is checked before the thread ticks again.

use std::future::Future;
use std::pin::pin;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use std::{io, thread};

use tokio::time::error::Elapsed;
use tokio::time::{self, timeout_at};

/// Time between two ticks.
const TICK: Duration = Duration::from_millis(250);
/// Longest gap that is attributed to ordinary load.
const TOLERANCE: Duration = Duration::from_secs(1);

/// The pauses of this process. They are global because they affect all of its clocks.
static PAUSES: OnceLock<Pauses> = OnceLock::new();

/// Starts the thread that ticks. Without it deadlines are not extended.
///
/// # Errors
/// The system cannot start a thread.
pub(crate) fn watch_for_pauses() -> io::Result<()> {
    let pauses = PAUSES.get_or_init(|| Pauses::new(Instant::now()));
    let tick = move || {
        loop {
            thread::sleep(TICK);
            let pause = pauses.tick(Instant::now());
            if !pause.is_zero() {
                let seconds = pause.as_secs_f64();
                tracing::warn!(seconds, "this process was not scheduled for a while: its deadlines are extended");
            }
        }
    };
    thread::Builder::new().name("pauses".to_owned()).spawn(tick).map(drop)
}

/// Time lost to pauses since the process started.
fn lost() -> Duration {
    PAUSES.get().map_or(Duration::ZERO, |pauses| pauses.lost_until(Instant::now()))
}

/// The sum of all pauses. Times are nanoseconds since `start`.
#[derive(Debug)]
struct Pauses {
    start: Instant,
    last_tick: AtomicU64,
    lost: AtomicU64,
}

impl Pauses {
    fn new(start: Instant) -> Self {
        Self { start, last_tick: AtomicU64::new(0), lost: AtomicU64::new(0) }
    }

    /// Returns the pause since the last tick.
    fn tick(&self, now: Instant) -> Duration {
        let before = Duration::from_nanos(self.lost.load(Ordering::Acquire));
        let lost = self.lost_until(now);
        // In this order a reader between the two stores counts a gap twice rather than not at all.
        self.lost.store(nanoseconds(lost), Ordering::Release);
        self.last_tick.store(nanoseconds(now.saturating_duration_since(self.start)), Ordering::Release);
        lost - before
    }

    fn lost_until(&self, now: Instant) -> Duration {
        let last_tick = Duration::from_nanos(self.last_tick.load(Ordering::Acquire));
        let lost = Duration::from_nanos(self.lost.load(Ordering::Acquire));
        let gap = now.saturating_duration_since(self.start).saturating_sub(last_tick);
        if gap > TOLERANCE { lost + (gap - TICK) } else { lost }
    }
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// A point in time that is extended by the pauses of the process.
#[derive(Debug, Clone, Copy)]
pub struct Deadline {
    due: time::Instant,
    /// Time that was lost before the deadline was set.
    lost: Duration,
}

impl Deadline {
    /// The deadline `due`, set now.
    pub fn at(due: time::Instant) -> Self {
        Self { due, lost: lost() }
    }

    /// The deadline `duration` from now.
    pub fn after(duration: Duration) -> Self {
        Self::at(time::Instant::now() + duration)
    }

    /// The time at which it expires, unless there are further pauses.
    pub fn due(self) -> time::Instant {
        self.due + lost().saturating_sub(self.lost)
    }

    /// Whether the deadline has expired.
    pub fn has_expired(self) -> bool {
        self.left().is_zero()
    }

    /// Time until the deadline expires.
    pub fn left(self) -> Duration {
        self.due().saturating_duration_since(time::Instant::now())
    }

    /// The earlier of two deadlines.
    #[must_use]
    pub fn min(self, other: Self) -> Self {
        if other.due() < self.due() { other } else { self }
    }

    /// The later of two deadlines.
    #[must_use]
    pub fn max(self, other: Self) -> Self {
        if other.due() > self.due() { other } else { self }
    }

    /// Runs `future` until the deadline.
    ///
    /// # Errors
    /// The deadline expired while the process was running.
    pub async fn limit<F: Future>(self, future: F) -> Result<F::Output, Elapsed> {
        let mut future = pin!(future);
        loop {
            match timeout_at(self.due(), &mut future).await {
                Ok(output) => return Ok(output),
                Err(_) if self.due() > time::Instant::now() => {}
                Err(elapsed) => return Err(elapsed),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn gap_between_ticks_is_lost_time_and_an_ordinary_delay_is_not() {
        let start = Instant::now();
        let pauses = Pauses::new(start);
        let mut now = start;
        for _ in 0..40 {
            now += TICK;
            assert_eq!(pauses.tick(now), Duration::ZERO);
        }
        now += Duration::from_millis(900);
        assert_eq!(pauses.tick(now), Duration::ZERO, "load delays ticks");
        now += 7 * SECOND;
        let lost = 7 * SECOND - TICK;
        assert_eq!(pauses.lost_until(now), lost, "detected before the next tick");
        assert_eq!(pauses.tick(now), lost);
        assert_eq!(pauses.lost_until(now), lost, "and counted once");
        assert_eq!(pauses.lost_until(now + SECOND / 2), lost);
        now += 3 * SECOND;
        pauses.tick(now);
        assert_eq!(pauses.lost_until(now), lost + 3 * SECOND - TICK, "pauses add up");
    }

    #[tokio::test(start_paused = true)]
    async fn deadline_expires_on_time_while_the_process_runs() {
        let began = time::Instant::now();
        let deadline = Deadline::after(5 * SECOND);
        assert!(deadline.limit(std::future::pending::<()>()).await.is_err());
        assert_eq!(began.elapsed(), 5 * SECOND);
        assert_eq!(Deadline::after(SECOND).limit(async { 7 }).await.unwrap(), 7);
        assert_eq!(Deadline::after(SECOND).min(Deadline::after(2 * SECOND)).due(), time::Instant::now() + SECOND);
    }
}
