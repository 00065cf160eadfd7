//! A backend and its servers, checked.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;

use super::{BalancingConfig, Located, Location, LoginRules};
use crate::admin_state::AdminState;
use crate::identity::UserName;

/// A named set of equivalent servers.
#[derive(Debug, Clone)]
pub struct Backend {
    /// Unique; also the label of metrics.
    pub name: String,
    /// At least one.
    pub servers: Vec<Server>,
    /// Local addresses that connections to them come from. Empty: the system chooses.
    pub source_addresses: Vec<IpAddr>,
    /// TLS towards them.
    pub tls: UpstreamTlsConfig,
    /// What they learn of the client.
    pub client_info: ClientInfo,
    /// Whether a client may log in on behalf of another user.
    pub authzid: bool,
    /// What servers are logged in with where the client has no password for them.
    pub login: Option<MasterLogin>,
    /// Whether a server's referral is followed; else the client is told.
    pub follows_referrals: bool,
    /// How passwords are sent to them, and how their answers are understood.
    pub login_rules: LoginRules,
    /// Sent with ID as `x-forward-KEY`.
    pub forward: BTreeMap<String, String>,
    /// How servers are chosen, watched and limited.
    pub balancing: BalancingConfig,
    /// In the file.
    pub location: Location,
}

/// Credentials of the proxy's own.
#[derive(Debug, Clone)]
pub struct MasterLogin {
    /// Who logs in on behalf of the user; `None`: the user, whose password is always this.
    pub master: Option<UserName>,
    /// A file with the password.
    pub password: Located<PathBuf>,
}

/// What servers learn of the client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClientInfo {
    /// The command ID with x-originating-ip and its kin.
    Id,
    /// A PROXY protocol header, version 1.
    ProxyV1,
    /// A PROXY protocol header, version 2.
    ProxyV2,
    /// Nothing, not even the client's own ID.
    None,
}

/// Where servers are.
#[derive(Debug, Clone)]
pub enum Server {
    /// One server.
    Address {
        /// As written: its label in metrics and logs.
        name: String,
        /// Address or DNS name.
        host: Host,
        /// Never 0.
        port: u16,
        /// 1 to 1000.
        weight: u32,
        /// Sessions it may have at a time.
        max_sessions: Option<u32>,
        /// Whether it gets logins.
        state: AdminState,
        /// In the file.
        location: Location,
    },
    /// All servers that an SRV record lists.
    Srv {
        /// `_imap._tcp.example.org`.
        name: String,
        /// Sessions that each may have at a time.
        max_sessions: Option<u32>,
        /// Whether they get logins.
        state: AdminState,
        /// In the file.
        location: Location,
    },
}

/// A server's host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Host {
    /// An address.
    Ip(IpAddr),
    /// A DNS name, in lower case.
    Name(String),
}

/// TLS towards servers.
#[derive(Debug, Clone)]
pub struct UpstreamTlsConfig {
    /// How it begins.
    pub mode: TlsMode,
    /// Whom to trust.
    pub trust: Trust,
    /// The name certificates must carry, instead of the server's.
    pub server_name: Option<String>,
}

/// How TLS begins towards servers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TlsMode {
    /// Never.
    None,
    /// In clear, then STARTTLS, without which nothing is sent.
    StartTls,
    /// At once.
    Implicit,
}

impl TlsMode {
    /// The word of the configuration.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::StartTls => "starttls",
            Self::Implicit => "implicit",
        }
    }
}

/// Whom to trust among servers.
#[derive(Debug, Clone)]
pub enum Trust {
    /// The system's root certificates.
    System,
    /// The roots in a PEM file.
    Ca(Located<PathBuf>),
    /// Keys with these SHA-256 digests (of the SubjectPublicKeyInfo), and no others.
    Pin(Vec<[u8; 32]>),
    /// Anybody.
    Insecure,
}

/// Index of a backend in `Config::backends`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BackendId(pub usize);
