//! Takes an established connection from rustls: its secrets become a channel of the record layer.
//!
//! rustls hands over keys and sequence numbers; the traffic secrets behind them, which KeyUpdate needs, its key log tells
//! during the handshake, to a [`TrafficSecrets`] that belongs to the one connection. Everything rustls has read is decrypted and
//! carried along, and so is what it never saw, so that no byte is lost at the moment of the change. Kernel TLS would begin here
//! too; `benches/NOTES.md` says what it takes. Called by `stream`.
//!
//! Two states of rustls cannot be extracted and must be empty at that moment: an answer that waits to be sent, which [`extract`] sends
//! first, and a handshake message of which only some records have arrived. [`poll_read`] therefore reads one record with
//! data at a time: no such message can be incomplete when data arrives (RFC 8446 section 5.1), and later records stay in [`RecordStream`].

use std::io::{self, Read, Write};
use std::pin::Pin;
use std::sync::{Mutex, PoisonError};
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncBufRead, AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio_rustls::TlsStream;
use tokio_rustls::rustls::{self, KeyLog, ProtocolVersion};
use zeroize::Zeroizing;

use super::record_stream::RecordStream;
use crate::record_layer::{Channel, Keys, Role, Version};

/// The traffic secrets of one connection (TLS 1.3), as its handshake told them.
#[derive(Default)]
pub struct TrafficSecrets(Mutex<Told>);

#[derive(Default)]
struct Told {
    client: Zeroizing<Vec<u8>>,
    server: Zeroizing<Vec<u8>>,
}

const CLIENT: &str = "CLIENT_TRAFFIC_SECRET_0";
const SERVER: &str = "SERVER_TRAFFIC_SECRET_0";

impl KeyLog for TrafficSecrets {
    fn log(&self, label: &str, _client_random: &[u8], secret: &[u8]) {
        let mut told = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match label {
            CLIENT => told.client = Zeroizing::new(secret.to_vec()),
            SERVER => told.server = Zeroizing::new(secret.to_vec()),
            _ => {}
        }
    }

    fn will_log(&self, label: &str) -> bool {
        matches!(label, CLIENT | SERVER)
    }
}

impl std::fmt::Debug for TrafficSecrets {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("TrafficSecrets")
    }
}

/// A connection without rustls.
#[derive(Debug)]
pub struct Established<S> {
    /// The socket, open both ways.
    pub socket: S,
    /// Seals and opens from here on.
    pub channel: Channel,
    /// Already decrypted, and read by nobody yet.
    pub plaintext: Vec<u8>,
    /// Already read from the socket, and not yet opened.
    pub records: Vec<u8>,
    /// The peer has said that it will send no more.
    pub closed: bool,
}

/// Reads from one record with data, and sends the answer that a record before it asked for (a KeyUpdate, or the alert that declines a
/// renegotiation): a peer may wait for the answer. An error of that write is also an error of the next read.
pub fn poll_read<S>(
    stream: &mut TlsStream<RecordStream<S>>,
    context: &mut Context<'_>,
    buffer: &mut ReadBuf<'_>,
) -> Poll<io::Result<()>>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let read = poll_read_record(stream, context, buffer);
    // One answer at a time moves out of its slot, so a peer that reads nothing cannot make the buffer behind it grow.
    let queued = stream.get_ref().1.wants_write() || queue_answer(stream).is_ok();
    if queued && stream.get_ref().1.wants_write() {
        let _ = Pin::new(stream).poll_flush(context);
    }
    read
}

/// `TlsStream::poll_read` would go on with the next records while `buffer` has space.
fn poll_read_record<S>(
    stream: &mut TlsStream<RecordStream<S>>,
    context: &mut Context<'_>,
    buffer: &mut ReadBuf<'_>,
) -> Poll<io::Result<()>>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let plaintext = ready!(Pin::new(&mut *stream).poll_fill_buf(context))?;
    let length = plaintext.len().min(buffer.remaining());
    buffer.put_slice(&plaintext[..length]);
    Pin::new(stream).consume(length);
    Poll::Ready(Ok(()))
}

/// Moves the answer to a KeyUpdate to the bytes that are to be sent. rustls does so at the next write, even an empty one.
fn queue_answer<S>(stream: &mut TlsStream<S>) -> io::Result<()> {
    let mut writer = match stream {
        TlsStream::Server(stream) => stream.get_mut().1.writer(),
        TlsStream::Client(stream) => stream.get_mut().1.writer(),
    };
    // Not `write_all`, which does nothing if there is nothing to write.
    writer.write(&[]).map(drop)
}

/// Takes the connection over. What rustls still had to send is sent first.
///
/// # Errors
/// The connection broke, or rustls found something wrong with it.
pub async fn extract<S>(mut stream: TlsStream<RecordStream<S>>, secrets: &TrafficSecrets) -> io::Result<Established<S>>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    queue_answer(&mut stream)?;
    stream.flush().await?;
    let (records, connection) = match stream {
        TlsStream::Server(stream) => {
            let (records, connection) = stream.into_inner();
            (records, rustls::Connection::Server(connection))
        }
        TlsStream::Client(stream) => {
            let (records, connection) = stream.into_inner();
            (records, rustls::Connection::Client(connection))
        }
    };
    debug_assert!(records.is_between_records());
    let (plaintext, closed, channel) = extract_channel(connection, secrets)?;
    let (socket, records) = records.into_parts();
    Ok(Established { socket, channel, plaintext, records, closed })
}

fn extract_channel(
    mut connection: rustls::Connection,
    secrets: &TrafficSecrets,
) -> io::Result<(Vec<u8>, bool, Channel)> {
    let mut plaintext = Vec::new();
    let closed = match connection.reader().read_to_end(&mut plaintext) {
        Ok(_) => true,
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => false,
        // The stream ended without close_notify: an end all the same.
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => true,
        Err(error) => return Err(error),
    };
    let role = match &connection {
        rustls::Connection::Client(_) => Role::Client,
        rustls::Connection::Server(_) => Role::Server,
    };
    let version = match connection.protocol_version() {
        Some(ProtocolVersion::TLSv1_3) => Version::Tls13,
        _ => Version::Tls12,
    };
    let extracted = connection.dangerous_extract_secrets().map_err(io::Error::other)?;
    let told = secrets.0.lock().unwrap_or_else(PoisonError::into_inner);
    let (send, receive) = match role {
        Role::Client => (&told.client, &told.server),
        Role::Server => (&told.server, &told.client),
    };
    let unknown = || io::Error::other("a cipher the record layer does not know");
    let receive = Keys::new(&extracted.rx.1, extracted.rx.0, receive).ok_or_else(unknown)?;
    let send = Keys::new(&extracted.tx.1, extracted.tx.0, send).ok_or_else(unknown)?;
    Ok((plaintext, closed, Channel::new(version, role, receive, send)))
}

#[cfg(test)]
mod tests;
