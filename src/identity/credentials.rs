//! What a login brought, and what a server is sent for it.

use serde::Deserialize;

use super::{Secret, UserName};

macro_rules! mechanisms {
    ($($(#[$doc:meta])* $variant:ident = $label:literal, $sasl:literal,)*) => {
        /// How the client logged in: the label of metrics and log records.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum Mechanism { $($(#[$doc])* $variant,)* }

        impl Mechanism {
            /// All of them, in label order: metrics resolve their children once.
            pub const ALL: [Self; [$($label),*].len()] = [$(Self::$variant),*];

            /// Label text.
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $label,)* }
            }

            /// The name in SASL's registry; none for the command LOGIN.
            pub fn sasl_name(self) -> &'static str {
                match self { $(Self::$variant => $sasl,)* }
            }
        }
    };
}

mechanisms! {
    /// The LOGIN command (RFC 3501 section 6.2.3).
    Login = "login", "",
    /// SASL PLAIN (RFC 4616).
    SaslPlain = "sasl-plain", "PLAIN",
    /// SASL LOGIN (an expired draft that many clients speak).
    SaslLogin = "sasl-login", "LOGIN",
    /// XOAUTH2 (Google's, older than the next).
    XOauth2 = "xoauth2", "XOAUTH2",
    /// OAUTHBEARER (RFC 7628).
    OauthBearer = "oauthbearer", "OAUTHBEARER",
    /// EXTERNAL (RFC 4422 appendix A): the client's certificate.
    External = "external", "EXTERNAL",
    /// SCRAM-SHA-1 (RFC 5802).
    ScramSha1 = "scram-sha-1", "SCRAM-SHA-1",
    /// SCRAM-SHA-256 (RFC 7677).
    ScramSha256 = "scram-sha-256", "SCRAM-SHA-256",
}

impl Mechanism {
    /// By the name in AUTHENTICATE or behind `AUTH=`.
    pub fn by_sasl_name(name: &[u8]) -> Option<Self> {
        Self::ALL.into_iter().find(|known| {
            let known = known.sasl_name().as_bytes();
            !known.is_empty() && known.eq_ignore_ascii_case(name)
        })
    }

    /// Whether its messages go to the server as the client sent them, and the server's come back.
    pub fn is_relayed(self) -> bool {
        matches!(self, Self::XOauth2 | Self::OauthBearer | Self::ScramSha1 | Self::ScramSha256)
    }

    /// Whether the first message carries all that a server needs to decide. SCRAM's only names the user; the proof is the
    /// answer to the server's challenge.
    pub fn is_complete_at_once(self) -> bool {
        !matches!(self, Self::ScramSha1 | Self::ScramSha256)
    }
}

/// A set of mechanisms.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Mechanisms(u16);

impl Mechanisms {
    /// Those whose passwords we can bring to a server in whatever form it takes: always possible.
    pub const PASSWORDS: Self = Self(0b111);

    /// With `mechanism` too.
    #[must_use]
    pub const fn with(self, mechanism: Mechanism) -> Self {
        Self(self.0 | 1 << mechanism as u16)
    }

    /// Whether `mechanism` is in it.
    pub fn has(self, mechanism: Mechanism) -> bool {
        self.0 & 1 << mechanism as u16 != 0
    }

    /// What is in both.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// What is in either.
    #[must_use]
    pub fn or(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// As one number, to be kept where threads share it.
    pub fn to_bits(self) -> u16 {
        self.0
    }

    /// What [`Mechanisms::to_bits`] gave.
    pub fn from_bits(bits: u16) -> Self {
        Self(bits)
    }

    /// Those in it, in order.
    pub fn iter(self) -> impl Iterator<Item = Mechanism> {
        Mechanism::ALL.into_iter().filter(move |mechanism| self.has(*mechanism))
    }
}

impl FromIterator<Mechanism> for Mechanisms {
    fn from_iter<I: IntoIterator<Item = Mechanism>>(mechanisms: I) -> Self {
        mechanisms.into_iter().fold(Self::default(), Self::with)
    }
}

/// What one login attempt brought.
#[derive(Debug, Clone)]
pub struct Credentials {
    /// Whose proof it is.
    pub user: UserName,
    /// On whose behalf (RFC 4616), where it differs from `user`. Never dropped on the way: routed by and passed on, or
    /// the login is refused.
    pub authzid: Option<UserName>,
    /// How it arrived.
    pub mechanism: Mechanism,
    /// What shows that it is the user.
    pub proof: Proof,
}

/// What shows that it is the user.
#[derive(Debug, Clone)]
pub enum Proof {
    /// A password, for the server to check.
    Password(Secret),
    /// The first message of a mechanism that is relayed, decoded: a token, or the beginning of SCRAM.
    Message(Secret),
    /// A certificate, which TLS has checked.
    Certificate,
}

impl Credentials {
    /// The name whose mailbox is asked for: the one to route by.
    pub fn mailbox_user(&self) -> &UserName {
        self.authzid.as_ref().unwrap_or(&self.user)
    }

    /// Whether they carry all that a server needs to decide: see [`Mechanism::is_complete_at_once`].
    pub fn is_complete(&self) -> bool {
        self.mechanism.is_complete_at_once()
    }

    /// Bytes of the proof.
    pub fn proof_size(&self) -> usize {
        match &self.proof {
            Proof::Password(secret) | Proof::Message(secret) => secret.expose().len(),
            Proof::Certificate => 0,
        }
    }

    /// The password, where there is one.
    pub fn password(&self) -> Option<&Secret> {
        match &self.proof {
            Proof::Password(password) => Some(password),
            Proof::Message(_) | Proof::Certificate => None,
        }
    }

    /// Whether the client sent a password of no bytes, which proves nothing. Some servers and directories accept it:
    /// LDAP takes a bind with an empty password for an anonymous one (RFC 4513 section 5.1.2).
    pub fn has_empty_password(&self) -> bool {
        self.password().is_some_and(|password| password.expose().is_empty())
    }
}

/// The form in which a password is sent to a backend's servers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LoginWith {
    /// The client's command if the server has it, else the other one.
    #[default]
    Automatic,
    /// AUTHENTICATE PLAIN only.
    Plain,
    /// The command LOGIN only.
    Login,
    /// The client's command only.
    AsClient,
}

/// What a server is logged in with.
#[derive(Debug, Clone, Copy)]
pub enum ServerLogin<'a> {
    /// A password, in whatever form the server takes.
    Password(PasswordLogin<'a>),
    /// The client's own exchange, beginning with this message.
    Relayed {
        /// By what.
        mechanism: Mechanism,
        /// Decoded.
        first: &'a Secret,
        /// The name that logs in, and that of the mailbox if it is another user's. Both are in the message.
        user: &'a UserName,
        /// See `user`.
        authzid: Option<&'a UserName>,
    },
}

impl ServerLogin<'_> {
    /// Whether it carries all that a server needs to decide: see [`Mechanism::is_complete_at_once`].
    pub fn is_complete(&self) -> bool {
        match self {
            Self::Password(_) => true,
            Self::Relayed { mechanism, .. } => mechanism.is_complete_at_once(),
        }
    }
}

/// A password and whose it is.
#[derive(Debug, Clone, Copy)]
pub struct PasswordLogin<'a> {
    /// Whose password it is.
    pub user: &'a UserName,
    /// Whose mailbox is asked for, where that is another's.
    pub authzid: Option<&'a UserName>,
    /// The password.
    pub password: &'a Secret,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mechanisms_by_name() {
        assert_eq!(Mechanism::by_sasl_name(b"scram-sha-256"), Some(Mechanism::ScramSha256));
        for none in ["", "SCRAM-SHA-256-PLUS", "CRAM-MD5"] {
            assert_eq!(Mechanism::by_sasl_name(none.as_bytes()), None, "{none}");
        }
    }

    #[test]
    fn sets() {
        let set = Mechanisms::PASSWORDS.with(Mechanism::XOauth2);
        assert!(set.has(Mechanism::Login) && set.has(Mechanism::XOauth2) && !set.has(Mechanism::External));
        assert_eq!(set.and(Mechanisms::PASSWORDS), Mechanisms::PASSWORDS);
        let names: Vec<&str> = set.iter().map(Mechanism::as_str).collect();
        assert_eq!(names, ["login", "sasl-plain", "sasl-login", "xoauth2"]);
        assert_eq!(Mechanisms::from_bits(set.to_bits()), set);
        assert_eq!(Mechanism::ALL.into_iter().collect::<Mechanisms>().iter().count(), Mechanism::ALL.len());
    }
}
