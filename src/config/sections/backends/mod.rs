//! `backends`: named sets of equivalent servers.

mod balancing;
mod login_rules;
mod server;
mod tls;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;

use serde::Deserialize;
use serde_yaml::{Mapping, Value};

use self::balancing::{BalanceKind, BalanceSection, BreakerSection, CheckSection, CheckWord, QueueSection};
use self::tls::UpstreamTlsSection;
use super::tls::TlsMode;
use crate::config::error::{Located, Location};
use crate::config::yaml::{DurationText, OneOrMany, OrOff, Section, WordOrMap};
use crate::identity::{LoginWith, UserName};

pub use self::balancing::{Balance, BalancingConfig, Check, CheckKind, Queue};
pub use self::login_rules::{EmptyPassword, LoginRules};
pub use self::server::{Host, Server};
pub use self::tls::{Trust, UpstreamTlsConfig};

/// Maximum length of a backend's name, which is a label of metrics.
const MAX_NAME: usize = 64;

/// Maximum length of a key in `forward`: RFC 2971 section 3.3 allows 30 bytes, of which `x-forward-` takes ten.
const MAX_FORWARD_KEY: usize = 20;

/// Maximum length of a value in `forward` (RFC 2971 section 3.3).
const MAX_FORWARD_VALUE: usize = 1024;

/// Consequence of `client_info: none`.
const CLIENT_INFO_NONE: &str = "with client_info: none, the servers see the proxy as the client of every login: Dovecot then \
     counts the failed logins of all users for the proxy's address and delays all logins by up to 15 s; use id, with the \
     proxy in Dovecot's login_trusted_networks, or proxy-v2";

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct BackendSection {
    /// Optional here, so that a missing key does not hide other problems of the backend.
    servers: Option<Vec<Value>>,
    tls: Option<WordOrMap<TlsMode, UpstreamTlsSection>>,
    #[serde(default)]
    source_addresses: Vec<String>,
    #[serde(default)]
    client_info: ClientInfo,
    #[serde(default)]
    authzid: Authzid,
    login: Option<MasterLoginSection>,
    #[serde(default)]
    referrals: Referrals,
    #[serde(default)]
    login_with: LoginWith,
    unavailable_texts: Option<OneOrMany>,
    limit_texts: Option<OneOrMany>,
    #[serde(default)]
    empty_password: EmptyPassword,
    #[serde(default)]
    forward: BTreeMap<String, String>,
    balance: Option<WordOrMap<BalanceKind, BalanceSection>>,
    check: Option<WordOrMap<CheckWord, CheckSection>>,
    slow_start: Option<OrOff<DurationText>>,
    #[serde(default)]
    breaker: BreakerSection,
    max_sessions: Option<i64>,
    #[serde(default)]
    queue: QueueSection,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct MasterLoginSection {
    master: Option<String>,
    password_file: PathBuf,
}

/// Index of a backend in `Config::backends`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BackendId(pub usize);

/// A named set of equivalent servers.
#[derive(Debug, Clone)]
pub struct Backend {
    /// Unique name, which is also a label of metrics.
    pub name: String,
    /// At least one server.
    pub servers: Vec<Server>,
    /// Local addresses of connections to the servers; if empty, the system chooses.
    pub source_addresses: Vec<IpAddr>,
    /// TLS towards the servers.
    pub tls: UpstreamTlsConfig,
    /// How the servers learn about the client.
    pub client_info: ClientInfo,
    /// Whether a client may log in on behalf of another user.
    pub authzid: Authzid,
    /// Credentials for clients without a password for the servers.
    pub login: Option<MasterLogin>,
    /// What happens if a server refers the client to another server.
    pub referrals: Referrals,
    /// How passwords are sent, and how refusals are understood.
    pub login_rules: LoginRules,
    /// Fields sent with ID as `x-forward-KEY`.
    pub forward: BTreeMap<String, String>,
    /// How servers are chosen, checked and limited.
    pub balancing: BalancingConfig,
    /// Location of the backend's name.
    pub location: Location,
}

/// How servers learn about the client.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ClientInfo {
    /// The command ID with x-originating-ip and related fields.
    #[default]
    Id,
    /// A PROXY protocol header, version 1.
    #[serde(rename = "proxy-v1")]
    ProxyV1,
    /// A PROXY protocol header, version 2.
    #[serde(rename = "proxy-v2")]
    ProxyV2,
    /// Not at all; not even the client's own ID is sent.
    None,
}

/// Whether a client may log in on behalf of another user (RFC 4616).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Authzid {
    /// The login is refused.
    #[default]
    Refuse,
    /// The login is routed by the other user and passed on; the server decides.
    Allow,
}

/// What happens if a server refers the client to another server.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Referrals {
    /// The proxy logs in there if it is a declared server.
    #[default]
    Follow,
    /// The client receives the referral.
    Relay,
}

/// Credentials of the proxy.
#[derive(Debug, Clone)]
pub struct MasterLogin {
    /// The user who logs in on behalf of others; `None` means that every user has this password.
    pub master: Option<UserName>,
    /// File of the password.
    pub password: Located<PathBuf>,
}

/// Checks all backends. Returns the names of all that are declared, including those that cannot be read.
pub(super) fn check(mut section: Section<'_>, map: Mapping) -> (Vec<String>, Vec<Backend>) {
    let mut names = Vec::new();
    let mut backends = Vec::new();
    for (name, value) in map {
        // `Reader::reject_nulls` has reported and removed other keys.
        let Value::String(name) = name else { continue };
        names.push(name.clone());
        backends.extend(check_backend(&mut section.child(&name), name, value));
    }
    if names.is_empty() {
        section.consequence("", "at least one backend is required");
    }
    (names, backends)
}

fn check_backend(section: &mut Section<'_>, name: String, value: Value) -> Option<Backend> {
    if name.is_empty() || name.len() > MAX_NAME || !name.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'#') {
        let message =
            format!("a backend's name must be 1 to {MAX_NAME} printable ASCII characters, without space and #");
        section.problem("", message);
    }
    let raw: BackendSection = section.read(value)?;
    let tls = UpstreamTlsConfig::validate(&mut section.child("tls"), raw.tls);
    if raw.client_info == ClientInfo::None {
        section.warning("client_info", CLIENT_INFO_NONE);
    }
    check_forward(section, raw.client_info, &raw.forward);
    let login_rules = LoginRules {
        login_with: raw.login_with,
        unavailable_texts: login_rules::check_texts(section, "unavailable_texts", raw.unavailable_texts),
        limit_texts: login_rules::check_texts(section, "limit_texts", raw.limit_texts),
        empty_password: raw.empty_password,
    };
    let balance = Balance::validate(&mut section.child("balance"), raw.balance);
    let balancing = BalancingConfig {
        balance,
        check: Check::validate(&mut section.child("check"), tls.mode, raw.check),
        slow_start: balancing::check_slow_start(section, balance, raw.slow_start),
        failures: raw.breaker.check(&mut section.child("breaker")),
        queue: raw.queue.check(&mut section.child("queue")),
    };
    Some(Backend {
        servers: server::check_servers(section, raw.servers, raw.max_sessions),
        name,
        source_addresses: check_source_addresses(section, &raw.source_addresses),
        tls,
        client_info: raw.client_info,
        authzid: raw.authzid,
        login: raw.login.and_then(|login| login.check(&mut section.child("login"))),
        referrals: raw.referrals,
        login_rules,
        forward: raw.forward,
        balancing,
        location: section.location(""),
    })
}

impl MasterLoginSection {
    fn check(self, section: &mut Section<'_>) -> Option<MasterLogin> {
        let master = self.master.map(|name| UserName::new(name.as_bytes())).transpose();
        let master = master.map_err(|error| section.problem("master", error.to_string())).ok()?;
        Some(MasterLogin { master, password: section.file("password_file", &self.password_file) })
    }
}

/// Checks that names and values fit into the command ID.
fn check_forward(section: &mut Section<'_>, client_info: ClientInfo, forward: &BTreeMap<String, String>) {
    if client_info != ClientInfo::Id && !forward.is_empty() {
        section.problem("forward", "requires client_info: id");
    }
    let mut section = section.child("forward");
    for (name, value) in forward {
        let has_valid_characters = name.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'"');
        if !(1..=MAX_FORWARD_KEY).contains(&name.len()) || !has_valid_characters {
            let message =
                format!("the name must be 1 to {MAX_FORWARD_KEY} printable ASCII characters, without space and \"");
            section.problem(name, message);
        } else if value.len() > MAX_FORWARD_VALUE || !value.bytes().all(|byte| (b' '..0x7f).contains(&byte)) {
            let message = format!("the value must be at most {MAX_FORWARD_VALUE} printable ASCII characters");
            section.problem(name, message);
        }
    }
}

fn check_source_addresses(section: &mut Section<'_>, texts: &[String]) -> Vec<IpAddr> {
    let mut addresses = Vec::new();
    for (index, text) in texts.iter().enumerate() {
        let key = format!("source_addresses[{index}]");
        let Ok(address) = text.parse::<IpAddr>() else {
            section.problem(&key, "expected an IP address of this machine, like 10.0.0.5");
            continue;
        };
        let address = address.to_canonical();
        if address.is_unspecified() || address.is_multicast() {
            section.problem(&key, format!("{address} is not a valid source address"));
        } else if addresses.contains(&address) {
            section.problem(&key, "duplicate address");
        } else {
            addresses.push(address);
        }
    }
    addresses
}
