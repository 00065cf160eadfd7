//! The sources of a configuration: builds each from its section, and looks users up.

use std::sync::Arc;

use super::answer::DeclaredBackends;
use super::cached_directory::CachedDirectory;
use super::decision::{LookupOrigin, LookupResult, RouteDecision};
use super::directory::Directory;
use super::input_digest::InputDigest;
use super::request::LookupRequest;
use super::sources;
use crate::config::{self, Config, Problem};
use crate::metrics::RouteMetrics;

/// One source. The set is closed, so an enum serves instead of a trait object.
#[derive(Debug)]
pub(super) enum Source {
    Table(Arc<sources::table::Table>),
    Domain(sources::domain::Domains),
    Regex(sources::regex::Rules),
    Hash(sources::hash::Hash),
    Default(Arc<RouteDecision>),
    Directory(Arc<CachedDirectory>, Option<InputDigest>),
}

impl Source {
    /// Builds the source of `route`. Takes over from `previous`, the source of an equal section in the previous configuration, what is
    /// still valid: an unchanged table, the cache, and a directory with its connections.
    pub(super) fn build(
        config: &Config,
        route: &config::Route,
        declared: &DeclaredBackends,
        metrics: &RouteMetrics,
        previous: Option<&Self>,
    ) -> Result<Self, Vec<Problem>> {
        let digest = InputDigest::of(config, route);
        let previous_directory =
            if let Some(Self::Directory(directory, digest)) = previous { Some((directory, *digest)) } else { None };
        let reused = previous_directory.filter(|(_, before)| digest.is_some() && *before == digest);
        let cached = |build: &dyn Fn() -> Result<Directory, Vec<Problem>>, lookup: &config::LookupConfig| {
            let directory = match reused {
                Some((previous, _)) => previous.directory().clone(),
                None => build()?.into(),
            };
            let directory = CachedDirectory::new(directory, lookup, declared.clone(), metrics.clone())
                .with_cache_of(previous_directory.map(|(previous, _)| &**previous))
                .with_thread_of(reused.map(|(previous, _)| &**previous));
            Ok::<_, Vec<Problem>>(Self::Directory(directory.into(), digest))
        };
        Ok(match route {
            config::Route::Table(path) => match previous {
                Some(Self::Table(table)) if table.is_current(&path.value, declared) => Self::Table(table.clone()),
                _ => Self::Table(Arc::new(sources::table::Table::load(path, declared)?)),
            },
            config::Route::Domain(domains) => Self::Domain(sources::domain::Domains::new(domains)),
            config::Route::Regex(rules) => Self::Regex(sources::regex::Rules::build(rules, declared)?),
            config::Route::Hash { style, shares } => Self::Hash(sources::hash::Hash::new(config, *style, shares)),
            config::Route::Default(backend) => Self::Default(RouteDecision::backend(*backend).into()),
            config::Route::Sql(sql) => {
                cached(&|| Ok(Directory::Sql(Box::new(sources::sql::Sql::build(sql, declared)?))), &sql.lookup)?
            }
            config::Route::Ldap(ldap) => {
                cached(&|| Ok(Directory::Ldap(Box::new(sources::ldap::Ldap::build(ldap, declared)?))), &ldap.lookup)?
            }
            config::Route::Http(http) => cached(
                &|| Ok(Directory::Http(Box::new(sources::http::Http::build(config, http, declared)?))),
                &http.lookup,
            )?,
            config::Route::Redis(redis) => cached(
                &|| Ok(Directory::Redis(Box::new(sources::redis::Redis::build(redis, declared)?))),
                &redis.lookup,
            )?,
            config::Route::Dns(dns) => {
                cached(&|| Ok(Directory::Dns(Box::new(sources::dns::Dns::new(config, dns, declared)))), &dns.lookup)?
            }
        })
    }

    pub(super) async fn lookup(&self, request: &LookupRequest) -> (LookupResult, LookupOrigin) {
        let user = &*request.user;
        let result = match self {
            Self::Table(table) => table.lookup(user),
            Self::Domain(domains) => domains.lookup(user),
            Self::Regex(rules) => rules.lookup(user),
            Self::Hash(hash) => hash.lookup(user),
            Self::Default(decision) => LookupResult::Found(decision.clone()),
            Self::Directory(directory, _) => return directory.lookup(request.clone()).await,
        };
        (result, LookupOrigin::Memory)
    }

    /// The directory of this source, if it queries one.
    pub(super) fn directory(&self) -> Option<&Arc<CachedDirectory>> {
        match self {
            Self::Directory(directory, _) => Some(directory),
            _ => None,
        }
    }
}
