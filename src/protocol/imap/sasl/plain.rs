//! PLAIN (RFC 4616), and the two steps of LOGIN.

use zeroize::Zeroizing;

use super::{InvalidCredentials, encode, name};
use crate::identity::{Credentials, Mechanism, PasswordLogin, Proof, Secret, UserName};

/// Reads `authzid NUL authcid NUL password`. An authzid that repeats the authcid asks for nothing and is left out.
pub(in crate::protocol::imap) fn plain(message: &[u8]) -> Result<Credentials, InvalidCredentials> {
    let mut parts = message.split(|byte| *byte == 0);
    let (Some(authzid), Some(authcid), Some(password), None) = (parts.next(), parts.next(), parts.next(), parts.next())
    else {
        return Err(InvalidCredentials::Grammar);
    };
    let mut credentials = password_login(authcid, password, Mechanism::SaslPlain)?;
    if !authzid.is_empty() && authzid != authcid {
        credentials.authzid = Some(name(authzid)?);
    }
    Ok(credentials)
}

/// Checks a user name and a password: those of the command LOGIN, and of both steps of the mechanism LOGIN.
pub(in crate::protocol::imap) fn password_login(
    user: &[u8],
    password: &[u8],
    mechanism: Mechanism,
) -> Result<Credentials, InvalidCredentials> {
    let user = name(user)?;
    if password.iter().any(|byte| matches!(byte, 0 | b'\r' | b'\n')) {
        return Err(InvalidCredentials::Password);
    }
    Ok(Credentials { user, authzid: None, mechanism, proof: Proof::Password(Secret::new(password.to_vec())) })
}

/// The response of PLAIN in base64, as a server gets it.
pub(in crate::protocol::imap) fn plain_response(credentials: &PasswordLogin<'_>) -> Zeroizing<Vec<u8>> {
    let authzid = credentials.authzid.map_or("", UserName::as_str).as_bytes();
    let password = credentials.password.expose();
    let user = credentials.user.as_str().as_bytes();
    let mut message = Zeroizing::new(Vec::with_capacity(authzid.len() + user.len() + password.len() + 2));
    for part in [authzid, b"\0", user, b"\0", password] {
        message.extend_from_slice(part);
    }
    encode(&message)
}
