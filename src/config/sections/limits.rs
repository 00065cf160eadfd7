//! `limits`: deadlines, sizes and counts. `admission` checks those that count clients, addresses and users.

use std::time::Duration;

use serde::Deserialize;
use serde_yaml::Value;

use crate::config::yaml::{Count, DurationText, OrOff, RateText, Section, Size, seconds};

const HOUR: u64 = 3600;
const DAY: u64 = 24 * HOUR;

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct LimitsSection {
    proxy_header: Option<DurationText>,
    handshake: Option<DurationText>,
    login: Option<DurationText>,
    lookup: Option<DurationText>,
    connect: Option<DurationText>,
    server_login: Option<DurationText>,
    pub(super) line: Option<Size>,
    pub(super) literal: Option<Size>,
    bad_commands: Option<i64>,
    failed_logins: Option<i64>,
    idle: Option<OrOff<DurationText>>,
    half_close: Option<DurationText>,
    stall: Option<DurationText>,
    max_disconnect_delay: Option<OrOff<DurationText>>,
    drain: Option<DurationText>,
    ready_delay: Option<DurationText>,
    keepalive: Option<OrOff<DurationText>>,
    sessions: Option<i64>,
    workers: Option<i64>,
    untagged_lines: Option<i64>,
    untagged_bytes: Option<Size>,
    // The keys below belong to `AdmissionConfig`.
    pub(super) handshakes: Option<i64>,
    pub(super) before_login: Option<i64>,
    pub(super) before_login_memory: Option<Size>,
    pub(super) sessions_per_address: Option<OrOff<Count>>,
    pub(super) sessions_per_user: Option<OrOff<Count>>,
    pub(super) sessions_per_user_and_address: Option<OrOff<Count>>,
    pub(super) networks: Vec<Value>,
    pub(super) connection_rate: Option<OrOff<RateText>>,
    pub(super) login_rate_per_address: Option<OrOff<RateText>>,
    pub(super) login_rate_per_user: Option<OrOff<RateText>>,
    pub(super) tracked: Option<i64>,
    pub(super) failed_login_delay: Option<OrOff<DurationText>>,
    pub(super) failed_login_delay_max: Option<DurationText>,
}

/// Deadlines, sizes and counts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// From the accepted connection to the end of its PROXY header, on listeners that require one.
    pub proxy_header: Duration,
    /// A TLS handshake with a client.
    pub handshake: Duration,
    /// From the accepted connection to the last login command, whatever the client sends in between.
    pub login: Duration,
    /// One lookup over all routes.
    pub lookup: Duration,
    /// From the first SYN to a server to its first byte, including TLS.
    pub connect: Duration,
    /// One login over all servers that are tried.
    pub server_login: Duration,
    /// Bytes of a command line or a SASL response before login.
    pub line: usize,
    /// Bytes of all literals of one command before login.
    pub literal: usize,
    /// Number of the bad command that closes the connection.
    pub bad_commands: u32,
    /// Number of the failed login that closes the connection.
    pub failed_logins: u32,
    /// Silence that ends a relayed session; at least 30 minutes (RFC 9051 section 5.4).
    pub idle: Option<Duration>,
    /// Silence that ends a relayed session of which one side has closed its direction.
    pub half_close: Duration,
    /// Time without progress that ends a relayed session, if a side does not accept bytes that are ready for it.
    pub stall: Duration,
    /// Maximum delay before a client is disconnected whose server has failed, so that clients do not reconnect all at once;
    /// `None` disconnects immediately.
    pub max_disconnect_delay: Option<Duration>,
    /// Time in which relayed sessions may finish when the process stops.
    pub drain: Duration,
    /// Time between the start of a shutdown, when `/ready` begins to fail, and the end of accepting connections.
    pub ready_delay: Duration,
    /// Silence after which TCP probes the peer (Linux allows nine hours at most).
    pub keepalive: Option<Duration>,
    /// Open client connections, logged in or not.
    pub sessions: usize,
    /// Threads that serve sessions.
    pub workers: usize,
    /// Lines that a server may send before its tagged response to a login.
    pub untagged_lines: usize,
    /// Bytes of those lines.
    pub untagged_bytes: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            proxy_header: Duration::from_secs(3),
            handshake: Duration::from_secs(10),
            login: Duration::from_secs(60),
            lookup: Duration::from_secs(5),
            connect: Duration::from_secs(5),
            server_login: Duration::from_secs(30),
            // A token of 64 KiB in base64.
            line: 96 * 1024,
            literal: 64 * 1024,
            bad_commands: 3,
            failed_logins: 5,
            idle: None,
            half_close: Duration::from_secs(60),
            stall: Duration::from_secs(300),
            max_disconnect_delay: Some(Duration::from_secs(30)),
            drain: Duration::from_secs(60),
            ready_delay: Duration::ZERO,
            keepalive: Some(Duration::from_secs(120)),
            sessions: 100_000,
            workers: std::thread::available_parallelism().map_or(1, usize::from),
            untagged_lines: 64,
            untagged_bytes: 64 * 1024,
        }
    }
}

impl LimitsSection {
    pub(super) fn check(self, section: &mut Section<'_>) -> Limits {
        let default = Limits::default();
        let deadlines = self.check_login_deadlines(section);
        let deadlines = self.check_session_deadlines(section, deadlines);
        Limits {
            line: section.size("line", self.line, default.line, 1024..=16 << 20),
            literal: section.size("literal", self.literal, default.literal, 256..=16 << 20),
            untagged_bytes: section.size(
                "untagged_bytes",
                self.untagged_bytes,
                default.untagged_bytes,
                1024..=16 << 20,
            ),
            bad_commands: section.number("bad_commands", self.bad_commands, default.bad_commands, 1..=1000),
            failed_logins: section.number("failed_logins", self.failed_logins, default.failed_logins, 1..=1000),
            sessions: section.count("sessions", self.sessions, default.sessions, 1..=10_000_000),
            workers: section.count("workers", self.workers, default.workers, 1..=1024),
            untagged_lines: section.count("untagged_lines", self.untagged_lines, default.untagged_lines, 1..=100_000),
            ..deadlines
        }
    }

    fn check_login_deadlines(&self, section: &mut Section<'_>) -> Limits {
        let default = Limits::default();
        Limits {
            proxy_header: section.duration("proxy_header", self.proxy_header, default.proxy_header, seconds(0, 60)),
            handshake: section.duration("handshake", self.handshake, default.handshake, seconds(1, 300)),
            login: section.duration("login", self.login, default.login, seconds(1, HOUR)),
            lookup: section.duration("lookup", self.lookup, default.lookup, seconds(0, 300)),
            connect: section.duration("connect", self.connect, default.connect, seconds(0, 300)),
            server_login: section.duration("server_login", self.server_login, default.server_login, seconds(0, 600)),
            ..default
        }
    }

    fn check_session_deadlines(&self, section: &mut Section<'_>, limits: Limits) -> Limits {
        let default = Limits::default();
        // Unlike a deadline, this delay may be zero.
        let ready_delays = Duration::ZERO..=Duration::from_secs(HOUR);
        Limits {
            half_close: section.duration("half_close", self.half_close, default.half_close, seconds(1, HOUR)),
            stall: section.duration("stall", self.stall, default.stall, seconds(10, DAY)),
            max_disconnect_delay: section.duration_or_off(
                "max_disconnect_delay",
                self.max_disconnect_delay,
                default.max_disconnect_delay,
                seconds(1, HOUR),
            ),
            ready_delay: section.duration("ready_delay", self.ready_delay, default.ready_delay, ready_delays),
            drain: section.duration("drain", self.drain, default.drain, seconds(0, 7 * DAY)),
            idle: section.duration_or_off("idle", self.idle, default.idle, seconds(1800, 30 * DAY)),
            keepalive: section.duration_or_off("keepalive", self.keepalive, default.keepalive, seconds(10, DAY)),
            ..limits
        }
    }
}
