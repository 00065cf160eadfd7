//! Route by an LDAP directory (RFC 4511).
//!
//! One entry is searched; its attributes are the fields of an answer. No entry, or one without any of them, is an unknown
//! user; a second entry, or a second value of an attribute, is a failure. What is filled into the filter is escaped by
//! RFC 4515, what is filled into the base by RFC 4514. Connections are bound once and used again; one that has died
//! or fallen silent is replaced within the same lookup (see `hedge`).

use std::sync::Arc;
use std::time::Instant;

use ldap3::{
    Ldap, LdapConnAsync, LdapConnSettings, LdapError, Scope, SearchEntry, SearchOptions, StdStream, dn_escape,
    ldap_escape,
};
use tokio::net::TcpStream;
use tokio_rustls::rustls::ClientConfig;
use zeroize::Zeroizing;

use crate::config::{self, LdapScope, Problem};
use crate::lookup::hedge::{Budget, hedged};
use crate::lookup::tcp_liveness;
use crate::route::LookupResult;
use crate::route::decision::{Declared, Fields};
use crate::route::idle::IdleConnections;
use crate::route::request::LookupRequest;
use crate::template::Template;
use crate::tls;

/// RFC 4511 section 4.1.9, noSuchObject: the base does not exist.
const NO_SUCH_OBJECT: u32 = 32;
/// More references to other servers than this fail a lookup.
const MAX_REFERENCES: usize = 64;

/// A search a user.
pub(in crate::route) struct Directory {
    url: String,
    starttls: bool,
    tls: Option<Arc<ClientConfig>>,
    bind: Option<(String, Zeroizing<String>)>,
    base: Template,
    scope: Scope,
    filter: Template,
    /// Field and attribute.
    attributes: Vec<(String, String)>,
    /// Host and port.
    server: (String, u16),
    /// Bound, and not in use.
    idle: IdleConnections<Ldap>,
    declared: Declared,
}

impl std::fmt::Debug for Directory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ldap::Directory").field("url", &self.url).finish_non_exhaustive()
    }
}

impl Directory {
    /// # Errors
    /// A URL whose host or port is invalid, a password file or a `ca` that cannot be read.
    pub(in crate::route) fn build(ldap: &config::Ldap, declared: &Declared) -> Result<Self, Vec<Problem>> {
        let bind = match (&ldap.bind, &ldap.password) {
            (Some(name), Some(file)) => Some((name.clone(), file.read_secret().map_err(|problem| vec![problem])?)),
            _ => None,
        };
        let encrypted = ldap.starttls || ldap.url.value.starts_with("ldaps://");
        let tls = encrypted.then(|| tls::upstream::verified_config(ldap.ca.as_ref(), &ldap.url.location)).transpose();
        Ok(Self {
            server: server(&ldap.url.value).map_err(|message| vec![ldap.url.location.problem(message)])?,
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
            declared: declared.clone().with_names(&ldap.lookup.names),
        })
    }

    pub(in crate::route) async fn ask(&self, question: &LookupRequest, budget: &Budget) -> LookupResult {
        match self.entry(&question.user, budget).await {
            Err(error) => LookupResult::Failed(error.to_string().replace(char::is_control, " ")),
            Ok(None) => LookupResult::Unknown,
            Ok(Some(entry)) => self.read(&entry),
        }
    }

    /// Closes connections that have not been used for long.
    pub(in crate::route) fn close_expired(&self) {
        self.idle.remove_expired(Instant::now());
    }

    /// Closes all connections that are not in use, and those in use once their lookup ends.
    pub(in crate::route) fn retire(&self) {
        self.idle.close();
    }

    async fn entry(&self, user: &str, budget: &Budget) -> Result<Option<SearchEntry>, LdapError> {
        let began = Instant::now();
        let fresh = async {
            let ldap = budget.connecting(self.connect()).await?;
            self.found(ldap, user).await
        };
        let found = match self.idle.take(began) {
            Some(ldap) => {
                hedged(self.found(ldap, user), budget.patience(), fresh, || self.remove_older_than(began)).await?
            }
            None => fresh.await?,
        };
        found.single()
    }

    /// What a search on this connection finds. After an error the connection is dropped.
    async fn found(&self, mut ldap: Ldap, user: &str) -> Result<Found, LdapError> {
        let found = self.search(&mut ldap, user).await?;
        // A connection that is not kept is closed by its drop, for example one with an answer that was not read to its end.
        if let Found::Entry(_) = found {
            self.idle.put(ldap, Instant::now());
        }
        Ok(found)
    }

    /// Closes idle connections that are older than one that has failed.
    fn remove_older_than(&self, time: Instant) {
        self.idle.remove_older_than(time);
    }

    async fn connect(&self) -> Result<Ldap, LdapError> {
        let (host, port) = &self.server;
        let socket = TcpStream::connect((host.as_str(), *port)).await?;
        tcp_liveness::apply(&socket);
        let mut settings =
            LdapConnSettings::new().set_starttls(self.starttls).set_std_stream(StdStream::Tcp(socket.into_std()?));
        if let Some(tls) = &self.tls {
            settings = settings.set_config(tls.clone());
        }
        let (connection, mut ldap) =
            LdapConnAsync::with_settings(settings, &self.url).await.map_err(|error| match error {
                LdapError::LdapResult { result } => {
                    std::io::Error::other(format!("the server refuses StartTLS: {result}")).into()
                }
                other => other,
            })?;
        // Ends with the last handle.
        tokio::spawn(async move {
            if let Err(error) = connection.drive().await {
                tracing::debug!(%error, "an LDAP connection ended");
            }
        });
        if let Some((name, password)) = &self.bind {
            ldap.simple_bind(name, password).await?.success()?;
        }
        Ok(ldap)
    }

    async fn search(&self, ldap: &mut Ldap, user: &str) -> Result<Found, LdapError> {
        let (base, filter) = (filled_base(&self.base, user), filled_filter(&self.filter, user));
        let attributes: Vec<&str> = self.attributes.iter().map(|(_, attribute)| attribute.as_str()).collect();
        let mut search = ldap
            .with_search_options(SearchOptions::new().sizelimit(2))
            .streaming_search(&base, self.scope, &filter, attributes)
            .await?;
        let (mut entry, mut references) = (None, 0);
        while let Some(item) = search.next().await? {
            if item.is_ref() {
                references += 1;
                if references > MAX_REFERENCES {
                    return Ok(Found::TooMuch("the search finds too many references"));
                }
            } else if entry.replace(item).is_some() {
                return Ok(Found::TooMuch("the search finds more than one entry"));
            }
        }
        let result = search.finish().await;
        if result.rc == NO_SUCH_OBJECT && !self.base.is_constant() {
            return Ok(Found::Entry(None));
        }
        // A server may count references towards the size limit.
        if result.rc != 0 && usize::from(entry.is_some()) + references < 2 {
            return Err(result.into());
        }
        Ok(Found::Entry(entry.map(SearchEntry::construct)))
    }

    fn read(&self, entry: &SearchEntry) -> LookupResult {
        let mut fields = Fields::default();
        for (field, attribute) in &self.attributes {
            // RFC 4512 section 2.5: descriptions compare without regard to letter case.
            let values = entry.attrs.iter().find(|(name, _)| name.eq_ignore_ascii_case(attribute));
            match values.map_or(&[][..], |(_, values)| &values[..]) {
                [] => {}
                [value] => fields.set(field, value),
                _ => return LookupResult::Failed(format!("the entry has more than one {attribute}")),
            }
        }
        LookupResult::from(self.declared.fields(fields))
    }
}

/// The base for a user; values are escaped by RFC 4514.
fn filled_base(base: &Template, user: &str) -> String {
    base.fill(user, |value| dn_escape(value).into_owned())
}

/// The filter for a user; values are escaped by RFC 4515.
fn filled_filter(filter: &Template, user: &str) -> String {
    filter.fill(user, |value| ldap_escape(value).into_owned())
}

/// Host and port of a URL. Without a host it is this machine, without a port that of the scheme.
fn server(url: &str) -> Result<(String, u16), String> {
    let (scheme, rest) = url.split_once("://").ok_or("the URL has no scheme")?;
    let authority = rest.split(['/', '?']).next().unwrap_or_default();
    let (host, port) = match authority.strip_prefix('[') {
        Some(rest) => rest.split_once(']').ok_or("the URL has an address without its closing bracket")?,
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

/// The result of a search.
enum Found {
    /// At most one entry; the answer was read to its end.
    Entry(Option<SearchEntry>),
    /// More than a lookup may find; the rest of the answer was not read.
    TooMuch(&'static str),
}

impl Found {
    fn single(self) -> Result<Option<SearchEntry>, LdapError> {
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

    /// What the library that sends the filter reads in it, with the bytes of the user's name replaced.
    fn shape_of_filter(filter: &str, user: &str) -> String {
        let template = Template::new(filter).unwrap();
        let parsed = ldap3::parse_filter(filled_filter(&template, user)).unwrap_or_else(|()| panic!("{user:?}"));
        let (parsed, name) = (format!("{parsed:?}"), format!("{:?}", user.as_bytes()));
        assert!(parsed.contains(&name), "{user:?}: {parsed}");
        parsed.replace(&name, "NAME")
    }

    #[test]
    fn names_are_values_of_the_filter_whatever_they_hold() {
        let long = "n".repeat(512);
        for filter in ["(mail=%{user})", "(&(objectClass=person)(|(mail=%{user})(uid=%{user})))", "(mail=*%{user}*)"] {
            let expected = shape_of_filter(filter, "alice");
            for user in HOSTILE.into_iter().chain([&*long]) {
                assert_eq!(shape_of_filter(filter, user), expected, "{user:?}");
            }
        }
    }

    #[test]
    fn names_are_values_of_the_base_whatever_they_hold() {
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
    fn host_and_port_of_a_url() {
        for (url, host, port) in [
            ("ldap://ldap.internal", "ldap.internal", 389),
            ("ldaps://ldap.internal/dc=test", "ldap.internal", 636),
            ("ldap://127.0.0.1:3890/?x", "127.0.0.1", 3890),
            ("ldaps://[2001:db8::1]:6360", "2001:db8::1", 6360),
            ("ldap://[::1]", "::1", 389),
            ("ldap:///", "localhost", 389),
        ] {
            assert_eq!(server(url), Ok((host.to_owned(), port)), "{url}");
        }
        for url in ["ldap://host:port", "ldap://host:70000", "ldap://[::1", "host"] {
            assert!(server(url).is_err(), "{url}");
        }
    }
}
