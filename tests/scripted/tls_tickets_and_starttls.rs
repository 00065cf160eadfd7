//! TLS session tickets are bound to a policy, and state from before STARTTLS is discarded.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;

use tokio::net::TcpListener;
use tokio_rustls::rustls::pki_types::ServerName;
use tokio_rustls::rustls::{ClientConfig, ClientConnection, HandshakeKind, RootCertStore, Stream};

use crate::support::{Certificates, Client, LineStream, TIMEOUT, start, with_timeout};

/// Connects with a client that stores its tickets in `config`, and reads the greeting. Returns the kind of the handshake, and whether the
/// client could have sent early data.
fn handshake(config: &Arc<ClientConfig>, address: SocketAddr) -> (Option<HandshakeKind>, bool) {
    let mut socket = TcpStream::connect(address).unwrap();
    socket.set_read_timeout(Some(TIMEOUT)).unwrap();
    let mut connection = ClientConnection::new(config.clone(), ServerName::try_from("localhost").unwrap()).unwrap();
    let early = connection.early_data().is_some();
    let mut stream = Stream::new(&mut connection, &mut socket);
    let mut greeting = [0; 5];
    stream.read_exact(&mut greeting).unwrap();
    assert_eq!(&greeting, b"* OK ");
    stream.write_all(b"a LOGOUT\r\n").unwrap();
    // In TLS 1.3 the ticket arrives after the handshake.
    let mut rest = Vec::new();
    let _ = stream.read_to_end(&mut rest);
    (connection.handshake_kind(), early)
}

#[tokio::test]
async fn ticket_is_valid_only_for_its_policy_and_allows_no_early_data() {
    let certificates = Certificates::new();
    let ca = certificates.path("ca.pem");
    let proxy = start(&format!(
        "listeners:\n  - {{address: '127.0.0.1:0', tls: implicit}}\n\
         \x20 - {{address: '127.0.0.1:0', tls: implicit, client_certificates: {{ca: {}}}}}\n{}\
         backends: {{only: {{servers: ['127.0.0.1:1']}}}}\nroutes: [{{default: only}}]\n",
        ca.display(),
        certificates.section()
    ))
    .await;
    let (without_certificates, with_certificates) = (proxy.listeners()[0], proxy.listeners()[1]);
    let pem = std::fs::read(ca).unwrap();
    tokio::task::spawn_blocking(move || {
        let mut roots = RootCertStore::empty();
        roots.add(rustls_pemfile::certs(&mut &pem[..]).next().unwrap().unwrap()).unwrap();
        for version in [&tokio_rustls::rustls::version::TLS13, &tokio_rustls::rustls::version::TLS12] {
            let config = ClientConfig::builder_with_protocol_versions(&[version]).with_root_certificates(roots.clone());
            let mut config = config.with_no_client_auth();
            config.enable_early_data = true;
            let config = Arc::new(config);
            assert_eq!(handshake(&config, without_certificates), (Some(HandshakeKind::Full), false));
            assert_eq!(handshake(&config, without_certificates), (Some(HandshakeKind::Resumed), false), "{version:?}");
            // Every client of this listener must be asked for a certificate.
            assert_eq!(handshake(&config, with_certificates), (Some(HandshakeKind::Full), false), "{version:?}");
            assert_eq!(handshake(&config, with_certificates), (Some(HandshakeKind::Resumed), false), "{version:?}");
            assert_eq!(handshake(&config, without_certificates), (Some(HandshakeKind::Full), false), "{version:?}");
        }
    })
    .await
    .unwrap();
}

#[tokio::test]
async fn starttls_discards_earlier_state() {
    let certificates = Certificates::new();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let proxy = start(&format!(
        "listeners: [{{address: '127.0.0.1:0', tls: starttls}}]\n{}backends: {{only: {{servers: ['{}']}}}}\n\
         routes: [{{default: only}}]\nlimits: {{bad_commands: 3}}\n",
        certificates.section(),
        listener.local_addr().unwrap()
    ))
    .await;
    let mut client = Client::connect(proxy.listeners()[0]).await;
    client.send("a ID (\"name\" \"injected\")\r\n").await;
    assert!(client.line().await.starts_with("* ID "));
    assert!(client.line().await.starts_with("a OK"));
    for _ in 0..2 {
        assert!(client.command("b NONSENSE").await.starts_with("b BAD"));
    }
    assert!(client.command("c STARTTLS").await.starts_with("c OK"));
    let mut client = LineStream::new(certificates.encrypt(client.into_parts().0).await);
    // Together with those before STARTTLS they would be four.
    for _ in 0..2 {
        assert!(client.command("d NONSENSE").await.starts_with("d BAD"));
    }
    client.send("e LOGIN alice secret\r\n").await;
    let mut server = LineStream::new(with_timeout("the login", listener.accept()).await.unwrap().0);
    server.send("* OK [CAPABILITY IMAP4rev1 ID STARTTLS] x\r\n").await;
    let id = server.line().await;
    assert!(id.starts_with("I ID (\"x-session-id\" "), "{id}");
    assert_eq!(server.line().await, "L LOGIN \"alice\" \"secret\"");
    server.send("I OK\r\nL OK [CAPABILITY IMAP4rev1 STARTTLS LOGINDISABLED AUTH=PLAIN IDLE] in\r\n").await;
    assert_eq!(client.line().await, "e OK [CAPABILITY IMAP4rev1 IDLE] in", "no second STARTTLS is offered");
    // A second STARTTLS is left to the server to refuse, like every command after the login.
    client.send("f STARTTLS\r\n").await;
    assert_eq!(server.line().await, "f STARTTLS");
}
