//! TLS records of established connections, sealed and opened with the secrets that rustls extracts.
//!
//! rustls performs every handshake. After the login a connection needs only what this module provides: two traffic keys, two sequence
//! numbers, KeyUpdate and alerts. A [`Channel`] is ready for use; a [`StoredChannel`] contains the same state in about 150 bytes while the
//! session is idle. The module uses no socket, no clock and no buffer: records are sealed and opened in place in the caller's memory.
//!
//! Everything that a peer may not send after the handshake is refused. A [`Violation`] is the reason and determines the alert; the channel
//! must not be read again. Renegotiation (TLS 1.2) is declined with a warning. After 32 consecutive records without data (KeyUpdates,
//! handshakes, tickets, alerts, empty records) the channel is closed. The ciphers are those of aws-lc, and keys are derived with the key
//! schedule of rustls.

mod keys;
mod open;
mod post_handshake;
mod seal;
mod violation;

pub use self::keys::{Cipher, Keys, Version};
use self::keys::{MAX_KEY_LENGTH, MAX_SECRET_LENGTH};
pub use self::open::{Opened, Opener};
pub use self::seal::{Exhausted, Sealer};
pub use self::violation::{AlertCode, Violation};

/// Length of a record's header: type, version, length (RFC 8446 section 5.1).
pub const HEADER: usize = 5;
/// Maximum length of the plaintext of a record (RFC 8446 section 5.1, RFC 5246 section 6.2.1).
pub const MAX_PLAINTEXT: usize = 1 << 14;
/// Maximum length of a received record, with its header: TLS 1.2 allows 2048 bytes beyond the plaintext, TLS 1.3 only 256.
pub const MAX_RECORD: usize = HEADER + MAX_PLAINTEXT + 2048;
/// Length of the authentication tag, the same for all ciphers.
const TAG_LENGTH: usize = 16;

/// The role of this end in the handshake.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// This end connected.
    Client,
    /// This end accepted the connection.
    Server,
}

/// The content type of a record (RFC 8446 section 5.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum ContentType {
    Alert = 21,
    Handshake = 22,
    Data = 23,
}

/// Space that a record needs before and after its plaintext.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Layout {
    /// Bytes before the plaintext: the header, and the explicit nonce of TLS 1.2 with AES-GCM.
    pub prefix: usize,
    /// Bytes after the plaintext: the inner content type of TLS 1.3, and the tag.
    pub suffix: usize,
}

/// Both directions of one established connection.
#[derive(Debug)]
pub struct Channel {
    /// Opens received records.
    pub opener: Opener,
    /// Seals records to send.
    pub sealer: Sealer,
}

impl Channel {
    /// `receive` and `send` are the keys of the two directions, with the sequence numbers of the next records.
    pub fn new(version: Version, role: Role, receive: Keys, send: Keys) -> Self {
        Self { opener: Opener::new(version, role, receive), sealer: Sealer::new(version, send) }
    }

    /// Whether the keys are the whole state of the channel: no handshake message is incomplete, and neither direction is closed.
    pub fn can_suspend(&self) -> bool {
        self.opener.can_suspend() && !self.sealer.is_closed()
    }

    /// Reduces the channel to its keys. The initialised ciphers are dropped.
    pub fn suspend(self) -> StoredChannel {
        let (version, role) = (self.sealer.version(), self.opener.role());
        let (receive, send) = (self.opener.into_keys(), self.sealer.into_keys());
        if receive.fits_in::<16, 32>() && send.fits_in::<16, 32>() {
            StoredChannel::Short(Box::new(StoredKeys {
                version,
                role,
                receive: receive.resized(),
                send: send.resized(),
            }))
        } else {
            StoredChannel::Long(Box::new(StoredKeys { version, role, receive, send }))
        }
    }
}

/// A suspended [`Channel`]: plain data, wiped when dropped.
#[derive(Debug)]
pub enum StoredChannel {
    /// The keys of AES-128-GCM with SHA-256, which most connections use. They need 64 bytes less.
    Short(Box<StoredKeys<16, 32>>),
    /// Longer keys.
    Long(Box<StoredKeys>),
}

/// The keys of both directions of a [`StoredChannel`].
#[derive(Debug)]
pub struct StoredKeys<const K: usize = MAX_KEY_LENGTH, const S: usize = MAX_SECRET_LENGTH> {
    version: Version,
    role: Role,
    receive: Keys<K, S>,
    send: Keys<K, S>,
}

impl StoredChannel {
    /// Initialises the ciphers again, which takes 0.3 µs.
    pub fn resume(self) -> Channel {
        match self {
            Self::Short(stored) => {
                Channel::new(stored.version, stored.role, stored.receive.resized(), stored.send.resized())
            }
            Self::Long(stored) => Channel::new(stored.version, stored.role, stored.receive, stored.send),
        }
    }
}

/// The length of the first record in `bytes`, including its header. `None` if the header is incomplete.
///
/// # Errors
/// [`Violation::RecordOverflow`], or [`Violation::NotTls`] if the bytes are not a TLS record.
pub fn record_length(bytes: &[u8]) -> Result<Option<usize>, Violation> {
    let Some(header) = bytes.get(..HEADER) else { return Ok(None) };
    let length = usize::from(u16::from_be_bytes([header[3], header[4]]));
    if !(20..=23).contains(&header[0]) || header[1] != 3 {
        return Err(Violation::NotTls);
    }
    if HEADER + length > MAX_RECORD {
        return Err(Violation::RecordOverflow);
    }
    Ok(Some(HEADER + length))
}

#[cfg(test)]
mod tests;
