//! Steps 7 and 8: a session after its login. It is a task while bytes move, and an entry of the idle poller while they do not.

use std::future::poll_fn;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::sync::Arc;
use std::task::Context;
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::time::{self, timeout};
use tokio_util::task::task_tracker::TaskTrackerToken;

use super::attempt_result::AcceptedLogin;
use super::log_record::{EndedBy, Record, SessionEnd};
use super::{CLOSE_TIMEOUT, ConnectionPermits, Session, SessionEnded, SessionPoller};
use crate::backend::DelayedDisconnect;
use crate::failure::Reason;
use crate::protocol::imap::reply;
use crate::protocol::imap::tag::Tag;
use crate::relay::idle_poller::Parked;
use crate::relay::{Buffered, Limits, ParkedRelay, Relay, RelayEvent};
use crate::session_registry::{CancelSignal, SessionHandle};
use crate::stream::{Stream, set_keepalive};

/// Silence after which a session is parked, without task and buffers. Unparking takes about 20 µs, so that a client that sends
/// something every few seconds is not parked.
const PARK_AFTER: Duration = Duration::from_secs(2);

/// A session with a task, which moves bytes.
pub(super) struct RelayedSession {
    relay: Relay<TcpStream>,
    state: Box<EstablishedState>,
}

/// A silent session without a task, which the idle poller watches.
pub(crate) struct ParkedSession {
    relay: ParkedRelay,
    state: Box<EstablishedState>,
}

/// What a session keeps from its login to its end.
struct EstablishedState {
    poller: Arc<SessionPoller>,
    record: Record,
    /// Whether TCP keepalive has been enabled on both sockets.
    keepalive_set: bool,
    /// The drain waits until this is dropped.
    _drain_token: TaskTrackerToken,
    permits: ConnectionPermits,
    /// The entry in the session registry, with the cancel signal. It is the last field, because fields are dropped in order: when a
    /// login that waits for this session continues, the permits of this session have been released.
    handle: SessionHandle,
}

impl EstablishedState {
    fn limits(&self) -> Limits {
        let limits = &self.record.settings().limits;
        Limits { idle: limits.idle, half_close: limits.half_close, stall: limits.stall }
    }

    /// The server has closed. Delays the disconnect of the client, so that the clients of this server do not all reconnect at the
    /// same moment. Returns earlier if the client becomes active or the session is cancelled.
    async fn delay_disconnect(&mut self, relay: &Relay<TcpStream>, cancel_signal: &CancelSignal) {
        let Some(DelayedDisconnect { delay, gauge: _gauge, .. }) = self.record.server_closed() else { return };
        // The user may log in again during the delay.
        self.permits.count.release();
        self.handle.server_closed();
        tokio::select! {
            () = time::sleep(delay) => {}
            () = relay.client_readable() => {}
            _ = poll_fn(|context| cancel_signal.poll(context)) => {}
        }
    }
}

impl RelayedSession {
    /// Runs until the session ends or is parked.
    pub(super) async fn run(self) {
        self.run_until_silent(Some(PARK_AFTER)).await;
    }

    async fn run_until_silent(self, park_after: Option<Duration>) {
        let Self { mut relay, mut state } = self;
        let cancel_signal = state.handle.cancel_signal().clone();
        let end = loop {
            tokio::select! {
                // The relay is first, so that a session that was cancelled before it begins still sends the answer to the login.
                biased;
                event = relay.run(park_after) => match event {
                    RelayEvent::Silent => return park(relay, state),
                    RelayEvent::ServerClosed => state.delay_disconnect(&relay, &cancel_signal).await,
                    RelayEvent::Ended(end) => break SessionEnd::Relay(end),
                },
                reason = poll_fn(|context| cancel_signal.poll(context)) => break SessionEnd::Cancelled(reason),
            }
        };
        state.record.relayed(end, relay.moved());
        // If that fails or takes too long, the sockets close when the relay is dropped.
        let _ = timeout(CLOSE_TIMEOUT, relay.close()).await;
        // Before the registry entry: a login that waits for this session requires that the connection to the server is closed.
        drop(relay);
    }
}

fn park(relay: Relay<TcpStream>, mut state: Box<EstablishedState>) {
    let poller = state.poller.clone();
    match relay.park() {
        Ok(relay) => {
            // Enable TCP keepalive when a session is first parked: an active session notices a dead peer anyway, and most
            // sessions end before they are parked.
            if let Some(time) = state.record.settings().limits.keepalive.filter(|_| !state.keepalive_set) {
                state.keepalive_set = true;
                set_keepalive(&relay.client.socket, time);
                set_keepalive(&relay.server.socket, time);
            }
            let cancel_signal = state.handle.cancel_signal().clone();
            // From here on the signal wakes the poller instead of the task.
            let _ = cancel_signal.poll(&Context::from_waker(poller.waker()));
            if let Err(session) = poller.park(Box::new(ParkedSession { relay, state })) {
                session.unpark(None);
            } else if cancel_signal.reason().is_some() {
                // Cancelled before the poller could find the session.
                poller.waker().wake_by_ref();
            }
        }
        Err(error) => state.record.lost(&error),
    }
}

impl ParkedSession {
    /// Continues the session in a task, which parks it again after `park_after`.
    fn unpark(self, park_after: Option<Duration>) {
        let Self { relay, mut state } = self;
        match relay.unpark(state.limits(), state.record.byte_counters()) {
            Ok(relay) => drop(tokio::spawn(RelayedSession { relay, state }.run_until_silent(park_after))),
            Err(error) => state.record.lost(&error),
        }
    }
}

impl Parked for ParkedSession {
    fn sockets(&self) -> [BorrowedFd<'_>; 2] {
        [self.relay.client.socket.as_fd(), self.relay.server.socket.as_fd()]
    }

    fn deadline(&self) -> Option<time::Instant> {
        self.relay.idle_deadline(&self.state.limits())
    }

    fn is_cancelled(&self) -> bool {
        self.state.handle.cancel_signal().reason().is_some()
    }

    fn unpark(self) {
        self.unpark(Some(PARK_AFTER));
    }
}

impl Session {
    /// Step 7: takes the client's connection from rustls and reduces the session to what it needs after the login. The relay sends
    /// the server's OK, and what the client has sent after the login.
    pub(super) async fn establish(
        mut self,
        tag: &Tag,
        stream: Stream,
        mut to_server: Vec<u8>,
        accepted: AcceptedLogin,
    ) -> Result<RelayedSession, SessionEnded> {
        // The registry entry is bound first, so that it is dropped last.
        let AcceptedLogin { handle, backend, server_permit, established } = accepted;
        // A session that has logged in is not shed. If the client does not read, the handover from rustls is given up as a close is.
        self.prelogin_ticket = None;
        let leg = timeout(CLOSE_TIMEOUT, stream.into_leg()).await;
        let Ok(Ok((client, more))) = leg else { return Err(self.ended(EndedBy::Client, Reason::Disconnected)) };
        to_server.extend(more);
        let mut to_client = established.to_client;
        if handle.cancel_signal().reason().is_some() {
            // The login was cancelled before the client was answered. The relay ends when it sees the signal.
            (to_client, to_server) = (reply::exchange_cancelled(tag), Vec::new());
        }
        self.record.set_relaying(backend.id, server_permit);
        handle.establish();
        self.record.log_login();
        let state = EstablishedState {
            _drain_token: self.drain.count(),
            keepalive_set: false,
            poller: self.poller,
            record: self.record,
            permits: self.permits,
            handle,
        };
        let buffered = Buffered { to_client, to_server };
        let relay = Relay::new(client, established.leg, buffered, state.record.byte_counters(), state.limits());
        Ok(RelayedSession { relay, state: Box::new(state) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A silent session consists of these, its keys (`record_layer` tests their size), a slot of the idle poller, the registry entry
    /// (`session_registry` tests its size) and its names. The steps of the allocator are 80, 96, … 384, 448 bytes; a session of
    /// every user takes one step more if a size grows beyond one.
    #[test]
    fn parked_session_is_small() {
        assert!(size_of::<ParkedSession>() <= 88, "{}", size_of::<ParkedSession>());
        assert!(size_of::<EstablishedState>() <= 384, "{}", size_of::<EstablishedState>());
    }
}
