//! Route by an LDAP directory (RFC 4511).
//!
//! One entry is searched; its attributes are the fields of an answer. No entry, or one without any of them, is an unknown
//! user; a second entry, or a second value of an attribute, is a failure. What is filled into the filter is escaped by
//! RFC 4515, what is filled into the base by RFC 4514. Connections are bound once and used again; one that has died
//! meanwhile is replaced within the same question.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use ldap3::{
    Ldap, LdapConnAsync, LdapConnSettings, LdapError, Scope, SearchEntry, SearchOptions, dn_escape, ldap_escape,
};
use tokio_rustls::rustls::ClientConfig;
use zeroize::Zeroizing;

use super::Answer;
use super::directory::answer;
use super::question::Question;
use super::target::{Declared, Fields};
use crate::config::{self, Config, LdapScope, Problem};
use crate::template::Template;
use crate::tls;

/// RFC 4511 section 4.1.9, noSuchObject: the base does not exist.
const NO_SUCH_OBJECT: u32 = 32;

/// A search a user.
pub(super) struct Directory {
    url: String,
    starttls: bool,
    tls: Option<Arc<ClientConfig>>,
    bind: Option<(String, Zeroizing<String>)>,
    base: Template,
    scope: Scope,
    filter: Template,
    /// Field and attribute.
    attributes: Vec<(String, String)>,
    timeout: Duration,
    /// Bound, and used by nobody just now.
    idle: Mutex<Vec<Ldap>>,
    declared: Declared,
}

impl std::fmt::Debug for Directory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ldap::Directory").field("url", &self.url).finish_non_exhaustive()
    }
}

impl Directory {
    /// # Errors
    /// A password file or a `ca` that cannot be read.
    pub(super) fn build(config: &Config, ldap: &config::Ldap, declared: &Declared) -> Result<Self, Vec<Problem>> {
        let bind = match (&ldap.bind, &ldap.password) {
            (Some(name), Some(file)) => {
                Some((name.clone(), file.read_secret(config).map_err(|problem| vec![problem])?))
            }
            _ => None,
        };
        let encrypted = ldap.starttls || ldap.url.value.starts_with("ldaps://");
        let tls = encrypted.then(|| tls::client::verified(config, ldap.ca.as_ref(), &ldap.url.place)).transpose();
        Ok(Self {
            url: ldap.url.value.clone(),
            starttls: ldap.starttls,
            tls: tls.map_err(|problem| vec![problem])?.map(Arc::new),
            bind,
            base: ldap.base.clone(),
            scope: match ldap.scope {
                LdapScope::Base => Scope::Base,
                LdapScope::One => Scope::OneLevel,
                LdapScope::Sub => Scope::Subtree,
            },
            filter: ldap.filter.clone(),
            attributes: ldap.attributes.clone().into_iter().collect(),
            timeout: ldap.asking.timeout,
            idle: Mutex::default(),
            declared: declared.clone().with_names(&ldap.asking.names),
        })
    }

    pub(super) async fn ask(&self, question: &Question) -> Answer {
        match self.entry(&question.user).await {
            Err(error) => Answer::Failed(error.to_string().replace(char::is_control, " ")),
            Ok(None) => Answer::Unknown,
            Ok(Some(entry)) => self.read(&entry),
        }
    }

    async fn entry(&self, user: &str) -> Result<Option<SearchEntry>, LdapError> {
        let pooled = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
        if let Some(mut ldap) = pooled
            && !ldap.is_closed()
            && let Ok(found) = self.search(&mut ldap, user).await
        {
            self.keep(ldap);
            return found.single();
        }
        let mut ldap = self.connect().await?;
        let found = self.search(&mut ldap, user).await?;
        self.keep(ldap);
        found.single()
    }

    async fn connect(&self) -> Result<Ldap, LdapError> {
        let mut settings = LdapConnSettings::new().set_conn_timeout(self.timeout).set_starttls(self.starttls);
        if let Some(tls) = &self.tls {
            settings = settings.set_config(tls.clone());
        }
        let (connection, mut ldap) = LdapConnAsync::with_settings(settings, &self.url).await?;
        // Ends with the last handle.
        tokio::spawn(async move {
            if let Err(error) = connection.drive().await {
                tracing::debug!(%error, "an LDAP connection ended");
            }
        });
        if let Some((name, password)) = &self.bind {
            ldap.with_timeout(self.timeout).simple_bind(name, password).await?.success()?;
        }
        Ok(ldap)
    }

    async fn search(&self, ldap: &mut Ldap, user: &str) -> Result<Found, LdapError> {
        let base = self.base.fill(user, |value| dn_escape(value).into_owned());
        let filter = self.filter.fill(user, |value| ldap_escape(value).into_owned());
        let attributes: Vec<&str> = self.attributes.iter().map(|(_, attribute)| attribute.as_str()).collect();
        let search = ldap
            .with_timeout(self.timeout)
            .with_search_options(SearchOptions::new().sizelimit(2))
            .search(&base, self.scope, &filter, attributes)
            .await?;
        // sizeLimitExceeded comes with the entries that were found within it, which are too many already.
        let (entries, result) = (search.0, search.1);
        if result.rc == NO_SUCH_OBJECT && !self.base.is_constant() {
            return Ok(Found(Vec::new()));
        }
        if result.rc != 0 && entries.len() < 2 {
            return Err(result.into());
        }
        Ok(Found(entries.into_iter().filter(|entry| !entry.is_ref()).map(SearchEntry::construct).collect()))
    }

    fn keep(&self, ldap: Ldap) {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).push(ldap);
    }

    fn read(&self, entry: &SearchEntry) -> Answer {
        let mut fields = Fields::default();
        for (field, attribute) in &self.attributes {
            // RFC 4512 section 2.5: descriptions compare without regard to letter case.
            let values = entry.attrs.iter().find(|(name, _)| name.eq_ignore_ascii_case(attribute));
            match values.map_or(&[][..], |(_, values)| &values[..]) {
                [] => {}
                [value] => fields.set(field, value),
                _ => return Answer::Failed(format!("the entry has more than one {attribute}")),
            }
        }
        answer(self.declared.fields(fields))
    }
}

/// What a search found.
struct Found(Vec<SearchEntry>);

impl Found {
    fn single(mut self) -> Result<Option<SearchEntry>, LdapError> {
        match self.0.len() {
            0 | 1 => Ok(self.0.pop()),
            _ => Err(std::io::Error::other("the search finds more than one entry").into()),
        }
    }
}
