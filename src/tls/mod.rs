//! TLS of both sides: what clients are shown, and what servers must show.
//!
//! [`server`] builds the side that clients connect to, with `certificates` (and `ocsp`) and `tickets`; [`client`] the side that connects to servers; [`records`] and
//! [`handover`] take the connection from rustls once the login is done. Both sides use one
//! provider (aws-lc) with AES-128-GCM first: it is the fastest on hardware with AES instructions, and SHA-384, which
//! the 256-bit suites bring along, has no hardware help on common processors.

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

/// The process's crypto provider: TLS 1.3 and 1.2, AES-128-GCM preferred.
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

/// When a certificate (in DER) ends, in seconds since 1970. `None`: it cannot be read.
pub fn certificate_expiry(certificate: &[u8]) -> Option<i64> {
    let (_, parsed) = X509Certificate::from_der(certificate).ok()?;
    Some(parsed.validity().not_after.timestamp())
}

/// All certificates of a PEM file, at least one.
fn read_certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let pem = std::fs::read(path).map_err(|error| error.to_string())?;
    let certificates: Vec<_> = rustls_pemfile::certs(&mut &pem[..])
        .collect::<Result<_, _>>()
        .map_err(|error| format!("not a PEM file of certificates: {error}"))?;
    if certificates.is_empty() {
        return Err("no certificate in it: expected a block that begins with -----BEGIN CERTIFICATE-----".to_owned());
    }
    Ok(certificates)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn aes_128_comes_first_in_both_versions() {
        let names: Vec<String> = provider().cipher_suites.iter().map(|suite| format!("{:?}", suite.suite())).collect();
        assert_eq!(names[0], "TLS13_AES_128_GCM_SHA256");
        assert_eq!(names[3], "TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256");
        // Nothing that the provider has was left out.
        assert_eq!(names.len(), aws_lc_rs::default_provider().cipher_suites.len());
    }
}
