//! Messages of the handshake protocol that come after the handshake, at any split over records.
//!
//! None but KeyUpdate is of use here, so no message is kept: a ticket, for example, is skipped as it arrives.

use super::violation::Violation;
use super::{Role, Version};

const HELLO_REQUEST: u8 = 0;
const CLIENT_HELLO: u8 = 1;
const NEW_SESSION_TICKET: u8 = 4;
const KEY_UPDATE: u8 = 24;

/// Type and length.
const MESSAGE_HEADER: usize = 4;
/// A longer message is none that may come here: tickets are hundreds of bytes, rustls's own limit is this.
const MAX_MESSAGE: usize = 0xffff;

/// What a record's messages ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Asked {
    Nothing,
    /// The peer's next record has new keys; whether it wants new ones from us too.
    KeyUpdate {
        answer: bool,
    },
    /// TLS 1.2: to begin again.
    Renegotiation,
}

/// Where in the stream of messages we are.
#[derive(Debug, Default)]
pub(super) struct Messages {
    /// Header of the message that has begun, and the one byte that a KeyUpdate has.
    head: [u8; MESSAGE_HEADER + 1],
    head_length: u8,
    /// Bytes of a message still to be skipped.
    skip: usize,
}

impl Messages {
    /// Whether a message is only half there: then no other type of record may come (RFC 8446 section 5.1).
    pub(super) fn is_inside(&self) -> bool {
        self.skip > 0 || self.head_length > 0
    }

    /// Takes the content of one record.
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
                    // Keys change at the end of a record, or the rest of it would belong to neither key.
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

    /// A message's header is complete.
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
