//! One side of a relayed session: a socket, and TLS where it has it.
//!
//! A leg reads into the worker's scratch memory and writes from there; of its own it has memory only for what cannot go
//! on at once: the beginning of a record, and bytes that the peer does not take. What TLS says by itself (answers to
//! KeyUpdates, close_notify, alerts) is said here; the two directions see plaintext.
//!
//! A peer can ask TLS for answers as fast as it can send. There is one slot for an answer that is due, and a leg whose peer has not
//! taken its answer is not read: a peer that never reads makes the proxy hold one answer, and spend time on one read.

use std::io::{self, IoSlice, IoSliceMut};
use std::net;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use thiserror::Error;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::TcpStream;

use super::pipe::Pipe;
use super::scratch::{ROUND, Scratch, stride};
use crate::record_layer::{
    AlertCode, Channel, HEADER, Layout, MAX_PLAINTEXT, Opened, StoredChannel, Violation, record_length,
};

/// Pieces of one vectored write. Where a peer sent more, shorter records, they are gathered first.
const PIECES: usize = 128;
/// After this many TLS records without data other sessions of the worker run.
const MAX_EMPTY_RECORDS: u16 = 64;

/// What a leg needs of a socket beyond reading and writing.
pub trait Socket: AsyncRead + AsyncWrite + Unpin {
    /// Reads into several buffers what is there already.
    ///
    /// # Errors
    /// `WouldBlock`: nothing is.
    fn try_read_vectored(&self, buffers: &mut [IoSliceMut<'_>]) -> io::Result<usize>;

    /// Moves what is there already into the pipe; 0 is the end of the stream.
    ///
    /// # Errors
    /// `WouldBlock`: nothing is. Any other: this cannot be done with this socket.
    fn try_fill(&self, pipe: &Pipe) -> io::Result<usize>;

    /// Moves bytes of the pipe out.
    ///
    /// # Errors
    /// `WouldBlock`: the peer takes none now.
    fn try_empty(&self, pipe: &Pipe, length: usize) -> io::Result<usize>;
}

impl Socket for TcpStream {
    fn try_read_vectored(&self, buffers: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        self.try_read_vectored(buffers)
    }

    fn try_fill(&self, pipe: &Pipe) -> io::Result<usize> {
        self.try_io(Interest::READABLE, || pipe.fill(self))
    }

    fn try_empty(&self, pipe: &Pipe, length: usize) -> io::Result<usize> {
        self.try_io(Interest::WRITABLE, || pipe.empty(self, length))
    }
}

/// Why nothing more comes from a peer, or goes to it.
#[derive(Debug, Error)]
pub(super) enum Broken {
    /// The connection.
    #[error(transparent)]
    Socket(#[from] io::Error),
    /// TLS: the session must end.
    #[error(transparent)]
    Tls(#[from] Violation),
}

/// What one read brought.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Received {
    /// The peer will send no more.
    End,
    /// So much plaintext, in the slots of `Scratch::outbound`.
    InSlots(usize),
    /// So much plaintext, at the places in `Scratch::opened`.
    Opened(usize),
    /// So much plaintext, in `Scratch::pipe`: only between plain sockets.
    InPipe(usize),
}

/// A reply that the TLS layer owes the peer. One of a kind is enough: one KeyUpdate answers any number of requests (RFC 8446
/// section 4.6.3), and one warning declines any number of handshakes. Each TLS version has one kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Answer {
    KeyUpdate,
    NoRenegotiation,
}

/// Progress of the one answer that a leg may owe its peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Owed {
    Nothing,
    /// To be sealed once everything before it is sent.
    Due(Answer),
    /// Sealed, and part of `Leg::unsent`.
    Sealed,
}

/// See the module.
#[derive(Debug)]
pub struct Leg<S> {
    socket: S,
    tls: Option<Box<Channel>>,
    /// Read, but no whole record yet.
    received: Vec<u8>,
    /// There may be whole records in `received`.
    unparsed: bool,
    /// TLS records opened since [`Leg::take_records_opened`].
    records_opened: u16,
    /// To be sent, from `sent`: as it goes over the wire.
    unsent: Vec<u8>,
    sent: usize,
    /// Of all that was ever unsent, so much has gone out.
    flushed: u64,
    owed: Owed,
    /// Nothing more can be sent: the peer was told.
    finished: bool,
    /// The peer has closed, or broken, TLS.
    ended: Option<Result<(), Violation>>,
}

/// A leg at rest.
#[derive(Debug)]
pub struct RestingLeg {
    /// Registered nowhere.
    pub socket: net::TcpStream,
    tls: Option<StoredChannel>,
}

impl<S> Leg<S> {
    /// Plain TCP.
    pub fn plain(socket: S) -> Self {
        Self::new(socket, None, Vec::new(), false)
    }

    /// TLS, with the bytes that were read from the socket and are not opened yet. `closed`: the peer has said that it
    /// will send no more.
    pub fn tls(socket: S, channel: Channel, received: Vec<u8>, closed: bool) -> Self {
        Self::new(socket, Some(Box::new(channel)), received, closed)
    }

    fn new(socket: S, tls: Option<Box<Channel>>, received: Vec<u8>, closed: bool) -> Self {
        let unparsed = !received.is_empty();
        let ended = closed.then_some(Ok(()));
        let (unsent, owed) = (Vec::new(), Owed::Nothing);
        Self {
            socket,
            tls,
            received,
            unparsed,
            records_opened: 0,
            unsent,
            sent: 0,
            flushed: 0,
            owed,
            finished: false,
            ended,
        }
    }

    /// Room to leave around plaintext that this leg is to send.
    pub(super) fn layout(&self) -> Layout {
        self.tls.as_ref().map_or(Layout::default(), |tls| tls.sealer.layout())
    }

    /// Whether bytes, or an answer of TLS, wait for the peer to take them.
    pub(super) fn has_unsent(&self) -> bool {
        !self.unsent.is_empty() || self.owed != Owed::Nothing
    }

    /// Bytes of memory that wait for the peer, or for the rest of a record.
    #[cfg(test)]
    pub(super) fn held(&self) -> usize {
        self.unsent.capacity() + self.received.len()
    }

    /// Whether the leg is nothing but a socket and keys just now.
    pub(super) fn can_rest(&self) -> bool {
        self.received.is_empty()
            && !self.has_unsent()
            && self.ended.is_none()
            && self.tls.as_ref().is_none_or(|tls| tls.can_rest())
    }

    /// Tells the peer what it did wrong, behind what is still unsent.
    pub(super) fn fail(&mut self, violation: Violation) {
        if let (Some(tls), Some(alert)) = (&mut self.tls, violation.alert()) {
            tls.sealer.close(alert, &mut self.unsent);
        }
    }
}

impl Leg<TcpStream> {
    /// Waits until the peer has sent something, or closed.
    pub(super) async fn readable(&self) -> io::Result<()> {
        self.socket.readable().await
    }

    /// Takes the socket from the runtime and the ciphers apart.
    ///
    /// # Errors
    /// The system would not have the socket unregistered.
    pub fn rest(self) -> io::Result<RestingLeg> {
        let tls = self.tls.map(|tls| tls.rest());
        Ok(RestingLeg { socket: self.socket.into_std()?, tls })
    }
}

impl RestingLeg {
    /// The leg again, on this runtime.
    ///
    /// # Errors
    /// The system would not have the socket registered.
    pub fn wake(self) -> io::Result<Leg<TcpStream>> {
        let tls = self.tls.map(|tls| Box::new(tls.wake()));
        Ok(Leg::new(TcpStream::from_std(self.socket)?, tls, Vec::new(), false))
    }
}

impl<S: Socket> Leg<S> {
    /// Reads once, up to `round` records. Plaintext is placed for a receiver that needs `layout`.
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
            if round == ROUND
                && let Some(filled) = self.fill_pipe(scratch)
            {
                return Poll::Ready(Ok(if filled == 0 { Received::End } else { Received::InPipe(filled) }));
            }
            let read = ready!(self.poll_read(context, &mut scratch.outbound[..round * MAX_PLAINTEXT]))?;
            return Poll::Ready(Ok(if read == 0 { Received::End } else { Received::InSlots(read) }));
        }
        let mut read = ready!(self.poll_read(context, scratch.first_slot(layout)))?;
        if read == 0 {
            return Poll::Ready(Ok(Received::End));
        }
        // A full slot: there is more, and the records behind it come with one call. What goes wrong there, or the end
        // of the stream, the next read meets again.
        if read == MAX_PLAINTEXT && round > 1 {
            read += self.socket.try_read_vectored(&mut scratch.further_slots(layout)[..round - 1]).unwrap_or(0);
        }
        Poll::Ready(Ok(Received::InSlots(read)))
    }

    /// `None`: nothing is there, or it must be read in the ordinary way.
    fn fill_pipe(&self, scratch: &mut Scratch) -> Option<usize> {
        if scratch.pipe.is_none() {
            scratch.pipe = Pipe::new().ok();
        }
        self.socket.try_fill(scratch.pipe.as_ref()?).ok()
    }

    fn poll_receive_tls(
        &mut self,
        context: &mut Context<'_>,
        scratch: &mut Scratch,
        round: usize,
    ) -> Poll<Result<Received, Broken>> {
        loop {
            match self.ended {
                Some(Ok(())) => return Poll::Ready(Ok(Received::End)),
                Some(Err(violation)) => return Poll::Ready(Err(violation.into())),
                None => {}
            }
            // What goes wrong with the write is for the other direction to find: the peer may still have sent something.
            if self.owed != Owed::Nothing && self.poll_flush(context).is_pending() {
                return Poll::Pending;
            }
            let mut filled = self.received.len();
            if !std::mem::take(&mut self.unparsed) {
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
            // Records without data, such as KeyUpdate: other sessions of the worker run before the next ones.
            if self.records_opened >= MAX_EMPTY_RECORDS {
                self.records_opened = 0;
                context.waker().wake_by_ref();
                return Poll::Pending;
            }
        }
    }

    /// Opens the records in the first `filled` bytes; keeps what is not a whole one.
    fn open(&mut self, scratch: &mut Scratch, filled: usize) -> usize {
        let Some(tls) = &mut self.tls else { return 0 };
        scratch.opened.clear();
        let (mut at, mut total) = (0, 0);
        while self.ended.is_none() {
            let record = match record_length(&scratch.inbound[at..filled]) {
                Ok(Some(length)) if at + length <= filled => &mut scratch.inbound[at..at + length],
                Ok(_) => break,
                Err(violation) => {
                    self.ended = Some(Err(violation));
                    break;
                }
            };
            let length = record.len();
            match tls.opener.open(record) {
                Ok(Opened::Data(range)) => {
                    total += range.len();
                    scratch.opened.push(at + range.start..at + range.end);
                }
                Ok(Opened::Nothing) => {}
                Ok(Opened::KeyUpdateRequested) => self.owed = Owed::Due(Answer::KeyUpdate),
                Ok(Opened::Renegotiation) => self.owed = Owed::Due(Answer::NoRenegotiation),
                Ok(Opened::Closed) => self.ended = Some(Ok(())),
                Err(violation) => self.ended = Some(Err(violation)),
            }
            at += length;
            self.records_opened = self.records_opened.saturating_add(1);
        }
        self.received.clear();
        if self.ended.is_none() {
            self.received.extend_from_slice(&scratch.inbound[at..filled]);
        }
        total
    }

    /// Sends what another leg received. What the peer does not take is kept, and then nothing more may be given before
    /// [`Leg::poll_flush`] is ready.
    pub(super) fn poll_send(
        &mut self,
        context: &mut Context<'_>,
        scratch: &mut Scratch,
        received: Received,
    ) -> Result<(), Broken> {
        // RFC 8446 section 4.6.3: the answer goes before the next data.
        self.seal_answer();
        let layout = self.layout();
        let length = match received {
            Received::End => return Ok(()),
            Received::InPipe(length) => return self.send_pipe(scratch, length),
            Received::Opened(_) if self.tls.is_none() && scratch.opened.len() <= PIECES => {
                return self.poll_write_pieces(context, scratch);
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
                    let plain = (length - slot * MAX_PLAINTEXT).min(MAX_PLAINTEXT);
                    // Every record but the last is full, so that they lie side by side.
                    sealed += tls.sealer.seal(&mut scratch.outbound[sealed..], plain).map_err(io::Error::other)?;
                }
                sealed
            }
        };
        self.poll_write(context, &scratch.outbound[..sealed])
    }

    /// Sends what is in the pipe; what the peer does not take comes out of it.
    fn send_pipe(&mut self, scratch: &mut Scratch, length: usize) -> Result<(), Broken> {
        let Some(pipe) = scratch.pipe.take() else { return Ok(()) };
        let mut left = length;
        while left > 0 {
            match self.socket.try_empty(&pipe, left) {
                Ok(moved) if moved > 0 => left -= moved,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    pipe.take(left, &mut self.unsent)?;
                    break;
                }
                Ok(_) => return Err(io::Error::from(io::ErrorKind::WriteZero).into()),
                Err(error) => return Err(error.into()),
            }
        }
        // After an error it is not put back: the next transfer makes a new, empty one.
        scratch.pipe = Some(pipe);
        Ok(())
    }

    /// Sends `plaintext`, in the order of all that is sent.
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

    /// Writes plaintext from where it was opened.
    fn poll_write_pieces(&mut self, context: &mut Context<'_>, scratch: &Scratch) -> Result<(), Broken> {
        if let [range] = &scratch.opened[..] {
            return self.poll_write(context, &scratch.inbound[range.clone()]);
        }
        let mut slices = [IoSlice::new(&[]); PIECES];
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

    /// Sends what is unsent, and then the answer that is due. Ready when nothing is left.
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
            if self.owed == Owed::Sealed {
                self.owed = Owed::Nothing;
            }
            self.seal_answer();
            if self.unsent.is_empty() {
                return Poll::Ready(Ok(()));
            }
        }
    }

    /// Appends the answer that is due. A leg that has closed, or may send no more under its key, answers nothing.
    fn seal_answer(&mut self) {
        let (Owed::Due(answer), Some(tls)) = (self.owed, &mut self.tls) else { return };
        let sealed = match answer {
            Answer::KeyUpdate => tls.sealer.key_update(&mut self.unsent),
            Answer::NoRenegotiation => tls.sealer.decline_renegotiation(&mut self.unsent),
        };
        self.owed = if sealed.is_ok() { Owed::Sealed } else { Owed::Nothing };
    }

    /// How much of what is unsent has gone out: grows as long as the peer takes anything.
    pub(super) fn flushed(&self) -> u64 {
        self.flushed
    }

    /// Says that nothing more will be sent: close_notify, then FIN. `last`: nothing more is expected either, and the
    /// FIN comes with the close.
    pub(super) fn poll_finish(&mut self, context: &mut Context<'_>, last: bool) -> Poll<io::Result<()>> {
        if self.finished {
            return Poll::Ready(Ok(()));
        }
        if let Some(tls) = &mut self.tls {
            tls.sealer.close(AlertCode::CLOSE_NOTIFY, &mut self.unsent);
        }
        let flushed = ready!(self.poll_flush(context));
        self.finished = flushed.is_err() || last || Pin::new(&mut self.socket).poll_shutdown(context)?.is_ready();
        if self.finished { Poll::Ready(flushed) } else { Poll::Pending }
    }

    /// What is unsent will never be taken.
    pub(super) fn discard_unsent(&mut self) {
        (self.unsent, self.sent, self.owed) = (Vec::new(), 0, Owed::Nothing);
    }

    fn poll_read(&mut self, context: &mut Context<'_>, to: &mut [u8]) -> Poll<io::Result<usize>> {
        let mut buffer = ReadBuf::new(to);
        ready!(Pin::new(&mut self.socket).poll_read(context, &mut buffer))?;
        Poll::Ready(Ok(buffer.filled().len()))
    }
}

// One read holds at least the rest of any record.
const _: () = assert!(ROUND >= 2 && HEADER < MAX_PLAINTEXT);
