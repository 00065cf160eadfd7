//! The tag of a client's command.

use std::fmt;

/// Maximum length of a tag, as in Dovecot: echoing longer tags would help cross-protocol attacks.
const MAX: usize = 126;

/// A tag of 1 to 126 characters that RFC 9051 allows (ASTRING-CHAR without `+`), which is safe to echo.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tag(Box<str>);

impl Tag {
    /// Validates `bytes`; returns `None` if they are not a tag.
    pub fn new(bytes: &[u8]) -> Option<Self> {
        let allowed = |byte: &u8| byte.is_ascii_graphic() && !br#"(){%*"\+"#.contains(byte);
        if bytes.is_empty() || bytes.len() > MAX || !bytes.iter().all(allowed) {
            return None;
        }
        std::str::from_utf8(bytes).ok().map(|text| Self(text.into()))
    }

    /// The tag as the client sent it.
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
    fn tag_accepts_exactly_the_grammar() {
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
