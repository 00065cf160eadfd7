//! Parsers of SASL messages, with a strict grammar for each mechanism.
//!
//! The proxy routes, limits and logs by the user that a message names, and the server opens the mailbox of the user that it reads
//! in the same message. Both must be the same user, so a message that two parsers could read differently is refused: a repeated
//! field, an unknown field next to a user name, trailing bytes, or an escape that is not in the grammar. PLAIN (RFC 4616), LOGIN
//! and EXTERNAL (RFC 4422 appendix A) are parsed completely. Of XOAUTH2, OAUTHBEARER (RFC 7628) and SCRAM (RFC 5802) only the first
//! message is parsed; the rest of the exchange is relayed.

mod external;
mod gs2;
mod oauth;
mod plain;
mod scram;

use base64::Engine as _;
use base64::alphabet::STANDARD;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use zeroize::Zeroizing;

pub(super) use self::external::external;
pub use self::oauth::with_user;
pub(super) use self::plain::{password_login, plain, plain_response};
pub use self::scram::is_server_final as is_scram_signature;
use crate::identity::{
    Credentials, InvalidName, Mechanism, Proof, RelayedMechanism, Secret, TokenError, TokenIssuer, UserName,
};

const BASE64: GeneralPurpose = GeneralPurpose::new(
    &STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// Why the credentials in a message or command are refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InvalidCredentials {
    /// The message is not base64.
    Base64,
    /// The message does not match the grammar of the mechanism.
    Grammar,
    /// The user name is invalid.
    Name(InvalidName),
    /// The password contains NUL, CR or LF.
    Password,
    /// The message has no authorization identity, and its token does not name the user.
    Token(TokenError),
}

impl InvalidCredentials {
    /// Whether the message is well-formed, so that it counts as a failed login and not as a syntax error.
    pub(super) fn is_well_formed(self) -> bool {
        match self {
            Self::Base64 | Self::Grammar => false,
            Self::Name(_) | Self::Password | Self::Token(_) => true,
        }
    }
}

impl std::fmt::Display for InvalidCredentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Base64 => f.write_str("the response is not base64"),
            Self::Grammar => f.write_str("the response does not fit the grammar of the mechanism"),
            Self::Name(name) => name.fmt(f),
            Self::Password => f.write_str("the password has NUL, CR or LF"),
            Self::Token(fault) => fault.fmt(f),
        }
    }
}

/// Decodes a line of a SASL exchange from base64.
pub(super) fn decode(line: &[u8]) -> Result<Zeroizing<Vec<u8>>, InvalidCredentials> {
    BASE64.decode(line).map(Zeroizing::new).map_err(|_| InvalidCredentials::Base64)
}

/// Encodes a message in base64, with padding.
pub(super) fn encode(message: &[u8]) -> Zeroizing<Vec<u8>> {
    let mut encoded = Zeroizing::new(vec![0; message.len().div_ceil(3) * 4]);
    // The buffer has exactly the size of the encoded message.
    let written = BASE64.encode_slice(message, &mut encoded[..]).unwrap_or(0);
    encoded.truncate(written);
    encoded
}

/// Parses the first message of a relayed mechanism. `issuers` are the token issuers whose tokens may name the user.
pub(super) fn first_message(
    mechanism: RelayedMechanism,
    message: &[u8],
    issuers: &[TokenIssuer],
) -> Result<Credentials, InvalidCredentials> {
    let (user, authzid) = match mechanism {
        RelayedMechanism::XOauth2 => (user_name(oauth::xoauth2(message)?.user)?, None),
        RelayedMechanism::OauthBearer => return oauth::bearer_credentials(message, issuers),
        RelayedMechanism::ScramSha1 | RelayedMechanism::ScramSha256 => {
            let first = scram::client_first(message)?;
            (user_name(&first.user)?, first.authzid.as_deref().map(user_name).transpose()?)
        }
    };
    Ok(relayed(mechanism, user, authzid, message))
}

/// Returns the credentials of a relayed mechanism, without an authzid that repeats the user name.
fn relayed(mechanism: RelayedMechanism, user: UserName, authzid: Option<UserName>, message: &[u8]) -> Credentials {
    let authzid = authzid.filter(|name| *name != user);
    let proof = Proof::Message { mechanism, first: Secret::new(message.to_vec()) };
    Credentials { user, authzid, mechanism: mechanism.into(), proof }
}

/// Whether a server's challenge refuses the token: the only challenge of XOAUTH2 and OAUTHBEARER (RFC 7628 section 3.2.2) explains a
/// failure. An empty challenge requests the message again.
pub fn is_token_refusal(mechanism: Mechanism, challenge: &[u8]) -> bool {
    matches!(mechanism, Mechanism::XOauth2 | Mechanism::OauthBearer) && !challenge.trim_ascii().is_empty()
}

fn user_name(bytes: &[u8]) -> Result<UserName, InvalidCredentials> {
    UserName::new(bytes).map_err(InvalidCredentials::Name)
}

#[cfg(test)]
mod tests;
