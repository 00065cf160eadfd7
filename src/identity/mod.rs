//! User names, credentials and secrets.
//!
//! User names are validated once, here, and contain no control characters afterwards, so that they are safe in log lines, lookups
//! and IMAP commands. Secrets print as `[redacted]` in every build and are wiped when dropped. The module does not parse IMAP, does
//! not route, and does not verify credentials: the mailbox server does.

mod credentials;
mod delegation;
mod names;
mod token;

use std::fmt;
use std::sync::Arc;

use zeroize::{Zeroize, ZeroizeOnDrop, Zeroizing};

pub use self::credentials::{
    Credentials, LoginWith, Mechanism, Mechanisms, PasswordLogin, Proof, RelayedMechanism, ServerLogin,
};
pub use self::delegation::{Delegation, NamePattern, NotDelegated, authorise_certificate};
pub use self::names::{LogName, NameNotAllowed, NamingRules, UnicodeRule, UserNames};
pub use self::token::{TokenError, TokenIssuer, claimed_user};

/// Maximum size of a user name in bytes. RFC 3501 sets no limit, but Dovecot refuses longer names.
pub const MAX_USER_NAME: usize = 512;

/// A user name as the client sent it: UTF-8, 1 to [`MAX_USER_NAME`] bytes, without control characters, and without white space at
/// its ends, which some servers trim. Several parts of a session keep its name, so clones share the text.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct UserName(Arc<str>);

impl UserName {
    /// Validates `bytes`.
    ///
    /// # Errors
    /// The rule that the name violates. The error does not contain the name.
    pub fn new(bytes: &[u8]) -> Result<Self, InvalidName> {
        let text = std::str::from_utf8(bytes).map_err(|_| InvalidName::NotUtf8)?;
        if text.is_empty() {
            return Err(InvalidName::Empty);
        }
        if text.len() > MAX_USER_NAME {
            return Err(InvalidName::TooLong);
        }
        if text.chars().any(char::is_control) {
            return Err(InvalidName::Control);
        }
        if text.trim() != text {
            return Err(InvalidName::WhiteSpace);
        }
        Ok(Self(text.into()))
    }

    /// The name as the client sent it.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Returns `text` in an allocation that it shares with this name if both are equal.
    fn share(&self, text: &str) -> Arc<str> {
        if text == &*self.0 { self.0.clone() } else { text.into() }
    }
}

impl fmt::Display for UserName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for UserName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

/// Why a user name was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum InvalidName {
    /// The name is empty.
    #[error("the user name is empty")]
    Empty,
    /// The name exceeds [`MAX_USER_NAME`] bytes.
    #[error("the user name is too long")]
    TooLong,
    /// The name is not UTF-8.
    #[error("the user name is not UTF-8")]
    NotUtf8,
    /// The name contains NUL, CR, LF or another control character.
    #[error("the user name has a control character")]
    Control,
    /// The name begins or ends with white space.
    #[error("the user name begins or ends with white space")]
    WhiteSpace,
}

/// A password or token, which is wiped when dropped and never printed.
#[derive(Clone, PartialEq, Eq, Zeroize, ZeroizeOnDrop)]
pub struct Secret(Vec<u8>);

impl Secret {
    /// Takes ownership of the bytes, of which the caller must keep no copy.
    pub fn new(bytes: Vec<u8>) -> Self {
        Self(bytes)
    }

    /// Returns the secret itself, to be sent or compared.
    pub fn expose(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[redacted]")
    }
}

/// Appends to a buffer that may contain a secret. If it must grow, the previous allocation is wiped, which `Vec` alone does not do.
pub fn append_wiped(buffer: &mut Zeroizing<Vec<u8>>, bytes: &[u8]) {
    let needed = buffer.len() + bytes.len();
    if needed > buffer.capacity() {
        let mut larger = Zeroizing::new(Vec::with_capacity(needed.max(2 * buffer.capacity())));
        larger.extend_from_slice(buffer);
        // The previous allocation is wiped when it is dropped.
        *buffer = larger;
    }
    buffer.extend_from_slice(bytes);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn invalid_names_are_refused() {
        assert_eq!(UserName::new(b""), Err(InvalidName::Empty));
        assert_eq!(UserName::new(&[b'a'; MAX_USER_NAME + 1]), Err(InvalidName::TooLong));
        assert_eq!(UserName::new(b"a\xffb"), Err(InvalidName::NotUtf8));
        for control in ["a\0b", "a\rb", "a\nb", "a\x7fb", "a\u{85}b", "\tb"] {
            assert_eq!(UserName::new(control.as_bytes()), Err(InvalidName::Control), "{control:?}");
        }
        for trimmed in [" a", "a ", " ", "a\u{a0}", "\u{3000}a"] {
            assert_eq!(UserName::new(trimmed.as_bytes()), Err(InvalidName::WhiteSpace), "{trimmed:?}");
        }
        assert!(UserName::new(&[b'a'; MAX_USER_NAME]).is_ok());
    }

    #[test]
    fn append_wiped_keeps_the_content() {
        let mut buffer = Zeroizing::new(Vec::with_capacity(2));
        for part in [&b"a"[..], b"bcd", b"", b"efghijklmnop"] {
            append_wiped(&mut buffer, part);
        }
        assert_eq!(&buffer[..], b"abcdefghijklmnop");
    }

    #[test]
    fn secrets_are_redacted_in_debug_output() {
        let credentials = Credentials {
            user: UserName::new(b"alice").unwrap(),
            authzid: None,
            mechanism: Mechanism::Login,
            proof: Proof::Password(Secret::new(b"hunter2".to_vec())),
        };
        let printed = format!("{credentials:?} {credentials:#?}");
        assert!(printed.contains("[redacted]") && !printed.contains("hunter2"), "{printed}");
    }
}
