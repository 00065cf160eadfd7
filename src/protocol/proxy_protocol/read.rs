//! Parser of headers from balancers.
//!
//! An error is returned at the first byte that cannot be valid, so that a peer with another protocol is not waited for. Unknown
//! TLVs are skipped but must be complete, and a checksum must match if there is one.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::str::FromStr;

use super::tlv::{self, kind};
use super::{ClientTlsInfo, FIXED_SIZE, SIGNATURE};

/// Maximum size of a version 1 line, including its end.
const MAX_LINE: usize = 107;
/// Maximum size of the addresses and TLVs of version 2. Real headers have a few hundred bytes.
const MAX_BLOCK: usize = 4096;
/// Maximum size of a server name, as in the specification.
const MAX_NAME: usize = 255;

/// A complete header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header<'a> {
    /// Size of the header in bytes, after which the client's data begins.
    pub length: usize,
    /// The origin of the connection.
    pub origin: Origin,
    /// The client's TLS connection, if the balancer terminates TLS.
    pub tls: Option<ClientTlsInfo<'a>>,
}

/// The origin of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// The balancer itself, which checks whether the proxy is alive (LOCAL).
    Local,
    /// Not known to the balancer (UNKNOWN, UNSPEC), or not a TCP connection.
    Unknown,
    /// A client.
    Client {
        /// The client's address.
        client: SocketAddr,
        /// The address that the client connected to.
        listener: SocketAddr,
    },
}

impl Origin {
    /// The word for the origin in log lines.
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::Local => "local",
            Self::Unknown => "unknown",
            Self::Client { .. } => "client",
        }
    }
}

/// Why bytes are not a valid header. The text contains nothing that the peer has sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct MalformedHeader(&'static str);

const NOT_A_HEADER: MalformedHeader = MalformedHeader("not a PROXY header");

/// Parses the header at the start of `bytes`. Returns `None` if the header is incomplete.
///
/// # Errors
/// `bytes` do not begin with a valid header.
pub fn parse(bytes: &[u8]) -> Result<Option<Header<'_>>, MalformedHeader> {
    match bytes.first() {
        None => Ok(None),
        Some(b'P') => header_v1(bytes),
        Some(_) => header_v2(bytes),
    }
}

/// Whether a connection begins with a header on a listener that expects none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Detection {
    /// The connection begins with a header.
    ProxyHeader,
    /// More bytes are needed.
    Undecided,
    /// The connection does not begin with a header.
    Other,
}

/// Detects the start of a header in the first bytes of a connection. It cannot be an IMAP command.
pub fn detect(bytes: &[u8]) -> Detection {
    let starts = [&b"PROXY TCP4 "[..], b"PROXY TCP6 ", b"PROXY UNKNOWN", SIGNATURE];
    let mut possible = starts.into_iter().filter(|start| begins_with(bytes, start)).peekable();
    if possible.peek().is_none() {
        Detection::Other
    } else if possible.any(|start| bytes.len() >= start.len()) {
        Detection::ProxyHeader
    } else {
        Detection::Undecided
    }
}

/// Whether `bytes` begin with `start`, or with as much of it as they contain.
fn begins_with(bytes: &[u8], start: &[u8]) -> bool {
    bytes.iter().zip(start).all(|(byte, expected)| byte == expected)
}

fn header_v1(bytes: &[u8]) -> Result<Option<Header<'_>>, MalformedHeader> {
    const START: &[u8] = b"PROXY ";
    if !begins_with(bytes, START) {
        return Err(NOT_A_HEADER);
    }
    let seen = &bytes[..bytes.len().min(MAX_LINE)];
    // The first control character is the end of the line.
    let Some(end) = seen.iter().position(|byte| !matches!(byte, b' '..=b'~')) else {
        return if seen.len() == MAX_LINE { Err(MalformedHeader("the line is too long")) } else { Ok(None) };
    };
    match seen[end..] {
        [b'\r', b'\n', ..] => {}
        [b'\r'] if seen.len() < MAX_LINE => return Ok(None),
        _ => return Err(MalformedHeader("the line is too long or contains a control character")),
    }
    let line = seen.get(START.len()..end).and_then(|line| std::str::from_utf8(line).ok()).unwrap_or_default();
    let origin = line_origin(line).ok_or(MalformedHeader("the line does not match the format of version 1"))?;
    Ok(Some(Header { length: end + 2, origin, tls: None }))
}

/// Parses `TCP4 192.0.2.1 198.51.100.2 4000 993`.
fn line_origin(line: &str) -> Option<Origin> {
    let (family, rest) = line.split_once(' ').unwrap_or((line, ""));
    if family == "UNKNOWN" {
        // The specification requires that the rest is ignored.
        return Some(Origin::Unknown);
    }
    let mut words = rest.split(' ');
    let mut word = || words.next();
    let addresses = match family {
        "TCP4" => [address::<Ipv4Addr>(word()?)?, address::<Ipv4Addr>(word()?)?],
        "TCP6" => [address::<Ipv6Addr>(word()?)?, address::<Ipv6Addr>(word()?)?],
        _ => return None,
    };
    let ports = [port(word()?)?, port(word()?)?];
    if word().is_some() {
        return None;
    }
    let [client, listener] = [0, 1].map(|end| SocketAddr::new(addresses[end], ports[end]));
    Some(Origin::Client { client, listener })
}

fn address<A: FromStr + Into<IpAddr>>(word: &str) -> Option<IpAddr> {
    word.parse::<A>().ok().map(Into::into)
}

/// Parses a decimal number without a sign or leading zeros.
fn port(word: &str) -> Option<u16> {
    let is_canonical = word.bytes().all(|byte| byte.is_ascii_digit()) && (word == "0" || !word.starts_with('0'));
    word.parse().ok().filter(|_| is_canonical)
}

fn header_v2(bytes: &[u8]) -> Result<Option<Header<'_>>, MalformedHeader> {
    if !begins_with(bytes, SIGNATURE) {
        return Err(NOT_A_HEADER);
    }
    let is_local = match bytes.get(SIGNATURE.len()) {
        None => return Ok(None),
        Some(0x20) => true,
        Some(0x21) => false,
        Some(_) => return Err(MalformedHeader("unknown version or command")),
    };
    let Some(fixed) = bytes.first_chunk::<FIXED_SIZE>() else { return Ok(None) };
    let [.., family, high, low] = *fixed;
    let addresses = match family {
        // The specification requires that the rest of a LOCAL header is ignored.
        _ if is_local => 0,
        0x00 => 0,
        0x11 | 0x12 => 12,
        0x21 | 0x22 => 36,
        0x31 | 0x32 => 216,
        _ => return Err(MalformedHeader("unknown address family")),
    };
    let length = usize::from(u16::from_be_bytes([high, low]));
    if length > MAX_BLOCK {
        return Err(MalformedHeader("the header is too long"));
    }
    if length < addresses {
        return Err(MalformedHeader("the header is too short for its addresses"));
    }
    let length = FIXED_SIZE + length;
    let Some(header) = bytes.get(..length) else { return Ok(None) };
    if is_local {
        return Ok(Some(Header { length, origin: Origin::Local, tls: None }));
    }
    let (block, fields) = header[FIXED_SIZE..].split_at(addresses);
    let origin = match family {
        0x11 => pair::<4>(block),
        0x21 => pair::<16>(block),
        // Valid, but not a TCP connection, which the specification treats as unknown.
        _ => Some(Origin::Unknown),
    };
    let origin = origin.ok_or(MalformedHeader("the header is too short for its addresses"))?;
    // The TLVs of an unspecified family are ignored too.
    let tls = if family == 0 { None } else { client_tls(header, fields)? };
    Ok(Some(Header { length, origin, tls }))
}

/// Parses both addresses, then both ports.
fn pair<const N: usize>(block: &[u8]) -> Option<Origin>
where
    IpAddr: From<[u8; N]>,
{
    let (&client, rest) = block.split_first_chunk::<N>()?;
    let (&listener, rest) = rest.split_first_chunk::<N>()?;
    let (&from, rest) = rest.split_first_chunk::<2>()?;
    let to = *rest.first_chunk::<2>()?;
    Some(Origin::Client {
        client: SocketAddr::new(client.into(), u16::from_be_bytes(from)),
        listener: SocketAddr::new(listener.into(), u16::from_be_bytes(to)),
    })
}

/// Reads the client's TLS connection from the TLVs.
fn client_tls<'a>(header: &[u8], mut fields: &'a [u8]) -> Result<Option<ClientTlsInfo<'a>>, MalformedHeader> {
    let (mut alpn, mut server_name, mut sum, mut ssl) = (None, None, None, None);
    let end = header.len();
    while let Some(field) = tlv::next(&mut fields) {
        let (number, value) = field.map_err(|()| MalformedHeader("a TLV extends beyond the header"))?;
        let slot = match number {
            kind::ALPN => &mut alpn,
            kind::AUTHORITY => &mut server_name,
            kind::SSL => &mut ssl,
            kind::CRC32C => {
                let after = end - fields.len();
                let (before, after) = (&header[..after - value.len()], &header[after..]);
                if value.len() != 4 || tlv::checksum([before, &[0; 4], after]) != *value {
                    return Err(MalformedHeader("the checksum is wrong"));
                }
                &mut sum
            }
            _ => continue,
        };
        if slot.replace(value).is_some() {
            return Err(MalformedHeader("duplicate TLV"));
        }
    }
    let server_name = server_name.map(self::server_name).transpose()?;
    let Some((flags, version)) = ssl.map(ssl_tlv).transpose()?.flatten() else { return Ok(None) };
    let alpn = alpn == Some(b"imap");
    Ok(Some(ClientTlsInfo { version, server_name, alpn, certificate: flags & tlv::CLIENT_CERTIFICATE != 0 }))
}

/// Validates a server name. It is sent to servers and logged, so it must not contain white space or control characters.
fn server_name(value: &[u8]) -> Result<&str, MalformedHeader> {
    let name = std::str::from_utf8(value).ok().filter(|name| (1..=MAX_NAME).contains(&name.len()));
    let name = name.filter(|name| !name.contains(|char: char| char.is_control() || char.is_whitespace()));
    name.ok_or(MalformedHeader("invalid server name"))
}

/// Returns the client flags and the TLS version, or `None` without TLS. The flag of a certificate that was not verified is removed.
fn ssl_tlv(value: &[u8]) -> Result<Option<(u8, &'static str)>, MalformedHeader> {
    const SHORT: MalformedHeader = MalformedHeader("the SSL TLV is too short");
    let (&flags, rest) = value.split_first().ok_or(SHORT)?;
    let (&verified, mut inner) = rest.split_first_chunk::<4>().ok_or(SHORT)?;
    let mut version = None;
    while let Some(field) = tlv::next(&mut inner) {
        let (number, value) = field.map_err(|()| MalformedHeader("a TLV extends beyond the enclosing TLV"))?;
        if number == kind::SSL_VERSION {
            version = tlv::VERSIONS.iter().find(|(_, in_header)| in_header.as_bytes() == value).map(|(name, _)| *name);
        }
    }
    let flags = if verified == [0; 4] { flags } else { flags & !tlv::CLIENT_CERTIFICATE };
    Ok((flags & tlv::CLIENT_SSL != 0).then_some((flags, version.unwrap_or("unknown"))))
}
