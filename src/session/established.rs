//! A session after its login: a task while bytes move, an entry of the waiting poller while they do not.

use std::future::poll_fn;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::sync::Arc;
use std::task::Context;
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::time::{self, timeout};
use tokio_util::task::task_tracker::TaskTrackerToken;

use super::attempt::Seated;
use super::log_record::Record;
use super::{ConnectionPermits, FAREWELL, Session, SessionPoller};
use crate::backend::DelayedDisconnect;
use crate::backend::login::Established;
use crate::failure::Reason;
use crate::protocol::imap::reply;
use crate::protocol::imap::tag::Tag;
use crate::relay::idle_poller::Parked;
use crate::relay::{Buffered, Leg, Limits, ParkedRelay, Relay, RelayEnd, RelayEvent};
use crate::session_registry::{CancelReason, CancelSignal, SessionHandle};
use crate::stream::{Stream, keep_alive};

/// Silence after which a session gives its task and buffers up. Coming back costs some 20 µs, so that a client that talks every
/// few seconds should not have to.
const REST_AFTER: Duration = Duration::from_secs(2);

/// A session that moves bytes.
pub(super) struct Relayed {
    relay: Relay<TcpStream>,
    kept: Box<EstablishedState>,
}

/// How a relayed session came to its end.
pub(super) enum SessionEnd {
    /// By itself.
    Ended(RelayEnd),
    /// It was told to.
    Told(CancelReason),
}

/// A session that waits for a byte.
pub(crate) struct ParkedSession {
    relay: ParkedRelay,
    kept: Box<EstablishedState>,
}

/// What a session keeps for all of its life after the login.
pub(super) struct EstablishedState {
    pub(super) poller: Arc<SessionPoller>,
    pub(super) record: Record,
    /// On both sockets.
    pub(super) keepalive_set: bool,
    /// The drain waits until it drops.
    pub(super) _counted: TaskTrackerToken,
    pub(super) permits: ConnectionPermits,
    /// The entry in the session registry; also where the session sees that it is cancelled. The last field, because fields
    /// drop in order: a login that waits for this session finds its limits and places free.
    pub(super) seat: SessionHandle,
}

impl EstablishedState {
    fn limits(&self) -> Limits {
        let limits = &self.record.settings().limits;
        Limits { idle: limits.idle, half_close: limits.half_close, stall: limits.stall }
    }
}

impl EstablishedState {
    /// The server has closed, and the client shall not come back at the same moment as all others of this server: waits for
    /// its turn, or until something happens to it.
    async fn keep_client(&mut self, relay: &Relay<TcpStream>, call: &CancelSignal) {
        let Some(DelayedDisconnect { delay: wait, gauge: _gauge, .. }) = self.record.cut_off() else { return };
        // The user may come back at once, while this connection waits for its turn.
        self.permits.count.release();
        self.seat.server_closed();
        tokio::select! {
            () = time::sleep(wait) => {}
            () = relay.client_readable() => {}
            _ = poll_fn(|context| call.poll(context)) => {}
        }
    }
}

impl Relayed {
    /// Steps 6 and 7: the OK and what followed it go first, then bytes both ways.
    pub(super) fn new(
        client: Leg<TcpStream>,
        server: Leg<TcpStream>,
        to_client: Vec<u8>,
        to_server: Vec<u8>,
        kept: EstablishedState,
    ) -> Self {
        let buffered = Buffered { to_client, to_server };
        let relay = Relay::new(client, server, buffered, kept.record.byte_counters(), kept.limits());
        Self { relay, kept: Box::new(kept) }
    }

    /// Runs until the session ends or falls silent.
    pub(super) async fn run(self) {
        self.run_until(Some(REST_AFTER)).await;
    }

    async fn run_until(self, rest_after: Option<Duration>) {
        let Self { mut relay, mut kept } = self;
        let call = kept.seat.cancel_signal().clone();
        let over = loop {
            tokio::select! {
                // In this order a session that is cancelled from its begin still sends the answer to the login.
                biased;
                outcome = relay.run(rest_after) => match outcome {
                    RelayEvent::Silent => return put_aside(relay, kept),
                    RelayEvent::ServerClosed => kept.keep_client(&relay, &call).await,
                    RelayEvent::Ended(end) => break SessionEnd::Ended(end),
                },
                why = poll_fn(|context| call.poll(context)) => break SessionEnd::Told(why),
            }
        };
        kept.record.relayed(over, relay.moved());
        // Whatever the result, the sockets close when the relay drops.
        let _ = timeout(FAREWELL, relay.close()).await;
        // Ahead of the seat: who waits for it must find the server's connection closed.
        drop(relay);
    }
}

fn put_aside(relay: Relay<TcpStream>, mut kept: Box<EstablishedState>) {
    let poller = kept.poller.clone();
    match relay.park() {
        Ok(relay) => {
            // Only who is silent can be gone unnoticed; most sessions end before they are, and save the calls.
            if let Some(time) = kept.record.settings().limits.keepalive.filter(|_| !kept.keepalive_set) {
                kept.keepalive_set = true;
                keep_alive(&relay.client.socket, time);
                keep_alive(&relay.server.socket, time);
            }
            let call = kept.seat.cancel_signal().clone();
            // From here on the poller is woken, not the task.
            let _ = call.poll(&Context::from_waker(poller.waker()));
            // One that does not get in stays as it is.
            if let Err(quiet) = poller.park(Box::new(ParkedSession { relay, kept })) {
                quiet.resume(None);
            } else if call.reason().is_some() {
                // Told on the way in, when the poller could not find it yet.
                poller.waker().wake_by_ref();
            }
        }
        Err(error) => kept.record.lost(&error),
    }
}

impl ParkedSession {
    fn resume(self, rest_after: Option<Duration>) {
        let Self { relay, mut kept } = self;
        match relay.unpark(kept.limits(), kept.record.byte_counters()) {
            Ok(relay) => drop(tokio::spawn(Relayed { relay, kept }.run_until(rest_after))),
            Err(error) => kept.record.lost(&error),
        }
    }
}

impl Parked for ParkedSession {
    fn sockets(&self) -> [BorrowedFd<'_>; 2] {
        [self.relay.client.socket.as_fd(), self.relay.server.socket.as_fd()]
    }

    fn deadline(&self) -> Option<time::Instant> {
        self.relay.idle_deadline(&self.kept.limits())
    }

    fn is_cancelled(&self) -> bool {
        self.kept.seat.cancel_signal().reason().is_some()
    }

    fn unpark(self) {
        self.resume(Some(REST_AFTER));
    }
}

impl Session {
    /// The end of the login: rustls lets go of the client's connection, and all that is kept is packed up.
    pub(super) async fn relayed(
        mut self,
        tag: &Tag,
        stream: Stream,
        mut to_server: Vec<u8>,
        seated: Seated,
        established: Established,
    ) -> Option<Relayed> {
        // A session that is logged in is not shed. A client that does not read is not waited for any longer than at a close.
        self.prelogin_ticket = None;
        let leg = timeout(FAREWELL, stream.into_leg()).await;
        let Ok(Ok((client, more))) = leg else { return self.gone(Reason::Disconnected) };
        to_server.extend(more);
        let mut to_client = established.to_client;
        if seated.seat.cancel_signal().reason().is_some() {
            // The login was cancelled before the client could be answered: it ends with the first look at the call.
            (to_client, to_server) = (reply::exchange_cancelled(tag), Vec::new());
        }
        self.record.open_on(seated.backend.id, seated.slot);
        seated.seat.establish();
        self.record.log_login();
        let kept = EstablishedState {
            _counted: self.drain.count(),
            keepalive_set: false,
            poller: self.poller,
            record: self.record,
            permits: self.permits,
            seat: seated.seat,
        };
        Some(Relayed::new(client, established.leg, to_client, to_server, kept))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a silent session keeps, beside its keys (`record_layer` holds their size), its place in the waiting poller, its
    /// seat (`sessions`) and its names. One step more is memory of every session of every user: the allocator's steps are
    /// 80, 96, … 384, 448 bytes.
    #[test]
    fn a_silent_session_is_small() {
        assert!(size_of::<ParkedSession>() <= 88, "{}", size_of::<ParkedSession>());
        assert!(size_of::<EstablishedState>() <= 384, "{}", size_of::<EstablishedState>());
    }
}
