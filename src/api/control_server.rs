//! The server of the control socket: accepts connections, and restores the socket if its path is lost.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::net::UnixListener;
use tokio::sync::{Notify, Semaphore, mpsc};
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::task::TaskTracker;

use super::context::{ControlContext, RetireRequest};
use super::control_socket::{self, IfListening, PathState, PendingSocket, PublishedPath, PublishedSocket};
use super::request;
use super::succession::state::Succession;
use crate::server::Running;

/// Maximum number of open connections. Each hold of a user keeps one open; see [`super::succession::state::MAX_HOLDS`].
const MAX_CONNECTIONS: usize = 1024;
/// Maximum number of commands that run at the same time; others wait.
const MAX_COMMANDS: usize = 64;
/// Interval at which the path of the socket is checked, because any user who may write to its directory can remove it.
const PATH_CHECK_INTERVAL: Duration = Duration::from_secs(5);
/// Pause after a failed accept.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// The server of the control socket.
#[derive(Debug)]
pub(crate) struct ControlServer {
    socket: UnixListener,
    path: PublishedPath,
    connections: TaskTracker,
    /// Whether the loss of the path has been logged.
    is_loss_logged: bool,
}

impl ControlServer {
    /// Serves a published socket. Must be called on a runtime.
    ///
    /// # Errors
    /// The runtime cannot register the socket.
    pub(crate) fn new(published: PublishedSocket) -> io::Result<Self> {
        let PublishedSocket { socket, path } = published;
        let socket = UnixListener::from_std(socket)?;
        Ok(Self { socket, path, connections: TaskTracker::new(), is_loss_logged: false })
    }

    /// The tasks of open connections, so that the process can wait for them before it exits.
    pub(crate) fn connections(&self) -> TaskTracker {
        self.connections.clone()
    }

    /// Serves until it is dropped. `retire` receives a request when a successor serves.
    pub(crate) async fn run(
        mut self,
        running: Arc<Running>,
        file: PathBuf,
        succession: Succession,
        retire: mpsc::Sender<RetireRequest>,
    ) {
        let permits = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        let context = Arc::new(ControlContext {
            running,
            file,
            path: self.path.path().to_owned(),
            succession,
            retire,
            path_lost: Notify::new(),
            connections: self.connections.clone(),
            trusted: vec![0, rustix::process::geteuid().as_raw()],
            command_permits: Semaphore::new(MAX_COMMANDS),
        });
        let mut check = interval(PATH_CHECK_INTERVAL);
        check.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let accept = async {
                // The semaphore is never closed.
                let permit = permits.clone().acquire_owned().await.ok();
                (self.socket.accept().await, permit)
            };
            let (accepted, permit) = tokio::select! {
                accepted = accept => accepted,
                () = context.path_lost.notified() => {
                    self.restore_path(&context);
                    continue;
                }
                _ = check.tick() => {
                    self.restore_path(&context);
                    continue;
                }
            };
            match accepted {
                Ok((socket, _)) => {
                    let context = context.clone();
                    self.connections.spawn(async move {
                        request::serve(socket, context).await;
                        drop(permit);
                    });
                }
                Err(error) => {
                    tracing::error!(%error, "a connection to the control socket could not be accepted");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    /// Binds the socket again if its path was removed, or leads to a socket that no process listens on, for example because a
    /// successor failed after it had taken over the path.
    fn restore_path(&mut self, context: &ControlContext) {
        if !context.succession.owns_control_path() || self.path.is_ours() {
            self.is_loss_logged = false;
            return;
        }
        let path = self.path.path().to_owned();
        let restored = match control_socket::path_state(&path, &context.trusted) {
            Ok(PathState::Listening) => Err("another process listens there".to_owned()),
            Ok(PathState::Free | PathState::Stale) => {
                self.bind_again(&path, &context.trusted).map_err(|error| format!("{error:#}"))
            }
            Err(error) => Err(format!("{:#}", anyhow::Error::from(error))),
        };
        match restored {
            Ok(()) => tracing::info!(path = %path.display(), "the control socket was lost and has been restored"),
            Err(error) if !self.is_loss_logged => {
                tracing::error!(path = %path.display(), %error, "the control socket was lost; commands do not reach this process");
                self.is_loss_logged = true;
            }
            Err(_) => {}
        }
    }

    fn bind_again(&mut self, path: &Path, trusted: &[u32]) -> anyhow::Result<()> {
        let PublishedSocket { socket, path } = PendingSocket::bind(path, None)?.publish(IfListening::Fail, trusted)?;
        (self.socket, self.path) = (UnixListener::from_std(socket)?, path);
        Ok(())
    }
}
