//! Explanations of TLS errors that reach us as text, from the libraries that speak to directories.

use super::certificate_refusal::VERSION_1;

/// Explains that a peer does not speak TLS.
pub(super) const NOT_TLS: &str = "the server does not speak TLS on this port";
/// Explains an issuer that is not trusted.
const UNTRUSTED: &str = "the server's certificate was not issued by an authority that `ca` or the system trusts";

/// What rustls writes, and what it means to the operator of a directory.
const KNOWN: [(&str, &str); 11] = [
    ("UnknownIssuer", UNTRUSTED),
    ("BadSignature", UNTRUSTED),
    (
        "CaUsedAsEndEntity",
        "the server's certificate is that of an authority (CA:TRUE), not of a server: make one with \
         `-addext basicConstraints=CA:FALSE`, or have it issued by an authority",
    ),
    ("UnsupportedCertVersion", VERSION_1),
    ("not valid for name", "the server's certificate does not name the host in the URL"),
    ("NotValidForName", "the server's certificate does not name the host in the URL"),
    ("expired", "the server's certificate has expired"),
    ("Expired", "the server's certificate has expired"),
    ("NotValidYet", "the server's certificate is not valid yet: is the clock of this machine right?"),
    ("not valid yet", "the server's certificate is not valid yet: is the clock of this machine right?"),
    ("InvalidContentType", NOT_TLS),
];

/// `text` with an explanation in front, if it reports a failed handshake. For the libraries of `sql` and `redis` routes, which
/// verify certificates on their own; `http`, `ldap` and the policy service use `trust`.
pub fn explain_error(text: String) -> String {
    let is_of_tls = text.contains("peer certificate") || text.contains("corrupt message");
    let known = KNOWN.iter().find(|(part, _)| is_of_tls && text.contains(part));
    known.map_or(text.clone(), |(_, explanation)| format!("{explanation} ({text})"))
}

#[cfg(test)]
mod tests {
    use tokio_rustls::rustls::pki_types::{ServerName, UnixTime};
    use tokio_rustls::rustls::{CertificateError, Error, InvalidMessage, OtherError};

    use super::*;

    /// As rustls wraps errors of webpki that it has no kind for.
    fn of_webpki(name: &'static str) -> Error {
        #[derive(Debug)]
        struct Named(&'static str);
        impl std::fmt::Display for Named {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(self.0)
            }
        }
        impl std::error::Error for Named {}
        CertificateError::Other(OtherError(std::sync::Arc::new(Named(name)))).into()
    }

    #[test]
    fn what_rustls_writes_is_known() {
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
            (CertificateError::NotValidForName.into(), "the server's certificate does not name"),
            (
                CertificateError::NotValidForNameContext {
                    expected: ServerName::try_from("localhost").unwrap(),
                    presented: Vec::new(),
                }
                .into(),
                "the server's certificate does not name",
            ),
            (InvalidMessage::InvalidContentType.into(), "the server does not speak TLS"),
            (of_webpki("UnsupportedCertVersion"), "the certificate is X.509 version 1"),
            (of_webpki("CaUsedAsEndEntity"), "the server's certificate is that of an authority (CA:TRUE)"),
        ] {
            let text = format!("error communicating with database: {error}");
            let explained = explain_error(text.clone());
            assert!(explained.starts_with(start) && explained.ends_with(&format!("({text})")), "{explained}");
        }
        let other = "the session has expired";
        assert_eq!(explain_error(other.to_owned()), other);
    }
}
