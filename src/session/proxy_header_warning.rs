//! Warns if a client sends a PROXY header to a listener without `proxy_protocol`, at a limited rate per listener.

use std::time::Instant;

use super::Session;
use super::log_record::EndedBy;
use crate::failure::Reason;
use crate::protocol::proxy_protocol::{Detection, detect};

/// Length of the header of a TLS record, after which rustls rejects other input.
const TLS_RECORD_HEADER: usize = 5;
/// Upper bound of the bytes that are added per read. [`detect`] decides by the first 13.
const MAX_START: usize = 16;

/// Detects a PROXY header at the beginning of a connection without TLS. Bytes are kept only while they may belong to a header.
#[derive(Debug, Default)]
pub(super) enum ProxyHeaderDetector {
    /// No header is looked for: the connection uses TLS or `proxy_protocol`, or has begun without a header.
    #[default]
    Off,
    Collecting(Vec<u8>),
}

impl ProxyHeaderDetector {
    pub(super) fn on() -> Self {
        Self::Collecting(Vec::new())
    }

    /// Adds `bytes`. Returns whether they complete the start of a PROXY header.
    pub(super) fn observe(&mut self, bytes: &[u8]) -> bool {
        let Self::Collecting(start) = self else { return false };
        start.extend_from_slice(&bytes[..bytes.len().min(MAX_START)]);
        let detection = detect(start);
        if detection != Detection::Undecided {
            *self = Self::Off;
        }
        detection == Detection::ProxyHeader
    }
}

/// Whether the bytes that were received instead of a ClientHello are the start of a PROXY header.
pub(super) fn is_header_before_tls(first_bytes: &[u8]) -> bool {
    // The handshake may have ended before there were enough bytes to decide.
    first_bytes.len() >= TLS_RECORD_HEADER && detect(first_bytes) != Detection::Other
}

impl Session {
    /// Records why the session ends, and logs a warning at a limited rate.
    pub(super) fn record_unexpected_proxy_header(&mut self) {
        if self.snapshot.proxy_header_warnings[self.listener].allows(Instant::now()) {
            tracing::warn!(
                listener = %self.local,
                balancer = %self.peer.ip().to_canonical(),
                "received a PROXY header on a listener without proxy_protocol: set proxy_protocol on this listener, or disable PROXY headers on the load balancer"
            );
        }
        self.record.set_detail("a PROXY header on a listener without proxy_protocol".to_owned());
        self.record.set_ended_by(EndedBy::Proxy);
        self.record.record_failure(Reason::UnexpectedProxyHeader);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn header_is_found_at_every_split_and_a_login_is_not_stored() {
        let header = b"PROXY TCP4 192.0.2.1 192.0.2.2 4000 143\r\n";
        for cut in 0..header.len() {
            let mut detector = ProxyHeaderDetector::on();
            assert!(detector.observe(&header[..cut]) || detector.observe(&header[cut..]), "cut at {cut}");
        }
        let mut detector = ProxyHeaderDetector::on();
        assert!(!detector.observe(b"a LOGIN u secret\r\n"));
        assert!(matches!(detector, ProxyHeaderDetector::Off));
        assert!(!detector.observe(header), "a header is expected only at the beginning of a connection");
        assert!(!ProxyHeaderDetector::default().observe(header));
    }

    #[test]
    fn header_before_tls_is_distinguished_from_other_bytes() {
        assert!(is_header_before_tls(b"PROXY"));
        assert!(is_header_before_tls(b"PROXY TCP4 192.0.2.1"));
        assert!(is_header_before_tls(b"\r\n\r\n\0\r\nQUIT\n\x21\x11"));
        for other in [&b""[..], b"PROX", b"\x16\x03\x01\x00\x05\x01", b"GET / HTTP/1.1", b"a1 ID NIL"] {
            assert!(!is_header_before_tls(other), "{other:?}");
        }
    }
}
