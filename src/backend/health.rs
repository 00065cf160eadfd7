//! Is a server alive? Decided from what sessions and checks met, and from time handed in.
//!
//! Two judges. A *breaker* hears of real logins: it opens at once where a connection is refused, and after some other
//! failures in a row; then the server is passed over for a while, one second at first, doubling to half a minute, after
//! which a single login at a time may try it. *Checks* ask by themselves: some failures in a row take the server out,
//! some successes bring it back, and may close the breaker too, if they have seen as much as the logins that opened it.
//! A server that is not alive is passed over, not shut out: when no other server is left it is tried all the same. This
//! room touches no socket and no clock. Called by `backend`.

use std::time::{Duration, Instant};

const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// What a server gets of its weight when its slow start begins.
const FIRST_STEP: f64 = 0.1;

/// How a login failed, by how much that says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum FailureKind {
    /// Nobody listens there.
    Refused,
    /// Anything else that is the server's fault.
    Other,
}

/// How much of a server a check has seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Depth {
    /// It takes connections.
    Connection,
    /// It speaks IMAP.
    Dialogue,
}

/// When judgements change.
#[derive(Debug, Clone, Copy)]
pub(super) struct Thresholds {
    /// Failed logins in a row that open the breaker.
    pub failures: u32,
    /// Good checks in a row that bring a server back.
    pub rise: u32,
    /// Failed checks in a row that take a server out.
    pub fall: u32,
}

/// What a login may expect of a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Standing {
    /// It is alive.
    Alive,
    /// Its pause is over: one login may try it, who must [`Health::begin_trial`].
    OnTrial,
    /// It comes last.
    Failing,
}

/// A breaker's word for metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum BreakerState {
    Closed = 0,
    HalfOpen = 1,
    Open = 2,
}

/// Names one trial: see [`Health::begin_trial`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Trial(u32);

/// What is known of one server.
#[derive(Debug, Default)]
pub(super) struct Health {
    breaker: Breaker,
    checks: Checks,
    trials: u32,
    /// When it last came back to life.
    recovered: Option<Instant>,
}

#[derive(Debug)]
enum Breaker {
    Closed { failures: u32 },
    Open { retry_at: Instant, pause: Duration, blow: FailureKind, trial: Option<Trial> },
}

impl Default for Breaker {
    fn default() -> Self {
        Self::Closed { failures: 0 }
    }
}

#[derive(Debug, Default)]
struct Checks {
    out: bool,
    /// Results in a row that speak against `out`.
    against: u32,
}

/// A server has just died, or come back: `Some(alive)`.
pub(super) type HealthChange = Option<bool>;

impl Health {
    /// A login could not use the server.
    ///
    /// Failures within a pause (logins that were under way together, and those that had no other server) do not
    /// lengthen it.
    pub(super) fn failed(&mut self, blow: FailureKind, now: Instant, thresholds: Thresholds) -> HealthChange {
        self.judge(now, |health| {
            let pause = match &mut health.breaker {
                Breaker::Closed { failures } => {
                    *failures += 1;
                    if blow == FailureKind::Other && *failures < thresholds.failures {
                        return;
                    }
                    FIRST_PAUSE
                }
                Breaker::Open { retry_at, .. } if now < *retry_at => return,
                Breaker::Open { pause, .. } => (*pause * 2).min(LONGEST_PAUSE),
            };
            health.breaker = Breaker::Open { retry_at: now + pause, pause, blow, trial: None };
        })
    }

    /// The server answered a login, whichever way.
    pub(super) fn answered(&mut self, now: Instant) -> HealthChange {
        self.judge(now, |health| health.breaker = Breaker::default())
    }

    /// A check that sees as much as `depth` ended well or not.
    pub(super) fn checked(&mut self, good: bool, depth: Depth, now: Instant, thresholds: Thresholds) -> HealthChange {
        self.judge(now, |health| {
            let checks = &mut health.checks;
            checks.against = if good == checks.out { checks.against + 1 } else { 0 };
            if checks.against >= if good { thresholds.rise } else { thresholds.fall } {
                *checks = Checks { out: !good, against: 0 };
            }
            let closes =
                |blow| good && !health.checks.out && (depth == Depth::Dialogue || blow == FailureKind::Refused);
            if matches!(health.breaker, Breaker::Open { blow, .. } if closes(blow)) {
                health.breaker = Breaker::default();
            }
        })
    }

    /// Whether it is taken for alive.
    pub(super) fn is_alive(&self) -> bool {
        !self.checks.out && matches!(self.breaker, Breaker::Closed { .. })
    }

    /// See [`Standing`].
    pub(super) fn standing(&self, now: Instant) -> Standing {
        match &self.breaker {
            _ if self.checks.out => Standing::Failing,
            Breaker::Closed { .. } => Standing::Alive,
            Breaker::Open { retry_at, trial: None, .. } if now >= *retry_at => Standing::OnTrial,
            Breaker::Open { .. } => Standing::Failing,
        }
    }

    /// The caller tries a server on trial. `None`: it is not, or somebody else does already.
    pub(super) fn begin_trial(&mut self, now: Instant) -> Option<Trial> {
        if self.standing(now) != Standing::OnTrial {
            return None;
        }
        let Breaker::Open { trial, .. } = &mut self.breaker else { return None };
        self.trials = self.trials.wrapping_add(1);
        *trial = Some(Trial(self.trials));
        *trial
    }

    /// A trial is over. Where nothing was learnt from it, the next login may try.
    pub(super) fn end_trial(&mut self, ended: Trial) {
        if let Breaker::Open { trial, .. } = &mut self.breaker
            && *trial == Some(ended)
        {
            *trial = None;
        }
    }

    /// For metrics.
    pub(super) fn breaker(&self) -> BreakerState {
        match &self.breaker {
            Breaker::Closed { .. } => BreakerState::Closed,
            Breaker::Open { trial: Some(_), .. } => BreakerState::HalfOpen,
            Breaker::Open { .. } => BreakerState::Open,
        }
    }

    /// How much of its weight counts: a tenth when it has just come back, all of it after `slow_start`.
    pub(super) fn ramp(&self, now: Instant, slow_start: Option<Duration>) -> f64 {
        let Some((recovered, slow_start)) = self.recovered.zip(slow_start) else { return 1.0 };
        let passed = now.saturating_duration_since(recovered).as_secs_f64() / slow_start.as_secs_f64();
        passed.clamp(FIRST_STEP, 1.0)
    }

    fn judge(&mut self, now: Instant, change: impl FnOnce(&mut Self)) -> HealthChange {
        let before = self.is_alive();
        change(self);
        let after = self.is_alive();
        if after && !before {
            self.recovered = Some(now);
        }
        (before != after).then_some(after)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const THRESHOLDS: Thresholds = Thresholds { failures: 3, rise: 2, fall: 3 };
    const SECOND: Duration = Duration::from_secs(1);

    fn fail(health: &mut Health, blow: FailureKind, now: Instant) -> HealthChange {
        health.failed(blow, now, THRESHOLDS)
    }

    fn check(health: &mut Health, good: bool, depth: Depth) -> HealthChange {
        health.checked(good, depth, Instant::now(), THRESHOLDS)
    }

    #[test]
    fn pauses_double_and_end() {
        let mut health = Health::default();
        let mut now = Instant::now();
        assert_eq!(fail(&mut health, FailureKind::Refused, now), Some(false), "at once");
        for seconds in [1, 2, 4, 8, 16, 30, 30] {
            assert_eq!(fail(&mut health, FailureKind::Refused, now), None, "a failure within the pause is no news");
            let nearly = now + Duration::from_millis(seconds * 1000 - 1);
            assert_eq!(health.standing(nearly), Standing::Failing, "{seconds} s");
            now += Duration::from_secs(seconds);
            assert_eq!(health.standing(now), Standing::OnTrial, "{seconds} s");
            assert!(health.begin_trial(now).is_some());
            assert_eq!(fail(&mut health, FailureKind::Refused, now), None);
        }
        assert_eq!(health.answered(now), Some(true));
        assert_eq!(health.answered(now), None);
        assert_eq!(health.standing(now), Standing::Alive);
        assert_eq!(fail(&mut health, FailureKind::Refused, now), Some(false));
        assert_eq!(health.standing(now + FIRST_PAUSE), Standing::OnTrial, "from the first pause again");
    }

    #[test]
    fn other_failures_must_come_in_a_row() {
        let (mut health, now) = (Health::default(), Instant::now());
        for _ in 0..5 {
            assert_eq!(fail(&mut health, FailureKind::Other, now), None);
            assert_eq!(fail(&mut health, FailureKind::Other, now), None);
            assert_eq!(health.answered(now), None);
        }
        assert_eq!(fail(&mut health, FailureKind::Other, now), None);
        assert_eq!(fail(&mut health, FailureKind::Other, now), None);
        assert_eq!(fail(&mut health, FailureKind::Other, now), Some(false));
        assert_eq!(health.breaker(), BreakerState::Open);
    }

    #[test]
    fn one_trial_at_a_time() {
        let (mut health, now) = (Health::default(), Instant::now());
        assert_eq!(health.begin_trial(now), None, "it is alive");
        fail(&mut health, FailureKind::Refused, now);
        assert_eq!(health.begin_trial(now), None, "the pause is not over");
        let later = now + SECOND;
        let first = health.begin_trial(later).unwrap();
        assert_eq!(health.breaker(), BreakerState::HalfOpen);
        assert_eq!(health.standing(later), Standing::Failing, "for everybody else");
        assert_eq!(health.begin_trial(later), None);
        health.end_trial(first);
        let second = health.begin_trial(later).expect("the first one has learnt nothing");
        health.end_trial(first);
        assert_eq!(health.begin_trial(later), None, "an old trial does not end a new one");
        fail(&mut health, FailureKind::Other, later);
        health.end_trial(second);
        assert_eq!(health.standing(later + SECOND), Standing::Failing, "a failed trial doubles the pause");
        assert_eq!(health.standing(later + 2 * SECOND), Standing::OnTrial);
    }

    #[test]
    fn checks_rise_and_fall() {
        let mut health = Health::default();
        for (good, expected) in [
            (false, None),
            (false, None),
            (true, None),
            (false, None),
            (false, None),
            (false, Some(false)),
            (true, None),
            (false, None),
            (true, None),
            (true, Some(true)),
            (true, None),
        ] {
            assert_eq!(check(&mut health, good, Depth::Dialogue), expected, "{health:?}");
        }
    }

    #[test]
    fn a_check_closes_a_breaker_that_opened_for_what_it_sees() {
        for (blow, depth, closes) in [
            (FailureKind::Refused, Depth::Connection, true),
            (FailureKind::Other, Depth::Connection, false),
            (FailureKind::Refused, Depth::Dialogue, true),
            (FailureKind::Other, Depth::Dialogue, true),
        ] {
            let (mut health, now) = (Health::default(), Instant::now());
            for _ in 0..3 {
                fail(&mut health, blow, now);
            }
            assert!(!health.is_alive());
            assert_eq!(check(&mut health, false, depth), None);
            assert_eq!(check(&mut health, true, depth), closes.then_some(true), "{blow:?} {depth:?}");
        }
    }

    #[test]
    fn a_server_that_checks_took_out_is_not_tried_and_logins_do_not_bring_it_back() {
        let (mut health, now) = (Health::default(), Instant::now());
        for _ in 0..3 {
            check(&mut health, false, Depth::Dialogue);
        }
        fail(&mut health, FailureKind::Refused, now);
        assert_eq!(health.standing(now + 60 * SECOND), Standing::Failing, "no trials: checks go there by themselves");
        assert_eq!(health.answered(now), None);
        assert_eq!(health.standing(now), Standing::Failing);
        check(&mut health, true, Depth::Connection);
        assert_eq!(check(&mut health, true, Depth::Connection), Some(true));
    }

    #[test]
    fn a_weight_rises_from_a_tenth() {
        let (mut health, now) = (Health::default(), Instant::now());
        let slow = Some(Duration::from_secs(30));
        assert!((health.ramp(now, slow) - 1.0).abs() < 1e-9, "it was never away");
        fail(&mut health, FailureKind::Refused, now);
        health.answered(now);
        for (seconds, expected) in [(0, 0.1), (3, 0.1), (15, 0.5), (30, 1.0), (60, 1.0)] {
            let ramp = health.ramp(now + Duration::from_secs(seconds), slow);
            assert!((ramp - expected).abs() < 1e-9, "{seconds} s: {ramp}");
        }
        assert!((health.ramp(now, None) - 1.0).abs() < 1e-9);
    }
}
