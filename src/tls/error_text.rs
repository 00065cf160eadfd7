//! Explanations of TLS errors that reach us as text, from the libraries that speak to directories.

/// What rustls writes, and what it means to the operator of a directory.
const KNOWN: [(&str, &str); 10] = [
    ("UnknownIssuer", "the server's certificate was not issued by an authority that `ca` or the system trusts"),
    ("BadSignature", "the server's certificate was not issued by an authority that `ca` or the system trusts"),
    ("CaUsedAsEndEntity", "the server's certificate is that of an authority (CA:TRUE), not of a server"),
    ("not valid for name", "the server's certificate does not name the host in the URL"),
    ("NotValidForName", "the server's certificate does not name the host in the URL"),
    ("expired", "the server's certificate has expired"),
    ("Expired", "the server's certificate has expired"),
    ("NotValidYet", "the server's certificate is not valid yet: is the clock of this machine right?"),
    ("not valid yet", "the server's certificate is not valid yet: is the clock of this machine right?"),
    ("InvalidContentType", "the server does not speak TLS on this port"),
];

/// `text` with an explanation in front, if it tells of a failed handshake.
pub fn explained(text: String) -> String {
    let is_of_tls = text.contains("peer certificate") || text.contains("corrupt message");
    let known = KNOWN.iter().find(|(part, _)| is_of_tls && text.contains(part));
    known.map_or(text.clone(), |(_, explanation)| format!("{explanation} ({text})"))
}

#[cfg(test)]
mod tests {
    use tokio_rustls::rustls::pki_types::{ServerName, UnixTime};
    use tokio_rustls::rustls::{CertificateError, Error, InvalidMessage};

    use super::*;

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
        ] {
            let text = format!("error communicating with database: {error}");
            let explained = explained(text.clone());
            assert!(explained.starts_with(start) && explained.ends_with(&format!("({text})")), "{explained}");
        }
        let other = "the session has expired";
        assert_eq!(explained(other.to_owned()), other);
    }
}
