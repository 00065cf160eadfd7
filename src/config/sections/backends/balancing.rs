//! `balance`, `check`, `slow_start`, `breaker` and `queue` of a backend: how its servers are chosen, checked and limited.

use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;

use crate::config::error::Located;
use crate::config::sections::tls::TlsMode;
use crate::config::yaml::{DurationText, OrOff, Section, Shorthand, WordOrMap, seconds};
use crate::identity::UserName;

/// The bound of `bounded-hash`, unless `factor` is set.
const DEFAULT_FACTOR: f64 = 1.25;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct BalanceSection {
    kind: BalanceKind,
    factor: Option<f64>,
}

impl Shorthand for BalanceSection {
    const EXPECTED: &'static str =
        "user-hash, bounded-hash, least-sessions, round-robin, or a map with kind and factor";
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum BalanceKind {
    #[default]
    UserHash,
    BoundedHash,
    LeastSessions,
    RoundRobin,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct CheckSection {
    kind: CheckWord,
    interval: Option<DurationText>,
    timeout: Option<DurationText>,
    rise: Option<i64>,
    fall: Option<i64>,
    account: Option<String>,
    password_file: Option<PathBuf>,
}

impl Shorthand for CheckSection {
    const EXPECTED: &'static str = "off, tcp, tls, imap, login, or a map with kind and interval, timeout, rise or fall";
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum CheckWord {
    Off,
    Tcp,
    Tls,
    #[default]
    Imap,
    Login,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct BreakerSection {
    failures: Option<i64>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct QueueSection {
    length: Option<i64>,
    timeout: Option<DurationText>,
}

/// How the servers of a backend are chosen, checked and limited.
#[derive(Debug, Clone)]
pub struct BalancingConfig {
    /// How a server is chosen for a login.
    pub balance: Balance,
    /// Health checks of the servers.
    pub check: Option<Check>,
    /// Time in which a server that has recovered reaches its full weight.
    pub slow_start: Option<Duration>,
    /// Consecutive failed logins that open a server's breaker.
    pub failures: u32,
    /// Queue of logins, if servers have `max_sessions`.
    pub queue: Queue,
}

impl Default for BalancingConfig {
    fn default() -> Self {
        Self {
            balance: Balance::UserHash,
            check: Some(Check::default()),
            slow_start: None,
            failures: 3,
            queue: Queue::default(),
        }
    }
}

/// How a server of a backend is chosen for a login.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Balance {
    /// Always the same server for a user, while it is up.
    UserHash,
    /// As `UserHash`, but no server gets more than `factor` times its fair share.
    BoundedHash {
        /// From 1.01 to 10.
        factor: f64,
    },
    /// The one with fewer sessions of two servers drawn by weight.
    LeastSessions,
    /// The servers in turn.
    RoundRobin,
}

impl Balance {
    /// The word in the configuration.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::UserHash => "user-hash",
            Self::BoundedHash { .. } => "bounded-hash",
            Self::LeastSessions => "least-sessions",
            Self::RoundRobin => "round-robin",
        }
    }

    /// What determines the order of servers, for operators.
    pub fn decided_by(self) -> &'static str {
        match self {
            Self::UserHash => "the user's name decides; the next server is used while the first is failing",
            Self::BoundedHash { .. } => {
                "the user's name decides; the next server is used while the first is failing or has more than its share"
            }
            Self::LeastSessions => {
                "of two servers drawn by weight, the running process takes the one with fewer sessions; this order is an example"
            }
            Self::RoundRobin => "the running process takes the servers in turn; this is the order after its start",
        }
    }

    /// Whether a user must not be served by two servers at once, so that a login waits for its server instead of using
    /// another one.
    pub fn is_sticky(self) -> bool {
        self == Self::UserHash
    }

    pub(super) fn validate(section: &mut Section<'_>, raw: Option<WordOrMap<BalanceKind, BalanceSection>>) -> Self {
        let (kind, factor) = match raw {
            None => (BalanceKind::default(), None),
            Some(WordOrMap::Word(kind)) => (kind, None),
            Some(WordOrMap::Map(map)) => (map.kind, map.factor),
        };
        if factor.is_some() && kind != BalanceKind::BoundedHash {
            section.problem("factor", "requires kind: bounded-hash");
        }
        match kind {
            BalanceKind::UserHash => Self::UserHash,
            BalanceKind::LeastSessions => Self::LeastSessions,
            BalanceKind::RoundRobin => Self::RoundRobin,
            BalanceKind::BoundedHash => {
                let factor = factor.unwrap_or(DEFAULT_FACTOR);
                if !(1.01..=10.0).contains(&factor) {
                    section.problem("factor", "expected a number from 1.01 to 10");
                }
                Self::BoundedHash { factor }
            }
        }
    }
}

/// Health checks of servers.
#[derive(Debug, Clone)]
pub struct Check {
    /// What a check does.
    pub kind: CheckKind,
    /// Time between two checks, plus or minus a tenth.
    pub interval: Duration,
    /// Timeout of a whole check.
    pub timeout: Duration,
    /// Consecutive successful checks after which a server is up.
    pub rise: u32,
    /// Consecutive failed checks after which a server is down.
    pub fall: u32,
}

impl Default for Check {
    fn default() -> Self {
        let (interval, timeout) = (Duration::from_secs(10), Duration::from_secs(5));
        Self { kind: CheckKind::Imap, interval, timeout, rise: 2, fall: 3 }
    }
}

impl Check {
    /// Returns `None` if checks are off. `mode` is how TLS starts towards the servers.
    pub(super) fn validate(
        section: &mut Section<'_>,
        mode: TlsMode,
        raw: Option<WordOrMap<CheckWord, CheckSection>>,
    ) -> Option<Self> {
        let raw = match raw {
            Some(WordOrMap::Word(CheckWord::Off)) => return None,
            Some(WordOrMap::Word(kind)) => CheckSection { kind, ..CheckSection::default() },
            Some(WordOrMap::Map(map)) => map,
            None => CheckSection::default(),
        };
        let default = Self::default();
        Some(Self {
            interval: section.duration("interval", raw.interval, default.interval, seconds(0, 86_400)),
            timeout: section.duration("timeout", raw.timeout, default.timeout, seconds(0, 300)),
            rise: section.number("rise", raw.rise, default.rise, 1..=1000),
            fall: section.number("fall", raw.fall, default.fall, 1..=1000),
            kind: CheckKind::validate(section, mode, raw)?,
        })
    }
}

/// What a health check does.
#[derive(Debug, Clone)]
pub enum CheckKind {
    /// Opens a TCP connection.
    Tcp,
    /// Performs a TLS handshake, including verification of chain and name.
    Tls,
    /// Reads the greeting and the capabilities.
    Imap,
    /// Logs in with an account.
    Login {
        /// The user who logs in.
        account: UserName,
        /// File of the password.
        password: Located<PathBuf>,
    },
}

impl CheckKind {
    /// The word in the configuration, which is also a label of metrics.
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Tls => "tls",
            Self::Imap => "imap",
            Self::Login { .. } => "login",
        }
    }

    /// Returns `None` if the account is missing or invalid.
    fn validate(section: &mut Section<'_>, mode: TlsMode, raw: CheckSection) -> Option<Self> {
        let is_login = raw.kind == CheckWord::Login;
        for (name, is_set) in [("account", raw.account.is_some()), ("password_file", raw.password_file.is_some())] {
            match (is_login, is_set) {
                (true, false) if !section.has_problem_below(name) => {
                    section.problem("", format!("kind: login requires the key `{name}`"));
                }
                (false, true) => section.problem(name, "requires kind: login"),
                _ => {}
            }
        }
        match raw.kind {
            CheckWord::Off => {
                section.problem("kind", "expected tcp, tls, imap or login; to disable checks, write check: off");
                None
            }
            CheckWord::Tcp => Some(Self::Tcp),
            CheckWord::Tls => {
                if mode == TlsMode::None {
                    section.problem("", "kind tls requires TLS, but the backend has tls: none");
                }
                Some(Self::Tls)
            }
            CheckWord::Imap => Some(Self::Imap),
            CheckWord::Login => {
                let password = section.file("password_file", &raw.password_file?);
                match UserName::new(raw.account?.as_bytes()) {
                    Ok(account) => Some(Self::Login { account, password }),
                    Err(error) => {
                        section.problem("account", error.to_string());
                        None
                    }
                }
            }
        }
    }
}

/// Queue of logins that wait for a session to end, if servers have `max_sessions`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Queue {
    /// Maximum number of logins that wait, for each backend.
    pub length: u32,
    /// Maximum time that each login waits.
    pub timeout: Duration,
}

impl Default for Queue {
    fn default() -> Self {
        Self { length: 100, timeout: Duration::from_secs(5) }
    }
}

impl QueueSection {
    pub(super) fn check(self, section: &mut Section<'_>) -> Queue {
        let default = Queue::default();
        Queue {
            length: section.number("length", self.length, default.length, 0..=1_000_000),
            timeout: section.duration("timeout", self.timeout, default.timeout, seconds(0, 600)),
        }
    }
}

impl BreakerSection {
    pub(super) fn check(self, section: &mut Section<'_>) -> u32 {
        section.number("failures", self.failures, BalancingConfig::default().failures, 1..=1000)
    }
}

/// `section` is the backend.
pub(super) fn check_slow_start(
    section: &mut Section<'_>,
    balance: Balance,
    raw: Option<OrOff<DurationText>>,
) -> Option<Duration> {
    let slow_start =
        section.duration_or_off("slow_start", raw, BalancingConfig::default().slow_start, seconds(1, 3600));
    if slow_start.is_some() && balance == Balance::UserHash {
        section.problem("slow_start", "has no effect with balance: user-hash, which serves a user from one server");
    }
    slow_start
}
