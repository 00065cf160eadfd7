//! PROXY protocol headers, versions 1 and 2, as sent to servers (the HAProxy specification, sections 2.1 and 2.2).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// First twelve bytes of version 2.
const SIGNATURE: &[u8] = b"\r\n\r\n\0\r\nQUIT\n";
/// Version 2, command PROXY.
const VERSION_AND_COMMAND: u8 = 0x21;

/// The line of version 1 for a connection of the proxy's own.
pub(super) const LOCAL_1: &[u8] = b"PROXY UNKNOWN\r\n";

/// The header of version 2 for a connection of the proxy's own: the command LOCAL, and no addresses.
pub(super) fn local_2() -> Vec<u8> {
    [SIGNATURE, &[0x20, 0, 0, 0]].concat()
}

/// Both ends of the client's connection, brought to one address family.
enum Pair {
    V4(Ipv4Addr, Ipv4Addr),
    V6(Ipv6Addr, Ipv6Addr),
}

impl Pair {
    fn new(client: IpAddr, listener: IpAddr) -> Self {
        match (client.to_canonical(), listener.to_canonical()) {
            (IpAddr::V4(client), IpAddr::V4(listener)) => Self::V4(client, listener),
            (client, listener) => Self::V6(as_v6(client), as_v6(listener)),
        }
    }
}

fn as_v6(address: IpAddr) -> Ipv6Addr {
    match address {
        IpAddr::V4(v4) => v4.to_ipv6_mapped(),
        IpAddr::V6(v6) => v6,
    }
}

/// The line of version 1.
pub(super) fn version_1(client: SocketAddr, listener: SocketAddr) -> Vec<u8> {
    let (family, from, to) = match Pair::new(client.ip(), listener.ip()) {
        Pair::V4(from, to) => ("TCP4", from.to_string(), to.to_string()),
        Pair::V6(from, to) => ("TCP6", from.to_string(), to.to_string()),
    };
    format!("PROXY {family} {from} {to} {} {}\r\n", client.port(), listener.port()).into_bytes()
}

/// The binary header of version 2, without TLVs.
pub(super) fn version_2(client: SocketAddr, listener: SocketAddr) -> Vec<u8> {
    let mut addresses = Vec::with_capacity(36);
    let family = match Pair::new(client.ip(), listener.ip()) {
        Pair::V4(from, to) => {
            addresses.extend([from.octets(), to.octets()].concat());
            0x11
        }
        Pair::V6(from, to) => {
            addresses.extend([from.octets(), to.octets()].concat());
            0x21
        }
    };
    addresses.extend(client.port().to_be_bytes());
    addresses.extend(listener.port().to_be_bytes());
    #[expect(clippy::cast_possible_truncation, reason = "12 or 36 bytes")]
    let length = (addresses.len() as u16).to_be_bytes();
    [SIGNATURE, &[VERSION_AND_COMMAND, family], &length, &addresses].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    #[test]
    fn version_1_lines() {
        let line = |client, listener| String::from_utf8(version_1(address(client), address(listener))).unwrap();
        assert_eq!(line("192.0.2.1:4000", "198.51.100.2:993"), "PROXY TCP4 192.0.2.1 198.51.100.2 4000 993\r\n");
        assert_eq!(line("[2001:db8::1]:4000", "[::1]:993"), "PROXY TCP6 2001:db8::1 ::1 4000 993\r\n");
        // A dual-stack listener sees IPv4 clients as mapped addresses.
        assert_eq!(line("[::ffff:192.0.2.1]:1", "[::ffff:192.0.2.2]:2"), "PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n");
    }

    #[test]
    fn version_2_headers() {
        let v4 = version_2(address("192.0.2.1:4000"), address("198.51.100.2:993"));
        assert_eq!(&v4[..16], b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c");
        assert_eq!(&v4[16..], [192, 0, 2, 1, 198, 51, 100, 2, 0x0f, 0xa0, 0x03, 0xe1]);
        let v6 = version_2(address("[2001:db8::1]:1"), address("[::1]:2"));
        assert_eq!((&v6[12..16], v6.len()), (&[0x21, 0x21, 0, 36][..], 52));
    }
}
