//! Handshakes over loopback with a client of rustls that notes what it is shown.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use rcgen::{CertificateParams, CertifiedIssuer, KeyPair, PKCS_ECDSA_P256_SHA256, PKCS_RSA_SHA256, SerialNumber};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use tokio_rustls::rustls::version::TLS12;
use tokio_rustls::rustls::{
    ClientConfig, DigitallySignedStruct, Error, HandshakeKind, SignatureScheme, SupportedProtocolVersion,
};

use super::super::ocsp;
use super::*;
use crate::config;
use crate::metrics::Names;

mod files;
mod tickets;

const EVERY: &[SignatureScheme] = &[SignatureScheme::ECDSA_NISTP256_SHA256, SignatureScheme::RSA_PSS_SHA256];

/// A folder of certificates.
struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// `name.pem` and `name-key.pem`, signed by itself; the certificate.
    fn certificate(&self, name: &str, names: &[&str], serial: u64, rsa: bool) -> CertificateDer<'static> {
        let algorithm = if rsa { &PKCS_RSA_SHA256 } else { &PKCS_ECDSA_P256_SHA256 };
        let key = KeyPair::generate_for(algorithm).unwrap();
        let mut params = CertificateParams::new(names.iter().map(ToString::to_string).collect::<Vec<_>>()).unwrap();
        params.serial_number = Some(SerialNumber::from(serial));
        let certificate = params.self_signed(&key).unwrap();
        fs::write(self.path(&format!("{name}-key.pem")), key.serialize_pem()).unwrap();
        fs::write(self.path(&format!("{name}.pem")), certificate.pem()).unwrap();
        certificate.der().clone()
    }

    fn secret(&self, name: &str, from: u8) {
        fs::write(self.path(name), (from..from + 32).collect::<Vec<u8>>()).unwrap();
        fs::set_permissions(self.path(name), fs::Permissions::from_mode(0o600)).unwrap();
    }

    fn config(&self, listeners: &[&str], certificates: &[&str], more: &str) -> Config {
        let listeners: String = listeners
            .iter()
            .map(|more| format!("  - {{address: '127.0.0.1:0', tls: implicit, {more}}}\n"))
            .collect::<String>();
        let certificates: Vec<String> = certificates
            .iter()
            .map(|certificate| {
                let (name, more) = certificate.split_once(", ").unwrap_or((certificate, ""));
                format!("{{cert: {name}.pem, key: {name}-key.pem, {more}}}")
            })
            .collect();
        let text = format!(
            "listeners:\n{listeners}tls: {{certificates: [{}], {more}}}\n\
             backends: {{a: {{servers: ['192.0.2.1:143']}}}}\nroutes: [{{default: a}}]\n",
            certificates.join(", "),
        );
        config::parse(&self.path("v.yaml"), &text).unwrap_or_else(|report| panic!("{report}"))
    }

    fn build(&self, listeners: &[&str], certificates: &[&str], more: &str) -> DownstreamTls {
        built(DownstreamTls::build(&self.config(listeners, certificates, more), None))
    }
}

#[track_caller]
fn built(result: Result<Option<DownstreamTls>, Vec<Problem>>) -> DownstreamTls {
    result.unwrap_or_else(|problems| panic!("{problems:?}")).unwrap()
}

fn metrics() -> Metrics {
    Metrics::new(&Names::default())
}

/// Believes everybody, and notes what it was shown.
#[derive(Debug)]
struct Noting {
    schemes: Vec<SignatureScheme>,
    shown: Mutex<Option<ListenerAcceptor>>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct ListenerAcceptor {
    certificate: CertificateDer<'static>,
    response: Vec<u8>,
}

impl ServerCertVerifier for Noting {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        response: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let certificate = certificate.clone().into_owned();
        *self.shown.lock().unwrap() = Some(ListenerAcceptor { certificate, response: response.to_vec() });
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.schemes.clone()
    }
}

struct Client {
    noting: Arc<Noting>,
    config: ClientConfig,
}

impl Client {
    fn new(schemes: &[SignatureScheme], versions: &[&'static SupportedProtocolVersion]) -> Self {
        let noting = Arc::new(Noting { schemes: schemes.to_vec(), shown: Mutex::new(None) });
        let builder = ClientConfig::builder_with_provider(provider()).with_protocol_versions(versions).unwrap();
        let config = builder.dangerous().with_custom_certificate_verifier(noting.clone()).with_no_client_auth();
        Self { noting, config }
    }

    /// All of TLS that there is.
    fn able() -> Self {
        Self::new(EVERY, &[&TLS13, &TLS12])
    }

    /// Connects and reads a byte, behind which the ticket has come too. How the handshake went, or how it failed.
    async fn connect(&self, tls: &DownstreamTls, listener: usize, name: &str) -> Result<HandshakeKind, std::io::Error> {
        let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let server = async {
            let (accepted, _) = socket.accept().await.unwrap();
            let mut stream =
                tls.accept(listener, accepted, Arc::default(), None).await.map_err(std::io::Error::other)?;
            stream.write_all(b"*").await?;
            stream.shutdown().await?;
            // Until the client has gone: its end must not overtake what was sent.
            let _ = stream.read(&mut [0]).await;
            std::io::Result::Ok(())
        };
        let client = async {
            let socket = TcpStream::connect(socket.local_addr().unwrap()).await?;
            let name = ServerName::try_from(name.to_owned()).unwrap();
            let mut stream = TlsConnector::from(Arc::new(self.config.clone())).connect(name, socket).await?;
            stream.read_exact(&mut [0]).await?;
            Ok(stream.get_ref().1.handshake_kind().unwrap())
        };
        let (server, client) = tokio::join!(server, client);
        if client.is_ok() {
            server?;
        }
        client
    }

    /// A full handshake; what was shown in it.
    async fn shown(&self, tls: &DownstreamTls, name: &str) -> ListenerAcceptor {
        let fresh = Self { noting: self.noting.clone(), config: self.fresh() };
        fresh.connect(tls, 0, name).await.unwrap();
        self.noting.shown.lock().unwrap().take().expect("a full handshake")
    }

    /// Without tickets.
    fn fresh(&self) -> ClientConfig {
        let mut config = self.config.clone();
        config.resumption = tokio_rustls::rustls::client::Resumption::disabled();
        config
    }

    fn with_certificate(mut self, issuer: &CertifiedIssuer<'_, KeyPair>) -> Self {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(["alice.test".to_owned()]).unwrap();
        let chain = vec![params.signed_by(&key, issuer).unwrap().der().clone()];
        let key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
        let builder =
            ClientConfig::builder_with_provider(provider()).with_protocol_versions(&[&TLS13, &TLS12]).unwrap();
        let builder = builder.dangerous().with_custom_certificate_verifier(self.noting.clone());
        self.config = builder.with_client_auth_cert(chain, key).unwrap();
        self
    }
}

fn authority(path: &Path) -> CertifiedIssuer<'static, KeyPair> {
    let mut params = CertificateParams::default();
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
    fs::write(path, issuer.pem()).unwrap();
    issuer
}

#[tokio::test]
async fn a_client_is_shown_the_certificate_that_it_can_check() {
    let folder = Folder::new();
    let rsa = folder.certificate("rsa", &["localhost", "*.mail.test"], 1, true);
    let curve = folder.certificate("curve", &["localhost", "mail.test"], 2, false);
    let wild = folder.certificate("wild", &["*.mail.test", "only.test"], 3, false);
    let tls = folder.build(&["sni: any"], &["rsa", "curve", "wild"], "");
    for versions in [&[&TLS13][..], &[&TLS12]] {
        let both = Client::new(EVERY, versions);
        let only_rsa = Client::new(&[SignatureScheme::RSA_PSS_SHA256], versions);
        let only_curves = Client::new(&[SignatureScheme::ECDSA_NISTP256_SHA256], versions);
        for (name, by_both, by_rsa, by_curves) in [
            ("localhost", &curve, Some(&rsa), &curve),
            ("LOCALHOST", &curve, Some(&rsa), &curve),
            ("a.mail.test", &wild, Some(&rsa), &wild),
            // SNI cannot contain an address: the first certificate is used, or its sibling.
            ("127.0.0.1", &curve, Some(&rsa), &curve),
            ("unknown.test", &curve, Some(&rsa), &curve),
            ("a.b.mail.test", &curve, Some(&rsa), &curve),
            ("only.test", &wild, None, &wild),
        ] {
            assert_eq!(both.shown(&tls, name).await.certificate, *by_both, "{name}");
            assert_eq!(only_curves.shown(&tls, name).await.certificate, *by_curves, "{name}");
            match by_rsa {
                Some(expected) => assert_eq!(only_rsa.shown(&tls, name).await.certificate, *expected, "{name}"),
                None => assert!(only_rsa.connect(&tls, 0, name).await.is_err(), "{name}"),
            }
        }
    }
}

#[tokio::test]
async fn strict_sni_refuses_who_asks_for_nobody_we_know() {
    let folder = Folder::new();
    folder.certificate("a", &["localhost", "*.mail.test"], 1, false);
    let tls = folder.build(&["sni: strict", "sni: any"], &["a"], "");
    for versions in [&[&TLS13][..], &[&TLS12]] {
        let client = Client::new(EVERY, versions);
        for name in ["localhost", "LocalHost", "a.mail.test"] {
            client.connect(&tls, 0, name).await.unwrap();
            assert_eq!(client.connect(&tls, 0, name).await.unwrap(), HandshakeKind::Resumed);
        }
        for name in ["unknown.test", "a.b.mail.test", "127.0.0.1"] {
            client.connect(&tls, 1, name).await.unwrap();
            let error = client.connect(&tls, 0, name).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidData, "{name}");
            assert!(error.to_string().contains("UnrecognisedName"), "{name}: {error}");
        }
    }
}

#[tokio::test]
async fn alpn_that_offers_other_protocols_only_is_refused() {
    let folder = Folder::new();
    folder.certificate("a", &["localhost"], 1, false);
    let tls = folder.build(&["sni: any", "sni: strict"], &["a"], "");
    let offering = |names: &[&str]| {
        let mut client = Client::able();
        client.config.alpn_protocols = names.iter().map(|name| name.as_bytes().to_vec()).collect();
        client
    };
    for listener in [0, 1] {
        for names in [&[][..], &["imap"], &["h2", "imap"]] {
            offering(names).connect(&tls, listener, "localhost").await.unwrap();
        }
        for names in [&["h2", "http/1.1"][..], &["IMAP"], &["pop3"]] {
            let error = offering(names).connect(&tls, listener, "localhost").await.unwrap_err();
            assert!(error.to_string().contains("NoApplicationProtocol"), "{error}");
        }
    }
}

#[tokio::test]
async fn a_renewed_certificate_is_shown_and_a_bad_one_is_not() {
    let folder = Folder::new();
    let old = folder.certificate("a", &["localhost"], 1, false);
    let tls = folder.build(&["sni: any"], &["a"], "");
    let (metrics, client) = (metrics(), Client::able());
    tls.certificates.publish(&metrics);
    let look = || (0..2).for_each(|_| tls.certificates.check_files(&metrics, now()));
    let failed = || {
        let label = folder.path("a.pem").display().to_string();
        let text = metrics.render();
        let value =
            text.split_once(&format!("vestibule_certificate_load_failed{{certificate=\"{label}\"}} ")).unwrap().1;
        value.starts_with('1')
    };
    assert!(!failed());

    let key = fs::read(folder.path("a-key.pem")).unwrap();
    let renewed = folder.certificate("a", &["localhost"], 2, false);
    let new_key = fs::read(folder.path("a-key.pem")).unwrap();
    // The certificate is there, its key is not yet.
    fs::write(folder.path("a-key.pem"), &key).unwrap();
    look();
    assert!(failed());
    assert_eq!(client.shown(&tls, "localhost").await.certificate, old);
    fs::write(folder.path("a-key.pem"), &new_key).unwrap();
    look();
    assert!(!failed());
    assert_eq!(client.shown(&tls, "localhost").await.certificate, renewed);

    for (name, content) in [("a.pem", &b"-----BEGIN CERTIFICATE-----\nMII"[..]), ("a.pem", b""), ("a-key.pem", b"x")] {
        let good = fs::read(folder.path(name)).unwrap();
        fs::write(folder.path(name), content).unwrap();
        look();
        assert!(failed(), "{name}");
        assert_eq!(client.shown(&tls, "localhost").await.certificate, renewed);
        fs::write(folder.path(name), good).unwrap();
        look();
        assert!(!failed(), "{name}");
    }
    fs::remove_file(folder.path("a.pem")).unwrap();
    look();
    assert!(failed());
    assert_eq!(client.shown(&tls, "localhost").await.certificate, renewed);
}

#[tokio::test]
async fn an_ocsp_response_is_shown_while_it_fits() {
    let folder = Folder::new();
    let other = folder.certificate("b", &["b.test"], 9, false);
    let certificate = folder.certificate("a", &["localhost"], 77, false);
    let respond = |serial: u8, until: &str| ocsp::tests::response(&[serial], 0, Some(until));
    let good = respond(77, "20990101000000Z");
    fs::write(folder.path("ocsp.der"), &good).unwrap();
    let tls = folder.build(&["sni: any"], &["a, ocsp: ocsp.der", "b"], "");
    let (metrics, client) = (metrics(), Client::able());
    let look = |at: i64| (0..2).for_each(|_| tls.certificates.check_files(&metrics, at));
    let failed = || metrics.render().lines().any(|line| line.contains("load_failed{") && line.ends_with(" 1"));
    assert_eq!(
        client.shown(&tls, "localhost").await,
        ListenerAcceptor { certificate: certificate.clone(), response: good.clone() }
    );
    assert_eq!(client.shown(&tls, "b.test").await, ListenerAcceptor { certificate: other, response: Vec::new() });

    // About another one, or out of date: not shown, and said.
    for wrong in [respond(78, "20990101000000Z"), respond(77, "20200101000000Z")] {
        fs::write(folder.path("ocsp.der"), &wrong).unwrap();
        look(now());
        assert!(failed());
        assert_eq!(client.shown(&tls, "localhost").await.response, b"");
        fs::write(folder.path("ocsp.der"), &good).unwrap();
        look(now());
        assert!(!failed());
        assert_eq!(client.shown(&tls, "localhost").await.response, good);
    }
    // No response at all: the old one goes on, until it is out of date.
    fs::write(folder.path("ocsp.der"), "half").unwrap();
    look(now());
    assert!(failed());
    assert_eq!(client.shown(&tls, "localhost").await.response, good);
    look(4_080_000_000);
    assert_eq!(client.shown(&tls, "localhost").await.response, b"");

    // A certificate is renewed before its response is: shown without one.
    fs::write(folder.path("ocsp.der"), &good).unwrap();
    let renewed = folder.certificate("a", &["localhost"], 78, false);
    look(now());
    assert!(failed());
    assert_eq!(client.shown(&tls, "localhost").await, ListenerAcceptor { certificate: renewed, response: Vec::new() });
}

#[test]
fn files_that_cannot_be_used_are_told_with_their_place() {
    let folder = Folder::new();
    folder.certificate("a", &["localhost"], 1, false);
    fs::write(folder.path("ocsp.der"), "no response").unwrap();
    folder.secret("open", 1);
    fs::set_permissions(folder.path("open"), fs::Permissions::from_mode(0o644)).unwrap();
    let config = folder.config(&["sni: any"], &["a, ocsp: ocsp.der"], "ticket_keys: [open, absent]");
    let problems = DownstreamTls::build(&config, None).map(drop).unwrap_err();
    let said: Vec<String> =
        problems.iter().map(|problem| format!("{}: {}", problem.location.key, problem.message)).collect();
    let path = |name| folder.path(name).display().to_string();
    assert_eq!(
        said,
        [
            format!("tls.certificates[0].ocsp: {}: is not an OCSP response in DER", path("ocsp.der")),
            format!(
                "tls.ticket_keys[0]: {}: is accessible by all users of this machine (mode 644): run chmod 600",
                path("open")
            ),
            format!("tls.ticket_keys[1]: {}: No such file or directory (os error 2)", path("absent")),
        ]
    );
}

#[test]
fn a_version_1_certificate_of_a_listener_is_explained() {
    let folder = Folder::new();
    fs::write(folder.path("v1.pem"), crate::tls::trust::tests::VERSION_1_PEM).unwrap();
    fs::write(folder.path("v1-key.pem"), "unused").unwrap();
    let problems = DownstreamTls::build(&folder.config(&["tls_min: '1.2'"], &["v1"], ""), None).err().unwrap();
    let message = problems[0].to_string();
    assert!(message.contains("v1.pem: the certificate is X.509 version 1, which TLS libraries refuse"), "{message}");
    assert!(message.contains("create a version 3 certificate"), "{message}");
}
