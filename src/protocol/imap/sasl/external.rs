//! Parser of EXTERNAL (RFC 4422 appendix A).

use super::{InvalidCredentials, user_name};
use crate::identity::{Credentials, Mechanism, Proof, UserName};

/// Parses an empty message, or the name of the user whose mailbox the certificate's owner requests.
pub(in crate::protocol::imap) fn external(message: &[u8], owner: &UserName) -> Result<Credentials, InvalidCredentials> {
    let authzid = match message {
        b"" => None,
        authzid => Some(user_name(authzid)?),
    };
    let authzid = authzid.filter(|name| name != owner);
    Ok(Credentials { user: owner.clone(), authzid, mechanism: Mechanism::External, proof: Proof::Certificate })
}
