//! Answers of a cache in a file, so that a process that starts while a directory is down knows its users.
//!
//! One JSON object a line, readable by nobody else, written beside the old file and then put in its place. Backends stand
//! there by their names, and what the configuration no longer declares is left out. No secret and no unknown user is
//! written. A file that cannot be read is no reason not to start: it is told and left. Called by `asked`.

use std::fs;
use std::io::{self, BufRead as _, BufWriter, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use super::cache::Cache;
use super::decision::{Declared, Fields, RouteDecision, ServerChoice};

/// A line of the file.
#[derive(Debug, Serialize, Deserialize)]
struct Line {
    user: String,
    /// When the directory said so, in seconds since 1970.
    asked: u64,
    #[serde(flatten)]
    target: Written,
}

#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
struct Written {
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

/// Fills `cache`; says how many answers were there.
///
/// # Errors
/// The file cannot be read, or a line of it.
pub(super) fn load(path: &Path, cache: &Cache, declared: &Declared) -> io::Result<usize> {
    let file = match fs::File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
        Err(error) => return Err(error),
    };
    let (now, today) = (Instant::now(), since_1970());
    let mut read = 0;
    for line in io::BufReader::new(file).lines() {
        let line: Line = serde_json::from_str(&line?)?;
        let fields = Fields {
            backend: line.target.backend.as_deref(),
            server: line.target.server.as_deref(),
            user: line.target.as_user.as_deref(),
            refuse: line.target.refuse.as_deref(),
            maintenance: line.target.maintenance.as_deref(),
            ..Fields::default()
        };
        let age = Duration::from_secs(today.saturating_sub(line.asked));
        if let (Ok(Some(target)), Some(asked)) = (declared.fields(fields), now.checked_sub(age)) {
            cache.keep(line.user.into(), Some(Arc::new(target)), asked);
            read += 1;
        }
    }
    Ok(read)
}

/// Writes what `cache` holds.
///
/// # Errors
/// The file, or the one beside it, cannot be written: the old one is as it was.
pub(super) fn save(path: &Path, cache: &Cache, declared: &Declared) -> io::Result<()> {
    let mut beside = path.as_os_str().to_owned();
    beside.push(".new");
    let file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&beside)?;
    let mut file = BufWriter::new(file);
    let today = since_1970();
    for (user, target, age) in cache.storable(Instant::now()) {
        let line = Line {
            user: user.to_string(),
            asked: today.saturating_sub(age.as_secs()),
            target: written(&target, declared),
        };
        serde_json::to_writer(&mut file, &line)?;
        file.write_all(b"\n")?;
    }
    file.into_inner().map_err(io::IntoInnerError::into_error)?.sync_all()?;
    fs::rename(&beside, path)
}

fn written(target: &RouteDecision, declared: &Declared) -> Written {
    match target {
        RouteDecision::Destination(place) => Written {
            backend: declared.name(place.backend).map(str::to_owned),
            server: match &place.server {
                ServerChoice::Server(server) => Some(server.to_string()),
                ServerChoice::Any | ServerChoice::Address(_) => None,
            },
            as_user: place.user.as_ref().map(|user| user.as_str().to_owned()),
            ..Written::default()
        },
        RouteDecision::Refuse(text) => Written { refuse: Some(text.to_string()), ..Written::default() },
        RouteDecision::Maintenance(text) => Written { maintenance: Some(text.to_string()), ..Written::default() },
        // A verdict on a password is never kept.
        RouteDecision::WrongPassword(_) | RouteDecision::PasswordNeeded => Written::default(),
    }
}

fn since_1970() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;
    use crate::config;
    use crate::route::cache::Looked;

    fn cache() -> Cache {
        let hour = Duration::from_secs(3600);
        Cache::new(config::CacheConfig { ttl: hour, negative: hour, stale: hour, entries: 1000, file: None })
    }

    #[test]
    fn what_is_saved_is_loaded() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("cache");
        let declared = Declared::named(["shard-a", "shard-b"]);
        let before = cache();
        let texts = ["shard-b server=h:1 user=other", "refuse: No.", "maintenance: Later.", "shard-a"];
        let now = Instant::now();
        for (user, text) in ["a\"\n\u{e9}", "b", "c", "d"].into_iter().zip(texts) {
            before.keep(user.into(), declared.text(text).unwrap().map(Arc::new), now);
        }
        before.keep("unknown".into(), None, now);
        save(&path, &before, &declared).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        // shard-a is not declared any more.
        let declared = Declared::named(["shard-b"]);
        let after = cache();
        assert_eq!(load(&path, &after, &declared).unwrap(), 3);
        let Looked::Fresh(kept) = after.look("a\"\n\u{e9}", Instant::now()) else { panic!() };
        assert_eq!(kept.target, declared.text(texts[0]).unwrap().map(Arc::new));
        assert!(matches!(after.look("b", Instant::now()), Looked::Fresh(_)));
        assert_eq!(after.look("d", Instant::now()), Looked::Nothing);
        assert_eq!(after.look("unknown", Instant::now()), Looked::Nothing);
    }

    #[test]
    fn a_missing_file_is_empty_and_a_broken_one_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let declared = Declared::named(["shard-a"]);
        assert_eq!(load(&folder.path().join("none"), &cache(), &declared).unwrap(), 0);
        let path = folder.path().join("broken");
        fs::write(&path, "{\"user\":\"a\",\"asked\":1").unwrap();
        assert!(load(&path, &cache(), &declared).is_err());
    }
}
