//! Admission: `access`, and the keys of `limits` that count clients, addresses and users.

use std::time::Duration;

use serde::Deserialize;

use super::access::{AccessConfig, AccessSection};
use super::limits::{Limits, LimitsSection};
use crate::config::network::Network;
use crate::config::yaml::{Count, OrOff, RateText, Section, Size, seconds};

/// The smallest `before_login_memory`, as a multiple of `line` and `literal` together. Four logins with the largest commands
/// fit into seven eighths of it: each is charged for its command and `session::COPIES` (9) copies of it, and an eighth is a
/// reserve.
const MIN_MEMORY_FACTOR: usize = 48;

const MAX_MEMORY: usize = 1 << 40;

/// Limits on who may connect and try to log in. An address is an IPv4 address or an IPv6 /64, which is what one household has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AdmissionConfig {
    /// Networks that may connect, may not, and are exempt from the limits below.
    pub access: AccessConfig,
    /// Concurrent TLS handshakes with clients, counted from a client's first byte; others wait.
    pub handshakes: usize,
    /// Connections before login, including logins in progress. Beyond this number, the oldest connection without complete
    /// credentials is closed.
    pub before_login: usize,
    /// Bytes in the larger buffers of all connections before login.
    pub before_login_memory: usize,
    /// Open connections of one address.
    pub sessions_per_address: Option<u32>,
    /// Open connections by network, logged in or not; the narrowest network that contains the client applies.
    pub networks: Vec<(Network, u32)>,
    /// Logged-in sessions of one user.
    pub sessions_per_user: Option<u32>,
    /// Logged-in sessions of one user from one address.
    pub sessions_per_user_and_address: Option<u32>,
    /// Rate of connections of one address.
    pub connection_rate: Option<Rate>,
    /// Rate of login attempts from one address.
    pub login_rate_per_address: Option<Rate>,
    /// Rate of login attempts for one user.
    pub login_rate_per_user: Option<Rate>,
    /// Addresses, users, and pairs of them that are tracked, of each kind.
    pub tracked: usize,
    /// Delay of the reply to the first failed login of a user from an address, counted from the command. It doubles with
    /// each further failure.
    pub failed_login_delay: Option<Duration>,
    /// Maximum of that delay.
    pub failed_login_delay_max: Duration,
}

impl Default for AdmissionConfig {
    fn default() -> Self {
        Self {
            access: AccessConfig::default(),
            handshakes: 4000,
            before_login: 10_000,
            before_login_memory: 256 << 20,
            sessions_per_address: None,
            networks: Vec::new(),
            sessions_per_user: None,
            sessions_per_user_and_address: None,
            connection_rate: None,
            login_rate_per_address: None,
            login_rate_per_user: None,
            tracked: 100_000,
            failed_login_delay: Some(Duration::from_secs(1)),
            failed_login_delay_max: Duration::from_secs(15),
        }
    }
}

/// A token bucket that contains `events` tokens and is refilled evenly within `per`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate {
    /// Number of tokens, 1 to 1,000,000.
    pub events: u32,
    /// Time in which all tokens are refilled, from one second to one day.
    pub per: Duration,
}

/// An item of `limits.networks`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct NetworkSection {
    network: String,
    sessions: i64,
}

/// Checks `access` and the admission keys of `limits`.
pub(super) fn check(root: &mut Section<'_>, access: AccessSection, limits: &LimitsSection) -> AdmissionConfig {
    let default = AdmissionConfig::default();
    let access = access.check(&mut root.child("access"));
    let mut section = root.child("limits");
    let (failed_login_delay, failed_login_delay_max) = check_delays(&mut section, limits);
    let section = &mut section;
    AdmissionConfig {
        access,
        handshakes: section.count("handshakes", limits.handshakes, default.handshakes, 1..=1_000_000),
        before_login: section.count("before_login", limits.before_login, default.before_login, 1..=10_000_000),
        before_login_memory: check_memory(section, limits),
        sessions_per_address: check_count(section, "sessions_per_address", limits.sessions_per_address),
        networks: check_networks(section, limits),
        sessions_per_user: check_count(section, "sessions_per_user", limits.sessions_per_user),
        sessions_per_user_and_address: check_count(
            section,
            "sessions_per_user_and_address",
            limits.sessions_per_user_and_address,
        ),
        connection_rate: check_rate(section, "connection_rate", limits.connection_rate),
        login_rate_per_address: check_rate(section, "login_rate_per_address", limits.login_rate_per_address),
        login_rate_per_user: check_rate(section, "login_rate_per_user", limits.login_rate_per_user),
        tracked: section.count("tracked", limits.tracked, default.tracked, 1000..=10_000_000),
        failed_login_delay,
        failed_login_delay_max,
    }
}

fn check_delays(section: &mut Section<'_>, limits: &LimitsSection) -> (Option<Duration>, Duration) {
    let default = AdmissionConfig::default();
    let bounds = seconds(0, 60);
    let delay = section.duration_or_off(
        "failed_login_delay",
        limits.failed_login_delay,
        default.failed_login_delay,
        bounds.clone(),
    );
    let default_max = default.failed_login_delay_max.max(delay.unwrap_or_default());
    let max = section.duration("failed_login_delay_max", limits.failed_login_delay_max, default_max, bounds);
    if delay.is_some_and(|delay| delay > max) {
        section.consequence("failed_login_delay_max", "is less than failed_login_delay, which increases up to it");
    }
    (delay, max)
}

fn check_memory(section: &mut Section<'_>, limits: &LimitsSection) -> usize {
    let (default, sizes) = (AdmissionConfig::default().before_login_memory, Limits::default());
    let line = limits.line.map_or(sizes.line, |Size(line)| line);
    let literal = limits.literal.map_or(sizes.literal, |Size(literal)| literal);
    let least = MIN_MEMORY_FACTOR * (line + literal);
    match limits.before_login_memory {
        None => default.max(least),
        Some(Size(memory)) if (least..=MAX_MEMORY).contains(&memory) => memory,
        Some(_) => {
            let message = format!(
                "expected a size from {least} bytes ({MIN_MEMORY_FACTOR} times limits.line and limits.literal together) to 1 TiB"
            );
            section.problem("before_login_memory", message);
            default
        }
    }
}

fn check_networks(section: &mut Section<'_>, limits: &LimitsSection) -> Vec<(Network, u32)> {
    let mut networks: Vec<(Network, u32)> = Vec::new();
    for (index, item) in limits.networks.iter().enumerate() {
        let mut section = section.child(&format!("networks[{index}]"));
        let Some(raw) = section.read::<NetworkSection>(item.clone()) else { continue };
        let sessions = section.number("sessions", Some(raw.sessions), 1, 1..=10_000_000);
        let Some(network) = section.network("network", &raw.network) else { continue };
        if networks.iter().any(|(other, _)| *other == network) {
            section.problem("network", "duplicate network");
        }
        networks.push((network, sessions));
    }
    networks
}

fn check_count(section: &mut Section<'_>, name: &str, raw: Option<OrOff<Count>>) -> Option<u32> {
    let Some(OrOff::On(Count(number))) = raw else { return None };
    let count = u32::try_from(number).ok().filter(|number| (1..=10_000_000).contains(number));
    if count.is_none() {
        section.problem(name, "expected off or a number from 1 to 10000000");
    }
    count
}

fn check_rate(section: &mut Section<'_>, name: &str, raw: Option<OrOff<RateText>>) -> Option<Rate> {
    let Some(OrOff::On(RateText { events, per })) = raw else { return None };
    if !(1..=1_000_000).contains(&events) || !seconds(1, 24 * 3600).contains(&per) {
        section.problem(name, "expected off, or 1 to 1000000 events in 1s to 1day, like 60/1m");
        return None;
    }
    Some(Rate { events, per })
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::config::parse;

    const MINIMAL: &str = "listeners: [{address: '127.0.0.1:1143', tls: none}]\nbackends: {a: {servers: ['192.0.2.1:143']}}\n\
                           routes: [{default: a}]\n";

    fn read(more: &str) -> Result<AdmissionConfig, Vec<String>> {
        let config = parse(Path::new("v.yaml"), &format!("{MINIMAL}{more}"));
        config
            .map(|config| config.admission)
            .map_err(|report| report.problems().iter().map(ToString::to_string).collect())
    }

    #[test]
    fn all_keys_are_read() {
        let text = "limits: {handshakes: 7, before_login: 8, before_login_memory: 64MiB, sessions_per_address: 9, sessions_per_user: 10, \
                    sessions_per_user_and_address: off, connection_rate: 60/1m, login_rate_per_address: 5/10s, \
                    login_rate_per_user: off, tracked: 5000, failed_login_delay: 2s, failed_login_delay_max: 3s, \
                    networks: [{network: 192.0.2.0/24, sessions: 11}]}\n\
                    access: {allow: [10.0.0.0/8], deny: ['2001:db8::/32'], exempt: [10.1.2.3]}\n";
        let network = |text| Network::parse(text).unwrap();
        let expected = AdmissionConfig {
            access: AccessConfig {
                allow: vec![network("10.0.0.0/8")],
                deny: vec![network("2001:db8::/32")],
                exempt: vec![network("10.1.2.3")],
            },
            handshakes: 7,
            before_login: 8,
            before_login_memory: 64 << 20,
            sessions_per_address: Some(9),
            networks: vec![(network("192.0.2.0/24"), 11)],
            sessions_per_user: Some(10),
            sessions_per_user_and_address: None,
            connection_rate: Some(Rate { events: 60, per: Duration::from_secs(60) }),
            login_rate_per_address: Some(Rate { events: 5, per: Duration::from_secs(10) }),
            login_rate_per_user: None,
            tracked: 5000,
            failed_login_delay: Some(Duration::from_secs(2)),
            failed_login_delay_max: Duration::from_secs(3),
        };
        assert_eq!(read(text), Ok(expected));
        assert_eq!(read(""), Ok(AdmissionConfig::default()));
    }

    #[test]
    fn problems_are_reported_with_their_locations() {
        for (text, expected) in [
            (
                "limits: {connection_rate: 60}",
                "4:10: limits.connection_rate: expected off or a rate, like 60/1m, got a number",
            ),
            ("limits: {connection_rate: 60/m}", "4:10: limits.connection_rate: expected off or a rate, like 60/1m"),
            (
                "limits: {login_rate_per_user: 0/1m}",
                "4:10: limits.login_rate_per_user: expected off, or 1 to 1000000 events in 1s to 1day, like 60/1m",
            ),
            (
                "limits: {before_login_memory: 1MiB}",
                "4:10: limits.before_login_memory: expected a size from 7864320 bytes (48 times limits.line and limits.literal \
                 together) to 1 TiB",
            ),
            (
                "limits: {sessions_per_user: 0}",
                "4:10: limits.sessions_per_user: expected off or a number from 1 to 10000000",
            ),
            ("limits: {sessions_per_user: many}", "4:10: limits.sessions_per_user: expected off or a number"),
            (
                "limits: {failed_login_delay: 5s, failed_login_delay_max: 4s}",
                "4:34: limits.failed_login_delay_max: is less than failed_login_delay, which increases up to it",
            ),
            (
                "limits: {networks: [{network: 10.0.0.0/33, sessions: 1}]}",
                "4:22: limits.networks[0].network: expected a network, like 10.0.0.0/8",
            ),
            ("limits: {networks: [{network: 10.0.0.0/8}]}", "4:21: limits.networks[0]: missing key `sessions`"),
            ("access: {deny: [mail.test]}", "4:17: access.deny[0]: expected a network, like 10.0.0.0/8"),
            ("access: {block: [10.0.0.1]}", "4:10: access.block: unknown key: expected allow, deny or exempt"),
        ] {
            assert_eq!(read(text), Err(vec![format!("v.yaml:{expected}")]), "{text}");
        }
        let twice = "limits: {networks: [{network: 10.0.0.0/8, sessions: 1}, {network: 10.0.0.0/8, sessions: 2}]}";
        assert_eq!(read(twice).unwrap_err().len(), 1);
    }
}
