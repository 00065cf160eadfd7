//! A socket that gives rustls whole records, one at a time.
//!
//! rustls keeps what it has read of a record that is not complete, and gives it to nobody; a connection that shall be
//! taken from it at any moment must therefore never have handed it half a record. So the reading is done here, into a
//! buffer of ours: a record goes out when all of it is there, and the next one in a call of its own. What is left when
//! the connection is handed over, whole records and the beginning of one, is [`RecordStream::into_parts`]. Bytes that are no
//! record pass as they are: rustls knows what to say of them.
//!
//! A client's connection carries a [`MemoryCharge`] for the bytes that are here or in rustls. When the budget does not allow more of them, the
//! read fails with [`io::ErrorKind::OutOfMemory`].

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use zeroize::Zeroizing;

use crate::admission::MemoryCharge;
use crate::record_layer::record_length;

/// One read of the socket: a handshake message, a login or a reply fits.
const READ: usize = 4096;
/// rustls reads this often before other tasks of the worker run: a peer may send records without data.
const MAX_READS: u8 = 64;
/// Bytes kept from the start of a connection: a ClientHello with a post-quantum key share has about 1.8 KB.
const MAX_START: usize = 4096;

/// See the module.
#[derive(Debug)]
pub struct RecordStream<S> {
    socket: S,
    /// Read from the socket, and not yet given to rustls from `start`.
    buffer: Vec<u8>,
    start: usize,
    /// So much of the record at `start` is still to be given, known to be there.
    releasing: usize,
    account: Option<Account>,
    /// Reads by rustls since a read of the socket had to wait.
    reads: u8,
    /// What the peer sent first, as long as it is wanted: a login in clear, if it speaks no TLS.
    first_bytes: Option<Zeroizing<Vec<u8>>>,
}

/// Bytes of a client's connection that are charged to the budget.
#[derive(Debug)]
struct Account {
    charge: MemoryCharge,
    /// rustls joins the records of a handshake message, and keeps certificates: all of the handshake may be in it.
    handshaking: bool,
    /// Bytes that rustls may hold.
    in_rustls: usize,
    /// Bytes of these that it keeps as long as the connection lives.
    kept: usize,
}

impl Account {
    /// rustls asks for the next record, and has nothing left of the one before.
    fn asked(&mut self) {
        if !self.handshaking {
            self.in_rustls = self.kept;
        }
    }

    /// rustls is given a part of a record. It decrypts data where they lie, and copies what is in them.
    fn given(&mut self, length: usize) {
        self.in_rustls += if self.handshaking { length } else { 2 * length };
    }
}

impl<S> RecordStream<S> {
    /// Nothing is read yet.
    pub fn new(socket: S) -> Self {
        Self { socket, buffer: Vec::new(), start: 0, releasing: 0, account: None, reads: 0, first_bytes: None }
    }

    /// What comes first is kept for [`RecordStream::take_first_bytes`]. Nothing may have been read yet.
    #[must_use]
    pub fn keeping_first_bytes(self) -> Self {
        Self { first_bytes: Some(Zeroizing::default()), ..self }
    }

    /// What is held is charged to a client's connection.
    #[must_use]
    pub fn charged(self, charge: MemoryCharge) -> Self {
        let account = Account { charge, handshaking: true, in_rustls: 0, kept: 0 };
        Self { account: Some(account), ..self }
    }

    /// The handshake is done; of it rustls keeps `kept` bytes.
    pub fn established(&mut self, kept: usize) {
        if let Some(account) = &mut self.account {
            (account.handshaking, account.in_rustls, account.kept) = (false, kept, kept);
        }
        // Less than before is always allowed, and more would be noticed at the next read.
        let _ = self.pay(self.buffer.capacity());
    }

    /// The start of the connection, up to 4 KiB, which is not kept any longer.
    pub fn take_first_bytes(&mut self) -> Zeroizing<Vec<u8>> {
        self.first_bytes.take().unwrap_or_default()
    }

    /// The socket itself.
    pub fn socket(&self) -> &S {
        &self.socket
    }

    /// The socket, and what was read from it that rustls never saw.
    pub fn into_parts(mut self) -> (S, Vec<u8>) {
        self.buffer.drain(..self.start);
        (self.socket, self.buffer)
    }

    /// Whether rustls was given all of the records it was given any of.
    pub fn is_between_records(&self) -> bool {
        self.releasing == 0
    }

    /// Charges `buffer` bytes here, the first bytes that are kept, and what is in rustls.
    fn pay(&mut self, buffer: usize) -> io::Result<()> {
        let Some(account) = &mut self.account else { return Ok(()) };
        let first = self.first_bytes.as_ref().map_or(0, |bytes| bytes.capacity());
        let paid = account.charge.resize(buffer + first + account.in_rustls);
        paid.map_err(|error| io::Error::new(io::ErrorKind::OutOfMemory, error))
    }

    /// Keeps what was read to `from` in the buffer, if it belongs to the start of the connection.
    fn keep_first_bytes(&mut self, from: usize) -> io::Result<()> {
        let Some(kept) = &self.first_bytes else { return Ok(()) };
        let length = MAX_START.min(kept.len() + self.buffer.len() - from);
        let (wanted, capacity) = (length - kept.len(), kept.capacity());
        if length > capacity {
            let larger = length.next_power_of_two();
            self.pay(self.buffer.capacity() + larger)?;
            // A growing vector would leave a copy behind that is not wiped.
            let mut copy = Zeroizing::new(Vec::with_capacity(larger));
            if let Some(kept) = &self.first_bytes {
                copy.extend_from_slice(kept);
            }
            self.first_bytes = Some(copy);
        }
        if let Some(kept) = &mut self.first_bytes {
            kept.extend_from_slice(&self.buffer[from..from + wanted]);
        }
        self.pay(self.buffer.capacity())
    }

    /// Bytes that rustls may have now: up to the end of the first record, if all of it is there.
    fn available(&mut self) -> usize {
        if self.releasing == 0 {
            let buffered = &self.buffer[self.start..];
            self.releasing = match record_length(buffered) {
                Ok(Some(length)) if length <= buffered.len() => length,
                Ok(_) => 0,
                Err(_) => buffered.len(),
            };
        }
        self.releasing
    }

    fn release(&mut self, to: &mut ReadBuf<'_>) -> io::Result<()> {
        let given = self.releasing.min(to.remaining());
        if let Some(account) = &mut self.account {
            account.given(given);
        }
        self.pay(self.buffer.capacity())?;
        to.put_slice(&self.buffer[self.start..self.start + given]);
        self.start += given;
        self.releasing -= given;
        if self.start == self.buffer.len() {
            self.start = 0;
            self.buffer.clear();
            // What a long record needed is not kept.
            self.buffer.shrink_to(READ);
            self.pay(self.buffer.capacity())?;
        }
        Ok(())
    }
}

impl<S: AsyncRead + Unpin> RecordStream<S> {
    /// Reads once. Ready with `false` at the end of the stream.
    fn poll_fill(&mut self, context: &mut Context<'_>) -> Poll<io::Result<bool>> {
        self.buffer.drain(..self.start);
        self.start = 0;
        let length = self.buffer.len();
        self.pay(self.buffer.capacity().max(length + READ))?;
        self.buffer.reserve_exact(READ);
        self.buffer.resize(length + READ, 0);
        let mut space = ReadBuf::new(&mut self.buffer[length..]);
        let result = Pin::new(&mut self.socket).poll_read(context, &mut space);
        let read = space.filled().len();
        self.buffer.truncate(length + read);
        self.keep_first_bytes(length)?;
        ready!(result)?;
        Poll::Ready(Ok(read > 0))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for RecordStream<S> {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, to: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.releasing == 0
            && let Some(account) = &mut self.account
        {
            account.asked();
        }
        if self.reads >= MAX_READS {
            self.reads = 0;
            context.waker().wake_by_ref();
            return Poll::Pending;
        }
        while self.available() == 0 {
            let filled = self.poll_fill(context);
            if filled.is_pending() {
                self.reads = 0;
            }
            if !ready!(filled)? {
                // An end inside a record: rustls sees the stream end, and the session with it.
                return Poll::Ready(Ok(()));
            }
        }
        self.reads += 1;
        Poll::Ready(self.release(to))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for RecordStream<S> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.socket).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.socket).poll_write_vectored(context, bytes)
    }

    fn is_write_vectored(&self) -> bool {
        self.socket.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Instant;

    use futures_util::FutureExt as _;
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

    use super::*;
    use crate::admission::{AdmissionControl, PreloginTicket};
    use crate::config;

    #[tokio::test]
    async fn only_whole_records_pass_and_one_at_a_time() {
        let stream = [&[22, 3, 1, 0, 3][..], b"abc", &[23, 3, 3, 0, 2], b"de", &[23, 3, 3, 0, 9], b"fg"].concat();
        for cut in 0..=stream.len() {
            let (mut peer, socket) = duplex(64);
            let mut records = RecordStream::new(socket);
            peer.write_all(&stream[..cut]).await.unwrap();
            let mut got = Vec::new();
            for length in [8, 7] {
                if got.len() + length > cut {
                    break;
                }
                // A reader with little room gets a record in pieces, and never a piece of an incomplete one.
                let mut piece = [0; 5];
                let mut left = length;
                while left > 0 {
                    let read = records.read(&mut piece).await.unwrap();
                    assert!(read <= left, "{read} bytes, of a record with {left} left");
                    got.extend_from_slice(&piece[..read]);
                    left -= read;
                }
                assert!(records.is_between_records());
            }
            peer.write_all(&stream[cut..]).await.unwrap();
            drop(peer);
            let rest = stream.len() - got.len();
            let (mut socket, mut buffered) = records.into_parts();
            socket.read_to_end(&mut buffered).await.unwrap();
            assert_eq!(buffered, stream[got.len()..]);
            assert_eq!(buffered.len(), rest);
        }
    }

    #[tokio::test]
    async fn many_small_records_let_other_tasks_run() {
        let (mut peer, socket) = duplex(1 << 16);
        let mut records = RecordStream::new(socket);
        peer.write_all(&[23, 3, 3, 0, 1, 0].repeat(1000)).await.unwrap();
        let mut got = [0; 64];
        let mut reads = 0;
        while records.read(&mut got).now_or_never().is_some() {
            reads += 1;
            assert!(reads <= MAX_READS, "a read must wait in between");
        }
        assert_eq!(records.read(&mut got).await.unwrap(), 6, "it goes on without another byte from the peer");
    }

    /// A guard with a budget of `bytes`, and a charge of its only connection.
    fn charge(bytes: usize) -> (Arc<AdmissionControl>, PreloginTicket) {
        let config = config::AdmissionConfig { before_login_memory: bytes, ..Default::default() };
        let guard = Arc::new(AdmissionControl::new(&config, Instant::now()));
        let ticket = guard.enter_prelogin_queue(Instant::now()).unwrap();
        (guard, ticket)
    }

    /// The most that a client can make its connection hold here and in rustls, at each moment of its life.
    #[tokio::test]
    async fn what_a_client_sends_is_charged_until_rustls_has_used_it() {
        const ALLOWANCE: usize = 8192;
        let record = [&[23, 3, 3, 0x40, 0][..], &[7; 0x4000]].concat();
        let (guard, ticket) = charge(1 << 20);
        let (mut peer, socket) = duplex(1 << 16);
        let mut records = RecordStream::new(socket).charged(ticket.charge());
        peer.write_all(&record[..12_000]).await.unwrap();
        let mut got = vec![0; 32_768];
        let mut read = |records: &mut RecordStream<_>| records.read(&mut got).now_or_never().map(Result::unwrap);
        assert_eq!(read(&mut records), None);
        let partial = guard.prelogin_memory();
        assert!((12_000..=20_480).contains(&(partial + ALLOWANCE)), "{partial}: a record of which the end is missing");
        peer.write_all(&record[12_000..]).await.unwrap();
        assert_eq!(read(&mut records), Some(record.len()));
        let handshake = guard.prelogin_memory() + ALLOWANCE;
        assert!(
            (record.len()..=record.len() + READ).contains(&handshake),
            "{handshake}: rustls joins handshake messages"
        );
        records.established(100);
        assert_eq!(guard.prelogin_memory(), 0, "of the handshake certificates are kept");
        peer.write_all(&record).await.unwrap();
        assert_eq!(read(&mut records), Some(record.len()));
        let data = guard.prelogin_memory() + ALLOWANCE;
        assert!((2 * record.len()..=2 * record.len() + 2 * READ).contains(&data), "{data}: encrypted and decrypted");
        assert_eq!(read(&mut records), None);
        assert_eq!(guard.prelogin_memory(), 0, "rustls has asked for more, so it has used the record");
        drop(records);
    }

    #[tokio::test]
    async fn the_first_bytes_are_kept_without_an_unwiped_copy_and_charged_as_long_as_they_are_kept() {
        const ALLOWANCE: usize = 8192;
        let (guard, ticket) = charge(1 << 20);
        let (mut peer, socket) = duplex(1 << 16);
        let mut records = RecordStream::new(socket).charged(ticket.charge()).keeping_first_bytes();
        let sent = [&[22, 3, 1, 0x40, 0][..], &[7; 8187]].concat();
        let mut capacities = Vec::new();
        for piece in sent.chunks(700) {
            peer.write_all(piece).await.unwrap();
            assert_eq!(records.read(&mut [0; 64]).now_or_never().map(Result::unwrap), None);
            capacities.push(records.first_bytes.as_ref().unwrap().capacity());
        }
        capacities.dedup();
        assert_eq!(capacities, [1024, 2048, 4096]);
        let held = records.buffer.capacity() + MAX_START;
        assert_eq!(guard.prelogin_memory() + ALLOWANCE, held);
        assert_eq!(records.take_first_bytes()[..], sent[..MAX_START]);
        records.established(0);
        assert_eq!(guard.prelogin_memory(), (held - MAX_START).saturating_sub(ALLOWANCE));
    }

    #[tokio::test]
    async fn without_budget_a_record_is_not_read_to_its_end() {
        let (_guard, ticket) = charge(4096);
        let (mut peer, socket) = duplex(1 << 16);
        let mut records = RecordStream::new(socket).charged(ticket.charge());
        peer.write_all(&[&[22, 3, 1, 0x40, 0][..], &[1; 0x4000]].concat()).await.unwrap();
        let error = records.read(&mut [0; 64]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::OutOfMemory);
    }

    #[tokio::test]
    async fn what_is_no_record_passes_as_it_is() {
        let (mut peer, socket) = duplex(64);
        peer.write_all(b"a1 LOGIN u p\r\n").await.unwrap();
        drop(peer);
        let mut got = Vec::new();
        RecordStream::new(socket).read_to_end(&mut got).await.unwrap();
        assert_eq!(got, b"a1 LOGIN u p\r\n");
    }
}
