//! Who may come in and try: `access`, and those of `limits` that count clients, addresses and users. Called by `check`.

use std::time::Duration;

use super::Limits;
use super::directory::Network;
use super::file::LimitsMap;
use super::guard_file::{AccessMap, NetworkMap};
use super::limits::{bounded, number, or_off, seconds};
use super::locate::child;
use super::read::Reader;
use super::values::{OptionalCount, RateText, Size};

/// Who may come in and try. An address is one of IPv4, or a /64 of IPv6, which is what one household has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AdmissionConfig {
    /// Networks that may come in, may not, and to which nothing below applies.
    pub access: AccessConfig,
    /// TLS handshakes with clients under way at once, counted from a client's first byte; others wait for their turn. Default
    /// 4000.
    pub handshakes: usize,
    /// Connections before their login, logins under way included; beyond, the oldest without complete credentials is closed. Default
    /// 10,000.
    pub before_login: usize,
    /// Bytes of larger buffers of all connections before their login. Default 256 MiB.
    pub before_login_memory: usize,
    /// Open connections of one address. Default: any number.
    pub sessions_per_address: Option<u32>,
    /// Open connections from networks, logged in or not; the narrowest that contains the client counts.
    pub networks: Vec<(Network, u32)>,
    /// Logged-in sessions of one user. Default: any number.
    pub sessions_per_user: Option<u32>,
    /// Logged-in sessions of one user from one address. Default: any number.
    pub sessions_per_user_and_address: Option<u32>,
    /// Connections of one address. Default: any rate.
    pub connection_rate: Option<Rate>,
    /// Login attempts from one address. Default: any rate.
    pub login_rate_per_address: Option<Rate>,
    /// Login attempts for one user. Default: any rate.
    pub login_rate_per_user: Option<Rate>,
    /// Addresses, users, and pairs of them that are remembered, of each kind. Default 100,000.
    pub tracked: usize,
    /// How late the first failed login of a user from an address is answered, counted from the command; it doubles with each
    /// more. Default 1 s.
    pub failed_login_delay: Option<Duration>,
    /// What it grows to. Default 15 s.
    pub failed_login_delay_max: Duration,
}

/// `access`. The narrowest network that contains the client decides; `deny` where two are as narrow.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AccessConfig {
    /// Where it is not empty, whoever is in none is not let in.
    pub allow: Vec<Network>,
    /// Who is not let in.
    pub deny: Vec<Network>,
    /// Let in without limits and delays: webmail, monitoring.
    pub exempt: Vec<Network>,
}

/// A token bucket: it holds `events`, and is filled evenly within `per`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate {
    /// 1 to 1,000,000.
    pub events: u32,
    /// One second to one day.
    pub per: Duration,
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

/// Absent keys have their defaults.
pub(super) fn guard(reader: &mut Reader<'_>, access: AccessMap, written: &LimitsMap) -> AdmissionConfig {
    let default = AdmissionConfig::default();
    let tracked = number(reader, "limits.tracked", written.tracked, 100_000, 1000..=10_000_000);
    let handshakes = number(reader, "limits.handshakes", written.handshakes, 4000, 1..=1_000_000);
    let before_login = number(reader, "limits.before_login", written.before_login, 10_000, 1..=10_000_000);
    let before_login_memory = before_login_memory(reader, written, default.before_login_memory);
    let delay = or_off(
        reader,
        "limits.failed_login_delay",
        written.failed_login_delay,
        default.failed_login_delay,
        seconds(0, 60),
    );
    let delay_max = bounded(
        reader,
        "limits.failed_login_delay_max",
        written.failed_login_delay_max,
        default.failed_login_delay_max.max(delay.unwrap_or_default()),
        seconds(0, 60),
    );
    if delay.is_some_and(|delay| delay > delay_max) && !reader.blamed("limits.failed_login_delay_max") {
        reader.problem("limits.failed_login_delay_max", "is less than failed_login_delay, which grows up to it");
    }
    AdmissionConfig {
        access: AccessConfig {
            allow: networks(reader, "access.allow", &access.allow),
            deny: networks(reader, "access.deny", &access.deny),
            exempt: networks(reader, "access.exempt", &access.exempt),
        },
        handshakes: handshakes as usize,
        before_login: before_login as usize,
        before_login_memory,
        sessions_per_address: cap(reader, "limits.sessions_per_address", written.sessions_per_address),
        networks: network_limits(reader, written),
        sessions_per_user: cap(reader, "limits.sessions_per_user", written.sessions_per_user),
        sessions_per_user_and_address: cap(
            reader,
            "limits.sessions_per_user_and_address",
            written.sessions_per_user_and_address,
        ),
        connection_rate: rate(reader, "limits.connection_rate", written.connection_rate),
        login_rate_per_address: rate(reader, "limits.login_rate_per_address", written.login_rate_per_address),
        login_rate_per_user: rate(reader, "limits.login_rate_per_user", written.login_rate_per_user),
        tracked: tracked as usize,
        failed_login_delay: delay,
        failed_login_delay_max: delay_max,
    }
}

/// The smallest budget, as a multiple of `limits.line` and `limits.literal` together. Four logins with the largest commands fit into
/// seven eighths of it: each is charged for its command and `session::COPIES` (9) copies of it, and an eighth is a reserve.
const LEAST_BUDGET: usize = 48;

fn before_login_memory(reader: &mut Reader<'_>, written: &LimitsMap, default: usize) -> usize {
    let (line, literal) = (Limits::default().line, Limits::default().literal);
    let one = written.line.map_or(line, |Size(line)| line) + written.literal.map_or(literal, |Size(literal)| literal);
    let least = LEAST_BUDGET * one;
    match written.before_login_memory {
        None => default.max(least),
        Some(Size(memory)) if (least..=1 << 40).contains(&memory) => memory,
        Some(_) => {
            let message = format!(
                "expected a size from {least} bytes ({LEAST_BUDGET} times limits.line and limits.literal together) to 1 TiB"
            );
            reader.problem("limits.before_login_memory", message);
            default
        }
    }
}

fn network_limits(reader: &mut Reader<'_>, written: &LimitsMap) -> Vec<(Network, u32)> {
    let mut limits: Vec<(Network, u32)> = Vec::new();
    for (index, item) in written.networks.iter().enumerate() {
        let key = format!("limits.networks[{index}]");
        let Some(map) = reader.read::<NetworkMap>(&key, item.clone()) else { continue };
        let sessions = number(reader, &child(&key, "sessions"), Some(map.sessions), 1, 1..=10_000_000);
        let Some(network) = network(reader, &child(&key, "network"), &map.network) else { continue };
        if limits.iter().any(|(other, _)| *other == network) {
            reader.problem(&child(&key, "network"), "stands in this list already");
        }
        limits.push((network, sessions));
    }
    limits
}

fn networks(reader: &mut Reader<'_>, key: &str, texts: &[String]) -> Vec<Network> {
    texts.iter().enumerate().filter_map(|(index, text)| network(reader, &format!("{key}[{index}]"), text)).collect()
}

fn network(reader: &mut Reader<'_>, key: &str, text: &str) -> Option<Network> {
    let network = Network::parse(text);
    if network.is_none() {
        reader.problem(key, "expected a network, like 10.0.0.0/8");
    }
    network
}

fn cap(reader: &mut Reader<'_>, key: &str, written: Option<OptionalCount>) -> Option<u32> {
    let number = written?.0?;
    let within = u32::try_from(number).ok().filter(|number| (1..=10_000_000).contains(number));
    if within.is_none() {
        reader.problem(key, "expected off or a number from 1 to 10000000");
    }
    within
}

fn rate(reader: &mut Reader<'_>, key: &str, written: Option<RateText>) -> Option<Rate> {
    let (events, per) = written?.0?;
    if !(1..=1_000_000).contains(&events) || !seconds(1, 24 * 3600).contains(&per) {
        reader.problem(key, "expected off, or 1 to 1000000 events in 1s to 1day, like 60/1m");
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
    fn every_key_is_read() {
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
    fn mistakes_are_told_with_their_places() {
        for (text, said) in [
            (
                "limits: {connection_rate: 60}",
                "4:10: limits.connection_rate: expected off or a rate, like 60/1m, found a number",
            ),
            (
                "limits: {connection_rate: 60/m}",
                "4:10: limits.connection_rate: expected off or a rate, like 60/1m, found a text of another form",
            ),
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
            (
                "limits: {sessions_per_user: many}",
                "4:10: limits.sessions_per_user: expected off or a number, found a text of another form",
            ),
            (
                "limits: {failed_login_delay: 5s, failed_login_delay_max: 4s}",
                "4:34: limits.failed_login_delay_max: is less than failed_login_delay, which grows up to it",
            ),
            (
                "limits: {networks: [{network: 10.0.0.0/33, sessions: 1}]}",
                "4:22: limits.networks[0].network: expected a network, like 10.0.0.0/8",
            ),
            ("limits: {networks: [{network: 10.0.0.0/8}]}", "4:21: limits.networks[0]: the key `sessions` is missing"),
            ("access: {deny: [mail.test]}", "4:17: access.deny[0]: expected a network, like 10.0.0.0/8"),
            ("access: {block: [10.0.0.1]}", "4:10: access.block: unknown key: expected allow, deny or exempt"),
        ] {
            assert_eq!(read(text), Err(vec![format!("v.yaml:{said}")]), "{text}");
        }
        let twice = "limits: {networks: [{network: 10.0.0.0/8, sessions: 1}, {network: 10.0.0.0/8, sessions: 2}]}";
        assert_eq!(read(twice).unwrap_err().len(), 1);
    }
}
