//! Where log records go: standard error, as text or as one JSON object a line.
//!
//! `RUST_LOG` overrides the configured level, for one run and per module. Called by `main` and the demo.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;

use crate::config::{Level, Log, LogFormat};

/// Libraries that say at info or debug what an operator has no use for.
const QUIET: &str = "hickory_net=error,hickory_resolver=error,hickory_proto=error,rustls=warn,hyper=warn";

/// Installs the process's subscriber; a second call changes nothing.
pub fn install(log: &Log) {
    let level = match log.level {
        Level::Error => "error",
        Level::Warn => "warn",
        Level::Info => "info",
        Level::Debug => "debug",
        Level::Trace => "trace",
    };
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(format!("{level},{QUIET}")));
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_target(true);
    // An error says that a subscriber is there already (in tests), which then stays.
    let _ = match log.format {
        LogFormat::Text => builder.with_ansi(std::io::stderr().is_terminal()).try_init(),
        LogFormat::Json => builder.json().flatten_event(true).with_current_span(false).with_span_list(false).try_init(),
    };
}
