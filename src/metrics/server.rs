//! Metrics of one server: gauges of its state, and how its checks end. Series of servers that are gone are dropped.

use std::time::Duration;

use prometheus::{Gauge, GaugeVec, Histogram, IntCounter, IntCounterVec, IntGauge, IntGaugeVec};

use super::families::Families;
use crate::admin_state::AdminState;
use crate::metrics::{BackendMetrics, OpenGuard};

/// Kinds of checks and how they end, as labels.
const KINDS: [&str; 4] = ["tcp", "tls", "imap", "login"];
const OUTCOMES: [&str; 2] = ["passed", "failed"];

/// The families whose children belong to servers.
#[derive(Debug, Clone)]
pub(super) struct ServerFamilies {
    up: IntGaugeVec,
    trusts: IntGaugeVec,
    sessions: IntGaugeVec,
    kept: IntGaugeVec,
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
            kept: families.server_kept.clone(),
            breaker: families.server_breaker.clone(),
            state: families.server_state.clone(),
            checks: families.server_checks.clone(),
            certificate: families.server_certificate.clone(),
            check: families.server_check.with_label_values(&[backend]),
        }
    }
}

impl BackendMetrics {
    /// Gauges of one server.
    pub fn server(&self, server: &str) -> ServerMetrics {
        let labels = &[self.name.as_str(), server];
        let metrics = ServerMetrics {
            up: self.servers.up.with_label_values(labels),
            trusts: self.servers.trusts.with_label_values(labels),
            sessions: self.servers.sessions.with_label_values(labels),
            kept: self.servers.kept.with_label_values(labels),
            breaker: self.servers.breaker.with_label_values(labels),
            state: self.servers.state.with_label_values(labels),
        };
        metrics.up.set(1);
        metrics.trusts.set(-1);
        metrics
    }

    /// What is counted of one server's checks of this kind.
    pub fn checks(&self, server: &str, kind: &str) -> CheckMetrics {
        let count = |outcome| self.servers.checks.with_label_values(&[self.name.as_str(), server, kind, outcome]);
        CheckMetrics {
            passed: count(OUTCOMES[0]),
            failed: count(OUTCOMES[1]),
            length: self.servers.check.clone(),
            certificate: self.servers.certificate.clone(),
            labels: [self.name.clone(), server.to_owned()],
        }
    }

    /// The server is gone: its series end.
    pub fn forget_server(&self, server: &str) {
        let labels = &[self.name.as_str(), server];
        let families = &self.servers;
        // An error says that the series does not exist, which is what is asked for.
        let states = [&families.up, &families.trusts, &families.breaker, &families.state];
        for family in states.into_iter().chain([&families.sessions, &families.kept]) {
            let _ = family.remove_label_values(labels);
        }
        let _ = families.certificate.remove_label_values(labels);
        for (kind, outcome) in KINDS.iter().flat_map(|kind| OUTCOMES.map(|outcome| (*kind, outcome))) {
            let _ = families.checks.remove_label_values(&[self.name.as_str(), server, kind, outcome]);
        }
    }
}

/// Metrics of one server.
#[derive(Debug)]
pub struct ServerMetrics {
    up: IntGauge,
    trusts: IntGauge,
    sessions: IntGauge,
    kept: IntGauge,
    breaker: IntGauge,
    state: IntGauge,
}

impl ServerMetrics {
    /// Whether the server says that it trusts our ID.
    pub fn set_trusts(&self, trusts: bool) {
        self.trusts.set(trusts.into());
    }

    /// The server is taken for alive, or not.
    pub fn set_up(&self, up: bool) {
        self.up.set(up.into());
    }

    /// Its breaker: 0 closed, 1 half-open, 2 open.
    pub fn set_breaker(&self, state: i64) {
        self.breaker.set(state);
    }

    /// Sets the administrative state.
    pub fn set_admin_state(&self, state: AdminState) {
        self.state.set(match state {
            AdminState::Up => 0,
            AdminState::Drain => 1,
            AdminState::Down => 2,
        });
    }

    /// Sessions relayed to it.
    pub fn sessions(&self) -> i64 {
        self.sessions.get()
    }

    /// A session begins on the server.
    pub fn session_opened(&self) {
        self.sessions.inc();
    }

    /// And ends.
    pub fn session_closed(&self) {
        self.sessions.dec();
    }

    /// A client is kept although the server has cut it off, until the guard drops.
    pub fn kept(&self) -> OpenGuard {
        OpenGuard::new(&self.kept)
    }
}

/// What is counted of one server's checks.
#[derive(Debug, Clone)]
pub struct CheckMetrics {
    passed: IntCounter,
    failed: IntCounter,
    length: Histogram,
    certificate: GaugeVec,
    labels: [String; 2],
}

impl CheckMetrics {
    /// A check ended after `took`.
    pub fn checked(&self, passed: bool, took: Duration) {
        if passed {
            self.passed.inc()
        } else {
            self.failed.inc()
        }
        self.length.observe(took.as_secs_f64());
    }

    /// The server showed a certificate that ends then (seconds since 1970). Where none is ever shown there is no series.
    pub fn certificate(&self, ends: i64) {
        let gauge: Gauge = self.certificate.with_label_values(&self.labels);
        #[expect(clippy::cast_precision_loss, reason = "seconds since 1970 fit an f64 exactly for 285 million years")]
        gauge.set(ends as f64);
    }
}
