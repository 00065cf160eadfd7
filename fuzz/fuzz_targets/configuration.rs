//! The configuration file: any text is a configuration or a report of what is wrong, which can be printed.
#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use vestibule::config;

fuzz_target!(|text: &str| {
    if let Err(report) = config::parse(Path::new("vestibule.yaml"), text) {
        assert!(!report.to_string().is_empty());
    }
});
