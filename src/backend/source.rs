//! Local addresses and ports that connections to servers come from.
//!
//! One local address has some 28,000 ports for each address and port of a server. `source_addresses` gives a backend
//! several: they take turns, and one that has no port left is followed by the next. IP_BIND_ADDRESS_NO_PORT leaves the
//! port to connect(2), which may use a port once for each server. What this machine lacks is never a server's fault.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicUsize, Ordering};

use nix::sys::socket::{setsockopt, sockopt};
use rustix::io::Errno;
use tokio::net::{TcpSocket, TcpStream};

use crate::failure::Reason;

/// The source addresses of a backend.
#[derive(Debug, Default)]
pub(super) struct Sources {
    v4: Vec<IpAddr>,
    v6: Vec<IpAddr>,
    /// Connections so far.
    turn: AtomicUsize,
}

impl Sources {
    pub(super) fn new(addresses: &[IpAddr]) -> Self {
        let (v4, v6) = addresses.iter().partition(|address| address.is_ipv4());
        Self { v4, v6, turn: AtomicUsize::new(0) }
    }

    /// Connects to `server` from the next source address of its family, or from the first after it that has a port left.
    pub(super) async fn connect(&self, server: SocketAddr) -> io::Result<TcpStream> {
        let server = SocketAddr::new(server.ip().to_canonical(), server.port());
        let sources = if server.is_ipv4() { &self.v4 } else { &self.v6 };
        if sources.is_empty() {
            return TcpStream::connect(server).await;
        }
        let turn = self.turn.fetch_add(1, Ordering::Relaxed);
        let mut last = io::Error::from(io::ErrorKind::AddrNotAvailable);
        for source in in_turn(sources, turn) {
            match connect_from(source, server).await {
                Err(error) if local_fault(&error) == Some(Reason::LocalPorts) => last = error,
                other => return other,
            }
        }
        Err(last)
    }
}

/// All of `sources`, beginning with the one whose turn it is.
fn in_turn(sources: &[IpAddr], turn: usize) -> impl Iterator<Item = IpAddr> {
    let first = turn.checked_rem(sources.len()).unwrap_or_default();
    sources[first..].iter().chain(&sources[..first]).copied()
}

async fn connect_from(source: IpAddr, server: SocketAddr) -> io::Result<TcpStream> {
    let socket = if source.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    setsockopt(&socket, sockopt::IpBindAddressNoPort, &true)?;
    socket.bind(SocketAddr::new(source, 0)).map_err(|error| unusable(source, &error))?;
    socket.connect(server).await.map_err(|error| match error.kind() {
        // A loopback address cannot speak to another machine, for example.
        io::ErrorKind::InvalidInput => unusable(source, &io::Error::new(io::ErrorKind::AddrNotAvailable, error)),
        _ => error,
    })
}

fn unusable(source: IpAddr, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("the source address {source} cannot be used: {error}"))
}

/// The reason, if a connection failed for something that this machine lacks or forbids.
pub(super) fn local_fault(error: &io::Error) -> Option<Reason> {
    match error.kind() {
        io::ErrorKind::AddrNotAvailable | io::ErrorKind::AddrInUse => return Some(Reason::LocalPorts),
        // An error of `bind` has a text of its own instead of a code.
        io::ErrorKind::PermissionDenied | io::ErrorKind::OutOfMemory => return Some(Reason::System),
        _ => {}
    }
    // The last two: a security module, or a rule of the local firewall.
    let causes = [Errno::MFILE, Errno::NFILE, Errno::NOBUFS, Errno::NOMEM, Errno::ACCESS, Errno::PERM];
    let code = error.raw_os_error()?;
    causes.iter().any(|errno| errno.raw_os_error() == code).then_some(Reason::System)
}

/// `error` in an operator's words.
pub(super) fn in_words(reason: Reason, server: SocketAddr, error: &io::Error) -> String {
    match reason {
        Reason::LocalPorts => format!(
            "no local port is free for a connection to {server} ({error}): add source_addresses to the backend, or widen \
             net.ipv4.ip_local_port_range"
        ),
        _ => format!("this machine cannot make a connection to {server}: {error}"),
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr};

    use tokio::net::TcpListener;

    use super::*;

    #[test]
    fn sources_take_turns_and_each_is_tried_once() {
        let addresses: Vec<IpAddr> = ["10.0.0.1", "10.0.0.2", "10.0.0.3"].map(|text| text.parse().unwrap()).into();
        for turn in [0, 1, 2, 3, usize::MAX] {
            let tried: Vec<IpAddr> = in_turn(&addresses, turn).collect();
            assert_eq!(tried[0], addresses[turn % 3]);
            assert_eq!(tried.len(), 3);
            assert!(addresses.iter().all(|address| tried.contains(address)));
        }
        assert_eq!(in_turn(&[], 5).count(), 0);
    }

    #[test]
    fn local_faults_are_distinguished_from_faults_of_a_server() {
        let reason = |code: i32| local_fault(&io::Error::from_raw_os_error(code));
        assert_eq!(reason(99), Some(Reason::LocalPorts), "EADDRNOTAVAIL");
        assert_eq!(reason(98), Some(Reason::LocalPorts), "EADDRINUSE");
        for code in [24, 23, 105, 12, 13, 1] {
            assert_eq!(reason(code), Some(Reason::System), "{code}");
        }
        for code in [111, 104, 110, 113, 101] {
            assert_eq!(reason(code), None, "{code}: refused, reset, timed out, unreachable");
        }
        // A security module that forbids the source address: the error names the address, and has no code.
        let forbidden = unusable(Ipv4Addr::LOCALHOST.into(), &io::Error::from_raw_os_error(13));
        assert_eq!((local_fault(&forbidden), forbidden.raw_os_error()), (Some(Reason::System), None));
    }

    #[tokio::test]
    async fn connections_come_from_the_sources_of_the_servers_family() {
        let sources: Vec<IpAddr> = ["127.0.0.2", "127.0.0.3", "::1"].map(|text| text.parse().unwrap()).into();
        let sources = Sources::new(&sources);
        let v4 = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let mut seen = Vec::new();
        for _ in 0..4 {
            let _client = sources.connect(v4.local_addr().unwrap()).await.unwrap();
            seen.push(v4.accept().await.unwrap().1.ip().to_string());
        }
        seen.sort();
        assert_eq!(seen, ["127.0.0.2", "127.0.0.2", "127.0.0.3", "127.0.0.3"]);
        if let Ok(v6) = TcpListener::bind((Ipv6Addr::LOCALHOST, 0)).await {
            let _client = sources.connect(v6.local_addr().unwrap()).await.unwrap();
            assert_eq!(v6.accept().await.unwrap().1.ip(), Ipv6Addr::LOCALHOST);
        }
        // An address that is not this machine's is passed over.
        let sources = Sources::new(&["192.0.2.1", "127.0.0.4"].map(|text| text.parse().unwrap()));
        for _ in 0..2 {
            let _client = sources.connect(v4.local_addr().unwrap()).await.unwrap();
            assert_eq!(v4.accept().await.unwrap().1.ip().to_string(), "127.0.0.4");
        }
        // Without a route at all the network is unreachable, which says as little about the server.
        let loopback = Sources::new(&["127.0.0.4".parse().unwrap()]);
        let error = loopback.connect("192.0.2.1:143".parse().unwrap()).await.unwrap_err();
        let is_unreachable = error.kind() == io::ErrorKind::NetworkUnreachable;
        assert!(is_unreachable || local_fault(&error) == Some(Reason::LocalPorts), "{error:?}");
        let foreign = Sources::new(&["192.0.2.1".parse().unwrap()]);
        let error = foreign.connect(v4.local_addr().unwrap()).await.unwrap_err();
        assert_eq!(local_fault(&error), Some(Reason::LocalPorts));
        assert!(error.to_string().contains("192.0.2.1"), "{error}");
    }
}
