//! Tables in the documentation that name the tests behind each row.

use std::fs;
use std::path::Path;

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
            // The function must be a test.
            let attribute = source[..at].trim_end_matches("async ").lines().rfind(|line| !line.trim().is_empty());
            let is_test = attribute.is_some_and(|line| line.contains("#[test") || line.contains("#[tokio::test"));
            assert!(file.ends_with(".py") || is_test, "{number}: {name} is not a test");
            shown += 1;
        }
        assert!(shown > 0, "{number} has no test");
    }
}
