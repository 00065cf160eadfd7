//! A PROXY header on a listener without `proxy_protocol`: a mistake of the balancer's configuration or of ours, reported
//! once in a while for each listener, however many connections it meets.

use std::time::Instant;

use super::{EndedBy, Session};
use crate::failure::Reason;
use crate::protocol::proxy_protocol::{Detection, detect};

/// rustls gives up after five bytes that are not TLS. The first five of a header are not TLS either.
const TLS_DECIDES: usize = 5;

/// First bytes of a client that speaks in clear, as long as they may become a PROXY header.
#[derive(Debug, Default)]
pub(super) struct Opening(Option<Vec<u8>>);

impl Opening {
    /// Nothing was read yet.
    pub(super) fn expected() -> Self {
        Self(Some(Vec::new()))
    }

    /// Whether the connection begins with a PROXY header, now that `bytes` were read.
    pub(super) fn is_header(&mut self, bytes: &[u8]) -> bool {
        let Some(opening) = &mut self.0 else { return false };
        opening.extend_from_slice(&bytes[..bytes.len().min(16)]);
        let beginning = detect(opening);
        if beginning != Detection::Undecided {
            self.0 = None;
        }
        beginning == Detection::ProxyHeader
    }
}

/// Whether what came instead of a ClientHello is a PROXY header.
pub(super) fn is_header_before_tls(first_bytes: &[u8]) -> bool {
    first_bytes.len() >= TLS_DECIDES && detect(first_bytes) != Detection::Other
}

impl Session {
    /// The session is over.
    pub(super) fn unexpected_proxy_header(&mut self) {
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
    fn a_header_is_found_at_every_split_and_a_login_is_not_kept() {
        let header = b"PROXY TCP4 192.0.2.1 192.0.2.2 4000 143\r\n";
        for cut in 0..header.len() {
            let mut opening = Opening::expected();
            assert!(opening.is_header(&header[..cut]) || opening.is_header(&header[cut..]), "cut at {cut}");
        }
        let mut opening = Opening::expected();
        assert!(!opening.is_header(b"a LOGIN u secret\r\n"));
        assert!(opening.0.is_none());
        assert!(!opening.is_header(header), "only at the start of a connection");
        assert!(!Opening::default().is_header(header));
    }

    #[test]
    fn what_comes_instead_of_tls() {
        assert!(is_header_before_tls(b"PROXY"));
        assert!(is_header_before_tls(b"PROXY TCP4 192.0.2.1"));
        assert!(is_header_before_tls(b"\r\n\r\n\0\r\nQUIT\n\x21\x11"));
        for other in [&b""[..], b"PROX", b"\x16\x03\x01\x00\x05\x01", b"GET / HTTP/1.1", b"a1 ID NIL"] {
            assert!(!is_header_before_tls(other), "{other:?}");
        }
    }
}
