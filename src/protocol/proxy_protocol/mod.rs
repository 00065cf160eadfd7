//! PROXY protocol headers, versions 1 and 2 (HAProxy's specification, sections 2.1 and 2.2), in which a load balancer sends the
//! addresses of the client.
//!
//! [`parse`] reads the header of a balancer, [`header_v1`] and [`header_v2`] create headers for servers. The module does not decide
//! whether a header is trusted: `session` reads one only if the configuration lists the sender's network.

mod read;
#[cfg(test)]
mod tests;
mod tlv;
mod write;

pub use self::read::{Detection, Header, MalformedHeader, Origin, detect, parse};
pub use self::write::{LOCAL_V1, header_v1, header_v2, local_v2};

/// The first twelve bytes of version 2.
const SIGNATURE: &[u8; 12] = b"\r\n\r\n\0\r\nQUIT\n";

/// Size of the signature, version and command, family, and length.
const FIXED_SIZE: usize = 16;

/// The client's TLS connection, as described by the TLVs of a header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClientTlsInfo<'a> {
    /// The TLS version, such as `TLSv1.3`, or `unknown` if the balancer does not send it.
    pub version: &'static str,
    /// The server name that the client requested (SNI): up to 255 bytes, without white space and control characters.
    pub server_name: Option<&'a str>,
    /// Whether `imap` was negotiated by ALPN.
    pub alpn: bool,
    /// Whether the client presented a certificate that was verified.
    pub certificate: bool,
}
