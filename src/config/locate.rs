//! Where every key of a YAML text stands, which serde does not tell, and which keys stand twice.
//!
//! Keys are written as paths: `backends.shard-a.servers[0]`. The position is that of the key in a map, and of the item in
//! a list. Called by `config::parse`.

use std::collections::HashMap;

use saphyr_parser::{Event, Marker, Parser};

/// A configuration needs six levels. Of much deeper texts, paths would be quadratic in size and reading in time.
const MAX_DEPTH: usize = 64;

/// Line and column, both counted from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Position {
    pub(super) line: usize,
    pub(super) column: usize,
}

impl Position {
    pub(super) const START: Self = Self { line: 1, column: 1 };

    fn of(marker: &Marker) -> Self {
        Self { line: marker.line(), column: marker.col() + 1 }
    }
}

/// Paths and positions of one text.
#[derive(Debug, Default)]
pub(super) struct Positions {
    positions: HashMap<String, Position>,
    /// Keys that stand twice in one map: the path, the first and the second position.
    pub(super) duplicates: Vec<(String, Position, Position)>,
    /// Where a second document begins.
    pub(super) second_document: Option<Position>,
    /// Where a level beyond [`MAX_DEPTH`] begins.
    pub(super) too_deep: Option<Position>,
}

/// A map or list being read.
enum Level {
    /// `seen` holds the keys of this map alone: the paths of `{a: {b: 1}, a.b: 2}` are equal, its keys are not.
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
    /// Reads the first document as far as it is YAML; what is behind a syntax error has no position.
    pub(super) fn new(text: &str) -> Self {
        let mut index = Self::default();
        let mut levels: Vec<Level> = Vec::new();
        let mut begun = false;
        for event in Parser::new_from_str(text) {
            let (event, span) = match event {
                Ok(event) => event,
                Err(error) => {
                    // The scanner runs ahead of the parser and may meet its own limit of 255 flow levels first.
                    if error.info() == "recursion limit exceeded" {
                        index.too_deep = Some(Position::of(error.marker()));
                    }
                    break;
                }
            };
            if levels.len() > MAX_DEPTH {
                index.too_deep = Some(Position::of(&span.start));
                break;
            }
            match event {
                Event::DocumentStart(_) if begun => {
                    index.second_document = Some(Position::of(&span.start));
                    break;
                }
                Event::DocumentStart(_) => begun = true,
                Event::MappingStart(..) => {
                    let path = index.value(&mut levels, &span.start);
                    levels.push(Level::Map { path, key: None, seen: HashMap::new() });
                }
                Event::SequenceStart(..) => {
                    let path = index.value(&mut levels, &span.start);
                    levels.push(Level::List { path, next: 0 });
                }
                Event::MappingEnd | Event::SequenceEnd => {
                    levels.pop();
                }
                Event::Scalar(text, ..) => index.scalar(&mut levels, &text, &span.start),
                Event::Alias(_) => {
                    index.value(&mut levels, &span.start);
                }
                _ => {}
            }
        }
        index
    }

    /// Of the key, or of the nearest one around it that has a position.
    pub(super) fn position(&self, path: &str) -> Position {
        let mut path = path;
        loop {
            if let Some(position) = self.positions.get(path) {
                return *position;
            }
            let Some(cut) = path.rfind(['.', '[']) else { return Position::START };
            path = &path[..cut];
        }
    }

    fn scalar(&mut self, levels: &mut [Level], text: &str, start: &Marker) {
        if let Some(Level::Map { path, key: key @ None, seen }) = levels.last_mut() {
            let full = child(path, text);
            *key = Some(full.clone());
            let position = Position::of(start);
            match seen.get(text) {
                Some(first) => {
                    // What is below it has been told with it.
                    *key = Some(format!("{full} (again)"));
                    self.duplicates.push((full, *first, position));
                }
                None => {
                    seen.insert(text.to_owned(), position);
                    self.positions.entry(full).or_insert(position);
                }
            }
        } else {
            self.value(levels, start);
        }
    }

    /// A value begins here: says its path.
    fn value(&mut self, levels: &mut [Level], start: &Marker) -> String {
        match levels.last_mut() {
            None => String::new(),
            // A map as a key has no path; serde refuses it later.
            Some(Level::Map { key, path, .. }) => key.take().unwrap_or_else(|| path.clone()),
            Some(Level::List { path, next }) => {
                let full = format!("{path}[{next}]");
                *next += 1;
                self.positions.insert(full.clone(), Position::of(start));
                full
            }
        }
    }
}

/// The path of `key` in the map at `path`.
pub(super) fn child(path: &str, key: &str) -> String {
    if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_are_those_an_editor_shows() {
        let index = Positions::new("a: 1\nb:\n  - x\n  - c: 2\n    d: [5, 6]\n");
        let at = |path: &str| {
            let position = index.position(path);
            (position.line, position.column)
        };
        assert_eq!(at("a"), (1, 1));
        assert_eq!(at("b[0]"), (3, 5));
        assert_eq!(at("b[1].c"), (4, 5));
        assert_eq!(at("b[1].d[1]"), (5, 12));
        assert_eq!(at("b[1].missing.deep"), (4, 5), "the nearest around it");
        assert_eq!(at("nothing"), (1, 1));
    }

    #[test]
    fn keys_that_stand_twice() {
        let index = Positions::new("a: {x: 1, x: 2}\nb: 1\na: {x: 3}\n");
        let found: Vec<_> =
            index.duplicates.iter().map(|(path, first, second)| (path.as_str(), first.line, second.line)).collect();
        assert_eq!(found, [("a.x", 1, 1), ("a", 1, 3)]);
    }

    #[test]
    fn equal_paths_are_not_equal_keys() {
        assert_eq!(Positions::new("a: {b: 1}\na.b: 2\n").duplicates, []);
    }

    #[test]
    fn a_second_document_is_not_read() {
        let index = Positions::new("a: 1\n---\na: 2\n");
        assert_eq!(index.duplicates, []);
        assert_eq!(index.second_document, Some(Position { line: 2, column: 1 }));
        assert_eq!(Positions::new("---\na: 1\n").second_document, None);
    }

    #[test]
    fn depth_costs_nothing() {
        let index = Positions::new(&"- ".repeat(20_000));
        assert!(index.too_deep.is_some());
        assert!(index.positions.len() <= MAX_DEPTH + 1, "{}", index.positions.len());
    }
}
