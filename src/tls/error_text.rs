//! Explains TLS errors of client libraries that report them only as text.

use super::certificate_refusal::VERSION_1;

/// Explanation of a peer that does not speak TLS.
pub(super) const NOT_TLS: &str = "the server does not speak TLS on this port";
const UNTRUSTED: &str =
    "the server's certificate was not issued by an authority in `ca` or in the system's root certificates";
const BAD_SIGNATURE: &str = "the server's certificate names an authority in `ca` or in the system's root certificates, but was signed \
     with another key";
const WRONG_NAME: &str = "the server's certificate is not valid for the host in the URL";
const EXPIRED: &str = "the server's certificate has expired";
const NOT_VALID_YET: &str = "the server's certificate is not valid yet: check the clock of this machine";

/// Substrings of rustls error texts, and their explanations. rustls writes the name of a variant, or a sentence if the variant has
/// a context.
const EXPLANATIONS: [(&str, &str); 11] = [
    ("UnknownIssuer", UNTRUSTED),
    ("BadSignature", BAD_SIGNATURE),
    (
        "CaUsedAsEndEntity",
        "the server's certificate is a CA certificate (CA:TRUE): create a server certificate with \
         `-addext basicConstraints=CA:FALSE`, or let an authority issue one",
    ),
    // This text is shared with the certificates of listeners, and so does not mention a server.
    ("UnsupportedCertVersion", VERSION_1),
    ("NotValidForName", WRONG_NAME),
    ("not valid for name", WRONG_NAME),
    ("Expired", EXPIRED),
    ("expired", EXPIRED),
    ("NotValidYet", NOT_VALID_YET),
    ("not valid yet", NOT_VALID_YET),
    ("InvalidContentType", NOT_TLS),
];

/// Prepends an explanation to `text` if it reports a failed TLS handshake. Other texts are returned unchanged.
pub fn explain_error(text: String) -> String {
    if !text.contains("peer certificate") && !text.contains("corrupt message") {
        return text;
    }
    match EXPLANATIONS.iter().find(|(part, _)| text.contains(part)) {
        Some((_, explanation)) => format!("{explanation} ({text})"),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use tokio_rustls::rustls::pki_types::{ServerName, UnixTime};
    use tokio_rustls::rustls::{CertificateError, Error, InvalidMessage, OtherError};

    use super::*;

    /// A webpki error without an equivalent in rustls, wrapped as rustls does it.
    fn unmapped_webpki_error(name: &'static str) -> Error {
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
            (CertificateError::BadSignature.into(), "the server's certificate names an authority"),
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
            (unmapped_webpki_error("UnsupportedCertVersion"), "the certificate is X.509 version 1"),
            (unmapped_webpki_error("CaUsedAsEndEntity"), "the server's certificate is a CA certificate (CA:TRUE)"),
        ] {
            let text = format!("error communicating with database: {error}");
            let explained = explain_error(text.clone());
            assert!(explained.starts_with(start) && explained.ends_with(&format!("({text})")), "{explained}");
        }
        let other = "the session has expired";
        assert_eq!(explain_error(other.to_owned()), other);
    }
}
