//! The protocol of nginx's mail module: headers of requests to an `auth_http` server, and of its responses.
//!
//! The headers are those of nginx 1.22 (src/mail/ngx_mail_auth_http_module.c); tests/real sends the same requests by both. Headers that an
//! IMAP proxy does not need are left out: `Auth-Salt` (APOP, CRAM-MD5) and those of SMTP. `Auth-Server` must be an IP address. This file
//! does no I/O: `http` sends and receives.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use aws_lc_rs::digest::{SHA1_FOR_LEGACY_USE_ONLY, digest};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hyper::header::{HeaderMap, HeaderName, HeaderValue};
use x509_parser::prelude::{FromDer as _, X509Certificate};
use x509_parser::x509::{AttributeTypeAndValue, X509Name};
use zeroize::Zeroizing;

use crate::identity::{Proof, Secret, UserName};
use crate::route::answer::client_text;
use crate::route::decision::{IssuedCredentials, NextAttempt, WrongPassword};
use crate::route::request::{LoginContext, LoginTls, LookupRequest};

/// Upper limit for `Auth-Wait`.
const MAX_WAIT: Duration = Duration::from_secs(30);
/// Shortest interval between two requests to a server that answers `WAIT`.
const MIN_WAIT: Duration = Duration::from_millis(100);

/// Result in a response.
#[derive(Debug, PartialEq, Eq)]
pub(in crate::route) enum AuthResult {
    /// The password is right.
    Accepted {
        /// The mailbox server.
        address: SocketAddr,
        /// The user's name on that server, if it differs.
        user: Option<UserName>,
        /// The password on that server, if it differs.
        credentials: Option<IssuedCredentials>,
    },
    /// The password is wrong.
    WrongPassword(WrongPassword),
    /// The request must be repeated after this time.
    RetryAfter(Duration),
}

/// Whether requests contain the client's whole certificate, or only its properties.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::route) enum ClientCertificate {
    Whole,
    PropertiesOnly,
}

/// Creates the headers of a request.
///
/// # Errors
/// A message for the log: the protocol does not support the client's mechanism, or a value is not valid in a header.
pub(in crate::route) fn request_headers(
    request: &LookupRequest,
    login: &LoginContext,
    certificate: ClientCertificate,
) -> Result<HeaderMap, String> {
    let (method, password): (_, &[u8]) = match &login.credentials.proof {
        // nginx sends "plain" for LOGIN, too.
        Proof::Password(password) => ("plain", password.expose()),
        Proof::Certificate => ("external", b""),
        Proof::Message { .. } => return Err("this protocol supports only logins by password or certificate".to_owned()),
    };
    let mut headers = Headers::default();
    headers.add("auth-method", method.as_bytes())?;
    headers.add("auth-user", &escaped(request.user.as_bytes()))?;
    headers.add("auth-pass", &escaped(password))?;
    headers.add("auth-protocol", b"imap")?;
    headers.add("auth-login-attempt", login.attempt.to_string().as_bytes())?;
    headers.add("client-ip", login.client.ip().to_canonical().to_string().as_bytes())?;
    if login.is_proxied {
        headers.add("proxy-protocol-addr", login.client.ip().to_string().as_bytes())?;
        headers.add("proxy-protocol-port", login.client.port().to_string().as_bytes())?;
        headers.add("proxy-protocol-server-addr", login.listener.ip().to_string().as_bytes())?;
        headers.add("proxy-protocol-server-port", login.listener.port().to_string().as_bytes())?;
    }
    if let Some(tls) = &login.tls {
        headers.add_tls(tls, certificate)?;
    }
    Ok(headers.0)
}

#[derive(Default)]
struct Headers(HeaderMap);

impl Headers {
    fn add(&mut self, name: &'static str, value: &[u8]) -> Result<(), String> {
        let mut value = HeaderValue::from_bytes(value).map_err(|_| format!("{name} is not a valid header value"))?;
        value.set_sensitive(true);
        self.0.insert(HeaderName::from_static(name), value);
        Ok(())
    }

    fn add_tls(&mut self, tls: &LoginTls, certificate: ClientCertificate) -> Result<(), String> {
        self.add("auth-ssl", b"on")?;
        self.add("auth-ssl-protocol", tls.version.as_bytes())?;
        if let Some(cipher) = tls.cipher {
            self.add("auth-ssl-cipher", openssl_name(cipher).as_bytes())?;
        }
        if !tls.asks_certificate {
            return Ok(());
        }
        let parsed = tls.certificate.as_deref().map(|der| (der, X509Certificate::from_der(der)));
        let verified: &[u8] = match &parsed {
            None => b"NONE",
            // The certificate of a resumed TLS session comes from the ticket, and its dates have not been checked since.
            Some((_, Ok((_, parsed)))) if parsed.validity().is_valid() => b"SUCCESS",
            Some(_) => b"FAILED:certificate has expired",
        };
        self.add("auth-ssl-verify", verified)?;
        let Some((der, Ok((_, parsed)))) = parsed else { return Ok(()) };
        self.add("auth-ssl-subject", distinguished_name(parsed.subject()).as_bytes())?;
        self.add("auth-ssl-issuer", distinguished_name(parsed.issuer()).as_bytes())?;
        self.add("auth-ssl-serial", serial(parsed.raw_serial()).as_bytes())?;
        self.add("auth-ssl-fingerprint", hexadecimal(digest(&SHA1_FOR_LEGACY_USE_ONLY, der).as_ref()).as_bytes())?;
        if certificate == ClientCertificate::Whole {
            self.add("auth-ssl-cert", escaped_pem(der).as_bytes())?;
        }
        Ok(())
    }
}

/// Reads the headers of a response.
///
/// # Errors
/// A message for the log: what is invalid in the response.
pub(in crate::route) fn parse_response(headers: &HeaderMap) -> Result<AuthResult, String> {
    let header =
        |name: &str| headers.get(name).map(HeaderValue::as_bytes).and_then(|value| std::str::from_utf8(value).ok());
    // Like nginx, reads the headers whatever the status code is; an error page of the service has no Auth-Status.
    let status = header("auth-status").ok_or("the response has no Auth-Status")?;
    let wait = header("auth-wait").and_then(|seconds| seconds.parse().ok()).map(Duration::from_secs);
    match status {
        "OK" => {}
        "WAIT" => {
            return Ok(AuthResult::RetryAfter(wait.unwrap_or_default().clamp(MIN_WAIT, MAX_WAIT)));
        }
        text => {
            return Ok(AuthResult::WrongPassword(WrongPassword {
                text: Some(client_text(text)),
                // As in nginx, only a positive Auth-Wait allows another attempt on the same connection.
                next_attempt: match wait {
                    Some(wait) if !wait.is_zero() => NextAttempt::After(wait.min(MAX_WAIT)),
                    _ => NextAttempt::OnNewConnection,
                },
            }));
        }
    }
    let address = || {
        let ip: IpAddr = header("auth-server")?.parse().ok()?;
        let port: u16 = header("auth-port")?.parse().ok().filter(|port| *port != 0)?;
        Some(SocketAddr::new(ip.to_canonical(), port))
    };
    let address = address().ok_or("the response has no valid Auth-Server and Auth-Port")?;
    let user = header("auth-user").map(|name| UserName::new(name.as_bytes())).transpose();
    let user = user.map_err(|error| format!("the response's Auth-User: {error}"))?;
    let credentials = header("auth-pass")
        .map(|password| IssuedCredentials { master: None, password: Secret::new(password.as_bytes().to_vec()) });
    Ok(AuthResult::Accepted { address, user, credentials })
}

/// Escapes spaces, `%` and control characters, as nginx does in `Auth-User` and `Auth-Pass`.
fn escaped(bytes: &[u8]) -> Zeroizing<Vec<u8>> {
    let mut escaped = Zeroizing::new(Vec::with_capacity(3 * bytes.len()));
    for byte in bytes {
        match byte {
            0..=b' ' | b'%' | 0x7f => escaped.extend_from_slice(format!("%{byte:02X}").as_bytes()),
            other => escaped.push(*other),
        }
    }
    escaped
}

/// Converts a cipher suite name of rustls (`TLS13_AES_128_GCM_SHA256`, `TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256`) to that of OpenSSL.
fn openssl_name(rustls: &str) -> String {
    if let Some(rest) = rustls.strip_prefix("TLS13_") {
        return format!("TLS_{rest}");
    }
    let name = rustls.trim_start_matches("TLS_").replace("WITH_", "").replace("AES_", "AES").replace('_', "-");
    // OpenSSL omits the hash of ChaCha20-Poly1305.
    name.strip_suffix("POLY1305-SHA256").map_or(name.clone(), |start| format!("{start}POLY1305"))
}

/// Formats a distinguished name by RFC 2253 as OpenSSL does: the last RDN first, and only ASCII.
fn distinguished_name(name: &X509Name<'_>) -> String {
    let mut text = String::new();
    for rdn in name.iter_rdn() {
        for (index, value) in rdn.iter().enumerate() {
            let separator = match (text.is_empty(), index) {
                (true, _) => "",
                (false, 0) => ",",
                (false, _) => "+",
            };
            text = format!("{}{separator}{text}", attribute(value));
        }
    }
    text
}

fn attribute(attribute: &AttributeTypeAndValue<'_>) -> String {
    let oid = attribute.attr_type().to_id_string();
    let name = match &*oid {
        "2.5.4.3" => "CN",
        "2.5.4.4" => "SN",
        "2.5.4.5" => "serialNumber",
        "2.5.4.6" => "C",
        "2.5.4.7" => "L",
        "2.5.4.8" => "ST",
        "2.5.4.9" => "street",
        "2.5.4.10" => "O",
        "2.5.4.11" => "OU",
        "2.5.4.12" => "title",
        "2.5.4.42" => "GN",
        "1.2.840.113549.1.9.1" => "emailAddress",
        "0.9.2342.19200300.100.1.1" => "UID",
        "0.9.2342.19200300.100.1.25" => "DC",
        other => other,
    };
    format!("{name}={}", attribute.as_str().map(escaped_rfc2253).unwrap_or_default())
}

/// Escapes an attribute value by RFC 2253.
fn escaped_rfc2253(value: &str) -> String {
    let last = value.len().saturating_sub(1);
    let mut escaped = String::with_capacity(value.len());
    for (at, byte) in value.bytes().enumerate() {
        let needs_backslash = matches!(byte, b',' | b'+' | b'"' | b'\\' | b'<' | b'>' | b';')
            || byte == b' ' && (at == 0 || at == last)
            || byte == b'#' && at == 0;
        match byte {
            _ if needs_backslash => escaped.extend(['\\', char::from(byte)]),
            b' '..=b'~' => escaped.push(char::from(byte)),
            _ => escaped.push_str(&format!("\\{byte:02X}")),
        }
    }
    escaped
}

/// Encodes a certificate as PEM, with the spaces and line ends escaped as by nginx.
fn escaped_pem(der: &[u8]) -> String {
    let mut escaped = "-----BEGIN%20CERTIFICATE-----%0A".to_owned();
    for (at, letter) in STANDARD.encode(der).chars().enumerate() {
        if at > 0 && at % 64 == 0 {
            escaped.push_str("%0A");
        }
        escaped.push(letter);
    }
    escaped + "%0A-----END%20CERTIFICATE-----%0A"
}

/// Formats a serial number, without the leading zero byte that only marks it as positive.
fn serial(raw: &[u8]) -> String {
    let digits = match raw {
        [0, rest @ ..] if !rest.is_empty() => rest,
        all => all,
    };
    hexadecimal(digits).to_ascii_uppercase()
}

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(headers: &[(&'static str, &'static str)]) -> Result<AuthResult, String> {
        let headers =
            headers.iter().map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value)));
        parse_response(&headers.collect())
    }

    #[test]
    fn positive_auth_wait_allows_another_attempt() {
        let wrong_password =
            |next_attempt| Ok(AuthResult::WrongPassword(WrongPassword { text: Some("No.".into()), next_attempt }));
        let retry_after = |seconds| wrong_password(NextAttempt::After(Duration::from_secs(seconds)));
        assert_eq!(parsed(&[("auth-status", "No."), ("auth-wait", "3")]), retry_after(3));
        assert_eq!(parsed(&[("auth-status", "No."), ("auth-wait", "86400")]), retry_after(30));
        for wait in ["0", "soon", "-1"] {
            assert_eq!(
                parsed(&[("auth-status", "No."), ("auth-wait", wait)]),
                wrong_password(NextAttempt::OnNewConnection),
                "{wait}"
            );
        }
        assert_eq!(parsed(&[("auth-status", "No.")]), wrong_password(NextAttempt::OnNewConnection));
        assert_eq!(
            parsed(&[("auth-status", "WAIT"), ("auth-wait", "2")]),
            Ok(AuthResult::RetryAfter(Duration::from_secs(2)))
        );
        assert_eq!(parsed(&[("auth-status", "WAIT")]), Ok(AuthResult::RetryAfter(MIN_WAIT)));
    }

    #[test]
    fn response_must_contain_an_address() {
        let accepted = |address: &str| {
            Ok(AuthResult::Accepted { address: address.parse().unwrap(), user: None, credentials: None })
        };
        let result_for = |server, port| parsed(&[("auth-status", "OK"), ("auth-server", server), ("auth-port", port)]);
        assert_eq!(result_for("10.0.0.1", "143"), accepted("10.0.0.1:143"));
        assert_eq!(result_for("::ffff:10.0.0.1", "143"), accepted("10.0.0.1:143"));
        assert_eq!(result_for("2001:db8::1", "143"), accepted("[2001:db8::1]:143"));
        for (server, port) in [("mail.internal", "143"), ("unix:/run/imap", "143"), ("10.0.0.1", "0"), ("10.0.0.1", "")]
        {
            assert!(result_for(server, port).is_err(), "{server} {port}");
        }
        assert!(parsed(&[("auth-status", "OK")]).is_err() && parsed(&[]).is_err());
    }

    #[test]
    fn names_have_the_openssl_spelling() {
        for (rustls, openssl) in [
            ("TLS13_AES_256_GCM_SHA384", "TLS_AES_256_GCM_SHA384"),
            ("TLS13_CHACHA20_POLY1305_SHA256", "TLS_CHACHA20_POLY1305_SHA256"),
            ("TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256", "ECDHE-ECDSA-AES128-GCM-SHA256"),
            ("TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256", "ECDHE-RSA-CHACHA20-POLY1305"),
        ] {
            assert_eq!(openssl_name(rustls), openssl);
        }
        assert_eq!(escaped_rfc2253("#a,b+\"c\\<>; "), "\\#a\\,b\\+\\\"c\\\\\\<\\>\\;\\ ");
        assert_eq!(escaped_rfc2253("a=b#\u{e9}\n"), "a=b#\\C3\\A9\\0A");
        assert_eq!((serial(&[0, 0xab]), serial(&[0]), serial(&[1, 2])), ("AB".into(), "00".into(), "0102".into()));
    }

    #[test]
    fn spaces_and_control_characters_are_escaped() {
        assert_eq!(&escaped(b"a b%\r\n\0\x7f\xc3\xa9\"")[..], b"a%20b%25%0D%0A%00%7F\xc3\xa9\"");
    }
}
