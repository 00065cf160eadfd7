//! One side of a relayed session: a socket, with TLS or without.
//!
//! A leg reads into the buffers of the worker and writes from there. It has memory of its own only for what cannot be processed
//! at once: the beginning of a record, and bytes that the peer does not accept. It sends the messages of the TLS layer itself
//! (replies to KeyUpdates, close_notify, alerts); the two directions see only plaintext.
//!
//! A peer can request TLS replies as fast as it can send. A leg keeps at most one pending reply, and does not read from a peer
//! that has not accepted it: a peer that never reads costs the proxy one reply and the time of one read.

use std::io::{self, IoSlice};
use std::net;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use thiserror::Error;
use tokio::io::ReadBuf;
use tokio::net::TcpStream;

use super::MAX_ROUND;
use super::pipe::Pipe;
use super::scratch::{Scratch, stride};
use super::socket::Socket;
use crate::record_layer::{
    AlertCode, Channel, HEADER, Layout, MAX_PLAINTEXT, Opened, StoredChannel, Violation, record_length,
};

/// Maximum number of slices in one vectored write. More, shorter records are copied to one buffer first.
const MAX_SLICES: usize = 128;
/// Maximum number of TLS records without data before other sessions of the worker run.
const MAX_EMPTY_RECORDS: u16 = 64;

/// Why nothing more can be received from a peer, or sent to it.
#[derive(Debug, Error)]
pub(super) enum Broken {
    /// The connection failed.
    #[error(transparent)]
    Socket(#[from] io::Error),
    /// The peer violated the TLS protocol, and the session must end.
    #[error(transparent)]
    Tls(#[from] Violation),
}

/// The result of one read. The numbers are bytes of plaintext.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Received {
    /// The peer has ended its stream.
    End,
    /// In the slots of `Scratch::outbound`.
    InSlots(usize),
    /// In `Scratch::inbound`, at the ranges of `Scratch::opened`.
    Opened(usize),
    /// In `Scratch::pipe`; only between plain sockets.
    InPipe(usize),
}

/// How the stream to a peer is ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Finish {
    /// With a FIN, because the peer may still send.
    HalfClose,
    /// Without a FIN of its own, because the socket is about to be closed.
    WithClose,
}

/// A reply that the peer has requested from the TLS layer. One is enough: one KeyUpdate answers any number of requests (RFC 8446
/// section 4.6.3), and one warning declines any number of handshakes. Each TLS version has one kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum TlsReply {
    KeyUpdate,
    NoRenegotiation,
}

/// Progress of the pending reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum PendingReply {
    None,
    /// To be sealed when everything before it has been sent.
    Due(TlsReply),
    /// Sealed, and part of `Leg::unsent`.
    Sealed,
}

/// Whether the peer's TLS stream is open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum PeerStream {
    Open,
    /// Ended by a close_notify.
    Closed,
    Violated(Violation),
}

/// One side of a relayed session.
#[derive(Debug)]
pub(crate) struct Leg<S> {
    socket: S,
    tls: Option<Box<Channel>>,
    /// Bytes of a record that is not complete yet.
    received: Vec<u8>,
    /// Whether `received` may contain complete records.
    has_unparsed: bool,
    /// TLS records opened since [`Leg::take_records_opened`].
    records_opened: u16,
    /// Bytes to be sent as they are; those before index `sent` have been sent.
    unsent: Vec<u8>,
    sent: usize,
    /// Number of bytes that were unsent once and have been sent since.
    flushed: u64,
    pending_reply: PendingReply,
    /// Whether the stream to the peer has been ended.
    finished: bool,
    peer_stream: PeerStream,
}

/// The leg of a parked session.
#[derive(Debug)]
pub(crate) struct ParkedLeg {
    /// The socket, which is not registered with the runtime.
    pub socket: net::TcpStream,
    tls: Option<StoredChannel>,
}

impl<S> Leg<S> {
    pub(crate) fn plain(socket: S) -> Self {
        Self::new(socket, None, Vec::new())
    }

    /// A leg with TLS. `received` are bytes that were read from the socket and have not been decrypted.
    pub(crate) fn tls(socket: S, channel: Channel, received: Vec<u8>) -> Self {
        Self::new(socket, Some(Box::new(channel)), received)
    }

    /// A leg whose peer has already sent a close_notify.
    pub(crate) fn with_peer_closed(self) -> Self {
        Self { peer_stream: PeerStream::Closed, ..self }
    }

    fn new(socket: S, tls: Option<Box<Channel>>, received: Vec<u8>) -> Self {
        let has_unparsed = !received.is_empty();
        Self {
            socket,
            tls,
            received,
            has_unparsed,
            records_opened: 0,
            unsent: Vec::new(),
            sent: 0,
            flushed: 0,
            pending_reply: PendingReply::None,
            finished: false,
            peer_stream: PeerStream::Open,
        }
    }

    /// Space that a record needs around plaintext that this leg sends.
    pub(super) fn layout(&self) -> Layout {
        self.tls.as_ref().map_or(Layout::default(), |tls| tls.sealer.layout())
    }

    /// Whether bytes or a TLS reply wait for the peer to accept them.
    pub(super) fn has_unsent(&self) -> bool {
        !self.unsent.is_empty() || self.pending_reply != PendingReply::None
    }

    /// Bytes of memory for what waits for the peer, or for the rest of a record.
    #[cfg(test)]
    pub(super) fn buffered(&self) -> usize {
        self.unsent.capacity() + self.received.len()
    }

    /// Whether the state of the leg is only a socket and keys at present.
    pub(super) fn can_park(&self) -> bool {
        self.received.is_empty()
            && !self.has_unsent()
            && self.peer_stream == PeerStream::Open
            && self.tls.as_ref().is_none_or(|tls| tls.can_suspend())
    }

    /// Appends the alert for the violation to what is unsent.
    pub(super) fn send_alert(&mut self, violation: Violation) {
        if let (Some(tls), Some(alert)) = (&mut self.tls, violation.alert()) {
            tls.sealer.close(alert, &mut self.unsent);
        }
    }
}

impl Leg<TcpStream> {
    /// Waits until the peer has sent something or closed.
    pub(super) async fn readable(&self) -> io::Result<()> {
        self.socket.readable().await
    }

    /// Removes the socket from the runtime and reduces the TLS state to its keys.
    ///
    /// # Errors
    /// The socket could not be removed from the runtime.
    pub(super) fn park(self) -> io::Result<ParkedLeg> {
        let tls = self.tls.map(|tls| tls.suspend());
        Ok(ParkedLeg { socket: self.socket.into_std()?, tls })
    }
}

impl ParkedLeg {
    /// Registers the socket with the current runtime.
    ///
    /// # Errors
    /// The socket could not be registered.
    pub(super) fn unpark(self) -> io::Result<Leg<TcpStream>> {
        let tls = self.tls.map(|tls| Box::new(tls.resume()));
        Ok(Leg::new(TcpStream::from_std(self.socket)?, tls, Vec::new()))
    }
}

impl<S: Socket> Leg<S> {
    /// Reads once, up to `round` records. Plaintext is placed for a receiver with this layout.
    pub(super) fn poll_receive(
        &mut self,
        context: &mut Context<'_>,
        scratch: &mut Scratch,
        layout: Layout,
        round: usize,
    ) -> Poll<Result<Received, Broken>> {
        match &self.tls {
            None => self.poll_receive_plain(context, scratch, layout, round),
            Some(_) => self.poll_receive_tls(context, scratch, round),
        }
    }

    /// Number of TLS records that were opened since the last call.
    pub(super) fn take_records_opened(&mut self) -> usize {
        std::mem::take(&mut self.records_opened).into()
    }

    fn poll_receive_plain(
        &mut self,
        context: &mut Context<'_>,
        scratch: &mut Scratch,
        layout: Layout,
        round: usize,
    ) -> Poll<Result<Received, Broken>> {
        if layout == Layout::default() {
            if round == MAX_ROUND
                && let Some(read) = self.read_to_pipe(scratch)
            {
                return Poll::Ready(Ok(if read == 0 { Received::End } else { Received::InPipe(read) }));
            }
            let read = ready!(self.poll_read(context, &mut scratch.outbound[..round * MAX_PLAINTEXT]))?;
            return Poll::Ready(Ok(if read == 0 { Received::End } else { Received::InSlots(read) }));
        }
        let mut read = ready!(self.poll_read(context, scratch.first_slot(layout)))?;
        if read == 0 {
            return Poll::Ready(Ok(Received::End));
        }
        // A full slot means that more may have arrived: one call reads the further slots. The next read sees again an error or
        // the end of the stream that this call found.
        if read == MAX_PLAINTEXT && round > 1 {
            read += self.socket.try_read_vectored(&mut scratch.further_slots(layout)[..round - 1]).unwrap_or(0);
        }
        Poll::Ready(Ok(Received::InSlots(read)))
    }

    /// Returns `None` if no bytes have arrived or splice cannot be used.
    fn read_to_pipe(&self, scratch: &mut Scratch) -> Option<usize> {
        if scratch.pipe.is_none() {
            scratch.pipe = Pipe::new().ok();
        }
        self.socket.try_read_to_pipe(scratch.pipe.as_ref()?).ok()
    }

    fn poll_receive_tls(
        &mut self,
        context: &mut Context<'_>,
        scratch: &mut Scratch,
        round: usize,
    ) -> Poll<Result<Received, Broken>> {
        loop {
            match self.peer_stream {
                PeerStream::Closed => return Poll::Ready(Ok(Received::End)),
                PeerStream::Violated(violation) => return Poll::Ready(Err(violation.into())),
                PeerStream::Open => {}
            }
            // A failed write is left to the other direction, because the peer may still have sent something.
            if self.pending_reply != PendingReply::None && self.poll_flush(context).is_pending() {
                return Poll::Pending;
            }
            let mut filled = self.received.len();
            if !std::mem::take(&mut self.has_unparsed) {
                let end = (filled + round * stride(self.layout())).min(scratch.inbound.len());
                let read = ready!(self.poll_read(context, &mut scratch.inbound[filled..end]))?;
                if read == 0 {
                    return Poll::Ready(Ok(Received::End));
                }
                filled += read;
            }
            scratch.inbound[..self.received.len()].copy_from_slice(&self.received);
            let total = self.open(scratch, filled);
            if total > 0 {
                return Poll::Ready(Ok(Received::Opened(total)));
            }
            // After many records without data, such as KeyUpdates, other sessions of the worker run first.
            if self.records_opened >= MAX_EMPTY_RECORDS {
                self.records_opened = 0;
                context.waker().wake_by_ref();
                return Poll::Pending;
            }
        }
    }

    /// Decrypts the records in the first `filled` bytes and keeps an incomplete one. Returns the length of the plaintext.
    fn open(&mut self, scratch: &mut Scratch, filled: usize) -> usize {
        let Some(tls) = &mut self.tls else { return 0 };
        scratch.opened.clear();
        let (mut start, mut total) = (0, 0);
        while self.peer_stream == PeerStream::Open {
            let record = match record_length(&scratch.inbound[start..filled]) {
                Ok(Some(length)) if start + length <= filled => &mut scratch.inbound[start..start + length],
                Ok(_) => break,
                Err(violation) => {
                    self.peer_stream = PeerStream::Violated(violation);
                    break;
                }
            };
            let length = record.len();
            match tls.opener.open(record) {
                Ok(Opened::Data(range)) => {
                    total += range.len();
                    scratch.opened.push(start + range.start..start + range.end);
                }
                Ok(Opened::Nothing) => {}
                Ok(Opened::KeyUpdateRequested) => self.pending_reply = PendingReply::Due(TlsReply::KeyUpdate),
                Ok(Opened::Renegotiation) => self.pending_reply = PendingReply::Due(TlsReply::NoRenegotiation),
                Ok(Opened::Closed) => self.peer_stream = PeerStream::Closed,
                Err(violation) => self.peer_stream = PeerStream::Violated(violation),
            }
            start += length;
            self.records_opened = self.records_opened.saturating_add(1);
        }
        self.received.clear();
        if self.peer_stream == PeerStream::Open {
            self.received.extend_from_slice(&scratch.inbound[start..filled]);
        }
        total
    }

    /// Sends what another leg received. What the peer does not accept is kept; then [`Leg::poll_flush`] must be ready before the
    /// next call.
    pub(super) fn poll_send(
        &mut self,
        context: &mut Context<'_>,
        scratch: &mut Scratch,
        received: Received,
    ) -> Result<(), Broken> {
        // RFC 8446 section 4.6.3: the reply goes before the next data.
        self.seal_reply();
        let layout = self.layout();
        let length = match received {
            Received::End => return Ok(()),
            Received::InPipe(length) => return self.send_from_pipe(scratch, length),
            Received::Opened(_) if self.tls.is_none() && scratch.opened.len() <= MAX_SLICES => {
                return self.poll_write_opened(context, scratch);
            }
            Received::Opened(_) => scratch.gather(layout),
            Received::InSlots(length) => length,
        };
        let sealed = match &mut self.tls {
            None => length,
            Some(tls) => {
                if tls.sealer.wants_key_update() {
                    tls.sealer.key_update(&mut self.unsent).map_err(io::Error::other)?;
                }
                let mut sealed = 0;
                for slot in 0..length.div_ceil(MAX_PLAINTEXT) {
                    let plaintext = (length - slot * MAX_PLAINTEXT).min(MAX_PLAINTEXT);
                    // Every record but the last is full, so that the sealed records are contiguous.
                    sealed += tls.sealer.seal(&mut scratch.outbound[sealed..], plaintext).map_err(io::Error::other)?;
                }
                sealed
            }
        };
        self.poll_write(context, &scratch.outbound[..sealed])
    }

    /// Sends the bytes in the pipe. What the peer does not accept is moved from the pipe to the unsent bytes.
    fn send_from_pipe(&mut self, scratch: &mut Scratch, length: usize) -> Result<(), Broken> {
        let Some(pipe) = scratch.pipe.take() else { return Ok(()) };
        let mut left = length;
        while left > 0 {
            match self.socket.try_write_from_pipe(&pipe, left) {
                Ok(moved) if moved > 0 => left -= moved,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    pipe.drain_to(left, &mut self.unsent)?;
                    break;
                }
                Ok(_) => return Err(io::Error::from(io::ErrorKind::WriteZero).into()),
                Err(error) => return Err(error.into()),
            }
        }
        // After an error the pipe is dropped, and the next transfer creates an empty one.
        scratch.pipe = Some(pipe);
        Ok(())
    }

    /// Sends `plaintext` after everything that was sent before.
    pub(super) fn poll_send_bytes(
        &mut self,
        context: &mut Context<'_>,
        scratch: &mut Scratch,
        plaintext: &[u8],
    ) -> Result<(), Broken> {
        let layout = self.layout();
        for part in plaintext.chunks(MAX_PLAINTEXT) {
            scratch.first_slot(layout)[..part.len()].copy_from_slice(part);
            self.poll_send(context, scratch, Received::InSlots(part.len()))?;
        }
        Ok(())
    }

    /// Writes plaintext from the buffer in which it was decrypted.
    fn poll_write_opened(&mut self, context: &mut Context<'_>, scratch: &Scratch) -> Result<(), Broken> {
        if let [range] = &scratch.opened[..] {
            return self.poll_write(context, &scratch.inbound[range.clone()]);
        }
        let mut slices = [IoSlice::new(&[]); MAX_SLICES];
        for (slice, range) in slices.iter_mut().zip(&scratch.opened) {
            *slice = IoSlice::new(&scratch.inbound[range.clone()]);
        }
        let mut slices = &mut slices[..scratch.opened.len()];
        while !slices.is_empty() && self.unsent.is_empty() {
            match Pin::new(&mut self.socket).poll_write_vectored(context, slices)? {
                Poll::Ready(0) => return Err(io::Error::from(io::ErrorKind::WriteZero).into()),
                Poll::Ready(written) => IoSlice::advance_slices(&mut slices, written),
                Poll::Pending => break,
            }
        }
        for slice in slices {
            self.unsent.extend_from_slice(slice);
        }
        Ok(())
    }

    fn poll_write(&mut self, context: &mut Context<'_>, mut bytes: &[u8]) -> Result<(), Broken> {
        while !bytes.is_empty() && self.unsent.is_empty() {
            match Pin::new(&mut self.socket).poll_write(context, bytes)? {
                Poll::Ready(0) => return Err(io::Error::from(io::ErrorKind::WriteZero).into()),
                Poll::Ready(written) => bytes = &bytes[written..],
                Poll::Pending => break,
            }
        }
        self.unsent.extend_from_slice(bytes);
        Ok(())
    }

    /// Sends what is unsent, and then the pending reply. Ready when nothing is left.
    pub(super) fn poll_flush(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            while self.sent < self.unsent.len() {
                match ready!(Pin::new(&mut self.socket).poll_write(context, &self.unsent[self.sent..]))? {
                    0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                    written => {
                        self.sent += written;
                        self.flushed += written as u64;
                    }
                }
            }
            if self.unsent.capacity() > 0 {
                (self.unsent, self.sent) = (Vec::new(), 0);
            }
            if self.pending_reply == PendingReply::Sealed {
                self.pending_reply = PendingReply::None;
            }
            self.seal_reply();
            if self.unsent.is_empty() {
                return Poll::Ready(Ok(()));
            }
        }
    }

    /// Appends the reply that is due. A leg that has sent a close_notify, or may not use its key any more, sends none.
    fn seal_reply(&mut self) {
        let (PendingReply::Due(reply), Some(tls)) = (self.pending_reply, &mut self.tls) else { return };
        let sealed = match reply {
            TlsReply::KeyUpdate => tls.sealer.key_update(&mut self.unsent),
            TlsReply::NoRenegotiation => tls.sealer.decline_renegotiation(&mut self.unsent),
        };
        self.pending_reply = if sealed.is_ok() { PendingReply::Sealed } else { PendingReply::None };
    }

    /// Number of bytes that were unsent once and have been sent since: grows while the peer accepts anything.
    pub(super) fn flushed(&self) -> u64 {
        self.flushed
    }

    /// Ends the stream to the peer: sends what is unsent and a close_notify, then a FIN as `finish` says.
    pub(super) fn poll_finish(&mut self, context: &mut Context<'_>, finish: Finish) -> Poll<io::Result<()>> {
        if self.finished {
            return Poll::Ready(Ok(()));
        }
        if let Some(tls) = &mut self.tls {
            tls.sealer.close(AlertCode::CLOSE_NOTIFY, &mut self.unsent);
        }
        let flushed = ready!(self.poll_flush(context));
        self.finished = flushed.is_err()
            || finish == Finish::WithClose
            || Pin::new(&mut self.socket).poll_shutdown(context)?.is_ready();
        if self.finished { Poll::Ready(flushed) } else { Poll::Pending }
    }

    /// Drops what is unsent, because the peer will never accept it.
    pub(super) fn discard_unsent(&mut self) {
        (self.unsent, self.sent, self.pending_reply) = (Vec::new(), 0, PendingReply::None);
    }

    fn poll_read(&mut self, context: &mut Context<'_>, space: &mut [u8]) -> Poll<io::Result<usize>> {
        let mut buffer = ReadBuf::new(space);
        ready!(Pin::new(&mut self.socket).poll_read(context, &mut buffer))?;
        Poll::Ready(Ok(buffer.filled().len()))
    }
}

// One read has space for the rest of any record.
const _: () = assert!(MAX_ROUND >= 2 && HEADER < MAX_PLAINTEXT);
