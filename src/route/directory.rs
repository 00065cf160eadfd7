//! The directories: sources that are queried over a network, or from a file that other programs write.
//!
//! Building a directory does not connect to it; the first lookup does.

use super::decision::LookupResult;
use super::request::LookupRequest;
use super::sources::{dns, http, ldap, redis, sql};
use crate::lookup::hedge::Budget;
use crate::tls;

/// One directory. The set is closed, so an enum serves instead of a trait object.
#[derive(Debug)]
pub(super) enum Directory {
    Sql(Box<sql::Sql>),
    Ldap(Box<ldap::Ldap>),
    Http(Box<http::Http>),
    Redis(Box<redis::Redis>),
    Dns(Box<dns::Dns>),
    #[cfg(test)]
    Scripted(super::cached_directory::tests::Scripted),
}

impl Directory {
    /// Queries the directory once. The caller ends the query at the deadline of `budget`, and limits concurrent queries.
    pub(super) async fn query(&self, request: &LookupRequest, budget: &Budget) -> LookupResult {
        let result = match self {
            Self::Sql(sql) => sql.query(request, budget).await,
            Self::Ldap(ldap) => ldap.query(request, budget).await,
            Self::Http(http) => http.query(request, budget).await,
            Self::Redis(redis) => redis.query(request, budget).await,
            Self::Dns(dns) => dns.query(request).await,
            #[cfg(test)]
            Self::Scripted(scripted) => scripted.query(request).await,
        };
        match result {
            LookupResult::Failed(reason) => LookupResult::Failed(tls::explain_error(reason)),
            other => other,
        }
    }

    /// Closes connections that have been idle for long. The HTTP client does that itself, and Redis has a single connection.
    pub(super) fn close_expired(&self) {
        match self {
            Self::Sql(sql) => sql.close_expired(),
            Self::Ldap(ldap) => ldap.close_expired(),
            _ => {}
        }
    }

    /// Closes all idle connections, because the next configuration does not use this directory.
    pub(super) fn retire(&self) {
        match self {
            Self::Sql(sql) => sql.retire(),
            Self::Ldap(ldap) => ldap.retire(),
            Self::Http(http) => http.retire(),
            Self::Redis(redis) => redis.retire(),
            Self::Dns(_) => {}
            #[cfg(test)]
            Self::Scripted(_) => {}
        }
    }
}
