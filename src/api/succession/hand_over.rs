//! The predecessor's side of a handover: sends the listening sockets to a successor, and retires when the successor serves.
//!
//! Every step has a timeout, and is cancelled when this process stops. Before the retirement this process serves as before.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tokio::sync::oneshot;

use super::super::context::{ControlContext, RetireRequest};
use super::connection::{FromPredecessor, FromSuccessor, HandoverConnection, SERVING_TIMEOUT, TRANSFER_TIMEOUT};
use super::state::HandoverGrant;

/// Timeout from the transfer of the sockets to [`FromSuccessor::Ready`]. The successor has built everything before.
const READY_TIMEOUT: Duration = Duration::from_secs(30);
/// Timeout of a change of administrative states in progress. Shorter than the successor's timeout, [`TRANSFER_TIMEOUT`].
const STATES_TIMEOUT: Duration = Duration::from_secs(5);

/// Hands over on the connection that `upgrade` becomes.
pub(in crate::api) async fn serve(upgrade: OnUpgrade, grant: HandoverGrant, context: Arc<ControlContext>) {
    let successor = grant.pid();
    tracing::info!(successor, "handover to a successor begins");
    let stopping = context.succession.stopping().clone();
    let (text, mut connection) = match hand_over(upgrade, &grant, &context).await {
        Ok(()) => return,
        Err(Failed { error, connection }) => (error.to_string(), connection),
    };
    if stopping.is_cancelled() {
        tracing::info!(successor, "handover cancelled: this process is stopping");
    } else {
        tracing::error!(successor, error = %text, "the successor did not take over; this process continues");
    }
    if let Some(connection) = &mut connection {
        // A successor that was only too slow must not start.
        let _ =
            connection.write(&FromPredecessor::Refused { reason: format!("the handover has failed: {text}") }).await;
    }
    drop(grant);
    context.path_lost.notify_one();
}

/// A handover that has failed.
struct Failed {
    error: io::Error,
    /// The connection, unless it is lost.
    connection: Option<HandoverConnection>,
}

impl From<io::Error> for Failed {
    fn from(error: io::Error) -> Self {
        Self { error, connection: None }
    }
}

async fn hand_over(upgrade: OnUpgrade, grant: &HandoverGrant, context: &ControlContext) -> Result<(), Failed> {
    let upgraded = tokio::time::timeout(TRANSFER_TIMEOUT, upgrade).await.map_err(io::Error::other)?;
    let parts = upgraded.map_err(io::Error::other)?.downcast::<TokioIo<UnixStream>>();
    let parts = parts.map_err(|_| io::Error::other("not a Unix socket"))?;
    if !parts.read_buf.is_empty() {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "the successor sent data after its request").into());
    }
    let mut connection = HandoverConnection::new(parts.io.into_inner());
    match next(&mut connection, context, TRANSFER_TIMEOUT).await {
        Ok(FromSuccessor::RequestSockets) => {}
        Ok(other) => return Err(Failed { error: unexpected(&other), connection: Some(connection) }),
        Err(error) => return Err(Failed { error, connection: Some(connection) }),
    }
    // The successor gets copies of the listening sockets, and a reload would change the set of sockets.
    let Some(_no_reloads) = context.running.block_reloads() else {
        let error = io::Error::other("a configuration is being loaded: try again when it is loaded");
        return Err(Failed { error, connection: Some(connection) });
    };
    let sockets = context.running.sockets()?;
    let mut connection = connection.send_sockets(sockets, context.trusted.clone()).await?;
    finish(&mut connection, grant, context).await.map_err(|error| Failed { error, connection: Some(connection) })
}

/// The steps after the transfer of the sockets.
async fn finish(
    connection: &mut HandoverConnection,
    grant: &HandoverGrant,
    context: &ControlContext,
) -> io::Result<()> {
    let version = match next(connection, context, READY_TIMEOUT).await? {
        FromSuccessor::Ready { version } => version,
        other => return Err(unexpected(&other)),
    };
    connection.write(&FromPredecessor::Go { states: context.running.states() }).await?;
    let unused = match next(connection, context, SERVING_TIMEOUT).await? {
        FromSuccessor::Serving { unused } => unused,
        other => return Err(unexpected(&other)),
    };
    let retirement = context.running.before_retirement(STATES_TIMEOUT).await?;
    grant.complete(&version).map_err(io::Error::other)?;
    // Before `Retiring` is sent: from then on the successor decides, and a later change must be refused here.
    let states = retirement.retire();
    let (received, is_received) = oneshot::channel();
    context.retire.send(RetireRequest { successor: grant.pid(), unused, received }).await.map_err(io::Error::other)?;
    is_received.await.map_err(io::Error::other)?;
    // This process retires even if the message does not reach the successor.
    let _ = connection.write(&FromPredecessor::Retiring { states }).await;
    Ok(())
}

async fn next(
    connection: &mut HandoverConnection,
    context: &ControlContext,
    timeout: Duration,
) -> io::Result<FromSuccessor> {
    let stopping = context.succession.stopping();
    stopping
        .run_until_cancelled(connection.read(timeout))
        .await
        .unwrap_or_else(|| Err(io::Error::other("this process is stopping")))
}

fn unexpected(message: &FromSuccessor) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the successor sent {message:?} out of order"))
}
