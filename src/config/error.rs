//! Problems of a configuration, each with its location in the file.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use zeroize::Zeroizing;

/// A position in a configuration file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Location {
    /// Path of the configuration file.
    pub file: Arc<Path>,
    /// Line, counted from 1.
    pub line: usize,
    /// Column, counted from 1.
    pub column: usize,
    /// Path of the key, like `backends.shard-a.servers[0]`; empty for the whole file.
    pub key: String,
}

impl Location {
    /// The location of problems that concern the whole file.
    pub fn of_file(file: &Path) -> Self {
        Self { file: file.into(), line: 1, column: 1, key: String::new() }
    }

    /// A problem at this location. `message` must not contain a value that could be a secret.
    pub fn problem(&self, message: impl Into<String>) -> Problem {
        Problem { location: self.clone(), message: message.into(), help: None }
    }
}

/// A value and its location, for checks that are made later, by the module that uses the value.
#[derive(Debug, Clone)]
pub struct Located<T> {
    /// The value as configured.
    pub value: T,
    /// Location of its key.
    pub location: Location,
}

/// Compares the values only: a key that has moved to another line has not changed.
impl<T: PartialEq> PartialEq for Located<T> {
    fn eq(&self, other: &Self) -> bool {
        self.value == other.value
    }
}

impl Located<PathBuf> {
    /// Reads a secret from the file: its text without the final line end.
    ///
    /// # Errors
    /// The file cannot be read, is empty, or is not UTF-8. The error does not contain the file's content.
    pub fn read_secret(&self) -> Result<Zeroizing<String>, Problem> {
        let problem = |message: &str| self.location.problem(format!("{}: {message}", self.value.display()));
        let bytes = fs::read(&self.value).map(Zeroizing::new).map_err(|error| problem(&error.to_string()))?;
        let text = std::str::from_utf8(&bytes).map_err(|_| problem("not UTF-8"))?.trim_end_matches(['\r', '\n']);
        if text.is_empty() { Err(problem("the file is empty")) } else { Ok(Zeroizing::new(text.to_owned())) }
    }
}

/// An error or a warning. The messages never contain a value that could be a secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// Location of the key that the problem concerns.
    pub location: Location,
    /// What is wrong, and what was expected.
    pub message: String,
    /// How to correct it.
    pub help: Option<Help>,
}

/// How to correct a problem.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Help {
    /// A known word that differs from the configured one by a typing error.
    DidYouMean(String),
    /// All words that are known.
    Known(Vec<String>),
    /// Advice for this problem only.
    Advice(&'static str),
}

impl Help {
    /// Proposes the word of `known` that is nearest to `word`, or all of them if none is near.
    pub(super) fn suggest<W: AsRef<str>>(word: &str, known: &[W]) -> Self {
        let lower = |text: &str| text.to_lowercase();
        let distance = |other: &W| strsim::damerau_levenshtein(&lower(word), &lower(other.as_ref()));
        let nearest = known.iter().map(|other| (distance(other), other.as_ref())).min();
        match nearest {
            // One typing error in three characters.
            Some((distance, nearest)) if distance <= nearest.len().div_ceil(3) => Self::DidYouMean(nearest.to_owned()),
            _ => Self::Known(known.iter().map(|word| word.as_ref().to_owned()).collect()),
        }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Location { file, line, column, key } = &self.location;
        write!(f, "{}:{line}:{column}: ", file.display())?;
        if !key.is_empty() {
            // A line break in a key would split the message.
            let shown: String = key.chars().map(|char| if char.is_control() { '\u{fffd}' } else { char }).collect();
            write!(f, "{shown}: ")?;
        }
        f.write_str(&self.message)?;
        match &self.help {
            Some(Help::DidYouMean(word)) => write!(f, "; did you mean `{word}`?"),
            Some(Help::Known(words)) => write!(f, ": expected {}", alternatives(words)),
            Some(Help::Advice(sentence)) => write!(f, "; {sentence}"),
            None => Ok(()),
        }
    }
}

/// All problems of a file, sorted by line and column.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    problems: Vec<Problem>,
}

impl Report {
    /// Sorts `problems` by line and column.
    pub fn new(mut problems: Vec<Problem>) -> Self {
        problems.sort_by_key(|problem| (problem.location.line, problem.location.column));
        Self { problems }
    }

    /// The problems by line and column.
    pub fn problems(&self) -> &[Problem] {
        &self.problems
    }
}

impl From<Problem> for Report {
    fn from(problem: Problem) -> Self {
        Self { problems: vec![problem] }
    }
}

/// Writes one line for each problem.
impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.problems.iter().try_for_each(|problem| writeln!(f, "{problem}"))
    }
}

impl std::error::Error for Report {}

/// Joins words to `a, b or c`.
pub(super) fn alternatives<W: AsRef<str>>(words: &[W]) -> String {
    let words: Vec<&str> = words.iter().map(AsRef::as_ref).collect();
    match words.split_last() {
        Some((last, others)) if !others.is_empty() => format!("{} or {last}", others.join(", ")),
        _ => words.concat(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn suggestion_is_the_nearest_word_or_all_words() {
        let suggest = |word| Help::suggest(word, &["address", "tls"]);
        assert_eq!(suggest("adress"), Help::DidYouMean("address".to_owned()));
        assert_eq!(suggest("TLS"), Help::DidYouMean("tls".to_owned()));
        assert_eq!(suggest("colour"), Help::Known(vec!["address".to_owned(), "tls".to_owned()]));
    }

    #[test]
    fn alternatives_are_joined_by_or() {
        assert_eq!(alternatives(&["up", "drain", "down"]), "up, drain or down");
        assert_eq!(alternatives(&["up"]), "up");
    }
}
