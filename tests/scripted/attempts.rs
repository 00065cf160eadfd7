//! Tests of single login attempts: what is counted, what is kept during the delay of a refusal, and what a server receives.

use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use futures_util::FutureExt as _;
use tokio::net::TcpListener;
use vestibule::admin_state::AdminState;
use vestibule::server::Running;
use vestibule::session_registry::CancelReason;

use crate::registry::{
    ManualServer, OK, SCRAM, UNAVAILABLE, accept, answer, assert_alive, login, set_state, stuck_session, two_servers,
};
use crate::routes::{Service, json};
use crate::support::*;

fn failures(proxy: &Running, reason: &str) -> f64 {
    metric(proxy, "vestibule_failures_total", &[&format!("reason=\"{reason}\"")])
}

fn outcomes(proxy: &Running, outcome: &str) -> f64 {
    metric(proxy, "vestibule_logins_total", &[&format!("outcome=\"{outcome}\"")])
}

fn plain(mailbox: &str, user: &str, password: &str) -> String {
    format!("a AUTHENTICATE PLAIN {}", STANDARD.encode(format!("{mailbox}\0{user}\0{password}")))
}

#[tokio::test]
async fn failure_before_the_connection_to_a_server_is_counted_once() {
    // 192.0.2.1 is not an address of the test machine.
    let local = proxy(
        "backends: {only: {servers: ['127.0.0.1:1'], source_addresses: [192.0.2.1]}}\nroutes: [{default: only}]\n",
    )
    .await;
    assert_eq!(Client::connect(local.listeners()[0]).await.command("a LOGIN alice secret").await, UNAVAILABLE);
    assert_eq!((failures(&local, "local_ports"), outcomes(&local, "unavailable")), (1.0, 1.0));
    // The route needs a password, which SCRAM does not send.
    let text = format!(
        "{SCRAM}backends: {{only: {{servers: ['127.0.0.1:1']}}}}\n\
         routes: [{{http: {{url: 'http://127.0.0.1:1/', style: nginx-auth-http}}}}]\n"
    );
    let scram = start(&text).await;
    let first = STANDARD.encode("n,,n=alice,r=nonce");
    let mut client = Client::connect(scram.listeners()[0]).await;
    assert_eq!(client.command(&format!("a AUTHENTICATE SCRAM-SHA-256 {first}")).await, UNAVAILABLE);
    assert_eq!((failures(&scram, "mechanism_unsupported"), outcomes(&scram, "unavailable")), (1.0, 1.0));
    // A fault of a server is counted for the server, and not again for the login.
    let refused = proxy("backends: {only: {servers: ['127.0.0.1:1']}}\nroutes: [{default: only}]\n").await;
    assert_eq!(Client::connect(refused.listeners()[0]).await.command("a LOGIN alice secret").await, UNAVAILABLE);
    assert_eq!((failures(&refused, "connect"), outcomes(&refused, "unavailable")), (1.0, 1.0));
}

/// The first backend allows logins that the second does not allow.
#[tokio::test]
async fn referral_to_a_backend_that_does_not_allow_the_login_is_not_followed() {
    let (front, other) = (ManualServer::new().await, ManualServer::new().await);
    let service = Service::new(|request| match request.contains("confirmed") {
        true => json("{\"backend\": \"front\", \"password\": \"issued\"}"),
        false => json("{\"backend\": \"front\"}"),
    })
    .await;
    let route = format!("{{http: {{url: 'http://{}/', password: true, cache: off}}}}", service.address);
    let with = |allowed: &str| {
        format!(
            "backends:\n  front: {{servers: ['{}'], authzid: allow, empty_password: allow}}\n\
             \x20 other: {{servers: ['{}']{allowed}}}\nroutes: [{route}]\n",
            front.address(),
            other.address()
        )
    };
    let refer = async |proxy: &Running, command: &str| {
        let mut client = Client::connect(proxy.listeners()[0]).await;
        client.send(format!("{command}\r\n")).await;
        let mut server = LineStream::new(front.accept().await);
        server.send("* OK [CAPABILITY IMAP4rev1 SASL-IR AUTH=PLAIN] x\r\n").await;
        let sent = server.line().await;
        assert!(sent.starts_with("L LOGIN") || sent.starts_with("L AUTHENTICATE"), "{sent}");
        answer(&mut server, &format!("NO [REFERRAL imap://alice@{}/] there", other.address())).await;
        client
    };
    let strict = proxy(&with("")).await;
    let commands =
        [plain("bob", "alice", "secret"), "a LOGIN alice \"\"".to_owned(), "a LOGIN alice confirmed".to_owned()];
    for (refused, command) in commands.iter().enumerate() {
        let mut client = refer(&strict, command).await;
        assert_eq!(client.line().await, UNAVAILABLE, "{command}");
        assert!(!other.has_pending_connection().await, "{command}");
        assert_eq!(failures(&strict, "referral"), refused as f64 + 1.0);
    }
    let lenient = proxy(&with(", authzid: allow, empty_password: allow")).await;
    for (command, is_sent) in commands.iter().zip([true, true, false]) {
        let mut client = refer(&lenient, command).await;
        if is_sent {
            let mut server = LineStream::new(other.accept().await);
            server.send("* OK [CAPABILITY IMAP4rev1 SASL-IR AUTH=PLAIN] x\r\n").await;
            server.line().await;
            accept(&mut server).await;
            assert_eq!(client.line().await, OK, "{command}");
        } else {
            assert_eq!(client.line().await, UNAVAILABLE, "{command}");
            assert!(
                !other.has_pending_connection().await,
                "a password that a route issues is for the backend of the route only"
            );
        }
    }
}

/// A proxy whose server has refused a wrong password after six seconds, so that refusals without a server are delayed as long.
async fn slow_to_refuse(more: &str) -> Running {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let text = format!(
        "backends: {{only: {{servers: ['{}']}}}}\nroutes: [{{domain: {{good.test: only}}}}]\n{more}",
        listener.local_addr().unwrap()
    );
    let proxy = proxy(&text).await;
    let mut client = Client::connect(proxy.listeners()[0]).await;
    client.send("a LOGIN alice@good.test x\r\n").await;
    let mut server = LineStream::new(with_timeout("the proxy", listener.accept()).await.unwrap().0);
    server.send("* OK [CAPABILITY IMAP4rev1] x\r\n").await;
    server.line().await;
    // This is the latency of the server; the test does not wait for anything.
    tokio::time::sleep(Duration::from_secs(6)).await;
    answer(&mut server, "NO [AUTHENTICATIONFAILED] no").await;
    assert!(client.line().await.starts_with("a NO"));
    proxy
}

#[tokio::test]
async fn delayed_refusal_is_not_registered_and_ends_with_a_stop_and_when_shed() {
    for (command, reason) in [("a LOGIN unknown@bad.test x", "unknown_user"), ("a LOGIN \"\" x", "invalid_credentials")]
    {
        let proxy = slow_to_refuse("limits: {before_login: 1}\n").await;
        let mut client = Client::connect(proxy.listeners()[0]).await;
        client.send(format!("{command}\r\n")).await;
        eventually("the refusal", || failures(&proxy, reason) == 1.0).await;
        let began = Instant::now();
        assert!(proxy.sessions().of_user("unknown@bad.test").is_empty(), "the login has ended");
        // A new connection sheds this one.
        let mut next = Client::connect(proxy.listeners()[0]).await;
        assert!(client.line().await.starts_with("a NO [AUTHENTICATIONFAILED]"));
        assert!(client.line().await.starts_with("* BYE [UNAVAILABLE] "));
        next.send(format!("{command}\r\n")).await;
        eventually("the refusal", || failures(&proxy, reason) == 2.0).await;
        with_timeout("the stop", proxy.stop()).await;
        assert!(next.line().await.starts_with("a NO [AUTHENTICATIONFAILED]"));
        assert!(next.line().await.starts_with("* BYE"));
        assert!(began.elapsed() < Duration::from_secs(4), "{reason}: {:?}", began.elapsed());
    }
}

#[tokio::test]
async fn password_denied_by_an_auth_server_is_a_failed_login() {
    for wait in ["", "auth-wait: 1\r\n"] {
        let answer = format!("HTTP/1.1 200 OK\r\nauth-status: Invalid login\r\n{wait}content-length: 0\r\n\r\n");
        let service = Service::new(move |_| answer.clone()).await;
        let proxy = proxy(&format!(
            "backends: {{only: {{servers: ['127.0.0.1:1']}}}}\n\
             routes: [{{http: {{url: 'http://{}/', style: nginx-auth-http}}}}]\nlimits: {{failed_login_delay: 100ms}}\n",
            service.address
        ))
        .await;
        let mut client = Client::connect(proxy.listeners()[0]).await;
        let began = Instant::now();
        assert_eq!(client.command("a LOGIN alice wrong").await, "a NO [AUTHENTICATIONFAILED] Invalid login");
        let least = if wait.is_empty() { 80 } else { 1000 };
        assert!(began.elapsed() >= Duration::from_millis(least), "{:?}", began.elapsed());
        if wait.is_empty() {
            assert_eq!(client.line().await, "* BYE Authentication failed.");
            client.assert_closed().await;
        }
        assert_eq!(metric(&proxy, "vestibule_admission_entries", &["table=\"failed_logins\""]), 1.0, "{wait}");
    }
}

/// The server closes after BAD, and the TLS handshake of the second connection fails. The server has received the login before.
#[tokio::test]
async fn failed_handshake_after_a_reconnect_moves_no_user_of_user_hash() {
    let certificates = Certificates::new();
    let (one, other) = (ManualServer::new().await, ManualServer::new().await);
    let text = format!(
        "backends: {{pair: {{servers: ['{}', '{}'], tls: {{mode: starttls, ca: {}}}, breaker: {{failures: 1}}}}}}\n\
         routes: [{{default: pair}}]\n",
        one.address(),
        other.address(),
        certificates.path("ca.pem").display()
    );
    let proxy = proxy(&text).await;
    let backend = proxy.snapshot().backends.named("pair").unwrap().clone();
    let first = with_timeout("the order", backend.candidates("alice")).await[0].name.to_string();
    let (home, away) = if first == one.address().to_string() { (one, other) } else { (other, one) };
    let starttls = async || {
        let mut server = LineStream::new(home.accept().await);
        server.send("* OK [CAPABILITY IMAP4rev1 STARTTLS] x\r\n").await;
        let tag = server.line().await.split(' ').next().unwrap().to_owned();
        server.send(format!("{tag} OK begin\r\n")).await;
        server.into_parts().0
    };
    let mut client = Client::connect(proxy.listeners()[0]).await;
    client.send(format!("{}\r\n", plain("", "alice", "secret"))).await;
    let socket = starttls().await;
    let mut server =
        LineStream::new(with_timeout("a handshake", certificates.acceptor().accept(socket)).await.unwrap());
    let tag = server.line().await.split(' ').next().unwrap().to_owned();
    server.send(format!("* CAPABILITY IMAP4rev1 SASL-IR AUTH=PLAIN\r\n{tag} OK\r\n")).await;
    assert!(server.line().await.starts_with("L AUTHENTICATE PLAIN"));
    server.send("L BAD x\r\n").await;
    drop(server);
    drop(starttls().await);
    assert_eq!(client.line().await, UNAVAILABLE);
    assert!(!away.has_pending_connection().await, "all sessions of a user are on one server");
    assert_eq!(failures(&proxy, "tls"), 1.0);
    let up = ["backend=\"pair\"", &*format!("server=\"{}\"", home.address())];
    assert_eq!(metric(&proxy, "vestibule_server_up", &up), 1.0, "a client may have caused the fault");
}

#[tokio::test]
async fn queued_referral_avoids_a_server_drained_in_the_meantime() {
    let (front, there) = (ManualServer::new().await, ManualServer::new().await);
    let text = format!(
        "backends:\n  front: {{servers: ['{}']}}\n  there: {{servers: ['{}'], max_sessions: 1, queue: {{timeout: 60s}}}}\n\
         routes: [{{default: front}}]\n",
        front.address(),
        there.address()
    );
    let proxy = proxy(&text).await;
    let refer = async || {
        let client = login(&proxy).await;
        answer(&mut front.login().await, &format!("NO [REFERRAL imap://alice@{}/] there", there.address())).await;
        client
    };
    let mut session = (refer().await, there.login().await);
    accept(&mut session.1).await;
    assert_eq!(session.0.line().await, OK);
    let mut waiting = refer().await;
    eventually("the queue", || metric(&proxy, "vestibule_backend_queue_length", &[]) == 1.0).await;
    set_state(&proxy, &there, AdminState::Drain, None).await;
    drop(session);
    assert_eq!(waiting.line().await, UNAVAILABLE);
    assert!(!there.has_pending_connection().await);
}

#[tokio::test]
async fn first_message_of_an_exchange_is_charged_until_the_login_ends() {
    let server = ScriptedServer::new(
        "S: * OK [CAPABILITY IMAP4rev1 SASL-IR AUTH=XOAUTH2] x\nC: *\nS: +\nC: *\nS: + eyJ9\nC: *\n...",
    )
    .await;
    let text = format!("{SCRAM}backends: {{only: {{servers: ['{}']}}}}\nroutes: [{{default: only}}]\n", server.address);
    let proxy = start(&text).await;
    let memory = || metric(&proxy, "vestibule_before_login_memory_bytes", &[]);
    let token = STANDARD.encode(format!("user=alice\x01auth=Bearer {}\x01\x01", "t".repeat(40_000)));
    let mut client = Client::connect(proxy.listeners()[0]).await;
    assert_eq!(client.command(&format!("a AUTHENTICATE XOAUTH2 {token}")).await, "+ eyJ9");
    assert!(memory() >= 40_000.0, "{}", memory());
    client.send("\r\n").await;
    // The response has been sent to the server, which does not answer.
    eventually("the response", || proxy.sessions().of_user("alice").len() == 1).await;
    for _ in 0..20 {
        tokio::time::sleep(Duration::from_millis(10)).await;
        assert!(memory() >= 40_000.0, "{}", memory());
    }
}

#[tokio::test]
async fn server_given_less_than_limits_connect_stays_up() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let text = |server_login: &str| {
        format!(
            "backends: {{only: {{servers: ['{}'], tls: {{mode: implicit, insecure: true}}, breaker: {{failures: 1}}}}}}\n\
             routes: [{{default: only}}]\nlimits: {{connect: 1s, server_login: {server_login}}}\n",
            listener.local_addr().unwrap()
        )
    };
    for (server_login, up) in [("500ms", 1.0), ("30s", 0.0)] {
        let proxy = proxy(&text(server_login)).await;
        let answer = Client::connect(proxy.listeners()[0]).await.command("a LOGIN alice secret").await;
        assert_eq!(answer, UNAVAILABLE);
        assert_eq!((failures(&proxy, "tls"), metric(&proxy, "vestibule_server_up", &[])), (1.0, up), "{server_login}");
    }
}

#[tokio::test]
async fn login_accepted_late_gives_other_sessions_time_to_end() {
    let (proxy, first, other) = two_servers("limits: {server_login: 1s}\n").await;
    let handle = stuck_session(&proxy, &other);
    let mut client = login(&proxy).await;
    let mut server = first.login().await;
    accept(&mut server).await;
    eventually("the end of the other session", || handle.cancel_signal().reason().is_some()).await;
    // A session takes up to two seconds to close its connections.
    tokio::time::sleep(Duration::from_millis(1200)).await;
    drop(handle);
    assert_eq!(client.line().await, OK);
    assert_alive(&mut (client, server)).await;
    proxy.stop().await;
}

#[tokio::test]
async fn replaced_login_is_not_routed_again() {
    let front = ManualServer::new().await;
    let servers = [ManualServer::new().await, ManualServer::new().await, ManualServer::new().await];
    let names = servers.each_ref().map(|server| format!("'{}'", server.address())).join(", ");
    let text = format!(
        "backends: {{trio: {{servers: [{names}]}}, zfront: {{servers: ['{}']}}}}\nroutes: [{{default: zfront}}]\n",
        front.address()
    );
    let proxy = proxy(&text).await;
    let old = stuck_session(&proxy, &servers[2]);
    let refer = async |to: &ManualServer| {
        let client = login(&proxy).await;
        answer(&mut front.login().await, &format!("NO [REFERRAL imap://alice@{}/] there", to.address())).await;
        (client, to.login().await)
    };
    let (mut replaced, mut later) = (refer(&servers[0]).await, refer(&servers[1]).await);
    accept(&mut replaced.1).await;
    eventually("the first acceptance", || old.cancel_signal().reason() == Some(CancelReason::Replaced)).await;
    accept(&mut later.1).await;
    assert_eq!(replaced.0.line().await, UNAVAILABLE);
    replaced.1.assert_closed().await;
    assert!(!front.has_pending_connection().await, "the replaced login must not end the later one");
    assert_eq!(later.0.line().now_or_never(), None, "the old session has not ended");
    drop(old);
    assert_eq!(later.0.line().await, OK);
    assert_alive(&mut later).await;
    proxy.stop().await;
}

#[tokio::test]
async fn login_ended_by_a_stop_has_an_outcome() {
    let server = ManualServer::new().await;
    let proxy =
        proxy(&format!("backends: {{only: {{servers: ['{}']}}}}\nroutes: [{{default: only}}]\n", server.address()))
            .await;
    let mut client = login(&proxy).await;
    let _server = server.login().await;
    let ended = async {
        assert_eq!(client.line().await, "* BYE [UNAVAILABLE] Server shutting down, connect again.");
        client.assert_closed().await;
    };
    with_timeout("the stop", async { tokio::join!(ended, proxy.drain(std::future::pending())) }).await;
    assert_eq!((outcomes(&proxy, "abandoned"), failures(&proxy, "drain")), (1.0, 1.0));
}

#[tokio::test]
async fn invalid_names_count_for_the_rate_of_their_address() {
    let proxy = proxy(
        "backends: {only: {servers: ['127.0.0.1:1']}}\nroutes: [{default: only}]\nusers: {unicode: refuse}\n\
         limits: {login_rate_per_address: 2/1h, failed_logins: 100}\n",
    )
    .await;
    let mut client = Client::connect(proxy.listeners()[0]).await;
    let name = plain("", "zo\u{eb}", "x");
    for _ in 0..2 {
        assert!(client.command(&name).await.starts_with("a NO [AUTHENTICATIONFAILED]"));
    }
    assert_eq!(client.command(&name).await, "a NO [LIMIT] Too many logins from your address, wait a little.");
    assert_eq!((failures(&proxy, "name_refused"), failures(&proxy, "login_rate")), (2.0, 1.0));
}
