//! The predecessor's side of a hand-over: one successor receives the listening sockets, and once it serves this process retires.
//!
//! Every step has a deadline, and ends when this process is asked to stop. Until the last step this process serves as before.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tokio::sync::oneshot;

use super::Context;
use super::link::{FromPredecessor, FromSuccessor, Link, TRANSFER_DEADLINE};
use super::succession::Lease;

/// From the sockets to [`FromSuccessor::Ready`]: a successor has built everything before it asks.
const READY_DEADLINE: Duration = Duration::from_secs(30);
/// Timeout of a change of administrative states in progress. Less than the successor's patience, [`TRANSFER_DEADLINE`].
const STATES_DEADLINE: Duration = Duration::from_secs(5);
/// From [`FromPredecessor::Go`] to [`FromSuccessor::Serving`].
pub(super) const SERVING_DEADLINE: Duration = Duration::from_secs(10);

/// A request to the main task: stop accepting and finish the sessions, because a successor serves.
#[derive(Debug)]
pub(crate) struct Retire {
    /// Process id of the successor.
    pub successor: u32,
    /// Addresses of sockets that the successor does not use.
    pub unused: Vec<SocketAddr>,
    /// To be notified as soon as the main task has begun.
    pub begun: oneshot::Sender<()>,
}

/// Carries the hand-over out on the connection that `upgrade` becomes.
pub(super) async fn serve(upgrade: OnUpgrade, lease: Lease, desk: Arc<Context>) {
    let successor = lease.pid();
    tracing::info!(successor, "a successor takes over");
    let stopping = desk.succession.stopping().clone();
    let (text, mut link) = match hand_over(upgrade, &lease, &desk).await {
        Ok(()) => return,
        Err(Failed { error, link }) => (error.to_string(), link),
    };
    if stopping.is_cancelled() {
        tracing::info!(successor, "the hand-over is cancelled: this process stops");
    } else {
        tracing::error!(successor, error = %text, "the successor did not take over; this process goes on");
    }
    if let Some(link) = &mut link {
        // A successor that only was too slow must not go on.
        let _ = link.write(&FromPredecessor::Refused { text: format!("the hand-over has ended: {text}") }).await;
    }
    drop(lease);
    desk.name_lost.notify_one();
}

/// A hand-over that came to nothing.
struct Failed {
    error: io::Error,
    /// The connection, unless it was lost on the way.
    link: Option<Link>,
}

impl From<io::Error> for Failed {
    fn from(error: io::Error) -> Self {
        Self { error, link: None }
    }
}

async fn hand_over(upgrade: OnUpgrade, lease: &Lease, desk: &Context) -> Result<(), Failed> {
    let upgraded = tokio::time::timeout(TRANSFER_DEADLINE, upgrade).await.map_err(io::Error::other)?;
    let parts = upgraded.map_err(io::Error::other)?.downcast::<TokioIo<UnixStream>>();
    let parts = parts.map_err(|_| io::Error::other("not a Unix socket"))?;
    if !parts.read_buf.is_empty() {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "the successor sent more than its request").into());
    }
    let mut link = Link::new(parts.io.into_inner());
    match next(&mut link, desk, TRANSFER_DEADLINE).await {
        Ok(FromSuccessor::Send) => {}
        Ok(other) => return Err(Failed { error: unexpected(&other), link: Some(link) }),
        Err(error) => return Err(Failed { error, link: Some(link) }),
    }
    // The successor gets copies of the listening sockets: a reload would change which they are.
    let Some(_no_reloads) = desk.running.block_reloads() else {
        let error = io::Error::other("a configuration is being loaded: try again when that is done");
        return Err(Failed { error, link: Some(link) });
    };
    let sockets = desk.running.sockets()?;
    let mut link = link.send_sockets(sockets, desk.trusted.clone()).await?;
    finish(&mut link, lease, desk).await.map_err(|error| Failed { error, link: Some(link) })
}

/// From the sockets on.
async fn finish(link: &mut Link, lease: &Lease, desk: &Context) -> io::Result<()> {
    let version = match next(link, desk, READY_DEADLINE).await? {
        FromSuccessor::Ready { version } => version,
        other => return Err(unexpected(&other)),
    };
    link.write(&FromPredecessor::Go { states: desk.running.states() }).await?;
    let unused = match next(link, desk, SERVING_DEADLINE).await? {
        FromSuccessor::Serving { unused } => unused,
        other => return Err(unexpected(&other)),
    };
    let retirement = desk.running.before_retirement(STATES_DEADLINE).await?;
    lease.complete(&version).map_err(io::Error::other)?;
    // Before the answer, from which on the successor decides: nothing that comes later may be decided here.
    let states = retirement.retire();
    let (begun, has_begun) = oneshot::channel();
    desk.retire.send(Retire { successor: lease.pid(), unused, begun }).await.map_err(io::Error::other)?;
    has_begun.await.map_err(io::Error::other)?;
    // This process retires, whether or not the successor hears of it.
    let _ = link.write(&FromPredecessor::Retiring { states }).await;
    Ok(())
}

async fn next(link: &mut Link, desk: &Context, deadline: Duration) -> io::Result<FromSuccessor> {
    let stopping = desk.succession.stopping();
    stopping
        .run_until_cancelled(link.read(deadline))
        .await
        .unwrap_or_else(|| Err(io::Error::other("this process is stopping")))
}

fn unexpected(message: &FromSuccessor) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the successor sent {message:?} out of order"))
}
