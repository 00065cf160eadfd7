//! Names, help texts, labels and buckets of all metrics, each declared once.

use prometheus::core::Collector;
use prometheus::process_collector::ProcessCollector;
use prometheus::{
    GaugeVec, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry, Result,
};

/// Seconds from a millisecond to a minute: handshakes, lookups, logins.
const PHASE_BUCKETS: &[f64] =
    &[0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0];
/// Seconds from one to a week, because phones stay in IDLE for days.
const SESSION_BUCKETS: &[f64] =
    &[1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 1800.0, 3600.0, 14400.0, 43200.0, 86400.0, 259200.0, 604800.0];

/// Declares the metric families: a field and its type, the name, the help text, the labels and, for histograms, the buckets.
macro_rules! families {
    ($(
        $field:ident: $type:ty = $name:literal, $help:literal $(, labels $labels:expr)? $(, buckets $buckets:expr)?;
    )*) => {
        /// The metric families.
        #[derive(Debug)]
        pub(super) struct Families {
            pub(super) registry: Registry,
            $(pub(super) $field: $type,)*
        }

        impl Families {
            pub(super) fn new() -> Self {
                let registry = Registry::new();
                $(
                    let labels: Vec<&str> = [&[] as &[&str] $(, &$labels)?].concat();
                    let buckets: Vec<f64> = [&[] as &[f64] $(, $buckets)?].concat();
                    let $field = valid(<$type as Family>::create($name, $help, &labels, &buckets));
                    valid(registry.register(Box::new($field.clone())));
                )*
                valid(registry.register(Box::new(ProcessCollector::for_self())));
                Self { registry, $($field,)* }
            }
        }
    };
}

families! {
    build_info: IntGaugeVec = "vestibule_build_info", "Always 1; the label contains the version.", labels ["version"];

    connections: IntGaugeVec = "vestibule_connections",
        "Open client connections, before and after login.", labels ["listener"];
    connections_total: IntCounterVec = "vestibule_connections_total",
        "Client connections accepted.", labels ["listener"];
    connections_refused: IntCounterVec = "vestibule_connections_refused_total",
        "Client connections closed on arrival, by reason.", labels ["listener", "reason"];
    balancer_checks: IntCounterVec = "vestibule_balancer_checks_total",
        "Health checks by a balancer on a listener with proxy_protocol: a LOCAL header (local), or a connection without data (connect).",
        labels ["listener", "kind"];
    tls_handshake: HistogramVec = "vestibule_tls_handshake_seconds",
        "Duration of successful TLS handshakes with clients.", labels ["listener"], buckets PHASE_BUCKETS;
    before_login_memory: IntGauge = "vestibule_before_login_memory_bytes",
        "Memory of connections that have not logged in, counted against limits.before_login_memory.";
    admission_entries: IntGaugeVec = "vestibule_admission_entries",
        "Entries in the tables of limits and access rules.", labels ["table"];
    policy_answers: IntCounterVec = "vestibule_policy_answers_total",
        "Answers of the authentication policy service to queries (allow) and reports (report).", labels ["command", "answer"];

    logins: IntCounterVec = "vestibule_logins_total",
        "Login attempts by outcome; the backend is empty if the attempt ended before one was found.",
        labels ["backend", "mechanism", "outcome"];
    login: HistogramVec = "vestibule_login_seconds",
        "Duration of successful logins, from the client's complete command to the OK.",
        labels ["backend"], buckets PHASE_BUCKETS;
    failures: IntCounterVec = "vestibule_failures_total",
        "Failures by the side at fault and the reason.", labels ["side", "reason"];

    route_lookup: HistogramVec = "vestibule_route_lookup_seconds",
        "Duration of lookups in a route, cached results included.", labels ["route"], buckets PHASE_BUCKETS;
    route_lookups: IntCounterVec = "vestibule_route_lookups_total",
        "Lookups in a route by result.", labels ["route", "result"];
    route_query: HistogramVec = "vestibule_route_query_seconds",
        "Duration of queries to the service behind a route, without cached and shared results.",
        labels ["route"], buckets PHASE_BUCKETS;
    route_cache: IntCounterVec = "vestibule_route_cache_total",
        "Route cache lookups by result: hit, miss, or stale while the service fails.", labels ["route", "state"];
    route_cached: IntGaugeVec = "vestibule_route_cached_users", "Results in the route cache.", labels ["route"];
    route_failing: IntGaugeVec = "vestibule_route_failing",
        "1 while the last query to the service behind a route has failed.", labels ["route"];
    table_users: IntGaugeVec = "vestibule_table_users", "Entries of a table that is held in memory.", labels ["route"];
    table_load_failed: IntGaugeVec = "vestibule_table_load_failed",
        "1 while the file of a route is invalid and an older version is in use.", labels ["route"];

    backend_sessions: IntGaugeVec = "vestibule_backend_sessions", "Sessions being relayed.", labels ["backend"];
    backend_sessions_total: IntCounterVec = "vestibule_backend_sessions_total",
        "Sessions established after a successful login.", labels ["backend"];
    backend_queue: IntGaugeVec = "vestibule_backend_queue_length",
        "Logins that wait because all servers have reached max_sessions.", labels ["backend"];
    backend_insecure: IntGaugeVec = "vestibule_backend_insecure",
        "1 if the certificates of the backend's servers are not verified.", labels ["backend"];
    session_duration: HistogramVec = "vestibule_session_seconds",
        "Duration of sessions, from the accepted connection to its end.", labels ["backend"], buckets SESSION_BUCKETS;
    parked_sessions: IntGauge = "vestibule_parked_sessions",
        "Idle sessions that are parked: they use no task and no buffer until data arrives.";
    bytes: IntCounterVec = "vestibule_bytes_total",
        "Bytes relayed after login, before encryption.", labels ["backend", "direction"];

    server_connect: HistogramVec = "vestibule_server_connect_seconds",
        "Duration of successful TCP connects to servers.", labels ["backend"], buckets PHASE_BUCKETS;
    server_login: HistogramVec = "vestibule_server_login_seconds",
        "Time from the TCP connection to the server's answer to the login, TLS included.",
        labels ["backend"], buckets PHASE_BUCKETS;
    server_up: IntGaugeVec = "vestibule_server_up",
        "1 if the server is available: its checks pass, its breaker is closed, and its administrative state is not down.",
        labels ["backend", "server"];
    server_breaker: IntGaugeVec = "vestibule_server_breaker",
        "State of the circuit breaker: 0 closed, 1 half-open (one trial login), 2 open after failed logins.",
        labels ["backend", "server"];
    server_state: IntGaugeVec = "vestibule_server_state",
        "Administrative state of the server: 0 up, 1 drain (no new logins), 2 down (no new logins, no checks).",
        labels ["backend", "server"];
    server_checks: IntCounterVec = "vestibule_server_checks_total",
        "Health checks of servers by kind and outcome.", labels ["backend", "server", "kind", "outcome"];
    server_check: HistogramVec = "vestibule_server_check_seconds",
        "Duration of health checks.", labels ["backend"], buckets PHASE_BUCKETS;
    server_certificate: GaugeVec = "vestibule_server_certificate_expiry_timestamp_seconds",
        "Expiry of the certificate that the server sent in the last check, in seconds since 1970.", labels ["backend", "server"];
    server_trusts: IntGaugeVec = "vestibule_server_trusts_id",
        "Whether the server reports that it trusts the ID command of this proxy, as Dovecot 2.4 does: 1 yes, 0 no longer, -1 unknown.",
        labels ["backend", "server"];
    server_sessions: IntGaugeVec = "vestibule_server_sessions",
        "Sessions being relayed to the server.", labels ["backend", "server"];
    server_disconnects: IntGaugeVec = "vestibule_server_disconnects_pending",
        "Clients of sessions that the server has ended, which are disconnected gradually.", labels ["backend", "server"];

    certificate_expiry: GaugeVec = "vestibule_certificate_expiry_timestamp_seconds",
        "Expiry of a served certificate, in seconds since 1970.", labels ["certificate"];
    certificate_load_failed: IntGaugeVec = "vestibule_certificate_load_failed",
        "1 while the files of a certificate are unusable and the version loaded before is served.", labels ["certificate"];
    ticket_keys_load_failed: IntGauge = "vestibule_ticket_keys_load_failed",
        "1 while the files of ticket keys are unusable and the keys loaded before are in use.";

    draining: IntGauge = "vestibule_draining", "1 after the process has begun to stop.";
    reloads: IntCounterVec = "vestibule_reloads_total", "Reloads of the configuration by outcome.", labels ["outcome"];
    reload_failed: IntGauge = "vestibule_reload_failed",
        "1 while the last reload has failed and an older configuration is in use.";
    state_file_failed: IntGauge = "vestibule_state_file_failed",
        "1 if the state file could not be read at the start, or written at the last change of a server's state.";
    panics: IntCounter = "vestibule_panics_total", "Panics; each ended at most one session.";
    log_lines_dropped: IntCounter = "vestibule_log_lines_dropped_total",
        "Log lines dropped because standard error was not read in time or could not be written.";
}

/// A type of metric families.
trait Family: Collector + Clone + Sized + 'static {
    fn create(name: &str, help: &str, labels: &[&str], buckets: &[f64]) -> Result<Self>;
}

impl Family for IntGauge {
    fn create(name: &str, help: &str, _: &[&str], _: &[f64]) -> Result<Self> {
        Self::new(name, help)
    }
}

impl Family for IntCounter {
    fn create(name: &str, help: &str, _: &[&str], _: &[f64]) -> Result<Self> {
        Self::new(name, help)
    }
}

impl Family for IntGaugeVec {
    fn create(name: &str, help: &str, labels: &[&str], _: &[f64]) -> Result<Self> {
        Self::new(Opts::new(name, help), labels)
    }
}

impl Family for GaugeVec {
    fn create(name: &str, help: &str, labels: &[&str], _: &[f64]) -> Result<Self> {
        Self::new(Opts::new(name, help), labels)
    }
}

impl Family for IntCounterVec {
    fn create(name: &str, help: &str, labels: &[&str], _: &[f64]) -> Result<Self> {
        Self::new(Opts::new(name, help), labels)
    }
}

impl Family for HistogramVec {
    fn create(name: &str, help: &str, labels: &[&str], buckets: &[f64]) -> Result<Self> {
        Self::new(HistogramOpts::new(name, help).buckets(buckets.to_vec()), labels)
    }
}

/// The arguments are constants of this file; creating the families once in a test shows that they are well formed and unique.
fn valid<T>(result: Result<T>) -> T {
    result.expect("the constant names, labels and buckets of this file are valid and unique")
}
