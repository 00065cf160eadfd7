//! Collects the problems of one configuration file.
//!
//! A map with an error is read again without the faulty key, until it can be read or nothing more can be removed, so that
//! one error does not hide the next.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::de::DeserializeOwned;
use serde_path_to_error::Segment;
use serde_yaml::Value;

use super::deserializer::{ValueDeserializer, ValueError};
use super::positions::{Duplicate, Position, Positions, join};
use crate::config::error::{Help, Location, Problem, Report};

/// Maximum number of errors reported for one map.
const MAX_ERRORS_PER_MAP: usize = 50;

/// Maximum number of problems reported for one file.
const MAX_PROBLEMS: usize = 200;

/// Reads values and collects problems.
#[derive(Debug)]
pub(in crate::config) struct Reader {
    file: Arc<Path>,
    positions: Positions,
    problems: Vec<Problem>,
    warnings: Vec<Problem>,
    /// Location of the last problem beyond [`MAX_PROBLEMS`].
    unlisted: Option<Location>,
}

impl Reader {
    pub(in crate::config) fn new(file: &Path, positions: Positions) -> Self {
        Self { file: file.into(), positions, problems: Vec::new(), warnings: Vec::new(), unlisted: None }
    }

    /// Returns `value` if no problem was found.
    pub(in crate::config) fn finish<T>(mut self, value: Option<T>) -> Result<T, Report> {
        if let Some(value) = value.filter(|_| self.problems.is_empty()) {
            return Ok(value);
        }
        if let Some(location) = self.unlisted.take() {
            let message = format!("more than {MAX_PROBLEMS} problems; the others are not listed");
            self.problems.push(location.problem(message));
        }
        Err(Report::new(self.problems))
    }

    /// Resolves a relative path against the folder of the configuration file.
    pub(super) fn resolve(&self, path: &Path) -> PathBuf {
        self.file.parent().unwrap_or(Path::new("")).join(path)
    }

    pub(super) fn location(&self, key: &str) -> Location {
        self.location_at(self.positions.position(key), key)
    }

    /// Whether a problem at `key` or below it has been reported.
    pub(super) fn has_problem_below(&self, key: &str) -> bool {
        self.problems.iter().any(|problem| {
            let below = problem.location.key.strip_prefix(key);
            below.is_some_and(|below| below.is_empty() || below.starts_with(['.', '[']))
        })
    }

    /// Whether a problem at `key` itself has been reported.
    pub(super) fn has_problem_at(&self, key: &str) -> bool {
        self.problems.iter().any(|problem| problem.location.key == key)
    }

    pub(super) fn report(&mut self, key: &str, message: impl Into<String>, help: Option<Help>) {
        let location = self.location(key);
        self.add(Problem { location, message: message.into(), help });
    }

    pub(super) fn warn(&mut self, key: &str, message: impl Into<String>) {
        self.warnings.push(self.location(key).problem(message));
    }

    pub(in crate::config) fn take_warnings(&mut self) -> Vec<Problem> {
        std::mem::take(&mut self.warnings)
    }

    /// Reports duplicate keys, a second document and excessive depth. Returns false if the text should not be read at all.
    pub(in crate::config) fn check_structure(&mut self) -> bool {
        for Duplicate { key, first, second } in std::mem::take(&mut self.positions.duplicates) {
            let message = format!("duplicate key; first defined in line {}", first.line);
            self.add(self.location_at(second, &key).problem(message));
        }
        let second = self.positions.second_document.map(|position| {
            (position, "a second YAML document begins here (---); a configuration file contains one document")
        });
        let deep = self.positions.too_deep.map(|position| (position, "maps and lists are nested too deeply"));
        let faults: Vec<_> = second.into_iter().chain(deep).collect();
        for (position, message) in &faults {
            self.add(self.location_at(*position, "").problem(*message));
        }
        faults.is_empty()
    }

    /// Reports and removes keys that are not strings, and keys without a value.
    ///
    /// If the latter counted as absent, `tls:` or `pin:` above lines that are commented out would silently mean less
    /// protection than the operator believes.
    pub(in crate::config) fn reject_nulls(&mut self, key: &str, value: &mut Value) {
        match value {
            Value::Mapping(map) => map.retain(|name, value| {
                let Some(name) = name.as_str() else {
                    self.report(&join(key, &as_written(name)), "a key must be a string; put it in quotes", None);
                    return false;
                };
                let path = join(key, name);
                // A top-level section without keys is allowed: all of its keys have defaults.
                if value.is_null() && !key.is_empty() {
                    self.report(&path, "has no value; set one or remove the key", None);
                    return false;
                }
                self.reject_nulls(&path, value);
                true
            }),
            Value::Sequence(items) => {
                for (index, item) in items.iter_mut().enumerate() {
                    self.reject_nulls(&format!("{key}[{index}]"), item);
                }
            }
            Value::Tagged(tagged) => self.reject_nulls(key, &mut tagged.value),
            Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
        }
    }

    /// Reads the value of `key` as a `T`, and reports all errors. Returns `None` if it cannot be read even without the
    /// faulty keys.
    pub(super) fn read<T: DeserializeOwned>(&mut self, key: &str, mut value: Value) -> Option<T> {
        for _ in 0..MAX_ERRORS_PER_MAP {
            let error = match serde_path_to_error::deserialize::<_, T>(ValueDeserializer(value.clone())) {
                Ok(read) => return Some(read),
                Err(error) => error,
            };
            let mut steps: Vec<Segment> = error.path().iter().cloned().collect();
            steps.retain(|step| !matches!(step, Segment::Unknown | Segment::Enum { .. }));
            let error = error.into_inner();
            match &error {
                ValueError::MissingKey(name) if self.explains_missing(&path(key, &steps), name) => return None,
                ValueError::UnknownKey { key: unknown, .. } if !matches!(steps.last(), Some(Segment::Map { key }) if key == unknown) =>
                {
                    steps.push(Segment::Map { key: unknown.clone() });
                }
                _ => {}
            }
            self.report(&path(key, &steps), error.to_string(), help(&error));
            remove(&mut value, &steps)?;
        }
        None
    }

    /// Whether a reported problem explains that `name` is missing in the map at `key`: its value is wrong, or it is
    /// misspelt.
    fn explains_missing(&self, key: &str, name: &str) -> bool {
        let misspelt = Some(Help::DidYouMean(name.to_owned()));
        let is_misspelling = |problem: &Problem| {
            let last = problem.location.key.strip_prefix(key).map(|below| below.trim_start_matches('.'));
            problem.help == misspelt && last.is_some_and(|last| !last.contains(['.', '[']))
        };
        self.has_problem_below(&join(key, name)) || self.problems.iter().any(is_misspelling)
    }

    fn location_at(&self, position: Position, key: &str) -> Location {
        Location { file: self.file.clone(), line: position.line, column: position.column, key: key.to_owned() }
    }

    fn add(&mut self, problem: Problem) {
        // A problem in an anchor is found again at each of its aliases.
        if self.problems.contains(&problem) {
            return;
        }
        if self.problems.len() < MAX_PROBLEMS {
            self.problems.push(problem);
        } else {
            let last = self.problems.iter().map(|problem| &problem.location).max_by_key(|at| (at.line, at.column));
            self.unlisted = last.map(|last| Location { key: String::new(), ..last.clone() });
        }
    }
}

/// A problem of a text that is not YAML. The message contains no value of the text.
pub(in crate::config) fn syntax_error(file: &Path, text: &str, error: &serde_yaml::Error) -> Problem {
    let (line, column) = error.location().map_or((1, 1), |at| (at.line(), at.column()));
    let location = Location { line, column, ..Location::of_file(file) };
    let message = error.to_string();
    // A tag such as `!!int` is checked here, and the message contains the value, after the key.
    if let Some(start) = message.find("invalid value: ").or_else(|| message.find("invalid type: ")) {
        let key = message[..start].trim_end_matches(": ").to_owned();
        return Location { key, ..location }.problem("the value does not match its YAML tag");
    }
    let at = text.lines().nth(line - 1).unwrap_or_default();
    let has_tab = at[..at.len() - at.trim_start().len()].contains('\t');
    let help = has_tab.then_some(Help::Advice("indent with spaces: YAML does not allow tabs there"));
    Problem { location, message: format!("invalid YAML: {message}"), help }
}

fn help(error: &ValueError) -> Option<Help> {
    match error {
        ValueError::UnknownKey { key, known } => Some(Help::suggest(key, known)),
        // The message lists the known words, so that only a near one helps.
        ValueError::UnknownWord { word, known } => {
            Some(Help::suggest(word, known)).filter(|help| matches!(help, Help::DidYouMean(_)))
        }
        ValueError::MissingKey(_) | ValueError::WrongType { .. } | ValueError::WrongForm { .. } | ValueError::Other => {
            None
        }
    }
}

/// `prefix` and the steps below it.
fn path(prefix: &str, steps: &[Segment]) -> String {
    steps.iter().fold(prefix.to_owned(), |path, step| match step {
        Segment::Seq { index } => format!("{path}[{index}]"),
        Segment::Map { key } => join(&path, key),
        Segment::Enum { .. } | Segment::Unknown => path,
    })
}

/// Removes the innermost map key on the way of `steps`. Returns `None` if there is none.
fn remove(value: &mut Value, steps: &[Segment]) -> Option<()> {
    let last = steps.iter().rposition(|step| matches!(step, Segment::Map { .. }))?;
    let mut current = value;
    for step in &steps[..last] {
        current = match step {
            Segment::Seq { index } => current.get_mut(*index)?,
            Segment::Map { key } => current.get_mut(key.as_str())?,
            Segment::Enum { .. } | Segment::Unknown => return None,
        };
    }
    let Segment::Map { key } = &steps[last] else { return None };
    current.as_mapping_mut()?.remove(key.as_str()).map(drop)
}

/// A key that YAML does not read as a string, as the operator probably wrote it.
fn as_written(key: &Value) -> String {
    match key {
        Value::Bool(value) => value.to_string(),
        Value::Number(value) => value.to_string(),
        Value::Null => "null".to_owned(),
        _ => String::new(),
    }
}
