//! Transcripts about the forms of the login, and about answers that are not caused by a wrong password.

use super::transcript::{Server, alice, alice_by_plain};
use crate::identity::{LoginWith, Mechanism, Proof, Secret, UserName};

const IR: &str = "* OK [CAPABILITY IMAP4rev1 SASL-IR AUTH=PLAIN] x";
const OK: &str = "S: L OK [CAPABILITY IMAP4rev1] in\n! client: tag1 OK [CAPABILITY IMAP4rev1] in";

#[test]
fn bad_leads_to_the_next_form() {
    // Coremail lists SASL-IR and does not understand it.
    alice_by_plain().check(&format!(
        "S: {IR}
         C: L AUTHENTICATE PLAIN AGFsaWNlAHNlY3JldA==
         S: L BAD Request not ending with CRLF
         C: L AUTHENTICATE PLAIN
         S: +
         C: AGFsaWNlAHNlY3JldA==
         {OK}"
    ));
    // If the server understands neither form of AUTHENTICATE, LOGIN is sent.
    alice_by_plain().check(&format!(
        "S: {IR}
         C: L AUTHENTICATE PLAIN AGFsaWNlAHNlY3JldA==
         S: L BAD x
         C: L AUTHENTICATE PLAIN
         S: L bad y
         C: L LOGIN \"alice\" \"secret\"
         {OK}"
    ));
    // LOGIN is sent first, and each form once.
    alice().check(&format!(
        "S: {IR}
         C: L LOGIN \"alice\" \"secret\"
         S: L BAD x
         C: L AUTHENTICATE PLAIN AGFsaWNlAHNlY3JldA==
         S: L BAD x
         C: L AUTHENTICATE PLAIN
         S: +
         C: AGFsaWNlAHNlY3JldA==
         S: L BAD x
         ! unavailable: LoginBad"
    ));
}

#[test]
fn refused_password_is_not_sent_in_another_form() {
    for answer in ["NO x", "NO [ALERT] Unsupported authentication mechanism", "NO [CANNOT] x"] {
        let (output, rejected) =
            alice_by_plain().run_for_rejected_forms(&format!("S: {IR}\nC: *\nS: L {answer}\nC: *"));
        assert!(output.contains("! refused: tag1 NO") && output.matches("C: ").count() == 1, "{output}");
        assert_eq!(rejected, None);
    }
}

#[test]
fn response_is_sent_again_if_requested() {
    alice_by_plain().check(&format!(
        "S: {IR}
         C: L AUTHENTICATE PLAIN AGFsaWNlAHNlY3JldA==
         S: +
         C: AGFsaWNlAHNlY3JldA==
         {OK}"
    ));
    alice_by_plain().check(&format!(
        "S: {IR}
         C: L AUTHENTICATE PLAIN AGFsaWNlAHNlY3JldA==
         S: +
         C: AGFsaWNlAHNlY3JldA==
         S: +
         ! unavailable: Protocol"
    ));
}

#[test]
fn server_that_closes_after_bad_is_reconnected() {
    alice_by_plain().check(&format!(
        "S: {IR}
         C: L AUTHENTICATE PLAIN AGFsaWNlAHNlY3JldA==
         S: L BAD x
         C: L AUTHENTICATE PLAIN
         S: * BYE too many errors
         ! reconnect
         S: {IR}
         C: L AUTHENTICATE PLAIN
         S: +
         C: AGFsaWNlAHNlY3JldA==
         {OK}"
    ));
    // A second connection that closes in the same way ends the login.
    alice_by_plain().check(&format!(
        "S: {IR}
         C: L AUTHENTICATE PLAIN AGFsaWNlAHNlY3JldA==
         S: L BAD x
         C: L AUTHENTICATE PLAIN
         S: * BYE
         ! reconnect
         S: {IR}
         C: L AUTHENTICATE PLAIN
         S: * BYE
         ! unavailable: Bye"
    ));
}

#[test]
fn rejected_forms_are_avoided_until_the_capabilities_change() {
    let login = format!("S: {IR}\nC: *\nS: L BAD x\nC: *\nS: +\nC: *\nS: L OK [CAPABILITY IMAP4rev1] in");
    let (_, rejected) = alice_by_plain().run_for_rejected_forms(&login);
    let mut next = alice_by_plain();
    next.unsupported_forms = rejected;
    assert!(rejected.is_some());
    next.check(&format!("S: {IR}\nC: L AUTHENTICATE PLAIN\nS: +\nC: AGFsaWNlAHNlY3JldA==\n{OK}"));
    let other = IR.replace("IMAP4rev1", "IMAP4rev2");
    next.check(&format!("S: {other}\nC: L AUTHENTICATE PLAIN AGFsaWNlAHNlY3JldA==\n{OK}"));
    // A refused login or a long response may be an attacker's, so the forms are not remembered.
    let refused = login.replace("S: L OK [CAPABILITY IMAP4rev1] in", "S: L NO x");
    assert_eq!(alice_by_plain().run_for_rejected_forms(&refused).1, None);
    let mut long = alice_by_plain();
    long.credentials.proof = Proof::Password(Secret::new(vec![b'x'; 300]));
    assert_eq!(long.run_for_rejected_forms(&login).1, None);
}

#[test]
fn special_credentials_do_not_change_how_others_log_in() {
    for (password, is_remembered) in
        [(&b"secret"[..], true), (b"sec\"ret", false), (b"sec ret", false), (&[b'x'; 300], false)]
    {
        let login = format!("S: {IR}\nC: *\nS: L BAD x\nC: *\nS: L OK [CAPABILITY IMAP4rev1] in");
        let (output, rejected) = Server::new("alice", password).run_for_rejected_forms(&login);
        assert!(output.contains("C: L LOGIN") && output.contains("C: L AUTHENTICATE PLAIN"), "{output}");
        assert_eq!(rejected.is_some(), is_remembered, "{output}");
        if is_remembered {
            let mut next = alice();
            next.unsupported_forms = rejected;
            next.check(&format!("S: {IR}\nC: L AUTHENTICATE PLAIN AGFsaWNlAHNlY3JldA==\n{OK}"));
        }
    }
}

#[test]
fn clients_command_is_kept_if_the_server_supports_it() {
    let first = |with: LoginWith, client: Mechanism, capabilities: &str| {
        let mut server = alice();
        (server.login_with, server.credentials.mechanism) = (with, client);
        let (output, _) =
            server.run_for_rejected_forms(&format!("S: * OK [CAPABILITY IMAP4rev1 {capabilities}] x\nC: *"));
        output.lines().nth(1).unwrap_or_default().replace("AGFsaWNlAHNlY3JldA==", "IR")
    };
    let (login, initial, continued) =
        ("C: L LOGIN \"alice\" \"secret\"", "C: L AUTHENTICATE PLAIN IR", "C: L AUTHENTICATE PLAIN");
    let (disabled, unsupported) = ("! unavailable: LoginDisabled", "! unavailable: MechanismUnsupported");
    let all = "SASL-IR AUTH=PLAIN";
    let without_login = "SASL-IR AUTH=PLAIN LOGINDISABLED";
    for (with, client, capabilities, expected) in [
        (LoginWith::Automatic, Mechanism::Login, all, login),
        (LoginWith::Automatic, Mechanism::SaslLogin, all, login),
        (LoginWith::Automatic, Mechanism::SaslPlain, all, initial),
        (LoginWith::Automatic, Mechanism::External, all, initial),
        (LoginWith::Automatic, Mechanism::Login, without_login, initial),
        (LoginWith::Automatic, Mechanism::SaslPlain, "AUTH=PLAIN", continued),
        (LoginWith::Automatic, Mechanism::External, "AUTH=PLAIN", login),
        (LoginWith::Automatic, Mechanism::SaslPlain, "", login),
        (LoginWith::Plain, Mechanism::Login, all, initial),
        (LoginWith::Plain, Mechanism::Login, "AUTH=PLAIN", continued),
        (LoginWith::Plain, Mechanism::SaslPlain, "", disabled),
        (LoginWith::Login, Mechanism::SaslPlain, all, login),
        (LoginWith::Login, Mechanism::Login, without_login, disabled),
        (LoginWith::AsClient, Mechanism::Login, all, login),
        (LoginWith::AsClient, Mechanism::Login, without_login, unsupported),
        (LoginWith::AsClient, Mechanism::SaslPlain, all, initial),
        (LoginWith::AsClient, Mechanism::SaslPlain, "", unsupported),
        (LoginWith::AsClient, Mechanism::External, all, initial),
    ] {
        assert_eq!(first(with, client, capabilities), expected, "{with:?} {client:?} {capabilities}");
    }
}

#[test]
fn plain_replaces_login_for_unsupported_arguments() {
    let first = |user: &str, password: &[u8], authzid: Option<&str>, with: LoginWith| {
        let mut server = Server::new(user, password);
        server.login_with = with;
        server.credentials.authzid = authzid.map(|name| UserName::new(name.as_bytes()).unwrap());
        let (output, _) = server.run_for_rejected_forms(&format!("S: {IR}\nC: *"));
        output.lines().nth(1).unwrap_or_default().chars().take(21).collect::<String>()
    };
    let (login, plain) = ("C: L LOGIN \"alice\" \"xx", "C: L AUTHENTICATE PLAI");
    let cut = |text: &str| text.chars().take(21).collect::<String>();
    assert_eq!(first("alice", &[b'x'; 900], None, LoginWith::Automatic), cut(login));
    // Old versions of Dovecot read 1 KiB of a LOGIN command.
    assert_eq!(first("alice", &[b'x'; 1000], None, LoginWith::Automatic), cut(plain));
    assert_eq!(first("alice", &[b'"'; 500], None, LoginWith::Automatic), cut(plain));
    // RFC 6855 section 5: LOGIN is for ASCII.
    assert_eq!(first("alice", "pä".as_bytes(), None, LoginWith::Automatic), cut(plain));
    assert_eq!(first("alice", b"xx", Some("bob"), LoginWith::Login), cut(plain));
}

#[test]
fn text_without_a_code_may_mean_an_outage_or_a_limit() {
    let answered = |answer: &str, expected: &str| {
        alice().check(&format!(
            "S: * OK [CAPABILITY IMAP4rev1] x\nC: L LOGIN \"alice\" \"secret\"\nS: {answer}\n! {expected}"
        ));
    };
    answered("L NO Server Unavailable. 15", "unavailable: Overloaded tag1 NO [UNAVAILABLE] Server Unavailable. 15");
    answered(
        "L NO Too many open connections (5 of 5 for x)",
        "unavailable: UserLimit tag1 NO [LIMIT] Too many open connections (5 of 5 for x)",
    );
    answered(
        "L NO Temporary authentication failure",
        "unavailable: Overloaded tag1 NO [UNAVAILABLE] Temporary authentication failure",
    );
    answered("L NO [ALERT] The store IS ON FIRE", "unavailable: Overloaded tag1 NO [UNAVAILABLE] The store IS ON FIRE");
    answered("L NO Quota of logins reached", "unavailable: UserLimit tag1 NO [LIMIT] Quota of logins reached");
    answered("L NO [CANNOT] too many connections", "refused: tag1 NO [CANNOT] too many connections");
    answered("L NO [CONTACTADMIN] Closed", "refused (not counted): tag1 NO [CONTACTADMIN] Closed");
    answered("L NO [PRIVACYREQUIRED] TLS please", "unavailable: TlsRequired");
    answered("* BYE [AUTHENTICATIONFAILED] Go away", "refused: tag1 NO [AUTHENTICATIONFAILED] Go away");
    answered("* BYE", "unavailable: Bye");
}

#[test]
fn lower_case_and_capabilities_before_the_answer_are_accepted() {
    alice_by_plain().check(
        "S: * ok [capability imap4rev1 sasl-ir auth=plain] hello
         C: L AUTHENTICATE PLAIN AGFsaWNlAHNlY3JldA==
         S: * capability imap4rev1 idle
         S: L ok done
         ! client: * CAPABILITY imap4rev1 idle
         ! client: tag1 OK done",
    );
    alice_by_plain().check(
        "S: * ok [capability imap4rev1 sasl-ir auth=plain] hello
         C: L AUTHENTICATE PLAIN AGFsaWNlAHNlY3JldA==
         S: L no [authenticationfailed] wrong
         ! refused: tag1 NO [authenticationfailed] wrong",
    );
    alice_by_plain().check("S: * bye busy\n! unavailable: Bye");
}
