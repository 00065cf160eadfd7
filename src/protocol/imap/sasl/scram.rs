//! The first message of SCRAM (RFC 5802 section 7).

use super::{InvalidCredentials, gs2};

/// Names of attributes with a meaning elsewhere in the exchange: none of them may be an extension of the first message.
const RESERVED: &[u8] = b"anmrcspvie";

/// What the first message says.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct ClientFirst {
    pub(super) user: Vec<u8>,
    pub(super) authzid: Option<Vec<u8>>,
}

/// Reads `gs2-header n=user,r=nonce[,extension]…`. `m=`, an extension that a server must not ignore, is refused, and so is an
/// attribute that occurs twice, in any letter case.
pub(super) fn client_first(message: &[u8]) -> Result<ClientFirst, InvalidCredentials> {
    let header = gs2::header(message)?;
    let mut attributes = header.rest.split(|byte| *byte == b',');
    let user = attributes.next().and_then(|first| first.strip_prefix(b"n=")).ok_or(InvalidCredentials::Grammar)?;
    let nonce = attributes.next().and_then(|second| second.strip_prefix(b"r=")).ok_or(InvalidCredentials::Grammar)?;
    if nonce.is_empty() || !nonce.iter().all(u8::is_ascii_graphic) {
        return Err(InvalidCredentials::Grammar);
    }
    let mut names = RESERVED.to_vec();
    for extension in attributes {
        let [attribute, b'=', value @ ..] = extension else { return Err(InvalidCredentials::Grammar) };
        let attribute_name = attribute.to_ascii_lowercase();
        if !attribute.is_ascii_alphabetic() || names.contains(&attribute_name) || !is_value(value) {
            return Err(InvalidCredentials::Grammar);
        }
        names.push(attribute_name);
    }
    Ok(ClientFirst { user: gs2::sasl_name(user)?, authzid: header.authzid })
}

/// Whether a server's challenge has the form of its final message, with its signature. It says nothing about the client: only the
/// server's OK means that the client is who it claims to be, and only the client can verify the signature.
pub fn is_server_final(challenge: &[u8]) -> bool {
    super::decode(challenge.trim_ascii_end()).is_ok_and(|message| message.starts_with(b"v="))
}

/// `value`: one or more characters of UTF-8 other than NUL and the comma, at which it was split.
fn is_value(value: &[u8]) -> bool {
    !value.is_empty() && !value.contains(&0) && std::str::from_utf8(value).is_ok()
}
