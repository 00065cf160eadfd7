//! What is wrong with a configuration, each with its place.

use std::fmt;
use std::path::PathBuf;

/// Where something stands in the configuration file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// From 1.
    pub line: usize,
    /// From 1.
    pub column: usize,
    /// As a path: `backends.shard-a.servers[0]`.
    pub key: String,
}

/// A value and where it stands, for those who use it later and may find it wrong.
#[derive(Debug, Clone)]
pub struct Located<T> {
    /// The value.
    pub value: T,
    /// Its place.
    pub place: Place,
}

/// Equal wherever it stands: what has only moved down a line has not changed.
impl<T: PartialEq> PartialEq for Located<T> {
    fn eq(&self, other: &Self) -> bool {
        self.value == other.value
    }
}

/// One mistake. The texts never show a value that could be a secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// The configuration file.
    pub file: PathBuf,
    /// Where in it.
    pub place: Place,
    /// What is wrong, and what was expected.
    pub message: String,
    /// What was probably meant.
    pub help: Option<String>,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Place { line, column, key } = &self.place;
        write!(f, "{}:{line}:{column}: ", self.file.display())?;
        if !key.is_empty() {
            // A key is the operator's own, but a line break in it would make two lines of one problem.
            let shown: String = key.chars().map(|char| if char.is_control() { '\u{fffd}' } else { char }).collect();
            write!(f, "{shown}: ")?;
        }
        f.write_str(&self.message)?;
        match &self.help {
            Some(help) => write!(f, "; {help}"),
            None => Ok(()),
        }
    }
}

/// All mistakes, in the order of the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    problems: Vec<Problem>,
}

impl Report {
    /// Sorts `problems`.
    pub fn new(mut problems: Vec<Problem>) -> Self {
        problems.sort_by_key(|problem| (problem.place.line, problem.place.column));
        Self { problems }
    }

    /// In the order of the file.
    pub fn problems(&self) -> &[Problem] {
        &self.problems
    }
}

/// A line a problem.
impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.problems.iter().try_for_each(|problem| writeln!(f, "{problem}"))
    }
}

impl std::error::Error for Report {}

/// "did you mean" for a word that is none of `known`: the nearest one if it is near, else all of them.
pub(super) fn suggestion(word: &str, known: &[&str]) -> Option<String> {
    let distance = |other: &str| strsim::damerau_levenshtein(&word.to_lowercase(), other);
    let nearest = known.iter().min_by_key(|other| distance(other))?;
    if distance(nearest) <= nearest.len().div_ceil(3) {
        return Some(did_you_mean(nearest));
    }
    Some(format!("known: {}", known.join(", ")))
}

/// The help for a word that is nearly `word`.
pub(super) fn did_you_mean(word: &str) -> String {
    format!("did you mean `{word}`?")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_word_or_all() {
        assert_eq!(suggestion("adress", &["address", "tls"]).unwrap(), "did you mean `address`?");
        assert_eq!(suggestion("TLS", &["address", "tls"]).unwrap(), "did you mean `tls`?");
        assert_eq!(suggestion("colour", &["address", "tls"]).unwrap(), "known: address, tls");
    }
}
