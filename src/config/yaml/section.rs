//! One map of the configuration: reads its values, checks them against bounds, and reports problems at its keys.

use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde_yaml::Value;

use super::forms::{DurationText, OrOff, Size};
use super::positions::join;
use super::reader::Reader;
use crate::config::error::{Help, Located, Location};
use crate::config::network::Network;

/// The map at `key`. Methods take the name of a key in it, or a path below it; an empty name means the map itself.
#[derive(Debug)]
pub(in crate::config) struct Section<'a> {
    reader: &'a mut Reader,
    key: String,
}

impl<'a> Section<'a> {
    pub(in crate::config) fn new(reader: &'a mut Reader, key: impl Into<String>) -> Self {
        Self { reader, key: key.into() }
    }

    /// The section of another key of the file, by its full path.
    pub(in crate::config) fn elsewhere(&mut self, key: impl Into<String>) -> Section<'_> {
        Section { reader: self.reader, key: key.into() }
    }

    pub(in crate::config) fn child(&mut self, name: &str) -> Section<'_> {
        let key = self.key_of(name);
        Section { reader: self.reader, key }
    }

    /// The full path of a key.
    pub(in crate::config) fn key_of(&self, name: &str) -> String {
        join(&self.key, name)
    }

    pub(in crate::config) fn location(&self, name: &str) -> Location {
        self.reader.location(&self.key_of(name))
    }

    pub(in crate::config) fn located<T>(&self, name: &str, value: T) -> Located<T> {
        Located { value, location: self.location(name) }
    }

    /// A path, relative to the folder of the configuration file.
    pub(in crate::config) fn file(&self, name: &str, path: &Path) -> Located<PathBuf> {
        self.located(name, self.reader.resolve(path))
    }

    pub(in crate::config) fn optional_file(&self, name: &str, path: Option<&Path>) -> Option<Located<PathBuf>> {
        path.map(|path| self.file(name, path))
    }

    pub(in crate::config) fn problem(&mut self, name: &str, message: impl Into<String>) {
        self.reader.report(&self.key_of(name), message, None);
    }

    /// Reports that `word` is unknown, and suggests one of `known`.
    pub(in crate::config) fn unknown(&mut self, name: &str, what: &str, word: &str, known: &[impl AsRef<str>]) {
        let help = Help::suggest(word, known);
        self.reader.report(&self.key_of(name), format!("unknown {what} {word:?}"), Some(help));
    }

    pub(in crate::config) fn warning(&mut self, name: &str, message: impl Into<String>) {
        self.reader.warn(&self.key_of(name), message);
    }

    /// Whether a problem at this key or below it has been reported, so that consequences of it should not be.
    pub(in crate::config) fn has_problem_below(&self, name: &str) -> bool {
        self.reader.has_problem_below(&self.key_of(name))
    }

    /// Whether a problem at this key itself has been reported.
    pub(in crate::config) fn has_problem_at(&self, name: &str) -> bool {
        self.reader.has_problem_at(&self.key_of(name))
    }

    /// Reports a problem that may be a consequence of one that has been reported at this key or below it.
    pub(in crate::config) fn consequence(&mut self, name: &str, message: impl Into<String>) {
        if !self.has_problem_below(name) {
            self.problem(name, message);
        }
    }

    /// Reads the map itself.
    pub(in crate::config) fn read<T: DeserializeOwned>(&mut self, value: Value) -> Option<T> {
        self.reader.read(&self.key, value)
    }

    pub(in crate::config) fn duration(
        &mut self,
        name: &str,
        value: Option<DurationText>,
        default: Duration,
        bounds: RangeInclusive<Duration>,
    ) -> Duration {
        match value {
            None => default,
            Some(DurationText(duration)) if bounds.contains(&duration) => duration,
            Some(_) => {
                self.problem(name, format!("expected a duration {}", within(&bounds)));
                default
            }
        }
    }

    pub(in crate::config) fn duration_or_off(
        &mut self,
        name: &str,
        value: Option<OrOff<DurationText>>,
        default: Option<Duration>,
        bounds: RangeInclusive<Duration>,
    ) -> Option<Duration> {
        match value {
            None => default,
            Some(OrOff::Off) => None,
            Some(OrOff::On(DurationText(duration))) if bounds.contains(&duration) => Some(duration),
            Some(OrOff::On(_)) => {
                self.problem(name, format!("expected off or a duration {}", within(&bounds)));
                default
            }
        }
    }

    pub(in crate::config) fn size(
        &mut self,
        name: &str,
        value: Option<Size>,
        default: usize,
        bounds: RangeInclusive<usize>,
    ) -> usize {
        match value {
            None => default,
            Some(Size(size)) if bounds.contains(&size) => size,
            Some(_) => {
                self.problem(name, format!("expected a size from {} to {} bytes", bounds.start(), bounds.end()));
                default
            }
        }
    }

    pub(in crate::config) fn number(
        &mut self,
        name: &str,
        value: Option<i64>,
        default: u32,
        bounds: RangeInclusive<u32>,
    ) -> u32 {
        let Some(value) = value else { return default };
        let number = u32::try_from(value).ok().filter(|number| bounds.contains(number));
        number.unwrap_or_else(|| {
            self.problem(name, format!("expected a number from {} to {}", bounds.start(), bounds.end()));
            default
        })
    }

    /// A number that the program uses as a `usize`.
    pub(in crate::config) fn count(
        &mut self,
        name: &str,
        value: Option<i64>,
        default: usize,
        bounds: RangeInclusive<u32>,
    ) -> usize {
        match value {
            None => default,
            Some(_) => self.number(name, value, *bounds.start(), bounds) as usize,
        }
    }

    pub(in crate::config) fn networks(&mut self, name: &str, texts: &[String]) -> Vec<Network> {
        let indexed = texts.iter().enumerate();
        indexed.filter_map(|(index, text)| self.network(&format!("{name}[{index}]"), text)).collect()
    }

    pub(in crate::config) fn network(&mut self, name: &str, text: &str) -> Option<Network> {
        let network = Network::parse(text);
        if network.is_none() {
            self.problem(name, "expected a network, like 10.0.0.0/8");
        }
        network
    }

    pub(in crate::config) fn socket_address(&mut self, name: &str, text: &str, example: &str) -> Option<SocketAddr> {
        let address = text.parse().ok();
        if address.is_none() {
            self.problem(name, format!("expected an address and a port, like {example:?}, got {text:?}"));
        }
        address
    }

    pub(in crate::config) fn name_servers(&mut self, texts: &[String]) -> Vec<SocketAddr> {
        let indexed = texts.iter().enumerate();
        indexed
            .filter_map(|(index, text)| self.socket_address(&format!("servers[{index}]"), text, "127.0.0.1:53"))
            .collect()
    }
}

/// Bounds in seconds. A lower bound of 0 means 100 ms, because a zero deadline expires at once.
pub(in crate::config) fn seconds(least: u64, most: u64) -> RangeInclusive<Duration> {
    let least = if least == 0 { Duration::from_millis(100) } else { Duration::from_secs(least) };
    least..=Duration::from_secs(most)
}

fn within(bounds: &RangeInclusive<Duration>) -> String {
    format!("from {} to {}", humantime::format_duration(*bounds.start()), humantime::format_duration(*bounds.end()))
}
