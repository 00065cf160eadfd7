//! Splits input into complete commands and lines with limited sizes, in linear time even if single bytes arrive.
//!
//! The framer owns the buffer, wipes it, and returns the bytes that follow the last command. It recognises lines and literals
//! (RFC 3501 section 4.3, RFC 7888) and no other syntax of IMAP; the caller decides whether a literal is accepted. A bare LF ends
//! a line like CRLF, as in Dovecot.

use zeroize::{Zeroize, Zeroizing};

/// Maximum number of a command's literals, and their maximum total size in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct LiteralLimits {
    pub(super) count: u32,
    pub(super) bytes: usize,
}

impl LiteralLimits {
    /// LOGIN has two literals; a command with more than a few is an attack.
    pub(super) const FEW: Self = Self { count: 4, bytes: usize::MAX };
}

/// A command above this size, which is larger than one read, is moved out of the buffer instead of copied.
const LONG: usize = 4096;

/// What the buffer begins with.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Frame {
    /// An incomplete command.
    Incomplete,
    /// The client waits for a continuation request before it sends a literal: call [`Framer::accept_literal`] or
    /// [`Framer::reject_literal`].
    Literal,
    /// A complete command, which [`Framer::take`] returns.
    Complete,
    /// The line exceeds the limit. Its end is unknown, so the connection must close.
    LineTooLong,
    /// A command's literals exceed the limit of their number or total size.
    LiteralTooLong,
}

/// Whether the buffer begins with a complete line.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum LineFrame {
    Incomplete,
    /// A complete line, which [`Framer::take`] returns.
    Complete,
    /// The line exceeds the limit.
    TooLong,
}

/// Maximum sizes in bytes of what a framer accepts.
#[derive(Debug, Clone, Copy)]
pub(super) struct FrameLimits {
    /// Maximum size of a command or response without its literals.
    pub(super) line: usize,
    /// Maximum total size of a command's literals.
    pub(super) literals: usize,
}

/// The buffer, and the position up to which it has been scanned.
#[derive(Debug)]
pub(super) struct Framer {
    limits: FrameLimits,
    /// Returns the limits of a command's literals; the argument is the beginning of the command.
    literals_of: fn(&[u8]) -> LiteralLimits,
    buffer: Zeroizing<Vec<u8>>,
    /// Index of the first byte of the current command.
    start: usize,
    /// Bytes before this index have been scanned and are not scanned again.
    scanned: usize,
    /// Index of the first byte of the current line.
    line: usize,
    /// Index of the end of the literal that is being read, or that the client waits to send.
    literal_end: Option<usize>,
    waiting: bool,
    literals: u32,
    literal_bytes: usize,
}

impl Framer {
    pub(super) fn new(limits: FrameLimits) -> Self {
        Self {
            limits,
            literals_of: |_| LiteralLimits::FEW,
            buffer: Zeroizing::new(Vec::new()),
            start: 0,
            scanned: 0,
            line: 0,
            literal_end: None,
            waiting: false,
            literals: 0,
            literal_bytes: 0,
        }
    }

    /// Sets the function that returns the limits of a command's literals.
    pub(super) fn with_literals(mut self, literals_of: fn(&[u8]) -> LiteralLimits) -> Self {
        self.literals_of = literals_of;
        self
    }

    /// Appends received bytes.
    pub(super) fn input(&mut self, bytes: &[u8]) {
        self.discard_consumed();
        let capacity = self.capacity_with(bytes.len());
        if capacity > self.buffer.capacity() {
            // Not grown in place, because the previous allocation would not be wiped.
            let mut larger = Zeroizing::new(Vec::with_capacity(capacity));
            larger.extend_from_slice(&self.buffer);
            self.buffer = larger;
        }
        self.buffer.extend_from_slice(bytes);
    }

    /// Size of the buffer's allocation in bytes.
    pub(super) fn capacity(&self) -> usize {
        self.buffer.capacity()
    }

    /// Size of the allocation once `more` bytes have arrived: doubled if it must grow, but not far beyond the limits of a command.
    pub(super) fn capacity_with(&self, more: usize) -> usize {
        let needed = self.buffer.len() - self.start + more;
        let capacity = self.buffer.capacity();
        if needed <= capacity {
            capacity
        } else {
            needed.max((2 * capacity).min(self.limits.line + self.limits.literals))
        }
    }

    /// Looks for the end of a command, literals included.
    pub(super) fn command(&mut self) -> Frame {
        if self.waiting {
            return Frame::Literal;
        }
        loop {
            if let Some(end) = self.literal_end {
                if self.buffer.len() < end {
                    return Frame::Incomplete;
                }
                (self.scanned, self.line, self.literal_end) = (end, end, None);
            }
            match self.line() {
                LineFrame::Complete => {}
                LineFrame::Incomplete => return Frame::Incomplete,
                LineFrame::TooLong => return Frame::LineTooLong,
            }
            let Some(literal) = literal_header(&self.buffer[self.line..self.scanned]) else { return Frame::Complete };
            let allowed = (self.literals_of)(self.partial_command());
            self.literals += 1;
            let bytes = allowed.bytes.min(self.limits.literals);
            if literal.size > bytes.saturating_sub(self.literal_bytes) || self.literals > allowed.count {
                return Frame::LiteralTooLong;
            }
            self.literal_bytes += literal.size;
            self.literal_end = Some(self.scanned + literal.size);
            if literal.synchronising {
                self.waiting = true;
                return Frame::Literal;
            }
        }
    }

    /// Looks for the end of a line, without regard to literals.
    pub(super) fn line(&mut self) -> LineFrame {
        let found = self.buffer[self.scanned..].iter().position(|byte| *byte == b'\n');
        let end = found.map_or(self.buffer.len(), |at| self.scanned + at + 1);
        self.scanned = end;
        if end - self.start - self.literal_bytes > self.limits.line {
            return LineFrame::TooLong;
        }
        if found.is_some() { LineFrame::Complete } else { LineFrame::Incomplete }
    }

    /// Lets the client's literal become part of the command.
    pub(super) fn accept_literal(&mut self) {
        self.waiting = false;
    }

    /// Ends the command before its literal, which the client will not send.
    pub(super) fn reject_literal(&mut self) {
        self.waiting = false;
        self.literal_end = None;
        self.end_command();
    }

    /// What is known of the current command, complete or not.
    pub(super) fn partial_command(&self) -> &[u8] {
        &self.buffer[self.start..self.scanned]
    }

    /// Removes the complete command or line, including its end, and wipes it from the buffer: a client whose login was refused may
    /// stay connected for a long time.
    pub(super) fn take(&mut self) -> Zeroizing<Vec<u8>> {
        if self.scanned - self.start > LONG {
            return self.take_long();
        }
        let command = Zeroizing::new(self.partial_command().to_vec());
        self.buffer[self.start..self.scanned].zeroize();
        self.end_command();
        command
    }

    /// Moves a long command out together with its buffer; the few bytes after it are copied to a new buffer.
    fn take_long(&mut self) -> Zeroizing<Vec<u8>> {
        let rest = Zeroizing::new(self.buffer[self.scanned..].to_vec());
        let mut command = std::mem::replace(&mut self.buffer, rest);
        command.truncate(self.scanned);
        command.drain(..self.start);
        self.scanned = 0;
        self.end_command();
        command
    }

    /// Whether bytes follow the last command taken.
    pub(super) fn has_leftover(&self) -> bool {
        self.start < self.buffer.len()
    }

    /// The first byte of the current command, if it has arrived.
    pub(super) fn first_byte(&self) -> Option<u8> {
        self.buffer.get(self.start).copied()
    }

    /// The bytes that follow the last command taken.
    pub(super) fn into_leftover(self) -> Vec<u8> {
        self.buffer[self.start..].to_vec()
    }

    fn end_command(&mut self) {
        (self.start, self.line) = (self.scanned, self.scanned);
        (self.literals, self.literal_bytes) = (0, 0);
    }

    fn discard_consumed(&mut self) {
        let consumed = self.start;
        if consumed == 0 {
            return;
        }
        let left = self.buffer.len() - consumed;
        self.buffer.copy_within(consumed.., 0);
        self.buffer[left..].zeroize();
        self.buffer.truncate(left);
        (self.start, self.scanned, self.line) = (0, self.scanned - consumed, self.line - consumed);
        self.literal_end = self.literal_end.map(|end| end - consumed);
    }
}

/// The header of a literal, at the end of a line.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct LiteralHeader {
    pub(super) size: usize,
    pub(super) synchronising: bool,
}

/// Parses `{n}` or `{n+}` at the end of `line`, which includes its line end. A size beyond `usize` is replaced by `usize::MAX`, which
/// exceeds every limit.
pub(super) fn literal_header(line: &[u8]) -> Option<LiteralHeader> {
    let inner = without_line_end(line).strip_suffix(b"}")?;
    let (inner, synchronising) = match inner.strip_suffix(b"+") {
        Some(inner) => (inner, false),
        None => (inner, true),
    };
    let open = inner.iter().rposition(|byte| !byte.is_ascii_digit())?;
    let digits = &inner[open + 1..];
    if inner[open] != b'{' || digits.is_empty() {
        return None;
    }
    let size = digits.iter().try_fold(0_usize, |sum, digit| sum.checked_mul(10)?.checked_add((digit - b'0').into()));
    Some(LiteralHeader { size: size.unwrap_or(usize::MAX), synchronising })
}

/// `line` without its CRLF or LF.
pub(super) fn without_line_end(line: &[u8]) -> &[u8] {
    let line = line.strip_suffix(b"\n").unwrap_or(line);
    line.strip_suffix(b"\r").unwrap_or(line)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: FrameLimits = FrameLimits { line: 64, literals: 32 };

    fn framer(bytes: &[u8]) -> Framer {
        let mut framer = Framer::new(LIMITS);
        framer.input(bytes);
        framer
    }

    #[test]
    fn literal_header_is_parsed() {
        let read = |line: &[u8]| literal_header(line).map(|it| (it.size, it.synchronising));
        assert_eq!(read(b"a LOGIN {5}\r\n"), Some((5, true)));
        assert_eq!(read(b"a LOGIN {0+}\n"), Some((0, false)));
        assert_eq!(read(b"{99999999999999999999999}\r\n"), Some((usize::MAX, true)));
        for none in
            [&b"a {}\r\n"[..], b"a {+}\r\n", b"a {x5}\r\n", b"a 5}\r\n", b"{5} \r\n", b"}\r\n", b"5}\r\n", b"{-1}\r\n"]
        {
            assert_eq!(read(none), None, "{}", none.escape_ascii());
        }
    }

    #[test]
    fn commands_are_the_same_at_every_split() {
        let input = b"a NOOP\r\nb LOGIN {2+}\r\n\r\n {3+}\r\nx\ny\nc X";
        for split in 0..=input.len() {
            let mut framer = framer(&input[..split]);
            let mut commands = Vec::new();
            for rest in [&input[split..], b""] {
                while framer.command() == Frame::Complete {
                    commands.push(framer.take().to_vec());
                }
                framer.input(rest);
            }
            assert_eq!(commands, [&b"a NOOP\r\n"[..], b"b LOGIN {2+}\r\n\r\n {3+}\r\nx\ny\n"], "split at {split}");
            assert_eq!(framer.into_leftover(), b"c X");
        }
    }

    #[test]
    fn synchronising_literal_waits_for_the_continuation_request() {
        let mut framer = framer(b"a LOGIN {3}\r\n");
        assert_eq!(framer.command(), Frame::Literal);
        assert_eq!(framer.command(), Frame::Literal, "a second call changes nothing");
        framer.accept_literal();
        assert_eq!(framer.command(), Frame::Incomplete);
        framer.input(b"abc x\r\nb");
        assert_eq!(framer.command(), Frame::Complete);
        assert_eq!(&framer.take()[..], b"a LOGIN {3}\r\nabc x\r\n");
        assert_eq!(framer.into_leftover(), b"b");
    }

    #[test]
    fn rejected_literal_keeps_the_following_bytes() {
        let mut framer = framer(b"a LOGIN {3}\r\nb NOOP\r\n");
        assert_eq!(framer.command(), Frame::Literal);
        framer.reject_literal();
        assert_eq!(framer.command(), Frame::Complete);
        assert_eq!(&framer.take()[..], b"b NOOP\r\n");
    }

    #[test]
    fn limits_are_exact_to_the_byte() {
        let line = |length: usize| framer(&[vec![b'x'; length], b"\r\n".to_vec()].concat()).command();
        assert_eq!((line(62), line(63)), (Frame::Complete, Frame::LineTooLong));
        assert_eq!(framer(&[b'x'; 65]).command(), Frame::LineTooLong, "the end of the line is not waited for");
        assert_eq!(framer(b"a {32}\r\n").command(), Frame::Literal);
        assert_eq!(framer(b"a {33}\r\n").command(), Frame::LiteralTooLong);
        assert_eq!(framer(b"a {4294967296+}\r\n").command(), Frame::LiteralTooLong);
        assert_eq!(framer(&b"{0+}\r\n".repeat(4)).command(), Frame::Incomplete);
        assert_eq!(framer(&b"{0+}\r\n".repeat(5)).command(), Frame::LiteralTooLong);
        let two = |second: &str| framer(format!("{{20+}}\r\n0123456789abcdefghij {second}\r\n").as_bytes()).command();
        assert_eq!((two("{12}"), two("{13}")), (Frame::Literal, Frame::LiteralTooLong), "literals count together");
    }

    #[test]
    fn long_command_releases_its_memory() {
        let limits = FrameLimits { line: 96 * 1024, literals: 64 * 1024 };
        let command = [&vec![b'x'; 90_000][..], b"\r\n"].concat();
        let mut framer = Framer::new(limits);
        for part in [b"a NOOP\r\n", &command[..], b"b"].concat().chunks(4096) {
            let expected = framer.capacity_with(part.len());
            framer.input(part);
            assert_eq!(framer.capacity(), expected);
            while framer.command() == Frame::Complete {
                let taken = framer.take();
                assert!(taken[..] == *b"a NOOP\r\n" || taken[..] == command);
            }
        }
        assert!(framer.capacity() < 4096, "{}", framer.capacity());
        assert_eq!(framer.into_leftover(), b"b");
    }

    /// The maximum size that a client can cause, with input in pieces of any size.
    #[test]
    fn buffer_size_is_limited() {
        let limits = FrameLimits { line: 96 * 1024, literals: 64 * 1024 };
        for piece in [1, 100, 4096] {
            let mut framer = Framer::new(limits);
            let hostile = [&b"a LOGIN {65536+}\r\n"[..], &vec![b'x'; 65536], &vec![b'y'; 1 << 20]].concat();
            let mut max = 0;
            for part in hostile.chunks(piece) {
                framer.input(part);
                max = max.max(framer.capacity());
                if framer.command() != Frame::Incomplete {
                    break;
                }
            }
            assert_eq!(framer.command(), Frame::LineTooLong);
            assert!(max <= limits.line + limits.literals + 4096, "{max} with pieces of {piece}");
        }
    }

    #[test]
    fn literal_limits_depend_on_the_command() {
        let allowed = |command: &[u8]| match command {
            [b'i', ..] => LiteralLimits { count: 6, bytes: 30 },
            _ => LiteralLimits::FEW,
        };
        let read = |bytes: &[u8]| {
            let mut framer = Framer::new(LIMITS).with_literals(allowed);
            framer.input(bytes);
            framer.command()
        };
        let literals = |verb: &str, count: usize| [verb.as_bytes(), &b" {1+}\r\nx".repeat(count), b"\r\n"].concat();
        assert_eq!((read(&literals("i", 6)), read(&literals("i", 7))), (Frame::Complete, Frame::LiteralTooLong));
        assert_eq!((read(&literals("l", 4)), read(&literals("l", 5))), (Frame::Complete, Frame::LiteralTooLong));
        let long = |size: usize| [b"i {20+}\r\n", &[b'x'; 20][..], format!(" {{{size}+}}\r\n").as_bytes()].concat();
        assert_eq!((read(&long(10)), read(&long(11))), (Frame::Incomplete, Frame::LiteralTooLong), "together");
    }

    #[test]
    fn every_byte_is_scanned_once() {
        let mut framer = Framer::new(FrameLimits { line: 1 << 20, literals: 0 });
        let mut scanned = 0;
        for _ in 0..(1 << 16) {
            framer.input(b"x");
            let before = framer.scanned;
            assert_eq!(framer.command(), Frame::Incomplete);
            scanned += framer.scanned - before;
        }
        assert_eq!(scanned, 1 << 16);
    }

    #[test]
    fn consumed_bytes_are_wiped_from_the_buffer() {
        let mut framer = framer(b"a LOGIN u secret\r\nb");
        assert_eq!(framer.command(), Frame::Complete);
        framer.take();
        assert!(framer.buffer.starts_with(&[0; 18]), "at once");
        framer.input(b"");
        assert_eq!(&framer.buffer[..], b"b");
    }
}
