//! The GS2 header (RFC 5801 section 4), with which messages of OAUTHBEARER and SCRAM begin.

use super::InvalidCredentials;

/// A header and what follows it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Header<'a> {
    /// Whether the client could bind the channel, but believes that the server cannot (`y`).
    pub(super) could_bind: bool,
    /// The authorization identity, unescaped. Not empty.
    pub(super) authzid: Option<Vec<u8>>,
    pub(super) rest: &'a [u8],
}

/// Reads `n,a=name,` or `y,,`. A client that wants its channel bound (`p=`) is refused: its TLS channel ends here.
pub(super) fn header(message: &[u8]) -> Result<Header<'_>, InvalidCredentials> {
    let mut parts = message.splitn(3, |byte| *byte == b',');
    let (Some(flag), Some(authzid), Some(rest)) = (parts.next(), parts.next(), parts.next()) else {
        return Err(InvalidCredentials::Grammar);
    };
    let could_bind = match flag {
        b"n" => false,
        b"y" => true,
        _ => return Err(InvalidCredentials::Grammar),
    };
    let authzid = match authzid {
        b"" => None,
        written => Some(sasl_name(written.strip_prefix(b"a=").ok_or(InvalidCredentials::Grammar)?)?),
    };
    Ok(Header { could_bind, authzid, rest })
}

/// Unescapes a saslname (RFC 5802 section 5.1): `=2C` is a comma, `=3D` an equals sign, and there is no other `=`.
pub(super) fn sasl_name(written: &[u8]) -> Result<Vec<u8>, InvalidCredentials> {
    let mut name = Vec::with_capacity(written.len());
    let mut rest = written;
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

/// Writes a name as a saslname.
pub(super) fn escaped(name: &str) -> String {
    name.replace('=', "=3D").replace(',', "=2C")
}
