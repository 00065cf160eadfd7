//! The fuzz targets: functions that take any bytes and panic if an invariant is violated.
//!
//! They are plain functions because two programs call them: libFuzzer, through the programs in `fuzz_targets`, and the test in
//! `tests/fuzz`, which runs the corpus and mutations of it whenever the tests run.

pub mod backend_login;
pub mod client_hello;
pub mod configuration;
pub mod prelogin;
pub mod proxy_header;
pub mod records;
pub mod sasl;
pub mod table;
pub mod template;

/// Name and function of a target.
pub type Target = (&'static str, fn(&[u8]));

/// All targets.
pub const TARGETS: &[Target] = &[
    ("prelogin", prelogin::run),
    ("sasl", sasl::run),
    ("backend_login", backend_login::run),
    ("proxy_header", proxy_header::run),
    ("client_hello", client_hello::run),
    ("records", records::run),
    ("configuration", configuration::run),
    ("table", table::run),
    ("template", template::run),
];
