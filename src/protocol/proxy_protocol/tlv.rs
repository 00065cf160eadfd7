//! The fields that follow the addresses in version 2 (the HAProxy specification, section 2.2): their numbers, and reading and
//! writing them one by one.

use crc::{CRC_32_ISCSI, Crc, Digest};

/// Numbers of fields.
pub(super) mod kind {
    pub(in crate::protocol::proxy_protocol) const ALPN: u8 = 0x01;
    pub(in crate::protocol::proxy_protocol) const AUTHORITY: u8 = 0x02;
    pub(in crate::protocol::proxy_protocol) const CRC32C: u8 = 0x03;
    pub(in crate::protocol::proxy_protocol) const SSL: u8 = 0x20;
    /// Inside of [`SSL`].
    pub(in crate::protocol::proxy_protocol) const SSL_VERSION: u8 = 0x21;
}

/// The client came over TLS.
pub(super) const CLIENT_SSL: u8 = 0x01;
/// The client showed a certificate, in this connection or in the session that it resumed.
pub(super) const CLIENT_CERTIFICATE: u8 = 0x02 | 0x04;
/// The same, of this connection.
pub(super) const CLIENT_CERTIFICATE_NOW: u8 = 0x02;

/// Names of TLS versions: in log lines, and in headers.
pub(super) const VERSIONS: &[(&str, &str)] =
    &[("TLSv1.3", "TLSv1.3"), ("TLSv1.2", "TLSv1.2"), ("TLSv1.1", "TLSv1.1"), ("TLSv1.0", "TLSv1")];

/// Takes the next field off `bytes`: its number and value. `Err`: there is half a one.
pub(super) fn next<'a>(bytes: &mut &'a [u8]) -> Option<Result<(u8, &'a [u8]), ()>> {
    let (&number, rest) = bytes.split_first()?;
    let parts =
        rest.split_first_chunk().and_then(|(length, rest)| rest.split_at_checked(u16::from_be_bytes(*length).into()));
    let Some((value, rest)) = parts else { return Some(Err(())) };
    *bytes = rest;
    Some(Ok((number, value)))
}

/// Adds a field. A value is some hundred bytes at most.
pub(super) fn put(out: &mut Vec<u8>, number: u8, value: &[u8]) {
    out.push(number);
    out.extend(u16::try_from(value.len()).unwrap_or(u16::MAX).to_be_bytes());
    out.extend(value);
}

/// The sum over a header whose field for it holds zeros.
pub(super) fn checksum(parts: [&[u8]; 3]) -> [u8; 4] {
    const CRC32C: Crc<u32> = Crc::<u32>::new(&CRC_32_ISCSI);
    let mut digest: Digest<'_, u32> = CRC32C.digest();
    parts.iter().for_each(|part| digest.update(part));
    digest.finalize().to_be_bytes()
}
