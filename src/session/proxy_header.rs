//! Step 1 of a session: behind a balancer, whose connection it is.
//!
//! The balancer's header is read, and not one byte of what follows it, which may be the client's TLS. Where the configuration
//! names balancers nobody else is let in, for anybody can write a header. Called by `session`.

use std::io;
use std::net::SocketAddr;

use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;

use super::log_record::Record;
use super::{Session, id};
use crate::deadline::Deadline;
use crate::failure::Reason;
use crate::metrics::BalancerCheck;
use crate::protocol::proxy_protocol::{Header, Origin, parse};
use crate::snapshot::Snapshot;
use crate::stream::{TlsFacts, TlsVersion};

/// Most headers come in one piece that fits.
const READ: usize = 512;

/// What a header has said.
struct Said {
    origin: Origin,
    tls: Option<TlsFacts>,
}

impl Session {
    /// `None`: the session is over, without a word.
    pub(super) async fn introduced(&mut self, socket: &mut TcpStream) -> Option<()> {
        let snapshot = self.snapshot.clone();
        // The listener has checked the address of the balancer.
        if snapshot.config.listeners[self.listener].proxy_protocol.is_none() {
            return Some(());
        }
        let due = self.login_by.min(Deadline::after(snapshot.limits.proxy_header));
        let said = tokio::select! {
            said = due.limit(header(socket)) => said,
            () = self.drain.begun().cancelled() => {
                self.record.failed(Reason::Drain);
                return None;
            }
            () = self.shed() => {
                let (_, reason) = self.why_shed();
                self.record.failed(reason);
                return None;
            }
        };
        match said {
            Ok(Ok(None)) => {
                snapshot.metrics.listener(self.listener).balancer_check(BalancerCheck::Connect);
                self.record.is_check();
                None
            }
            Ok(Ok(Some(said))) => {
                let is_check = matches!(said.origin, Origin::Local);
                self.believe(said);
                if is_check { Some(()) } else { self.may_come_in(socket) }
            }
            Ok(Err(fault)) => self.not_introduced(fault),
            Err(_) => self.not_introduced("no PROXY header within limits.proxy_header".to_owned()),
        }
    }

    fn believe(&mut self, said: Said) {
        let balancer = self.peer;
        match said.origin {
            Origin::Client { client, listener } => {
                (self.peer, self.local, self.is_proxied) = (client, listener, true);
            }
            Origin::Local => {
                self.snapshot.metrics.listener(self.listener).balancer_check(BalancerCheck::Local);
                self.record.is_check();
            }
            Origin::Unknown => {}
        }
        self.record.introduced(id::new(self.peer), self.peer, self.local, said.tls);
        let session = self.record.session();
        tracing::debug!(session = session.as_str(), %balancer, origin = said.origin.as_str(), "introduced by a PROXY header");
    }

    fn not_introduced(&mut self, fault: String) -> Option<()> {
        self.record.detail(fault);
        self.record.failed(Reason::ProxyHeader);
        None
    }
}

/// Records a connection that was closed because its address is not among those of `proxy_protocol.from`.
pub(crate) fn unknown_balancer(socket: &TcpStream, peer: SocketAddr, listener: SocketAddr, snapshot: &Snapshot) {
    let local = socket.local_addr().unwrap_or(listener);
    let mut record = Record::new(id::new(peer), peer, local, snapshot.session_settings.clone());
    record.detail("the address is not among those of proxy_protocol.from".to_owned());
    record.failed(Reason::ProxyHeader);
}

/// Reads up to the end of the header, and no further. `None`: the balancer closed without a byte, as it does to see
/// whether the listener is there. The error is a sentence for the operator.
async fn header(socket: &mut TcpStream) -> Result<Option<Said>, String> {
    let mut seen = Vec::new();
    loop {
        let known = seen.len();
        seen.resize(known + READ, 0);
        let peeked = match socket.peek(&mut seen[known..]).await {
            Ok(peeked) => peeked,
            Err(error) if known == 0 && error.kind() == io::ErrorKind::ConnectionReset => 0,
            Err(error) => return Err(error.to_string()),
        };
        if peeked == 0 {
            return if known == 0 { Ok(None) } else { Err("the connection closed within a PROXY header".to_owned()) };
        }
        seen.truncate(known + peeked);
        let header = parse(&seen).map_err(|malformed| malformed.to_string())?;
        // All that is there belongs to a header that is not complete.
        let length = header.as_ref().map_or(seen.len(), |header| header.length);
        let said = header.map(Said::from);
        // The same bytes again, which are there.
        socket.read_exact(&mut seen[known..length]).await.map_err(|error| error.to_string())?;
        if said.is_some() {
            return Ok(said);
        }
    }
}

impl From<Header<'_>> for Said {
    fn from(header: Header<'_>) -> Self {
        let origin = match header.origin {
            // The header of an IPv4 client may come in IPv6 clothes.
            Origin::Client { client, listener } => {
                Origin::Client { client: canonical(client), listener: canonical(listener) }
            }
            other => other,
        };
        let tls = header.tls.map(|tls| TlsFacts {
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
