//! Administrative states that operators have set, which override the configured ones.
//!
//! An override belongs to a server's name within its backend, not to a configuration. It outlives reloads, and applies again
//! to a server that has left the configuration or DNS and comes back; `server` saves it to a file for the next process. This
//! module holds and validates overrides and does not access files.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use crate::admin_state::AdminState;

/// Maximum number of overrides, including those of servers that are not in the configuration.
pub(crate) const MAX_OVERRIDES: usize = 4096;
/// Maximum length of a reason, in bytes.
pub(crate) const MAX_REASON: usize = 256;
/// Maximum length of the name of the operator, and of a server's name, in bytes.
const MAX_NAME: usize = 320;

/// An administrative state that an operator has set.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StateOverride {
    /// The state.
    pub state: AdminState,
    /// The operator who set it.
    pub by: String,
    /// Seconds since 1970 when it was set.
    #[serde(with = "time")]
    pub since: u64,
    /// The operator's reason, if one was given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// An override together with the server that it applies to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredOverride {
    /// Name of the backend.
    pub backend: String,
    /// Name of the server.
    pub server: String,
    /// The override.
    #[serde(flatten)]
    pub set: StateOverride,
}

/// An override that cannot be set.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidOverride {
    /// The text is empty, too long, or has control characters.
    #[error("{what} must have 1 to {max} bytes and no control characters")]
    Text {
        /// Which text is invalid.
        what: &'static str,
        /// Its maximum length.
        max: usize,
    },
    /// [`MAX_OVERRIDES`] is reached.
    #[error("{MAX_OVERRIDES} servers have a state set already: reset some with `vestibule server NAME as-configured`")]
    TooMany,
}

impl StateOverride {
    /// A state that is set now.
    ///
    /// # Errors
    /// `by` or `reason` is empty, too long, or has control characters.
    pub fn new(state: AdminState, by: &str, reason: Option<&str>) -> Result<Self, InvalidOverride> {
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
        let new = Self { state, by: by.to_owned(), since, reason: reason.map(str::to_owned) };
        new.validate()?;
        Ok(new)
    }

    fn validate(&self) -> Result<(), InvalidOverride> {
        check_text("the operator's name", &self.by, MAX_NAME)?;
        self.reason.as_ref().map_or(Ok(()), |reason| check_text("a reason", reason, MAX_REASON))
    }

    /// The time when it was set, in the format of RFC 3339.
    pub fn since(&self) -> String {
        time::format(self.since)
    }
}

impl StoredOverride {
    /// Checks an override that was read from a file or received from another process.
    ///
    /// # Errors
    /// A text is empty, too long, or has control characters.
    pub fn validate(&self) -> Result<(), InvalidOverride> {
        check_text("a backend's name", &self.backend, MAX_NAME)?;
        check_text("a server's name", &self.server, MAX_NAME)?;
        self.set.validate()
    }
}

fn check_text(what: &'static str, text: &str, max: usize) -> Result<(), InvalidOverride> {
    let is_valid = !text.is_empty() && text.len() <= max && !text.chars().any(char::is_control);
    if is_valid { Ok(()) } else { Err(InvalidOverride::Text { what, max }) }
}

/// The override of one server, shared by all that know the server by its name.
#[derive(Debug, Clone, Default)]
pub(super) struct OverrideCell(Arc<Mutex<Option<StateOverride>>>);

impl OverrideCell {
    /// The state that was set, without who set it.
    pub(super) fn state(&self) -> Option<AdminState> {
        self.lock().as_ref().map(|set| set.state)
    }

    /// A copy of everything that was set.
    pub(super) fn get(&self) -> Option<StateOverride> {
        self.lock().clone()
    }

    pub(super) fn set(&self, state: Option<StateOverride>) {
        *self.lock() = state;
    }

    fn lock(&self) -> MutexGuard<'_, Option<StateOverride>> {
        // Nothing panics while the value is replaced.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The overrides of a process, by backend and server.
#[derive(Debug, Clone, Default)]
pub struct StateOverrides(Arc<Mutex<BTreeMap<(String, String), OverrideCell>>>);

impl StateOverrides {
    /// The cell of a server's override.
    pub(super) fn cell(&self, backend: &str, server: &str) -> OverrideCell {
        let mut cells = self.lock();
        if cells.len().is_power_of_two() {
            // Drop the cells of servers that are gone and have no override.
            cells.retain(|_, cell| Arc::strong_count(&cell.0) > 1 || cell.state().is_some());
        }
        cells.entry((backend.to_owned(), server.to_owned())).or_default().clone()
    }

    /// Sets or clears the override of a server, whether or not the server exists.
    ///
    /// # Errors
    /// There are [`MAX_OVERRIDES`] already.
    pub fn set(&self, backend: &str, server: &str, state: Option<StateOverride>) -> Result<(), InvalidOverride> {
        let cell = self.cell(backend, server);
        let is_new = state.is_some() && cell.state().is_none();
        if is_new && self.lock().values().filter(|cell| cell.state().is_some()).count() >= MAX_OVERRIDES {
            return Err(InvalidOverride::TooMany);
        }
        cell.set(state);
        Ok(())
    }

    /// All overrides, in the order of backends and servers.
    pub fn all(&self) -> Vec<StoredOverride> {
        let cells = self.lock();
        let set = cells.iter().filter_map(|((backend, server), cell)| {
            Some(StoredOverride { backend: backend.clone(), server: server.clone(), set: cell.get()? })
        });
        set.collect()
    }

    /// Replaces all overrides by `states`.
    pub fn replace(&self, states: &[StoredOverride]) {
        for cell in self.lock().values() {
            cell.set(None);
        }
        for stored in states.iter().take(MAX_OVERRIDES) {
            self.cell(&stored.backend, &stored.server).set(Some(stored.set.clone()));
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<(String, String), OverrideCell>> {
        // Nothing panics halfway through a change.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Seconds since 1970 as RFC 3339 text.
mod time {
    use std::time::{Duration, SystemTime};

    use serde::de::Error as _;
    use serde::{Deserialize as _, Deserializer, Serializer};

    /// The last second of the year 9999, which is the last one that RFC 3339 can express.
    const LAST: u64 = 253_402_300_799;

    pub(super) fn format(since: u64) -> String {
        humantime::format_rfc3339_seconds(SystemTime::UNIX_EPOCH + Duration::from_secs(since.min(LAST))).to_string()
    }

    pub(super) fn serialize<S: Serializer>(since: &u64, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&format(*since))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
        let time = humantime::parse_rfc3339(&String::deserialize(deserializer)?).map_err(D::Error::custom)?;
        let since = time.duration_since(SystemTime::UNIX_EPOCH).map_err(D::Error::custom)?;
        Ok(since.as_secs())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drained() -> StateOverride {
        StateOverride {
            state: AdminState::Drain,
            by: "root".into(),
            since: 1_800_000_000,
            reason: Some("new disks".into()),
        }
    }

    #[test]
    fn override_is_shared_by_all_that_know_the_server() {
        let states = StateOverrides::default();
        let cell = states.cell("shard-a", "h:1");
        states.set("shard-a", "h:1", Some(drained())).unwrap();
        assert_eq!(cell.state(), Some(AdminState::Drain));
        assert_eq!(states.cell("shard-b", "h:1").state(), None, "a server of another backend is another server");
        drop(cell);
        (0..100).for_each(|number| drop(states.cell("shard-a", &format!("gone:{number}"))));
        assert!(states.lock().len() < 70, "cells without a state and a server are dropped");
        assert_eq!(states.cell("shard-a", "h:1").get(), Some(drained()), "a server that comes back has its state");
        states.set("shard-a", "h:1", None).unwrap();
        assert!(states.all().is_empty());
    }

    #[test]
    fn number_of_overrides_is_bounded() {
        let states = StateOverrides::default();
        (0..MAX_OVERRIDES).for_each(|number| states.set("b", &number.to_string(), Some(drained())).unwrap());
        assert_eq!(states.set("b", "more", Some(drained())), Err(InvalidOverride::TooMany));
        states.set("b", "0", Some(drained())).unwrap();
        states.set("b", "0", None).unwrap();
        states.set("b", "more", Some(drained())).unwrap();
        assert_eq!(states.all().len(), MAX_OVERRIDES);
    }

    #[test]
    fn overrides_are_written_and_read_as_json() {
        let stored = StoredOverride { backend: "shard-a".into(), server: "h:1".into(), set: drained() };
        let text = serde_json::to_string(&stored).unwrap();
        let expected = r#"{"backend":"shard-a","server":"h:1","state":"drain","by":"root","since":"2027-01-15T08:00:00Z","reason":"new disks"}"#;
        assert_eq!(text, expected);
        let read: StoredOverride = serde_json::from_str(&text).unwrap();
        assert_eq!(read, stored);
        for (good, bad) in [("drain", "dry"), ("2027-01-15", "soon"), ("2027", "1869")] {
            assert!(serde_json::from_str::<StoredOverride>(&text.replace(good, bad)).is_err(), "{bad}");
        }
    }

    #[test]
    fn texts_with_control_characters_or_excess_length_are_invalid() {
        for (by, reason) in [("", None), ("root", Some("")), ("root\n", None), ("root", Some("\u{1b}[2J"))] {
            assert!(StateOverride::new(AdminState::Up, by, reason).is_err(), "{by:?} {reason:?}");
        }
        assert!(StateOverride::new(AdminState::Up, "root", Some(&"x".repeat(MAX_REASON + 1))).is_err());
        assert!(StateOverride::new(AdminState::Up, "root", Some("Größe")).is_ok());
    }
}
