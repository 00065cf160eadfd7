//! Parses the arguments of a complete command: astrings, and the list of ID.
//!
//! It is as liberal as real clients require: an atom may contain any printable character except the specials that end it, and
//! quoted strings may contain 8-bit characters. It is strict otherwise: a quoted string must be terminated, and only spaces may
//! follow the last argument. Values are wiped when dropped, because each of them may be a password.

use zeroize::Zeroizing;

use crate::protocol::imap::framing::{literal_header, without_line_end};

/// The arguments do not match the grammar.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct MalformedArguments;

/// The bytes of an argument.
pub(super) type Value = Zeroizing<Vec<u8>>;

/// The rest of a command that is not parsed yet.
#[derive(Debug, Clone, Copy)]
pub(super) struct Arguments<'a>(&'a [u8]);

impl<'a> Arguments<'a> {
    /// Starts with `bytes`, which end with the command's line end.
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self(without_line_end(bytes))
    }

    /// Takes the word up to the next space, which is empty at the end.
    pub(super) fn word(&mut self) -> &'a [u8] {
        self.skip_spaces();
        let end = self.0.iter().position(|byte| matches!(byte, b' ' | b'\r' | b'\n')).unwrap_or(self.0.len());
        let (word, rest) = self.0.split_at(end);
        self.0 = rest;
        word
    }

    /// Takes an atom, a quoted string or a literal, after at least one space.
    pub(super) fn astring(&mut self) -> Result<Value, MalformedArguments> {
        self.space()?;
        match self.0.first().ok_or(MalformedArguments)? {
            b'"' => self.quoted(),
            b'{' => self.literal(),
            _ => self.atom(),
        }
    }

    /// Takes the list of ID: pairs of a string and a string or NIL. NIL and `()` are empty lists (RFC 2971 section 3.1).
    pub(super) fn id_fields(&mut self, max: usize) -> Result<Vec<(Value, Option<Value>)>, MalformedArguments> {
        self.space()?;
        if let Some(rest) = strip_prefix_ignoring_case(self.0, b"NIL") {
            self.0 = rest;
            return Ok(Vec::new());
        }
        self.0 = self.0.strip_prefix(b"(").ok_or(MalformedArguments)?;
        let mut pairs = Vec::new();
        loop {
            self.skip_spaces();
            if let Some(rest) = self.0.strip_prefix(b")") {
                self.0 = rest;
                return Ok(pairs);
            }
            if pairs.len() == max {
                return Err(MalformedArguments);
            }
            let key = self.string()?;
            self.space()?;
            let value = match strip_prefix_ignoring_case(self.0, b"NIL") {
                Some(rest) => {
                    self.0 = rest;
                    None
                }
                None => Some(self.string()?),
            };
            pairs.push((key, value));
        }
    }

    /// Checks that only spaces are left.
    pub(super) fn end(mut self) -> Result<(), MalformedArguments> {
        self.skip_spaces();
        if self.0.is_empty() { Ok(()) } else { Err(MalformedArguments) }
    }

    fn string(&mut self) -> Result<Value, MalformedArguments> {
        match self.0.first().ok_or(MalformedArguments)? {
            b'"' => self.quoted(),
            b'{' => self.literal(),
            _ => Err(MalformedArguments),
        }
    }

    fn space(&mut self) -> Result<(), MalformedArguments> {
        let before = self.0.len();
        self.skip_spaces();
        if self.0.len() < before { Ok(()) } else { Err(MalformedArguments) }
    }

    fn skip_spaces(&mut self) {
        let spaces = self.0.iter().take_while(|byte| **byte == b' ').count();
        self.0 = &self.0[spaces..];
    }

    fn atom(&mut self) -> Result<Value, MalformedArguments> {
        let ends = |byte: &u8| *byte <= b' ' || *byte == 0x7f || matches!(byte, b'(' | b')' | b'{' | b'"' | b'\\');
        let end = self.0.iter().position(ends).unwrap_or(self.0.len());
        let (atom, rest) = self.0.split_at(end);
        if atom.is_empty() || rest.first().is_some_and(|byte| *byte != b' ') {
            return Err(MalformedArguments);
        }
        self.0 = rest;
        Ok(Zeroizing::new(atom.to_vec()))
    }

    fn quoted(&mut self) -> Result<Value, MalformedArguments> {
        // Allocated by the length of the string, because each of many strings would otherwise take the size of the command.
        let mut value = Zeroizing::new(Vec::with_capacity(quoted_length(self.0)));
        let mut bytes = self.0.iter().enumerate().skip(1);
        while let Some((index, byte)) = bytes.next() {
            match byte {
                b'"' => {
                    self.0 = &self.0[index + 1..];
                    return self.separated().map(|()| value);
                }
                // A backslash escapes the next byte. RFC 3501 allows only \" and \\; old clients escape others too.
                b'\\' => value.push(*bytes.next().ok_or(MalformedArguments)?.1),
                b'\r' | b'\n' | 0 => return Err(MalformedArguments),
                other => value.push(*other),
            }
        }
        Err(MalformedArguments)
    }

    fn literal(&mut self) -> Result<Value, MalformedArguments> {
        let line_end = self.0.iter().position(|byte| *byte == b'\n').ok_or(MalformedArguments)? + 1;
        let (line, rest) = self.0.split_at(line_end);
        // The line must consist of the literal's header.
        let size = literal_header(line)
            .filter(|_| line.iter().filter(|byte| **byte == b'{').count() == 1)
            .ok_or(MalformedArguments)?
            .size;
        if rest.len() < size {
            return Err(MalformedArguments);
        }
        let (value, rest) = rest.split_at(size);
        // RFC 9051 section 9 allows no NUL in literals and quoted strings.
        if value.contains(&0) {
            return Err(MalformedArguments);
        }
        self.0 = rest;
        self.separated().map(|()| Zeroizing::new(value.to_vec()))
    }

    /// Checks that a space, the end of the list or the end of the command follows a string.
    fn separated(&self) -> Result<(), MalformedArguments> {
        match self.0.first() {
            None | Some(b' ' | b')') => Ok(()),
            Some(_) => Err(MalformedArguments),
        }
    }
}

/// Upper bound of the number of bytes in a quoted string.
fn quoted_length(string: &[u8]) -> usize {
    let mut escaped = false;
    let ends = |byte: &u8| {
        let ends = *byte == b'"' && !escaped;
        escaped = *byte == b'\\' && !escaped;
        ends
    };
    string.iter().skip(1).position(ends).unwrap_or(string.len())
}

fn strip_prefix_ignoring_case<'a>(bytes: &'a [u8], prefix: &[u8]) -> Option<&'a [u8]> {
    let (start, rest) = bytes.split_at_checked(prefix.len())?;
    start.eq_ignore_ascii_case(prefix).then_some(rest)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn two(bytes: &[u8]) -> Result<(Vec<u8>, Vec<u8>), MalformedArguments> {
        let mut arguments = Arguments::new(bytes);
        let pair = (arguments.astring()?.to_vec(), arguments.astring()?.to_vec());
        arguments.end().map(|()| pair)
    }

    #[test]
    fn arguments_are_parsed_in_every_form() {
        for (input, first, second) in [
            (&b" user pass\r\n"[..], &b"user"[..], &b"pass"[..]),
            (b" user  p*s%s]#+  \n", b"user", b"p*s%s]#+"),
            (b" \"us er\" \"\"\r\n", b"us er", b""),
            (br#" "a\"b" "c\\d\e""#, b"a\"b", b"c\\de"),
            (b" \"\xc3\xa4\" \xff\xfe\r\n", b"\xc3\xa4", b"\xff\xfe"),
            (b" {4}\r\nus\r\n {3+}\r\n{5}\r\n", b"us\r\n", b"{5}"),
            (b" {0}\r\n {1+}\nx\r\n", b"", b"x"),
        ] {
            assert_eq!(two(input), Ok((first.to_vec(), second.to_vec())), "{}", input.escape_ascii());
        }
    }

    #[test]
    fn invalid_arguments_are_refused() {
        for input in [
            &b"\r\n"[..],
            b" user\r\n",
            b"user pass\r\n",
            b" user pass more\r\n",
            b" (user) pass\r\n",
            b" user \"pass\r\n",
            b" \"user\"pass\r\n",
            b" user pa\"ss\r\n",
            b" user pa\\ss\r\n",
            b" user \"a\\\r\n",
            b" us\0er pass\r\n",
            b" us\x7fer pass\r\n",
            b" \"us\0er\" pass\r\n",
            b" user {5}\r\npas\r\n",
            b" user {2}\r\npass\r\n",
            b" user x{2}\r\nab\r\n",
            b" {3x}\r\nabc pass\r\n",
            b" user {2}\r\na\0\r\n",
            b" {2}\r\na\0 pass\r\n",
            b" user a(b\r\n",
        ] {
            assert_eq!(two(input), Err(MalformedArguments), "{}", input.escape_ascii());
        }
    }

    #[test]
    fn quoted_string_allocates_no_more_than_its_size() {
        let long = [&br#" "a\"b\\" "c" "#[..], &[b'x'; 10_000], b"\r\n"].concat();
        let mut arguments = Arguments::new(&long);
        for (expected, max) in [(&b"a\"b\\"[..], 6), (b"c", 1)] {
            let value = arguments.astring().unwrap();
            assert_eq!(&value[..], expected);
            assert!(value.capacity() <= max.max(8), "{}", value.capacity());
        }
    }

    #[test]
    fn id_fields_are_parsed() {
        let read = |bytes: &[u8]| {
            let mut arguments = Arguments::new(bytes);
            let pairs = arguments.id_fields(2)?;
            arguments.end()?;
            Ok(pairs
                .into_iter()
                .map(|(key, value)| (key.to_vec(), value.map(|value| value.to_vec())))
                .collect::<Vec<_>>())
        };
        assert_eq!(read(b" NIL\r\n"), Ok(vec![]));
        assert_eq!(read(b" ( )\r\n"), Ok(vec![]));
        let pair = |key: &str, value: Option<&str>| (key.into(), value.map(|value| value.as_bytes().to_vec()));
        assert_eq!(read(b" (\"name\" \"x\" {2+}\r\nos nil)\r\n"), Ok(vec![pair("name", Some("x")), pair("os", None)]));
        for bad in [
            &b" (\"a\")\r\n"[..],
            b" (\"a\" b)\r\n",
            b" (\"a\" \"b\"\r\n",
            b" ((\"a\" \"b\"))\r\n",
            b" x\r\n",
            b" (\"a\" NIL \"b\" NIL \"c\" NIL)\r\n",
        ] {
            assert_eq!(read(bad), Err(MalformedArguments), "{}", bad.escape_ascii());
        }
    }
}
