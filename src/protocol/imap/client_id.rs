//! The client's ID (RFC 2971), which is passed on because some servers require one.

use super::framing::LiteralLimits;

/// Maximum number of fields (RFC 2971 section 3.3).
pub(super) const MAX_ID_PAIRS: usize = 30;
const MAX_KEY: usize = 30;
const MAX_VALUE: usize = 1024;
/// Limits of the literals in an ID: new versions of Outlook send every value as a literal.
pub(super) const LITERALS: LiteralLimits =
    LiteralLimits { count: 2 * MAX_ID_PAIRS as u32, bytes: MAX_ID_PAIRS * (MAX_KEY + MAX_VALUE) };

/// Key and value of a field; the value may be NIL.
pub type IdPair = (Vec<u8>, Option<Vec<u8>>);

/// Fields that are safe to pass on: within the limits, quotable, and not among those with which a proxy describes its client.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ClientId {
    pairs: Vec<IdPair>,
    ttl: Option<u8>,
}

impl ClientId {
    /// Removes fields that must not be passed on. Keys that begin with `x-` are removed because servers that trust the proxy
    /// would believe them.
    pub(super) fn new(pairs: impl IntoIterator<Item = IdPair>) -> Self {
        let mut id = Self::empty();
        for (key, value) in pairs {
            if key.eq_ignore_ascii_case(b"x-proxy-ttl") {
                // Accepted from any client, because it can only cause the client's own login to be refused.
                let ttl = value.as_deref().and_then(|value| std::str::from_utf8(value).ok()?.parse().ok());
                id.ttl = Some(ttl.unwrap_or(0));
            } else if may_pass(&key, value.as_deref()) {
                id.pairs.push((key, value));
            }
        }
        id
    }

    /// The ID of a client that has sent none.
    pub(super) const fn empty() -> Self {
        Self { pairs: Vec::new(), ttl: None }
    }

    /// How many more proxies may follow, if the client is a proxy that sends it.
    pub fn ttl(&self) -> Option<u8> {
        self.ttl
    }

    /// Memory that the fields take, in bytes.
    pub(super) fn size(&self) -> usize {
        let pair = |(key, value): &IdPair| size_of::<IdPair>() + key.len() + value.as_ref().map_or(0, Vec::len);
        self.pairs.iter().map(pair).sum()
    }

    /// The client's fields that may be passed on.
    pub fn pairs(&self) -> &[IdPair] {
        &self.pairs
    }
}

fn may_pass(key: &[u8], value: Option<&[u8]>) -> bool {
    let quotable = |bytes: &[u8]| bytes.iter().all(|byte| (b' '..0x7f).contains(byte));
    let is_reserved = key.get(..2).is_some_and(|start| start.eq_ignore_ascii_case(b"x-"));
    !key.is_empty()
        && !is_reserved
        && key.len() <= MAX_KEY
        && quotable(key)
        && value.is_none_or(|value| value.len() <= MAX_VALUE && quotable(value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn client_id_keeps_only_fields_that_may_be_passed_on() {
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
        for (value, ttl) in [("3", 3), ("0", 0), ("many", 0), ("-1", 0), ("300", 0)] {
            assert_eq!(ClientId::new([pair("X-Proxy-TTL", value)]).ttl(), Some(ttl), "{value}");
        }
    }
}
