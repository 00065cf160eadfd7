//! PROXY headers from a load balancer, and those that are sent to servers.

use std::net::SocketAddr;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use vestibule::protocol::proxy_protocol::{ClientTlsInfo, Header, Origin, header_v1, header_v2, local_v2, parse};
use vestibule::server::Running;

use crate::support::{
    ACCEPTS_ALICE, Certificates, Client, LineStream, ScriptedServer, eventually, metric, start, with_timeout,
};

const CLIENT: &str = "192.0.2.7:4000";
const FRONT: &str = "198.51.100.2:993";

fn address(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

fn headers() -> [Vec<u8>; 2] {
    [header_v1(address(CLIENT), address(FRONT)), header_v2(address(CLIENT), address(FRONT), None)]
}

/// Starts a proxy with a plaintext, a STARTTLS and a TLS listener, which trust headers only from 127.0.0.1.
async fn proxy_behind_a_balancer(certificates: &Certificates, server: SocketAddr, more: &str) -> Running {
    let listener = |tls: &str| format!("{{address: '127.0.0.1:0', tls: {tls}, proxy_protocol: {{from: [127.0.0.1]}}}}");
    let listeners = ["none", "starttls", "implicit"].map(listener).join(", ");
    let section = certificates.section();
    start(&format!(
        "listeners: [{listeners}]\n{section}backends: {{only: {{servers: ['{server}'], client_info: proxy-v2}}}}\n\
         routes: [{{default: only}}]\n{more}"
    ))
    .await
}

fn refused(proxy: &Running) -> f64 {
    metric(proxy, "vestibule_failures_total", &["reason=\"proxy_header\""])
}

/// A server that returns the header it receives, and then accepts alice's login.
struct HeaderServer(TcpListener);

impl HeaderServer {
    async fn new() -> Self {
        Self(TcpListener::bind("127.0.0.1:0").await.unwrap())
    }

    fn address(&self) -> SocketAddr {
        self.0.local_addr().unwrap()
    }

    /// Accepts the next login and returns its header.
    async fn header(&self) -> Vec<u8> {
        let mut socket = with_timeout("a login", self.0.accept()).await.unwrap().0;
        let mut header = vec![0; 16];
        with_timeout("a header", socket.read_exact(&mut header)).await.unwrap();
        let fixed = header.len();
        header.resize(fixed + usize::from(header[15]), 0);
        with_timeout("a header", socket.read_exact(&mut header[fixed..])).await.unwrap();
        let mut line = LineStream::new(socket);
        line.send("* OK [CAPABILITY IMAP4rev1] x\r\n").await;
        assert_eq!(line.line().await, "L LOGIN \"alice\" \"secret\"");
        line.send("L OK [CAPABILITY IMAP4rev1] in\r\n").await;
        header
    }
}

async fn log_in<S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin>(client: &mut LineStream<S>) {
    client.send("a LOGIN alice secret\r\n").await;
    assert_eq!(client.line().await, "a OK [CAPABILITY IMAP4rev1] in");
}

/// Connects, and sends the header in two parts, split at `cut`.
async fn connect_with_header(address: SocketAddr, header: &[u8], cut: usize) -> TcpStream {
    let mut socket = TcpStream::connect(address).await.unwrap();
    socket.set_nodelay(true).unwrap();
    socket.write_all(&header[..cut]).await.unwrap();
    tokio::task::yield_now().await;
    socket.write_all(&header[cut..]).await.unwrap();
    socket
}

#[tokio::test]
async fn client_address_is_taken_from_the_header() {
    let certificates = Certificates::new();
    let server = HeaderServer::new().await;
    let proxy = proxy_behind_a_balancer(&certificates, server.address(), "").await;
    let named = Origin::Client { client: address(CLIENT), listener: address(FRONT) };
    for header in headers() {
        for cut in 0..header.len() {
            let mut client = Client::new(connect_with_header(proxy.listeners()[0], &header, cut).await);
            client.line().await;
            let (sent, ()) = tokio::join!(server.header(), log_in(&mut client));
            assert_eq!(parse(&sent), Ok(Some(Header { length: sent.len(), origin: named, tls: None })), "cut at {cut}");
        }
    }
    assert_eq!(refused(&proxy), 0.0);
}

#[tokio::test]
async fn tls_starts_immediately_after_the_header() {
    let certificates = Certificates::new();
    let server = HeaderServer::new().await;
    let proxy = proxy_behind_a_balancer(&certificates, server.address(), "").await;
    let named = Origin::Client { client: address(CLIENT), listener: address(FRONT) };
    for header in headers() {
        for (listener, cut) in [(2, 0), (2, 1), (2, 20), (1, 0), (1, 20)] {
            let mut socket = connect_with_header(proxy.listeners()[listener], &header, cut).await;
            if listener == 1 {
                let mut plain = LineStream::new(socket);
                plain.line().await;
                assert_eq!(plain.command("s STARTTLS").await, "s OK Begin TLS negotiation now.");
                socket = plain.into_parts().0;
            }
            let mut client = LineStream::new(certificates.encrypt(socket).await);
            if listener == 2 {
                client.line().await;
            }
            let (sent, ()) = tokio::join!(server.header(), log_in(&mut client));
            let header = parse(&sent).unwrap().unwrap();
            let tls =
                ClientTlsInfo { version: "TLSv1.3", server_name: Some("localhost"), alpn: false, certificate: false };
            assert_eq!((header.origin, header.tls), (named, Some(tls)), "listener {listener}, cut at {cut}");
        }
    }
}

#[tokio::test]
async fn tls_of_the_balancer_is_passed_on_to_the_server() {
    let certificates = Certificates::new();
    let server = HeaderServer::new().await;
    let proxy = proxy_behind_a_balancer(&certificates, server.address(), "").await;
    let tls = ClientTlsInfo { version: "TLSv1.2", server_name: Some("mail.test"), alpn: true, certificate: false };
    let header = header_v2(address(CLIENT), address(FRONT), Some(&tls));
    let mut client = Client::new(connect_with_header(proxy.listeners()[0], &header, 0).await);
    client.line().await;
    let (sent, ()) = tokio::join!(server.header(), log_in(&mut client));
    assert_eq!(sent, header, "the header is passed on unchanged");
}

#[tokio::test]
async fn missing_or_invalid_header_closes_the_connection_silently() {
    let certificates = Certificates::new();
    let proxy = proxy_behind_a_balancer(&certificates, address("127.0.0.1:1"), "limits: {proxy_header: 200ms}\n").await;
    let [line, binary] = headers();
    let mut spoilt = binary.clone();
    spoilt[12] = 0x31;
    for (number, input) in [
        &b"a LOGIN alice secret\r\n"[..],
        b"\x16\x03\x01\x02\x00\x01\x00\x01\x7c\x03\x03",
        b"PROXY TCP4 192.0.2.1 198.51.100.2 4000\r\n",
        &spoilt,
        // An incomplete header, which ends at the deadline.
        &line[..line.len() - 1],
        &binary[..binary.len() - 1],
        b"",
    ]
    .into_iter()
    .enumerate()
    {
        for listener in [0, 1, 2] {
            let before = refused(&proxy);
            let mut client = Client::connect_only(proxy.listeners()[listener]).await;
            client.send(input).await;
            client.assert_closed().await;
            eventually("the count", || refused(&proxy) == before + 1.0).await;
            assert!(proxy.metrics().render().contains("vestibule_connections"), "case {number}");
        }
    }
    // A peer that disconnects within the header is not waited for.
    let mut client = Client::connect_only(proxy.listeners()[0]).await;
    client.send(&binary[..20]).await;
    drop(client);
    eventually("the count", || refused(&proxy) == 22.0).await;
    assert_eq!(metric(&proxy, "vestibule_connections", &[]), 0.0);
}

#[tokio::test]
async fn header_from_an_untrusted_address_closes_the_connection() {
    let certificates = Certificates::new();
    let server = ScriptedServer::new(ACCEPTS_ALICE).await;
    let proxy = proxy_behind_a_balancer(&certificates, server.address, "").await;
    for said in [&headers()[1][..], b"a LOGIN alice secret\r\n"] {
        let before = refused(&proxy);
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.bind(address("127.0.0.2:0")).unwrap();
        let mut client = LineStream::new(socket.connect(proxy.listeners()[0]).await.unwrap());
        // The proxy may have closed the connection already.
        let _ = client.stream.write_all(said).await;
        client.assert_closed().await;
        eventually("the count", || refused(&proxy) == before + 1.0).await;
    }
    assert_eq!(server.connections(), 0);
    // A listener without the setting does not trust a header either, and closes the connection.
    let proxy = crate::support::proxy(&format!(
        "backends: {{only: {{servers: ['{}']}}}}\nroutes: [{{default: only}}]\n",
        server.address
    ))
    .await;
    let mut client = Client::connect(proxy.listeners()[0]).await;
    client.send(&headers()[0]).await;
    client.assert_closed().await;
}

#[tokio::test]
async fn health_check_by_a_balancer_is_not_a_failure() {
    let certificates = Certificates::new();
    let server = ScriptedServer::new("S: * OK [CAPABILITY IMAP4rev1] x\nC: *\n...").await;
    let proxy = proxy_behind_a_balancer(&certificates, server.address, "").await;
    let mut check = Client::connect_only(proxy.listeners()[0]).await;
    check.send(local_v2()).await;
    assert!(check.line().await.starts_with("* OK [CAPABILITY IMAP4rev1 "), "it is served like a client");
    assert!(check.command("a NOOP").await.starts_with("a OK"));
    drop(check);
    // On a TLS listener the health check ends before the handshake.
    let mut check = Client::connect_only(proxy.listeners()[2]).await;
    check.send(local_v2()).await;
    drop(check);
    eventually("the end", || metric(&proxy, "vestibule_connections", &[]) == 0.0).await;
    assert_eq!(metric(&proxy, "vestibule_failures_total", &[]), 0.0);
}

#[tokio::test]
async fn limits_apply_to_the_client_and_not_to_the_balancer() {
    let server = ScriptedServer::new(ACCEPTS_ALICE).await;
    let text = format!(
        "listeners: [{{address: '127.0.0.1:0', tls: none, proxy_protocol: {{from: [127.0.0.0/8]}}}}]\n\
         backends: {{only: {{servers: ['{}']}}}}\nroutes: [{{default: only}}]\n\
         limits: {{sessions_per_address: 1}}\naccess: {{deny: [203.0.113.0/24]}}\n",
        server.address
    );
    let proxy = start(&text).await;
    let mut open = Vec::new();
    for (client, greeted) in [("192.0.2.1", true), ("192.0.2.2", true), ("192.0.2.1", false), ("203.0.113.9", false)] {
        let mut line = LineStream::connect_only(proxy.listeners()[0]).await;
        line.send(format!("PROXY TCP4 {client} 198.51.100.1 4000 143\r\n")).await;
        assert_eq!(line.line().await.starts_with("* OK"), greeted, "{client}");
        open.push(line);
    }
    for reason in ["sessions_per_address", "denied"] {
        let label = format!("reason=\"{reason}\"");
        assert_eq!(metric(&proxy, "vestibule_connections_refused_total", &[&label]), 1.0, "{reason}");
    }
    proxy.stop().await;
}

#[tokio::test]
async fn balancer_that_connects_without_sending_is_not_a_failure() {
    let certificates = Certificates::new();
    let proxy = proxy_behind_a_balancer(&certificates, address("127.0.0.1:1"), "").await;
    for (number, listener) in proxy.listeners().into_iter().enumerate() {
        // One connection is closed, the other one reset, which HAProxy does.
        drop(TcpStream::connect(listener).await.unwrap());
        let reset = TcpStream::connect(listener).await.unwrap();
        socket2::SockRef::from(&reset).set_linger(Some(std::time::Duration::ZERO)).unwrap();
        drop(reset);
        let checks = || metric(&proxy, "vestibule_balancer_checks_total", &["kind=\"connect\""]);
        eventually("the checks", || checks() == 2.0 * (number + 1) as f64).await;
    }
    let mut check = Client::connect_only(proxy.listeners()[0]).await;
    check.send(local_v2()).await;
    check.line().await;
    assert_eq!(metric(&proxy, "vestibule_balancer_checks_total", &["kind=\"local\""]), 1.0);
    // An incomplete header is a failure.
    let mut broken = Client::connect_only(proxy.listeners()[0]).await;
    broken.send("PROXY TCP4").await;
    drop(broken);
    eventually("the failure", || refused(&proxy) == 1.0).await;
    assert_eq!(metric(&proxy, "vestibule_failures_total", &[]), 1.0);
}

#[tokio::test]
async fn unexpected_header_has_a_failure_reason() {
    let certificates = Certificates::new();
    let server = ScriptedServer::new(ACCEPTS_ALICE).await;
    let listeners =
        ["none", "starttls", "implicit"].map(|tls| format!("{{address: '127.0.0.1:0', tls: {tls}}}")).join(", ");
    let proxy = start(&format!(
        "listeners: [{listeners}]\n{}backends: {{only: {{servers: ['{}']}}}}\nroutes: [{{default: only}}]\n",
        certificates.section(),
        server.address
    ))
    .await;
    let mut expected = 0.0;
    let [line, binary] = headers();
    for (header, cuts) in [(line, &[0, 5, 8][..]), (binary, &[0])] {
        for (number, listener) in proxy.listeners().into_iter().enumerate() {
            for &cut in cuts {
                let mut client = Client::new(connect_with_header(listener, &header, cut).await);
                if number < 2 {
                    assert!(client.line().await.starts_with("* OK"));
                }
                while !client.line().await.is_empty() {}
                expected += 1.0;
                let named = || metric(&proxy, "vestibule_failures_total", &["reason=\"unexpected_proxy_header\""]);
                eventually("the reason", || named() == expected).await;
            }
        }
    }
    assert_eq!(metric(&proxy, "vestibule_failures_total", &[]), expected, "no other reason is counted");
    // A tag may be equal to the start of a header.
    let mut client = Client::connect(proxy.listeners()[0]).await;
    assert_eq!(client.command("PROXY NOOP").await, "PROXY OK NOOP completed.");
    log_in_good(&mut client).await;
}

async fn log_in_good(client: &mut Client) {
    assert_eq!(client.command("a LOGIN alice secret").await, "a OK [CAPABILITY IMAP4rev1 IDLE] in");
}
