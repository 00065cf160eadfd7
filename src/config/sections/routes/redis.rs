//! `redis`: Redis or Valkey.

use std::path::PathBuf;

use serde_yaml::Value;

use super::Route;
use super::lookup::{LookupConfig, RouteReader, lookup_section};
use crate::config::error::Located;
use crate::config::yaml::OneOrMany;
use crate::template::Template;

const SCHEMES: [&str; 2] = ["redis://", "rediss://"];

lookup_section! {
    RedisSection {
        url: Option<String>,
        sentinels: Option<OneOrMany>,
        master: Option<String>,
        cluster: Option<OneOrMany>,
        user: Option<String>,
        password_file: Option<PathBuf>,
        ca: Option<PathBuf>,
        key: String,
        field: Option<String>,
    }
}

/// A source that is Redis or Valkey.
#[derive(Debug, Clone, PartialEq)]
pub struct Redis {
    /// The servers to connect to.
    pub servers: RedisServers,
    /// ACL user; `None` means `default`.
    pub user: Option<String>,
    /// File of the password.
    pub password: Option<Located<PathBuf>>,
    /// PEM file of root certificates, instead of the system's.
    pub ca: Option<Located<PathBuf>>,
    /// Key of a user.
    pub key: Template,
    /// Field of the hash at the key; `None` means the key's own value.
    pub field: Option<String>,
    /// How it is queried.
    pub lookup: LookupConfig,
}

/// The servers of a Redis installation.
#[derive(Debug, Clone, PartialEq)]
pub enum RedisServers {
    /// One server, by its URL.
    Server(Located<String>),
    /// The master that Sentinels report.
    Sentinel {
        /// URLs of the Sentinels.
        urls: Vec<Located<String>>,
        /// The name of the master.
        master: String,
    },
    /// A cluster, by the URLs of some of its servers.
    Cluster(Vec<Located<String>>),
}

pub(super) fn check(mut reader: RouteReader<'_>, value: Value) -> Option<Route> {
    let mut raw: RedisSection = reader.section.read(value)?;
    let lookup = raw.take_lookup();
    let lookup = reader.lookup(lookup);
    let key = reader.template_with_user("key", &raw.key);
    if raw.user.is_some() && raw.password_file.is_none() {
        reader.problem("user", "requires password_file");
    }
    if raw.master.is_some() != raw.sentinels.is_some() {
        reader.problem("sentinels", "sentinels and master require each other");
    }
    let servers = match (raw.url, raw.sentinels, raw.cluster) {
        (Some(url), None, None) => RedisServers::Server(reader.url("url", &url, &SCHEMES)?),
        (None, Some(urls), None) => RedisServers::Sentinel {
            urls: reader.urls("sentinels", &urls, &SCHEMES),
            master: raw.master.unwrap_or_default(),
        },
        (None, None, Some(urls)) => RedisServers::Cluster(reader.urls("cluster", &urls, &SCHEMES)),
        _ => {
            reader.problem("", "expected exactly one of url, sentinels, cluster");
            return None;
        }
    };
    Some(Route::Redis(Box::new(Redis {
        servers,
        user: raw.user,
        password: reader.file("password_file", raw.password_file.as_deref()),
        ca: reader.file("ca", raw.ca.as_deref()),
        key: key?,
        field: raw.field,
        lookup,
    })))
}
