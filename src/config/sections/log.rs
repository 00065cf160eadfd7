//! `log`: format and level of log records.

use serde::Deserialize;

/// Format and level of log records.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LogConfig {
    /// Format of the records.
    pub format: LogFormat,
    /// Least important level that is written.
    pub level: Level,
}

/// Format of log records.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// Lines in a format for people.
    #[default]
    Text,
    /// One JSON object per line.
    Json,
}

/// Importance of a log record.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
#[expect(missing_docs, reason = "the names are the usual ones")]
pub enum Level {
    Error,
    Warn,
    #[default]
    Info,
    Debug,
    Trace,
}
