//! Metrics of one server: gauges of its state, and counters of its checks. The series of removed servers are removed.

use std::time::Duration;

use prometheus::{Gauge, GaugeVec, Histogram, IntCounter, IntCounterVec, IntGauge, IntGaugeVec};

use super::families::Families;
use crate::admin_state::AdminState;
use crate::metrics::{BackendMetrics, GaugeGuard};

/// Values of the labels `kind` and `outcome` of checks.
const KINDS: [&str; 4] = ["tcp", "tls", "imap", "login"];
const OUTCOMES: [&str; 2] = ["passed", "failed"];

/// The families with a label for the server.
#[derive(Debug, Clone)]
pub(super) struct ServerFamilies {
    up: IntGaugeVec,
    trusts: IntGaugeVec,
    sessions: IntGaugeVec,
    disconnects: IntGaugeVec,
    breaker: IntGaugeVec,
    state: IntGaugeVec,
    checks: IntCounterVec,
    certificate: GaugeVec,
    check: Histogram,
}

impl ServerFamilies {
    pub(super) fn new(families: &Families, backend: &str) -> Self {
        Self {
            up: families.server_up.clone(),
            trusts: families.server_trusts.clone(),
            sessions: families.server_sessions.clone(),
            disconnects: families.server_disconnects.clone(),
            breaker: families.server_breaker.clone(),
            state: families.server_state.clone(),
            checks: families.server_checks.clone(),
            certificate: families.server_certificate.clone(),
            check: families.server_check.with_label_values(&[backend]),
        }
    }
}

impl BackendMetrics {
    /// Metrics of one server.
    pub fn server(&self, server: &str) -> ServerMetrics {
        let labels = &[self.name.as_str(), server];
        let metrics = ServerMetrics {
            up: self.servers.up.with_label_values(labels),
            trusts: self.servers.trusts.with_label_values(labels),
            sessions: self.servers.sessions.with_label_values(labels),
            disconnects: self.servers.disconnects.with_label_values(labels),
            breaker: self.servers.breaker.with_label_values(labels),
            state: self.servers.state.with_label_values(labels),
        };
        metrics.up.set(1);
        metrics.trusts.set(-1);
        metrics
    }

    /// Metrics of the checks of this kind on one server.
    pub fn checks(&self, server: &str, kind: &str) -> CheckMetrics {
        let count = |outcome| self.servers.checks.with_label_values(&[self.name.as_str(), server, kind, outcome]);
        CheckMetrics {
            passed: count(OUTCOMES[0]),
            failed: count(OUTCOMES[1]),
            duration: self.servers.check.clone(),
            certificate: self.servers.certificate.clone(),
            labels: [self.name.clone(), server.to_owned()],
        }
    }

    /// Removes the series of a server.
    pub fn forget_server(&self, server: &str) {
        let labels = &[self.name.as_str(), server];
        let families = &self.servers;
        // An error means that the series does not exist.
        let states = [&families.up, &families.trusts, &families.breaker, &families.state];
        for family in states.into_iter().chain([&families.sessions, &families.disconnects]) {
            let _ = family.remove_label_values(labels);
        }
        let _ = families.certificate.remove_label_values(labels);
        for (kind, outcome) in KINDS.iter().flat_map(|kind| OUTCOMES.map(|outcome| (*kind, outcome))) {
            let _ = families.checks.remove_label_values(&[self.name.as_str(), server, kind, outcome]);
        }
    }
}

/// The state of a server's breaker. The values are those of the metric.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BreakerState {
    /// Logins are sent to the server.
    Closed = 0,
    /// One login tries the server.
    HalfOpen = 1,
    /// Logins avoid the server.
    Open = 2,
}

/// Metrics of one server.
#[derive(Debug)]
pub struct ServerMetrics {
    up: IntGauge,
    trusts: IntGauge,
    sessions: IntGauge,
    disconnects: IntGauge,
    breaker: IntGauge,
    state: IntGauge,
}

impl ServerMetrics {
    /// Sets whether the server reports that it trusts the ID command of this proxy.
    pub fn set_trusts_id(&self, trusts: bool) {
        self.trusts.set(trusts.into());
    }

    /// Sets whether the server is available.
    pub fn set_up(&self, up: bool) {
        self.up.set(up.into());
    }

    /// Sets the state of the breaker.
    pub fn set_breaker(&self, state: BreakerState) {
        self.breaker.set(state as i64);
    }

    /// Sets the administrative state.
    pub fn set_admin_state(&self, state: AdminState) {
        self.state.set(match state {
            AdminState::Up => 0,
            AdminState::Drain => 1,
            AdminState::Down => 2,
        });
    }

    /// Number of sessions relayed to the server.
    pub fn sessions(&self) -> i64 {
        self.sessions.get()
    }

    /// Counts a session as open.
    pub fn session_opened(&self) {
        self.sessions.inc();
    }

    /// Counts a session as closed.
    pub fn session_closed(&self) {
        self.sessions.dec();
    }

    /// Counts a client whose session the server has ended until the guard is dropped.
    pub fn disconnect_pending(&self) -> GaugeGuard {
        GaugeGuard::new(&self.disconnects)
    }
}

/// Metrics of one server's checks.
#[derive(Debug, Clone)]
pub struct CheckMetrics {
    passed: IntCounter,
    failed: IntCounter,
    duration: Histogram,
    certificate: GaugeVec,
    labels: [String; 2],
}

impl CheckMetrics {
    /// Records the result of a check.
    pub fn checked(&self, passed: bool, took: Duration) {
        if passed {
            self.passed.inc()
        } else {
            self.failed.inc()
        }
        self.duration.observe(took.as_secs_f64());
    }

    /// Sets the expiry of the certificate that the server sent, in seconds since 1970. A server without TLS has no series.
    pub fn certificate(&self, expiry: i64) {
        let gauge: Gauge = self.certificate.with_label_values(&self.labels);
        #[expect(clippy::cast_precision_loss, reason = "seconds since 1970 fit an f64 exactly for 285 million years")]
        gauge.set(expiry as f64);
    }
}
