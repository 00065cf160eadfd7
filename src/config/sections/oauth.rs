//! `oauth`: issuers whose tokens may name the user.

use serde::Deserialize;
use serde_yaml::Value;

use crate::config::yaml::Section;
use crate::identity::TokenIssuer;

/// The claim that contains the user name, unless `claim` is set.
const DEFAULT_CLAIM: &str = "email";

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct IssuerSection {
    issuer: String,
    claim: Option<String>,
    audience: Option<String>,
}

pub(super) fn check(mut section: Section<'_>, items: Vec<Value>) -> Vec<TokenIssuer> {
    let mut issuers: Vec<TokenIssuer> = Vec::new();
    for (index, item) in items.into_iter().enumerate() {
        let mut section = section.child(&format!("[{index}]"));
        let Some(raw) = section.read::<IssuerSection>(item) else { continue };
        let issuer = raw.check(&mut section);
        if issuers.iter().any(|other| other.issuer == issuer.issuer) {
            section.problem("issuer", format!("duplicate issuer {:?}", issuer.issuer));
        }
        issuers.push(issuer);
    }
    issuers
}

impl IssuerSection {
    fn check(self, section: &mut Section<'_>) -> TokenIssuer {
        if self.issuer.is_empty() {
            section.problem("issuer", "expected the issuer of tokens, like https://login.example.org");
        }
        let claim = self.claim.unwrap_or_else(|| DEFAULT_CLAIM.to_owned());
        if claim.is_empty() || claim == "iss" || claim == "aud" {
            section.problem("claim", "expected the claim that contains the user name, like email");
        }
        if self.audience.as_ref().is_some_and(String::is_empty) {
            section.problem("audience", "expected an audience; remove the key to accept any");
        }
        TokenIssuer { issuer: self.issuer, claim, audience: self.audience }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use crate::config::{Config, Report, parse};

    fn config(oauth: &str) -> Result<Config, Report> {
        let text = format!(
            "listeners: [{{address: '127.0.0.1:1143', tls: none}}]\nbackends: {{a: {{servers: ['192.0.2.1:143']}}}}\n\
             routes: [{{default: a}}]\n{oauth}"
        );
        parse(Path::new("v.yaml"), &text)
    }

    #[test]
    fn issuers_are_read() {
        let read = config("oauth: [{issuer: 'https://a.test'}, {issuer: b, claim: sub, audience: imap}]");
        let read = read.unwrap_or_else(|report| panic!("{report}"));
        let issuers: Vec<_> =
            read.token_issuers.iter().map(|it| (&*it.issuer, &*it.claim, it.audience.as_deref())).collect();
        assert_eq!(issuers, [("https://a.test", "email", None), ("b", "sub", Some("imap"))]);
        assert!(config("").unwrap_or_else(|report| panic!("{report}")).token_issuers.is_empty());
    }

    #[test]
    fn problems_are_reported_with_their_locations() {
        for (oauth, expected) in [
            ("oauth: [{issuer: ''}]", "oauth[0].issuer: expected the issuer"),
            ("oauth: [{issuer: a}, {issuer: a}]", "oauth[1].issuer: duplicate issuer \"a\""),
            ("oauth: [{issuer: a, claim: iss}]", "oauth[0].claim: expected the claim"),
            ("oauth: [{issuer: a, audience: ''}]", "oauth[0].audience: expected an audience"),
            ("oauth: [{issuer: a, claims: b}]", "oauth[0]"),
        ] {
            let report = config(oauth).expect_err(expected).to_string();
            assert!(report.contains(expected), "{report}");
        }
    }
}
