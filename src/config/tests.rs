//! Valid and invalid configurations.

use std::time::Duration;

use super::*;
use crate::admin_state::AdminState;

mod backends;
mod cross_checks;
mod files;
mod limits;
mod listeners;
mod problems;
mod reference;
mod routes;

const MINIMAL: &str = "\
listeners: [{address: '127.0.0.1:1143', tls: none}]
backends: {a: {servers: ['192.0.2.1:143']}}
routes: [{default: a}]
";

/// The problems of an invalid configuration.
#[track_caller]
fn problems(text: &str) -> Vec<String> {
    let report = parse(Path::new("v.yaml"), text).expect_err("the configuration is invalid");
    report.problems().iter().map(ToString::to_string).collect()
}

/// The problems of `MINIMAL` and `more`.
#[track_caller]
fn with(more: &str) -> Vec<String> {
    problems(&format!("{MINIMAL}{more}"))
}

/// `MINIMAL` with one part replaced.
#[track_caller]
fn edited(part: &str, replacement: &str) -> String {
    assert!(MINIMAL.contains(part), "{part} does not occur");
    MINIMAL.replace(part, replacement)
}
