//! The ClientHello of a failed TLS handshake. It is parsed as far as possible, and its description has a limited size and contains no
//! control characters.

use tokio_rustls::rustls::{Error, PeerIncompatible};
use vestibule::config::TlsVersion;
use vestibule::tls::client_hello::Offer;

/// Maximum size of the description in a log record, in bytes.
const MAX_DESCRIPTION: usize = 2000;

pub fn run(input: &[u8]) {
    let Some(offer) = Offer::read(input) else {
        // A prefix of an invalid ClientHello is not a valid one.
        return assert!(input.first() != Some(&22) || Offer::read(&input[..input.len().min(5)]).is_none());
    };
    for error in [
        Error::NoApplicationProtocol,
        Error::PeerIncompatible(PeerIncompatible::NoCipherSuitesInCommon),
        Error::PeerIncompatible(PeerIncompatible::NoKxGroupsInCommon),
        Error::DecryptError,
    ] {
        for oldest in [TlsVersion::Tls12, TlsVersion::Tls13] {
            let words = offer.explain(&error, oldest).unwrap_or_default();
            assert!(words.len() <= MAX_DESCRIPTION, "{} bytes", words.len());
            assert!(!words.contains(char::is_control), "{words:?}");
        }
    }
}
