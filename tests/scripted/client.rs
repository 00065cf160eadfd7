//! Clients with hostile or unusual behaviour.

use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use vestibule::server::Running;

use crate::support::{
    ACCEPTS_ALICE, Certificates, Client, LineStream, ScriptedServer, eventually, metric, proxy, start, tls_session,
    with_timeout,
};

async fn with_good_server(more: &str) -> (Running, ScriptedServer) {
    let server = ScriptedServer::new(ACCEPTS_ALICE).await;
    let text = format!("backends: {{only: {{servers: ['{}']}}}}\nroutes: [{{default: only}}]\n{more}", server.address);
    (proxy(&text).await, server)
}

fn failures(proxy: &Running, reason: &str) -> f64 {
    metric(proxy, "vestibule_failures_total", &[&format!("reason=\"{reason}\"")])
}

/// Starts a proxy with a STARTTLS and a TLS listener, and a server that accepts all logins.
async fn starttls(certificates: &Certificates, more: &str) -> (Running, ScriptedServer) {
    let server = ScriptedServer::new(ACCEPTS_ALICE).await;
    let text = format!(
        "listeners: [{{address: '127.0.0.1:0', tls: starttls}}, {{address: '127.0.0.1:0', tls: implicit}}]\n{}\
         backends: {{only: {{servers: ['{}']}}}}\nroutes: [{{default: only}}]\n{more}",
        certificates.section(),
        server.address
    );
    (start(&text).await, server)
}

#[tokio::test]
async fn commands_are_read_byte_by_byte_and_pipelined() {
    let (proxy, _server) = with_good_server("").await;
    let mut client = Client::connect(proxy.listeners()[0]).await;
    client.stream.set_nodelay(true).unwrap();
    for byte in b"a LOGIN {5+}\r\nalice {6+}\r\nsecret\r\n" {
        client.send([*byte]).await;
    }
    assert_eq!(client.line().await, "a OK [CAPABILITY IMAP4rev1 IDLE] in");
    let mut client = Client::connect(proxy.listeners()[0]).await;
    client.send("x NOOP\r\na LOGIN alice secret\r\nb NOOP\r\n").await;
    for expected in ["x OK NOOP completed.", "a OK [CAPABILITY IMAP4rev1 IDLE] in", "b OK relayed"] {
        assert_eq!(client.line().await, expected);
    }
}

#[tokio::test]
async fn login_succeeds_after_starttls() {
    let certificates = Certificates::new();
    let (proxy, _server) = starttls(&certificates, "").await;
    let mut client = Client::connect(proxy.listeners()[0]).await;
    assert!(
        client.command("a LOGIN alice {6}").await.starts_with("a NO [PRIVACYREQUIRED]"),
        "the literal is not requested"
    );
    assert!(client.command("b AUTHENTICATE PLAIN").await.starts_with("b NO [PRIVACYREQUIRED]"));
    assert_eq!(client.command("c STARTTLS").await, "c OK Begin TLS negotiation now.");
    let (socket, pending) = client.into_parts();
    assert!(pending.is_empty());
    let mut client = LineStream::new(certificates.encrypt(socket).await);
    // There is no greeting, the capabilities are new, and failed logins before TLS are not counted.
    assert_eq!(
        client.command("d CAPABILITY").await,
        "* CAPABILITY IMAP4rev1 SASL-IR LITERAL+ ID ENABLE AUTH=PLAIN AUTH=LOGIN"
    );
    client.line().await;
    assert_eq!(client.command("e STARTTLS").await, "e BAD TLS is already active.");
    assert_eq!(client.command("a LOGIN alice secret").await, "a OK [CAPABILITY IMAP4rev1 IDLE] in");
    assert_eq!(metric(&proxy, "vestibule_tls_handshake_seconds_count", &[]), 1.0);
}

#[tokio::test]
async fn commands_after_starttls_are_not_executed() {
    let certificates = Certificates::new();
    let (proxy, server) = starttls(&certificates, "").await;
    let mut client = Client::connect(proxy.listeners()[0]).await;
    client.send("a STARTTLS\r\nb LOGIN alice secret\r\n").await;
    client.assert_closed().await;
    eventually("the count", || failures(&proxy, "starttls_injection") == 1.0).await;
    assert_eq!(server.connections(), 0);
}

#[tokio::test]
async fn deadlines_before_login() {
    let certificates = Certificates::new();
    let (proxy, _server) = starttls(&certificates, "limits: {login: 1s, handshake: 1s}\n").await;
    // A client that sends nothing.
    let mut silent = Client::connect(proxy.listeners()[0]).await;
    // A client that keeps sending commands: the deadline is absolute.
    let mut slow = Client::connect(proxy.listeners()[0]).await;
    // A client that starts no handshake.
    let mut no_hello = Client::connect_only(proxy.listeners()[1]).await;
    let feeder = async {
        for tag in 0.. {
            if slow.stream.write_all(format!("t{tag} NOOP\r\n").as_bytes()).await.is_err() {
                break;
            }
            if slow.line().await.starts_with("* BYE") {
                break;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    with_timeout("the slow client's end", feeder).await;
    assert_eq!(silent.line().await, "* BYE Login took too long.");
    silent.assert_closed().await;
    no_hello.assert_closed().await;
    eventually("the counts", || failures(&proxy, "login_deadline") == 2.0 && failures(&proxy, "handshake") == 1.0)
        .await;
    assert_eq!(metric(&proxy, "vestibule_connections", &[]), 0.0);
}

#[tokio::test]
async fn other_protocols_and_unexpected_tls_are_refused() {
    let (proxy, _server) = with_good_server("").await;
    for (said, reason) in [
        ("GET / HTTP/1.1\r\nHost: x\r\n\r\n", "foreign_protocol"),
        ("EHLO mail.example.org\r\n", "foreign_protocol"),
        ("\x16\x03\x01\x02\x00\x01\x00\x01\x7c\x03\x03", "tls_on_plain_port"),
    ] {
        let before = failures(&proxy, reason);
        let mut client = Client::connect(proxy.listeners()[0]).await;
        client.send(said).await;
        client.assert_closed().await;
        eventually("the count", || failures(&proxy, reason) == before + 1.0).await;
    }
}

#[tokio::test]
async fn connections_beyond_the_limit_are_refused() {
    let (proxy, _server) = with_good_server("limits: {sessions: 2}\n").await;
    let first = Client::connect(proxy.listeners()[0]).await;
    let _second = Client::connect(proxy.listeners()[0]).await;
    let mut third = Client::connect_only(proxy.listeners()[0]).await;
    assert_eq!(third.line().await, "* BYE [UNAVAILABLE] Too many connections, try again later.");
    assert_eq!(metric(&proxy, "vestibule_connections_refused_total", &["reason=\"full\""]), 1.0);
    drop(first);
    eventually("a closed connection", || metric(&proxy, "vestibule_connections", &[]) == 1.0).await;
    Client::connect(proxy.listeners()[0]).await;
}

#[tokio::test]
async fn overlong_command_is_answered_before_its_end() {
    let (proxy, _server) = with_good_server("").await;
    let mut client = Client::connect(proxy.listeners()[0]).await;
    client.send("a LOGIN alice {65537+}\r\n").await;
    assert_eq!(client.line().await, "a BAD The literal is too long.");
    assert!(client.line().await.starts_with("* BYE"));
    // 64 KiB are allowed, for example for an OAuth token. The server refuses this password.
    let mut client = Client::connect(proxy.listeners()[0]).await;
    client.send([b"a LOGIN alice {65536+}\r\n", &[b'x'; 65536][..], b"\r\n"].concat()).await;
    assert!(client.line().await.starts_with("a NO "), "the server has answered");
}

#[tokio::test]
async fn client_that_resets_does_not_affect_others() {
    let (proxy, _server) = with_good_server("").await;
    for _ in 0..20 {
        let client = TcpStream::connect(proxy.listeners()[0]).await.unwrap();
        socket2::SockRef::from(&client).set_linger(Some(std::time::Duration::ZERO)).unwrap();
        drop(client);
    }
    let mut neighbour = Client::connect(proxy.listeners()[0]).await;
    assert!(neighbour.command("a LOGIN alice secret").await.starts_with("a OK"));
    eventually("the end of the other connections", || metric(&proxy, "vestibule_connections", &[]) == 1.0).await;
    proxy.stop().await;
}

#[tokio::test]
async fn half_close_delivers_the_last_response() {
    let (proxy, _server) = with_good_server("").await;
    let mut client = Client::connect(proxy.listeners()[0]).await;
    client.send("a LOGIN alice secret\r\nb LOGOUT\r\n").await;
    client.stream.shutdown().await.unwrap();
    assert!(client.line().await.starts_with("a OK"));
    assert_eq!(client.line().await, "b OK relayed");
    client.assert_closed().await;
    eventually("the end", || metric(&proxy, "vestibule_backend_sessions", &[]) == 0.0).await;
    assert_eq!(metric(&proxy, "vestibule_session_seconds_count", &[]), 1.0);
    let up = "b LOGOUT\r\n".len() as f64;
    assert_eq!(metric(&proxy, "vestibule_bytes_total", &["to_server"]), up);
}

#[tokio::test]
async fn megabytes_are_relayed_both_ways_to_a_slow_reader() {
    const SIZE: usize = 8 << 20;
    let (_proxy, client, server) = tls_session("").await;
    let pattern: Vec<u8> = (0..SIZE).map(|index| (index * 31 % 251) as u8).collect();
    let (client, _) = client.into_parts();
    let (server, _) = server.into_parts();
    let (mut client_read, mut client_write) = tokio::io::split(client);
    let (mut server_read, mut server_write) = server.into_split();
    let (mut down, mut up) = (Vec::new(), Vec::new());
    with_timeout("the transfers", async {
        tokio::join!(
            async {
                client_write.write_all(&pattern).await.unwrap();
                client_write.shutdown().await.unwrap();
            },
            async {
                server_write.write_all(&pattern).await.unwrap();
                server_write.shutdown().await.unwrap();
            },
            async {
                // Reads slowly: the proxy must not buffer the rest, and must not lose data.
                let mut buffer = [0; 1021];
                while let Ok(read @ 1..) = client_read.read(&mut buffer).await {
                    down.extend_from_slice(&buffer[..read]);
                    tokio::task::yield_now().await;
                }
            },
            async {
                server_read.read_to_end(&mut up).await.unwrap();
            },
        )
    })
    .await;
    assert!(down == pattern && up == pattern, "{} down, {} up", down.len(), up.len());
}

#[tokio::test]
async fn shutdown_sends_bye_before_login_and_waits_for_sessions() {
    let (proxy, _server) = with_good_server("limits: {drain: 30s}\n").await;
    let address = proxy.listeners()[0];
    let mut waiting = Client::connect(address).await;
    let mut relayed = Client::connect(address).await;
    relayed.command("a LOGIN alice secret").await;
    let metrics = proxy.metrics().clone();
    let stopping = tokio::spawn(async move { proxy.drain(std::future::pending()).await });
    assert_eq!(waiting.line().await, "* BYE [UNAVAILABLE] Server shutting down, connect again.");
    waiting.assert_closed().await;
    assert_eq!(relayed.command("b NOOP").await, "b OK relayed", "within the drain deadline");
    assert!(metrics.render().contains("vestibule_draining 1"));
    eventually("a closed port", || std::net::TcpStream::connect(address).is_err()).await;
    drop(relayed);
    assert_eq!(with_timeout("the stop", stopping).await.unwrap(), 0, "no session was closed");
}

#[tokio::test]
async fn drain_deadline_closes_sessions() {
    let (proxy, _server) = with_good_server("limits: {drain: 100ms}\n").await;
    let mut relayed = Client::connect(proxy.listeners()[0]).await;
    relayed.command("a LOGIN alice secret").await;
    assert_eq!(with_timeout("the stop", proxy.drain(std::future::pending())).await, 1);
    relayed.assert_closed().await;
}
