//! TLVs that follow the addresses in version 2 (HAProxy's specification, section 2.2).

use crc::{CRC_32_ISCSI, Crc, Digest};

/// Types of TLVs.
pub(super) mod kind {
    pub(in crate::protocol::proxy_protocol) const ALPN: u8 = 0x01;
    pub(in crate::protocol::proxy_protocol) const AUTHORITY: u8 = 0x02;
    pub(in crate::protocol::proxy_protocol) const CRC32C: u8 = 0x03;
    pub(in crate::protocol::proxy_protocol) const SSL: u8 = 0x20;
    /// A TLV within [`SSL`].
    pub(in crate::protocol::proxy_protocol) const SSL_VERSION: u8 = 0x21;
}

/// The client uses TLS.
pub(super) const CLIENT_SSL: u8 = 0x01;
/// The client has presented a certificate, in this connection or in the TLS session that it resumed.
pub(super) const CLIENT_CERTIFICATE: u8 = 0x02 | 0x04;
/// The client has presented a certificate in this connection.
pub(super) const CLIENT_CERTIFICATE_NOW: u8 = 0x02;

/// Names of TLS versions: in log records, and in headers.
pub(super) const VERSIONS: &[(&str, &str)] =
    &[("TLSv1.3", "TLSv1.3"), ("TLSv1.2", "TLSv1.2"), ("TLSv1.1", "TLSv1.1"), ("TLSv1.0", "TLSv1")];

/// Takes the next TLV off `bytes`, and returns its type and value. An error means that it is incomplete.
pub(super) fn next<'a>(bytes: &mut &'a [u8]) -> Option<Result<(u8, &'a [u8]), ()>> {
    let (&number, rest) = bytes.split_first()?;
    let parts =
        rest.split_first_chunk().and_then(|(length, rest)| rest.split_at_checked(u16::from_be_bytes(*length).into()));
    let Some((value, rest)) = parts else { return Some(Err(())) };
    *bytes = rest;
    Some(Ok((number, value)))
}

/// Appends a TLV. Values have at most a few hundred bytes.
pub(super) fn put(out: &mut Vec<u8>, number: u8, value: &[u8]) {
    out.push(number);
    out.extend(u16::try_from(value.len()).unwrap_or(u16::MAX).to_be_bytes());
    out.extend(value);
}

/// Returns the CRC-32C of a header in which the checksum itself is zero.
pub(super) fn checksum(parts: [&[u8]; 3]) -> [u8; 4] {
    const CRC32C: Crc<u32> = Crc::<u32>::new(&CRC_32_ISCSI);
    let mut digest: Digest<'_, u32> = CRC32C.digest();
    parts.iter().for_each(|part| digest.update(part));
    digest.finalize().to_be_bytes()
}
