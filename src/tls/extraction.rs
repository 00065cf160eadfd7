//! Takes an established connection out of rustls: its secrets become a channel of the record layer.
//!
//! rustls returns the keys and sequence numbers. KeyUpdate also needs the traffic secrets, which the key log reports during the handshake to
//! the [`TrafficSecrets`] of the connection. Data that rustls has decrypted and records that it has not seen are returned too, so no byte is
//! lost. `benches/NOTES.md` describes how kernel TLS could be added here.
//!
//! Two states of rustls cannot be extracted, so neither may exist at that moment: an answer that waits to be sent, which [`extract`] sends
//! first, and a handshake message of which only some records have arrived. [`poll_read`] therefore reads only one record with data at a
//! time: no handshake message can be incomplete when data arrives (RFC 8446 section 5.1), and later records stay in [`RecordStream`].

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

/// The traffic secrets of one TLS 1.3 connection, reported by the key log of its handshake.
#[derive(Default)]
pub struct TrafficSecrets(Mutex<SecretPair>);

#[derive(Default)]
struct SecretPair {
    client: Zeroizing<Vec<u8>>,
    server: Zeroizing<Vec<u8>>,
}

const CLIENT_LABEL: &str = "CLIENT_TRAFFIC_SECRET_0";
const SERVER_LABEL: &str = "SERVER_TRAFFIC_SECRET_0";

impl KeyLog for TrafficSecrets {
    fn log(&self, label: &str, _client_random: &[u8], secret: &[u8]) {
        let mut secrets = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match label {
            CLIENT_LABEL => secrets.client = Zeroizing::new(secret.to_vec()),
            SERVER_LABEL => secrets.server = Zeroizing::new(secret.to_vec()),
            _ => {}
        }
    }

    fn will_log(&self, label: &str) -> bool {
        matches!(label, CLIENT_LABEL | SERVER_LABEL)
    }
}

impl std::fmt::Debug for TrafficSecrets {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("TrafficSecrets")
    }
}

/// A connection that was taken out of rustls.
#[derive(Debug)]
pub struct ExtractedConnection<S> {
    /// The socket. Neither direction is closed.
    pub socket: S,
    /// Seals and opens the next records.
    pub channel: Channel,
    /// Data that rustls decrypted and that was not read from it.
    pub plaintext: Vec<u8>,
    /// Records that were read from the socket and not yet opened.
    pub records: Vec<u8>,
    /// Whether the peer has sent its last record.
    pub peer_closed: bool,
}

/// Reads from one record with data, and sends the answer that an earlier record requested (a KeyUpdate, or the alert that declines a
/// renegotiation), because the peer may wait for it. If sending fails, the next read fails too.
pub fn poll_read<S>(
    stream: &mut TlsStream<RecordStream<S>>,
    context: &mut Context<'_>,
    buffer: &mut ReadBuf<'_>,
) -> Poll<io::Result<()>>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let read = poll_read_record(stream, context, buffer);
    // Only one answer at a time is moved to the send buffer, so a peer that reads nothing cannot make the buffer grow.
    let queued = stream.get_ref().1.wants_write() || queue_answer(stream).is_ok();
    if queued && stream.get_ref().1.wants_write() {
        let _ = Pin::new(stream).poll_flush(context);
    }
    read
}

/// Reads from one record with data. `TlsStream::poll_read` would read further records while `buffer` has space.
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

/// Moves a pending answer to a KeyUpdate into the send buffer. rustls does so at the next write, even if that is empty.
fn queue_answer<S>(stream: &mut TlsStream<S>) -> io::Result<()> {
    let mut writer = match stream {
        TlsStream::Server(stream) => stream.get_mut().1.writer(),
        TlsStream::Client(stream) => stream.get_mut().1.writer(),
    };
    // `write_all` would not call `write` for an empty slice.
    writer.write(&[]).map(drop)
}

/// Takes the connection out of rustls, after sending what rustls has buffered.
///
/// # Errors
/// The connection failed, or rustls reported a protocol error.
pub async fn extract<S>(
    mut stream: TlsStream<RecordStream<S>>,
    secrets: &TrafficSecrets,
) -> io::Result<ExtractedConnection<S>>
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
    let (plaintext, peer_closed, channel) = extract_channel(connection, secrets)?;
    let (socket, records) = records.into_parts();
    Ok(ExtractedConnection { socket, channel, plaintext, records, peer_closed })
}

fn extract_channel(
    mut connection: rustls::Connection,
    secrets: &TrafficSecrets,
) -> io::Result<(Vec<u8>, bool, Channel)> {
    let mut plaintext = Vec::new();
    let peer_closed = match connection.reader().read_to_end(&mut plaintext) {
        Ok(_) => true,
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => false,
        // The stream ended without close_notify.
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
    let secrets = secrets.0.lock().unwrap_or_else(PoisonError::into_inner);
    let (send, receive) = match role {
        Role::Client => (&secrets.client, &secrets.server),
        Role::Server => (&secrets.server, &secrets.client),
    };
    let unknown = || io::Error::other("the record layer does not support the cipher");
    let receive = Keys::new(&extracted.rx.1, extracted.rx.0, receive).ok_or_else(unknown)?;
    let send = Keys::new(&extracted.tx.1, extracted.tx.0, send).ok_or_else(unknown)?;
    Ok((plaintext, peer_closed, Channel::new(version, role, receive, send)))
}

#[cfg(test)]
mod tests;
