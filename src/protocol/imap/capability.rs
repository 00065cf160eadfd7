//! Capability lists: what the proxy advertises before login, what a server advertises, and what a client receives after login.

use std::hash::{DefaultHasher, Hash as _, Hasher as _};

use crate::identity::{Mechanism, Mechanisms};

/// How far the connection can be trusted with a password.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// Plaintext, on which the operator allows logins.
    Plain,
    /// Plaintext that must be upgraded by STARTTLS before a login.
    StartTls,
    /// TLS.
    Tls,
}

/// The part of a server's capabilities that affects what the proxy advertises before login.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ServerCapabilities {
    /// Mechanisms that may be offered to clients.
    pub mechanisms: Mechanisms,
    /// Extensions that may be advertised to clients.
    pub extensions: Extensions,
}

/// Returns the capabilities that a client receives before login: those of the proxy, and the extensions that all servers support.
/// After the login the client receives its server's list (RFC 3501 section 6.1.1).
pub(super) fn before_login(transport: Transport, mechanisms: Mechanisms, extensions: Extensions) -> String {
    let mut list = "IMAP4rev1 SASL-IR LITERAL+ ID ENABLE".to_owned();
    for extension in extensions.iter() {
        list.push(' ');
        list.push_str(extension);
    }
    if transport == Transport::StartTls {
        list.push_str(" STARTTLS LOGINDISABLED");
        return list;
    }
    for mechanism in mechanisms.iter().filter_map(Mechanism::sasl_name) {
        list.push_str(" AUTH=");
        list.push_str(mechanism);
    }
    if !mechanisms.has(Mechanism::Login) {
        list.push_str(" LOGINDISABLED");
    }
    list
}

/// The extensions that the proxy advertises before login if all servers support them: they have no effect before or during the
/// login, and are the same for every user. It does not contain extensions of the proxy itself (SASL-IR, LITERAL+, ID, ENABLE),
/// extensions about the login or the connection (AUTH=, STARTTLS, LOGINDISABLED, LOGIN-REFERRALS, UNAUTHENTICATE, COMPRESS=), other
/// base protocols (IMAP4rev2, UTF8=, LITERAL-), and extensions that depend on the user or have parameters (ACL, RIGHTS=,
/// APPENDLIMIT=, THREAD=, CONTEXT=, and names that begin with X).
const ADVERTISED: [&str; 28] = [
    "IDLE",
    "UIDPLUS",
    "MOVE",
    "NAMESPACE",
    "CHILDREN",
    "UNSELECT",
    "SPECIAL-USE",
    "CREATE-SPECIAL-USE",
    "LIST-EXTENDED",
    "LIST-STATUS",
    "STATUS=SIZE",
    "CONDSTORE",
    "QRESYNC",
    "ESEARCH",
    "SEARCHRES",
    "WITHIN",
    "SORT",
    "SORT=DISPLAY",
    "BINARY",
    "MULTIAPPEND",
    "CATENATE",
    "REPLACE",
    "QUOTA",
    "METADATA",
    "NOTIFY",
    "OBJECTID",
    "SAVEDATE",
    "PREVIEW",
];

/// A set of the extensions that may be advertised before login.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Extensions(u32);

impl Extensions {
    /// No extension.
    pub const NONE: Self = Self(0);
    /// All extensions that may be advertised.
    pub const ALL: Self = Self((1 << ADVERTISED.len()) - 1);

    /// The extensions in both sets.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// The set as a number, which can be stored in an atomic.
    pub fn to_bits(self) -> u32 {
        self.0
    }

    /// The set that [`Extensions::to_bits`] returned as `bits`.
    pub fn from_bits(bits: u32) -> Self {
        Self(bits).and(Self::ALL)
    }

    /// The names, in a fixed order.
    pub fn iter(self) -> impl Iterator<Item = &'static str> {
        ADVERTISED.into_iter().enumerate().filter(move |(index, _)| self.0 & 1 << index != 0).map(|(_, name)| name)
    }
}

/// The words of a server's capability list.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct CapabilityList(Vec<Vec<u8>>);

impl CapabilityList {
    /// Parses words separated by spaces.
    pub(super) fn new(words: &[u8]) -> Self {
        Self(words.split(|byte| *byte == b' ').filter(|word| !word.is_empty()).map(<[u8]>::to_vec).collect())
    }

    /// Parses the list in the response code `[CAPABILITY …]` at the start of a status text.
    pub(super) fn from_code(text: &[u8]) -> Option<Self> {
        let (code, arguments, _) = code(text)?;
        code.eq_ignore_ascii_case(b"CAPABILITY").then(|| Self::new(arguments))
    }

    /// Whether the list contains `word`, in any letter case.
    pub(super) fn has(&self, word: &str) -> bool {
        self.0.iter().any(|other| other.eq_ignore_ascii_case(word.as_bytes()))
    }

    /// Returns a hash of the list, by which a change is noticed.
    pub(super) fn fingerprint(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        self.0.hash(&mut hasher);
        hasher.finish()
    }

    /// The mechanisms that the server offers.
    pub(super) fn mechanisms(&self) -> Mechanisms {
        let names = self.0.iter().filter_map(|word| {
            let (start, name) = word.split_at_checked(5)?;
            start.eq_ignore_ascii_case(b"AUTH=").then(|| Mechanism::by_sasl_name(name)).flatten()
        });
        let offered: Mechanisms = names.collect();
        if self.has("LOGINDISABLED") { offered } else { offered.with(Mechanism::Login) }
    }

    /// The part of the list that affects what the proxy advertises.
    pub(super) fn server_capabilities(&self) -> ServerCapabilities {
        ServerCapabilities { mechanisms: self.offerable(), extensions: self.extensions() }
    }

    /// The server's mechanisms that the proxy may offer to clients. A SCRAM mechanism whose `-PLUS` variant the server offers is
    /// excluded: a client that supports channel binding would report that it saw no `-PLUS` (`y,,`), which the server must refuse as
    /// a downgrade attack (RFC 5802 section 6).
    fn offerable(&self) -> Mechanisms {
        let has_channel_binding =
            |mechanism: Mechanism| mechanism.sasl_name().is_some_and(|name| self.has(&format!("AUTH={name}-PLUS")));
        self.mechanisms().iter().filter(|mechanism| !has_channel_binding(*mechanism)).collect()
    }

    /// The server's extensions among those that may be advertised before login.
    fn extensions(&self) -> Extensions {
        let listed = ADVERTISED.into_iter().enumerate().filter(|(_, name)| self.has(name));
        Extensions(listed.fold(0, |bits, (index, _)| bits | 1 << index))
    }

    /// Returns the list for a client that has logged in: without capabilities that apply only before login, and without
    /// UNAUTHENTICATE, after which the client could log in as a user of another backend.
    pub(super) fn after_login(&self) -> Vec<u8> {
        let words: Vec<&[u8]> = self.0.iter().map(Vec::as_slice).filter(|word| holds_after_login(word)).collect();
        words.join(&b' ')
    }
}

fn holds_after_login(word: &[u8]) -> bool {
    let only_before = ["STARTTLS", "LOGINDISABLED", "SASL-IR", "LOGIN-REFERRALS", "UNAUTHENTICATE"];
    let auth = word.get(..5).is_some_and(|start| start.eq_ignore_ascii_case(b"AUTH="));
    !auth && !only_before.iter().any(|other| word.eq_ignore_ascii_case(other.as_bytes()))
}

/// Splits `[CODE arguments] text` at the start of a status text into code, arguments and text.
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
    fn response_code_is_split_from_its_arguments_and_text() {
        assert_eq!(code(b"[INUSE] busy"), Some((&b"INUSE"[..], &b""[..], &b"busy"[..])));
        assert_eq!(code(b"[CAPABILITY A B]"), Some((&b"CAPABILITY"[..], &b"A B"[..], &b""[..])));
        for none in [&b"text [A] more"[..], b"[open", b""] {
            assert_eq!(code(none), None);
        }
    }

    #[test]
    fn list_after_login_has_no_login_capabilities() {
        let list =
            CapabilityList::new(b"IMAP4rev1  auth=PLAIN AUTH=LOGIN starttls IDLE LOGINDISABLED UNAUTHENTICATE SASL-IR");
        assert!(list.has("StartTLS") && list.has("AUTH=plain") && !list.has("AUTH"));
        assert_eq!(list.after_login(), b"IMAP4rev1 IDLE");
    }

    #[test]
    fn list_before_tls_offers_no_login() {
        let list = before_login(Transport::StartTls, Mechanisms::PASSWORDS, Extensions::default());
        assert!(list.contains("LOGINDISABLED") && list.contains("STARTTLS") && !list.contains("AUTH="));
        let list = before_login(Transport::Tls, Mechanisms::PASSWORDS, Extensions::default());
        assert_eq!(list, "IMAP4rev1 SASL-IR LITERAL+ ID ENABLE AUTH=PLAIN AUTH=LOGIN");
        let list = before_login(Transport::Tls, [Mechanism::XOauth2].into_iter().collect(), Extensions::default());
        assert_eq!(list, "IMAP4rev1 SASL-IR LITERAL+ ID ENABLE AUTH=XOAUTH2 LOGINDISABLED");
    }

    #[test]
    fn mechanisms_are_read_from_a_servers_list() {
        let list =
            CapabilityList::new(b"IMAP4rev1 AUTH=PLAIN auth=scram-sha-256 AUTH=SCRAM-SHA-256-PLUS LOGINDISABLED");
        let names: Vec<&str> = list.mechanisms().iter().filter_map(Mechanism::sasl_name).collect();
        assert_eq!(names, ["PLAIN", "SCRAM-SHA-256"]);
        assert!(CapabilityList::new(b"IMAP4rev1").mechanisms().has(Mechanism::Login));
    }

    #[test]
    fn scram_with_channel_binding_at_the_server_is_not_offered() {
        let list = CapabilityList::new(b"AUTH=SCRAM-SHA-1 AUTH=SCRAM-SHA-256 auth=scram-sha-256-plus LOGINDISABLED");
        let names: Vec<&str> = list.offerable().iter().filter_map(Mechanism::sasl_name).collect();
        assert_eq!(names, ["SCRAM-SHA-1"]);
        assert!(list.mechanisms().has(Mechanism::ScramSha256), "it is relayed if the operator offers it");
    }

    #[test]
    fn extensions_of_all_servers_are_advertised_before_login() {
        let one = CapabilityList::new(
            b"IMAP4rev1 idle MOVE UIDPLUS STARTTLS LOGINDISABLED AUTH=PLAIN COMPRESS=DEFLATE LOGIN-REFERRALS \
              UNAUTHENTICATE LITERAL- IMAP4rev2 UTF8=ACCEPT X-OWN ACL",
        );
        let other = CapabilityList::new(b"IMAP4rev1 IDLE UIDPLUS QUOTA");
        let names: Vec<&str> = one.extensions().iter().collect();
        assert_eq!(names, ["IDLE", "UIDPLUS", "MOVE"]);
        let common = one.extensions().and(other.extensions());
        assert_eq!(Extensions::from_bits(common.to_bits()), common);
        let greeting = |transport| before_login(transport, Mechanisms::PASSWORDS, common);
        assert_eq!(greeting(Transport::Tls), "IMAP4rev1 SASL-IR LITERAL+ ID ENABLE IDLE UIDPLUS AUTH=PLAIN AUTH=LOGIN");
        assert_eq!(
            greeting(Transport::StartTls),
            "IMAP4rev1 SASL-IR LITERAL+ ID ENABLE IDLE UIDPLUS STARTTLS LOGINDISABLED"
        );
        assert_eq!(Extensions::ALL.iter().count(), ADVERTISED.len());
        assert_eq!(Extensions::from_bits(u32::MAX), Extensions::ALL);
    }
}
