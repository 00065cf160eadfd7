//! Processes that this one has replaced and that still serve sessions.
//!
//! Every process answers commands at a socket of its own, `CONTROL.PID`, until it ends; the newest also at `CONTROL`. So the
//! predecessors are found by their sockets' names, whoever handed over to whom, and are asked one by one what operators ask of all.
//! A name behind which no process listens any more is removed. Only sockets of the same user, or root's, count.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use futures_util::future::join_all;
use rustix::process::geteuid;
use tokio::net::UnixStream;
use tokio::time::timeout;

use super::client::{Reply, Scope, ask_over};
use super::{Command, place};

/// Timeout of a command that a predecessor answers at once.
pub(super) const AT_ONCE: Duration = Duration::from_secs(5);
/// Timeout of a hold: sessions that are ended have 30 s to be gone.
pub(super) const HOLD: Duration = Duration::from_secs(35);

/// Number of tries when a predecessor closes the connection without an answer, and the pause between two.
const TRIES: u32 = 20;
const PAUSE: Duration = Duration::from_millis(50);

/// The reply of one predecessor.
pub(super) struct Answered {
    /// Its process id.
    pub(super) pid: u32,
    /// What it replied, or why there is no reply.
    pub(super) reply: Result<Reply, String>,
}

/// Sends `command` to all predecessors of this process at once. One that ends in the meantime is not among the replies.
pub(super) async fn ask_all(control: &Path, command: &Command, within: Duration) -> Vec<Answered> {
    let asking = sockets(control).into_iter().map(|(pid, path)| async move {
        let reply = match timeout(within, ask_one(pid, &path, command)).await {
            Ok(Ok(reply)) => Ok(reply?),
            Ok(Err(error)) => Err(format!("{error:#}")),
            Err(_) => Err(format!("no answer within {within:?}")),
        };
        Some(Answered { pid, reply })
    });
    join_all(asking).await.into_iter().flatten().collect()
}

/// `Ok(None)`: the process has ended, or ends just now.
async fn ask_one(pid: u32, path: &Path, command: &Command) -> anyhow::Result<Option<Reply>> {
    let mut tries = 1;
    loop {
        let socket = match UnixStream::connect(path).await {
            Ok(socket) => socket,
            Err(error) if is_gone(pid, &error) => {
                // Whatever the result: the name is tried again with the next command.
                let _ = fs::remove_file(path);
                return Ok(None);
            }
            Err(error) => return Err(error.into()),
        };
        let owner = socket.peer_cred()?.uid();
        if owner != 0 && owner != geteuid().as_raw() {
            tracing::warn!(path = %path.display(), owner, "a control socket belongs to another user and is ignored");
            return Ok(None);
        }
        match ask_over(socket, Scope::Process, command).await {
            Ok(reply) => return Ok(Some(reply)),
            // It may be ending with its last session. If so, it soon takes no connections.
            Err(_) if tries < TRIES => tokio::time::sleep(PAUSE).await,
            Err(error) => return Err(error),
        }
        tries += 1;
    }
}

fn is_gone(pid: u32, error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound) || !place::is_running(pid)
}

/// Sockets of other processes beside `control`, with their process ids.
fn sockets(control: &Path) -> Vec<(u32, PathBuf)> {
    let Some(name) = control.file_name() else { return Vec::new() };
    let folder = place::folder(control);
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) => {
            tracing::warn!(folder = %folder.display(), %error, "predecessors cannot be looked for");
            return Vec::new();
        }
    };
    let mut found: Vec<(u32, PathBuf)> = entries
        .flatten()
        .filter_map(|entry| Some((pid_in(name, &entry.file_name())?, entry.path())))
        .filter(|(pid, _)| *pid != std::process::id())
        .collect();
    found.sort_unstable();
    found
}

/// The process id in the name of a process's own socket.
fn pid_in(control: &OsStr, name: &OsStr) -> Option<u32> {
    let digits = name.as_bytes().strip_prefix(control.as_bytes())?.strip_prefix(b".")?;
    let is_number = digits.iter().all(u8::is_ascii_digit) && digits.first().is_some_and(|first| *first != b'0');
    std::str::from_utf8(digits).ok().filter(|_| is_number)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn names_of_sockets_have_a_process_id() {
        let pid = |name: &str| pid_in(OsStr::new("control"), OsStr::new(name));
        assert_eq!((pid("control.7"), pid("control.4194304")), (Some(7), Some(4_194_304)));
        for other in
            ["control", "control.", "control.0", "control.07", "control.+7", "control.7.sockets", "x.7", "control7"]
        {
            assert_eq!(pid(other), None, "{other}");
        }
        assert_eq!(pid("control.99999999999"), None);
    }

    #[tokio::test(start_paused = true)]
    async fn dead_names_are_removed_and_silent_processes_are_reported() {
        let folder = tempfile::tempdir().unwrap();
        let control = folder.path().join("control");
        let of = |pid: u32| place::own_name(&control, pid);
        // A socket whose process has ended, one that never answers (process 1 always runs), and a file of another kind.
        drop(UnixListener::bind(of(4_194_305)).unwrap());
        let _silent = UnixListener::bind(of(1)).unwrap();
        fs::write(folder.path().join("control.note"), "").unwrap();
        let answered = ask_all(&control, &Command::Status, AT_ONCE).await;
        assert_eq!(answered.iter().map(|answered| answered.pid).collect::<Vec<_>>(), [1]);
        assert_eq!(answered[0].reply.as_ref().err().unwrap(), "no answer within 5s");
        assert!(!of(4_194_305).exists() && of(1).exists());
    }

    #[tokio::test]
    async fn one_that_ends_while_it_is_asked_is_gone() {
        let folder = tempfile::tempdir().unwrap();
        let control = folder.path().join("control");
        let path = place::own_name(&control, 1);
        let listener = UnixListener::bind(&path).unwrap();
        // It takes the connection, and ends before it answers.
        let ending = std::thread::spawn(move || {
            let taken = listener.accept().unwrap();
            drop(listener);
            drop(taken);
        });
        assert!(ask_all(&control, &Command::Status, AT_ONCE).await.is_empty());
        ending.join().unwrap();
        assert!(!path.exists());
    }
}
