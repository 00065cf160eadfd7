//! A connection to a client or a server until its login is complete, with TLS or without.
//!
//! Callers read and write without a distinction between the two. Handshakes are made by `tls`. After the login [`Stream::into_leg`]
//! makes the connection one side of a relay.

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

/// A connection to a client or a server.
#[derive(Debug)]
pub(crate) enum Stream {
    Plain(TcpStream),
    /// Boxed, because a TLS state takes a kilobyte, which a plain session does not need.
    Tls(Box<Encrypted>),
}

/// A connection with the TLS state of rustls.
#[derive(Debug)]
pub(crate) struct Encrypted {
    pub tls: TlsStream<RecordStream<TcpStream>>,
    /// The secrets that rustls has passed to its key log.
    pub secrets: Arc<TrafficSecrets>,
}

impl Stream {
    /// Properties of the TLS connection, for the log record and for servers.
    pub(crate) fn tls_info(&self) -> Option<TlsInfo> {
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
        Some(TlsInfo { version, server_name, alpn, certificate })
    }

    /// The cipher suite by its name in rustls, such as `TLS13_AES_128_GCM_SHA256`.
    pub(crate) fn cipher(&self) -> Option<&'static str> {
        let Self::Tls(encrypted) = self else { return None };
        encrypted.tls.get_ref().1.negotiated_cipher_suite()?.suite().as_str()
    }

    /// The peer's certificate, in DER.
    pub(crate) fn peer_certificate(&self) -> Option<&[u8]> {
        let Self::Tls(encrypted) = self else { return None };
        encrypted.tls.get_ref().1.peer_certificates()?.first().map(AsRef::as_ref)
    }

    /// Makes the connection one side of a relay, without rustls. Returns also the plaintext that has been received and not read.
    ///
    /// # Errors
    /// The connection broke, or the peer violated the TLS protocol.
    pub(crate) async fn into_leg(self) -> io::Result<(Leg<TcpStream>, Vec<u8>)> {
        match self {
            Self::Plain(socket) => Ok((Leg::plain(socket), Vec::new())),
            Self::Tls(encrypted) => {
                let taken = extract(encrypted.tls, &encrypted.secrets).await?;
                let leg = Leg::tls(taken.socket, taken.channel, taken.records);
                let leg = if taken.peer_closed { leg.with_peer_closed() } else { leg };
                Ok((leg, taken.plaintext))
            }
        }
    }
}

/// Properties of a TLS connection.
#[derive(Debug, Clone)]
pub(crate) struct TlsInfo {
    /// The negotiated version.
    pub version: TlsVersion,
    /// The server name that the client requested (SNI).
    pub server_name: Option<Box<str>>,
    /// Whether a protocol was negotiated by ALPN, which can only be `imap`.
    pub alpn: bool,
    /// Whether the client has sent a certificate, which was verified.
    pub certificate: bool,
}

/// A version of TLS, in one byte, because every session stores it. Versions before 1.2 are reported by balancers that terminate TLS.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TlsVersion {
    /// TLS 1.0.
    V10,
    /// TLS 1.1.
    V11,
    /// TLS 1.2.
    V12,
    /// TLS 1.3.
    V13,
    /// The balancer has not sent a version.
    Unknown,
}

impl TlsVersion {
    /// The version with this name; names are those of log records.
    pub(crate) fn named(name: &str) -> Self {
        [Self::V10, Self::V11, Self::V12, Self::V13]
            .into_iter()
            .find(|version| version.as_str() == name)
            .unwrap_or(Self::Unknown)
    }

    /// The name in log records.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::V10 => "TLSv1.0",
            Self::V11 => "TLSv1.1",
            Self::V12 => "TLSv1.2",
            Self::V13 => "TLSv1.3",
            Self::Unknown => "unknown",
        }
    }
}

/// Maximum keepalive time that Linux accepts (MAX_TCP_KEEPIDLE): nine hours.
const MAX_KEEPALIVE: Duration = Duration::from_secs(32_767);

/// Enables TCP keepalive: after `time` of silence three probes are sent at intervals of a quarter of it, so that the session ends if
/// its peer has disappeared.
///
/// An error is logged and otherwise ignored, because the connection works without keepalive.
pub(crate) fn set_keepalive(socket: impl AsFd, time: Duration) {
    let time = time.min(MAX_KEEPALIVE);
    let probes = TcpKeepalive::new().with_time(time).with_interval(time / 4).with_retries(3);
    if let Err(error) = SockRef::from(&socket).set_tcp_keepalive(&probes) {
        tracing::debug!(%error, "keepalive could not be enabled");
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
    fn keepalive_is_set_for_every_time_that_the_configuration_allows() {
        for seconds in [10, 120, 32_767, 86_400] {
            let socket = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
            set_keepalive(&socket, Duration::from_secs(seconds));
            let set = SockRef::from(&socket).tcp_keepalive_time().unwrap();
            assert_eq!(set, Duration::from_secs(seconds.min(32_767)));
            assert!(SockRef::from(&socket).keepalive().unwrap());
        }
    }
}
