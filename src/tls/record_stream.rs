//! A socket that passes complete TLS records to rustls, one at a time.
//!
//! rustls does not return the bytes of an incomplete record that it has read. A connection that may be extracted at any moment must therefore
//! never pass it a part of a record. This type reads into its own buffer, and passes on a record when it is complete, each in a separate
//! read. [`RecordStream::into_parts`] returns the remaining bytes: complete records and the beginning of one. Bytes that are not a TLS record
//! are passed on unchanged, and rustls reports the error.
//!
//! The connection of a client has a [`MemoryCharge`] for the bytes in this buffer and in rustls. If the budget does not allow more, the read
//! fails with [`io::ErrorKind::OutOfMemory`].

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use zeroize::Zeroizing;

use crate::admission::MemoryCharge;
use crate::record_layer::record_length;

/// Size of one read from the socket. A handshake message, a login or a reply usually fits.
const READ_SIZE: usize = 4096;
/// Maximum number of reads by rustls before other tasks of the worker run, because a peer may send records without data.
const MAX_READS: u8 = 64;
/// Maximum number of retained first bytes of a connection. A ClientHello with a post-quantum key share has about 1.8 KB.
const MAX_FIRST_BYTES: usize = 4096;

/// The socket and its read buffer; see the module documentation.
#[derive(Debug)]
pub struct RecordStream<S> {
    socket: S,
    /// Bytes read from the socket. Those from `start` have not been passed to rustls.
    buffer: Vec<u8>,
    start: usize,
    /// Number of bytes of the current record that have not been passed to rustls; all of them are in the buffer.
    releasing: usize,
    charged: Option<ChargedBytes>,
    /// Number of reads by rustls since the socket last had no data.
    reads: u8,
    /// The first bytes of the connection, until they are taken. They contain a plaintext login if the peer does not use TLS.
    first_bytes: Option<Zeroizing<Vec<u8>>>,
}

/// The memory of a client's connection that is charged to the budget.
#[derive(Debug)]
struct ChargedBytes {
    charge: MemoryCharge,
    /// During the handshake rustls may retain all bytes, because it joins the records of a message and stores certificates.
    is_handshaking: bool,
    /// Upper bound of the bytes in rustls.
    in_rustls: usize,
    /// Bytes that rustls retains until the connection ends.
    retained: usize,
}

impl ChargedBytes {
    /// rustls reads the next record, so it has consumed the previous one.
    fn record_consumed(&mut self) {
        if !self.is_handshaking {
            self.in_rustls = self.retained;
        }
    }

    /// `length` bytes of a record were passed to rustls, which decrypts data in place and then copies them.
    fn record_passed(&mut self, length: usize) {
        self.in_rustls += if self.is_handshaking { length } else { 2 * length };
    }
}

impl<S> RecordStream<S> {
    /// Wraps a socket from which nothing has been read.
    pub fn new(socket: S) -> Self {
        Self { socket, buffer: Vec::new(), start: 0, releasing: 0, charged: None, reads: 0, first_bytes: None }
    }

    /// Retains the first bytes for [`RecordStream::take_first_bytes`]. Nothing may have been read yet.
    #[must_use]
    pub fn with_first_bytes(self) -> Self {
        Self { first_bytes: Some(Zeroizing::default()), ..self }
    }

    /// Charges the buffered bytes to a client's connection.
    #[must_use]
    pub fn with_charge(self, charge: MemoryCharge) -> Self {
        let charged = ChargedBytes { charge, is_handshaking: true, in_rustls: 0, retained: 0 };
        Self { charged: Some(charged), ..self }
    }

    /// Records that the handshake is complete and that rustls retains `retained` bytes of it.
    pub fn handshake_completed(&mut self, retained: usize) {
        if let Some(charged) = &mut self.charged {
            (charged.is_handshaking, charged.in_rustls, charged.retained) = (false, retained, retained);
        }
        // A smaller charge is always allowed, and a larger one would fail at the next read.
        let _ = self.update_charge(self.buffer.capacity());
    }

    /// Takes the first bytes of the connection, up to 4 KiB.
    pub fn take_first_bytes(&mut self) -> Zeroizing<Vec<u8>> {
        self.first_bytes.take().unwrap_or_default()
    }

    /// The underlying socket.
    pub fn socket(&self) -> &S {
        &self.socket
    }

    /// Returns the socket, and the bytes that were read from it but not passed to rustls.
    pub fn into_parts(mut self) -> (S, Vec<u8>) {
        self.buffer.drain(..self.start);
        (self.socket, self.buffer)
    }

    /// Whether no record has been passed to rustls only in part.
    pub fn is_between_records(&self) -> bool {
        self.releasing == 0
    }

    /// Updates the charge to `buffer` bytes, the retained first bytes, and the bytes in rustls.
    fn update_charge(&mut self, buffer: usize) -> io::Result<()> {
        let Some(charged) = &mut self.charged else { return Ok(()) };
        let first = self.first_bytes.as_ref().map_or(0, |bytes| bytes.capacity());
        let result = charged.charge.resize(buffer + first + charged.in_rustls);
        result.map_err(|error| io::Error::new(io::ErrorKind::OutOfMemory, error))
    }

    /// Copies the bytes from `from` in the buffer to the first bytes, unless these are complete.
    fn copy_first_bytes(&mut self, from: usize) -> io::Result<()> {
        let Some(first_bytes) = &self.first_bytes else { return Ok(()) };
        let length = MAX_FIRST_BYTES.min(first_bytes.len() + self.buffer.len() - from);
        let (additional, capacity) = (length - first_bytes.len(), first_bytes.capacity());
        if length > capacity {
            let larger = length.next_power_of_two();
            self.update_charge(self.buffer.capacity() + larger)?;
            // A vector that grows by itself would leave a copy that is not wiped.
            let mut copy = Zeroizing::new(Vec::with_capacity(larger));
            if let Some(first_bytes) = &self.first_bytes {
                copy.extend_from_slice(first_bytes);
            }
            self.first_bytes = Some(copy);
        }
        if let Some(first_bytes) = &mut self.first_bytes {
            first_bytes.extend_from_slice(&self.buffer[from..from + additional]);
        }
        self.update_charge(self.buffer.capacity())
    }

    /// Number of bytes that may be passed to rustls: up to the end of the first record if it is complete.
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
        let length = self.releasing.min(to.remaining());
        if let Some(charged) = &mut self.charged {
            charged.record_passed(length);
        }
        self.update_charge(self.buffer.capacity())?;
        to.put_slice(&self.buffer[self.start..self.start + length]);
        self.start += length;
        self.releasing -= length;
        if self.start == self.buffer.len() {
            self.start = 0;
            self.buffer.clear();
            // Release the memory of a long record.
            self.buffer.shrink_to(READ_SIZE);
            self.update_charge(self.buffer.capacity())?;
        }
        Ok(())
    }
}

impl<S: AsyncRead + Unpin> RecordStream<S> {
    /// Reads once from the socket. Returns `false` at the end of the stream.
    fn poll_fill(&mut self, context: &mut Context<'_>) -> Poll<io::Result<bool>> {
        self.buffer.drain(..self.start);
        self.start = 0;
        let length = self.buffer.len();
        self.update_charge(self.buffer.capacity().max(length + READ_SIZE))?;
        self.buffer.reserve_exact(READ_SIZE);
        self.buffer.resize(length + READ_SIZE, 0);
        let mut space = ReadBuf::new(&mut self.buffer[length..]);
        let result = Pin::new(&mut self.socket).poll_read(context, &mut space);
        let read = space.filled().len();
        self.buffer.truncate(length + read);
        self.copy_first_bytes(length)?;
        ready!(result)?;
        Poll::Ready(Ok(read > 0))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for RecordStream<S> {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, to: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.releasing == 0
            && let Some(charged) = &mut self.charged
        {
            charged.record_consumed();
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
                // If the stream ends inside a record, rustls sees only the end.
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
    async fn records_are_passed_complete_and_one_at_a_time() {
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
                // A reader with a small buffer gets a record in pieces, but never a piece of an incomplete record.
                let mut piece = [0; 5];
                let mut left = length;
                while left > 0 {
                    let read = records.read(&mut piece).await.unwrap();
                    assert!(read <= left, "{read} bytes of a record with {left} bytes left");
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
            assert!(reads <= MAX_READS, "a read must wait after {MAX_READS} reads");
        }
        assert_eq!(records.read(&mut got).await.unwrap(), 6, "reading continues without another byte from the peer");
    }

    /// An admission control with a budget of `bytes`, and the ticket of its only connection.
    fn admission_with_budget(bytes: usize) -> (Arc<AdmissionControl>, PreloginTicket) {
        let config = config::AdmissionConfig { before_login_memory: bytes, ..Default::default() };
        let admission = Arc::new(AdmissionControl::new(&config, Instant::now()));
        let ticket = admission.enter_prelogin_queue(Instant::now()).unwrap();
        (admission, ticket)
    }

    /// Checks the charge at each stage of a connection whose client uses as much memory as it can.
    #[tokio::test]
    async fn received_bytes_are_charged_until_rustls_has_consumed_them() {
        const ALLOWANCE: usize = 8192;
        let record = [&[23, 3, 3, 0x40, 0][..], &[7; 0x4000]].concat();
        let (admission, ticket) = admission_with_budget(1 << 20);
        let (mut peer, socket) = duplex(1 << 16);
        let mut records = RecordStream::new(socket).with_charge(ticket.charge());
        peer.write_all(&record[..12_000]).await.unwrap();
        let mut got = vec![0; 32_768];
        let mut read = |records: &mut RecordStream<_>| records.read(&mut got).now_or_never().map(Result::unwrap);
        assert_eq!(read(&mut records), None);
        let partial = admission.prelogin_memory();
        assert!((12_000..=20_480).contains(&(partial + ALLOWANCE)), "{partial}: an incomplete record");
        peer.write_all(&record[12_000..]).await.unwrap();
        assert_eq!(read(&mut records), Some(record.len()));
        let handshake = admission.prelogin_memory() + ALLOWANCE;
        assert!(
            (record.len()..=record.len() + READ_SIZE).contains(&handshake),
            "{handshake}: rustls joins handshake messages"
        );
        records.handshake_completed(100);
        assert_eq!(
            admission.prelogin_memory(),
            0,
            "only the certificates of the handshake are retained, which the allowance covers"
        );
        peer.write_all(&record).await.unwrap();
        assert_eq!(read(&mut records), Some(record.len()));
        let data = admission.prelogin_memory() + ALLOWANCE;
        assert!(
            (2 * record.len()..=2 * record.len() + 2 * READ_SIZE).contains(&data),
            "{data}: encrypted and decrypted"
        );
        assert_eq!(read(&mut records), None);
        assert_eq!(admission.prelogin_memory(), 0, "rustls reads again, so it has consumed the record");
        drop(records);
    }

    #[tokio::test]
    async fn first_bytes_are_charged_while_retained_and_leave_no_unwiped_copy() {
        const ALLOWANCE: usize = 8192;
        let (admission, ticket) = admission_with_budget(1 << 20);
        let (mut peer, socket) = duplex(1 << 16);
        let mut records = RecordStream::new(socket).with_charge(ticket.charge()).with_first_bytes();
        let sent = [&[22, 3, 1, 0x40, 0][..], &[7; 8187]].concat();
        let mut capacities = Vec::new();
        for piece in sent.chunks(700) {
            peer.write_all(piece).await.unwrap();
            assert_eq!(records.read(&mut [0; 64]).now_or_never().map(Result::unwrap), None);
            capacities.push(records.first_bytes.as_ref().unwrap().capacity());
        }
        capacities.dedup();
        assert_eq!(capacities, [1024, 2048, 4096]);
        let charged = records.buffer.capacity() + MAX_FIRST_BYTES;
        assert_eq!(admission.prelogin_memory() + ALLOWANCE, charged);
        assert_eq!(records.take_first_bytes()[..], sent[..MAX_FIRST_BYTES]);
        records.handshake_completed(0);
        assert_eq!(admission.prelogin_memory(), (charged - MAX_FIRST_BYTES).saturating_sub(ALLOWANCE));
    }

    #[tokio::test]
    async fn long_record_is_not_read_to_its_end_without_budget() {
        let (_admission, ticket) = admission_with_budget(4096);
        let (mut peer, socket) = duplex(1 << 16);
        let mut records = RecordStream::new(socket).with_charge(ticket.charge());
        peer.write_all(&[&[22, 3, 1, 0x40, 0][..], &[1; 0x4000]].concat()).await.unwrap();
        let error = records.read(&mut [0; 64]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::OutOfMemory);
    }

    #[tokio::test]
    async fn bytes_that_are_not_a_record_are_passed_unchanged() {
        let (mut peer, socket) = duplex(64);
        peer.write_all(b"a1 LOGIN u p\r\n").await.unwrap();
        drop(peer);
        let mut got = Vec::new();
        RecordStream::new(socket).read_to_end(&mut got).await.unwrap();
        assert_eq!(got, b"a1 LOGIN u p\r\n");
    }
}
