//! Where log records go: standard error, as text or as one JSON object a line.
//!
//! `RUST_LOG` overrides the configured level, for one run and per module. No thread that serves clients writes to standard error
//! itself ([`LogQueue`]): a log that is not read costs lines, and never time.

mod queue;
pub(crate) mod warning_limit;

use std::io::{self, IsTerminal, Write as _};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use prometheus::IntCounter;
use tracing_subscriber::fmt::writer::BoxMakeWriter;

use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Registry, fmt, reload};

use crate::config::{Level, LogConfig, LogFormat};
use crate::logging::queue::LogQueue;

/// Libraries that say at info or debug what an operator has no use for.
const QUIET: &str = "hickory_net=error,hickory_resolver=error,hickory_proto=error,rustls=warn,hyper=warn";

/// The filter of the subscriber that is installed, to be changed while it is in use.
static FILTER: OnceLock<reload::Handle<EnvFilter, Registry>> = OnceLock::new();
/// The lines of the subscriber that is installed.
static QUEUE: OnceLock<Arc<LogQueue>> = OnceLock::new();
/// The end of the process waits this long for a reader of the log.
const FLUSH_AT_EXIT: Duration = Duration::from_secs(2);
/// A panic waits this long. It may end the process, but usually ends one session, on a thread that serves others.
const FLUSH_AT_PANIC: Duration = Duration::from_millis(200);

/// Installs the process's subscriber; a second call changes nothing.
pub(crate) fn install(log: &LogConfig) {
    let (filter, handle) = reload::Layer::new(filter(log));
    let registry = Registry::default().with(filter);
    let queue = LogQueue::start(io::stderr(), report_dropped);
    let writer = match &queue {
        Ok(queue) => BoxMakeWriter::new(queue.clone()),
        Err(_) => BoxMakeWriter::new(io::stderr),
    };
    let lines = fmt::layer().with_writer(writer).with_target(true);
    // An error says that a subscriber is there already (in tests), which then stays.
    let installed = match log.format {
        LogFormat::Text => registry.with(lines.with_ansi(io::stderr().is_terminal())).try_init(),
        LogFormat::Json => {
            registry.with(lines.json().flatten_event(true).with_current_span(false).with_span_list(false)).try_init()
        }
    };
    if installed.is_ok() {
        let _ = FILTER.set(handle);
        let _ = queue.map(|queue| QUEUE.set(queue));
    }
}

/// Counts lines that are dropped because the log is not read, or cannot be written, in `counter`.
pub(crate) fn count_dropped_lines(counter: IntCounter) {
    if let Some(queue) = QUEUE.get() {
        queue.count_in(counter);
    }
}

/// Writes an error text to standard error as it is, after everything logged before. Use it at the end of the process: it waits up to
/// two seconds for the log's reader.
pub(crate) fn print_last_error(text: &str) {
    match QUEUE.get() {
        // An error is impossible: a line that does not fit is dropped.
        Some(queue) => drop((&**queue).write_all(text.as_bytes())),
        None => eprint!("{text}"),
    }
    flush();
}

/// Waits up to two seconds until everything logged is written.
pub(crate) fn flush() {
    if let Some(queue) = QUEUE.get() {
        queue.flush(FLUSH_AT_EXIT);
    }
}

/// Like [`flush`] with a shorter limit, for a panic, which may be the last that the process does.
pub(crate) fn flush_at_panic() {
    if let Some(queue) = QUEUE.get() {
        queue.flush(FLUSH_AT_PANIC);
    }
}

fn report_dropped(lines: u64) {
    tracing::warn!("{lines} log lines were dropped: standard error was not read, or could not be written");
}

/// Writes from the level in `log` on, from now on.
pub(crate) fn set_level(log: &LogConfig) {
    // An error says that the subscriber is gone, which it never is.
    let _ = FILTER.get().map(|handle| handle.reload(filter(log)));
}

fn filter(log: &LogConfig) -> EnvFilter {
    let level = match log.level {
        Level::Error => "error",
        Level::Warn => "warn",
        Level::Info => "info",
        Level::Debug => "debug",
        Level::Trace => "trace",
    };
    EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(format!("{level},{QUIET}")))
}
