//! Protocol violations by the peer, and the alerts that report them.

use thiserror::Error;

/// An alert's number (RFC 8446 section 6).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AlertCode(pub u8);

impl AlertCode {
    /// The peer will send nothing more.
    pub const CLOSE_NOTIFY: Self = Self(0);
    pub(super) const UNEXPECTED_MESSAGE: Self = Self(10);
    pub(super) const BAD_RECORD_MAC: Self = Self(20);
    pub(super) const RECORD_OVERFLOW: Self = Self(22);
    pub(super) const ILLEGAL_PARAMETER: Self = Self(47);
    pub(super) const DECODE_ERROR: Self = Self(50);
    pub(super) const USER_CANCELED: Self = Self(90);
    pub(super) const NO_RENEGOTIATION: Self = Self(100);
}

/// The reason why a connection must be closed. The text is for logs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum Violation {
    /// The bytes are not a TLS record.
    #[error("not a TLS record")]
    NotTls,
    /// A record or its plaintext is longer than allowed.
    #[error("a TLS record is too long")]
    RecordOverflow,
    /// Authentication failed: bytes were changed or lost.
    #[error("a TLS record does not authenticate")]
    BadRecord,
    /// A record or message type that is not allowed after the handshake.
    #[error("a TLS message that is not allowed now")]
    UnexpectedMessage,
    /// Too many consecutive records without data.
    #[error("too many TLS records without data")]
    TooManyWithoutData,
    /// A message that cannot be parsed.
    #[error("a TLS message that cannot be read")]
    Malformed,
    /// A message with a value that is not allowed.
    #[error("a TLS message with a value that is not allowed")]
    IllegalValue,
    /// The sequence number would overflow.
    #[error("too many TLS records under one key")]
    Exhausted,
    /// The peer closed the connection with this alert.
    #[error("TLS alert {} received", .0.0)]
    AlertReceived(AlertCode),
}

impl Violation {
    /// The alert to send to the peer; `None` if the peer sent one itself.
    pub fn alert(self) -> Option<AlertCode> {
        match self {
            Self::NotTls | Self::UnexpectedMessage | Self::TooManyWithoutData => Some(AlertCode::UNEXPECTED_MESSAGE),
            Self::RecordOverflow => Some(AlertCode::RECORD_OVERFLOW),
            Self::BadRecord => Some(AlertCode::BAD_RECORD_MAC),
            Self::Malformed => Some(AlertCode::DECODE_ERROR),
            Self::IllegalValue => Some(AlertCode::ILLEGAL_PARAMETER),
            Self::Exhausted => Some(AlertCode::CLOSE_NOTIFY),
            Self::AlertReceived(_) => None,
        }
    }
}
