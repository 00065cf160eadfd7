//! `http`: a web service.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::Deserialize;
use serde_yaml::Value;

use super::Route;
use super::lookup::{LookupConfig, LookupSection, Off, RouteReader, lookup_section};
use crate::config::error::Located;
use crate::config::network::Network;
use crate::config::sections::backends::BackendId;
use crate::config::yaml::WordOrMap;

lookup_section! {
    HttpSection {
        url: String,
        #[serde(default)]
        style: HttpStyle,
        ca: Option<PathBuf>,
        #[serde(default)]
        headers: BTreeMap<String, String>,
        token_file: Option<PathBuf>,
        password: Option<bool>,
        #[serde(default)]
        client_certificate: bool,
        backend: Option<String>,
        #[serde(default)]
        networks: Vec<String>,
    }
}

/// A source that is a web service.
#[derive(Debug, Clone, PartialEq)]
pub struct Http {
    /// URL that begins with `http://` or `https://`.
    pub url: Located<String>,
    /// Protocol of requests and responses.
    pub style: HttpStyle,
    /// PEM file of root certificates, instead of the system's.
    pub ca: Option<Located<PathBuf>>,
    /// Headers of every request.
    pub headers: BTreeMap<String, String>,
    /// File of a bearer token.
    pub token: Option<Located<PathBuf>>,
    /// Whether the service receives the password and verifies it.
    pub password: bool,
    /// Whether the service receives the client's certificate (`style: nginx-auth-http` only).
    pub client_certificate: bool,
    /// The backend of the addresses in `networks`.
    pub backend: Option<BackendId>,
    /// Networks of addresses that the service may return although no server is declared there.
    pub networks: Vec<Network>,
    /// How it is queried.
    pub lookup: LookupConfig,
}

/// Protocol of a web service.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HttpStyle {
    /// A JSON object in the request and in the response.
    #[default]
    Json,
    /// The headers of nginx's mail module.
    NginxAuthHttp,
}

pub(super) fn check(mut reader: RouteReader<'_>, value: Value) -> Option<Route> {
    let mut raw: HttpSection = reader.section.read(value)?;
    let is_nginx = raw.style == HttpStyle::NginxAuthHttp;
    let password = raw.password.unwrap_or(is_nginx);
    let lookup = raw.take_lookup();
    let lookup = check_cache(&mut reader, lookup, password);
    let lookup = reader.lookup(lookup);
    if is_nginx && !password {
        reader.problem("password", "must be true with style: nginx-auth-http");
    }
    if raw.client_certificate && !is_nginx {
        reader.problem("client_certificate", "requires style: nginx-auth-http");
    }
    let url = reader.url("url", &raw.url, &["http://", "https://"])?;
    if raw.ca.is_some() && url.value.starts_with("http://") {
        reader.problem("ca", "has no effect without TLS: use https://");
    }
    check_headers(&mut reader, &raw.headers);
    let networks = reader.section.networks("networks", &raw.networks);
    if raw.networks.is_empty() != raw.backend.is_none() {
        reader.problem("networks", "networks and backend require each other: addresses there belong to that backend");
    }
    let backend = raw.backend.and_then(|name| reader.backend("backend", &name));
    Some(Route::Http(Box::new(Http {
        url,
        style: raw.style,
        ca: reader.file("ca", raw.ca.as_deref()),
        headers: raw.headers,
        token: reader.file("token_file", raw.token_file.as_deref()),
        password,
        client_certificate: raw.client_certificate,
        backend,
        networks,
        lookup,
    })))
}

/// Disables the cache if results depend on the password: one for another password would be wrong.
fn check_cache(reader: &mut RouteReader<'_>, lookup: LookupSection, password: bool) -> LookupSection {
    match (password, &lookup.cache) {
        (true, None) => LookupSection { cache: Some(WordOrMap::Word(Off::Off)), ..lookup },
        (true, Some(WordOrMap::Map(_))) => {
            reader.problem("cache", "results that depend on the password cannot be cached; remove the key");
            lookup
        }
        (true, Some(WordOrMap::Word(Off::Off))) | (false, _) => lookup,
    }
}

fn check_headers(reader: &mut RouteReader<'_>, headers: &BTreeMap<String, String>) {
    for (name, value) in headers {
        let is_token = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
        let is_text = |byte: u8| byte == b'\t' || (b' '..0x7f).contains(&byte);
        if name.is_empty() || !name.bytes().all(is_token) || !value.bytes().all(is_text) {
            reader.problem(&format!("headers.{name}"), "is not a valid HTTP header");
        }
    }
}
