//! TLS towards servers and directories: which certificates are trusted, and for which name.
//!
//! Certificates are verified unless the configuration says `insecure`. A certificate must be valid for `server_name` if that is
//! configured, else for the configured host. For servers found by an SRV record, that is the domain of the query, because the host names
//! in the answer come from DNS, which an attacker may have forged (RFC 6125 section 6.5.1 and RFC 6186 section 6). With `pin` only the
//! public key is compared, and neither the chain nor the name is verified.

use std::path::PathBuf;
use std::sync::Arc;

use tokio::net::TcpStream;
use tokio_rustls::rustls::client::danger::ServerCertVerifier;
use tokio_rustls::rustls::pki_types::ServerName;
use tokio_rustls::rustls::{ClientConfig, Error, InvalidMessage, RootCertStore};
use tokio_rustls::{TlsConnector, TlsStream};

use super::error_text::NOT_TLS;
use super::extraction::TrafficSecrets;
use super::record_stream::RecordStream;
use super::trust::{AcceptedKeys, KeyVerifier, RootVerifier, with_refusal};
use super::{provider, read_certificates};
use crate::config::{Backend, Located, Location, Problem, TlsMode, Trust};

/// TLS settings for the servers of one backend.
#[derive(Clone)]
pub struct UpstreamTls {
    config: ClientConfig,
    server_name: Option<ServerName<'static>>,
}

impl std::fmt::Debug for UpstreamTls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("UpstreamTls").field("server_name", &self.server_name).finish_non_exhaustive()
    }
}

impl UpstreamTls {
    /// Loads the roots or pins of a backend. `None` if the backend does not use TLS.
    ///
    /// # Errors
    /// An unusable `ca` file, an invalid `server_name`, or no root certificate on the system.
    pub fn build(backend: &Backend) -> Result<Option<Self>, Problem> {
        if backend.tls.mode == TlsMode::None {
            return Ok(None);
        }
        let server_name = match &backend.tls.server_name {
            None => None,
            Some(name) => Some(ServerName::try_from(name.clone()).map_err(|_| {
                backend.location.problem(format!("server_name {name:?} is neither a DNS name nor an address"))
            })?),
        };
        let verifier: Arc<dyn ServerCertVerifier> = match &backend.tls.trust {
            Trust::Pin(pins) => KeyVerifier::new(AcceptedKeys::Pinned(pins.clone())),
            Trust::Insecure => KeyVerifier::new(AcceptedKeys::Any),
            Trust::System => root_verifier(None, &backend.location)?,
            Trust::Ca(ca) => root_verifier(Some(ca), &backend.location)?,
        };
        let mut client = client_config(verifier).map_err(|error| backend.location.problem(error))?;
        client.alpn_protocols = vec![b"imap".to_vec()];
        client.enable_secret_extraction = true;
        Ok(Some(Self { config: client, server_name }))
    }

    /// Performs the handshake. `host` is the configured name of the server. `secrets` receives the traffic secrets of the connection.
    ///
    /// # Errors
    /// The handshake failed, for example because the certificate is not trusted or the server does not speak TLS.
    pub async fn connect(
        &self,
        socket: TcpStream,
        host: &ServerName<'static>,
        secrets: Arc<TrafficSecrets>,
    ) -> std::io::Result<TlsStream<RecordStream<TcpStream>>> {
        let name = self.server_name.as_ref().unwrap_or(host).clone();
        // The key log belongs to the configuration, so each connection needs a copy. Copies are cheap: their contents are shared.
        let mut config = self.config.clone();
        config.key_log = secrets;
        let handshake = TlsConnector::from(Arc::new(config)).connect(name, RecordStream::new(socket));
        match with_refusal(handshake).await {
            (Ok(tls), _) => Ok(TlsStream::Client(tls)),
            (Err(error), Some(refusal)) => Err(std::io::Error::new(error.kind(), refusal)),
            (Err(error), None) => Err(explain_plaintext(error)),
        }
    }
}

/// Explains the error of a handshake if the server does not speak TLS.
fn explain_plaintext(error: std::io::Error) -> std::io::Error {
    let cause = error.get_ref().and_then(|cause| cause.downcast_ref::<Error>());
    match cause {
        Some(Error::InvalidMessage(InvalidMessage::InvalidContentType)) => {
            std::io::Error::new(error.kind(), format!("{NOT_TLS}, or not from the first byte: {error}"))
        }
        _ => error,
    }
}

/// TLS towards a directory, whose certificate is verified with the roots in `ca`, or with those of the system.
///
/// # Errors
/// An unusable `ca` file, or no root certificate on the system.
pub fn verified_config(ca: Option<&Located<PathBuf>>, location: &Location) -> Result<ClientConfig, Problem> {
    client_config(root_verifier(ca, location)?).map_err(|error| location.problem(error))
}

/// A configuration that trusts no server, for an HTTP client that requires a configuration but never uses TLS.
pub fn config_without_roots() -> ClientConfig {
    let builder = ClientConfig::builder_with_provider(provider());
    let builder =
        builder.with_safe_default_protocol_versions().expect("the provider has cipher suites of both versions");
    builder.with_root_certificates(RootCertStore::empty()).with_no_client_auth()
}

fn client_config(verifier: Arc<dyn ServerCertVerifier>) -> Result<ClientConfig, String> {
    let builder = ClientConfig::builder_with_provider(provider()).with_safe_default_protocol_versions();
    let builder = builder.map_err(|error| error.to_string())?;
    Ok(builder.dangerous().with_custom_certificate_verifier(verifier).with_no_client_auth())
}

/// A verifier with the roots of a `ca` file, or with those of the system.
fn root_verifier(ca: Option<&Located<PathBuf>>, location: &Location) -> Result<Arc<RootVerifier>, Problem> {
    let mut store = RootCertStore::empty();
    if let Some(path) = ca {
        let problem = |message: String| path.location.problem(format!("{}: {message}", path.value.display()));
        let certificates = read_certificates(&path.value).map_err(problem)?;
        for certificate in &certificates {
            store.add(certificate.clone()).map_err(|error| problem(error.to_string()))?;
        }
        return RootVerifier::new(store, &certificates).map_err(problem);
    }
    // Some of the system's roots may be unusable. It is an error only if no root is usable.
    let certificates = rustls_native_certs::load_native_certs().certs;
    store.add_parsable_certificates(certificates.iter().cloned());
    if store.is_empty() {
        let message = "the system has no root certificates to verify servers with: install ca-certificates, or set ca, pin or insecure";
        return Err(location.problem(message));
    }
    RootVerifier::new(store, &certificates).map_err(|error| location.problem(error))
}
