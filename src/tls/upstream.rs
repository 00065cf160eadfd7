//! The side that connects to servers: whom we trust, and under which name.
//!
//! Verification is on unless the configuration spells out `insecure`. The name a certificate must carry is
//! `server_name` where configured, else the host as configured; for servers found by an SRV record it is the domain
//! that was asked for, because the host names in the answer come from DNS, which anybody may have forged (RFC 6125
//! section 6.5.1 and RFC 6186 section 6). With `pin`, the key itself is compared and chain and name are not.

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
use super::trust::{Accepted, ByPin, ByRoots, observed};
use super::{provider, read_certificates};
use crate::config::{Backend, Located, Location, Problem, TlsMode, Trust};

/// How to reach the servers of one backend under TLS.
#[derive(Clone)]
pub struct UpstreamTls {
    config: ClientConfig,
    server_name: Option<ServerName<'static>>,
}

impl std::fmt::Debug for UpstreamTls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ClientTls").field("server_name", &self.server_name).finish_non_exhaustive()
    }
}

impl UpstreamTls {
    /// Loads roots and pins of a backend; `None` where it speaks plaintext.
    ///
    /// # Errors
    /// A `ca` file that cannot be used, a `server_name` that is none, no root certificate on the system.
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
            Trust::Pin(pins) => ByPin::new(Accepted::Pins(pins.clone())),
            Trust::Insecure => ByPin::new(Accepted::Everything),
            Trust::System => by_roots(None, &backend.location)?,
            Trust::Ca(ca) => by_roots(Some(ca), &backend.location)?,
        };
        let mut client = client_config(verifier).map_err(|error| backend.location.problem(error))?;
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
        secrets: Arc<TrafficSecrets>,
    ) -> std::io::Result<TlsStream<RecordStream<TcpStream>>> {
        let name = self.server_name.as_ref().unwrap_or(host).clone();
        // A configuration of its own is what gives a connection a key log of its own; all it holds is shared.
        let mut config = self.config.clone();
        config.key_log = secrets;
        let handshake = TlsConnector::from(Arc::new(config)).connect(name, RecordStream::new(socket));
        match observed(handshake).await {
            (Ok(tls), _) => Ok(TlsStream::Client(tls)),
            (Err(error), Some(refusal)) => Err(std::io::Error::new(error.kind(), refusal)),
            (Err(error), None) => Err(explain_plaintext(error)),
        }
    }
}

/// An error of a handshake with a server, explained if the server does not speak TLS.
fn explain_plaintext(error: std::io::Error) -> std::io::Error {
    let cause = error.get_ref().and_then(|cause| cause.downcast_ref::<Error>());
    match cause {
        Some(Error::InvalidMessage(InvalidMessage::InvalidContentType)) => {
            let words = format!("{NOT_TLS}, or not from the first byte: {error}");
            std::io::Error::new(error.kind(), words)
        }
        _ => error,
    }
}

/// TLS towards a directory: verified by the roots in `ca`, or the system's.
///
/// # Errors
/// A `ca` file that cannot be used, no root certificate on the system.
pub fn verified_config(ca: Option<&Located<PathBuf>>, location: &Location) -> Result<ClientConfig, Problem> {
    client_config(by_roots(ca, location)?).map_err(|error| location.problem(error))
}

/// TLS in which nobody is trusted: for a client that needs a configuration and speaks plaintext.
pub fn config_without_roots() -> ClientConfig {
    let builder = ClientConfig::builder_with_provider(provider());
    let builder = builder.with_safe_default_protocol_versions().expect("the provider has suites of both versions");
    builder.with_root_certificates(RootCertStore::empty()).with_no_client_auth()
}

fn client_config(verifier: Arc<dyn ServerCertVerifier>) -> Result<ClientConfig, String> {
    let builder = ClientConfig::builder_with_provider(provider()).with_safe_default_protocol_versions();
    let builder = builder.map_err(|error| error.to_string())?;
    Ok(builder.dangerous().with_custom_certificate_verifier(verifier).with_no_client_auth())
}

/// Trust in the certificates of a `ca` file, or in those of the system.
fn by_roots(ca: Option<&Located<PathBuf>>, location: &Location) -> Result<Arc<ByRoots>, Problem> {
    let mut store = RootCertStore::empty();
    if let Some(path) = ca {
        let fault = |message: String| path.location.problem(format!("{}: {message}", path.value.display()));
        let certificates = read_certificates(&path.value).map_err(fault)?;
        for certificate in &certificates {
            store.add(certificate.clone()).map_err(|error| fault(error.to_string()))?;
        }
        return ByRoots::new(store, &certificates).map_err(fault);
    }
    // Some of a system's roots may be unusable; what matters is that there are any.
    let found = rustls_native_certs::load_native_certs().certs;
    store.add_parsable_certificates(found.iter().cloned());
    if store.is_empty() {
        let message = "no root certificates on this system to verify the servers with: install ca-certificates, or name a ca, a pin or insecure";
        return Err(location.problem(message));
    }
    ByRoots::new(store, &found).map_err(|error| location.problem(error))
}
