//! Directories and policy services that send data without end.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use tokio::io::AsyncReadExt as _;

use crate::support::{Client, ScriptedServer, metric, start, with_timeout};

const UNAVAILABLE: &str = "a NO [UNAVAILABLE]";
/// Much less than the configured timeouts.
const SOON: Duration = Duration::from_secs(20);

/// Starts a service that runs each connection in a thread, because it may block the test's runtime.
fn service(serve: impl Fn(TcpStream) -> std::io::Result<()> + Send + Clone + 'static) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for socket in listener.incoming().flatten() {
            let serve = serve.clone();
            std::thread::spawn(move || serve(socket));
        }
    });
    address
}

/// Sends `bytes` repeatedly until the peer closes the connection, or for `limit`.
fn flood(mut socket: TcpStream, bytes: &[u8], limit: Duration) -> std::io::Result<()> {
    let (many, started) = (bytes.repeat(64 * 1024 / bytes.len()), Instant::now());
    while started.elapsed() < limit {
        socket.write_all(&many)?;
    }
    Ok(())
}

/// Accepts a PostgreSQL client and floods it with notices.
fn postgres(mut socket: TcpStream, limit: Duration) -> std::io::Result<()> {
    let mut length = [0; 4];
    socket.read_exact(&mut length)?;
    let mut startup = vec![0; u32::from_be_bytes(length) as usize - 4];
    socket.read_exact(&mut startup)?;
    let accepted = [b"R".as_slice(), &8_u32.to_be_bytes(), &0_u32.to_be_bytes()].concat();
    socket.write_all(&accepted)?;
    let fields = b"SDEBUG\0VDEBUG\0C00000\0Mx\0\0";
    let notice = [b"N".as_slice(), &(fields.len() as u32 + 4).to_be_bytes(), fields].concat();
    flood(socket, &notice, limit)
}

/// Reads a request and floods the client with informational responses.
fn http(socket: TcpStream) -> std::io::Result<()> {
    let mut lines = BufReader::new(socket.try_clone()?);
    let mut line = String::new();
    while lines.read_line(&mut line)? > 2 {
        line.clear();
    }
    flood(socket, b"HTTP/1.1 100 Continue\r\n\r\n", 6 * SOON)
}

/// Reads a search request and floods the client with entries.
fn ldap(mut socket: TcpStream) -> std::io::Result<()> {
    let mut request = [0; 4096];
    let read = socket.read(&mut request)?;
    assert!(read > 5 && request[2..4] == [2, 1], "a message with a short id");
    // A SearchResultEntry with a name and without attributes.
    let entry = [0x30, 11, 2, 1, request[4], 0x64, 6, 4, 2, b'o', b'=', 0x30, 0];
    flood(socket, &entry, 6 * SOON)
}

/// Checks that a login at a proxy with this configuration is answered with UNAVAILABLE, long before the timeouts in it.
async fn assert_login_is_unavailable(configuration: &str) {
    let proxy = start(configuration).await;
    let mut client = Client::connect(proxy.listeners()[0]).await;
    let answer = tokio::time::timeout(SOON, client.command("a LOGIN alice secret")).await.unwrap();
    assert!(answer.starts_with(UNAVAILABLE), "{answer}");
    proxy.stop().await;
}

#[tokio::test]
async fn database_that_floods_its_client_fails_only_its_lookups() {
    let database = service(|socket| postgres(socket, SOON / 2));
    let url = format!("postgres://v@{database}/d?sslmode=disable");
    let text = format!(
        "listeners: [{{address: '127.0.0.1:0', tls: none}}]\nadmin: {{address: '127.0.0.1:0'}}\n\
         backends: {{only: {{servers: ['127.0.0.1:1']}}}}\n\
         routes: [{{sql: {{url: '{url}', query: 'SELECT %{{user}} AS backend', timeout: 1s}}}}]\n"
    );
    let proxy = start(&text).await;
    for _ in 0..2 {
        let mut client = Client::connect(proxy.listeners()[0]).await;
        let answer = with_timeout("a refusal", client.command("a LOGIN alice secret")).await;
        assert!(answer.starts_with(UNAVAILABLE), "{answer}");
    }
    let mut admin = tokio::net::TcpStream::connect(proxy.admin().unwrap()).await.unwrap();
    tokio::io::AsyncWriteExt::write_all(&mut admin, b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        .await
        .unwrap();
    let mut health = String::new();
    with_timeout("the health", admin.read_to_string(&mut health)).await.unwrap();
    assert!(health.starts_with("HTTP/1.1 200"), "{health}");
    assert_eq!(metric(&proxy, "vestibule_route_failing", &[]), 1.0);
    with_timeout("the stop", proxy.stop()).await;
}

#[tokio::test]
async fn endless_informational_responses_fail_a_lookup() {
    let url = service(http);
    let text = format!(
        "listeners: [{{address: '127.0.0.1:0', tls: none}}]\nbackends: {{only: {{servers: ['127.0.0.1:1']}}}}\n\
         routes: [{{http: {{url: 'http://{url}/', timeout: 60s}}}}]\nlimits: {{lookup: 60s}}\n"
    );
    assert_login_is_unavailable(&text).await;
}

#[tokio::test]
async fn endless_informational_responses_fail_a_policy_request() {
    let (url, folder) = (service(http), tempfile::tempdir().unwrap());
    let nonce = folder.path().join("nonce");
    std::fs::write(&nonce, "0123456789abcdef").unwrap();
    let server = ScriptedServer::new("S: * OK [CAPABILITY IMAP4rev1] x\n...").await;
    let text = format!(
        "listeners: [{{address: '127.0.0.1:0', tls: none}}]\nbackends: {{only: {{servers: ['{}']}}}}\n\
         routes: [{{default: only}}]\npolicy: {{url: 'http://{url}/', nonce_file: {}, timeout: 30s, on_failure: deny}}\n",
        server.address,
        nonce.display()
    );
    assert_login_is_unavailable(&text).await;
}

#[tokio::test]
async fn second_entry_of_an_ldap_response_ends_the_lookup() {
    let url = service(ldap);
    let text = format!(
        "listeners: [{{address: '127.0.0.1:0', tls: none}}]\nbackends: {{only: {{servers: ['127.0.0.1:1']}}}}\n\
         routes: [{{ldap: {{url: 'ldap://{url}', base: 'o=x', filter: '(uid=%{{user}})', \
         attributes: {{backend: b}}, timeout: 60s}}}}]\nlimits: {{lookup: 60s}}\n"
    );
    assert_login_is_unavailable(&text).await;
}
