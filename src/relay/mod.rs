//! Bytes both ways until both sides are done; nothing is parsed.
//!
//! A session that moves bytes is a task with a [`Relay`]. No buffer belongs to it: what a read brings lies in scratch
//! memory of the worker thread and goes out at once, up to 64 full records with two reads and one write. Only what a slow peer
//! does not take is kept, at most one round's worth, and as long as it is kept its source is not read: that is the
//! backpressure. A session that has been silent for a while is not even a task: [`Relay::rest`] takes it down to two
//! sockets and their keys, and [`Resting::wake`] makes it a relay again.
//!
//! A side that finishes is passed on as a half-close, and the other may go on talking for `half_close` after its last
//! byte. A write that fails ends its own direction only, so that the last words of a server (`* BYE …`) still reach a
//! client that is still sending. A server that closes in the middle of a silence was asked by nobody: the caller hears of
//! it ([`Outcome::CutOff`]) before the client does, and says when it shall. What breaks the rules of TLS ends the session
//! with an alert. Called by `session`, after the login.

mod direction;
pub(crate) mod idle_poller;
mod leg;
mod pipe;
mod scratch;

use std::future::poll_fn;
use std::io;
use std::pin::pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use prometheus::IntCounter;
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep_until};

use self::direction::Direction;
pub(crate) use self::leg::{Leg, RestingLeg, Socket};
use crate::record_layer::Violation;

/// Who has said nothing for so long before the server closed was not waiting for anything.
const SILENCE: Duration = Duration::from_secs(1);

/// When a relayed session is ended without either side asking for it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// No byte in either direction for this long; `None`: never.
    pub idle: Option<Duration>,
    /// No byte for this long after one side has finished.
    pub half_close: Duration,
    /// A side has taken nothing for this long while bytes wait for it.
    pub stall: Duration,
}

/// Who ended a relayed session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    /// The client closed, or its connection broke.
    Client,
    /// The server closed, or its connection broke.
    Server,
    /// `limits.idle` passed in silence.
    Idle,
    /// The client took nothing for `limits.stall`.
    ClientStalled,
    /// The server took nothing for `limits.stall`.
    ServerStalled,
    /// The client broke the rules of TLS.
    ClientTls(Violation),
    /// The server broke the rules of TLS.
    ServerTls(Violation),
}

/// How a run of the relay came to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// The session is over: [`Relay::close`].
    Ended(End),
    /// Nothing has moved for a while and nothing waits: [`Relay::rest`].
    Quiet,
    /// The server has closed its connection, or it broke, after a second or more of silence. The client has all the server
    /// said and does not know it yet: the next [`Relay::run`] tells it. Once in a session.
    CutOff,
}

/// A relay between two connections.
#[derive(Debug)]
pub(crate) struct Relay<S> {
    client: Leg<S>,
    server: Leg<S>,
    up: Direction,
    down: Direction,
    limits: Limits,
    first_done: Option<End>,
    last_byte: Instant,
    /// When the relay began, or woke: sockets that were just registered have not told yet what they have.
    begun: Instant,
}

/// What is already read when the relay begins, and where bytes are counted.
#[derive(Debug)]
pub(crate) struct Opening {
    /// Bytes for the client, ahead of what the server sends from now on.
    pub to_client: Vec<u8>,
    /// Bytes for the server, ahead of what the client sends from now on.
    pub to_server: Vec<u8>,
    /// Counter of bytes to the client.
    pub client_bytes: IntCounter,
    /// Counter of bytes to the server.
    pub server_bytes: IntCounter,
}

impl<S: Socket> Relay<S> {
    /// Nothing moves before [`Relay::run`].
    pub(crate) fn new(client: Leg<S>, server: Leg<S>, opening: Opening, limits: Limits) -> Self {
        Self {
            client,
            server,
            up: Direction::new(opening.to_server, opening.server_bytes),
            down: Direction::new(opening.to_client, opening.client_bytes).keeping_end(),
            limits,
            first_done: None,
            last_byte: Instant::now(),
            begun: Instant::now(),
        }
    }

    /// Moves bytes until both directions are done, a limit is reached, or nothing has moved for `rest_after`. Dropping
    /// the future loses nothing: it may be called again.
    pub(crate) async fn run(&mut self, rest_after: Option<Duration>) -> Outcome {
        let mut timer = pin!(sleep_until(self.last_byte + Duration::from_secs(24 * 3600)));
        let mut armed = false;
        poll_fn(|context| {
            if let Poll::Ready(outcome) = self.poll_bytes(context) {
                return Poll::Ready(outcome);
            }
            while let Some((due, outcome)) = self.due(rest_after) {
                // Bytes move the time on, and the timer is left as it is until it fires.
                if !armed || due < timer.deadline() {
                    timer.as_mut().reset(due);
                    armed = true;
                }
                ready!(timer.as_mut().poll(context));
                if Instant::now() >= due {
                    return Poll::Ready(outcome);
                }
                armed = false;
            }
            Poll::Pending
        })
        .await
    }

    /// Bytes to the client and to the server so far.
    pub(crate) fn moved(&self) -> (u64, u64) {
        (self.down.moved, self.up.moved)
    }

    /// Says goodbye to both, as long as they take it. The sockets close when the relay drops.
    pub(crate) async fn close(&mut self) {
        poll_fn(|context| {
            // A peer that can be told nothing any more is told nothing.
            let client = self.client.poll_finish(context, true).is_ready();
            let server = self.server.poll_finish(context, true).is_ready();
            if client && server { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
    }

    fn poll_bytes(&mut self, context: &mut Context<'_>) -> Poll<Outcome> {
        let before = self.moved();
        loop {
            if let Poll::Ready(result) = self.up.poll(context, &mut self.client, &mut self.server, self.down.is_done())
            {
                if let Err(violation) = result {
                    self.client.fail(violation);
                    return Poll::Ready(Outcome::Ended(End::ClientTls(violation)));
                }
                self.first_done.get_or_insert(if self.up.write_failed { End::Server } else { End::Client });
            }
            if let Poll::Ready(result) = self.down.poll(context, &mut self.server, &mut self.client, self.up.is_done())
            {
                if let Err(violation) = result {
                    self.server.fail(violation);
                    return Poll::Ready(Outcome::Ended(End::ServerTls(violation)));
                }
                self.first_done.get_or_insert(if self.down.write_failed { End::Client } else { End::Server });
            }
            // Reading from the server may have left something for it, an answer to a KeyUpdate: its own direction was
            // polled before.
            if self.server.has_unsent() && self.up.is_open() && self.up.stalled_since().is_none() {
                continue;
            }
            if !self.down.is_kept() {
                break;
            }
            self.down.keeps_end = false;
            if self.up.is_open() && self.moved() == before && self.last_byte.elapsed() >= SILENCE {
                return Poll::Ready(Outcome::CutOff);
            }
        }
        if self.moved() != before {
            self.last_byte = Instant::now();
        }
        match self.first_done {
            Some(end) if self.up.is_done() && self.down.is_done() => Poll::Ready(Outcome::Ended(end)),
            _ => Poll::Pending,
        }
    }

    /// What happens next if no byte moves, and when.
    fn due(&self, rest_after: Option<Duration>) -> Option<(Instant, Outcome)> {
        let silence = match self.first_done {
            Some(end) => Some((self.last_byte + self.limits.half_close, Outcome::Ended(end))),
            None => self.limits.idle.map(|idle| (self.last_byte + idle, Outcome::Ended(End::Idle))),
        };
        let stalled = |direction: &Direction, end| {
            let since = direction.stalled_since()?;
            Some((since + self.limits.stall, Outcome::Ended(end)))
        };
        let quiet = self.last_byte.max(self.begun);
        let rest = rest_after.filter(|_| self.can_rest()).map(|after| (quiet + after, Outcome::Quiet));
        let due = [silence, stalled(&self.down, End::ClientStalled), stalled(&self.up, End::ServerStalled), rest];
        due.into_iter().flatten().min_by_key(|(at, _)| *at)
    }

    fn can_rest(&self) -> bool {
        self.up.is_open() && self.down.is_open() && self.client.can_rest() && self.server.can_rest()
    }
}

/// A silent session: two sockets, their keys, and what has moved.
#[derive(Debug)]
pub(crate) struct Resting {
    /// Towards the client.
    pub client: RestingLeg,
    /// Towards the server.
    pub server: RestingLeg,
    last_byte: Instant,
    to_client: u64,
    to_server: u64,
}

impl Relay<TcpStream> {
    /// After [`Outcome::CutOff`]: waits until the client sends something or closes.
    pub(crate) async fn client_stirs(&self) {
        // An error is something, too: the next run finds it.
        let _ = self.client.readable().await;
    }

    /// After [`Outcome::Quiet`].
    ///
    /// # Errors
    /// The system would not let go of a socket; the session is lost.
    pub(crate) fn rest(self) -> io::Result<Resting> {
        let (to_client, to_server) = self.moved();
        Ok(Resting {
            client: self.client.rest()?,
            server: self.server.rest()?,
            last_byte: self.last_byte,
            to_client,
            to_server,
        })
    }
}

impl Resting {
    /// When `limits.idle` ends the session.
    pub(crate) fn idle_until(&self, limits: &Limits) -> Option<Instant> {
        limits.idle.map(|idle| self.last_byte + idle)
    }

    /// A relay again, on this runtime.
    ///
    /// # Errors
    /// The system would not take a socket; the session is lost.
    pub(crate) fn wake(
        self,
        limits: Limits,
        client_bytes: IntCounter,
        server_bytes: IntCounter,
    ) -> io::Result<Relay<TcpStream>> {
        Ok(Relay {
            client: self.client.wake()?,
            server: self.server.wake()?,
            up: Direction::resumed(self.to_server, server_bytes),
            down: Direction::resumed(self.to_client, client_bytes).keeping_end(),
            limits,
            first_done: None,
            last_byte: self.last_byte,
            begun: Instant::now(),
        })
    }
}

#[cfg(test)]
mod socket_tests;
#[cfg(test)]
mod tests;
