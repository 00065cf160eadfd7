//! The house's own rules: which room may use which, and how large a room may be.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// What each room may use of the others. A new arrow is a decision: make it here, and say why in the commit.
const ALLOWED: &[(&str, &[&str])] = &[
    (
        "main",
        &[
            "cli",
            "config",
            "control",
            "deadline",
            "demo",
            "explain",
            "identity",
            "inherit",
            "limits",
            "logging",
            "metrics",
            "operate",
            "preflight",
            "privileges",
            "server",
            "shutdown",
        ],
    ),
    ("preflight", &["backend", "config", "control", "privileges", "server"]),
    ("deadline", &[]),
    (
        "run",
        &[
            "config",
            "control",
            "deadline",
            "inherit",
            "limits",
            "logging",
            "metrics",
            "preflight",
            "privileges",
            "server",
            "shutdown",
        ],
    ),
    ("operate", &["cli", "control"]),
    ("control", &["backend", "inherit", "server"]),
    ("inherit", &[]),
    ("privileges", &["config"]),
    ("allocator", &[]),
    ("cli", &[]),
    ("demo", &["cli", "config", "logging", "server", "shutdown"]),
    ("explain", &["backend", "identity", "route", "server"]),
    (
        "server",
        &[
            "admin",
            "backend",
            "config",
            "guard",
            "identity",
            "listener",
            "logging",
            "metrics",
            "occupancy",
            "policy",
            "route",
            "session",
            "sessions",
            "shutdown",
            "tls",
            "workers",
        ],
    ),
    ("listener", &["config", "guard", "metrics", "occupancy", "server", "session", "shutdown"]),
    (
        "session",
        &[
            "backend",
            "config",
            "deadline",
            "failure",
            "generations",
            "guard",
            "identity",
            "imap",
            "metrics",
            "occupancy",
            "proxy_protocol",
            "policy",
            "relay",
            "route",
            "server",
            "sessions",
            "shutdown",
            "stream",
            "tls",
            "waiting",
        ],
    ),
    ("sessions", &["backend", "generations"]),
    ("generations", &[]),
    (
        "backend",
        &[
            "config",
            "deadline",
            "dns",
            "failure",
            "identity",
            "imap",
            "metrics",
            "proxy_protocol",
            "relay",
            "rendezvous",
            "stream",
            "tls",
        ],
    ),
    (
        "route",
        &[
            "config",
            "deadline",
            "dns",
            "generations",
            "hedge",
            "http_client",
            "identity",
            "lookup_thread",
            "metrics",
            "rendezvous",
            "tcp_liveness",
            "template",
            "tls",
            "watch",
        ],
    ),
    ("admin", &["metrics"]),
    ("tls", &["config", "guard", "identity", "metrics", "record_layer", "watch"]),
    ("imap", &["identity"]),
    ("log_queue", &[]),
    ("logging", &["config", "log_queue"]),
    ("metrics", &["failure", "identity"]),
    ("config", &["identity", "template"]),
    ("dns", &[]),
    ("failure", &[]),
    ("guard", &["config"]),
    ("hedge", &["deadline"]),
    ("http_client", &["config", "hedge", "limited_http", "tcp_liveness", "tls"]),
    ("policy", &["config", "deadline", "hedge", "http_client", "identity", "lookup_thread", "metrics", "tls"]),
    ("identity", &[]),
    ("limited_http", &[]),
    ("limits", &[]),
    ("lookup_thread", &[]),
    ("occupancy", &[]),
    ("proxy_protocol", &[]),
    ("record_layer", &[]),
    ("relay", &["record_layer"]),
    ("rendezvous", &[]),
    ("shutdown", &[]),
    ("stream", &["relay", "tls"]),
    ("tcp_liveness", &[]),
    ("template", &[]),
    ("waiting", &[]),
    ("watch", &[]),
    ("workers", &[]),
];

fn sources() -> Vec<PathBuf> {
    fn walk(folder: &Path, found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                walk(&path, found);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                found.push(path);
            }
        }
    }
    let mut found = Vec::new();
    walk(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &mut found);
    assert!(found.len() > 30, "{} files", found.len());
    found
}

fn room(path: &Path) -> String {
    let inside = path.strip_prefix(Path::new(env!("CARGO_MANIFEST_DIR")).join("src")).unwrap();
    inside.iter().next().unwrap().to_str().unwrap().trim_end_matches(".rs").to_owned()
}

/// The first names behind `crate::` (or `vestibule::` in main), in groups too.
fn uses(text: &str) -> Vec<String> {
    let mut found = Vec::new();
    for prefix in ["crate::", "vestibule::"] {
        for (at, _) in text.match_indices(prefix) {
            let rest = &text[at + prefix.len()..];
            let group = rest.strip_prefix('{').and_then(|rest| rest.split_once('}')).map_or(rest, |(group, _)| group);
            let parts: Vec<&str> = if rest.starts_with('{') { group.split(',').collect() } else { vec![rest] };
            for part in parts {
                let name: String =
                    part.trim().chars().take_while(|letter| letter.is_ascii_lowercase() || *letter == '_').collect();
                found.push(name);
            }
        }
    }
    found
}

#[test]
fn rooms_use_only_what_they_may() {
    let allowed: BTreeMap<&str, &[&str]> = ALLOWED.iter().copied().collect();
    let mut arrows = 0;
    for path in sources() {
        let from = room(&path);
        if from == "lib" {
            continue;
        }
        let may = allowed.get(from.as_str()).unwrap_or_else(|| panic!("the room {from} is not in the table"));
        let text = fs::read_to_string(&path).unwrap();
        // Documentation may name anything.
        let code: String =
            text.lines().filter(|line| !line.trim_start().starts_with("//")).map(|line| format!("{line}\n")).collect();
        for to in
            uses(&code).into_iter().filter(|to| !to.is_empty() && *to != from && allowed.contains_key(to.as_str()))
        {
            assert!(may.contains(&to.as_str()), "{} uses {to}, which {from} may not", path.display());
            arrows += 1;
        }
    }
    assert!(arrows > 50, "{arrows} uses were looked at");
}

#[test]
fn no_file_has_more_than_one_room_in_it() {
    for path in sources() {
        let lines = fs::read_to_string(&path).unwrap().lines().count();
        assert!(lines <= 560, "{} has {lines} lines", path.display());
    }
}

#[test]
fn every_defence_has_a_test_that_exists() {
    tests_exist("tests/DEFENCES.md", 20);
}

#[test]
fn every_fault_has_a_test_that_exists() {
    tests_exist("tests/FAULTS.md", 32);
}

#[test]
fn every_bound_of_memory_has_a_test_that_exists() {
    tests_exist("docs/security.md", 30);
}

/// Checks a table of at least `least` rows, numbered from 1 without a gap, each of which names a test.
fn tests_exist(table: &str, least: usize) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let text = fs::read_to_string(root.join(table)).unwrap();
    let rows: Vec<(usize, &str)> = text
        .lines()
        .filter_map(|line| {
            let (number, rest) = line.strip_prefix("| ")?.split_once(" | ")?;
            Some((number.parse().ok()?, rest))
        })
        .collect();
    let numbers: Vec<usize> = rows.iter().map(|(number, _)| *number).collect();
    assert!(numbers.len() >= least, "{table} has only {} rows", numbers.len());
    assert_eq!(numbers, (1..=numbers.len()).collect::<Vec<_>>(), "{table} is not numbered from 1 without a gap");
    for (number, row) in rows {
        let mut shown = 0;
        for name in row.split('`').skip(1).step_by(2) {
            if name == "src/admission" {
                shown += 1;
            }
            let Some((file, test)) = name.split_once("::") else { continue };
            let source =
                fs::read_to_string(root.join(file)).unwrap_or_else(|error| panic!("{number}: {file}: {error}"));
            let written = if file.ends_with(".py") { format!("    def {test}(self") } else { format!("fn {test}(") };
            let at = source.find(&written).unwrap_or_else(|| panic!("{number}: {name} does not exist"));
            // A function that is no test shows nothing.
            let attribute = source[..at].trim_end_matches("async ").lines().rfind(|line| !line.trim().is_empty());
            let is_test = attribute.is_some_and(|line| line.contains("#[test") || line.contains("#[tokio::test"));
            assert!(file.ends_with(".py") || is_test, "{number}: {name} is no test");
            shown += 1;
        }
        assert!(shown > 0, "{number} has no test");
    }
}
