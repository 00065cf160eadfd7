//! TLS towards clients: the settings of each listener, and the handshake.
//!
//! Certificates come from `certificates` and session tickets from `tickets`; [`DownstreamTls::start`] watches the files of both. A listener
//! with `sni: strict` refuses clients that send no SNI or a name without a certificate. A client that offers application protocols (ALPN)
//! without `imap` is refused (CVE-2021-3618, ALPACA) unless the listener has `alpn: any`; a client that offers none is accepted. The error of
//! a failed handshake says what the client offered.
//!
//! Sessions are resumed only with tickets, so no state is stored between connections. One ticket is sent instead of two. Early data is never
//! accepted, because it could be replayed (RFC 8446 section 8).

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use aws_lc_rs::digest;
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;
use tokio::runtime::Handle;
use tokio::time;
use tokio_rustls::rustls::server::danger::ClientCertVerifier;
use tokio_rustls::rustls::server::{Acceptor, NoServerSessionStorage, ProducesTickets};
use tokio_rustls::rustls::version::{TLS12, TLS13};
use tokio_rustls::rustls::{Error, InvalidMessage, RootCertStore, ServerConfig};
use tokio_rustls::{LazyConfigAcceptor, TlsAcceptor, TlsStream, server};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer as _, X509Certificate};
use zeroize::Zeroizing;

use super::certificates::{Certificates, Resolver};
use super::client_hello::Offer;
use super::extraction::TrafficSecrets;
use super::record_stream::RecordStream;
use super::tickets::{ClientAuth, TicketScope, Tickets};
use super::trust::{CertificatePresence, ClientRootVerifier, with_refusal};
use super::{provider, read_certificates};
use crate::admission::MemoryCharge;
use crate::config::{
    AlpnPolicy, CertificateUser, ClientCertificates, Config, Listener, Problem, SniPolicy, TlsVersion,
};
use crate::identity::UserName;
use crate::metrics::Metrics;
use crate::process::file_watch::POLL_INTERVAL;

/// The ALPN protocol name of IMAP.
const ALPN: &[u8] = b"imap";
/// A record with the fatal alert unrecognized_name (RFC 6066 section 3). rustls would send access_denied.
const UNRECOGNIZED_NAME: [u8; 7] = [21, 3, 3, 0, 2, 2, 112];

/// TLS towards the clients of all listeners.
pub struct DownstreamTls {
    /// In the order of the configuration.
    acceptors: Vec<ListenerAcceptor>,
    certificates: Arc<Certificates>,
    tickets: Arc<Tickets>,
}

/// The TLS settings of one listener.
struct ListenerAcceptor {
    config: ServerConfig,
    strict_sni: bool,
    strict_alpn: bool,
    min_version: TlsVersion,
    /// The field of client certificates that contains the user name; `None` if the listener requests no certificates.
    certificate_user: Option<CertificateUser>,
}

impl DownstreamTls {
    /// Loads all certificates and keys. Tickets issued by `previous` stay valid at listeners whose policy is unchanged.
    ///
    /// # Errors
    /// A problem for each unusable certificate and each unusable file of ticket keys, with its location in the configuration.
    pub fn build(config: &Config, previous: Option<&Self>) -> Result<Option<Self>, Vec<Problem>> {
        if config.certificates.is_empty() {
            return Ok(None);
        }
        let mut problems = Vec::new();
        let certificates = Certificates::load(config, now()).map_err(|found| problems.extend(found)).ok();
        let mut policies = Vec::new();
        for listener in &config.listeners {
            match ListenerPolicy::build(listener) {
                Ok(policy) => policies.push(policy),
                Err(problem) => problems.push(problem),
            }
        }
        let scopes = policies.iter().map(|policy| policy.scope);
        let tickets = Tickets::build(config, scopes, previous.map(|previous| &*previous.tickets));
        let tickets = tickets.map_err(|found| problems.extend(found)).ok();
        let (Some(certificates), Some(tickets), true) = (certificates, tickets, problems.is_empty()) else {
            return Err(problems);
        };
        let certificates = Arc::new(certificates);
        let mut acceptors = Vec::new();
        for (policy, listener) in policies.into_iter().zip(&config.listeners) {
            let resolver = Resolver { certificates: certificates.clone(), strict: listener.sni == SniPolicy::Strict };
            let ticketer = tickets.ticketer(&policy.scope);
            let config =
                server_config(policy, resolver, ticketer).map_err(|error| vec![listener.location.problem(error)])?;
            acceptors.push(ListenerAcceptor {
                config,
                strict_sni: listener.sni == SniPolicy::Strict,
                strict_alpn: listener.alpn == AlpnPolicy::Strict,
                min_version: listener.tls_min,
                certificate_user: listener.client_certificates.as_ref().map(|certificates| certificates.user),
            });
        }
        Ok(Some(Self { acceptors, certificates, tickets: Arc::new(tickets) }))
    }

    /// Performs the handshake of a connection to the listener with this index in the configuration. `secrets` receives the traffic secrets
    /// of the connection. `memory` is charged for buffers that the client fills.
    ///
    /// # Errors
    /// The handshake failed, for example because there is no common version or cipher, because the client does not use TLS, because its
    /// certificate is not trusted, or because there is no certificate for the name it sent.
    pub async fn accept(
        &self,
        listener: usize,
        socket: TcpStream,
        secrets: Arc<TrafficSecrets>,
        memory: Option<MemoryCharge>,
    ) -> Result<TlsStream<RecordStream<TcpStream>>, HandshakeError> {
        let acceptor = &self.acceptors[listener];
        // The key log belongs to the configuration, so each connection needs a copy. Copies are cheap: their contents are shared.
        let mut config = acceptor.config.clone();
        config.key_log = secrets;
        let records = RecordStream::new(socket).with_first_bytes();
        let records = match memory {
            Some(charge) => records.with_charge(charge),
            None => records,
        };
        let handshake = async {
            if acceptor.strict_sni || !acceptor.strict_alpn {
                // Boxed because its future is larger than that of the other branch.
                Box::pin(self.accept_by_hello(acceptor, config, records)).await
            } else {
                TlsAcceptor::from(Arc::new(config)).accept(records).into_fallible().await.map_err(FailedHandshake::from)
            }
        };
        match with_refusal(handshake).await {
            (Ok(mut accepted), _) => {
                let (records, connection) = accepted.get_mut();
                drop(records.take_first_bytes());
                let certificates = connection.peer_certificates().unwrap_or_default();
                records.handshake_completed(certificates.iter().map(|certificate| certificate.len()).sum());
                Ok(TlsStream::Server(accepted))
            }
            (Err(failed), refusal) => Err(HandshakeError::new(failed, refusal, acceptor.min_version)),
        }
    }

    /// Whether the listener requests client certificates.
    pub fn requests_certificate(&self, listener: usize) -> bool {
        self.acceptors[listener].certificate_user.is_some()
    }

    /// Reads the ClientHello before rustls answers it, for listeners whose answer depends on it.
    async fn accept_by_hello(
        &self,
        acceptor: &ListenerAcceptor,
        mut config: ServerConfig,
        socket: RecordStream<TcpStream>,
    ) -> Result<server::TlsStream<RecordStream<TcpStream>>, FailedHandshake> {
        let mut handshake = LazyConfigAcceptor::new(Acceptor::default(), socket);
        let mut start = match (&mut handshake).await {
            Ok(start) => start,
            Err(error) => {
                let first_bytes = handshake.take_io().map(|mut socket| socket.take_first_bytes());
                return Err(FailedHandshake { error, first_bytes: first_bytes.unwrap_or_default() });
            }
        };
        let hello = start.client_hello();
        let is_known = self.certificates.has_name(hello.server_name());
        if !acceptor.strict_alpn && hello.alpn().is_some_and(|mut offered| offered.all(|protocol| protocol != ALPN)) {
            // If no protocols are configured, rustls accepts the connection without one.
            config.alpn_protocols = Vec::new();
        }
        if acceptor.strict_sni && !is_known {
            let error = std::io::Error::other("the client sent no SNI, or a name for which there is no certificate");
            let error = start.io.write_all(&UNRECOGNIZED_NAME).await.err().unwrap_or(error);
            return Err(FailedHandshake { error, first_bytes: start.io.take_first_bytes() });
        }
        start.into_stream(Arc::new(config)).into_fallible().await.map_err(FailedHandshake::from)
    }

    /// Sets the gauges, and watches the files of certificates and ticket keys on `runtime` until `stop`.
    pub fn start(&self, metrics: &Arc<Metrics>, runtime: &Handle, tasks: &TaskTracker, stop: &CancellationToken) {
        self.certificates.publish(metrics);
        let (certificates, tickets) = (self.certificates.clone(), self.tickets.clone());
        let (metrics, stop) = (metrics.clone(), stop.clone());
        let watch = async move {
            loop {
                time::sleep(POLL_INTERVAL).await;
                let (certificates, tickets, metrics) = (certificates.clone(), tickets.clone(), metrics.clone());
                let check = move || {
                    certificates.check_files(&metrics, now());
                    tickets.check_files(&metrics);
                };
                // Reading files may block, so it is not done on a thread that serves clients.
                if tokio::task::spawn_blocking(check).await.is_err() {
                    tracing::error!("the check of the certificate files panicked");
                }
            }
        };
        tasks.spawn_on(async move { stop.run_until_cancelled(watch).await }, runtime);
    }

    /// The user named by the client's certificate, in the field that the listener's configuration selects. `None` if the field is missing or
    /// the certificate has expired. A resumed session takes the certificate from the ticket, and rustls does not verify it again.
    pub fn certificate_user(&self, listener: usize, certificate: &[u8]) -> Option<UserName> {
        let field = self.acceptors[listener].certificate_user?;
        let (_, parsed) =
            X509Certificate::from_der(certificate).ok().filter(|(_, parsed)| parsed.validity().is_valid())?;
        let alternatives = parsed.subject_alternative_name().ok().flatten();
        let mut alternatives = alternatives.iter().flat_map(|names| &names.value.general_names);
        let name = match field {
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
}

/// The TLS requirements of a listener.
struct ListenerPolicy {
    verifier: Option<Arc<dyn ClientCertVerifier>>,
    scope: TicketScope,
}

impl ListenerPolicy {
    fn build(listener: &Listener) -> Result<Self, Problem> {
        let min_version = listener.tls_min;
        let Some(config) = &listener.client_certificates else {
            return Ok(Self { verifier: None, scope: TicketScope { min_version, client_auth: None } });
        };
        let presence = if config.required { CertificatePresence::Required } else { CertificatePresence::Optional };
        let (verifier, roots_digest) = client_verifier(config, presence)?;
        let client_auth = Some(ClientAuth { presence, roots_digest });
        Ok(Self { verifier: Some(verifier), scope: TicketScope { min_version, client_auth } })
    }
}

fn server_config(
    policy: ListenerPolicy,
    resolver: Resolver,
    ticketer: Option<Arc<dyn ProducesTickets>>,
) -> Result<ServerConfig, String> {
    let versions = match policy.scope.min_version {
        TlsVersion::Tls12 => &[&TLS13, &TLS12][..],
        TlsVersion::Tls13 => &[&TLS13],
    };
    let builder = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(versions)
        .map_err(|error| error.to_string())?;
    let mut config = match policy.verifier {
        Some(verifier) => builder.with_client_cert_verifier(verifier),
        None => builder.with_no_client_auth(),
    }
    .with_cert_resolver(Arc::new(resolver));
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.ignore_client_order = true;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    if let Some(ticketer) = ticketer {
        config.ticketer = ticketer;
    }
    config.send_tls13_tickets = 1;
    config.enable_secret_extraction = true;
    Ok(config)
}

/// The verifier of client certificates, and the digest of the roots that it trusts.
fn client_verifier(
    config: &ClientCertificates,
    presence: CertificatePresence,
) -> Result<(Arc<dyn ClientCertVerifier>, [u8; 32]), Problem> {
    let file = config.ca.value.display();
    let problem = |message: String| config.ca.location.problem(format!("{file}: {message}"));
    let mut roots = RootCertStore::empty();
    let mut digest = digest::Context::new(&digest::SHA256);
    let certificates = read_certificates(&config.ca.value).map_err(problem)?;
    for certificate in &certificates {
        digest.update(certificate);
        roots.add(certificate.clone()).map_err(|error| problem(error.to_string()))?;
    }
    let verifier = ClientRootVerifier::new(roots, &certificates, presence).map_err(problem)?;
    let mut bytes = [0; 32];
    bytes.copy_from_slice(digest.finish().as_ref());
    Ok((verifier, bytes))
}

/// The error of a handshake before it is explained.
struct FailedHandshake {
    error: std::io::Error,
    first_bytes: Zeroizing<Vec<u8>>,
}

impl From<(std::io::Error, RecordStream<TcpStream>)> for FailedHandshake {
    fn from((error, mut socket): (std::io::Error, RecordStream<TcpStream>)) -> Self {
        Self { error, first_bytes: socket.take_first_bytes() }
    }
}

/// The error of a handshake with a client.
#[derive(Debug, thiserror::Error)]
#[error("{reason}")]
pub struct HandshakeError {
    reason: String,
    kind: std::io::ErrorKind,
    /// The first bytes that the client sent, up to 4 KiB.
    pub first_bytes: Zeroizing<Vec<u8>>,
}

impl HandshakeError {
    /// An error of the operating system before the handshake began.
    pub fn of_system(error: &std::io::Error) -> Self {
        Self { reason: error.to_string(), kind: error.kind(), first_bytes: Zeroizing::default() }
    }

    /// The kind of the I/O error that ended the handshake.
    pub fn kind(&self) -> std::io::ErrorKind {
        self.kind
    }

    fn new(failed: FailedHandshake, refusal: Option<String>, min_version: TlsVersion) -> Self {
        let FailedHandshake { error, first_bytes } = failed;
        let cause = error.get_ref().and_then(|cause| cause.downcast_ref::<Error>());
        let explanation = || match cause? {
            Error::InvalidMessage(InvalidMessage::InvalidContentType) => {
                Some("the client does not speak TLS on this port, or not from the first byte".to_owned())
            }
            cause => Offer::read(&first_bytes)?.explain(cause, min_version),
        };
        let reason = refusal.or_else(explanation).unwrap_or_else(|| error.to_string());
        Self { reason, kind: error.kind(), first_bytes }
    }
}

/// Seconds since 1970.
fn now() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs().cast_signed())
}

#[cfg(test)]
mod tests;
