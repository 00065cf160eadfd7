//! YAML to the structs of `file`, with every mistake in it found and told in the operator's words.
//!
//! A map with a mistake is read again without the faulty key, until it reads or nothing more can be left out: so one
//! mistake does not hide the next. Values never appear in a message: a secret may have ended up at the wrong key.

use std::marker::PhantomData;
use std::path::Path;
use std::sync::Arc;

use serde::de::DeserializeOwned;
use serde_path_to_error::Segment;
use serde_yaml::{Mapping, Value};

use super::error::{Help, Location, Problem, Report};
use super::locate::{Position, Positions, child};

/// More mistakes than this in one map are not worth listing.
const MAX_MISTAKES: usize = 50;

/// More mistakes than this in one file are not listed.
const MAX_PROBLEMS: usize = 200;

/// Collects mistakes of one file.
#[derive(Debug)]
pub(super) struct Reader<'a> {
    file: Arc<Path>,
    text: PhantomData<&'a ()>,
    index: Positions,
    problems: Vec<Problem>,
    warnings: Vec<Problem>,
    /// The last position of a mistake beyond [`MAX_PROBLEMS`].
    unlisted: Option<Location>,
}

impl<'a> Reader<'a> {
    pub(super) fn new(file: &'a Path, index: Positions) -> Self {
        Self { file: file.into(), text: PhantomData, index, problems: Vec::new(), warnings: Vec::new(), unlisted: None }
    }

    /// `ready`, unless there was a mistake.
    pub(super) fn finish<T>(mut self, ready: Option<T>) -> Result<T, Report> {
        if let Some(ready) = ready.filter(|_| self.problems.is_empty()) {
            return Ok(ready);
        }
        if let Some(location) = self.unlisted.take() {
            self.problems.push(location.problem(format!("there are more mistakes than these {MAX_PROBLEMS}")));
        }
        Err(Report::new(self.problems))
    }

    pub(super) fn location(&self, key: &str) -> Location {
        let position = self.index.position(key);
        self.at(position, key)
    }

    fn at(&self, position: Position, key: &str) -> Location {
        Location { file: self.file.clone(), line: position.line, column: position.column, key: key.to_owned() }
    }

    /// Whether a mistake at `key`, or below it, was told already, so that what follows from it need not be.
    pub(super) fn blamed(&self, key: &str) -> bool {
        self.problems.iter().any(|problem| {
            let below = problem.location.key.strip_prefix(key);
            below.is_some_and(|below| below.is_empty() || below.starts_with(['.', '[']))
        })
    }

    /// Whether there was a mistake at `key` itself.
    pub(super) fn is_told(&self, key: &str) -> bool {
        self.problems.iter().any(|problem| problem.location.key == key)
    }

    pub(super) fn problem(&mut self, key: &str, message: impl Into<String>) {
        self.problem_with_help(key, message, None);
    }

    pub(super) fn problem_with_help(&mut self, key: &str, message: impl Into<String>, help: Option<Help>) {
        let location = self.location(key);
        self.tell(Problem { location, message: message.into(), help });
    }

    /// Something that is allowed at `key`, but seldom meant.
    pub(super) fn warning(&mut self, key: &str, message: impl Into<String>) {
        self.warnings.push(self.location(key).problem(message));
    }

    /// The warnings so far.
    pub(super) fn take_warnings(&mut self) -> Vec<Problem> {
        std::mem::take(&mut self.warnings)
    }

    /// Keys that stand twice, a second document, and lists in lists in lists. Whether the file can be read all the same.
    pub(super) fn structure(&mut self) -> bool {
        for (key, first, second) in std::mem::take(&mut self.index.duplicates) {
            let message = format!("the key stands twice; the first time in line {}", first.line);
            self.tell(self.at(second, &key).problem(message));
        }
        let second =
            self.index.second_document.map(|at| (at, "a second document begins here (---), a configuration is one"));
        let deep = self.index.too_deep.map(|at| (at, "there are too many maps and lists in each other"));
        let readable = second.is_none() && deep.is_none();
        for (position, message) in second.into_iter().chain(deep) {
            self.tell(self.at(position, "").problem(message));
        }
        readable
    }

    /// Takes out of `value` keys that are no texts, and keys without a value. Were the latter read as absent, `tls:` or
    /// `pin:` with nothing behind it, its lines commented out, would silently mean less protection than is believed.
    pub(super) fn tidy(&mut self, key: &str, value: &mut Value) {
        match value {
            Value::Mapping(map) => map.retain(|name, value| {
                let Some(name) = name.as_str() else {
                    self.problem(&child(key, &scalar(name)), "a key must be a text: put it in quotes");
                    return false;
                };
                let path = child(key, name);
                // A section without any key is no mistake: all of its keys have defaults.
                if value.is_null() && !key.is_empty() {
                    self.problem(&path, "has no value: give it one, or remove the key");
                    return false;
                }
                self.tidy(&path, value);
                true
            }),
            Value::Sequence(items) => {
                for (index, item) in items.iter_mut().enumerate() {
                    self.tidy(&format!("{key}[{index}]"), item);
                }
            }
            Value::Tagged(tagged) => self.tidy(key, &mut tagged.value),
            Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
        }
    }

    /// Reads `value`, which stands at `key`, as a `T`. `None`: not even without its faulty keys is it one.
    pub(super) fn read<T: DeserializeOwned>(&mut self, key: &str, mut value: Value) -> Option<T> {
        for _ in 0..MAX_MISTAKES {
            let error = match serde_path_to_error::deserialize::<_, T>(value.clone()) {
                Ok(read) => return Some(read),
                Err(error) => error,
            };
            let mut steps: Vec<Segment> = error.path().iter().cloned().collect();
            steps.retain(|step| !matches!(step, Segment::Unknown | Segment::Enum { .. }));
            let message = error.into_inner().to_string();
            if let Some(name) = missing(&message)
                && self.explains_missing(&path(key, &steps), name)
            {
                return None;
            }
            if let Some((unknown, _)) = unknown(&message, "field")
                && steps.last().is_none_or(|last| !matches!(last, Segment::Map { key } if key == unknown))
            {
                steps.push(Segment::Map { key: unknown.to_owned() });
            }
            let (text, help) = told(&message);
            self.problem_with_help(&path(key, &steps), text, help);
            leave_out(&mut value, &steps)?;
        }
        None
    }

    /// `name` in the map at `key` is there, but wrong and told, or was told to be misspelt.
    fn explains_missing(&self, key: &str, name: &str) -> bool {
        let misspelt = Help::DidYouMean(name.to_owned());
        let meant = |problem: &Problem| {
            let last = problem.location.key.strip_prefix(key).map(|below| below.trim_start_matches('.'));
            problem.help.as_ref() == Some(&misspelt) && last.is_some_and(|last| !last.contains(['.', '[']))
        };
        self.blamed(&child(key, name)) || self.problems.iter().any(meant)
    }

    fn tell(&mut self, problem: Problem) {
        // One mistake may be met twice, by way of an anchor for example.
        if self.problems.contains(&problem) {
            return;
        }
        if self.problems.len() < MAX_PROBLEMS {
            self.problems.push(problem);
        } else {
            let last = self.problems.iter().map(|problem| &problem.location).max_by_key(|at| (at.line, at.column));
            self.unlisted = last.map(|at| Location { key: String::new(), ..at.clone() });
        }
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

/// Removes the innermost key of a map on the way. `None` where there is none.
fn leave_out(value: &mut Value, steps: &[Segment]) -> Option<()> {
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
    map.remove(key.as_str()).map(drop)
}

/// serde's sentence in an operator's words, without the value that was found, and what was probably meant.
///
/// The value may hold anything, the words around it included, so sentences are taken apart at their known ends.
fn told(message: &str) -> (String, Option<Help>) {
    if let Some((unknown, known)) = unknown(message, "field") {
        return ("unknown key".to_owned(), Some(Help::suggest(unknown, &known)));
    }
    if let Some((unknown, known)) = unknown(message, "variant") {
        let nearest = Some(Help::suggest(unknown, &known)).filter(|help| matches!(help, Help::DidYouMean(_)));
        return (format!("expected one of {}", known.join(", ")), nearest);
    }
    if let Some(name) = missing(message) {
        return (format!("the key `{name}` is missing"), None);
    }
    let Some((found, expected)) = message.rsplit_once(", expected ").filter(|_| message.starts_with("invalid ")) else {
        // A sentence nobody foresaw may show the value.
        return ("is not of the expected form".to_owned(), None);
    };
    let found = found.split_once(": ").map_or("", |(_, found)| found);
    (format!("expected {}, found {}", expectation(expected), kind(found)), None)
}

/// What is wrong with a text that is no YAML at all; never a value in it.
pub(super) fn no_yaml(file: &Path, text: &str, error: &serde_yaml::Error) -> Problem {
    let (line, column) = error.location().map_or((1, 1), |at| (at.line(), at.column()));
    let said = error.to_string();
    let file = file.into();
    // Tags such as !!int are checked while reading, and their sentences show the value, behind the key.
    if let Some(start) = said.find("invalid value: ").or_else(|| said.find("invalid type: ")) {
        let key = said[..start].trim_end_matches(": ").to_owned();
        let message = told(&said[start..]).0.replace(&format!(" at line {line} column {column}"), "");
        return Location { file, line, column, key }.problem(message);
    }
    let at = text.lines().nth(line - 1).unwrap_or_default();
    let tab = at[..at.len() - at.trim_start().len()].contains('\t');
    let help = tab.then(|| Help::Advice("indent with spaces: YAML allows no tab there"));
    let location = Location { file, line, column, key: String::new() };
    Problem { location, message: format!("not YAML: {said}"), help }
}

/// A key that YAML takes for something else than a text, as it is probably written.
fn scalar(key: &Value) -> String {
    match key {
        Value::Bool(value) => value.to_string(),
        Value::Number(value) => value.to_string(),
        Value::Null => "null".to_owned(),
        _ => String::new(),
    }
}

/// The word that is none of those known, and these.
fn unknown<'m>(message: &'m str, what: &str) -> Option<(&'m str, Vec<&'m str>)> {
    let rest = message.strip_prefix("unknown ")?.strip_prefix(what)?.strip_prefix(" `")?;
    let (word, known) = rest.rsplit_once("`, expected ")?;
    Some((word, known.split('`').skip(1).step_by(2).collect()))
}

/// The key that should be there.
fn missing(message: &str) -> Option<&str> {
    message.strip_prefix("missing field `")?.strip_suffix('`')
}

fn expectation(expected: &str) -> &str {
    match expected {
        "i64" => "a whole number",
        "f64" => "a number",
        "a string" => "a text",
        // What serde says of an enum: its words are known only once there is one.
        "a Value::Tagged enum" => "a word",
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
        "integer" => "a number",
        "floating" => "a number with a fraction",
        "boolean" => "true or false",
        "sequence" => "a list",
        "map" => "a map",
        "unit" | "null" | "Option" => "nothing",
        _ => "something else",
    }
}
