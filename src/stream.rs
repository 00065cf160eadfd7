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
use tokio_rustls::rustls::ProtocolVersion;

use crate::relay::Leg;
use crate::tls::extraction::{self, TrafficSecrets, extract};
use crate::tls::record_stream::RecordStream;

/// A connection.
#[derive(Debug)]
pub(crate) enum Stream {
    /// Plain TCP.
    Plain(TcpStream),
    /// TLS over TCP; boxed, for a TLS state is a thousand bytes and a plain session shall not carry it.
    Tls(Box<Encrypted>),
}

/// A connection that rustls has.
#[derive(Debug)]
pub(crate) struct Encrypted {
    /// rustls and the socket.
    pub tls: TlsStream<RecordStream<TcpStream>>,
    /// What its key log told.
    pub secrets: Arc<TrafficSecrets>,
}

impl Stream {
    /// How the other side came, for the log record and for servers.
    pub(crate) fn tls_facts(&self) -> Option<TlsFacts> {
        let Self::Tls(encrypted) = self else { return None };
        let common = encrypted.tls.get_ref().1;
        let version = match common.protocol_version() {
            Some(ProtocolVersion::TLSv1_3) => TlsVersion::V13,
            Some(ProtocolVersion::TLSv1_2) => TlsVersion::V12,
            _ => TlsVersion::Unknown,
        };
        let server_name = match &encrypted.tls {
            TlsStream::Server(server) => server.get_ref().1.server_name().map(Into::into),
            TlsStream::Client(_) => None,
        };
        let alpn = common.alpn_protocol().is_some();
        let certificate = common.peer_certificates().is_some();
        Some(TlsFacts { version, server_name, alpn, certificate })
    }

    /// The cipher suite, as rustls calls it: `TLS13_AES_128_GCM_SHA256`.
    pub(crate) fn cipher(&self) -> Option<&'static str> {
        let Self::Tls(encrypted) = self else { return None };
        encrypted.tls.get_ref().1.negotiated_cipher_suite()?.suite().as_str()
    }

    /// The certificate the other side has shown, in DER.
    pub(crate) fn peer_certificate(&self) -> Option<&[u8]> {
        let Self::Tls(encrypted) = self else { return None };
        encrypted.tls.get_ref().1.peer_certificates()?.first().map(AsRef::as_ref)
    }

    /// The connection as one side of a relay, without rustls, and what it has received that nobody has read.
    ///
    /// # Errors
    /// The connection broke, or TLS did.
    pub(crate) async fn into_leg(self) -> io::Result<(Leg<TcpStream>, Vec<u8>)> {
        match self {
            Self::Plain(socket) => Ok((Leg::plain(socket), Vec::new())),
            Self::Tls(encrypted) => {
                let taken = extract(encrypted.tls, &encrypted.secrets).await?;
                let leg = Leg::tls(taken.socket, taken.channel, taken.records);
                let leg = if taken.closed { leg.with_peer_closed() } else { leg };
                Ok((leg, taken.plaintext))
            }
        }
    }
}

/// What a log record says of a TLS connection.
#[derive(Debug, Clone)]
pub struct TlsFacts {
    /// Which.
    pub version: TlsVersion,
    /// The name the client asked for (SNI).
    pub server_name: Option<Box<str>>,
    /// Whether ALPN agreed on something, which can only be `imap`.
    pub alpn: bool,
    /// Whether the client showed a certificate, which was verified.
    pub certificate: bool,
}

/// A version of TLS, in one byte: sessions keep it. The old ones are those of balancers that ended TLS ahead of us.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TlsVersion {
    /// 1.0.
    V10,
    /// 1.1.
    V11,
    /// 1.2.
    V12,
    /// 1.3.
    V13,
    /// Nobody said.
    Unknown,
}

impl TlsVersion {
    /// By its name in log records.
    pub fn named(name: &str) -> Self {
        [Self::V10, Self::V11, Self::V12, Self::V13]
            .into_iter()
            .find(|version| version.as_str() == name)
            .unwrap_or(Self::Unknown)
    }

    /// The name in log records.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::V10 => "TLSv1.0",
            Self::V11 => "TLSv1.1",
            Self::V12 => "TLSv1.2",
            Self::V13 => "TLSv1.3",
            Self::Unknown => "unknown",
        }
    }
}

/// Linux refuses longer times for keepalive (MAX_TCP_KEEPIDLE): nine hours.
const LONGEST_KEEPALIVE: Duration = Duration::from_secs(32_767);

/// Probes after `time` of silence, three, a quarter of that apart: so that a session whose peer is gone is noticed to be
/// dead.
///
/// A failure is logged and otherwise ignored: a connection without keepalive still carries mail.
pub(crate) fn keep_alive(socket: impl AsFd, time: Duration) {
    let time = time.min(LONGEST_KEEPALIVE);
    let probes = TcpKeepalive::new().with_time(time).with_interval(time / 4).with_retries(3);
    if let Err(error) = SockRef::from(&socket).set_tcp_keepalive(&probes) {
        tracing::debug!(%error, "no keepalive");
    }
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(socket) => Pin::new(socket).poll_read(context, buffer),
            Self::Tls(encrypted) => extraction::poll_read(&mut encrypted.tls, context, buffer),
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_keepalive_that_the_configuration_allows_is_set() {
        for seconds in [10, 120, 32_767, 86_400] {
            let socket = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
            keep_alive(&socket, Duration::from_secs(seconds));
            let set = SockRef::from(&socket).tcp_keepalive_time().unwrap();
            assert_eq!(set, Duration::from_secs(seconds.min(32_767)));
            assert!(SockRef::from(&socket).keepalive().unwrap());
        }
    }
}
