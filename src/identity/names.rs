//! The three names of a user: for routing, for servers and for logs.
//!
//! Clients spell a user's name differently, and the rules here define which spellings are the same user. They are applied in this
//! order: a master user is split off, Unicode is checked, letters are converted to lower case, a name that still contains the
//! separator of master users is refused, a separator of domains is replaced by `@`, the default domain is added, and the detail is
//! removed from the routing name.

use std::fmt::Write as _;
use std::sync::Arc;

use aws_lc_rs::digest::{SHA256, digest};
use precis_profiles::UsernameCaseMapped;
use precis_profiles::precis_core::profile::Profile as _;
use serde::Deserialize;

use super::UserName;

/// The rules of `users` in the configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NamingRules {
    /// Whether ASCII letters are converted to lower case, which is the default.
    pub lower_case: bool,
    /// Which characters beyond ASCII are allowed.
    pub unicode: UnicodeRule,
    /// Characters of which the last one in a name replaces a missing `@`.
    pub separators: Box<[char]>,
    /// The domain that is added to names without a domain.
    pub default_domain: Option<Box<str>>,
    /// The character that begins the detail in the local part, which is not part of the routing name.
    pub detail: Option<char>,
    /// Whether servers receive the normalised name instead of the name that the client sent.
    pub server_normalised: bool,
    /// The form of the name in logs.
    pub log: LogName,
    /// The separator between a user's and a master user's name, as in `alice*admin`.
    pub master_separator: Option<char>,
}

/// The rule for characters beyond ASCII.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum UnicodeRule {
    /// All characters are allowed and unchanged.
    #[default]
    Keep,
    /// A login with such characters is refused.
    Refuse,
    /// The PRECIS profile UsernameCaseMapped (RFC 8265 section 3.3) is enforced.
    Precis,
}

/// The form of user names in logs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LogName {
    /// As the client sent it.
    #[default]
    AsSent,
    /// Normalised by the rules.
    Normalised,
    /// The first 16 hexadecimal digits of the normalised name's SHA-256, so that records can be found by a known name.
    Hashed,
}

impl Default for NamingRules {
    fn default() -> Self {
        Self {
            lower_case: true,
            unicode: UnicodeRule::Keep,
            separators: Box::default(),
            default_domain: None,
            detail: None,
            server_normalised: false,
            log: LogName::AsSent,
            master_separator: None,
        }
    }
}

/// The three names of a user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UserNames {
    /// The name by which the user is routed.
    pub routing: Arc<str>,
    /// The name for servers.
    pub server: UserName,
    /// The name in logs.
    pub log: UserName,
}

/// The name violates a rule of the configuration or of PRECIS.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the user name has characters that are not allowed here")]
pub struct NameNotAllowed;

impl NamingRules {
    /// Splits the name in a master user's login into the mailbox's user and the master user. Returns `None` for other names.
    pub fn split_master(&self, sent: &UserName) -> Option<(UserName, UserName)> {
        let (user, master) = sent.as_str().rsplit_once(self.master_separator?)?;
        // If either part is not a valid name, the whole is an ordinary name.
        Some((UserName::new(user.as_bytes()).ok()?, UserName::new(master.as_bytes()).ok()?))
    }

    /// Whether `name` contains the separator of master users. A server with the same separator would split such a name: it could
    /// open a mailbox other than the routed one, or verify the password of a user for whom failed logins are not counted.
    pub fn has_master_separator(&self, name: &str) -> bool {
        self.master_separator.is_some_and(|separator| name.contains(separator))
    }

    /// Returns the name for servers of a user who logs in on behalf of another user. It is normalised if servers receive
    /// normalised names, but without the default domain, which master users need not have.
    ///
    /// # Errors
    /// The name violates a rule, as in [`NamingRules::names`].
    pub fn authcid(&self, sent: &UserName) -> Result<UserName, NameNotAllowed> {
        let folded = self.folded(sent.as_str())?;
        if self.server_normalised {
            UserName::new(folded.as_bytes()).map_err(|_| NameNotAllowed)
        } else {
            Ok(sent.clone())
        }
    }

    /// Returns the three names of a user who sent the name `sent`.
    ///
    /// # Errors
    /// `sent` or its normalised form contains a character that the rules do not allow, or the separator of master users.
    pub fn names(&self, sent: &UserName) -> Result<UserNames, NameNotAllowed> {
        let whole = self.normalised(sent.as_str())?;
        let routing = self.without_detail(&whole);
        let server = match self.server_normalised {
            true => UserName::new(whole.as_bytes()).map_err(|_| NameNotAllowed)?,
            false => sent.clone(),
        };
        let log = match self.log {
            LogName::AsSent => sent.clone(),
            LogName::Normalised => UserName::new(whole.as_bytes()).map_err(|_| NameNotAllowed)?,
            LogName::Hashed => hashed(&whole),
        };
        Ok(UserNames { routing: log.share(&routing), server, log })
    }

    /// Applies the rules for single characters.
    fn folded(&self, sent: &str) -> Result<String, NameNotAllowed> {
        let mut name = match self.unicode {
            UnicodeRule::Refuse if !sent.is_ascii() => return Err(NameNotAllowed),
            UnicodeRule::Keep | UnicodeRule::Refuse => sent.to_owned(),
            // The profile is defined for the parts before and after `@`, but it allows `@` too.
            UnicodeRule::Precis => UsernameCaseMapped::new().enforce(sent).map_err(|_| NameNotAllowed)?.into_owned(),
        };
        if self.lower_case {
            name.make_ascii_lowercase();
        }
        // PRECIS maps a full-width asterisk to `*`, so both forms are checked.
        if self.has_master_separator(sent) || self.has_master_separator(&name) {
            return Err(NameNotAllowed);
        }
        Ok(name)
    }

    fn normalised(&self, sent: &str) -> Result<String, NameNotAllowed> {
        let mut name = self.folded(sent)?;
        if !name.contains('@')
            && let Some((at, separator)) = name.char_indices().rfind(|(_, char)| self.separators.contains(char))
        {
            name.replace_range(at..at + separator.len_utf8(), "@");
        }
        if let Some(domain) = self.default_domain.as_deref().filter(|_| !name.contains('@')) {
            name.push('@');
            name.push_str(domain);
        }
        UserName::new(name.as_bytes()).map_err(|_| NameNotAllowed)?;
        Ok(name)
    }

    /// Removes the detail, as in `alice+work@example.org`, unless nothing else is left of the local part.
    fn without_detail(&self, name: &str) -> String {
        let Some(detail) = self.detail else { return name.to_owned() };
        let (local, domain) = match name.rfind('@') {
            Some(at) => name.split_at(at),
            None => (name, ""),
        };
        match local.split_once(detail) {
            Some((user, _)) if !user.is_empty() => format!("{user}{domain}"),
            _ => name.to_owned(),
        }
    }
}

fn hashed(name: &str) -> UserName {
    let mut text = String::new();
    for byte in digest(&SHA256, name.as_bytes()).as_ref().iter().take(8) {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
    }
    UserName(text.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> UserName {
        UserName::new(text.as_bytes()).unwrap()
    }

    fn routing(naming: &NamingRules, sent: &str) -> Option<String> {
        naming.names(&name(sent)).ok().map(|names| names.routing.to_string())
    }

    #[test]
    fn default_rules_only_lower_the_case_of_the_routing_name() {
        let names = NamingRules::default().names(&name("Zo\u{cb}+X@Example.ORG")).unwrap();
        assert_eq!(&*names.routing, "zo\u{cb}+x@example.org");
        assert_eq!((names.server.as_str(), names.log.as_str()), ("Zo\u{cb}+X@Example.ORG", "Zo\u{cb}+X@Example.ORG"));
    }

    #[test]
    fn equal_names_share_an_allocation() {
        let names = NamingRules::default().names(&name("alice@example.org")).unwrap();
        let addresses = [names.routing.as_ptr(), names.server.as_str().as_ptr(), names.log.as_str().as_ptr()];
        assert!(addresses.iter().all(|address| *address == addresses[0]));
    }

    #[test]
    fn rules_are_applied_in_order() {
        let naming = NamingRules {
            separators: ['%', '!'].into(),
            default_domain: Some("example.org".into()),
            detail: Some('+'),
            server_normalised: true,
            log: LogName::Normalised,
            ..NamingRules::default()
        };
        for (sent, routed, server) in [
            ("Alice", "alice@example.org", "alice@example.org"),
            ("alice%B.test", "alice@b.test", "alice@b.test"),
            ("a!b%c.test", "a!b@c.test", "a!b@c.test"),
            ("alice%x@b.test", "alice%x@b.test", "alice%x@b.test"),
            ("Alice+Work@b.test", "alice@b.test", "alice+work@b.test"),
            ("+only@b.test", "+only@b.test", "+only@b.test"),
            ("alice+a+b", "alice@example.org", "alice+a+b@example.org"),
        ] {
            let names = naming.names(&name(sent)).unwrap();
            assert_eq!(
                (&*names.routing, names.server.as_str(), names.log.as_str()),
                (routed, server, server),
                "{sent}"
            );
        }
    }

    #[test]
    fn unicode_rule_is_applied() {
        let rule = |unicode| NamingRules { unicode, ..NamingRules::default() };
        assert_eq!(routing(&rule(UnicodeRule::Refuse), "zo\u{eb}"), None);
        assert_eq!(routing(&rule(UnicodeRule::Refuse), "Zoe"), Some("zoe".into()));
        let precis = rule(UnicodeRule::Precis);
        // RFC 8265 section 3.3: width, case, composition.
        assert_eq!(routing(&precis, "Zo\u{cb}@x.test"), Some("zo\u{eb}@x.test".into()));
        assert_eq!(routing(&precis, "zoe\u{308}"), Some("zo\u{eb}".into()));
        assert_eq!(routing(&precis, "\u{ff21}lice"), Some("alice".into()));
        for refused in ["a b", "\u{202e}alice", "hen\u{2163}", "a\u{a0}b"] {
            assert_eq!(routing(&precis, refused), None, "{refused:?}");
        }
    }

    #[test]
    fn name_that_is_too_long_with_the_default_domain_is_refused() {
        let naming = NamingRules { default_domain: Some("example.org".into()), ..NamingRules::default() };
        assert_eq!(routing(&naming, &"a".repeat(505)), None);
    }

    #[test]
    fn master_user_is_split_off() {
        let naming = NamingRules { master_separator: Some('*'), ..NamingRules::default() };
        assert_eq!(naming.split_master(&name("a*b*root")), Some((name("a*b"), name("root"))));
        for none in ["alice", "*root", "alice*"] {
            assert_eq!(naming.split_master(&name(none)), None, "{none}");
        }
        assert_eq!(NamingRules::default().split_master(&name("alice*root")), None);
    }

    #[test]
    fn name_with_the_master_separator_is_refused_before_and_after_normalisation() {
        let naming = |unicode, server_normalised| NamingRules {
            unicode,
            server_normalised,
            master_separator: Some('*'),
            ..NamingRules::default()
        };
        for server_normalised in [true, false] {
            let precis = naming(UnicodeRule::Precis, server_normalised);
            for refused in ["alice*admin", "alice\u{ff0a}admin", "alice\u{fe61}admin", "\u{ff0a}alice", "alice\u{ff0a}"]
            {
                assert_eq!(precis.split_master(&name(refused)).is_some(), refused == "alice*admin", "{refused}");
                assert_eq!(precis.names(&name(refused)), Err(NameNotAllowed), "{refused}");
                assert_eq!(precis.authcid(&name(refused)), Err(NameNotAllowed), "{refused}");
            }
            // Servers receive these names unchanged, and none of them splits at a full-width asterisk.
            let keep = naming(UnicodeRule::Keep, server_normalised);
            assert!(keep.names(&name("alice\u{ff0a}admin")).is_ok());
        }
    }

    #[test]
    fn full_width_characters_are_normalised_for_routing_and_servers() {
        let naming = NamingRules {
            unicode: UnicodeRule::Precis,
            server_normalised: true,
            separators: ['%'].into(),
            default_domain: Some("example.org".into()),
            detail: Some('+'),
            ..NamingRules::default()
        };
        for (sent, routed, server) in [
            ("alice\u{ff20}b.test", "alice@b.test", "alice@b.test"),
            ("alice\u{ff05}b.test", "alice@b.test", "alice@b.test"),
            ("alice\u{ff0b}x@b.test", "alice@b.test", "alice+x@b.test"),
            ("alice\u{ff0b}x", "alice@example.org", "alice+x@example.org"),
        ] {
            let names = naming.names(&name(sent)).unwrap();
            assert_eq!((&*names.routing, names.server.as_str()), (routed, server), "{sent}");
        }
        for refused in ["alice\u{2028}x", "alice\u{200b}x", "alice\u{3000}x", "alice\u{feff}"] {
            assert_eq!(naming.names(&name(refused)), Err(NameNotAllowed), "{refused:?}");
        }
    }

    #[test]
    fn master_user_is_normalised_without_the_default_domain() {
        let naming = |server_normalised| NamingRules {
            unicode: UnicodeRule::Precis,
            default_domain: Some("example.org".into()),
            server_normalised,
            ..NamingRules::default()
        };
        assert_eq!(naming(true).authcid(&name("\u{ff21}dmin")), Ok(name("admin")));
        assert_eq!(naming(false).authcid(&name("Admin")), Ok(name("Admin")));
    }

    #[test]
    fn hashed_name_does_not_contain_the_name() {
        let naming = NamingRules { log: LogName::Hashed, ..NamingRules::default() };
        let names = naming.names(&name("Alice")).unwrap();
        // The SHA-256 of "alice".
        assert_eq!(names.log.as_str(), "2bd806c97f0e00af");
    }
}
