//! `client_certificates` of a listener: certificates that clients authenticate with.

use std::path::PathBuf;

use serde::Deserialize;
use serde_yaml::Value;

use crate::config::error::Located;
use crate::config::yaml::Section;
use crate::identity::{Delegation, NamePattern};

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ClientCertificatesSection {
    ca: PathBuf,
    #[serde(default)]
    required: bool,
    #[serde(default)]
    user: CertificateUser,
    #[serde(default)]
    may_act_for: Vec<Value>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct DelegationSection {
    certificate: String,
    users: Vec<String>,
}

/// Certificates requested from clients.
#[derive(Debug, Clone)]
pub struct ClientCertificates {
    /// PEM file of the accepted root certificates.
    pub ca: Located<PathBuf>,
    /// Whether a client without a certificate is refused.
    pub required: bool,
    /// The part of a certificate that contains the user name.
    pub user: CertificateUser,
    /// Users whose mailboxes the owners of certificates may open besides their own.
    pub may_act_for: Vec<Delegation>,
}

/// The part of a certificate that contains the user name.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CertificateUser {
    /// The first e-mail address among the subject alternative names.
    #[default]
    SanEmail,
    /// The first DNS name among the subject alternative names.
    SanDns,
    /// The common name of the subject.
    CommonName,
}

impl ClientCertificatesSection {
    pub(super) fn check(self, section: &mut Section<'_>) -> ClientCertificates {
        let mut may_act_for = Vec::new();
        for (index, item) in self.may_act_for.into_iter().enumerate() {
            let mut section = section.child(&format!("may_act_for[{index}]"));
            let Some(raw) = section.read::<DelegationSection>(item) else { continue };
            may_act_for.extend(raw.check(&mut section));
        }
        ClientCertificates { ca: section.file("ca", &self.ca), required: self.required, user: self.user, may_act_for }
    }
}

impl DelegationSection {
    fn check(self, section: &mut Section<'_>) -> Option<Delegation> {
        let certificate = NamePattern::parse(&self.certificate).filter(|pattern| *pattern != NamePattern::Any);
        if certificate.is_none() {
            section.problem("certificate", "expected the name in a certificate, or *@domain");
        }
        if self.users.is_empty() {
            section.problem("users", "at least one user is required");
        }
        let mut users = Vec::new();
        for (index, text) in self.users.iter().enumerate() {
            match NamePattern::parse(text) {
                Some(pattern) => users.push(pattern),
                None => section.problem(
                    &format!("users[{index}]"),
                    format!("expected a user name, *@domain, or * for all users, got {text:?}"),
                ),
            }
        }
        certificate.map(|certificate| Delegation { certificate, users })
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use crate::config::{Config, Report, parse};
    use crate::identity::{NamePattern, UserName};

    fn config(certificates: &str, authzid: &str) -> Result<Config, Report> {
        let text = format!(
            "listeners: [{{address: '127.0.0.1:0', tls: implicit, client_certificates: {{ca: ca.pem{certificates}}}}}]\n\
             tls: {{certificates: [{{cert: a, key: b}}]}}\nbackends: {{a: {{servers: ['192.0.2.1:143'], authzid: {authzid}}}}}\n\
             routes: [{{default: a}}]\n"
        );
        parse(Path::new("v.yaml"), &text)
    }

    #[test]
    fn delegations_are_read() {
        let read = config(", may_act_for: [{certificate: webmail@a.test, users: ['*@A.test', bob]}]", "allow");
        let read = read.unwrap_or_else(|report| panic!("{report}"));
        let entry = &read.listeners[0].client_certificates.as_ref().unwrap().may_act_for[0];
        let exact = |text: &str| NamePattern::Exact(UserName::new(text.as_bytes()).unwrap());
        assert_eq!(entry.certificate, exact("webmail@a.test"));
        assert_eq!(entry.users, [NamePattern::Domain("a.test".into()), exact("bob")]);
        let none = config("", "allow").unwrap_or_else(|report| panic!("{report}"));
        assert!(none.listeners[0].client_certificates.as_ref().unwrap().may_act_for.is_empty(), "none by default");
    }

    #[test]
    fn problems_are_reported_with_their_locations() {
        for (certificates, expected) in [
            (", may_act_for: [{certificate: '*', users: [a]}]", "may_act_for[0].certificate: expected the name"),
            (", may_act_for: [{certificate: a, users: []}]", "may_act_for[0].users: at least one user is required"),
            (", may_act_for: [{certificate: a, users: ['b*']}]", "may_act_for[0].users[0]: expected a user name"),
            (", may_act_for: [{certificate: a}]", "may_act_for[0]"),
        ] {
            let report = config(certificates, "allow").expect_err(expected).to_string();
            assert!(report.contains(expected), "{report}");
        }
        let in_vain = config(", may_act_for: [{certificate: a, users: [b]}]", "refuse").expect_err("a problem");
        assert!(in_vain.to_string().contains("may_act_for: has no effect: no backend has authzid: allow"), "{in_vain}");
    }
}
