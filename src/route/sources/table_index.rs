//! The content of a table: parses the text, and finds users in it.
//!
//! The names become the keys of a finite state transducer, in which they share prefixes and suffixes: it takes a fraction of the memory
//! of the text, and the time of a lookup is linear in the length of the name.

use std::collections::HashMap;
use std::sync::Arc;

use crate::identity::UserName;
use crate::route::answer::{DeclaredBackends, is_client_text};
use crate::route::decision::RouteDecision;

/// Parsing stops after this many errors.
const MAX_ERRORS: usize = 20;

/// The users of one version of a table.
#[derive(Debug)]
pub(super) struct TableIndex {
    /// Names and domains in lower case, with indexes into `decisions`.
    keys: fst::Map<Vec<u8>>,
    /// Every different decision once.
    decisions: Vec<Arc<RouteDecision>>,
    /// Decision for all users that are not listed.
    default: Option<Arc<RouteDecision>>,
    len: usize,
}

/// An error in a table.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct LineError {
    /// Number of the line, from 1; `None` if the error concerns the whole file.
    pub(super) line: Option<usize>,
    pub(super) message: String,
}

impl LineError {
    pub(super) fn at(line: usize, message: impl Into<String>) -> Self {
        Self { line: Some(line), message: message.into() }
    }

    pub(super) fn of_file(message: impl Into<String>) -> Self {
        Self { line: None, message: message.into() }
    }
}

impl TableIndex {
    /// Parses a table. Converts the keys in `text` to lower case.
    pub(super) fn parse(text: &mut str, declared: &DeclaredBackends) -> Result<Self, Vec<LineError>> {
        if u32::try_from(text.len()).is_err() {
            return Err(vec![LineError::of_file("the table is over 4 GiB")]);
        }
        let lines = text.bytes().filter(|byte| *byte == b'\n').count();
        let mut parser = Parser {
            declared,
            known: HashMap::new(),
            decisions: Vec::new(),
            entries: Vec::with_capacity(lines + 1),
            default: None,
        };
        let mut errors = Vec::new();
        let mut start = 0;
        let mut number = 0;
        while start < text.len() {
            number += 1;
            let end = text[start..].find('\n').map_or(text.len(), |end| start + end);
            if let Err(message) = parser.line(text, start, end) {
                errors.push(LineError::at(number, message));
                if errors.len() == MAX_ERRORS {
                    errors.push(LineError::at(number, "too many errors, the rest of the file was not read"));
                    return Err(errors);
                }
            }
            start = end + 1;
        }
        parser.finish(text, errors)
    }

    pub(super) fn lookup(&self, user: &str) -> Option<Arc<RouteDecision>> {
        let domain = || user.rfind('@').and_then(|at| self.find(&user[at..]));
        self.find(user).or_else(domain).or_else(|| self.default.clone())
    }

    /// Number of entries.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    fn find(&self, key: &str) -> Option<Arc<RouteDecision>> {
        let index = self.keys.get(key)?;
        self.decisions.get(usize::try_from(index).ok()?).cloned()
    }
}

/// A line: its key within the text, and the index of its decision.
#[derive(Debug, Clone, Copy)]
struct Entry {
    /// The first bytes of the key as a number, which decide most comparisons.
    head: u64,
    start: u32,
    length: u16,
    decision: u32,
}

/// State of parsing a table.
struct Parser<'a> {
    declared: &'a DeclaredBackends,
    /// Texts that have been parsed, with the indexes of their decisions.
    known: HashMap<Box<str>, u32>,
    decisions: Vec<Arc<RouteDecision>>,
    entries: Vec<Entry>,
    default: Option<u32>,
}

impl Parser<'_> {
    fn line(&mut self, text: &mut str, start: usize, end: usize) -> Result<(), String> {
        let line = text[start..end].trim_end();
        let key = line.trim_start();
        let key_start = start + line.len() - key.len();
        let key = key.split_ascii_whitespace().next().unwrap_or_default();
        if key.is_empty() || key.starts_with('#') {
            return Ok(());
        }
        let key_end = key_start + key.len();
        let decision = self.decision(&text[key_end..end])?;
        let key = &text[key_start..key_end];
        if key == "*" {
            return match self.default.replace(decision) {
                Some(before) if before != decision => Err("contradicts an earlier line for *".to_owned()),
                _ => Ok(()),
            };
        }
        UserName::new(key.as_bytes()).map_err(|error| error.to_string())?;
        if key == "@" {
            return Err("expected a domain after @".to_owned());
        }
        text[key_start..key_end].make_ascii_lowercase();
        let key = &text.as_bytes()[key_start..key_end];
        // These conversions cannot fail: the text is under 4 GiB, and `UserName` limits the length.
        let length = u16::try_from(key.len()).map_err(|_| "the name is too long")?;
        let start = u32::try_from(key_start).map_err(|_| "the table is over 4 GiB")?;
        self.entries.push(Entry { head: head(key), start, length, decision });
        Ok(())
    }

    /// Parses the text after the key. Most lines have a text that has been parsed before.
    fn decision(&mut self, text: &str) -> Result<u32, String> {
        let text = without_comment(text).trim();
        if let Some(known) = self.known.get(text) {
            return Ok(*known);
        }
        let decision = self.declared.check_text(text)?.ok_or("expected \"user backend\", found one word")?;
        let index = u32::try_from(self.decisions.len()).map_err(|_| "too many different answers")?;
        self.decisions.push(decision.into());
        self.known.insert(text.into(), index);
        Ok(index)
    }

    fn finish(mut self, text: &str, mut errors: Vec<LineError>) -> Result<TableIndex, Vec<LineError>> {
        let key = |entry: &Entry| &text.as_bytes()[entry.start as usize..][..entry.length.into()];
        let order = |a: &Entry, b: &Entry| a.head.cmp(&b.head).then_with(|| key(a).cmp(key(b)));
        // Equal keys are ordered by position, so that a contradiction is reported at the later line.
        self.entries.sort_unstable_by(|a, b| order(a, b).then(a.start.cmp(&b.start)));
        for pair in self.entries.windows(2) {
            if key(&pair[0]) == key(&pair[1]) && pair[0].decision != pair[1].decision && errors.len() < MAX_ERRORS {
                let line =
                    |entry: &Entry| 1 + text[..entry.start as usize].bytes().filter(|byte| *byte == b'\n').count();
                let message = format!("contradicts line {}, which has the same user", line(&pair[0]));
                errors.push(LineError::at(line(&pair[1]), message));
            }
        }
        if !errors.is_empty() {
            errors.sort_by_key(|error| error.line);
            return Err(errors);
        }
        self.entries.dedup_by(|a, b| key(a) == key(b));
        let keys = fst::Map::from_iter(self.entries.iter().map(|entry| (key(entry), u64::from(entry.decision))));
        let keys = keys.map_err(|error| vec![LineError::of_file(error.to_string())])?;
        let default = self.default.and_then(|index| self.decisions.get(index as usize).cloned());
        let len = self.entries.len() + usize::from(default.is_some());
        Ok(TableIndex { keys, decisions: self.decisions, default, len })
    }
}

/// The first eight bytes as a number that sorts like them.
fn head(key: &[u8]) -> u64 {
    let mut head = [0; 8];
    let length = key.len().min(8);
    head[..length].copy_from_slice(&key[..length]);
    u64::from_be_bytes(head)
}

/// Removes a comment, which begins with `#` at the start of a word. A text for the client has no comment: it may contain `#`.
fn without_comment(text: &str) -> &str {
    let comment =
        || text.match_indices('#').find(|(at, _)| text[..*at].ends_with(|char: char| char.is_ascii_whitespace()));
    if is_client_text(text) { text } else { comment().map_or(text, |(at, _)| &text[..at]) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::BackendId;
    use crate::route::decision::ServerChoice;

    fn parse(text: &str) -> Result<TableIndex, Vec<LineError>> {
        TableIndex::parse(&mut text.to_owned(), &DeclaredBackends::named(["shard-a", "shard-b"]))
    }

    fn backend(index: usize) -> Option<Arc<RouteDecision>> {
        Some(RouteDecision::backend(BackendId(index)).into())
    }

    #[test]
    fn most_specific_line_decides() {
        let table =
            parse("# users\n\n  Alice@Example.org shard-b # moved\n@example.org\tshard-a\r\n* shard-b\n").unwrap();
        assert_eq!(table.len, 3);
        assert_eq!(table.lookup("alice@example.org"), backend(1));
        assert_eq!(table.lookup("bob@example.org"), backend(0));
        assert_eq!(table.lookup("carol"), backend(1));
        assert_eq!(parse("alice shard-a").unwrap().lookup("bob"), None);
        assert_eq!(parse("").unwrap().lookup("bob"), None);
    }

    #[test]
    fn line_can_contain_more_than_a_backend() {
        let table = parse("a shard-a server=h:1 user=b #x\nc refuse: Bill #7 is open.\nd shard-a\n").unwrap();
        let RouteDecision::Destination(found) = &*table.lookup("a").unwrap() else { panic!() };
        assert_eq!((&found.server, found.user.as_ref().unwrap().as_str()), (&ServerChoice::Server("h:1".into()), "b"));
        assert_eq!(table.lookup("c"), Some(RouteDecision::Refuse("Bill #7 is open.".into()).into()));
        assert_eq!(table.lookup("d"), backend(0));
    }

    #[test]
    fn every_invalid_line_is_reported() {
        let result = parse("alice\nbob shard-z\ncarol shard-a extra\n@ shard-a\n\u{1}x shard-a\ndave shard-a\n");
        let errors = result.unwrap_err();
        let lines: Vec<usize> = errors.iter().filter_map(|error| error.line).collect();
        assert_eq!(lines, [1, 2, 3, 4, 5], "{errors:?}");
        let message = &errors[1].message;
        assert!(message.contains("shard-z") && message.contains("shard-a, shard-b"), "{message}");
    }

    #[test]
    fn duplicate_user_must_have_the_same_answer() {
        assert_eq!(parse("alice shard-a\nALICE shard-a\n").unwrap().len, 1);
        let errors = parse("alice shard-a\nbob shard-a\nAlice shard-b\n").unwrap_err();
        assert_eq!(errors, [LineError::at(3, "contradicts line 1, which has the same user")]);
        assert_eq!(parse("* shard-a\n* shard-b\n").unwrap_err()[0].line, Some(2));
    }

    #[test]
    fn parsing_stops_after_too_many_errors() {
        assert_eq!(parse(&"wrong\n".repeat(1000)).unwrap_err().len(), MAX_ERRORS + 1);
    }

    #[test]
    fn all_users_of_a_large_table_are_found() {
        let shard = |user: usize| user % 2;
        let name = ["shard-a", "shard-b"];
        // Not in order, and with common prefixes longer than `head`.
        let users = || (0..100_000).map(|user| user * 7919 % 100_000);
        let file: String = users().map(|user| format!("User{user}@example.org {}\n", name[shard(user)])).collect();
        let table = parse(&file).unwrap();
        for user in users() {
            assert_eq!(table.lookup(&format!("user{user}@example.org")), backend(shard(user)));
        }
        assert_eq!(table.decisions.len(), 2);
        assert!(table.keys.as_fst().size() < file.len() / 4, "{} bytes", table.keys.as_fst().size());
    }
}
