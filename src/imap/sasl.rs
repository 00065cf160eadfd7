//! Payloads of SASL as they travel in IMAP: base64, with or without padding.
//!
//! PLAIN (RFC 4616) and LOGIN are understood whole. Of XOAUTH2, OAUTHBEARER (RFC 7628) and SCRAM (RFC 5802) only the first
//! message is read, and of that only whose it is: the rest is between client and server. EXTERNAL (RFC 4422 appendix A)
//! has at most a name. Called by `prelogin` to read, by `backend_login` to write, and by `session` to rename.

use base64::Engine as _;
use base64::alphabet::STANDARD;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use zeroize::Zeroizing;

use crate::identity::{Credentials, InvalidName, Mechanism, PasswordLogin, Proof, Secret, UserName};

const BASE64: GeneralPurpose = GeneralPurpose::new(
    &STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// Why a response is no credentials.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Invalid {
    /// Not base64.
    Base64,
    /// Not three parts, or a password with NUL, CR or LF.
    Form,
    /// A user name that breaks a rule.
    Name(InvalidName),
}

/// Decodes a line of a SASL exchange.
pub(super) fn decode(line: &[u8]) -> Result<Zeroizing<Vec<u8>>, Invalid> {
    BASE64.decode(line).map(Zeroizing::new).map_err(|_| Invalid::Base64)
}

/// Whether a server's SCRAM challenge is its final message with its signature: it has verified the client's proof.
pub fn is_scram_signature(challenge: &[u8]) -> bool {
    decode(challenge.trim_ascii_end()).is_ok_and(|message| message.starts_with(b"v="))
}

/// `authzid NUL authcid NUL password`. An authzid that repeats the authcid asks for nothing and is left out.
pub(super) fn plain(message: &[u8]) -> Result<Credentials, Invalid> {
    let mut parts = message.splitn(3, |byte| *byte == 0);
    let (Some(authzid), Some(authcid), Some(password)) = (parts.next(), parts.next(), parts.next()) else {
        return Err(Invalid::Form);
    };
    let mut credentials = credentials(authcid, password, Mechanism::SaslPlain)?;
    if !authzid.is_empty() && authzid != authcid {
        credentials.authzid = Some(UserName::new(authzid).map_err(Invalid::Name)?);
    }
    Ok(credentials)
}

/// A user and a password, checked.
pub(super) fn credentials(user: &[u8], password: &[u8], mechanism: Mechanism) -> Result<Credentials, Invalid> {
    let user = UserName::new(user).map_err(Invalid::Name)?;
    if password.iter().any(|byte| matches!(byte, 0 | b'\r' | b'\n')) {
        return Err(Invalid::Form);
    }
    Ok(Credentials { user, authzid: None, mechanism, proof: Proof::Password(Secret::new(password.to_vec())) })
}

/// The first message of a mechanism that is relayed.
pub(super) fn first_message(mechanism: Mechanism, message: &[u8]) -> Result<Credentials, Invalid> {
    let (user, authzid) = match mechanism {
        Mechanism::XOauth2 => (xoauth2_user(message)?.to_vec(), None),
        Mechanism::OauthBearer => {
            let (authzid, rest) = gs2_header(message)?;
            if !rest.split(|byte| *byte == 1).any(|part| starts_with(part, b"auth=")) {
                return Err(Invalid::Form);
            }
            // Without a name nobody could tell whose mailbox it is: the token is not ours to open.
            (authzid.ok_or(Invalid::Form)?, None)
        }
        Mechanism::ScramSha1 | Mechanism::ScramSha256 => {
            let (authzid, rest) = gs2_header(message)?;
            let mut attributes = rest.split(|byte| *byte == b',');
            let user = attributes.next().and_then(|first| first.strip_prefix(b"n=")).ok_or(Invalid::Form)?;
            if !attributes.next().is_some_and(|nonce| nonce.starts_with(b"r=") && nonce.len() > 2) {
                return Err(Invalid::Form);
            }
            (sasl_name(user)?, authzid)
        }
        _ => return Err(Invalid::Form),
    };
    let user = UserName::new(&user).map_err(Invalid::Name)?;
    let authzid = authzid.map(|name| UserName::new(&name).map_err(Invalid::Name)).transpose()?;
    let authzid = authzid.filter(|name| *name != user);
    Ok(Credentials { user, authzid, mechanism, proof: Proof::Message(Secret::new(message.to_vec())) })
}

/// Nothing, or on whose behalf the certificate's owner logs in.
pub(super) fn external(message: &[u8], owner: &UserName) -> Result<Credentials, Invalid> {
    let authzid = match message {
        b"" => None,
        name => Some(UserName::new(name).map_err(Invalid::Name)?),
    };
    let authzid = authzid.filter(|name| name != owner);
    Ok(Credentials { user: owner.clone(), authzid, mechanism: Mechanism::External, proof: Proof::Certificate })
}

/// The message of a token under another name. `None`: the name is part of the proof, as in SCRAM.
pub fn renamed(mechanism: Mechanism, message: &Secret, user: &UserName) -> Option<Secret> {
    let message = message.expose();
    match mechanism {
        Mechanism::XOauth2 => {
            let rest = message.iter().position(|byte| *byte == 1)?;
            Some(Secret::new([b"user=", user.as_str().as_bytes(), &message[rest..]].concat()))
        }
        Mechanism::OauthBearer => {
            let rest = message.iter().position(|byte| *byte == 1)?;
            let name = user.as_str().replace('=', "=3D").replace(',', "=2C");
            Some(Secret::new([b"n,a=", name.as_bytes(), b",", &message[rest..]].concat()))
        }
        _ => None,
    }
}

/// `user=… ^A auth=Bearer … ^A ^A`.
fn xoauth2_user(message: &[u8]) -> Result<&[u8], Invalid> {
    let mut parts = message.split(|byte| *byte == 1);
    let user = parts.next().filter(|part| starts_with(part, b"user=")).ok_or(Invalid::Form)?;
    if !parts.any(|part| starts_with(part, b"auth=")) {
        return Err(Invalid::Form);
    }
    Ok(&user[b"user=".len()..])
}

/// RFC 5801 section 4: `n,a=name,` and what follows. A client that wants its channel bound cannot be served: the channel
/// ends here. `y` says only that it could have been.
fn gs2_header(message: &[u8]) -> Result<(Option<Vec<u8>>, &[u8]), Invalid> {
    let mut parts = message.splitn(3, |byte| *byte == b',');
    let (Some(b"n" | b"y"), Some(authzid), Some(rest)) = (parts.next(), parts.next(), parts.next()) else {
        return Err(Invalid::Form);
    };
    match authzid {
        b"" => Ok((None, rest)),
        name => Ok((Some(sasl_name(name.strip_prefix(b"a=").ok_or(Invalid::Form)?)?), rest)),
    }
}

/// RFC 5802 section 5.1: `=2C` is a comma, `=3D` an equals sign, and there is no other `=`.
fn sasl_name(written: &[u8]) -> Result<Vec<u8>, Invalid> {
    let mut name = Vec::with_capacity(written.len());
    let mut rest = written;
    while let Some((first, behind)) = rest.split_first() {
        let (byte, behind) = match (first, behind) {
            (b'=', [b'2', b'C', behind @ ..]) => (b',', behind),
            (b'=', [b'3', b'D', behind @ ..]) => (b'=', behind),
            (b'=', _) => return Err(Invalid::Form),
            (byte, behind) => (*byte, behind),
        };
        name.push(byte);
        rest = behind;
    }
    Ok(name)
}

fn starts_with(text: &[u8], start: &[u8]) -> bool {
    text.get(..start.len()).is_some_and(|begin| begin.eq_ignore_ascii_case(start))
}

/// A message in base64, as a server is sent it.
pub(super) fn encode(message: &[u8]) -> Zeroizing<Vec<u8>> {
    let mut encoded = Zeroizing::new(vec![0; message.len().div_ceil(3) * 4]);
    // The buffer has exactly the length of the padded form.
    let written = BASE64.encode_slice(message, &mut encoded[..]).unwrap_or(0);
    encoded.truncate(written);
    encoded
}

/// The response of PLAIN in base64, as a server is sent it.
pub(super) fn plain_response(credentials: &PasswordLogin<'_>) -> Zeroizing<Vec<u8>> {
    let authzid = credentials.authzid.map_or("", UserName::as_str).as_bytes();
    let password = credentials.password.expose();
    let user = credentials.user.as_str().as_bytes();
    let mut message = Zeroizing::new(Vec::with_capacity(authzid.len() + user.len() + password.len() + 2));
    for part in [authzid, b"\0", user, b"\0", password] {
        message.extend_from_slice(part);
    }
    encode(&message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_messages() {
        let read = |message: &[u8]| {
            plain(message).map(|it| {
                let password = it.password().unwrap().expose().to_vec();
                (it.user.to_string(), it.authzid.map(|name| name.to_string()), password)
            })
        };
        assert_eq!(read(b"\0alice\0p w"), Ok(("alice".into(), None, b"p w".to_vec())));
        assert_eq!(read(b"alice\0alice\0x"), Ok(("alice".into(), None, b"x".to_vec())));
        assert_eq!(read(b"bob\0alice\0\xff"), Ok(("alice".into(), Some("bob".into()), b"\xff".to_vec())));
        assert_eq!(read(b"alice\0x"), Err(Invalid::Form));
        assert_eq!(read(b""), Err(Invalid::Form));
        assert_eq!(read(b"\0alice\0a\0b"), Err(Invalid::Form));
        assert_eq!(read(b"\0alice\0a\nb"), Err(Invalid::Form));
        assert_eq!(read(b"\0\0x"), Err(Invalid::Name(InvalidName::Empty)));
        assert_eq!(read(b"b\rob\0alice\0x"), Err(Invalid::Name(InvalidName::Control)));
    }

    #[test]
    fn padding_may_be_missing() {
        assert_eq!(decode(b"AGEAYg==").as_deref().map(Vec::as_slice), Ok(&b"\0a\0b"[..]));
        assert_eq!(decode(b"AGEAYg").as_deref().map(Vec::as_slice), Ok(&b"\0a\0b"[..]));
        for bad in [&b"A"[..], b"AGEA Yg==", b"AGEAYg==x", b"!"] {
            assert_eq!(decode(bad).err(), Some(Invalid::Base64), "{}", bad.escape_ascii());
        }
    }

    #[test]
    fn what_is_written_is_what_is_read() {
        let credentials = plain(b"bob\0alice\0pass").unwrap();
        let login = PasswordLogin {
            user: &credentials.user,
            authzid: credentials.authzid.as_ref(),
            password: credentials.password().unwrap(),
        };
        let message = decode(&plain_response(&login)).unwrap();
        assert_eq!(&message[..], b"bob\0alice\0pass");
    }

    #[test]
    fn first_messages_tell_whose_they_are() {
        let read = |mechanism, message: &[u8]| {
            first_message(mechanism, message).map(|it| (it.user.to_string(), it.authzid.map(|name| name.to_string())))
        };
        let good = |user: &str| Ok((user.to_owned(), None));
        assert_eq!(read(Mechanism::XOauth2, b"user=a@b\x01auth=Bearer t\x01\x01"), good("a@b"));
        assert_eq!(read(Mechanism::OauthBearer, b"n,a=a=2Cb=3D,\x01host=h\x01auth=Bearer t\x01\x01"), good("a,b="));
        assert_eq!(read(Mechanism::ScramSha256, b"n,,n=user,r=rOprNGfw"), good("user"));
        assert_eq!(
            read(Mechanism::ScramSha1, b"y,a=bob,n=al=2Cice,r=x,ext=1"),
            Ok(("al,ice".into(), Some("bob".into())))
        );
        assert_eq!(read(Mechanism::ScramSha1, b"n,a=bob,n=bob,r=x"), good("bob"));
        for (mechanism, wrong) in [
            (Mechanism::XOauth2, &b"user=a\x01\x01"[..]),
            (Mechanism::XOauth2, b"auth=Bearer t\x01user=a\x01\x01"),
            (Mechanism::XOauth2, b""),
            (Mechanism::OauthBearer, b"n,,\x01auth=Bearer t\x01\x01"),
            (Mechanism::OauthBearer, b"n,a=alice,\x01\x01"),
            (Mechanism::OauthBearer, b"p=tls-unique,a=alice,\x01auth=Bearer t\x01\x01"),
            (Mechanism::ScramSha256, b"p=tls-exporter,,n=user,r=x"),
            (Mechanism::ScramSha256, b"n,,m=ext,n=user,r=x"),
            (Mechanism::ScramSha256, b"n,,n=us=er,r=x"),
            (Mechanism::ScramSha256, b"n,,n=user,r="),
            (Mechanism::ScramSha256, b"n,,n=user"),
            (Mechanism::ScramSha256, b"n=user,r=x"),
        ] {
            assert_eq!(read(mechanism, wrong), Err(Invalid::Form), "{}", wrong.escape_ascii());
        }
        assert_eq!(read(Mechanism::ScramSha256, b"n,,n=a\0b,r=x"), Err(Invalid::Name(InvalidName::Control)));
        assert_eq!(read(Mechanism::ScramSha256, b"n,,n=,r=x"), Err(Invalid::Name(InvalidName::Empty)));
    }

    #[test]
    fn a_token_may_travel_under_another_name() {
        let user = UserName::new(b"c,=d").unwrap();
        let under = |mechanism, message: &[u8]| {
            renamed(mechanism, &Secret::new(message.to_vec()), &user).map(|secret| secret.expose().to_vec())
        };
        assert_eq!(
            under(Mechanism::XOauth2, b"user=a\x01auth=Bearer t\x01\x01"),
            Some(b"user=c,=d\x01auth=Bearer t\x01\x01".to_vec())
        );
        assert_eq!(
            under(Mechanism::OauthBearer, b"n,a=a,\x01port=1\x01auth=Bearer t\x01\x01"),
            Some(b"n,a=c=2C=3Dd,\x01port=1\x01auth=Bearer t\x01\x01".to_vec())
        );
        assert_eq!(under(Mechanism::ScramSha256, b"n,,n=a,r=x"), None);
    }

    #[test]
    fn a_certificate_may_ask_for_another_mailbox() {
        let owner = UserName::new(b"alice").unwrap();
        let read = |message: &[u8]| external(message, &owner).map(|it| it.authzid.map(|name| name.to_string()));
        assert_eq!(read(b""), Ok(None));
        assert_eq!(read(b"alice"), Ok(None));
        assert_eq!(read(b"bob"), Ok(Some("bob".into())));
        assert!(read(b"a\0").is_err());
    }
}
