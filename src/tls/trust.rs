//! Verification of peers' certificates, with explanations of refusals for the operator.
//!
//! rustls verifies chains. A certificate that is listed in the trusted file is trusted too, as in OpenSSL, even if it is a CA certificate
//! (plain `openssl req -x509` creates one); its name, dates and purpose are still verified. rustls chooses the alert that is sent to the
//! peer. The explanation needs the refused certificate, so the verifier stores it in a task-local variable, which [`with_refusal`] reads.

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

use super::certificate_refusal::{Peer, explain};
use super::provider;

tokio::task_local! {
    /// Why the certificate of the current handshake was refused.
    static REFUSAL: RefCell<Option<String>>;
}

/// Runs a handshake. Returns its result and, if the peer's certificate was refused, the explanation.
pub(super) async fn with_refusal<F: Future>(handshake: F) -> (F::Output, Option<String>) {
    let handshake = async {
        let output = handshake.await;
        (output, REFUSAL.with(RefCell::take))
    };
    REFUSAL.scope(RefCell::default(), handshake).await
}

/// Stores the explanation of `error` for [`with_refusal`], and returns the error.
fn store_refusal(error: Error, certificate: &[u8], role: Peer<'_>, now: UnixTime) -> Error {
    // Clients of directories do not use `with_refusal`; they have only the error.
    let _ = REFUSAL.try_with(|refusal| refusal.replace(Some(explain(&error, certificate, role, now.as_secs()))));
    error
}

/// SHA-256 digests of the certificates that are trusted without a chain.
#[derive(Debug, Clone, Default)]
struct TrustedCertificates(HashSet<[u8; 32]>);

impl TrustedCertificates {
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

/// Trusts servers whose chain ends at a root certificate, and servers whose certificate is in the trusted file.
#[derive(Debug)]
pub(super) struct RootVerifier {
    chains: Arc<WebPkiServerVerifier>,
    certificates: TrustedCertificates,
}

impl RootVerifier {
    /// `roots` must contain `certificates`.
    ///
    /// # Errors
    /// There are no roots.
    pub(super) fn new(roots: RootCertStore, certificates: &[CertificateDer<'_>]) -> Result<Arc<Self>, String> {
        let chains = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider()).build();
        let chains = chains.map_err(|error| error.to_string())?;
        Ok(Arc::new(Self { chains, certificates: TrustedCertificates::new(certificates) }))
    }
}

impl ServerCertVerifier for RootVerifier {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let verified = if self.certificates.contains(certificate) {
            verify_dates_and_purpose(certificate, now, Purpose::Server)
                .and_then(|()| verify_name(certificate, name))
                .map(|()| ServerCertVerified::assertion())
        } else {
            self.chains.verify_server_cert(certificate, intermediates, name, ocsp, now)
        };
        verified.map_err(|error| store_refusal(error, certificate, Peer::Server(name), now))
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

/// Trusts servers by their public key alone (`pin`), or all servers (`insecure`). The signature of the handshake is verified in both
/// cases, so the server must have the private key of the certificate it presents.
#[derive(Debug)]
pub(super) struct KeyVerifier {
    provider: Arc<CryptoProvider>,
    accepted: AcceptedKeys,
}

/// The public keys that a [`KeyVerifier`] trusts.
#[derive(Debug)]
pub(super) enum AcceptedKeys {
    /// The keys with these SHA-256 digests.
    Pinned(Vec<[u8; 32]>),
    Any,
}

impl KeyVerifier {
    pub(super) fn new(accepted: AcceptedKeys) -> Arc<Self> {
        Arc::new(Self { provider: provider(), accepted })
    }
}

impl ServerCertVerifier for KeyVerifier {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        _ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let pins = match &self.accepted {
            AcceptedKeys::Pinned(pins) => pins,
            AcceptedKeys::Any => return Ok(ServerCertVerified::assertion()),
        };
        let parsed = X509Certificate::from_der(certificate);
        let verified = match parsed {
            Err(_) => Err(CertificateError::BadEncoding),
            Ok((_, parsed)) if pins.contains(&sha256(parsed.public_key().raw)) => Ok(ServerCertVerified::assertion()),
            Ok(_) => Err(CertificateError::ApplicationVerificationFailure),
        };
        verified.map_err(|error| store_refusal(error.into(), certificate, Peer::Server(name), now))
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, certificate, signed, &self.provider.signature_verification_algorithms)
            .map_err(|error| store_refusal(error, certificate, Peer::PinnedServer, UnixTime::now()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, certificate, signed, &self.provider.signature_verification_algorithms)
            .map_err(|error| store_refusal(error, certificate, Peer::PinnedServer, UnixTime::now()))
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

/// Whether a listener requires clients to present a certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum CertificatePresence {
    Optional,
    Required,
}

/// Trusts clients whose chain ends at a root certificate, and clients whose certificate is in the trusted file.
#[derive(Debug)]
pub(super) struct ClientRootVerifier {
    chains: Arc<dyn ClientCertVerifier>,
    certificates: TrustedCertificates,
}

impl ClientRootVerifier {
    /// `roots` must contain `certificates`. A client without a certificate is accepted unless `presence` requires one.
    ///
    /// # Errors
    /// There are no roots.
    pub(super) fn new(
        roots: RootCertStore,
        certificates: &[CertificateDer<'_>],
        presence: CertificatePresence,
    ) -> Result<Arc<Self>, String> {
        let builder = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider());
        let builder = match presence {
            CertificatePresence::Required => builder,
            CertificatePresence::Optional => builder.allow_unauthenticated(),
        };
        let chains = builder.build().map_err(|error| error.to_string())?;
        Ok(Arc::new(Self { chains, certificates: TrustedCertificates::new(certificates) }))
    }
}

impl ClientCertVerifier for ClientRootVerifier {
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
        let verified = if self.certificates.contains(certificate) {
            verify_dates_and_purpose(certificate, now, Purpose::Client).map(|()| ClientCertVerified::assertion())
        } else {
            self.chains.verify_client_cert(certificate, intermediates, now)
        };
        verified.map_err(|error| store_refusal(error, certificate, Peer::Client, now))
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

/// The role of the certificate's owner in the handshake.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Purpose {
    Server,
    Client,
}

/// Verifies the dates and the purpose of a certificate that is in the trusted file.
fn verify_dates_and_purpose(certificate: &[u8], now: UnixTime, purpose: Purpose) -> Result<(), Error> {
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
    let is_allowed = purposes.is_none_or(|purposes| {
        let listed = match purpose {
            Purpose::Server => purposes.value.server_auth,
            Purpose::Client => purposes.value.client_auth,
        };
        listed || purposes.value.any
    });
    if is_allowed { Ok(()) } else { Err(CertificateError::InvalidPurpose.into()) }
}

/// Verifies that a certificate that is in the trusted file is valid for `name`. If it has no alternative names, like a certificate of
/// plain `openssl req -x509`, its common name is used.
fn verify_name(certificate: &CertificateDer<'_>, name: &ServerName<'_>) -> Result<(), Error> {
    let mismatch = match verify_server_name(&ParsedCertificate::try_from(certificate)?, name) {
        Ok(()) => return Ok(()),
        Err(error) => error,
    };
    let (_, parsed) = X509Certificate::from_der(certificate).map_err(|_| CertificateError::BadEncoding)?;
    if parsed.subject_alternative_name().map_err(|_| CertificateError::BadEncoding)?.is_some() {
        return Err(mismatch);
    }
    let expected = name.to_str();
    let mut common = parsed.subject().iter_common_name().filter_map(|common| common.as_str().ok());
    if common.any(|common| common.eq_ignore_ascii_case(&expected)) { Ok(()) } else { Err(mismatch) }
}

#[cfg(test)]
pub(super) mod tests;
