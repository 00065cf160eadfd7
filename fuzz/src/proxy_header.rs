//! What a balancer says ahead of a connection: cut anywhere, the same header, or none at the first byte that is wrong. Nothing behind
//! it matters. What a header says can be written, and read again.

use vestibule::protocol::proxy_protocol::{Detection, Origin, detect, header_v1, header_v2, parse};

pub fn run(input: &[u8]) {
    let whole = parse(input);
    let header = match whole {
        Ok(None) => {
            assert!(input.len() < 16 + 4096, "a header has an end");
            return cut_short(input);
        }
        Err(error) => {
            // Where it went wrong it stays wrong.
            let first = (0..=input.len()).find(|end| parse(&input[..*end]).is_err()).expect("the whole is wrong");
            assert_eq!(parse(&input[..first]), Err(error));
            return cut_short(&input[..first - 1]);
        }
        Ok(Some(header)) => header,
    };
    let (bytes, _) = input.split_at(header.length);
    assert_eq!(detect(bytes), Detection::ProxyHeader, "also where none is expected");
    assert_eq!(parse(bytes), Ok(Some(header)), "what follows is not looked at");
    cut_short(&bytes[..bytes.len() - 1]);
    if let Some(name) = header.tls.and_then(|tls| tls.server_name) {
        assert!(!name.is_empty() && name.len() <= 255 && !name.contains(char::is_control));
    }
    if let Origin::Client { client, listener } = header.origin {
        let written = header_v2(client, listener, header.tls.as_ref());
        let again = parse(&written).expect("what we write").expect("is whole");
        assert_eq!((again.length, again.tls), (written.len(), header.tls));
        assert_eq!(canonical(again.origin), canonical(header.origin));
        let written = header_v1(client, listener);
        let again = parse(&written).expect("what we write").expect("is whole");
        assert_eq!((again.length, canonical(again.origin)), (written.len(), canonical(header.origin)));
    }
}

/// All that is there belongs to a header that is not complete, however little there is.
fn cut_short(bytes: &[u8]) {
    for end in (0..=bytes.len()).rev().take(300) {
        assert_eq!(parse(&bytes[..end]), Ok(None), "cut at {end}");
    }
}

/// An IPv4 address may come in IPv6 clothes, and goes without.
fn canonical(origin: Origin) -> Option<[(std::net::IpAddr, u16); 2]> {
    let Origin::Client { client, listener } = origin else { return None };
    Some([client, listener].map(|address| (address.ip().to_canonical(), address.port())))
}
