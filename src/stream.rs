//! One connection before its login is done, plain or encrypted, to a client or to a server.
//!
//! The rest of the code reads and writes without knowing which it is. This room starts no handshake (`tls` does). When the login is done, [`Stream::into_leg`] makes it one side of
//! a relay. Called by `session` and `backend::connect`.

use std::io;
use std::os::fd::AsFd;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::TlsStream;

use crate::relay::Leg;
use crate::tls::handover::{Secrets, take_over};
use crate::tls::records::Records;

/// A connection.
#[derive(Debug)]
pub enum Stream {
    /// Plain TCP.
    Plain(TcpStream),
    /// TLS over TCP; boxed, for a TLS state is a thousand bytes and a plain session shall not carry it.
    Tls(Box<Encrypted>),
}

/// A connection that rustls has.
#[derive(Debug)]
pub struct Encrypted {
    /// rustls and the socket.
    pub tls: TlsStream<Records<TcpStream>>,
    /// What its key log told.
    pub secrets: Arc<Secrets>,
}

impl Stream {
    /// TLS version and server name, for the log record: `("TLSv1_3", "imap.example.org")`.
    pub fn tls_facts(&self) -> Option<TlsFacts> {
        let Self::Tls(encrypted) = self else { return None };
        let common = encrypted.tls.get_ref().1;
        let version = common.protocol_version().and_then(|version| version.as_str()).unwrap_or("unknown");
        let server_name = match &encrypted.tls {
            TlsStream::Server(server) => server.get_ref().1.server_name().map(Into::into),
            TlsStream::Client(_) => None,
        };
        Some(TlsFacts { version, server_name })
    }

    /// The certificate the other side has shown, in DER.
    pub fn peer_certificate(&self) -> Option<&[u8]> {
        let Self::Tls(encrypted) = self else { return None };
        encrypted.tls.get_ref().1.peer_certificates()?.first().map(AsRef::as_ref)
    }

    /// The connection as one side of a relay, without rustls, and what it has received that nobody has read.
    ///
    /// # Errors
    /// The connection broke, or TLS did.
    pub async fn into_leg(self) -> io::Result<(Leg<TcpStream>, Vec<u8>)> {
        match self {
            Self::Plain(socket) => Ok((Leg::plain(socket), Vec::new())),
            Self::Tls(encrypted) => {
                let taken = take_over(encrypted.tls, &encrypted.secrets).await?;
                Ok((Leg::tls(taken.socket, taken.channel, taken.records, taken.closed), taken.plaintext))
            }
        }
    }
}

/// What a log record says of a TLS connection.
#[derive(Debug, Clone)]
pub struct TlsFacts {
    /// As rustls writes it: `TLSv1_2`, `TLSv1_3`.
    pub version: &'static str,
    /// The name the client asked for (SNI).
    pub server_name: Option<Box<str>>,
}

/// Probes after `time` of silence, three, a quarter of that apart: so that a session whose peer is gone is noticed to be
/// dead.
///
/// A failure is logged and otherwise ignored: a connection without keepalive still carries mail.
pub fn keep_alive(socket: impl AsFd, time: Duration) {
    let probes = TcpKeepalive::new().with_time(time).with_interval(time / 4).with_retries(3);
    if let Err(error) = SockRef::from(&socket).set_tcp_keepalive(&probes) {
        tracing::debug!(%error, "no keepalive");
    }
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(socket) => Pin::new(socket).poll_read(context, buffer),
            Self::Tls(encrypted) => {
                let read = Pin::new(&mut encrypted.tls).poll_read(context, buffer);
                // What was read may want an answer of TLS itself (a key update, a renegotiation that is refused), for which
                // a peer may wait before it says more. An error of the write is one of the next read, too.
                if encrypted.tls.get_ref().1.wants_write() {
                    let _ = Pin::new(&mut encrypted.tls).poll_flush(context);
                }
                read
            }
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(socket) => Pin::new(socket).poll_write(context, bytes),
            Self::Tls(encrypted) => Pin::new(&mut encrypted.tls).poll_write(context, bytes),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(socket) => Pin::new(socket).poll_flush(context),
            Self::Tls(encrypted) => Pin::new(&mut encrypted.tls).poll_flush(context),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(socket) => Pin::new(socket).poll_shutdown(context),
            Self::Tls(encrypted) => Pin::new(&mut encrypted.tls).poll_shutdown(context),
        }
    }
}
