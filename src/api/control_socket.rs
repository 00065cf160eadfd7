//! The control socket in the file system: bound under a temporary name, and published under its path when the process is ready.
//!
//! The temporary name is `PATH.PID.new`. A published socket has two names: `PATH`, until a successor takes it over, and
//! `PATH.PID` until the process ends, by which its successor forwards commands to it (`predecessors`). A socket on which no
//! process listens is replaced. A file that is not a socket, or that belongs to another user, is never replaced.

use std::fs::{self, File, TryLockError};
use std::io;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use socket2::{Domain, SockAddr, Socket, Type};
use thiserror::Error;

/// Timeout of the lock on the directory. After it the socket is published without the lock, because other users may be able to
/// lock the directory too.
const LOCK_DEADLINE: Duration = Duration::from_secs(3);
const LOCK_PAUSE: Duration = Duration::from_millis(20);

/// What exists at a control path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PathState {
    /// No file.
    Free,
    /// A socket on which no process listens.
    Stale,
    /// A socket on which a process listens.
    Listening,
}

/// What to do if another process listens at the control path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum IfListening {
    /// Fail.
    Fail,
    /// Replace its socket, because it is about to hand over.
    Replace,
}

/// The reason why a control path cannot be used.
#[derive(Debug, Error)]
pub(crate) enum ControlSocketError {
    #[error("{0} is {1}, not a socket: remove it, or choose another path (admin.control)")]
    NotSocket(PathBuf, &'static str),
    #[error(
        "{path} belongs to another user (uid {uid}), and so perhaps does the process that listens there: run as that user or as \
         root, or choose another path (admin.control)"
    )]
    OtherUser {
        /// The control path.
        path: PathBuf,
        /// Owner of the socket.
        uid: u32,
    },
    #[error(
        "{0}: permission denied: the process there belongs to another user; run as that user or as root (admin.control)"
    )]
    Denied(PathBuf),
    /// Any user could replace the socket by another.
    #[error("{0}, the directory of the control socket, is writable by every user: choose another (admin.control)")]
    OpenDirectory(PathBuf),
    #[error("another process already answers at {0}: replace it with --replace")]
    InUse(PathBuf),
    #[error("{path} cannot be bound (admin.control)")]
    Io {
        /// The control path.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
}

impl ControlSocketError {
    fn io(path: &Path, source: io::Error) -> Self {
        Self::Io { path: path.to_owned(), source }
    }

    /// Whether the cause is the user that this process runs as.
    pub(crate) fn is_permission(&self) -> bool {
        match self {
            Self::OtherUser { .. } | Self::Denied(_) => true,
            Self::Io { source, .. } => source.kind() == io::ErrorKind::PermissionDenied,
            Self::NotSocket(..) | Self::OpenDirectory(_) | Self::InUse(_) => false,
        }
    }
}

/// Returns what exists at `path`. A socket there must belong to one of the users in `trusted`.
///
/// # Errors
/// The path cannot be used: see [`ControlSocketError`].
pub(crate) fn path_state(path: &Path, trusted: &[u32]) -> Result<PathState, ControlSocketError> {
    let directory = directory(path);
    let mode = fs::metadata(directory).map_err(|error| ControlSocketError::io(path, error))?.mode();
    if is_writable_by_all(mode) {
        return Err(ControlSocketError::OpenDirectory(directory.to_owned()));
    }
    let found = match fs::symlink_metadata(path) {
        Ok(found) => found,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(PathState::Free),
        Err(error) => return Err(ControlSocketError::io(path, error)),
    };
    if !found.file_type().is_socket() {
        return Err(ControlSocketError::NotSocket(path.to_owned(), kind(found.file_type())));
    }
    if !trusted.contains(&found.uid()) {
        return Err(ControlSocketError::OtherUser { path: path.to_owned(), uid: found.uid() });
    }
    match connect(path) {
        Ok(()) => Ok(PathState::Listening),
        Err(error) => match error.kind() {
            io::ErrorKind::ConnectionRefused => Ok(PathState::Stale),
            io::ErrorKind::NotFound => Ok(PathState::Free),
            io::ErrorKind::PermissionDenied => Err(ControlSocketError::Denied(path.to_owned())),
            // Its connection queue is full, so a process listens.
            io::ErrorKind::WouldBlock => Ok(PathState::Listening),
            _ => Err(ControlSocketError::io(path, error)),
        },
    }
}

/// Connects without blocking, to find out whether a process listens. The queue of a process that is stopped may be full.
fn connect(path: &Path) -> io::Result<()> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM.nonblocking(), None)?;
    socket.connect(&SockAddr::unix(path)?)
}

/// Whether a directory is writable by all users without the sticky bit, which lets only owners rename and remove files.
fn is_writable_by_all(mode: u32) -> bool {
    mode & 0o002 != 0 && mode & 0o1000 == 0
}

fn kind(found: fs::FileType) -> &'static str {
    if found.is_symlink() {
        "a symbolic link"
    } else if found.is_dir() {
        "a directory"
    } else {
        "a file"
    }
}

/// Returns the directory of a control path.
pub(crate) fn directory(path: &Path) -> &Path {
    match path.parent() {
        Some(directory) if directory != Path::new("") => directory,
        _ => Path::new("."),
    }
}

/// Whether a user with these groups may create and rename files in `directory`. Access control lists are not considered.
pub(crate) fn may_write(directory: &Path, uid: u32, groups: &[u32]) -> io::Result<bool> {
    let found = fs::metadata(directory)?;
    Ok(permits(found.mode(), (found.uid(), found.gid()), uid, groups))
}

fn permits(mode: u32, (owner, group): (u32, u32), uid: u32, groups: &[u32]) -> bool {
    let bits = if uid == owner {
        mode >> 6
    } else if groups.contains(&group) {
        mode >> 3
    } else {
        mode
    };
    uid == 0 || bits & 0o3 == 0o3
}

/// A socket that listens under a temporary name. The name is removed if the socket is not published.
#[derive(Debug)]
pub(crate) struct PendingSocket {
    socket: UnixListener,
    temporary: TemporaryName,
    path: PathBuf,
    id: FileId,
}

/// Device and inode of a file.
type FileId = (u64, u64);

#[derive(Debug)]
struct TemporaryName(Option<PathBuf>);

impl Drop for TemporaryName {
    fn drop(&mut self) {
        if let Some(path) = &self.0 {
            // The file may already have been removed.
            let _ = fs::remove_file(path);
        }
    }
}

impl PendingSocket {
    /// Binds a temporary name in the directory of `path`. The socket is given to `owner`, a user and a group.
    ///
    /// # Errors
    /// The socket cannot be bound.
    pub(crate) fn bind(path: &Path, owner: Option<(u32, u32)>) -> Result<Self, ControlSocketError> {
        remove_stale_sockets(path);
        let bound = || {
            let temporary = temporary_name(path, std::process::id());
            let _ = fs::remove_file(&temporary);
            let socket = UnixListener::bind(&temporary)?;
            let temporary = TemporaryName(Some(temporary));
            let name = temporary.0.as_deref().unwrap_or(path);
            fs::set_permissions(name, fs::Permissions::from_mode(0o600))?;
            if let Some((user, group)) = owner {
                std::os::unix::fs::lchown(name, Some(user), Some(group))?;
            }
            socket.set_nonblocking(true)?;
            let found = fs::symlink_metadata(name)?;
            Ok(Self { socket, id: (found.dev(), found.ino()), path: path.to_owned(), temporary })
        };
        bound().map_err(|error| ControlSocketError::io(path, error))
    }

    /// Renames the socket to its path, so that commands reach this process.
    ///
    /// # Errors
    /// Another process listens at the path and `if_listening` is [`IfListening::Fail`], or the path cannot be used.
    pub(crate) fn publish(
        mut self,
        if_listening: IfListening,
        trusted: &[u32],
    ) -> Result<PublishedSocket, ControlSocketError> {
        let _lock = lock(directory(&self.path));
        if path_state(&self.path, trusted)? == PathState::Listening && if_listening == IfListening::Fail {
            return Err(ControlSocketError::InUse(self.path));
        }
        let own = own_path(&self.path, std::process::id());
        let _ = fs::remove_file(&own);
        if let Some(temporary) = &self.temporary.0 {
            let named = fs::hard_link(temporary, &own).and_then(|()| fs::rename(temporary, &self.path));
            named.map_err(|error| ControlSocketError::io(&self.path, error))?;
        }
        self.temporary.0 = None;
        let path = PublishedPath { path: std::mem::take(&mut self.path), own, id: self.id };
        Ok(PublishedSocket { socket: self.socket, path })
    }
}

/// A socket under its path.
#[derive(Debug)]
pub(crate) struct PublishedSocket {
    /// The listening socket.
    pub socket: UnixListener,
    /// The paths of the socket, which are removed when this is dropped.
    pub path: PublishedPath,
}

/// The control path, which leads to this process's socket until another process takes it over, and the path of this process alone.
#[derive(Debug)]
pub(crate) struct PublishedPath {
    path: PathBuf,
    own: PathBuf,
    id: FileId,
}

impl PublishedPath {
    /// The control path.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Whether the control path still leads to this process's socket.
    pub(crate) fn is_ours(&self) -> bool {
        self.leads_here(&self.path)
    }

    fn leads_here(&self, path: &Path) -> bool {
        fs::symlink_metadata(path).is_ok_and(|found| (found.dev(), found.ino()) == self.id)
    }
}

impl Drop for PublishedPath {
    fn drop(&mut self) {
        for path in [&self.path, &self.own] {
            if self.leads_here(path) {
                // If this process is not permitted to remove it, a later start replaces or removes it.
                let _ = fs::remove_file(path);
            }
        }
    }
}

/// Locks the directory, so that two processes do not publish at the same time. The lock is released when the file is dropped.
fn lock(directory: &Path) -> Option<File> {
    let directory = File::open(directory).ok()?;
    let deadline = Instant::now() + LOCK_DEADLINE;
    loop {
        match directory.try_lock() {
            Ok(()) => return Some(directory),
            Err(TryLockError::WouldBlock) if Instant::now() < deadline => std::thread::sleep(LOCK_PAUSE),
            Err(_) => return None,
        }
    }
}

fn temporary_name(path: &Path, pid: u32) -> PathBuf {
    with_suffix(path, &format!(".{pid}.new"))
}

/// Returns the path of the socket of the process `pid` alone.
pub(super) fn own_path(path: &Path, pid: u32) -> PathBuf {
    with_suffix(path, &format!(".{pid}"))
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

/// Removes the sockets of processes that have ended.
fn remove_stale_sockets(path: &Path) {
    let Some(prefix) = path.file_name() else { return };
    let Ok(entries) = fs::read_dir(directory(path)) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let pid = name.as_encoded_bytes().strip_prefix(prefix.as_encoded_bytes()).and_then(pid_of_name);
        let is_socket = || entry.file_type().is_ok_and(|kind| kind.is_socket());
        // A process in another container that shares the directory has a process id that is unknown here, but listens.
        let is_refused = || connect(&entry.path()).is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused);
        if pid.is_some_and(|pid| !is_running(pid)) && is_socket() && is_refused() {
            let _ = fs::remove_file(entry.path());
        }
    }
}

/// Parses the process id in `.PID`, in `.PID.new`, and in `.PID.sockets`, which an earlier version used.
fn pid_of_name(rest: &[u8]) -> Option<u32> {
    let rest = std::str::from_utf8(rest).ok()?.strip_prefix('.')?;
    let digits = rest.strip_suffix(".new").or_else(|| rest.strip_suffix(".sockets")).unwrap_or(rest);
    digits.parse().ok().filter(|pid| *pid > 0 && digits.bytes().all(|byte| byte.is_ascii_digit()))
}

/// Whether a process with this id exists, of any user.
pub(super) fn is_running(pid: u32) -> bool {
    let Some(pid) = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw) else { return false };
    rustix::process::test_kill_process(pid) != Err(rustix::io::Errno::SRCH)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn own() -> u32 {
        rustix::process::geteuid().as_raw()
    }

    #[test]
    fn published_socket_is_reachable_and_its_paths_are_removed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("control");
        let pending = PendingSocket::bind(&path, None).unwrap();
        assert_eq!(path_state(&path, &[own()]).unwrap(), PathState::Free);
        let published = pending.publish(IfListening::Fail, &[own()]).unwrap();
        assert_eq!(path_state(&path, &[own()]).unwrap(), PathState::Listening);
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        let own_path = own_path(&path, std::process::id());
        assert_eq!(path_state(&own_path, &[own()]).unwrap(), PathState::Listening);
        // A second process must ask to replace the first.
        let second = PendingSocket::bind(&path, None).unwrap();
        assert!(matches!(second.publish(IfListening::Fail, &[own()]), Err(ControlSocketError::InUse(_))));
        let second = PendingSocket::bind(&path, None).unwrap().publish(IfListening::Replace, &[own()]).unwrap();
        assert!(second.path.is_ours() && !published.path.is_ours());
        drop(published);
        assert!(second.path.is_ours(), "the socket of another process is not removed");
        drop(second);
        drop(PendingSocket::bind(&path, None).unwrap());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn path_that_is_not_an_own_socket_is_not_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        fs::write(path("file"), "precious").unwrap();
        fs::create_dir(path("directory")).unwrap();
        symlink(path("file"), path("link")).unwrap();
        for (name, kind) in [("file", "a file"), ("directory", "a directory"), ("link", "a symbolic link")] {
            let error = path_state(&path(name), &[own()]).unwrap_err().to_string();
            assert!(error.contains(&format!("is {kind}, not a socket")), "{error}");
            let pending = PendingSocket::bind(&path(name), None).unwrap();
            assert!(pending.publish(IfListening::Replace, &[own()]).is_err());
        }
        assert_eq!(fs::read_to_string(path("file")).unwrap(), "precious");
        drop(UnixListener::bind(path("socket")).unwrap());
        assert_eq!(path_state(&path("socket"), &[own()]).unwrap(), PathState::Stale);
        let error = path_state(&path("socket"), &[own() + 1]).unwrap_err();
        assert!(error.is_permission() && error.to_string().contains("belongs to another user"), "{error}");
    }

    #[test]
    fn directory_that_all_users_may_write_to_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("control");
        for (mode, is_refused) in [(0o777, true), (0o1777, false), (0o775, false), (0o702, true)] {
            fs::set_permissions(folder.path(), fs::Permissions::from_mode(mode)).unwrap();
            assert_eq!(path_state(&path, &[own()]).is_err(), is_refused, "{mode:o}");
        }
    }

    #[test]
    fn sockets_of_dead_processes_are_removed() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        // Above the kernel's highest process id.
        let dead = 4_194_304 + 1;
        let running = 1;
        let names = |pid: i32| ["", ".new", ".sockets"].map(|end| format!("control.{pid}{end}"));
        for name in names(dead).iter().chain(&names(running)) {
            drop(UnixListener::bind(path(name)).unwrap());
        }
        let _elsewhere = UnixListener::bind(path("control.4194306")).unwrap();
        for other in ["control.4194305.txt", "other.4194305", "control.4194305"] {
            fs::remove_file(path(other)).unwrap_or(());
            fs::write(path(other), "").unwrap();
        }
        remove_stale_sockets(&path("control"));
        assert!(!path("control.4194305.new").exists() && !path("control.4194305.sockets").exists());
        let others = ["control.4194305.txt", "other.4194305", "control.4194305", "control.4194306"];
        for kept in others.into_iter().chain(["control.1", "control.1.new"]) {
            assert!(path(kept).exists(), "{kept}");
        }
    }

    #[test]
    fn permissions_of_owner_group_and_others() {
        let owner = (10, 20);
        assert!(permits(0o700, owner, 10, &[]) && permits(0o000, owner, 0, &[]));
        assert!(!permits(0o077, owner, 10, &[20]), "the bits of the owner apply to the owner");
        assert!(permits(0o770, owner, 11, &[19, 20]) && !permits(0o750, owner, 11, &[20]));
        assert!(permits(0o703, owner, 11, &[]) && !permits(0o770, owner, 11, &[]));
    }
}
