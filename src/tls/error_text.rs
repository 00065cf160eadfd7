//! Explains TLS errors that arrive as text from the client libraries of directories.

use super::certificate_refusal::VERSION_1;

/// Explanation of a peer that does not speak TLS.
pub(super) const NOT_TLS: &str = "the server does not speak TLS on this port";
/// Explanation of an untrusted issuer.
const UNTRUSTED: &str =
    "the server's certificate was not issued by an authority in `ca` or in the system's root certificates";

/// Parts of the error texts of rustls, and their explanations.
const KNOWN: [(&str, &str); 11] = [
    ("UnknownIssuer", UNTRUSTED),
    ("BadSignature", UNTRUSTED),
    (
        "CaUsedAsEndEntity",
        "the server's certificate is a CA certificate (CA:TRUE): create a server certificate with \
         `-addext basicConstraints=CA:FALSE`, or let an authority issue one",
    ),
    ("UnsupportedCertVersion", VERSION_1),
    ("not valid for name", "the server's certificate is not valid for the host in the URL"),
    ("NotValidForName", "the server's certificate is not valid for the host in the URL"),
    ("expired", "the server's certificate has expired"),
    ("Expired", "the server's certificate has expired"),
    ("NotValidYet", "the server's certificate is not valid yet: check the clock of this machine"),
    ("not valid yet", "the server's certificate is not valid yet: check the clock of this machine"),
    ("InvalidContentType", NOT_TLS),
];

/// Prepends an explanation to `text` if it reports a failed TLS handshake. For `sql` and `redis` routes, whose libraries verify
/// certificates themselves; `http` and `ldap` routes and the policy service use `trust`.
pub fn explain_error(text: String) -> String {
    let is_tls_error = text.contains("peer certificate") || text.contains("corrupt message");
    let known = KNOWN.iter().find(|(part, _)| is_tls_error && text.contains(part));
    known.map_or(text.clone(), |(_, explanation)| format!("{explanation} ({text})"))
}

#[cfg(test)]
mod tests {
    use tokio_rustls::rustls::pki_types::{ServerName, UnixTime};
    use tokio_rustls::rustls::{CertificateError, Error, InvalidMessage, OtherError};

    use super::*;

    /// An error of webpki that has no variant of its own in rustls.
    fn webpki_error(name: &'static str) -> Error {
        #[derive(Debug)]
        struct WebpkiError(&'static str);
        impl std::fmt::Display for WebpkiError {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(self.0)
            }
        }
        impl std::error::Error for WebpkiError {}
        CertificateError::Other(OtherError(std::sync::Arc::new(WebpkiError(name)))).into()
    }

    #[test]
    fn errors_of_rustls_are_explained() {
        let time = UnixTime::now();
        for (error, start) in [
            (Error::from(CertificateError::UnknownIssuer), "the server's certificate was not issued"),
            (CertificateError::BadSignature.into(), "the server's certificate was not issued"),
            (CertificateError::Expired.into(), "the server's certificate has expired"),
            (CertificateError::ExpiredContext { time, not_after: time }.into(), "the server's certificate has expired"),
            (
                CertificateError::NotValidYetContext { time, not_before: time }.into(),
                "the server's certificate is not valid yet",
            ),
            (CertificateError::NotValidForName.into(), "the server's certificate is not valid for the host"),
            (
                CertificateError::NotValidForNameContext {
                    expected: ServerName::try_from("localhost").unwrap(),
                    presented: Vec::new(),
                }
                .into(),
                "the server's certificate is not valid for the host",
            ),
            (InvalidMessage::InvalidContentType.into(), "the server does not speak TLS"),
            (webpki_error("UnsupportedCertVersion"), "the certificate is X.509 version 1"),
            (webpki_error("CaUsedAsEndEntity"), "the server's certificate is a CA certificate (CA:TRUE)"),
        ] {
            let text = format!("error communicating with database: {error}");
            let explained = explain_error(text.clone());
            assert!(explained.starts_with(start) && explained.ends_with(&format!("({text})")), "{explained}");
        }
        let other = "the session has expired";
        assert_eq!(explain_error(other.to_owned()), other);
    }
}
