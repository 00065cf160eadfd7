//! Transcripts of the login dialogue with a server, run at every split of the input.

mod login_forms;

use zeroize::Zeroizing;

use super::verdict::Action;
use super::{BackendLogin, DialogueRules, LoginAttempt, LoginStep, Unavailable, UnsupportedForms};
use crate::identity::{
    Credentials, LoginWith, Mechanism, PasswordLogin, Proof, RelayedMechanism, Secret, ServerLogin, UserName,
};
use crate::protocol::imap::client_id::IdPair;
use crate::protocol::imap::refusal::RefusalKind;
use crate::protocol::imap::tag::Tag;

/// How the server's bytes are split into reads.
#[derive(Debug, Clone, Copy)]
enum Cut {
    Whole,
    Bytes,
    At(usize),
}

pub(super) struct Server {
    starttls: bool,
    is_probe: bool,
    id: Vec<IdPair>,
    pub(super) login_with: LoginWith,
    pub(super) unsupported_forms: Option<UnsupportedForms>,
    pub(super) credentials: Credentials,
}

impl Server {
    pub(super) fn new(user: &str, password: &[u8]) -> Self {
        Self {
            starttls: false,
            is_probe: false,
            id: Vec::new(),
            login_with: LoginWith::Automatic,
            unsupported_forms: None,
            credentials: Credentials {
                user: UserName::new(user.as_bytes()).unwrap(),
                authzid: None,
                mechanism: Mechanism::Login,
                proof: Proof::Password(Secret::new(password.to_vec())),
            },
        }
    }

    /// Runs a dialogue: `S: ` is a line from the server, `C: ` an expected line to the server, `! ` an expected step. The server's
    /// bytes between two expected lines arrive in one piece, byte by byte, and split in two at every position.
    #[track_caller]
    pub(super) fn check(&self, dialogue: &str) {
        let expected = dialogue.lines().map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join("\n");
        let longest = dialogue.len();
        for cut in [Cut::Whole, Cut::Bytes].into_iter().chain((1..longest).map(Cut::At)) {
            let output = self.run(dialogue, cut);
            assert_eq!(output, expected, "{cut:?}\n--- output:\n{output}\n--- expected:\n{expected}\n");
        }
    }

    fn run(&self, dialogue: &str, cut: Cut) -> String {
        self.run_dialogue(dialogue, cut).0
    }

    /// Returns the transcript, and the forms that the server rejected.
    pub(super) fn run_for_rejected_forms(&self, dialogue: &str) -> (String, Option<UnsupportedForms>) {
        self.run_dialogue(dialogue, Cut::Whole)
    }

    fn run_dialogue(&self, dialogue: &str, cut: Cut) -> (String, Option<UnsupportedForms>) {
        let tag = Tag::new(b"tag1").unwrap();
        let (unavailable_texts, limit_texts) = (["is on fire".to_owned()], ["quota of logins".to_owned()]);
        let mut dialogue_state = BackendLogin::new(LoginAttempt {
            login: (!self.is_probe).then_some(match &self.credentials.proof {
                Proof::Message { mechanism, first } => ServerLogin::Relayed {
                    mechanism: *mechanism,
                    first,
                    user: &self.credentials.user,
                    authzid: self.credentials.authzid.as_ref(),
                },
                _ => ServerLogin::Password(PasswordLogin {
                    user: &self.credentials.user,
                    authzid: self.credentials.authzid.as_ref(),
                    password: self.credentials.password().unwrap(),
                }),
            }),
            tag: &tag,
            starttls: self.starttls,
            id: self.id.clone(),
            max_line: 1024,
            max_untagged_lines: 4,
            max_untagged_bytes: 512,
            rules: DialogueRules {
                login_with: self.login_with,
                client: Some(self.credentials.mechanism),
                one_server_per_user: true,
                unavailable_texts: &unavailable_texts,
                limit_texts: &limit_texts,
                unsupported_forms: self.unsupported_forms,
            },
        });
        let mut log: Vec<String> = Vec::new();
        let lines: Vec<&str> = dialogue.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
        let mut index = 0;
        while index < lines.len() {
            // Consecutive lines of the server arrive together.
            let mut batch = Vec::new();
            while let Some(line) = lines.get(index).and_then(|line| line.strip_prefix("S: ")) {
                batch.extend_from_slice(&unescape(line));
                log.push(lines[index].to_owned());
                index += 1;
            }
            let chunks: Vec<&[u8]> = match cut {
                Cut::Whole => vec![&batch],
                Cut::Bytes => batch.chunks(1).collect(),
                Cut::At(place) => {
                    let (first, second) = batch.split_at(place.min(batch.len()));
                    vec![first, second]
                }
            };
            let mut ended = false;
            for chunk in chunks {
                dialogue_state.input(chunk);
                ended |= Self::steps(&mut dialogue_state, &mut log);
                if ended {
                    break;
                }
            }
            if ended {
                break;
            }
            while lines.get(index).is_some_and(|line| !line.starts_with("S: ")) {
                index += 1;
            }
        }
        (log.join("\n"), dialogue_state.unsupported_forms())
    }

    fn steps(dialogue_state: &mut BackendLogin<'_>, log: &mut Vec<String>) -> bool {
        loop {
            let mut out = Zeroizing::new(Vec::new());
            let step = dialogue_state.step(&mut out);
            if !out.is_empty() {
                for line in out.split_inclusive(|byte| *byte == b'\n') {
                    log.push(format!("C: {}", escape(line)));
                }
            }
            match step {
                LoginStep::NeedInput => return false,
                LoginStep::StartTls => {
                    log.push("! start TLS".to_owned());
                    dialogue_state.tls_established();
                }
                LoginStep::Accepted { to_client } => {
                    log.extend(
                        to_client
                            .split_inclusive(|byte| *byte == b'\n')
                            .map(|line| format!("! client: {}", escape(line))),
                    );
                    return true;
                }
                LoginStep::Refused { reply, kind } => {
                    log.push(format!(
                        "! refused{}: {}",
                        match kind {
                            RefusalKind::FailedLogin => "",
                            RefusalKind::NotCounted => " (not counted)",
                        },
                        escape(&reply)
                    ));
                    return true;
                }
                LoginStep::Challenge(line) => {
                    log.push(format!("! challenge: {}", line.escape_ascii()));
                    dialogue_state.respond(b"YW5zd2Vy");
                }
                LoginStep::Referred(referral) => {
                    log.push(format!("! referred to {} {}: {}", referral.host, referral.port, escape(&referral.reply)));
                    return true;
                }
                LoginStep::Probed(offer) => {
                    let names: Vec<&str> = offer.mechanisms.iter().map(Mechanism::as_str).collect();
                    log.push(format!("! seen: {}", names.join(" ")));
                    return true;
                }
                LoginStep::Unavailable(Unavailable { fault, verdict, reply, .. })
                    if verdict.action != Action::Reconnect =>
                {
                    let reply = reply.map(|reply| format!(" {}", escape(&reply))).unwrap_or_default();
                    log.push(format!("! unavailable: {fault:?}{reply}"));
                    return true;
                }
                LoginStep::Unavailable(_) => {
                    log.push("! reconnect".to_owned());
                    dialogue_state.reconnected();
                }
            }
        }
    }
}

/// Adds the CRLF that lines in transcripts do not contain; `\q` stands for a bare LF.
fn unescape(line: &str) -> Vec<u8> {
    match line.strip_suffix("\\q") {
        Some(bare) => [bare.as_bytes(), b"\n"].concat(),
        None => [line.as_bytes(), b"\r\n"].concat(),
    }
}

fn escape(line: &[u8]) -> String {
    match line.strip_suffix(b"\r\n") {
        Some(line) => String::from_utf8_lossy(line).into_owned(),
        None => format!("{}\\", String::from_utf8_lossy(line)),
    }
}

pub(super) fn alice() -> Server {
    Server::new("alice", b"secret")
}

/// A client that uses AUTHENTICATE PLAIN.
pub(super) fn alice_by_plain() -> Server {
    let mut server = alice();
    server.credentials.mechanism = Mechanism::SaslPlain;
    server
}

#[test]
fn login_with_sasl_ir_and_id_takes_one_round_trip() {
    let mut server = alice_by_plain();
    server.id =
        vec![(b"name".to_vec(), Some(b"mu\"tt".to_vec())), (b"os".to_vec(), None), (b"bad".to_vec(), Some(vec![0xff]))];
    server.check(
        r#"
        S: * OK [CAPABILITY IMAP4rev1 SASL-IR ID AUTH=PLAIN] ready
        C: I ID ("name" "mu\"tt" "os" NIL)
        C: L AUTHENTICATE PLAIN AGFsaWNlAHNlY3JldA==
        S: * ID ("name" "Dovecot")
        S: I OK ID completed.
        S: L OK [CAPABILITY IMAP4rev1 IDLE AUTH=PLAIN STARTTLS] Logged in
        S: * 1 EXISTS
        ! client: tag1 OK [CAPABILITY IMAP4rev1 IDLE] Logged in
        ! client: * 1 EXISTS
        "#
        .replace("        S: * 1 EXISTS\n", "")
        .replace("        ! client: * 1 EXISTS\n", "")
        .as_str(),
    );
}

#[test]
fn bytes_after_the_ok_are_passed_to_the_client() {
    let server = alice();
    let output = server
        .run("S: * OK [CAPABILITY IMAP4rev1] hi\nC: x\nS: L OK [CAPABILITY X] in\nS: * 3 EXISTS\nS: half", Cut::Whole);
    assert!(output.ends_with("! client: tag1 OK [CAPABILITY X] in\n! client: * 3 EXISTS\n! client: half"), "{output}");
}

#[test]
fn login_is_quoted_without_sasl_ir() {
    Server::new("al\"ice", b"se\\cret").check(
        r#"
        S: * OK [CAPABILITY IMAP4rev1 AUTH=PLAIN] ready
        C: L LOGIN "al\"ice" "se\\cret"
        S: L OK [CAPABILITY IMAP4rev1] Logged in
        ! client: tag1 OK [CAPABILITY IMAP4rev1] Logged in
        "#,
    );
}

#[test]
fn unquotable_argument_is_sent_as_a_literal() {
    let eight_bit = Server::new("alice", "pä".as_bytes());
    eight_bit.check(
        "S: * OK [CAPABILITY IMAP4rev1 LITERAL+] ready
         C: L LOGIN \"alice\" {3+}
         C: pä
         S: L NO [AUTHENTICATIONFAILED] no
         ! refused: tag1 NO [AUTHENTICATIONFAILED] no",
    );
    eight_bit.check(
        "S: * OK [CAPABILITY IMAP4rev1 LITERAL-] ready
         C: L LOGIN \"alice\" {3+}
         C: pä
         S: L NO [AUTHENTICATIONFAILED] no
         ! refused: tag1 NO [AUTHENTICATIONFAILED] no",
    );
    Server::new("älice", "pä".as_bytes()).check(
        "S: * OK [CAPABILITY IMAP4rev1] ready
         C: L LOGIN {6}
         S: + OK
         C: älice {3}
         S: +
         C: pä
         S: L OK
         C: D CAPABILITY
         S: * CAPABILITY IMAP4rev1 IDLE
         S: D OK done
         ! client: tag1 OK [CAPABILITY IMAP4rev1 IDLE] Logged in.",
    );
    // A server that refuses the literal does not receive the password.
    eight_bit.check(
        "S: * OK [CAPABILITY IMAP4rev1] ready
         C: L LOGIN \"alice\" {3}
         S: L BAD no literals here
         ! unavailable: LoginBad",
    );
}

#[test]
fn plain_with_continuation_is_used_if_login_is_disabled() {
    alice().check(
        "S: * OK [CAPABILITY IMAP4rev1 AUTH=PLAIN LOGINDISABLED] ready
         C: L AUTHENTICATE PLAIN
         S: +
         C: AGFsaWNlAHNlY3JldA==
         S: L OK [CAPABILITY IMAP4rev1] in
         ! client: tag1 OK [CAPABILITY IMAP4rev1] in",
    );
    alice().check("S: * OK [CAPABILITY IMAP4rev1 LOGINDISABLED] ready\n! unavailable: LoginDisabled");
    let mut long = alice_by_plain();
    long.credentials.proof = Proof::Password(Secret::new(vec![b'x'; 900]));
    let output = long.run("S: * OK [CAPABILITY IMAP4rev1 SASL-IR AUTH=PLAIN] ready\nC: x\nS: +", Cut::Whole);
    assert!(output.contains("C: L AUTHENTICATE PLAIN\nS: +\nC: AGFsaWNlAHh4"), "{output}");
}

#[test]
fn authorization_identity_is_sent_or_the_login_fails() {
    let mut server = alice();
    server.credentials.authzid = Some(UserName::new(b"bob").unwrap());
    server.check(
        "S: * OK [CAPABILITY IMAP4rev1 AUTH=PLAIN] ready
         C: L AUTHENTICATE PLAIN
         S: +
         C: Ym9iAGFsaWNlAHNlY3JldA==
         S: L OK [CAPABILITY IMAP4rev1] in
         ! client: tag1 OK [CAPABILITY IMAP4rev1] in",
    );
    server.check("S: * OK [CAPABILITY IMAP4rev1] ready\n! unavailable: AuthzidUnsupported");
}

#[test]
fn unknown_capabilities_are_queried() {
    alice().check(
        r#"
        S: * OK old server\q
        C: C CAPABILITY
        S: * CAPABILITY IMAP4rev1
        S: C OK
        C: L LOGIN "alice" "secret"
        S: * OK [ALERT] Quota at 99 %
        S: L OK [READ-WRITE] Schön
        C: D CAPABILITY
        S: * CAPABILITY IMAP4rev1 IDLE LOGINDISABLED
        S: D OK
        ! client: * OK [ALERT] Quota at 99 %
        ! client: * CAPABILITY IMAP4rev1 IDLE
        ! client: tag1 OK [READ-WRITE] Schön
        "#,
    );
    // A CAPABILITY line before the answer is equivalent to a response code.
    alice().check(
        r#"
        S: * OK [CAPABILITY IMAP4rev1] ready
        C: L LOGIN "alice" "secret"
        S: * CAPABILITY IMAP4rev1 UIDPLUS AUTH=PLAIN
        S: L OK in
        ! client: * CAPABILITY IMAP4rev1 UIDPLUS
        ! client: tag1 OK in
        "#,
    );
}

#[test]
fn starttls_precedes_the_login() {
    let mut server = alice_by_plain();
    server.starttls = true;
    server.check(
        "S: * OK [CAPABILITY IMAP4rev1 STARTTLS LOGINDISABLED] ready
         C: S STARTTLS
         S: S OK go
         ! start TLS
         C: C CAPABILITY
         S: * CAPABILITY IMAP4rev1 SASL-IR AUTH=PLAIN
         S: C OK
         C: L AUTHENTICATE PLAIN AGFsaWNlAHNlY3JldA==
         S: L OK [CAPABILITY IMAP4rev1] in
         ! client: tag1 OK [CAPABILITY IMAP4rev1] in",
    );
    server.check("S: * OK [CAPABILITY IMAP4rev1 AUTH=PLAIN] ready\n! unavailable: StartTlsNotOffered");
    server
        .check("S: * OK [CAPABILITY IMAP4rev1 STARTTLS] ready\nC: S STARTTLS\nS: S NO\n! unavailable: StartTlsRefused");
    let residue =
        "S: * OK [CAPABILITY IMAP4rev1 STARTTLS] ready\nC: S STARTTLS\nS: S OK go\nS: L OK [CAPABILITY X] injected";
    assert!(server.run(residue, Cut::Whole).ends_with("! unavailable: StartTlsResidue"));
}

#[test]
fn invalid_greeting_is_a_fault() {
    for greeting in ["* PREAUTH welcome", "* NO", "* BAD x", "220 smtp ready", "", "a OK hi", "+ hi"] {
        alice().check(&format!("S: {greeting}\n! unavailable: Greeting").replace("S: \n", "S: \\q\n"));
    }
    alice().check("S: * BYE too busy\n! unavailable: Bye");
}

#[test]
fn refusal_is_classified() {
    let refused = |answer: &str, expected: &str| {
        alice().check(&format!(
            "S: * OK [CAPABILITY IMAP4rev1] x\nC: L LOGIN \"alice\" \"secret\"\nS: {answer}\n! {expected}"
        ));
    };
    refused("L NO [AUTHENTICATIONFAILED] Wrong", "refused: tag1 NO [AUTHENTICATIONFAILED] Wrong");
    refused("L NO [EXPIRED] Old password", "refused: tag1 NO [EXPIRED] Old password");
    refused("L NO Invalid", "refused: tag1 NO [AUTHENTICATIONFAILED] Invalid");
    refused("L NO", "refused: tag1 NO [AUTHENTICATIONFAILED] Authentication failed.");
    refused("l no x", "unavailable: Protocol");
    refused("L NO [LIMIT] Too many", "unavailable: UserLimit tag1 NO [LIMIT] Too many");
    refused("L NO [INUSE] x", "unavailable: UserLimit tag1 NO [INUSE] x");
    refused("L NO [ALERT] Büro geschlossen", "refused: tag1 NO [ALERT] Büro geschlossen");
    for outage in ["UNAVAILABLE", "serverbug"] {
        refused(&format!("L NO [{outage}] x"), &format!("unavailable: Overloaded tag1 NO [{outage}] x"));
    }
    refused("L BAD what", "unavailable: LoginBad");
    refused("* BYE shutting down", "unavailable: Bye tag1 NO [UNAVAILABLE] shutting down");
    refused("X OK forged", "unavailable: Protocol");
    refused("+ more?", "unavailable: Protocol");
    refused("* LIST () {5}", "unavailable: Protocol");
}

#[test]
fn excess_untagged_data_is_a_fault() {
    let talk = |line: &str, count: usize| {
        let lines = format!("S: {line}\n").repeat(count);
        alice().run(&format!("S: * OK [CAPABILITY IMAP4rev1] x\nC: y\n{lines}S: L OK [CAPABILITY X] in"), Cut::Whole)
    };
    assert!(talk("* OK still here", 4).ends_with("! client: tag1 OK [CAPABILITY X] in"));
    assert!(talk("* OK still here", 5).ends_with("! unavailable: TooMuchUntagged"));
    assert!(talk(&format!("* OK {}", "x".repeat(300)), 2).ends_with("! unavailable: TooMuchUntagged"));
    assert!(talk(&format!("* OK {}", "x".repeat(2000)), 1).ends_with("! unavailable: Protocol"));
}

fn relayed(mechanism: RelayedMechanism, message: &[u8]) -> Server {
    let mut server = Server::new("alice", b"");
    server.credentials.mechanism = mechanism.into();
    server.credentials.proof = Proof::Message { mechanism, first: Secret::new(message.to_vec()) };
    server
}

#[test]
fn mechanism_is_relayed_challenge_by_challenge() {
    relayed(RelayedMechanism::ScramSha256, b"n,,n=alice,r=x").check(
        "S: * OK [CAPABILITY IMAP4rev1 SASL-IR AUTH=PLAIN AUTH=SCRAM-SHA-256] x
         C: L AUTHENTICATE SCRAM-SHA-256 biwsbj1hbGljZSxyPXg=
         S: + cj14eSxzPXosaT00MDk2
         ! challenge: cj14eSxzPXosaT00MDk2
         C: YW5zd2Vy
         S: + dj1zaWc=
         ! challenge: dj1zaWc=
         C: YW5zd2Vy
         S: L OK [CAPABILITY IMAP4rev1 IDLE] in
         ! client: tag1 OK [CAPABILITY IMAP4rev1 IDLE] in",
    );
    // Without SASL-IR the first message is sent after a continuation request, which may lack its space.
    relayed(RelayedMechanism::XOauth2, b"user=alice\x01auth=Bearer t\x01\x01").check(
        "S: * OK [CAPABILITY IMAP4rev1 AUTH=XOAUTH2] x
         C: L AUTHENTICATE XOAUTH2
         S: +
         C: dXNlcj1hbGljZQFhdXRoPUJlYXJlciB0AQE=
         S: + eyJzdGF0dXMiOiI0MDEifQ==
         ! challenge: eyJzdGF0dXMiOiI0MDEifQ==
         C: YW5zd2Vy
         S: L NO [AUTHENTICATIONFAILED] expired
         ! refused: tag1 NO [AUTHENTICATIONFAILED] expired",
    );
    // A client that cancels is not a fault of the server.
    relayed(RelayedMechanism::ScramSha1, b"n,,n=alice,r=x").check(
        "S: * OK [CAPABILITY IMAP4rev1 SASL-IR AUTH=SCRAM-SHA-1] x
         C: L AUTHENTICATE SCRAM-SHA-1 biwsbj1hbGljZSxyPXg=
         S: + cj14eSxzPXosaT00MDk2
         ! challenge: cj14eSxzPXosaT00MDk2
         C: YW5zd2Vy
         S: L BAD Authentication aborted by client.
         ! refused: tag1 BAD Authentication aborted by client.",
    );
}

#[test]
fn unsupported_mechanism_is_not_tried() {
    relayed(RelayedMechanism::ScramSha1, b"n,,n=alice,r=x").check(
        "S: * OK [CAPABILITY IMAP4rev1 SASL-IR AUTH=PLAIN AUTH=SCRAM-SHA-1-PLUS] x
         ! unavailable: MechanismUnsupported",
    );
}

#[test]
fn challenges_are_limited_and_only_relayed_for_relayed_mechanisms() {
    let endless = "         S: + eA==
         ! challenge: eA==
         C: YW5zd2Vy\n"
        .repeat(4);
    relayed(RelayedMechanism::ScramSha1, b"n,,n=alice,r=x").check(&format!(
        "S: * OK [CAPABILITY SASL-IR AUTH=SCRAM-SHA-1] x
         C: L AUTHENTICATE SCRAM-SHA-1 biwsbj1hbGljZSxyPXg=\n{endless}         S: + eA==
         ! unavailable: TooManyChallenges"
    ));
    // PLAIN has no further response.
    alice_by_plain().check(
        "S: * OK [CAPABILITY SASL-IR AUTH=PLAIN] x
         C: L AUTHENTICATE PLAIN AGFsaWNlAHNlY3JldA==
         S: + eA==
         ! unavailable: Protocol",
    );
}

#[test]
fn referral_names_host_and_port() {
    for (url, target) in [
        ("imap://alice;AUTH=*@mail2.internal:1143/", "mail2.internal 1143"),
        ("imap://Mail2.Internal/", "mail2.internal 143"),
        ("imap://10.0.0.2", "10.0.0.2 143"),
    ] {
        alice_by_plain().check(&format!(
            "S: * OK [CAPABILITY SASL-IR AUTH=PLAIN] x
             C: L AUTHENTICATE PLAIN AGFsaWNlAHNlY3JldA==
             S: L NO [REFERRAL {url}] try there
             ! referred to {target}: tag1 NO [REFERRAL {url}] try there"
        ));
    }
    // A referral without a valid host and port is an ordinary refusal.
    for url in ["imap://", "http://x/", "imap://h:0/", "imap://h:x/"] {
        alice_by_plain().check(&format!(
            "S: * OK [CAPABILITY SASL-IR AUTH=PLAIN] x
             C: L AUTHENTICATE PLAIN AGFsaWNlAHNlY3JldA==
             S: L NO [REFERRAL {url}] try there
             ! refused (not counted): tag1 NO [REFERRAL {url}] try there"
        ));
    }
}

#[test]
fn probe_ends_with_logout() {
    let mut server = Server::new("alice", b"secret");
    server.is_probe = true;
    server.check(
        "S: * OK [CAPABILITY IMAP4rev1 AUTH=PLAIN AUTH=XOAUTH2 LOGINDISABLED] x
         C: Q LOGOUT
         ! seen: sasl-plain xoauth2",
    );
    server.starttls = true;
    server.check(
        "S: * OK hello
         C: C CAPABILITY
         S: * CAPABILITY IMAP4rev1 STARTTLS LOGINDISABLED
         S: C OK
         C: S STARTTLS
         S: S OK
         ! start TLS
         C: C CAPABILITY
         S: * CAPABILITY IMAP4rev1 AUTH=SCRAM-SHA-256
         S: C OK
         C: Q LOGOUT
         ! seen: login scram-sha-256",
    );
}
