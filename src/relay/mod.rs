//! Relays bytes in both directions until both sides have finished. It parses nothing and changes nothing.
//!
//! A session that moves bytes is a task with a [`Relay`], which owns no buffer. A read goes to the buffers of the worker thread
//! and is sent on at once, up to [`MAX_ROUND`] full records with two reads and one write. Only what a slow peer does not accept
//! is kept, at most one round, and until it has been sent its source is not read: this is the backpressure. A session that has
//! been silent for a while does not keep its task: [`Relay::park`] reduces it to two sockets and their keys, and
//! [`ParkedRelay::unpark`] makes it a relay again.
//!
//! The end of one side's stream is passed on as a half-close, and the other side may continue until `half_close` after its last
//! byte. A failed write ends only its own direction, so that the last lines of a server (`* BYE …`) still reach a client that is
//! sending. If the server closes during silence, the caller is notified first ([`RelayEvent::ServerClosed`]) and decides when the
//! client's connection closes. A violation of the TLS protocol ends the session with an alert.

mod direction;
pub(crate) mod idle_poller;
mod leg;
mod pipe;
mod scratch;
mod socket;

use std::future::poll_fn;
use std::io;
use std::pin::pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use prometheus::IntCounter;
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep_until};

use self::direction::Direction;
use self::leg::Finish;
pub(crate) use self::leg::{Leg, ParkedLeg};
use self::socket::Socket;
use crate::record_layer::Violation;

/// Maximum number of full records that one round moves, 1 MiB of plaintext. This is also the most that a session keeps for a
/// peer that stops reading (`direction` limits which peers get that far). Up to here, twice as many records per round reduce the
/// CPU time per byte by an eighth, because the peers are woken less often.
const MAX_ROUND: usize = 64;

/// A client that has sent nothing for this long before the server closed was not waiting for a reply.
const SILENCE: Duration = Duration::from_secs(1);

/// When a relayed session is ended although both sides keep it open.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// Maximum time without a byte in either direction, or `None`.
    pub idle: Option<Duration>,
    /// Maximum time without a byte after one side has finished.
    pub half_close: Duration,
    /// Maximum time in which a side accepts none of the bytes that wait for it.
    pub stall: Duration,
}

/// What ended a relayed session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RelayEnd {
    /// The client closed, or its connection broke.
    Client,
    /// The server closed, or its connection broke.
    Server,
    /// No byte was moved for `limits.idle`.
    Idle,
    /// The client accepted nothing for `limits.stall`.
    ClientStalled,
    /// The server accepted nothing for `limits.stall`.
    ServerStalled,
    /// The client violated the TLS protocol.
    ClientTls(Violation),
    /// The server violated the TLS protocol.
    ServerTls(Violation),
}

/// Why [`Relay::run`] returned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RelayEvent {
    /// The session has ended; the caller calls [`Relay::close`].
    Ended(RelayEnd),
    /// Nothing has moved for a while and nothing waits; the caller may call [`Relay::park`].
    Silent,
    /// The server closed its connection, or it broke, after at least a second of silence. The client has received all bytes of
    /// the server but not the end, which the next [`Relay::run`] passes on. Returned once per session.
    ServerClosed,
}

/// A relay between two connections.
#[derive(Debug)]
pub(crate) struct Relay<S> {
    client: Leg<S>,
    server: Leg<S>,
    to_server: Direction,
    to_client: Direction,
    limits: Limits,
    first_done: Option<RelayEnd>,
    last_byte: Instant,
    /// When the relay was created. A session is not parked at once after that: sockets that were just registered have not
    /// reported yet whether they are readable.
    created: Instant,
}

/// Bytes that were read before the relay began and go first.
#[derive(Debug, Default)]
pub(crate) struct Buffered {
    pub to_client: Vec<u8>,
    pub to_server: Vec<u8>,
}

/// Counters of relayed bytes.
#[derive(Debug)]
pub(crate) struct ByteCounters {
    pub to_client: IntCounter,
    pub to_server: IntCounter,
}

/// Numbers of bytes relayed in a session.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct BytesMoved {
    pub to_client: u64,
    pub to_server: u64,
}

impl<S: Socket> Relay<S> {
    /// Nothing is moved before [`Relay::run`].
    pub(crate) fn new(
        client: Leg<S>,
        server: Leg<S>,
        buffered: Buffered,
        counters: ByteCounters,
        limits: Limits,
    ) -> Self {
        let to_server = Direction::new(buffered.to_server, counters.to_server);
        let to_client = Direction::new(buffered.to_client, counters.to_client).delaying_end();
        let now = Instant::now();
        Self { client, server, to_server, to_client, limits, first_done: None, last_byte: now, created: now }
    }

    /// Moves bytes until both directions are done, a limit is reached, or nothing has moved for `park_after`. If the future is
    /// dropped, no bytes are lost and it may be called again.
    pub(crate) async fn run(&mut self, park_after: Option<Duration>) -> RelayEvent {
        let mut timer = pin!(sleep_until(self.last_byte + Duration::from_secs(24 * 3600)));
        let mut is_armed = false;
        poll_fn(|context| {
            if let Poll::Ready(event) = self.poll_bytes(context) {
                return Poll::Ready(event);
            }
            while let Some((due, event)) = self.next_timeout(park_after) {
                // Moved bytes postpone the timeout; the timer is not set again before it fires.
                if !is_armed || due < timer.deadline() {
                    timer.as_mut().reset(due);
                    is_armed = true;
                }
                ready!(timer.as_mut().poll(context));
                if Instant::now() >= due {
                    return Poll::Ready(event);
                }
                is_armed = false;
            }
            Poll::Pending
        })
        .await
    }

    /// Bytes relayed so far.
    pub(crate) fn moved(&self) -> BytesMoved {
        BytesMoved { to_client: self.to_client.moved, to_server: self.to_server.moved }
    }

    /// Ends both streams, with a TLS close_notify if possible. The sockets close when the relay is dropped.
    pub(crate) async fn close(&mut self) {
        poll_fn(|context| {
            // A peer that a close_notify cannot reach counts as closed.
            let client = self.client.poll_finish(context, Finish::WithClose).is_ready();
            let server = self.server.poll_finish(context, Finish::WithClose).is_ready();
            if client && server { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
    }

    fn poll_bytes(&mut self, context: &mut Context<'_>) -> Poll<RelayEvent> {
        let before = self.moved();
        loop {
            if let Err(end) = self.poll_to_server(context).and_then(|()| self.poll_to_client(context)) {
                return Poll::Ready(RelayEvent::Ended(end));
            }
            // Reading from the server may have queued a reply to a KeyUpdate for it, after the direction that sends to the
            // server was polled.
            if self.server.has_unsent() && self.to_server.is_open() && self.to_server.stalled_since().is_none() {
                continue;
            }
            if !self.to_client.is_end_delayed() {
                break;
            }
            self.to_client.delays_end = false;
            if self.to_server.is_open() && self.moved() == before && self.last_byte.elapsed() >= SILENCE {
                return Poll::Ready(RelayEvent::ServerClosed);
            }
        }
        if self.moved() != before {
            self.last_byte = Instant::now();
        }
        match self.first_done {
            Some(end) if self.to_server.is_done() && self.to_client.is_done() => Poll::Ready(RelayEvent::Ended(end)),
            _ => Poll::Pending,
        }
    }

    fn poll_to_server(&mut self, context: &mut Context<'_>) -> Result<(), RelayEnd> {
        let finish = self.to_client.finish_of_other();
        match self.to_server.poll(context, &mut self.client, &mut self.server, finish) {
            Poll::Pending => {}
            Poll::Ready(Ok(())) => {
                let end = if self.to_server.write_failed { RelayEnd::Server } else { RelayEnd::Client };
                self.first_done.get_or_insert(end);
            }
            Poll::Ready(Err(violation)) => {
                self.client.send_alert(violation);
                return Err(RelayEnd::ClientTls(violation));
            }
        }
        Ok(())
    }

    fn poll_to_client(&mut self, context: &mut Context<'_>) -> Result<(), RelayEnd> {
        let finish = self.to_server.finish_of_other();
        match self.to_client.poll(context, &mut self.server, &mut self.client, finish) {
            Poll::Pending => {}
            Poll::Ready(Ok(())) => {
                let end = if self.to_client.write_failed { RelayEnd::Client } else { RelayEnd::Server };
                self.first_done.get_or_insert(end);
            }
            Poll::Ready(Err(violation)) => {
                self.server.send_alert(violation);
                return Err(RelayEnd::ServerTls(violation));
            }
        }
        Ok(())
    }

    /// The next event if no byte is moved before, and its time.
    fn next_timeout(&self, park_after: Option<Duration>) -> Option<(Instant, RelayEvent)> {
        let silence = match self.first_done {
            Some(end) => Some((self.last_byte + self.limits.half_close, RelayEvent::Ended(end))),
            None => self.limits.idle.map(|idle| (self.last_byte + idle, RelayEvent::Ended(RelayEnd::Idle))),
        };
        let stalled = |direction: &Direction, end| {
            let since = direction.stalled_since()?;
            Some((since + self.limits.stall, RelayEvent::Ended(end)))
        };
        let client_stalled = stalled(&self.to_client, RelayEnd::ClientStalled);
        let server_stalled = stalled(&self.to_server, RelayEnd::ServerStalled);
        let silent_since = self.last_byte.max(self.created);
        let park = park_after.filter(|_| self.can_park()).map(|after| (silent_since + after, RelayEvent::Silent));
        [silence, client_stalled, server_stalled, park].into_iter().flatten().min_by_key(|(due, _)| *due)
    }

    fn can_park(&self) -> bool {
        self.to_server.is_open() && self.to_client.is_open() && self.client.can_park() && self.server.can_park()
    }
}

impl Relay<TcpStream> {
    /// After [`RelayEvent::ServerClosed`]: waits until the client sends something or closes.
    pub(crate) async fn client_readable(&self) {
        // The next run reports an error of the socket.
        let _ = self.client.readable().await;
    }

    /// Parks the session after [`RelayEvent::Silent`].
    ///
    /// # Errors
    /// A socket could not be removed from the runtime; the session is lost.
    pub(crate) fn park(self) -> io::Result<ParkedRelay> {
        let (last_byte, moved) = (self.last_byte, self.moved());
        Ok(ParkedRelay { client: self.client.park()?, server: self.server.park()?, last_byte, moved })
    }
}

/// A silent session: two sockets, their keys, and the number of bytes moved.
#[derive(Debug)]
pub(crate) struct ParkedRelay {
    pub client: ParkedLeg,
    pub server: ParkedLeg,
    last_byte: Instant,
    moved: BytesMoved,
}

impl ParkedRelay {
    /// When `limits.idle` ends the session.
    pub(crate) fn idle_deadline(&self, limits: &Limits) -> Option<Instant> {
        limits.idle.map(|idle| self.last_byte + idle)
    }

    /// Makes the session a relay again, on the current runtime.
    ///
    /// # Errors
    /// A socket could not be registered with the runtime; the session is lost.
    pub(crate) fn unpark(self, limits: Limits, counters: ByteCounters) -> io::Result<Relay<TcpStream>> {
        Ok(Relay {
            client: self.client.unpark()?,
            server: self.server.unpark()?,
            to_server: Direction::unparked(self.moved.to_server, counters.to_server),
            to_client: Direction::unparked(self.moved.to_client, counters.to_client).delaying_end(),
            limits,
            first_done: None,
            last_byte: self.last_byte,
            created: Instant::now(),
        })
    }
}

#[cfg(test)]
mod tests;
