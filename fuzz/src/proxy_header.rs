//! PROXY headers. A header is incomplete up to its last byte, or refused at its first invalid byte; bytes after it do not change the
//! result; and its content can be written and parsed again.

use vestibule::protocol::proxy_protocol::{Detection, Origin, detect, header_v1, header_v2, parse};

pub fn run(input: &[u8]) {
    let whole = parse(input);
    let header = match whole {
        Ok(None) => {
            assert!(input.len() < 16 + 4096, "the size of a header is limited");
            return assert_incomplete(input);
        }
        Err(error) => {
            // Once the input is invalid, more bytes do not change the error.
            let first = (0..=input.len()).find(|end| parse(&input[..*end]).is_err()).expect("the input is invalid");
            assert_eq!(parse(&input[..first]), Err(error));
            return assert_incomplete(&input[..first - 1]);
        }
        Ok(Some(header)) => header,
    };
    let (bytes, _) = input.split_at(header.length);
    assert_eq!(detect(bytes), Detection::ProxyHeader, "the header is detected on a listener that expects none");
    assert_eq!(parse(bytes), Ok(Some(header)), "bytes after the header do not change the result");
    assert_incomplete(&bytes[..bytes.len() - 1]);
    if let Some(name) = header.tls.and_then(|tls| tls.server_name) {
        assert!(!name.is_empty() && name.len() <= 255 && !name.contains(char::is_control));
    }
    if let Origin::Client { client, listener } = header.origin {
        let written = header_v2(client, listener, header.tls.as_ref());
        let again = parse(&written).expect("a valid header").expect("a complete header");
        assert_eq!((again.length, again.tls), (written.len(), header.tls));
        assert_eq!(canonical(again.origin), canonical(header.origin));
        let written = header_v1(client, listener);
        let again = parse(&written).expect("a valid header").expect("a complete header");
        assert_eq!((again.length, canonical(again.origin)), (written.len(), canonical(header.origin)));
    }
}

/// Checks that every beginning of `bytes` is an incomplete header.
fn assert_incomplete(bytes: &[u8]) {
    for end in (0..=bytes.len()).rev().take(300) {
        assert_eq!(parse(&bytes[..end]), Ok(None), "cut at {end}");
    }
}

/// Returns the addresses with IPv4-mapped addresses as IPv4, which is how they are written.
fn canonical(origin: Origin) -> Option<[(std::net::IpAddr, u16); 2]> {
    let Origin::Client { client, listener } = origin else { return None };
    Some([client, listener].map(|address| (address.ip().to_canonical(), address.port())))
}
