//! The sections of the configuration file, one file for each: what is written, what it becomes, its defaults and its rules.
//!
//! Lists of maps are first read as plain YAML and then item by item, so that an error in one item does not hide those in
//! the next.

mod access;
mod admin;
mod admission;
mod backends;
mod client_certificates;
mod limits;
mod listeners;
mod log;
mod oauth;
mod policy;
mod resolver;
mod routes;
mod run_as;
mod tls;
mod users;

use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_yaml::{Mapping, Value};

use self::access::AccessSection;
use self::admin::AdminSection;
use self::limits::LimitsSection;
use self::policy::PolicySection;
use self::resolver::ResolverSection;
use self::run_as::RunAsSection;
use self::tls::TlsSection;
use self::users::UsersSection;
use super::yaml::{Reader, Section};
use super::{Config, cross_checks};

pub use self::access::AccessConfig;
pub use self::admission::{AdmissionConfig, Rate};
pub use self::backends::{
    Authzid, Backend, BackendId, Balance, BalancingConfig, Check, CheckKind, ClientInfo, EmptyPassword, Host,
    LoginRules, MasterLogin, Queue, Referrals, Server, Trust, UpstreamTlsConfig,
};
pub use self::client_certificates::{CertificateUser, ClientCertificates};
pub use self::limits::Limits;
pub use self::listeners::{AlpnPolicy, Listener, SniPolicy};
pub use self::log::{Level, LogConfig, LogFormat};
pub use self::policy::{OnFailure, Policy};
pub use self::resolver::ResolverConfig;
pub use self::routes::{
    ANSWER_FIELDS, CacheConfig, Dns, DnsQuery, HashShare, HashStyle, Http, HttpStyle, Ldap, LdapScope, LookupConfig,
    Redis, RedisServers, RegexRule, Route, Sql,
};
pub use self::run_as::RunAs;
pub use self::tls::{Certificate, TlsMode, TlsVersion};

/// The whole file as written.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct FileSection {
    listeners: Vec<Value>,
    tls: TlsSection,
    backends: Mapping,
    routes: Vec<Value>,
    users: UsersSection,
    oauth: Vec<Value>,
    limits: LimitsSection,
    access: AccessSection,
    policy: Option<PolicySection>,
    admin: AdminSection,
    state_file: Option<PathBuf>,
    run_as: Option<RunAsSection>,
    log: LogConfig,
    resolver: ResolverSection,
}

impl FileSection {
    /// Checks all sections. The result is meaningful only if no problem has been reported to `reader`.
    pub(super) fn check(self, reader: &mut Reader, file: &Path) -> Config {
        let mut root = Section::new(reader, "");
        let listeners = listeners::check(root.child("listeners"), self.listeners);
        let (certificates, ticket_keys) = self.tls.check(&mut root.child("tls"));
        let (names, backends) = backends::check(root.child("backends"), self.backends);
        let routes = routes::check(root.child("routes"), &names, self.routes);
        let (naming, master_networks) = self.users.check(&mut root.child("users"));
        let admission = admission::check(&mut root, self.access, &self.limits);
        let limits = self.limits.check(&mut root.child("limits"));
        let (admin, control) = self.admin.check(&mut root.child("admin"));
        let state_file = self.state_file.map(|path| root.file("state_file", &path).value);
        if state_file.as_ref().is_some_and(|path| path.file_name().is_none()) {
            root.problem("state_file", "expected the path of a file, like /var/lib/vestibule/state.json");
        }
        let config = Config {
            file: file.to_owned(),
            listeners,
            certificates,
            ticket_keys,
            backends,
            routes,
            naming,
            master_networks,
            token_issuers: oauth::check(root.child("oauth"), self.oauth).into(),
            limits,
            admission,
            policy: self.policy.map(|policy| policy.check(&mut root.child("policy"))),
            admin,
            control,
            state_file,
            run_as: self.run_as.map(|run_as| run_as.check(&mut root.child("run_as"))),
            log: self.log,
            resolver: self.resolver.check(&mut root.child("resolver")),
            warnings: Vec::new(),
        };
        cross_checks::check(&mut root, &config);
        Config { warnings: reader.take_warnings(), ..config }
    }
}
