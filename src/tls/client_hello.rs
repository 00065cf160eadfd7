//! Describes what a client offered in its ClientHello, for the log record of a failed handshake.
//!
//! rustls reports that the two sides have nothing in common, but not what the client offered. [`Offer::read`] parses the first bytes of the
//! connection, which are buffered until the handshake ends. It is called only if the handshake fails. The bytes are
//! untrusted: parsing stops at the first incomplete field, and the description is escaped and limited in length.

use tokio_rustls::rustls::{CipherSuite, Error, PeerIncompatible};

use super::provider;
use crate::config::TlsVersion;

/// Cipher suites named in a log record.
const MAX_SUITES: usize = 4;
/// Application protocols named in a log record.
const MAX_PROTOCOLS: usize = 8;
/// Bytes of an application protocol's name in a log record.
const MAX_PROTOCOL_NAME: usize = 32;
/// Length of a TLS record's header.
const RECORD_HEADER: usize = 5;
/// Record type of handshake messages.
const HANDSHAKE: u8 = 22;
/// Handshake type of a ClientHello.
const CLIENT_HELLO: u8 = 1;
/// Extension number of ALPN (RFC 7301).
const EXTENSION_ALPN: u16 = 16;
/// Extension number of supported_versions (RFC 8446 section 4.2.1).
const EXTENSION_VERSIONS: u16 = 43;
/// The number of TLS 1.2 on the wire.
const TLS_1_2: u16 = 0x0303;
/// The number of TLS 1.3 on the wire.
const TLS_1_3: u16 = 0x0304;

/// The parts of a ClientHello that decide whether a handshake is possible.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Offer {
    /// Protocol versions by their numbers on the wire; at least one.
    versions: Vec<u16>,
    /// Cipher suites in the client's order, without signalling values.
    suites: Vec<u16>,
    /// Application protocols (ALPN) in the client's order.
    protocols: Vec<Vec<u8>>,
}

impl Offer {
    /// Reads the start of a connection. `None` if it is not a ClientHello.
    pub fn read(bytes: &[u8]) -> Option<Self> {
        let message = handshake_bytes(bytes)?;
        let mut reader = Reader(&message);
        if reader.byte()? != CLIENT_HELLO {
            return None;
        }
        reader.take(3)?;
        let legacy_version = reader.number()?;
        let mut offer = Self { versions: vec![legacy_version], ..Self::default() };
        // Fields beyond the end of a truncated message stay empty.
        let _ = offer.read_rest(&mut reader);
        Some(offer)
    }

    fn read_rest(&mut self, reader: &mut Reader<'_>) -> Option<()> {
        reader.take(32)?;
        let session_id = reader.byte()?;
        reader.take(session_id.into())?;
        let suites = reader.number()?;
        let mut suites = Reader(reader.take(suites.into())?);
        while let Some(suite) = suites.number() {
            if !is_signalling(suite) {
                self.suites.push(suite);
            }
        }
        let compressions = reader.byte()?;
        reader.take(compressions.into())?;
        reader.number()?;
        while let (Some(kind), Some(length)) = (reader.number(), reader.number()) {
            let mut content = Reader(reader.take(length.into())?);
            match kind {
                EXTENSION_VERSIONS => {
                    content.byte()?;
                    let numbers = std::iter::from_fn(|| content.number());
                    let versions: Vec<u16> = numbers.filter(|version| !is_grease(*version)).collect();
                    if !versions.is_empty() {
                        self.versions = versions;
                    }
                }
                EXTENSION_ALPN => {
                    content.number()?;
                    while let Some(length) = content.byte() {
                        self.protocols.push(content.take(length.into())?.to_vec());
                    }
                }
                _ => {}
            }
        }
        Some(())
    }

    /// Explains why the handshake failed. `None` if the offer is not related to `error`.
    pub fn explain(&self, error: &Error, min_version: TlsVersion) -> Option<String> {
        if matches!(error, Error::NoApplicationProtocol) {
            let protocols = self.protocol_names();
            return Some(format!(
                "the client offers the application protocols {protocols} (ALPN), but not imap: to accept it, set `alpn: any` for the listener"
            ));
        }
        if !matches!(error, Error::PeerIncompatible(_)) {
            return None;
        }
        let required = match min_version {
            TlsVersion::Tls12 => TLS_1_2,
            TlsVersion::Tls13 => TLS_1_3,
        };
        let newest = self.versions.iter().copied().max()?;
        if newest < required {
            let (newest, required) = (version_name(newest), version_name(required));
            return Some(format!(
                "the client offers at most {newest}, but this listener requires {required}; cipher suites {}",
                self.suite_names()
            ));
        }
        let supported: Vec<u16> = provider().cipher_suites.iter().map(|suite| suite.suite().into()).collect();
        if !self.suites.iter().any(|suite| supported.contains(suite)) {
            return Some(format!(
                "the client offers no cipher suite with forward secrecy and AEAD encryption: {} ({})",
                self.suite_names(),
                self.version_names()
            ));
        }
        let error = match error {
            Error::PeerIncompatible(PeerIncompatible::NoKxGroupsInCommon) => {
                "no key exchange group in common".to_owned()
            }
            Error::PeerIncompatible(PeerIncompatible::NoSignatureSchemesInCommon) => {
                "the client does not support the signatures of this certificate's key".to_owned()
            }
            other => other.to_string(),
        };
        Some(format!("{error}; the client offers {} and {}", self.version_names(), self.suite_names()))
    }

    fn protocol_names(&self) -> String {
        let names = self
            .protocols
            .iter()
            .take(MAX_PROTOCOLS)
            .map(|name| name[..name.len().min(MAX_PROTOCOL_NAME)].escape_ascii().to_string());
        listed(names.collect(), self.protocols.len())
    }

    fn suite_names(&self) -> String {
        let names = self.suites.iter().take(MAX_SUITES).map(|suite| match CipherSuite::from(*suite).as_str() {
            Some(name) => name.to_owned(),
            None => format!("0x{suite:04x}"),
        });
        listed(names.collect(), self.suites.len())
    }

    fn version_names(&self) -> String {
        self.versions.iter().take(MAX_SUITES).map(|version| version_name(*version)).collect::<Vec<_>>().join(", ")
    }
}

/// The contents of the leading handshake records. The last one may be incomplete.
fn handshake_bytes(bytes: &[u8]) -> Option<Vec<u8>> {
    let mut message = Vec::new();
    let mut rest = bytes;
    while let Some((header, after)) = rest.split_at_checked(RECORD_HEADER) {
        if header[0] != HANDSHAKE {
            break;
        }
        let length = usize::from(u16::from_be_bytes([header[3], header[4]]));
        let (content, next) = after.split_at(length.min(after.len()));
        message.extend_from_slice(content);
        rest = next;
    }
    (!message.is_empty()).then_some(message)
}

/// Whether `value` is reserved so that clients can test the tolerance of servers (GREASE, RFC 8701).
fn is_grease(value: u16) -> bool {
    let [high, low] = value.to_be_bytes();
    high == low && low & 0x0f == 0x0a
}

/// Whether a value in the list of cipher suites is a signal: TLS_EMPTY_RENEGOTIATION_INFO_SCSV, TLS_FALLBACK_SCSV or GREASE.
fn is_signalling(suite: u16) -> bool {
    matches!(suite, 0x00ff | 0x5600) || is_grease(suite)
}

fn version_name(version: u16) -> String {
    match version {
        0x0300 => "SSL 3.0".to_owned(),
        0x0301 => "TLS 1.0".to_owned(),
        0x0302 => "TLS 1.1".to_owned(),
        TLS_1_2 => "TLS 1.2".to_owned(),
        TLS_1_3 => "TLS 1.3".to_owned(),
        other => format!("version 0x{other:04x}"),
    }
}

fn listed(names: Vec<String>, all: usize) -> String {
    let more = all.saturating_sub(names.len());
    match (names.is_empty(), more) {
        (true, _) => "none".to_owned(),
        (false, 0) => names.join(", "),
        (false, more) => format!("{} and {more} more", names.join(", ")),
    }
}

/// Reads fields from the front of a slice.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, length: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        Some(taken)
    }

    fn byte(&mut self) -> Option<u8> {
        self.take(1).map(|bytes| bytes[0])
    }

    fn number(&mut self) -> Option<u16> {
        self.take(2).map(|bytes| u16::from_be_bytes([bytes[0], bytes[1]]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Encodes a ClientHello in one record.
    fn hello(legacy: u16, suites: &[u16], extensions: &[(u16, &[u8])]) -> Vec<u8> {
        let mut body = legacy.to_be_bytes().to_vec();
        body.extend([7; 32]);
        body.push(0);
        body.extend((suites.len() as u16 * 2).to_be_bytes());
        body.extend(suites.iter().flat_map(|suite| suite.to_be_bytes()));
        body.extend([1, 0]);
        let extensions: Vec<u8> = extensions
            .iter()
            .flat_map(|(kind, content)| {
                [&kind.to_be_bytes()[..], &(content.len() as u16).to_be_bytes(), content].concat()
            })
            .collect();
        body.extend((extensions.len() as u16).to_be_bytes());
        body.extend(extensions);
        let message = [&[CLIENT_HELLO, 0][..], &(body.len() as u16).to_be_bytes(), &body].concat();
        [&[HANDSHAKE, 3, 1][..], &(message.len() as u16).to_be_bytes(), &message].concat()
    }

    fn incompatible() -> Error {
        Error::PeerIncompatible(PeerIncompatible::NoCipherSuitesInCommon)
    }

    #[test]
    fn explanation_contains_the_offered_and_the_required_version() {
        let offer = Offer::read(&hello(0x0302, &[0x002f, 0x0035, 0x00ff], &[])).unwrap();
        assert_eq!(
            offer.explain(&Error::PeerIncompatible(PeerIncompatible::Tls12NotOffered), TlsVersion::Tls12).unwrap(),
            "the client offers at most TLS 1.1, but this listener requires TLS 1.2; \
             cipher suites TLS_RSA_WITH_AES_128_CBC_SHA, TLS_RSA_WITH_AES_256_CBC_SHA"
        );
        let offer = Offer::read(&hello(0x0303, &[0xc02f], &[])).unwrap();
        assert!(offer.explain(&incompatible(), TlsVersion::Tls13).unwrap().contains("at most TLS 1.2"));
    }

    #[test]
    fn explanation_lists_suites_without_forward_secrecy() {
        let suites = [0x2a2a, 0x009c, 0xc013, 0xc014, 0x0005, 0x0004];
        let offer = Offer::read(&hello(0x0303, &suites, &[])).unwrap();
        assert_eq!(
            offer.explain(&incompatible(), TlsVersion::Tls12).unwrap(),
            "the client offers no cipher suite with forward secrecy and AEAD encryption: \
             TLS_RSA_WITH_AES_128_GCM_SHA256, TLS_ECDHE_RSA_WITH_AES_128_CBC_SHA, \
             TLS_ECDHE_RSA_WITH_AES_256_CBC_SHA, TLS_RSA_WITH_RC4_128_SHA and 1 more (TLS 1.2)"
        );
    }

    #[test]
    fn application_protocols_are_escaped_and_bounded() {
        let mut list = Vec::new();
        for name in [&b"h2"[..], b"http/1.1", b"\x1b[31m\n\""] {
            list.push(name.len() as u8);
            list.extend_from_slice(name);
        }
        for _ in 0..20 {
            list.extend([200; 201]);
        }
        let content = [&(list.len() as u16).to_be_bytes()[..], &list].concat();
        let offer = Offer::read(&hello(0x0303, &[0xc02f], &[(EXTENSION_ALPN, &content)])).unwrap();
        let text = offer.explain(&Error::NoApplicationProtocol, TlsVersion::Tls12).unwrap();
        assert!(text.contains(r#"protocols h2, http/1.1, \x1b[31m\n\", "#), "{text}");
        assert!(text.contains("and 15 more") && text.len() < 1200, "{text}");
        assert!(!text.contains(char::is_control));
    }

    #[test]
    fn supported_versions_are_read_without_grease() {
        let versions = [4, 0x5a, 0x5a, 3, 4, 3, 3];
        let offer = Offer::read(&hello(0x0303, &[0x1301], &[(EXTENSION_VERSIONS, &versions)])).unwrap();
        assert_eq!(offer.versions, [0x0304, 0x0303]);
        let error = Error::PeerIncompatible(PeerIncompatible::NoKxGroupsInCommon);
        assert_eq!(
            offer.explain(&error, TlsVersion::Tls12).unwrap(),
            "no key exchange group in common; the client offers TLS 1.3, TLS 1.2 and TLS13_AES_128_GCM_SHA256"
        );
        assert_eq!(offer.explain(&Error::DecryptError, TlsVersion::Tls12), None);
    }

    #[test]
    fn truncated_and_changed_hello_does_not_panic() {
        let alpn = [0, 3, 2, b'h', b'2'];
        let whole = hello(0x0303, &[0xc02f, 0xc030], &[(EXTENSION_ALPN, &alpn)]);
        for end in 0..whole.len() {
            let _ = Offer::read(&whole[..end]);
            for value in [0, 0x7f, 0xff] {
                let mut changed = whole.clone();
                changed[end] = value;
                let _ = Offer::read(&changed);
            }
        }
        assert_eq!(Offer::read(b"GET / HTTP/1.1\r\n"), None);
        assert_eq!(Offer::read(b""), None);
        // A message may be split over two records.
        let (message, cut) = (&whole[RECORD_HEADER..], 20);
        let record = |part: &[u8]| [&[HANDSHAKE, 3, 1][..], &(part.len() as u16).to_be_bytes(), part].concat();
        let split = [record(&message[..cut]), record(&message[cut..])].concat();
        assert_eq!(Offer::read(&split), Offer::read(&whole));
    }
}
