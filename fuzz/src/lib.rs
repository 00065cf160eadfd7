//! What the fuzzer calls: one function a target, which takes any bytes and panics where something does not hold.
//!
//! Plain functions, so that two may call them: libFuzzer, by the programs in `fuzz_targets`, and the test in `tests/fuzz`, which runs
//! the corpus and changes of it in every run of the tests.

pub mod backend_login;
pub mod client_hello;
pub mod configuration;
pub mod prelogin;
pub mod proxy_header;
pub mod records;
pub mod sasl;
pub mod table;
pub mod template;

/// A name, and what is called.
pub type RouteDecision = (&'static str, fn(&[u8]));

/// All of them.
pub const TARGETS: &[RouteDecision] = &[
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
