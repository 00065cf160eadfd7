//! Parser of SCRAM's first message (RFC 5802 section 7).

use super::{InvalidCredentials, gs2};

/// Attributes that are defined for other messages of the exchange, and must not be extensions of the first message.
const RESERVED: &[u8] = b"anmrcspvie";

/// The names in the first message.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct ClientFirst {
    pub(super) user: Vec<u8>,
    pub(super) authzid: Option<Vec<u8>>,
}

/// Parses `gs2-header n=user,r=nonce[,extension]…`. Mandatory extensions (`m=`) and attributes that occur twice, in any letter case,
/// are refused.
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

/// Whether a server's challenge looks like its final message, which contains its signature. It does not prove that the client is
/// authenticated: only the server's OK does, and only the client can verify the signature.
pub fn is_server_final(challenge: &[u8]) -> bool {
    super::decode(challenge.trim_ascii_end()).is_ok_and(|message| message.starts_with(b"v="))
}

/// Whether `value` consists of one or more UTF-8 characters except NUL. The message has been split at commas.
fn is_value(value: &[u8]) -> bool {
    !value.is_empty() && !value.contains(&0) && std::str::from_utf8(value).is_ok()
}
