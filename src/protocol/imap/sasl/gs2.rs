//! Parser of the GS2 header (RFC 5801 section 4), with which messages of OAUTHBEARER and SCRAM begin.

use super::InvalidCredentials;

/// A header, and the rest of the message.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Header<'a> {
    /// Whether the client supports channel binding, but believes that the server does not (`y`).
    pub(super) supports_channel_binding: bool,
    /// The unescaped authorization identity.
    pub(super) authzid: Option<Vec<u8>>,
    pub(super) rest: &'a [u8],
}

/// Parses `n,a=name,` or `y,,`. Channel binding (`p=`) is refused, because the client's TLS channel ends at the proxy.
pub(super) fn header(message: &[u8]) -> Result<Header<'_>, InvalidCredentials> {
    let mut parts = message.splitn(3, |byte| *byte == b',');
    let (Some(flag), Some(authzid), Some(rest)) = (parts.next(), parts.next(), parts.next()) else {
        return Err(InvalidCredentials::Grammar);
    };
    let supports_channel_binding = match flag {
        b"n" => false,
        b"y" => true,
        _ => return Err(InvalidCredentials::Grammar),
    };
    let authzid = match authzid {
        b"" => None,
        field => Some(sasl_name(field.strip_prefix(b"a=").ok_or(InvalidCredentials::Grammar)?)?),
    };
    Ok(Header { supports_channel_binding, authzid, rest })
}

/// Unescapes a saslname (RFC 5802 section 5.1): `=2C` is a comma, `=3D` an equals sign, and any other `=` is invalid.
pub(super) fn sasl_name(escaped: &[u8]) -> Result<Vec<u8>, InvalidCredentials> {
    let mut name = Vec::with_capacity(escaped.len());
    let mut rest = escaped;
    while let Some((first, after)) = rest.split_first() {
        let (byte, after) = match (first, after) {
            (b'=', [b'2', b'C', after @ ..]) => (b',', after),
            (b'=', [b'3', b'D', after @ ..]) => (b'=', after),
            (b'=' | b',' | 0, _) => return Err(InvalidCredentials::Grammar),
            (byte, after) => (*byte, after),
        };
        name.push(byte);
        rest = after;
    }
    Ok(name)
}

/// Escapes a name as a saslname.
pub(super) fn escape(name: &str) -> String {
    name.replace('=', "=3D").replace(',', "=2C")
}
