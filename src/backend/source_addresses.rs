//! Local addresses and ports of connections to servers.
//!
//! One local address has about 28,000 ports for each address and port of a server. `source_addresses` gives a backend
//! several addresses, which are used in turn; if one has no free port, the next is used. IP_BIND_ADDRESS_NO_PORT leaves the
//! choice of the port to connect(2), which can use a port once for each server. A lack of this machine is never treated as a
//! fault of the server.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicUsize, Ordering};

use nix::sys::socket::{setsockopt, sockopt};
use rustix::io::Errno;
use tokio::net::{TcpSocket, TcpStream};

use crate::failure::Reason;

/// The source addresses of a backend.
#[derive(Debug, Default)]
pub(super) struct SourceAddresses {
    v4: Vec<IpAddr>,
    v6: Vec<IpAddr>,
    /// Number of connections so far.
    turn: AtomicUsize,
}

impl SourceAddresses {
    pub(super) fn new(addresses: &[IpAddr]) -> Self {
        let (v4, v6) = addresses.iter().partition(|address| address.is_ipv4());
        Self { v4, v6, turn: AtomicUsize::new(0) }
    }

    /// Connects to `server` from the next source address of its family, or from the first one after it with a free port.
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

/// All of `sources`, beginning with the one at `turn`.
fn in_turn(sources: &[IpAddr], turn: usize) -> impl Iterator<Item = IpAddr> {
    let first = turn.checked_rem(sources.len()).unwrap_or_default();
    sources[first..].iter().chain(&sources[..first]).copied()
}

async fn connect_from(source: IpAddr, server: SocketAddr) -> io::Result<TcpStream> {
    let socket = if source.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    setsockopt(&socket, sockopt::IpBindAddressNoPort, &true)?;
    socket.bind(SocketAddr::new(source, 0)).map_err(|error| unusable(source, &error))?;
    socket.connect(server).await.map_err(|error| match error.kind() {
        // For example, a loopback address cannot connect to another machine.
        io::ErrorKind::InvalidInput => unusable(source, &io::Error::new(io::ErrorKind::AddrNotAvailable, error)),
        _ => error,
    })
}

fn unusable(source: IpAddr, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("the source address {source} cannot be used: {error}"))
}

/// The reason, if a connection failed because this machine lacks or forbids something.
pub(super) fn local_fault(error: &io::Error) -> Option<Reason> {
    match error.kind() {
        io::ErrorKind::AddrNotAvailable | io::ErrorKind::AddrInUse => return Some(Reason::LocalPorts),
        // An error of bind(2) has our own text instead of a code.
        io::ErrorKind::PermissionDenied | io::ErrorKind::OutOfMemory => return Some(Reason::System),
        _ => {}
    }
    // The last two are caused by a security module, or by a rule of the local firewall.
    let causes = [Errno::MFILE, Errno::NFILE, Errno::NOBUFS, Errno::NOMEM, Errno::ACCESS, Errno::PERM];
    let code = error.raw_os_error()?;
    causes.iter().any(|errno| errno.raw_os_error() == code).then_some(Reason::System)
}

/// Text for the operator about an error with a local reason.
pub(super) fn describe_local_fault(reason: Reason, server: SocketAddr, error: &io::Error) -> String {
    match reason {
        Reason::LocalPorts => format!(
            "no local port is free for a connection to {server} ({error}): add source_addresses to the backend, or widen \
             net.ipv4.ip_local_port_range"
        ),
        _ => format!("this machine cannot connect to {server}: {error}"),
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr};

    use tokio::net::TcpListener;

    use super::*;

    #[test]
    fn source_addresses_are_used_in_turn_and_each_is_tried_once() {
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
    async fn connections_use_source_addresses_of_the_servers_family() {
        let sources: Vec<IpAddr> = ["127.0.0.2", "127.0.0.3", "::1"].map(|text| text.parse().unwrap()).into();
        let sources = SourceAddresses::new(&sources);
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
        // An address of another machine is skipped.
        let sources = SourceAddresses::new(&["192.0.2.1", "127.0.0.4"].map(|text| text.parse().unwrap()));
        for _ in 0..2 {
            let _client = sources.connect(v4.local_addr().unwrap()).await.unwrap();
            assert_eq!(v4.accept().await.unwrap().1.ip().to_string(), "127.0.0.4");
        }
        // Without any route the network is unreachable, which shows nothing about the server either.
        let loopback = SourceAddresses::new(&["127.0.0.4".parse().unwrap()]);
        let error = loopback.connect("192.0.2.1:143".parse().unwrap()).await.unwrap_err();
        let is_unreachable = error.kind() == io::ErrorKind::NetworkUnreachable;
        assert!(is_unreachable || local_fault(&error) == Some(Reason::LocalPorts), "{error:?}");
        let foreign = SourceAddresses::new(&["192.0.2.1".parse().unwrap()]);
        let error = foreign.connect(v4.local_addr().unwrap()).await.unwrap_err();
        assert_eq!(local_fault(&error), Some(Reason::LocalPorts));
        assert!(error.to_string().contains("192.0.2.1"), "{error}");
    }
}
