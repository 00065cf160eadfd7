//! Session ids, which identify a session in the log of the proxy and in that of the server.

use std::net::SocketAddr;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;

const LENGTH: usize = 16;

/// A session id: 16 characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct SessionId([u8; LENGTH]);

impl SessionId {
    pub(super) fn bytes(&self) -> [u8; LENGTH] {
        self.0
    }

    pub(super) fn as_str(&self) -> &str {
        // base64 is ASCII.
        std::str::from_utf8(&self.0).unwrap_or_default()
    }
}

/// A new id: 48 bits of time in microseconds, the client's port and a counter, in base64. It is unique within the process, and
/// among several machines unless microsecond, port and counter are all equal. Dovecot accepts up to 64 characters.
pub(super) fn new(peer: SocketAddr) -> SessionId {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    static PROCESS: LazyLock<u32> = LazyLock::new(std::process::id);
    let count = COUNT.fetch_add(1, Ordering::Relaxed).wrapping_add(*PROCESS << 16);
    let micros = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_micros());
    let mut bytes = [0; 12];
    #[expect(clippy::cast_possible_truncation, reason = "the lower 48 bits are wanted")]
    bytes[..6].copy_from_slice(&(micros as u64).to_be_bytes()[2..]);
    bytes[6..8].copy_from_slice(&peer.port().to_be_bytes());
    bytes[8..].copy_from_slice(&count.to_be_bytes());
    let mut text = [b'A'; LENGTH];
    // Twelve bytes are 16 characters, so that this cannot fail.
    let _ = URL_SAFE_NO_PAD.encode_slice(bytes, &mut text);
    SessionId(text)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn ids_are_unique_and_short() {
        let peer = "192.0.2.1:4000".parse().unwrap();
        let ids: HashSet<SessionId> = (0..10_000).map(|_| new(peer)).collect();
        assert_eq!(ids.len(), 10_000);
        assert!(ids.iter().all(
            |id| id.as_str().len() == 16 && id.as_str().bytes().all(|byte| byte.is_ascii_graphic() && byte != b'"')
        ));
    }
}
