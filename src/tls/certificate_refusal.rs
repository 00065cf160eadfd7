//! Explains to the operator why a certificate was refused, and prints the pin that would make it trusted.
//!
//! Texts from the peer's certificate are untrusted, so they are escaped and truncated.

use std::time::{Duration, UNIX_EPOCH};

use aws_lc_rs::digest::{SHA256, digest};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use tokio_rustls::rustls::pki_types::ServerName;
use tokio_rustls::rustls::{CertificateError, Error};
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer as _, X509Certificate, X509Version};

/// Maximum number of certificate names in an explanation.
const MAX_NAMES: usize = 5;
/// Maximum number of characters of each name.
const MAX_NAME_LENGTH: usize = 80;

/// The peer that presented the certificate, and how it was verified.
#[derive(Debug, Clone, Copy)]
pub(super) enum Peer<'a> {
    /// A server, verified for this name.
    Server(&'a ServerName<'a>),
    /// A server that is trusted by its pin or without verification, but whose handshake signature is invalid.
    PinnedServer,
    Client,
}

/// Explanation of an X.509 version 1 certificate. Also used for the certificates of listeners.
pub(super) const VERSION_1: &str = "the certificate is X.509 version 1, which TLS libraries refuse: create a version 3 certificate, \
     for example with `openssl req -x509` and -addext \"subjectAltName=DNS:mail.example.org\", or with \
     `openssl x509 -req` and -extfile";

pub(super) fn is_version_1(certificate: &X509Certificate<'_>) -> bool {
    certificate.version() == X509Version::V1
}

/// Explains `error`, with which `certificate` was refused at `now` (seconds since 1970).
pub(super) fn explain(error: &Error, certificate: &[u8], peer: Peer<'_>, now: u64) -> String {
    let Ok((_, parsed)) = X509Certificate::from_der(certificate) else {
        return format!("the certificate cannot be parsed: {error}");
    };
    if is_version_1(&parsed) {
        // No pin is printed, because the signatures of such a certificate cannot be verified either.
        return VERSION_1.to_owned();
    }
    let Error::InvalidCertificate(refusal) = error else { return error.to_string() };
    let reason = reason(refusal, &parsed, peer, now).unwrap_or_else(|| error.to_string());
    match peer {
        Peer::Server(_) => {
            format!("{reason}; if you have verified that this is the server's key, trust it with {}", pin(&parsed))
        }
        Peer::PinnedServer | Peer::Client => reason,
    }
}

fn reason(refusal: &CertificateError, parsed: &X509Certificate<'_>, peer: Peer<'_>, now: u64) -> Option<String> {
    let is_self_signed = parsed.subject().as_raw() == parsed.issuer().as_raw();
    let validity = parsed.validity();
    // rustls checks for CA:TRUE, which plain `openssl req -x509` sets, before it checks the issuer.
    let is_untrusted = match refusal {
        CertificateError::UnknownIssuer | CertificateError::BadSignature => true,
        CertificateError::Other(_) => parsed.is_ca(),
        _ => false,
    };
    if is_self_signed && is_untrusted {
        return Some(match peer {
            Peer::Client => "the certificate is self-signed and not listed in client_certificates.ca".to_owned(),
            _ => "the certificate is self-signed and not trusted: to trust it, set tls.ca to its file".to_owned(),
        });
    }
    Some(match refusal {
        CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
            let (end, age) = (validity.not_after.timestamp(), age(now, validity.not_after.timestamp()));
            // The expired certificate may be an intermediate one.
            if i64::try_from(now).is_ok_and(|now| now <= end) {
                "a certificate in its chain has expired".to_owned()
            } else {
                format!("the certificate expired on {}, {age} ago", date(end))
            }
        }
        CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => format!(
            "the certificate is not valid before {}: check the clock of this machine",
            date(validity.not_before.timestamp())
        ),
        CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
            let Peer::Server(expected) = peer else { return None };
            wrong_name(parsed, &expected.to_str())
        }
        CertificateError::UnknownIssuer => format!(
            "the certificate was issued by {}, which is not trusted, or intermediate certificates are missing",
            escaped(&parsed.issuer().to_string())
        ),
        CertificateError::BadSignature => {
            "the signature of the certificate, or of one in its chain, is invalid".to_owned()
        }
        CertificateError::InvalidPurpose | CertificateError::InvalidPurposeContext { .. } => {
            let purpose = if matches!(peer, Peer::Client) { "clients" } else { "servers" };
            format!("the extended key usage of the certificate does not allow TLS {purpose}")
        }
        CertificateError::ApplicationVerificationFailure => {
            "the server's key matches none of the configured pins".to_owned()
        }
        CertificateError::Other(_) if parsed.is_ca() => {
            "the certificate is a CA certificate (CA:TRUE) and not listed in the trusted file".to_owned()
        }
        _ => return None,
    })
}

fn wrong_name(parsed: &X509Certificate<'_>, expected: &str) -> String {
    match names(parsed) {
        Some(names) => format!(
            "the certificate is valid for {names}, not for {expected}: set tls.server_name to a name in the certificate"
        ),
        None => format!("the certificate is not valid for {expected}: it contains no name{}", common_name(parsed)),
    }
}

/// The pin of the certificate's key in the form of `tls.pin`.
fn pin(certificate: &X509Certificate<'_>) -> String {
    format!("pin: \"sha256:{}\"", STANDARD.encode(digest(&SHA256, certificate.public_key().raw)))
}

/// The host names and addresses in the certificate; `None` if there are none.
fn names(certificate: &X509Certificate<'_>) -> Option<String> {
    let alternatives = certificate.subject_alternative_name().ok().flatten();
    let alternatives = alternatives.iter().flat_map(|names| &names.value.general_names);
    let names: Vec<String> = alternatives
        .filter_map(|name| match name {
            GeneralName::DNSName(name) => Some(escaped(name)),
            GeneralName::IPAddress(bytes) => address(bytes),
            _ => None,
        })
        .collect();
    if names.is_empty() {
        return None;
    }
    let more = names.len().saturating_sub(MAX_NAMES);
    let list = names.into_iter().take(MAX_NAMES).collect::<Vec<_>>().join(", ");
    Some(if more == 0 { list } else { format!("{list} and {more} more") })
}

fn common_name(certificate: &X509Certificate<'_>) -> String {
    let name = certificate.subject().iter_common_name().next().and_then(|name| name.as_str().ok());
    name.map_or_else(String::new, |name| format!(" (its common name {} is ignored)", escaped(name)))
}

fn address(bytes: &[u8]) -> Option<String> {
    let v4 = <[u8; 4]>::try_from(bytes).map(|bytes| std::net::IpAddr::from(bytes).to_string());
    v4.or_else(|_| <[u8; 16]>::try_from(bytes).map(|bytes| std::net::IpAddr::from(bytes).to_string())).ok()
}

fn escaped(text: &str) -> String {
    text.chars().take(MAX_NAME_LENGTH).flat_map(char::escape_debug).collect()
}

/// Date and time in UTC.
fn date(seconds: i64) -> String {
    let duration = Duration::from_secs(u64::try_from(seconds).unwrap_or_default());
    match UNIX_EPOCH.checked_add(duration) {
        // humantime supports years of four digits.
        Some(time) if duration.as_secs() < 253_402_300_800 => humantime::format_rfc3339_seconds(time).to_string(),
        _ => "a date beyond the year 9999".to_owned(),
    }
}

fn age(now: u64, end: i64) -> String {
    let passed = now.saturating_sub(u64::try_from(end).unwrap_or_default());
    match passed / 86_400 {
        0 => humantime::format_duration(Duration::from_secs(passed)).to_string(),
        1 => "1 day".to_owned(),
        days => format!("{days} days"),
    }
}
