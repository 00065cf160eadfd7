//! The words that the project does not use, because readers had to guess what they mean. CONTRIBUTING.md has the rules.

use std::fs;
use std::path::{Path, PathBuf};

use regex::Regex;

/// Words of the old dialect. "Nobody" and the like stand for machines and values, "told" for logged or reported, "room" for module.
const DIALECT: &str = r"(?i)\b(told|whoever|whomever|nobody|somebody|that is none|rooms?|is no \w+)\b";
/// Plain English that matches the pattern.
const PLAIN: &str = r"(?i)\b(there|it) is no \w+\b|\bis no (longer|more)\b";
/// Lines that may contain such a word: the end of the file's path, a part of the line, and the reason.
const EXCEPTIONS: &[(&str, &str, &str)] = &[
    ("CONTRIBUTING.md", "", "it states the rules"),
    ("tests/scripted/language.rs", "", "it states the words"),
    ("", "user: nobody", "the system account"),
    ("", "\"nobody\"", "the system account"),
    ("src/demo/imap_server.rs", "status told", "a reply of the demo server on the wire"),
    ("", "mail_uid = nobody", "the system account"),
    ("test_control_socket.py", "NOBODY", "the system account"),
];
/// Folders and files whose text is checked.
const CHECKED: &[&str] = &[
    "src",
    "tests",
    "docs",
    "config",
    "deploy",
    "dashboards",
    "benches",
    "fuzz/src",
    "fuzz/README.md",
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "Cargo.toml",
    "deny.toml",
];

#[test]
fn no_text_uses_the_old_dialect() {
    let (dialect, plain) = (Regex::new(DIALECT).unwrap(), Regex::new(PLAIN).unwrap());
    let mut used = vec![false; EXCEPTIONS.len()];
    let mut found = Vec::new();
    let files = texts();
    assert!(files.len() > 250, "only {} files", files.len());
    for (file, text) in &files {
        for (number, line) in text.lines().enumerate() {
            if !dialect.is_match(&plain.replace_all(line, "")) {
                continue;
            }
            match EXCEPTIONS.iter().position(|(end, part, _)| file.ends_with(end) && line.contains(part)) {
                Some(exception) => used[exception] = true,
                None => found.push(format!("{file}:{}: {}", number + 1, line.trim())),
            }
        }
    }
    assert!(found.is_empty(), "{} lines:\n{}", found.len(), found.join("\n"));
    let unused: Vec<_> =
        EXCEPTIONS.iter().zip(used).filter(|(_, used)| !used).map(|(exception, _)| exception).collect();
    assert!(unused.is_empty(), "exceptions without a line: {unused:?}");
}

#[test]
fn words_of_the_old_dialect_are_found_and_plain_ones_are_not() {
    let (dialect, plain) = (Regex::new(DIALECT).unwrap(), Regex::new(PLAIN).unwrap());
    let is_found = |line: &str| dialect.is_match(&plain.replace_all(line, ""));
    for line in
        ["The client is told", "Nobody waits", "x is no mode", "of one that is none", "This room knows", "whoever asks"]
    {
        assert!(is_found(line), "{line}");
    }
    for line in ["There is no series", "it is no longer used", "memory, not a classroom", "none of them"] {
        assert!(!is_found(line), "{line}");
    }
}

/// Paths, relative to the repository, and contents of the files that are checked.
fn texts() -> Vec<(String, String)> {
    fn walk(path: &Path, found: &mut Vec<PathBuf>) {
        if !path.is_dir() {
            return found.push(path.to_owned());
        }
        for entry in fs::read_dir(path).unwrap() {
            let entry = entry.unwrap().path();
            let name = entry.file_name().unwrap().to_str().unwrap();
            // Third-party files that tests/run downloads.
            if ![".cache", "__pycache__", "node_modules"].contains(&name) {
                walk(&entry, found);
            }
        }
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut paths = Vec::new();
    CHECKED.iter().for_each(|path| walk(&root.join(path), &mut paths));
    let text = |path: PathBuf| {
        let name = path.strip_prefix(root).unwrap().to_str().unwrap().to_owned();
        // A file that is not UTF-8 is not text.
        String::from_utf8(fs::read(path).unwrap()).ok().map(|text| (name, text))
    };
    paths.into_iter().filter_map(text).collect()
}
