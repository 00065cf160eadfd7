//! `vestibule upgrade`: starts the installed program as successor, and reports what becomes of it.
//!
//! The successor is `run --replace` with the same configuration file. It asks for the rest by the control socket; its first
//! error comes back on a socket that is its standard input ([`REPORT_VARIABLE`]), because its log may lead anywhere.

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

use super::succession::Stage;
use super::{Answer, Context, Progress, encoded};

/// Set to [`REPORT_ON_STDIN`] in the environment of a successor.
pub(crate) const REPORT_VARIABLE: &str = "VESTIBULE_STARTUP_REPORT";
/// Standard input is a socket on which the process that started this one reads why it has failed.
pub(crate) const REPORT_ON_STDIN: &str = "stdin";

/// Longer reports are cut.
const MAX_REPORT: u64 = 16 * 1024;
/// Set in the environment of a launcher.
const LAUNCHER_VARIABLE: &str = "VESTIBULE_LAUNCHER";
/// Timeout of the launcher, which does nothing but start another process.
pub(super) const LAUNCH_DEADLINE: Duration = Duration::from_secs(10);
/// Between SIGTERM and SIGKILL to a successor that took too long.
const TERMINATE_DEADLINE: Duration = Duration::from_secs(5);

/// Begins an upgrade, which goes on if the operator goes away. Lines for the operator come on the channel, the answer last.
pub(super) fn begin(desk: Arc<Context>, deadline: Duration) -> mpsc::Receiver<Bytes> {
    let (lines, received) = mpsc::channel(16);
    tokio::spawn(async move {
        let answer = upgrade(&desk, deadline, &lines).await;
        // The operator may be gone.
        let _ = lines.send(encoded(&answer)).await;
    });
    received
}

async fn upgrade(desk: &Context, deadline: Duration, lines: &mpsc::Sender<Bytes>) -> Answer {
    let report_progress = async |progress: String| {
        let _ = lines.send(encoded(&Progress { progress })).await;
    };
    let start = match desk.succession.start() {
        Ok(start) => start,
        Err(refusal) => return Answer::failed(refusal.to_string()),
    };
    let mut stages = desk.succession.watch();
    let mut successor = match Successor::spawn(&desk.file).await {
        Ok(successor) => successor,
        Err(error) => {
            tracing::error!(%error, "the successor could not be started");
            return Answer::failed(format!("the successor could not be started: {error}"));
        }
    };
    start.started(successor.pid);
    let pid = successor.pid;
    report_progress(format!("successor started (pid {pid}): it reads {}", desk.file.display())).await;
    let mut report = Vec::new();
    let too_late = sleep(deadline);
    tokio::pin!(too_late);
    loop {
        tokio::select! {
            // A successor that serves has not ended: the stage is looked at first.
            biased;
            _ = stages.changed() => {
                let stage = stages.borrow_and_update().clone();
                match stage {
                    Stage::HandingOver { .. } => report_progress("it has the listening sockets".to_owned()).await,
                    Stage::Retired { version, .. } => return succeeded(desk, pid, &version),
                    Stage::Stopping => return Answer::failed("this process is stopping"),
                    Stage::Idle | Stage::Starting { .. } => {}
                }
            }
            ended = successor.ended(&mut report) => {
                tracing::error!(pid, error = %ended, "the successor has ended; this process goes on");
                return Answer::failed(format!("the successor (pid {pid}) has ended, this process goes on: {ended}"));
            }
            () = &mut too_late => {
                let ended = successor.terminate(&mut report).await;
                let shown = humantime::format_duration(deadline);
                tracing::error!(pid, %ended, "the successor did not take over within {shown}; it was ended, and this process goes on");
                return Answer::failed(format!("the successor (pid {pid}) did not take over within {shown}: ended"));
            }
        }
    }
}

fn succeeded(desk: &Context, pid: u32, version: &str) -> Answer {
    let own = std::process::id();
    let sessions = desk.running.sessions().count(|_| true);
    let data = json!({"pid": pid, "version": version, "predecessor": own, "sessions": sessions});
    let text = format!(
        "pid {pid}, version {version}, serves; pid {own}, version {}, ends when its {sessions} sessions have ended",
        env!("CARGO_PKG_VERSION")
    );
    Answer { data, ..Answer::done(text) }
}

/// A process started for this one by a launcher, which ends at once: see [`launch`].
struct Successor {
    pid: u32,
    report: tokio::net::UnixStream,
}

impl Successor {
    async fn spawn(file: &Path) -> io::Result<Self> {
        let program = program()?;
        let (report, stdin) = UnixStream::pair()?;
        report.set_nonblocking(true)?;
        // Sockets that systemd gave are handed over like all others.
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

    /// Waits for its end, before it serves; the error it reported. Not to be used again after it was dropped unfinished, except to
    /// wait.
    async fn ended(&mut self, report: &mut Vec<u8>) -> String {
        let mut limited = (&mut self.report).take(MAX_REPORT);
        // What has come until a failure counts.
        let _ = limited.read_to_end(report).await;
        match String::from_utf8_lossy(report).trim_end() {
            "" => "without an error: by a signal, perhaps".to_owned(),
            report => report.to_owned(),
        }
    }

    /// SIGTERM, and SIGKILL if that does not help.
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
        "although it was killed, it is there".to_owned()
    }
}

/// Whether this process is the launcher of a successor.
pub(crate) fn is_launcher() -> bool {
    std::env::var_os(LAUNCHER_VARIABLE).is_some()
}

/// Starts this program with the same arguments, and prints its process id. The launcher then ends, and the successor becomes a
/// child of systemd, as a service's main process must be: systemd does not wait for others when it stops a service, but kills
/// them at once.
///
/// # Errors
/// The system's reason.
pub(crate) fn launch() -> io::Result<()> {
    let log = io::stderr().as_fd().try_clone_to_owned()?;
    let successor = std::process::Command::new(std::env::current_exe()?)
        .args(std::env::args_os().skip(1))
        .env_remove(LAUNCHER_VARIABLE)
        .stdout(Stdio::from(log))
        .spawn()?;
    writeln!(io::stdout(), "{}", successor.id())
}

/// The path this program was started from. After an upgrade another file lies there, and the kernel says of this one that it is
/// deleted.
fn program() -> io::Result<PathBuf> {
    let path = std::env::current_exe()?;
    let bytes = path.as_os_str().as_bytes();
    Ok(match bytes.strip_suffix(b" (deleted)") {
        Some(before) => OsString::from_vec(before.to_vec()).into(),
        None => path,
    })
}
