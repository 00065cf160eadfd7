//! `routes` as written: one struct a map of the YAML, whose doc comments are the reference.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::Deserialize;
use serde_yaml::Value;

use crate::config::values::{CacheEntry, DurationText, HashEntry, Words};

/// An item of `routes`: exactly one key.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct RouteMap {
    /// A text file: user and backend a line.
    pub(super) table: Option<PathBuf>,
    /// Domains and their backends.
    pub(super) domain: Option<BTreeMap<String, String>>,
    /// Rules, tried in order: [`RegexMap`].
    pub(super) regex: Option<Vec<Value>>,
    /// Backends that share all users by consistent hashing: a list, or [`HashMap`].
    pub(super) hash: Option<HashEntry>,
    /// The backend of everybody else.
    pub(super) default: Option<String>,
    /// A database: [`SqlMap`].
    pub(super) sql: Option<Value>,
    /// A directory: [`LdapMap`].
    pub(super) ldap: Option<Value>,
    /// A service: [`HttpMap`].
    pub(super) http: Option<Value>,
    /// A Redis or Valkey: [`RedisMap`].
    pub(super) redis: Option<Value>,
    /// DNS: [`DnsMap`].
    pub(super) dns: Option<Value>,
}

/// An item of `regex`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RegexMap {
    /// Found anywhere in the user's name; `^` and `$` tie it down.
    pub(super) r#match: String,
    /// As a line of a table has it; `$1`, `${name}` are what the pattern caught.
    pub(super) to: String,
}

/// `hash` that is no list.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::config) struct HashMap {
    /// Whose hash.
    #[serde(default)]
    pub(super) style: HashStyleWord,
    /// Backends and what each is given: a weight, or [`HashShareMap`].
    pub(super) backends: BTreeMap<String, Value>,
}

/// `hash.style`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum HashStyleWord {
    /// Rendezvous hashing.
    #[default]
    Vestibule,
    /// As Dovecot's director had it.
    Director,
}

/// A value of `hash.backends`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct HashShareMap {
    /// Share of users, 1 to 1000.
    pub(super) weight: Option<i64>,
    /// What the director called the servers: an address, or a list of them.
    pub(super) host: Option<Words>,
}

/// Keys that all directories have; flattened into their maps by hand, as serde cannot refuse unknown keys otherwise.
#[derive(Debug, Default)]
pub(super) struct AskingMap {
    pub(super) timeout: Option<DurationText>,
    pub(super) connections: Option<i64>,
    pub(super) cache: Option<CacheEntry>,
    pub(super) names: BTreeMap<String, String>,
}

/// `cache` that is not `off`.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(in crate::config) struct CacheMap {
    /// Of a user that was found.
    pub(super) ttl: Option<DurationText>,
    /// Of a user that is unknown.
    pub(super) negative: Option<DurationText>,
    /// How much longer an answer is good while the directory is down.
    pub(super) stale: Option<DurationText>,
    /// Users at most.
    pub(super) entries: Option<i64>,
    /// Where answers are written for the next start.
    pub(super) file: Option<PathBuf>,
}

macro_rules! directory {
    ($(#[$doc:meta])* $name:ident { $($(#[$field_doc:meta])* $field:ident: $type:ty,)* }) => {
        $(#[$doc])*
        #[derive(Debug, Deserialize)]
        #[serde(deny_unknown_fields)]
        pub(super) struct $name {
            $($(#[$field_doc])* pub(super) $field: $type,)*
            /// Of one question.
            #[serde(default)]
            timeout: Option<DurationText>,
            /// Questions at a time.
            #[serde(default)]
            connections: Option<i64>,
            /// `off`, or [`CacheMap`].
            #[serde(default)]
            cache: Option<CacheEntry>,
            /// What the directory calls a backend, where that is not its name here.
            #[serde(default)]
            names: BTreeMap<String, String>,
        }

        impl $name {
            pub(super) fn asking(&mut self) -> AskingMap {
                AskingMap {
                    timeout: self.timeout,
                    connections: self.connections,
                    cache: self.cache.take(),
                    names: std::mem::take(&mut self.names),
                }
            }
        }
    };
}

directory! {
    /// `sql`.
    SqlMap {
        /// `postgres://user@host/database`, `mysql://…`, `sqlite:///path`.
        url: String,
        /// A file with the password.
        #[serde(default)]
        password_file: Option<PathBuf>,
        /// `SELECT backend FROM … WHERE name = %{user}`.
        query: String,
        /// PEM file of root certificates.
        #[serde(default)]
        ca: Option<PathBuf>,
    }
}

directory! {
    /// `ldap`.
    LdapMap {
        /// `ldap://host` or `ldaps://host`.
        url: String,
        /// Before anything is said on `ldap://`.
        #[serde(default)]
        starttls: bool,
        /// PEM file of root certificates.
        #[serde(default)]
        ca: Option<PathBuf>,
        /// Distinguished name to bind as.
        #[serde(default)]
        bind: Option<String>,
        /// A file with its password.
        #[serde(default)]
        password_file: Option<PathBuf>,
        /// Where to search.
        base: String,
        /// How deep.
        #[serde(default)]
        scope: ScopeWord,
        /// `(mail=%{user})`.
        filter: String,
        /// Fields and the attributes they stand in.
        attributes: BTreeMap<String, String>,
    }
}

directory! {
    /// `http`.
    HttpMap {
        /// `https://host/path`.
        url: String,
        /// What is spoken.
        #[serde(default)]
        style: StyleWord,
        /// PEM file of root certificates.
        #[serde(default)]
        ca: Option<PathBuf>,
        /// Sent with every question.
        #[serde(default)]
        headers: BTreeMap<String, String>,
        /// A file with a bearer token.
        #[serde(default)]
        token_file: Option<PathBuf>,
        /// Whether the source is told the password.
        #[serde(default)]
        password: Option<bool>,
        /// Whether `nginx-auth-http` is told the client's whole certificate.
        #[serde(default)]
        client_certificate: bool,
        /// The backend of addresses in `networks`.
        #[serde(default)]
        backend: Option<String>,
        /// Addresses the source may name although no server is declared there.
        #[serde(default)]
        networks: Vec<String>,
    }
}

directory! {
    /// `redis`.
    RedisMap {
        /// `redis://host:6379/0`, `rediss://…`.
        #[serde(default)]
        url: Option<String>,
        /// URLs of Sentinels.
        #[serde(default)]
        sentinels: Option<Words>,
        /// What Sentinels call the master.
        #[serde(default)]
        master: Option<String>,
        /// URLs of some servers of a cluster.
        #[serde(default)]
        cluster: Option<Words>,
        /// ACL user.
        #[serde(default)]
        user: Option<String>,
        /// A file with the password.
        #[serde(default)]
        password_file: Option<PathBuf>,
        /// PEM file of root certificates.
        #[serde(default)]
        ca: Option<PathBuf>,
        /// `user:%{user}`.
        key: String,
        /// A field of the hash at the key.
        #[serde(default)]
        field: Option<String>,
    }
}

directory! {
    /// `dns`.
    DnsMap {
        /// A name whose TXT record names the backend.
        #[serde(default)]
        txt: Option<String>,
        /// A name whose SRV record names a server.
        #[serde(default)]
        srv: Option<String>,
        /// Name servers, `ip:port`.
        #[serde(default)]
        servers: Vec<String>,
    }
}

/// `ldap.scope`.
#[derive(Debug, Clone, Copy, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum ScopeWord {
    Base,
    One,
    #[default]
    Sub,
}

/// `http.style`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum StyleWord {
    #[default]
    Json,
    NginxAuthHttp,
}
