//! Handshake messages that arrive after the handshake, split over records in any way.
//!
//! Only KeyUpdate has an effect. Other messages, such as session tickets, are skipped as they arrive and not stored.

use super::violation::Violation;
use super::{Role, Version};

const HELLO_REQUEST: u8 = 0;
const CLIENT_HELLO: u8 = 1;
const NEW_SESSION_TICKET: u8 = 4;
const KEY_UPDATE: u8 = 24;

/// Length of a message header: type and length.
const MESSAGE_HEADER: usize = 4;
/// Maximum length of a message, as in rustls. Tickets have a few hundred bytes.
const MAX_MESSAGE: usize = 0xffff;

/// The field `request_update` of a KeyUpdate (RFC 8446 section 4.6.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum UpdateRequest {
    NotRequested = 0,
    /// The receiver must update its sending keys too.
    Requested = 1,
}

/// The effect of the messages in one record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum HandshakeEvent {
    Nothing,
    /// The next record of the peer uses new keys.
    KeyUpdate(UpdateRequest),
    /// The peer requests a renegotiation (TLS 1.2).
    Renegotiation,
}

/// The kind of a message whose header is complete.
enum MessageKind {
    Ticket,
    KeyUpdate,
    Renegotiation,
}

/// Reads the stream of messages, and stores its position between records.
#[derive(Debug, Default)]
pub(super) struct MessageReader {
    /// The header of the current message, and the content of a KeyUpdate (one byte).
    head: [u8; MESSAGE_HEADER + 1],
    head_length: u8,
    /// Remaining bytes of a message that is skipped.
    skip: usize,
}

impl MessageReader {
    /// Whether a message is incomplete. Then no record of another type may follow (RFC 8446 section 5.1).
    pub(super) fn is_incomplete(&self) -> bool {
        self.skip > 0 || self.head_length > 0
    }

    /// Reads the content of one record.
    pub(super) fn read(
        &mut self,
        version: Version,
        role: Role,
        mut content: &[u8],
    ) -> Result<HandshakeEvent, Violation> {
        if content.is_empty() {
            return Err(Violation::UnexpectedMessage);
        }
        let mut event = HandshakeEvent::Nothing;
        loop {
            let skipped = self.skip.min(content.len());
            self.skip -= skipped;
            content = &content[skipped..];
            let Some((&byte, rest)) = content.split_first() else { return Ok(event) };
            content = rest;
            self.head[usize::from(self.head_length)] = byte;
            self.head_length += 1;
            match self.head_length {
                4 => match self.read_header(version, role)? {
                    // Its content, one byte, follows.
                    MessageKind::KeyUpdate => {}
                    MessageKind::Ticket => self.head_length = 0,
                    MessageKind::Renegotiation => {
                        self.head_length = 0;
                        event = HandshakeEvent::Renegotiation;
                    }
                },
                5 => {
                    self.head_length = 0;
                    // A KeyUpdate must end its record, because the rest of the record would have been sealed with the old key.
                    if !content.is_empty() {
                        return Err(Violation::UnexpectedMessage);
                    }
                    return match self.head[MESSAGE_HEADER] {
                        0 => Ok(HandshakeEvent::KeyUpdate(UpdateRequest::NotRequested)),
                        1 => Ok(HandshakeEvent::KeyUpdate(UpdateRequest::Requested)),
                        _ => Err(Violation::IllegalValue),
                    };
                }
                _ => {}
            }
        }
    }

    /// Evaluates a complete header. Content that is not needed will be skipped.
    fn read_header(&mut self, version: Version, role: Role) -> Result<MessageKind, Violation> {
        let length = usize::from(self.head[1]) << 16 | usize::from(self.head[2]) << 8 | usize::from(self.head[3]);
        if length > MAX_MESSAGE {
            return Err(Violation::Malformed);
        }
        match (version, role, self.head[0]) {
            (Version::Tls13, _, KEY_UPDATE) if length == 1 => Ok(MessageKind::KeyUpdate),
            (Version::Tls13, _, KEY_UPDATE) => Err(Violation::Malformed),
            (Version::Tls13, Role::Client, NEW_SESSION_TICKET) => {
                self.skip = length;
                Ok(MessageKind::Ticket)
            }
            (Version::Tls12, Role::Client, HELLO_REQUEST) if length == 0 => Ok(MessageKind::Renegotiation),
            (Version::Tls12, Role::Client, HELLO_REQUEST) => Err(Violation::Malformed),
            (Version::Tls12, Role::Server, CLIENT_HELLO) => {
                self.skip = length;
                Ok(MessageKind::Renegotiation)
            }
            _ => Err(Violation::UnexpectedMessage),
        }
    }
}
