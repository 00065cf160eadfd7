//! Keys that all sources with an external service have in common: `timeout`, `connections`, `cache` and `names`; and the
//! checks that they share.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;

use super::DeclaredBackends;
use crate::config::error::Located;
use crate::config::sections::backends::BackendId;
use crate::config::yaml::{DurationText, OneOrMany, Section, Shorthand, WordOrMap, seconds};
use crate::template::Template;

/// Fields of an answer: names of columns, keys of JSON, and keys of `ldap.attributes`.
pub const ANSWER_FIELDS: [&str; 7] = ["backend", "server", "user", "master", "password", "refuse", "maintenance"];

/// The value of `cache`.
pub(super) type WrittenCache = Option<WordOrMap<Off, CacheSection>>;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Off {
    Off,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct CacheSection {
    ttl: Option<DurationText>,
    negative: Option<DurationText>,
    stale: Option<DurationText>,
    entries: Option<i64>,
    file: Option<PathBuf>,
}

impl Shorthand for CacheSection {
    const EXPECTED: &'static str = "off, or a map with ttl, negative, stale, entries or file";
}

/// The common keys. Each source repeats them, because serde cannot refuse unknown keys in flattened structs.
#[derive(Debug)]
pub(super) struct LookupSection {
    pub(super) timeout: Option<DurationText>,
    pub(super) connections: Option<i64>,
    pub(super) cache: WrittenCache,
    pub(super) names: BTreeMap<String, String>,
}

/// Declares the map of a source: its own keys, and those of [`LookupSection`].
macro_rules! lookup_section {
    ($name:ident { $($(#[$meta:meta])* $field:ident: $type:ty,)* }) => {
        #[derive(Debug, serde::Deserialize)]
        #[serde(deny_unknown_fields)]
        struct $name {
            $($(#[$meta])* $field: $type,)*
            timeout: Option<crate::config::yaml::DurationText>,
            connections: Option<i64>,
            cache: super::lookup::WrittenCache,
            #[serde(default)]
            names: std::collections::BTreeMap<String, String>,
        }

        impl $name {
            fn take_lookup(&mut self) -> super::lookup::LookupSection {
                super::lookup::LookupSection {
                    timeout: self.timeout,
                    connections: self.connections,
                    cache: self.cache.take(),
                    names: std::mem::take(&mut self.names),
                }
            }
        }
    };
}
pub(super) use lookup_section;

/// How a source is queried.
#[derive(Debug, Clone, PartialEq)]
pub struct LookupConfig {
    /// Timeout of one query.
    pub timeout: Duration,
    /// Maximum number of concurrent queries and of connections.
    pub connections: usize,
    /// The cache; `None` means that every login is a query.
    pub cache: Option<CacheConfig>,
    /// Backends by the names that the source uses for them, if these differ from the configuration's.
    pub names: BTreeMap<String, BackendId>,
}

impl Default for LookupConfig {
    fn default() -> Self {
        let cache = Some(CacheConfig::default());
        Self { timeout: Duration::from_secs(2), connections: 8, cache, names: BTreeMap::new() }
    }
}

/// How long the results of lookups are cached.
#[derive(Debug, Clone, PartialEq)]
pub struct CacheConfig {
    /// Lifetime of the result for a user that was found.
    pub ttl: Duration,
    /// Lifetime of the result for an unknown user.
    pub negative: Duration,
    /// Additional lifetime of results while the source is unavailable.
    pub stale: Duration,
    /// Maximum number of users.
    pub entries: usize,
    /// File in which results are saved for the next start.
    pub file: Option<Located<PathBuf>>,
}

impl Default for CacheConfig {
    fn default() -> Self {
        Self {
            ttl: Duration::from_secs(60),
            negative: Duration::from_secs(10),
            stale: Duration::from_secs(3600),
            entries: 100_000,
            file: None,
        }
    }
}

/// Reads the map of a source.
pub(super) struct RouteReader<'a> {
    pub(super) section: Section<'a>,
    declared: &'a DeclaredBackends<'a>,
}

impl<'a> RouteReader<'a> {
    pub(super) fn new(section: Section<'a>, declared: &'a DeclaredBackends<'a>) -> Self {
        Self { section, declared }
    }

    pub(super) fn problem(&mut self, name: &str, message: impl Into<String>) {
        self.section.problem(name, message);
    }

    pub(super) fn file(&self, name: &str, path: Option<&Path>) -> Option<Located<PathBuf>> {
        self.section.optional_file(name, path)
    }

    pub(super) fn backend(&mut self, key: &str, name: &str) -> Option<BackendId> {
        self.declared.resolve(&mut self.section, key, name)
    }

    pub(super) fn lookup(&mut self, raw: LookupSection) -> LookupConfig {
        let default = LookupConfig::default();
        let mut names = BTreeMap::new();
        for (name, backend) in raw.names {
            if let Some(id) = self.backend(&format!("names.{name}"), &backend) {
                names.insert(name, id);
            }
        }
        let section = &mut self.section;
        LookupConfig {
            timeout: section.duration("timeout", raw.timeout, default.timeout, seconds(0, 60)),
            connections: section.count("connections", raw.connections, default.connections, 1..=1000),
            cache: match raw.cache {
                Some(WordOrMap::Word(Off::Off)) => None,
                Some(WordOrMap::Map(map)) => Some(map.check(&mut section.child("cache"))),
                None => default.cache,
            },
            names,
        }
    }

    pub(super) fn template(&mut self, name: &str, text: &str) -> Option<Template> {
        Template::new(text).map_err(|unknown| self.problem(name, unknown.to_string())).ok()
    }

    /// A template that must contain a variable.
    pub(super) fn template_with_user(&mut self, name: &str, text: &str) -> Option<Template> {
        let template = self.template(name, text)?;
        if template.is_constant() {
            self.problem(name, "is the same for every user: use %{user}");
        }
        Some(template)
    }

    /// A URL without a password, because URLs appear in logs.
    pub(super) fn url(&mut self, name: &str, text: &str, schemes: &[&str]) -> Option<Located<String>> {
        if !schemes.iter().any(|scheme| text.starts_with(scheme)) {
            self.problem(name, format!("expected a URL that begins with {}", schemes.join(" or ")));
            return None;
        }
        let authority = text.split_once("://").and_then(|(_, rest)| rest.split(['/', '?']).next()).unwrap_or_default();
        if authority.rsplit_once('@').is_some_and(|(user, _)| user.contains(':')) {
            self.problem(name, "must not contain a password; put it into a file and set password_file");
            return None;
        }
        Some(self.section.located(name, text.to_owned()))
    }

    pub(super) fn urls(&mut self, name: &str, urls: &OneOrMany, schemes: &[&str]) -> Vec<Located<String>> {
        let urls = urls.with_keys(name);
        if urls.is_empty() {
            self.problem(name, "at least one URL is required");
        }
        urls.iter().filter_map(|(key, url)| self.url(key, url, schemes)).collect()
    }
}

impl CacheSection {
    fn check(self, section: &mut Section<'_>) -> CacheConfig {
        let (day, default) = (24 * 3600, CacheConfig::default());
        CacheConfig {
            ttl: section.duration("ttl", self.ttl, default.ttl, seconds(1, day)),
            negative: section.duration("negative", self.negative, default.negative, seconds(0, day)),
            stale: section.duration("stale", self.stale, default.stale, seconds(1, 30 * day)),
            entries: section.count("entries", self.entries, default.entries, 100..=100_000_000),
            file: section.optional_file("file", self.file.as_deref()),
        }
    }
}
