//! Detects a PROXY header on a listener without `proxy_protocol`: the balancer or this proxy is misconfigured. The warning is
//! rate-limited for each listener.

use std::time::Instant;

use super::Session;
use super::log_record::EndedBy;
use crate::failure::Reason;
use crate::protocol::proxy_protocol::{Detection, detect};

/// Number of bytes after which rustls rejects input that is not TLS. The first five bytes of a PROXY header are not TLS.
const TLS_HEADER: usize = 5;

/// The first bytes of a client without TLS, while they may be the begin of a PROXY header.
#[derive(Debug, Default)]
pub(super) struct FirstBytes(Option<Vec<u8>>);

impl FirstBytes {
    /// The state before the first read. The default state expects no header.
    pub(super) fn expected() -> Self {
        Self(Some(Vec::new()))
    }

    /// Whether the connection begins with a PROXY header, after `bytes` were read.
    pub(super) fn is_header(&mut self, bytes: &[u8]) -> bool {
        let Some(first_bytes) = &mut self.0 else { return false };
        first_bytes.extend_from_slice(&bytes[..bytes.len().min(16)]);
        let detection = detect(first_bytes);
        if detection != Detection::Undecided {
            self.0 = None;
        }
        detection == Detection::ProxyHeader
    }
}

/// Whether the bytes that were received instead of a ClientHello are a PROXY header.
pub(super) fn is_header_before_tls(first_bytes: &[u8]) -> bool {
    first_bytes.len() >= TLS_HEADER && detect(first_bytes) != Detection::Other
}

impl Session {
    /// Ends the session, with a warning.
    pub(super) fn record_unexpected_proxy_header(&mut self) {
        if self.snapshot.proxy_header_warnings[self.listener].allows(Instant::now()) {
            tracing::warn!(
                listener = %self.local,
                balancer = %self.peer.ip().to_canonical(),
                "a balancer sends PROXY headers to a listener that has no proxy_protocol: add proxy_protocol to it, or switch the headers off there"
            );
        }
        self.record.detail("a PROXY header on a listener without proxy_protocol".to_owned());
        self.record.ended_by(EndedBy::Proxy);
        self.record.failed(Reason::UnexpectedProxyHeader);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn header_is_found_at_every_split_and_a_login_is_not_stored() {
        let header = b"PROXY TCP4 192.0.2.1 192.0.2.2 4000 143\r\n";
        for cut in 0..header.len() {
            let mut first_bytes = FirstBytes::expected();
            assert!(first_bytes.is_header(&header[..cut]) || first_bytes.is_header(&header[cut..]), "cut at {cut}");
        }
        let mut first_bytes = FirstBytes::expected();
        assert!(!first_bytes.is_header(b"a LOGIN u secret\r\n"));
        assert!(first_bytes.0.is_none());
        assert!(!first_bytes.is_header(header), "a header is expected only at the begin of a connection");
        assert!(!FirstBytes::default().is_header(header));
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
