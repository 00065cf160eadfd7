//! One connection, plain or encrypted, to a client or to a server.
//!
//! The rest of the code reads and writes without knowing which it is. This room sets the socket options that every
//! connection has and starts no handshake (`tls` does). Called by `session`, `backend::connect` and `relay`.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::TlsStream;

/// A connection.
#[derive(Debug)]
pub enum Stream {
    /// Plain TCP.
    Plain(TcpStream),
    /// TLS over TCP; boxed, for a TLS state is a thousand bytes and a plain session shall not carry it.
    Tls(Box<TlsStream<TcpStream>>),
}

impl Stream {
    /// The socket below.
    pub fn socket(&self) -> &TcpStream {
        match self {
            Self::Plain(socket) => socket,
            Self::Tls(tls) => tls.get_ref().0,
        }
    }

    /// TLS version and server name, for the log record: `("TLSv1_3", "imap.example.org")`.
    pub fn tls_facts(&self) -> Option<TlsFacts> {
        let Self::Tls(tls) = self else { return None };
        let common = tls.get_ref().1;
        let version = common.protocol_version().and_then(|version| version.as_str()).unwrap_or("unknown");
        let server_name = match &**tls {
            TlsStream::Server(server) => server.get_ref().1.server_name().map(str::to_owned),
            TlsStream::Client(_) => None,
        };
        Some(TlsFacts { version, server_name })
    }
}

/// What a log record says of a TLS connection.
#[derive(Debug, Clone)]
pub struct TlsFacts {
    /// As rustls writes it: `TLSv1_2`, `TLSv1_3`.
    pub version: &'static str,
    /// The name the client asked for (SNI).
    pub server_name: Option<String>,
}

/// Options of every connection: no Nagle delay, keepalive probes after `keepalive` of silence (three, a quarter of that apart).
///
/// Failures are logged and otherwise ignored: a connection without keepalive still carries mail.
pub fn set_options(socket: &TcpStream, keepalive: Option<Duration>) {
    let options = || -> io::Result<()> {
        socket.set_nodelay(true)?;
        if let Some(time) = keepalive {
            let probes = TcpKeepalive::new().with_time(time).with_interval(time / 4).with_retries(3);
            SockRef::from(socket).set_tcp_keepalive(&probes)?;
        }
        Ok(())
    };
    if let Err(error) = options() {
        tracing::debug!(%error, "socket options not set");
    }
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(socket) => Pin::new(socket).poll_read(context, buffer),
            Self::Tls(tls) => Pin::new(tls).poll_read(context, buffer),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(socket) => Pin::new(socket).poll_write(context, bytes),
            Self::Tls(tls) => Pin::new(tls).poll_write(context, bytes),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(socket) => Pin::new(socket).poll_flush(context),
            Self::Tls(tls) => Pin::new(tls).poll_flush(context),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(socket) => Pin::new(socket).poll_shutdown(context),
            Self::Tls(tls) => Pin::new(tls).poll_shutdown(context),
        }
    }
}
