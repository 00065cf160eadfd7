//! Checks the servers of a backend at intervals: whether they work, and what they offer before login.
//!
//! One task per backend checks each server every `interval`, with a jitter of a tenth, so that checks of many servers, or by
//! many proxies, do not coincide. A check reads the capabilities over the connection that it tests. A server whose state is
//! `down` is not checked. `health` decides what the results mean for a server's availability.

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
use crate::metrics::CheckMetrics;

/// Interval at which the servers of an SRV record are listed again, and at which the state of a server is read again whose check
/// is due but whose state is `down`.
const REFRESH_INTERVAL: Duration = Duration::from_secs(1);

/// How the servers of a backend are checked.
#[derive(Debug)]
pub(super) struct CheckSettings {
    check: config::Check,
    probe: Probe,
}

impl CheckSettings {
    /// Builds the settings, and reads the password of the account that logs in.
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
pub(super) async fn run_checks(
    backends: Arc<Backends>,
    backend: Arc<Backend>,
    settings: Arc<CheckSettings>,
    limits: Arc<Limits>,
) {
    let has_srv_records = backend.groups.iter().any(|group| group.srv_name.is_some());
    let max_pause = if has_srv_records { REFRESH_INTERVAL } else { settings.check.interval };
    let (schedules, running) = (HashMap::new(), JoinSet::new());
    let mut checker = HealthChecker { backends, backend, settings, limits, schedules, running };
    loop {
        let servers: Vec<Arc<Server>> = checker.backend.groups.iter().flat_map(ServerGroup::current).collect();
        checker.remove_stale_schedules(&servers);
        let mut next = Instant::now() + max_pause;
        for server in servers {
            next = next.min(checker.start_if_due(server));
        }
        tokio::select! {
            Some(_) = checker.running.join_next() => {}
            () = time::sleep_until(next) => {}
        }
    }
}

/// Runs the checks of one backend.
struct HealthChecker {
    backends: Arc<Backends>,
    backend: Arc<Backend>,
    settings: Arc<CheckSettings>,
    limits: Arc<Limits>,
    schedules: HashMap<Arc<str>, CheckSchedule>,
    running: JoinSet<()>,
}

impl HealthChecker {
    /// Removes the schedules of servers that are gone, and their metrics.
    fn remove_stale_schedules(&mut self, servers: &[Arc<Server>]) {
        self.schedules.retain(|name, schedule| {
            let remains = servers.iter().any(|server| Arc::ptr_eq(&server.state, &schedule.state));
            if !remains && !servers.iter().any(|server| server.name == *name) {
                // A check may have ended after the server's series was removed.
                self.backend.metrics.backend(self.backend.id.0).forget_server(name);
            }
            remains
        });
    }

    /// Starts a check of `server` if it is due. Returns when the server has to be looked at again.
    fn start_if_due(&mut self, server: Arc<Server>) -> Instant {
        let (now, check) = (Instant::now(), &self.settings.check);
        let schedule = self.schedules.entry(server.name.clone()).or_insert_with(|| CheckSchedule {
            state: server.state.clone(),
            due: now,
            running: None,
            metrics: self.backend.metrics.backend(self.backend.id.0).checks(&server.name, check.kind.as_str()),
        });
        if schedule.due > now {
            return schedule.due;
        }
        if server.admin_state() == AdminState::Down {
            return now + REFRESH_INTERVAL;
        }
        if schedule.is_running() {
            // The end of the check wakes the loop.
            return now + check.interval;
        }
        schedule.due = now + check.interval.mul_f64(0.9 + 0.2 * random_fraction());
        let metrics = schedule.metrics.clone();
        let (backends, backend) = (self.backends.clone(), self.backend.clone());
        let (settings, limits) = (self.settings.clone(), self.limits.clone());
        schedule.running = Some(self.running.spawn(async move {
            check_and_record(&backend, &server, &settings, &limits, &metrics).await;
            backends.update_offer();
        }));
        schedule.due
    }
}

async fn check_and_record(
    backend: &Backend,
    server: &Arc<Server>,
    settings: &CheckSettings,
    limits: &Limits,
    metrics: &CheckMetrics,
) {
    let started = Instant::now();
    let result = probe(backend, server, &settings.probe, limits, settings.check.timeout).await;
    if let Err(ProbeFailure { cause: FailureCause::ThisMachine, detail }) = &result {
        let (backend, server) = (&backend.name, &server.name);
        // A local failure says nothing about the server, so its health does not change.
        tracing::warn!(%backend, %server, %detail, "this machine cannot check the server");
        return;
    }
    metrics.checked(result.is_ok(), started.elapsed());
    match result {
        Ok(observation) => {
            record_observation(server, &observation, &settings.probe, metrics);
            server.record_check(Ok(()), settings.depth());
        }
        Err(ProbeFailure { detail, .. }) => {
            tracing::debug!(backend = %backend.name, server = %server.name, %detail, "check failed");
            // Unknown capabilities do not restrict what clients are offered.
            server.set_capabilities(None);
            server.record_check(Err(&detail), settings.depth());
        }
    }
}

fn record_observation(server: &Server, observation: &Observation, probe: &Probe, metrics: &CheckMetrics) {
    if let Some(expiry) = observation.certificate_expiry {
        metrics.certificate(expiry);
    }
    server.set_capabilities(observation.capabilities);
    // A server may advertise UNAUTHENTICATE only after a login.
    if observation.has_unauthenticate || matches!(probe, Probe::Login { .. }) {
        server.set_unauthenticate(observation.has_unauthenticate);
    }
}
