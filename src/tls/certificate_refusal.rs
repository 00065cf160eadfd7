//! Why a certificate was refused, in an operator's words, with the pin that would make it trusted.
//!
//! Texts in a peer's certificate are untrusted: they are escaped and bounded.

use std::time::{Duration, UNIX_EPOCH};

use aws_lc_rs::digest::{SHA256, digest};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use tokio_rustls::rustls::pki_types::ServerName;
use tokio_rustls::rustls::{CertificateError, Error};
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer as _, X509Certificate, X509Version};

/// Names of a certificate that are shown.
const MAX_NAMES: usize = 5;
/// Characters of each.
const MAX_NAME: usize = 80;

/// Whose certificate was refused.
#[derive(Debug, Clone, Copy)]
pub(super) enum Role<'a> {
    /// A server's, which was to be for this name.
    Server(&'a ServerName<'a>),
    /// A server's that is trusted by its pin or without verification, and whose signature of the handshake was refused.
    PinnedServer,
    /// A client's.
    Client,
}

/// Explains version 1, for certificates of our own too.
pub(super) const VERSION_1: &str = "the certificate is X.509 version 1, which TLS libraries refuse: make one of version 3, \
     for example with `openssl req -x509` and -addext \"subjectAltName=DNS:mail.example.org\", or with \
     `openssl x509 -req` and -extfile";

/// Whether a certificate is X.509 version 1.
pub(super) fn is_version_1(certificate: &X509Certificate<'_>) -> bool {
    certificate.version() == X509Version::V1
}

/// Why `certificate` was refused with `error`, at `now` (seconds since 1970).
pub(super) fn in_words(error: &Error, certificate: &[u8], role: Role<'_>, now: u64) -> String {
    let Ok((_, parsed)) = X509Certificate::from_der(certificate) else {
        return format!("the certificate cannot be read: {error}");
    };
    if is_version_1(&parsed) {
        // A pin does not help: its signatures cannot be checked either.
        return VERSION_1.to_owned();
    }
    let Error::InvalidCertificate(refusal) = error else { return error.to_string() };
    let reason = reason(refusal, &parsed, role, now).unwrap_or_else(|| error.to_string());
    match role {
        Role::Server(_) => {
            format!("{reason}; to trust this very key, once you know it is the server's: {}", pin(&parsed))
        }
        Role::PinnedServer | Role::Client => reason,
    }
}

fn reason(refusal: &CertificateError, parsed: &X509Certificate<'_>, role: Role<'_>, now: u64) -> Option<String> {
    let is_self_signed = parsed.subject().as_raw() == parsed.issuer().as_raw();
    let validity = parsed.validity();
    // rustls looks at CA:TRUE first, which plain `openssl req -x509` sets.
    let is_untrusted = match refusal {
        CertificateError::UnknownIssuer | CertificateError::BadSignature => true,
        CertificateError::Other(_) => parsed.is_ca(),
        _ => false,
    };
    if is_self_signed && is_untrusted {
        return Some(match role {
            Role::Client => "the certificate is self-signed and not itself in client_certificates.ca".to_owned(),
            _ => "the certificate is self-signed and not trusted: name its file as tls.ca".to_owned(),
        });
    }
    Some(match refusal {
        CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
            let (end, age) = (validity.not_after.timestamp(), days(now, validity.not_after.timestamp()));
            // The one that has expired may be an intermediate.
            if i64::try_from(now).is_ok_and(|now| now <= end) {
                "a certificate of its chain has expired".to_owned()
            } else {
                format!("the certificate expired on {}, {age} ago", date(end))
            }
        }
        CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => format!(
            "the certificate is not valid before {}: is the clock of this machine right?",
            date(validity.not_before.timestamp())
        ),
        CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
            let Role::Server(asked) = role else { return None };
            format!(
                "the certificate is for {}, and {} was asked for: set tls.server_name to a name in the certificate",
                names(parsed),
                asked.to_str()
            )
        }
        CertificateError::UnknownIssuer => format!(
            "the certificate was issued by {}, which is not trusted, or intermediate certificates are missing",
            shown(&parsed.issuer().to_string())
        ),
        CertificateError::BadSignature => "the certificate, or one of its chain, is signed with another key".to_owned(),
        CertificateError::InvalidPurpose | CertificateError::InvalidPurposeContext { .. } => {
            let purpose = if matches!(role, Role::Client) { "clients" } else { "servers" };
            format!("the certificate is not meant for TLS {purpose} (its extended key usage)")
        }
        CertificateError::ApplicationVerificationFailure => {
            "the server's key is none of the configured pins".to_owned()
        }
        CertificateError::Other(_) if parsed.is_ca() => {
            "the certificate is that of an authority (CA:TRUE) and not itself in the trusted file".to_owned()
        }
        _ => return None,
    })
}

/// As `tls.pin` takes it.
fn pin(certificate: &X509Certificate<'_>) -> String {
    format!("pin: \"sha256:{}\"", STANDARD.encode(digest(&SHA256, certificate.public_key().raw)))
}

/// The names that a certificate is for.
fn names(certificate: &X509Certificate<'_>) -> String {
    let alternatives = certificate.subject_alternative_name().ok().flatten();
    let alternatives = alternatives.iter().flat_map(|names| &names.value.general_names);
    let names: Vec<String> = alternatives
        .filter_map(|name| match name {
            GeneralName::DNSName(name) => Some(shown(name)),
            GeneralName::IPAddress(bytes) => address(bytes),
            _ => None,
        })
        .collect();
    if names.is_empty() {
        let common = certificate.subject().iter_common_name().next().and_then(|name| name.as_str().ok());
        let common =
            common.map_or_else(String::new, |name| format!(" (its common name {} does not count)", shown(name)));
        return format!("no name{common}");
    }
    let more = names.len().saturating_sub(MAX_NAMES);
    let list = names.into_iter().take(MAX_NAMES).collect::<Vec<_>>().join(", ");
    if more == 0 { list } else { format!("{list} and {more} more") }
}

fn address(bytes: &[u8]) -> Option<String> {
    let v4 = <[u8; 4]>::try_from(bytes).map(|bytes| std::net::IpAddr::from(bytes).to_string());
    v4.or_else(|_| <[u8; 16]>::try_from(bytes).map(|bytes| std::net::IpAddr::from(bytes).to_string())).ok()
}

/// A text of a certificate, escaped and bounded.
fn shown(text: &str) -> String {
    text.chars().take(MAX_NAME).flat_map(char::escape_debug).collect()
}

/// A date and a time of day, UTC.
fn date(seconds: i64) -> String {
    let since = Duration::from_secs(u64::try_from(seconds).unwrap_or_default());
    match UNIX_EPOCH.checked_add(since) {
        // humantime writes years of four digits.
        Some(time) if since.as_secs() < 253_402_300_800 => humantime::format_rfc3339_seconds(time).to_string(),
        _ => "a date beyond the year 9999".to_owned(),
    }
}

fn days(now: u64, then: i64) -> String {
    let passed = now.saturating_sub(u64::try_from(then).unwrap_or_default());
    match passed / 86_400 {
        0 => humantime::format_duration(Duration::from_secs(passed)).to_string(),
        1 => "1 day".to_owned(),
        days => format!("{days} days"),
    }
}
