//! Where log records go: standard error, as text or as one JSON object a line.
//!
//! `RUST_LOG` overrides the configured level, for one run and per module. Called by `main` and the demo.

use std::io::IsTerminal;
use std::sync::OnceLock;

use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Registry, fmt, reload};

use crate::config::{Level, Log, LogFormat};

/// Libraries that say at info or debug what an operator has no use for.
const QUIET: &str = "hickory_net=error,hickory_resolver=error,hickory_proto=error,rustls=warn,hyper=warn";

/// The filter of the subscriber that is installed, to be changed while it is in use.
static FILTER: OnceLock<reload::Handle<EnvFilter, Registry>> = OnceLock::new();

/// Installs the process's subscriber; a second call changes nothing.
pub fn install(log: &Log) {
    let (filter, handle) = reload::Layer::new(filter(log));
    let registry = Registry::default().with(filter);
    let lines = fmt::layer().with_writer(std::io::stderr).with_target(true);
    // An error says that a subscriber is there already (in tests), which then stays.
    let installed = match log.format {
        LogFormat::Text => registry.with(lines.with_ansi(std::io::stderr().is_terminal())).try_init(),
        LogFormat::Json => {
            registry.with(lines.json().flatten_event(true).with_current_span(false).with_span_list(false)).try_init()
        }
    };
    if installed.is_ok() {
        let _ = FILTER.set(handle);
    }
}

/// Writes from the level in `log` on, from now on.
pub fn set_level(log: &Log) {
    // An error says that the subscriber is gone, which it never is.
    let _ = FILTER.get().map(|handle| handle.reload(filter(log)));
}

fn filter(log: &Log) -> EnvFilter {
    let level = match log.level {
        Level::Error => "error",
        Level::Warn => "warn",
        Level::Info => "info",
        Level::Debug => "debug",
        Level::Trace => "trace",
    };
    EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(format!("{level},{QUIET}")))
}
