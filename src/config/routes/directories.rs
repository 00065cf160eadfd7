//! Routes that ask a directory: what their keys may be, and which need each other. Called by `routes`.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde_yaml::Value;

use super::maps::{AskingMap, DnsMap, HttpMap, LdapMap, RedisMap, ScopeWord, SqlMap, StyleWord};
use super::sql_query::{Syntax, quoted_variable};
use super::{Context, declared_backend};
use crate::config::check::{located, socket_address};
use crate::config::directory::{
    ANSWER_FIELDS, CacheConfig, Dns, DnsQuery, Http, HttpStyle, Ldap, LdapScope, LookupConfig, Network, Redis,
    RedisServers, Sql,
};
use crate::config::limits::{bounded, number, seconds};
use crate::config::locate::child;
use crate::config::read::Reader;
use crate::config::values::{CacheEntry, Words};
use crate::config::{Located, Route};
use crate::template::Template;

/// One section of a route: where it stands, and what is known around it.
pub(super) struct Section<'a, 'b> {
    pub(super) reader: &'a mut Reader<'b>,
    pub(super) context: &'a Context<'a>,
    pub(super) key: String,
}

impl Section<'_, '_> {
    pub(super) fn sql(&mut self, value: Value) -> Option<Route> {
        let mut written: SqlMap = self.read(value)?;
        let asking = self.asking(written.asking());
        let query = self.for_each_user("query", &written.query)?;
        let known = ["postgres://", "postgresql://", "mysql://", "mariadb://", "sqlite:"];
        let url = self.url("url", &written.url, &known)?;
        let syntax = match url.value.split(':').next() {
            Some("mysql" | "mariadb") => Syntax::MySql,
            Some("sqlite") => Syntax::Sqlite,
            _ => Syntax::Postgres,
        };
        if let Some(variable) = quoted_variable(&written.query, syntax) {
            self.problem(
                "query",
                format!(
                    "{variable} is within quotes, where a database takes it for plain text and finds no user: it is a \
                     bound parameter, so write it without quotes, like WHERE name = {variable}"
                ),
            );
        }
        let is_file = url.value.starts_with("sqlite:");
        for (name, file) in [("password_file", &written.password_file), ("ca", &written.ca)] {
            if is_file && file.is_some() {
                self.problem(name, "has no meaning for SQLite, which is a file");
            }
        }
        Some(Route::Sql(Box::new(Sql {
            url,
            password: self.file("password_file", written.password_file),
            query,
            ca: self.file("ca", written.ca),
            lookup: asking,
        })))
    }

    pub(super) fn ldap(&mut self, value: Value) -> Option<Route> {
        let mut written: LdapMap = self.read(value)?;
        let asking = self.asking(written.asking());
        let url = self.url("url", &written.url, &["ldap://", "ldaps://"])?;
        let is_plain = url.value.starts_with("ldap://");
        if written.starttls && !is_plain {
            self.problem("starttls", "ldaps:// speaks TLS from the start");
        }
        if written.ca.is_some() && is_plain && !written.starttls {
            self.problem("ca", "has no effect without TLS: use ldaps:// or starttls");
        }
        if written.bind.is_some() != written.password_file.is_some() {
            self.problem("bind", "bind and password_file belong together");
        }
        for field in written.attributes.keys() {
            if !ANSWER_FIELDS.contains(&field.as_str()) {
                self.problem(&child("attributes", field), format!("expected one of {}", ANSWER_FIELDS.join(", ")));
            }
        }
        if !["backend", "refuse", "maintenance"].iter().any(|field| written.attributes.contains_key(*field)) {
            self.problem("attributes", "at least `backend` is needed, like {backend: mailHost}");
        }
        let scope = match written.scope {
            ScopeWord::Base => LdapScope::Base,
            ScopeWord::One => LdapScope::One,
            ScopeWord::Sub => LdapScope::Sub,
        };
        let base = self.template("base", &written.base);
        let filter = self.template("filter", &written.filter);
        let (base, filter) = (base?, filter?);
        for (name, template, separators) in [("base", &base, &[',', '+', ';'][..]), ("filter", &filter, &['(', ')'])] {
            if !template.has_variables_in_values_only(separators) {
                self.problem(name, "a variable may only be a part of a value, after `=`: (mail=%{user})");
            }
        }
        if base.is_constant() && filter.is_constant() {
            self.problem("filter", "says the same for every user: %{user} is missing");
        }
        Some(Route::Ldap(Box::new(Ldap {
            url,
            starttls: written.starttls,
            ca: self.file("ca", written.ca),
            bind: written.bind,
            password: self.file("password_file", written.password_file),
            base,
            scope,
            filter,
            attributes: written.attributes,
            lookup: asking,
        })))
    }

    pub(super) fn http(&mut self, value: Value) -> Option<Route> {
        let mut written: HttpMap = self.read(value)?;
        let is_nginx = written.style == StyleWord::NginxAuthHttp;
        let mut asking_map = written.asking();
        let password = written.password.unwrap_or(is_nginx);
        if password && asking_map.cache.is_none() {
            // A verdict on one password is no answer for the next.
            asking_map.cache = Some(CacheEntry::Off);
        } else if password && !matches!(asking_map.cache, Some(CacheEntry::Off)) {
            self.problem("cache", "answers that depend on the password cannot be kept: leave it out");
        }
        if is_nginx && !password {
            self.problem("password", "servers of this style decide by the password");
        }
        if written.client_certificate && !is_nginx {
            self.problem("client_certificate", "has a meaning for style: nginx-auth-http only");
        }
        let asking = self.asking(asking_map);
        let url = self.url("url", &written.url, &["http://", "https://"])?;
        if written.ca.is_some() && url.value.starts_with("http://") {
            self.problem("ca", "has no effect without TLS: use https://");
        }
        for (name, value) in &written.headers {
            let token = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
            let text = |byte: u8| byte == b'\t' || (b' '..0x7f).contains(&byte);
            if name.is_empty() || !name.bytes().all(token) || !value.bytes().all(text) {
                self.problem(&child("headers", name), "is no header, or has a value that is none");
            }
        }
        let mut networks = Vec::new();
        for (index, text) in written.networks.iter().enumerate() {
            match Network::parse(text) {
                Some(network) => networks.push(network),
                None => self.problem(&format!("networks[{index}]"), "expected a network, like 10.0.0.0/8"),
            }
        }
        if written.networks.is_empty() != written.backend.is_none() {
            self.problem("networks", "networks and backend belong together: addresses there are used as that backend");
        }
        let backend = written.backend.and_then(|name| {
            let key = child(&self.key, "backend");
            declared_backend(self.reader, self.context.declared, &key, &name)
        });
        Some(Route::Http(Box::new(Http {
            url,
            style: if is_nginx { HttpStyle::NginxAuthHttp } else { HttpStyle::Json },
            ca: self.file("ca", written.ca),
            headers: written.headers,
            token: self.file("token_file", written.token_file),
            password,
            client_certificate: written.client_certificate,
            backend,
            networks,
            lookup: asking,
        })))
    }

    pub(super) fn redis(&mut self, value: Value) -> Option<Route> {
        let mut written: RedisMap = self.read(value)?;
        let asking = self.asking(written.asking());
        let key = self.for_each_user("key", &written.key);
        if written.master.is_some() != written.sentinels.is_some() {
            self.problem("sentinels", "sentinels and master belong together");
        }
        let schemes = ["redis://", "rediss://"];
        let servers = match (written.url, written.sentinels, written.cluster) {
            (Some(url), None, None) => RedisServers::Server(self.url("url", &url, &schemes)?),
            (None, Some(urls), None) => RedisServers::Sentinel {
                urls: self.urls("sentinels", &urls, &schemes),
                master: written.master.unwrap_or_default(),
            },
            (None, None, Some(urls)) => RedisServers::Cluster(self.urls("cluster", &urls, &schemes)),
            _ => {
                let key = self.key.clone();
                self.reader.problem(&key, "expected exactly one of url, sentinels, cluster");
                return None;
            }
        };
        if written.user.is_some() && written.password_file.is_none() {
            self.problem("user", "needs a password_file");
        }
        Some(Route::Redis(Box::new(Redis {
            servers,
            user: written.user,
            password: self.file("password_file", written.password_file),
            ca: self.file("ca", written.ca),
            key: key?,
            field: written.field,
            lookup: asking,
        })))
    }

    pub(super) fn dns(&mut self, value: Value) -> Option<Route> {
        let mut written: DnsMap = self.read(value)?;
        let asking = self.asking(written.asking());
        let question = match (written.txt, written.srv) {
            (Some(txt), None) => DnsQuery::Txt(self.for_each_user("txt", &txt)?),
            (None, Some(srv)) => {
                if asking.names.is_empty() {
                    self.problem("names", "targets of SRV records need it, like {mail1.internal: BACKEND}");
                }
                DnsQuery::Srv(self.for_each_user("srv", &srv)?)
            }
            _ => {
                let key = self.key.clone();
                self.reader.problem(&key, "expected exactly one of txt, srv");
                return None;
            }
        };
        let servers = written.servers.iter().enumerate().filter_map(|(index, text)| {
            socket_address(self.reader, &format!("{}.servers[{index}]", self.key), text, "127.0.0.1:53")
        });
        let servers = servers.collect();
        Some(Route::Dns(Box::new(Dns { query: question, servers, lookup: asking })))
    }

    fn read<T: DeserializeOwned>(&mut self, value: Value) -> Option<T> {
        self.reader.read(&self.key, value)
    }

    fn problem(&mut self, name: &str, message: impl Into<String>) {
        let key = child(&self.key, name);
        self.reader.problem(&key, message);
    }

    fn file(&self, name: &str, path: Option<PathBuf>) -> Option<Located<PathBuf>> {
        path.map(|path| located(self.reader, self.context.folder, &child(&self.key, name), &path))
    }

    fn template(&mut self, name: &str, text: &str) -> Option<Template> {
        match Template::new(text) {
            Ok(template) => Some(template),
            Err(unknown) => {
                self.problem(name, unknown.to_string());
                None
            }
        }
    }

    fn for_each_user(&mut self, name: &str, text: &str) -> Option<Template> {
        let template = self.template(name, text)?;
        if template.is_constant() {
            self.problem(name, "says the same for every user: %{user} is missing");
        }
        Some(template)
    }

    /// A password in a URL would be shown wherever the URL is.
    fn url(&mut self, name: &str, text: &str, schemes: &[&str]) -> Option<Located<String>> {
        if !schemes.iter().any(|scheme| text.starts_with(scheme)) {
            self.problem(name, format!("expected a URL that begins with {}", schemes.join(" or ")));
            return None;
        }
        let authority =
            text.split_once("://").map_or("", |(_, rest)| rest.split(['/', '?']).next().unwrap_or_default());
        if authority.rsplit_once('@').is_some_and(|(user, _)| user.contains(':')) {
            self.problem(name, "a password belongs into a file of its own (password_file), not into the URL");
            return None;
        }
        Some(Located { value: text.to_owned(), location: self.reader.location(&child(&self.key, name)) })
    }

    fn urls(&mut self, name: &str, words: &Words, schemes: &[&str]) -> Vec<Located<String>> {
        if words.words.is_empty() {
            self.problem(name, "at least one URL is needed");
        }
        let keys = words.words.iter().enumerate();
        keys.filter_map(|(index, url)| {
            let name = if words.is_list { format!("{name}[{index}]") } else { name.to_owned() };
            self.url(&name, url, schemes)
        })
        .collect()
    }

    fn asking(&mut self, written: AskingMap) -> LookupConfig {
        let key = |name: &str| child(&self.key, name);
        let timeout = bounded(self.reader, &key("timeout"), written.timeout, Duration::from_secs(2), seconds(0, 60));
        let connections = number(self.reader, &key("connections"), written.connections, 8, 1..=1000) as usize;
        let cache = match written.cache {
            Some(CacheEntry::Off) => None,
            Some(CacheEntry::Map(map)) => Some(self.cache(map)),
            None => Some(self.cache(super::maps::CacheMap::default())),
        };
        let mut names = BTreeMap::new();
        for (name, backend) in written.names {
            let place = child(&child(&self.key, "names"), &name);
            if let Some(id) = declared_backend(self.reader, self.context.declared, &place, &backend) {
                names.insert(name, id);
            }
        }
        LookupConfig { timeout, connections, cache, names }
    }

    fn cache(&mut self, written: super::maps::CacheMap) -> CacheConfig {
        let day = 24 * 3600;
        let base = child(&self.key, "cache");
        let key = |name: &str| child(&base, name);
        let reader = &mut *self.reader;
        let location = reader.location(&key("file"));
        let file = written.file.map(|file| Located { value: self.context.folder.join(file), location });
        CacheConfig {
            ttl: bounded(reader, &key("ttl"), written.ttl, Duration::from_secs(60), seconds(1, day)),
            negative: bounded(reader, &key("negative"), written.negative, Duration::from_secs(10), seconds(0, day)),
            stale: bounded(reader, &key("stale"), written.stale, Duration::from_secs(3600), seconds(1, 30 * day)),
            entries: number(reader, &key("entries"), written.entries, 100_000, 100..=100_000_000) as usize,
            file,
        }
    }
}
