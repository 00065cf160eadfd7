//! Notices that files have changed, by looking at them once a second.
//!
//! A look costs a stat(2) a file and needs nothing of the kernel or the file system, so it works over NFS and in
//! containers too. Symbolic links are followed: a link that leads elsewhere (certbot), or one of the folders on the way
//! (Kubernetes), is a change of the file. A file that is still being written is left alone until it has not changed for
//! one look. What the files say is the caller's business: `route` for tables, `tls` for certificates.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How often files are looked at, and how long one must rest before it is loaded.
pub(crate) const LOOK: Duration = Duration::from_secs(1);
/// Files that could not be loaded are due again after so many looks though they have not changed: what was wrong may have
/// been the system, out of descriptors for example.
const RETRY: u32 = 60;

/// Files that are loaded together.
#[derive(Debug)]
pub(crate) struct Watch {
    paths: Vec<PathBuf>,
    loaded: Vec<Stamp>,
    seen: Vec<Stamp>,
    /// Looks until another try.
    retry: Option<u32>,
}

impl Watch {
    /// Takes the files for loaded as they are now: to be called before they are read, so that a change meanwhile is one.
    pub(crate) fn new(paths: Vec<PathBuf>) -> Self {
        let loaded = stamps(&paths);
        Self { paths, seen: loaded.clone(), loaded, retry: None }
    }

    /// Looks at the files. Whether they are to be loaded: one of them has changed since that was last due, and none since
    /// the last look. Or it is time for another try, see [`Watch::failed`].
    pub(crate) fn is_due(&mut self) -> bool {
        let now = stamps(&self.paths);
        self.look(now)
    }

    /// Records the state of the files, for [`Watch::is_settled`] to compare with.
    pub(crate) fn observe(&mut self) {
        self.seen = stamps(&self.paths);
    }

    /// Whether no file has changed since the last look. If so they count as loaded from now on, and the caller loads them.
    pub(crate) fn is_settled(&mut self) -> bool {
        let before = std::mem::replace(&mut self.seen, stamps(&self.paths));
        let settled = self.seen == before;
        if settled {
            self.loaded.clone_from(&self.seen);
            self.retry = None;
        }
        settled
    }

    /// Whether loading the files again would bring what they brought: they could be loaded, and have not changed since.
    pub(crate) fn is_unchanged(&self) -> bool {
        self.retry.is_none() && stamps(&self.paths) == self.loaded
    }

    /// What was due could not be loaded: it is due again in a minute, if it does not change before.
    pub(crate) fn failed(&mut self) {
        self.retry = Some(RETRY);
    }

    fn look(&mut self, now: Vec<Stamp>) -> bool {
        let before = std::mem::replace(&mut self.seen, now);
        self.retry = self.retry.map(|looks| looks.saturating_sub(1));
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

/// What tells one version of a file from the next. `None`: there is no file.
///
/// The change time is among it: a program can set the modification time back, but not this one; and a file that becomes
/// readable is a change.
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

    fn watch() -> Watch {
        Watch { paths: Vec::new(), loaded: stamp(1), seen: stamp(1), retry: None }
    }

    #[test]
    fn a_change_is_loaded_once_it_rests() {
        let mut watch = watch();
        let looks = [(1, false), (2, false), (3, false), (3, true), (3, false), (4, false), (3, false), (3, false)];
        for (step, (version, due)) in looks.into_iter().enumerate() {
            assert_eq!(watch.look(stamp(version)), due, "look {step}");
        }
    }

    #[test]
    fn a_file_that_goes_is_a_change_too() {
        let mut watch = watch();
        assert!(!watch.look(vec![Stamp(None)]));
        assert!(watch.look(vec![Stamp(None)]));
    }

    #[test]
    fn what_failed_is_tried_again_without_a_change() {
        let mut watch = watch();
        watch.failed();
        assert!((1..RETRY).all(|_| !watch.look(stamp(1))));
        assert!(watch.look(stamp(1)), "once");
        assert!((0..2 * RETRY).all(|_| !watch.look(stamp(1))));
        // A change comes first, and is the try.
        watch.failed();
        assert!(!watch.look(stamp(2)) && watch.look(stamp(2)));
        assert!((0..2 * RETRY).all(|_| !watch.look(stamp(2))));
    }

    #[test]
    fn a_file_counts_as_loaded_once_it_is_settled() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("table");
        fs::write(&path, "1").unwrap();
        let mut watch = Watch::new(vec![path.clone()]);
        fs::write(&path, "12").unwrap();
        watch.observe();
        fs::write(&path, "123").unwrap();
        assert!(!watch.is_settled() && !watch.is_unchanged(), "it is being written");
        assert!(watch.is_settled() && watch.is_unchanged());
        assert!(!watch.is_due(), "what was loaded is not due once more");
    }

    #[test]
    fn changes_are_seen_through_links_and_whatever_the_times_say() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        for version in ["1", "2"] {
            fs::create_dir(path(version)).unwrap();
            fs::write(path(version).join("cert"), version).unwrap();
        }
        // As Kubernetes lays out a volume: the file leads through a folder that is a link, and swapped.
        symlink("1", path("data")).unwrap();
        symlink("data/cert", path("cert")).unwrap();
        let mut watch = Watch::new(vec![path("cert")]);
        assert!(!watch.is_due() && !watch.is_due());
        symlink("2", path("new")).unwrap();
        fs::rename(path("new"), path("data")).unwrap();
        assert!(!watch.is_due() && watch.is_due() && !watch.is_due());
        // Another text of the same length in the same file, at the same time of day.
        let file = fs::File::options().write(true).open(path("cert")).unwrap();
        let before = file.metadata().unwrap().modified().unwrap();
        // The kernel's clock of files ticks a few hundred times a second only.
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
