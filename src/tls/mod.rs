//! TLS towards clients and towards servers: handshakes, certificates, session tickets and verification.
//!
//! [`downstream`] accepts connections of clients, with the certificates of `certificates` (and `ocsp`) and the session tickets of
//! `tickets`. [`upstream`] connects to servers and directories, whose certificates `trust` verifies. [`record_stream`] and [`extraction`]
//! take an established connection out of rustls after the login.
//!
//! Both directions use the same crypto provider (aws-lc) and prefer AES-128-GCM: it is the fastest cipher on processors with AES
//! instructions, and the AES-256 suites need SHA-384, which common processors do not accelerate.

mod certificate_refusal;
mod certificates;
pub mod client_hello;
pub mod downstream;
mod error_text;
pub mod extraction;
mod ocsp;
pub mod record_stream;
mod tickets;
mod trust;
pub mod upstream;

use std::path::Path;
use std::sync::Arc;

use tokio_rustls::rustls::crypto::{CryptoProvider, aws_lc_rs};
use tokio_rustls::rustls::pki_types::CertificateDer;
use x509_parser::prelude::{FromDer as _, X509Certificate};

pub use self::error_text::explain_error;

/// The crypto provider of the process, for TLS 1.3 and 1.2.
fn provider() -> Arc<CryptoProvider> {
    use aws_lc_rs::cipher_suite as suite;
    Arc::new(CryptoProvider {
        cipher_suites: vec![
            suite::TLS13_AES_128_GCM_SHA256,
            suite::TLS13_AES_256_GCM_SHA384,
            suite::TLS13_CHACHA20_POLY1305_SHA256,
            suite::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256,
            suite::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256,
            suite::TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384,
            suite::TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384,
            suite::TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256,
            suite::TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256,
        ],
        ..aws_lc_rs::default_provider()
    })
}

/// The expiry of a certificate in DER, in seconds since 1970. `None` if the certificate cannot be parsed.
pub fn certificate_expiry(certificate: &[u8]) -> Option<i64> {
    let (_, parsed) = X509Certificate::from_der(certificate).ok()?;
    Some(parsed.validity().not_after.timestamp())
}

/// Reads the certificates of a PEM file. A file without certificates is an error.
fn read_certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let pem = std::fs::read(path).map_err(|error| error.to_string())?;
    let certificates: Vec<_> = rustls_pemfile::certs(&mut &pem[..])
        .collect::<Result<_, _>>()
        .map_err(|error| format!("not a PEM file of certificates: {error}"))?;
    if certificates.is_empty() {
        return Err("the file contains no certificate: expected a block that begins with -----BEGIN CERTIFICATE-----"
            .to_owned());
    }
    Ok(certificates)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cipher_suites_begin_with_aes_128_in_both_versions() {
        let names: Vec<String> = provider().cipher_suites.iter().map(|suite| format!("{:?}", suite.suite())).collect();
        assert_eq!(names[0], "TLS13_AES_128_GCM_SHA256");
        assert_eq!(names[3], "TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256");
        // The list has every suite of the default provider.
        assert_eq!(names.len(), aws_lc_rs::default_provider().cipher_suites.len());
    }
}
