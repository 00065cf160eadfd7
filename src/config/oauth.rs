//! `oauth`: issuers whose tokens may name the user, and `may_act_for` of client certificates. Called by `check`.

use serde::Deserialize;
use serde_yaml::Value;

use super::locate::child;
use super::read::Reader;
use crate::identity::{Delegation, NamePattern, TokenIssuer};

/// An item of `oauth`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct IssuerMap {
    /// The claim `iss` of its tokens, exactly.
    issuer: String,
    /// The claim with the user's name.
    claim: Option<String>,
    /// What the claim `aud` must be or contain. Absent: anything.
    audience: Option<String>,
}

/// An item of `may_act_for`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct DelegationMap {
    /// The name in the certificate, or `*@domain`.
    certificate: String,
    /// Whose mailboxes it may open: names, `*@domain`, or `*` for all.
    users: Vec<String>,
}

/// The issuers, each once.
pub(super) fn issuers(reader: &mut Reader<'_>, items: Vec<Value>) -> Vec<TokenIssuer> {
    let mut issuers: Vec<TokenIssuer> = Vec::new();
    for (index, item) in items.into_iter().enumerate() {
        let key = format!("oauth[{index}]");
        let Some(written) = reader.read::<IssuerMap>(&key, item) else { continue };
        if written.issuer.is_empty() {
            reader.problem(&child(&key, "issuer"), "expected the issuer of tokens, like https://login.example.org");
        }
        if issuers.iter().any(|other| other.issuer == written.issuer) {
            reader.problem(&child(&key, "issuer"), format!("{:?} is listed already", written.issuer));
        }
        let claim = written.claim.unwrap_or_else(|| "email".to_owned());
        if claim.is_empty() || claim == "iss" || claim == "aud" {
            reader.problem(&child(&key, "claim"), "expected the claim with the user's name, like email");
        }
        if written.audience.as_ref().is_some_and(String::is_empty) {
            reader.problem(&child(&key, "audience"), "expected an audience, or no key for any");
        }
        issuers.push(TokenIssuer { issuer: written.issuer, claim, audience: written.audience });
    }
    issuers
}

/// The entries of `may_act_for` at `key`.
pub(super) fn delegations(reader: &mut Reader<'_>, key: &str, items: Vec<Value>) -> Vec<Delegation> {
    let mut delegations = Vec::new();
    for (index, item) in items.into_iter().enumerate() {
        let key = format!("{key}[{index}]");
        let Some(written) = reader.read::<DelegationMap>(&key, item) else { continue };
        let certificate = NamePattern::parse(&written.certificate).filter(|pattern| *pattern != NamePattern::Any);
        if certificate.is_none() {
            reader.problem(&child(&key, "certificate"), "expected the name in a certificate, or *@domain");
        }
        if written.users.is_empty() {
            reader.problem(&child(&key, "users"), "at least one user is needed");
        }
        let mut users = Vec::new();
        for (index, text) in written.users.iter().enumerate() {
            match NamePattern::parse(text) {
                Some(pattern) => users.push(pattern),
                None => reader.problem(
                    &format!("{}[{index}]", child(&key, "users")),
                    format!("expected a user name, *@domain, or * for all users, got {text:?}"),
                ),
            }
        }
        delegations.extend(certificate.map(|certificate| Delegation { certificate, users }));
    }
    delegations
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use crate::config::{Config, Report, parse};
    use crate::identity::{NamePattern, UserName};

    fn config(listener: &str, rest: &str) -> Result<Config, Report> {
        with(listener, "allow", rest)
    }

    fn with(listener: &str, authzid: &str, rest: &str) -> Result<Config, Report> {
        let text = format!(
            "listeners: [{{address: '127.0.0.1:0', tls: implicit, client_certificates: {{ca: ca.pem{listener}}}}}]\n\
             tls: {{certificates: [{{cert: a, key: b}}]}}\nbackends: {{a: {{servers: ['192.0.2.1:143'], authzid: {authzid}}}}}\n\
             routes: [{{default: a}}]\n{rest}"
        );
        parse(Path::new("v.yaml"), &text)
    }

    #[test]
    fn issuers_and_delegations_are_read() {
        let read = config(
            ", may_act_for: [{certificate: webmail@a.test, users: ['*@A.test', bob]}]",
            "oauth: [{issuer: 'https://a.test'}, {issuer: b, claim: sub, audience: imap}]",
        )
        .unwrap_or_else(|report| panic!("{report}"));
        let issuers: Vec<_> =
            read.token_issuers.iter().map(|it| (&*it.issuer, &*it.claim, it.audience.as_deref())).collect();
        assert_eq!(issuers, [("https://a.test", "email", None), ("b", "sub", Some("imap"))]);
        let entry = &read.listeners[0].client_certificates.as_ref().unwrap().may_act_for[0];
        let exact = |text: &str| NamePattern::Exact(UserName::new(text.as_bytes()).unwrap());
        assert_eq!(entry.certificate, exact("webmail@a.test"));
        assert_eq!(entry.users, [NamePattern::Domain("a.test".into()), exact("bob")]);
        let none = config("", "").unwrap_or_else(|report| panic!("{report}"));
        assert!(none.token_issuers.is_empty());
        assert!(none.listeners[0].client_certificates.as_ref().unwrap().may_act_for.is_empty(), "none by default");
    }

    #[test]
    fn mistakes_are_named_with_their_place() {
        for (listener, rest, expected) in [
            (", may_act_for: [{certificate: '*', users: [a]}]", "", "may_act_for[0].certificate: expected the name"),
            (", may_act_for: [{certificate: a, users: []}]", "", "may_act_for[0].users: at least one user is needed"),
            (", may_act_for: [{certificate: a, users: ['b*']}]", "", "may_act_for[0].users[0]: expected a user name"),
            (", may_act_for: [{certificate: a}]", "", "may_act_for[0]"),
            ("", "oauth: [{issuer: ''}]", "oauth[0].issuer: expected the issuer"),
            ("", "oauth: [{issuer: a}, {issuer: a}]", "oauth[1].issuer: \"a\" is listed already"),
            ("", "oauth: [{issuer: a, claim: iss}]", "oauth[0].claim: expected the claim"),
            ("", "oauth: [{issuer: a, audience: ''}]", "oauth[0].audience: expected an audience"),
            ("", "oauth: [{issuer: a, claims: b}]", "oauth[0]"),
        ] {
            let report = config(listener, rest).expect_err(expected).to_string();
            assert!(report.contains(expected), "{report}");
        }
        let in_vain = with(", may_act_for: [{certificate: a, users: [b]}]", "refuse", "").expect_err("a problem");
        assert!(in_vain.to_string().contains("may_act_for: has no effect: no backend has authzid: allow"), "{in_vain}");
    }
}
