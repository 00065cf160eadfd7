//! The login dialogue with a server. The same bytes lead to the same result however they are split, the output for the client has a
//! limited size, and replies consist of complete lines.

use vestibule::identity::{Mechanism, PasswordLogin, RelayedMechanism, Secret, ServerLogin, UserName};
use vestibule::protocol::imap::backend_login::{BackendLogin, DialogueRules, LoginAttempt, LoginStep};
use vestibule::protocol::imap::tag::Tag;
use zeroize::Zeroizing;

const MAX_UNTAGGED: usize = 4096;

pub fn run(input: &[u8]) {
    // The first byte selects the login; the other bytes are the server's input unchanged, so that the dictionary applies.
    let Some((&choice, bytes)) = input.split_first() else { return };
    let [user, authzid] =
        [&b"alice@example.org"[..], b"bob@example.net"].map(|name| UserName::new(name).expect("a name"));
    let password = Secret::new(if choice & 2 != 0 { b"pass \"word\\".to_vec() } else { vec![0xff, b'\n', 7] });
    let login = match choice & 0x18 {
        0 => None,
        8 => Some(ServerLogin::Relayed {
            mechanism: if choice & 1 != 0 { RelayedMechanism::XOauth2 } else { RelayedMechanism::ScramSha256 },
            first: &password,
            user: &user,
            authzid: None,
        }),
        _ => {
            let authzid = (choice & 1 != 0).then_some(&authzid);
            Some(ServerLogin::Password(PasswordLogin { user: &user, authzid, password: &password }))
        }
    };
    let starttls = choice & 4 != 0;
    let by_plain = choice & 0x20 != 0;
    let whole = outcome(login, (starttls, by_plain), bytes.chunks(bytes.len().max(1)));
    // Bytes that arrive with the answer to STARTTLS are refused, and later bytes belong to TLS, so the result depends on the split.
    if !starttls {
        assert_eq!(whole, outcome(login, (starttls, by_plain), bytes.chunks(1)), "byte by byte");
    }
}

/// Returns the result of the dialogue, and the bytes for the server.
fn outcome<'a>(
    login: Option<ServerLogin<'_>>,
    (starttls, by_plain): (bool, bool),
    pieces: impl Iterator<Item = &'a [u8]>,
) -> String {
    // Whether the secret could be recognised in an excerpt.
    let is_recognisable = match login {
        Some(ServerLogin::Password(PasswordLogin { password, .. }) | ServerLogin::Relayed { first: password, .. }) => {
            password.expose().starts_with(b"pass")
        }
        None => false,
    };
    let tag = Tag::new(b"a1").expect("a tag");
    let attempt = LoginAttempt {
        login,
        tag: &tag,
        starttls,
        id: vec![(b"name".to_vec(), Some(b"Vestibule".to_vec()))],
        max_line: 1024,
        max_untagged_lines: 20,
        max_untagged_bytes: MAX_UNTAGGED,
        rules: DialogueRules { client: by_plain.then_some(Mechanism::SaslPlain), ..DialogueRules::default() },
    };
    let mut dialogue = BackendLogin::new(attempt);
    let mut sent = Zeroizing::new(Vec::new());
    let mut accepted: Option<Vec<u8>> = None;
    let mut after = Vec::new();
    for piece in pieces {
        if accepted.is_some() {
            // Bytes after the answer are relayed to the client, in order, whether they arrived with the answer or later.
            after.extend_from_slice(piece);
            continue;
        }
        dialogue.input(piece);
        loop {
            match dialogue.step(&mut sent) {
                LoginStep::NeedInput => break,
                LoginStep::StartTls => dialogue.tls_established(),
                LoginStep::Accepted { to_client } => {
                    accepted = Some(to_client);
                    break;
                }
                LoginStep::Challenge(line) => {
                    assert!(!line.contains(&b'\n'), "{line:?}");
                    dialogue.respond(b"cmVzcG9uc2U=");
                }
                last => return last_step(last, &sent, is_recognisable),
            }
        }
    }
    match accepted {
        Some(mut to_client) => {
            assert!(to_client.len() <= MAX_UNTAGGED + 2048 + 65536, "the output for the client has a limited size");
            to_client.extend_from_slice(&after);
            format!("accepted {to_client:?} {:?}", *sent)
        }
        None => format!("open {:?}", *sent),
    }
}

/// Checks the last step of a dialogue that does not accept the login, and returns it as text.
fn last_step(step: LoginStep, sent: &[u8], is_recognisable: bool) -> String {
    match &step {
        LoginStep::Refused { reply, .. } => assert_one_line(reply),
        LoginStep::Referred(referral) => {
            assert!(referral.reply.starts_with(b"a1 NO") && referral.reply.ends_with(b"\r\n"), "{referral:?}");
        }
        LoginStep::Unavailable(unavailable) => {
            unavailable.reply.iter().for_each(|reply| assert_one_line(reply));
            let excerpt = unavailable.excerpt.as_deref().unwrap_or_default();
            assert!(excerpt.len() < 1000 && !excerpt.chars().any(char::is_control), "{excerpt:?}");
            let has_login = sent.split(|byte| *byte == b'\n').any(|line| line.starts_with(b"L "));
            assert!(!is_recognisable || !has_login || !excerpt.contains("pass \\\"word"), "a secret in {excerpt:?}");
        }
        _ => {}
    }
    format!("{step:?} {sent:?}")
}

/// Checks that a reply to the client is one line with its tag, without control characters.
fn assert_one_line(reply: &[u8]) {
    let line = reply.strip_suffix(b"\r\n").expect("a complete line");
    assert!(line.starts_with(b"a1 NO ") || line.starts_with(b"a1 BAD "), "{reply:?}");
    assert!(!line.iter().any(u8::is_ascii_control) && line.len() < 1200, "{reply:?}");
}
