//! Shared parts of the scripted tests: the proxy in this process, scripted mailbox servers, a line-based client, certificates.

use std::future::Future;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, RootCertStore, ServerConfig};
use tokio_rustls::{TlsAcceptor, TlsConnector};
use vestibule::api::operations::Operations;
use vestibule::config;
use vestibule::server::{self, Running};

/// Time limit of every wait in the tests.
pub const TIMEOUT: Duration = Duration::from_secs(20);

/// Awaits `future`, and fails the test after [`TIMEOUT`].
pub async fn with_timeout<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(TIMEOUT, future).await.unwrap_or_else(|_| panic!("timed out: {what}"))
}

/// Starts the proxy with one plaintext listener and the given rest of the configuration.
pub async fn proxy(rest: &str) -> Running {
    let text = format!("listeners: [{{address: '127.0.0.1:0', tls: none}}]\n{rest}");
    start(&text).await
}

/// Starts the proxy with a complete configuration.
pub async fn start(text: &str) -> Running {
    let mut config = config::parse(Path::new("test.yaml"), text).unwrap_or_else(|report| panic!("{report}"));
    // Tests count the connections to scripted servers, so health checks run only if the test configures them.
    if !text.contains("check:") {
        config.backends.iter_mut().for_each(|backend| backend.balancing.check = None);
    }
    // Refusals are not delayed unless the test configures a delay.
    if !text.contains("failed_login_delay:") {
        config.admission.failed_login_delay = None;
    }
    server::start(config, Vec::new()).await.unwrap_or_else(|error| panic!("{error:#}"))
}

/// Returns the operators' operations on the proxy.
pub fn operations(proxy: &Running) -> Operations<'_> {
    Operations::new(proxy)
}

/// The sum of the samples of a metric whose labels contain all of `labels`.
pub fn metric(proxy: &Running, name: &str, labels: &[&str]) -> f64 {
    let text = proxy.metrics().render();
    let samples = text
        .lines()
        .filter(|line| line.split(['{', ' ']).next() == Some(name) && labels.iter().all(|label| line.contains(label)));
    samples.map(|line| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap()).sum()
}

/// Polls `condition` until it is true, for events of the proxy that have no other signal.
pub async fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    with_timeout(what, async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
}

/// A connection on which lines are sent and read.
pub struct LineStream<S> {
    pub stream: S,
    pending: Vec<u8>,
}

pub type Client = LineStream<TcpStream>;

impl LineStream<TcpStream> {
    /// Connects, and reads the greeting.
    pub async fn connect(address: SocketAddr) -> Self {
        let mut client = Self::connect_only(address).await;
        assert!(client.line().await.starts_with("* OK [CAPABILITY IMAP4rev1 "));
        client
    }

    /// Connects, and does not read the greeting.
    pub async fn connect_only(address: SocketAddr) -> Self {
        Self::new(with_timeout("a connection", TcpStream::connect(address)).await.unwrap())
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> LineStream<S> {
    pub fn new(stream: S) -> Self {
        Self { stream, pending: Vec::new() }
    }

    pub async fn send(&mut self, text: impl AsRef<[u8]>) {
        with_timeout("a write", async {
            self.stream.write_all(text.as_ref()).await?;
            self.stream.flush().await
        })
        .await
        .unwrap();
    }

    /// Sends to a peer that may have closed the connection.
    pub async fn try_send(&mut self, text: &str) -> std::io::Result<()> {
        with_timeout("a write", async {
            self.stream.write_all(text.as_bytes()).await?;
            self.stream.flush().await
        })
        .await
    }

    /// Reads one line without its line end. At the end of the stream, and on an error, the result is what is left: usually nothing.
    pub async fn line(&mut self) -> String {
        loop {
            if let Some(end) = self.pending.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.pending.drain(..=end).collect();
                return String::from_utf8_lossy(&line).trim_end().to_owned();
            }
            match with_timeout("a line", self.stream.read_buf(&mut self.pending)).await {
                Ok(0) | Err(_) => return String::from_utf8_lossy(&std::mem::take(&mut self.pending)).into_owned(),
                Ok(_) => {}
            }
        }
    }

    /// Reads exactly `length` bytes. Returns `None` if the stream ends before.
    pub async fn bytes(&mut self, length: usize) -> Option<Vec<u8>> {
        while self.pending.len() < length {
            match with_timeout("bytes", self.stream.read_buf(&mut self.pending)).await {
                Ok(0) | Err(_) => return None,
                Ok(_) => {}
            }
        }
        Some(self.pending.drain(..length).collect())
    }

    /// Sends a line, and returns the line that comes back.
    pub async fn command(&mut self, text: &str) -> String {
        self.send(format!("{text}\r\n")).await;
        self.line().await
    }

    /// Asserts that the peer closes the connection without sending anything more.
    pub async fn assert_closed(&mut self) {
        assert_eq!(self.line().await, "");
    }

    /// Returns the stream, and the bytes that were read from it but not consumed.
    pub fn into_parts(self) -> (S, Vec<u8>) {
        (self.stream, self.pending)
    }
}

/// A server that runs the same script on every connection. It sends `S: ` lines, and expects `C: ` lines; `C: *` accepts any line.
/// At the end of the script it closes the connection, or keeps it open without a word if the last line is `...`.
pub struct ScriptedServer {
    pub address: SocketAddr,
    connections: Arc<AtomicUsize>,
}

impl ScriptedServer {
    pub async fn new(script: &str) -> Self {
        Self::at(TcpListener::bind("127.0.0.1:0").await.unwrap(), script, None)
    }

    /// For tests that need the server's address in the script.
    pub fn on_listener(listener: TcpListener, script: &str) -> Self {
        Self::at(listener, script, None)
    }

    /// `!TLS` in the script performs a handshake as the server.
    pub async fn with_tls(script: &str, certificates: &Certificates) -> Self {
        Self::at(TcpListener::bind("127.0.0.1:0").await.unwrap(), script, Some(certificates.acceptor()))
    }

    fn at(listener: TcpListener, script: &str, acceptor: Option<TlsAcceptor>) -> Self {
        let address = listener.local_addr().unwrap();
        let connections = Arc::new(AtomicUsize::new(0));
        let counter = connections.clone();
        let script: Arc<Vec<String>> =
            Arc::new(script.lines().map(|line| line.trim().to_owned()).filter(|line| !line.is_empty()).collect());
        tokio::spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                counter.fetch_add(1, Ordering::SeqCst);
                tokio::spawn(serve(LineStream::new(socket), script.clone(), acceptor.clone()));
            }
        });
        Self { address, connections }
    }

    /// Number of connections accepted.
    pub fn connections(&self) -> usize {
        self.connections.load(Ordering::SeqCst)
    }
}

async fn serve(mut line: LineStream<TcpStream>, script: Arc<Vec<String>>, acceptor: Option<TlsAcceptor>) {
    let end = run_script(&mut line, &script).await;
    if let Some(acceptor) = acceptor.filter(|_| script.get(end).is_some_and(|step| step == "!TLS")) {
        let (socket, pending) = line.into_parts();
        assert!(pending.is_empty(), "the proxy sent bytes before the TLS handshake");
        if let Ok(tls) = acceptor.accept(socket).await {
            run_script(&mut LineStream::new(tls), &script[end + 1..]).await;
        }
    }
}

/// Runs the script up to its end or to `!TLS`, and returns the index at which it stopped.
async fn run_script<S: AsyncRead + AsyncWrite + Unpin>(line: &mut LineStream<S>, script: &[String]) -> usize {
    for (index, step) in script.iter().enumerate() {
        if step == "!TLS" {
            return index;
        }
        if step == "..." {
            // Until the proxy closes the connection.
            while !line.line().await.is_empty() {}
        } else if let Some(text) = step.strip_prefix("S: ") {
            line.send(format!("{text}\r\n")).await;
        } else if let Some(expected) = step.strip_prefix("C: ") {
            let received = line.line().await;
            if expected != "*" && received != expected {
                // The proxy relays or logs this text, so that it appears in the test's failing assertion.
                line.send(format!("* BYE script: expected {expected:?}, got {received:?}\r\n")).await;
                return script.len();
            }
        }
    }
    script.len()
}

/// A client connected to the proxy over TLS.
pub type TlsClient = LineStream<tokio_rustls::client::TlsStream<TcpStream>>;

/// Starts the proxy with a TLS listener, and returns it with both ends of an established session.
pub async fn tls_session(more: &str) -> (Running, TlsClient, Client) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let certificates = Certificates::new();
    let text = format!(
        "listeners: [{{address: '127.0.0.1:0', tls: implicit}}]\n{}backends: {{only: {{servers: ['{}']}}}}\n\
         routes: [{{default: only}}]\n{more}",
        certificates.section(),
        listener.local_addr().unwrap()
    );
    let proxy = start(&text).await;
    let socket = TcpStream::connect(proxy.listeners()[0]).await.unwrap();
    let mut client = LineStream::new(certificates.encrypt(socket).await);
    client.line().await;
    client.send("a LOGIN alice secret\r\n").await;
    let mut server = LineStream::new(listener.accept().await.unwrap().0);
    server.send("* OK [CAPABILITY IMAP4rev1] x\r\n").await;
    server.line().await;
    server.send("L OK [CAPABILITY IMAP4rev1] in\r\n").await;
    assert!(client.line().await.starts_with("a OK"));
    (proxy, client, server)
}

/// A script that accepts the login of alice and answers one command.
pub const ACCEPTS_ALICE: &str = r#"
    S: * OK [CAPABILITY IMAP4rev1] good
    C: L LOGIN "alice" "secret"
    S: L OK [CAPABILITY IMAP4rev1 IDLE] in
    C: *
    S: b OK relayed
    ...
"#;

/// A certificate authority, and a certificate for `localhost` and 127.0.0.1.
pub struct Certificates {
    pub folder: tempfile::TempDir,
    certificate: CertificateDer<'static>,
    key: PrivateKeyDer<'static>,
    ca: CertificateDer<'static>,
}

impl Certificates {
    pub fn new() -> Self {
        let mut authority = CertificateParams::new(Vec::new()).unwrap();
        authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        authority.distinguished_name.push(DnType::CommonName, "test authority");
        let authority = CertifiedIssuer::self_signed(authority, KeyPair::generate().unwrap()).unwrap();
        let key = KeyPair::generate().unwrap();
        let names = vec!["localhost".to_owned(), "127.0.0.1".to_owned()];
        let certificate = CertificateParams::new(names).unwrap().signed_by(&key, &authority).unwrap();
        let folder = tempfile::tempdir().unwrap();
        for (name, text) in
            [("ca.pem", authority.pem()), ("cert.pem", certificate.pem()), ("key.pem", key.serialize_pem())]
        {
            std::fs::write(folder.path().join(name), text).unwrap();
        }
        Self {
            certificate: certificate.der().clone(),
            key: PrivateKeyDer::try_from(key.serialize_der()).unwrap(),
            ca: authority.der().clone(),
            folder,
        }
    }

    /// Uses a given certificate and key. The test's clients trust `ca`; `ca.pem` contains `ca_pem`.
    pub fn with_certificate(
        certificate: CertificateDer<'static>,
        key: &KeyPair,
        ca: CertificateDer<'static>,
        ca_pem: &str,
    ) -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("ca.pem"), ca_pem).unwrap();
        Self { certificate, key: PrivateKeyDer::try_from(key.serialize_der()).unwrap(), ca, folder }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The `tls` section of a configuration with this certificate.
    pub fn section(&self) -> String {
        format!(
            "tls: {{certificates: [{{cert: {}, key: {}}}]}}\n",
            self.path("cert.pem").display(),
            self.path("key.pem").display()
        )
    }

    pub fn acceptor(&self) -> TlsAcceptor {
        let config = ServerConfig::builder().with_no_client_auth();
        let config = config.with_single_cert(vec![self.certificate.clone()], self.key.clone_key()).unwrap();
        TlsAcceptor::from(Arc::new(config))
    }

    /// Performs a TLS handshake as a client that verifies the proxy's certificate.
    pub async fn encrypt(&self, socket: TcpStream) -> tokio_rustls::client::TlsStream<TcpStream> {
        let mut roots = RootCertStore::empty();
        roots.add(self.ca.clone()).unwrap();
        let config = ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
        let connector = TlsConnector::from(Arc::new(config));
        with_timeout("a handshake", connector.connect(ServerName::try_from("localhost").unwrap(), socket))
            .await
            .unwrap()
    }
}
