//! Accepts connections and hands each to a session of its own. Nothing else happens between two accepts.
//!
//! An accept that fails never ends a listener: a connection gone again is skipped, and a lack of descriptors is reported
//! once in a while with what to raise, and waited out. Called by `server`.

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
use crate::config::{self, ListenerTls};
use crate::metrics::Refusal;
use crate::process::drain::Drain;
use crate::session::{self, AcceptedConnection, ConnectionPermits, SessionPoller};
use crate::snapshot::ListenerConfig;

/// Connections the kernel may keep waiting; it caps this by net.core.somaxconn.
const BACKLOG: i32 = 4096;
/// After an accept that failed for lack of something, which trying at once would not bring back.
const PAUSE: Duration = Duration::from_millis(100);
/// How long a listener that gives way completes handshakes that are under way.
const GIVE_WAY: Duration = Duration::from_millis(300);
/// A packet filter that drops what has the flag SYN in the 14th byte of its TCP header, and lets all else pass.
const NO_SYN: [SockFilter; 4] = [
    SockFilter::new(0x30, 0, 0, 13),
    SockFilter::new(0x45, 0, 1, 0x02),
    SockFilter::new(0x06, 0, 0, 0),
    SockFilter::new(0x06, 0, 0, u32::MAX),
];
/// EMFILE and ENFILE: the process's and the system's descriptors are used up.
const OUT_OF_DESCRIPTORS: [i32; 2] = [24, 23];

/// A port of one worker.
#[derive(Debug)]
pub(crate) struct Listener {
    socket: TcpListener,
    address: SocketAddr,
    listener_config: watch::Receiver<ListenerConfig>,
    closing: Closing,
}

/// Closes a listener.
#[derive(Debug, Clone, Default)]
pub(crate) struct Closing {
    closed: CancellationToken,
    gives_way: Arc<AtomicBool>,
}

impl Closing {
    /// Closes it. Connections that wait are accepted first.
    pub(crate) fn close(&self) {
        self.closed.cancel();
    }

    /// Prepares for another socket that takes the connections from now on: requests that still arrive at `sockets`, those of the
    /// listener, are dropped instead of refused, so that clients repeat them, after a second, to the other socket. Handshakes
    /// that are under way are completed.
    pub(crate) fn give_way(&self, sockets: &[std::net::TcpListener]) {
        match sockets.iter().try_for_each(|socket| SockRef::from(socket).attach_filter(&NO_SYN)) {
            Ok(()) => self.gives_way.store(true, Ordering::Release),
            // A system that forbids it to this user: what arrives in the moment of the change is reset.
            Err(error) => tracing::debug!(%error, "requests cannot be held back while a listener is replaced"),
        }
    }
}

/// Whether a listener takes IPv6 only. `[::]` also takes IPv4, unless `others` hold an IPv4 listener on the same port.
pub(crate) fn is_only_v6(listener: &config::Listener, others: &[config::Listener]) -> bool {
    match listener.address {
        SocketAddr::V6(v6) => !takes_ipv4(v6, others),
        SocketAddr::V4(_) => false,
    }
}

/// Binds one socket for each worker; none listens yet. With `beside` the address may overlap with one of this user's sockets
/// that may be shared too.
///
/// # Errors
/// The system's reason: in use, not permitted, no such address.
pub(crate) fn bind(
    address: SocketAddr,
    only_v6: bool,
    workers: usize,
    beside: bool,
) -> io::Result<Vec<std::net::TcpListener>> {
    // Sockets that share a port would share it with another process of the same user too, and clients with it: so the first
    // attempt is without sharing.
    let mut first = socket(address, only_v6, beside)?;
    if workers > 1 && !beside {
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

/// Listens on bound sockets; those that do already stay as they are.
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
    // Inherited by what is accepted.
    socket.set_tcp_nodelay(true)?;
    socket.bind(&address.into())?;
    Ok(socket.into())
}

/// What all listeners of a worker share, whatever the configuration.
#[derive(Clone)]
pub(crate) struct WorkerContext {
    /// Bounds the open connections of all listeners together.
    pub connection_limit: Arc<ConnectionLimit>,
    /// When to stop.
    pub drain: Drain,
    /// Where silent sessions wait.
    pub poller: Arc<SessionPoller>,
    /// Tasks of listeners: a process ends after they have.
    pub listener_tasks: TaskTracker,
}

impl Listener {
    /// The listener of one worker, on its runtime, until `closed`.
    ///
    /// # Errors
    /// The system has no room to register it.
    pub(crate) fn new(
        socket: std::net::TcpListener,
        listener_config: watch::Receiver<ListenerConfig>,
        closing: Closing,
    ) -> io::Result<Self> {
        let address = socket.local_addr()?;
        socket.set_nonblocking(true)?;
        Ok(Self { socket: TcpListener::from_std(socket)?, address, listener_config, closing })
    }

    /// Accepts until it is closed, or the drain begins.
    pub(crate) async fn run(self, context: WorkerContext) {
        let begun = context.drain.begun().clone();
        let accept = async {
            loop {
                match self.socket.accept().await {
                    Ok((socket, peer)) => self.welcome(socket, peer, &context),
                    Err(error) => self.accept_failed(&error).await,
                }
            }
        };
        tokio::pin!(accept);
        self.closing.closed.run_until_cancelled(begun.run_until_cancelled(&mut accept)).await;
        if self.closing.gives_way.load(Ordering::Acquire) {
            begun.run_until_cancelled(tokio::time::timeout(GIVE_WAY, accept)).await;
        }
        self.accept_rest(&context);
    }

    /// Accepts the connections that wait already: closing the socket would reset them. If the process stops, they are sent BYE;
    /// if a successor has the same socket, it is not important which of the two serves them.
    fn accept_rest(&self, context: &WorkerContext) {
        let Ok(copy) = self.socket.as_fd().try_clone_to_owned() else { return };
        let socket = std::net::TcpListener::from(copy);
        for _ in 0..BACKLOG {
            let Ok((connection, peer)) = socket.accept() else { return };
            let connection = connection.set_nonblocking(true).and_then(|()| TcpStream::from_std(connection));
            if let Ok(connection) = connection {
                self.welcome(connection, peer, context);
            }
        }
    }

    fn welcome(&self, socket: TcpStream, peer: SocketAddr, context: &WorkerContext) {
        // Of its own, and up to date: a login looks whether it has changed since.
        let mut listener_config = self.listener_config.clone();
        let ListenerConfig { snapshot, index } = listener_config.borrow_and_update().clone();
        let tls = snapshot.config.listeners[index].tls;
        let metrics = snapshot.metrics.listener(index);
        let Some(occupant) = context.connection_limit.enter(snapshot.limits.sessions) else {
            metrics.refused(Refusal::Full);
            if tls != ListenerTls::Implicit {
                // The connection is closed either way; a client that does not get the reason loses nothing.
                let _ = socket.try_write(b"* BYE [UNAVAILABLE] Too many connections, try again later.\r\n");
            }
            return;
        };
        let balancers = snapshot.config.listeners[index].proxy_protocol.as_ref();
        // Before a place is taken that a client could have: such connections must not displace those of clients.
        if balancers.is_some_and(|networks| !networks.iter().any(|network| network.contains(peer.ip()))) {
            let _open = metrics.session_opened();
            return session::unknown_balancer(&socket, peer, self.address, &snapshot);
        }
        // A balancer is not the client, whose address is in the header.
        let is_passed_on = balancers.is_some();
        let pass =
            if is_passed_on { Ok(snapshot.guard.pass()) } else { snapshot.guard.admit(Instant::now(), peer.ip()) };
        // A place before the login: only for an address that may come in.
        let admitted = pass.and_then(|pass| Ok((pass, snapshot.guard.lobby(Instant::now())?)));
        let (pass, ticket) = match admitted {
            Ok(admitted) => admitted,
            Err(turned) => {
                let reason = session::turn_away(&socket, turned, &snapshot, index).as_str();
                // At info a flood would write as many lines as it has connections.
                return tracing::debug!(client = %peer.ip().to_canonical(), listener = %self.address, reason, "turned away");
            }
        };
        let held = ConnectionPermits { occupant, open: metrics.session_opened(), pass };
        let arrival = AcceptedConnection {
            socket,
            peer,
            local: self.address,
            listener: index,
            tls,
            snapshot,
            desk: listener_config,
            drain: context.drain.clone(),
            room: context.poller.clone(),
            ticket,
            held,
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
            tracing::error!(listener = %self.address, %error, "no descriptor left to accept a connection: raise LimitNOFILE or lower limits.sessions");
        } else {
            tracing::error!(listener = %self.address, %error, "a connection could not be accepted");
        }
        tokio::time::sleep(PAUSE).await;
    }
}

fn takes_ipv4(address: SocketAddrV6, others: &[config::Listener]) -> bool {
    *address.ip() == Ipv6Addr::UNSPECIFIED
        && !others.iter().any(|other| other.address.is_ipv4() && other.address.port() == address.port())
}
