//! Capability lists: what the proxy advertises, what a server said, and what of that a logged-in client is told.

use super::prelogin::Transport;

/// What the proxy itself can do before login; the server says after login what it can do (RFC 3501 section 6.1.1).
pub(super) fn before_login(transport: Transport) -> &'static str {
    match transport {
        Transport::StartTls => "IMAP4rev1 SASL-IR LITERAL+ ID ENABLE STARTTLS LOGINDISABLED",
        Transport::Plain | Transport::Tls => "IMAP4rev1 SASL-IR LITERAL+ ID ENABLE AUTH=PLAIN AUTH=LOGIN",
    }
}

/// A server's list.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Capabilities(Vec<Vec<u8>>);

impl Capabilities {
    /// Words separated by spaces.
    pub(super) fn new(words: &[u8]) -> Self {
        Self(words.split(|byte| *byte == b' ').filter(|word| !word.is_empty()).map(<[u8]>::to_vec).collect())
    }

    /// From the text behind `OK `: the list in `[CAPABILITY …]`, if that is its code.
    pub(super) fn from_code(text: &[u8]) -> Option<Self> {
        let (code, arguments, _) = code(text)?;
        code.eq_ignore_ascii_case(b"CAPABILITY").then(|| Self::new(arguments))
    }

    /// Whether `word` is in the list, in any letter case.
    pub(super) fn has(&self, word: &str) -> bool {
        self.0.iter().any(|other| other.eq_ignore_ascii_case(word.as_bytes()))
    }

    /// The list for a client that has logged in: without what holds only before login, and without UNAUTHENTICATE,
    /// behind which the client could log in as a user of another backend.
    pub(super) fn after_login(&self) -> Vec<u8> {
        let kept: Vec<&[u8]> = self.0.iter().map(Vec::as_slice).filter(|word| holds_after_login(word)).collect();
        kept.join(&b' ')
    }
}

fn holds_after_login(word: &[u8]) -> bool {
    let only_before = ["STARTTLS", "LOGINDISABLED", "SASL-IR", "LOGIN-REFERRALS", "UNAUTHENTICATE"];
    let auth = word.get(..5).is_some_and(|start| start.eq_ignore_ascii_case(b"AUTH="));
    !auth && !only_before.iter().any(|other| word.eq_ignore_ascii_case(other.as_bytes()))
}

/// Splits `[CODE arguments] text` at the start of a status text.
pub(super) fn code(text: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let inner = text.strip_prefix(b"[")?;
    let end = inner.iter().position(|byte| *byte == b']')?;
    let (content, rest) = (&inner[..end], &inner[end + 1..]);
    let split = content.iter().position(|byte| *byte == b' ').unwrap_or(content.len());
    let arguments = content.get(split + 1..).unwrap_or_default();
    Some((&content[..split], arguments, rest.strip_prefix(b" ").unwrap_or(rest)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes() {
        assert_eq!(code(b"[INUSE] busy"), Some((&b"INUSE"[..], &b""[..], &b"busy"[..])));
        assert_eq!(code(b"[CAPABILITY A B]"), Some((&b"CAPABILITY"[..], &b"A B"[..], &b""[..])));
        for none in [&b"text [A] more"[..], b"[open", b""] {
            assert_eq!(code(none), None);
        }
    }

    #[test]
    fn a_logged_in_client_is_not_told_how_to_log_in() {
        let list =
            Capabilities::new(b"IMAP4rev1  auth=PLAIN AUTH=LOGIN starttls IDLE LOGINDISABLED UNAUTHENTICATE SASL-IR");
        assert!(list.has("StartTLS") && list.has("AUTH=plain") && !list.has("AUTH"));
        assert_eq!(list.after_login(), b"IMAP4rev1 IDLE");
    }

    #[test]
    fn before_tls_there_is_no_way_to_log_in() {
        let list = before_login(Transport::StartTls);
        assert!(list.contains("LOGINDISABLED") && list.contains("STARTTLS") && !list.contains("AUTH="));
        assert!(!before_login(Transport::Tls).contains("STARTTLS"));
    }
}
