//! Parsers of XOAUTH2 (by Google) and OAUTHBEARER (RFC 7628), whose messages contain a bearer token and its user's name.

use super::gs2::{self, escape};
use super::{InvalidCredentials, relayed, user_name};
use crate::identity::{Credentials, RelayedMechanism, Secret, TokenIssuer, UserName, claimed_user};

/// The separator of fields in both mechanisms.
const SEPARATOR: u8 = 1;
/// Maximum number of keys in a message. RFC 7628 defines three, its drafts a few more.
const MAX_KEYS: usize = 16;

/// A message of XOAUTH2.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct XOauth2<'a> {
    pub(super) user: &'a [u8],
}

/// Parses `user=NAME ^A auth=Bearer TOKEN ^A ^A`. Further fields are refused, because servers differ in which field they use.
pub(super) fn xoauth2(message: &[u8]) -> Result<XOauth2<'_>, InvalidCredentials> {
    let mut fields = fields(message)?;
    let (Some(user), Some(auth), None) = (fields.next(), fields.next(), fields.next()) else {
        return Err(InvalidCredentials::Grammar);
    };
    let user = user.strip_prefix(b"user=").ok_or(InvalidCredentials::Grammar)?;
    bearer_token(auth.strip_prefix(b"auth=").ok_or(InvalidCredentials::Grammar)?)?;
    Ok(XOauth2 { user })
}

/// A message of OAUTHBEARER.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Bearer<'a> {
    pub(super) authzid: Option<Vec<u8>>,
    pub(super) token: &'a [u8],
}

/// Parses `gs2-header ^A (key=value ^A)… ^A` (RFC 7628 section 3.1). Unknown keys are ignored, as the RFC requires, except `user`,
/// with which drafts of the RFC named the user. A key that occurs twice, in any letter case, is refused.
pub(super) fn bearer(message: &[u8]) -> Result<Bearer<'_>, InvalidCredentials> {
    let header = gs2::header(message)?;
    // Section 3.1: the flag is "n", because the mechanism has no channel binding.
    if header.supports_channel_binding {
        return Err(InvalidCredentials::Grammar);
    }
    let pairs = header.rest.strip_prefix(&[SEPARATOR]).ok_or(InvalidCredentials::Grammar)?;
    let mut seen: Vec<Vec<u8>> = Vec::new();
    let mut token = None;
    for pair in fields(pairs)? {
        let split = pair.iter().position(|byte| *byte == b'=').ok_or(InvalidCredentials::Grammar)?;
        let (key, value) = (&pair[..split], &pair[split + 1..]);
        let folded = key.to_ascii_lowercase();
        if key.is_empty()
            || !key.iter().all(u8::is_ascii_alphabetic)
            || !value.iter().all(|byte| matches!(byte, b' '..=b'~' | b'\t' | b'\r' | b'\n'))
            || folded == b"user"
            || seen.contains(&folded)
        {
            return Err(InvalidCredentials::Grammar);
        }
        if key == b"auth" {
            token = Some(bearer_token(value)?);
        }
        seen.push(folded);
        if seen.len() > MAX_KEYS {
            return Err(InvalidCredentials::Grammar);
        }
    }
    Ok(Bearer { authzid: header.authzid, token: token.ok_or(InvalidCredentials::Grammar)? })
}

/// Returns the credentials in a message of OAUTHBEARER. Without an authorization identity the user is the one that the token
/// claims, if one of `issuers` issued it; that name is then added to the message, so that the server accepts no other user.
pub(super) fn bearer_credentials(message: &[u8], issuers: &[TokenIssuer]) -> Result<Credentials, InvalidCredentials> {
    let Bearer { authzid, token } = bearer(message)?;
    if let Some(authzid) = authzid {
        return Ok(relayed(RelayedMechanism::OauthBearer, user_name(&authzid)?, None, message));
    }
    let user = claimed_user(token, issuers).map_err(InvalidCredentials::Token)?;
    let message = with_authzid(message, &user).ok_or(InvalidCredentials::Grammar)?;
    Ok(relayed(RelayedMechanism::OauthBearer, user, None, message.expose()))
}

/// Replaces the user name in a message. Returns `None` for SCRAM, in which the name is part of the proof.
pub fn with_user(mechanism: RelayedMechanism, message: &Secret, user: &UserName) -> Option<Secret> {
    let message = message.expose();
    match mechanism {
        RelayedMechanism::XOauth2 => {
            let rest = message.iter().position(|byte| *byte == SEPARATOR)?;
            Some(Secret::new([b"user=", user.as_str().as_bytes(), &message[rest..]].concat()))
        }
        RelayedMechanism::OauthBearer => with_authzid(message, user),
        RelayedMechanism::ScramSha1 | RelayedMechanism::ScramSha256 => None,
    }
}

fn with_authzid(message: &[u8], user: &UserName) -> Option<Secret> {
    let rest = message.iter().position(|byte| *byte == SEPARATOR)?;
    Some(Secret::new([b"n,a=", escape(user.as_str()).as_bytes(), b",", &message[rest..]].concat()))
}

/// Splits a message into its fields. It ends with two separators: one ends the last field, one the message.
fn fields(message: &[u8]) -> Result<impl Iterator<Item = &[u8]>, InvalidCredentials> {
    let content = message.strip_suffix(&[SEPARATOR, SEPARATOR]).ok_or(InvalidCredentials::Grammar)?;
    Ok(content.split(|byte| *byte == SEPARATOR))
}

/// Parses `Bearer TOKEN`. The scheme may have any letter case, as in HTTP (RFC 9110 section 11.1); the token consists of one or more
/// VSCHAR (RFC 6749 appendix A.12).
fn bearer_token(value: &[u8]) -> Result<&[u8], InvalidCredentials> {
    let (scheme, token) = value.split_at_checked(b"Bearer ".len()).ok_or(InvalidCredentials::Grammar)?;
    let is_token = !token.is_empty() && token.iter().all(u8::is_ascii_graphic);
    if scheme.eq_ignore_ascii_case(b"Bearer ") && is_token { Ok(token) } else { Err(InvalidCredentials::Grammar) }
}
