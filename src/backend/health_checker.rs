//! Checks the servers of a backend at intervals: whether they work, and what they offer before login.
//!
//! One task per backend checks each server every `interval`, with a jitter of a tenth, so that neither many servers nor many
//! proxies are checked at the same moment. One connection serves both purposes. A server whose state is `down` is not
//! checked. What results mean is decided by `health`.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{self, Instant};

use super::health::CheckDepth;
use super::probe::{FailureCause, Observation, Probe, ProbeFailure, probe};
use super::random::random_fraction;
use super::server::ServerState;
use super::server_group::ServerGroup;
use super::{Backend, Backends, Server};
use crate::admin_state::AdminState;
use crate::config::{self, CheckKind, Limits, Problem};
use crate::identity::Secret;
use crate::metrics::{BackendMetrics, CheckMetrics};

/// Interval at which the servers of an SRV record and the states of servers are looked at again.
const REFRESH_INTERVAL: Duration = Duration::from_secs(1);

/// The checks of a backend.
#[derive(Debug)]
pub(super) struct HealthChecker {
    check: config::Check,
    probe: Probe,
}

impl HealthChecker {
    /// Builds the checks, and reads the password of the account that logs in.
    pub(super) fn build(check: &config::Check) -> Result<Self, Problem> {
        let probe = match &check.kind {
            CheckKind::Tcp => Probe::Tcp,
            CheckKind::Tls => Probe::Tls,
            CheckKind::Imap => Probe::Imap,
            CheckKind::Login { account, password } => {
                let password = Secret::new(password.read_secret()?.as_bytes().to_vec());
                Probe::Login { user: account.clone(), password }
            }
        };
        Ok(Self { check: check.clone(), probe })
    }

    fn depth(&self) -> CheckDepth {
        match self.probe {
            Probe::Tcp | Probe::Tls => CheckDepth::Connection,
            Probe::Imap | Probe::Login { .. } => CheckDepth::Dialogue,
        }
    }
}

/// When one server is checked.
struct CheckSchedule {
    /// Identifies the server: another one may get the same name.
    state: Arc<ServerState>,
    due: Instant,
    running: Option<AbortHandle>,
    metrics: CheckMetrics,
}

impl CheckSchedule {
    fn is_running(&self) -> bool {
        self.running.as_ref().is_some_and(|check| !check.is_finished())
    }
}

impl Drop for CheckSchedule {
    fn drop(&mut self) {
        // The server is gone: a check that still runs must not publish its result.
        if let Some(check) = &self.running {
            check.abort();
        }
    }
}

/// Checks the backend's servers until it is dropped, which ends the checks that are running too.
pub(super) async fn run_checks(backends: Arc<Backends>, backend: Arc<Backend>, limits: Arc<Limits>) {
    let Some(checker) = &backend.checker else { return };
    let mut checks = Checks { backends, limits, schedules: HashMap::new(), running: JoinSet::new() };
    let has_srv_records = backend.groups.iter().any(|group| group.srv_name.is_some());
    let max_pause = if has_srv_records { REFRESH_INTERVAL } else { checker.check.interval };
    loop {
        let servers: Vec<Arc<Server>> = backend.groups.iter().flat_map(ServerGroup::current).collect();
        checks.forget_others(&servers, backend.metrics.backend(backend.id.0));
        let mut next = Instant::now() + max_pause;
        for server in servers {
            next = next.min(checks.start_if_due(&backend, checker, server));
        }
        tokio::select! {
            Some(_) = checks.running.join_next() => {}
            () = time::sleep_until(next) => {}
        }
    }
}

/// The checks of a backend's servers, scheduled and running.
struct Checks {
    backends: Arc<Backends>,
    limits: Arc<Limits>,
    schedules: HashMap<Arc<str>, CheckSchedule>,
    running: JoinSet<()>,
}

impl Checks {
    /// Removes the schedules of servers that are gone.
    fn forget_others(&mut self, servers: &[Arc<Server>], metrics: &BackendMetrics) {
        self.schedules.retain(|name, schedule| {
            let remains = servers.iter().any(|server| Arc::ptr_eq(&server.state, &schedule.state));
            if !remains && !servers.iter().any(|server| server.name == *name) {
                // A check may have ended after the server's series was removed.
                metrics.forget_server(name);
            }
            remains
        });
    }

    /// Starts a check of `server` if it is due. Returns when the server has to be looked at again.
    fn start_if_due(&mut self, backend: &Arc<Backend>, checker: &HealthChecker, server: Arc<Server>) -> Instant {
        let now = Instant::now();
        let schedule = self.schedules.entry(server.name.clone()).or_insert_with(|| CheckSchedule {
            state: server.state.clone(),
            due: now,
            running: None,
            metrics: backend.metrics.backend(backend.id.0).checks(&server.name, checker.check.kind.as_str()),
        });
        if schedule.due > now {
            return schedule.due;
        }
        if server.admin_state() == AdminState::Down {
            return now + REFRESH_INTERVAL;
        }
        if schedule.is_running() {
            // The end of the check wakes the loop.
            return now + checker.check.interval;
        }
        schedule.due = now + checker.check.interval.mul_f64(0.9 + 0.2 * random_fraction());
        let metrics = schedule.metrics.clone();
        let (backends, backend, limits) = (self.backends.clone(), backend.clone(), self.limits.clone());
        schedule.running = Some(self.running.spawn(async move {
            check(&backend, &server, &limits, &metrics).await;
            backends.update_offer();
        }));
        schedule.due
    }
}

async fn check(backend: &Backend, server: &Arc<Server>, limits: &Limits, metrics: &CheckMetrics) {
    let Some(checker) = &backend.checker else { return };
    let started = Instant::now();
    let result = probe(backend, server, &checker.probe, limits, checker.check.timeout).await;
    if let Err(ProbeFailure { cause: FailureCause::ThisMachine, detail }) = &result {
        // The result shows nothing about the server, so its health stays as it is.
        let (backend, server) = (&backend.name, &server.name);
        return tracing::warn!(%backend, %server, %detail, "this machine cannot check the server");
    }
    metrics.checked(result.is_ok(), started.elapsed());
    match result {
        Ok(observation) => {
            record_observation(server, &observation, &checker.probe, metrics);
            server.record_check(Ok(()), checker.depth());
        }
        Err(ProbeFailure { detail, .. }) => {
            tracing::debug!(backend = %backend.name, server = %server.name, %detail, "check failed");
            // A server whose offer is unknown does not restrict the common offer.
            server.set_offer(None);
            server.record_check(Err(&detail), checker.depth());
        }
    }
}

fn record_observation(server: &Server, observation: &Observation, probe: &Probe, metrics: &CheckMetrics) {
    if let Some(expiry) = observation.certificate_expiry {
        metrics.certificate(expiry);
    }
    server.set_offer(observation.offer);
    // A server may advertise UNAUTHENTICATE only after a login.
    if observation.has_unauthenticate || matches!(probe, Probe::Login { .. }) {
        server.set_unauthenticate(observation.has_unauthenticate);
    }
}
