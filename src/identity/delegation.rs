//! Delegation: the mailboxes that the owner of a client certificate may request (by the authzid of EXTERNAL).
//!
//! No server checks such a request, because the proxy's own credentials open the mailbox. So the configuration must list these
//! mailboxes; without a list a certificate opens only its owner's mailbox. Names are compared in the form in which they are routed.

use super::{Credentials, NamingRules, Proof, UserName};

/// A pattern of user names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NamePattern {
    /// This user.
    Exact(UserName),
    /// `*@domain`: every user of the domain.
    Domain(Box<str>),
    /// `*`: every user.
    Any,
}

impl NamePattern {
    /// Parses a name, `*@domain` or `*`.
    pub fn parse(text: &str) -> Option<Self> {
        if text == "*" {
            return Some(Self::Any);
        }
        match text.strip_prefix("*@") {
            Some(domain) if domain.is_empty() || domain.contains(['@', '*', ' ']) => None,
            Some(domain) => Some(Self::Domain(domain.to_ascii_lowercase().into())),
            None if text.contains('*') => None,
            None => UserName::new(text.as_bytes()).ok().map(Self::Exact),
        }
    }

    /// Whether the pattern matches the user with this routing name.
    fn matches(&self, naming: &NamingRules, routing_name: &str) -> bool {
        match self {
            Self::Any => true,
            Self::Exact(name) => naming.names(name).is_ok_and(|names| *names.routing == *routing_name),
            // Servers differ in the domain of a name with two at signs.
            Self::Domain(domain) => routing_name
                .split_once('@')
                .is_some_and(|(local, of)| !local.is_empty() && !of.contains('@') && of.eq_ignore_ascii_case(domain)),
        }
    }
}

/// An entry of `may_act_for`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Delegation {
    /// The owner of the certificate.
    pub certificate: NamePattern,
    /// The users whose mailboxes it may open.
    pub users: Vec<NamePattern>,
}

/// The certificate's owner may not open the requested mailbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NotDelegated;

/// Authorises a login by certificate; other logins pass. An authzid that is another spelling of the owner's name is removed, so that
/// the owner's mailbox is opened under the name in the certificate.
///
/// # Errors
/// The mailbox belongs to another user, and no entry allows access.
pub fn authorise_certificate(
    credentials: &mut Credentials,
    naming: &NamingRules,
    delegations: &[Delegation],
) -> Result<(), NotDelegated> {
    let (Proof::Certificate, Some(authzid)) = (&credentials.proof, &credentials.authzid) else { return Ok(()) };
    let owner = naming.names(&credentials.user).map_err(|_| NotDelegated)?.routing;
    let mailbox = naming.names(authzid).map_err(|_| NotDelegated)?.routing;
    if owner == mailbox {
        credentials.authzid = None;
        return Ok(());
    }
    let allows = |entry: &Delegation| {
        entry.certificate.matches(naming, &owner) && entry.users.iter().any(|user| user.matches(naming, &mailbox))
    };
    if delegations.iter().any(allows) { Ok(()) } else { Err(NotDelegated) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::{Mechanism, Secret};

    fn name(text: &str) -> UserName {
        UserName::new(text.as_bytes()).unwrap()
    }

    fn external(owner: &str, authzid: Option<&str>) -> Credentials {
        Credentials {
            user: name(owner),
            authzid: authzid.map(name),
            mechanism: Mechanism::External,
            proof: Proof::Certificate,
        }
    }

    fn delegations() -> Vec<Delegation> {
        let pattern = |text: &str| NamePattern::parse(text).unwrap();
        let entry = |certificate: &str, users: &[&str]| Delegation {
            certificate: pattern(certificate),
            users: users.iter().map(|text| pattern(text)).collect(),
        };
        vec![
            entry("webmail@host.test", &["*@A.test", "Carol@c.test"]),
            entry("*@desk.test", &["bob@b.test"]),
            entry("backup@host.test", &["*"]),
        ]
    }

    #[test]
    fn certificate_opens_the_listed_mailboxes() {
        let allows = |owner: &str, mailbox: &str| {
            let mut credentials = external(owner, Some(mailbox));
            authorise_certificate(&mut credentials, &NamingRules::default(), &delegations()).is_ok()
        };
        for (owner, mailbox) in [
            ("webmail@host.test", "alice@a.test"),
            ("Webmail@HOST.test", "ALICE@a.TEST"),
            ("webmail@host.test", "carol@c.test"),
            ("one@desk.test", "bob@b.test"),
            ("backup@host.test", "anyone"),
        ] {
            assert!(allows(owner, mailbox), "{owner} {mailbox}");
        }
        for (owner, mailbox) in [
            ("webmail@host.test", "bob@b.test"),
            ("webmail@host.test", "alice@x@a.test"),
            ("webmail@host.test", "alice@a.test@b.test"),
            ("webmail@host.test", "@a.test"),
            ("webmail@host.test", "a.test"),
            ("webmail@host.test", "alice@sub.a.test"),
            ("one@desk.test", "alice@a.test"),
            ("one@x@desk.test", "bob@b.test"),
            ("alice@a.test", "bob@b.test"),
        ] {
            assert!(!allows(owner, mailbox), "{owner} {mailbox}");
        }
    }

    #[test]
    fn certificate_without_a_list_opens_only_its_owners_mailbox() {
        let mut credentials = external("alice@a.test", Some("bob@a.test"));
        assert_eq!(authorise_certificate(&mut credentials, &NamingRules::default(), &[]), Err(NotDelegated));
        let mut own = external("alice@a.test", None);
        assert_eq!(authorise_certificate(&mut own, &NamingRules::default(), &[]), Ok(()));
    }

    #[test]
    fn authzid_that_spells_the_owners_name_differently_is_removed() {
        let naming = NamingRules { detail: Some('+'), ..NamingRules::default() };
        let mut credentials = external("alice@a.test", Some("ALICE+secret@a.test"));
        assert_eq!(authorise_certificate(&mut credentials, &naming, &[]), Ok(()));
        assert_eq!((credentials.authzid, credentials.user), (None, name("alice@a.test")));
    }

    #[test]
    fn other_logins_pass_unchanged() {
        let mut credentials = external("alice", Some("bob"));
        credentials.proof = Proof::Password(Secret::new(b"x".to_vec()));
        assert_eq!(authorise_certificate(&mut credentials, &NamingRules::default(), &[]), Ok(()));
        assert_eq!(credentials.authzid, Some(name("bob")));
    }

    #[test]
    fn invalid_patterns_are_refused() {
        for bad in ["", "a*", "*a", "*@", "*@a@b", "*@*", "**", "a b*", "x\0"] {
            assert_eq!(NamePattern::parse(bad), None, "{bad:?}");
        }
    }
}
