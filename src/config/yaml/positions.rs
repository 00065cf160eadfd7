//! Positions of all keys in a YAML text, which serde does not report, and duplicate keys.
//!
//! Keys are written as paths, like `backends.shard-a.servers[0]`. A position is that of the key in a map or of the item in
//! a list.

use std::collections::HashMap;

use saphyr_parser::{Event, Marker, Parser};

/// Maximum depth of maps and lists. A configuration needs six levels; paths in a much deeper text would need memory and
/// time that are quadratic in its size.
const MAX_DEPTH: usize = 64;

/// Line and column, both counted from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Position {
    pub(super) line: usize,
    pub(super) column: usize,
}

impl Position {
    const START: Self = Self { line: 1, column: 1 };

    fn of(marker: &Marker) -> Self {
        Self { line: marker.line(), column: marker.col() + 1 }
    }
}

/// The positions of one text.
#[derive(Debug, Default)]
pub(in crate::config) struct Positions {
    by_path: HashMap<String, Position>,
    pub(super) duplicates: Vec<Duplicate>,
    /// Start of a second document.
    pub(super) second_document: Option<Position>,
    /// Start of a level beyond [`MAX_DEPTH`].
    pub(super) too_deep: Option<Position>,
}

/// A key that occurs twice in one map.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Duplicate {
    pub(super) key: String,
    pub(super) first: Position,
    pub(super) second: Position,
}

/// A map or list that is open.
enum Level {
    /// `seen` contains only the keys of this map: in `{a: {b: 1}, a.b: 2}` two paths are equal, but no keys.
    Map {
        path: String,
        key: Option<String>,
        seen: HashMap<String, Position>,
    },
    List {
        path: String,
        next: usize,
    },
}

impl Positions {
    /// Reads the first document up to the first syntax error; keys after it have no position.
    pub(in crate::config) fn new(text: &str) -> Self {
        let mut positions = Self::default();
        let mut levels: Vec<Level> = Vec::new();
        let mut has_document = false;
        for event in Parser::new_from_str(text) {
            let (event, span) = match event {
                Ok(event) => event,
                Err(error) => {
                    // The scanner is ahead of the parser and may reach its own limit of 255 flow levels first.
                    if error.info() == "recursion limit exceeded" {
                        positions.too_deep = Some(Position::of(error.marker()));
                    }
                    break;
                }
            };
            if levels.len() > MAX_DEPTH {
                positions.too_deep = Some(Position::of(&span.start));
                break;
            }
            match event {
                Event::DocumentStart(_) if has_document => {
                    positions.second_document = Some(Position::of(&span.start));
                    break;
                }
                Event::DocumentStart(_) => has_document = true,
                Event::MappingStart(..) => {
                    let path = positions.value(&mut levels, &span.start);
                    levels.push(Level::Map { path, key: None, seen: HashMap::new() });
                }
                Event::SequenceStart(..) => {
                    let path = positions.value(&mut levels, &span.start);
                    levels.push(Level::List { path, next: 0 });
                }
                Event::MappingEnd | Event::SequenceEnd => {
                    levels.pop();
                }
                Event::Scalar(text, ..) => positions.scalar(&mut levels, &text, &span.start),
                Event::Alias(_) => {
                    positions.value(&mut levels, &span.start);
                }
                _ => {}
            }
        }
        positions
    }

    /// Position of the key at `path`, or of the nearest key around it that has one.
    pub(super) fn position(&self, path: &str) -> Position {
        let mut path = path;
        loop {
            if let Some(position) = self.by_path.get(path) {
                return *position;
            }
            let Some(cut) = path.rfind(['.', '[']) else { return Position::START };
            path = &path[..cut];
        }
    }

    fn scalar(&mut self, levels: &mut [Level], text: &str, start: &Marker) {
        if let Some(Level::Map { path, key: key @ None, seen }) = levels.last_mut() {
            let full = join(path, text);
            *key = Some(full.clone());
            let position = Position::of(start);
            match seen.get(text) {
                Some(first) => {
                    // Keys below the duplicate get paths of their own, so that they are not reported as duplicates too.
                    *key = Some(format!("{full} (duplicate)"));
                    self.duplicates.push(Duplicate { key: full, first: *first, second: position });
                }
                None => {
                    seen.insert(text.to_owned(), position);
                    self.by_path.entry(full).or_insert(position);
                }
            }
        } else {
            self.value(levels, start);
        }
    }

    /// Records the start of a value and returns its path.
    fn value(&mut self, levels: &mut [Level], start: &Marker) -> String {
        match levels.last_mut() {
            None => String::new(),
            // A map that is a key has no path; serde refuses it later.
            Some(Level::Map { key, path, .. }) => key.take().unwrap_or_else(|| path.clone()),
            Some(Level::List { path, next }) => {
                let full = format!("{path}[{next}]");
                *next += 1;
                self.by_path.insert(full.clone(), Position::of(start));
                full
            }
        }
    }
}

/// The path of `key` in the map at `path`. An index like `[0]` is appended without a dot; an empty `key` means `path`.
pub(super) fn join(path: &str, key: &str) -> String {
    match (path, key) {
        ("", key) => key.to_owned(),
        (path, "") => path.to_owned(),
        (path, index) if index.starts_with('[') => format!("{path}{index}"),
        (path, key) => format!("{path}.{key}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_are_those_that_an_editor_shows() {
        let positions = Positions::new("a: 1\nb:\n  - x\n  - c: 2\n    d: [5, 6]\n");
        let at = |path: &str| {
            let position = positions.position(path);
            (position.line, position.column)
        };
        assert_eq!(at("a"), (1, 1));
        assert_eq!(at("b[0]"), (3, 5));
        assert_eq!(at("b[1].c"), (4, 5));
        assert_eq!(at("b[1].d[1]"), (5, 12));
        assert_eq!(at("b[1].missing.deep"), (4, 5), "the nearest key around it");
        assert_eq!(at("nothing"), (1, 1));
    }

    #[test]
    fn duplicate_keys_are_found_with_both_positions() {
        let positions = Positions::new("a: {x: 1, x: 2}\nb: 1\na: {x: 3}\n");
        let found: Vec<_> =
            positions.duplicates.iter().map(|it| (it.key.as_str(), it.first.line, it.second.line)).collect();
        assert_eq!(found, [("a.x", 1, 1), ("a", 1, 3)]);
    }

    #[test]
    fn equal_paths_of_different_keys_are_not_duplicates() {
        assert_eq!(Positions::new("a: {b: 1}\na.b: 2\n").duplicates, []);
    }

    #[test]
    fn second_document_is_not_read() {
        let positions = Positions::new("a: 1\n---\na: 2\n");
        assert_eq!(positions.duplicates, []);
        assert_eq!(positions.second_document, Some(Position { line: 2, column: 1 }));
        assert_eq!(Positions::new("---\na: 1\n").second_document, None);
    }

    #[test]
    fn deep_text_needs_little_memory() {
        let positions = Positions::new(&"- ".repeat(20_000));
        assert!(positions.too_deep.is_some());
        assert!(positions.by_path.len() <= MAX_DEPTH + 1, "{}", positions.by_path.len());
    }
}
