//! TLS towards servers: self-signed certificates, the warnings of `check`, and key update requests during a login.

use std::path::Path;

use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, KeyPair};
use tokio::io::AsyncWriteExt as _;
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::rustls::ConnectionCommon;
use vestibule::app::preflight;
use vestibule::snapshot::Snapshot;

use crate::support::{
    ACCEPTS_ALICE, Certificates, Client, LineStream, ScriptedServer, metric, proxy, start, with_timeout,
};

/// A self-signed certificate with CA:TRUE, like the one that `openssl req -x509` creates by default.
fn self_signed_authority(names: &[&str]) -> Certificates {
    let mut params = CertificateParams::new(names.iter().map(ToString::to_string).collect::<Vec<_>>()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, "localhost");
    let key = KeyPair::generate().unwrap();
    let certificate = params.self_signed(&key).unwrap();
    Certificates::with_certificate(certificate.der().clone(), &key, certificate.der().clone(), &certificate.pem())
}

#[tokio::test]
async fn self_signed_certificate_is_trusted_if_it_is_the_configured_ca() {
    for names in [&["localhost", "127.0.0.1"][..], &[]] {
        let certificates = self_signed_authority(names);
        let server = ScriptedServer::with_tls(&format!("!TLS\n{ACCEPTS_ALICE}"), &certificates).await;
        let (ca, other) = (certificates.path("ca.pem"), self_signed_authority(names));
        for (tls, accepted) in [
            (format!("ca: {}, server_name: localhost", ca.display()), true),
            (format!("ca: {}, server_name: mail.example.org", ca.display()), false),
            (format!("ca: {}, server_name: localhost", other.path("ca.pem").display()), false),
        ] {
            let proxy = proxy(&format!(
                "backends: {{only: {{servers: ['{}'], tls: {{mode: implicit, {tls}}}}}}}\nroutes: [{{default: only}}]\n",
                server.address
            ))
            .await;
            let mut client = Client::connect(proxy.listeners()[0]).await;
            let reply = client.command("a LOGIN alice secret").await;
            assert_eq!(reply.starts_with("a OK"), accepted, "{names:?} {tls}: {reply}");
            let failed = metric(&proxy, "vestibule_failures_total", &["reason=\"tls\""]);
            assert_eq!(failed, if accepted { 0.0 } else { 1.0 });
        }
    }
}

/// Warnings of `check` about the servers.
async fn warnings(tls: &str, servers: &str) -> Vec<String> {
    let text = format!(
        "listeners: [{{address: '127.0.0.1:0', tls: none}}]\n\
         backends:\n  only:\n    servers: [{servers}]\n    tls: {{{tls}}}\nroutes: [{{default: only}}]\n"
    );
    let config = vestibule::config::parse(Path::new("v.yaml"), &text).unwrap_or_else(|report| panic!("{report}"));
    let snapshot = Snapshot::build(config, None).unwrap_or_else(|report| panic!("{report}"));
    preflight::server_warnings(&snapshot).await.iter().map(ToString::to_string).collect()
}

#[tokio::test]
async fn check_warns_about_an_untrusted_certificate_and_prints_its_pin() {
    let (certificates, other) = (self_signed_authority(&["localhost", "127.0.0.1"]), Certificates::new());
    let implicit = ScriptedServer::with_tls("!TLS\n...", &certificates).await;
    let script = "S: * OK [CAPABILITY IMAP4rev1 STARTTLS] x\nC: S STARTTLS\nS: S OK go\n!TLS\n...";
    let starttls = ScriptedServer::with_tls(script, &certificates).await;
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let (ca, own) = (other.path("ca.pem"), certificates.path("ca.pem"));
    for (mode, server) in [("implicit", implicit.address), ("starttls", starttls.address)] {
        let servers = format!("'{closed}', '{server}'");
        let found = warnings(&format!("mode: {mode}, ca: {}", ca.display()), &servers).await;
        assert_eq!(found.len(), 1, "a server that cannot be reached is not reported: {found:?}");
        assert!(found[0].starts_with("v.yaml:4:"), "{found:?}");
        assert!(found[0].contains(&format!("backends.only.servers[1]: TLS with {server} fails")), "{found:?}");
        let pin = found[0].split("pin: \"").nth(1).unwrap().trim_end_matches('"');
        for trusted in [format!("pin: '{pin}'"), format!("ca: {}", own.display())] {
            let found = warnings(&format!("mode: {mode}, {trusted}"), &servers).await;
            assert_eq!(found, Vec::<String>::new(), "{trusted}");
        }
    }
}

/// The client requests key updates before and after LOGIN, and the server before and after its reply, in one write and in several.
#[tokio::test]
async fn key_update_requests_around_a_login_are_answered_on_both_sides() {
    for flushes in [false, true] {
        let certificates = Certificates::new();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let proxy = start(&format!(
            "listeners: [{{address: '127.0.0.1:0', tls: implicit}}]\n{}\
             backends: {{only: {{servers: ['{}'], tls: {{mode: implicit, ca: {}, server_name: localhost}}}}}}\n\
             routes: [{{default: only}}]\n",
            certificates.section(),
            listener.local_addr().unwrap(),
            certificates.path("ca.pem").display(),
        ))
        .await;
        let socket = TcpStream::connect(proxy.listeners()[0]).await.unwrap();
        let mut client = LineStream::new(certificates.encrypt(socket).await);
        client.line().await;
        request_key_update(client.stream.get_mut().1);
        if flushes {
            client.stream.flush().await.unwrap();
        }
        client.stream.write_all(b"a LOGIN alice secret\r\n").await.unwrap();
        request_key_update(client.stream.get_mut().1);
        client.send("b NOOP\r\n").await;
        let (socket, _) = with_timeout("a connection", listener.accept()).await.unwrap();
        let mut server =
            LineStream::new(with_timeout("a handshake", certificates.acceptor().accept(socket)).await.unwrap());
        server.send("* OK [CAPABILITY IMAP4rev1] x\r\n").await;
        assert_eq!(server.line().await, "L LOGIN \"alice\" \"secret\"");
        request_key_update(server.stream.get_mut().1);
        if flushes {
            server.stream.flush().await.unwrap();
        }
        server.stream.write_all(b"L OK [CAPABILITY IMAP4rev1] in\r\n").await.unwrap();
        request_key_update(server.stream.get_mut().1);
        server.send("* 1 EXISTS\r\n").await;
        assert!(client.line().await.starts_with("a OK"));
        assert_eq!(client.line().await, "* 1 EXISTS");
        assert_eq!(server.line().await, "b NOOP");
        server.send("b OK\r\n").await;
        assert_eq!(client.line().await, "b OK");
        // Requests after the login are answered too.
        request_key_update(client.stream.get_mut().1);
        client.send("c NOOP\r\n").await;
        assert_eq!(server.line().await, "c NOOP");
        request_key_update(server.stream.get_mut().1);
        server.send("c OK\r\n").await;
        assert_eq!(client.line().await, "c OK");
        proxy.stop().await;
    }
}

fn request_key_update<Data>(connection: &mut ConnectionCommon<Data>) {
    connection.refresh_traffic_keys().unwrap();
}
