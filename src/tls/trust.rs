//! Verification of peers' certificates: what is trusted, and refusals in an operator's words.
//!
//! Chains are verified by rustls. In addition a certificate that is itself in the trusted file is trusted, as OpenSSL
//! does it, although it may be that of an authority (plain `openssl req -x509` makes one): its name, dates and purpose
//! are still checked. The alert that the peer gets is the one rustls chooses; the explanation, which needs the refused
//! certificate, is passed to [`observed`] beside it.

use std::cell::RefCell;
use std::collections::HashSet;
use std::future::Future;
use std::sync::Arc;

use aws_lc_rs::digest::{SHA256, digest};
use tokio_rustls::rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use tokio_rustls::rustls::client::{WebPkiServerVerifier, verify_server_name};
use tokio_rustls::rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use tokio_rustls::rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use tokio_rustls::rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use tokio_rustls::rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, RootCertStore, SignatureScheme,
};
use x509_parser::prelude::{FromDer as _, X509Certificate};

use super::certificate_refusal::{Role, in_words};
use super::provider;

tokio::task_local! {
    /// Why the certificate of the handshake under way was refused.
    static REFUSAL: RefCell<Option<String>>;
}

/// Runs a handshake; returns its result, and why the peer's certificate was refused if it was.
pub(super) async fn observed<F: Future>(handshake: F) -> (F::Output, Option<String>) {
    let handshake = async {
        let output = handshake.await;
        (output, REFUSAL.with(RefCell::take))
    };
    REFUSAL.scope(RefCell::default(), handshake).await
}

/// Passes the explanation of `error` to [`observed`]; returns the error.
fn refused(error: Error, certificate: &[u8], role: Role<'_>, now: UnixTime) -> Error {
    // Outside of `observed` (clients of directories) the error alone must do.
    let _ = REFUSAL.try_with(|refusal| refusal.replace(Some(in_words(&error, certificate, role, now.as_secs()))));
    error
}

/// Certificates that are trusted as they are, by their digests.
#[derive(Debug, Clone, Default)]
struct Exact(HashSet<[u8; 32]>);

impl Exact {
    fn new(certificates: &[CertificateDer<'_>]) -> Self {
        Self(certificates.iter().map(|certificate| sha256(certificate)).collect())
    }

    fn contains(&self, certificate: &[u8]) -> bool {
        self.0.contains(&sha256(certificate))
    }
}

fn sha256(bytes: &[u8]) -> [u8; 32] {
    let mut sum = [0; 32];
    sum.copy_from_slice(digest(&SHA256, bytes).as_ref());
    sum
}

/// Trusts servers by root certificates, or by their own certificates among these.
#[derive(Debug)]
pub(super) struct ByRoots {
    chains: Arc<WebPkiServerVerifier>,
    exact: Exact,
}

impl ByRoots {
    /// `roots` are built from `certificates`.
    ///
    /// # Errors
    /// There are no roots.
    pub(super) fn new(roots: RootCertStore, certificates: &[CertificateDer<'_>]) -> Result<Arc<Self>, String> {
        let chains = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider()).build();
        let chains = chains.map_err(|error| error.to_string())?;
        Ok(Arc::new(Self { chains, exact: Exact::new(certificates) }))
    }
}

impl ServerCertVerifier for ByRoots {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let verified = if self.exact.contains(certificate) {
            is_valid(certificate, now, Purpose::Server)
                .and_then(|()| is_named(certificate, name))
                .map(|()| ServerCertVerified::assertion())
        } else {
            self.chains.verify_server_cert(certificate, intermediates, name, ocsp, now)
        };
        verified.map_err(|error| refused(error, certificate, Role::Server(name), now))
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chains.verify_tls12_signature(message, certificate, signed)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chains.verify_tls13_signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.chains.supported_verify_schemes()
    }
}

/// Trusts servers by pins alone, or trusts every server: what `pin` and `insecure` mean. The handshake's signature is
/// still checked, so that the server has the key of the certificate it shows.
#[derive(Debug)]
pub(super) struct ByPin {
    provider: Arc<CryptoProvider>,
    accepted: Accepted,
}

/// Which servers [`ByPin`] trusts.
#[derive(Debug)]
pub(super) enum Accepted {
    /// Those whose public key has one of these SHA-256 digests.
    Pins(Vec<[u8; 32]>),
    /// All servers.
    Everything,
}

impl ByPin {
    pub(super) fn new(accepted: Accepted) -> Arc<Self> {
        Arc::new(Self { provider: provider(), accepted })
    }
}

impl ServerCertVerifier for ByPin {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        _ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let pins = match &self.accepted {
            Accepted::Pins(pins) => pins,
            Accepted::Everything => return Ok(ServerCertVerified::assertion()),
        };
        let parsed = X509Certificate::from_der(certificate);
        let verified = match parsed {
            Err(_) => Err(CertificateError::BadEncoding),
            Ok((_, parsed)) if pins.contains(&sha256(parsed.public_key().raw)) => Ok(ServerCertVerified::assertion()),
            Ok(_) => Err(CertificateError::ApplicationVerificationFailure),
        };
        verified.map_err(|error| refused(error.into(), certificate, Role::Server(name), now))
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, certificate, signed, &self.provider.signature_verification_algorithms)
            .map_err(|error| refused(error, certificate, Role::PinnedServer, UnixTime::now()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, certificate, signed, &self.provider.signature_verification_algorithms)
            .map_err(|error| refused(error, certificate, Role::PinnedServer, UnixTime::now()))
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

/// Trusts clients by root certificates, or by their own certificates among these.
#[derive(Debug)]
pub(super) struct ClientsByRoots {
    chains: Arc<dyn ClientCertVerifier>,
    exact: Exact,
}

impl ClientsByRoots {
    /// `roots` are built from `certificates`; a client without a certificate is let in unless one is `required`.
    ///
    /// # Errors
    /// There are no roots.
    pub(super) fn new(
        roots: RootCertStore,
        certificates: &[CertificateDer<'_>],
        required: bool,
    ) -> Result<Arc<Self>, String> {
        let builder = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider());
        let builder = if required { builder } else { builder.allow_unauthenticated() };
        let chains = builder.build().map_err(|error| error.to_string())?;
        Ok(Arc::new(Self { chains, exact: Exact::new(certificates) }))
    }
}

impl ClientCertVerifier for ClientsByRoots {
    fn offer_client_auth(&self) -> bool {
        self.chains.offer_client_auth()
    }

    fn client_auth_mandatory(&self) -> bool {
        self.chains.client_auth_mandatory()
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.chains.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let verified = if self.exact.contains(certificate) {
            is_valid(certificate, now, Purpose::Client).map(|()| ClientCertVerified::assertion())
        } else {
            self.chains.verify_client_cert(certificate, intermediates, now)
        };
        verified.map_err(|error| refused(error, certificate, Role::Client, now))
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chains.verify_tls12_signature(message, certificate, signed)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chains.verify_tls13_signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.chains.supported_verify_schemes()
    }
}

/// What a certificate is used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Purpose {
    Server,
    Client,
}

/// Dates and purpose of a certificate that is trusted as it is.
fn is_valid(certificate: &[u8], now: UnixTime, purpose: Purpose) -> Result<(), Error> {
    let (_, parsed) = X509Certificate::from_der(certificate).map_err(|_| CertificateError::BadEncoding)?;
    let seconds = i64::try_from(now.as_secs()).unwrap_or(i64::MAX);
    if seconds > parsed.validity().not_after.timestamp() {
        return Err(CertificateError::Expired.into());
    }
    if seconds < parsed.validity().not_before.timestamp() {
        return Err(CertificateError::NotValidYet.into());
    }
    // RFC 5280 section 4.2.1.12: without the extension a certificate serves every purpose.
    let purposes = parsed.extended_key_usage().map_err(|_| CertificateError::BadEncoding)?;
    let is_fit = purposes.is_none_or(|purposes| {
        let listed = match purpose {
            Purpose::Server => purposes.value.server_auth,
            Purpose::Client => purposes.value.client_auth,
        };
        listed || purposes.value.any
    });
    if is_fit { Ok(()) } else { Err(CertificateError::InvalidPurpose.into()) }
}

/// Whether a certificate that is trusted as it is carries `name`. One without alternative names, as `openssl req -x509`
/// makes it, is known by its common name.
fn is_named(certificate: &CertificateDer<'_>, name: &ServerName<'_>) -> Result<(), Error> {
    let mismatch = match verify_server_name(&ParsedCertificate::try_from(certificate)?, name) {
        Ok(()) => return Ok(()),
        Err(error) => error,
    };
    let (_, parsed) = X509Certificate::from_der(certificate).map_err(|_| CertificateError::BadEncoding)?;
    if parsed.subject_alternative_name().map_err(|_| CertificateError::BadEncoding)?.is_some() {
        return Err(mismatch);
    }
    let asked = name.to_str();
    let mut common = parsed.subject().iter_common_name().filter_map(|common| common.as_str().ok());
    if common.any(|common| common.eq_ignore_ascii_case(&asked)) { Ok(()) } else { Err(mismatch) }
}

#[cfg(test)]
pub(super) mod tests;
