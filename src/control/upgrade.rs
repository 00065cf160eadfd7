//! `vestibule upgrade`: starts the installed program as successor, and reports what becomes of it.
//!
//! The successor is `run --replace` with the same configuration file. It asks for the rest by the control socket; its first
//! error comes back on a socket that is its standard input ([`REPORT_VARIABLE`]), because its log may lead anywhere.

use std::ffi::OsString;
use std::io;
use std::os::fd::OwnedFd;
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
use tokio::process::{Child, Command};
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};

use super::succession::Stage;
use super::{Answer, Desk, Progress, encoded};

/// Set to [`REPORT_ON_STDIN`] in the environment of a successor.
pub const REPORT_VARIABLE: &str = "VESTIBULE_STARTUP_REPORT";
/// Standard input is a socket on which the process that started this one reads why it has failed.
pub const REPORT_ON_STDIN: &str = "stdin";

/// Longer reports are cut.
const MAX_REPORT: u64 = 16 * 1024;
/// A successor that has ended has closed its report too, unless a process of its own holds it.
const REPORT_DEADLINE: Duration = Duration::from_secs(2);
/// Between SIGTERM and SIGKILL to a successor that took too long.
const TERMINATE_DEADLINE: Duration = Duration::from_secs(5);

/// Begins an upgrade, which goes on if the operator goes away. Lines for the operator come on the channel, the answer last.
pub(super) fn begin(desk: Arc<Desk>, deadline: Duration) -> mpsc::Receiver<Bytes> {
    let (lines, received) = mpsc::channel(16);
    tokio::spawn(async move {
        let answer = upgrade(&desk, deadline, &lines).await;
        // The operator may be gone.
        let _ = lines.send(encoded(&answer)).await;
    });
    received
}

async fn upgrade(desk: &Desk, deadline: Duration, lines: &mpsc::Sender<Bytes>) -> Answer {
    let report_progress = async |progress: String| {
        let _ = lines.send(encoded(&Progress { progress })).await;
    };
    let start = match desk.succession.start() {
        Ok(start) => start,
        Err(refusal) => return Answer::failed(refusal.to_string()),
    };
    let mut stages = desk.succession.watch();
    let mut successor = match Successor::spawn(&desk.file) {
        Ok(successor) => successor,
        Err(error) => {
            tracing::error!(%error, "the successor could not be started");
            return Answer::failed(format!("the successor could not be started: {error}"));
        }
    };
    start.started(successor.pid);
    let pid = successor.pid;
    report_progress(format!("successor started (pid {pid}): it reads {}", desk.file.display())).await;
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
                    Stage::Retired { version, .. } => return succeeded(desk, successor, &version),
                    Stage::Stopping => return Answer::failed("this process is stopping"),
                    Stage::Idle | Stage::Starting { .. } => {}
                }
            }
            ended = successor.ended() => {
                tracing::error!(pid, error = %ended, "the successor has ended; this process goes on");
                return Answer::failed(format!("the successor (pid {pid}) has ended, this process goes on: {ended}"));
            }
            () = &mut too_late => {
                let ended = successor.terminate().await;
                let shown = humantime::format_duration(deadline);
                tracing::error!(pid, %ended, "the successor did not take over within {shown}; it was ended, and this process goes on");
                return Answer::failed(format!("the successor (pid {pid}) did not take over within {shown}: ended"));
            }
        }
    }
}

fn succeeded(desk: &Desk, mut successor: Successor, version: &str) -> Answer {
    let (pid, own) = (successor.pid, std::process::id());
    tokio::spawn(async move {
        let ended = successor.ended().await;
        tracing::error!(pid, error = %ended, "the successor has ended");
    });
    let sessions = desk.running.sessions().count(|_| true);
    let data = json!({"pid": pid, "version": version, "predecessor": own, "sessions": sessions});
    let text = format!(
        "pid {pid}, version {version}, serves; pid {own}, version {}, ends when its {sessions} sessions have ended",
        env!("CARGO_PKG_VERSION")
    );
    Answer { data, ..Answer::done(text) }
}

/// The process started by this one.
struct Successor {
    child: Child,
    pid: u32,
    report: tokio::net::UnixStream,
}

impl Successor {
    fn spawn(file: &Path) -> io::Result<Self> {
        let program = program()?;
        let (report, stdin) = UnixStream::pair()?;
        report.set_nonblocking(true)?;
        // Sockets that systemd gave are handed over like all others.
        let child = Command::new(&program)
            .args(["run", "--replace", "--config"])
            .arg(file)
            .env(REPORT_VARIABLE, REPORT_ON_STDIN)
            .env_remove("LISTEN_FDS")
            .env_remove("LISTEN_PID")
            .env_remove("LISTEN_FDNAMES")
            .stdin(Stdio::from(OwnedFd::from(stdin)))
            .spawn()
            .map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", program.display())))?;
        let pid = child.id().unwrap_or_default();
        tracing::info!(program = %program.display(), pid, "successor started");
        Ok(Self { child, pid, report: tokio::net::UnixStream::from_std(report)? })
    }

    /// Waits for its end; the error it reported, or its exit status.
    async fn ended(&mut self) -> String {
        let status = self.child.wait().await.map_or_else(|error| error.to_string(), |status| status.to_string());
        let mut report = Vec::new();
        let mut limited = (&mut self.report).take(MAX_REPORT);
        // What has come until a failure counts.
        let _ = timeout(REPORT_DEADLINE, limited.read_to_end(&mut report)).await;
        let report = String::from_utf8_lossy(&report);
        if report.trim().is_empty() { status } else { format!("{} ({status})", report.trim_end()) }
    }

    /// SIGTERM, and SIGKILL if that does not help.
    async fn terminate(&mut self) -> String {
        if let Some(pid) = i32::try_from(self.pid).ok().and_then(Pid::from_raw) {
            let _ = kill_process(pid, Signal::TERM);
        }
        if let Ok(ended) = timeout(TERMINATE_DEADLINE, self.ended()).await {
            return ended;
        }
        let _ = self.child.start_kill();
        self.ended().await
    }
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
