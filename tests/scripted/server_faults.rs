//! Faults and refusals of servers before a session: the client's answer, the metrics, and TLS and identity towards servers.

use crate::support::{ACCEPTS_ALICE, Certificates, Client, ScriptedServer, eventually, metric, operations, proxy};

const UNAVAILABLE: &str = "a NO [UNAVAILABLE] The mailbox is temporarily unavailable, try again later.";

/// A proxy with one server and short deadlines.
async fn single_server(script: &str) -> (vestibule::server::Running, ScriptedServer) {
    let server = ScriptedServer::new(script).await;
    let text = format!(
        "backends: {{only: {{servers: ['{}']}}}}\nroutes: [{{default: only}}]\nlimits: {{connect: 300ms, server_login: 600ms}}\n",
        server.address
    );
    (proxy(&text).await, server)
}

#[track_caller]
fn failures(proxy: &vestibule::server::Running, reason: &str) -> f64 {
    metric(proxy, "vestibule_failures_total", &[&format!("reason=\"{reason}\"")])
}

#[tokio::test]
async fn server_fault_before_the_answer_is_answered_with_unavailable() {
    let login = "S: * OK [CAPABILITY IMAP4rev1] x\nC: *\n";
    for (script, reason) in [
        ("...", "login_timeout"),
        ("S: * BYE not today", "bye"),
        ("S: * PREAUTH welcome", "greeting"),
        ("S: 220 smtp.example ESMTP", "greeting"),
        (&format!("{login}..."), "login_timeout"),
        (&format!("{login}S: * BYE\n..."), "bye"),
        (login, "bye"),
        (&format!("{login}S: L BAD x"), "login_bad"),
        (&format!("{login}S: X OK forged"), "protocol"),
        ("S: * OK [CAPABILITY IMAP4rev1 LOGINDISABLED] x\n...", "login_disabled"),
    ] {
        let (proxy, _server) = single_server(script).await;
        let mut client = Client::connect(proxy.listeners()[0]).await;
        assert_eq!(client.command("a LOGIN alice secret").await, UNAVAILABLE, "{script}");
        assert_eq!(failures(&proxy, reason), 1.0, "{script}\n{}", proxy.metrics().render());
        assert_eq!(client.command("c NOOP").await, "c OK NOOP completed.", "the connection stays open");
        assert_eq!(metric(&proxy, "vestibule_logins_total", &["outcome=\"unavailable\"", "backend=\"only\""]), 1.0);
        proxy.stop().await;
    }
}

#[tokio::test]
async fn refused_connection_is_answered_with_unavailable() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let proxy = proxy(&format!("backends: {{only: {{servers: ['{address}']}}}}\nroutes: [{{default: only}}]\n")).await;
    let mut client = Client::connect(proxy.listeners()[0]).await;
    assert_eq!(client.command("a LOGIN alice secret").await, UNAVAILABLE);
    assert_eq!(failures(&proxy, "connect"), 1.0);
    assert_eq!(metric(&proxy, "vestibule_server_up", &[]), 0.0);
}

#[tokio::test]
async fn next_server_is_tried_without_the_client_noticing() {
    for (broken, balance) in [
        ("...", "user-hash"),
        ("S: * BYE x", "user-hash"),
        // With user-hash no other server is tried once a server has received the login.
        ("S: * OK [CAPABILITY IMAP4rev1] x\nC: *\nS: L NO [UNAVAILABLE] x", "round-robin"),
    ] {
        let (bad, good) = (ScriptedServer::new(broken).await, ScriptedServer::new(ACCEPTS_ALICE).await);
        let text = format!(
            "backends: {{pair: {{servers: ['{}', '{}'], balance: {balance}}}}}\nroutes: [{{default: pair}}]\nlimits: {{connect: 300ms, server_login: 10s}}\n",
            bad.address, good.address
        );
        let proxy = proxy(&text).await;
        // The login succeeds whichever of the two comes first for alice.
        let mut client = Client::connect(proxy.listeners()[0]).await;
        assert_eq!(client.command("a LOGIN alice secret").await, "a OK [CAPABILITY IMAP4rev1 IDLE] in", "{broken}");
        assert_eq!(client.command("b NOOP").await, "b OK relayed");
        assert_eq!(good.connections(), 1);
    }
}

#[tokio::test]
async fn refused_password_is_not_tried_on_another_server() {
    let refuse = "S: * OK [CAPABILITY IMAP4rev1] x\nC: *\nS: L NO [AUTHENTICATIONFAILED] Wrong.";
    let (one, other) = (ScriptedServer::new(refuse).await, ScriptedServer::new(refuse).await);
    let text = format!(
        "backends: {{pair: {{servers: ['{}', '{}']}}}}\nroutes: [{{default: pair}}]\n",
        one.address, other.address
    );
    let proxy = proxy(&text).await;
    let mut client = Client::connect(proxy.listeners()[0]).await;
    assert_eq!(client.command("a LOGIN alice wrong").await, "a NO [AUTHENTICATIONFAILED] Wrong.");
    assert_eq!(one.connections() + other.connections(), 1);
    // The next attempt uses a new connection to a server.
    assert_eq!(client.command("b LOGIN alice wrong").await, "b NO [AUTHENTICATIONFAILED] Wrong.");
    assert_eq!(one.connections() + other.connections(), 2);
    for tag in ["c", "d"] {
        client.command(&format!("{tag} LOGIN alice wrong")).await;
    }
    assert_eq!(client.command("e LOGIN alice wrong").await, "e NO [AUTHENTICATIONFAILED] Wrong.");
    assert_eq!(client.line().await, "* BYE Too many failed logins.");
    client.assert_closed().await;
    assert_eq!(failures(&proxy, "too_many_failed_logins"), 1.0);
}

#[tokio::test]
async fn server_answers_are_relayed_with_their_codes() {
    for (answer, expected) in [
        ("L NO [LIMIT] Too many sessions", "a NO [LIMIT] Too many sessions"),
        ("L NO [UNAVAILABLE] Down", "a NO [UNAVAILABLE] Down"),
        ("L NO [INUSE] Locked", "a NO [INUSE] Locked"),
        ("L NO [SERVERBUG] Oops", "a NO [SERVERBUG] Oops"),
        ("* BYE overloaded", "a NO [UNAVAILABLE] overloaded"),
        ("L NO [ALERT] Schönen Gruß", "a NO [ALERT] Schönen Gruß"),
        ("L NO just no", "a NO [AUTHENTICATIONFAILED] just no"),
    ] {
        let (proxy, _server) = single_server(&format!("S: * OK [CAPABILITY IMAP4rev1] x\nC: *\nS: {answer}")).await;
        assert_eq!(Client::connect(proxy.listeners()[0]).await.command("a LOGIN alice x").await, expected);
    }
}

#[tokio::test]
async fn lines_around_the_servers_ok_reach_the_client() {
    let script = r#"
        S: * OK old server
        C: C CAPABILITY
        S: * CAPABILITY IMAP4rev1
        S: C OK
        C: L LOGIN "alice" "secret"
        S: * OK [ALERT] Quota
        S: L OK
        C: D CAPABILITY
        S: * CAPABILITY IMAP4rev1 IDLE AUTH=PLAIN
        S: D OK
        S: * 3 EXISTS
        C: b NOOP
        S: b OK done
        ...
    "#;
    let (proxy, _server) = single_server(script).await;
    let mut client = Client::connect(proxy.listeners()[0]).await;
    client.send("a LOGIN alice secret\r\nb NOOP\r\n").await;
    for expected in ["* OK [ALERT] Quota", "a OK [CAPABILITY IMAP4rev1 IDLE] Logged in.", "* 3 EXISTS", "b OK done"] {
        assert_eq!(client.line().await, expected);
    }
}

#[tokio::test]
async fn server_receives_the_clients_address_by_id() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let proxy = proxy(&format!("backends: {{only: {{servers: ['{address}']}}}}\nroutes: [{{default: only}}]\n")).await;
    let mut client = Client::connect(proxy.listeners()[0]).await;
    let port = client.stream.local_addr().unwrap().port();
    client.send("a ID (\"name\" \"phone\" \"x-originating-ip\" \"192.0.2.1\" \"X-Session-ID\" \"forged\")\r\n").await;
    assert_eq!(client.line().await, "* ID (\"name\" \"Vestibule\")");
    assert_eq!(client.line().await, "a OK ID completed.");
    client.send("b LOGIN alice secret\r\n").await;
    let (socket, _) = listener.accept().await.unwrap();
    let mut server = crate::support::LineStream::new(socket);
    server.send("* OK [CAPABILITY IMAP4rev1 ID] hi\r\n").await;
    let id = server.line().await;
    assert!(id.starts_with("I ID (\"name\" \"phone\" \"x-session-id\" \""), "{id}");
    assert!(id.contains(&format!("\"x-originating-ip\" \"127.0.0.1\" \"x-originating-port\" \"{port}\"")), "{id}");
    assert!(!id.contains("forged") && !id.contains("192.0.2.1"), "{id}");
    assert_eq!(server.line().await, "L LOGIN \"alice\" \"secret\"", "without waiting for the answer to ID");
}

#[tokio::test]
async fn plaintext_after_starttls_fails_the_server() {
    let certificates = Certificates::new();
    // Both lines must arrive together, which a script cannot ensure.
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let ca = certificates.path("ca.pem");
    let proxy = proxy(&format!(
        "backends: {{only: {{servers: ['{address}'], tls: {{mode: starttls, ca: {}}}}}}}\nroutes: [{{default: only}}]\n",
        ca.display()
    ))
    .await;
    let mut client = Client::connect(proxy.listeners()[0]).await;
    client.send("a LOGIN alice secret\r\n").await;
    let mut server = crate::support::LineStream::new(listener.accept().await.unwrap().0);
    server.send("* OK [CAPABILITY IMAP4rev1 STARTTLS] x\r\n").await;
    assert_eq!(server.line().await, "S STARTTLS");
    server.send("S OK go\r\nL OK [CAPABILITY X] injected\r\n").await;
    assert_eq!(client.line().await, UNAVAILABLE);
    server.assert_closed().await;
    assert_eq!(failures(&proxy, "starttls_residue"), 1.0);
}

#[tokio::test]
async fn starttls_is_used_and_its_refusal_is_a_server_fault() {
    let certificates = Certificates::new();
    let good = "S: * OK [CAPABILITY IMAP4rev1 STARTTLS LOGINDISABLED] x\nC: S STARTTLS\nS: S OK go\n!TLS\nC: C CAPABILITY\n\
                S: * CAPABILITY IMAP4rev1\nS: C OK\nC: L LOGIN \"alice\" \"secret\"\nS: L OK [CAPABILITY IMAP4rev1] in\n...";
    for (script, expected, reason) in [
        (good, "a OK [CAPABILITY IMAP4rev1] in", None),
        ("S: * OK [CAPABILITY IMAP4rev1] no tls\n...", UNAVAILABLE, Some("starttls_unavailable")),
        ("S: * OK [CAPABILITY IMAP4rev1 STARTTLS] x\nC: *\nS: S NO x\n...", UNAVAILABLE, Some("starttls_unavailable")),
        ("S: * OK [CAPABILITY IMAP4rev1 STARTTLS] x\nC: *\nS: S OK x\nC: *\nS: no handshake", UNAVAILABLE, Some("tls")),
    ] {
        let server = ScriptedServer::with_tls(script, &certificates).await;
        let ca = certificates.path("ca.pem");
        let proxy = proxy(&format!(
            "backends: {{only: {{servers: ['{}'], tls: {{mode: starttls, ca: {}}}}}}}\nroutes: [{{default: only}}]\nlimits: {{connect: 2s}}\n",
            server.address,
            ca.display()
        ))
        .await;
        let mut client = Client::connect(proxy.listeners()[0]).await;
        assert_eq!(client.command("a LOGIN alice secret").await, expected, "{script}");
        if let Some(reason) = reason {
            assert_eq!(failures(&proxy, reason), 1.0, "{script}");
        }
    }
}

#[tokio::test]
async fn server_certificate_must_match_ca_name_or_pin() {
    let certificates = Certificates::new();
    let other_certificates = Certificates::new();
    let script = format!("!TLS\n{ACCEPTS_ALICE}");
    let server = ScriptedServer::with_tls(&script, &certificates).await;
    let port = server.address.port();
    let der =
        rustls_pemfile::certs(&mut &std::fs::read(certificates.path("cert.pem")).unwrap()[..]).next().unwrap().unwrap();
    let pin = {
        use base64::Engine as _;
        use x509_parser::prelude::{FromDer, X509Certificate};
        let (_, parsed) = X509Certificate::from_der(&der).unwrap();
        let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, parsed.public_key().raw);
        base64::engine::general_purpose::STANDARD.encode(digest)
    };
    let (ca, other_ca) = (certificates.path("ca.pem"), other_certificates.path("ca.pem"));
    let wrong_pin = "A".repeat(43) + "=";
    for (tls, accepted) in [
        (format!("ca: {}", ca.display()), true),
        (format!("ca: {}", other_ca.display()), false),
        (format!("ca: {}, server_name: localhost", ca.display()), true),
        (format!("ca: {}, server_name: mail.example.org", ca.display()), false),
        (format!("pin: 'sha256:{pin}'"), true),
        (format!("pin: ['sha256:{wrong_pin}', 'sha256:{pin}']"), true),
        (format!("pin: 'sha256:{wrong_pin}'"), false),
        ("insecure: true".to_owned(), true),
    ] {
        let proxy = proxy(&format!(
            "backends: {{only: {{servers: ['127.0.0.1:{port}'], tls: {{mode: implicit, {tls}}}}}}}\nroutes: [{{default: only}}]\n"
        ))
        .await;
        let mut client = Client::connect(proxy.listeners()[0]).await;
        let answer = client.command("a LOGIN alice secret").await;
        assert_eq!(answer.starts_with("a OK"), accepted, "{tls}: {answer}");
        assert_eq!(failures(&proxy, "tls"), if accepted { 0.0 } else { 1.0 }, "{tls}");
        let insecure = if tls.starts_with("insecure") { 1.0 } else { 0.0 };
        assert_eq!(metric(&proxy, "vestibule_backend_insecure", &[]), insecure);
    }
}

#[tokio::test]
async fn authorization_identity_is_routed_by_or_refused() {
    // bob\0alice\0secret
    let command = "a AUTHENTICATE PLAIN Ym9iAGFsaWNlAHNlY3JldA==";
    let script = "S: * OK [CAPABILITY IMAP4rev1 SASL-IR AUTH=PLAIN] x\nC: L AUTHENTICATE PLAIN Ym9iAGFsaWNlAHNlY3JldA==\nS: L OK [CAPABILITY IMAP4rev1] in\n...";
    let server = ScriptedServer::new(script).await;
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("users"), "bob of-bob\nalice of-alice\n").unwrap();
    let with = |authzid: &str| {
        format!(
            "backends:\n  of-bob: {{servers: ['{}'], authzid: {authzid}}}\n  of-alice: {{servers: ['127.0.0.1:1']}}\nroutes: [{{table: {}}}]\n",
            server.address,
            folder.path().join("users").display()
        )
    };
    let allowed = proxy(&with("allow")).await;
    assert_eq!(Client::connect(allowed.listeners()[0]).await.command(command).await, "a OK [CAPABILITY IMAP4rev1] in");
    let refused = proxy(&with("refuse")).await;
    let answer = Client::connect(refused.listeners()[0]).await.command(command).await;
    assert_eq!(answer, "a NO [AUTHORIZATIONFAILED] Logging in on behalf of another user is not allowed.");
    assert_eq!(server.connections(), 1, "the refused login was not sent to the server");
    assert_eq!(failures(&refused, "authzid_refused"), 1.0);
}

#[tokio::test]
async fn refused_authorization_identity_does_not_reveal_whether_the_user_exists() {
    use base64::Engine as _;
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("users"), "bob one\nalice other\n").unwrap();
    let command = |mailbox: &str| {
        let response = base64::engine::general_purpose::STANDARD.encode(format!("{mailbox}\0mallory\0x"));
        format!("a AUTHENTICATE PLAIN {response}")
    };
    for (other, expected) in [("refuse", "AUTHORIZATIONFAILED"), ("allow", "AUTHENTICATIONFAILED")] {
        let text = format!(
            "backends:\n  one: {{servers: ['127.0.0.1:1']}}\n  other: {{servers: ['127.0.0.1:1'], authzid: {other}}}\n\
             routes: [{{table: {}}}]\n",
            folder.path().join("users").display()
        );
        let proxy = proxy(&text).await;
        let mut answers = Vec::new();
        for mailbox in ["bob", "unknown"] {
            answers.push(Client::connect(proxy.listeners()[0]).await.command(&command(mailbox)).await);
        }
        assert!(answers[0].contains(expected), "{answers:?}");
        assert_eq!(answers[0], answers[1]);
        assert!(failures(&proxy, "authzid_refused") >= 1.0);
    }
}

#[tokio::test]
async fn server_with_unauthenticate_is_reported_in_the_status() {
    let plain = "S: * OK [CAPABILITY IMAP4rev1] x\nC: Q LOGOUT\n...";
    let in_greeting = "S: * OK [CAPABILITY IMAP4rev1 UNAUTHENTICATE] x\nC: Q LOGOUT\n...";
    let in_answer = "S: * OK x\nC: C CAPABILITY\nS: * CAPABILITY IMAP4rev1 unauthenticate\nS: C OK\nC: Q LOGOUT\n...";
    for (script, reported) in [(plain, false), (in_greeting, true), (in_answer, true)] {
        let server = ScriptedServer::new(script).await;
        let proxy = proxy(&format!(
            "backends: {{only: {{servers: ['{}'], check: {{interval: 100ms}}}}}}\nroutes: [{{default: only}}]\n",
            server.address
        ))
        .await;
        let passed = || metric(&proxy, "vestibule_server_checks_total", &["outcome=\"passed\""]) > 0.0;
        eventually("a check", passed).await;
        // `src/api/report.rs` tests the text that is made from this.
        assert_eq!(
            serde_json::to_value(operations(&proxy).status()).unwrap()["servers"][0]["unauthenticate"],
            reported
        );
    }
    // A server may advertise it only after a login.
    let script = "S: * OK [CAPABILITY IMAP4rev1] x\nC: *\nS: L OK [CAPABILITY IMAP4rev1 UNAUTHENTICATE] in\n...";
    let (proxy, _server) = single_server(script).await;
    let mut client = Client::connect(proxy.listeners()[0]).await;
    assert_eq!(client.command("a LOGIN alice secret").await, "a OK [CAPABILITY IMAP4rev1] in");
    assert!(operations(&proxy).status().servers[0].unauthenticate);
}
