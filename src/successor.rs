//! Starts the program as it lies on the disk now, to take this process's place. Called by `main`.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::{Path, PathBuf};
use std::process::Stdio;

use tokio::process::Command;

/// `run --replace` with the same configuration; the child asks for the rest. If it ends before it has taken over, that is told
/// and nothing else has happened.
pub(crate) fn start(file: &Path) {
    let program = match program() {
        Ok(program) => program,
        Err(error) => return tracing::error!(%error, "this program's own file is not known"),
    };
    // Sockets that systemd gave are handed over like all others.
    let child = Command::new(&program)
        .args(["run", "--replace", "--config"])
        .arg(file)
        .env_remove("LISTEN_FDS")
        .env_remove("LISTEN_PID")
        .stdin(Stdio::null())
        .spawn();
    match child {
        Ok(mut child) => {
            tracing::info!(program = %program.display(), pid = child.id(), "successor started");
            tokio::spawn(async move {
                let status = child.wait().await.map_or_else(|error| error.to_string(), |status| status.to_string());
                tracing::error!(%status, "the successor has ended; this process goes on");
            });
        }
        Err(error) => tracing::error!(program = %program.display(), %error, "the successor could not be started"),
    }
}

/// Where this program was started from; after an upgrade another file lies there, and the kernel says of ours that it is
/// deleted.
fn program() -> std::io::Result<PathBuf> {
    let path = std::env::current_exe()?;
    let bytes = path.as_os_str().as_bytes();
    Ok(match bytes.strip_suffix(b" (deleted)") {
        Some(before) => OsString::from_vec(before.to_vec()).into(),
        None => path,
    })
}
