//! The text of a server's refusal: classifies its response code or text, and prepares it for the client and for logs.
//!
//! Many servers report an outage or a limit without a response code. A short list of such texts is built in, and each backend
//! can add its own. Texts are compared only if there is no code, or only `[ALERT]`, which does not state the cause.

use zeroize::Zeroizing;

use super::fault::ServerFault;
use super::verdict::ServerAnswer;
use crate::identity::{ServerLogin, UserName};
use crate::protocol::imap::{capability, sasl};

/// Maximum size of a server's text in a reply to the client, in bytes.
const MAX_TEXT: usize = 1024;
/// Maximum size of an excerpt of a server's line in logs, in bytes.
const MAX_EXCERPT: usize = 80;
/// Size of the part of a line that is searched for secrets, in bytes.
const MAX_SEARCHED: usize = 1024;
/// Maximum size of a secret, in bytes, for which a server's text is logged at all.
const MAX_COMPARED: usize = 4096;
/// Size of the parts of a password that must not occur in a logged text, in bytes.
const PASSWORD_PART: usize = 4;
/// The same for base64 and tokens, because four of their bytes occur too often in ordinary words.
const TOKEN_PART: usize = 8;
/// Logged instead of a text.
const WITHHELD: &str = "(text withheld: it may repeat what the client sent)";

/// Texts that mean an outage, in lower case.
const UNAVAILABLE_TEXTS: &[&str] = &[
    // Microsoft Exchange: "Server Unavailable. 15", "User is authenticated but not connected."
    "server unavailable",
    "authenticated but not connected",
    // Dovecot, and servers that use its texts.
    "temporary authentication failure",
    "internal error occurred",
    "internal login failure",
    // Cyrus SASL, if its password service does not answer.
    "authentication server unavailable",
    "cannot connect to saslauthd",
    // Courier, Yahoo and others.
    "temporary problem",
    "temporarily unavailable",
    "service unavailable",
];

/// Texts that mean a limit of the user, in lower case.
const LIMIT_TEXTS: &[&str] = &[
    // Cyrus: "Too many open connections (5 of 5 for x)".
    "too many open connections",
    // Gmail: "Too many simultaneous connections. (Failure)".
    "too many simultaneous connections",
    "too many connections",
    // Dovecot: "Maximum number of connections from user+IP exceeded".
    "maximum number of connections",
    // Courier: "Maximum connection limit reached".
    "maximum connection limit",
    "connection limit exceeded",
];

/// The meaning of a refusal, and the response code that the client receives before its text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct ClassifiedRefusal {
    pub(super) answer: ServerAnswer,
    /// Replaces the server's code; `None` leaves the server's text unchanged.
    pub(super) code: Option<&'static str>,
}

/// Classifies the text of a tagged NO. `unavailable` and `limit` are the backend's own texts, in lower case.
pub(super) fn classify_no(text: &[u8], unavailable: &[String], limit: &[String]) -> ClassifiedRefusal {
    let code = capability::code(text).map(|(code, ..)| code.to_ascii_uppercase());
    let recognised = match code.as_deref() {
        None | Some(b"ALERT") => recognised(text, unavailable, limit),
        Some(code) => {
            return ClassifiedRefusal { answer: answer_of_code(code), code: None };
        }
    };
    match recognised {
        Some(fault) => ClassifiedRefusal { answer: ServerAnswer::Fault(fault), code: Some(code_of_fault(fault)) },
        None => {
            ClassifiedRefusal { answer: ServerAnswer::Refusal, code: code.is_none().then_some("AUTHENTICATIONFAILED") }
        }
    }
}

/// Classifies the text of a `* BYE` in place of a tagged answer.
pub(super) fn classify_bye(text: &[u8], limit: &[String]) -> ClassifiedRefusal {
    let code = capability::code(text).map(|(code, ..)| code.to_ascii_uppercase());
    match code.as_deref() {
        Some(b"AUTHENTICATIONFAILED" | b"AUTHORIZATIONFAILED" | b"EXPIRED") => {
            ClassifiedRefusal { answer: ServerAnswer::Refusal, code: None }
        }
        Some(code) if answer_of_code(code) == ServerAnswer::Fault(ServerFault::UserLimit) => {
            ClassifiedRefusal { answer: ServerAnswer::Fault(ServerFault::UserLimit), code: None }
        }
        None | Some(b"ALERT") if recognised(text, &[], limit) == Some(ServerFault::UserLimit) => {
            ClassifiedRefusal { answer: ServerAnswer::Fault(ServerFault::UserLimit), code: Some("LIMIT") }
        }
        _ => ClassifiedRefusal { answer: ServerAnswer::Fault(ServerFault::Bye), code: Some("UNAVAILABLE") },
    }
}

/// Returns the meaning of a NO with this response code (RFC 5530 section 3), which is in upper case.
fn answer_of_code(code: &[u8]) -> ServerAnswer {
    match code {
        // A temporary failure of a subsystem, a bug in the server, and Yahoo's code for the former.
        b"UNAVAILABLE" | b"SERVERBUG" | b"TEMPFAIL" => ServerAnswer::Fault(ServerFault::Overloaded),
        // A locked mailbox, or a limit or quota that is reached: the password may be right, and another server would not help.
        b"INUSE" | b"LIMIT" | b"OVERQUOTA" => ServerAnswer::Fault(ServerFault::UserLimit),
        // The client uses TLS or may log in without it; the proxy's connection to this server needs TLS.
        b"PRIVACYREQUIRED" => ServerAnswer::Fault(ServerFault::TlsRequired),
        // The account is closed. Phones repeat their login for days, which must not ban their network.
        b"CONTACTADMIN" => ServerAnswer::AccountClosed,
        b"REFERRAL" => ServerAnswer::Referral,
        // AUTHENTICATIONFAILED, AUTHORIZATIONFAILED, EXPIRED (an expired password), NOPERM, CANNOT and unknown codes. They count
        // as failed logins, because otherwise passwords could be guessed without limit.
        _ => ServerAnswer::Refusal,
    }
}

fn code_of_fault(fault: ServerFault) -> &'static str {
    if fault == ServerFault::UserLimit { "LIMIT" } else { "UNAVAILABLE" }
}

/// Searches for the backend's texts first, then for the built-in ones.
fn recognised(text: &[u8], unavailable: &[String], limit: &[String]) -> Option<ServerFault> {
    let text = String::from_utf8_lossy(text).to_lowercase();
    let has = |list: &[String]| list.iter().any(|part| text.contains(part.as_str()));
    let has_built_in = |list: &[&str]| list.iter().any(|part| text.contains(part));
    if has(limit) {
        Some(ServerFault::UserLimit)
    } else if has(unavailable) {
        Some(ServerFault::Overloaded)
    } else if has_built_in(LIMIT_TEXTS) {
        Some(ServerFault::UserLimit)
    } else if has_built_in(UNAVAILABLE_TEXTS) {
        Some(ServerFault::Overloaded)
    } else {
        None
    }
}

/// Returns `TAG NO text` for the client, of limited size and without control characters; `code` replaces the server's code.
pub(super) fn refusal(tag: &str, text: &[u8], code: Option<&str>) -> Vec<u8> {
    let text = match code {
        Some(_) => capability::code(text).map_or(text, |(_, _, rest)| rest),
        None => text,
    };
    let mut reply = [tag.as_bytes(), b" NO "].concat();
    if let Some(code) = code {
        reply.extend_from_slice(format!("[{code}] ").as_bytes());
    }
    reply.extend_from_slice(&printable(text, "Authentication failed."));
    reply.extend_from_slice(b"\r\n");
    reply
}

/// Returns `TAG BAD text` for the client, likewise.
pub(super) fn bad(tag: &str, text: &[u8]) -> Vec<u8> {
    [tag.as_bytes(), b" BAD ", &printable(text, "Authentication aborted."), b"\r\n"].concat()
}

/// Returns at most [`MAX_TEXT`] bytes without control characters, or `absent` if the text is empty.
fn printable(text: &[u8], absent: &str) -> Vec<u8> {
    let mut end = text.len().min(MAX_TEXT);
    // The text is not cut within a character.
    while end < text.len() && end > 0 && text[end] & 0xc0 == 0x80 {
        end -= 1;
    }
    let text: Vec<u8> = text[..end].iter().map(|byte| if byte.is_ascii_control() { b' ' } else { *byte }).collect();
    if text.is_empty() { absent.as_bytes().to_vec() } else { text }
}

/// Returns the first [`MAX_EXCERPT`] bytes of a line in quotes, with control characters escaped.
pub(super) fn excerpt(line: &[u8]) -> String {
    let end = line.len().min(MAX_EXCERPT);
    let more = if line.len() > end { "…" } else { "" };
    format!("{:?}{more}", String::from_utf8_lossy(&line[..end]))
}

/// Returns an excerpt of a line from a server that has received the credentials of `login` and may repeat them. It is withheld if
/// the line contains a part of the password, of its base64 form, or of a token. The user names in `login` are replaced by
/// `(user)`, because logs may be configured to contain no names.
pub(super) fn excerpt_after(line: &[u8], login: &ServerLogin<'_>) -> String {
    let line = &line[..line.len().min(MAX_SEARCHED)];
    let lower = line.to_ascii_lowercase();
    let repeats = |secret: &[u8], part: usize| {
        let secret = Zeroizing::new(secret.to_ascii_lowercase());
        let part = part.min(secret.len());
        // Searching for the parts of a very long secret would take too long.
        secret.len() > MAX_COMPARED || part > 0 && secret.windows(part).any(|window| position(&lower, window).is_some())
    };
    let (is_repeated, names): (bool, Vec<&str>) = match login {
        ServerLogin::Password(password) => (
            repeats(password.password.expose(), PASSWORD_PART) || repeats(&sasl::plain_response(password), TOKEN_PART),
            password.authzid.into_iter().chain([password.user]).map(UserName::as_str).collect(),
        ),
        ServerLogin::Relayed { first, user, authzid, .. } => (
            repeats(first.expose(), TOKEN_PART) || repeats(&sasl::encode(first.expose()), TOKEN_PART),
            authzid.iter().chain([user]).map(|name| name.as_str()).collect(),
        ),
    };
    if is_repeated {
        return WITHHELD.to_owned();
    }
    excerpt(&names.iter().fold(line.to_vec(), |line, name| without_name(&line, name.as_bytes())))
}

/// Replaces each occurrence of `name` in `line`, in any letter case, by `(user)`.
fn without_name(line: &[u8], name: &[u8]) -> Vec<u8> {
    let (lower, name) = (line.to_ascii_lowercase(), name.to_ascii_lowercase());
    let mut out = Vec::with_capacity(line.len());
    let mut start = 0;
    while let Some(found) = position(&lower[start..], &name) {
        out.extend_from_slice(&line[start..start + found]);
        out.extend_from_slice(b"(user)");
        start += found + name.len();
    }
    out.extend_from_slice(&line[start..]);
    out
}

/// Returns the index of the first occurrence of `part`, which is not empty.
fn position(text: &[u8], part: &[u8]) -> Option<usize> {
    text.windows(part.len()).position(|window| window == part)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::{PasswordLogin, RelayedMechanism, Secret};

    fn meaning(text: &str) -> (ServerAnswer, Option<&'static str>) {
        let ClassifiedRefusal { answer, code } =
            classify_no(text.as_bytes(), &["backend is down".into()], &["quota of logins".into()]);
        (answer, code)
    }

    #[test]
    fn codes_take_precedence_over_texts() {
        let fault = ServerAnswer::Fault;
        for (text, expected) in [
            ("[UNAVAILABLE] x", fault(ServerFault::Overloaded)),
            ("[serverbug] x", fault(ServerFault::Overloaded)),
            ("[TEMPFAIL] x", fault(ServerFault::Overloaded)),
            ("[INUSE] x", fault(ServerFault::UserLimit)),
            ("[LIMIT] x", fault(ServerFault::UserLimit)),
            ("[OVERQUOTA] Account exceeded bandwidth limits", fault(ServerFault::UserLimit)),
            ("[PRIVACYREQUIRED] x", fault(ServerFault::TlsRequired)),
            ("[CONTACTADMIN] x", ServerAnswer::AccountClosed),
            ("[REFERRAL imap://x/] x", ServerAnswer::Referral),
            ("[AUTHENTICATIONFAILED] Temporary authentication failure", ServerAnswer::Refusal),
            ("[AUTHORIZATIONFAILED] x", ServerAnswer::Refusal),
            ("[EXPIRED] x", ServerAnswer::Refusal),
            ("[CANNOT] Too many connections", ServerAnswer::Refusal),
            ("[NOPERM] x", ServerAnswer::Refusal),
            ("[X-UNKNOWN y] x", ServerAnswer::Refusal),
        ] {
            assert_eq!(meaning(text), (expected, None), "{text}");
        }
    }

    #[test]
    fn texts_are_classified_without_a_code() {
        let unavailable = (ServerAnswer::Fault(ServerFault::Overloaded), Some("UNAVAILABLE"));
        let limit = (ServerAnswer::Fault(ServerFault::UserLimit), Some("LIMIT"));
        for (text, expected) in [
            ("Server Unavailable. 15", unavailable),
            ("[ALERT] TEMPORARY Authentication failure.", unavailable),
            ("LOGIN failed: Backend is DOWN", unavailable),
            ("Too many open connections (5 of 5 for x)", limit),
            ("[ALERT] Too many simultaneous connections. (Failure)", limit),
            ("Quota of logins reached, server unavailable", limit),
            ("LOGIN failed.", (ServerAnswer::Refusal, Some("AUTHENTICATIONFAILED"))),
            ("", (ServerAnswer::Refusal, Some("AUTHENTICATIONFAILED"))),
            ("[ALERT] Invalid credentials (Failure)", (ServerAnswer::Refusal, None)),
            ("[unterminated", (ServerAnswer::Refusal, Some("AUTHENTICATIONFAILED"))),
        ] {
            assert_eq!(meaning(text), expected, "{text}");
        }
    }

    #[test]
    fn documentation_lists_the_texts() {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/server-answers.md");
        let documentation = std::fs::read_to_string(path).unwrap();
        for (name, texts) in [("outage", UNAVAILABLE_TEXTS), ("limit of the user", LIMIT_TEXTS)] {
            let line = format!("- {name}: \"{}\"\n", texts.join("\", \""));
            assert!(documentation.contains(&line), "docs/server-answers.md must contain this line:\n{line}");
            assert!(texts.iter().all(|text| *text == text.to_lowercase()), "{texts:?}");
        }
    }

    #[test]
    fn bye_is_an_outage_unless_its_code_or_text_says_otherwise() {
        for (text, answer, code) in [
            ("IMAP access disabled for this account.", ServerAnswer::Fault(ServerFault::Bye), Some("UNAVAILABLE")),
            ("[ALERT] Server unavailable", ServerAnswer::Fault(ServerFault::Bye), Some("UNAVAILABLE")),
            ("[AUTHENTICATIONFAILED] Too many failures", ServerAnswer::Refusal, None),
            ("[limit] x", ServerAnswer::Fault(ServerFault::UserLimit), None),
            ("Maximum number of connections exceeded", ServerAnswer::Fault(ServerFault::UserLimit), Some("LIMIT")),
            ("", ServerAnswer::Fault(ServerFault::Bye), Some("UNAVAILABLE")),
        ] {
            assert_eq!(classify_bye(text.as_bytes(), &[]), ClassifiedRefusal { answer, code }, "{text}");
        }
    }

    #[test]
    fn what_the_client_gets_is_one_bounded_line() {
        assert_eq!(refusal("a", b"[ALERT] Full", Some("LIMIT")), b"a NO [LIMIT] Full\r\n");
        assert_eq!(refusal("a", b"[CODE x] y\rz\0", None), b"a NO [CODE x] y z \r\n");
        assert_eq!(refusal("a", b"", Some("X")), b"a NO [X] Authentication failed.\r\n");
        let long = refusal("a", "ö".repeat(1000).as_bytes(), None);
        assert!(long.len() <= MAX_TEXT + 10 && std::str::from_utf8(&long).is_ok());
        assert_eq!(bad("a", b""), b"a BAD Authentication aborted.\r\n");
    }

    #[test]
    fn excerpts_are_short_and_escaped() {
        assert_eq!(excerpt(b"220 host ESMTP\t\x1b[2J"), r#""220 host ESMTP\t\u{1b}[2J""#);
        let long = excerpt(&[b'x'; 200]);
        assert_eq!(long, format!("\"{}\"…", "x".repeat(80)));
    }

    #[test]
    fn excerpts_contain_no_secret() {
        let (user, password) = (UserName::new(b"alice").unwrap(), Secret::new(b"hunter2!".to_vec()));
        let login = ServerLogin::Password(PasswordLogin { user: &user, authzid: None, password: &password });
        let base64 = sasl::plain_response(&PasswordLogin { user: &user, authzid: None, password: &password });
        let base64 = String::from_utf8_lossy(&base64[..12]).into_owned();
        for repeated in [
            "BAD LOGIN alice hunter2!",
            "BAD Unknown HUNT",
            "BAD \"ter2\"",
            &format!("BAD AUTHENTICATE PLAIN {base64}"),
        ] {
            assert_eq!(excerpt_after(repeated.as_bytes(), &login), WITHHELD, "{repeated}");
        }
        assert_eq!(excerpt_after(b"NO Too many for ALICE hun", &login), r#""NO Too many for (user) hun""#);
        // Bytes beyond the excerpt are searched too, because replacing a name can move them into it.
        let late = format!("{}hunter2!", "alice ".repeat(20));
        assert_eq!(excerpt_after(late.as_bytes(), &login), WITHHELD);
        let short = Secret::new(b"x".to_vec());
        let login = ServerLogin::Password(PasswordLogin { user: &user, authzid: None, password: &short });
        assert_eq!(excerpt_after(b"NO maximum exceeded", &login), WITHHELD);
        let bob = UserName::new(b"bob").unwrap();
        let token = Secret::new(b"user=alice\x01auth=Bearer abcdefghijkl\x01\x01".to_vec());
        let login = ServerLogin::Relayed {
            mechanism: RelayedMechanism::XOauth2,
            first: &token,
            user: &user,
            authzid: Some(&bob),
        };
        assert_eq!(excerpt_after(b"BAD token efghijkl", &login), WITHHELD);
        assert_eq!(excerpt_after(b"BAD no authentication", &login), "\"BAD no authentication\"");
        // Names are shorter than the parts of the message that are searched for.
        assert_eq!(excerpt_after(b"NO alice is not Bob", &login), r#""NO (user) is not (user)""#);
    }
}
