//! Parses an OCSP response (RFC 6960), and checks whether it may be stapled to a certificate.
//!
//! The checks find mistakes of operators: another format, an error response, a response for another certificate, or an expired one. The
//! signature is not verified. Clients verify it, because they know the issuer, and treat an invalid response like a missing one.

use x509_parser::asn1_rs::{Any, Class, FromDer as _, Tag};
use x509_parser::prelude::ASN1Time;

/// Maximum size of a response. It is sent in every full handshake.
const MAX_RESPONSE: usize = 64 * 1024;
/// Object identifier id-pkix-ocsp-basic (1.3.6.1.5.5.7.48.1.1).
const BASIC: &[u8] = &[0x2b, 6, 1, 5, 5, 7, 48, 1, 1];

/// A response, and the fields of its first entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Response {
    pub(super) der: Vec<u8>,
    /// Serial number of the certificate, encoded as in the certificate.
    serial: Vec<u8>,
    status: CertificateStatus,
    /// In seconds since 1970.
    next_update: Option<i64>,
}

impl Response {
    /// Parses the content of a file.
    ///
    /// # Errors
    /// The content is not a successful OCSP response.
    pub(super) fn read(der: Vec<u8>) -> Result<Self, String> {
        if der.len() > MAX_RESPONSE {
            return Err(format!("is larger than {MAX_RESPONSE} bytes: not an OCSP response"));
        }
        if der.starts_with(b"-----BEGIN") {
            return Err("is PEM: expected an OCSP response in DER".to_owned());
        }
        let SingleResponse { serial, status, next_update } = parse(&der)?;
        Ok(Self { serial: serial.to_vec(), status, next_update, der })
    }

    /// The reason why the response may not be stapled to the certificate with this serial number at `now`.
    pub(super) fn rejection(&self, serial: &[u8], now: i64) -> Option<&'static str> {
        if self.serial != serial {
            return Some("is for another certificate");
        }
        match self.status {
            CertificateStatus::Good => {}
            CertificateStatus::Revoked => return Some("states that the certificate was revoked"),
            CertificateStatus::Unknown => return Some("states that the certificate is unknown to its issuer"),
        }
        self.is_expired(now).then_some("has expired: its nextUpdate has passed")
    }

    pub(super) fn is_expired(&self, now: i64) -> bool {
        self.next_update.is_some_and(|next_update| next_update <= now)
    }
}

fn parse(der: &[u8]) -> Result<SingleResponse<'_>, String> {
    let invalid = || "is not an OCSP response in DER".to_owned();
    let mut outer = Der(der);
    let mut response = outer.sequence().filter(|_| outer.0.is_empty()).ok_or_else(invalid)?;
    let status = response.universal(Tag::Enumerated).ok_or_else(invalid)?;
    match status {
        [0] => {}
        [1] => return Err("is an error response (malformedRequest)".to_owned()),
        [2] => return Err("is an error response (internalError)".to_owned()),
        [3] => return Err("is an error response (tryLater)".to_owned()),
        [5] => return Err("is an error response (sigRequired)".to_owned()),
        [6] => return Err("is an error response (unauthorized)".to_owned()),
        _ => return Err("is an error response (unknown status)".to_owned()),
    }
    let (kind, basic) = response.body().ok_or_else(invalid)?;
    if kind != BASIC {
        return Err("is not a basic OCSP response".to_owned());
    }
    SingleResponse::first(basic).ok_or_else(invalid)
}

/// The status of a certificate (CertStatus in RFC 6960).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum CertificateStatus {
    Good,
    Revoked,
    Unknown,
}

/// The first entry of a response. Responses with several entries are rare.
struct SingleResponse<'a> {
    serial: &'a [u8],
    status: CertificateStatus,
    next_update: Option<i64>,
}

impl<'a> SingleResponse<'a> {
    /// Parses the first entry of a BasicOCSPResponse.
    fn first(basic: &'a [u8]) -> Option<Self> {
        let mut data = Der(basic).sequence()?.sequence()?;
        // The optional version, the responder (by name or by key), and producedAt.
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
        let status = match single.any()?.header.tag().0 {
            0 => CertificateStatus::Good,
            1 => CertificateStatus::Revoked,
            _ => CertificateStatus::Unknown,
        };
        single.universal(Tag::GeneralizedTime)?;
        let next_update = match single.any() {
            Some(next) if next.header.class() == Class::ContextSpecific && next.header.tag().0 == 0 => {
                Some(ASN1Time::from_der(next.data).ok()?.1.timestamp())
            }
            _ => None,
        };
        Some(Self { serial, status, next_update })
    }
}

/// A reader of DER elements.
struct Der<'a>(&'a [u8]);

impl<'a> Der<'a> {
    /// Reads the next element.
    fn any(&mut self) -> Option<Any<'a>> {
        let (rest, any) = Any::from_der(self.0).ok()?;
        self.0 = rest;
        Some(any)
    }

    /// Reads the next element, and returns its content if it has this tag.
    fn universal(&mut self, tag: Tag) -> Option<&'a [u8]> {
        let any = self.any()?;
        (any.header.class() == Class::Universal && any.header.tag() == tag).then_some(any.data)
    }

    fn sequence(&mut self) -> Option<Self> {
        self.universal(Tag::Sequence).map(Der)
    }

    /// Reads ResponseBytes, and returns its type and content.
    fn body(&mut self) -> Option<(&'a [u8], &'a [u8])> {
        let explicit = self.any().filter(|any| any.header.class() == Class::ContextSpecific)?;
        let mut bytes = Der(explicit.data).sequence()?;
        Some((bytes.universal(Tag::Oid)?, bytes.universal(Tag::OctetString)?))
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Encodes an element in DER.
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

    /// A response as issuers create them, without a valid signature. `certificate_status` is 0, 1 or 2.
    pub(in crate::tls) fn response(serial: &[u8], certificate_status: u8, next_update: Option<&str>) -> Vec<u8> {
        let time = |text: &str| element(0x18, &[text.as_bytes()]);
        let algorithm = element(0x30, &[&element(0x06, &[&[0x2b, 14, 3, 2, 26]]), &[5, 0]]);
        let hash = element(0x04, &[&[7; 20]]);
        let id = element(0x30, &[&algorithm, &hash, &hash, &element(0x02, &[serial])]);
        let status = match certificate_status {
            1 => element(0xa1, &[&time("20260101000000Z")]),
            other => vec![0x80 | other, 0],
        };
        let next = next_update.map(|text| element(0xa0, &[&time(text)])).unwrap_or_default();
        let single = element(0x30, &[&id, &status, &time("20260101000000Z"), &next]);
        let responder = element(0xa2, &[&hash]);
        let data = element(0x30, &[&responder, &time("20260101000000Z"), &element(0x30, &[&single])]);
        let basic = element(0x30, &[&data, &algorithm, &element(0x03, &[&[0; 72]])]);
        let bytes = element(0x30, &[&element(0x06, &[BASIC]), &element(0x04, &[&basic])]);
        element(0x30, &[&[0x0a, 1, 0], &element(0xa0, &[&bytes])])
    }

    #[test]
    fn response_is_rejected_for_another_certificate_and_after_its_next_update() {
        let found = Response::read(response(&[1, 2, 3], 0, Some("20300101000000Z"))).unwrap();
        assert_eq!((&*found.serial, found.next_update), ([1, 2, 3].as_slice(), Some(1_893_456_000)));
        assert_eq!(found.rejection(&[1, 2, 3], 1_893_455_999), None);
        assert!(found.rejection(&[1, 2, 3], 1_893_456_000).unwrap().contains("has expired"));
        assert!(found.rejection(&[1, 2], 0).unwrap().contains("another certificate"));
        let endless = Response::read(response(&[1], 0, None)).unwrap();
        assert_eq!(endless.rejection(&[1], i64::MAX), None);
        for (status, expected) in [(1, "revoked"), (2, "unknown to its issuer")] {
            assert!(
                Response::read(response(&[1], status, None)).unwrap().rejection(&[1], 0).unwrap().contains(expected)
            );
        }
    }

    #[test]
    fn invalid_response_is_rejected_with_a_reason() {
        let error = |der: &[u8]| Response::read(der.to_vec()).unwrap_err();
        assert!(error(b"").contains("not an OCSP response"));
        assert!(error(b"-----BEGIN OCSP RESPONSE-----").contains("PEM"));
        assert!(error(&vec![0; MAX_RESPONSE + 1]).contains("65536"));
        // An error response has no body.
        for (status, name) in [(1, "malformedRequest"), (3, "tryLater"), (6, "unauthorized"), (9, "unknown status")] {
            assert!(error(&[0x30, 3, 0x0a, 1, status]).contains(name), "{name}");
        }
        let good = response(&[1], 0, Some("20300101000000Z"));
        for length in 0..good.len() {
            error(&good[..length]);
        }
        error(&[good.as_slice(), b"\n"].concat());
    }
}
