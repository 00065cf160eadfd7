//! The state file, which preserves servers' administrative states across restarts.
//!
//! It is one JSON document, readable only by its owner, written to a new file that is renamed over the old one. An invalid file does
//! not prevent the start, because a proxy that stays down is worse than a server in its configured state: the file is moved aside,
//! an error is logged, and `vestibule_state_file_failed` is 1.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::backend::state_override::{MAX_OVERRIDES, StoredOverride};

/// Maximum size of the file. It is more than [`MAX_OVERRIDES`] of the longest states need.
const MAX_FILE: u64 = 8 * 1024 * 1024;
/// Version of the file's format.
const VERSION: u32 = 1;

#[derive(Debug, Serialize, Deserialize)]
struct Document {
    version: u32,
    states: Vec<StoredOverride>,
}

/// The result of reading the state file at the start.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Loaded {
    /// The states, none if the file does not exist.
    States(Vec<StoredOverride>),
    /// The file cannot be read.
    Damaged,
}

/// Reads the states. The result is empty if the file does not exist.
///
/// # Errors
/// The file cannot be read, or its content is invalid.
pub(super) fn read(path: &Path) -> Result<Vec<StoredOverride>, String> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error.to_string()),
    };
    let mut text = Vec::new();
    file.take(MAX_FILE + 1).read_to_end(&mut text).map_err(|error| error.to_string())?;
    if text.len() as u64 > MAX_FILE {
        return Err(format!("the file is over {MAX_FILE} bytes"));
    }
    let document: Document = serde_json::from_slice(&text).map_err(|error| error.to_string())?;
    if document.version != VERSION {
        return Err(format!("unknown version {}: expected {VERSION}", document.version));
    }
    if document.states.len() > MAX_OVERRIDES {
        return Err(format!("more than {MAX_OVERRIDES} states"));
    }
    document.states.iter().try_for_each(StoredOverride::validate).map_err(|error| error.to_string())?;
    Ok(document.states)
}

/// Reads the states at the start. A file that cannot be read is moved aside.
pub(super) fn load(path: &Path) -> Loaded {
    match read(path) {
        Ok(states) => Loaded::States(states),
        Err(error) => {
            let aside = beside(path, ".damaged");
            let moved = fs::rename(path, &aside);
            let moved_to = moved.is_ok().then(|| tracing::field::display(aside.display()));
            tracing::error!(
                file = %path.display(), %error, moved_to,
                "the state file cannot be read: servers start in their configured states"
            );
            Loaded::Damaged
        }
    }
}

/// Replaces the content of the file.
///
/// # Errors
/// The new file cannot be written. The old one is unchanged.
pub(super) fn save(path: &Path, states: Vec<StoredOverride>) -> io::Result<()> {
    let new = beside(path, ".new");
    // Removed instead of truncated, because the file may have another mode, or be a link to another file.
    match fs::remove_file(&new) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&new)?;
    let mut text = serde_json::to_vec_pretty(&Document { version: VERSION, states })?;
    text.push(b'\n');
    file.write_all(&text)?;
    file.sync_all()?;
    fs::rename(&new, path)?;
    // The rename is durable once the directory is synced. Errors are ignored, because some file systems cannot sync directories.
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if let Ok(directory) = File::open(directory) {
        let _ = directory.sync_all();
    }
    Ok(())
}

fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;
    use crate::admin_state::AdminState;
    use crate::backend::state_override::StateOverride;

    fn states() -> Vec<StoredOverride> {
        let set = StateOverride { state: AdminState::Down, by: "root".into(), since: 1, reason: None };
        ["h:1", "h:2"]
            .map(|server| StoredOverride { backend: "a".into(), server: server.into(), set: set.clone() })
            .into()
    }

    #[test]
    fn saved_states_are_loaded_and_readable_by_the_owner_only() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state.json");
        assert_eq!(load(&path), Loaded::States(Vec::new()), "there is no file");
        // The rest of an interrupted write is replaced, regardless of its mode.
        fs::write(beside(&path, ".new"), "half").unwrap();
        save(&path, states()).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(load(&path), Loaded::States(states()));
        save(&path, Vec::new()).unwrap();
        assert_eq!(load(&path), Loaded::States(Vec::new()));
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "no temporary file is left");
    }

    #[test]
    fn damaged_file_is_moved_aside() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state.json");
        save(&path, states()).unwrap();
        let good = fs::read_to_string(&path).unwrap();
        let half = &good[..good.len() / 2];
        let swaps = [("\"version\": 1", "\"version\": 2"), ("down", "gone"), ("root", "\\u001b[2J"), ("h:1", "")];
        let mut texts: Vec<String> = swaps.iter().map(|(from, to)| good.replacen(from, to, 1)).collect();
        texts.extend([half.to_owned(), String::new(), "\u{0}".repeat(9), format!("{good}more")]);
        for text in texts {
            fs::write(&path, &text).unwrap();
            assert_eq!(load(&path), Loaded::Damaged, "{text}");
            assert!(!path.exists());
            assert_eq!(fs::read_to_string(beside(&path, ".damaged")).unwrap(), text);
        }
    }

    #[test]
    fn failed_write_keeps_the_old_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state.json");
        save(&path, states()).unwrap();
        fs::create_dir(beside(&path, ".new")).unwrap();
        assert!(save(&path, Vec::new()).is_err());
        assert_eq!(load(&path), Loaded::States(states()));
    }
}
