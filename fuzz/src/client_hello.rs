//! What a client sent before a TLS handshake failed: read as far as it goes, and shown in words that are bounded and hold no controls.

use tokio_rustls::rustls::{Error, PeerIncompatible};
use vestibule::config::TlsVersion;
use vestibule::tls::client_hello::Offer;

/// Longer details would make a log record unwieldy.
const MAX_WORDS: usize = 2000;

pub fn run(input: &[u8]) {
    let Some(offer) = Offer::read(input) else {
        // What is not a ClientHello does not become one by being cut.
        return assert!(input.first() != Some(&22) || Offer::read(&input[..input.len().min(5)]).is_none());
    };
    for error in [
        Error::NoApplicationProtocol,
        Error::PeerIncompatible(PeerIncompatible::NoCipherSuitesInCommon),
        Error::PeerIncompatible(PeerIncompatible::NoKxGroupsInCommon),
        Error::DecryptError,
    ] {
        for oldest in [TlsVersion::Tls12, TlsVersion::Tls13] {
            let words = offer.explains(&error, oldest).unwrap_or_default();
            assert!(words.len() <= MAX_WORDS, "{} bytes", words.len());
            assert!(!words.contains(char::is_control), "{words:?}");
        }
    }
}
