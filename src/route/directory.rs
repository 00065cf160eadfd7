//! The sources that are asked over a network, or from a file that other programs write: a closed set, one file each.
//!
//! All are built without a word to anybody and connect when they are first asked. Called by `asked`.

use super::LookupResult;
use super::request::LookupRequest;
use super::sources::{dns, http, ldap, redis, sql};
use crate::lookup::hedge::Budget;
use crate::tls;

/// A directory.
#[derive(Debug)]
pub(super) enum Directory {
    Sql(Box<sql::Sql>),
    Ldap(Box<ldap::Directory>),
    Http(Box<http::Http>),
    Redis(Box<redis::Redis>),
    Dns(Box<dns::Dns>),
    /// For tests of what is around it.
    #[cfg(test)]
    Scripted(super::cached_directory::tests::Scripted),
}

impl Directory {
    /// One question. The caller ends it at the deadline of `budget`, and bounds how many are asked at a time.
    pub(super) async fn ask(&self, question: &LookupRequest, budget: &Budget) -> LookupResult {
        let answer = match self {
            Self::Sql(sql) => sql.ask(question, budget).await,
            Self::Ldap(ldap) => ldap.ask(question, budget).await,
            Self::Http(http) => http.ask(question, budget).await,
            Self::Redis(redis) => redis.ask(question, budget).await,
            Self::Dns(dns) => dns.ask(question).await,
            #[cfg(test)]
            Self::Scripted(scripted) => scripted.ask(question).await,
        };
        match answer {
            LookupResult::Failed(reason) => LookupResult::Failed(tls::explain_error(reason)),
            other => other,
        }
    }

    /// Closes connections that have not been used for long. Clients of HTTP do that by themselves, and Redis has only one.
    pub(super) fn close_expired(&self) {
        match self {
            Self::Sql(sql) => sql.close_expired(),
            Self::Ldap(ldap) => ldap.close_expired(),
            _ => {}
        }
    }

    /// Closes all connections that are not in use: the next configuration does not have this directory.
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
