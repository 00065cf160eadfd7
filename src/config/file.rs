//! The configuration as written: one struct a map of the YAML, whose doc comments are the reference.
//!
//! Lists of maps are kept as plain YAML here, so that `check` reads their items one by one and a mistake in one does not
//! hide those in the next.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::Deserialize;
use serde_yaml::{Mapping, Value};

use super::answers::{EmptyPasswordWord, LoginWithWord};
use super::guard_file::{AccessMap, PolicyMap};
use super::users_file::UsersMap;
use super::values::{
    BalanceEntry, CheckEntry, DurationText, OptionalCount, RateText, ServerEntry, Size, TlsEntry, TlsVersionWord, Words,
};
use crate::admin_state::AdminState;

/// The whole file.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct File {
    /// Ports that clients connect to: [`ListenerMap`].
    pub(super) listeners: Vec<Value>,
    /// What clients are shown.
    pub(super) tls: TlsSection,
    /// Named sets of servers: [`BackendMap`].
    pub(super) backends: Mapping,
    /// Asked in order; the first that knows the user wins: `routes::maps`.
    pub(super) routes: Vec<Value>,
    /// What users are called.
    pub(super) users: UsersMap,
    /// Issuers whose tokens may name the user: `oauth::IssuerMap`.
    pub(super) oauth: Vec<Value>,
    /// Deadlines and caps.
    pub(super) limits: LimitsMap,
    /// Networks that may come in.
    pub(super) access: AccessMap,
    /// A service that is asked before each login: [`PolicyMap`].
    pub(super) policy: Option<PolicyMap>,
    /// Metrics and health; commands.
    pub(super) admin: AdminMap,
    /// The file that keeps administrative states of servers. Absent: they end with the process.
    pub(super) state_file: Option<PathBuf>,
    /// Whom to become once all ports are bound.
    pub(super) run_as: Option<RunAsMap>,
    /// LogConfig records.
    pub(super) log: LogMap,
    /// DNS.
    pub(super) resolver: ResolverMap,
}

/// An item of `listeners`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ListenerMap {
    /// Address and port. `[::]` takes IPv4 too.
    pub(super) address: String,
    /// How TLS begins.
    pub(super) tls: TlsWord,
    /// Ways to log in that are offered, instead of those that the backends have.
    #[serde(default)]
    pub(super) mechanisms: Option<Vec<String>>,
    /// The oldest version of TLS that is spoken.
    #[serde(default)]
    pub(super) tls_min: Option<TlsVersionWord>,
    /// Whom a client must ask for.
    #[serde(default)]
    pub(super) sni: Option<SniWord>,
    /// Application protocols that a client may offer.
    #[serde(default)]
    pub(super) alpn: Option<AlpnWord>,
    /// Certificates of clients.
    #[serde(default)]
    pub(super) client_certificates: Option<ClientCertificatesMap>,
    /// Balancers in front, that say whose connection they pass on.
    #[serde(default)]
    pub(super) proxy_protocol: Option<ProxyProtocolMap>,
}

/// `proxy_protocol` of a listener.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ProxyProtocolMap {
    /// Networks from which every connection begins with a PROXY header; from all others there is none at all.
    pub(super) from: Vec<String>,
}

/// `sni` of a listener.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum SniWord {
    /// Any server, or none: the first certificate serves where no other does.
    Any,
    /// A server that there is a certificate for.
    Strict,
}

/// `alpn` of a listener.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum AlpnWord {
    /// `imap` among them, or none at all.
    Strict,
    /// Any.
    Any,
}

/// `client_certificates` of a listener.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ClientCertificatesMap {
    /// PEM file of the roots that clients' certificates must lead to.
    pub(super) ca: PathBuf,
    /// Whether a client without one is turned away.
    #[serde(default)]
    pub(super) required: bool,
    /// Where the user's name stands in it.
    #[serde(default)]
    pub(super) user: CertificateUserWord,
    /// Whose mailboxes the owners of certificates may open besides their own: `oauth::DelegationMap`.
    #[serde(default)]
    pub(super) may_act_for: Vec<Value>,
}

/// `client_certificates.user`.
#[derive(Debug, Clone, Copy, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum CertificateUserWord {
    /// The first e-mail address among the alternative names.
    #[default]
    SanEmail,
    /// The first DNS name among them.
    SanDns,
    /// The common name of the subject.
    CommonName,
}

/// How TLS begins, on either side.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum TlsWord {
    /// At once (port 993).
    Implicit,
    /// In clear, then the command STARTTLS (port 143).
    StartTls,
    /// Never.
    None,
}

/// `tls` of the file.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct TlsSection {
    /// Chosen by SNI; the first is the default: [`CertificateMap`].
    pub(super) certificates: Vec<Value>,
    /// Files of secrets behind the session tickets: the first seals, all open. Absent: a secret of the process's own.
    pub(super) ticket_keys: Option<Vec<PathBuf>>,
}

/// An item of `tls.certificates`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct CertificateMap {
    /// PEM file: the certificate, then its intermediates.
    pub(super) cert: PathBuf,
    /// PEM file: its private key, not encrypted.
    pub(super) key: PathBuf,
    /// DER file: an OCSP response about it, for clients that ask.
    #[serde(default)]
    pub(super) ocsp: Option<PathBuf>,
}

/// A value of `backends`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct BackendMap {
    /// `"host:port"`, or [`ServerMap`]. Needed; `check` says so, and what else is wrong with the backend.
    pub(super) servers: Option<Vec<Value>>,
    /// A word, or [`TlsMap`].
    #[serde(default)]
    pub(super) tls: Option<TlsEntry>,
    /// Local addresses that connections to the servers come from.
    #[serde(default)]
    pub(super) source_addresses: Vec<String>,
    /// What servers learn of the client.
    #[serde(default)]
    pub(super) client_info: ClientInfoWord,
    /// Whether a client may log in on behalf of another user (RFC 4616).
    #[serde(default)]
    pub(super) authzid: AuthzidWord,
    /// What servers are logged in with where the client has no password for them.
    #[serde(default)]
    pub(super) login: Option<LoginMap>,
    /// What is done when a server sends a user elsewhere.
    #[serde(default)]
    pub(super) referrals: ReferralsWord,
    /// The form in which a password is sent to a server.
    #[serde(default)]
    pub(super) login_with: LoginWithWord,
    /// Texts of a refusal that mean an outage.
    pub(super) unavailable_texts: Option<Words>,
    /// Texts of a refusal that mean a limit of the user.
    pub(super) limit_texts: Option<Words>,
    /// What is done with a login that has an empty password.
    #[serde(default)]
    pub(super) empty_password: EmptyPasswordWord,
    /// Sent with ID as `x-forward-KEY`.
    #[serde(default)]
    pub(super) forward: BTreeMap<String, String>,
    /// Which server a login goes to: a word, or [`BalanceMap`].
    #[serde(default)]
    pub(super) balance: Option<BalanceEntry>,
    /// How servers are asked whether they are well: `off`, a word, or [`CheckMap`].
    #[serde(default)]
    pub(super) check: Option<CheckEntry>,
    /// How long a server that came back takes to its full weight.
    #[serde(default)]
    pub(super) slow_start: Option<DurationText>,
    /// When logins stop going to a server by themselves.
    #[serde(default)]
    pub(super) breaker: BreakerMap,
    /// Sessions of each server that does not say otherwise.
    #[serde(default)]
    pub(super) max_sessions: Option<i64>,
    /// Logins that wait for a free place.
    #[serde(default)]
    pub(super) queue: QueueMap,
}

/// `balance` that is no word.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct BalanceMap {
    pub(super) kind: BalanceWord,
    /// How many times its fair share a server may have, with bounded-hash.
    pub(super) factor: Option<f64>,
}

/// `balance`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum BalanceWord {
    UserHash,
    BoundedHash,
    LeastSessions,
    RoundRobin,
}

/// `check` that is no word.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct CheckMap {
    pub(super) kind: CheckWord,
    /// From one check to the next.
    pub(super) interval: Option<DurationText>,
    /// For all of a check.
    pub(super) timeout: Option<DurationText>,
    /// Good ones in a row that bring a server back.
    pub(super) rise: Option<i64>,
    /// Failed ones in a row that take a server out.
    pub(super) fall: Option<i64>,
    /// Who logs in.
    pub(super) account: Option<String>,
    /// A file with the password.
    pub(super) password_file: Option<PathBuf>,
}

/// `check.kind`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum CheckWord {
    Tcp,
    Tls,
    #[default]
    Imap,
    Login,
}

/// `breaker`.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct BreakerMap {
    /// In a row; a refused connection counts for all of them.
    pub(super) failures: Option<i64>,
}

/// `queue`.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct QueueMap {
    /// Logins at a time, a backend.
    pub(super) length: Option<i64>,
    /// How long each waits.
    pub(super) timeout: Option<DurationText>,
}

/// `login` of a backend.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct LoginMap {
    /// A user who may log in on behalf of others.
    pub(super) master: Option<String>,
    /// A file with the password.
    pub(super) password_file: PathBuf,
}

/// `referrals`.
#[derive(Debug, Clone, Copy, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum ReferralsWord {
    /// LogConfig in there, if it is a declared server.
    #[default]
    Follow,
    /// The client is told.
    Relay,
}

/// An item of `servers` that is no word.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ServerMap {
    /// `host:port`.
    pub(super) address: Option<String>,
    /// Share of users among the backend's servers, 1 to 1000.
    pub(super) weight: Option<i64>,
    /// A DNS name whose SRV record lists the servers.
    pub(super) srv: Option<String>,
    /// Sessions it may have at a time; behind an SRV record each server.
    pub(super) max_sessions: Option<i64>,
    /// Whether it gets logins; behind an SRV record all servers.
    #[serde(default)]
    pub(super) state: AdminState,
}

/// `tls` of a backend that is no word.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct TlsMap {
    /// How TLS begins.
    pub(super) mode: TlsWord,
    /// PEM file of root certificates, instead of the system's.
    pub(super) ca: Option<PathBuf>,
    /// The name certificates must carry, instead of the server's.
    pub(super) server_name: Option<String>,
    /// `sha256:` and the base64 of the SHA-256 of a certificate's public key (SubjectPublicKeyInfo).
    pub(super) pin: Option<Words>,
    /// `true`: certificates go unchecked.
    pub(super) insecure: Option<bool>,
}

/// `client_info`.
#[derive(Debug, Clone, Copy, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum ClientInfoWord {
    /// The command ID with x-originating-ip and its kin.
    #[default]
    Id,
    /// A PROXY protocol header, version 1.
    #[serde(rename = "proxy-v1")]
    ProxyV1,
    /// A PROXY protocol header, version 2.
    #[serde(rename = "proxy-v2")]
    ProxyV2,
    /// Nothing.
    None,
}

/// `authzid`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum AuthzidWord {
    /// The login is refused.
    #[default]
    Refuse,
    /// Route by it and pass it on; the server decides.
    Allow,
}

/// `limits`; absent keys have their defaults, see [`super::Limits`].
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct LimitsMap {
    pub(super) proxy_header: Option<DurationText>,
    pub(super) handshake: Option<DurationText>,
    pub(super) login: Option<DurationText>,
    pub(super) lookup: Option<DurationText>,
    pub(super) connect: Option<DurationText>,
    pub(super) server_login: Option<DurationText>,
    pub(super) line: Option<Size>,
    pub(super) literal: Option<Size>,
    pub(super) bad_commands: Option<i64>,
    pub(super) failed_logins: Option<i64>,
    pub(super) idle: Option<DurationText>,
    pub(super) half_close: Option<DurationText>,
    pub(super) stall: Option<DurationText>,
    pub(super) max_disconnect_delay: Option<DurationText>,
    pub(super) drain: Option<DurationText>,
    pub(super) ready_delay: Option<DurationText>,
    pub(super) keepalive: Option<DurationText>,
    pub(super) sessions: Option<i64>,
    pub(super) workers: Option<i64>,
    pub(super) untagged_lines: Option<i64>,
    pub(super) untagged_bytes: Option<Size>,
    // See [`super::AdmissionConfig`].
    pub(super) handshakes: Option<i64>,
    pub(super) before_login: Option<i64>,
    pub(super) before_login_memory: Option<Size>,
    pub(super) sessions_per_address: Option<OptionalCount>,
    pub(super) sessions_per_user: Option<OptionalCount>,
    pub(super) sessions_per_user_and_address: Option<OptionalCount>,
    /// [`super::guard_file::NetworkMap`].
    pub(super) networks: Vec<Value>,
    pub(super) connection_rate: Option<RateText>,
    pub(super) login_rate_per_address: Option<RateText>,
    pub(super) login_rate_per_user: Option<RateText>,
    pub(super) tracked: Option<i64>,
    pub(super) failed_login_delay: Option<DurationText>,
    pub(super) failed_login_delay_max: Option<DurationText>,
}

/// `admin`.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct AdminMap {
    /// Where /metrics, /health and /ready are answered. Absent: nowhere.
    pub(super) address: Option<String>,
    /// The Unix socket on which the program's own commands are answered. Absent: nowhere.
    pub(super) control: Option<PathBuf>,
}

/// `run_as`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RunAsMap {
    /// By name.
    pub(super) user: String,
    /// By name. Absent: the user's.
    #[serde(default)]
    pub(super) group: Option<String>,
}

/// `log`.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct LogMap {
    /// How records look.
    pub(super) format: FormatWord,
    /// The least important level that is written.
    pub(super) level: LevelWord,
}

/// `log.format`.
#[derive(Debug, Clone, Copy, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum FormatWord {
    #[default]
    Text,
    Json,
}

/// `log.level`.
#[derive(Debug, Clone, Copy, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum LevelWord {
    Error,
    Warn,
    #[default]
    Info,
    Debug,
    Trace,
}

/// `resolver`.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct ResolverMap {
    /// Name servers, `ip:port`. Absent: the system's.
    pub(super) servers: Vec<String>,
    /// Of one question to one server.
    pub(super) timeout: Option<DurationText>,
}

/// The server entry is used by `check`.
pub(super) type Server = ServerEntry;
