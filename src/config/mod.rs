//! The configuration: a YAML file, checked, as plain values.
//!
//! [`load`] reads the file as `file` describes it, finds all mistakes it can, and hands out a [`Config`] in which every name
//! is resolved and every number is within its bounds. It opens none of the files the configuration names; the rooms
//! that use them report with the [`Location`] they are named at. Called by `main`, the demo and the tests; read by
//! every room that is configured.

mod answers;
mod backend;
mod care;
mod check;
mod directory;
mod error;
mod file;
mod guard;
mod guard_file;
mod limits;
mod local;
mod locate;
mod oauth;
mod policy;
mod read;
mod routes;
mod servers;
mod tree;
mod users;
mod users_file;
mod values;

use std::collections::BTreeMap;
use std::fs;
use std::io::Read as _;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use crate::identity::{Delegation, Mechanisms, NamingRules, TokenIssuer};

pub use self::answers::LoginRules;
pub use self::backend::{Backend, BackendId, ClientInfo, Host, MasterLogin, Server, TlsMode, Trust, UpstreamTlsConfig};
pub use self::care::{Balance, BalancingConfig, Check, CheckKind, Queue};
pub use self::directory::{
    ANSWER_FIELDS, CacheConfig, Dns, DnsQuery, Http, HttpStyle, Ldap, LdapScope, LookupConfig, Network, Redis,
    RedisServers, Sql,
};
pub use self::error::{Help, Located, Location, Problem, Report};
pub use self::guard::{AccessConfig, AdmissionConfig, Rate};
pub use self::local::is_local;
use self::locate::Positions;
pub use self::policy::Policy;
use self::read::{Reader, no_yaml};
use self::tree::YamlValue;

/// A larger file is no configuration: users belong into a table.
const MAX_FILE: u64 = 16 * 1024 * 1024;

/// A checked configuration.
#[derive(Debug, Clone)]
pub struct Config {
    /// The file it came from.
    pub file: PathBuf,
    /// At least one.
    pub listeners: Vec<Listener>,
    /// At least one where a listener speaks TLS.
    pub certificates: Vec<Certificate>,
    /// Files of secrets behind session tickets: the first seals, all open. Empty: the process makes its own.
    pub ticket_keys: Vec<Located<PathBuf>>,
    /// At least one; [`BackendId`] counts here.
    pub backends: Vec<Backend>,
    /// At least one.
    pub routes: Vec<Route>,
    /// What users are called.
    pub naming: NamingRules,
    /// From where logins on behalf of others may come; `None`: from everywhere.
    pub master_networks: Option<Vec<Network>>,
    /// Issuers whose tokens may name the user.
    pub token_issuers: Arc<[TokenIssuer]>,
    /// Deadlines and caps.
    pub limits: Limits,
    /// Who may come in and try.
    pub admission: AdmissionConfig,
    /// A service that is asked before each login.
    pub policy: Option<Policy>,
    /// Where metrics and health are answered.
    pub admin: Option<SocketAddr>,
    /// Where the program's own commands are answered.
    pub control: Option<PathBuf>,
    /// File in which administrative states of servers are kept over restarts.
    pub state_file: Option<PathBuf>,
    /// Whom to become once all ports are bound.
    pub run_as: Option<RunAs>,
    /// LogConfig records.
    pub log: LogConfig,
    /// DNS.
    pub resolver: ResolverConfig,
    /// What is allowed, but seldom meant.
    pub warnings: Vec<Problem>,
}

/// A user to become.
#[derive(Debug, Clone, PartialEq)]
pub struct RunAs {
    /// By name.
    pub user: Located<String>,
    /// By name; `None`: the user's.
    pub group: Option<Located<String>>,
}

/// A port that clients connect to.
#[derive(Debug, Clone)]
pub struct Listener {
    /// Port 0 takes any free one.
    pub address: SocketAddr,
    /// How TLS begins.
    pub tls: TlsMode,
    /// Ways to log in that are offered; `None`: those that the backends have.
    pub mechanisms: Option<Mechanisms>,
    /// The oldest version of TLS that is spoken. Default 1.2.
    pub tls_min: TlsVersion,
    /// Whether a client must ask for a server that there is a certificate for. Default no.
    pub strict_sni: bool,
    /// Whether a client that offers application protocols (ALPN) must offer `imap`. Default yes.
    pub strict_alpn: bool,
    /// Certificates of clients.
    pub client_certificates: Option<ClientCertificates>,
    /// From where every connection begins with a PROXY header, and nobody else is let in; `None`: there are no headers.
    pub proxy_protocol: Option<Vec<Network>>,
    /// In the file.
    pub location: Location,
}

/// Certificates that clients show.
#[derive(Debug, Clone)]
pub struct ClientCertificates {
    /// PEM file of the roots they must lead to.
    pub ca: Located<PathBuf>,
    /// Whether a client without one is turned away.
    pub required: bool,
    /// Where the user's name stands.
    pub user: CertificateUser,
    /// Whose mailboxes the owners of certificates may open besides their own.
    pub may_act_for: Vec<Delegation>,
}

/// Where in a certificate the user's name stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CertificateUser {
    /// The first e-mail address among the alternative names.
    SanEmail,
    /// The first DNS name among them.
    SanDns,
    /// The common name of the subject.
    CommonName,
}

/// A version of TLS.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum TlsVersion {
    /// RFC 5246.
    Tls12,
    /// RFC 8446.
    Tls13,
}

/// A certificate and its key.
#[derive(Debug, Clone)]
pub struct Certificate {
    /// PEM file of the chain.
    pub cert: Located<PathBuf>,
    /// PEM file of the key.
    pub key: Located<PathBuf>,
    /// DER file of an OCSP response about the certificate.
    pub ocsp: Option<Located<PathBuf>>,
}

/// One source that maps users to backends.
#[derive(Debug, Clone, PartialEq)]
pub enum Route {
    /// A text file.
    Table(Located<PathBuf>),
    /// Domains, in lower case.
    Domain(BTreeMap<String, BackendId>),
    /// Rules, tried in order.
    Regex(Vec<RegexRule>),
    /// A share of all users each.
    Hash {
        /// Whose hash.
        style: HashStyle,
        /// At least one, each backend once.
        shares: Vec<HashShare>,
    },
    /// Everybody.
    Default(BackendId),
    /// A database.
    Sql(Box<Sql>),
    /// A directory.
    Ldap(Box<Ldap>),
    /// A service.
    Http(Box<Http>),
    /// Redis or Valkey.
    Redis(Box<Redis>),
    /// DNS.
    Dns(Box<Dns>),
}

/// A pattern and where those who match it belong.
#[derive(Debug, Clone, PartialEq)]
pub struct RegexRule {
    /// A regular expression.
    pub pattern: String,
    /// Written like a line of a table, with `$1` for what was caught.
    pub to: String,
    /// In the file.
    pub location: Location,
}

/// Whose way of hashing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HashStyle {
    /// Rendezvous hashing.
    Vestibule,
    /// The ring of Dovecot's director.
    Director,
}

/// A backend's share of users.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HashShare {
    /// Whose.
    pub backend: BackendId,
    /// 1 to 1000.
    pub weight: u32,
    /// What the director called its servers; empty in other styles.
    pub hosts: Vec<String>,
}

/// Deadlines and caps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// From the accepted connection to the end of its PROXY header, where there must be one. Default 3 s.
    pub proxy_header: Duration,
    /// A TLS handshake with a client. Default 10 s.
    pub handshake: Duration,
    /// From the accepted connection to the last login command, whatever happens in between. Default 60 s.
    pub login: Duration,
    /// One question to all routes. Default 5 s.
    pub lookup: Duration,
    /// From the first SYN to a server to its first byte, TLS included. Default 5 s.
    pub connect: Duration,
    /// One login over all servers tried. Default 30 s.
    pub server_login: Duration,
    /// Bytes of a command line or a SASL response before login. Default 96 KiB: a token of 64 KiB in base64.
    pub line: usize,
    /// Bytes of the literals of a command before login, together. Default 64 KiB.
    pub literal: usize,
    /// The bad command that ends a connection. Default 3.
    pub bad_commands: u32,
    /// The failed login that ends a connection. Default 5.
    pub failed_logins: u32,
    /// Silence that ends a relayed session; never under 30 minutes (RFC 9051 section 5.4). Default: none ends it.
    pub idle: Option<Duration>,
    /// Silence that ends a relayed session of which one side has finished. Default 60 s.
    pub half_close: Duration,
    /// A side that takes no byte for this long, while bytes wait for it, ends a relayed session. Default 5 min.
    pub stall: Duration,
    /// When a server dies, the client of a session there is kept so long at most, so that not all come back at once;
    /// `None`: they are closed at once. Default 30 s.
    pub max_disconnect_delay: Option<Duration>,
    /// What relayed sessions get to finish when the process stops. Default 60 s.
    pub drain: Duration,
    /// Time between the moment at which `/ready` fails because the process stops, and the moment at which it stops to accept
    /// connections. Default: none.
    pub ready_delay: Duration,
    /// Silence after which TCP asks whether the peer is still there; Linux allows nine hours. Default 2 min.
    pub keepalive: Option<Duration>,
    /// Open client connections, logged in or not. Default 100,000.
    pub sessions: usize,
    /// Threads that serve sessions. Default: one a core.
    pub workers: usize,
    /// Lines a server may send ahead of its answer to a login. Default 64.
    pub untagged_lines: usize,
    /// Bytes of those. Default 64 KiB.
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

/// LogConfig records.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogConfig {
    /// How they look.
    pub format: LogFormat,
    /// The least important that is written.
    pub level: Level,
}

/// How log records look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One object a line.
    Json,
}

/// How important a log record is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "the words say it")]
pub enum Level {
    Error,
    Warn,
    Info,
    Debug,
    Trace,
}

/// DNS.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ResolverConfig {
    /// None: the system's.
    pub servers: Vec<SocketAddr>,
    /// Of one question to one server. Default 3 s.
    pub timeout: Duration,
}

/// Reads and checks a file.
///
/// # Errors
/// All mistakes that could be found.
pub fn load(path: &Path) -> Result<Config, Report> {
    let text = read_file(path).map_err(|message| fault(path, message))?;
    parse(path, &text)
}

/// Checks `text`, which is, or could be, the content of `file`.
///
/// # Errors
/// All mistakes that could be found.
pub fn parse(file: &Path, text: &str) -> Result<Config, Report> {
    // Some editors put a byte order mark ahead of a text; it says nothing.
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let mut reader = Reader::new(file, Positions::new(text));
    if !reader.structure() {
        return reader.finish(None);
    }
    let is_blank = |line: &str| line.trim().is_empty() || line.trim_start().starts_with('#');
    if text.lines().all(is_blank) {
        return Err(fault(file, "the file is empty".to_owned()));
    }
    let mut value = match serde_yaml::from_str(text) {
        Ok(YamlValue(value)) => value,
        Err(error) => return Err(Report::new(vec![no_yaml(file, text, &error)])),
    };
    reader.tidy("", &mut value);
    let config = check::config(&mut reader, file, value);
    reader.finish(config)
}

fn read_file(path: &Path) -> Result<String, String> {
    let mut bytes = Vec::new();
    let opened = fs::File::open(path).map_err(|error| error.to_string())?;
    opened.take(MAX_FILE + 1).read_to_end(&mut bytes).map_err(|error| error.to_string())?;
    if bytes.len() as u64 > MAX_FILE {
        return Err("the file is over 16 MiB: users belong into a table of its own".to_owned());
    }
    String::from_utf8(bytes).map_err(|error| format!("not UTF-8 at byte {}", error.utf8_error().valid_up_to()))
}

/// A mistake of the whole file.
fn fault(file: &Path, message: String) -> Report {
    Location::of_file(file).problem(message).into()
}

#[cfg(test)]
mod tests;
