//! Whether a file is an OCSP response (RFC 6960) that may be shown along with a certificate.
//!
//! Looks at what an operator can get wrong: another format, an answer that is an error, about another certificate, or
//! out of date. Who signed it is for clients to check, who know the issuer; a response that they do not believe is no
//! worse for them than none. Called by `certificates`.

use x509_parser::asn1_rs::{Any, Class, FromDer as _, Tag};
use x509_parser::prelude::ASN1Time;

/// A larger one would cost every handshake dearly.
const MOST: usize = 64 * 1024;
/// id-pkix-ocsp-basic, 1.3.6.1.5.5.7.48.1.1.
const BASIC: &[u8] = &[0x2b, 6, 1, 5, 5, 7, 48, 1, 1];

/// A response, and what it says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Response {
    pub(super) der: Vec<u8>,
    /// Of the certificate it is about, as in the certificate.
    serial: Vec<u8>,
    /// 0: good, 1: revoked, 2: unknown to its issuer.
    status: u32,
    /// When the next one is due, in seconds since 1970.
    until: Option<i64>,
}

impl Response {
    /// Takes a file's content apart.
    ///
    /// # Errors
    /// It is no response, or one that says nothing.
    pub(super) fn read(der: Vec<u8>) -> Result<Self, String> {
        if der.len() > MOST {
            return Err(format!("is over {MOST} bytes: not an OCSP response"));
        }
        if der.starts_with(b"-----BEGIN") {
            return Err("is PEM, an OCSP response is wanted in DER".to_owned());
        }
        let Single { serial, status, until } = parse(&der)?;
        Ok(Self { serial: serial.to_vec(), status, until, der })
    }

    /// Why it may not be shown with the certificate of this serial number at this time.
    pub(super) fn unfit(&self, serial: &[u8], now: i64) -> Option<&'static str> {
        if self.serial != serial {
            return Some("is about another certificate");
        }
        match self.status {
            0 => {}
            1 => return Some("says that the certificate was revoked"),
            _ => return Some("says that its issuer does not know the certificate"),
        }
        self.is_over(now).then_some("is out of date: its nextUpdate has passed")
    }

    /// Whether the next one is overdue.
    pub(super) fn is_over(&self, now: i64) -> bool {
        self.until.is_some_and(|until| until <= now)
    }
}

fn parse(der: &[u8]) -> Result<Single<'_>, String> {
    let none = || "is not an OCSP response in DER".to_owned();
    let mut outer = Der(der);
    let mut response = outer.sequence().filter(|_| outer.0.is_empty()).ok_or_else(none)?;
    let status = response.universal(Tag::Enumerated).ok_or_else(none)?;
    match status {
        [0] => {}
        [1] => return Err("is an answer of the error malformedRequest, not of success".to_owned()),
        [2] => return Err("is an answer of the error internalError, not of success".to_owned()),
        [3] => return Err("is an answer of the error tryLater, not of success".to_owned()),
        [5] => return Err("is an answer of the error sigRequired, not of success".to_owned()),
        [6] => return Err("is an answer of the error unauthorized, not of success".to_owned()),
        _ => return Err("is an answer of an unknown status, not of success".to_owned()),
    }
    let (kind, basic) = response.body().ok_or_else(none)?;
    if kind != BASIC {
        return Err("is an OCSP response of another kind than the basic one".to_owned());
    }
    Single::first(basic).ok_or_else(none)
}

/// What is said of the first certificate in a response; there is one, but in curious ones.
struct Single<'a> {
    serial: &'a [u8],
    status: u32,
    until: Option<i64>,
}

impl<'a> Single<'a> {
    /// Of a BasicOCSPResponse.
    fn first(basic: &'a [u8]) -> Option<Self> {
        let mut data = Der(basic).sequence()?.sequence()?;
        // The version, which has a default, the responder, by name or by key, and producedAt.
        let mut tag = data.any()?;
        if tag.header.class() == Class::ContextSpecific && tag.header.tag().0 == 0 {
            tag = data.any()?;
        }
        if tag.header.class() != Class::ContextSpecific {
            return None;
        }
        data.universal(Tag::GeneralizedTime)?;
        let mut single = data.sequence()?.sequence()?;
        let mut certificate = single.sequence()?;
        certificate.sequence()?;
        certificate.universal(Tag::OctetString)?;
        certificate.universal(Tag::OctetString)?;
        let serial = certificate.universal(Tag::Integer)?;
        let status = single.any()?.header.tag().0;
        single.universal(Tag::GeneralizedTime)?;
        let until = match single.any() {
            Some(next) if next.header.class() == Class::ContextSpecific && next.header.tag().0 == 0 => {
                Some(ASN1Time::from_der(next.data).ok()?.1.timestamp())
            }
            _ => None,
        };
        Some(Self { serial, status, until })
    }
}

/// What is left of some DER.
struct Der<'a>(&'a [u8]);

impl<'a> Der<'a> {
    /// The next element.
    fn any(&mut self) -> Option<Any<'a>> {
        let (rest, any) = Any::from_der(self.0).ok()?;
        self.0 = rest;
        Some(any)
    }

    /// The content of the next element, if it is this one.
    fn universal(&mut self, tag: Tag) -> Option<&'a [u8]> {
        let any = self.any()?;
        (any.header.class() == Class::Universal && any.header.tag() == tag).then_some(any.data)
    }

    fn sequence(&mut self) -> Option<Self> {
        self.universal(Tag::Sequence).map(Der)
    }

    /// ResponseBytes: its type, and what is in it.
    fn body(&mut self) -> Option<(&'a [u8], &'a [u8])> {
        let explicit = self.any().filter(|any| any.header.class() == Class::ContextSpecific)?;
        let mut bytes = Der(explicit.data).sequence()?;
        Some((bytes.universal(Tag::Oid)?, bytes.universal(Tag::OctetString)?))
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// An element of DER.
    fn element(tag: u8, content: &[&[u8]]) -> Vec<u8> {
        let content = content.concat();
        let mut der = vec![tag];
        match u8::try_from(content.len()) {
            Ok(short) if short < 128 => der.push(short),
            _ => der.extend([0x82, (content.len() >> 8) as u8, content.len() as u8]),
        }
        der.extend(content);
        der
    }

    /// A response as issuers make them, unsigned. `certificate_status` is 0, 1 or 2.
    pub(in crate::tls) fn response(serial: &[u8], certificate_status: u8, until: Option<&str>) -> Vec<u8> {
        let time = |text: &str| element(0x18, &[text.as_bytes()]);
        let algorithm = element(0x30, &[&element(0x06, &[&[0x2b, 14, 3, 2, 26]]), &[5, 0]]);
        let hash = element(0x04, &[&[7; 20]]);
        let id = element(0x30, &[&algorithm, &hash, &hash, &element(0x02, &[serial])]);
        let status = match certificate_status {
            1 => element(0xa1, &[&time("20260101000000Z")]),
            other => vec![0x80 | other, 0],
        };
        let next = until.map(|text| element(0xa0, &[&time(text)])).unwrap_or_default();
        let single = element(0x30, &[&id, &status, &time("20260101000000Z"), &next]);
        let responder = element(0xa2, &[&hash]);
        let data = element(0x30, &[&responder, &time("20260101000000Z"), &element(0x30, &[&single])]);
        let basic = element(0x30, &[&data, &algorithm, &element(0x03, &[&[0; 72]])]);
        let bytes = element(0x30, &[&element(0x06, &[BASIC]), &element(0x04, &[&basic])]);
        element(0x30, &[&[0x0a, 1, 0], &element(0xa0, &[&bytes])])
    }

    #[test]
    fn what_it_is_about_and_until_when() {
        let found = Response::read(response(&[1, 2, 3], 0, Some("20300101000000Z"))).unwrap();
        assert_eq!((&*found.serial, found.until), ([1, 2, 3].as_slice(), Some(1_893_456_000)));
        assert_eq!(found.unfit(&[1, 2, 3], 1_893_455_999), None);
        assert!(found.unfit(&[1, 2, 3], 1_893_456_000).unwrap().contains("out of date"));
        assert!(found.unfit(&[1, 2], 0).unwrap().contains("another certificate"));
        let endless = Response::read(response(&[1], 0, None)).unwrap();
        assert_eq!(endless.unfit(&[1], i64::MAX), None);
        for (status, says) in [(1, "revoked"), (2, "does not know")] {
            assert!(Response::read(response(&[1], status, None)).unwrap().unfit(&[1], 0).unwrap().contains(says));
        }
    }

    #[test]
    fn what_is_no_good_response_is_told() {
        let said = |der: &[u8]| Response::read(der.to_vec()).unwrap_err();
        assert!(said(b"").contains("not an OCSP response"));
        assert!(said(b"-----BEGIN OCSP RESPONSE-----").contains("PEM"));
        assert!(said(&vec![0; MOST + 1]).contains("65536"));
        // An error has no body.
        for (status, name) in [(1, "malformedRequest"), (3, "tryLater"), (6, "unauthorized"), (9, "unknown status")] {
            assert!(said(&[0x30, 3, 0x0a, 1, status]).contains(name), "{name}");
        }
        let good = response(&[1], 0, Some("20300101000000Z"));
        for length in 0..good.len() {
            said(&good[..length]);
        }
        said(&[good.as_slice(), b"\n"].concat());
    }
}
