//! Headers as balancers send them.
//!
//! What is wrong is told at the first byte that cannot be right, so that a peer which speaks something else is not waited for.
//! Fields that nobody here needs are skipped, but they must be whole, and a checksum must be right where there is one.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::str::FromStr;

use super::tlv::{self, kind};
use super::{ClientTlsInfo, FIXED, SIGNATURE};

/// A line of version 1 with its end.
const MAX_LINE: usize = 107;
/// Addresses and fields of version 2. Real ones have some hundred bytes.
const MAX_BLOCK: usize = 4096;
/// Of a server name: as much as the specification allows.
const MAX_NAME: usize = 255;

/// A whole header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header<'a> {
    /// Bytes of it. What follows is the client's.
    pub length: usize,
    /// Whose connection it is.
    pub origin: Origin,
    /// How the client came to the balancer, where TLS ended there.
    pub tls: Option<ClientTlsInfo<'a>>,
}

/// Whose connection it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// The balancer's own (LOCAL): it looks whether we are alive.
    Local,
    /// The balancer does not say (UNKNOWN, UNSPEC), or it is no TCP connection.
    Unknown,
    /// A client's.
    Client {
        /// The client.
        client: SocketAddr,
        /// Where it connected to.
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

/// Why bytes are no header. Nothing that the peer sent is in the text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct MalformedHeader(&'static str);

const NO_HEADER: MalformedHeader = MalformedHeader("no PROXY header");

/// The header at the start of `bytes`. `None`: it may become one, and all that is there belongs to it.
///
/// # Errors
/// It is no header, or one that breaks the rules.
pub fn parse(bytes: &[u8]) -> Result<Option<Header<'_>>, MalformedHeader> {
    match bytes.first() {
        None => Ok(None),
        Some(b'P') => header_v1(bytes),
        Some(_) => header_v2(bytes),
    }
}

/// Whether a connection that is not to begin with a header does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Detection {
    /// It does.
    ProxyHeader,
    /// More bytes are needed.
    Undecided,
    /// It does not.
    Other,
}

/// Looks at the first bytes of a connection for the start of a header, which no command of IMAP can be.
pub fn detect(bytes: &[u8]) -> Detection {
    let starts = [&b"PROXY TCP4 "[..], b"PROXY TCP6 ", b"PROXY UNKNOWN", SIGNATURE];
    let mut possible = starts.into_iter().filter(|start| begins(bytes, start)).peekable();
    if possible.peek().is_none() {
        Detection::Other
    } else if possible.any(|start| bytes.len() >= start.len()) {
        Detection::ProxyHeader
    } else {
        Detection::Undecided
    }
}

/// `bytes` begin with `start`, as far as they have come.
fn begins(bytes: &[u8], start: &[u8]) -> bool {
    bytes.iter().zip(start).all(|(byte, expected)| byte == expected)
}

fn header_v1(bytes: &[u8]) -> Result<Option<Header<'_>>, MalformedHeader> {
    const START: &[u8] = b"PROXY ";
    if !begins(bytes, START) {
        return Err(NO_HEADER);
    }
    let seen = &bytes[..bytes.len().min(MAX_LINE)];
    // Before its end a line holds no controls.
    let Some(end) = seen.iter().position(|byte| !matches!(byte, b' '..=b'~')) else {
        return if seen.len() == MAX_LINE { Err(MalformedHeader("the line is too long")) } else { Ok(None) };
    };
    match seen[end..] {
        [b'\r', b'\n', ..] => {}
        [b'\r'] if seen.len() < MAX_LINE => return Ok(None),
        _ => return Err(MalformedHeader("the line is too long, or no text")),
    }
    let line = seen.get(START.len()..end).and_then(|line| std::str::from_utf8(line).ok()).unwrap_or_default();
    let origin = line_origin(line).ok_or(MalformedHeader("the line has not the form of version 1"))?;
    Ok(Some(Header { length: end + 2, origin, tls: None }))
}

/// `TCP4 192.0.2.1 198.51.100.2 4000 993`.
fn line_origin(line: &str) -> Option<Origin> {
    let (family, rest) = line.split_once(' ').unwrap_or((line, ""));
    if family == "UNKNOWN" {
        // Whatever follows is to be ignored.
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

/// Decimal, without a sign or zeros ahead.
fn port(word: &str) -> Option<u16> {
    let plain = word.bytes().all(|byte| byte.is_ascii_digit()) && (word == "0" || !word.starts_with('0'));
    word.parse().ok().filter(|_| plain)
}

fn header_v2(bytes: &[u8]) -> Result<Option<Header<'_>>, MalformedHeader> {
    if !begins(bytes, SIGNATURE) {
        return Err(NO_HEADER);
    }
    let is_local = match bytes.get(SIGNATURE.len()) {
        None => return Ok(None),
        Some(0x20) => true,
        Some(0x21) => false,
        Some(_) => return Err(MalformedHeader("neither version 2 nor a command of it")),
    };
    let Some(fixed) = bytes.first_chunk::<FIXED>() else { return Ok(None) };
    let [.., family, high, low] = *fixed;
    let addresses = match family {
        // Of a header of the balancer's own, all that follows is to be ignored.
        _ if is_local => 0,
        0x00 => 0,
        0x11 | 0x12 => 12,
        0x21 | 0x22 => 36,
        0x31 | 0x32 => 216,
        _ => return Err(MalformedHeader("an unknown family of addresses")),
    };
    let length = usize::from(u16::from_be_bytes([high, low]));
    if length > MAX_BLOCK {
        return Err(MalformedHeader("the header is too long"));
    }
    if length < addresses {
        return Err(MalformedHeader("the header is too short for its addresses"));
    }
    let length = FIXED + length;
    let Some(header) = bytes.get(..length) else { return Ok(None) };
    if is_local {
        return Ok(Some(Header { length, origin: Origin::Local, tls: None }));
    }
    let (block, fields) = header[FIXED..].split_at(addresses);
    let origin = match family {
        0x11 => pair::<4>(block),
        0x21 => pair::<16>(block),
        // Valid, but no address of a TCP connection: as if not told, says the specification.
        _ => Some(Origin::Unknown),
    };
    let origin = origin.ok_or(MalformedHeader("the header is too short for its addresses"))?;
    // What follows an unspecified family is to be ignored too.
    let tls = if family == 0 { None } else { told(header, fields)? };
    Ok(Some(Header { length, origin, tls }))
}

/// Both addresses, then both ports.
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

/// What the fields say of the client's TLS.
fn told<'a>(header: &[u8], mut fields: &'a [u8]) -> Result<Option<ClientTlsInfo<'a>>, MalformedHeader> {
    let (mut alpn, mut server_name, mut sum, mut ssl) = (None, None, None, None);
    let end = header.len();
    while let Some(field) = tlv::next(&mut fields) {
        let (number, value) = field.map_err(|()| MalformedHeader("a field reaches beyond the header"))?;
        let place = match number {
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
        if place.replace(value).is_some() {
            return Err(MalformedHeader("a field stands twice"));
        }
    }
    let server_name = server_name.map(name).transpose()?;
    let Some((flags, version)) = ssl.map(ssl_field).transpose()?.flatten() else { return Ok(None) };
    let alpn = alpn == Some(b"imap");
    Ok(Some(ClientTlsInfo { version, server_name, alpn, certificate: flags & tlv::CLIENT_CERTIFICATE != 0 }))
}

/// It goes to servers and into logs, so it is text that nothing can hide in.
fn name(value: &[u8]) -> Result<&str, MalformedHeader> {
    let name = std::str::from_utf8(value).ok().filter(|name| (1..=MAX_NAME).contains(&name.len()));
    let name = name.filter(|name| !name.contains(|char: char| char.is_control() || char.is_whitespace()));
    name.ok_or(MalformedHeader("the server name is no name"))
}

/// Flags of the client and the version of TLS; `None`: it was not TLS. A certificate that was not verified is none.
fn ssl_field(value: &[u8]) -> Result<Option<(u8, &'static str)>, MalformedHeader> {
    const SHORT: MalformedHeader = MalformedHeader("the field on TLS is too short");
    let (&flags, rest) = value.split_first().ok_or(SHORT)?;
    let (&verified, mut inner) = rest.split_first_chunk::<4>().ok_or(SHORT)?;
    let mut version = None;
    while let Some(field) = tlv::next(&mut inner) {
        let (number, value) = field.map_err(|()| MalformedHeader("a field reaches beyond the one around it"))?;
        if number == kind::SSL_VERSION {
            version = tlv::VERSIONS.iter().find(|(_, theirs)| theirs.as_bytes() == value).map(|(ours, _)| *ours);
        }
    }
    let flags = if verified == [0; 4] { flags } else { flags & !tlv::CLIENT_CERTIFICATE };
    Ok((flags & tlv::CLIENT_SSL != 0).then_some((flags, version.unwrap_or("unknown"))))
}
