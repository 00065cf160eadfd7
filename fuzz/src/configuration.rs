//! The configuration file. Any text is a valid configuration or leads to a report that can be printed.

use std::path::Path;

use vestibule::config;

pub fn run(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else { return };
    if let Err(report) = config::parse(Path::new("vestibule.yaml"), text) {
        assert!(!report.to_string().is_empty());
    }
}
