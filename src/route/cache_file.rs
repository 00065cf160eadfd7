//! Stores a cache in a file, so that a process that starts while a directory is down can route its users.
//!
//! The file has one JSON object per line. It is written under another name, readable by its owner only, and then renamed. Backends are
//! stored by name; entries of backends that are no longer declared are skipped. Secrets and unknown users are not stored. The caller
//! logs an unreadable file and starts without it.

use std::fs;
use std::io::{self, BufRead as _, BufWriter, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use super::answer::{AnswerFields, DeclaredBackends};
use super::cache::Cache;
use super::decision::{RouteDecision, ServerChoice};

/// A line of the file.
#[derive(Debug, Serialize, Deserialize)]
struct StoredEntry {
    user: String,
    /// When the directory answered, in seconds since 1970.
    #[serde(rename = "asked")]
    queried_at: u64,
    #[serde(flatten)]
    decision: StoredDecision,
}

#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
struct StoredDecision {
    #[serde(skip_serializing_if = "Option::is_none")]
    backend: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    server: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    as_user: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    refuse: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    maintenance: Option<String>,
}

impl StoredDecision {
    fn new(decision: &RouteDecision, declared: &DeclaredBackends) -> Self {
        match decision {
            RouteDecision::Destination(destination) => Self {
                backend: declared.name(destination.backend).map(str::to_owned),
                server: match &destination.server {
                    ServerChoice::Server(server) => Some(server.to_string()),
                    ServerChoice::Any | ServerChoice::Address(_) => None,
                },
                as_user: destination.user.as_ref().map(|user| user.as_str().to_owned()),
                ..Self::default()
            },
            RouteDecision::Refuse(text) => Self { refuse: Some(text.to_string()), ..Self::default() },
            RouteDecision::Maintenance(text) => Self { maintenance: Some(text.to_string()), ..Self::default() },
            // Decisions about a password are never cached.
            RouteDecision::WrongPassword(_) | RouteDecision::PasswordNeeded => Self::default(),
        }
    }

    fn fields(&self) -> AnswerFields<'_> {
        AnswerFields {
            backend: self.backend.as_deref(),
            server: self.server.as_deref(),
            user: self.as_user.as_deref(),
            refuse: self.refuse.as_deref(),
            maintenance: self.maintenance.as_deref(),
            ..AnswerFields::default()
        }
    }
}

/// Fills `cache` from the file, and returns the number of entries. A missing file has none.
///
/// # Errors
/// The file cannot be read, or contains an invalid line.
pub(super) fn load(path: &Path, cache: &Cache, declared: &DeclaredBackends) -> io::Result<usize> {
    let file = match fs::File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
        Err(error) => return Err(error),
    };
    let (now, unix_now) = (Instant::now(), unix_time());
    let mut loaded = 0;
    for line in io::BufReader::new(file).lines() {
        let entry: StoredEntry = serde_json::from_str(&line?)?;
        let age = Duration::from_secs(unix_now.saturating_sub(entry.queried_at));
        let decision = declared.check_fields(entry.decision.fields());
        if let (Ok(Some(decision)), Some(queried_at)) = (decision, now.checked_sub(age)) {
            cache.insert(entry.user.into(), Some(Arc::new(decision)), queried_at);
            loaded += 1;
        }
    }
    Ok(loaded)
}

/// Writes the entries of `cache` to the file.
///
/// # Errors
/// The new file cannot be written or renamed; the old file is unchanged.
pub(super) fn save(path: &Path, cache: &Cache, declared: &DeclaredBackends) -> io::Result<()> {
    let mut new_path = path.as_os_str().to_owned();
    new_path.push(".new");
    let file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new_path)?;
    let mut file = BufWriter::new(file);
    let unix_now = unix_time();
    for (user, decision, age) in cache.storable(Instant::now()) {
        let entry = StoredEntry {
            user: user.to_string(),
            queried_at: unix_now.saturating_sub(age.as_secs()),
            decision: StoredDecision::new(&decision, declared),
        };
        serde_json::to_writer(&mut file, &entry)?;
        file.write_all(b"\n")?;
    }
    file.into_inner().map_err(io::IntoInnerError::into_error)?.sync_all()?;
    fs::rename(&new_path, path)
}

fn unix_time() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;
    use crate::config;
    use crate::route::cache::CacheLookup;

    fn cache() -> Cache {
        let hour = Duration::from_secs(3600);
        Cache::new(config::CacheConfig { ttl: hour, negative: hour, stale: hour, entries: 1000, file: None })
    }

    #[test]
    fn saved_entries_are_loaded() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("cache");
        let declared = DeclaredBackends::named(["shard-a", "shard-b"]);
        let before = cache();
        let texts = ["shard-b server=h:1 user=other", "refuse: No.", "maintenance: Later.", "shard-a"];
        let now = Instant::now();
        for (user, text) in ["a\"\n\u{e9}", "b", "c", "d"].into_iter().zip(texts) {
            before.insert(user.into(), declared.check_text(text).unwrap().map(Arc::new), now);
        }
        before.insert("unknown".into(), None, now);
        save(&path, &before, &declared).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        // shard-a is no longer declared.
        let declared = DeclaredBackends::named(["shard-b"]);
        let after = cache();
        assert_eq!(load(&path, &after, &declared).unwrap(), 3);
        let CacheLookup::Fresh(entry) = after.get("a\"\n\u{e9}", Instant::now()) else { panic!() };
        assert_eq!(entry.decision, declared.check_text(texts[0]).unwrap().map(Arc::new));
        assert!(matches!(after.get("b", Instant::now()), CacheLookup::Fresh(_)));
        assert_eq!(after.get("d", Instant::now()), CacheLookup::Missing);
        assert_eq!(after.get("unknown", Instant::now()), CacheLookup::Missing);
    }

    #[test]
    fn missing_file_is_empty_and_invalid_file_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let declared = DeclaredBackends::named(["shard-a"]);
        assert_eq!(load(&folder.path().join("none"), &cache(), &declared).unwrap(), 0);
        let path = folder.path().join("broken");
        fs::write(&path, "{\"user\":\"a\",\"asked\":1").unwrap();
        assert!(load(&path, &cache(), &declared).is_err());
    }
}
