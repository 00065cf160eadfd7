//! TLS records of established connections: sealed and opened with the secrets that rustls hands over.
//!
//! rustls performs every handshake; once a login is accepted the connection needs no more of TLS than this room: two
//! traffic keys, two sequence numbers, KeyUpdate, alerts. A [`Channel`] is that, ready for use; a [`StoredChannel`] is the same
//! as plain data of some hundred and fifty bytes, kept while nothing moves. Bytes in, bytes out: no socket, no clock, no
//! allocation, and no buffer, for records are sealed and opened in place in the caller's memory.
//!
//! What the room refuses: everything a peer may not send after the handshake. A [`Violation`] says what, and which alert
//! answers it; the channel must not be read from again. Renegotiation (TLS 1.2) is declined with a warning. After 32 records in
//! a row without data (KeyUpdates, handshakes, tickets, alerts, empty records) the channel is closed. Ciphers, nonces and derivations are those of the provider (aws-lc) and of rustls's own key schedule
//! interface. Called by `tls` (which makes channels) and `relay` (which uses them).

mod keys;
mod open;
mod post_handshake;
mod seal;
mod violation;

pub use self::keys::{Cipher, Keys, MAX_ROLL, UnknownSecret, Version};
use self::keys::{LONGEST_KEY, LONGEST_SECRET};
pub use self::open::{Opened, Opener};
pub use self::seal::{Exhausted, Sealer};
pub use self::violation::{AlertCode, Violation};

/// Bytes of a record's header: type, version, length (RFC 8446 section 5.1).
pub const HEADER: usize = 5;
/// The most plaintext a record may carry (RFC 8446 section 5.1, RFC 5246 section 6.2.1).
pub const MAX_PLAINTEXT: usize = 1 << 14;
/// The longest record that may arrive: TLS 1.2 allows 2048 bytes beyond the plaintext, TLS 1.3 only 256.
pub const MAX_RECORD: usize = HEADER + MAX_PLAINTEXT + 2048;
/// Of every AEAD used here.
const TAG: usize = 16;

/// Which end of the connection we are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// We connected.
    Client,
    /// We accepted.
    Server,
}

/// What a record carries (RFC 8446 section 5.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum ContentType {
    Alert = 21,
    Handshake = 22,
    Data = 23,
}

/// Room that a record needs around its plaintext.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Layout {
    /// Bytes ahead of the plaintext: header, and the explicit nonce of TLS 1.2 with AES-GCM.
    pub prefix: usize,
    /// Bytes behind it: the inner type of TLS 1.3, and the tag.
    pub suffix: usize,
}

/// Both directions of one established connection.
#[derive(Debug)]
pub struct Channel {
    /// For what arrives.
    pub opener: Opener,
    /// For what is sent.
    pub sealer: Sealer,
}

impl Channel {
    /// `receive` and `send` are the keys of the two directions, with the sequence numbers of the next records.
    pub fn new(version: Version, role: Role, receive: Keys, send: Keys) -> Self {
        Self { opener: Opener::new(version, role, receive), sealer: Sealer::new(version, send) }
    }

    /// Whether nothing but keys is needed to go on later: no handshake message is half received, nothing is closed.
    pub fn can_suspend(&self) -> bool {
        self.opener.can_suspend() && !self.sealer.is_closed()
    }

    /// Drops the ready-made ciphers and keeps what they are made from.
    pub fn suspend(self) -> StoredChannel {
        let (version, role) = (self.sealer.version(), self.opener.role());
        let (receive, send) = (self.opener.into_keys(), self.sealer.into_keys());
        if receive.fit::<16, 32>() && send.fit::<16, 32>() {
            StoredChannel::Short(Box::new(StoredKeys { version, role, receive: receive.moved(), send: send.moved() }))
        } else {
            StoredChannel::Long(Box::new(StoredKeys { version, role, receive, send }))
        }
    }
}

/// A suspended [`Channel`]: plain data, wiped when dropped.
#[derive(Debug)]
pub enum StoredChannel {
    /// AES-128-GCM with SHA-256, which most connections have: 64 bytes less.
    Short(Box<StoredKeys<16, 32>>),
    /// What is longer.
    Long(Box<StoredKeys>),
}

/// What both directions of a [`StoredChannel`] channel are made from.
#[derive(Debug)]
pub struct StoredKeys<const K: usize = LONGEST_KEY, const S: usize = LONGEST_SECRET> {
    version: Version,
    role: Role,
    receive: Keys<K, S>,
    send: Keys<K, S>,
}

impl StoredChannel {
    /// Makes the ciphers again: 0.3 µs.
    pub fn resume(self) -> Channel {
        match self {
            Self::Short(rest) => Channel::new(rest.version, rest.role, rest.receive.moved(), rest.send.moved()),
            Self::Long(rest) => Channel::new(rest.version, rest.role, rest.receive, rest.send),
        }
    }
}

/// The whole length of the record that `bytes` begins with, header included; `None` before all of the header is there.
///
/// # Errors
/// [`Violation::RecordOverflow`], or [`Violation::NotTls`] for what cannot be a record.
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
