//! Headers for servers.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::tlv::{self, kind};
use super::{ClientTlsInfo, FIXED_SIZE, SIGNATURE};

/// Version 2, command PROXY.
const VERSION_AND_COMMAND: u8 = 0x21;

/// The version 1 header of a connection that the proxy itself makes.
pub const LOCAL_V1: &[u8] = b"PROXY UNKNOWN\r\n";

/// Returns the version 2 header of a connection that the proxy itself makes: the command LOCAL, without addresses.
pub fn local_v2() -> Vec<u8> {
    [&SIGNATURE[..], &[0x20, 0, 0, 0]].concat()
}

/// Both addresses of the client's connection, converted to one address family.
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

/// Returns the version 1 header.
pub fn header_v1(client: SocketAddr, listener: SocketAddr) -> Vec<u8> {
    let (family, from, to) = match Pair::new(client.ip(), listener.ip()) {
        Pair::V4(from, to) => ("TCP4", from.to_string(), to.to_string()),
        Pair::V6(from, to) => ("TCP6", from.to_string(), to.to_string()),
    };
    format!("PROXY {family} {from} {to} {} {}\r\n", client.port(), listener.port()).into_bytes()
}

/// Returns the version 2 header. If the client uses TLS, it contains TLVs about it and a checksum.
pub fn header_v2(client: SocketAddr, listener: SocketAddr, tls: Option<&ClientTlsInfo<'_>>) -> Vec<u8> {
    let mut header = [&SIGNATURE[..], &[VERSION_AND_COMMAND, 0, 0, 0]].concat();
    let family = match Pair::new(client.ip(), listener.ip()) {
        Pair::V4(from, to) => {
            header.extend([from.octets(), to.octets()].concat());
            0x11
        }
        Pair::V6(from, to) => {
            header.extend([from.octets(), to.octets()].concat());
            0x21
        }
    };
    header.extend(client.port().to_be_bytes());
    header.extend(listener.port().to_be_bytes());
    if let Some(tls) = tls {
        append_tlvs(tls, &mut header);
        tlv::put(&mut header, kind::CRC32C, &[0; 4]);
    }
    // The length fits: a name has at most 255 bytes.
    let length = u16::try_from(header.len() - FIXED_SIZE).unwrap_or(u16::MAX).to_be_bytes();
    header[FIXED_SIZE - 3..FIXED_SIZE].copy_from_slice(&[family, length[0], length[1]]);
    if tls.is_some() {
        let sum = tlv::checksum([&header, &[], &[]]);
        let at = header.len() - sum.len();
        header[at..].copy_from_slice(&sum);
    }
    header
}

fn append_tlvs(tls: &ClientTlsInfo<'_>, out: &mut Vec<u8>) {
    if tls.alpn {
        tlv::put(out, kind::ALPN, b"imap");
    }
    if let Some(name) = tls.server_name.filter(|name| name.len() <= 255) {
        tlv::put(out, kind::AUTHORITY, name.as_bytes());
    }
    let flags = tlv::CLIENT_SSL | if tls.certificate { tlv::CLIENT_CERTIFICATE_NOW } else { 0 };
    // Zero means that a certificate was presented and verified.
    let verified = u32::from(!tls.certificate);
    let mut ssl = [&[flags][..], &verified.to_be_bytes()].concat();
    if let Some((_, version)) = tlv::VERSIONS.iter().find(|(name, _)| *name == tls.version) {
        tlv::put(&mut ssl, kind::SSL_VERSION, version.as_bytes());
    }
    tlv::put(out, kind::SSL, &ssl);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    #[test]
    fn header_v1_has_the_addresses_in_text() {
        let line = |client, listener| String::from_utf8(header_v1(address(client), address(listener))).unwrap();
        assert_eq!(line("192.0.2.1:4000", "198.51.100.2:993"), "PROXY TCP4 192.0.2.1 198.51.100.2 4000 993\r\n");
        assert_eq!(line("[2001:db8::1]:4000", "[::1]:993"), "PROXY TCP6 2001:db8::1 ::1 4000 993\r\n");
        // A dual-stack listener sees IPv4 clients as mapped addresses.
        assert_eq!(line("[::ffff:192.0.2.1]:1", "[::ffff:192.0.2.2]:2"), "PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n");
    }

    #[test]
    fn header_v2_has_the_addresses_in_binary() {
        let v4 = header_v2(address("192.0.2.1:4000"), address("198.51.100.2:993"), None);
        assert_eq!(&v4[..16], b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c");
        assert_eq!(&v4[16..], [192, 0, 2, 1, 198, 51, 100, 2, 0x0f, 0xa0, 0x03, 0xe1]);
        let v6 = header_v2(address("[2001:db8::1]:1"), address("[::1]:2"), None);
        assert_eq!((&v6[12..16], v6.len()), (&[0x21, 0x21, 0, 36][..], 52));
    }

    #[test]
    fn header_v2_describes_tls() {
        let tls = ClientTlsInfo { version: "TLSv1.3", server_name: Some("mail.test"), alpn: true, certificate: false };
        let header = header_v2(address("192.0.2.1:4000"), address("198.51.100.2:993"), Some(&tls));
        let fields = b"\x01\0\x04imap\x02\0\x09mail.test\x20\0\x0f\x01\0\0\0\x01\x21\0\x07TLSv1.3\x03\0\x04";
        assert_eq!(&header[28..header.len() - 4], fields);
        assert_eq!(usize::from(header[15]), header.len() - FIXED_SIZE);
        // Calculated by another program.
        assert_eq!(header[header.len() - 4..], [0xf0, 0x6b, 0x50, 0xaf]);
        let certified = ClientTlsInfo { certificate: true, alpn: false, server_name: None, ..tls };
        let header = header_v2(address("192.0.2.1:4000"), address("198.51.100.2:993"), Some(&certified));
        assert_eq!(&header[28..36], b"\x20\0\x0f\x03\0\0\0\0");
    }
}
