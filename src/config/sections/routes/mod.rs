//! `routes`: sources that map users to backends, in the order in which they are queried.
//!
//! Each item has exactly one source and refers to declared backends only, and no item follows one that matches all users.

mod dns;
mod hash;
mod http;
mod ldap;
mod lookup;
mod redis;
mod sql;
mod sql_query;

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;

use serde::Deserialize;
use serde_yaml::Value;

use self::lookup::RouteReader;
use super::backends::BackendId;
use crate::config::error::{Located, Location};
use crate::config::yaml::{Section, WordOrMap};

pub use self::dns::{Dns, DnsQuery};
pub use self::hash::{HashShare, HashStyle};
pub use self::http::{Http, HttpStyle};
pub use self::ldap::{Ldap, LdapScope};
pub use self::lookup::{ANSWER_FIELDS, CacheConfig, LookupConfig};
pub use self::redis::{Redis, RedisServers};
pub use self::sql::Sql;

/// The keys of [`RouteSection`], for error messages.
const KINDS: &str = "table, domain, regex, hash, default, sql, ldap, http, redis, dns";

/// An item of `routes`.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RouteSection {
    table: Option<PathBuf>,
    domain: Option<BTreeMap<String, String>>,
    regex: Option<Vec<Value>>,
    hash: Option<WordOrMap<Vec<String>, hash::HashSection>>,
    default: Option<String>,
    sql: Option<Value>,
    ldap: Option<Value>,
    http: Option<Value>,
    redis: Option<Value>,
    dns: Option<Value>,
}

/// The one source of an item.
enum Source {
    Table(PathBuf),
    Domain(BTreeMap<String, String>),
    Regex(Vec<Value>),
    Hash(WordOrMap<Vec<String>, hash::HashSection>),
    Default(String),
    Sql(Value),
    Ldap(Value),
    Http(Value),
    Redis(Value),
    Dns(Value),
}

impl RouteSection {
    /// Returns `None` unless exactly one key is set.
    fn into_source(self) -> Option<Source> {
        let sources = [
            self.table.map(Source::Table),
            self.domain.map(Source::Domain),
            self.regex.map(Source::Regex),
            self.hash.map(Source::Hash),
            self.default.map(Source::Default),
            self.sql.map(Source::Sql),
            self.ldap.map(Source::Ldap),
            self.http.map(Source::Http),
            self.redis.map(Source::Redis),
            self.dns.map(Source::Dns),
        ];
        let mut set = sources.into_iter().flatten();
        set.next().filter(|_| set.next().is_none())
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RegexSection {
    r#match: String,
    to: String,
}

/// One source that maps users to backends.
#[derive(Debug, Clone, PartialEq)]
pub enum Route {
    /// A table in a text file.
    Table(Located<PathBuf>),
    /// Backends by domain in lower case.
    Domain(BTreeMap<String, BackendId>),
    /// Rules, tried in order.
    Regex(Vec<RegexRule>),
    /// Backends that share all users.
    Hash {
        /// Algorithm that distributes users over backends.
        style: HashStyle,
        /// At least one share; each backend occurs once.
        shares: Vec<HashShare>,
    },
    /// One backend for all users.
    Default(BackendId),
    /// A query of an SQL database.
    Sql(Box<Sql>),
    /// A search in an LDAP directory.
    Ldap(Box<Ldap>),
    /// A request to a web service.
    Http(Box<Http>),
    /// A key in Redis or Valkey.
    Redis(Box<Redis>),
    /// A query for DNS records.
    Dns(Box<Dns>),
}

impl Route {
    /// Whether the route knows every user, so that later ones are never queried.
    fn matches_all_users(&self) -> bool {
        matches!(self, Self::Default(_) | Self::Hash { .. })
    }
}

/// A pattern and the destination of the users that match it.
#[derive(Debug, Clone, PartialEq)]
pub struct RegexRule {
    /// Regular expression that is searched in the user name.
    pub pattern: String,
    /// The destination, like a line of a table, with `$1` for the first group of the match.
    pub to: String,
    /// Location of the rule.
    pub location: Location,
}

/// The declared backends by name.
struct DeclaredBackends<'a>(HashMap<&'a str, BackendId>);

impl DeclaredBackends<'_> {
    /// Resolves the backend `name` of the key `key`.
    fn resolve(&self, section: &mut Section<'_>, key: &str, name: &str) -> Option<BackendId> {
        let found = self.0.get(name).copied();
        if found.is_none() && !Self::explains_unknown(section, name) {
            let mut known: Vec<&str> = self.0.keys().copied().collect();
            known.sort_unstable();
            section.unknown(key, "backend", name, &known);
        }
        found
    }

    /// Whether a reported problem explains that `name` is unknown: `backends` or this backend cannot be read.
    fn explains_unknown(section: &mut Section<'_>, name: &str) -> bool {
        let backends = section.elsewhere("backends");
        backends.has_problem_at("") || backends.has_problem_below(name)
    }
}

/// Checks all routes; `names` are those of the backends, in the order of [`BackendId`].
pub(super) fn check(mut section: Section<'_>, names: &[String], items: Vec<Value>) -> Vec<Route> {
    if items.is_empty() {
        section.consequence("", "at least one route is required, such as {default: BACKEND}");
    }
    let by_name = names.iter().enumerate().map(|(index, name)| (name.as_str(), BackendId(index)));
    let declared = DeclaredBackends(by_name.collect());
    let mut routes: Vec<Route> = Vec::new();
    for (index, item) in items.into_iter().enumerate() {
        let mut section = section.child(&format!("[{index}]"));
        if routes.iter().any(Route::matches_all_users) {
            section.problem("", "is unreachable: an earlier route matches all users");
        }
        let Some(raw) = section.read::<RouteSection>(item) else { continue };
        match raw.into_source() {
            Some(source) => routes.extend(check_source(&mut section, &declared, source)),
            None => section.consequence("", format!("expected exactly one of {KINDS}")),
        }
    }
    routes
}

fn check_source(section: &mut Section<'_>, declared: &DeclaredBackends<'_>, source: Source) -> Option<Route> {
    match source {
        Source::Table(path) => Some(Route::Table(section.file("table", &path))),
        Source::Domain(domains) => Some(Route::Domain(check_domains(&mut section.child("domain"), declared, domains))),
        Source::Regex(rules) => Some(Route::Regex(check_rules(&mut section.child("regex"), rules))),
        Source::Hash(raw) => Some(hash::check(&mut section.child("hash"), declared, raw)),
        Source::Default(name) => declared.resolve(section, "default", &name).map(Route::Default),
        Source::Sql(value) => sql::check(RouteReader::new(section.child("sql"), declared), value),
        Source::Ldap(value) => ldap::check(RouteReader::new(section.child("ldap"), declared), value),
        Source::Http(value) => http::check(RouteReader::new(section.child("http"), declared), value),
        Source::Redis(value) => redis::check(RouteReader::new(section.child("redis"), declared), value),
        Source::Dns(value) => dns::check(RouteReader::new(section.child("dns"), declared), value),
    }
}

fn check_domains(
    section: &mut Section<'_>,
    declared: &DeclaredBackends<'_>,
    domains: BTreeMap<String, String>,
) -> BTreeMap<String, BackendId> {
    if domains.is_empty() {
        section.consequence("", "at least one domain is required, like example.org: BACKEND");
    }
    let mut by_domain = BTreeMap::new();
    for (key, name) in domains {
        let domain = key.strip_prefix('@').unwrap_or(&key).to_ascii_lowercase();
        if !is_domain(&domain) {
            section.problem(&key, "is not a valid domain, like example.org");
            continue;
        }
        let Some(backend) = declared.resolve(section, &key, &name) else { continue };
        if by_domain.insert(domain, backend).is_some() {
            section.problem(&key, "duplicate domain (letter case and a leading @ do not count)");
        }
    }
    by_domain
}

/// Whether the text may follow the last `@` of a user name. All scripts are allowed; only ASCII letters are folded.
fn is_domain(text: &str) -> bool {
    !text.is_empty()
        && !text.contains(|char: char| matches!(char, '@' | '*') || char.is_whitespace() || char.is_control())
}

fn check_rules(section: &mut Section<'_>, items: Vec<Value>) -> Vec<RegexRule> {
    if items.is_empty() {
        section.consequence("", "at least one rule is required, like {match: '@example\\.org$', to: BACKEND}");
    }
    let mut rules = Vec::new();
    for (index, item) in items.into_iter().enumerate() {
        let mut section = section.child(&format!("[{index}]"));
        let Some(raw) = section.read::<RegexSection>(item) else { continue };
        rules.push(RegexRule { pattern: raw.r#match, to: raw.to, location: section.location("") });
    }
    rules
}
