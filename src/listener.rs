//! Accepts connections and starts a session for each. Between two accepts only permits are taken and a task is spawned.
//!
//! A failed accept never ends a listener: an aborted connection is skipped, and a lack of descriptors is logged with the setting
//! to raise, followed by a pause.

use std::io;
use std::net::{Ipv6Addr, SocketAddr, SocketAddrV6};
use std::os::fd::AsFd as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use socket2::{Domain, Protocol, SockFilter, SockRef, Socket, Type};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::admission::connection_limit::ConnectionLimit;
use crate::config::{self, TlsMode};
use crate::metrics::Refusal;
use crate::process::drain::Drain;
use crate::session::{self, AcceptedConnection, ConnectionPermits, SessionPoller};
use crate::snapshot::ListenerConfig;

/// Maximum number of connections that the kernel queues; net.core.somaxconn is an upper limit.
const BACKLOG: i32 = 4096;
/// Pause after an accept that failed for lack of a resource, which an immediate retry would not find either.
const PAUSE: Duration = Duration::from_millis(100);
/// Time in which a listener that is replaced completes TCP handshakes in progress.
const REPLACEMENT_GRACE: Duration = Duration::from_millis(300);
/// A packet filter that drops packets with the flag SYN in the 14th byte of the TCP header and passes all others.
const NO_SYN: [SockFilter; 4] = [
    SockFilter::new(0x30, 0, 0, 13),
    SockFilter::new(0x45, 0, 1, 0x02),
    SockFilter::new(0x06, 0, 0, 0),
    SockFilter::new(0x06, 0, 0, u32::MAX),
];
/// EMFILE and ENFILE: the process or the system has no free descriptors.
const OUT_OF_DESCRIPTORS: [i32; 2] = [24, 23];

/// A listening socket of one worker.
#[derive(Debug)]
pub(crate) struct Listener {
    socket: TcpListener,
    address: SocketAddr,
    listener_config: watch::Receiver<ListenerConfig>,
    closing: Closing,
}

/// Handle that closes a listener.
#[derive(Debug, Clone, Default)]
pub(crate) struct Closing {
    closed: CancellationToken,
    is_replaced: Arc<AtomicBool>,
}

impl Closing {
    /// Closes the listener after it has accepted the queued connections.
    pub(crate) fn close(&self) {
        self.closed.cancel();
    }

    /// Prepares the listener's `sockets` for replacement by another socket: SYN packets that still arrive are dropped instead of
    /// refused, so that clients repeat them, after a second, to the other socket. Handshakes in progress are completed.
    pub(crate) fn prepare_replacement(&self, sockets: &[std::net::TcpListener]) {
        match sockets.iter().try_for_each(|socket| SockRef::from(socket).attach_filter(&NO_SYN)) {
            Ok(()) => self.is_replaced.store(true, Ordering::Release),
            // The system forbids packet filters to this user: connections that arrive during the change are reset.
            Err(error) => tracing::debug!(%error, "new connections cannot be held back while a listener is replaced"),
        }
    }
}

/// Whether a listener accepts IPv6 only. `[::]` also accepts IPv4, unless `others` has an IPv4 listener on the same port.
pub(crate) fn is_only_v6(listener: &config::Listener, others: &[config::Listener]) -> bool {
    match listener.address {
        SocketAddr::V6(v6) => !accepts_ipv4(v6, others),
        SocketAddr::V4(_) => false,
    }
}

/// Binds one socket for each worker, without listening. With `sharing` the address may overlap with that of another socket of this
/// user that also allows it (SO_REUSEPORT).
///
/// # Errors
/// The address is in use, not permitted, or not an address of this machine.
pub(crate) fn bind(
    address: SocketAddr,
    only_v6: bool,
    workers: usize,
    sharing: bool,
) -> io::Result<Vec<std::net::TcpListener>> {
    // Sockets that share a port would also share it, and its clients, with another process of the same user. The first attempt
    // therefore does not share.
    let mut first = socket(address, only_v6, sharing)?;
    if workers > 1 && !sharing {
        drop(first);
        first = socket(address, only_v6, true)?;
    }
    let address = first.local_addr()?;
    let mut sockets = vec![first];
    for _ in 1..workers {
        sockets.push(socket(address, only_v6, true)?);
    }
    Ok(sockets)
}

/// Listens on bound sockets. Sockets that listen already are not affected.
///
/// # Errors
/// The address is in use by a socket that listens.
pub(crate) fn listen(sockets: &[std::net::TcpListener]) -> io::Result<()> {
    sockets.iter().try_for_each(|socket| SockRef::from(socket).listen(BACKLOG))
}

fn socket(address: SocketAddr, only_v6: bool, share: bool) -> io::Result<std::net::TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM.nonblocking(), Some(Protocol::TCP))?;
    if address.is_ipv6() {
        socket.set_only_v6(only_v6)?;
    }
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(share)?;
    // Accepted connections inherit this.
    socket.set_tcp_nodelay(true)?;
    socket.bind(&address.into())?;
    Ok(socket.into())
}

/// State of a worker that its listeners share across configurations.
#[derive(Clone)]
pub(crate) struct WorkerContext {
    /// Limits the open connections of all listeners together.
    pub connection_limit: Arc<ConnectionLimit>,
    /// The drain that stops the process.
    pub drain: Drain,
    /// Poller of parked sessions.
    pub poller: Arc<SessionPoller>,
    /// Tasks of listeners, which the process waits for when it stops.
    pub listener_tasks: TaskTracker,
}

impl Listener {
    /// Creates the listener of one worker. Must be called on the worker's runtime.
    ///
    /// # Errors
    /// The socket cannot be registered with the runtime.
    pub(crate) fn new(
        socket: std::net::TcpListener,
        listener_config: watch::Receiver<ListenerConfig>,
        closing: Closing,
    ) -> io::Result<Self> {
        let address = socket.local_addr()?;
        socket.set_nonblocking(true)?;
        Ok(Self { socket: TcpListener::from_std(socket)?, address, listener_config, closing })
    }

    /// Accepts connections until the listener is closed or the drain begins.
    pub(crate) async fn run(self, context: WorkerContext) {
        let begun = context.drain.begun().clone();
        let accept = async {
            loop {
                match self.socket.accept().await {
                    Ok((socket, peer)) => self.start_session(socket, peer, &context),
                    Err(error) => self.accept_failed(&error).await,
                }
            }
        };
        tokio::pin!(accept);
        self.closing.closed.run_until_cancelled(begun.run_until_cancelled(&mut accept)).await;
        if self.closing.is_replaced.load(Ordering::Acquire) {
            begun.run_until_cancelled(tokio::time::timeout(REPLACEMENT_GRACE, accept)).await;
        }
        self.accept_queued(&context);
    }

    /// Accepts the queued connections, which closing the socket would reset. If the process stops, they are sent BYE; if a successor
    /// has the same socket, either of the two processes may serve them.
    fn accept_queued(&self, context: &WorkerContext) {
        let Ok(copy) = self.socket.as_fd().try_clone_to_owned() else { return };
        let socket = std::net::TcpListener::from(copy);
        for _ in 0..BACKLOG {
            let Ok((connection, peer)) = socket.accept() else { return };
            let connection = connection.set_nonblocking(true).and_then(|()| TcpStream::from_std(connection));
            if let Ok(connection) = connection {
                self.start_session(connection, peer, context);
            }
        }
    }

    fn start_session(&self, socket: TcpStream, peer: SocketAddr, context: &WorkerContext) {
        // A receiver of its own that has seen the present value, so that a login can detect a change.
        let mut listener_config = self.listener_config.clone();
        let ListenerConfig { snapshot, index } = listener_config.borrow_and_update().clone();
        let tls = snapshot.config.listeners[index].tls;
        let metrics = snapshot.metrics.listener(index);
        let Some(connection) = context.connection_limit.acquire(snapshot.limits.sessions) else {
            metrics.refused(Refusal::Full);
            if tls != TlsMode::Implicit {
                // The connection is closed in either case, so a failure to send the reason is ignored.
                let _ = socket.try_write(b"* BYE [UNAVAILABLE] Too many connections, try again later.\r\n");
            }
            return;
        };
        let balancers = snapshot.config.listeners[index].proxy_protocol.as_ref();
        // Checked before the prelogin queue is entered, because these connections must not displace clients.
        if balancers.is_some_and(|networks| !networks.iter().any(|network| network.contains(peer.ip()))) {
            let _open = metrics.connection_opened();
            return session::log_unknown_balancer(&socket, peer, self.address, &snapshot);
        }
        // The address of the client is in the PROXY header, so limits by address are applied after it has been read.
        let has_proxy_header = balancers.is_some();
        let count = if has_proxy_header {
            Ok(snapshot.admission.uncounted())
        } else {
            snapshot.admission.admit(Instant::now(), peer.ip())
        };
        // Only an admitted address may enter the prelogin queue.
        let admitted = count.and_then(|count| Ok((count, snapshot.admission.enter_prelogin_queue(Instant::now())?)));
        let (count, prelogin_ticket) = match admitted {
            Ok(admitted) => admitted,
            Err(turned) => {
                let reason = session::refuse_connection(&socket, turned, &snapshot, index).as_str();
                // At level info a flood would log one line for each connection.
                return tracing::debug!(client = %peer.ip().to_canonical(), listener = %self.address, reason, "connection refused");
            }
        };
        let permits = ConnectionPermits { connection, open_gauge: metrics.connection_opened(), count };
        let arrival = AcceptedConnection {
            socket,
            peer,
            local: self.address,
            listener: index,
            tls,
            snapshot,
            listener_config,
            drain: context.drain.clone(),
            poller: context.poller.clone(),
            prelogin_ticket,
            permits,
        };
        context.drain.spawn(session::serve(arrival));
    }

    async fn accept_failed(&self, error: &io::Error) {
        if error.kind() == io::ErrorKind::ConnectionAborted {
            return;
        }
        let ListenerConfig { snapshot, index } = self.listener_config.borrow().clone();
        snapshot.metrics.listener(index).refused(Refusal::AcceptError);
        drop(snapshot);
        if error.raw_os_error().is_some_and(|code| OUT_OF_DESCRIPTORS.contains(&code)) {
            tracing::error!(listener = %self.address, %error, "no free descriptor to accept a connection: raise LimitNOFILE or lower limits.sessions");
        } else {
            tracing::error!(listener = %self.address, %error, "a connection could not be accepted");
        }
        tokio::time::sleep(PAUSE).await;
    }
}

fn accepts_ipv4(address: SocketAddrV6, others: &[config::Listener]) -> bool {
    *address.ip() == Ipv6Addr::UNSPECIFIED
        && !others.iter().any(|other| other.address.is_ipv4() && other.address.port() == address.port())
}
