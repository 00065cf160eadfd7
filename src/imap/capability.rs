//! Capability lists: what the proxy advertises, what a server said, and what of that a logged-in client is told.

use std::hash::{DefaultHasher, Hash as _, Hasher as _};

use super::prelogin::Transport;
use crate::identity::{Mechanism, Mechanisms};

/// What the proxy itself can do before login; the server says after login what it can do (RFC 3501 section 6.1.1).
pub(super) fn before_login(transport: Transport, mechanisms: Mechanisms) -> String {
    let mut list = "IMAP4rev1 SASL-IR LITERAL+ ID ENABLE".to_owned();
    if transport == Transport::StartTls {
        list.push_str(" STARTTLS LOGINDISABLED");
        return list;
    }
    for mechanism in mechanisms.iter().map(Mechanism::sasl_name).filter(|name| !name.is_empty()) {
        list.push_str(" AUTH=");
        list.push_str(mechanism);
    }
    if !mechanisms.has(Mechanism::Login) {
        list.push_str(" LOGINDISABLED");
    }
    list
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

    /// A number that changes with the list.
    pub(super) fn fingerprint(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        self.0.hash(&mut hasher);
        hasher.finish()
    }

    /// Mechanisms that the server offers.
    pub(super) fn mechanisms(&self) -> Mechanisms {
        let names = self.0.iter().filter_map(|word| {
            let (start, name) = word.split_at_checked(5)?;
            start.eq_ignore_ascii_case(b"AUTH=").then(|| Mechanism::by_sasl_name(name)).flatten()
        });
        let offered: Mechanisms = names.collect();
        if self.has("LOGINDISABLED") { offered } else { offered.with(Mechanism::Login) }
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
        let list = before_login(Transport::StartTls, Mechanisms::PASSWORDS);
        assert!(list.contains("LOGINDISABLED") && list.contains("STARTTLS") && !list.contains("AUTH="));
        let list = before_login(Transport::Tls, Mechanisms::PASSWORDS);
        assert_eq!(list, "IMAP4rev1 SASL-IR LITERAL+ ID ENABLE AUTH=PLAIN AUTH=LOGIN");
        let list = before_login(Transport::Tls, [Mechanism::XOauth2].into_iter().collect());
        assert_eq!(list, "IMAP4rev1 SASL-IR LITERAL+ ID ENABLE AUTH=XOAUTH2 LOGINDISABLED");
    }

    #[test]
    fn what_a_server_offers() {
        let list = Capabilities::new(b"IMAP4rev1 AUTH=PLAIN auth=scram-sha-256 AUTH=SCRAM-SHA-256-PLUS LOGINDISABLED");
        let names: Vec<&str> = list.mechanisms().iter().map(Mechanism::sasl_name).collect();
        assert_eq!(names, ["PLAIN", "SCRAM-SHA-256"]);
        assert!(Capabilities::new(b"IMAP4rev1").mechanisms().has(Mechanism::Login));
    }
}
