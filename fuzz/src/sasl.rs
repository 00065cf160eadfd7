//! SASL messages of every mechanism, encoded in base64 so that their content is reached. With an initial response or after a
//! continuation request they are the same login, every parser finds the same user in an accepted message, and a relayed message
//! reaches the server unchanged.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use vestibule::identity::{
    Credentials, Mechanism, Mechanisms, Proof, RelayedMechanism, Secret, ServerLogin, TokenIssuer, UserName,
};
use vestibule::protocol::imap::backend_login::{BackendLogin, DialogueRules, LoginAttempt, LoginStep};
use vestibule::protocol::imap::capability::{Extensions, Transport};
use vestibule::protocol::imap::prelogin::{Prelogin, PreloginSettings, PreloginStep};
use vestibule::protocol::imap::sasl::with_user;
use vestibule::protocol::imap::tag::Tag;
use zeroize::Zeroizing;

/// The first byte selects the mechanism, the rest is the message. For LOGIN it is two messages, separated by a zero byte.
pub fn run(input: &[u8]) {
    let Some((&choice, message)) = input.split_first() else { return };
    let mechanisms: Vec<Mechanism> = Mechanism::ALL.into_iter().filter(|known| known.sasl_name().is_some()).collect();
    let mechanism = mechanisms[usize::from(choice) % mechanisms.len()];
    let messages: Vec<&[u8]> = match mechanism {
        Mechanism::SaslLogin => message.splitn(2, |byte| *byte == 0).collect(),
        _ => vec![message],
    };
    let read = login(mechanism, &messages, FirstMessage::Continuation);
    assert_eq!(
        format!("{read:?}"),
        format!("{:?}", login(mechanism, &messages, FirstMessage::InitialResponse)),
        "with an initial response"
    );
    let Some(credentials) = read else { return };
    assert_eq!(credentials.mechanism, mechanism);
    for name in [Some(&credentials.user), credentials.authzid.as_ref()].into_iter().flatten() {
        assert!(!name.as_str().is_empty() && !name.as_str().contains(|char: char| char.is_ascii_control()), "{name:?}");
    }
    assert_ne!(credentials.authzid.as_ref(), Some(&credentials.user), "an authzid that repeats the user is removed");
    match &credentials.proof {
        Proof::Password(password) => {
            let end = [b"\0", credentials.user.as_str().as_bytes(), b"\0", password.expose()].concat();
            match mechanism {
                Mechanism::SaslPlain => {
                    assert!(message.ends_with(&end));
                    assert_eq!(message.split(|byte| *byte == 0).count(), 3, "the message has three parts");
                }
                _ => assert_eq!([b"\0", message].concat(), end),
            }
        }
        Proof::Message { mechanism: relayed_mechanism, first } => {
            let claimed = mechanism == Mechanism::OauthBearer && message.starts_with(b"n,,");
            assert!(claimed || first.expose() == message, "the first message is unchanged");
            assert_eq!(
                relayed(*relayed_mechanism, &credentials, first),
                first.expose(),
                "the server receives the message unchanged"
            );
            assert_one_user_for_every_parser(mechanism, first.expose(), &credentials);
            let other = UserName::new("d,a=v\u{e9}".as_bytes()).expect("a name");
            if let Some(renamed) = with_user(*relayed_mechanism, first, &other) {
                let again = login(mechanism, &[renamed.expose()], FirstMessage::InitialResponse)
                    .expect("the message is still valid");
                assert_eq!((again.user, again.authzid), (other, None));
            }
            if let Some(same) = with_user(*relayed_mechanism, first, &credentials.user) {
                assert_eq!(same.expose(), first.expose(), "setting the same name changes nothing");
            }
        }
        Proof::Certificate => assert_eq!(credentials.user.as_str(), "carol"),
    }
}

/// Reads the message like careless servers: any field that names a user, at any position and in any letter case.
fn assert_one_user_for_every_parser(mechanism: Mechanism, message: &[u8], credentials: &Credentials) {
    let named = |separators: &[u8], key: &[u8]| -> Vec<String> {
        let fields = message.split(|byte| separators.contains(byte));
        let named = fields.filter(|field| field.get(..key.len()).is_some_and(|start| start.eq_ignore_ascii_case(key)));
        named.map(|field| String::from_utf8_lossy(&field[key.len()..]).into_owned()).collect()
    };
    let unescaped = |names: Vec<String>| -> Vec<String> {
        names.iter().map(|name| name.replace("=2C", ",").replace("=3D", "=")).collect()
    };
    let user = credentials.user.as_str().to_owned();
    match mechanism {
        Mechanism::XOauth2 => assert_eq!(named(&[1], b"user="), [user]),
        Mechanism::OauthBearer => {
            assert_eq!(named(&[1], b"user="), [""; 0]);
            let header = message.split(|byte| *byte == 1).next().unwrap_or_default();
            let names = header.split(|byte| *byte == b',').filter(|field| field.starts_with(b"a=")).count();
            assert_eq!((names, unescaped(named(&[1, b','], b"a="))[0].clone()), (1, user));
        }
        _ => {
            assert_eq!(unescaped(named(b",", b"n=")), [user]);
            let authzid = unescaped(named(b",", b"a="));
            assert!(authzid.len() < 2);
            assert_eq!(
                authzid.first().map_or(credentials.user.as_str(), String::as_str),
                credentials.mailbox_user().as_str()
            );
        }
    }
}

/// How the first message is sent.
#[derive(Clone, Copy)]
enum FirstMessage {
    InitialResponse,
    Continuation,
}

/// Returns the credentials of a login with these messages, if it is valid.
fn login(mechanism: Mechanism, messages: &[&[u8]], first: FirstMessage) -> Option<Credentials> {
    let mut dialogue = Prelogin::new(PreloginSettings {
        transport: Transport::Tls,
        max_line: 128 * 1024,
        max_literal: 1024,
        max_bad_commands: 10,
        max_failed_logins: 10,
        mechanisms: Mechanism::ALL.into_iter().collect::<Mechanisms>(),
        certificate: Some(UserName::new(b"carol").expect("a name")),
        extensions: Extensions::NONE,
        issuers: [TokenIssuer { issuer: "https://a.test".to_owned(), claim: "email".to_owned(), audience: None }]
            .into(),
    });
    let mut lines = vec![format!("a AUTHENTICATE {}", mechanism.sasl_name().expect("a mechanism with a name"))];
    for (index, message) in messages.iter().enumerate() {
        let encoded = STANDARD.encode(message);
        match (index, first) {
            // RFC 4959: "=" is an empty initial response.
            (0, FirstMessage::InitialResponse) => {
                lines[0] += &format!(" {}", if encoded.is_empty() { "=" } else { &encoded })
            }
            _ => lines.push(encoded),
        }
    }
    let mut replies = Vec::new();
    for line in lines {
        dialogue.input(format!("{line}\r\n").as_bytes());
        match dialogue.step(&mut replies) {
            PreloginStep::NeedInput | PreloginStep::Send => {}
            PreloginStep::Login(request) => return Some(request.credentials),
            PreloginStep::Close(_) | PreloginStep::InvalidLogin(_) => return None,
            PreloginStep::StartTls => panic!("the client did not send STARTTLS"),
        }
    }
    None
}

/// Returns the message that the server receives.
fn relayed(mechanism: RelayedMechanism, credentials: &Credentials, first: &Secret) -> Vec<u8> {
    let tag = Tag::new(b"a1").expect("a tag");
    let mut dialogue = BackendLogin::new(LoginAttempt {
        login: Some(ServerLogin::Relayed {
            mechanism,
            first,
            user: &credentials.user,
            authzid: credentials.authzid.as_ref(),
        }),
        tag: &tag,
        starttls: false,
        id: Vec::new(),
        max_line: 1024,
        max_untagged_lines: 20,
        max_untagged_bytes: 1024,
        rules: DialogueRules::default(),
    });
    let mut sent = Zeroizing::new(Vec::new());
    let name = mechanism.sasl_name();
    dialogue.input(format!("* OK [CAPABILITY IMAP4rev1 SASL-IR AUTH={name}] x\r\n").as_bytes());
    assert!(matches!(dialogue.step(&mut sent), LoginStep::NeedInput));
    let line = std::str::from_utf8(&sent).expect("base64 is ASCII");
    let encoded = line.trim_end().rsplit(' ').next().unwrap_or_default();
    STANDARD.decode(encoded).expect("base64")
}
