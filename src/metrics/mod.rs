//! All metrics, with methods named after the events that they count.
//!
//! The metrics of a label are resolved once, when a snapshot is built, so that a login does not look up labels. The number of label
//! values is bounded: listeners, backends, routes and servers come from the configuration (or from an SRV record, and are removed
//! with [`BackendMetrics::forget_server`]), all others from enums. No label contains a user, a client's address or text sent by a
//! peer. Each instance has its own registry; nothing is global.

mod admission;
pub(crate) mod endpoint;
mod families;
mod route;
mod server;

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use prometheus::{Histogram, IntCounter, IntGauge, TextEncoder};

use self::admission::AdmissionReader;
pub use self::admission::{PolicyAnswer, PolicyCommand};
use self::families::Families;
pub use self::route::{LookupOutcome, RouteMetrics};
use self::server::ServerFamilies;
pub use self::server::{BreakerState, CheckMetrics, ServerMetrics};
use crate::failure::Reason;
use crate::identity::Mechanism;

/// The outcome of a login attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LoginOutcome {
    /// A server accepted it.
    Accepted,
    /// A server, or the proxy's own policy, refused it.
    Refused,
    /// No server answered, or the lookup failed.
    Unavailable,
    /// No route knows the user.
    UnknownUser,
    /// A limit of the proxy, or a limit of the user on the server, was exceeded.
    Limited,
    /// The connection ended before the login was answered.
    Abandoned,
}

/// Values of the label `outcome` of reloads.
const RELOADED: &str = "loaded";
const RELOAD_REFUSED: &str = "refused";

impl LoginOutcome {
    const ALL: [Self; 6] =
        [Self::Accepted, Self::Refused, Self::Unavailable, Self::UnknownUser, Self::Limited, Self::Abandoned];

    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Accepted => "accepted",
            Self::Refused => "refused",
            Self::Unavailable => "unavailable",
            Self::UnknownUser => "unknown_user",
            Self::Limited => "limited",
            Self::Abandoned => "abandoned",
        }
    }
}

/// The configured names that become label values, in the order of the configuration.
#[derive(Debug, Default)]
pub struct Names {
    /// Listener addresses as written.
    pub listeners: Vec<String>,
    /// Backend names.
    pub backends: Vec<String>,
    /// Labels of routes.
    pub routes: Vec<String>,
}

/// All metrics of one running instance.
#[derive(Debug)]
pub struct Metrics {
    families: Arc<Families>,
    /// Set when the server starts; shared by the metrics of all configurations.
    admission: Arc<OnceLock<AdmissionReader>>,
    listeners: Vec<ListenerMetrics>,
    backends: Vec<BackendMetrics>,
    routes: Vec<RouteMetrics>,
    unrouted_logins: LoginCounters,
    failures: Vec<IntCounter>,
    policy: [[IntCounter; PolicyAnswer::ALL.len()]; PolicyCommand::ALL.len()],
}

impl Metrics {
    /// Creates and registers all metrics.
    pub fn new(names: &Names) -> Self {
        let families = Families::new();
        families.build_info.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
        for outcome in [RELOADED, RELOAD_REFUSED] {
            families.reloads.with_label_values(&[outcome]);
        }
        Self::resolve(Arc::new(families), Arc::default(), names)
    }

    /// The same metrics, resolved for the names of another configuration.
    pub fn for_names(&self, names: &Names) -> Self {
        Self::resolve(self.families.clone(), self.admission.clone(), names)
    }

    fn resolve(families: Arc<Families>, admission: Arc<OnceLock<AdmissionReader>>, names: &Names) -> Self {
        let failures = Reason::ALL
            .iter()
            .map(|reason| families.failures.with_label_values(&[reason.side().as_str(), reason.as_str()]))
            .collect();
        Self {
            admission,
            listeners: names.listeners.iter().map(|name| ListenerMetrics::new(&families, name)).collect(),
            backends: names.backends.iter().map(|name| BackendMetrics::new(&families, name)).collect(),
            routes: names.routes.iter().map(|name| RouteMetrics::new(&families, name)).collect(),
            unrouted_logins: LoginCounters::new(&families, ""),
            failures,
            policy: PolicyCommand::ALL.map(|command| {
                PolicyAnswer::ALL
                    .map(|answer| families.policy_answers.with_label_values(&[command.as_str(), answer.as_str()]))
            }),
            families,
        }
    }

    /// Removes the series of states whose labels `successor` does not have, because they would never be updated again. Counters stay,
    /// and so do gauges of sessions, which may still be open.
    pub fn retire(&self, successor: &Self) {
        for route in &self.routes {
            if !successor.routes.iter().any(|other| other.label() == route.label()) {
                route.forget(&self.families);
            }
        }
        for backend in &self.backends {
            if !successor.backends.iter().any(|other| other.name == backend.name) {
                // The error means that the series does not exist.
                let _ = self.families.backend_insecure.remove_label_values(&[&backend.name]);
                let _ = self.families.backend_queue.remove_label_values(&[&backend.name]);
            }
        }
        self.families.certificate_expiry.reset();
        self.families.certificate_load_failed.reset();
    }

    /// The metrics in the text format of Prometheus.
    pub fn render(&self) -> String {
        if let Some(reader) = self.admission.get() {
            reader.update(&self.families);
        }
        TextEncoder::new().encode_to_string(&self.families.registry.gather()).unwrap_or_else(|error| {
            tracing::error!(%error, "metrics could not be rendered");
            String::new()
        })
    }

    /// Metrics of the listener with this index in the configuration.
    pub fn listener(&self, index: usize) -> &ListenerMetrics {
        &self.listeners[index]
    }

    /// Metrics of the backend with this index in the configuration.
    pub fn backend(&self, index: usize) -> &BackendMetrics {
        &self.backends[index]
    }

    /// Metrics of the route with this index in the configuration.
    pub fn route(&self, index: usize) -> &RouteMetrics {
        &self.routes[index]
    }

    /// Counts an answered login attempt; `backend` is `None` if it was not routed.
    pub fn login(&self, backend: Option<usize>, mechanism: Mechanism, outcome: LoginOutcome) {
        let counters = backend.map_or(&self.unrouted_logins, |index| &self.backends[index].logins);
        counters.0[mechanism as usize][outcome as usize].inc();
    }

    /// Counts a failure.
    pub fn failure(&self, reason: Reason) {
        self.failures[reason as usize].inc();
    }

    /// Counts an answer, or a failure, of the policy service.
    pub fn policy(&self, command: PolicyCommand, answer: PolicyAnswer) {
        self.policy[command as usize][answer as usize].inc();
    }

    /// Sets the expiry of a loaded certificate, in seconds since 1970.
    pub fn certificate(&self, file: &str, expiry: i64) {
        #[expect(clippy::cast_precision_loss, reason = "seconds since 1970 fit an f64 exactly for 285 million years")]
        self.families.certificate_expiry.with_label_values(&[file]).set(expiry as f64);
    }

    /// Reads the number of entries of each admission table, and the bytes of `limits.before_login_memory` in use, whenever metrics
    /// are rendered. Must be called once per process.
    pub fn measure_admission(
        &self,
        read_entries: impl Fn() -> Vec<(&'static str, usize)> + Send + Sync + 'static,
        read_memory: impl Fn() -> usize + Send + Sync + 'static,
    ) {
        let reader = AdmissionReader { entries: Box::new(read_entries), memory: Box::new(read_memory) };
        if self.admission.set(reader).is_err() {
            tracing::error!("admission is measured already");
        }
    }

    /// Sets whether the present files of a certificate are unusable.
    pub fn certificate_load_failed(&self, file: &str, failed: bool) {
        self.families.certificate_load_failed.with_label_values(&[file]).set(failed.into());
    }

    /// Sets whether the present files of ticket keys are unusable.
    pub fn ticket_keys_load_failed(&self, failed: bool) {
        self.families.ticket_keys_load_failed.set(failed.into());
    }

    /// The gauge of parked sessions, for the poller.
    pub fn parked_sessions(&self) -> IntGauge {
        self.families.parked_sessions.clone()
    }

    /// Counts a reload.
    pub fn reloaded(&self, succeeded: bool) {
        let outcome = if succeeded { RELOADED } else { RELOAD_REFUSED };
        self.families.reloads.with_label_values(&[outcome]).inc();
        self.families.reload_failed.set((!succeeded).into());
    }

    /// Sets whether the last use of the state file failed.
    pub fn state_file_failed(&self, failed: bool) {
        self.families.state_file_failed.set(failed.into());
    }

    /// Records that the process has begun to stop.
    pub fn draining(&self) {
        self.families.draining.set(1);
    }

    /// The counter of panics, for the panic hook.
    pub fn panics(&self) -> IntCounter {
        self.families.panics.clone()
    }

    /// The counter of dropped log lines, for the log queue.
    pub fn log_lines_dropped(&self) -> IntCounter {
        self.families.log_lines_dropped.clone()
    }
}

/// The reason for which a connection was closed on arrival.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// `limits.sessions` is reached.
    Full,
    /// accept(2) failed, for example for lack of descriptors.
    AcceptError,
    /// Denied by `access`.
    Denied,
    /// `limits.connection_rate` is exceeded.
    Rate,
    /// `limits.sessions_per_address` is reached.
    Address,
    /// A limit in `limits.networks` is reached.
    Network,
    /// `limits.before_login` is reached.
    BeforeLogin,
}

impl Refusal {
    const ALL: [Self; 7] =
        [Self::Full, Self::AcceptError, Self::Denied, Self::Rate, Self::Address, Self::Network, Self::BeforeLogin];

    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::AcceptError => "accept_error",
            Self::Denied => "denied",
            Self::Rate => "connection_rate",
            Self::Address => "sessions_per_address",
            Self::Network => "sessions_per_network",
            Self::BeforeLogin => "before_login",
        }
    }
}

/// The way in which a balancer checks a listener with `proxy_protocol`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BalancerCheck {
    /// A PROXY header with LOCAL.
    Local,
    /// A connection that is closed without data.
    Connect,
}

impl BalancerCheck {
    const ALL: [Self; 2] = [Self::Local, Self::Connect];

    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Local => "local",
            Self::Connect => "connect",
        }
    }
}

/// Metrics of one listener.
#[derive(Debug)]
pub struct ListenerMetrics {
    balancer_checks: [IntCounter; BalancerCheck::ALL.len()],
    connections: IntGauge,
    connections_total: IntCounter,
    refused: [IntCounter; Refusal::ALL.len()],
    tls_handshake: Histogram,
}

impl ListenerMetrics {
    fn new(families: &Families, name: &str) -> Self {
        Self {
            connections: families.connections.with_label_values(&[name]),
            connections_total: families.connections_total.with_label_values(&[name]),
            refused: Refusal::ALL
                .map(|refusal| families.connections_refused.with_label_values(&[name, refusal.as_str()])),
            tls_handshake: families.tls_handshake.with_label_values(&[name]),
            balancer_checks: BalancerCheck::ALL
                .map(|check| families.balancer_checks.with_label_values(&[name, check.as_str()])),
        }
    }

    /// Counts a connection, which is open until the guard is dropped.
    pub fn connection_opened(&self) -> GaugeGuard {
        self.connections_total.inc();
        GaugeGuard::new(&self.connections)
    }

    /// Counts a refused connection.
    pub fn refused(&self, refusal: Refusal) {
        self.refused[refusal as usize].inc();
    }

    /// Counts a balancer's health check.
    pub fn balancer_check(&self, check: BalancerCheck) {
        self.balancer_checks[check as usize].inc();
    }

    /// Records a successful TLS handshake with a client.
    pub fn tls_handshake(&self, took: Duration) {
        self.tls_handshake.observe(took.as_secs_f64());
    }
}

/// Metrics of one backend.
#[derive(Debug)]
pub struct BackendMetrics {
    name: String,
    sessions: IntGauge,
    sessions_total: IntCounter,
    logins: LoginCounters,
    server_connect: Histogram,
    server_login: Histogram,
    login: Histogram,
    session_duration: Histogram,
    to_client: IntCounter,
    to_server: IntCounter,
    queue: IntGauge,
    servers: ServerFamilies,
    insecure: IntGauge,
}

impl BackendMetrics {
    fn new(families: &Families, name: &str) -> Self {
        let one = &[name];
        Self {
            name: name.to_owned(),
            sessions: families.backend_sessions.with_label_values(one),
            sessions_total: families.backend_sessions_total.with_label_values(one),
            logins: LoginCounters::new(families, name),
            server_connect: families.server_connect.with_label_values(one),
            server_login: families.server_login.with_label_values(one),
            login: families.login.with_label_values(one),
            session_duration: families.session_duration.with_label_values(one),
            to_client: families.bytes.with_label_values(&[name, "to_client"]),
            to_server: families.bytes.with_label_values(&[name, "to_server"]),
            queue: families.backend_queue.with_label_values(one),
            servers: ServerFamilies::new(families, name),
            insecure: families.backend_insecure.with_label_values(one),
        }
    }

    /// Counts an established session, which is open until the guard is dropped.
    pub fn session_established(&self) -> GaugeGuard {
        self.sessions_total.inc();
        GaugeGuard::new(&self.sessions)
    }

    /// Records the end of a session.
    pub fn session_ended(&self, duration: Duration) {
        self.session_duration.observe(duration.as_secs_f64());
    }

    /// Records a successful TCP connect to a server.
    pub fn server_connected(&self, took: Duration) {
        self.server_connect.observe(took.as_secs_f64());
    }

    /// Records the answer of a server to a login, `took` after the connection.
    pub fn server_answered(&self, took: Duration) {
        self.server_login.observe(took.as_secs_f64());
    }

    /// Records a successful login, `took` after the client's command was complete.
    pub fn logged_in(&self, took: Duration) {
        self.login.observe(took.as_secs_f64());
    }

    /// Counters of relayed bytes: to the client, to the server.
    pub fn byte_counters(&self) -> (IntCounter, IntCounter) {
        (self.to_client.clone(), self.to_server.clone())
    }

    /// Sets whether the certificates of this backend's servers are not verified.
    pub fn set_insecure(&self, insecure: bool) {
        self.insecure.set(insecure.into());
    }

    /// Counts a login in the queue until the guard is dropped.
    pub fn login_queued(&self) -> GaugeGuard {
        GaugeGuard::new(&self.queue)
    }
}

/// Counts one in a gauge until it is dropped.
#[derive(Debug)]
pub struct GaugeGuard(IntGauge);

impl GaugeGuard {
    fn new(gauge: &IntGauge) -> Self {
        gauge.inc();
        Self(gauge.clone())
    }
}

impl Drop for GaugeGuard {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// Login counters of one backend, by mechanism and outcome.
#[derive(Debug)]
struct LoginCounters([[IntCounter; LoginOutcome::ALL.len()]; Mechanism::ALL.len()]);

impl LoginCounters {
    fn new(families: &Families, backend: &str) -> Self {
        Self(Mechanism::ALL.map(|mechanism| {
            LoginOutcome::ALL
                .map(|outcome| families.logins.with_label_values(&[backend, mechanism.as_str(), outcome.as_str()]))
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn metrics() -> Metrics {
        Metrics::new(&Names {
            listeners: vec!["[::]:993".into()],
            backends: vec!["shard-a".into()],
            routes: vec!["table".into()],
        })
    }

    #[test]
    fn every_series_exists_before_the_first_event() {
        let text = metrics().render();
        for line in [
            r#"vestibule_logins_total{backend="",mechanism="login",outcome="unknown_user"} 0"#,
            r#"vestibule_logins_total{backend="shard-a",mechanism="sasl-plain",outcome="accepted"} 0"#,
            r#"vestibule_failures_total{reason="starttls_injection",side="client"} 0"#,
            r#"vestibule_bytes_total{backend="shard-a",direction="to_client"} 0"#,
            "process_resident_memory_bytes",
        ] {
            assert!(text.contains(line), "{line} is missing in\n{text}");
        }
    }

    #[test]
    fn gauge_decreases_when_the_guard_is_dropped() {
        let metrics = metrics();
        let open = metrics.listener(0).connection_opened();
        assert!(metrics.render().contains(r#"vestibule_connections{listener="[::]:993"} 1"#));
        drop(open);
        let text = metrics.render();
        assert!(text.contains(r#"vestibule_connections{listener="[::]:993"} 0"#), "{text}");
        assert!(text.contains(r#"vestibule_connections_total{listener="[::]:993"} 1"#), "{text}");
    }

    #[test]
    fn forgotten_server_has_no_series() {
        let metrics = metrics();
        metrics.backend(0).server("mail-1:143").set_up(false);
        assert!(metrics.render().contains(r#"vestibule_server_up{backend="shard-a",server="mail-1:143"} 0"#));
        metrics.backend(0).forget_server("mail-1:143");
        assert!(!metrics.render().contains("mail-1:143"));
    }
}
