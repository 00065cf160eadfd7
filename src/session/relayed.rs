//! A session after its login: a task while bytes move, an entry of the waiting room while they do not.

use std::os::fd::{AsFd as _, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::time::{self, timeout};
use tokio_util::task::task_tracker::TaskTrackerToken;

use super::record::Record;
use super::{FAREWELL, Held, Room};
use crate::relay::{End, Leg, Limits, Opening, Outcome, Relay, Resting};
use crate::shutdown::Drain;
use crate::stream::keep_alive;
use crate::waiting::Waiting;

/// Silence after which a session gives its task and buffers up. Coming back costs some 20 µs, so that a client that talks every
/// few seconds should not have to.
const REST_AFTER: Duration = Duration::from_secs(2);

/// A session that moves bytes.
pub(super) struct Relayed {
    relay: Relay<TcpStream>,
    kept: Box<Kept>,
}

/// A session that waits for a byte.
pub struct Quiet {
    resting: Resting,
    kept: Box<Kept>,
}

/// What a session keeps for all of its life after the login.
pub(super) struct Kept {
    pub(super) room: Arc<Room>,
    pub(super) drain: Drain,
    pub(super) record: Record,
    /// On both sockets.
    pub(super) keepalive_set: bool,
    /// The drain waits until it drops.
    pub(super) _counted: TaskTrackerToken,
    pub(super) _held: Held,
}

impl Kept {
    fn limits(&self) -> Limits {
        let limits = &self.record.live().limits;
        Limits { idle: limits.idle, half_close: limits.half_close, stall: limits.stall }
    }
}

impl Relayed {
    /// Steps 6 and 7: the OK and what followed it go first, then bytes both ways.
    pub(super) fn new(
        client: Leg<TcpStream>,
        server: Leg<TcpStream>,
        to_client: Vec<u8>,
        to_server: Vec<u8>,
        kept: Kept,
    ) -> Self {
        let (client_bytes, server_bytes) = kept.record.byte_counters();
        let opening = Opening { to_client, to_server, client_bytes, server_bytes };
        Self { relay: Relay::new(client, server, opening, kept.limits()), kept: Box::new(kept) }
    }

    /// Runs until the session ends or falls silent.
    pub(super) async fn run(self) {
        self.run_until(Some(REST_AFTER)).await;
    }

    async fn run_until(self, rest_after: Option<Duration>) {
        let Self { mut relay, mut kept } = self;
        let over = kept.drain.over().clone();
        let outcome = tokio::select! {
            outcome = relay.run(rest_after) => outcome,
            () = over.cancelled() => Outcome::Ended(End::Drained),
        };
        match outcome {
            Outcome::Quiet => put_aside(relay, kept),
            Outcome::Ended(end) => {
                let (to_client, to_server) = relay.moved();
                kept.record.relayed(end, to_client, to_server);
                // Whatever the result, the sockets close when the relay drops here.
                let _ = timeout(FAREWELL, relay.close()).await;
            }
        }
    }
}

fn put_aside(relay: Relay<TcpStream>, mut kept: Box<Kept>) {
    let room = kept.room.clone();
    match relay.rest() {
        Ok(resting) => {
            // Only who is silent can be gone unnoticed; most sessions end before they are, and save the calls.
            if let Some(time) = kept.record.live().limits.keepalive.filter(|_| !kept.keepalive_set) {
                kept.keepalive_set = true;
                keep_alive(&resting.client.socket, time);
                keep_alive(&resting.server.socket, time);
            }
            // One that does not get in stays as it is.
            if let Err(quiet) = room.enter(Box::new(Quiet { resting, kept })) {
                quiet.resume(None);
            }
        }
        Err(error) => kept.record.lost(&error),
    }
}

impl Quiet {
    fn resume(self, rest_after: Option<Duration>) {
        let Self { resting, mut kept } = self;
        let (client_bytes, server_bytes) = kept.record.byte_counters();
        match resting.wake(kept.limits(), client_bytes, server_bytes) {
            Ok(relay) => drop(tokio::spawn(Relayed { relay, kept }.run_until(rest_after))),
            Err(error) => kept.record.lost(&error),
        }
    }
}

impl Waiting for Quiet {
    fn sockets(&self) -> [BorrowedFd<'_>; 2] {
        [self.resting.client.socket.as_fd(), self.resting.server.socket.as_fd()]
    }

    fn until(&self) -> Option<time::Instant> {
        self.resting.idle_until(&self.kept.limits())
    }

    fn leave(self) {
        self.resume(Some(REST_AFTER));
    }
}
