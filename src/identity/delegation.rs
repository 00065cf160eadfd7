//! Delegation: which mailboxes the owner of a client certificate may ask for (an authzid of EXTERNAL).
//!
//! No server checks such a request, because the proxy's own credentials open the mailbox. So the configuration has to list it;
//! without a list a certificate opens its owner's mailbox only. Names are compared as routes see them. Pure.

use super::{Credentials, NamingRules, Proof, UserName};

/// A user name, or all names of a domain.
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
    /// Reads a name, `*@domain` or `*`. `None`: none of these.
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

    /// Whether the pattern matches a user, by the name that routes see.
    fn matches(&self, naming: &NamingRules, routing_name: &str) -> bool {
        match self {
            Self::Any => true,
            Self::Exact(name) => naming.names(name).is_ok_and(|names| *names.routing == *routing_name),
            // With two at signs, servers differ in what the domain is.
            Self::Domain(domain) => routing_name
                .split_once('@')
                .is_some_and(|(local, of)| !local.is_empty() && !of.contains('@') && of.eq_ignore_ascii_case(domain)),
        }
    }
}

/// An entry of `may_act_for`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Delegation {
    /// Whose certificate.
    pub certificate: NamePattern,
    /// Whose mailboxes it may open.
    pub users: Vec<NamePattern>,
}

/// The certificate's owner may not open the mailbox asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NotDelegated;

/// Checks a login by certificate; other logins pass. An authzid that is another spelling of the owner's own name is left out, so that
/// the owner's mailbox is opened under the name in the certificate.
///
/// # Errors
/// The mailbox is another user's, and no entry allows it.
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
    fn a_certificate_opens_its_owners_mailbox_and_those_that_are_listed() {
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
    fn without_a_list_a_certificate_opens_its_owners_mailbox_only() {
        let mut credentials = external("alice@a.test", Some("bob@a.test"));
        assert_eq!(authorise_certificate(&mut credentials, &NamingRules::default(), &[]), Err(NotDelegated));
        let mut own = external("alice@a.test", None);
        assert_eq!(authorise_certificate(&mut own, &NamingRules::default(), &[]), Ok(()));
    }

    #[test]
    fn another_spelling_of_the_owners_name_is_left_out() {
        let naming = NamingRules { detail: Some('+'), ..NamingRules::default() };
        let mut credentials = external("alice@a.test", Some("ALICE+secret@a.test"));
        assert_eq!(authorise_certificate(&mut credentials, &naming, &[]), Ok(()));
        assert_eq!((credentials.authzid, credentials.user), (None, name("alice@a.test")));
    }

    #[test]
    fn other_logins_are_not_concerned() {
        let mut credentials = external("alice", Some("bob"));
        credentials.proof = Proof::Password(Secret::new(b"x".to_vec()));
        assert_eq!(authorise_certificate(&mut credentials, &NamingRules::default(), &[]), Ok(()));
        assert_eq!(credentials.authzid, Some(name("bob")));
    }

    #[test]
    fn patterns() {
        for bad in ["", "a*", "*a", "*@", "*@a@b", "*@*", "**", "a b*", "x\0"] {
            assert_eq!(NamePattern::parse(bad), None, "{bad:?}");
        }
    }
}
