//! Parsers of PLAIN (RFC 4616) and of LOGIN's two messages.

use zeroize::Zeroizing;

use super::{InvalidCredentials, encode, user_name};
use crate::identity::{Credentials, Mechanism, PasswordLogin, Proof, Secret, UserName};

/// Parses `authzid NUL authcid NUL password`. An authzid that repeats the authcid is omitted from the credentials.
pub(in crate::protocol::imap) fn plain(message: &[u8]) -> Result<Credentials, InvalidCredentials> {
    let mut parts = message.split(|byte| *byte == 0);
    let (Some(authzid), Some(authcid), Some(password), None) = (parts.next(), parts.next(), parts.next(), parts.next())
    else {
        return Err(InvalidCredentials::Grammar);
    };
    let mut credentials = password_login(authcid, password, Mechanism::SaslPlain)?;
    if !authzid.is_empty() && authzid != authcid {
        credentials.authzid = Some(user_name(authzid)?);
    }
    Ok(credentials)
}

/// Validates the user name and password of the command LOGIN, or of the two messages of the mechanism LOGIN.
pub(in crate::protocol::imap) fn password_login(
    user: &[u8],
    password: &[u8],
    mechanism: Mechanism,
) -> Result<Credentials, InvalidCredentials> {
    let user = user_name(user)?;
    if password.iter().any(|byte| matches!(byte, 0 | b'\r' | b'\n')) {
        return Err(InvalidCredentials::Password);
    }
    Ok(Credentials { user, authzid: None, mechanism, proof: Proof::Password(Secret::new(password.to_vec())) })
}

/// Returns the response of PLAIN for a server, in base64.
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
