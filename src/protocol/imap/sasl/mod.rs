//! SASL messages as they travel in IMAP: one strict grammar per mechanism.
//!
//! The proxy routes, limits, moves and logs by the user a message names, and the server opens the mailbox of the user it reads
//! in the same message. Both must be one user, so a message that two readers could understand differently is refused: a repeated
//! field, an unknown field next to a user name, trailing bytes, an escape that is not in the grammar. PLAIN (RFC 4616), LOGIN
//! and EXTERNAL (RFC 4422 appendix A) are read completely. Of XOAUTH2, OAUTHBEARER (RFC 7628) and SCRAM (RFC 5802) only the
//! first message is read; the rest is between client and server.

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
    Credentials, InvalidName, Mechanism, Proof, RelayedMechanism, Secret, TokenFault, TokenIssuer, UserName,
};

const BASE64: GeneralPurpose = GeneralPurpose::new(
    &STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// Why a message is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InvalidCredentials {
    /// Not base64.
    Base64,
    /// Not the grammar of the mechanism.
    Grammar,
    /// A user name that breaks a rule.
    Name(InvalidName),
    /// A password with NUL, CR or LF.
    Password,
    /// A token without an authorization identity, from which no user can be read.
    Token(TokenFault),
}

impl InvalidCredentials {
    /// Whether the message is well-formed, so that only its credentials cannot be right.
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

/// Decodes a line of a SASL exchange.
pub(super) fn decode(line: &[u8]) -> Result<Zeroizing<Vec<u8>>, InvalidCredentials> {
    BASE64.decode(line).map(Zeroizing::new).map_err(|_| InvalidCredentials::Base64)
}

/// Encodes a message as a server gets it.
pub(super) fn encode(message: &[u8]) -> Zeroizing<Vec<u8>> {
    let mut encoded = Zeroizing::new(vec![0; message.len().div_ceil(3) * 4]);
    // The buffer has exactly the length of the padded form.
    let written = BASE64.encode_slice(message, &mut encoded[..]).unwrap_or(0);
    encoded.truncate(written);
    encoded
}

/// Reads the first message of a relayed mechanism. `issuers` are those whose tokens may name the user.
pub(super) fn first_message(
    mechanism: RelayedMechanism,
    message: &[u8],
    issuers: &[TokenIssuer],
) -> Result<Credentials, InvalidCredentials> {
    let (user, authzid) = match mechanism {
        RelayedMechanism::XOauth2 => (name(oauth::xoauth2(message)?.user)?, None),
        RelayedMechanism::OauthBearer => return oauth::bearer_credentials(message, issuers),
        RelayedMechanism::ScramSha1 | RelayedMechanism::ScramSha256 => {
            let first = scram::client_first(message)?;
            (name(&first.user)?, first.authzid.as_deref().map(name).transpose()?)
        }
    };
    Ok(relayed(mechanism, user, authzid, message))
}

/// The credentials of a relayed mechanism. An authzid that repeats the user's name asks for nothing and is left out.
fn relayed(mechanism: RelayedMechanism, user: UserName, authzid: Option<UserName>, message: &[u8]) -> Credentials {
    let authzid = authzid.filter(|name| *name != user);
    let proof = Proof::Message { mechanism, first: Secret::new(message.to_vec()) };
    Credentials { user, authzid, mechanism: mechanism.into(), proof }
}

/// Whether a server's challenge refuses the token: XOAUTH2 and OAUTHBEARER (RFC 7628 section 3.2.2) have no other challenge than the
/// one that explains a failure. An empty one asks for the message again.
pub fn is_token_refusal(mechanism: Mechanism, challenge: &[u8]) -> bool {
    matches!(mechanism, Mechanism::XOauth2 | Mechanism::OauthBearer) && !challenge.trim_ascii().is_empty()
}

fn name(bytes: &[u8]) -> Result<UserName, InvalidCredentials> {
    UserName::new(bytes).map_err(InvalidCredentials::Name)
}

#[cfg(test)]
mod tests;
