//! Transcripts of the dialogue with a client, run at every split of the input.

use proptest::prelude::*;

use super::{ChallengeStep, Prelogin, PreloginSettings, PreloginStep};
use crate::identity::{Credentials, Mechanism, Proof, TokenIssuer};
use crate::protocol::imap::capability::{Extensions, Transport};
use crate::protocol::imap::refusal::RefusalKind;

fn settings(transport: Transport) -> PreloginSettings {
    PreloginSettings {
        transport,
        max_line: 1024,
        max_literal: 256,
        max_bad_commands: 3,
        max_failed_logins: 5,
        mechanisms: Mechanism::ALL.into_iter().collect(),
        certificate: None,
        extensions: Extensions::NONE,
        issuers: Vec::new().into(),
    }
}

/// Returns the transcript of a dialogue: replies, and lines with `! ` for steps.
fn transcript(transport: Transport, chunks: &[&[u8]]) -> String {
    let mut prelogin = Prelogin::new(settings(transport));
    let mut log = String::new();
    for chunk in chunks {
        prelogin.input(chunk);
        loop {
            let mut out = Vec::new();
            let step = prelogin.step(&mut out);
            log += &out.escape_ascii().to_string().replace("\\r\\n", "\n");
            match step {
                PreloginStep::NeedInput => break,
                PreloginStep::Send => {}
                PreloginStep::Login(login) => {
                    let Credentials { user, authzid, mechanism, proof } = &login.credentials;
                    let authzid = authzid.as_ref().map(|name| format!(" for {name}")).unwrap_or_default();
                    let password = match proof {
                        Proof::Password(secret) | Proof::Message { first: secret, .. } => secret.expose(),
                        Proof::Certificate => b"a certificate",
                    };
                    let password = String::from_utf8_lossy(password).replace('\x01', "^A");
                    log += &format!(
                        "! {} login of {user}{authzid} with \"{password}\" by {}\n",
                        login.tag,
                        mechanism.as_str()
                    );
                    let mut out = Vec::new();
                    let refusal = format!("{} NO refused\r\n", login.tag);
                    prelogin.refused(refusal.as_bytes(), RefusalKind::FailedLogin, &mut out);
                    log += &out.escape_ascii().to_string().replace("\\r\\n", "\n");
                }
                PreloginStep::InvalidLogin(login) => {
                    log += &format!("! {} invalid by {}: {}\n", login.tag, login.mechanism.as_str(), login.fault);
                    let mut out = Vec::new();
                    prelogin.refused(
                        format!("{} NO refused\r\n", login.tag).as_bytes(),
                        RefusalKind::FailedLogin,
                        &mut out,
                    );
                    log += &out.escape_ascii().to_string().replace("\\r\\n", "\n");
                }
                PreloginStep::StartTls => return log + "! start TLS\n",
                PreloginStep::Close(reason) => return log + &format!("! close: {reason:?}\n"),
            }
        }
    }
    log
}

/// Runs the dialogue with `input` in one piece, byte by byte, and split in two at every position.
fn transcript_at_every_split(transport: Transport, input: &[u8]) -> String {
    let whole = transcript(transport, &[input]);
    let bytes: Vec<&[u8]> = input.chunks(1).collect();
    assert_eq!(transcript(transport, &bytes), whole, "byte by byte");
    for split in 1..input.len() {
        assert_eq!(transcript(transport, &[&input[..split], &input[split..]]), whole, "split at {split}");
    }
    whole
}

#[track_caller]
fn check(transport: Transport, input: &[u8], expected: &str) {
    let output = transcript_at_every_split(transport, input);
    assert_eq!(output, expected, "\n--- output:\n{output}--- expected:\n{expected}");
}

#[test]
fn greeting_lists_capabilities() {
    for (transport, expected) in [
        (
            Transport::Tls,
            "* OK [CAPABILITY IMAP4rev1 SASL-IR LITERAL+ ID ENABLE AUTH=PLAIN AUTH=LOGIN AUTH=XOAUTH2 AUTH=OAUTHBEARER AUTH=SCRAM-SHA-1 AUTH=SCRAM-SHA-256] Vestibule ready.\r\n",
        ),
        (
            Transport::StartTls,
            "* OK [CAPABILITY IMAP4rev1 SASL-IR LITERAL+ ID ENABLE STARTTLS LOGINDISABLED] Vestibule ready.\r\n",
        ),
    ] {
        let mut out = Vec::new();
        Prelogin::new(settings(transport)).greet(&mut out);
        assert_eq!(String::from_utf8(out).unwrap(), expected);
    }
}

#[test]
fn commands_before_login_are_answered() {
    check(
        Transport::Tls,
        b"a NOOP\r\nb capability  \r\nc ENABLE QRESYNC\nd ID NIL\r\ne ID (\"name\" \"x\" \"os\" NIL)\r\nf LOGOUT\r\ng NOOP\r\n",
        "a OK NOOP completed.\n\
         * CAPABILITY IMAP4rev1 SASL-IR LITERAL+ ID ENABLE AUTH=PLAIN AUTH=LOGIN AUTH=XOAUTH2 AUTH=OAUTHBEARER AUTH=SCRAM-SHA-1 AUTH=SCRAM-SHA-256\n\
         b OK Capabilities before login listed; there are more after it.\n\
         * ENABLED\nc OK ENABLE has no effect before login.\n\
         * ID (\\\"name\\\" \\\"Vestibule\\\")\nd OK ID completed.\n\
         * ID (\\\"name\\\" \\\"Vestibule\\\")\ne OK ID completed.\n\
         * BYE Logging out\nf OK Logout completed.\n! close: Logout\n",
    );
}

#[test]
fn third_invalid_command_closes_the_connection() {
    check(
        Transport::Tls,
        b"a SELECT INBOX\r\n\r\nlogin user pass\r\nz NOOP\r\n",
        "a BAD Error in IMAP command: not known, or not allowed before login.\n\
         * BAD Error in IMAP command: no valid tag.\n\
         login BAD The first word of a line is the command\\'s tag, not the command. Put one before it, like: a login user pass\n\
         * BYE Too many invalid IMAP commands.\n! close: TooManyBadCommands\n",
    );
}

#[test]
fn login_is_read_in_every_form() {
    for input in [
        &b"a LOGIN alice secret\r\n"[..],
        b"a login \"alice\" \"secret\"  \r\n",
        b"a LOGIN {5+}\r\nalice {6+}\r\nsecret\r\n",
        b"a LOGIN alice {6+}\nsecret\n",
    ] {
        check(Transport::Tls, input, "! a login of alice with \"secret\" by login\na NO refused\n");
        check(Transport::Plain, input, "! a login of alice with \"secret\" by login\na NO refused\n");
    }
    check(
        Transport::Tls,
        b"a LOGIN {5}\r\nalice {6}\r\nsecret\r\n",
        "+ OK\n+ OK\n! a login of alice with \"secret\" by login\na NO refused\n",
    );
    check(
        Transport::Tls,
        b"a LOGIN \"al\\\\ice\" \"se\\\"cret\"\r\nb LOGIN alice \"p\xc3\xa4\"\r\n",
        "! a login of al\\ice with \"se\"cret\" by login\na NO refused\n! b login of alice with \"pä\" by login\nb NO refused\n",
    );
}

#[test]
fn authenticate_is_read_in_every_form() {
    // \0alice\0secret
    let plain = "! a login of alice with \"secret\" by sasl-plain\na NO refused\n";
    check(Transport::Tls, b"a AUTHENTICATE PLAIN AGFsaWNlAHNlY3JldA==\r\n", plain);
    check(Transport::Tls, b"a authenticate plain AGFsaWNlAHNlY3JldA\r\n", plain);
    check(Transport::Tls, b"a AUTHENTICATE PLAIN\r\nAGFsaWNlAHNlY3JldA==\r\n", &format!("+ \n{plain}"));
    // bob\0alice\0secret
    check(
        Transport::Tls,
        b"a AUTHENTICATE PLAIN Ym9iAGFsaWNlAHNlY3JldA==\r\n",
        "! a login of alice for bob with \"secret\" by sasl-plain\na NO refused\n",
    );
    let login = "! a login of alice with \"secret\" by sasl-login\na NO refused\n";
    check(
        Transport::Tls,
        b"a AUTHENTICATE LOGIN\r\nYWxpY2U=\r\nc2VjcmV0\r\n",
        &format!("+ VXNlcm5hbWU6\n+ UGFzc3dvcmQ6\n{login}"),
    );
    check(Transport::Tls, b"a AUTHENTICATE LOGIN YWxpY2U=\r\nc2VjcmV0\r\n", &format!("+ UGFzc3dvcmQ6\n{login}"));
    check(
        Transport::Tls,
        b"a AUTHENTICATE PLAIN\r\n*\r\nb AUTHENTICATE CRAM-MD5\r\nc NOOP\r\n",
        "+ \na BAD Authentication aborted by client.\n\
         b NO [CANNOT] Mechanism not supported. Offered: PLAIN, LOGIN, XOAUTH2, OAUTHBEARER, SCRAM-SHA-1, SCRAM-SHA-256.\nc OK NOOP completed.\n",
    );
    check(
        Transport::Tls,
        b"a AUTHENTICATE PLAIN =\r\nb AUTHENTICATE PLAIN !!!\r\nc NOOP\r\n",
        "a BAD Invalid credentials: the response does not fit the grammar of the mechanism.\n\
         b BAD Invalid credentials: the response is not base64.\nc OK NOOP completed.\n",
    );
}

#[test]
fn fifth_failed_login_closes_the_connection() {
    let output = transcript_at_every_split(Transport::Tls, &b"a LOGIN alice x\r\n".repeat(6));
    assert_eq!(output.matches("! a login").count(), 5);
    assert!(
        output.ends_with("a NO refused\n* BYE Too many failed logins.\n! close: TooManyFailedLogins\n"),
        "{output}"
    );
}

#[test]
fn password_is_refused_on_plaintext() {
    let no = "NO [PRIVACYREQUIRED] Login is not allowed without TLS: use STARTTLS first.";
    check(Transport::StartTls, b"a LOGIN alice secret\r\n", &format!("a {no}\n"));
    // Neither a literal nor a response is requested.
    check(Transport::StartTls, b"a LOGIN alice {6}\r\nb NOOP\r\n", &format!("a {no}\nb OK NOOP completed.\n"));
    check(Transport::StartTls, b"a LOGIN {5}\r\n", &format!("a {no}\n"));
    check(Transport::StartTls, b"a AUTHENTICATE PLAIN\r\n", &format!("a {no}\n"));
    // A non-synchronising literal is discarded with its command and not executed.
    check(
        Transport::StartTls,
        b"a LOGIN alice {10+}\r\nx LOGOUT\r\n\r\nb NOOP\r\n",
        &format!("a {no}\nb OK NOOP completed.\n"),
    );
    let output = transcript_at_every_split(Transport::StartTls, &b"a LOGIN alice secret\r\n".repeat(6));
    assert!(output.ends_with("! close: TooManyFailedLogins\n"), "{output}");
}

#[test]
fn starttls_refuses_pipelined_plaintext() {
    check(Transport::StartTls, b"a STARTTLS\r\n", "a OK Begin TLS negotiation now.\n! start TLS\n");
    check(Transport::Tls, b"a STARTTLS\r\n", "a BAD TLS is already active.\n");
    check(Transport::Plain, b"a STARTTLS\r\n", "a BAD TLS is not available on this port.\n");
    // Not at every split, because bytes that arrive after the reply belong to the handshake.
    for pipelined in [&b"a STARTTLS\r\nb LOGIN alice secret\r\n"[..], b"a STARTTLS\r\n\x16", b"a STARTTLS\n\n"] {
        assert_eq!(transcript(Transport::StartTls, &[pipelined]), "! close: StartTlsInjection\n");
    }
}

#[test]
fn other_protocols_get_no_reply() {
    for input in [
        &b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"[..],
        b"post /x HTTP/1.0\r\n",
        b"EHLO client\r\n",
        b"MAIL FROM:<a>\r\n",
        b"DATA\r\n",
    ] {
        check(Transport::Tls, input, "! close: ForeignProtocol\n");
    }
    check(
        Transport::Tls,
        b"GET NOOP\r\nGET / HTTP/1.1\r\n",
        "GET OK NOOP completed.\nGET BAD Error in IMAP command: not known, or not allowed before login.\n",
    );
    check(Transport::StartTls, b"\x16\x03\x01\x02\x00", "! close: TlsOnPlainPort\n");
    check(Transport::Plain, b"\x16\x03\x01\x02\x00", "! close: TlsOnPlainPort\n");
}

#[test]
fn exceeded_limits_are_answered_and_close_the_connection() {
    let long = [b"a LOGIN alice ", &[b'x'; 2000][..]].concat();
    let over_line = "The line is too long.";
    assert_eq!(
        transcript(Transport::Tls, &[&long]),
        format!("a BAD {over_line}\n* BYE {over_line}\n! close: LineTooLong\n")
    );
    assert_eq!(
        transcript(Transport::Tls, &[&[b'x'; 2000]]),
        format!("* BAD {over_line}\n* BYE {over_line}\n! close: LineTooLong\n")
    );
    let over_literal = "a BAD The literal is too long.\n* BYE The literal is too long.\n! close: LiteralTooLong\n";
    for input in [
        &b"a LOGIN alice {257}\r\n"[..],
        b"a LOGIN alice {257+}\r\n",
        b"a LOGIN {4294967296}\r\n",
        b"a LOGIN {0+}\r\n{0+}\r\n{0+}\r\n{0+}\r\n{0+}\r\n",
    ] {
        check(Transport::Tls, input, over_literal);
    }
    let response = [b"a AUTHENTICATE PLAIN\r\n", &[b'A'; 2000][..]].concat();
    assert_eq!(
        transcript(Transport::Tls, &[&response]),
        "+ \na BAD The response is too long.\n* BYE The response is too long.\n! close: LineTooLong\n"
    );
}

/// RFC 9051 section 6.2.3: BAD is for syntax errors.
#[test]
fn control_characters_are_syntax_errors() {
    for (input, tagged) in [
        (&b"a LOGIN {3+}\r\na\0b x\r\n"[..], true),
        (b"a LOGIN alice {3+}\r\na\0b\r\n", true),
        (b"a LOGIN al\x07ice x\r\n", true),
        (b"a LOGIN \"al\0ice\" x\r\n", true),
        (b"a\x01 LOGIN alice x\r\n", false),
        (b"a\0 LOGIN alice x\r\n", false),
    ] {
        let output = transcript_at_every_split(Transport::Tls, input);
        assert!(output.starts_with(if tagged { "a BAD" } else { "* BAD" }) && !output.contains("login of"), "{output}");
    }
}

/// They count as failed logins, not as invalid commands, because the user may have mistyped the name.
#[test]
fn well_formed_but_invalid_credentials_are_a_failed_login() {
    let base64 = |message: &[u8]| base64::Engine::encode(&base64::engine::general_purpose::STANDARD, message);
    let authenticate =
        |name: &str, message: &[u8]| format!("a AUTHENTICATE {name} {}\r\n", base64(message)).into_bytes();
    for (input, mechanism, fault) in [
        (b"a LOGIN \"\" pw\r\n".to_vec(), "login", "the user name is empty"),
        (b"a LOGIN {0+}\r\n pw\r\n".to_vec(), "login", "the user name is empty"),
        (b"a LOGIN \"al\x07ice\" pw\r\n".to_vec(), "login", "the user name has a control character"),
        (b"a LOGIN {3+}\r\na\rb pw\r\n".to_vec(), "login", "the user name has a control character"),
        (b"a LOGIN \"alice \" pw\r\n".to_vec(), "login", "the user name begins or ends with white space"),
        (b"a LOGIN \"al\xffice\" pw\r\n".to_vec(), "login", "the user name is not UTF-8"),
        (format!("a LOGIN {} pw\r\n", "x".repeat(513)).into_bytes(), "login", "the user name is too long"),
        (b"a LOGIN alice {3+}\r\na\nb\r\n".to_vec(), "login", "the password has NUL, CR or LF"),
        (authenticate("PLAIN", b"\0al\x0cice\0x"), "sasl-plain", "the user name has a control character"),
        (authenticate("PLAIN", b"\0\0x"), "sasl-plain", "the user name is empty"),
        (authenticate("XOAUTH2", b"user=\x01auth=Bearer t\x01\x01"), "xoauth2", "the user name is empty"),
        (
            authenticate("OAUTHBEARER", b"n,,\x01auth=Bearer t\x01\x01"),
            "oauthbearer",
            "the client sent no authzid, and no token issuer is configured (oauth)",
        ),
        (authenticate("SCRAM-SHA-1", b"n,,n=,r=x"), "scram-sha-1", "the user name is empty"),
    ] {
        check(Transport::Tls, &input, &format!("! a invalid by {mechanism}: {fault}\na NO refused\n"));
    }
    let output = transcript_at_every_split(Transport::Tls, &b"a LOGIN \"\" pw\r\n".repeat(6));
    assert_eq!(output.matches("! a invalid").count(), 5, "{output}");
    assert!(output.ends_with("! close: TooManyFailedLogins\n"), "{output}");
}

#[test]
fn token_without_authzid_logs_in_the_claimed_user() {
    use base64::Engine as _;
    use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
    let part = |text: &str| URL_SAFE_NO_PAD.encode(text);
    let token = format!("{}.{}.{}", part("{}"), part(r#"{"iss":"https://a.test","sub":"alice@a.test"}"#), part("s"));
    let mut settings = settings(Transport::Tls);
    settings.issuers = [TokenIssuer { issuer: "https://a.test".into(), claim: "sub".into(), audience: None }].into();
    let mut prelogin = Prelogin::new(settings);
    let message = STANDARD.encode(format!("n,,\x01auth=Bearer {token}\x01\x01"));
    prelogin.input(format!("a AUTHENTICATE OAUTHBEARER {message}\r\n").as_bytes());
    let PreloginStep::Login(login) = prelogin.step(&mut Vec::new()) else { panic!() };
    assert_eq!(login.credentials.user.as_str(), "alice@a.test");
    let Proof::Message { first: sent, .. } = &login.credentials.proof else { panic!() };
    assert!(sent.expose().starts_with(b"n,a=alice@a.test,\x01auth=Bearer "));
}

/// An ID has up to thirty fields (RFC 2971), and new versions of Outlook send every value as a literal.
#[test]
fn id_may_consist_of_literals() {
    let outlook = b"A1 ID (\"name\" {1+}\r\nx \"version\" {1+}\r\n1 \"os\" {1+}\r\nw \"os-version\" {1+}\r\n1 \
                    \"vendor\" {1+}\r\nm)\r\n";
    let answer = "* ID (\\\"name\\\" \\\"Vestibule\\\")\nA1 OK ID completed.\n";
    check(Transport::Tls, outlook, answer);
    let mut prelogin = Prelogin::new(settings(Transport::Tls));
    prelogin.input(outlook);
    prelogin.step(&mut Vec::new());
    assert_eq!(prelogin.client_id().pairs().len(), 5);
    let id = |pairs: usize, size: usize| {
        let pair = format!("{{3+}}\r\nkey {{{size}+}}\r\n{}", "v".repeat(size));
        format!("A1 ID ({})\r\n", vec![pair; pairs].join(" ")).into_bytes()
    };
    let mut wide = settings(Transport::Tls);
    (wide.max_line, wide.max_literal) = (96 * 1024, 64 * 1024);
    let answered = |input: &[u8]| {
        let mut prelogin = Prelogin::new(wide.clone());
        let mut out = Vec::new();
        prelogin.input(input);
        prelogin.step(&mut out);
        (String::from_utf8(out).unwrap(), prelogin.client_id().pairs().len())
    };
    assert_eq!(answered(&id(30, 1024)), ("* ID (\"name\" \"Vestibule\")\r\nA1 OK ID completed.\r\n".into(), 30));
    let too_much = "A1 BAD The literal is too long.\r\n* BYE The literal is too long.\r\n";
    assert_eq!(answered(&id(31, 1)), (too_much.into(), 0));
    assert_eq!(answered(&id(2, 31_000)), (too_much.into(), 0));
    // Synchronising literals are accepted one by one; a login may only have a few literals.
    let asked =
        transcript_at_every_split(Transport::Tls, b"A1 ID ({1}\r\nx {1}\r\ny {1}\r\nz {1}\r\nw {1}\r\nv NIL)\r\n");
    assert_eq!(asked, format!("{}{answer}", "+ OK\n".repeat(5)));
    let output = transcript(Transport::Tls, &[&[b"A1 LOGIN", &b" {1+}\r\nx".repeat(5)[..]].concat()]);
    assert!(output.contains("The literal is too long"), "{output}");
}

#[test]
fn bytes_after_the_login_are_left_over() {
    let input = b"a LOGIN alice secret\r\nb SELECT INBOX\r\nc FETCH 1 FLAGS\r\n";
    for split in 0..input.len() {
        let mut prelogin = Prelogin::new(settings(Transport::Tls));
        prelogin.input(&input[..split]);
        let mut out = Vec::new();
        let first = prelogin.step(&mut out);
        let fed = matches!(first, PreloginStep::NeedInput);
        if fed {
            prelogin.input(&input[split..]);
            assert!(matches!(prelogin.step(&mut out), PreloginStep::Login(_)));
        }
        let mut rest = prelogin.into_leftover();
        if !fed {
            rest.extend_from_slice(&input[split..]);
        }
        assert_eq!(rest, b"b SELECT INBOX\r\nc FETCH 1 FLAGS\r\n", "split at {split}");
    }
}

#[test]
fn client_id_is_kept_without_reserved_fields() {
    let mut prelogin = Prelogin::new(settings(Transport::Tls));
    prelogin.input(b"a ID (\"name\" \"mutt\" \"x-originating-ip\" \"192.0.2.9\")\r\nb ID (\"name\" \"other\")\r\n");
    prelogin.step(&mut Vec::new());
    assert_eq!(prelogin.client_id().pairs(), [(b"name".to_vec(), Some(b"mutt".to_vec()))]);
}

#[test]
fn malformed_commands_are_not_logins() {
    for input in [
        &b"a LOGIN ((((((((((\r\n"[..],
        b"a LOGIN \"\r\n",
        b"a LOGIN {\r\n",
        b"a LOGIN {}\r\n",
        b"a LOGIN alice\r\n",
        b"a LOGIN\r\n",
        b"a AUTHENTICATE\r\n",
        b"a AUTHENTICATE PLAIN x y\r\n",
        b"a ID (\"a\r\n",
        b"* LOGIN alice x\r\n",
        b"+ LOGIN alice x\r\n",
        b"\xff\xfe LOGIN alice x\r\n",
    ] {
        let output = transcript_at_every_split(Transport::Tls, input);
        assert!(output.contains("BAD ") && !output.contains("login of"), "{}: {output}", input.escape_ascii());
    }
    let commands = b"a NOOP\r\n".repeat(1100);
    assert!(transcript(Transport::Tls, &[&commands]).ends_with("! close: TooManyBadCommands\n"));
}

proptest! {
    /// A login that imap-codec has encoded is read with the same user and password, in the form that the codec chose.
    #[test]
    fn login_by_imap_codec_is_read_the_same(user in "[!-~]([ -~]{0,18}[!-~])?", password in "[ -~\u{e4}\u{20ac}]{0,40}") {
        use imap_codec::CommandCodec;
        use imap_codec::encode::{Encoder, Fragment};
        use imap_codec::imap_types::command::{Command, CommandBody};
        use imap_codec::imap_types::core::Tag as CodecTag;

        let body = CommandBody::login(user.as_str(), password.as_str());
        prop_assume!(body.is_ok());
        let command = Command::new(CodecTag::unvalidated("a"), body.unwrap()).unwrap();
        let mut bytes = Vec::new();
        for fragment in CommandCodec::default().encode(&command) {
            match fragment {
                Fragment::Line { data } | Fragment::Literal { data, .. } => bytes.extend(data),
            }
        }
        let mut prelogin = Prelogin::new(settings(Transport::Tls));
        prelogin.input(&bytes);
        let PreloginStep::Login(login) = prelogin.step(&mut Vec::new()) else {
            return Err(TestCaseError::fail(format!("no login in {}", bytes.escape_ascii())));
        };
        prop_assert_eq!(login.credentials.user.as_str(), user.as_str());
        prop_assert_eq!(login.credentials.password().unwrap().expose(), password.as_bytes());
    }

    #[test]
    fn any_input_leads_to_the_same_result_at_every_split(input in proptest::collection::vec(prop_oneof![
        Just(b"a LOGIN ".to_vec()), Just(b"\r\n".to_vec()), Just(b"{3+}\r\n".to_vec()), Just(b"{3}\r\n".to_vec()), Just(b"\"".to_vec()),
        Just(b"a AUTHENTICATE PLAIN ".to_vec()), Just(b"a ID (".to_vec()), proptest::collection::vec(any::<u8>(), 0..6),
    ], 0..12), split in 0_usize..80) {
        let input = input.concat();
        let split = split.min(input.len());
        prop_assert_eq!(transcript(Transport::Tls, &[&input]), transcript(Transport::Tls, &[&input[..split], &input[split..]]));
    }
}

#[test]
fn relayed_mechanisms_begin_with_a_user_name() {
    let user = "! a login of alice with \"user=alice^Aauth=Bearer t^A^A\" by xoauth2\na NO refused\n";
    check(Transport::Tls, b"a AUTHENTICATE XOAUTH2 dXNlcj1hbGljZQFhdXRoPUJlYXJlciB0AQE=\r\n", user);
    check(
        Transport::Tls,
        b"a authenticate xoauth2\r\ndXNlcj1hbGljZQFhdXRoPUJlYXJlciB0AQE=\r\n",
        &format!("+ \n{user}"),
    );
    check(
        Transport::Tls,
        b"a AUTHENTICATE SCRAM-SHA-256 biwsbj1hbGljZSxyPXg=\r\n",
        "! a login of alice with \"n,,n=alice,r=x\" by scram-sha-256\na NO refused\n",
    );
    check(
        Transport::Tls,
        b"a AUTHENTICATE SCRAM-SHA-256 cD10bHMtdW5pcXVlLCxuPWFsaWNlLHI9eA==\r\nb NOOP\r\n",
        "a BAD Invalid credentials: the response does not fit the grammar of the mechanism.\nb OK NOOP completed.\n",
    );
}

#[test]
fn mechanism_that_is_not_offered_is_refused() {
    let refused = "a NO [CANNOT] Mechanism not supported. Offered: PLAIN, LOGIN, XOAUTH2, OAUTHBEARER, SCRAM-SHA-1, SCRAM-SHA-256.\n";
    for name in ["SCRAM-SHA-256-PLUS", "EXTERNAL", "CRAM-MD5", "ANONYMOUS"] {
        check(Transport::Tls, format!("a AUTHENTICATE {name} =\r\n").as_bytes(), refused);
    }
    let mut settings = settings(Transport::Tls);
    settings.mechanisms = [Mechanism::External].into_iter().collect();
    settings.certificate = Some(crate::identity::UserName::new(b"alice").unwrap());
    let mut prelogin = Prelogin::new(settings);
    let mut out = Vec::new();
    prelogin.greet(&mut out);
    prelogin.input(b"a LOGIN alice secret\r\nb AUTHENTICATE EXTERNAL =\r\n");
    let PreloginStep::Login(login) = prelogin.step(&mut out) else { panic!() };
    assert_eq!(
        out.escape_ascii().to_string(),
        "* OK [CAPABILITY IMAP4rev1 SASL-IR LITERAL+ ID ENABLE AUTH=EXTERNAL LOGINDISABLED] Vestibule ready.\\r\\n\
         a NO [CANNOT] LOGIN is disabled: use AUTHENTICATE.\\r\\n"
    );
    assert_eq!((login.credentials.user.as_str(), login.credentials.mechanism), ("alice", Mechanism::External));
}

#[test]
fn challenge_is_sent_and_its_response_returned() {
    let mut prelogin = Prelogin::new(settings(Transport::Tls));
    let mut out = Vec::new();
    prelogin.input(b"a AUTHENTICATE SCRAM-SHA-1 biwsbj1hbGljZSxyPXg=\r\n");
    let PreloginStep::Login(login) = prelogin.step(&mut out) else { panic!() };
    prelogin.challenge(b"c2VydmVy", &mut out);
    assert_eq!(out, b"+ c2VydmVy\r\n");
    for (line, response) in [(&b"Y2xpZW50\r\n"[..], &b"Y2xpZW50"[..]), (b"*\r\n", b"*"), (b"\n", b"")] {
        assert!(matches!(prelogin.challenge_step(&login.tag, &mut out), ChallengeStep::NeedInput));
        prelogin.input(line);
        let ChallengeStep::Response(got) = prelogin.challenge_step(&login.tag, &mut out) else { panic!() };
        assert_eq!(&got[..], response);
        prelogin.challenge(b"", &mut out);
    }
    prelogin.input(&[b'x'; 2000]);
    out.clear();
    assert!(matches!(prelogin.challenge_step(&login.tag, &mut out), ChallengeStep::Close(_)));
    assert!(out.starts_with(b"a BAD The response is too long."));
}
