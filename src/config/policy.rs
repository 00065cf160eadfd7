//! `policy`: a service in weakforced's words that is asked before each login. Called by `check`.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::Located;
use super::check::located;
use super::guard_file::{OnFailureWord, PolicyMap};
use super::limits::{bounded, number, seconds};
use super::read::Reader;

/// A service that is asked before each login, and told how it ended.
#[derive(Debug, Clone)]
pub struct Policy {
    /// `http://` or `https://`.
    pub url: Located<String>,
    /// PEM file of roots, instead of the system's.
    pub ca: Option<Located<PathBuf>>,
    /// Whom it knows us as (HTTP Basic). Default `wforce`.
    pub user: String,
    /// A file with the password.
    pub password: Option<Located<PathBuf>>,
    /// A file with the key (X-API-Key).
    pub api_key: Option<Located<PathBuf>>,
    /// A file with the salt of password hashes.
    pub nonce: Located<PathBuf>,
    /// How many bits of a hash are told; 0: all. Default 12.
    pub hash_bits: u32,
    /// Of one question. Default 2 s.
    pub timeout: Duration,
    /// Whether logins go on while it does not answer. Default: they do.
    pub fail_open: bool,
}

/// `None`: a mistake was told.
pub(super) fn policy(reader: &mut Reader<'_>, folder: &Path, map: PolicyMap) -> Option<Policy> {
    let file = |reader: &mut Reader<'_>, key: &str, path: Option<PathBuf>| {
        path.map(|path| located(reader, folder, key, &path))
    };
    let scheme = map.url.split_once("://");
    let is_http = matches!(scheme, Some(("http" | "https", _)));
    if !is_http || map.url.contains(['?', '#', '@']) {
        reader.problem("policy.url", "expected a URL that begins with http:// or https://, without a query or a user");
    }
    if map.ca.is_some() && matches!(scheme, Some(("http", _))) {
        reader.problem("policy.ca", "has no effect without TLS: use https://");
    }
    if map.password_file.is_some() && map.api_key_file.is_some() {
        reader.problem("policy.api_key_file", "password_file and api_key_file exclude each other");
    }
    let user = map.user.unwrap_or_else(|| "wforce".to_owned());
    if user.contains(':') || user.chars().any(char::is_control) {
        reader.problem("policy.user", "HTTP Basic allows no colon in it");
    }
    let timeout = bounded(reader, "policy.timeout", map.timeout, Duration::from_secs(2), seconds(0, 30));
    let hash_bits = number(reader, "policy.hash_bits", map.hash_bits, 12, 0..=256);
    let ca = file(reader, "policy.ca", map.ca);
    let password = file(reader, "policy.password_file", map.password_file);
    let api_key = file(reader, "policy.api_key_file", map.api_key_file);
    let nonce = located(reader, folder, "policy.nonce_file", &map.nonce_file);
    is_http.then(|| Policy {
        url: Located { value: map.url, location: reader.location("policy.url") },
        ca,
        user,
        password,
        api_key,
        nonce,
        hash_bits,
        timeout,
        fail_open: map.on_failure == OnFailureWord::Allow,
    })
}

#[cfg(test)]
mod tests {
    use crate::config::parse;

    #[test]
    fn a_policy_and_its_mistakes() {
        let minimal = "listeners: [{address: '127.0.0.1:1143', tls: none}]\nbackends: {a: {servers: ['192.0.2.1:143']}}\n\
                       routes: [{default: a}]\n";
        let read = |policy: &str| parse(std::path::Path::new("v.yaml"), &format!("{minimal}policy: {policy}\n"));
        let policy = read("{url: 'http://127.0.0.1:8084/', nonce_file: n, on_failure: deny}").unwrap().policy.unwrap();
        assert_eq!((policy.user.as_str(), policy.hash_bits, policy.fail_open), ("wforce", 12, false));
        for (text, said) in [
            ("{nonce_file: n}", "policy: the key `url` is missing"),
            ("{url: 'http://a/'}", "policy: the key `nonce_file` is missing"),
            ("{url: a, nonce_file: n}", "policy.url: expected a URL that begins with http:// or https://"),
            ("{url: 'http://a/?b', nonce_file: n}", "policy.url: expected a URL that begins with http:// or https://"),
            ("{url: 'http://u:p@a/', nonce_file: n}", "without a query or a user"),
            ("{url: 'http://a/', nonce_file: n, ca: c}", "policy.ca: has no effect without TLS"),
            ("{url: 'http://a/', nonce_file: n, user: 'a:b'}", "policy.user: HTTP Basic allows no colon"),
            ("{url: 'http://a/', nonce_file: n, on_failure: open}", "policy.on_failure: expected one of allow, deny"),
            (
                "{url: 'http://a/', nonce_file: n, password_file: p, api_key_file: k}",
                "password_file and api_key_file exclude each other",
            ),
        ] {
            let report = read(text).expect_err(text).to_string();
            assert!(report.contains(said), "{text}: {report}");
        }
    }
}
