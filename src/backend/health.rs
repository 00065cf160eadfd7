//! Decides whether a server is alive, from the results of logins and checks.
//!
//! Two mechanisms decide. The *breaker* follows real logins: it opens at once if a connection is refused, and after a
//! configured number of other failures in a row. Then logins avoid the server for a pause of one second, which doubles up
//! to half a minute; after each pause one login at a time may try the server. *Checks* run by themselves: a number of
//! failures in a row takes the server out and a number of successes brings it back. A passed check also closes the breaker
//! if it has tested as much as the logins that opened it. A server that is not alive is still used when there is no other.
//! This module uses no socket and no clock.

use std::time::{Duration, Instant};

use crate::metrics::BreakerState;

const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// Share of its weight with which a server begins its slow start.
const FIRST_RAMP: f64 = 0.1;

/// How a login failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum FailureKind {
    /// The connection was refused: no process listens there.
    Refused,
    /// Any other failure of the server.
    Other,
}

/// How much of a server a check tests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum CheckDepth {
    /// The server accepts connections.
    Connection,
    /// The server speaks IMAP.
    Dialogue,
}

/// Numbers of results that change the state of a server.
#[derive(Debug, Clone, Copy)]
pub(super) struct Thresholds {
    /// Failed logins in a row that open the breaker.
    pub failures: u32,
    /// Passed checks in a row that bring a server back.
    pub rise: u32,
    /// Failed checks in a row that take a server out.
    pub fall: u32,
}

/// Whether a login may use a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Availability {
    Alive,
    /// The breaker's pause is over: one login may try the server after [`Health::begin_trial`].
    TrialDue,
    /// The server is used only if there is no other.
    Failing,
}

/// Identifies one trial: see [`Health::begin_trial`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Trial(u32);

/// Health of one server.
#[derive(Debug, Default)]
pub(super) struct Health {
    breaker: Breaker,
    checks: Checks,
    trials: u32,
    /// Time of the last recovery.
    recovered: Option<Instant>,
}

#[derive(Debug)]
enum Breaker {
    Closed { failures: u32 },
    Open { retry_at: Instant, pause: Duration, cause: FailureKind, trial: Option<Trial> },
}

impl Default for Breaker {
    fn default() -> Self {
        Self::Closed { failures: 0 }
    }
}

/// What the checks have decided, with the number of results in a row that contradict it.
#[derive(Debug)]
enum Checks {
    In { failed: u32 },
    Out { passed: u32 },
}

impl Default for Checks {
    fn default() -> Self {
        Self::In { failed: 0 }
    }
}

/// A change of a server's health.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum HealthChange {
    Failed,
    Recovered,
}

impl Health {
    /// Records that a login could not use the server.
    ///
    /// Failures within a pause do not lengthen it: they are of logins that were in progress together, or that had no other
    /// server.
    pub(super) fn login_failed(
        &mut self,
        kind: FailureKind,
        now: Instant,
        thresholds: Thresholds,
    ) -> Option<HealthChange> {
        self.update(now, |health| {
            let pause = match &mut health.breaker {
                Breaker::Closed { failures } => {
                    *failures += 1;
                    if kind == FailureKind::Other && *failures < thresholds.failures {
                        return;
                    }
                    FIRST_PAUSE
                }
                Breaker::Open { retry_at, .. } if now < *retry_at => return,
                Breaker::Open { pause, .. } => (*pause * 2).min(LONGEST_PAUSE),
            };
            health.breaker = Breaker::Open { retry_at: now + pause, pause, cause: kind, trial: None };
        })
    }

    /// Records that the server has answered a login, whether it accepted or refused it.
    pub(super) fn login_answered(&mut self, now: Instant) -> Option<HealthChange> {
        self.update(now, |health| health.breaker = Breaker::default())
    }

    /// Records a passed check.
    pub(super) fn check_passed(
        &mut self,
        depth: CheckDepth,
        now: Instant,
        thresholds: Thresholds,
    ) -> Option<HealthChange> {
        self.update(now, |health| {
            health.checks = match health.checks {
                Checks::Out { passed } if passed + 1 < thresholds.rise => Checks::Out { passed: passed + 1 },
                Checks::In { .. } | Checks::Out { .. } => Checks::default(),
            };
            if let (Checks::In { .. }, Breaker::Open { cause, .. }) = (&health.checks, &health.breaker)
                && (depth == CheckDepth::Dialogue || *cause == FailureKind::Refused)
            {
                health.breaker = Breaker::default();
            }
        })
    }

    /// Records a failed check.
    pub(super) fn check_failed(&mut self, now: Instant, thresholds: Thresholds) -> Option<HealthChange> {
        self.update(now, |health| {
            health.checks = match health.checks {
                Checks::In { failed } if failed + 1 < thresholds.fall => Checks::In { failed: failed + 1 },
                Checks::In { .. } | Checks::Out { .. } => Checks::Out { passed: 0 },
            };
        })
    }

    /// Whether neither the checks nor the breaker speak against the server.
    pub(super) fn is_alive(&self) -> bool {
        matches!((&self.checks, &self.breaker), (Checks::In { .. }, Breaker::Closed { .. }))
    }

    pub(super) fn availability(&self, now: Instant) -> Availability {
        match (&self.checks, &self.breaker) {
            (Checks::Out { .. }, _) => Availability::Failing,
            (Checks::In { .. }, Breaker::Closed { .. }) => Availability::Alive,
            (Checks::In { .. }, Breaker::Open { retry_at, trial: None, .. }) if now >= *retry_at => {
                Availability::TrialDue
            }
            (Checks::In { .. }, Breaker::Open { .. }) => Availability::Failing,
        }
    }

    /// Begins a trial. `None` if none is due, or another login tries the server already.
    pub(super) fn begin_trial(&mut self, now: Instant) -> Option<Trial> {
        if self.availability(now) != Availability::TrialDue {
            return None;
        }
        let Breaker::Open { trial, .. } = &mut self.breaker else { return None };
        self.trials = self.trials.wrapping_add(1);
        *trial = Some(Trial(self.trials));
        *trial
    }

    /// Ends a trial. If it had no result, the next login may try the server.
    pub(super) fn end_trial(&mut self, ended: Trial) {
        if let Breaker::Open { trial, .. } = &mut self.breaker
            && *trial == Some(ended)
        {
            *trial = None;
        }
    }

    pub(super) fn breaker(&self) -> BreakerState {
        match &self.breaker {
            Breaker::Closed { .. } => BreakerState::Closed,
            Breaker::Open { trial: Some(_), .. } => BreakerState::HalfOpen,
            Breaker::Open { .. } => BreakerState::Open,
        }
    }

    /// Share of its weight that the server gets: a tenth right after its recovery, all of it after `slow_start`.
    pub(super) fn ramp(&self, now: Instant, slow_start: Option<Duration>) -> f64 {
        let Some((recovered, slow_start)) = self.recovered.zip(slow_start) else { return 1.0 };
        let passed = now.saturating_duration_since(recovered).as_secs_f64() / slow_start.as_secs_f64();
        passed.clamp(FIRST_RAMP, 1.0)
    }

    fn update(&mut self, now: Instant, change: impl FnOnce(&mut Self)) -> Option<HealthChange> {
        let was_alive = self.is_alive();
        change(self);
        match (was_alive, self.is_alive()) {
            (true, false) => Some(HealthChange::Failed),
            (false, true) => {
                self.recovered = Some(now);
                Some(HealthChange::Recovered)
            }
            (true, true) | (false, false) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const THRESHOLDS: Thresholds = Thresholds { failures: 3, rise: 2, fall: 3 };
    const SECOND: Duration = Duration::from_secs(1);

    fn fail(health: &mut Health, kind: FailureKind, now: Instant) -> Option<HealthChange> {
        health.login_failed(kind, now, THRESHOLDS)
    }

    fn pass(health: &mut Health, depth: CheckDepth) -> Option<HealthChange> {
        health.check_passed(depth, Instant::now(), THRESHOLDS)
    }

    fn fail_check(health: &mut Health) -> Option<HealthChange> {
        health.check_failed(Instant::now(), THRESHOLDS)
    }

    #[test]
    fn breaker_pauses_double_up_to_a_limit() {
        let mut health = Health::default();
        let mut now = Instant::now();
        assert_eq!(fail(&mut health, FailureKind::Refused, now), Some(HealthChange::Failed), "at once");
        for seconds in [1, 2, 4, 8, 16, 30, 30] {
            assert_eq!(
                fail(&mut health, FailureKind::Refused, now),
                None,
                "a failure within the pause changes nothing"
            );
            let nearly = now + Duration::from_millis(seconds * 1000 - 1);
            assert_eq!(health.availability(nearly), Availability::Failing, "{seconds} s");
            now += Duration::from_secs(seconds);
            assert_eq!(health.availability(now), Availability::TrialDue, "{seconds} s");
            assert!(health.begin_trial(now).is_some());
            assert_eq!(fail(&mut health, FailureKind::Refused, now), None);
        }
        assert_eq!(health.login_answered(now), Some(HealthChange::Recovered));
        assert_eq!(health.login_answered(now), None);
        assert_eq!(health.availability(now), Availability::Alive);
        assert_eq!(fail(&mut health, FailureKind::Refused, now), Some(HealthChange::Failed));
        assert_eq!(health.availability(now + FIRST_PAUSE), Availability::TrialDue, "from the first pause again");
    }

    #[test]
    fn breaker_opens_after_failures_in_a_row() {
        let (mut health, now) = (Health::default(), Instant::now());
        for _ in 0..5 {
            assert_eq!(fail(&mut health, FailureKind::Other, now), None);
            assert_eq!(fail(&mut health, FailureKind::Other, now), None);
            assert_eq!(health.login_answered(now), None);
        }
        assert_eq!(fail(&mut health, FailureKind::Other, now), None);
        assert_eq!(fail(&mut health, FailureKind::Other, now), None);
        assert_eq!(fail(&mut health, FailureKind::Other, now), Some(HealthChange::Failed));
        assert_eq!(health.breaker(), BreakerState::Open);
    }

    #[test]
    fn trial_is_given_to_one_login_at_a_time() {
        let (mut health, now) = (Health::default(), Instant::now());
        assert_eq!(health.begin_trial(now), None, "the server is alive");
        fail(&mut health, FailureKind::Refused, now);
        assert_eq!(health.begin_trial(now), None, "the pause is not over");
        let later = now + SECOND;
        let first = health.begin_trial(later).unwrap();
        assert_eq!(health.breaker(), BreakerState::HalfOpen);
        assert_eq!(health.availability(later), Availability::Failing, "for other logins");
        assert_eq!(health.begin_trial(later), None);
        health.end_trial(first);
        let second = health.begin_trial(later).expect("the first trial had no result");
        health.end_trial(first);
        assert_eq!(health.begin_trial(later), None, "an old trial does not end a new one");
        fail(&mut health, FailureKind::Other, later);
        health.end_trial(second);
        assert_eq!(health.availability(later + SECOND), Availability::Failing, "a failed trial doubles the pause");
        assert_eq!(health.availability(later + 2 * SECOND), Availability::TrialDue);
    }

    #[test]
    fn checks_take_a_server_out_and_bring_it_back() {
        let mut health = Health::default();
        for (passed, expected) in [
            (false, None),
            (false, None),
            (true, None),
            (false, None),
            (false, None),
            (false, Some(HealthChange::Failed)),
            (true, None),
            (false, None),
            (true, None),
            (true, Some(HealthChange::Recovered)),
            (true, None),
        ] {
            let change = if passed { pass(&mut health, CheckDepth::Dialogue) } else { fail_check(&mut health) };
            assert_eq!(change, expected, "{health:?}");
        }
    }

    #[test]
    fn breaker_is_closed_by_a_check_that_tests_as_much_as_the_failed_logins() {
        for (kind, depth, closes) in [
            (FailureKind::Refused, CheckDepth::Connection, true),
            (FailureKind::Other, CheckDepth::Connection, false),
            (FailureKind::Refused, CheckDepth::Dialogue, true),
            (FailureKind::Other, CheckDepth::Dialogue, true),
        ] {
            let (mut health, now) = (Health::default(), Instant::now());
            for _ in 0..3 {
                fail(&mut health, kind, now);
            }
            assert!(!health.is_alive());
            assert_eq!(fail_check(&mut health), None);
            assert_eq!(pass(&mut health, depth), closes.then_some(HealthChange::Recovered), "{kind:?} {depth:?}");
        }
    }

    #[test]
    fn server_taken_out_by_checks_has_no_trials_and_logins_do_not_bring_it_back() {
        let (mut health, now) = (Health::default(), Instant::now());
        for _ in 0..3 {
            fail_check(&mut health);
        }
        fail(&mut health, FailureKind::Refused, now);
        assert_eq!(
            health.availability(now + 60 * SECOND),
            Availability::Failing,
            "no trials, because checks test the server"
        );
        assert_eq!(health.login_answered(now), None);
        assert_eq!(health.availability(now), Availability::Failing);
        pass(&mut health, CheckDepth::Connection);
        assert_eq!(pass(&mut health, CheckDepth::Connection), Some(HealthChange::Recovered));
    }

    #[test]
    fn ramp_rises_from_a_tenth() {
        let (mut health, now) = (Health::default(), Instant::now());
        let slow = Some(Duration::from_secs(30));
        assert!((health.ramp(now, slow) - 1.0).abs() < 1e-9, "it has never failed");
        fail(&mut health, FailureKind::Refused, now);
        health.login_answered(now);
        for (seconds, expected) in [(0, 0.1), (3, 0.1), (15, 0.5), (30, 1.0), (60, 1.0)] {
            let ramp = health.ramp(now + Duration::from_secs(seconds), slow);
            assert!((ramp - expected).abs() < 1e-9, "{seconds} s: {ramp}");
        }
        assert!((health.ramp(now, None) - 1.0).abs() < 1e-9);
    }
}
