//! The sources that are asked over a network, or from a file that other programs write: a closed set, one file each.
//!
//! All are built without a word to anybody and connect when they are first asked. Called by `asked`.

use super::question::Question;
use super::target::Target;
use super::{Answer, dns, http, ldap, redis, sql};

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
    Scripted(super::asked_tests::Scripted),
}

impl Directory {
    /// One question. The caller sets the deadline and bounds how many are asked at a time.
    pub(super) async fn ask(&self, question: &Question) -> Answer {
        match self {
            Self::Sql(sql) => sql.ask(question).await,
            Self::Ldap(ldap) => ldap.ask(question).await,
            Self::Http(http) => http.ask(question).await,
            Self::Redis(redis) => redis.ask(question).await,
            Self::Dns(dns) => dns.ask(question).await,
            #[cfg(test)]
            Self::Scripted(scripted) => scripted.ask(question).await,
        }
    }
}

/// A checked answer, from what [`Declared`] made of it.
pub(super) fn answer(read: Result<Option<Target>, String>) -> Answer {
    match read {
        Ok(Some(target)) => Answer::Found(target.into()),
        Ok(None) => Answer::Unknown,
        Err(reason) => Answer::Failed(reason),
    }
}
