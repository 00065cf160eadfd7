//! Step 1 of a session: the PROXY header of a balancer, which names the client.
//!
//! Exactly the header is read, because the bytes after it may be the client's TLS. On a listener with `proxy_protocol` only the
//! configured balancers may connect, because any client can write a header.

use std::io;
use std::net::SocketAddr;

use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;

use super::log_record::Record;
use super::{Session, SessionEnded, id};
use crate::deadline::Deadline;
use crate::failure::Reason;
use crate::metrics::BalancerCheck;
use crate::protocol::proxy_protocol::{Header, Origin, parse};
use crate::snapshot::Snapshot;
use crate::stream::{TlsInfo, TlsVersion};

/// Size of one read. Most headers arrive in one piece that fits.
const READ: usize = 512;

/// The content of a header.
struct ProxyInfo {
    origin: Origin,
    tls: Option<TlsInfo>,
}

impl Session {
    /// Reads the header if the listener expects one. If it is invalid, the connection closes without a reply.
    pub(super) async fn read_proxy_header(&mut self, socket: &mut TcpStream) -> Result<(), SessionEnded> {
        let snapshot = self.snapshot.clone();
        // The listener has checked the address of the balancer.
        if snapshot.config.listeners[self.listener].proxy_protocol.is_none() {
            return Ok(());
        }
        let deadline = self.login_deadline.min(Deadline::after(snapshot.limits.proxy_header));
        let header = tokio::select! {
            header = deadline.limit(read_header(socket)) => header,
            ending = self.termination() => {
                self.record.record_failure(ending.reason);
                return Err(SessionEnded);
            }
        };
        match header {
            Ok(Ok(None)) => {
                snapshot.metrics.listener(self.listener).balancer_check(BalancerCheck::Connect);
                self.record.set_balancer_check();
                Err(SessionEnded)
            }
            Ok(Ok(Some(info))) => {
                let is_check = matches!(info.origin, Origin::Local);
                self.apply_proxy_info(info);
                if is_check { Ok(()) } else { self.admit_proxied_client(socket) }
            }
            Ok(Err(fault)) => Err(self.invalid_proxy_header(fault)),
            Err(_) => Err(self.invalid_proxy_header("no PROXY header within limits.proxy_header".to_owned())),
        }
    }

    fn apply_proxy_info(&mut self, info: ProxyInfo) {
        let balancer = self.peer;
        match info.origin {
            Origin::Client { client, listener } => {
                (self.peer, self.local, self.is_proxied) = (client, listener, true);
            }
            Origin::Local => {
                self.snapshot.metrics.listener(self.listener).balancer_check(BalancerCheck::Local);
                self.record.set_balancer_check();
            }
            Origin::Unknown => {}
        }
        self.record.set_proxied(id::new(self.peer), self.peer, self.local, info.tls);
        let session = self.record.session();
        tracing::debug!(session = session.as_str(), %balancer, origin = info.origin.as_str(), "PROXY header read");
    }

    fn invalid_proxy_header(&mut self, fault: String) -> SessionEnded {
        self.record.set_detail(fault);
        self.record.record_failure(Reason::ProxyHeader);
        SessionEnded
    }
}

/// Writes the log record of a connection that was closed because its address is not in `proxy_protocol.from`.
pub(crate) fn log_unknown_balancer(socket: &TcpStream, peer: SocketAddr, listener: SocketAddr, snapshot: &Snapshot) {
    let local = socket.local_addr().unwrap_or(listener);
    let mut record = Record::new(id::new(peer), peer, local, snapshot.session_settings.clone());
    record.set_detail("the address is not in proxy_protocol.from".to_owned());
    record.record_failure(Reason::ProxyHeader);
}

/// Reads up to the end of the header and not further. Returns `None` if the balancer closed without sending a byte, which is a
/// check whether the listener accepts connections. The error is the detail of the log record.
async fn read_header(socket: &mut TcpStream) -> Result<Option<ProxyInfo>, String> {
    let mut bytes = Vec::new();
    loop {
        let known = bytes.len();
        bytes.resize(known + READ, 0);
        let peeked = match socket.peek(&mut bytes[known..]).await {
            Ok(peeked) => peeked,
            Err(error) if known == 0 && error.kind() == io::ErrorKind::ConnectionReset => 0,
            Err(error) => return Err(error.to_string()),
        };
        if peeked == 0 {
            return if known == 0 { Ok(None) } else { Err("the connection closed within a PROXY header".to_owned()) };
        }
        bytes.truncate(known + peeked);
        let header = parse(&bytes).map_err(|malformed| malformed.to_string())?;
        // If the header is incomplete, all bytes belong to it.
        let length = header.as_ref().map_or(bytes.len(), |header| header.length);
        let info = header.map(ProxyInfo::from);
        // Takes the bytes that were peeked, up to the end of the header.
        socket.read_exact(&mut bytes[known..length]).await.map_err(|error| error.to_string())?;
        if info.is_some() {
            return Ok(info);
        }
    }
}

impl From<Header<'_>> for ProxyInfo {
    fn from(header: Header<'_>) -> Self {
        let origin = match header.origin {
            // A balancer may send an IPv4 address in IPv6 notation.
            Origin::Client { client, listener } => {
                Origin::Client { client: canonical(client), listener: canonical(listener) }
            }
            other => other,
        };
        let tls = header.tls.map(|tls| TlsInfo {
            version: TlsVersion::named(tls.version),
            server_name: tls.server_name.map(Into::into),
            alpn: tls.alpn,
            certificate: tls.certificate,
        });
        Self { origin, tls }
    }
}

fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}
