//! Route by a text file: a user and a backend a line.
//!
//! ```text
//! # comment
//! alice@example.org   shard-a      one user
//! @example.net        shard-b      everybody of a domain
//! *                   shard-c      everybody else
//! ```
//!
//! The exact name wins over its domain, the domain over `*`. Names count without regard to ASCII case. The file is held
//! as one text and a sorted index of eight bytes an entry, so that ten million users cost their own characters and
//! 80 MB, and a look-up is a binary search. Every wrong line is reported with its number.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use super::Answer;
use crate::config::{BackendId, Config, Located, Problem};
use crate::identity::UserName;

/// More problems than this say nothing new about one file.
const MAX_PROBLEMS: usize = 20;

/// A loaded table.
#[derive(Debug)]
pub(super) struct Table {
    /// All keys, one after the other, in lower case.
    text: String,
    /// Sorted by key.
    entries: Vec<Entry>,
    everybody: Option<BackendId>,
}

#[derive(Debug, Clone, Copy)]
struct Entry {
    start: u32,
    length: u16,
    backend: u16,
}

/// A wrong line: its number, and what is wrong with it.
type Wrong = (usize, String);

impl Table {
    /// Reads and checks the file.
    ///
    /// # Errors
    /// The file cannot be read, or lines of it are wrong: each becomes a [`Problem`] that names the table and the line.
    pub(super) fn load(config: &Config, path: &Located<std::path::PathBuf>) -> Result<Self, Vec<Problem>> {
        let fault = |message: String| config.problem(&path.place, message);
        let text = read(&path.value).map_err(|message| vec![fault(format!("{}: {message}", path.value.display()))])?;
        let backends = config.backends.iter().enumerate().map(|(index, it)| (it.name.as_str(), BackendId(index)));
        Self::parse(&text, &backends.collect()).map_err(|wrong| {
            wrong
                .into_iter()
                .map(|(line, message)| fault(format!("{}:{line}: {message}", path.value.display())))
                .collect()
        })
    }

    fn parse(file: &str, backends: &HashMap<&str, BackendId>) -> Result<Self, Vec<Wrong>> {
        let mut table = Self { text: String::with_capacity(file.len()), entries: Vec::new(), everybody: None };
        let mut wrong: Vec<Wrong> = Vec::new();
        for (index, line) in file.lines().enumerate() {
            if let Err(message) = table.add(line, backends) {
                wrong.push((index + 1, message));
                if wrong.len() == MAX_PROBLEMS {
                    wrong.push((index + 1, "too many mistakes, the rest of the file was not read".to_owned()));
                    return Err(wrong);
                }
            }
        }
        let text = &table.text;
        table.entries.sort_by(|a, b| a.key(text).cmp(b.key(text)));
        wrong.extend(table.contradiction(file));
        table.entries.dedup_by(|a, b| a.key(text) == b.key(text));
        table.entries.shrink_to_fit();
        table.text.shrink_to_fit();
        if wrong.is_empty() { Ok(table) } else { Err(wrong) }
    }

    fn add(&mut self, line: &str, backends: &HashMap<&str, BackendId>) -> Result<(), String> {
        let mut words = line.split_ascii_whitespace();
        let Some(key) = words.next().filter(|word| !word.starts_with('#')) else { return Ok(()) };
        let name = words.next().ok_or("expected \"user backend\", found one word")?;
        if words.next().is_some_and(|word| !word.starts_with('#')) {
            return Err("expected \"user backend\", found more than two words".to_owned());
        }
        let backend = *backends.get(name).ok_or_else(|| undeclared(name, backends))?;
        if key == "*" {
            return match self.everybody.replace(backend) {
                Some(before) if before != backend => Err("a second * line names another backend".to_owned()),
                _ => Ok(()),
            };
        }
        UserName::new(key.as_bytes()).map_err(|error| error.to_string())?;
        if key == "@" {
            return Err("a domain is missing behind @".to_owned());
        }
        let start = u32::try_from(self.text.len()).map_err(|_| "the table is over 4 GiB")?;
        self.text.extend(key.chars().map(|letter| letter.to_ascii_lowercase()));
        // Both fit: UserName caps the length, and a configuration has no 65,536 backends.
        let length = u16::try_from(key.len()).map_err(|_| "the name is too long")?;
        let backend = u16::try_from(backend.0).map_err(|_| "too many backends")?;
        self.entries.push(Entry { start, length, backend });
        Ok(())
    }

    /// The first user with two different backends, by the line of the second.
    fn contradiction(&self, file: &str) -> Option<Wrong> {
        let pair = self
            .entries
            .windows(2)
            .find(|pair| pair[0].key(&self.text) == pair[1].key(&self.text) && pair[0].backend != pair[1].backend)?;
        let key = pair[1].key(&self.text);
        let mut lines = file.lines().enumerate().filter(|(_, line)| {
            line.split_ascii_whitespace().next().is_some_and(|word| word.eq_ignore_ascii_case(key))
        });
        let first = lines.next()?.0 + 1;
        let second = lines.next()?.0 + 1;
        Some((second, format!("the same user has another backend in line {first}")))
    }

    /// The exact name, else its domain, else everybody.
    pub(super) fn lookup(&self, key: &str) -> Answer {
        let domain = || key.rfind('@').and_then(|at| self.find(&key[at..]));
        self.find(key).or_else(domain).or(self.everybody).map_or(Answer::Unknown, Answer::Found)
    }

    fn find(&self, key: &str) -> Option<BackendId> {
        let index = self.entries.binary_search_by(|entry| entry.key(&self.text).cmp(key)).ok()?;
        Some(BackendId(self.entries[index].backend.into()))
    }

    /// Number of entries.
    pub(super) fn len(&self) -> usize {
        self.entries.len() + usize::from(self.everybody.is_some())
    }
}

impl Entry {
    fn key<'a>(&self, text: &'a str) -> &'a str {
        &text[self.start as usize..][..self.length.into()]
    }
}

fn read(path: &Path) -> Result<String, String> {
    let bytes = fs::read(path).map_err(|error| error.to_string())?;
    String::from_utf8(bytes).map_err(|error| {
        let line = error.as_bytes()[..error.utf8_error().valid_up_to()].iter().filter(|byte| **byte == b'\n').count();
        format!("line {} is not UTF-8", line + 1)
    })
}

fn undeclared(name: &str, backends: &HashMap<&str, BackendId>) -> String {
    let mut declared: Vec<&str> = backends.keys().copied().collect();
    declared.sort_unstable();
    format!("no backend is declared as {name:?}; declared: {}", declared.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: BackendId = BackendId(0);
    const B: BackendId = BackendId(1);

    fn parse(text: &str) -> Result<Table, Vec<Wrong>> {
        Table::parse(text, &HashMap::from([("shard-a", A), ("shard-b", B)]))
    }

    #[test]
    fn the_nearest_line_wins() {
        let table =
            parse("# users\n\nAlice@Example.org shard-b # moved\n@example.org\tshard-a\r\n* shard-b\n").unwrap();
        assert_eq!(table.len(), 3);
        assert_eq!(table.lookup("alice@example.org"), Answer::Found(B));
        assert_eq!(table.lookup("bob@example.org"), Answer::Found(A));
        assert_eq!(table.lookup("carol"), Answer::Found(B));
        assert_eq!(parse("alice shard-a").unwrap().lookup("bob"), Answer::Unknown);
    }

    #[test]
    fn every_wrong_line_is_named() {
        let wrong =
            parse("alice\nbob shard-z\ncarol shard-a extra\n@ shard-a\n\u{1}x shard-a\ndave shard-a\n").unwrap_err();
        let lines: Vec<usize> = wrong.iter().map(|(line, _)| *line).collect();
        assert_eq!(lines, [1, 2, 3, 4, 5], "{wrong:?}");
        assert!(wrong[1].1.contains("shard-z") && wrong[1].1.contains("shard-a, shard-b"), "{wrong:?}");
    }

    #[test]
    fn one_user_twice_is_fine_only_with_one_backend() {
        assert_eq!(parse("alice shard-a\nALICE shard-a\n").unwrap().len(), 1);
        let wrong = parse("alice shard-a\nbob shard-a\nAlice shard-b\n").unwrap_err();
        assert_eq!(wrong, [(3, "the same user has another backend in line 1".to_owned())]);
        assert_eq!(parse("* shard-a\n* shard-b\n").unwrap_err()[0].0, 2);
    }

    #[test]
    fn a_hopeless_file_is_given_up_early() {
        assert_eq!(parse(&"wrong\n".repeat(1000)).unwrap_err().len(), MAX_PROBLEMS + 1);
    }

    #[test]
    fn every_user_of_a_large_table_is_found() {
        let shard = |user: usize| if user.is_multiple_of(2) { ("shard-a", A) } else { ("shard-b", B) };
        let file: String = (0..100_000).map(|user| format!("user{user}@example.org {}\n", shard(user).0)).collect();
        let table = parse(&file).unwrap();
        for user in 0..100_000 {
            assert_eq!(table.lookup(&format!("user{user}@example.org")), Answer::Found(shard(user).1));
        }
        assert_eq!(std::mem::size_of::<Entry>(), 8);
    }
}
