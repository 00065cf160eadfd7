//! The command `upgrade`: starts the installed binary as successor, and reports its progress and result.
//!
//! The successor runs `run --replace` with the same configuration file, and requests everything else over the control socket. It
//! reports a fatal error on a socket that is its standard input ([`REPORT_VARIABLE`]), because its log may go anywhere.

use std::ffi::OsString;
use std::io::{self, Write as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use hyper::body::Bytes;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;
use tokio::io::AsyncReadExt as _;
use tokio::process::Command;
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};

use super::super::context::ControlContext;
use super::super::message::{Progress, Response, encode};
use super::state::Phase;

/// Set to [`REPORT_ON_STDIN`] in the environment of a successor.
pub(crate) const REPORT_VARIABLE: &str = "VESTIBULE_STARTUP_REPORT";
/// Value of [`REPORT_VARIABLE`]: standard input is a socket on which the predecessor reads the error of a failed start.
pub(crate) const REPORT_ON_STDIN: &str = "stdin";

/// Maximum length of a report; longer ones are cut.
const MAX_REPORT: u64 = 16 * 1024;
/// Set in the environment of a launcher: see [`launch`].
const LAUNCHER_VARIABLE: &str = "VESTIBULE_LAUNCHER";
/// Timeout of the launcher, which only starts another process.
pub(in crate::api) const LAUNCH_DEADLINE: Duration = Duration::from_secs(10);
/// Time between SIGTERM and SIGKILL to a successor that took too long.
const TERMINATE_DEADLINE: Duration = Duration::from_secs(5);

/// Begins an upgrade, which continues if the operator disconnects. Returns a channel of progress messages, and the response
/// last.
pub(in crate::api) fn begin(context: Arc<ControlContext>, deadline: Duration) -> mpsc::Receiver<Bytes> {
    let (lines, received) = mpsc::channel(16);
    tokio::spawn(async move {
        let response = upgrade(&context, deadline, &lines).await;
        // The operator may have disconnected.
        let _ = lines.send(encode(&response)).await;
    });
    received
}

async fn upgrade(context: &ControlContext, deadline: Duration, lines: &mpsc::Sender<Bytes>) -> Response {
    let report_progress = async |progress: String| {
        let _ = lines.send(encode(&Progress { progress })).await;
    };
    let launch = match context.succession.launch() {
        Ok(launch) => launch,
        Err(refusal) => return Response::failure(refusal.to_string()),
    };
    let mut phases = context.succession.subscribe();
    let mut successor = match Successor::spawn(&context.file).await {
        Ok(successor) => successor,
        Err(error) => {
            tracing::error!(%error, "the successor could not be started");
            return Response::failure(format!("the successor could not be started: {error}"));
        }
    };
    launch.set_pid(successor.pid);
    let pid = successor.pid;
    report_progress(format!("successor started (pid {pid}): it reads {}", context.file.display())).await;
    let mut report = Vec::new();
    let expired = sleep(deadline);
    tokio::pin!(expired);
    loop {
        tokio::select! {
            // The phase first: after a successful handover the report ends too, because the successor closes it.
            biased;
            _ = phases.changed() => {
                let phase = phases.borrow_and_update().clone();
                match phase {
                    Phase::HandingOver { .. } => report_progress("it has the listening sockets".to_owned()).await,
                    Phase::Retired { version, .. } => return success(context, pid, &version),
                    Phase::Stopping => return Response::failure("this process is stopping"),
                    Phase::Idle | Phase::Launching | Phase::Launched { .. } => {}
                }
            }
            ended = successor.ended(&mut report) => {
                tracing::error!(pid, error = %ended, "the successor has ended; this process continues");
                return Response::failure(format!("the successor (pid {pid}) has ended, this process continues: {ended}"));
            }
            () = &mut expired => {
                let ended = successor.terminate(&mut report).await;
                let shown = humantime::format_duration(deadline);
                tracing::error!(pid, %ended, "the successor did not take over within {shown}; it was terminated, and this process continues");
                return Response::failure(format!("the successor (pid {pid}) did not take over within {shown} and was terminated"));
            }
        }
    }
}

fn success(context: &ControlContext, pid: u32, version: &str) -> Response {
    let own = std::process::id();
    let sessions = context.running.sessions().count(|_| true);
    let data = json!({"pid": pid, "version": version, "predecessor": own, "sessions": sessions});
    let text = format!(
        "pid {pid}, version {version}, serves; pid {own}, version {}, ends when its {sessions} sessions have ended",
        env!("CARGO_PKG_VERSION")
    );
    Response { data, ..Response::success(text) }
}

/// A successor that was started by a launcher: see [`launch`].
struct Successor {
    pid: u32,
    report: tokio::net::UnixStream,
}

impl Successor {
    async fn spawn(file: &Path) -> io::Result<Self> {
        let program = program()?;
        let (report, stdin) = UnixStream::pair()?;
        report.set_nonblocking(true)?;
        // Sockets from systemd are handed over like all others.
        let launcher = Command::new(&program)
            .args(["run", "--replace", "--config"])
            .arg(file)
            .env(LAUNCHER_VARIABLE, "1")
            .env(REPORT_VARIABLE, REPORT_ON_STDIN)
            .env_remove("LISTEN_FDS")
            .env_remove("LISTEN_PID")
            .env_remove("LISTEN_FDNAMES")
            .stdin(Stdio::from(OwnedFd::from(stdin)))
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", program.display())))?;
        let output = timeout(LAUNCH_DEADLINE, launcher.wait_with_output()).await.map_err(io::Error::other)??;
        let pid = std::str::from_utf8(&output.stdout).ok().and_then(|text| text.trim().parse().ok());
        let pid = pid.ok_or_else(|| io::Error::other(format!("{}: {}", program.display(), output.status)))?;
        tracing::info!(program = %program.display(), pid, "successor started");
        Ok(Self { pid, report: tokio::net::UnixStream::from_std(report)? })
    }

    /// Waits until the successor ends without serving, and returns the error that it reported. `report` keeps what was read if the
    /// future is dropped.
    async fn ended(&mut self, report: &mut Vec<u8>) -> String {
        let mut limited = (&mut self.report).take(MAX_REPORT);
        // After an error the part that was read is used.
        let _ = limited.read_to_end(report).await;
        match String::from_utf8_lossy(report).trim_end() {
            "" => "without an error message, possibly by a signal".to_owned(),
            report => report.to_owned(),
        }
    }

    /// Sends SIGTERM, and SIGKILL if the successor does not end.
    async fn terminate(&mut self, report: &mut Vec<u8>) -> String {
        let pid = i32::try_from(self.pid).ok().and_then(Pid::from_raw);
        for signal in [Signal::TERM, Signal::KILL] {
            if let Some(pid) = pid {
                let _ = kill_process(pid, signal);
            }
            if let Ok(ended) = timeout(TERMINATE_DEADLINE, self.ended(report)).await {
                return ended;
            }
        }
        "it still runs after SIGKILL".to_owned()
    }
}

/// Whether this process is the launcher of a successor.
pub(crate) fn is_launcher() -> bool {
    std::env::var_os(LAUNCHER_VARIABLE).is_some()
}

/// Starts this program with the same arguments, and prints the process id. The launcher then ends, so that the successor becomes a
/// child of systemd, as the main process of a service must be: when systemd stops a service, it kills other processes at once.
///
/// # Errors
/// The program cannot be started.
pub(crate) fn launch() -> io::Result<()> {
    let log = io::stderr().as_fd().try_clone_to_owned()?;
    let successor = std::process::Command::new(std::env::current_exe()?)
        .args(std::env::args_os().skip(1))
        .env_remove(LAUNCHER_VARIABLE)
        .stdout(Stdio::from(log))
        .spawn()?;
    writeln!(io::stdout(), "{}", successor.id())
}

/// Returns the path that this program was started from. When another file was installed there, the kernel marks the path of this
/// one as deleted.
fn program() -> io::Result<PathBuf> {
    let path = std::env::current_exe()?;
    let bytes = path.as_os_str().as_bytes();
    Ok(match bytes.strip_suffix(b" (deleted)") {
        Some(path) => OsString::from_vec(path.to_vec()).into(),
        None => path,
    })
}
