//! The client's own ID (RFC 2971): kept for the server, which some servers insist on.

/// RFC 2971 section 3.3.
pub(super) const MAX_PAIRS: usize = 30;
const MAX_KEY: usize = 30;
const MAX_VALUE: usize = 1024;

/// Key and value of one pair; the value may be NIL.
pub type Pair = (Vec<u8>, Option<Vec<u8>>);

/// Pairs that are safe to send on: within the limits, quotable, and none that a proxy uses to tell about the client.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ClientId(Vec<Pair>);

impl ClientId {
    /// Keeps what may be sent on. Keys that begin with `x-` are left out: servers that trust us would believe them.
    pub(super) fn new(pairs: impl IntoIterator<Item = Pair>) -> Self {
        Self(pairs.into_iter().filter(|(key, value)| may_pass(key, value.as_deref())).collect())
    }

    /// Of a client that has said nothing.
    pub(super) const fn empty() -> Self {
        Self(Vec::new())
    }

    /// What is left of the client's pairs.
    pub fn pairs(&self) -> &[Pair] {
        &self.0
    }
}

fn may_pass(key: &[u8], value: Option<&[u8]>) -> bool {
    let quotable = |bytes: &[u8]| bytes.iter().all(|byte| (b' '..0x7f).contains(byte));
    let ours = key.get(..2).is_some_and(|start| start.eq_ignore_ascii_case(b"x-"));
    !key.is_empty()
        && !ours
        && key.len() <= MAX_KEY
        && quotable(key)
        && value.is_none_or(|value| value.len() <= MAX_VALUE && quotable(value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_clients_own_words_pass() {
        let pair = |key: &str, value: &str| (key.as_bytes().to_vec(), Some(value.as_bytes().to_vec()));
        let id = ClientId::new([
            pair("name", "Thunderbird"),
            pair("X-Originating-IP", "192.0.2.1"),
            pair("x-", ""),
            pair("", "x"),
            pair("vendor", "M\u{fc}ller"),
            pair("os", "a\r\nb"),
            pair(&"k".repeat(31), "x"),
            pair("long", &"v".repeat(1025)),
            (b"os".to_vec(), None),
        ]);
        assert_eq!(id.pairs(), [pair("name", "Thunderbird"), (b"os".to_vec(), None)]);
    }
}
