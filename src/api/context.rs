//! What the handlers of control requests share.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use tokio::sync::{Notify, Semaphore, mpsc, oneshot};
use tokio_util::task::TaskTracker;

use super::operations::Operations;
use super::succession::state::Succession;
use crate::server::Running;

/// The state that the handlers of control requests share.
pub(crate) struct ControlContext {
    pub(super) running: Arc<Running>,
    /// The configuration file.
    pub(super) file: PathBuf,
    /// Path of the control socket, which a successor takes over.
    pub(super) path: PathBuf,
    pub(super) succession: Succession,
    /// Sends the request to retire to the main task.
    pub(super) retire: mpsc::Sender<RetireRequest>,
    /// Notified when a handover has failed whose successor may have taken over the path of the control socket.
    pub(super) path_lost: Notify,
    pub(super) connections: TaskTracker,
    /// Ids of the users whose processes may send commands and take over.
    pub(super) trusted: Vec<u32>,
    /// Permits for commands that run at the same time.
    pub(super) command_permits: Semaphore,
}

impl ControlContext {
    pub(super) fn operations(&self) -> Operations<'_> {
        Operations::new(&self.running)
    }
}

/// A request to the main task: stop accepting connections and finish the sessions, because a successor serves.
#[derive(Debug)]
pub(crate) struct RetireRequest {
    /// Process id of the successor.
    pub successor: u32,
    /// Addresses of sockets that the successor does not use.
    pub unused: Vec<SocketAddr>,
    /// Notified as soon as the main task has received the request.
    pub received: oneshot::Sender<()>,
}
