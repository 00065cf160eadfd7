//! Every metric: names, help texts, labels, buckets, and methods named after what happened.
//!
//! Children are resolved once, when the configuration is built, so that the path of a login does no label look-up.
//! Labels are bounded: listeners, backends, routes and servers come from the configuration (or from an SRV record,
//! whose servers are dropped again with [`BackendMetrics::forget_server`]), the rest from closed enums. No label ever
//! holds a user, an address of a client or a text that a peer sent. Each instance has a registry of its own: nothing
//! here is global.

pub(crate) mod endpoint;
mod families;
mod guard;
mod route;
mod server;

use std::sync::Arc;
use std::time::Duration;

use prometheus::{Histogram, IntCounter, IntGauge, TextEncoder};

use self::families::Families;
pub use self::guard::{PolicyAnswer, PolicyCommand};
pub use self::route::{LookupOutcome, RouteMetrics};
use self::server::ServerFamilies;
pub use self::server::{CheckMetrics, ServerMetrics};
use crate::failure::Reason;
use crate::identity::Mechanism;

/// How a login attempt ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LoginOutcome {
    /// A server took it.
    Accepted,
    /// A server, or a policy of ours, said no.
    Refused,
    /// No server could answer, or the look-up failed.
    Unavailable,
    /// No route knows the user.
    UnknownUser,
    /// A limit or rate of the proxy, before or after the password was checked, or a limit of the user on the server.
    Limited,
    /// The connection ended before the login had an answer.
    Abandoned,
}

impl LoginOutcome {
    const ALL: [Self; 6] =
        [Self::Accepted, Self::Refused, Self::Unavailable, Self::UnknownUser, Self::Limited, Self::Abandoned];

    /// Label text.
    pub fn as_str(self) -> &'static str {
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

/// The configured names that become label values, in the configuration's order.
#[derive(Debug, Default)]
pub struct Names {
    /// Addresses as written.
    pub listeners: Vec<String>,
    /// Backend names.
    pub backends: Vec<String>,
    /// Route labels.
    pub routes: Vec<String>,
}

/// All metrics of one running instance.
#[derive(Debug)]
pub struct Metrics {
    families: Arc<Families>,
    listeners: Vec<ListenerMetrics>,
    backends: Vec<BackendMetrics>,
    routes: Vec<RouteMetrics>,
    unrouted_logins: LoginCounters,
    failures: Vec<IntCounter>,
    policy: [[IntCounter; PolicyAnswer::ALL.len()]; PolicyCommand::ALL.len()],
}

impl Metrics {
    /// Registers everything for the given names.
    pub fn new(names: &Names) -> Self {
        let families = Families::new();
        families.build_info.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
        Self::of(Arc::new(families), names)
    }

    /// The same counts, resolved for the names of another configuration.
    pub fn renewed(&self, names: &Names) -> Self {
        Self::of(self.families.clone(), names)
    }

    fn of(families: Arc<Families>, names: &Names) -> Self {
        let failures = Reason::ALL
            .iter()
            .map(|reason| families.failures.with_label_values(&[reason.side().as_str(), reason.as_str()]))
            .collect();
        Self {
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

    /// Ends the series of states that `successor` no longer has: nobody would ever set them again. Counters stay, and so do
    /// gauges of sessions, which are open yet.
    pub fn retire(&self, successor: &Self) {
        for route in &self.routes {
            if !successor.routes.iter().any(|other| other.label() == route.label()) {
                route.forget(&self.families);
            }
        }
        for backend in &self.backends {
            if !successor.backends.iter().any(|other| other.name == backend.name) {
                // An error says that the series does not exist, which is what is asked for.
                let _ = self.families.insecure.remove_label_values(&[&backend.name]);
                let _ = self.families.queue.remove_label_values(&[&backend.name]);
            }
        }
        self.families.certificate_expiry.reset();
        self.families.certificate_load_failed.reset();
    }

    /// The text that Prometheus scrapes.
    pub fn render(&self) -> String {
        TextEncoder::new().encode_to_string(&self.families.registry.gather()).unwrap_or_else(|error| {
            tracing::error!(%error, "metrics could not be rendered");
            String::new()
        })
    }

    /// Metrics of the listener at this place in the configuration.
    pub fn listener(&self, index: usize) -> &ListenerMetrics {
        &self.listeners[index]
    }

    /// Metrics of the backend at this place in the configuration.
    pub fn backend(&self, index: usize) -> &BackendMetrics {
        &self.backends[index]
    }

    /// Metrics of the route at this place in the configuration.
    pub fn route(&self, index: usize) -> &RouteMetrics {
        &self.routes[index]
    }

    /// A login attempt was answered; `backend` is absent where the attempt was never routed.
    pub fn login(&self, backend: Option<usize>, mechanism: Mechanism, outcome: LoginOutcome) {
        let counters = backend.map_or(&self.unrouted_logins, |index| &self.backends[index].logins);
        counters.0[mechanism as usize][outcome as usize].inc();
    }

    /// Something failed, for this reason.
    pub fn failure(&self, reason: Reason) {
        self.failures[reason as usize].inc();
    }

    /// The policy service has answered, or failed to.
    pub fn policy(&self, command: PolicyCommand, answer: PolicyAnswer) {
        self.policy[command as usize][answer as usize].inc();
    }

    /// A certificate was loaded that ends at `expiry` (seconds since 1970).
    pub fn certificate(&self, file: &str, expiry: i64) {
        #[expect(clippy::cast_precision_loss, reason = "seconds since 1970 fit an f64 exactly for 285 million years")]
        self.families.certificate_expiry.with_label_values(&[file]).set(expiry as f64);
    }

    /// Reads what the guard remembers, table by table, and the bytes of `limits.before_login_memory` in use, whenever metrics are
    /// collected. Once for a process.
    pub fn measure_guard(
        &self,
        read_entries: impl Fn() -> Vec<(&'static str, usize)> + Send + Sync + 'static,
        read_memory: impl Fn() -> usize + Send + Sync + 'static,
    ) {
        let (entries, memory) = (self.families.guard_entries.clone(), self.families.before_login_memory.clone());
        let measured = guard::Measured { entries, memory, read_entries, read_memory };
        if let Err(error) = self.families.registry.register(Box::new(measured)) {
            tracing::error!(%error, "the guard is measured already");
        }
    }

    /// The certificate's files could be used as they are now, or not.
    pub fn certificate_load_failed(&self, file: &str, failed: bool) {
        self.families.certificate_load_failed.with_label_values(&[file]).set(failed.into());
    }

    /// The files of ticket keys could be used as they are now, or not.
    pub fn ticket_keys_load_failed(&self, failed: bool) {
        self.families.ticket_keys_load_failed.set(failed.into());
    }

    /// The gauge of silent sessions, for the room they wait in.
    pub fn silent_sessions(&self) -> IntGauge {
        self.families.silent.clone()
    }

    /// A configuration was to be loaded again, and was or was not.
    pub fn reloaded(&self, succeeded: bool) {
        let outcome = if succeeded { "loaded" } else { "refused" };
        self.families.reloads.with_label_values(&[outcome]).inc();
        self.families.reload_failed.set((!succeeded).into());
    }

    /// Whether the last use of the state file failed.
    pub fn state_file_failed(&self, failed: bool) {
        self.families.state_file_failed.set(failed.into());
    }

    /// The process has begun to stop.
    pub fn draining(&self) {
        self.families.draining.set(1);
    }

    /// The counter a panic hook raises.
    pub fn panics(&self) -> IntCounter {
        self.families.panics.clone()
    }

    /// The counter of log lines that were dropped.
    pub fn log_lines_dropped(&self) -> IntCounter {
        self.families.log_lines_dropped.clone()
    }
}

/// Why a connection was turned away at the door.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// `limits.sessions` reached.
    Full,
    /// accept(2) failed, for example for want of descriptors.
    AcceptError,
    /// `access`.
    Denied,
    /// `limits.connection_rate`.
    Rate,
    /// `limits.sessions_per_address`.
    Address,
    /// `limits.networks`.
    Network,
    /// `limits.before_login`: all places are taken by logins under way.
    BeforeLogin,
}

impl Refusal {
    const ALL: [Self; 7] =
        [Self::Full, Self::AcceptError, Self::Denied, Self::Rate, Self::Address, Self::Network, Self::BeforeLogin];

    /// Label text.
    pub fn as_str(self) -> &'static str {
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

/// How a balancer tests a listener with `proxy_protocol`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BalancerCheck {
    /// By a header with LOCAL.
    Local,
    /// By a connection that is closed without a byte.
    Connect,
}

impl BalancerCheck {
    const ALL: [Self; 2] = [Self::Local, Self::Connect];

    /// Label text.
    pub fn as_str(self) -> &'static str {
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
    sessions: IntGauge,
    sessions_total: IntCounter,
    refused: [IntCounter; Refusal::ALL.len()],
    tls_handshake: Histogram,
}

impl ListenerMetrics {
    fn new(families: &Families, name: &str) -> Self {
        Self {
            sessions: families.sessions.with_label_values(&[name]),
            sessions_total: families.sessions_total.with_label_values(&[name]),
            refused: Refusal::ALL.map(|refusal| families.refused.with_label_values(&[name, refusal.as_str()])),
            tls_handshake: families.tls_handshake.with_label_values(&[name]),
            balancer_checks: BalancerCheck::ALL
                .map(|check| families.balancer_checks.with_label_values(&[name, check.as_str()])),
        }
    }

    /// A client connected; the session counts as open until the guard drops.
    pub fn session_opened(&self) -> OpenGuard {
        self.sessions_total.inc();
        OpenGuard::new(&self.sessions)
    }

    /// A connection was turned away.
    pub fn refused(&self, refusal: Refusal) {
        self.refused[refusal as usize].inc();
    }

    /// A balancer tested the listener.
    pub fn balancer_check(&self, check: BalancerCheck) {
        self.balancer_checks[check as usize].inc();
    }

    /// A TLS handshake with a client succeeded.
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
    session_length: Histogram,
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
            session_length: families.session_length.with_label_values(one),
            to_client: families.bytes.with_label_values(&[name, "to_client"]),
            to_server: families.bytes.with_label_values(&[name, "to_server"]),
            queue: families.queue.with_label_values(one),
            servers: ServerFamilies::new(families, name),
            insecure: families.insecure.with_label_values(one),
        }
    }

    /// A session was handed to the backend; it counts as open until the guard drops.
    pub fn session_established(&self) -> OpenGuard {
        self.sessions_total.inc();
        OpenGuard::new(&self.sessions)
    }

    /// A relayed session ended after `length`.
    pub fn session_ended(&self, length: Duration) {
        self.session_length.observe(length.as_secs_f64());
    }

    /// A connection to a server stood after `took`.
    pub fn server_connected(&self, took: Duration) {
        self.server_connect.observe(took.as_secs_f64());
    }

    /// A server answered a login after `took`, counted from the connection.
    pub fn server_answered(&self, took: Duration) {
        self.server_login.observe(took.as_secs_f64());
    }

    /// A login succeeded `took` after the client's command was complete.
    pub fn logged_in(&self, took: Duration) {
        self.login.observe(took.as_secs_f64());
    }

    /// Counters of relayed bytes: to the client, to the server.
    pub fn byte_counters(&self) -> (IntCounter, IntCounter) {
        (self.to_client.clone(), self.to_server.clone())
    }

    /// Whether certificates of this backend's servers go unchecked.
    pub fn set_insecure(&self, insecure: bool) {
        self.insecure.set(insecure.into());
    }

    /// A login waits for a place, until the guard drops.
    pub fn login_queued(&self) -> OpenGuard {
        OpenGuard::new(&self.queue)
    }
}

/// One more of something, until dropped.
#[derive(Debug)]
pub struct OpenGuard(IntGauge);

impl OpenGuard {
    fn new(gauge: &IntGauge) -> Self {
        gauge.inc();
        Self(gauge.clone())
    }
}

impl Drop for OpenGuard {
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
    fn guards_count_down_again() {
        let metrics = metrics();
        let open = metrics.listener(0).session_opened();
        assert!(metrics.render().contains(r#"vestibule_sessions{listener="[::]:993"} 1"#));
        drop(open);
        let text = metrics.render();
        assert!(text.contains(r#"vestibule_sessions{listener="[::]:993"} 0"#), "{text}");
        assert!(text.contains(r#"vestibule_sessions_total{listener="[::]:993"} 1"#), "{text}");
    }

    #[test]
    fn a_server_gone_from_dns_leaves_no_series() {
        let metrics = metrics();
        metrics.backend(0).server("mail-1:143").set_up(false);
        assert!(metrics.render().contains(r#"vestibule_server_up{backend="shard-a",server="mail-1:143"} 0"#));
        metrics.backend(0).forget_server("mail-1:143");
        assert!(!metrics.render().contains("mail-1:143"));
    }
}
