//! Bytes both ways until both sides are done; nothing is parsed.
//!
//! No buffer is held while a session is idle: what one read brings lives in scratch memory of the worker thread and goes
//! out at once. Only what a slow peer does not take is kept, at most one read's worth, and as long as it is kept its
//! source is not read: that is the backpressure. A side that finishes is passed on as a half-close, and the other may
//! go on talking for `half_close` after its last byte. A write that fails ends its own direction only, so that the last
//! words of a server (`* BYE …`) still reach a client that is still sending. Called by `session`, after the login.

use std::cell::RefCell;
use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use prometheus::IntCounter;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep};

/// One read: two TLS records' worth.
const SCRATCH: usize = 32 * 1024;

thread_local! {
    static SCRATCH_MEMORY: RefCell<Box<[u8]>> = RefCell::new(vec![0; SCRATCH].into_boxed_slice());
}

/// When a relayed session is ended without either side asking for it.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// No byte in either direction for this long; `None`: never.
    pub idle: Option<Duration>,
    /// No byte for this long after one side has finished.
    pub half_close: Duration,
}

/// Who ended a relayed session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The client closed, or its connection broke.
    Client,
    /// The server closed, or its connection broke.
    Server,
    /// `limits.idle` passed in silence.
    Idle,
    /// The operator stops the process.
    Drained,
}

impl End {
    /// Text of the log record.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Client => "client",
            Self::Server => "server",
            Self::Idle => "idle",
            Self::Drained => "drained",
        }
    }
}

/// A relay between two connections.
#[derive(Debug)]
pub struct Relay<C, S> {
    client: C,
    server: S,
    up: Direction,
    down: Direction,
    limits: Limits,
    first_done: Option<End>,
    last_byte: Instant,
}

/// What is already read when the relay begins, and where bytes are counted.
#[derive(Debug)]
pub struct Opening {
    /// Bytes for the client, ahead of what the server sends from now on.
    pub to_client: Vec<u8>,
    /// Bytes for the server, ahead of what the client sends from now on.
    pub to_server: Vec<u8>,
    /// Counter of bytes to the client.
    pub client_bytes: IntCounter,
    /// Counter of bytes to the server.
    pub server_bytes: IntCounter,
}

impl<C, S> Relay<C, S>
where
    C: AsyncRead + AsyncWrite + Unpin,
    S: AsyncRead + AsyncWrite + Unpin,
{
    /// Nothing moves before [`Relay::run`].
    pub fn new(client: C, server: S, opening: Opening, limits: Limits) -> Self {
        Self {
            client,
            server,
            up: Direction::new(opening.to_server, opening.server_bytes),
            down: Direction::new(opening.to_client, opening.client_bytes),
            limits,
            first_done: None,
            last_byte: Instant::now(),
        }
    }

    /// Moves bytes until both directions are done or a limit is reached. Dropping the future loses nothing: it may be
    /// called again.
    pub async fn run(&mut self) -> End {
        let mut timer: Option<Pin<Box<Sleep>>> = None;
        poll_fn(|context| {
            if let Poll::Ready(end) = self.poll_bytes(context) {
                return Poll::Ready(end);
            }
            while let Some(limit) = self.silence_limit() {
                let due = self.last_byte + limit;
                let timer = timer.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(due)));
                ready!(timer.as_mut().poll(context));
                if Instant::now() >= due {
                    return Poll::Ready(self.first_done.unwrap_or(End::Idle));
                }
                timer.as_mut().reset(due);
            }
            Poll::Pending
        })
        .await
    }

    /// Bytes to the client and to the server so far.
    pub fn moved(&self) -> (u64, u64) {
        (self.down.moved, self.up.moved)
    }

    /// The connections, to close them.
    pub fn into_parts(self) -> (C, S) {
        (self.client, self.server)
    }

    fn poll_bytes(&mut self, context: &mut Context<'_>) -> Poll<End> {
        let before = self.moved();
        if self.up.poll(context, &mut self.client, &mut self.server).is_ready() {
            self.first_done.get_or_insert(if self.up.write_failed { End::Server } else { End::Client });
        }
        if self.down.poll(context, &mut self.server, &mut self.client).is_ready() {
            self.first_done.get_or_insert(if self.down.write_failed { End::Client } else { End::Server });
        }
        if self.moved() != before {
            self.last_byte = Instant::now();
        }
        match self.first_done {
            Some(end) if self.up.is_done() && self.down.is_done() => Poll::Ready(end),
            _ => Poll::Pending,
        }
    }

    fn silence_limit(&self) -> Option<Duration> {
        match self.first_done {
            Some(_) => Some(self.limits.half_close),
            None => self.limits.idle,
        }
    }
}

/// One way: what one side sends, the other gets.
#[derive(Debug)]
struct Direction {
    /// Read, but not yet taken by the receiver; empty (and without memory) nearly always.
    pending: Vec<u8>,
    sent: usize,
    /// Something was written that a TLS layer may still hold.
    unflushed: bool,
    state: State,
    write_failed: bool,
    moved: u64,
    counter: IntCounter,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// The sender may still send.
    Open,
    /// The sender has finished; the receiver is yet to be told.
    Ending,
    Done,
}

impl Direction {
    fn new(pending: Vec<u8>, counter: IntCounter) -> Self {
        Self { pending, sent: 0, unflushed: false, state: State::Open, write_failed: false, moved: 0, counter }
    }

    fn is_done(&self) -> bool {
        self.state == State::Done
    }

    fn poll(
        &mut self,
        context: &mut Context<'_>,
        from: &mut (impl AsyncRead + Unpin),
        to: &mut (impl AsyncWrite + Unpin),
    ) -> Poll<()> {
        if self.is_done() {
            return Poll::Ready(());
        }
        let result = SCRATCH_MEMORY.with_borrow_mut(|scratch| self.poll_move(context, from, to, scratch));
        if let Err(error) = ready!(result) {
            tracing::debug!(%error, "a relayed write failed");
            self.write_failed = true;
            self.pending = Vec::new();
        }
        self.state = State::Done;
        Poll::Ready(())
    }

    /// Ready when the direction is done; an error is one of the receiver.
    fn poll_move(
        &mut self,
        context: &mut Context<'_>,
        from: &mut (impl AsyncRead + Unpin),
        to: &mut (impl AsyncWrite + Unpin),
        scratch: &mut [u8],
    ) -> Poll<io::Result<()>> {
        loop {
            ready!(self.poll_pending(context, to))?;
            if self.state == State::Ending {
                return Pin::new(to).poll_shutdown(context);
            }
            let mut buffer = ReadBuf::new(scratch);
            match Pin::new(&mut *from).poll_read(context, &mut buffer) {
                Poll::Pending => {
                    if self.unflushed {
                        ready!(Pin::new(&mut *to).poll_flush(context))?;
                        self.unflushed = false;
                    }
                    return Poll::Pending;
                }
                // A broken connection and a TLS stream cut off without close_notify end like a closed one: whether
                // mail was lost is for the protocol above to notice, and it does (literals carry their length).
                Poll::Ready(Err(error)) => {
                    tracing::debug!(%error, "a relayed read failed");
                    self.state = State::Ending;
                }
                Poll::Ready(Ok(())) if buffer.filled().is_empty() => self.state = State::Ending,
                Poll::Ready(Ok(())) => self.poll_forward(context, to, buffer.filled())?,
            }
        }
    }

    /// Writes `bytes`, and keeps what the receiver does not take now.
    fn poll_forward(
        &mut self,
        context: &mut Context<'_>,
        to: &mut (impl AsyncWrite + Unpin),
        mut bytes: &[u8],
    ) -> io::Result<()> {
        while !bytes.is_empty() {
            match Pin::new(&mut *to).poll_write(context, bytes)? {
                Poll::Ready(written) => {
                    self.count(written)?;
                    bytes = &bytes[written..];
                }
                Poll::Pending => {
                    self.pending = bytes.to_vec();
                    self.sent = 0;
                    break;
                }
            }
        }
        Ok(())
    }

    fn poll_pending(&mut self, context: &mut Context<'_>, to: &mut (impl AsyncWrite + Unpin)) -> Poll<io::Result<()>> {
        while self.sent < self.pending.len() {
            let written = ready!(Pin::new(&mut *to).poll_write(context, &self.pending[self.sent..]))?;
            self.count(written)?;
            self.sent += written;
        }
        if self.pending.capacity() > 0 {
            self.pending = Vec::new();
            self.sent = 0;
        }
        Poll::Ready(Ok(()))
    }

    fn count(&mut self, written: usize) -> io::Result<()> {
        if written == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        self.unflushed = true;
        self.moved += written as u64;
        self.counter.inc_by(written as u64);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
    use tokio::task::JoinHandle;

    use super::*;

    const LIMITS: Limits = Limits { idle: None, half_close: Duration::from_secs(60) };

    struct Ends {
        client: DuplexStream,
        server: DuplexStream,
        relay: JoinHandle<(End, (u64, u64))>,
    }

    fn start(pipe: usize, limits: Limits, to_client: &[u8], to_server: &[u8]) -> Ends {
        let (client, relay_client) = duplex(pipe);
        let (server, relay_server) = duplex(pipe);
        let counter = || IntCounter::new("bytes", "bytes").unwrap();
        let opening = Opening {
            to_client: to_client.to_vec(),
            to_server: to_server.to_vec(),
            client_bytes: counter(),
            server_bytes: counter(),
        };
        let mut relay = Relay::new(relay_client, relay_server, opening, limits);
        let relay = tokio::spawn(async move {
            let end = relay.run().await;
            (end, relay.moved())
        });
        Ends { client, server, relay }
    }

    #[tokio::test]
    async fn what_was_read_early_goes_first() {
        let mut ends = start(64, LIMITS, b"a OK\r\n", b"b NOOP\r\n");
        ends.client.write_all(b"c NOOP\r\n").await.unwrap();
        ends.server.write_all(b"b OK\r\n").await.unwrap();
        ends.client.shutdown().await.unwrap();
        let (mut up, mut down) = (String::new(), String::new());
        ends.server.read_to_string(&mut up).await.unwrap();
        ends.server.shutdown().await.unwrap();
        ends.client.read_to_string(&mut down).await.unwrap();
        assert_eq!((up.as_str(), down.as_str()), ("b NOOP\r\nc NOOP\r\n", "a OK\r\nb OK\r\n"));
        assert_eq!(ends.relay.await.unwrap(), (End::Client, (12, 16)));
    }

    #[tokio::test]
    async fn a_megabyte_passes_through_a_narrow_pipe_unchanged() {
        let mut ends = start(7, LIMITS, b"", b"");
        let sent: Vec<u8> = (0..1_000_000_u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
        let expected = sent.clone();
        let writer = tokio::spawn(async move {
            ends.server.write_all(&sent).await.unwrap();
            ends.server.shutdown().await.unwrap();
            ends.server
        });
        let mut got = Vec::new();
        ends.client.read_to_end(&mut got).await.unwrap();
        assert!(got == expected, "bytes differ");
        drop(ends.client);
        drop(writer.await.unwrap());
        assert_eq!(ends.relay.await.unwrap().0, End::Server);
    }

    #[tokio::test]
    async fn a_side_that_does_not_read_stops_the_other() {
        let mut ends = start(16, LIMITS, b"", b"");
        let mut accepted = 0;
        // Duplex (16) + one read kept (16) + duplex (16): more than that is never taken from the sender.
        while let Ok(written) = tokio::time::timeout(Duration::from_millis(50), ends.server.write(&[b'x'; 16])).await {
            accepted += written.unwrap();
            assert!(accepted <= 48, "{accepted} bytes taken for a client that reads nothing");
        }
        let mut got = vec![0; accepted];
        ends.client.read_exact(&mut got).await.unwrap();
        ends.server.write_all(b"more").await.unwrap();
    }

    #[tokio::test]
    async fn last_words_of_a_server_reach_a_client_that_still_sends() {
        let mut ends = start(1024, LIMITS, b"", b"");
        ends.server.write_all(b"* BYE shutting down\r\n").await.unwrap();
        drop(ends.server);
        ends.client.write_all(b"a NOOP\r\n").await.unwrap();
        let mut got = String::new();
        ends.client.read_to_string(&mut got).await.unwrap();
        assert_eq!(got, "* BYE shutting down\r\n");
        assert_eq!(ends.relay.await.unwrap().0, End::Server);
    }

    #[tokio::test(start_paused = true)]
    async fn the_idle_limit_counts_from_the_last_byte() {
        let limits = Limits { idle: Some(Duration::from_secs(1800)), ..LIMITS };
        let mut ends = start(1024, limits, b"", b"");
        let began = Instant::now();
        tokio::time::sleep(Duration::from_secs(1700)).await;
        ends.client.write_all(b"a NOOP\r\n").await.unwrap();
        assert_eq!(ends.relay.await.unwrap().0, End::Idle);
        assert_eq!(began.elapsed().as_secs(), 3500);
    }

    #[tokio::test(start_paused = true)]
    async fn a_half_closed_session_that_falls_silent_ends() {
        let mut ends = start(1024, LIMITS, b"", b"");
        ends.client.shutdown().await.unwrap();
        let began = Instant::now();
        assert_eq!(ends.relay.await.unwrap().0, End::Client);
        assert_eq!(began.elapsed().as_secs(), 60);
    }

    #[tokio::test(start_paused = true)]
    async fn without_an_idle_limit_silence_lasts() {
        let mut ends = start(1024, LIMITS, b"", b"");
        tokio::time::sleep(Duration::from_secs(30 * 24 * 3600)).await;
        ends.client.write_all(b"x").await.unwrap();
        assert_eq!(ends.server.read_u8().await.unwrap(), b'x');
    }
}
