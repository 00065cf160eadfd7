//! PROXY protocol headers, versions 1 and 2 (the HAProxy specification, sections 2.1 and 2.2): how a balancer says whose connection it
//! passes on.
//!
//! Bytes in, bytes out. [`parse`] reads what a balancer in front of us says, [`header_v1`] and [`header_v2`] write what servers
//! are told. Whether a header may be believed is not known here: `session` asks for one only where the configuration names
//! the sender's network. Called by `session` and `backend::connect`.

mod read;
#[cfg(test)]
mod tests;
mod tlv;
mod write;

pub use self::read::{Detection, Header, MalformedHeader, Origin, detect, parse};
pub use self::write::{LOCAL_V1, header_v1, header_v2, local_v2};

/// First twelve bytes of version 2.
const SIGNATURE: &[u8; 12] = b"\r\n\r\n\0\r\nQUIT\n";

/// Signature, version and command, family, and two bytes of length.
const FIXED: usize = 16;

/// How a client came over TLS, as TLVs carry it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClientTlsInfo<'a> {
    /// As log records write it: `TLSv1.3`; `unknown` where the balancer did not say.
    pub version: &'static str,
    /// The name that the client asked for (SNI): text without blanks and controls, up to 255 bytes.
    pub server_name: Option<&'a str>,
    /// Whether `imap` was agreed on by ALPN.
    pub alpn: bool,
    /// Whether the client showed a certificate that was verified.
    pub certificate: bool,
}
