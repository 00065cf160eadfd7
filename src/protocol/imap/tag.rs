//! The tag of a client's command.

use std::fmt;

/// Longer tags are refused, as Dovecot does: echoing them would help cross-protocol attacks.
const MAX: usize = 126;

/// 1 to 126 characters that RFC 9051 allows in a tag: ASTRING-CHAR without `+`. Safe to send back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tag(Box<str>);

impl Tag {
    /// Checks `bytes`; `None` where they are no tag.
    pub fn new(bytes: &[u8]) -> Option<Self> {
        let allowed = |byte: &u8| byte.is_ascii_graphic() && !br#"(){%*"\+"#.contains(byte);
        if bytes.is_empty() || bytes.len() > MAX || !bytes.iter().all(allowed) {
            return None;
        }
        std::str::from_utf8(bytes).ok().map(|text| Self(text.into()))
    }

    /// As the client sent it.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Tag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_of_the_grammar_and_no_others() {
        for good in ["a", "A0001", "a:b", "a/b", "a=b", "a]b", "1.2-3_4", &"x".repeat(126)] {
            assert!(Tag::new(good.as_bytes()).is_some(), "{good}");
        }
        for bad in [
            "",
            "*",
            "+",
            "a+b",
            "a b",
            "a\"b",
            "a\\b",
            "a(b",
            "a{5}",
            "a%",
            "a\0",
            "a\x7f",
            "\u{e4}",
            &"x".repeat(127),
        ] {
            assert!(Tag::new(bad.as_bytes()).is_none(), "{bad:?}");
        }
    }
}
