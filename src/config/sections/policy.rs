//! `policy`: a service that speaks the weakforced protocol and decides about each login.

use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;

use crate::config::error::Located;
use crate::config::yaml::{DurationText, Section, seconds};

const DEFAULT_USER: &str = "wforce";
const DEFAULT_HASH_BITS: u32 = 12;
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(2);

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct PolicySection {
    url: String,
    ca: Option<PathBuf>,
    user: Option<String>,
    password_file: Option<PathBuf>,
    api_key_file: Option<PathBuf>,
    nonce_file: PathBuf,
    hash_bits: Option<i64>,
    timeout: Option<DurationText>,
    #[serde(default)]
    on_failure: OnFailure,
}

/// A service that is queried before each login, and receives a report of its result.
#[derive(Debug, Clone)]
pub struct Policy {
    /// URL that begins with `http://` or `https://`; `?command=…` is appended.
    pub url: Located<String>,
    /// PEM file of root certificates; `None` means the system's.
    pub ca: Option<Located<PathBuf>>,
    /// User name for HTTP Basic authentication.
    pub user: String,
    /// File of the password for HTTP Basic authentication.
    pub password: Option<Located<PathBuf>>,
    /// File of the key sent as `X-API-Key`.
    pub api_key: Option<Located<PathBuf>>,
    /// File of the salt of password hashes.
    pub nonce: Located<PathBuf>,
    /// Number of bits of a password hash that are sent; 0 means all.
    pub hash_bits: u32,
    /// Timeout of one request.
    pub timeout: Duration,
    /// What happens to logins if the service fails.
    pub on_failure: OnFailure,
}

/// What happens to logins if the policy service fails.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnFailure {
    /// Logins proceed without its decision.
    #[default]
    Allow,
    /// Logins are refused with NO [UNAVAILABLE].
    Deny,
}

impl PolicySection {
    pub(super) fn check(self, section: &mut Section<'_>) -> Policy {
        let scheme = self.url.split_once("://").map(|(scheme, _)| scheme);
        if !matches!(scheme, Some("http" | "https")) || self.url.contains(['?', '#', '@']) {
            section.problem("url", "expected a URL that begins with http:// or https://, without a query or a user");
        }
        if self.ca.is_some() && scheme == Some("http") {
            section.problem("ca", "has no effect without TLS: use https://");
        }
        if self.password_file.is_some() && self.api_key_file.is_some() {
            section.problem("api_key_file", "password_file and api_key_file exclude each other");
        }
        let user = self.user.unwrap_or_else(|| DEFAULT_USER.to_owned());
        if user.contains(':') || user.chars().any(char::is_control) {
            section.problem("user", "must not contain a colon or control characters, because of HTTP Basic");
        }
        Policy {
            ca: section.optional_file("ca", self.ca.as_deref()),
            user,
            password: section.optional_file("password_file", self.password_file.as_deref()),
            api_key: section.optional_file("api_key_file", self.api_key_file.as_deref()),
            nonce: section.file("nonce_file", &self.nonce_file),
            hash_bits: section.number("hash_bits", self.hash_bits, DEFAULT_HASH_BITS, 0..=256),
            timeout: section.duration("timeout", self.timeout, DEFAULT_TIMEOUT, seconds(0, 30)),
            on_failure: self.on_failure,
            url: section.located("url", self.url),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::parse;

    #[test]
    fn policy_is_read_and_its_problems_are_reported() {
        let minimal = "listeners: [{address: '127.0.0.1:1143', tls: none}]\nbackends: {a: {servers: ['192.0.2.1:143']}}\n\
                       routes: [{default: a}]\n";
        let read = |policy: &str| parse(std::path::Path::new("v.yaml"), &format!("{minimal}policy: {policy}\n"));
        let policy = read("{url: 'http://127.0.0.1:8084/', nonce_file: n, on_failure: deny}").unwrap().policy.unwrap();
        assert_eq!((policy.user.as_str(), policy.hash_bits, policy.on_failure), ("wforce", 12, OnFailure::Deny));
        for (text, expected) in [
            ("{nonce_file: n}", "policy: missing key `url`"),
            ("{url: 'http://a/'}", "policy: missing key `nonce_file`"),
            ("{url: a, nonce_file: n}", "policy.url: expected a URL that begins with http:// or https://"),
            ("{url: 'http://a/?b', nonce_file: n}", "policy.url: expected a URL that begins with http:// or https://"),
            ("{url: 'http://u:p@a/', nonce_file: n}", "without a query or a user"),
            ("{url: 'http://a/', nonce_file: n, ca: c}", "policy.ca: has no effect without TLS"),
            ("{url: 'http://a/', nonce_file: n, user: 'a:b'}", "policy.user: must not contain a colon"),
            (
                "{url: 'http://a/', nonce_file: n, on_failure: open}",
                "policy.on_failure: unknown value: expected allow or deny",
            ),
            (
                "{url: 'http://a/', nonce_file: n, password_file: p, api_key_file: k}",
                "password_file and api_key_file exclude each other",
            ),
        ] {
            let report = read(text).expect_err(text).to_string();
            assert!(report.contains(expected), "{text}: {report}");
        }
    }
}
