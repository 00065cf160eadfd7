//! Sends commands to the predecessors: processes that this one has replaced and that still serve sessions.
//!
//! Every process listens on a socket of its own, `CONTROL.PID`, until it ends; the newest also on `CONTROL`. Predecessors are
//! found by the names of these sockets, so it does not matter which process handed over to which. Sockets on which no process
//! listens are removed. Sockets of users other than this process's own and root are ignored.

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

use super::client::{OpenResponse, send_over};
use super::control_socket;
use super::message::{Command, Scope};

/// Timeout of a command that a predecessor responds to at once.
pub(super) const SHORT_DEADLINE: Duration = Duration::from_secs(5);
/// Timeout of a hold. A predecessor waits up to 30 s for cancelled sessions to end.
pub(super) const HOLD_DEADLINE: Duration = Duration::from_secs(35);

/// Number of attempts when a predecessor closes the connection without a response, and the pause between two.
const ATTEMPTS: u32 = 20;
const PAUSE: Duration = Duration::from_millis(50);

/// What one predecessor responded, or the error of the attempt.
pub(super) struct PredecessorResponse {
    /// Process id of the predecessor.
    pub(super) pid: u32,
    pub(super) result: Result<OpenResponse, String>,
}

/// Sends `command` to all predecessors of this process concurrently. A predecessor that ends in the meantime is left out.
pub(super) async fn send_all(control: &Path, command: &Command, deadline: Duration) -> Vec<PredecessorResponse> {
    let requests = sockets(control).into_iter().map(|(pid, path)| async move {
        let result = match timeout(deadline, send_to(pid, &path, command)).await {
            Ok(Ok(response)) => Ok(response?),
            Ok(Err(error)) => Err(format!("{error:#}")),
            Err(_) => Err(format!("no response within {deadline:?}")),
        };
        Some(PredecessorResponse { pid, result })
    });
    join_all(requests).await.into_iter().flatten().collect()
}

/// Returns `None` if the process has ended or is ending.
async fn send_to(pid: u32, path: &Path, command: &Command) -> anyhow::Result<Option<OpenResponse>> {
    let mut attempt = 1;
    loop {
        let socket = match UnixStream::connect(path).await {
            Ok(socket) => socket,
            Err(error) if is_gone(pid, &error) => {
                // If this fails, the next command tries again.
                let _ = fs::remove_file(path);
                return Ok(None);
            }
            Err(error) => return Err(error.into()),
        };
        let owner = socket.peer_cred()?.uid();
        if owner != 0 && owner != geteuid().as_raw() {
            tracing::warn!(path = %path.display(), owner, "control socket of another user ignored");
            return Ok(None);
        }
        match send_over(socket, Scope::ThisProcess, command).await {
            Ok(response) => return Ok(Some(response)),
            // The process may be ending with its last session. Then it refuses one of the next connections.
            Err(_) if attempt < ATTEMPTS => tokio::time::sleep(PAUSE).await,
            Err(error) => return Err(error),
        }
        attempt += 1;
    }
}

fn is_gone(pid: u32, error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound)
        || !control_socket::is_running(pid)
}

/// Returns the process ids and the sockets of the other processes with the control path `control`.
fn sockets(control: &Path) -> Vec<(u32, PathBuf)> {
    let Some(name) = control.file_name() else { return Vec::new() };
    let directory = control_socket::directory(control);
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) => {
            tracing::warn!(directory = %directory.display(), %error, "the directory of the control socket cannot be read");
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

/// Parses the process id in the name of a process's own socket.
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
    fn socket_names_contain_the_process_id() {
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
    async fn stale_sockets_are_removed_and_hanging_processes_are_reported() {
        let folder = tempfile::tempdir().unwrap();
        let control = folder.path().join("control");
        let own_path = |pid: u32| control_socket::own_path(&control, pid);
        // The socket of a process that has ended, one of a process that never responds (process 1 always runs), and a file.
        drop(UnixListener::bind(own_path(4_194_305)).unwrap());
        let _hanging = UnixListener::bind(own_path(1)).unwrap();
        fs::write(folder.path().join("control.note"), "").unwrap();
        let responses = send_all(&control, &Command::Status, SHORT_DEADLINE).await;
        assert_eq!(responses.iter().map(|response| response.pid).collect::<Vec<_>>(), [1]);
        assert_eq!(responses[0].result.as_ref().err().unwrap(), "no response within 5s");
        assert!(!own_path(4_194_305).exists() && own_path(1).exists());
    }

    #[tokio::test]
    async fn predecessor_that_ends_during_the_request_is_left_out() {
        let folder = tempfile::tempdir().unwrap();
        let control = folder.path().join("control");
        let path = control_socket::own_path(&control, 1);
        let listener = UnixListener::bind(&path).unwrap();
        // The process accepts the connection and ends before it responds.
        let ending = std::thread::spawn(move || {
            let accepted = listener.accept().unwrap();
            drop(listener);
            drop(accepted);
        });
        assert!(send_all(&control, &Command::Status, SHORT_DEADLINE).await.is_empty());
        ending.join().unwrap();
        assert!(!path.exists());
    }
}
