//! Limits of connections before login: their number and their memory.

use std::time::Duration;

use socket2::SockRef;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket};
use vestibule::server::Running;

use crate::support::*;

/// Starts a proxy and a server that accepts connections and never answers, so that logins stay pending.
async fn with_silent_server(limits: &str) -> (Running, TcpListener) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let text = format!(
        "backends: {{only: {{servers: ['{}']}}}}\nroutes: [{{default: only}}]\nlimits: {{{limits}}}\n",
        listener.local_addr().unwrap()
    );
    (proxy(&text).await, listener)
}

fn connections_before_login(proxy: &Running) -> f64 {
    metric(proxy, "vestibule_admission_entries", &["table=\"before_login\""])
}

fn memory(proxy: &Running) -> f64 {
    metric(proxy, "vestibule_before_login_memory_bytes", &[])
}

#[tokio::test]
async fn pending_logins_count_and_new_connections_beyond_the_limit_are_refused() {
    const LIMIT: u32 = 5;
    let (proxy, _server) = with_silent_server(&format!("before_login: {LIMIT}")).await;
    let mut logins = Vec::new();
    for _ in 0..LIMIT {
        let mut client = Client::connect(proxy.listeners()[0]).await;
        client.send("a LOGIN alice secret\r\n").await;
        logins.push(client);
    }
    eventually("the logins", || metric(&proxy, "vestibule_connections", &[]) == f64::from(LIMIT)).await;
    let mut refused = 0_u32;
    for _ in 0..20 {
        let mut client = Client::connect_only(proxy.listeners()[0]).await;
        let line = client.line().await;
        assert!(connections_before_login(&proxy) <= f64::from(LIMIT));
        // Until the proxy has read a login, its connection can be shed like a silent one.
        if line.starts_with("* OK") {
            client.send("a LOGIN alice secret\r\n").await;
            logins.push(client);
        } else {
            assert!(line.starts_with("* BYE [UNAVAILABLE] "), "{line}");
            client.assert_closed().await;
            refused += 1;
        }
    }
    assert!(refused >= 15, "{refused} refused");
    assert_eq!(metric(&proxy, "vestibule_connections_refused_total", &["reason=\"before_login\""]), f64::from(refused));
    eventually("the refused to be gone", || metric(&proxy, "vestibule_connections", &[]) == f64::from(LIMIT)).await;
    assert_eq!(connections_before_login(&proxy), f64::from(LIMIT), "the gauge counts all open connections");
    proxy.stop().await;
}

#[tokio::test]
async fn connection_can_be_shed_after_its_login_was_answered() {
    let server =
        ScriptedServer::new("S: * OK [CAPABILITY IMAP4rev1] x\nC: *\nS: L NO [AUTHENTICATIONFAILED] no\n...").await;
    let text = format!(
        "backends: {{only: {{servers: ['{}']}}}}\nroutes: [{{default: only}}]\nlimits: {{before_login: 1}}\n",
        server.address
    );
    let proxy = proxy(&text).await;
    let mut first = Client::connect(proxy.listeners()[0]).await;
    assert!(first.command("a LOGIN alice secret").await.starts_with("a NO"));
    let _second = Client::connect(proxy.listeners()[0]).await;
    assert!(first.line().await.starts_with("* BYE [UNAVAILABLE] "));
    proxy.stop().await;
}

#[tokio::test]
async fn login_that_waits_for_its_client_is_shed() {
    let server =
        ScriptedServer::new("S: * OK [CAPABILITY IMAP4rev1 SASL-IR AUTH=SCRAM-SHA-256] x\nC: *\nS: + cj14\nC: *\n...")
            .await;
    let text = format!(
        "backends: {{only: {{servers: ['{}'], check: {{kind: imap, interval: 1s}}}}}}\nroutes: [{{default: only}}]\n\
         limits: {{before_login: 1}}\n",
        server.address
    );
    let proxy = proxy(&text).await;
    let offered = async {
        loop {
            let mut client = Client::connect_only(proxy.listeners()[0]).await;
            if client.line().await.contains("AUTH=SCRAM-SHA-256") {
                return client;
            }
        }
    };
    let mut first = with_timeout("the offer", offered).await;
    let line = first.command("a AUTHENTICATE SCRAM-SHA-256 biwsbj1hbGljZSxyPXg=").await;
    assert_eq!(line, "+ cj14");
    let _second = Client::connect(proxy.listeners()[0]).await;
    assert!(first.line().await.starts_with("* BYE [UNAVAILABLE] "));
    proxy.stop().await;
}

/// Bytes that a client sends before the answer stay in the kernel's buffers, and are sent to the server after the answer.
#[tokio::test]
async fn client_is_not_read_during_its_login() {
    let (proxy, listener) = with_silent_server("before_login: 10").await;
    let mut client = Client::connect(proxy.listeners()[0]).await;
    client.send("a LOGIN alice secret\r\n").await;
    let mut server = LineStream::new(with_timeout("the connection to the server", listener.accept()).await.unwrap().0);
    let piece = vec![b'x'; 1 << 20];
    let mut written = 0;
    while let Ok(more) = tokio::time::timeout(Duration::from_millis(300), client.stream.write(&piece)).await {
        written += more.unwrap();
        assert!(written < 64 << 20, "{written} bytes taken");
    }
    assert_eq!(memory(&proxy), 0.0);
    server.send("* OK [CAPABILITY IMAP4rev1] x\r\n").await;
    server.line().await;
    server.send("L OK [CAPABILITY IMAP4rev1] in\r\n").await;
    let mut got = vec![0; written];
    with_timeout("the client's bytes", server.stream.read_exact(&mut got)).await.unwrap();
    assert!(got.iter().all(|byte| *byte == b'x'));
    proxy.stop().await;
}

/// A client that reads no reply and a balancer that sends no header are shed too.
#[tokio::test]
async fn connection_is_shed_while_it_waits_for_anything() {
    let text = "listeners: [{address: '127.0.0.1:0', tls: none}, {address: '127.0.0.1:0', tls: none, proxy_protocol: {from: \
                [127.0.0.1]}}]\nbackends: {a: {servers: ['192.0.2.1:143']}}\nroutes: [{default: a}]\nlimits: {before_login: 1, \
                login: 1h, proxy_header: 60s}\n";
    let proxy = start(text).await;
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(1024).unwrap();
    // Small segments keep the proxy's send buffer small, so that the kernel does not buffer all replies.
    SockRef::from(&socket).set_tcp_mss(536).unwrap();
    let mut unread = LineStream::new(socket.connect(proxy.listeners()[0]).await.unwrap());
    // It is counted before the next connection arrives.
    assert!(unread.line().await.starts_with("* OK"));
    unread.send(b"a CAPABILITY\r\n".repeat(990)).await;
    let mut next = Client::connect(proxy.listeners()[0]).await;
    assert!(next.command("a NOOP").await.starts_with("a OK"));
    let balancer = Client::connect_only(proxy.listeners()[1]).await;
    assert!(next.line().await.starts_with("* BYE "));
    let mut last = Client::connect(proxy.listeners()[0]).await;
    assert!(last.command("a NOOP").await.starts_with("a OK"));
    eventually("three shed connections", || metric(&proxy, "vestibule_failures_total", &["reason=\"shed\""]) == 3.0)
        .await;
    drop((unread, balancer));
    proxy.stop().await;
}

/// A command of the maximum size without its end.
fn unfinished_command() -> Vec<u8> {
    [&b"a LOGIN {65000+}\r\n"[..], &[b'u'; 65_000], b" ", &[b'p'; 90_000]].concat()
}

#[tokio::test]
async fn memory_is_limited_and_small_logins_succeed() {
    const BUDGET: f64 = 8_388_608.0;
    let server =
        ScriptedServer::new("S: * OK [CAPABILITY IMAP4rev1 LITERAL+] x\nC: *\nS: L OK [CAPABILITY IMAP4rev1] in\n...")
            .await;
    let text = format!(
        "backends: {{only: {{servers: ['{}']}}}}\nroutes: [{{default: only}}]\nlimits: {{before_login_memory: 8MiB}}\n",
        server.address
    );
    let proxy = proxy(&text).await;
    let (unfinished, mut flood) = (unfinished_command(), Vec::new());
    for round in 0..120 {
        let mut client = Client::connect(proxy.listeners()[0]).await;
        client.send(&unfinished).await;
        flood.push(client);
        assert!(memory(&proxy) <= BUDGET, "{} in round {round}", memory(&proxy));
        if round % 20 == 0 {
            let mut client = Client::connect(proxy.listeners()[0]).await;
            assert!(client.command("b LOGIN alice secret").await.starts_with("b OK"), "round {round}");
            // A password of 40 kB.
            let mut client = Client::connect(proxy.listeners()[0]).await;
            let password = "t".repeat(40_000);
            assert!(
                client.command(&format!("b LOGIN alice \"{password}\"")).await.starts_with("b OK"),
                "round {round}"
            );
        }
    }
    let shed = || metric(&proxy, "vestibule_failures_total", &["reason=\"shed_for_memory\""]);
    eventually("shed connections", || shed() > 60.0).await;
    drop(flood);
    eventually("the release of all memory", || memory(&proxy) == 0.0).await;
    proxy.stop().await;
}

#[tokio::test]
async fn pending_logins_are_charged_for_copies_of_their_credentials() {
    let (proxy, _server) = with_silent_server("before_login_memory: 8MiB").await;
    let login = format!("a LOGIN alice \"{}\"\r\n", "p".repeat(60_000));
    let mut clients = Vec::new();
    for round in 0..40 {
        let mut client = Client::connect(proxy.listeners()[0]).await;
        client.send(&login).await;
        clients.push(client);
        assert!(memory(&proxy) <= 8_388_608.0, "{} in round {round}", memory(&proxy));
    }
    let shed = || metric(&proxy, "vestibule_failures_total", &["reason=\"shed_for_memory\""]);
    eventually("connections shed for memory", || shed() >= 20.0).await;
    assert!(memory(&proxy) > 4_000_000.0, "{}", memory(&proxy));
    // Among equal connections the oldest is shed.
    assert!(clients[0].line().await.starts_with("* BYE [UNAVAILABLE] "));
    proxy.stop().await;
}

#[tokio::test]
async fn memory_of_tls_is_counted() {
    let certificates = Certificates::new();
    let text = format!(
        "listeners: [{{address: '127.0.0.1:0', tls: implicit}}]\n{}backends: {{a: {{servers: ['192.0.2.1:143']}}}}\n\
         routes: [{{default: a}}]\n",
        certificates.section(),
    );
    let proxy = start(&text).await;
    // A handshake message without an end.
    let mut handshake = Client::connect_only(proxy.listeners()[0]).await;
    for _ in 0..3 {
        handshake.send([&[22, 3, 1, 0x3f, 0xff, 1, 0, 0xff, 0xff][..], &[0; 0x3ffb]].concat()).await;
    }
    eventually("the handshake's memory", || memory(&proxy) > 20_000.0).await;
    drop(handshake);
    eventually("the release of the memory", || memory(&proxy) == 0.0).await;
    // An ordinary client uses none of the budget.
    let socket = tokio::net::TcpStream::connect(proxy.listeners()[0]).await.unwrap();
    let mut client = LineStream::new(certificates.encrypt(socket).await);
    client.line().await;
    assert!(client.command("a CAPABILITY").await.starts_with("* CAPABILITY"));
    assert_eq!(memory(&proxy), 0.0);
    // A record without its end.
    let (tls, _) = client.into_parts();
    let mut socket = LineStream::new(tls.into_inner().0);
    socket.send([&[23, 3, 3, 0x40, 0][..], &[0; 0x3f00]].concat()).await;
    eventually("the record's memory", || memory(&proxy) > 8_000.0).await;
    proxy.stop().await;
}

/// Before login rustls handles TLS. It buffers one answer, and accepts 32 requests in a row without data.
#[tokio::test]
async fn key_updates_before_login_are_answered_and_limited() {
    let certificates = Certificates::new();
    let text = format!(
        "listeners: [{{address: '127.0.0.1:0', tls: implicit}}]\n{}backends: {{a: {{servers: ['192.0.2.1:143']}}}}\n\
         routes: [{{default: a}}]\n",
        certificates.section(),
    );
    let proxy = start(&text).await;
    let socket = tokio::net::TcpStream::connect(proxy.listeners()[0]).await.unwrap();
    let mut client = LineStream::new(certificates.encrypt(socket).await);
    client.line().await;
    for _ in 0..100 {
        client.stream.get_mut().1.refresh_traffic_keys().unwrap();
        client.send("a NOOP\r\n").await;
    }
    for _ in 0..100 {
        assert!(client.line().await.starts_with("a OK"));
    }
    assert_eq!(memory(&proxy), 0.0);
    for _ in 0..40 {
        client.stream.get_mut().1.refresh_traffic_keys().unwrap();
    }
    // The connection may close during the write.
    let _ = client.stream.flush().await;
    client.assert_closed().await;
    proxy.stop().await;
}

/// A client sends hundreds of commands at once and reads no reply.
#[tokio::test]
async fn replies_to_a_client_that_does_not_read_are_bounded() {
    use vestibule::identity::Mechanisms;
    use vestibule::protocol::imap::capability::{Extensions, Transport};
    use vestibule::protocol::imap::prelogin::{Prelogin, PreloginSettings, PreloginStep};
    let policy = PreloginSettings {
        transport: Transport::Tls,
        max_line: 98_304,
        max_literal: 65_536,
        max_bad_commands: 3,
        max_failed_logins: 5,
        mechanisms: Mechanisms::PASSWORDS,
        certificate: None,
        extensions: Extensions::NONE,
        issuers: Vec::new().into(),
    };
    let mut dialogue = Prelogin::new(policy);
    dialogue.input(&b"a CAPABILITY\r\n".repeat(4096 / 14));
    let (mut out, mut sent) = (Vec::new(), 0);
    while !matches!(dialogue.step(&mut out), PreloginStep::NeedInput) {
        assert!(out.len() < 5000, "{}", out.len());
        sent += std::mem::take(&mut out).len();
    }
    assert!(sent + out.len() > 40_000, "{sent}");
}

#[tokio::test]
async fn connections_that_are_not_from_balancers_shed_no_client() {
    let text = "listeners: [{address: '127.0.0.1:0', tls: none}, {address: '127.0.0.1:0', tls: none, \
                proxy_protocol: {from: [10.9.9.9/32]}}]\nbackends: {only: {servers: ['127.0.0.1:1']}}\n\
                routes: [{default: only}]\nlimits: {before_login: 1}\n";
    let proxy = start(text).await;
    let mut client = Client::connect(proxy.listeners()[0]).await;
    for _ in 0..5 {
        Client::connect_only(proxy.listeners()[1]).await.assert_closed().await;
    }
    assert!(client.command("a NOOP").await.starts_with("a OK"));
    assert_eq!(metric(&proxy, "vestibule_failures_total", &["reason=\"proxy_header\""]), 5.0);
    proxy.stop().await;
}
