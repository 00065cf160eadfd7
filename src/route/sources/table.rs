//! Route by a text file: a user and a place a line.
//!
//! ```text
//! # comment
//! alice@example.org   shard-a                        one user
//! bob@example.org     shard-a server=10.0.0.11:143   as `target` has it
//! carol@example.org   refuse: The account was closed.
//! @example.net        shard-b                        everybody of a domain
//! *                   shard-c                        everybody else
//! ```
//!
//! The exact name wins over its domain, the domain over `*`. Names count without regard to ASCII case. The file becomes
//! a finite state transducer, in which names share their beginnings and ends: a fraction of the text's size, and a
//! look-up as long as the name. While the process runs a changed file is loaded beside the old one and takes its place
//! whole, or not at all: every wrong line is reported with its number, and the old answers stay.

use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Duration;

use tokio::time;

use crate::config::{Located, Problem};
use crate::identity::UserName;
use crate::metrics::RouteMetrics;
use crate::process::file_watch::{FileWatch, POLL_INTERVAL};
use crate::route::LookupResult;
use crate::route::decision::{Declared, RouteDecision};

/// More problems than this say nothing new about one file.
const MAX_PROBLEMS: usize = 20;

/// A file that has not changed for this long is not being written, for an operator who waits for it.
const SETTLED: Duration = Duration::from_millis(100);

/// A loaded table, and where it is from.
#[derive(Debug)]
pub(in crate::route) struct Table {
    path: Located<std::path::PathBuf>,
    declared: Declared,
    watch: Mutex<FileWatch>,
    /// Held while the file is loaded.
    loading: tokio::sync::Mutex<()>,
    index: RwLock<Arc<Index>>,
}

/// A wrong line: its number, and what is wrong with it.
type Wrong = (usize, String);

impl Table {
    /// Reads and checks the file.
    ///
    /// # Errors
    /// The file cannot be read, or lines of it are wrong: each becomes a [`Problem`] that names the table and the line.
    pub(in crate::route) fn load(
        path: &Located<std::path::PathBuf>,
        declared: &Declared,
    ) -> Result<Self, Vec<Problem>> {
        // Taken before the file is read: a change meanwhile is a change.
        let watch = Mutex::new(FileWatch::new(vec![path.value.clone()]));
        let index = read(&path.value, declared).map_err(|wrong| {
            let shown = path.value.display();
            let told = wrong.into_iter().map(|wrong| path.location.problem(format!("{shown}{}", at(&wrong))));
            told.collect::<Vec<_>>()
        })?;
        let index = RwLock::new(Arc::new(index));
        let (path, declared) = (path.clone(), declared.clone());
        Ok(Self { path, declared, watch, loading: tokio::sync::Mutex::default(), index })
    }

    /// Whether loading the file again would bring the same: it has not changed, and its backends have not.
    pub(in crate::route) fn is_current(&self, path: &Path, declared: &Declared) -> bool {
        let unchanged = || self.watch().is_unchanged();
        self.path.value == path && self.declared == *declared && unchanged()
    }

    /// The exact name, else its domain, else everybody.
    pub(in crate::route) fn lookup(&self, user: &str) -> LookupResult {
        self.index().lookup(user).map_or(LookupResult::Unknown, LookupResult::Found)
    }

    /// Number of entries.
    pub(in crate::route) fn len(&self) -> usize {
        self.index().len
    }

    fn index(&self) -> Arc<Index> {
        self.index.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Loads the file whenever it has changed. Never returns.
    pub(in crate::route) async fn follow(self: Arc<Self>, metrics: RouteMetrics) {
        loop {
            time::sleep(POLL_INTERVAL).await;
            let loading = self.loading.lock().await;
            if self.watch().is_due() {
                // The errors are logged.
                let _ = self.load_again(&metrics).await;
            }
            drop(loading);
        }
    }

    /// Loads the file now if it has changed, as soon as it is not being written any more. The caller sets the deadline.
    ///
    /// # Errors
    /// What is wrong with the file: the old answers stay in use.
    pub(in crate::route) async fn refresh(self: &Arc<Self>, metrics: &RouteMetrics) -> Result<(), String> {
        // What [`Table::follow`] has begun to load counts only once it is loaded.
        let _loading = self.loading.lock().await;
        if self.watch().is_unchanged() {
            return Ok(());
        }
        loop {
            self.watch().observe();
            time::sleep(SETTLED).await;
            if self.watch().is_settled() {
                return self.load_again(metrics).await;
            }
        }
    }

    /// Called while `loading` is held.
    async fn load_again(self: &Arc<Self>, metrics: &RouteMetrics) -> Result<(), String> {
        let table = self.clone();
        // Sorting millions of names takes seconds: not on a thread that serves.
        let done = tokio::task::spawn_blocking(move || table.reload()).await;
        let wrong = done.unwrap_or_else(|_| vec![(0, "could not be loaded".to_owned())]);
        let file = self.path.value.display();
        for wrong in &wrong {
            tracing::error!("{file}{}; the old table stays in use", at(wrong));
        }
        metrics.set_users(self.len());
        metrics.set_load_failed(!wrong.is_empty());
        match wrong.first() {
            None => {
                tracing::info!(%file, entries = self.len(), "table loaded");
                Ok(())
            }
            Some(first) => {
                self.watch().failed();
                Err(format!("{file}{}; the old table stays in use", at(first)))
            }
        }
    }

    fn watch(&self) -> MutexGuard<'_, FileWatch> {
        // Nothing panics halfway through a look.
        self.watch.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn reload(&self) -> Vec<Wrong> {
        match read(&self.path.value, &self.declared) {
            Ok(index) => {
                *self.index.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(index);
                Vec::new()
            }
            Err(wrong) => wrong,
        }
    }
}

/// The answers of one version of the file.
#[derive(Debug)]
struct Index {
    /// Names and domains in lower case, and places in `targets`.
    keys: fst::Map<Vec<u8>>,
    /// Each different one once.
    targets: Vec<Arc<RouteDecision>>,
    everybody: Option<Arc<RouteDecision>>,
    len: usize,
}

impl Index {
    fn lookup(&self, user: &str) -> Option<Arc<RouteDecision>> {
        let domain = || user.rfind('@').and_then(|at| self.find(&user[at..]));
        self.find(user).or_else(domain).or_else(|| self.everybody.clone())
    }

    fn find(&self, key: &str) -> Option<Arc<RouteDecision>> {
        let place = self.keys.get(key)?;
        self.targets.get(usize::try_from(place).ok()?).cloned()
    }
}

/// A line's key within the text, and its place in `targets`.
#[derive(Debug, Clone, Copy)]
struct Entry {
    /// The key's first bytes as a number: what most comparisons come down to.
    head: u64,
    start: u32,
    length: u16,
    target: u32,
}

/// A file being read.
struct Loading<'a> {
    declared: &'a Declared,
    /// What stood on a line, and its place in `targets`.
    known: HashMap<Box<str>, u32>,
    targets: Vec<Arc<RouteDecision>>,
    entries: Vec<Entry>,
    everybody: Option<u32>,
}

fn read(path: &Path, declared: &Declared) -> Result<Index, Vec<Wrong>> {
    let bytes = fs::read(path).map_err(|error| vec![(0, error.to_string())])?;
    let mut text = String::from_utf8(bytes).map_err(|error| {
        let line = error.as_bytes()[..error.utf8_error().valid_up_to()].iter().filter(|byte| **byte == b'\n').count();
        vec![(line + 1, "not UTF-8".to_owned())]
    })?;
    parse(&mut text, declared)
}

/// Keys in `text` are put into lower case.
fn parse(text: &mut str, declared: &Declared) -> Result<Index, Vec<Wrong>> {
    if u32::try_from(text.len()).is_err() {
        return Err(vec![(0, "the table is over 4 GiB".to_owned())]);
    }
    let lines = text.bytes().filter(|byte| *byte == b'\n').count();
    let mut loading = Loading {
        declared,
        known: HashMap::new(),
        targets: Vec::new(),
        entries: Vec::with_capacity(lines + 1),
        everybody: None,
    };
    let mut wrong = Vec::new();
    let mut start = 0;
    let mut number = 0;
    while start < text.len() {
        number += 1;
        let end = text[start..].find('\n').map_or(text.len(), |end| start + end);
        if let Err(message) = loading.line(text, start, end) {
            wrong.push((number, message));
            if wrong.len() == MAX_PROBLEMS {
                wrong.push((number, "too many mistakes, the rest of the file was not read".to_owned()));
                return Err(wrong);
            }
        }
        start = end + 1;
    }
    loading.finish(text, wrong)
}

impl Loading<'_> {
    fn line(&mut self, text: &mut str, start: usize, end: usize) -> Result<(), String> {
        let line = text[start..end].trim_end();
        let key = line.trim_start();
        let key_start = start + line.len() - key.len();
        let key = key.split_ascii_whitespace().next().unwrap_or_default();
        if key.is_empty() || key.starts_with('#') {
            return Ok(());
        }
        let key_end = key_start + key.len();
        let target = self.target(&text[key_end..end])?;
        let key = &text[key_start..key_end];
        if key == "*" {
            return match self.everybody.replace(target) {
                Some(before) if before != target => Err("a second * line says something else".to_owned()),
                _ => Ok(()),
            };
        }
        UserName::new(key.as_bytes()).map_err(|error| error.to_string())?;
        if key == "@" {
            return Err("a domain is missing behind @".to_owned());
        }
        text[key_start..key_end].make_ascii_lowercase();
        let key = &text.as_bytes()[key_start..key_end];
        // All fit: the text is under 4 GiB and UserName caps the length.
        let length = u16::try_from(key.len()).map_err(|_| "the name is too long")?;
        let start = u32::try_from(key_start).map_err(|_| "the table is over 4 GiB")?;
        self.entries.push(Entry { head: head(key), start, length, target });
        Ok(())
    }

    /// What follows the key. Most lines say what others have said.
    fn target(&mut self, text: &str) -> Result<u32, String> {
        let text = without_comment(text).trim();
        if let Some(known) = self.known.get(text) {
            return Ok(*known);
        }
        let target = self.declared.text(text)?.ok_or("expected \"user backend\", found one word")?;
        let place = u32::try_from(self.targets.len()).map_err(|_| "too many different places")?;
        self.targets.push(target.into());
        self.known.insert(text.into(), place);
        Ok(place)
    }

    fn finish(mut self, text: &str, mut wrong: Vec<Wrong>) -> Result<Index, Vec<Wrong>> {
        let key = |entry: &Entry| &text.as_bytes()[entry.start as usize..][..entry.length.into()];
        let order = |a: &Entry, b: &Entry| a.head.cmp(&b.head).then_with(|| key(a).cmp(key(b)));
        // By place among equals, so that a contradiction is told at the later line.
        self.entries.sort_unstable_by(|a, b| order(a, b).then(a.start.cmp(&b.start)));
        for pair in self.entries.windows(2) {
            if key(&pair[0]) == key(&pair[1]) && pair[0].target != pair[1].target && wrong.len() < MAX_PROBLEMS {
                let line =
                    |entry: &Entry| 1 + text[..entry.start as usize].bytes().filter(|byte| *byte == b'\n').count();
                wrong.push((line(&pair[1]), format!("the same user has another place in line {}", line(&pair[0]))));
            }
        }
        if !wrong.is_empty() {
            wrong.sort_by_key(|(line, _)| *line);
            return Err(wrong);
        }
        self.entries.dedup_by(|a, b| key(a) == key(b));
        let keys = fst::Map::from_iter(self.entries.iter().map(|entry| (key(entry), u64::from(entry.target))));
        let keys = keys.map_err(|error| vec![(0, error.to_string())])?;
        let everybody = self.everybody.and_then(|place| self.targets.get(place as usize).cloned());
        let len = self.entries.len() + usize::from(everybody.is_some());
        Ok(Index { keys, targets: self.targets, everybody, len })
    }
}

/// The first eight bytes, in the order of bytes.
fn head(key: &[u8]) -> u64 {
    let mut head = [0; 8];
    let length = key.len().min(8);
    head[..length].copy_from_slice(&key[..length]);
    u64::from_be_bytes(head)
}

/// A comment begins with `#` at the start of a word; in the text of a verdict `#` is a character like any other.
fn without_comment(text: &str) -> &str {
    let is_verdict = ["refuse:", "maintenance:"].iter().any(|verdict| text.trim_start().starts_with(verdict));
    let comment =
        || text.match_indices('#').find(|(at, _)| text[..*at].ends_with(|char: char| char.is_ascii_whitespace()));
    if is_verdict { text } else { comment().map_or(text, |(at, _)| &text[..at]) }
}

/// `:7: message`, or `: message` of the whole file.
fn at((line, message): &Wrong) -> String {
    if *line == 0 { format!(": {message}") } else { format!(":{line}: {message}") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::BackendId;
    use crate::route::decision::ServerChoice;

    fn parse(text: &str) -> Result<Index, Vec<Wrong>> {
        super::parse(&mut text.to_owned(), &Declared::named(["shard-a", "shard-b"]))
    }

    fn backend(index: usize) -> Option<Arc<RouteDecision>> {
        Some(RouteDecision::backend(BackendId(index)).into())
    }

    #[test]
    fn the_nearest_line_wins() {
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
    fn a_line_may_say_more_than_a_backend() {
        let table = parse("a shard-a server=h:1 user=b #x\nc refuse: Bill #7 is open.\nd shard-a\n").unwrap();
        let RouteDecision::Destination(place) = &*table.lookup("a").unwrap() else { panic!() };
        assert_eq!((&place.server, place.user.as_ref().unwrap().as_str()), (&ServerChoice::Server("h:1".into()), "b"));
        assert_eq!(table.lookup("c"), Some(RouteDecision::Refuse("Bill #7 is open.".into()).into()));
        assert_eq!(table.lookup("d"), backend(0));
    }

    #[test]
    fn every_wrong_line_is_named() {
        let wrong = parse("alice\nbob shard-z\ncarol shard-a extra\n@ shard-a\n\u{1}x shard-a\ndave shard-a\n");
        let wrong = wrong.unwrap_err();
        let lines: Vec<usize> = wrong.iter().map(|(line, _)| *line).collect();
        assert_eq!(lines, [1, 2, 3, 4, 5], "{wrong:?}");
        assert!(wrong[1].1.contains("shard-z") && wrong[1].1.contains("shard-a, shard-b"), "{wrong:?}");
    }

    #[test]
    fn one_user_twice_is_fine_only_with_one_backend() {
        assert_eq!(parse("alice shard-a\nALICE shard-a\n").unwrap().len, 1);
        let wrong = parse("alice shard-a\nbob shard-a\nAlice shard-b\n").unwrap_err();
        assert_eq!(wrong, [(3, "the same user has another place in line 1".to_owned())]);
        assert_eq!(parse("* shard-a\n* shard-b\n").unwrap_err()[0].0, 2);
    }

    #[test]
    fn a_hopeless_file_is_given_up_early() {
        assert_eq!(parse(&"wrong\n".repeat(1000)).unwrap_err().len(), MAX_PROBLEMS + 1);
    }

    #[test]
    fn every_user_of_a_large_table_is_found() {
        let shard = |user: usize| user % 2;
        let name = ["shard-a", "shard-b"];
        // Not in order, and with common beginnings longer than what is compared first.
        let users = || (0..100_000).map(|user| user * 7919 % 100_000);
        let file: String = users().map(|user| format!("User{user}@example.org {}\n", name[shard(user)])).collect();
        let table = parse(&file).unwrap();
        for user in users() {
            assert_eq!(table.lookup(&format!("user{user}@example.org")), backend(shard(user)));
        }
        assert_eq!(table.targets.len(), 2);
        assert!(table.keys.as_fst().size() < file.len() / 4, "{} bytes", table.keys.as_fst().size());
    }
}
