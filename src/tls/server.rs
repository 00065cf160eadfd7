//! The side that clients connect to: certificates chosen by SNI, ALPN, tickets.
//!
//! Certificates are read once and checked: chain and key must match, names and expiry are taken from the certificate
//! itself. A client that names no server, or one we have no certificate for, gets the first. ALPN: a client that offers
//! protocols without `imap` is refused (CVE-2021-3618, ALPACA); one that offers none is served. Sessions are resumed by
//! tickets alone, so that nothing is stored between them, and one ticket is sent instead of two.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::sync::Arc;

use tokio::net::TcpStream;
use tokio_rustls::rustls::crypto::aws_lc_rs::Ticketer;
use tokio_rustls::rustls::pki_types::PrivateKeyDer;
use tokio_rustls::rustls::server::danger::ClientCertVerifier;
use tokio_rustls::rustls::server::{
    ClientHello, NoServerSessionStorage, ProducesTickets, ResolvesServerCert, WebPkiClientVerifier,
};
use tokio_rustls::rustls::sign::CertifiedKey;
use tokio_rustls::rustls::{RootCertStore, ServerConfig};
use tokio_rustls::{TlsAcceptor, TlsStream};
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::handover::Secrets;
use super::records::Records;
use super::{provider, read_certificates};
use crate::config::{Certificate, CertificateUser, ClientCertificates, Config, Problem};
use crate::identity::UserName;
use crate::metrics::Metrics;

/// The ALPN name of IMAP (RFC 7301 registry).
const ALPN: &[u8] = b"imap";

/// What clients are shown.
pub struct ServerTls {
    /// One a listener: tickets of one that asks for certificates are no good at another.
    listeners: Vec<(ServerConfig, Option<CertificateUser>)>,
    expiries: Vec<(String, i64)>,
}

impl ServerTls {
    /// Reads all certificates and keys.
    ///
    /// # Errors
    /// Every certificate that cannot be used, with its place in the configuration.
    pub fn build(config: &Config) -> Result<Option<Self>, Vec<Problem>> {
        if config.certificates.is_empty() {
            return Ok(None);
        }
        let mut problems = Vec::new();
        let mut expiries = Vec::new();
        let mut by_name = ByName::default();
        for certificate in &config.certificates {
            match Loaded::read(config, certificate) {
                Ok(loaded) => {
                    expiries.push((certificate.cert.value.display().to_string(), loaded.expiry));
                    by_name.add(loaded);
                }
                Err(problem) => problems.push(problem),
            }
        }
        if !problems.is_empty() {
            return Err(problems);
        }
        let by_name = Arc::new(by_name);
        let ticketer = Ticketer::new();
        let fault = |error: String| vec![config.problem(&config.certificates[0].cert.place, error)];
        let ticketer = ticketer.map_err(|error| fault(error.to_string()))?;
        let mut listeners = Vec::new();
        for listener in &config.listeners {
            let built = match &listener.client_certificates {
                None => (server_config(by_name.clone(), None, ticketer.clone()).map_err(fault)?, None),
                Some(wanted) => {
                    let verifier = verifier(config, wanted).map_err(|problem| vec![problem])?;
                    let own = Ticketer::new().map_err(|error| fault(error.to_string()))?;
                    (server_config(by_name.clone(), Some(verifier), own).map_err(fault)?, Some(wanted.user))
                }
            };
            listeners.push(built);
        }
        Ok(Some(Self { listeners, expiries }))
    }

    /// Performs the handshake of a connection to the listener at this place in the configuration. `secrets` is told the
    /// connection's own.
    ///
    /// # Errors
    /// What rustls says: no common version or cipher, no TLS at all.
    pub async fn accept(
        &self,
        listener: usize,
        socket: TcpStream,
        secrets: Arc<Secrets>,
    ) -> std::io::Result<TlsStream<Records<TcpStream>>> {
        // A configuration of its own is what gives a connection a key log of its own; all it holds is shared.
        let mut config = self.listeners[listener].0.clone();
        config.key_log = secrets;
        Ok(TlsStream::Server(TlsAcceptor::from(Arc::new(config)).accept(Records::new(socket)).await?))
    }

    /// Whether the listener asks clients for certificates.
    pub fn asks_certificate(&self, listener: usize) -> bool {
        self.listeners[listener].1.is_some()
    }

    /// Whose certificate it is, by the rule of the listener. `None`: it names nobody.
    pub fn owner(&self, listener: usize, certificate: &[u8]) -> Option<UserName> {
        let rule = self.listeners[listener].1?;
        let (_, parsed) = X509Certificate::from_der(certificate).ok()?;
        let alternatives = parsed.subject_alternative_name().ok().flatten();
        let mut alternatives = alternatives.iter().flat_map(|names| &names.value.general_names);
        let name = match rule {
            CertificateUser::SanEmail => alternatives.find_map(|name| match name {
                GeneralName::RFC822Name(name) => Some(*name),
                _ => None,
            })?,
            CertificateUser::SanDns => alternatives.find_map(|name| match name {
                GeneralName::DNSName(name) => Some(*name),
                _ => None,
            })?,
            CertificateUser::CommonName => parsed.subject().iter_common_name().next()?.as_str().ok()?,
        };
        UserName::new(name.as_bytes()).ok()
    }

    /// Sets the expiry gauges.
    pub fn publish(&self, metrics: &Metrics) {
        for (file, expiry) in &self.expiries {
            metrics.certificate(file, *expiry);
        }
    }
}

fn server_config(
    certificates: Arc<ByName>,
    verifier: Option<Arc<dyn ClientCertVerifier>>,
    ticketer: Arc<dyn ProducesTickets>,
) -> Result<ServerConfig, String> {
    let builder = ServerConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?;
    let mut config = match verifier {
        Some(verifier) => builder.with_client_cert_verifier(verifier),
        None => builder.with_no_client_auth(),
    }
    .with_cert_resolver(certificates);
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.ignore_client_order = true;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.ticketer = ticketer;
    config.send_tls13_tickets = 1;
    config.enable_secret_extraction = true;
    Ok(config)
}

fn verifier(config: &Config, wanted: &ClientCertificates) -> Result<Arc<dyn ClientCertVerifier>, Problem> {
    let file = wanted.ca.value.display();
    let fault = |message: String| config.problem(&wanted.ca.place, format!("{file}: {message}"));
    let mut roots = RootCertStore::empty();
    for certificate in read_certificates(&wanted.ca.value).map_err(fault)? {
        roots.add(certificate).map_err(|error| fault(error.to_string()))?;
    }
    let builder = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider());
    let builder = if wanted.required { builder } else { builder.allow_unauthenticated() };
    builder.build().map_err(|error| fault(error.to_string()))
}

/// One certificate with its key, and what the certificate says of itself.
struct Loaded {
    key: Arc<CertifiedKey>,
    names: Vec<String>,
    expiry: i64,
}

impl Loaded {
    fn read(config: &Config, certificate: &Certificate) -> Result<Self, Problem> {
        let cert_fault = |message: String| {
            let file = certificate.cert.value.display();
            config.problem(&certificate.cert.place, format!("{file}: {message}"))
        };
        let key_fault = |message: String| {
            let file = certificate.key.value.display();
            config.problem(&certificate.key.place, format!("{file}: {message}"))
        };
        let chain = read_certificates(&certificate.cert.value).map_err(cert_fault)?;
        let (names, expiry) = facts(&chain[0]).map_err(cert_fault)?;
        let private = read_key(&certificate.key.value).map_err(key_fault)?;
        let key = CertifiedKey::from_der(chain, private, &provider()).map_err(|error| {
            let file = certificate.cert.value.display();
            key_fault(format!("does not fit the certificate {file}: {error}"))
        })?;
        Ok(Self { key: Arc::new(key), names, expiry })
    }
}

/// The first private key of a PEM file. Error texts never show what is in it.
fn read_key(path: &Path) -> Result<PrivateKeyDer<'static>, String> {
    let pem = zeroize::Zeroizing::new(fs::read(path).map_err(|error| error.to_string())?);
    match rustls_pemfile::private_key(&mut &pem[..]) {
        Ok(Some(key)) => Ok(key),
        Ok(None) if pem.windows(15).any(|window| window == b"BEGIN ENCRYPTED") => {
            Err("the private key is encrypted: decrypt it, there is nobody to type a passphrase".to_owned())
        }
        Ok(None) => Err("no private key in it: expected a block like -----BEGIN PRIVATE KEY-----".to_owned()),
        Err(_) => Err("not a PEM file of a private key".to_owned()),
    }
}

/// DNS names and end of validity (seconds since 1970).
fn facts(certificate: &[u8]) -> Result<(Vec<String>, i64), String> {
    let (_, parsed) = X509Certificate::from_der(certificate).map_err(|error| format!("not a certificate: {error}"))?;
    let alternatives = parsed.subject_alternative_name().map_err(|error| error.to_string())?;
    let names = alternatives.into_iter().flat_map(|names| &names.value.general_names).filter_map(|name| match name {
        GeneralName::DNSName(name) => Some(name.to_ascii_lowercase()),
        _ => None,
    });
    Ok((names.collect(), parsed.validity().not_after.timestamp()))
}

/// Certificates by the names in them; `*.` stands for exactly one label (RFC 6125 section 6.4.3).
#[derive(Default)]
struct ByName {
    names: HashMap<String, Arc<CertifiedKey>>,
    first: Option<Arc<CertifiedKey>>,
}

impl ByName {
    /// Of two certificates for a name the earlier one serves it.
    fn add(&mut self, loaded: Loaded) {
        for name in loaded.names {
            self.names.entry(name).or_insert_with(|| loaded.key.clone());
        }
        self.first.get_or_insert(loaded.key);
    }

    fn find(&self, server_name: &str) -> Option<Arc<CertifiedKey>> {
        let name = server_name.to_ascii_lowercase();
        let wildcard = || name.split_once('.').and_then(|(_, parent)| self.names.get(&format!("*.{parent}")));
        self.names.get(&name).or_else(wildcard).cloned()
    }
}

impl ResolvesServerCert for ByName {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        hello.server_name().and_then(|name| self.find(name)).or_else(|| self.first.clone())
    }
}

impl std::fmt::Debug for ByName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut names: Vec<&str> = self.names.keys().map(String::as_str).collect();
        names.sort_unstable();
        f.write_str("certificates for ")?;
        f.write_str(&names.join(", "))?;
        f.write_char('.')
    }
}
