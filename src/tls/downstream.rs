//! The side that clients connect to: what each listener asks of TLS, and the handshake.
//!
//! Certificates are chosen by `certificates`, tickets sealed by `tickets`; both are read again while the process runs
//! ([`DownstreamTls::start`]). SNI: a listener may be strict, and then refuses a client that asks for no server there is a
//! certificate for. ALPN: a client that offers protocols without `imap` is refused (CVE-2021-3618, ALPACA), unless the
//! listener has `alpn: any`; one that offers none is served. A handshake that fails is explained by what the client
//! offered. Sessions are resumed by tickets alone, so that nothing is stored between them, one ticket is
//! sent instead of two, and no early data is ever taken (RFC 8446 section 8: it could be replayed).

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
use super::tickets::{Clients, Scope, Tickets};
use super::trust::{ClientsByRoots, observed};
use super::{provider, read_certificates};
use crate::admission::MemoryCharge;
use crate::config::{
    AlpnPolicy, CertificateUser, ClientCertificates, Config, Listener, Problem, SniPolicy, TlsVersion,
};
use crate::identity::UserName;
use crate::metrics::Metrics;
use crate::process::file_watch::POLL_INTERVAL;

/// The ALPN name of IMAP (RFC 7301 registry).
const ALPN: &[u8] = b"imap";
/// The alert unrecognized_name, fatal, as a record (RFC 6066 section 3). rustls would say access_denied.
const UNRECOGNIZED_NAME: [u8; 7] = [21, 3, 3, 0, 2, 2, 112];

/// What clients are shown.
pub struct DownstreamTls {
    /// One a listener.
    listeners: Vec<ListenerAcceptor>,
    certificates: Arc<Certificates>,
    tickets: Arc<Tickets>,
}

/// What clients of a listener are shown.
struct ListenerAcceptor {
    config: ServerConfig,
    strict_sni: bool,
    strict_alpn: bool,
    oldest: TlsVersion,
    user: Option<CertificateUser>,
}

impl DownstreamTls {
    /// Reads all certificates and keys. Tickets that `previous` gave out stay good where the policy is the same.
    ///
    /// # Errors
    /// Every certificate and every file of ticket keys that cannot be used, with its place in the configuration.
    pub fn build(config: &Config, previous: Option<&Self>) -> Result<Option<Self>, Vec<Problem>> {
        if config.certificates.is_empty() {
            return Ok(None);
        }
        let mut problems = Vec::new();
        let certificates = Certificates::read(config, now()).map_err(|found| problems.extend(found)).ok();
        let mut policies = Vec::new();
        for listener in &config.listeners {
            match Policy::build(listener) {
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
        let mut listeners = Vec::new();
        for (policy, listener) in policies.into_iter().zip(&config.listeners) {
            let resolver = Resolver { certificates: certificates.clone(), strict: listener.sni == SniPolicy::Strict };
            let ticketer = tickets.of(&policy.scope);
            let built =
                server_config(policy, resolver, ticketer).map_err(|error| vec![listener.location.problem(error)])?;
            listeners.push(ListenerAcceptor {
                config: built,
                strict_sni: listener.sni == SniPolicy::Strict,
                strict_alpn: listener.alpn == AlpnPolicy::Strict,
                oldest: listener.tls_min,
                user: listener.client_certificates.as_ref().map(|wanted| wanted.user),
            });
        }
        Ok(Some(Self { listeners, certificates, tickets: Arc::new(tickets) }))
    }

    /// Performs the handshake of a connection to the listener at this place in the configuration. `secrets` receives the
    /// connection's traffic secrets; `memory` is charged for what the client makes the connection hold.
    ///
    /// # Errors
    /// No common version or cipher, no TLS at all, a certificate that is not trusted, or no certificate for the server
    /// name that the client asked for.
    pub async fn accept(
        &self,
        listener: usize,
        socket: TcpStream,
        secrets: Arc<TrafficSecrets>,
        memory: Option<MemoryCharge>,
    ) -> Result<TlsStream<RecordStream<TcpStream>>, HandshakeError> {
        let shown = &self.listeners[listener];
        // A configuration of its own is what gives a connection a key log of its own; all it holds is shared.
        let mut config = shown.config.clone();
        config.key_log = secrets;
        let records = RecordStream::new(socket).keeping_first_bytes();
        let records = match memory {
            Some(charge) => records.charged(charge),
            None => records,
        };
        let handshake = async {
            match shown.strict_sni || !shown.strict_alpn {
                // In a box: it is larger than what all other listeners need.
                true => Box::pin(self.accept_by_hello(shown, config, records)).await,
                false => TlsAcceptor::from(Arc::new(config)).accept(records).into_fallible().await.map_err(broken),
            }
        };
        match observed(handshake).await {
            (Ok(mut accepted), _) => {
                let (records, connection) = accepted.get_mut();
                drop(records.take_first_bytes());
                let certificates = connection.peer_certificates().unwrap_or_default();
                records.established(certificates.iter().map(|certificate| certificate.len()).sum());
                Ok(TlsStream::Server(accepted))
            }
            (Err((error, first_bytes)), refusal) => {
                Err(HandshakeError::new(&error, first_bytes, refusal, shown.oldest))
            }
        }
    }

    /// Whether the listener asks clients for certificates.
    pub fn asks_certificate(&self, listener: usize) -> bool {
        self.listeners[listener].user.is_some()
    }

    /// Reads the client's first message before rustls answers it, for listeners whose answer depends on it.
    async fn accept_by_hello(
        &self,
        shown: &ListenerAcceptor,
        mut config: ServerConfig,
        socket: RecordStream<TcpStream>,
    ) -> Result<server::TlsStream<RecordStream<TcpStream>>, Broken> {
        let mut acceptor = LazyConfigAcceptor::new(Acceptor::default(), socket);
        let mut start = match (&mut acceptor).await {
            Ok(start) => start,
            Err(error) => {
                let first_bytes = acceptor.take_io().map(|mut socket| socket.take_first_bytes());
                return Err((error, first_bytes.unwrap_or_default()));
            }
        };
        let hello = start.client_hello();
        let is_known = self.certificates.knows(hello.server_name());
        if !shown.strict_alpn && hello.alpn().is_some_and(|mut offered| offered.all(|protocol| protocol != ALPN)) {
            // Without protocols of its own rustls agrees on none and goes on.
            config.alpn_protocols = Vec::new();
        }
        if shown.strict_sni && !is_known {
            let error = std::io::Error::other("the client asks for no server that there is a certificate for");
            let error = start.io.write_all(&UNRECOGNIZED_NAME).await.err().unwrap_or(error);
            return Err((error, start.io.take_first_bytes()));
        }
        start.into_stream(Arc::new(config)).into_fallible().await.map_err(broken)
    }

    /// Sets the gauges, and begins to watch certificates and ticket keys, on `runtime` until `stop`.
    pub fn start(&self, metrics: &Arc<Metrics>, runtime: &Handle, tasks: &TaskTracker, stop: &CancellationToken) {
        self.certificates.publish(metrics);
        let (certificates, tickets) = (self.certificates.clone(), self.tickets.clone());
        let (metrics, stop) = (metrics.clone(), stop.clone());
        let follow = async move {
            loop {
                time::sleep(POLL_INTERVAL).await;
                let (certificates, tickets, metrics) = (certificates.clone(), tickets.clone(), metrics.clone());
                let look = move || {
                    certificates.look(&metrics, now());
                    tickets.look(&metrics);
                };
                // Files may be slow: not on a thread that serves.
                if tokio::task::spawn_blocking(look).await.is_err() {
                    tracing::error!("certificates could not be looked at");
                }
            }
        };
        tasks.spawn_on(async move { stop.run_until_cancelled(follow).await }, runtime);
    }

    /// Whose certificate it is, by the rule of the listener. `None`: it names nobody, or has ended since: a session that
    /// is resumed has it from the ticket, and rustls does not check it again.
    pub fn owner(&self, listener: usize, certificate: &[u8]) -> Option<UserName> {
        let rule = self.listeners[listener].user?;
        let (_, parsed) =
            X509Certificate::from_der(certificate).ok().filter(|(_, parsed)| parsed.validity().is_valid())?;
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
}

/// What a listener asks of clients.
struct Policy {
    verifier: Option<Arc<dyn ClientCertVerifier>>,
    scope: Scope,
}

impl Policy {
    fn build(listener: &Listener) -> Result<Self, Problem> {
        let min = listener.tls_min;
        let Some(wanted) = &listener.client_certificates else {
            return Ok(Self { verifier: None, scope: Scope { min, clients: None } });
        };
        let (verifier, roots) = verifier(wanted)?;
        let clients = Some(Clients { required: wanted.required, roots });
        Ok(Self { verifier: Some(verifier), scope: Scope { min, clients } })
    }
}

fn server_config(
    policy: Policy,
    resolver: Resolver,
    ticketer: Option<Arc<dyn ProducesTickets>>,
) -> Result<ServerConfig, String> {
    let versions = match policy.scope.min {
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

/// And the digest of the roots it trusts.
fn verifier(wanted: &ClientCertificates) -> Result<(Arc<dyn ClientCertVerifier>, [u8; 32]), Problem> {
    let file = wanted.ca.value.display();
    let fault = |message: String| wanted.ca.location.problem(format!("{file}: {message}"));
    let mut roots = RootCertStore::empty();
    let mut digest = digest::Context::new(&digest::SHA256);
    let certificates = read_certificates(&wanted.ca.value).map_err(fault)?;
    for certificate in &certificates {
        digest.update(certificate);
        roots.add(certificate.clone()).map_err(|error| fault(error.to_string()))?;
    }
    let verifier = ClientsByRoots::new(roots, &certificates, wanted.required).map_err(fault)?;
    let mut bytes = [0; 32];
    bytes.copy_from_slice(digest.finish().as_ref());
    Ok((verifier, bytes))
}

/// Why a handshake failed, and what the client sent first.
type Broken = (std::io::Error, Zeroizing<Vec<u8>>);

fn broken((error, mut socket): (std::io::Error, RecordStream<TcpStream>)) -> Broken {
    (error, socket.take_first_bytes())
}

/// A handshake with a client that failed.
#[derive(Debug, thiserror::Error)]
#[error("{reason}")]
pub struct HandshakeError {
    reason: String,
    kind: std::io::ErrorKind,
    /// What the client sent first, up to 4 KiB.
    pub first_bytes: Zeroizing<Vec<u8>>,
}

impl HandshakeError {
    /// The system failed before the handshake began.
    pub fn of_system(error: &std::io::Error) -> Self {
        Self { reason: error.to_string(), kind: error.kind(), first_bytes: Zeroizing::default() }
    }

    /// The kind of the I/O error that ended the handshake.
    pub fn kind(&self) -> std::io::ErrorKind {
        self.kind
    }

    fn new(
        error: &std::io::Error,
        first_bytes: Zeroizing<Vec<u8>>,
        refusal: Option<String>,
        oldest: TlsVersion,
    ) -> Self {
        let cause = error.get_ref().and_then(|cause| cause.downcast_ref::<Error>());
        let explained = || match cause? {
            Error::InvalidMessage(InvalidMessage::InvalidContentType) => {
                Some("the client does not speak TLS on this port, or not from the first byte".to_owned())
            }
            cause => Offer::read(&first_bytes)?.explains(cause, oldest),
        };
        let reason = refusal.or_else(explained).unwrap_or_else(|| error.to_string());
        Self { reason, kind: error.kind(), first_bytes }
    }
}

/// Seconds since 1970.
fn now() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs().cast_signed())
}

#[cfg(test)]
mod tests;
