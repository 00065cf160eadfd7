//! The client's own ID (RFC 2971): kept for the server, which some servers insist on.

use super::framing::LiteralLimits;

/// RFC 2971 section 3.3.
pub(super) const MAX_ID_PAIRS: usize = 30;
const MAX_KEY: usize = 30;
const MAX_VALUE: usize = 1024;
/// LiteralLimits of an ID: new versions of Outlook write every value as one.
pub(super) const LITERALS: LiteralLimits =
    LiteralLimits { count: 2 * MAX_ID_PAIRS as u32, bytes: MAX_ID_PAIRS * (MAX_KEY + MAX_VALUE) };

/// Key and value of one pair; the value may be NIL.
pub type IdPair = (Vec<u8>, Option<Vec<u8>>);

/// Pairs that are safe to send on: within the limits, quotable, and none that a proxy uses to tell about the client.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ClientId {
    pairs: Vec<IdPair>,
    ttl: Option<u8>,
}

impl ClientId {
    /// Keeps what may be sent on. Keys that begin with `x-` are left out: servers that trust us would believe them.
    pub(super) fn new(pairs: impl IntoIterator<Item = IdPair>) -> Self {
        let mut id = Self::empty();
        for (key, value) in pairs {
            if key.eq_ignore_ascii_case(b"x-proxy-ttl") {
                // Anybody may say it: who does can only bring itself closer to a refusal.
                let ttl = value.as_deref().and_then(|value| std::str::from_utf8(value).ok()?.parse().ok());
                id.ttl = Some(ttl.unwrap_or(0));
            } else if may_pass(&key, value.as_deref()) {
                id.pairs.push((key, value));
            }
        }
        id
    }

    /// Of a client that has said nothing.
    pub(super) const fn empty() -> Self {
        Self { pairs: Vec::new(), ttl: None }
    }

    /// How many more proxies may follow, where the client is one and says so.
    pub fn ttl(&self) -> Option<u8> {
        self.ttl
    }

    /// Bytes of memory that the pairs take.
    pub(super) fn size(&self) -> usize {
        let pair = |(key, value): &IdPair| size_of::<IdPair>() + key.len() + value.as_ref().map_or(0, Vec::len);
        self.pairs.iter().map(pair).sum()
    }

    /// What is left of the client's pairs.
    pub fn pairs(&self) -> &[IdPair] {
        &self.pairs
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
        assert_eq!(id.ttl(), None);
        for (said, heard) in [("3", 3), ("0", 0), ("many", 0), ("-1", 0), ("300", 0)] {
            assert_eq!(ClientId::new([pair("X-Proxy-TTL", said)]).ttl(), Some(heard), "{said}");
        }
    }
}
