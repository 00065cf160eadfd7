//! Detects changed files by polling them once a second.
//!
//! A poll costs one stat(2) per file and needs no notification by the kernel or the file system, so it also works over NFS and in
//! containers. Symbolic links are followed: a link that changes its target (certbot), or a directory on the path that does
//! (Kubernetes), is a change of the file. A file that is still being written is not reported until it has not changed between
//! two polls. Loading the files is the caller's job: `route` loads tables, `tls` loads certificates.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Interval between two polls. A changed file must stay unchanged for this long before it is loaded.
pub(crate) const POLL_INTERVAL: Duration = Duration::from_secs(1);
/// Number of polls after which files that could not be loaded are due again although they have not changed: the cause may have
/// been the system, for example a lack of descriptors.
const RETRY_POLLS: u32 = 60;

/// The state of files that are loaded together.
#[derive(Debug)]
pub(crate) struct FileWatch {
    paths: Vec<PathBuf>,
    loaded: Vec<Stamp>,
    seen: Vec<Stamp>,
    /// Number of polls until the files are due again, after a failure.
    retry: Option<u32>,
}

impl FileWatch {
    /// Regards the files as loaded in their present state. Call it before reading them, so that a change during the reading is
    /// detected.
    pub(crate) fn new(paths: Vec<PathBuf>) -> Self {
        let loaded = stamps(&paths);
        Self { paths, seen: loaded.clone(), loaded, retry: None }
    }

    /// Polls the files and returns whether they must be loaded: one of them has changed since they were loaded and none since the
    /// last poll, or a retry is due (see [`FileWatch::failed`]).
    pub(crate) fn is_due(&mut self) -> bool {
        let now = stamps(&self.paths);
        self.poll(now)
    }

    /// Records the state of the files for [`FileWatch::is_settled`].
    pub(crate) fn observe(&mut self) {
        self.seen = stamps(&self.paths);
    }

    /// Whether no file has changed since the last poll. If so, they count as loaded from now on, and the caller must load them.
    pub(crate) fn is_settled(&mut self) -> bool {
        let before = std::mem::replace(&mut self.seen, stamps(&self.paths));
        let settled = self.seen == before;
        if settled {
            self.loaded.clone_from(&self.seen);
            self.retry = None;
        }
        settled
    }

    /// Whether loading the files again would have the same result: the last load succeeded, and they have not changed since.
    pub(crate) fn is_unchanged(&self) -> bool {
        self.retry.is_none() && stamps(&self.paths) == self.loaded
    }

    /// Records that the files could not be loaded. They are due again after a minute, or when they change.
    pub(crate) fn failed(&mut self) {
        self.retry = Some(RETRY_POLLS);
    }

    fn poll(&mut self, now: Vec<Stamp>) -> bool {
        let before = std::mem::replace(&mut self.seen, now);
        self.retry = self.retry.map(|polls| polls.saturating_sub(1));
        let due = (self.seen != self.loaded || self.retry == Some(0)) && self.seen == before;
        if due {
            self.loaded.clone_from(&self.seen);
            self.retry = None;
        }
        due
    }
}

fn stamps(paths: &[PathBuf]) -> Vec<Stamp> {
    paths.iter().map(|path| Stamp::of(path)).collect()
}

/// Identifies one version of a file; `None` if the file does not exist.
///
/// It includes the change time, because a program can set back the modification time but not the change time, and because a file
/// that becomes readable has changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp(Option<[i128; 5]>);

impl Stamp {
    fn of(path: &Path) -> Self {
        let nanoseconds = |seconds: i64, rest: i64| i128::from(seconds) * 1_000_000_000 + i128::from(rest);
        Self(fs::metadata(path).ok().map(|file| {
            let modified = nanoseconds(file.mtime(), file.mtime_nsec());
            let changed = nanoseconds(file.ctime(), file.ctime_nsec());
            [file.dev().into(), file.ino().into(), file.len().into(), modified, changed]
        }))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn stamp(version: i128) -> Vec<Stamp> {
        vec![Stamp(Some([version; 5]))]
    }

    fn watch() -> FileWatch {
        FileWatch { paths: Vec::new(), loaded: stamp(1), seen: stamp(1), retry: None }
    }

    #[test]
    fn a_change_is_due_once_the_file_stays_unchanged() {
        let mut watch = watch();
        let polls = [(1, false), (2, false), (3, false), (3, true), (3, false), (4, false), (3, false), (3, false)];
        for (step, (version, due)) in polls.into_iter().enumerate() {
            assert_eq!(watch.poll(stamp(version)), due, "poll {step}");
        }
    }

    #[test]
    fn a_removed_file_is_a_change() {
        let mut watch = watch();
        assert!(!watch.poll(vec![Stamp(None)]));
        assert!(watch.poll(vec![Stamp(None)]));
    }

    #[test]
    fn a_failed_load_is_retried_without_a_change() {
        let mut watch = watch();
        watch.failed();
        assert!((1..RETRY_POLLS).all(|_| !watch.poll(stamp(1))));
        assert!(watch.poll(stamp(1)), "once");
        assert!((0..2 * RETRY_POLLS).all(|_| !watch.poll(stamp(1))));
        // A change before the retry replaces it.
        watch.failed();
        assert!(!watch.poll(stamp(2)) && watch.poll(stamp(2)));
        assert!((0..2 * RETRY_POLLS).all(|_| !watch.poll(stamp(2))));
    }

    #[test]
    fn a_file_counts_as_loaded_once_it_is_settled() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("table");
        fs::write(&path, "1").unwrap();
        let mut watch = FileWatch::new(vec![path.clone()]);
        fs::write(&path, "12").unwrap();
        watch.observe();
        fs::write(&path, "123").unwrap();
        assert!(!watch.is_settled() && !watch.is_unchanged(), "it is being written");
        assert!(watch.is_settled() && watch.is_unchanged());
        assert!(!watch.is_due(), "loaded files are not due again");
    }

    #[test]
    fn changes_behind_links_and_with_old_modification_times_are_detected() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        for version in ["1", "2"] {
            fs::create_dir(path(version)).unwrap();
            fs::write(path(version).join("cert"), version).unwrap();
        }
        // The layout of a Kubernetes volume: a directory on the path is a link, which is replaced.
        symlink("1", path("data")).unwrap();
        symlink("data/cert", path("cert")).unwrap();
        let mut watch = FileWatch::new(vec![path("cert")]);
        assert!(!watch.is_due() && !watch.is_due());
        symlink("2", path("new")).unwrap();
        fs::rename(path("new"), path("data")).unwrap();
        assert!(!watch.is_due() && watch.is_due() && !watch.is_due());
        // Different content of the same length, with the modification time set back.
        let file = fs::File::options().write(true).open(path("cert")).unwrap();
        let before = file.metadata().unwrap().modified().unwrap();
        // The kernel's clock for file times ticks only a few hundred times a second.
        let ticked = || {
            fs::write(path("clock"), "").unwrap();
            fs::metadata(path("clock")).unwrap().modified().unwrap() > before
        };
        while !ticked() {}
        fs::write(path("cert"), "3").unwrap();
        file.set_modified(before).unwrap();
        assert!(!watch.is_due() && watch.is_due());
    }
}
