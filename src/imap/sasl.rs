//! Payloads of SASL PLAIN (RFC 4616) and LOGIN, as they travel in IMAP: base64, with or without padding.
//!
//! Called by `prelogin` to read and by `backend_login` to write.

use base64::Engine as _;
use base64::alphabet::STANDARD;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use zeroize::Zeroizing;

use crate::identity::{Credentials, InvalidName, Mechanism, Secret, ServerLogin, UserName};

const BASE64: GeneralPurpose = GeneralPurpose::new(
    &STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// Why a response is no credentials.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Invalid {
    /// Not base64.
    Base64,
    /// Not three parts, or a password with NUL, CR or LF.
    Form,
    /// A user name that breaks a rule.
    Name(InvalidName),
}

/// Decodes a line of a SASL exchange.
pub(super) fn decode(line: &[u8]) -> Result<Zeroizing<Vec<u8>>, Invalid> {
    BASE64.decode(line).map(Zeroizing::new).map_err(|_| Invalid::Base64)
}

/// `authzid NUL authcid NUL password`. An authzid that repeats the authcid asks for nothing and is left out.
pub(super) fn plain(message: &[u8]) -> Result<Credentials, Invalid> {
    let mut parts = message.splitn(3, |byte| *byte == 0);
    let (Some(authzid), Some(authcid), Some(password)) = (parts.next(), parts.next(), parts.next()) else {
        return Err(Invalid::Form);
    };
    let mut credentials = credentials(authcid, password, Mechanism::SaslPlain)?;
    if !authzid.is_empty() && authzid != authcid {
        credentials.authzid = Some(UserName::new(authzid).map_err(Invalid::Name)?);
    }
    Ok(credentials)
}

/// A user and a password, checked.
pub(super) fn credentials(user: &[u8], password: &[u8], mechanism: Mechanism) -> Result<Credentials, Invalid> {
    let user = UserName::new(user).map_err(Invalid::Name)?;
    if password.iter().any(|byte| matches!(byte, 0 | b'\r' | b'\n')) {
        return Err(Invalid::Form);
    }
    Ok(Credentials { user, authzid: None, password: Secret::new(password.to_vec()), mechanism })
}

/// The response of PLAIN in base64, as a server is sent it.
pub(super) fn plain_response(credentials: &ServerLogin<'_>) -> Zeroizing<Vec<u8>> {
    let authzid = credentials.authzid.map_or("", UserName::as_str).as_bytes();
    let password = credentials.password.expose();
    let user = credentials.user.as_str().as_bytes();
    let mut message = Zeroizing::new(Vec::with_capacity(authzid.len() + user.len() + password.len() + 2));
    for part in [authzid, b"\0", user, b"\0", password] {
        message.extend_from_slice(part);
    }
    let mut encoded = Zeroizing::new(vec![0; message.len().div_ceil(3) * 4]);
    // The buffer has exactly the length of the padded form.
    let written = BASE64.encode_slice(&message[..], &mut encoded[..]).unwrap_or(0);
    encoded.truncate(written);
    encoded
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_messages() {
        let read = |message: &[u8]| {
            plain(message)
                .map(|it| (it.user.to_string(), it.authzid.map(|name| name.to_string()), it.password.expose().to_vec()))
        };
        assert_eq!(read(b"\0alice\0p w"), Ok(("alice".into(), None, b"p w".to_vec())));
        assert_eq!(read(b"alice\0alice\0x"), Ok(("alice".into(), None, b"x".to_vec())));
        assert_eq!(read(b"bob\0alice\0\xff"), Ok(("alice".into(), Some("bob".into()), b"\xff".to_vec())));
        assert_eq!(read(b"alice\0x"), Err(Invalid::Form));
        assert_eq!(read(b""), Err(Invalid::Form));
        assert_eq!(read(b"\0alice\0a\0b"), Err(Invalid::Form));
        assert_eq!(read(b"\0alice\0a\nb"), Err(Invalid::Form));
        assert_eq!(read(b"\0\0x"), Err(Invalid::Name(InvalidName::Empty)));
        assert_eq!(read(b"b\rob\0alice\0x"), Err(Invalid::Name(InvalidName::Control)));
    }

    #[test]
    fn padding_may_be_missing() {
        assert_eq!(decode(b"AGEAYg==").as_deref().map(Vec::as_slice), Ok(&b"\0a\0b"[..]));
        assert_eq!(decode(b"AGEAYg").as_deref().map(Vec::as_slice), Ok(&b"\0a\0b"[..]));
        for bad in [&b"A"[..], b"AGEA Yg==", b"AGEAYg==x", b"!"] {
            assert_eq!(decode(bad).err(), Some(Invalid::Base64), "{}", bad.escape_ascii());
        }
    }

    #[test]
    fn what_is_written_is_what_is_read() {
        let credentials = plain(b"bob\0alice\0pass").unwrap();
        let login = ServerLogin {
            user: &credentials.user,
            authzid: credentials.authzid.as_ref(),
            password: &credentials.password,
        };
        let message = decode(&plain_response(&login)).unwrap();
        assert_eq!(&message[..], b"bob\0alice\0pass");
    }
}
