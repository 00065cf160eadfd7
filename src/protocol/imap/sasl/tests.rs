//! Tests of the grammars, and of messages that two parsers could read differently.

use proptest::prelude::*;

use super::*;
use crate::identity::PasswordLogin;

fn user_and_authzid(
    credentials: Result<Credentials, InvalidCredentials>,
) -> Result<(String, Option<String>), InvalidCredentials> {
    credentials.map(|it| (it.user.to_string(), it.authzid.map(|name| name.to_string())))
}

fn first(mechanism: RelayedMechanism, message: &[u8]) -> Result<(String, Option<String>), InvalidCredentials> {
    user_and_authzid(first_message(mechanism, message, &[]))
}

#[test]
fn plain_is_parsed() {
    let read = |message: &[u8]| {
        plain(message).map(|it| {
            let password = it.password().unwrap().expose().to_vec();
            (it.user.to_string(), it.authzid.map(|name| name.to_string()), password)
        })
    };
    assert_eq!(read(b"\0alice\0p w"), Ok(("alice".into(), None, b"p w".to_vec())));
    assert_eq!(read(b"alice\0alice\0x"), Ok(("alice".into(), None, b"x".to_vec())));
    assert_eq!(read(b"bob\0alice\0\xff"), Ok(("alice".into(), Some("bob".into()), b"\xff".to_vec())));
    for wrong in [&b"alice\0x"[..], b"", b"\0alice\0a\0b", b"\0alice\0a\0", b"\0\0\0\0"] {
        assert_eq!(read(wrong), Err(InvalidCredentials::Grammar), "{}", wrong.escape_ascii());
    }
    assert_eq!(read(b"\0alice\0a\nb"), Err(InvalidCredentials::Password));
    assert_eq!(read(b"\0\0x"), Err(InvalidCredentials::Name(InvalidName::Empty)));
    assert_eq!(read(b"bob\0\0x"), Err(InvalidCredentials::Name(InvalidName::Empty)));
    assert_eq!(read(b"b\rob\0alice\0x"), Err(InvalidCredentials::Name(InvalidName::Control)));
    assert_eq!(read(b" \0alice\0x"), Err(InvalidCredentials::Name(InvalidName::WhiteSpace)));
    assert_eq!(read(b"\0al\xffice\0x"), Err(InvalidCredentials::Name(InvalidName::NotUtf8)));
}

#[test]
fn base64_padding_is_optional() {
    assert_eq!(decode(b"AGEAYg==").as_deref().map(Vec::as_slice), Ok(&b"\0a\0b"[..]));
    assert_eq!(decode(b"AGEAYg").as_deref().map(Vec::as_slice), Ok(&b"\0a\0b"[..]));
    for bad in [&b"A"[..], b"AGEA Yg==", b"AGEAYg==x", b"!"] {
        assert_eq!(decode(bad).err(), Some(InvalidCredentials::Base64), "{}", bad.escape_ascii());
    }
}

#[test]
fn first_message_names_the_user() {
    let good = |user: &str| Ok((user.to_owned(), None));
    assert_eq!(first(RelayedMechanism::XOauth2, b"user=a@b\x01auth=Bearer t\x01\x01"), good("a@b"));
    assert_eq!(first(RelayedMechanism::XOauth2, b"user=a=b,c\x01auth=bearer t-._~+/=\x01\x01"), good("a=b,c"));
    assert_eq!(first(RelayedMechanism::OauthBearer, b"n,a=a=2Cb=3D,\x01host=h\x01auth=Bearer t\x01\x01"), good("a,b="));
    assert_eq!(first(RelayedMechanism::OauthBearer, b"n,a=a,\x01auth=Bearer t\x01port=1\x01x=\x01\x01"), good("a"));
    assert_eq!(first(RelayedMechanism::ScramSha256, b"n,,n=user,r=rOprNGfw"), good("user"));
    assert_eq!(
        first(RelayedMechanism::ScramSha1, b"y,a=bob,n=al=2Cice,r=x,x=1,Y=a=b"),
        Ok(("al,ice".into(), Some("bob".into())))
    );
    assert_eq!(first(RelayedMechanism::ScramSha1, b"n,a=bob,n=bob,r=x"), good("bob"));
    assert_eq!(
        first(RelayedMechanism::ScramSha256, b"n,,n=a\x01b,r=x"),
        Err(InvalidCredentials::Name(InvalidName::Control))
    );
    assert_eq!(first(RelayedMechanism::ScramSha256, b"n,,n=,r=x"), Err(InvalidCredentials::Name(InvalidName::Empty)));
    assert_eq!(
        first(RelayedMechanism::ScramSha256, b"n,a=,n=a,r=x"),
        Err(InvalidCredentials::Name(InvalidName::Empty))
    );
    assert_eq!(
        first(RelayedMechanism::XOauth2, b"user=\x01auth=Bearer t\x01\x01"),
        Err(InvalidCredentials::Name(InvalidName::Empty))
    );
    assert_eq!(
        first(RelayedMechanism::XOauth2, b"user=a \x01auth=Bearer t\x01\x01"),
        Err(InvalidCredentials::Name(InvalidName::WhiteSpace))
    );
    assert_eq!(
        first(RelayedMechanism::OauthBearer, b"n,a=\xff,\x01auth=Bearer t\x01\x01"),
        Err(InvalidCredentials::Name(InvalidName::NotUtf8))
    );
}

/// Parsers differ in which of two fields they use: the first, the last, or one with another letter case of the key.
const AMBIGUOUS: &[(RelayedMechanism, &[u8])] = &[
    (RelayedMechanism::XOauth2, b"user=alice\x01user=bob\x01auth=Bearer t\x01\x01"),
    (RelayedMechanism::XOauth2, b"user=alice\x01auth=Bearer t\x01user=bob\x01\x01"),
    (RelayedMechanism::XOauth2, b"user=alice\x01auth=Bearer t\x01USER=bob\x01\x01"),
    (RelayedMechanism::XOauth2, b"user=alice\x01auth=Bearer t\x01\x01user=bob\x01\x01"),
    (RelayedMechanism::XOauth2, b"user=alice\x01auth=Bearer t\x01auth=Bearer u\x01\x01"),
    (RelayedMechanism::XOauth2, b"user=alice\x01auth=Bearer t\x01host=h\x01\x01"),
    (RelayedMechanism::XOauth2, b"user=alice\x01auth=Bearer t\x01\x01x"),
    (RelayedMechanism::XOauth2, b"user=alice\x01auth=Bearer t\x01\x01\x01"),
    (RelayedMechanism::XOauth2, b"user=alice\x01auth=Bearer t\x01"),
    (RelayedMechanism::XOauth2, b"user=alice\x01auth=Bearer t"),
    (RelayedMechanism::XOauth2, b"User=alice\x01auth=Bearer t\x01\x01"),
    (RelayedMechanism::XOauth2, b"user=alice\x01Auth=Bearer t\x01\x01"),
    (RelayedMechanism::XOauth2, b"user=alice\x01auth=Basic t\x01\x01"),
    (RelayedMechanism::XOauth2, b"user=alice\x01auth=Bearer \x01\x01"),
    (RelayedMechanism::XOauth2, b"user=alice\x01auth=Bearer a b\x01\x01"),
    (RelayedMechanism::XOauth2, b"user=alice\x01auth=Bearer t\0user=bob\x01\x01"),
    (RelayedMechanism::XOauth2, b"user=a\x01\x01"),
    (RelayedMechanism::XOauth2, b"auth=Bearer t\x01user=a\x01\x01"),
    (RelayedMechanism::XOauth2, b""),
    (RelayedMechanism::OauthBearer, b"n,a=alice,\x01\x01"),
    (RelayedMechanism::OauthBearer, b"n,a=alice,a=bob,\x01auth=Bearer t\x01\x01"),
    (RelayedMechanism::OauthBearer, b"n,a=alice,x\x01auth=Bearer t\x01\x01"),
    (RelayedMechanism::OauthBearer, b"n,alice,\x01auth=Bearer t\x01\x01"),
    (RelayedMechanism::OauthBearer, b"n,A=alice,\x01auth=Bearer t\x01\x01"),
    (RelayedMechanism::OauthBearer, b"N,a=alice,\x01auth=Bearer t\x01\x01"),
    (RelayedMechanism::OauthBearer, b"y,a=alice,\x01auth=Bearer t\x01\x01"),
    (RelayedMechanism::OauthBearer, b"F,n,a=alice,\x01auth=Bearer t\x01\x01"),
    (RelayedMechanism::OauthBearer, b"p=tls-unique,a=alice,\x01auth=Bearer t\x01\x01"),
    (RelayedMechanism::OauthBearer, b"n,a=alice,\x01auth=Bearer t\x01user=bob\x01\x01"),
    (RelayedMechanism::OauthBearer, b"n,a=alice,\x01auth=Bearer t\x01User=bob\x01\x01"),
    (RelayedMechanism::OauthBearer, b"n,a=alice,\x01auth=Bearer t\x01auth=Bearer u\x01\x01"),
    (RelayedMechanism::OauthBearer, b"n,a=alice,\x01auth=Bearer t\x01AUTH=Bearer u\x01\x01"),
    (RelayedMechanism::OauthBearer, b"n,a=alice,\x01host=a\x01Host=b\x01auth=Bearer t\x01\x01"),
    (RelayedMechanism::OauthBearer, b"n,a=alice,\x01auth=Bearer t\x01\x01\x01"),
    (RelayedMechanism::OauthBearer, b"n,a=alice,\x01auth=Bearer t\x01\x01x"),
    (RelayedMechanism::OauthBearer, b"n,a=alice,\x01auth=Bearer t\x01"),
    (RelayedMechanism::OauthBearer, b"n,a=alice,auth=Bearer t\x01\x01"),
    (RelayedMechanism::OauthBearer, b"n,a=alice,\x01auth=Bearer t\x01ho st=x\x01\x01"),
    (RelayedMechanism::OauthBearer, b"n,a=alice,\x01auth=Bearer t\x01host=\xff\x01\x01"),
    (RelayedMechanism::OauthBearer, b"n,a=al=2cice,\x01auth=Bearer t\x01\x01"),
    (RelayedMechanism::OauthBearer, b"n,a=alice\0,\x01auth=Bearer t\x01\x01"),
    (RelayedMechanism::ScramSha256, b"p=tls-exporter,,n=user,r=x"),
    (RelayedMechanism::ScramSha256, b"n,,m=ext,n=user,r=x"),
    (RelayedMechanism::ScramSha256, b"n,,n=user,r=x,m=ext"),
    (RelayedMechanism::ScramSha256, b"n,,n=user,r=x,n=other"),
    (RelayedMechanism::ScramSha256, b"n,,n=user,r=x,N=other"),
    (RelayedMechanism::ScramSha256, b"n,,n=user,r=x,a=other"),
    (RelayedMechanism::ScramSha256, b"n,,n=user,r=x,r=y"),
    (RelayedMechanism::ScramSha256, b"n,,n=user,r=x,x=1,x=2"),
    (RelayedMechanism::ScramSha256, b"n,,n=user,r=x,x=1,X=2"),
    (RelayedMechanism::ScramSha256, b"n,,n=user,r=x,ext=1"),
    (RelayedMechanism::ScramSha256, b"n,,n=user,r=x,x="),
    (RelayedMechanism::ScramSha256, b"n,,n=user,r=x,"),
    (RelayedMechanism::ScramSha256, b"n,,n=user,r=x,x=\xff"),
    (RelayedMechanism::ScramSha256, b"n,,n=user,r=a b"),
    (RelayedMechanism::ScramSha256, b"n,,n=user,r=a\0b"),
    (RelayedMechanism::ScramSha256, b"n,,n=us=er,r=x"),
    (RelayedMechanism::ScramSha256, b"n,,n=us=3der,r=x"),
    (RelayedMechanism::ScramSha256, b"n,,n=us\0er,r=x"),
    (RelayedMechanism::ScramSha256, b"n,,n=user,r="),
    (RelayedMechanism::ScramSha256, b"n,,n=user"),
    (RelayedMechanism::ScramSha256, b"n=user,r=x"),
    (RelayedMechanism::ScramSha256, b"n,,r=x,n=user"),
];

#[test]
fn ambiguous_message_is_refused() {
    for (mechanism, wrong) in AMBIGUOUS {
        assert_eq!(first(*mechanism, wrong), Err(InvalidCredentials::Grammar), "{}", wrong.escape_ascii());
    }
}

#[test]
fn token_without_authzid_is_relayed_with_the_claimed_name() {
    use base64::engine::general_purpose::URL_SAFE_NO_PAD;
    let part = |text: &str| URL_SAFE_NO_PAD.encode(text);
    let token = format!("{}.{}.{}", part("{}"), part(r#"{"iss":"https://a.test","email":"a=li,ce"}"#), part("s"));
    let message = format!("n,,\x01host=h\x01auth=Bearer {token}\x01\x01");
    let issuer = TokenIssuer { issuer: "https://a.test".into(), claim: "email".into(), audience: None };
    let read = first_message(RelayedMechanism::OauthBearer, message.as_bytes(), &[issuer]).unwrap();
    assert_eq!((read.user.as_str(), read.authzid), ("a=li,ce", None));
    let Proof::Message { first, .. } = read.proof else { panic!("not a message") };
    assert_eq!(
        String::from_utf8_lossy(first.expose()),
        format!("n,a=a=3Dli=2Cce,\x01host=h\x01auth=Bearer {token}\x01\x01")
    );
    let unknown = first_message(RelayedMechanism::OauthBearer, message.as_bytes(), &[]);
    assert_eq!(unknown.map(|it| it.user).unwrap_err(), InvalidCredentials::Token(TokenError::NoIssuer));
}

#[test]
fn token_message_can_be_given_another_user_name() {
    let user = UserName::new(b"c,=d").unwrap();
    let under = |mechanism, message: &[u8]| {
        with_user(mechanism, &Secret::new(message.to_vec()), &user).map(|secret| secret.expose().to_vec())
    };
    assert_eq!(
        under(RelayedMechanism::XOauth2, b"user=a\x01auth=Bearer t\x01\x01"),
        Some(b"user=c,=d\x01auth=Bearer t\x01\x01".to_vec())
    );
    assert_eq!(
        under(RelayedMechanism::OauthBearer, b"n,a=a,\x01port=1\x01auth=Bearer t\x01\x01"),
        Some(b"n,a=c=2C=3Dd,\x01port=1\x01auth=Bearer t\x01\x01".to_vec())
    );
    assert_eq!(under(RelayedMechanism::ScramSha256, b"n,,n=a,r=x"), None);
}

#[test]
fn external_may_request_another_mailbox() {
    let owner = UserName::new(b"alice").unwrap();
    let read = |message: &[u8]| external(message, &owner).map(|it| it.authzid.map(|name| name.to_string()));
    assert_eq!(read(b""), Ok(None));
    assert_eq!(read(b"alice"), Ok(None));
    assert_eq!(read(b"bob"), Ok(Some("bob".into())));
    assert!(read(b"a\0").is_err());
}

/// The user of XOAUTH2 as Dovecot reads it: the last `user=` field.
fn last_user_field(message: &[u8]) -> Option<&[u8]> {
    message.split(|byte| *byte == 1).filter_map(|field| field.strip_prefix(b"user=")).next_back()
}

/// A part of a message; sequences of parts are valid, almost valid and invalid messages.
fn piece() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        prop::sample::select(vec![
            &b"user="[..],
            b"auth=Bearer t",
            b"\x01",
            b"\x01\x01",
            b"n,",
            b"y,",
            b"a=",
            b",",
            b"n=",
            b"r=",
            b"=2C",
            b"=3D",
            b"\0",
            b"alice",
            b"bob",
            b"x=1",
            b"m=",
            b"host=h",
            b"USER=",
            b"\xc3\xa9",
            b" ",
        ])
        .prop_map(<[u8]>::to_vec),
        prop::collection::vec(any::<u8>(), 0..3),
    ]
}

proptest! {
    /// An accepted message names one user for every parser, and is parsed to the same credentials after its name was set again.
    #[test]
    fn accepted_message_names_one_user(
        pieces in prop::collection::vec(piece(), 0..10),
        mechanism in prop::sample::select(vec![
            RelayedMechanism::XOauth2, RelayedMechanism::OauthBearer, RelayedMechanism::ScramSha1, RelayedMechanism::ScramSha256,
        ]),
    ) {
        let message = pieces.concat();
        let Ok(read) = first_message(mechanism, &message, &[]) else { return Ok(()) };
        if mechanism == RelayedMechanism::XOauth2 {
            prop_assert_eq!(last_user_field(&message), Some(read.user.as_str().as_bytes()));
        }
        let Proof::Message { first: secret, .. } = &read.proof else { return Err(TestCaseError::fail("not a message")) };
        prop_assert_eq!(secret.expose(), &message[..]);
        if let Some(again) = with_user(mechanism, secret, &read.user) {
            let again = first_message(mechanism, again.expose(), &[]).unwrap();
            prop_assert_eq!((again.user, again.authzid), (read.user, read.authzid));
        }
    }

    #[test]
    fn plain_response_is_parsed_to_the_same_credentials(
        authzid in prop::option::of("[ -~\u{e4}]{1,10}"), user in "[ -~\u{e4}]{1,10}", password in "[ -~\u{e4}]{0,10}",
    ) {
        let message = format!("{}\0{user}\0{password}", authzid.as_deref().unwrap_or_default());
        let Ok(read) = plain(message.as_bytes()) else { return Ok(()) };
        let login = PasswordLogin {
            user: &read.user,
            authzid: read.authzid.as_ref(),
            password: read.password().unwrap(),
        };
        let written = decode(&plain_response(&login)).unwrap();
        let again = plain(&written).unwrap();
        prop_assert_eq!(again.password().unwrap().expose(), password.as_bytes());
        prop_assert_eq!(again.user.as_str(), user);
        prop_assert_eq!(again.authzid.as_ref().map(UserName::as_str), read.authzid.as_ref().map(UserName::as_str));
    }

    #[test]
    fn escaped_name_is_unescaped_to_itself(name in "[ -~\u{e4}\u{20ac}]{1,20}") {
        let written = gs2::escape(&name);
        prop_assert_eq!(gs2::sasl_name(written.as_bytes()), Ok(name.into_bytes()));
    }
}
