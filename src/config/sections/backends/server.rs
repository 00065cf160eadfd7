//! `servers` of a backend.

use std::net::{IpAddr, SocketAddr};

use serde::Deserialize;
use serde_yaml::Value;

use crate::admin_state::AdminState;
use crate::config::error::Location;
use crate::config::yaml::{Section, Shorthand, WordOrMap};

/// Maximum length of a host name (RFC 1035 section 2.3.4).
const MAX_HOST: usize = 253;

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct ServerSection {
    address: Option<String>,
    weight: Option<i64>,
    srv: Option<String>,
    max_sessions: Option<i64>,
    #[serde(default)]
    state: AdminState,
}

impl Shorthand for ServerSection {
    const EXPECTED: &'static str =
        "\"host:port\", {address: \"host:port\", weight: 2} or {srv: _imap._tcp.example.org}";
}

/// One server, or the servers of an SRV record.
#[derive(Debug, Clone)]
pub enum Server {
    /// One server, by its address.
    Address {
        /// The address as configured, which is the server's name in metrics and logs.
        name: String,
        /// Address or DNS name.
        host: Host,
        /// Port, which is not 0.
        port: u16,
        /// Share of users among the backend's servers, 1 to 1000.
        weight: u32,
        /// Maximum number of concurrent sessions.
        max_sessions: Option<u32>,
        /// Whether it receives logins.
        state: AdminState,
        /// Location in the list of servers.
        location: Location,
    },
    /// All servers of an SRV record.
    Srv {
        /// Name of the record, like `_imap._tcp.example.org`.
        name: String,
        /// Maximum number of concurrent sessions of each server.
        max_sessions: Option<u32>,
        /// Whether the servers receive logins.
        state: AdminState,
        /// Location in the list of servers.
        location: Location,
    },
}

impl Server {
    /// Whether both name the same server or the same SRV record, whatever the letter case.
    fn is_same(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Address { host, port, .. }, Self::Address { host: other_host, port: other_port, .. }) => {
                (host, port) == (other_host, other_port)
            }
            (Self::Srv { name, .. }, Self::Srv { name: other, .. }) => name == other,
            _ => false,
        }
    }
}

/// Host of a server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Host {
    /// An IPv4 or IPv6 address.
    Ip(IpAddr),
    /// A DNS name, in lower case.
    Name(String),
}

/// Checks the servers of the backend at `section`.
pub(super) fn check_servers(
    section: &mut Section<'_>,
    items: Option<Vec<Value>>,
    max_sessions: Option<i64>,
) -> Vec<Server> {
    match &items {
        None if !section.has_problem_below("servers") => section.problem("", "missing key `servers`"),
        Some(items) if items.is_empty() => section.problem("servers", "at least one server is required"),
        _ => {}
    }
    let default_sessions = check_max_sessions(section, max_sessions);
    let mut servers: Vec<Server> = Vec::new();
    for (index, item) in items.unwrap_or_default().into_iter().enumerate() {
        let mut section = section.child(&format!("servers[{index}]"));
        let Some(server) = check_server(&mut section, item, default_sessions) else { continue };
        if servers.iter().any(|other| other.is_same(&server)) {
            section.problem("", "duplicate server");
        }
        servers.push(server);
    }
    servers
}

fn check_max_sessions(section: &mut Section<'_>, value: Option<i64>) -> Option<u32> {
    value.map(|_| section.number("max_sessions", value, 1, 1..=10_000_000))
}

fn check_server(section: &mut Section<'_>, item: Value, default_sessions: Option<u32>) -> Option<Server> {
    let raw = match section.read::<WordOrMap<String, ServerSection>>(item)? {
        WordOrMap::Word(address) => ServerSection { address: Some(address), ..ServerSection::default() },
        WordOrMap::Map(map) => map,
    };
    let location = section.location("");
    let max_sessions = check_max_sessions(section, raw.max_sessions).or(default_sessions);
    let state = raw.state;
    match (raw.address, raw.srv) {
        (Some(name), None) => {
            let weight = section.number("weight", raw.weight, 1, 1..=1000);
            let (host, port) = check_address(section, &name)?;
            Some(Server::Address { name, host, port, weight, max_sessions, state, location })
        }
        (None, Some(name)) => {
            if raw.weight.is_some() {
                section.problem("weight", "cannot be set with srv: the SRV record contains the weights");
            }
            let name = name.trim_end_matches('.').to_ascii_lowercase();
            if !name.starts_with('_') || !is_host(&name) {
                section.problem("srv", "expected the name of an SRV record, like _imap._tcp.example.org");
                return None;
            }
            Some(Server::Srv { name, max_sessions, state, location })
        }
        (Some(_), Some(_)) => {
            section.problem("", "address and srv exclude each other");
            None
        }
        (None, None) => {
            section.consequence("", "missing key `address` or `srv`");
            None
        }
    }
}

fn check_address(section: &mut Section<'_>, text: &str) -> Option<(Host, u16)> {
    let Some((host, port)) = parse_host_and_port(text) else {
        let expected = "host:port, like 10.0.0.11:143, [2001:db8::1]:143 or mail.internal:143";
        section.problem("", format!("expected {expected}, got {text:?}"));
        return None;
    };
    if let Host::Ip(ip) = host
        && (ip.to_canonical().is_unspecified() || ip.to_canonical().is_multicast())
    {
        section.problem("", format!("{ip} is not a valid server address"));
    }
    Some((host, port))
}

fn parse_host_and_port(text: &str) -> Option<(Host, u16)> {
    if let Ok(address) = text.parse::<SocketAddr>() {
        return (address.port() != 0).then_some((Host::Ip(address.ip()), address.port()));
    }
    let (host, port) = text.rsplit_once(':')?;
    // `parse` alone would accept "+143".
    let has_digits_only = port.bytes().all(|byte| byte.is_ascii_digit());
    let port = port.parse().ok().filter(|port| has_digits_only && *port != 0)?;
    let name = host.trim_end_matches('.').to_ascii_lowercase();
    // A name whose last label is a number is a mistyped IPv4 address (RFC 1123 section 2.1).
    let is_like_address = name.rsplit('.').next().is_some_and(|last| last.bytes().all(|byte| byte.is_ascii_digit()));
    (is_host(&name) && !is_like_address).then_some((Host::Name(name), port))
}

/// Whether the text is a DNS name; underscores are allowed.
pub(super) fn is_host(name: &str) -> bool {
    let is_label = |label: &str| {
        (1..=63).contains(&label.len())
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'))
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    name.len() <= MAX_HOST && name.split('.').all(is_label)
}
