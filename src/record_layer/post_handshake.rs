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
/// Maximum length of a message, as in rustls. Tickets have some hundred bytes.
const MAX_MESSAGE: usize = 0xffff;

/// The action that the messages of a record require.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Asked {
    Nothing,
    /// The next record of the peer uses new keys. `answer`: the peer requests new keys from this end too.
    KeyUpdate {
        answer: bool,
    },
    /// The peer requests a renegotiation (TLS 1.2).
    Renegotiation,
}

/// The position in the stream of messages.
#[derive(Debug, Default)]
pub(super) struct Messages {
    /// The header of the current message, and the content of a KeyUpdate (one byte).
    head: [u8; MESSAGE_HEADER + 1],
    head_length: u8,
    /// Remaining bytes of a message that is skipped.
    skip: usize,
}

impl Messages {
    /// Whether a message is incomplete. Then no record of another type may follow (RFC 8446 section 5.1).
    pub(super) fn is_inside(&self) -> bool {
        self.skip > 0 || self.head_length > 0
    }

    /// Reads the content of one record.
    pub(super) fn take(&mut self, version: Version, role: Role, mut content: &[u8]) -> Result<Asked, Violation> {
        if content.is_empty() {
            return Err(Violation::UnexpectedMessage);
        }
        let mut asked = Asked::Nothing;
        loop {
            let skipped = self.skip.min(content.len());
            self.skip -= skipped;
            content = &content[skipped..];
            let Some((&byte, rest)) = content.split_first() else { return Ok(asked) };
            content = rest;
            self.head[usize::from(self.head_length)] = byte;
            self.head_length += 1;
            match self.head_length {
                4 => match self.begun(version, role)? {
                    Asked::KeyUpdate { .. } => {}
                    other => {
                        self.head_length = 0;
                        if other != Asked::Nothing {
                            asked = other;
                        }
                    }
                },
                5 => {
                    self.head_length = 0;
                    // A KeyUpdate must end its record, because the rest of the record would have been sealed with the old key.
                    if !content.is_empty() {
                        return Err(Violation::UnexpectedMessage);
                    }
                    return match self.head[MESSAGE_HEADER] {
                        0 => Ok(Asked::KeyUpdate { answer: false }),
                        1 => Ok(Asked::KeyUpdate { answer: true }),
                        _ => Err(Violation::IllegalValue),
                    };
                }
                _ => {}
            }
        }
    }

    /// Handles a message whose header is complete.
    fn begun(&mut self, version: Version, role: Role) -> Result<Asked, Violation> {
        let length = usize::from(self.head[1]) << 16 | usize::from(self.head[2]) << 8 | usize::from(self.head[3]);
        if length > MAX_MESSAGE {
            return Err(Violation::Malformed);
        }
        match (version, role, self.head[0]) {
            (Version::Tls13, _, KEY_UPDATE) if length == 1 => Ok(Asked::KeyUpdate { answer: false }),
            (Version::Tls13, _, KEY_UPDATE) => Err(Violation::Malformed),
            (Version::Tls13, Role::Client, NEW_SESSION_TICKET) => {
                self.skip = length;
                Ok(Asked::Nothing)
            }
            (Version::Tls12, Role::Client, HELLO_REQUEST) if length == 0 => Ok(Asked::Renegotiation),
            (Version::Tls12, Role::Client, HELLO_REQUEST) => Err(Violation::Malformed),
            (Version::Tls12, Role::Server, CLIENT_HELLO) => {
                self.skip = length;
                Ok(Asked::Renegotiation)
            }
            _ => Err(Violation::UnexpectedMessage),
        }
    }
}
