//! Tests of the parser at every split of its input, and of every error.

use std::net::SocketAddr;

use super::read::*;
use super::tlv::{self, kind};
use super::*;

fn address(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

fn client(from: &str, to: &str) -> Origin {
    Origin::Client { client: address(from), listener: address(to) }
}

/// Parses a header, checking that it is incomplete up to its last byte, and that following bytes do not change it.
#[track_caller]
fn parse_complete(header: &[u8]) -> Header<'_> {
    for end in 0..header.len() {
        assert_eq!(parse(&header[..end]), Ok(None), "cut at {end}");
    }
    let read = parse(header).unwrap().unwrap();
    assert_eq!(read.length, header.len());
    let more = [header, b"\x16\x03\x01 and more\r\n"].concat();
    assert_eq!(parse(&more), Ok(Some(read)));
    read
}

#[track_caller]
fn refused(header: &[u8]) -> String {
    parse(header).unwrap_err().to_string()
}

/// A header of version 2 with this command, family, addresses and TLVs.
fn binary(command: u8, family: u8, block: &[u8]) -> Vec<u8> {
    let length = u16::try_from(block.len()).unwrap().to_be_bytes();
    [&SIGNATURE[..], &[command, family], &length[..], block].concat()
}

/// A header with IPv4 addresses and these TLVs.
fn with_tlvs(fields: &[u8]) -> Vec<u8> {
    binary(0x21, 0x11, &[&[192, 0, 2, 1, 198, 51, 100, 2, 0x0f, 0xa0, 0x03, 0xe1], fields].concat())
}

fn tlv_bytes(number: u8, value: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    tlv::put(&mut out, number, value);
    out
}

#[test]
fn version_1_headers_are_parsed() {
    let read = parse_complete(b"PROXY TCP4 192.0.2.1 198.51.100.2 4000 993\r\n");
    assert_eq!((read.origin, read.tls), (client("192.0.2.1:4000", "198.51.100.2:993"), None));
    let read = parse_complete(b"PROXY TCP6 2001:db8::1 ::1 0 65535\r\n");
    assert_eq!(read.origin, client("[2001:db8::1]:0", "[::1]:65535"));
    for unknown in [LOCAL_V1, b"PROXY UNKNOWN ffff::1 anything at all\r\n"] {
        assert_eq!(parse_complete(unknown).origin, Origin::Unknown);
    }
    // The longest valid line.
    let long = format!("PROXY UNKNOWN {}\r\n", "x".repeat(91));
    assert_eq!((long.len(), parse_complete(long.as_bytes()).origin), (107, Origin::Unknown));
}

#[test]
fn invalid_version_1_headers_are_refused() {
    for line in [
        "PROXY TCP4 192.0.2.1 198.51.100.2 4000\r\n",
        "PROXY TCP4 192.0.2.1 198.51.100.2 4000 993 \r\n",
        "PROXY TCP4  192.0.2.1 198.51.100.2 4000 993\r\n",
        "PROXY TCP4 192.0.2.1 198.51.100.2 4000 993 1\r\n",
        "PROXY TCP4 192.0.2.1 198.51.100.2 04000 993\r\n",
        "PROXY TCP4 192.0.2.1 198.51.100.2 +4000 993\r\n",
        "PROXY TCP4 192.0.2.1 198.51.100.2 65536 993\r\n",
        "PROXY TCP4 192.0.2.01 198.51.100.2 4000 993\r\n",
        "PROXY TCP4 2001:db8::1 ::1 4000 993\r\n",
        "PROXY TCP6 192.0.2.1 198.51.100.2 4000 993\r\n",
        "PROXY TCP6 fe80::1%eth0 ::1 4000 993\r\n",
        "PROXY UDP4 192.0.2.1 198.51.100.2 4000 993\r\n",
        "PROXY tcp4 192.0.2.1 198.51.100.2 4000 993\r\n",
        "PROXY UNKNOWNS\r\n",
        "PROXY \r\n",
        "PROXY\r\n",
        "PROXY TCP4 192.0.2.1 198.51.100.2 4000 993\n",
        "PROXY TCP4 192.0.2.1 198.51.100.2 4000 993\rx",
        "PROXY TCP4 192.0.2.1\x00198.51.100.2 4000 993\r\n",
    ] {
        refused(line.as_bytes());
    }
    let long = format!("PROXY UNKNOWN {}", "x".repeat(93));
    assert_eq!(refused(long.as_bytes()), "the line is too long");
    let long = format!("PROXY UNKNOWN {}\r\n", "x".repeat(92));
    assert_eq!(refused(long.as_bytes()), "the line is too long or contains a control character");
}

#[test]
fn other_protocols_are_refused_at_the_first_invalid_byte() {
    for (bytes, wrong) in [
        (&b"\x16\x03\x01"[..], 1),
        (b"a LOGIN alice secret\r\n", 1),
        (b"POST / HTTP/1.1\r\n", 2),
        (b"\r\n\r\n\0\r\nQUIT\r", 12),
        (b"\r\na NOOP\r\n", 3),
    ] {
        assert_eq!(parse(&bytes[..wrong - 1]), Ok(None));
        assert_eq!(refused(&bytes[..wrong]), "not a PROXY header");
    }
}

#[test]
fn version_2_headers_are_parsed() {
    let v4 = with_tlvs(b"");
    assert_eq!(
        (parse_complete(&v4).origin, parse_complete(&v4).tls),
        (client("192.0.2.1:4000", "198.51.100.2:993"), None)
    );
    let v6 = header_v2(address("[2001:db8::1]:1"), address("[::1]:2"), None);
    assert_eq!(parse_complete(&v6).origin, client("[2001:db8::1]:1", "[::1]:2"));
    assert_eq!(parse_complete(&local_v2()).origin, Origin::Local);
    // The rest is ignored after LOCAL and after an unspecified family.
    for block in [&b""[..], b"whatever there is"] {
        assert_eq!(parse_complete(&binary(0x20, 0x11, block)).origin, Origin::Local);
        assert_eq!(parse_complete(&binary(0x21, 0x00, block)).origin, Origin::Unknown);
    }
    for (family, length) in [(0x12, 12), (0x22, 36), (0x31, 216), (0x32, 216)] {
        assert_eq!(parse_complete(&binary(0x21, family, &vec![b'/'; length])).origin, Origin::Unknown);
        refused(&binary(0x21, family, &vec![b'/'; length - 1]));
    }
}

#[test]
fn invalid_version_2_headers_are_refused() {
    let block = [0; 36];
    assert_eq!(refused(&binary(0x11, 0x11, &block)), "unknown version or command");
    assert_eq!(refused(&binary(0x22, 0x11, &block)), "unknown version or command");
    assert_eq!(refused(&binary(0x21, 0x13, &block)), "unknown address family");
    assert_eq!(refused(&binary(0x21, 0x41, &block)), "unknown address family");
    assert_eq!(refused(&binary(0x21, 0x11, &block[..11])), "the header is too short for its addresses");
    assert_eq!(refused(&binary(0x21, 0x21, &block[..35])), "the header is too short for its addresses");
    // Refused by its length, before the rest arrives.
    let long = binary(0x21, 0x11, &[4; 4097]);
    assert_eq!(refused(&long[..FIXED_SIZE]), "the header is too long");
    refused(&with_tlvs(&[4]));
    refused(&with_tlvs(&[4, 0]));
    refused(&with_tlvs(&[4, 0, 2, 0]));
    assert_eq!(parse(&with_tlvs(&[4, 0, 1, 0])).unwrap().unwrap().tls, None);
}

#[test]
fn tls_of_the_client_is_parsed() {
    let tls = ClientTlsInfo { version: "TLSv1.3", server_name: Some("mail.test"), alpn: true, certificate: true };
    for tls in [tls, ClientTlsInfo { version: "TLSv1.2", server_name: None, alpn: false, certificate: false }] {
        let header = header_v2(address("192.0.2.1:4000"), address("198.51.100.2:993"), Some(&tls));
        let read = parse_complete(&header);
        assert_eq!((read.origin, read.tls), (client("192.0.2.1:4000", "198.51.100.2:993"), Some(tls)));
        // Changing the type of the last TLV is not noticed, because the header then has no checksum.
        for at in (FIXED_SIZE..header.len()).filter(|at| *at != header.len() - 7) {
            let mut wrong = header.clone();
            wrong[at] ^= 0x10;
            assert!(parse(&wrong).is_err() || parse(&wrong).unwrap().unwrap().tls != Some(tls), "changed at {at}");
        }
        let mut wrong = header.clone();
        wrong[FIXED_SIZE] ^= 1;
        assert_eq!(refused(&wrong), "the checksum is wrong");
    }
    // These headers have no name, so the result borrows nothing from them.
    let ssl = |value: &[u8]| {
        let header = with_tlvs(&tlv_bytes(kind::SSL, value));
        parse(&header).map(|header| header.unwrap().tls.map(|tls| ClientTlsInfo { server_name: None, ..tls }))
    };
    let unknown = ClientTlsInfo { version: "unknown", server_name: None, alpn: false, certificate: false };
    assert_eq!(ssl(&[1, 0, 0, 0, 1]), Ok(Some(unknown)));
    // The connection does not use TLS.
    assert_eq!(ssl(&[0, 0, 0, 0, 0]), Ok(None));
    // A certificate that was not verified is ignored.
    assert_eq!(ssl(&[7, 0, 0, 0, 1]), Ok(Some(unknown)));
    assert_eq!(ssl(&[7, 0, 0, 0, 0]), Ok(Some(ClientTlsInfo { certificate: true, ..unknown })));
    assert!(ssl(&[1, 0, 0, 0]).is_err());
    assert!(ssl(&[1, 0, 0, 0, 0, 0x21, 0, 9, b'T']).is_err());
    for name in [&b""[..], b"a\r\nb", b"a b", b"a\0", b"\xff", &[b'x'; 256]] {
        assert_eq!(refused(&with_tlvs(&tlv_bytes(kind::AUTHORITY, name))), "invalid server name");
    }
    let twice = tlv_bytes(kind::AUTHORITY, b"mail.test").repeat(2);
    assert_eq!(refused(&with_tlvs(&twice)), "duplicate TLV");
    assert_eq!(refused(&with_tlvs(&tlv_bytes(kind::CRC32C, &[0; 3]))), "the checksum is wrong");
}

#[test]
fn header_is_detected_on_a_listener_that_expects_none() {
    let line = header_v1(address("192.0.2.7:4000"), address("198.51.100.2:993"));
    let block = header_v2(address("[2001:db8::7]:4000"), address("[2001:db8::1]:993"), None);
    for (header, start) in
        [(&line[..], 11), (b"PROXY TCP6 2001:db8::7", 11), (b"PROXY UNKNOWN\r\n", 13), (&block, 12), (&local_v2(), 12)]
    {
        for length in 0..header.len() {
            let expected = if length >= start { Detection::ProxyHeader } else { Detection::Undecided };
            assert_eq!(detect(&header[..length]), expected, "{length} bytes of {header:?}");
        }
    }
    for other in [&b"PROXY NOOP\r\n"[..], b"PROXY TCP5 ", b"PROXYA", b"\r\n\r\na", b"\x16\x03\x01", b"a1 ID", b"proxy "]
    {
        assert_eq!(detect(other), Detection::Other, "{other:?}");
    }
}
