//! The headers of nginx's mail module: what its `auth_http` servers are asked, and what they answer.
//!
//! As nginx 1.22 writes and reads them (src/mail/ngx_mail_auth_http_module.c); tests/real asks one server by both. Left out
//! is what an IMAP proxy has no use for: `Auth-Salt` (APOP, CRAM-MD5) and the headers of SMTP. `Auth-Server` must be an IP
//! address. Pure: `http` sends and receives.

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
use crate::route::decision::{IssuedCredentials, NextAttempt, WrongPassword, sentence};
use crate::route::request::{LoginContext, LookupRequest};

/// `Auth-Wait` is honoured up to here.
const LONGEST_WAIT: Duration = Duration::from_secs(30);
/// A server that says "ask again at once" is not asked faster than that.
const SHORTEST_WAIT: Duration = Duration::from_millis(100);

/// What the server said.
#[derive(Debug, PartialEq, Eq)]
pub(in crate::route) enum Verdict {
    /// The password is right.
    Good {
        /// Where the mailbox is.
        address: SocketAddr,
        /// The name there, where it is another.
        user: Option<UserName>,
        /// The password there, where it is another.
        login: Option<IssuedCredentials>,
    },
    /// The password is wrong.
    WrongPassword(WrongPassword),
    /// The same question is to be asked again after this time.
    AskAgain(Duration),
}

/// The headers of a question, with the client's whole certificate where `pass_certificate`.
///
/// # Errors
/// A sentence for the log: the client did not log in by something that this protocol knows.
pub(in crate::route) fn question(
    question: &LookupRequest,
    login_context: &LoginContext,
    pass_certificate: bool,
) -> Result<HeaderMap, String> {
    let (method, password): (_, &[u8]) = match &login_context.credentials.proof {
        // LOGIN and PLAIN are both "plain" there.
        Proof::Password(password) => ("plain", password.expose()),
        Proof::Certificate => ("external", b""),
        Proof::Message { .. } => return Err("this style is asked with a password or a certificate only".to_owned()),
    };
    let mut headers = HeaderMap::new();
    let mut add = |name, value: &[u8]| {
        let mut value = HeaderValue::from_bytes(value).map_err(|_| format!("{name} cannot stand in a header"))?;
        value.set_sensitive(true);
        headers.insert(HeaderName::from_static(name), value);
        Ok::<_, String>(())
    };
    add("auth-method", method.as_bytes())?;
    add("auth-user", &escaped(question.user.as_bytes()))?;
    add("auth-pass", &escaped(password))?;
    add("auth-protocol", b"imap")?;
    add("auth-login-attempt", login_context.attempt.to_string().as_bytes())?;
    add("client-ip", login_context.client.ip().to_canonical().to_string().as_bytes())?;
    if login_context.is_proxied {
        add("proxy-protocol-addr", login_context.client.ip().to_string().as_bytes())?;
        add("proxy-protocol-port", login_context.client.port().to_string().as_bytes())?;
        add("proxy-protocol-server-addr", login_context.listener.ip().to_string().as_bytes())?;
        add("proxy-protocol-server-port", login_context.listener.port().to_string().as_bytes())?;
    }
    let Some(tls) = &login_context.tls else { return Ok(headers) };
    add("auth-ssl", b"on")?;
    add("auth-ssl-protocol", tls.version.as_bytes())?;
    if let Some(cipher) = tls.cipher {
        add("auth-ssl-cipher", openssl_name(cipher).as_bytes())?;
    }
    if !tls.asks_certificate {
        return Ok(headers);
    }
    let certificate = tls.certificate.as_deref().map(|der| (der, X509Certificate::from_der(der)));
    add(
        "auth-ssl-verify",
        match &certificate {
            None => b"NONE",
            // A session that is resumed has it from the ticket, and nobody has looked at its end since.
            Some((_, Ok((_, parsed)))) if parsed.validity().is_valid() => b"SUCCESS",
            Some(_) => b"FAILED:certificate has expired",
        },
    )?;
    if let Some((der, Ok((_, parsed)))) = certificate {
        add("auth-ssl-subject", distinguished_name(parsed.subject()).as_bytes())?;
        add("auth-ssl-issuer", distinguished_name(parsed.issuer()).as_bytes())?;
        add("auth-ssl-serial", serial(parsed.raw_serial()).as_bytes())?;
        add("auth-ssl-fingerprint", hexadecimal(digest(&SHA1_FOR_LEGACY_USE_ONLY, der).as_ref()).as_bytes())?;
        if pass_certificate {
            add("auth-ssl-cert", escaped_pem(der).as_bytes())?;
        }
    }
    Ok(headers)
}

/// # Errors
/// A sentence for the log: what in the answer is wrong.
pub(in crate::route) fn answer(headers: &HeaderMap) -> Result<Verdict, String> {
    let header =
        |name: &str| headers.get(name).map(HeaderValue::as_bytes).and_then(|value| std::str::from_utf8(value).ok());
    // nginx reads the headers of any answer; one that is an error of the service itself has none of them.
    let status = header("auth-status").ok_or("the answer has no Auth-Status")?;
    let wait = header("auth-wait").and_then(|seconds| seconds.parse().ok()).map(Duration::from_secs);
    match status {
        "OK" => {}
        "WAIT" => {
            return Ok(Verdict::AskAgain(wait.unwrap_or_default().clamp(SHORTEST_WAIT, LONGEST_WAIT)));
        }
        text => {
            return Ok(Verdict::WrongPassword(WrongPassword {
                text: Some(sentence(text)),
                // As in nginx, only a positive Auth-Wait allows another attempt on the same connection.
                next_attempt: match wait {
                    Some(wait) if !wait.is_zero() => NextAttempt::After(wait.min(LONGEST_WAIT)),
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
    let address = address().ok_or("the answer has no Auth-Server and Auth-Port that are an address")?;
    let user = header("auth-user").map(|name| UserName::new(name.as_bytes())).transpose();
    let user = user.map_err(|error| format!("the answer's Auth-User: {error}"))?;
    let login = header("auth-pass")
        .map(|password| IssuedCredentials { master: None, password: Secret::new(password.as_bytes().to_vec()) });
    Ok(Verdict::Good { address, user, login })
}

/// As nginx writes `Auth-User` and `Auth-Pass`: spaces, `%` and control characters escaped, all else as it is.
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

/// What OpenSSL calls the cipher suite that rustls calls `TLS13_AES_128_GCM_SHA256` or
/// `TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256`.
fn openssl_name(rustls: &str) -> String {
    if let Some(rest) = rustls.strip_prefix("TLS13_") {
        return format!("TLS_{rest}");
    }
    let name = rustls.trim_start_matches("TLS_").replace("WITH_", "").replace("AES_", "AES").replace('_', "-");
    // Its hash goes without saying.
    name.strip_suffix("POLY1305-SHA256").map_or(name.clone(), |start| format!("{start}POLY1305"))
}

/// RFC 2253, as OpenSSL writes it: the last part first, and nothing but ASCII.
fn distinguished_name(name: &X509Name<'_>) -> String {
    let mut written = String::new();
    for part in name.iter_rdn() {
        for (place, one) in part.iter().enumerate() {
            let behind = match (written.is_empty(), place) {
                (true, _) => "",
                (false, 0) => ",",
                (false, _) => "+",
            };
            written = format!("{}{behind}{written}", attribute(one));
        }
    }
    written
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
    format!("{name}={}", attribute.as_str().map(value_2253).unwrap_or_default())
}

fn value_2253(value: &str) -> String {
    let last = value.len().saturating_sub(1);
    let mut written = String::with_capacity(value.len());
    for (at, byte) in value.bytes().enumerate() {
        let needs_backslash = matches!(byte, b',' | b'+' | b'"' | b'\\' | b'<' | b'>' | b';')
            || byte == b' ' && (at == 0 || at == last)
            || byte == b'#' && at == 0;
        match byte {
            _ if needs_backslash => written.extend(['\\', char::from(byte)]),
            b' '..=b'~' => written.push(char::from(byte)),
            _ => written.push_str(&format!("\\{byte:02X}")),
        }
    }
    written
}

/// PEM with its spaces and line ends escaped, which is all that nginx escapes of it.
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

/// The number without the zero byte that only keeps it positive.
fn serial(raw: &[u8]) -> String {
    let digits = match raw {
        [0, rest @ ..] if !rest.is_empty() => rest,
        whole => whole,
    };
    hexadecimal(digits).to_ascii_uppercase()
}

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(headers: &[(&'static str, &'static str)]) -> Result<Verdict, String> {
        let headers =
            headers.iter().map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value)));
        answer(&headers.collect())
    }

    #[test]
    fn who_is_told_to_wait_may_try_again() {
        let denied =
            |next_attempt| Ok(Verdict::WrongPassword(WrongPassword { text: Some("No.".into()), next_attempt }));
        let retry_after = |seconds| denied(NextAttempt::After(Duration::from_secs(seconds)));
        assert_eq!(said(&[("auth-status", "No."), ("auth-wait", "3")]), retry_after(3));
        assert_eq!(said(&[("auth-status", "No."), ("auth-wait", "86400")]), retry_after(30));
        for wait in ["0", "soon", "-1"] {
            assert_eq!(
                said(&[("auth-status", "No."), ("auth-wait", wait)]),
                denied(NextAttempt::OnNewConnection),
                "{wait}"
            );
        }
        assert_eq!(said(&[("auth-status", "No.")]), denied(NextAttempt::OnNewConnection));
        assert_eq!(said(&[("auth-status", "WAIT"), ("auth-wait", "2")]), Ok(Verdict::AskAgain(Duration::from_secs(2))));
        assert_eq!(said(&[("auth-status", "WAIT")]), Ok(Verdict::AskAgain(SHORTEST_WAIT)));
    }

    #[test]
    fn an_address_is_needed() {
        let good = |address: &str| Ok(Verdict::Good { address: address.parse().unwrap(), user: None, login: None });
        let at = |server, port| said(&[("auth-status", "OK"), ("auth-server", server), ("auth-port", port)]);
        assert_eq!(at("10.0.0.1", "143"), good("10.0.0.1:143"));
        assert_eq!(at("::ffff:10.0.0.1", "143"), good("10.0.0.1:143"));
        assert_eq!(at("2001:db8::1", "143"), good("[2001:db8::1]:143"));
        for (server, port) in [("mail.internal", "143"), ("unix:/run/imap", "143"), ("10.0.0.1", "0"), ("10.0.0.1", "")]
        {
            assert!(at(server, port).is_err(), "{server} {port}");
        }
        assert!(said(&[("auth-status", "OK")]).is_err() && said(&[]).is_err());
    }

    #[test]
    fn names_as_openssl_writes_them() {
        for (rustls, openssl) in [
            ("TLS13_AES_256_GCM_SHA384", "TLS_AES_256_GCM_SHA384"),
            ("TLS13_CHACHA20_POLY1305_SHA256", "TLS_CHACHA20_POLY1305_SHA256"),
            ("TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256", "ECDHE-ECDSA-AES128-GCM-SHA256"),
            ("TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256", "ECDHE-RSA-CHACHA20-POLY1305"),
        ] {
            assert_eq!(openssl_name(rustls), openssl);
        }
        assert_eq!(value_2253("#a,b+\"c\\<>; "), "\\#a\\,b\\+\\\"c\\\\\\<\\>\\;\\ ");
        assert_eq!(value_2253("a=b#\u{e9}\n"), "a=b#\\C3\\A9\\0A");
        assert_eq!((serial(&[0, 0xab]), serial(&[0]), serial(&[1, 2])), ("AB".into(), "00".into(), "0102".into()));
    }

    #[test]
    fn what_a_header_cannot_hold_is_escaped() {
        assert_eq!(&escaped(b"a b%\r\n\0\x7f\xc3\xa9\"")[..], b"a%20b%25%0D%0A%00%7F\xc3\xa9\"");
    }
}
