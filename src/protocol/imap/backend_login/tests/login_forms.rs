//! LoginForms of the login, and answers that lead to another form or mean something other than a wrong password.

use super::{Server, alice, alice_by_plain};
use crate::identity::{LoginWith, Mechanism, Proof, Secret, UserName};

const IR: &str = "* OK [CAPABILITY IMAP4rev1 SASL-IR AUTH=PLAIN] x";
const OK: &str = "S: L OK [CAPABILITY IMAP4rev1] in\n! client: tag1 OK [CAPABILITY IMAP4rev1] in";

#[test]
fn bad_to_an_initial_response_leads_to_the_next_form() {
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
    // LOGIN first, and each form once.
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
fn a_refused_password_is_not_sent_in_another_form() {
    for answer in ["NO x", "NO [ALERT] Unsupported authentication mechanism", "NO [CANNOT] x"] {
        let (said, learned) = alice_by_plain().learn(&format!("S: {IR}\nC: *\nS: L {answer}\nC: *"));
        assert!(said.contains("! refused: tag1 NO") && said.matches("C: ").count() == 1, "{said}");
        assert_eq!(learned, None);
    }
}

#[test]
fn a_response_that_is_asked_for_again_is_sent_again() {
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
fn a_server_that_closes_after_bad_is_connected_to_again() {
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
    // A second connection that ends in the same way is final.
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
fn what_a_login_has_shown_is_used_until_the_capabilities_change() {
    let login = format!("S: {IR}\nC: *\nS: L BAD x\nC: *\nS: +\nC: *\nS: L OK [CAPABILITY IMAP4rev1] in");
    let (_, learned) = alice_by_plain().learn(&login);
    let mut next = alice_by_plain();
    next.learned = learned;
    assert!(learned.is_some());
    next.check(&format!("S: {IR}\nC: L AUTHENTICATE PLAIN\nS: +\nC: AGFsaWNlAHNlY3JldA==\n{OK}"));
    let other = IR.replace("IMAP4rev1", "IMAP4rev2");
    next.check(&format!("S: {other}\nC: L AUTHENTICATE PLAIN AGFsaWNlAHNlY3JldA==\n{OK}"));
    // The login may be an attacker's, or too long for the server: nothing is learnt from that.
    let refused = login.replace("S: L OK [CAPABILITY IMAP4rev1] in", "S: L NO x");
    assert_eq!(alice_by_plain().learn(&refused).1, None);
    let mut long = alice_by_plain();
    long.credentials.proof = Proof::Password(Secret::new(vec![b'x'; 300]));
    assert_eq!(long.learn(&login).1, None);
}

#[test]
fn a_user_with_special_credentials_does_not_change_how_others_log_in() {
    for (password, is_learnt) in
        [(&b"secret"[..], true), (b"sec\"ret", false), (b"sec ret", false), (&[b'x'; 300], false)]
    {
        let login = format!("S: {IR}\nC: *\nS: L BAD x\nC: *\nS: L OK [CAPABILITY IMAP4rev1] in");
        let (said, learned) = Server::new("alice", password).learn(&login);
        assert!(said.contains("C: L LOGIN") && said.contains("C: L AUTHENTICATE PLAIN"), "{said}");
        assert_eq!(learned.is_some(), is_learnt, "{said}");
        if is_learnt {
            let mut next = alice();
            next.learned = learned;
            next.check(&format!("S: {IR}\nC: L AUTHENTICATE PLAIN AGFsaWNlAHNlY3JldA==\n{OK}"));
        }
    }
}

#[test]
fn the_clients_command_is_kept_if_the_server_has_it() {
    let first = |with: LoginWith, client: Mechanism, capabilities: &str| {
        let mut server = alice();
        (server.login_with, server.credentials.mechanism) = (with, client);
        let (said, _) = server.learn(&format!("S: * OK [CAPABILITY IMAP4rev1 {capabilities}] x\nC: *"));
        said.lines().nth(1).unwrap_or_default().replace("AGFsaWNlAHNlY3JldA==", "IR")
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
fn login_gives_way_to_plain_for_what_it_cannot_carry() {
    let first = |user: &str, password: &[u8], authzid: Option<&str>, with: LoginWith| {
        let mut server = Server::new(user, password);
        server.login_with = with;
        server.credentials.authzid = authzid.map(|name| UserName::new(name.as_bytes()).unwrap());
        let (said, _) = server.learn(&format!("S: {IR}\nC: *"));
        said.lines().nth(1).unwrap_or_default().chars().take(21).collect::<String>()
    };
    let (login, plain) = ("C: L LOGIN \"alice\" \"xx", "C: L AUTHENTICATE PLAI");
    let cut = |text: &str| text.chars().take(21).collect::<String>();
    assert_eq!(first("alice", &[b'x'; 900], None, LoginWith::Automatic), cut(login));
    // Old Dovecots read 1 KiB of a LOGIN command.
    assert_eq!(first("alice", &[b'x'; 1000], None, LoginWith::Automatic), cut(plain));
    assert_eq!(first("alice", &[b'"'; 500], None, LoginWith::Automatic), cut(plain));
    // RFC 6855 section 5: LOGIN is for ASCII.
    assert_eq!(first("alice", "pä".as_bytes(), None, LoginWith::Automatic), cut(plain));
    assert_eq!(first("alice", b"xx", Some("bob"), LoginWith::Login), cut(plain));
}

#[test]
fn texts_without_a_code_may_mean_an_outage_or_a_limit() {
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
fn servers_write_words_in_lower_case_and_capabilities_ahead_of_the_answer() {
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
