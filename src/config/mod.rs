//! The configuration: a YAML file, checked, as plain values.
//!
//! [`load`] reads a file, reports all problems that it can find, and returns a [`Config`] in which every name is resolved
//! and every number is within its bounds. It does not open the files that the configuration names; the modules that use
//! them report problems at the [`Location`] of the key.

mod cross_checks;
mod error;
mod local_address;
mod network;
mod sections;
mod yaml;

use std::fs;
use std::io::Read as _;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::identity::{NamingRules, TokenIssuer};

pub use self::error::{Help, Located, Location, Problem, Report};
pub use self::local_address::is_local;
pub use self::network::Network;
use self::sections::FileSection;
pub use self::sections::{
    ANSWER_FIELDS, AccessConfig, AdmissionConfig, AlpnPolicy, Authzid, Backend, BackendId, Balance, BalancingConfig,
    CacheConfig, Certificate, CertificateUser, Check, CheckKind, ClientCertificates, ClientInfo, Dns, DnsQuery,
    EmptyPassword, HashShare, HashStyle, Host, Http, HttpStyle, Ldap, LdapScope, Level, Limits, Listener, LogConfig,
    LogFormat, LoginRules, LookupConfig, MasterLogin, OnFailure, Policy, Queue, Rate, Redis, RedisServers, Referrals,
    RegexRule, ResolverConfig, Route, RunAs, Server, SniPolicy, Sql, TlsMode, TlsVersion, Trust, UpstreamTlsConfig,
};
use self::yaml::{Positions, Reader, Section, YamlValue, syntax_error};

/// Maximum size of a configuration file in bytes.
const MAX_FILE: u64 = 16 * 1024 * 1024;

/// A configuration that has passed all checks.
#[derive(Debug, Clone)]
pub struct Config {
    /// Path of the configuration file.
    pub file: PathBuf,
    /// At least one listener.
    pub listeners: Vec<Listener>,
    /// At least one certificate if a listener uses TLS.
    pub certificates: Vec<Certificate>,
    /// Files of secrets for session tickets: the first one encrypts, all decrypt. If empty, the process generates a secret.
    pub ticket_keys: Vec<Located<PathBuf>>,
    /// At least one backend, in the order of [`BackendId`].
    pub backends: Vec<Backend>,
    /// At least one route.
    pub routes: Vec<Route>,
    /// Rules for user names.
    pub naming: NamingRules,
    /// Networks from which logins on behalf of others are accepted; `None` means from everywhere.
    pub master_networks: Option<Vec<Network>>,
    /// Issuers whose tokens may name the user.
    pub token_issuers: Arc<[TokenIssuer]>,
    /// Deadlines, sizes and counts.
    pub limits: Limits,
    /// Limits on who may connect and try to log in.
    pub admission: AdmissionConfig,
    /// A service that is queried before each login.
    pub policy: Option<Policy>,
    /// Address of the HTTP endpoint for metrics and health.
    pub admin: Option<SocketAddr>,
    /// Path of the control socket.
    pub control: Option<PathBuf>,
    /// File in which administrative states of servers are stored across restarts.
    pub state_file: Option<PathBuf>,
    /// The user and group to change to after binding all ports.
    pub run_as: Option<RunAs>,
    /// Format and level of log records.
    pub log: LogConfig,
    /// How DNS is queried.
    pub resolver: ResolverConfig,
    /// Settings that are allowed, but rarely intended.
    pub warnings: Vec<Problem>,
}

/// Reads and checks a file.
///
/// # Errors
/// All problems that were found.
pub fn load(path: &Path) -> Result<Config, Report> {
    let text = read_file(path).map_err(|message| Location::of_file(path).problem(message))?;
    parse(path, &text)
}

/// Checks `text`, the content of `file`, which need not exist.
///
/// # Errors
/// All problems that were found.
pub fn parse(file: &Path, text: &str) -> Result<Config, Report> {
    // Some editors write a byte order mark.
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let mut reader = Reader::new(file, Positions::new(text));
    if !reader.check_structure() {
        return reader.finish(None);
    }
    let is_blank = |line: &str| line.trim().is_empty() || line.trim_start().starts_with('#');
    if text.lines().all(is_blank) {
        return Err(Location::of_file(file).problem("the file is empty").into());
    }
    let mut value = match serde_yaml::from_str(text) {
        Ok(YamlValue(value)) => value,
        Err(error) => return Err(syntax_error(file, text, &error).into()),
    };
    reader.reject_nulls("", &mut value);
    let raw: Option<FileSection> = Section::new(&mut reader, "").read(value);
    let config = raw.map(|raw| raw.check(&mut reader, file));
    reader.finish(config)
}

fn read_file(path: &Path) -> Result<String, String> {
    let mut bytes = Vec::new();
    let opened = fs::File::open(path).map_err(|error| error.to_string())?;
    opened.take(MAX_FILE + 1).read_to_end(&mut bytes).map_err(|error| error.to_string())?;
    if bytes.len() as u64 > MAX_FILE {
        return Err("the file is larger than 16 MiB; list users in a table file instead".to_owned());
    }
    String::from_utf8(bytes).map_err(|error| format!("not UTF-8 at byte {}", error.utf8_error().valid_up_to()))
}

#[cfg(test)]
mod tests;
