//! Evidence that a service has verified the client's password.
//!
//! Credentials that a route hands out open a mailbox although the mailbox server never sees the client's own. They must
//! therefore not be used for a login whose password was not verified: one by token, by SCRAM, or without a password.
//! [`PasswordVerification::PasswordConfirmed`] can only be made from a [`SentPassword`], and that only from a client's password.

use crate::identity::{Credentials, Secret};

/// What the answer to one lookup says about the client's identity.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum PasswordVerification {
    /// Nothing: the mailbox server verifies what the client sends.
    #[default]
    Unverified,
    /// The service received the client's password with this lookup and confirmed it.
    PasswordConfirmed(Confirmation),
}

impl PasswordVerification {
    /// Whether the client's password was confirmed.
    pub fn is_confirmed(&self) -> bool {
        matches!(self, Self::PasswordConfirmed(_))
    }
}

/// Made by [`SentPassword::confirmed`] only.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Confirmation(());

/// The client's password as part of one request to a service.
#[derive(Debug)]
pub(super) struct SentPassword<'a>(&'a Secret);

impl<'a> SentPassword<'a> {
    /// `None` if the mechanism carries no password, or the password is empty: a service that passes an empty one to an LDAP
    /// bind gets a success that proves nothing (RFC 4513 section 5.1.2).
    pub(super) fn of(credentials: &'a Credentials) -> Option<Self> {
        credentials.password().filter(|password| !password.expose().is_empty()).map(Self)
    }

    pub(super) fn expose(&self) -> &'a [u8] {
        self.0.expose()
    }

    /// The service's answer to the request with this password was positive.
    pub(super) fn confirmed(self) -> PasswordVerification {
        PasswordVerification::PasswordConfirmed(Confirmation(()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::{Mechanism, Proof, RelayedMechanism, UserName};

    #[test]
    fn only_a_password_can_be_confirmed() {
        let secret = |text: &str| Secret::new(text.as_bytes().to_vec());
        for (mechanism, proof, can) in [
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
            assert_eq!(sent.map(SentPassword::confirmed).is_some_and(|identity| identity.is_confirmed()), can);
        }
        assert!(!PasswordVerification::default().is_confirmed());
    }
}
