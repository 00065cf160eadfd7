//! Handshakes over loopback with a rustls client that records the certificate and the OCSP response of the server.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use rcgen::{
    CertificateParams, CertifiedIssuer, KeyPair, PKCS_ECDSA_P256_SHA256, PKCS_RSA_SHA256, SerialNumber,
    SignatureAlgorithm,
};
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

const ALL_SCHEMES: &[SignatureScheme] = &[SignatureScheme::ECDSA_NISTP256_SHA256, SignatureScheme::RSA_PSS_SHA256];

/// A temporary folder of certificates, OCSP responses and ticket keys.
struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Writes a self-signed certificate to `name.pem` and its key to `name-key.pem`. Returns the certificate.
    fn certificate(
        &self,
        name: &str,
        names: &[&str],
        serial: u64,
        algorithm: &'static SignatureAlgorithm,
    ) -> CertificateDer<'static> {
        let key = KeyPair::generate_for(algorithm).unwrap();
        let mut params = CertificateParams::new(names.iter().map(ToString::to_string).collect::<Vec<_>>()).unwrap();
        params.serial_number = Some(SerialNumber::from(serial));
        let certificate = params.self_signed(&key).unwrap();
        fs::write(self.path(&format!("{name}-key.pem")), key.serialize_pem()).unwrap();
        fs::write(self.path(&format!("{name}.pem")), certificate.pem()).unwrap();
        certificate.der().clone()
    }

    /// Writes a file of 32 bytes that start with `first` and increase.
    fn ticket_key(&self, name: &str, first: u8) {
        fs::write(self.path(name), (first..first + 32).collect::<Vec<u8>>()).unwrap();
        fs::set_permissions(self.path(name), fs::Permissions::from_mode(0o600)).unwrap();
    }

    /// A configuration with the options of each listener, the name and options of each certificate, and options of `tls`.
    fn config(&self, listeners: &[&str], certificates: &[&str], tls_options: &str) -> Config {
        let listeners: String = listeners
            .iter()
            .map(|options| format!("  - {{address: '127.0.0.1:0', tls: implicit, {options}}}\n"))
            .collect::<String>();
        let certificates: Vec<String> = certificates
            .iter()
            .map(|certificate| {
                let (name, options) = certificate.split_once(", ").unwrap_or((certificate, ""));
                format!("{{cert: {name}.pem, key: {name}-key.pem, {options}}}")
            })
            .collect();
        let text = format!(
            "listeners:\n{listeners}tls: {{certificates: [{}], {tls_options}}}\n\
             backends: {{a: {{servers: ['192.0.2.1:143']}}}}\nroutes: [{{default: a}}]\n",
            certificates.join(", "),
        );
        config::parse(&self.path("v.yaml"), &text).unwrap_or_else(|report| panic!("{report}"))
    }

    fn build(&self, listeners: &[&str], certificates: &[&str], tls_options: &str) -> DownstreamTls {
        expect_built(DownstreamTls::build(&self.config(listeners, certificates, tls_options), None))
    }
}

#[track_caller]
fn expect_built(result: Result<Option<DownstreamTls>, Vec<Problem>>) -> DownstreamTls {
    result.unwrap_or_else(|problems| panic!("{problems:?}")).unwrap()
}

fn metrics() -> Metrics {
    Metrics::new(&Names::default())
}

/// Accepts every certificate, and records the last one with its OCSP response.
#[derive(Debug)]
struct RecordingVerifier {
    schemes: Vec<SignatureScheme>,
    presented: Mutex<Option<PresentedCertificate>>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct PresentedCertificate {
    certificate: CertificateDer<'static>,
    response: Vec<u8>,
}

impl ServerCertVerifier for RecordingVerifier {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        response: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let certificate = certificate.clone().into_owned();
        *self.presented.lock().unwrap() = Some(PresentedCertificate { certificate, response: response.to_vec() });
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
    verifier: Arc<RecordingVerifier>,
    config: ClientConfig,
}

impl Client {
    fn new(schemes: &[SignatureScheme], versions: &[&'static SupportedProtocolVersion]) -> Self {
        let verifier = Arc::new(RecordingVerifier { schemes: schemes.to_vec(), presented: Mutex::new(None) });
        let builder = ClientConfig::builder_with_provider(provider()).with_protocol_versions(versions).unwrap();
        let config = builder.dangerous().with_custom_certificate_verifier(verifier.clone()).with_no_client_auth();
        Self { verifier, config }
    }

    /// A client with both TLS versions and all signature schemes.
    fn unrestricted() -> Self {
        Self::new(ALL_SCHEMES, &[&TLS13, &TLS12])
    }

    /// Connects, and reads one byte: the session tickets arrive before it. Returns the kind of handshake, or its error.
    async fn connect(&self, tls: &DownstreamTls, listener: usize, name: &str) -> Result<HandshakeKind, std::io::Error> {
        let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let server = async {
            let (accepted, _) = socket.accept().await.unwrap();
            let mut stream =
                tls.accept(listener, accepted, Arc::default(), None).await.map_err(std::io::Error::other)?;
            stream.write_all(b"*").await?;
            stream.shutdown().await?;
            // Wait until the client closes: an earlier close by the server could discard bytes in transit.
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

    /// Does a full handshake, and returns the certificate that the server presented.
    async fn presented_certificate(&self, tls: &DownstreamTls, name: &str) -> PresentedCertificate {
        let client = Self { verifier: self.verifier.clone(), config: self.config_without_resumption() };
        client.connect(tls, 0, name).await.unwrap();
        self.verifier.presented.lock().unwrap().take().expect("a full handshake verifies a certificate")
    }

    fn config_without_resumption(&self) -> ClientConfig {
        let mut config = self.config.clone();
        config.resumption = tokio_rustls::rustls::client::Resumption::disabled();
        config
    }

    /// Adds a client certificate for alice.test.
    fn with_certificate(mut self, issuer: &CertifiedIssuer<'_, KeyPair>) -> Self {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(["alice.test".to_owned()]).unwrap();
        let chain = vec![params.signed_by(&key, issuer).unwrap().der().clone()];
        let key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
        let builder =
            ClientConfig::builder_with_provider(provider()).with_protocol_versions(&[&TLS13, &TLS12]).unwrap();
        let builder = builder.dangerous().with_custom_certificate_verifier(self.verifier.clone());
        self.config = builder.with_client_auth_cert(chain, key).unwrap();
        self
    }
}

/// Creates a certificate authority, and writes its certificate to `path`.
fn write_authority(path: &Path) -> CertifiedIssuer<'static, KeyPair> {
    let mut params = CertificateParams::default();
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
    fs::write(path, issuer.pem()).unwrap();
    issuer
}

#[tokio::test]
async fn presented_certificate_matches_name_and_signature_schemes() {
    let folder = Folder::new();
    let rsa = folder.certificate("rsa", &["localhost", "*.mail.test"], 1, &PKCS_RSA_SHA256);
    let ecdsa = folder.certificate("ecdsa", &["localhost", "mail.test"], 2, &PKCS_ECDSA_P256_SHA256);
    let wildcard = folder.certificate("wildcard", &["*.mail.test", "only.test"], 3, &PKCS_ECDSA_P256_SHA256);
    let tls = folder.build(&["sni: any"], &["rsa", "ecdsa", "wildcard"], "");
    for versions in [&[&TLS13][..], &[&TLS12]] {
        let both = Client::new(ALL_SCHEMES, versions);
        let only_rsa = Client::new(&[SignatureScheme::RSA_PSS_SHA256], versions);
        let only_ecdsa = Client::new(&[SignatureScheme::ECDSA_NISTP256_SHA256], versions);
        for (name, by_both, by_rsa, by_ecdsa) in [
            ("localhost", &ecdsa, Some(&rsa), &ecdsa),
            ("LOCALHOST", &ecdsa, Some(&rsa), &ecdsa),
            ("a.mail.test", &wildcard, Some(&rsa), &wildcard),
            // SNI cannot contain an address: the first certificate is presented, or the other one with the same name.
            ("127.0.0.1", &ecdsa, Some(&rsa), &ecdsa),
            ("unknown.test", &ecdsa, Some(&rsa), &ecdsa),
            ("a.b.mail.test", &ecdsa, Some(&rsa), &ecdsa),
            ("only.test", &wildcard, None, &wildcard),
        ] {
            assert_eq!(both.presented_certificate(&tls, name).await.certificate, *by_both, "{name}");
            assert_eq!(only_ecdsa.presented_certificate(&tls, name).await.certificate, *by_ecdsa, "{name}");
            match by_rsa {
                Some(expected) => {
                    assert_eq!(only_rsa.presented_certificate(&tls, name).await.certificate, *expected, "{name}")
                }
                None => assert!(only_rsa.connect(&tls, 0, name).await.is_err(), "{name}"),
            }
        }
    }
}

#[tokio::test]
async fn strict_sni_refuses_unknown_and_absent_names() {
    let folder = Folder::new();
    folder.certificate("a", &["localhost", "*.mail.test"], 1, &PKCS_ECDSA_P256_SHA256);
    let tls = folder.build(&["sni: strict", "sni: any"], &["a"], "");
    for versions in [&[&TLS13][..], &[&TLS12]] {
        let client = Client::new(ALL_SCHEMES, versions);
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
async fn alpn_offer_without_imap_is_refused() {
    let folder = Folder::new();
    folder.certificate("a", &["localhost"], 1, &PKCS_ECDSA_P256_SHA256);
    let tls = folder.build(&["sni: any", "sni: strict"], &["a"], "");
    let client_with_alpn = |names: &[&str]| {
        let mut client = Client::unrestricted();
        client.config.alpn_protocols = names.iter().map(|name| name.as_bytes().to_vec()).collect();
        client
    };
    for listener in [0, 1] {
        for names in [&[][..], &["imap"], &["h2", "imap"]] {
            client_with_alpn(names).connect(&tls, listener, "localhost").await.unwrap();
        }
        for names in [&["h2", "http/1.1"][..], &["IMAP"], &["pop3"]] {
            let error = client_with_alpn(names).connect(&tls, listener, "localhost").await.unwrap_err();
            assert!(error.to_string().contains("NoApplicationProtocol"), "{error}");
        }
    }
}

#[tokio::test]
async fn renewed_certificate_is_presented_unless_its_files_are_invalid() {
    let folder = Folder::new();
    let old = folder.certificate("a", &["localhost"], 1, &PKCS_ECDSA_P256_SHA256);
    let tls = folder.build(&["sni: any"], &["a"], "");
    let (metrics, client) = (metrics(), Client::unrestricted());
    tls.certificates.publish(&metrics);
    let check_files = || (0..2).for_each(|_| tls.certificates.check_files(&metrics, now()));
    let failed = || {
        let label = folder.path("a.pem").display().to_string();
        let text = metrics.render();
        let value =
            text.split_once(&format!("vestibule_certificate_load_failed{{certificate=\"{label}\"}} ")).unwrap().1;
        value.starts_with('1')
    };
    assert!(!failed());

    let key = fs::read(folder.path("a-key.pem")).unwrap();
    let renewed = folder.certificate("a", &["localhost"], 2, &PKCS_ECDSA_P256_SHA256);
    let new_key = fs::read(folder.path("a-key.pem")).unwrap();
    // The new certificate is written before its key.
    fs::write(folder.path("a-key.pem"), &key).unwrap();
    check_files();
    assert!(failed());
    assert_eq!(client.presented_certificate(&tls, "localhost").await.certificate, old);
    fs::write(folder.path("a-key.pem"), &new_key).unwrap();
    check_files();
    assert!(!failed());
    assert_eq!(client.presented_certificate(&tls, "localhost").await.certificate, renewed);

    for (name, content) in [("a.pem", &b"-----BEGIN CERTIFICATE-----\nMII"[..]), ("a.pem", b""), ("a-key.pem", b"x")] {
        let good = fs::read(folder.path(name)).unwrap();
        fs::write(folder.path(name), content).unwrap();
        check_files();
        assert!(failed(), "{name}");
        assert_eq!(client.presented_certificate(&tls, "localhost").await.certificate, renewed);
        fs::write(folder.path(name), good).unwrap();
        check_files();
        assert!(!failed(), "{name}");
    }
    fs::remove_file(folder.path("a.pem")).unwrap();
    check_files();
    assert!(failed());
    assert_eq!(client.presented_certificate(&tls, "localhost").await.certificate, renewed);
}

#[tokio::test]
async fn ocsp_response_is_stapled_while_it_is_valid_for_the_certificate() {
    let folder = Folder::new();
    let other = folder.certificate("b", &["b.test"], 9, &PKCS_ECDSA_P256_SHA256);
    let certificate = folder.certificate("a", &["localhost"], 77, &PKCS_ECDSA_P256_SHA256);
    let response_for = |serial: u8, until: &str| ocsp::tests::response(&[serial], 0, Some(until));
    let good = response_for(77, "20990101000000Z");
    fs::write(folder.path("ocsp.der"), &good).unwrap();
    let tls = folder.build(&["sni: any"], &["a, ocsp: ocsp.der", "b"], "");
    let (metrics, client) = (metrics(), Client::unrestricted());
    let check_files = |at: i64| (0..2).for_each(|_| tls.certificates.check_files(&metrics, at));
    let failed = || metrics.render().lines().any(|line| line.contains("load_failed{") && line.ends_with(" 1"));
    assert_eq!(
        client.presented_certificate(&tls, "localhost").await,
        PresentedCertificate { certificate: certificate.clone(), response: good.clone() }
    );
    assert_eq!(
        client.presented_certificate(&tls, "b.test").await,
        PresentedCertificate { certificate: other, response: Vec::new() }
    );

    // A response for another certificate or an expired response is reported and not stapled.
    for wrong in [response_for(78, "20990101000000Z"), response_for(77, "20200101000000Z")] {
        fs::write(folder.path("ocsp.der"), &wrong).unwrap();
        check_files(now());
        assert!(failed());
        assert_eq!(client.presented_certificate(&tls, "localhost").await.response, b"");
        fs::write(folder.path("ocsp.der"), &good).unwrap();
        check_files(now());
        assert!(!failed());
        assert_eq!(client.presented_certificate(&tls, "localhost").await.response, good);
    }
    // If the file contains no response, the old response is stapled until it expires.
    fs::write(folder.path("ocsp.der"), "half").unwrap();
    check_files(now());
    assert!(failed());
    assert_eq!(client.presented_certificate(&tls, "localhost").await.response, good);
    check_files(4_080_000_000);
    assert_eq!(client.presented_certificate(&tls, "localhost").await.response, b"");

    // A certificate that is renewed before its response is presented without one.
    fs::write(folder.path("ocsp.der"), &good).unwrap();
    let renewed = folder.certificate("a", &["localhost"], 78, &PKCS_ECDSA_P256_SHA256);
    check_files(now());
    assert!(failed());
    assert_eq!(
        client.presented_certificate(&tls, "localhost").await,
        PresentedCertificate { certificate: renewed, response: Vec::new() }
    );
}

#[test]
fn unusable_files_are_reported_with_their_configuration_key() {
    let folder = Folder::new();
    folder.certificate("a", &["localhost"], 1, &PKCS_ECDSA_P256_SHA256);
    fs::write(folder.path("ocsp.der"), "no response").unwrap();
    folder.ticket_key("open", 1);
    fs::set_permissions(folder.path("open"), fs::Permissions::from_mode(0o644)).unwrap();
    let config = folder.config(&["sni: any"], &["a, ocsp: ocsp.der"], "ticket_keys: [open, absent]");
    let problems = DownstreamTls::build(&config, None).map(drop).unwrap_err();
    let reported: Vec<String> =
        problems.iter().map(|problem| format!("{}: {}", problem.location.key, problem.message)).collect();
    let path = |name| folder.path(name).display().to_string();
    assert_eq!(
        reported,
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
fn version_1_certificate_of_a_listener_is_explained() {
    let folder = Folder::new();
    fs::write(folder.path("v1.pem"), crate::tls::trust::tests::VERSION_1_PEM).unwrap();
    fs::write(folder.path("v1-key.pem"), "unused").unwrap();
    let problems = DownstreamTls::build(&folder.config(&["tls_min: '1.2'"], &["v1"], ""), None).err().unwrap();
    let message = problems[0].to_string();
    assert!(message.contains("v1.pem: the certificate is X.509 version 1, which TLS libraries refuse"), "{message}");
    assert!(message.contains("create a version 3 certificate"), "{message}");
}
