//! Sessions that fall silent give up their task, and nobody notices.

use tokio::net::TcpListener;
use vestibule::server::Running;

use crate::support::*;

type Tls = Line<tokio_rustls::client::TlsStream<tokio::net::TcpStream>>;

/// The proxy, with TLS in front, and a logged-in session's two ends.
async fn session(more: &str) -> (Running, Tls, Client) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let certificates = Certificates::new();
    let text = format!(
        "listeners: [{{address: '127.0.0.1:0', tls: implicit}}]\n{}backends: {{only: {{servers: ['{}']}}}}\n\
         routes: [{{default: only}}]\n{more}",
        certificates.section(),
        listener.local_addr().unwrap()
    );
    let proxy = start(&text).await;
    let socket = tokio::net::TcpStream::connect(proxy.listeners()[0]).await.unwrap();
    let mut client = Line::new(certificates.encrypt(socket).await);
    client.line().await;
    client.send("a LOGIN alice secret\r\n").await;
    let mut server = Line::new(listener.accept().await.unwrap().0);
    server.send("* OK [CAPABILITY IMAP4rev1] x\r\n").await;
    server.line().await;
    server.send("L OK [CAPABILITY IMAP4rev1] in\r\n").await;
    assert!(client.line().await.starts_with("a OK"));
    (proxy, client, server)
}

async fn silence(proxy: &Running, sessions: f64) {
    eventually("silence", || metric(proxy, "vestibule_silent_sessions", &[]) == sessions).await;
}

#[tokio::test]
async fn a_silent_session_wakes_for_either_side() {
    let (proxy, mut client, mut server) = session("").await;
    silence(&proxy, 1.0).await;
    server.send("* 5 EXISTS\r\n").await;
    assert_eq!(client.line().await, "* 5 EXISTS");
    silence(&proxy, 1.0).await;
    client.send("b DONE\r\n").await;
    assert_eq!(server.line().await, "b DONE");
    silence(&proxy, 1.0).await;
    assert_eq!(metric(&proxy, "vestibule_backend_sessions", &[]), 1.0);
    drop(server);
    client.assert_closed().await;
    drop(client);
    silence(&proxy, 0.0).await;
    eventually("the end", || metric(&proxy, "vestibule_backend_sessions", &[]) == 0.0).await;
    assert_eq!(metric(&proxy, "vestibule_bytes_total", &["to_server"]), 8.0);
    proxy.stop().await;
}

#[tokio::test]
async fn a_stop_ends_silent_sessions_in_order() {
    let (proxy, mut client, mut server) = session("limits: {drain: 100ms}\n").await;
    silence(&proxy, 1.0).await;
    assert_eq!(in_time("the stop", proxy.drain(std::future::pending())).await, 1);
    // rustls tells an end without close_notify as an error, which `line` would take for an end too: this reads itself.
    let mut rest = Vec::new();
    let end = tokio::io::AsyncReadExt::read_to_end(&mut client.stream, &mut rest).await;
    assert_eq!(end.unwrap(), 0, "close_notify");
    server.assert_closed().await;
}
