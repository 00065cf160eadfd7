//! TCP options that detect a vanished peer on a connection to a directory or service.
//!
//! Keepalive probes detect it on an idle connection and refresh the state of firewalls on the path; `TCP_USER_TIMEOUT` detects it
//! on a connection with unacknowledged data.

use std::os::fd::AsFd;
use std::time::Duration;

use socket2::{SockRef, TcpKeepalive};

/// Idle time before the first probe.
pub(crate) const IDLE: Duration = Duration::from_secs(30);
/// Interval between probes.
pub(crate) const INTERVAL: Duration = Duration::from_secs(10);
/// Number of unanswered probes after which the connection is closed.
pub(crate) const RETRIES: u32 = 3;
/// The connection is closed if data is not acknowledged within this time.
pub(crate) const USER_TIMEOUT: Duration = Duration::from_secs(60);

/// The keepalive settings as a socket option.
pub(crate) fn keepalive() -> TcpKeepalive {
    TcpKeepalive::new().with_time(IDLE).with_interval(INTERVAL).with_retries(RETRIES)
}

/// Sets both options on `socket`.
///
/// A failure is logged and otherwise ignored: a connection without these options still carries requests.
pub(crate) fn apply(socket: &impl AsFd) {
    let socket = SockRef::from(socket);
    let result = socket.set_tcp_keepalive(&keepalive()).and_then(|()| socket.set_tcp_user_timeout(Some(USER_TIMEOUT)));
    if let Err(error) = result {
        tracing::debug!(%error, "keepalive could not be set on a directory connection");
    }
}
