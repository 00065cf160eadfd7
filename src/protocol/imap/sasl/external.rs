//! EXTERNAL (RFC 4422 appendix A).

use super::{InvalidCredentials, name};
use crate::identity::{Credentials, Mechanism, Proof, UserName};

/// Reads an empty message, or the name of the user whose mailbox the certificate's owner asks for.
pub(in crate::protocol::imap) fn external(message: &[u8], owner: &UserName) -> Result<Credentials, InvalidCredentials> {
    let authzid = match message {
        b"" => None,
        authzid => Some(name(authzid)?),
    };
    let authzid = authzid.filter(|name| name != owner);
    Ok(Credentials { user: owner.clone(), authzid, mechanism: Mechanism::External, proof: Proof::Certificate })
}
