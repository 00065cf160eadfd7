//! Effects of a server's answer to a login on the client, the user's other sessions, other servers and the metrics.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::net::TcpListener;
use vestibule::server::{self, Running};

use crate::support::{Client, LineStream, ScriptedServer, eventually, metric, operations, proxy, with_timeout};

const UNAVAILABLE: &str = "NO [UNAVAILABLE] The mailbox is temporarily unavailable, try again later.";

fn failures(proxy: &Running, reason: &str) -> f64 {
    metric(proxy, "vestibule_failures_total", &[&format!("reason=\"{reason}\"")])
}

/// A server that accepts a number of logins, and gives later ones another answer.
struct Limited {
    address: SocketAddr,
    logins: Arc<AtomicUsize>,
}

impl Limited {
    /// `answer` is sent to later logins. Then the connection closes, or stays open if `answer` ends with `...`.
    async fn new(accepted: usize, answer: &'static str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let logins = Arc::new(AtomicUsize::new(0));
        let counter = logins.clone();
        tokio::spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                let counter = counter.clone();
                tokio::spawn(async move {
                    let mut line = LineStream::new(socket);
                    line.send("* OK [CAPABILITY IMAP4rev1] x\r\n").await;
                    assert!(line.line().await.starts_with("L LOGIN "));
                    if counter.fetch_add(1, Ordering::SeqCst) < accepted {
                        line.send("L OK [CAPABILITY IMAP4rev1] in\r\n").await;
                        while let Some((tag, _)) = line.line().await.split_once(' ') {
                            line.send(format!("{tag} OK relayed\r\n")).await;
                        }
                        return;
                    }
                    line.send(answer.trim_end_matches("...")).await;
                    while answer.ends_with("...") && !line.line().await.is_empty() {}
                });
            }
        });
        Self { address, logins }
    }

    fn logins(&self) -> usize {
        self.logins.load(Ordering::SeqCst)
    }
}

#[tokio::test]
async fn refused_third_login_keeps_the_sessions_of_user_hash() {
    for (answer, expected, reason) in [
        (
            "L NO [UNAVAILABLE] Maximum number of connections from user+IP exceeded\r\n",
            "NO [UNAVAILABLE] Maximum number of connections from user+IP exceeded",
            "overloaded",
        ),
        ("L NO [INUSE] Locked by another session\r\n", "NO [INUSE] Locked by another session", "user_limit"),
        ("L NO [LIMIT] Too many\r\n", "NO [LIMIT] Too many", "user_limit"),
        ("L NO Too many open connections (2 of 2)\r\n", "NO [LIMIT] Too many open connections (2 of 2)", "user_limit"),
        ("L NO [SERVERBUG] x\r\n", "NO [SERVERBUG] x", "overloaded"),
        (
            "* BYE IMAP access disabled for this account.\r\n",
            "NO [UNAVAILABLE] IMAP access disabled for this account.",
            "bye",
        ),
        ("", UNAVAILABLE, "bye"),
        ("...", UNAVAILABLE, "login_timeout"),
        ("L BAD x\r\n", UNAVAILABLE, "login_bad"),
        ("garbage\r\n", UNAVAILABLE, "protocol"),
    ] {
        let (one, other) = (Limited::new(2, answer).await, Limited::new(2, answer).await);
        let text = format!(
            "backends: {{pair: {{servers: ['{}', '{}'], breaker: {{failures: 1}}}}}}\nroutes: [{{default: pair}}]\n\
             limits: {{server_login: 1s, connect: 500ms}}\n",
            one.address, other.address
        );
        let proxy = proxy(&text).await;
        let (mut desktop, mut phone) =
            (Client::connect(proxy.listeners()[0]).await, Client::connect(proxy.listeners()[0]).await);
        for client in [&mut desktop, &mut phone] {
            assert_eq!(client.command("a LOGIN alice secret").await, "a OK [CAPABILITY IMAP4rev1] in");
        }
        let mut third = Client::connect(proxy.listeners()[0]).await;
        // These are not failed logins, of which six would close the connection.
        for attempt in 1..=if answer == "..." { 1 } else { 6 } {
            assert_eq!(third.command("a LOGIN alice secret").await, format!("a {expected}"), "{answer:?}");
            assert_eq!(failures(&proxy, reason), f64::from(attempt), "{answer:?}");
        }
        assert_eq!(third.command("b NOOP").await, "b OK NOOP completed.");
        for client in [&mut desktop, &mut phone] {
            assert_eq!(client.command("b NOOP").await, "b OK relayed", "{answer:?}");
        }
        assert!(one.logins() == 0 || other.logins() == 0, "{answer:?}: only the user's server receives logins");
        assert_eq!(failures(&proxy, "moved"), 0.0);
        assert_eq!(metric(&proxy, "vestibule_server_up", &[]), 2.0, "{answer:?}: no server is marked as failed");
        proxy.stop().await;
    }
}

/// Half of the deadline is reserved for another server, which user-hash does not use after the login was sent. Dovecot delays the
/// answer to wrong passwords by up to 17 seconds, which must not be treated as an outage.
#[tokio::test]
async fn slow_answer_may_take_the_whole_deadline_with_user_hash() {
    let one = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let other = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let text = format!(
        "backends: {{pair: {{servers: ['{}', '{}']}}}}\nroutes: [{{default: pair}}]\n\
         limits: {{server_login: 5s, connect: 1s}}\n",
        one.local_addr().unwrap(),
        other.local_addr().unwrap()
    );
    let proxy = proxy(&text).await;
    let mut client = Client::connect(proxy.listeners()[0]).await;
    client.send("a LOGIN alice wrong\r\n").await;
    let accepted = async {
        tokio::select! {
            accepted = one.accept() => accepted,
            accepted = other.accept() => accepted,
        }
    };
    let mut server = LineStream::new(with_timeout("the proxy", accepted).await.unwrap().0);
    server.send("* OK [CAPABILITY IMAP4rev1] x\r\n").await;
    assert!(server.line().await.starts_with("L LOGIN"));
    // More than half of the deadline, and much less than the whole.
    tokio::time::sleep(Duration::from_millis(2800)).await;
    server.send("L NO [AUTHENTICATIONFAILED] Wrong.\r\n").await;
    assert_eq!(client.line().await, "a NO [AUTHENTICATIONFAILED] Wrong.");
    assert_eq!(failures(&proxy, "login_timeout"), 0.0);
}

#[tokio::test]
async fn other_balances_try_another_server_after_an_outage_but_not_after_a_limit() {
    for (answer, expected) in [
        ("L NO [UNAVAILABLE] x\r\n", "a OK [CAPABILITY IMAP4rev1] in"),
        ("L NO Server Unavailable. 15\r\n", "a OK [CAPABILITY IMAP4rev1] in"),
        ("* BYE x\r\n", "a OK [CAPABILITY IMAP4rev1] in"),
        ("L NO [LIMIT] x\r\n", "a NO [LIMIT] x"),
        ("L NO [INUSE] x\r\n", "a NO [INUSE] x"),
        ("L NO [PRIVACYREQUIRED] x\r\n", "a NO [UNAVAILABLE] The mailbox is temporarily unavailable, try again later."),
    ] {
        let (bad, good) = (Limited::new(0, answer).await, Limited::new(9, "").await);
        let text = format!(
            "backends: {{pair: {{servers: ['{}', '{}'], balance: round-robin}}}}\nroutes: [{{default: pair}}]\n",
            bad.address, good.address
        );
        let proxy = proxy(&text).await;
        let mut answers = Vec::new();
        for _ in 0..2 {
            answers.push(Client::connect(proxy.listeners()[0]).await.command("a LOGIN alice secret").await);
        }
        assert!(answers.iter().any(|answer| answer == expected), "{answer:?}: {answers:?}");
        assert_eq!(bad.logins(), 1, "{answer:?}: each server received a login");
    }
}

#[tokio::test]
async fn unsupported_sasl_ir_is_avoided_and_remembered() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("vestibule.yaml");
    let text = format!(
        "listeners: [{{address: '127.0.0.1:0', tls: none}}]\nbackends: {{only: {{servers: ['{address}'], check: off}}}}\n\
         routes: [{{default: only}}]\n"
    );
    std::fs::write(&file, &text).unwrap();
    let proxy = crate::support::start(&text).await;
    let response = "AGFsaWNlAHNlY3JldA==";
    for (login, understands) in [(1, false), (2, true), (3, true)] {
        if login == 3 {
            proxy.reload(&file).await.unwrap();
        }
        let mut client = Client::connect(proxy.listeners()[0]).await;
        client.send(format!("a AUTHENTICATE PLAIN {response}\r\n")).await;
        let mut server = LineStream::new(with_timeout("the proxy", listener.accept()).await.unwrap().0);
        server.send("* OK [CAPABILITY IMAP4rev1 SASL-IR AUTH=PLAIN] Coremail\r\n").await;
        if !understands {
            assert_eq!(server.line().await, format!("L AUTHENTICATE PLAIN {response}"));
            server.send("L BAD Request not ending with \\r\\n\r\n").await;
        }
        assert_eq!(server.line().await, "L AUTHENTICATE PLAIN", "login {login}");
        server.send("+ \r\n").await;
        assert_eq!(server.line().await, response);
        server.send("L OK [CAPABILITY IMAP4rev1] in\r\n").await;
        assert_eq!(client.line().await, "a OK [CAPABILITY IMAP4rev1] in");
    }
    assert_eq!(failures(&proxy, "login_bad"), 0.0);
}

#[tokio::test]
async fn server_that_closes_after_bad_is_reconnected() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let proxy = proxy(&format!("backends: {{only: {{servers: ['{address}']}}}}\nroutes: [{{default: only}}]\n")).await;
    let mut client = Client::connect(proxy.listeners()[0]).await;
    client.send("a AUTHENTICATE PLAIN AGFsaWNlAHNlY3JldA==\r\n").await;
    let mut first = LineStream::new(with_timeout("the proxy", listener.accept()).await.unwrap().0);
    first.send("* OK [CAPABILITY IMAP4rev1 SASL-IR AUTH=PLAIN] x\r\n").await;
    first.line().await;
    first.send("L BAD x\r\n").await;
    drop(first);
    let mut second = LineStream::new(with_timeout("the proxy", listener.accept()).await.unwrap().0);
    second.send("* OK [CAPABILITY IMAP4rev1 SASL-IR AUTH=PLAIN] x\r\n").await;
    assert_eq!(second.line().await, "L AUTHENTICATE PLAIN");
    second.send("+ \r\n").await;
    second.line().await;
    second.send("L OK [CAPABILITY IMAP4rev1] in\r\n").await;
    assert_eq!(client.line().await, "a OK [CAPABILITY IMAP4rev1] in");
}

#[tokio::test]
async fn login_command_is_sent_to_the_server_as_login() {
    // Exchange opens shared mailboxes only for LOGIN.
    let script = "S: * OK [CAPABILITY IMAP4rev1 SASL-IR AUTH=PLAIN] Exchange\nC: L LOGIN \"exch\\\\shared\" \"pw\"\n\
                  S: L OK [CAPABILITY IMAP4rev1] in\n...";
    let server = ScriptedServer::new(script).await;
    for (with, accepted) in [
        ("", true),
        (", login_with: automatic", true),
        (", login_with: login", true),
        (", login_with: as-client", true),
        (", login_with: plain", false),
    ] {
        let text =
            format!("backends: {{only: {{servers: ['{}']{with}}}}}\nroutes: [{{default: only}}]\n", server.address);
        let proxy = proxy(&text).await;
        let mut client = Client::connect(proxy.listeners()[0]).await;
        let answer = client.command("a LOGIN \"exch\\\\shared\" pw").await;
        assert_eq!(answer.starts_with("a OK"), accepted, "{with}: {answer}");
        if !accepted {
            assert!(answer.contains("AUTHENTICATE PLAIN"), "{answer}");
        }
    }
}

/// Returns how many logins a client can make in a row on a server with this answer, up to eight.
async fn attempts(answer: &str, more: &str) -> (usize, Running) {
    let server = ScriptedServer::new(&format!("S: * OK [CAPABILITY IMAP4rev1] x\nC: *\nS: {answer}")).await;
    let text = format!(
        "backends: {{only: {{servers: ['{}']{more}}}}}\nroutes: [{{default: only}}]\nlimits: {{failed_logins: 5}}\n",
        server.address
    );
    let proxy = proxy(&text).await;
    let mut client = Client::connect(proxy.listeners()[0]).await;
    for attempt in 1..=8 {
        if !client.command("a LOGIN alice guess").await.starts_with("a NO") {
            return (attempt - 1, proxy);
        }
    }
    (8, proxy)
}

#[tokio::test]
async fn every_refusal_except_outages_counts_as_a_failed_login() {
    let own = ", unavailable_texts: [The Store Is On Fire], limit_texts: quota of logins";
    for (answer, more, counted) in [
        ("L NO Server Unavailable. 15", "", false),
        ("L NO Too many open connections (5 of 5 for x)", "", false),
        ("L NO Temporary authentication failure", "", false),
        ("L NO [ALERT] Too many simultaneous connections. (Failure)", "", false),
        ("L NO Sorry, the store is on fire.", own, false),
        ("L NO Sorry, the store is on fire.", "", true),
        ("L NO [ALERT] QUOTA OF LOGINS reached", own, false),
        ("L NO [CONTACTADMIN] closed", "", false),
        ("L NO [ALERT] Invalid credentials (Failure)", "", true),
        ("L NO [CANNOT] x", "", true),
        ("L NO [NOPERM] Temporary authentication failure", "", true),
        ("L NO [X-UNKNOWN] x", "", true),
        ("L NO [EXPIRED] x", "", true),
        ("L NO x", "", true),
        ("* BYE [AUTHENTICATIONFAILED] x", "", true),
    ] {
        let (made, _proxy) = attempts(answer, more).await;
        assert_eq!(made, if counted { 5 } else { 8 }, "{answer} {more}");
    }
}

#[tokio::test]
async fn empty_password_is_refused_without_a_server() {
    let script = "S: * OK [CAPABILITY IMAP4rev1] x\nC: *\nS: L OK [CAPABILITY IMAP4rev1] in\n...";
    let server = ScriptedServer::new(script).await;
    let folder = tempfile::tempdir().unwrap();
    let users = folder.path().join("users");
    std::fs::write(&users, "alice strict\nbob lax\n").unwrap();
    let with = |lax: &str| {
        format!(
            "backends:\n  strict: {{servers: ['{0}']}}\n  lax: {{servers: ['{0}']{lax}}}\n\
             routes: [{{table: {1}}}]\n",
            server.address,
            users.display()
        )
    };
    let refused = "NO [AUTHENTICATIONFAILED] Authentication failed.";
    let strict = proxy(&with("")).await;
    let mut client = Client::connect(strict.listeners()[0]).await;
    for command in ["LOGIN alice \"\"", "LOGIN mallory \"\"", "AUTHENTICATE PLAIN AGFsaWNlAA==", "LOGIN bob \"\""] {
        assert_eq!(client.command(&format!("a {command}")).await, format!("a {refused}"), "{command}");
    }
    client.send("a AUTHENTICATE LOGIN\r\n").await;
    for said in ["YWxpY2U=", ""] {
        assert!(client.line().await.starts_with("+ "));
        client.send(format!("{said}\r\n")).await;
    }
    assert_eq!(client.line().await, format!("a {refused}"));
    assert_eq!(client.line().await, "* BYE Too many failed logins.", "they count as failed logins");
    assert_eq!((failures(&strict, "empty_password"), failures(&strict, "unknown_user")), (5.0, 0.0));
    assert_eq!(server.connections(), 0);
    // If one backend accepts them, all users are looked up, and an unknown user is refused like a known one.
    let lax = proxy(&with(", empty_password: allow")).await;
    let mut client = Client::connect(lax.listeners()[0]).await;
    assert_eq!(client.command("a LOGIN alice \"\"").await, format!("a {refused}"));
    assert_eq!(client.command("b LOGIN mallory \"\"").await, format!("b {refused}"));
    assert_eq!(server.connections(), 0);
    assert_eq!(client.command("c LOGIN bob \"\"").await, "c OK [CAPABILITY IMAP4rev1] in");
}

#[tokio::test]
async fn status_shows_the_servers_text_without_passwords() {
    let login = "S: * OK [CAPABILITY IMAP4rev1] x\nC: *\n";
    for (script, expected) in [
        (
            "S: * NO LOGOUT Intrusion prevention active for 10.0.0.1",
            "\"* NO LOGOUT Intrusion prevention active for 10.0.0.1\"",
        ),
        ("S: 220 host ESMTP \u{1b}[2J", "\"220 host ESMTP \\u{1b}[2J\""),
        ("S: * BYE Connection is closed. 13", "\"* BYE Connection is closed. 13\""),
        (&format!("{login}S: * BYE Shutting down"), "\"* BYE Shutting down\""),
        (
            &format!("{login}S: L NO [UNAVAILABLE] Database down for alice"),
            "\"L NO [UNAVAILABLE] Database down for (user)\"",
        ),
        (&format!("{login}S: L BAD Unknown: LOGIN \"alice\" \"wonderland\""), "(text withheld"),
        (&format!("{login}S: wonder \"alice\""), "(text withheld"),
        (&format!("{login}S: * BYE L LOGIN \"alice\" \"wonderl"), "(text withheld"),
    ] {
        let server = ScriptedServer::new(script).await;
        let text = format!("backends: {{only: {{servers: ['{}']}}}}\nroutes: [{{default: only}}]\n", server.address);
        let proxy = proxy(&text).await;
        let answer = Client::connect(proxy.listeners()[0]).await.command("a LOGIN alice wonderland").await;
        assert!(answer.starts_with("a NO [UNAVAILABLE]"), "{script}: {answer}");
        let status = serde_json::to_string(&operations(&proxy).status()).unwrap();
        let text = operations(&proxy).status().servers.remove(0).last_error.expect("a last error").text;
        assert!(text.contains(expected), "{script}: {text}");
        assert!(!status.contains("wonder"), "{script}: {status}");
    }
}

#[tokio::test]
async fn bye_in_answer_to_logins_opens_no_breaker() {
    let server = ScriptedServer::new("S: * OK [CAPABILITY IMAP4rev1] x\nC: *\nS: * BYE Go away").await;
    let text = format!("backends: {{only: {{servers: ['{}']}}}}\nroutes: [{{default: only}}]\n", server.address);
    let proxy: server::Running = proxy(&text).await;
    for _ in 0..4 {
        let mut client = Client::connect(proxy.listeners()[0]).await;
        assert_eq!(client.command("a LOGIN alice secret").await, "a NO [UNAVAILABLE] Go away");
    }
    assert_eq!(server.connections(), 4);
    assert_eq!(metric(&proxy, "vestibule_server_up", &[]), 1.0);
    assert_eq!(metric(&proxy, "vestibule_server_breaker", &[]), 0.0);
}

/// With `as-client` the client chooses the command, so it must not be able to mark a server without the command as failed.
#[tokio::test]
async fn unsupported_command_opens_no_breaker() {
    let server = ScriptedServer::new("S: * OK [CAPABILITY IMAP4rev1 LOGINDISABLED AUTH=PLAIN] x\n...").await;
    let text = format!(
        "backends: {{only: {{servers: ['{}'], login_with: as-client, breaker: {{failures: 1}}}}}}\n\
         routes: [{{default: only}}]\n",
        server.address
    );
    let proxy = proxy(&text).await;
    let mut client = Client::connect(proxy.listeners()[0]).await;
    let answer = client.command("a LOGIN alice secret").await;
    assert!(answer.starts_with("a NO [UNAVAILABLE]"), "{answer}");
    assert_eq!((failures(&proxy, "mechanism_unsupported"), metric(&proxy, "vestibule_server_up", &[])), (1.0, 1.0));
}

/// Many servers close the connection instead of refusing the login. Treating that as an outage would reveal that the user exists.
#[tokio::test]
async fn password_that_is_too_long_for_a_server_is_a_failed_login() {
    for (length, answer, counted) in [
        (4097, "", true),
        (4097, "\nS: * BYE Input buffer full, aborting", true),
        (4097, "\nS: L BAD Too long argument", true),
        (4096, "", false),
    ] {
        let server = ScriptedServer::new(&format!("S: * OK [CAPABILITY IMAP4rev1] x\nC: *{answer}")).await;
        let proxy = proxy(&format!(
            "backends: {{only: {{servers: ['{}']}}}}\nroutes: [{{domain: {{good.test: only}}}}]\n\
             limits: {{failed_logins: 5}}\n",
            server.address
        ))
        .await;
        let login = |user: &str| format!("a LOGIN {user} {{{length}+}}\r\n{}", "x".repeat(length));
        let unknown = Client::connect(proxy.listeners()[0]).await.command(&login("mallory@unknown.test")).await;
        let mut client = Client::connect(proxy.listeners()[0]).await;
        let mut made = 0;
        loop {
            let said = client.command(&login("alice@good.test")).await;
            if made == 8 || !said.starts_with("a NO") {
                break;
            }
            assert_eq!(said == unknown, counted, "{length} {answer}: {said}");
            made += 1;
        }
        assert_eq!(made, if counted { 5 } else { 8 }, "{length} {answer}");
        assert_eq!(metric(&proxy, "vestibule_server_up", &[]), 1.0);
    }
}

/// The server has processes for 16 logins, and sends no other greeting while these are pending.
#[tokio::test]
async fn missing_greeting_of_a_server_with_many_pending_logins_is_not_its_failure() {
    const LOGINS: usize = 16;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let logins = Arc::new(AtomicUsize::new(0));
    let counter = logins.clone();
    tokio::spawn(async move {
        let mut held = Vec::new();
        while let Ok((socket, _)) = listener.accept().await {
            let mut line = LineStream::new(socket);
            if held.len() < LOGINS {
                line.send("* OK [CAPABILITY IMAP4rev1] x\r\n").await;
                line.line().await;
                counter.fetch_add(1, Ordering::SeqCst);
            }
            held.push(line);
        }
    });
    let proxy = proxy(&format!(
        "backends: {{only: {{servers: ['{address}'], breaker: {{failures: 1}}}}}}\nroutes: [{{default: only}}]\n\
         limits: {{connect: 200ms, server_login: 8s}}\n",
    ))
    .await;
    let mut waiting = Vec::new();
    for number in 0..LOGINS {
        let mut client = Client::connect(proxy.listeners()[0]).await;
        client.send(format!("a LOGIN user{number} guess\r\n")).await;
        waiting.push(client);
    }
    eventually("logins at the server", || logins.load(Ordering::SeqCst) == LOGINS).await;
    let mut client = Client::connect(proxy.listeners()[0]).await;
    assert_eq!(client.command("a LOGIN alice secret").await, format!("a {UNAVAILABLE}"));
    assert_eq!(failures(&proxy, "overloaded"), 1.0);
    assert_eq!(metric(&proxy, "vestibule_server_up", &[]), 1.0);
    drop(waiting);
    // When these logins have ended, a missing greeting is a failure of the server again.
    let is_down = async {
        while metric(&proxy, "vestibule_server_up", &[]) == 1.0 {
            client = Client::connect(proxy.listeners()[0]).await;
            client.command("a LOGIN alice secret").await;
        }
    };
    with_timeout("the server's failure", is_down).await;
}
