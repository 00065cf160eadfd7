//! How the servers of a backend are chosen, watched and limited: `balance`, `check`, `slow_start`, `breaker`,
//! `max_sessions`, `queue`, and the `state` of a server. Called by `servers`.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::check::located;
use super::file::{BalanceWord, BreakerMap, CheckMap, CheckWord, QueueMap};
use super::limits::{bounded, number, or_off, seconds};
use super::locate::child;
use super::read::Reader;
use super::values::{BalanceEntry, CheckEntry, DurationText};
use super::{Located, TlsMode};
use crate::identity::UserName;

/// What a backend does for its servers, and with them.
#[derive(Debug, Clone)]
pub struct BalancingConfig {
    /// Which server a login goes to.
    pub balance: Balance,
    /// How servers are asked whether they are well; `None`: they are not.
    pub check: Option<Check>,
    /// How long a server that came back takes to its full weight. Default: no time.
    pub slow_start: Option<Duration>,
    /// Failed logins in a row that open a server's breaker. Default 3.
    pub failures: u32,
    /// Logins that wait for a free place at a server.
    pub queue: Queue,
}

/// Which server of a backend a login goes to.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Balance {
    /// Always the same for a user, while it is up.
    UserHash,
    /// The same, but no server gets more than `factor` times its fair share.
    BoundedHash {
        /// From 1.01 to 10.
        factor: f64,
    },
    /// The one with fewer sessions of two drawn by weight.
    LeastSessions,
    /// By turns.
    RoundRobin,
}

impl Balance {
    /// As configured.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::UserHash => "user-hash",
            Self::BoundedHash { .. } => "bounded-hash",
            Self::LeastSessions => "least-sessions",
            Self::RoundRobin => "round-robin",
        }
    }

    /// What the order of servers rests on, for operators.
    pub fn decided_by(self) -> &'static str {
        match self {
            Self::UserHash => "the user's name decides, and the next one counts while the first is failing",
            Self::BoundedHash { .. } => {
                "the user's name decides, and the next one counts while the first is failing or has more than its share"
            }
            Self::LeastSessions => {
                "the running process knows which of two drawn has fewer sessions; this order is an example"
            }
            Self::RoundRobin => "the running process knows whose turn it is; this is the order after its start",
        }
    }

    /// Whether a user must not be served by two servers at once: a login waits for its server sooner than go elsewhere.
    pub fn is_sticky(self) -> bool {
        self == Self::UserHash
    }
}

/// How servers are asked whether they are well.
#[derive(Debug, Clone)]
pub struct Check {
    /// What is asked.
    pub kind: CheckKind,
    /// From one to the next, give or take a tenth. Default 10 s.
    pub interval: Duration,
    /// For all of a check. Default 5 s.
    pub timeout: Duration,
    /// Good ones in a row that bring a server back. Default 2.
    pub rise: u32,
    /// Failed ones in a row that take a server out. Default 3.
    pub fall: u32,
}

/// What is asked.
#[derive(Debug, Clone)]
pub enum CheckKind {
    /// Does it take connections?
    Tcp,
    /// Does a TLS handshake succeed, chain and name included?
    Tls,
    /// Does it greet, and which capabilities has it?
    Imap,
    /// Can this user log in?
    Login {
        /// Who.
        account: UserName,
        /// A file with the password.
        password: Located<PathBuf>,
    },
}

impl CheckKind {
    /// As configured; the label of metrics.
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Tls => "tls",
            Self::Imap => "imap",
            Self::Login { .. } => "login",
        }
    }
}

/// Logins that wait for a free place, where servers have `max_sessions`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Queue {
    /// So many at a time, a backend. Default 100.
    pub length: u32,
    /// Each so long. Default 5 s.
    pub timeout: Duration,
}

/// The keys of a backend that are about its servers' care.
pub(super) struct Written {
    pub(super) balance: Option<BalanceEntry>,
    pub(super) check: Option<CheckEntry>,
    pub(super) slow_start: Option<DurationText>,
    pub(super) breaker: BreakerMap,
    pub(super) queue: QueueMap,
}

/// Absent keys have their defaults. `key` is the backend's.
pub(super) fn care(
    reader: &mut Reader<'_>,
    folder: &Path,
    key: &str,
    mode: TlsMode,
    written: Written,
) -> BalancingConfig {
    let balance = balance(reader, &child(key, "balance"), written.balance);
    let slow_key = child(key, "slow_start");
    let slow_start = or_off(reader, &slow_key, written.slow_start, None, seconds(1, 3600));
    if slow_start.is_some() && balance == Balance::UserHash {
        reader.problem(&slow_key, "has no effect with balance user-hash: a user's sessions meet on one server");
    }
    let queue = child(key, "queue");
    BalancingConfig {
        balance,
        check: check(reader, folder, &child(key, "check"), mode, written.check),
        slow_start,
        failures: number(reader, &child(&child(key, "breaker"), "failures"), written.breaker.failures, 3, 1..=1000),
        queue: Queue {
            length: number(reader, &child(&queue, "length"), written.queue.length, 100, 0..=1_000_000),
            timeout: bounded(
                reader,
                &child(&queue, "timeout"),
                written.queue.timeout,
                Duration::from_secs(5),
                seconds(0, 600),
            ),
        },
    }
}

/// `max_sessions` of a backend or a server.
pub(super) fn max_sessions(reader: &mut Reader<'_>, key: &str, written: Option<i64>) -> Option<u32> {
    written.map(|_| number(reader, &child(key, "max_sessions"), written, 1, 1..=10_000_000))
}

fn balance(reader: &mut Reader<'_>, key: &str, written: Option<BalanceEntry>) -> Balance {
    let (word, factor) = match written {
        None => return Balance::UserHash,
        Some(BalanceEntry::Word(word)) => (word, None),
        Some(BalanceEntry::Map(map)) => (map.kind, map.factor),
    };
    if factor.is_some() && word != BalanceWord::BoundedHash {
        reader.problem(&child(key, "factor"), "has an effect with bounded-hash only");
    }
    match word {
        BalanceWord::UserHash => Balance::UserHash,
        BalanceWord::LeastSessions => Balance::LeastSessions,
        BalanceWord::RoundRobin => Balance::RoundRobin,
        BalanceWord::BoundedHash => {
            let factor = factor.unwrap_or(1.25);
            if !(1.01..=10.0).contains(&factor) {
                reader.problem(&child(key, "factor"), "expected a number from 1.01 to 10");
            }
            Balance::BoundedHash { factor }
        }
    }
}

fn check(
    reader: &mut Reader<'_>,
    folder: &Path,
    key: &str,
    mode: TlsMode,
    written: Option<CheckEntry>,
) -> Option<Check> {
    let map = match written {
        Some(CheckEntry::Off) => return None,
        None => CheckMap::default(),
        Some(CheckEntry::Word(kind)) => CheckMap { kind, ..CheckMap::default() },
        Some(CheckEntry::Map(map)) => map,
    };
    let is_login = map.kind == CheckWord::Login;
    for (name, given) in [("account", map.account.is_some()), ("password_file", map.password_file.is_some())] {
        match (is_login, given) {
            (true, false) if !reader.blamed(&child(key, name)) => {
                reader.problem(key, format!("a login needs the key `{name}`"));
            }
            (false, true) => reader.problem(&child(key, name), "has an effect with kind login only"),
            _ => {}
        }
    }
    let kind = match map.kind {
        CheckWord::Tcp => CheckKind::Tcp,
        CheckWord::Tls => {
            if mode == TlsMode::None {
                reader.problem(key, "there is no TLS to check: the backend has tls none");
            }
            CheckKind::Tls
        }
        CheckWord::Imap => CheckKind::Imap,
        CheckWord::Login => {
            let account_key = child(key, "account");
            let account = match UserName::new(map.account.unwrap_or_default().as_bytes()) {
                Ok(account) => account,
                Err(error) => {
                    if !reader.blamed(key) {
                        reader.problem(&account_key, error.to_string());
                    }
                    return None;
                }
            };
            let password = map.password_file.unwrap_or_default();
            CheckKind::Login { account, password: located(reader, folder, &child(key, "password_file"), &password) }
        }
    };
    Some(Check {
        kind,
        interval: bounded(reader, &child(key, "interval"), map.interval, Duration::from_secs(10), seconds(0, 86_400)),
        timeout: bounded(reader, &child(key, "timeout"), map.timeout, Duration::from_secs(5), seconds(0, 300)),
        rise: number(reader, &child(key, "rise"), map.rise, 2, 1..=1000),
        fall: number(reader, &child(key, "fall"), map.fall, 3, 1..=1000),
    })
}
