//! YAML to the structs of `file`, with every mistake in it found and told in the operator's words.
//!
//! A map with a mistake is read again without the faulty key, until it reads or nothing more can be left out: so one
//! mistake does not hide the next. Values never appear in a message: a secret may have ended up at the wrong key.

use serde::de::DeserializeOwned;
use serde_path_to_error::Segment;
use serde_yaml::{Mapping, Value};

use super::locate::{Index, child};
use super::report::{Place, Problem, suggestion};

/// More mistakes than this in one map are not worth listing.
const MAX_MISTAKES: usize = 50;

/// Collects mistakes of one file.
#[derive(Debug)]
pub(super) struct Reader<'a> {
    file: &'a std::path::Path,
    index: Index,
    pub(super) problems: Vec<Problem>,
}

impl<'a> Reader<'a> {
    pub(super) fn new(file: &'a std::path::Path, index: Index) -> Self {
        Self { file, index, problems: Vec::new() }
    }

    pub(super) fn place(&self, key: &str) -> Place {
        let position = self.index.position(key);
        Place { line: position.line, column: position.column, key: key.to_owned() }
    }

    pub(super) fn problem(&mut self, key: &str, message: impl Into<String>) {
        self.problem_with_help(key, message, None);
    }

    pub(super) fn problem_with_help(&mut self, key: &str, message: impl Into<String>, help: Option<String>) {
        let place = self.place(key);
        // One mistake may be met twice, by way of an anchor for example.
        let problem = Problem { file: self.file.to_owned(), place, message: message.into(), help };
        if !self.problems.contains(&problem) {
            self.problems.push(problem);
        }
    }

    /// Keys that stand twice.
    pub(super) fn duplicates(&mut self) {
        for (key, first, second) in std::mem::take(&mut self.index.duplicates) {
            let message = format!("the key stands twice; the first time in line {}", first.line);
            let place = Place { line: second.line, column: second.column, key };
            self.problems.push(Problem { file: self.file.to_owned(), place, message, help: None });
        }
    }

    /// Reads `value`, which stands at `key`, as a `T`. `None`: not even without its faulty keys is it one.
    pub(super) fn read<T: DeserializeOwned>(&mut self, key: &str, mut value: Value) -> Option<T> {
        let mut left_out: Vec<String> = Vec::new();
        for _ in 0..MAX_MISTAKES {
            let error = match serde_path_to_error::deserialize::<_, T>(value.clone()) {
                Ok(read) => return Some(read),
                Err(error) => error,
            };
            let mut steps: Vec<Segment> = error.path().iter().cloned().collect();
            steps.retain(|step| !matches!(step, Segment::Unknown | Segment::Enum { .. }));
            let message = error.into_inner().to_string();
            let missing = backticked(&message).first().filter(|_| message.starts_with("missing field")).copied();
            if missing.is_some_and(|name| left_out.iter().any(|other| other == name)) {
                return None;
            }
            if let Some(unknown) = backticked(&message).first().filter(|_| message.starts_with("unknown field"))
                && steps.last().is_none_or(|last| !matches!(last, Segment::Map { key } if key == unknown))
            {
                steps.push(Segment::Map { key: (*unknown).to_owned() });
            }
            let (text, help) = told(&message);
            self.problem_with_help(&path(key, &steps), text, help);
            left_out.push(leave_out(&mut value, &steps)?);
        }
        None
    }
}

/// `prefix` and the steps below it.
fn path(prefix: &str, steps: &[Segment]) -> String {
    steps.iter().fold(prefix.to_owned(), |path, step| match step {
        Segment::Seq { index } => format!("{path}[{index}]"),
        Segment::Map { key } => child(&path, key),
        Segment::Enum { .. } | Segment::Unknown => path,
    })
}

/// Removes the innermost key of a map on the way; says which. `None` where there is none.
fn leave_out(value: &mut Value, steps: &[Segment]) -> Option<String> {
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
    let map: &mut Mapping = current.as_mapping_mut()?;
    map.remove(key.as_str()).map(|_| key.clone())
}

/// serde's sentence in an operator's words, without the value that was found, and what was probably meant.
fn told(message: &str) -> (String, Option<String>) {
    let words = backticked(message);
    if message.starts_with("unknown field") {
        let (unknown, known) = words.split_first().unwrap_or((&"", &[]));
        return ("unknown key".to_owned(), suggestion(unknown, known));
    }
    if message.starts_with("unknown variant") {
        let (unknown, known) = words.split_first().unwrap_or((&"", &[]));
        let nearest = suggestion(unknown, known).filter(|help| help.starts_with("did you mean"));
        return (format!("expected one of {}", known.join(", ")), nearest);
    }
    if message.starts_with("missing field") {
        return (format!("the key `{}` is missing", words.first().unwrap_or(&"?")), None);
    }
    let Some((found, expected)) = message.rsplit_once(", expected ").filter(|_| message.starts_with("invalid ")) else {
        return (message.to_owned(), None);
    };
    let found = found.split_once(": ").map_or("", |(_, found)| found);
    (format!("expected {}, found {}", expectation(expected), kind(found)), None)
}

fn expectation(expected: &str) -> &str {
    match expected {
        "u16" | "u32" | "u64" | "usize" => "a whole number",
        "a sequence" => "a list",
        "a map" | "a YAML mapping" => "a map",
        "path string" => "a path",
        "a boolean" => "true or false",
        map if map.starts_with("struct ") => "a map",
        other => other,
    }
}

fn kind(found: &str) -> &'static str {
    match found.split([' ', '`', '"']).next().unwrap_or_default() {
        "string" => "a text of another form",
        "integer" | "floating" => "a number",
        "boolean" => "true or false",
        "sequence" => "a list",
        "map" => "a map",
        "unit" | "null" | "Option" => "nothing",
        _ => "something else",
    }
}

/// The words between backticks.
fn backticked(message: &str) -> Vec<&str> {
    message.split('`').skip(1).step_by(2).collect()
}
