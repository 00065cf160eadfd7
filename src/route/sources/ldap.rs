//! Routes by an LDAP directory (RFC 4511).
//!
//! A lookup searches one entry, whose attributes are the fields of an answer. No entry, or an entry without these attributes, means an
//! unknown user; a second entry, or a second value of an attribute, fails the lookup. Values in the filter are escaped by
//! RFC 4515, values in the base by RFC 4514. Connections are bound once and reused; a dead or silent connection is replaced
//! within the same lookup (see `hedge`).

use std::sync::Arc;
use std::time::Instant;

use ldap3::{
    Ldap as Connection, LdapConnAsync, LdapConnSettings, LdapError, Scope, SearchEntry, SearchOptions, StdStream,
    dn_escape, ldap_escape,
};
use tokio::net::TcpStream;
use tokio_rustls::rustls::ClientConfig;
use zeroize::Zeroizing;

use crate::config::{self, LdapScope, Problem};
use crate::lookup::hedge::{Budget, hedged};
use crate::lookup::tcp_liveness;
use crate::route::LookupResult;
use crate::route::answer::{AnswerFields, DeclaredBackends};
use crate::route::idle_connections::IdleConnections;
use crate::route::request::LookupRequest;
use crate::template::Template;
use crate::tls;

/// RFC 4511 section 4.1.9, noSuchObject: the base does not exist.
const NO_SUCH_OBJECT: u32 = 32;
/// A search that finds more references to other servers fails.
const MAX_REFERENCES: usize = 64;

/// An LDAP directory that receives one search per lookup.
pub(in crate::route) struct Ldap {
    url: String,
    starttls: bool,
    tls: Option<Arc<ClientConfig>>,
    bind: Option<(String, Zeroizing<String>)>,
    base: Template,
    scope: Scope,
    filter: Template,
    /// Names of the fields of an answer and of their attributes.
    attributes: Vec<(String, String)>,
    /// Host and port.
    server: (String, u16),
    /// Bound connections that are not in use.
    idle: IdleConnections<Connection>,
    declared: DeclaredBackends,
}

impl std::fmt::Debug for Ldap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ldap").field("url", &self.url).finish_non_exhaustive()
    }
}

impl Ldap {
    /// # Errors
    /// An invalid URL, or a password file or `ca` that cannot be read.
    pub(in crate::route) fn build(ldap: &config::Ldap, declared: &DeclaredBackends) -> Result<Self, Vec<Problem>> {
        let bind = match (&ldap.bind, &ldap.password) {
            (Some(name), Some(file)) => Some((name.clone(), file.read_secret().map_err(|problem| vec![problem])?)),
            _ => None,
        };
        let encrypted = ldap.starttls || ldap.url.value.starts_with("ldaps://");
        let tls = encrypted.then(|| tls::upstream::verified_config(ldap.ca.as_ref(), &ldap.url.location)).transpose();
        Ok(Self {
            server: host_and_port(&ldap.url.value).map_err(|message| vec![ldap.url.location.problem(message)])?,
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
            idle: IdleConnections::new(ldap.lookup.connections),
            declared: declared.clone().with_directory_names(&ldap.lookup.names),
        })
    }

    pub(in crate::route) async fn query(&self, request: &LookupRequest, budget: &Budget) -> LookupResult {
        match self.find_entry(&request.user, budget).await {
            Err(error) => LookupResult::Failed(error.to_string().replace(char::is_control, " ")),
            Ok(None) => LookupResult::Unknown,
            Ok(Some(entry)) => self.check_entry(&entry),
        }
    }

    /// Closes connections that have been idle for long.
    pub(in crate::route) fn close_expired(&self) {
        self.idle.remove_expired(Instant::now());
    }

    /// Closes all idle connections, and those in use when their lookup ends.
    pub(in crate::route) fn retire(&self) {
        self.idle.close();
    }

    async fn find_entry(&self, user: &str, budget: &Budget) -> Result<Option<SearchEntry>, LdapError> {
        let began = Instant::now();
        let fresh = async {
            let connection = budget.connecting(self.connect()).await?;
            self.search_on(connection, user).await
        };
        let found = match self.idle.take(began) {
            Some(connection) => {
                hedged(self.search_on(connection, user), budget.patience(), fresh, || self.remove_older_than(began))
                    .await?
            }
            None => fresh.await?,
        };
        found.into_entry()
    }

    /// Searches on this connection, which is reused afterwards unless there was an error.
    async fn search_on(&self, mut connection: Connection, user: &str) -> Result<SearchResult, LdapError> {
        let found = self.search(&mut connection, user).await?;
        // A connection whose answer was not read to its end is closed by its drop.
        if let SearchResult::Entry(_) = found {
            self.idle.put(connection, Instant::now());
        }
        Ok(found)
    }

    /// Closes idle connections that were last used before `time`, because one of that age has failed.
    fn remove_older_than(&self, time: Instant) {
        self.idle.remove_older_than(time);
    }

    async fn connect(&self) -> Result<Connection, LdapError> {
        let (host, port) = &self.server;
        let socket = TcpStream::connect((host.as_str(), *port)).await?;
        tcp_liveness::apply(&socket);
        let mut settings =
            LdapConnSettings::new().set_starttls(self.starttls).set_std_stream(StdStream::Tcp(socket.into_std()?));
        if let Some(tls) = &self.tls {
            settings = settings.set_config(tls.clone());
        }
        let (driver, mut connection) =
            LdapConnAsync::with_settings(settings, &self.url).await.map_err(|error| match error {
                LdapError::LdapResult { result } => {
                    std::io::Error::other(format!("the server refuses StartTLS: {result}")).into()
                }
                other => other,
            })?;
        // The task ends with the last handle of the connection.
        tokio::spawn(async move {
            if let Err(error) = driver.drive().await {
                tracing::debug!(%error, "an LDAP connection ended");
            }
        });
        if let Some((name, password)) = &self.bind {
            connection.simple_bind(name, password).await?.success()?;
        }
        Ok(connection)
    }

    async fn search(&self, connection: &mut Connection, user: &str) -> Result<SearchResult, LdapError> {
        let (base, filter) = (filled_base(&self.base, user), filled_filter(&self.filter, user));
        let attributes: Vec<&str> = self.attributes.iter().map(|(_, attribute)| attribute.as_str()).collect();
        let mut search = connection
            .with_search_options(SearchOptions::new().sizelimit(2))
            .streaming_search(&base, self.scope, &filter, attributes)
            .await?;
        let (mut entry, mut references) = (None, 0);
        while let Some(item) = search.next().await? {
            if item.is_ref() {
                references += 1;
                if references > MAX_REFERENCES {
                    return Ok(SearchResult::TooMuch("the search found too many references"));
                }
            } else if entry.replace(item).is_some() {
                return Ok(SearchResult::TooMuch("the search found more than one entry"));
            }
        }
        let result = search.finish().await;
        if result.rc == NO_SUCH_OBJECT && !self.base.is_constant() {
            return Ok(SearchResult::Entry(None));
        }
        // A server may count references towards the size limit.
        if result.rc != 0 && usize::from(entry.is_some()) + references < 2 {
            return Err(result.into());
        }
        Ok(SearchResult::Entry(entry.map(SearchEntry::construct)))
    }

    fn check_entry(&self, entry: &SearchEntry) -> LookupResult {
        let mut fields = AnswerFields::default();
        for (field, attribute) in &self.attributes {
            // Attribute names are case-insensitive (RFC 4512 section 2.5).
            let values = entry.attrs.iter().find(|(name, _)| name.eq_ignore_ascii_case(attribute));
            match values.map_or(&[][..], |(_, values)| &values[..]) {
                [] => {}
                [value] => fields.set(field, value),
                _ => return LookupResult::Failed(format!("the entry has more than one {attribute}")),
            }
        }
        LookupResult::from(self.declared.check_fields(fields))
    }
}

/// Fills the base for a user; values are escaped by RFC 4514.
fn filled_base(base: &Template, user: &str) -> String {
    base.fill(user, |value| dn_escape(value).into_owned())
}

/// Fills the filter for a user; values are escaped by RFC 4515.
fn filled_filter(filter: &Template, user: &str) -> String {
    filter.fill(user, |value| ldap_escape(value).into_owned())
}

/// Splits a URL into host and port. The default host is localhost, the default port that of the scheme.
fn host_and_port(url: &str) -> Result<(String, u16), String> {
    let (scheme, rest) = url.split_once("://").ok_or("the URL has no scheme")?;
    let authority = rest.split(['/', '?']).next().unwrap_or_default();
    let (host, port) = match authority.strip_prefix('[') {
        Some(rest) => rest.split_once(']').ok_or("the URL has an unclosed bracket")?,
        None => authority.split_at(authority.find(':').unwrap_or(authority.len())),
    };
    let port = match port.strip_prefix(':').unwrap_or(port) {
        "" => {
            if scheme == "ldaps" {
                636
            } else {
                389
            }
        }
        digits => digits.parse().map_err(|_| format!("the URL has an invalid port: {digits:?}"))?,
    };
    Ok((if host.is_empty() { "localhost" } else { host }.to_owned(), port))
}

/// Result of a search.
enum SearchResult {
    /// At most one entry. The answer was read to its end.
    Entry(Option<SearchEntry>),
    /// More than a lookup may find. The rest of the answer was not read.
    TooMuch(&'static str),
}

impl SearchResult {
    fn into_entry(self) -> Result<Option<SearchEntry>, LdapError> {
        match self {
            Self::Entry(entry) => Ok(entry),
            Self::TooMuch(reason) => Err(std::io::Error::other(reason).into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOSTILE: [&str; 14] = [
        "a b=c",
        "x server=y",
        "*)(uid=*",
        "*",
        "a' OR '1'='1",
        "$1",
        "%{user}",
        "\"q\"",
        "a\nb\0",
        "a\\2a",
        "zo\u{eb}\u{4e2d}",
        "#x,dc=y+cn=z;q<r>",
        "(|(mail=*))",
        "x\\",
    ];

    /// Parses a filter with the library that sends it, and replaces the user's name in the result.
    fn shape_of_filter(filter: &str, user: &str) -> String {
        let template = Template::new(filter).unwrap();
        let parsed = ldap3::parse_filter(filled_filter(&template, user)).unwrap_or_else(|()| panic!("{user:?}"));
        let (parsed, name) = (format!("{parsed:?}"), format!("{:?}", user.as_bytes()));
        assert!(parsed.contains(&name), "{user:?}: {parsed}");
        parsed.replace(&name, "NAME")
    }

    #[test]
    fn hostile_names_are_values_of_the_filter() {
        let long = "n".repeat(512);
        for filter in ["(mail=%{user})", "(&(objectClass=person)(|(mail=%{user})(uid=%{user})))", "(mail=*%{user}*)"] {
            let expected = shape_of_filter(filter, "alice");
            for user in HOSTILE.into_iter().chain([&*long]) {
                assert_eq!(shape_of_filter(filter, user), expected, "{user:?}");
            }
        }
    }

    #[test]
    fn hostile_names_are_values_of_the_base() {
        let base = Template::new("uid=%{user},ou=x,dc=test").unwrap();
        for user in HOSTILE {
            let filled = filled_base(&base, user);
            // Two hexadecimal digits follow each backslash (RFC 4514 section 3).
            let mut parts = filled.split('\\');
            let mut unescaped = parts.next().unwrap().to_owned();
            parts.for_each(|part| unescaped.push_str(&part[2..]));
            let separators = unescaped.matches([',', '+', ';', '<', '>', '"', '\0']).count();
            assert_eq!((separators, unescaped.matches('=').count()), (2, 3), "{user:?}: {filled}");
            assert!(!unescaped.starts_with("uid=#") && !unescaped.starts_with("uid= "), "{filled}");
        }
    }

    #[test]
    fn url_is_split_into_host_and_port() {
        for (url, host, port) in [
            ("ldap://ldap.internal", "ldap.internal", 389),
            ("ldaps://ldap.internal/dc=test", "ldap.internal", 636),
            ("ldap://127.0.0.1:3890/?x", "127.0.0.1", 3890),
            ("ldaps://[2001:db8::1]:6360", "2001:db8::1", 6360),
            ("ldap://[::1]", "::1", 389),
            ("ldap:///", "localhost", 389),
        ] {
            assert_eq!(host_and_port(url), Ok((host.to_owned(), port)), "{url}");
        }
        for url in ["ldap://host:port", "ldap://host:70000", "ldap://[::1", "host"] {
            assert!(host_and_port(url).is_err(), "{url}");
        }
    }
}
