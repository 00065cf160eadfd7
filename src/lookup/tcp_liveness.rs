//! When a peer that vanished without a word is noticed on a TCP connection to a directory or service.
//!
//! Keepalive probes find it on an idle connection and refresh the state of firewalls on the way; `TCP_USER_TIMEOUT` finds it
//! on a connection with data that is not acknowledged.

use std::os::fd::AsFd;
use std::time::Duration;

use socket2::{SockRef, TcpKeepalive};

/// Silence before the first probe.
pub(crate) const IDLE: Duration = Duration::from_secs(30);
/// Between probes.
pub(crate) const INTERVAL: Duration = Duration::from_secs(10);
/// Probes without an answer that end the connection.
pub(crate) const RETRIES: u32 = 3;
/// Data that is not acknowledged for this time ends the connection.
pub(crate) const USER_TIMEOUT: Duration = Duration::from_secs(60);

/// The probes, as a socket option.
pub(crate) fn keepalive() -> TcpKeepalive {
    TcpKeepalive::new().with_time(IDLE).with_interval(INTERVAL).with_retries(RETRIES)
}

/// Sets both on `socket`.
///
/// A failure is logged and otherwise ignored: a connection without these options still carries requests.
pub(crate) fn apply(socket: &impl AsFd) {
    let socket = SockRef::from(socket);
    let result = socket.set_tcp_keepalive(&keepalive()).and_then(|()| socket.set_tcp_user_timeout(Some(USER_TIMEOUT)));
    if let Err(error) = result {
        tracing::debug!(%error, "keepalive could not be set on a directory connection");
    }
}
