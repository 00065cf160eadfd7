//! Evidence that a service has verified the client's password.
//!
//! Credentials that a route provides open a mailbox although the mailbox server never sees the client's own. They must
//! therefore not be used for a login whose password was not verified: one by token, by SCRAM, or without a password.
//! [`PasswordVerification::Confirmed`] can only be created from a [`SentPassword`], and that only from a client's password.

use crate::identity::{Credentials, Secret};

/// Whether a lookup has verified the client's password.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum PasswordVerification {
    /// It was not verified: the mailbox server verifies the client's credentials.
    #[default]
    Unverified,
    /// The service received the client's password with this lookup and confirmed it.
    Confirmed(Confirmation),
}

impl PasswordVerification {
    /// Whether the client's password was confirmed.
    pub fn is_confirmed(&self) -> bool {
        matches!(self, Self::Confirmed(_))
    }
}

/// Can only be created by [`SentPassword::confirmed`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Confirmation(());

/// The client's password as part of one request to a service.
#[derive(Debug)]
pub(super) struct SentPassword<'a>(&'a Secret);

impl<'a> SentPassword<'a> {
    /// Returns `None` if the mechanism carries no password, or if the password is empty: a service that passes an empty one to an LDAP
    /// bind gets a success that verifies nothing (RFC 4513 section 5.1.2).
    pub(super) fn of(credentials: &'a Credentials) -> Option<Self> {
        credentials.password().filter(|password| !password.expose().is_empty()).map(Self)
    }

    pub(super) fn expose(&self) -> &'a [u8] {
        self.0.expose()
    }

    /// The service accepted the request with this password.
    pub(super) fn confirmed(self) -> PasswordVerification {
        PasswordVerification::Confirmed(Confirmation(()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::{Mechanism, Proof, RelayedMechanism, UserName};

    #[test]
    fn only_a_password_can_be_confirmed() {
        let secret = |text: &str| Secret::new(text.as_bytes().to_vec());
        for (mechanism, proof, expected) in [
            (Mechanism::Login, Proof::Password(secret("secret")), true),
            (Mechanism::SaslPlain, Proof::Password(secret("")), false),
            (
                Mechanism::XOauth2,
                Proof::Message {
                    mechanism: RelayedMechanism::XOauth2,
                    first: secret("user=alice\x01auth=Bearer t\x01\x01"),
                },
                false,
            ),
            (
                Mechanism::ScramSha256,
                Proof::Message { mechanism: RelayedMechanism::ScramSha256, first: secret("n,,n=alice,r=x") },
                false,
            ),
            (Mechanism::External, Proof::Certificate, false),
        ] {
            let credentials = Credentials { user: UserName::new(b"alice").unwrap(), authzid: None, mechanism, proof };
            let sent = SentPassword::of(&credentials);
            assert_eq!(
                sent.map(SentPassword::confirmed).is_some_and(|verification| verification.is_confirmed()),
                expected
            );
        }
        assert!(!PasswordVerification::default().is_confirmed());
    }
}
