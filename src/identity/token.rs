//! Reads the user that an access token claims (RFC 9068, RFC 7519), without verifying the token.
//!
//! The claim decides only to which server the login is routed. The server verifies the token, and receives the claimed name as the
//! authorization identity, so that it refuses the token of another user. Errors contain no part of the token.

use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::de::{DeserializeSeed, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use zeroize::Zeroizing;

use super::UserName;

/// A token issuer of `oauth` in the configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenIssuer {
    /// The value of the claim `iss`, compared byte by byte.
    pub issuer: String,
    /// The name of the claim that contains the user name.
    pub claim: String,
    /// A value that the claim `aud` must equal or contain.
    pub audience: Option<String>,
}

/// Why no user can be read from a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// `oauth` is not configured.
    #[error("the client sent no authzid, and no token issuer is configured (oauth)")]
    NoIssuer,
    /// The token does not have three parts of base64url, or its payload is not a JSON object.
    #[error("the client sent no authzid, and the token is not a signed JWT")]
    NotJwt,
    /// The claim `iss` is missing, or its issuer is not configured.
    #[error("the client sent no authzid, and the token's issuer is not configured")]
    UnknownIssuer,
    /// The claim `aud` does not contain the configured audience.
    #[error("the client sent no authzid, and the token is for another audience")]
    WrongAudience,
    /// The claim is missing, occurs twice, or is not a valid user name.
    #[error("the client sent no authzid, and the token has no usable claim with the user's name")]
    NoUsableClaim,
}

/// Returns the user name in the claim that is configured for the token's issuer. The token is not verified.
///
/// # Errors
/// The token does not name a user: see [`TokenError`].
pub fn claimed_user(token: &[u8], issuers: &[TokenIssuer]) -> Result<UserName, TokenError> {
    if issuers.is_empty() {
        return Err(TokenError::NoIssuer);
    }
    let payload = decode_payload(token)?;
    let claim = |name: &str| read_claim(&payload, name);
    let Claim::Text(iss) = claim("iss")? else { return Err(TokenError::UnknownIssuer) };
    let issuer = issuers.iter().find(|known| known.issuer == iss).ok_or(TokenError::UnknownIssuer)?;
    if let Some(audience) = &issuer.audience
        && !claim("aud")?.contains(audience)
    {
        return Err(TokenError::WrongAudience);
    }
    match claim(&issuer.claim)? {
        Claim::Text(name) => UserName::new(name.as_bytes()).map_err(|_| TokenError::NoUsableClaim),
        _ => Err(TokenError::NoUsableClaim),
    }
}

/// Returns the decoded payload of a token that has the form of a signed JWT.
fn decode_payload(token: &[u8]) -> Result<Zeroizing<Vec<u8>>, TokenError> {
    let mut parts = token.split(|byte| *byte == b'.');
    let (Some(header), Some(payload), Some(signature), None) = (parts.next(), parts.next(), parts.next(), parts.next())
    else {
        return Err(TokenError::NotJwt);
    };
    let decode = |part: &[u8]| URL_SAFE_NO_PAD.decode(part).map(Zeroizing::new).map_err(|_| TokenError::NotJwt);
    // An unsigned token (alg "none") has an empty signature.
    if decode(header)?.is_empty() || decode(signature)?.is_empty() {
        return Err(TokenError::NotJwt);
    }
    decode(payload)
}

/// The value of one claim.
#[derive(Debug, PartialEq, Eq)]
enum Claim {
    Missing,
    /// The claim occurs twice. Parsers differ in which value they use.
    Repeated,
    Text(String),
    /// The texts of an array, whose other elements are ignored.
    List(Vec<String>),
    Other,
}

impl Claim {
    /// Whether the value is `text`, or an array that contains it.
    fn contains(&self, text: &str) -> bool {
        match self {
            Self::Text(value) => value == text,
            Self::List(values) => values.iter().any(|value| value == text),
            Self::Missing | Self::Repeated | Self::Other => false,
        }
    }
}

fn read_claim(payload: &[u8], name: &str) -> Result<Claim, TokenError> {
    let mut reader = serde_json::Deserializer::from_slice(payload);
    let claim = NamedClaim(name).deserialize(&mut reader).map_err(|_| TokenError::NotJwt)?;
    reader.end().map_err(|_| TokenError::NotJwt)?;
    Ok(claim)
}

/// Deserializes the claim of this name from a JSON object.
struct NamedClaim<'a>(&'a str);

impl<'de> DeserializeSeed<'de> for NamedClaim<'_> {
    type Value = Claim;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Claim, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for NamedClaim<'_> {
    type Value = Claim;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Claim, A::Error> {
        let mut claim = Claim::Missing;
        while let Some(key) = map.next_key::<String>()? {
            if key != self.0 {
                map.next_value::<IgnoredAny>()?;
                continue;
            }
            let value = map.next_value::<ClaimValue>()?.0;
            claim = if claim == Claim::Missing { value } else { Claim::Repeated };
        }
        Ok(claim)
    }
}

/// Deserializes the value of a claim.
struct ClaimValue(Claim);

impl<'de> Deserialize<'de> for ClaimValue {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ValueVisitor).map(Self)
    }
}

struct ValueVisitor;

impl<'de> Visitor<'de> for ValueVisitor {
    type Value = Claim;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_str<E>(self, text: &str) -> Result<Claim, E> {
        Ok(Claim::Text(text.to_owned()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Claim, A::Error> {
        let mut texts = Vec::new();
        while let Some(value) = list.next_element::<ClaimValue>()? {
            if let Claim::Text(text) = value.0 {
                texts.push(text);
            }
        }
        Ok(Claim::List(texts))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Claim, A::Error> {
        while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
        Ok(Claim::Other)
    }

    fn visit_bool<E>(self, _: bool) -> Result<Claim, E> {
        Ok(Claim::Other)
    }

    fn visit_i64<E>(self, _: i64) -> Result<Claim, E> {
        Ok(Claim::Other)
    }

    fn visit_u64<E>(self, _: u64) -> Result<Claim, E> {
        Ok(Claim::Other)
    }

    fn visit_f64<E>(self, _: f64) -> Result<Claim, E> {
        Ok(Claim::Other)
    }

    fn visit_unit<E>(self) -> Result<Claim, E> {
        Ok(Claim::Other)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(payload: &str) -> Vec<u8> {
        let part = |text: &str| URL_SAFE_NO_PAD.encode(text);
        format!("{}.{}.{}", part(r#"{"alg":"RS256"}"#), part(payload), part("signature")).into_bytes()
    }

    fn issuers() -> Vec<TokenIssuer> {
        let issuer = |issuer: &str, claim: &str, audience: Option<&str>| TokenIssuer {
            issuer: issuer.to_owned(),
            claim: claim.to_owned(),
            audience: audience.map(str::to_owned),
        };
        vec![issuer("https://a.test", "email", None), issuer("https://b.test", "sub", Some("imap"))]
    }

    fn user(payload: &str) -> Result<String, TokenError> {
        claimed_user(&token(payload), &issuers()).map(|name| name.to_string())
    }

    #[test]
    fn claim_of_a_configured_issuer_names_the_user() {
        assert_eq!(user(r#"{"iss":"https://a.test","email":"al\u0069ce@a.test"}"#), Ok("alice@a.test".into()));
        assert_eq!(user(r#"{"sub":"bob","aud":"imap","iss":"https://b.test","x":{"iss":1}}"#), Ok("bob".into()));
        assert_eq!(user(r#"{"sub":"bob","aud":["smtp","imap"],"iss":"https://b.test"}"#), Ok("bob".into()));
    }

    #[test]
    fn token_without_a_usable_claim_is_refused() {
        for (payload, error) in [
            (r#"{"iss":"https://c.test","email":"alice"}"#, TokenError::UnknownIssuer),
            (r#"{"iss":"https://a.test/","email":"alice"}"#, TokenError::UnknownIssuer),
            (r#"{"iss":["https://a.test"],"email":"alice"}"#, TokenError::UnknownIssuer),
            (r#"{"iss":"https://a.test","iss":"https://b.test","email":"alice"}"#, TokenError::UnknownIssuer),
            (r#"{"email":"alice"}"#, TokenError::UnknownIssuer),
            (r#"{"iss":"https://a.test","sub":"alice"}"#, TokenError::NoUsableClaim),
            (r#"{"iss":"https://a.test","email":""}"#, TokenError::NoUsableClaim),
            (r#"{"iss":"https://a.test","email":"a\u0000b"}"#, TokenError::NoUsableClaim),
            (r#"{"iss":"https://a.test","email":["alice"]}"#, TokenError::NoUsableClaim),
            (r#"{"iss":"https://a.test","email":7}"#, TokenError::NoUsableClaim),
            (r#"{"iss":"https://a.test","email":"alice","email":"bob"}"#, TokenError::NoUsableClaim),
            (r#"{"iss":"https://a.test","email":"alice","em\u0061il":"bob"}"#, TokenError::NoUsableClaim),
            (r#"{"iss":"https://b.test","sub":"alice"}"#, TokenError::WrongAudience),
            (r#"{"iss":"https://b.test","sub":"alice","aud":"smtp"}"#, TokenError::WrongAudience),
            (r#"{"iss":"https://b.test","sub":"alice","aud":["smtp"]}"#, TokenError::WrongAudience),
            (r#"{"iss":"https://a.test","email":"alice"} x"#, TokenError::NotJwt),
            (r#"["iss"]"#, TokenError::NotJwt),
            (r#"{"iss":"#, TokenError::NotJwt),
            ("", TokenError::NotJwt),
        ] {
            assert_eq!(user(payload), Err(error), "{payload}");
        }
        let good = token(r#"{"iss":"https://a.test","email":"alice"}"#);
        assert_eq!(claimed_user(&good, &[]), Err(TokenError::NoIssuer));
        for bad in [
            &b"opaque"[..],
            b"a.b",
            b"a.b.c.d",
            b"..",
            b"e30.e30.",
            b"e30.e30=.e30",
            b"e30.e3+.e30",
            b"e30.e30.e30.e30.e30",
        ] {
            assert_eq!(claimed_user(bad, &issuers()), Err(TokenError::NotJwt), "{}", bad.escape_ascii());
        }
        let deep = format!(r#"{{"iss":"https://a.test","email":{}1{}}}"#, "[".repeat(20_000), "]".repeat(20_000));
        assert_eq!(user(&deep), Err(TokenError::NotJwt), "depth is bounded");
    }
}
