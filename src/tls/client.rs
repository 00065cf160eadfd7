//! The side that connects to servers: whom we trust, and under which name.
//!
//! Verification is on unless the configuration spells out `insecure`. The name a certificate must carry is
//! `server_name` where configured, else the host as configured; for servers found by an SRV record it is the domain
//! that was asked for, because the host names in the answer come from DNS, which anybody may have forged (RFC 6125
//! section 6.5.1 and RFC 6186 section 6). With `pin`, the key itself is compared and chain and name are not.

use std::path::PathBuf;
use std::sync::Arc;

use aws_lc_rs::digest::{SHA256, digest};
use tokio::net::TcpStream;
use tokio_rustls::rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use tokio_rustls::rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use tokio_rustls::rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, Error, RootCertStore, SignatureScheme,
};
use tokio_rustls::{TlsConnector, TlsStream};
use x509_parser::prelude::{FromDer, X509Certificate};

use super::handover::Secrets;
use super::records::Records;
use super::{provider, read_certificates};
use crate::config::{Backend, Config, Located, Place, Problem, TlsMode, Trust};

/// How to reach the servers of one backend under TLS.
#[derive(Clone)]
pub struct ClientTls {
    config: ClientConfig,
    server_name: Option<ServerName<'static>>,
}

impl std::fmt::Debug for ClientTls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ClientTls").field("server_name", &self.server_name).finish_non_exhaustive()
    }
}

impl ClientTls {
    /// Loads roots and pins of a backend; `None` where it speaks plaintext.
    ///
    /// # Errors
    /// A `ca` file that cannot be used, a `server_name` that is none, no root certificate on the system.
    pub fn build(config: &Config, backend: &Backend) -> Result<Option<Self>, Problem> {
        if backend.tls.mode == TlsMode::None {
            return Ok(None);
        }
        let server_name = match &backend.tls.server_name {
            None => None,
            Some(name) => Some(ServerName::try_from(name.clone()).map_err(|_| {
                config.problem(&backend.place, format!("server_name {name:?} is neither a DNS name nor an address"))
            })?),
        };
        let provider = provider();
        let builder = ClientConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .map_err(|error| config.problem(&backend.place, error.to_string()))?;
        let mut client = match &backend.tls.trust {
            Trust::Pin(pins) => builder
                .dangerous()
                .with_custom_certificate_verifier(Arc::new(Relaxed { provider, pins: Some(pins.clone()) }))
                .with_no_client_auth(),
            Trust::Insecure => builder
                .dangerous()
                .with_custom_certificate_verifier(Arc::new(Relaxed { provider, pins: None }))
                .with_no_client_auth(),
            Trust::System => builder.with_root_certificates(roots(config, None, &backend.place)?).with_no_client_auth(),
            Trust::Ca(ca) => {
                builder.with_root_certificates(roots(config, Some(ca), &backend.place)?).with_no_client_auth()
            }
        };
        client.alpn_protocols = vec![b"imap".to_vec()];
        client.enable_secret_extraction = true;
        Ok(Some(Self { config: client, server_name }))
    }

    /// Performs the handshake; `host` is the configured name of the server. `secrets` is told the connection's own.
    ///
    /// # Errors
    /// What rustls says: untrusted, wrong name, expired, wrong pin, no TLS at all.
    pub async fn connect(
        &self,
        socket: TcpStream,
        host: &ServerName<'static>,
        secrets: Arc<Secrets>,
    ) -> std::io::Result<TlsStream<Records<TcpStream>>> {
        let name = self.server_name.as_ref().unwrap_or(host).clone();
        // A configuration of its own is what gives a connection a key log of its own; all it holds is shared.
        let mut config = self.config.clone();
        config.key_log = secrets;
        Ok(TlsStream::Client(TlsConnector::from(Arc::new(config)).connect(name, Records::new(socket)).await?))
    }
}

/// TLS towards a directory: verified by the roots in `ca`, or the system's.
///
/// # Errors
/// A `ca` file that cannot be used, no root certificate on the system.
pub fn verified(config: &Config, ca: Option<&Located<PathBuf>>, place: &Place) -> Result<ClientConfig, Problem> {
    let roots = roots(config, ca, place)?;
    let builder = ClientConfig::builder_with_provider(provider()).with_safe_default_protocol_versions();
    let builder = builder.map_err(|error| config.problem(place, error.to_string()))?;
    Ok(builder.with_root_certificates(roots).with_no_client_auth())
}

/// TLS in which nobody is trusted: for a client that needs a configuration and speaks plaintext.
pub fn nobody() -> ClientConfig {
    let builder = ClientConfig::builder_with_provider(provider());
    let builder = builder.with_safe_default_protocol_versions().expect("the provider has suites of both versions");
    builder.with_root_certificates(RootCertStore::empty()).with_no_client_auth()
}

fn roots(config: &Config, ca: Option<&Located<PathBuf>>, place: &Place) -> Result<RootCertStore, Problem> {
    let mut store = RootCertStore::empty();
    if let Some(path) = ca {
        let fault = |message: String| config.problem(&path.place, format!("{}: {message}", path.value.display()));
        for certificate in read_certificates(&path.value).map_err(fault)? {
            store.add(certificate).map_err(|error| fault(error.to_string()))?;
        }
        return Ok(store);
    }
    // Some of a system's roots may be unusable; what matters is that there are any.
    let found = rustls_native_certs::load_native_certs();
    store.add_parsable_certificates(found.certs);
    if store.is_empty() {
        let message = "no root certificates on this system to verify the servers with: install ca-certificates, or name a ca, a pin or insecure";
        return Err(config.problem(place, message));
    }
    Ok(store)
}

/// Accepts by pin alone, or anything: what `pin` and `insecure` mean. The handshake's signature is still checked, so
/// that the peer has the key of the certificate it shows.
#[derive(Debug)]
struct Relaxed {
    provider: Arc<CryptoProvider>,
    pins: Option<Vec<[u8; 32]>>,
}

impl ServerCertVerifier for Relaxed {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let Some(pins) = &self.pins else { return Ok(ServerCertVerified::assertion()) };
        let (_, parsed) = X509Certificate::from_der(certificate)
            .map_err(|_| Error::InvalidCertificate(CertificateError::BadEncoding))?;
        let shown = digest(&SHA256, parsed.public_key().raw);
        if pins.iter().any(|pin| pin == shown.as_ref()) {
            Ok(ServerCertVerified::assertion())
        } else {
            Err(Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure))
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, certificate, signed, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, certificate, signed, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
