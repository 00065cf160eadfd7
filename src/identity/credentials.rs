//! The credentials in a client's login, and those with which the proxy logs in on a server.

use serde::Deserialize;

use super::{Secret, UserName};

macro_rules! mechanisms {
    ($($(#[$doc:meta])* $variant:ident = $label:literal, $sasl:expr,)*) => {
        /// How the client logged in.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum Mechanism { $($(#[$doc])* $variant,)* }

        impl Mechanism {
            /// All mechanisms, in the order of their declaration.
            pub const ALL: [Self; [$($label),*].len()] = [$(Self::$variant),*];

            /// The value of the `mechanism` label of metrics and of the field in log records.
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $label,)* }
            }

            /// The registered SASL name; the command LOGIN has none.
            pub fn sasl_name(self) -> Option<&'static str> {
                match self { $(Self::$variant => $sasl,)* }
            }
        }
    };
}

mechanisms! {
    /// The LOGIN command (RFC 3501 section 6.2.3).
    Login = "login", None,
    /// SASL PLAIN (RFC 4616).
    SaslPlain = "sasl-plain", Some("PLAIN"),
    /// SASL LOGIN, an expired draft that many clients use.
    SaslLogin = "sasl-login", Some("LOGIN"),
    /// XOAUTH2, Google's predecessor of OAUTHBEARER.
    XOauth2 = "xoauth2", Some("XOAUTH2"),
    /// OAUTHBEARER (RFC 7628).
    OauthBearer = "oauthbearer", Some("OAUTHBEARER"),
    /// EXTERNAL (RFC 4422 appendix A): the client's certificate.
    External = "external", Some("EXTERNAL"),
    /// SCRAM-SHA-1 (RFC 5802).
    ScramSha1 = "scram-sha-1", Some("SCRAM-SHA-1"),
    /// SCRAM-SHA-256 (RFC 7677).
    ScramSha256 = "scram-sha-256", Some("SCRAM-SHA-256"),
}

impl Mechanism {
    /// Finds a mechanism by its name in AUTHENTICATE or after `AUTH=`.
    pub fn by_sasl_name(name: &[u8]) -> Option<Self> {
        let is_named =
            |known: &Self| known.sasl_name().is_some_and(|known| known.as_bytes().eq_ignore_ascii_case(name));
        Self::ALL.into_iter().find(is_named)
    }

    /// The mechanism as one that is relayed, or `None` if the proxy reads its messages completely.
    pub fn relayed(self) -> Option<RelayedMechanism> {
        match self {
            Self::Login | Self::SaslPlain | Self::SaslLogin | Self::External => None,
            Self::XOauth2 => Some(RelayedMechanism::XOauth2),
            Self::OauthBearer => Some(RelayedMechanism::OauthBearer),
            Self::ScramSha1 => Some(RelayedMechanism::ScramSha1),
            Self::ScramSha256 => Some(RelayedMechanism::ScramSha256),
        }
    }

    /// Whether the mechanism is relayed: see [`RelayedMechanism`].
    pub fn is_relayed(self) -> bool {
        self.relayed().is_some()
    }

    /// Whether the first message contains everything that a server needs to verify the login. In SCRAM it only names the user;
    /// the proof is the response to the server's challenge.
    pub fn is_complete_at_once(self) -> bool {
        !matches!(self, Self::ScramSha1 | Self::ScramSha256)
    }
}

/// A mechanism whose messages are relayed: the proxy reads the first message, and passes the exchange on between client and server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RelayedMechanism {
    /// See [`Mechanism::XOauth2`].
    XOauth2,
    /// See [`Mechanism::OauthBearer`].
    OauthBearer,
    /// See [`Mechanism::ScramSha1`].
    ScramSha1,
    /// See [`Mechanism::ScramSha256`].
    ScramSha256,
}

impl RelayedMechanism {
    /// The registered SASL name.
    pub fn sasl_name(self) -> &'static str {
        match self {
            Self::XOauth2 => "XOAUTH2",
            Self::OauthBearer => "OAUTHBEARER",
            Self::ScramSha1 => "SCRAM-SHA-1",
            Self::ScramSha256 => "SCRAM-SHA-256",
        }
    }
}

impl From<RelayedMechanism> for Mechanism {
    fn from(mechanism: RelayedMechanism) -> Self {
        match mechanism {
            RelayedMechanism::XOauth2 => Self::XOauth2,
            RelayedMechanism::OauthBearer => Self::OauthBearer,
            RelayedMechanism::ScramSha1 => Self::ScramSha1,
            RelayedMechanism::ScramSha256 => Self::ScramSha256,
        }
    }
}

/// A set of mechanisms.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Mechanisms(u16);

impl Mechanisms {
    /// The mechanisms that carry a password, which can be sent to any server in a form that it supports.
    pub const PASSWORDS: Self = Self(0b111);

    /// The set with `mechanism` added.
    #[must_use]
    pub const fn with(self, mechanism: Mechanism) -> Self {
        Self(self.0 | 1 << mechanism as u16)
    }

    /// Whether the set contains `mechanism`.
    pub fn has(self, mechanism: Mechanism) -> bool {
        self.0 & 1 << mechanism as u16 != 0
    }

    /// The intersection of both sets.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// The union of both sets.
    #[must_use]
    pub fn or(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// The set as a number, which can be stored in an atomic.
    pub fn to_bits(self) -> u16 {
        self.0
    }

    /// The set that [`Mechanisms::to_bits`] returned as `bits`.
    pub fn from_bits(bits: u16) -> Self {
        Self(bits)
    }

    /// The mechanisms in the set, in the order of [`Mechanism::ALL`].
    pub fn iter(self) -> impl Iterator<Item = Mechanism> {
        Mechanism::ALL.into_iter().filter(move |mechanism| self.has(*mechanism))
    }
}

impl FromIterator<Mechanism> for Mechanisms {
    fn from_iter<I: IntoIterator<Item = Mechanism>>(mechanisms: I) -> Self {
        mechanisms.into_iter().fold(Self::default(), Self::with)
    }
}

/// The credentials of one login attempt.
#[derive(Debug, Clone)]
pub struct Credentials {
    /// The user who authenticates (the authentication identity).
    pub user: UserName,
    /// The user whose mailbox is requested (the authorization identity, RFC 4616), if it differs from `user`. It is never
    /// dropped: the proxy routes by it and passes it on, or refuses the login.
    pub authzid: Option<UserName>,
    /// The mechanism that the client used.
    pub mechanism: Mechanism,
    /// The proof of the user's identity.
    pub proof: Proof,
}

/// The proof of a user's identity.
#[derive(Debug, Clone)]
pub enum Proof {
    /// A password, which the server verifies.
    Password(Secret),
    /// The first message of a relayed mechanism: a token, or the start of SCRAM.
    Message {
        /// The mechanism of the message.
        mechanism: RelayedMechanism,
        /// The message, decoded from base64.
        first: Secret,
    },
    /// A client certificate, which TLS has verified.
    Certificate,
}

impl Credentials {
    /// The user whose mailbox is requested, by which the login is routed.
    pub fn mailbox_user(&self) -> &UserName {
        self.authzid.as_ref().unwrap_or(&self.user)
    }

    /// Whether a server can verify the login by these credentials alone: see [`Mechanism::is_complete_at_once`].
    pub fn is_complete(&self) -> bool {
        self.mechanism.is_complete_at_once()
    }

    /// Size of the proof in bytes.
    pub fn proof_size(&self) -> usize {
        match &self.proof {
            Proof::Password(secret) | Proof::Message { first: secret, .. } => secret.expose().len(),
            Proof::Certificate => 0,
        }
    }

    /// The password, if the proof is one.
    pub fn password(&self) -> Option<&Secret> {
        match &self.proof {
            Proof::Password(password) => Some(password),
            Proof::Message { .. } | Proof::Certificate => None,
        }
    }

    /// Whether the password is empty, which proves nothing. Some servers and directories accept it: an LDAP bind with an empty
    /// password is anonymous and succeeds (RFC 4513 section 5.1.2).
    pub fn has_empty_password(&self) -> bool {
        self.password().is_some_and(|password| password.expose().is_empty())
    }
}

/// The form in which a password is sent to a backend's servers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LoginWith {
    /// The client's command if the server supports it, otherwise the other one.
    #[default]
    Automatic,
    /// Always AUTHENTICATE PLAIN.
    Plain,
    /// Always the command LOGIN.
    Login,
    /// Always the client's command.
    AsClient,
}

/// The credentials with which the proxy logs in on a server.
#[derive(Debug, Clone, Copy)]
pub enum ServerLogin<'a> {
    /// A password, sent in a form that the server supports.
    Password(PasswordLogin<'a>),
    /// The client's exchange, which is relayed.
    Relayed {
        /// The mechanism that the client used.
        mechanism: RelayedMechanism,
        /// The client's first message, decoded from base64.
        first: &'a Secret,
        /// The user who authenticates, as named in the message.
        user: &'a UserName,
        /// The user whose mailbox is requested, if it is another one, as named in the message.
        authzid: Option<&'a UserName>,
    },
}

impl ServerLogin<'_> {
    /// Whether a server can verify the login without a further message: see [`Mechanism::is_complete_at_once`].
    pub fn is_complete(&self) -> bool {
        match self {
            Self::Password(_) => true,
            Self::Relayed { mechanism, .. } => Mechanism::from(*mechanism).is_complete_at_once(),
        }
    }
}

/// A user name and a password.
#[derive(Debug, Clone, Copy)]
pub struct PasswordLogin<'a> {
    /// The user who authenticates.
    pub user: &'a UserName,
    /// The user whose mailbox is requested, if it is another one.
    pub authzid: Option<&'a UserName>,
    /// The password.
    pub password: &'a Secret,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mechanism_is_found_by_its_sasl_name() {
        assert_eq!(Mechanism::by_sasl_name(b"scram-sha-256"), Some(Mechanism::ScramSha256));
        for none in ["", "SCRAM-SHA-256-PLUS", "CRAM-MD5"] {
            assert_eq!(Mechanism::by_sasl_name(none.as_bytes()), None, "{none}");
        }
    }

    #[test]
    fn relayed_mechanisms_have_the_name_of_their_mechanism() {
        for mechanism in Mechanism::ALL {
            let Some(relayed) = mechanism.relayed() else { continue };
            assert_eq!((Mechanism::from(relayed), Some(relayed.sasl_name())), (mechanism, mechanism.sasl_name()));
        }
    }

    #[test]
    fn mechanism_sets_have_set_operations() {
        let set = Mechanisms::PASSWORDS.with(Mechanism::XOauth2);
        assert!(set.has(Mechanism::Login) && set.has(Mechanism::XOauth2) && !set.has(Mechanism::External));
        assert_eq!(set.and(Mechanisms::PASSWORDS), Mechanisms::PASSWORDS);
        let names: Vec<&str> = set.iter().map(Mechanism::as_str).collect();
        assert_eq!(names, ["login", "sasl-plain", "sasl-login", "xoauth2"]);
        assert_eq!(Mechanisms::from_bits(set.to_bits()), set);
        assert_eq!(Mechanism::ALL.into_iter().collect::<Mechanisms>().iter().count(), Mechanism::ALL.len());
    }
}
