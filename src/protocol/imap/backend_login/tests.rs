//! Transcripts of the login dialogue with a server, run at every split of the input.

mod login_forms;
mod transcript;

use self::transcript::{Server, Split, alice, alice_by_plain};
use crate::identity::{Proof, RelayedMechanism, Secret, UserName};

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
    let output = server.run(
        "S: * OK [CAPABILITY IMAP4rev1] hi\nC: x\nS: L OK [CAPABILITY X] in\nS: * 3 EXISTS\nS: half",
        Split::Whole,
    );
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
    let output = long.run("S: * OK [CAPABILITY IMAP4rev1 SASL-IR AUTH=PLAIN] ready\nC: x\nS: +", Split::Whole);
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
    assert!(server.run(residue, Split::Whole).ends_with("! unavailable: StartTlsResidue"));
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
        alice().run(&format!("S: * OK [CAPABILITY IMAP4rev1] x\nC: y\n{lines}S: L OK [CAPABILITY X] in"), Split::Whole)
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
