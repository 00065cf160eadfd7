//! Seals records to send in place, one at a time.

use aws_lc_rs::aead::{Aad, LessSafeKey};
use thiserror::Error;

use super::keys::{Cipher, Keys, Version, nonce};
use super::open::additional_data_12;
use super::post_handshake::UpdateRequest;
use super::violation::AlertCode;
use super::{ContentType, HEADER, Layout, MAX_PLAINTEXT, TAG_LENGTH};

/// Number of records below the cipher's limit that are reserved for alerts, KeyUpdates and one relay round.
const RESERVE: u64 = 64;
/// Upper bound of the sequence numbers in use, as in rustls.
const LAST_SEQUENCE: u64 = 0xffff_ffff_ffff_0000;
/// Maximum length of a control message. The longest is a KeyUpdate of five bytes.
const MAX_CONTROL_MESSAGE: usize = 8;

/// A key has reached its limit (TLS 1.2 has no KeyUpdate), or the channel is closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("nothing more may be sent under this key")]
pub struct Exhausted;

/// The sending direction.
#[derive(Debug)]
pub struct Sealer {
    version: Version,
    keys: Keys,
    aead: LessSafeKey,
    limit: u64,
    closed: bool,
}

impl Sealer {
    pub(super) fn new(version: Version, keys: Keys) -> Self {
        let aead = keys.aead();
        let limit = keys.cipher().confidentiality_limit().min(LAST_SEQUENCE);
        Self { version, keys, aead, limit, closed: false }
    }

    pub(super) fn version(&self) -> Version {
        self.version
    }

    pub(super) fn is_closed(&self) -> bool {
        self.closed
    }

    pub(super) fn into_keys(self) -> Keys {
        self.keys
    }

    #[cfg(test)]
    pub(super) fn keys_for_test(&mut self) -> &mut Keys {
        &mut self.keys
    }

    #[cfg(test)]
    pub(crate) fn seal_for_test(&mut self, kind: ContentType, content: &[u8], out: &mut Vec<u8>) {
        let Layout { prefix, suffix } = self.layout();
        let mut record = vec![0; prefix + content.len() + suffix];
        record[prefix..prefix + content.len()].copy_from_slice(content);
        self.seal_as(kind, &mut record, content.len()).unwrap();
        out.extend_from_slice(&record);
    }

    /// Appends a requesting KeyUpdate in two records, the first with `first` bytes of the message.
    #[cfg(test)]
    pub(crate) fn split_key_update_for_test(&mut self, first: usize, out: &mut Vec<u8>) {
        let (start, end) = [24, 0, 0, 1, 1].split_at(first);
        let next = self.keys.advance().unwrap();
        self.seal_for_test(ContentType::Handshake, start, out);
        self.seal_for_test(ContentType::Handshake, end, out);
        self.keys = next;
        self.aead = self.keys.aead();
    }

    #[cfg(test)]
    pub(crate) fn request_key_update_for_test(&mut self, out: &mut Vec<u8>) {
        self.change_keys(UpdateRequest::Requested, out).unwrap();
    }

    /// The space that a record needs around its plaintext.
    pub fn layout(&self) -> Layout {
        match (self.version, self.keys.cipher()) {
            (Version::Tls13, _) => Layout { prefix: HEADER, suffix: 1 + TAG_LENGTH },
            (Version::Tls12, Cipher::Chacha20Poly1305) => Layout { prefix: HEADER, suffix: TAG_LENGTH },
            (Version::Tls12, _) => Layout { prefix: HEADER + 8, suffix: TAG_LENGTH },
        }
    }

    /// Seals the `length` bytes of data after the prefix in `record`. Returns the length of the record.
    ///
    /// # Errors
    /// [`Exhausted`]: the connection must be closed.
    ///
    /// # Panics
    /// If `length` exceeds [`MAX_PLAINTEXT`] or `record` is too short for the layout.
    pub fn seal(&mut self, record: &mut [u8], length: usize) -> Result<usize, Exhausted> {
        if self.closed || self.keys.sequence() >= self.limit {
            return Err(Exhausted);
        }
        self.seal_as(ContentType::Data, record, length)
    }

    /// Whether the keys are almost used up. [`Sealer::key_update`] must be called within the next few records.
    pub fn wants_key_update(&self) -> bool {
        self.version == Version::Tls13 && self.keys.sequence() + RESERVE >= self.limit
    }

    /// Appends a KeyUpdate to `out` and switches to the next keys. It does not request new keys from the peer (RFC 8446 section 4.6.3).
    ///
    /// # Errors
    /// [`Exhausted`], also for TLS 1.2, which has no KeyUpdate.
    pub fn key_update(&mut self, out: &mut Vec<u8>) -> Result<(), Exhausted> {
        self.change_keys(UpdateRequest::NotRequested, out)
    }

    fn change_keys(&mut self, request: UpdateRequest, out: &mut Vec<u8>) -> Result<(), Exhausted> {
        if self.version != Version::Tls13 || self.closed {
            return Err(Exhausted);
        }
        let next = self.keys.advance().map_err(|_| Exhausted)?;
        self.seal_control(ContentType::Handshake, &[24, 0, 0, 1, request as u8], out)?;
        self.keys = next;
        self.aead = self.keys.aead();
        Ok(())
    }

    /// Appends the warning that declines a renegotiation (RFC 5246 section 7.2.2).
    ///
    /// # Errors
    /// [`Exhausted`], also after the channel was closed.
    pub fn decline_renegotiation(&mut self, out: &mut Vec<u8>) -> Result<(), Exhausted> {
        if self.closed || self.keys.sequence() >= self.limit {
            return Err(Exhausted);
        }
        self.seal_control(ContentType::Alert, &[1, AlertCode::NO_RENEGOTIATION.0], out)
    }

    /// Appends close_notify or a fatal alert to `out`. No further record can be sealed.
    pub fn close(&mut self, alert: AlertCode, out: &mut Vec<u8>) {
        if self.closed {
            return;
        }
        let level = if alert == AlertCode::CLOSE_NOTIFY { 1 } else { 2 };
        // If no sequence number is left, the connection ends without an alert.
        let _ = self.seal_control(ContentType::Alert, &[level, alert.0], out);
        self.closed = true;
    }

    /// Appends an alert or a KeyUpdate, regardless of the limit.
    fn seal_control(&mut self, kind: ContentType, content: &[u8], out: &mut Vec<u8>) -> Result<(), Exhausted> {
        let mut record = [0; HEADER + 8 + MAX_CONTROL_MESSAGE + 1 + TAG_LENGTH];
        let prefix = self.layout().prefix;
        record[prefix..prefix + content.len()].copy_from_slice(content);
        let length = self.seal_as(kind, &mut record, content.len())?;
        out.extend_from_slice(&record[..length]);
        Ok(())
    }

    fn seal_as(&mut self, kind: ContentType, record: &mut [u8], length: usize) -> Result<usize, Exhausted> {
        assert!(length <= MAX_PLAINTEXT, "plaintext of {length} bytes is too long for a record");
        let Layout { prefix, suffix } = self.layout();
        let nonce_bytes = self.keys.nonce();
        let total = prefix + length + suffix;
        let outer = if self.version == Version::Tls13 { ContentType::Data } else { kind };
        let [high, low] = ((total - HEADER) as u16).to_be_bytes();
        let header = [outer as u8, 3, 3, high, low];
        record[..HEADER].copy_from_slice(&header);
        record[HEADER..prefix].copy_from_slice(&nonce_bytes[nonce_bytes.len() - (prefix - HEADER)..]);
        let (content, tag) = record[prefix..total].split_at_mut(length + suffix - TAG_LENGTH);
        let sealed = match self.version {
            Version::Tls13 => {
                content[length] = kind as u8;
                self.aead.seal_in_place_separate_tag(nonce(nonce_bytes), Aad::from(header), content)
            }
            Version::Tls12 => {
                let aad = additional_data_12(self.keys.sequence(), kind as u8, length);
                self.aead.seal_in_place_separate_tag(nonce(nonce_bytes), Aad::from(aad), content)
            }
        };
        tag.copy_from_slice(sealed.map_err(|_| Exhausted)?.as_ref());
        self.keys.count_record().ok_or(Exhausted)?;
        Ok(total)
    }
}
