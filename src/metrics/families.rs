//! Names, help texts, labels and buckets of all metrics: the one place where they stand.

use prometheus::{
    GaugeVec, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry,
};

/// Seconds from a millisecond to a minute: handshakes, look-ups, logins.
const PHASE_BUCKETS: &[f64] =
    &[0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0];
/// Seconds from one to a week: phones stay in IDLE for days.
const SESSION_BUCKETS: &[f64] =
    &[1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 1800.0, 3600.0, 14400.0, 43200.0, 86400.0, 259200.0, 604800.0];

/// The metric families: the one place where names and help texts stand.
#[derive(Debug)]
pub(super) struct Families {
    pub(super) registry: Registry,
    pub(super) build_info: IntGaugeVec,
    pub(super) sessions: IntGaugeVec,
    pub(super) sessions_total: IntCounterVec,
    pub(super) refused: IntCounterVec,
    pub(super) balancer_checks: IntCounterVec,
    pub(super) backend_sessions: IntGaugeVec,
    pub(super) backend_sessions_total: IntCounterVec,
    pub(super) logins: IntCounterVec,
    pub(super) tls_handshake: HistogramVec,
    pub(super) route_lookup: HistogramVec,
    pub(super) lookups: IntCounterVec,
    pub(super) server_connect: HistogramVec,
    pub(super) server_login: HistogramVec,
    pub(super) login: HistogramVec,
    pub(super) session_length: HistogramVec,
    pub(super) bytes: IntCounterVec,
    pub(super) failures: IntCounterVec,
    pub(super) guard_entries: IntGaugeVec,
    pub(super) before_login_memory: IntGauge,
    pub(super) policy_answers: IntCounterVec,
    pub(super) queue: IntGaugeVec,
    pub(super) server_up: IntGaugeVec,
    pub(super) server_breaker: IntGaugeVec,
    pub(super) server_state: IntGaugeVec,
    pub(super) server_checks: IntCounterVec,
    pub(super) server_check: HistogramVec,
    pub(super) server_certificate: GaugeVec,
    pub(super) server_trusts: IntGaugeVec,
    pub(super) server_sessions: IntGaugeVec,
    pub(super) server_kept: IntGaugeVec,
    pub(super) certificate_expiry: GaugeVec,
    pub(super) certificate_load_failed: IntGaugeVec,
    pub(super) ticket_keys_load_failed: IntGauge,
    pub(super) table_users: IntGaugeVec,
    pub(super) load_failed: IntGaugeVec,
    pub(super) route_asked: HistogramVec,
    pub(super) route_cache: IntCounterVec,
    pub(super) route_cached: IntGaugeVec,
    pub(super) route_failing: IntGaugeVec,
    pub(super) insecure: IntGaugeVec,
    pub(super) silent: IntGauge,
    pub(super) draining: IntGauge,
    pub(super) reloads: IntCounterVec,
    pub(super) reload_failed: IntGauge,
    pub(super) state_file_failed: IntGauge,
    pub(super) panics: IntCounter,
    pub(super) log_lines_dropped: IntCounter,
}

impl Families {
    pub(super) fn new() -> Self {
        let registry = Registry::new();
        let families = Self {
            build_info: gauges("vestibule_build_info", "Always 1; the version is in the label.", &["version"]),
            sessions: gauges("vestibule_sessions", "Open client connections, logged in or not.", &["listener"]),
            sessions_total: counters("vestibule_sessions_total", "Client connections accepted.", &["listener"]),
            refused: counters(
                "vestibule_connections_refused_total",
                "Client connections turned away at the door, by reason.",
                &["listener", "reason"],
            ),
            balancer_checks: counters(
                "vestibule_balancer_checks_total",
                "Connections by which a balancer tests a listener with proxy_protocol: a LOCAL header, or closed without a byte (connect).",
                &["listener", "kind"],
            ),
            backend_sessions: gauges("vestibule_backend_sessions", "Logged-in sessions being relayed.", &["backend"]),
            backend_sessions_total: counters(
                "vestibule_backend_sessions_total",
                "Sessions handed to a server after a successful login.",
                &["backend"],
            ),
            logins: counters(
                "vestibule_logins_total",
                "Login attempts by outcome; the backend is empty if none was found, or if the attempt ended before.",
                &["backend", "mechanism", "outcome"],
            ),
            tls_handshake: histograms(
                "vestibule_tls_handshake_seconds",
                "TLS handshakes with clients that succeeded.",
                PHASE_BUCKETS,
                &["listener"],
            ),
            route_lookup: histograms(
                "vestibule_route_lookup_seconds",
                "Time a route took to answer.",
                PHASE_BUCKETS,
                &["route"],
            ),
            lookups: counters(
                "vestibule_route_lookups_total",
                "Questions to a route, by its answer.",
                &["route", "result"],
            ),
            server_connect: histograms(
                "vestibule_server_connect_seconds",
                "TCP connections to servers that succeeded.",
                PHASE_BUCKETS,
                &["backend"],
            ),
            server_login: histograms(
                "vestibule_server_login_seconds",
                "From the connection to the server's answer to the login, TLS included.",
                PHASE_BUCKETS,
                &["backend"],
            ),
            login: histograms(
                "vestibule_login_seconds",
                "Whole successful logins, from the client's complete command to the OK.",
                PHASE_BUCKETS,
                &["backend"],
            ),
            session_length: histograms(
                "vestibule_session_seconds",
                "Length of relayed sessions, from the accepted connection to its end.",
                SESSION_BUCKETS,
                &["backend"],
            ),
            bytes: counters(
                "vestibule_bytes_total",
                "Bytes relayed after login, before encryption.",
                &["backend", "direction"],
            ),
            failures: counters(
                "vestibule_failures_total",
                "What went wrong, by the side that must act and the reason.",
                &["side", "reason"],
            ),
            guard_entries: gauges(
                "vestibule_guard_entries",
                "What the guard remembers and counts just now, by table.",
                &["table"],
            ),
            before_login_memory: valid(IntGauge::new(
                "vestibule_before_login_memory_bytes",
                "Memory of connections that have not logged in, counted against limits.before_login_memory.",
            )),
            policy_answers: counters(
                "vestibule_policy_answers_total",
                "Answers of the policy service to what it was asked (allow) and told (report).",
                &["command", "answer"],
            ),
            queue: gauges(
                "vestibule_backend_queue_length",
                "Logins that wait for a free place, because all servers have max_sessions.",
                &["backend"],
            ),
            server_up: gauges(
                "vestibule_server_up",
                "1 while the server is taken for alive: its checks pass, its breaker is closed, and it is not down by the operator's word.",
                &["backend", "server"],
            ),
            server_breaker: gauges(
                "vestibule_server_breaker",
                "0: closed; 1: one login tries the server out; 2: open after failed logins.",
                &["backend", "server"],
            ),
            server_state: gauges(
                "vestibule_server_state",
                "Administrative state of the server: 0 up, 1 drain (no new logins), 2 down (no new logins, no checks).",
                &["backend", "server"],
            ),
            server_checks: counters(
                "vestibule_server_checks_total",
                "Checks of servers, by their kind and how they ended.",
                &["backend", "server", "kind", "outcome"],
            ),
            server_check: histograms(
                "vestibule_server_check_seconds",
                "Length of checks, whatever their outcome.",
                PHASE_BUCKETS,
                &["backend"],
            ),
            server_certificate: float_gauges(
                "vestibule_server_certificate_expiry_timestamp_seconds",
                "When the certificate that a server showed its last check ends, in seconds since 1970.",
                &["backend", "server"],
            ),
            server_trusts: gauges(
                "vestibule_server_trusts_id",
                "1: the server says that it trusts our ID, as Dovecot 2.4 does; 0: it said so before and no longer does; -1: unknown.",
                &["backend", "server"],
            ),
            server_sessions: gauges(
                "vestibule_server_sessions",
                "Logged-in sessions being relayed to the server.",
                &["backend", "server"],
            ),
            server_kept: gauges(
                "vestibule_server_clients_kept",
                "Clients of sessions that the server has cut off, kept to be closed one after another.",
                &["backend", "server"],
            ),
            certificate_expiry: float_gauges(
                "vestibule_certificate_expiry_timestamp_seconds",
                "When a served certificate ends, in seconds since 1970.",
                &["certificate"],
            ),
            certificate_load_failed: gauges(
                "vestibule_certificate_load_failed",
                "1 while files of a certificate cannot be used and what was loaded before is served.",
                &["certificate"],
            ),
            ticket_keys_load_failed: valid(IntGauge::new(
                "vestibule_ticket_keys_load_failed",
                "1 while the files of ticket keys cannot be used and those loaded before are in use.",
            )),
            table_users: gauges("vestibule_table_users", "Entries a route holds in memory.", &["route"]),
            load_failed: gauges(
                "vestibule_table_load_failed",
                "1 while the file of a route has mistakes and an older version is in use.",
                &["route"],
            ),
            route_asked: histograms(
                "vestibule_route_question_seconds",
                "Questions to the source of a route, answers kept and shared left out.",
                PHASE_BUCKETS,
                &["route"],
            ),
            route_cache: counters(
                "vestibule_route_cache_total",
                "Look-ups by what the kept answers had: hit, miss, or stale while the source is down.",
                &["route", "state"],
            ),
            route_cached: gauges("vestibule_route_cached_users", "Answers a route keeps.", &["route"]),
            route_failing: gauges(
                "vestibule_route_failing",
                "1 while the last question to the source of a route failed.",
                &["route"],
            ),
            insecure: gauges(
                "vestibule_backend_insecure",
                "1 where certificates of the backend's servers are not checked.",
                &["backend"],
            ),
            silent: valid(IntGauge::new(
                "vestibule_silent_sessions",
                "Logged-in sessions that are silent just now and wait without a task or a buffer.",
            )),
            draining: valid(IntGauge::new("vestibule_draining", "1 once the process has begun to stop.")),
            reloads: counters(
                "vestibule_reloads_total",
                "Configurations loaded again, or refused for their mistakes.",
                &["outcome"],
            ),
            reload_failed: valid(IntGauge::new(
                "vestibule_reload_failed",
                "1 while the last configuration that was to be loaded had mistakes and an older one is in use.",
            )),
            state_file_failed: valid(IntGauge::new(
                "vestibule_state_file_failed",
                "1 while the state file could not be read at the start, or written at the last change of a server's state.",
            )),
            panics: valid(IntCounter::new("vestibule_panics_total", "Panics caught; each ended one session.")),
            log_lines_dropped: valid(IntCounter::new(
                "vestibule_log_lines_dropped_total",
                "Log lines dropped because standard error was not read in time or could not be written.",
            )),
            registry,
        };
        for outcome in ["loaded", "refused"] {
            families.reloads.with_label_values(&[outcome]);
        }
        families.register_all();
        families
    }

    fn register_all(&self) {
        let collectors: [Box<dyn prometheus::core::Collector>; 45] = [
            Box::new(self.build_info.clone()),
            Box::new(self.sessions.clone()),
            Box::new(self.sessions_total.clone()),
            Box::new(self.refused.clone()),
            Box::new(self.balancer_checks.clone()),
            Box::new(self.backend_sessions.clone()),
            Box::new(self.backend_sessions_total.clone()),
            Box::new(self.logins.clone()),
            Box::new(self.tls_handshake.clone()),
            Box::new(self.route_lookup.clone()),
            Box::new(self.lookups.clone()),
            Box::new(self.server_connect.clone()),
            Box::new(self.server_login.clone()),
            Box::new(self.login.clone()),
            Box::new(self.session_length.clone()),
            Box::new(self.bytes.clone()),
            Box::new(self.failures.clone()),
            Box::new(self.policy_answers.clone()),
            Box::new(self.queue.clone()),
            Box::new(self.server_up.clone()),
            Box::new(self.server_breaker.clone()),
            Box::new(self.server_state.clone()),
            Box::new(self.server_checks.clone()),
            Box::new(self.server_check.clone()),
            Box::new(self.server_certificate.clone()),
            Box::new(self.server_trusts.clone()),
            Box::new(self.server_sessions.clone()),
            Box::new(self.server_kept.clone()),
            Box::new(self.certificate_expiry.clone()),
            Box::new(self.certificate_load_failed.clone()),
            Box::new(self.ticket_keys_load_failed.clone()),
            Box::new(self.table_users.clone()),
            Box::new(self.load_failed.clone()),
            Box::new(self.route_asked.clone()),
            Box::new(self.route_cache.clone()),
            Box::new(self.route_cached.clone()),
            Box::new(self.route_failing.clone()),
            Box::new(self.insecure.clone()),
            Box::new(self.silent.clone()),
            Box::new(self.draining.clone()),
            Box::new(self.reloads.clone()),
            Box::new(self.reload_failed.clone()),
            Box::new(self.state_file_failed.clone()),
            Box::new(self.panics.clone()),
            Box::new(self.log_lines_dropped.clone()),
        ];
        for collector in collectors {
            valid(self.registry.register(collector));
        }
        valid(self.registry.register(Box::new(prometheus::process_collector::ProcessCollector::for_self())));
    }
}

fn gauges(name: &str, help: &str, labels: &[&str]) -> IntGaugeVec {
    valid(IntGaugeVec::new(Opts::new(name, help), labels))
}

fn float_gauges(name: &str, help: &str, labels: &[&str]) -> GaugeVec {
    valid(GaugeVec::new(Opts::new(name, help), labels))
}

fn counters(name: &str, help: &str, labels: &[&str]) -> IntCounterVec {
    valid(IntCounterVec::new(Opts::new(name, help), labels))
}

fn histograms(name: &str, help: &str, buckets: &[f64], labels: &[&str]) -> HistogramVec {
    valid(HistogramVec::new(HistogramOpts::new(name, help).buckets(buckets.to_vec()), labels))
}

/// Names and labels of this file are constants: that they are well formed and unique is what the test below shows.
fn valid<T>(result: prometheus::Result<T>) -> T {
    result.expect("the constant names, labels and buckets of this file are valid and unique")
}
