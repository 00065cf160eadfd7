//! The control socket in the file system: bound under a temporary name, published last, restored when it is lost.
//!
//! The temporary name is `PATH.PID.new`. A published socket has two names: `PATH`, until a successor takes it, and `PATH.PID` as
//! long as the process runs, where its successor forwards commands to it (`predecessors`). What already lies at the path decides
//! whether it may be taken ([`occupant`]): a socket nobody listens on is replaced, anything that is not a socket, or that another
//! user put there, is not.

use std::fs::{self, File, TryLockError};
use std::io;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use socket2::{Domain, SockAddr, Socket, Type};
use thiserror::Error;

/// How long the lock of the folder is waited for. Other users may be able to lock it, so it is not waited for in vain.
const LOCK_DEADLINE: Duration = Duration::from_secs(3);
const LOCK_PAUSE: Duration = Duration::from_millis(20);

/// What lies at a control path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Occupant {
    /// Nothing.
    Nothing,
    /// A socket of a process that is gone.
    Stale,
    /// A process listens.
    Process,
}

/// Why a control path cannot be used.
#[derive(Debug, Error)]
pub(crate) enum PlaceError {
    /// Something else lies there.
    #[error("{0} is {1}, not a socket: remove it, or choose another path (admin.control)")]
    NotSocket(PathBuf, &'static str),
    /// Another user's socket.
    #[error(
        "{path} belongs to another user (uid {uid}), and so perhaps does the process that listens there: run as that user or as \
         root, or choose another path (admin.control)"
    )]
    OtherUser {
        /// The control path.
        path: PathBuf,
        /// Of the socket.
        uid: u32,
    },
    /// The socket exists and may not be opened.
    #[error(
        "{0}: permission denied: the process there belongs to another user; run as that user or as root (admin.control)"
    )]
    Denied(PathBuf),
    /// Anyone could put a socket of theirs in this one's place.
    #[error("{0}, the folder of the control socket, is writable by every user: choose another (admin.control)")]
    OpenFolder(PathBuf),
    /// Another process was faster.
    #[error("another process answers at {0} already: take its place with --replace")]
    Taken(PathBuf),
    /// The system's reason.
    #[error("{path} cannot be bound (admin.control)")]
    Io {
        /// The control path.
        path: PathBuf,
        /// The reason.
        source: io::Error,
    },
}

impl PlaceError {
    fn io(path: &Path, source: io::Error) -> Self {
        Self::Io { path: path.to_owned(), source }
    }

    /// Whether the cause is that this process runs as the wrong user.
    pub(crate) fn is_permission(&self) -> bool {
        match self {
            Self::OtherUser { .. } | Self::Denied(_) => true,
            Self::Io { source, .. } => source.kind() == io::ErrorKind::PermissionDenied,
            Self::NotSocket(..) | Self::OpenFolder(_) | Self::Taken(_) => false,
        }
    }
}

/// Looks at `path`, whose socket must belong to one of the users in `trusted` (root may replace anyone's).
///
/// # Errors
/// It cannot be used, see [`PlaceError`].
pub(crate) fn occupant(path: &Path, trusted: &[u32]) -> Result<Occupant, PlaceError> {
    let folder = folder(path);
    let mode = fs::metadata(folder).map_err(|error| PlaceError::io(path, error))?.mode();
    if is_open_to_all(mode) {
        return Err(PlaceError::OpenFolder(folder.to_owned()));
    }
    let found = match fs::symlink_metadata(path) {
        Ok(found) => found,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Occupant::Nothing),
        Err(error) => return Err(PlaceError::io(path, error)),
    };
    if !found.file_type().is_socket() {
        return Err(PlaceError::NotSocket(path.to_owned(), kind(found.file_type())));
    }
    if !trusted.contains(&found.uid()) {
        return Err(PlaceError::OtherUser { path: path.to_owned(), uid: found.uid() });
    }
    match connect(path) {
        Ok(()) => Ok(Occupant::Process),
        Err(error) => match error.kind() {
            io::ErrorKind::ConnectionRefused => Ok(Occupant::Stale),
            io::ErrorKind::NotFound => Ok(Occupant::Nothing),
            io::ErrorKind::PermissionDenied => Err(PlaceError::Denied(path.to_owned())),
            // Its queue is full: it is there, and slow.
            io::ErrorKind::WouldBlock => Ok(Occupant::Process),
            _ => Err(PlaceError::io(path, error)),
        },
    }
}

/// Whether a process listens. Does not wait, also where that process is stopped and its queue is full.
fn connect(path: &Path) -> io::Result<()> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM.nonblocking(), None)?;
    socket.connect(&SockAddr::unix(path)?)
}

/// Writable by all without the sticky bit, which keeps files from being renamed and removed by others.
fn is_open_to_all(mode: u32) -> bool {
    mode & 0o002 != 0 && mode & 0o1000 == 0
}

fn kind(found: fs::FileType) -> &'static str {
    if found.is_symlink() {
        "a symbolic link"
    } else if found.is_dir() {
        "a folder"
    } else {
        "a file"
    }
}

pub(super) fn folder(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if folder != Path::new("") => folder,
        _ => Path::new("."),
    }
}

/// Whether a user with these groups may create and rename files in a folder with this owner and mode. Access control lists
/// are not considered.
pub(crate) fn may_write(folder: &Path, uid: u32, groups: &[u32]) -> io::Result<bool> {
    let found = fs::metadata(folder)?;
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

/// A socket that listens under a temporary name, which is removed if it is not published.
#[derive(Debug)]
pub(crate) struct PendingSocket {
    socket: UnixListener,
    temporary: TemporaryName,
    path: PathBuf,
    id: FileId,
}

/// Which file it is, whatever its name.
type FileId = (u64, u64);

#[derive(Debug)]
struct TemporaryName(Option<PathBuf>);

impl Drop for TemporaryName {
    fn drop(&mut self) {
        if let Some(path) = &self.0 {
            // It may be gone already.
            let _ = fs::remove_file(path);
        }
    }
}

impl PendingSocket {
    /// Binds beside `path`; the socket belongs to `owner`, a user and a group, if given.
    ///
    /// # Errors
    /// The system's reason.
    pub(crate) fn bind(path: &Path, owner: Option<(u32, u32)>) -> Result<Self, PlaceError> {
        remove_stale_names(path);
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
        bound().map_err(|error| PlaceError::io(path, error))
    }

    /// Gives the socket its name. Unless `replaces` a process that knows, none may listen there.
    ///
    /// # Errors
    /// Another process has taken the name, or the system's reason.
    pub(crate) fn publish(mut self, replaces: bool, trusted: &[u32]) -> Result<PublishedSocket, PlaceError> {
        let _lock = lock(folder(&self.path));
        if occupant(&self.path, trusted)? == Occupant::Process && !replaces {
            return Err(PlaceError::Taken(self.path));
        }
        let own = own_name(&self.path, std::process::id());
        let _ = fs::remove_file(&own);
        if let Some(temporary) = &self.temporary.0 {
            let named = fs::hard_link(temporary, &own).and_then(|()| fs::rename(temporary, &self.path));
            named.map_err(|error| PlaceError::io(&self.path, error))?;
        }
        self.temporary.0 = None;
        let name = PublishedName { path: std::mem::take(&mut self.path), own, id: self.id };
        Ok(PublishedSocket { socket: self.socket, name })
    }
}

/// A socket under its name.
#[derive(Debug)]
pub(crate) struct PublishedSocket {
    /// Listens.
    pub socket: UnixListener,
    /// Removed when it is dropped.
    pub name: PublishedName,
}

/// A control path that leads to this process's socket, unless another process has taken it; and the socket's own name.
#[derive(Debug)]
pub(crate) struct PublishedName {
    path: PathBuf,
    own: PathBuf,
    id: FileId,
}

impl PublishedName {
    /// The path.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Whether the path still leads to this process's socket.
    pub(crate) fn is_ours(&self) -> bool {
        self.leads_here(&self.path)
    }

    fn leads_here(&self, path: &Path) -> bool {
        fs::symlink_metadata(path).is_ok_and(|found| (found.dev(), found.ino()) == self.id)
    }
}

impl Drop for PublishedName {
    fn drop(&mut self) {
        for path in [&self.path, &self.own] {
            if self.leads_here(path) {
                // Without the right to do so it stays, and a later start replaces or removes it.
                let _ = fs::remove_file(path);
            }
        }
    }
}

/// Keeps two processes from taking a name at the same time, until it is dropped.
fn lock(folder: &Path) -> Option<File> {
    let folder = File::open(folder).ok()?;
    let deadline = Instant::now() + LOCK_DEADLINE;
    loop {
        match folder.try_lock() {
            Ok(()) => return Some(folder),
            Err(TryLockError::WouldBlock) if Instant::now() < deadline => std::thread::sleep(LOCK_PAUSE),
            Err(_) => return None,
        }
    }
}

fn temporary_name(path: &Path, pid: u32) -> PathBuf {
    with_suffix(path, &format!(".{pid}.new"))
}

pub(super) fn own_name(path: &Path, pid: u32) -> PathBuf {
    with_suffix(path, &format!(".{pid}"))
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

/// Removes names of processes that are gone.
fn remove_stale_names(path: &Path) {
    let Some(prefix) = path.file_name() else { return };
    let Ok(entries) = fs::read_dir(folder(path)) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let pid = name.as_encoded_bytes().strip_prefix(prefix.as_encoded_bytes()).and_then(pid_of_name);
        let is_socket = || entry.file_type().is_ok_and(|kind| kind.is_socket());
        // A process of another container with the same folder has an id that is unknown here, and listens.
        let is_refused = || connect(&entry.path()).is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused);
        if pid.is_some_and(|pid| !is_running(pid)) && is_socket() && is_refused() {
            let _ = fs::remove_file(entry.path());
        }
    }
}

/// The process id in `.PID` and `.PID.new`, and in `.PID.sockets`, a name that an earlier version used.
fn pid_of_name(rest: &[u8]) -> Option<u32> {
    let rest = std::str::from_utf8(rest).ok()?.strip_prefix('.')?;
    let digits = rest.strip_suffix(".new").or_else(|| rest.strip_suffix(".sockets")).unwrap_or(rest);
    digits.parse().ok().filter(|pid| *pid > 0 && digits.bytes().all(|byte| byte.is_ascii_digit()))
}

/// Whether there is a process with this id, of any user.
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
    fn a_socket_is_reachable_under_its_name_and_leaves_none_behind() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("control");
        let pending = PendingSocket::bind(&path, None).unwrap();
        assert_eq!(occupant(&path, &[own()]).unwrap(), Occupant::Nothing);
        let published = pending.publish(false, &[own()]).unwrap();
        assert_eq!(occupant(&path, &[own()]).unwrap(), Occupant::Process);
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        let own_path = own_name(&path, std::process::id());
        assert_eq!(occupant(&own_path, &[own()]).unwrap(), Occupant::Process);
        // A second one needs to replace the first on purpose.
        let second = PendingSocket::bind(&path, None).unwrap();
        assert!(matches!(second.publish(false, &[own()]), Err(PlaceError::Taken(_))));
        let second = PendingSocket::bind(&path, None).unwrap().publish(true, &[own()]).unwrap();
        assert!(second.name.is_ours() && !published.name.is_ours());
        drop(published);
        assert!(second.name.is_ours(), "the name of another process is not removed");
        drop(second);
        drop(PendingSocket::bind(&path, None).unwrap());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn what_is_not_a_socket_of_ours_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        fs::write(path("file"), "precious").unwrap();
        fs::create_dir(path("folder")).unwrap();
        symlink(path("file"), path("link")).unwrap();
        for (name, kind) in [("file", "a file"), ("folder", "a folder"), ("link", "a symbolic link")] {
            let error = occupant(&path(name), &[own()]).unwrap_err().to_string();
            assert!(error.contains(&format!("is {kind}, not a socket")), "{error}");
            let pending = PendingSocket::bind(&path(name), None).unwrap();
            assert!(pending.publish(true, &[own()]).is_err());
        }
        assert_eq!(fs::read_to_string(path("file")).unwrap(), "precious");
        drop(UnixListener::bind(path("socket")).unwrap());
        assert_eq!(occupant(&path("socket"), &[own()]).unwrap(), Occupant::Stale);
        let error = occupant(&path("socket"), &[own() + 1]).unwrap_err();
        assert!(error.is_permission() && error.to_string().contains("belongs to another user"), "{error}");
    }

    #[test]
    fn a_folder_that_all_may_write_to_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("control");
        for (mode, is_refused) in [(0o777, true), (0o1777, false), (0o775, false), (0o702, true)] {
            fs::set_permissions(folder.path(), fs::Permissions::from_mode(mode)).unwrap();
            assert_eq!(occupant(&path, &[own()]).is_err(), is_refused, "{mode:o}");
        }
    }

    #[test]
    fn names_of_dead_processes_are_removed() {
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
        remove_stale_names(&path("control"));
        assert!(!path("control.4194305.new").exists() && !path("control.4194305.sockets").exists());
        let others = ["control.4194305.txt", "other.4194305", "control.4194305", "control.4194306"];
        for kept in others.into_iter().chain(["control.1", "control.1.new"]) {
            assert!(path(kept).exists(), "{kept}");
        }
    }

    #[test]
    fn rights_of_owner_group_and_others() {
        let owner = (10, 20);
        assert!(permits(0o700, owner, 10, &[]) && permits(0o000, owner, 0, &[]));
        assert!(!permits(0o077, owner, 10, &[20]), "the owner's own bits count");
        assert!(permits(0o770, owner, 11, &[19, 20]) && !permits(0o750, owner, 11, &[20]));
        assert!(permits(0o703, owner, 11, &[]) && !permits(0o770, owner, 11, &[]));
    }
}
