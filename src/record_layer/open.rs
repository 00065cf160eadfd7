//! Opens received records in place, one at a time.

use std::ops::Range;

use aws_lc_rs::aead::{Aad, LessSafeKey};

use super::keys::{Cipher, Keys, Version, nonce};
use super::post_handshake::{HandshakeEvent, MessageReader, UpdateRequest};
use super::violation::{AlertCode, Violation};
use super::{ContentType, HEADER, MAX_PLAINTEXT, Role, TAG_LENGTH};

/// Maximum number of consecutive records without data, as in rustls for KeyUpdates and empty records.
const MAX_WITHOUT_DATA: u8 = 32;
/// Length of the explicit nonce before the ciphertext of a TLS 1.2 record with AES-GCM.
const EXPLICIT_NONCE: usize = 8;

/// The content of an opened record.
#[derive(Debug, PartialEq, Eq)]
pub enum Opened {
    /// Plaintext in this range of the record.
    Data(Range<usize>),
    /// The record requires no action.
    Nothing,
    /// The peer has new keys and requests new keys from this end: call `Sealer::key_update`.
    KeyUpdateRequested,
    /// The peer requests a renegotiation (TLS 1.2): call `Sealer::decline_renegotiation`.
    Renegotiation,
    /// The peer sent close_notify. Following bytes must be ignored.
    Closed,
}

/// The receiving direction.
#[derive(Debug)]
pub struct Opener {
    version: Version,
    role: Role,
    keys: Keys,
    aead: LessSafeKey,
    messages: MessageReader,
    /// Number of records without data since the last record with data.
    without_data: u8,
    closed: bool,
}

impl Opener {
    pub(super) fn new(version: Version, role: Role, keys: Keys) -> Self {
        let aead = keys.aead();
        Self { version, role, keys, aead, messages: MessageReader::default(), without_data: 0, closed: false }
    }

    pub(super) fn role(&self) -> Role {
        self.role
    }

    pub(super) fn can_suspend(&self) -> bool {
        !self.messages.is_incomplete() && !self.closed
    }

    pub(super) fn into_keys(self) -> Keys {
        self.keys
    }

    #[cfg(test)]
    pub(super) fn keys_for_test(&mut self) -> &mut Keys {
        &mut self.keys
    }

    /// Opens a complete record, with the length that [`super::record_length`] returned.
    ///
    /// # Errors
    /// The violation by the peer. The channel must not be read again.
    pub fn open(&mut self, record: &mut [u8]) -> Result<Opened, Violation> {
        if self.closed {
            return Ok(Opened::Closed);
        }
        let (kind, plain) = match self.version {
            Version::Tls13 => self.decrypt_13(record)?,
            Version::Tls12 => self.decrypt_12(record)?,
        };
        self.keys.count_record().ok_or(Violation::Exhausted)?;
        if plain.len() > MAX_PLAINTEXT {
            return Err(Violation::RecordOverflow);
        }
        if kind != ContentType::Handshake as u8 && self.messages.is_incomplete() {
            return Err(Violation::UnexpectedMessage);
        }
        if kind == ContentType::Data as u8 && !plain.is_empty() {
            self.without_data = 0;
            return Ok(Opened::Data(plain));
        }
        self.without_data += 1;
        if self.without_data > MAX_WITHOUT_DATA {
            return Err(Violation::TooManyWithoutData);
        }
        match kind {
            kind if kind == ContentType::Data as u8 => Ok(Opened::Nothing),
            kind if kind == ContentType::Alert as u8 => self.alert(&record[plain]),
            kind if kind == ContentType::Handshake as u8 => self.handshake(&record[plain]),
            _ => Err(Violation::UnexpectedMessage),
        }
    }

    /// Returns the content type and the range of the content without padding (RFC 8446 section 5.2).
    fn decrypt_13(&mut self, record: &mut [u8]) -> Result<(u8, Range<usize>), Violation> {
        let (header, sealed) = record.split_at_mut(HEADER);
        // After the handshake neither change-cipher-spec nor any unencrypted record is allowed.
        if header[0] != ContentType::Data as u8 {
            return Err(Violation::UnexpectedMessage);
        }
        if sealed.len() > MAX_PLAINTEXT + 256 {
            return Err(Violation::RecordOverflow);
        }
        let aad = Aad::from(&*header);
        let inner = self.aead.open_in_place(nonce(self.keys.nonce()), aad, sealed).map_err(|_| Violation::BadRecord)?;
        if inner.len() > MAX_PLAINTEXT + 1 {
            return Err(Violation::RecordOverflow);
        }
        let end = inner.iter().rposition(|&byte| byte != 0).ok_or(Violation::UnexpectedMessage)?;
        Ok((inner[end], HEADER..HEADER + end))
    }

    /// Returns the content type and the range of the content (RFC 5246 section 6.2.3.3, RFC 5288 section 3, RFC 7905 section 2).
    fn decrypt_12(&mut self, record: &mut [u8]) -> Result<(u8, Range<usize>), Violation> {
        let (header, sealed) = record.split_at_mut(HEADER);
        let explicit = if self.keys.cipher() == Cipher::Chacha20Poly1305 { 0 } else { EXPLICIT_NONCE };
        let length = sealed.len().checked_sub(explicit + TAG_LENGTH).ok_or(Violation::BadRecord)?;
        // The additional data contain a fixed version and the computed length, so those of the header must be checked.
        if header[1..3] != [3, 3] || usize::from(u16::from_be_bytes([header[3], header[4]])) != sealed.len() {
            return Err(Violation::BadRecord);
        }
        let (explicit_nonce, sealed) = sealed.split_at_mut(explicit);
        let nonce_bytes = match <[u8; EXPLICIT_NONCE]>::try_from(&*explicit_nonce) {
            Ok(explicit) => self.keys.explicit_nonce(explicit),
            Err(_) => self.keys.nonce(),
        };
        let aad = Aad::from(additional_data_12(self.keys.sequence(), header[0], length));
        self.aead.open_in_place(nonce(nonce_bytes), aad, sealed).map_err(|_| Violation::BadRecord)?;
        Ok((header[0], HEADER + explicit..HEADER + explicit + length))
    }

    fn alert(&mut self, content: &[u8]) -> Result<Opened, Violation> {
        let &[level, code] = content else { return Err(Violation::Malformed) };
        let code = AlertCode(code);
        match (self.version, level) {
            (_, 1 | 2) if code == AlertCode::CLOSE_NOTIFY => {
                self.closed = true;
                Ok(Opened::Closed)
            }
            (Version::Tls13, 1) if code == AlertCode::USER_CANCELED => Ok(Opened::Nothing),
            (Version::Tls12, 1) => Ok(Opened::Nothing),
            (_, 1 | 2) => Err(Violation::AlertReceived(code)),
            _ => Err(Violation::IllegalValue),
        }
    }

    fn handshake(&mut self, content: &[u8]) -> Result<Opened, Violation> {
        match self.messages.read(self.version, self.role, content)? {
            HandshakeEvent::Nothing => Ok(Opened::Nothing),
            HandshakeEvent::Renegotiation => Ok(Opened::Renegotiation),
            HandshakeEvent::KeyUpdate(request) => {
                self.keys = self.keys.advance().map_err(|_| Violation::UnexpectedMessage)?;
                self.aead = self.keys.aead();
                Ok(match request {
                    UpdateRequest::Requested => Opened::KeyUpdateRequested,
                    UpdateRequest::NotRequested => Opened::Nothing,
                })
            }
        }
    }
}

/// The additional data of a TLS 1.2 record (RFC 5246 section 6.2.3.3).
pub(super) fn additional_data_12(sequence: u64, kind: u8, length: usize) -> [u8; 13] {
    let mut aad = [0; 13];
    aad[..8].copy_from_slice(&sequence.to_be_bytes());
    aad[8] = kind;
    (aad[9], aad[10]) = (3, 3);
    // The length fits into two bytes, because MAX_RECORD limits both directions.
    [aad[11], aad[12]] = (length as u16).to_be_bytes();
    aad
}
