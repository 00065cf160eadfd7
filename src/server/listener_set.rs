//! The open listeners, and the configuration that each serves new connections with.
//!
//! Listening sockets outlive configurations, because connections are queued in them during a reload. A listener that stays keeps
//! its sockets and only receives the new [`ListenerConfig`]. A new listener is bound before anything else changes, and a removed
//! one is closed. Sockets can also be inherited, from systemd or from the process that this one replaces.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, AsRawFd as _, OwnedFd};
use std::os::unix::fs::fchown;
use std::sync::Arc;

use anyhow::Context as _;
use socket2::SockRef;
use tokio::sync::watch;

use super::{ListenerConfig, Snapshot, WorkerHandle};
use crate::config::{self, Config};
use crate::listener::{self, Closing, Listener};

/// Identifies a listener across configurations.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Key {
    /// The configured address.
    address: SocketAddr,
    /// Index among the listeners with this address, because port 0 can be configured more than once.
    number: usize,
    /// Part of the key because it cannot be changed after the socket is bound.
    only_v6: bool,
}

/// A listener that accepts connections.
#[derive(Debug)]
struct OpenListener {
    key: Key,
    /// The bound address.
    address: SocketAddr,
    /// At least one. The workers have copies.
    sockets: Vec<TcpListener>,
    config_sender: watch::Sender<ListenerConfig>,
    closing: Closing,
}

impl Drop for OpenListener {
    fn drop(&mut self) {
        self.closing.close();
    }
}

/// All open listeners, in the order of the configuration.
#[derive(Debug, Default)]
pub(super) struct ListenerSet(Vec<OpenListener>);

/// Bound sockets of listeners that are about to be opened.
pub(super) struct BoundListeners(Vec<BoundListener>);

struct BoundListener {
    /// Index in the configuration.
    index: usize,
    address: SocketAddr,
    sockets: Vec<TcpListener>,
}

/// Addresses of listeners that were opened and closed.
#[derive(Debug, Default)]
pub(super) struct Change {
    pub(super) opened: Vec<SocketAddr>,
    pub(super) closed: Vec<SocketAddr>,
}

impl ListenerSet {
    /// Binds the listeners in `config` that are not open yet. Connections arrive at the new sockets only after all of them are bound.
    /// An address may overlap with that of an open listener that is closed afterwards, and with that of a socket in `others`.
    ///
    /// # Errors
    /// An address cannot be bound.
    pub(super) fn bind(
        &self,
        config: &Config,
        inherited: &mut Vec<TcpListener>,
        others: &[&OwnedFd],
    ) -> anyhow::Result<BoundListeners> {
        let mut opening = Vec::new();
        for (index, key) in keys(&config.listeners).into_iter().enumerate() {
            if self.0.iter().any(|listener| listener.key == key) {
                continue;
            }
            let mut sockets: Vec<TcpListener> = inherited.extract_if(.., |socket| key.fits(socket)).collect();
            if sockets.is_empty() {
                let sharing = self.share_overlapping(key.address, inherited, others);
                let bound = listener::bind(key.address, key.only_v6, config.limits.workers, sharing);
                sockets = match bound {
                    // For example a socket of systemd that accepts other versions of IP than configured.
                    Err(error) if error.kind() == io::ErrorKind::AddrInUse && key.is_among(inherited) => {
                        inherited.extract_if(.., |socket| is_at(socket, key.address)).collect()
                    }
                    bound => bound.with_context(|| cannot_bind(key.address, &config.listeners[index].location.key))?,
                };
            }
            let address = sockets[0].local_addr().context("a socket without an address")?;
            opening.push(BoundListener { index, address, sockets });
        }
        for BoundListener { index, sockets, .. } in &opening {
            let listener = &config.listeners[*index];
            listener::listen(sockets).with_context(|| cannot_bind(listener.address, &listener.location.key))?;
        }
        Ok(BoundListeners(opening))
    }

    /// Lets open sockets whose addresses overlap with `address` share it, and returns whether there are any. The new socket
    /// receives their connections after they are closed.
    pub(super) fn share_overlapping(
        &self,
        address: SocketAddr,
        inherited: &[TcpListener],
        others: &[&OwnedFd],
    ) -> bool {
        let open = self.0.iter().flat_map(|listener| &listener.sockets).chain(inherited).map(AsFd::as_fd);
        let mut found = false;
        for socket in open.chain(others.iter().map(AsFd::as_fd)) {
            let socket_address = SockRef::from(&socket).local_addr().ok().and_then(|address| address.as_socket());
            if !socket_address.is_some_and(|other| overlap(address, other)) {
                continue;
            }
            found = true;
            // The kernel lets only sockets of the same user share an address. The owner can be changed by root only; if that
            // fails, binding reports that the address is in use.
            let _ = fchown(socket, Some(rustix::process::geteuid().as_raw()), None);
            if let Err(error) = SockRef::from(&socket).set_reuse_port(true) {
                tracing::warn!(descriptor = socket.as_raw_fd(), %error, "a listening socket cannot share its address");
            }
        }
        found
    }

    /// Addresses of all listeners in `config` once `opening` is open.
    pub(super) fn addresses_with(&self, config: &Config, opening: &BoundListeners) -> Vec<SocketAddr> {
        let opened = |index| opening.0.iter().find(|bound| bound.index == index).map(|bound| bound.address);
        let stays = |key: &Key| self.0.iter().find(|listener| listener.key == *key).map(|listener| listener.address);
        let keys = keys(&config.listeners);
        keys.iter().enumerate().filter_map(|(index, key)| opened(index).or_else(|| stays(key))).collect()
    }

    /// Serves new connections with `snapshot`, opens the listeners in `opening` on `workers`, and closes those that are not in the
    /// configuration.
    ///
    /// # Errors
    /// A socket cannot be copied or registered. The open listeners then stay open.
    pub(super) fn swap(
        &mut self,
        snapshot: &Arc<Snapshot>,
        opening: BoundListeners,
        workers: &[WorkerHandle],
    ) -> io::Result<Change> {
        let mut change = Change::default();
        let mut opened = Vec::new();
        for BoundListener { index, address, sockets } in opening.0 {
            let key = keys(&snapshot.config.listeners)[index];
            let config_sender = watch::Sender::new(ListenerConfig { snapshot: snapshot.clone(), index });
            let listener = OpenListener { key, address, sockets, config_sender, closing: Closing::default() };
            listener.open(workers)?;
            change.opened.push(address);
            opened.push(listener);
        }
        let mut before = std::mem::take(&mut self.0);
        for (index, key) in keys(&snapshot.config.listeners).into_iter().enumerate() {
            if let Some(at) = before.iter().position(|listener| listener.key == key) {
                let listener = before.swap_remove(at);
                listener.config_sender.send_replace(ListenerConfig { snapshot: snapshot.clone(), index });
                self.0.push(listener);
            } else if let Some(at) = opened.iter().position(|listener| listener.key == key) {
                self.0.push(opened.swap_remove(at));
            }
        }
        for listener in &before {
            if self.0.iter().any(|other| overlap(other.address, listener.address)) {
                listener.closing.prepare_replacement(&listener.sockets);
            }
        }
        change.closed.extend(before.iter().map(|listener| listener.address));
        Ok(change)
    }

    /// Bound addresses, in the order of the configuration.
    pub(super) fn addresses(&self) -> Vec<SocketAddr> {
        self.0.iter().map(|listener| listener.address).collect()
    }

    /// Copies of all listening sockets, for a process that takes them over.
    ///
    /// # Errors
    /// The system has no descriptors for them.
    pub(super) fn copies(&self) -> io::Result<Vec<OwnedFd>> {
        self.0.iter().flat_map(|listener| &listener.sockets).map(|socket| socket.as_fd().try_clone_to_owned()).collect()
    }

    /// Closes all listeners. At the addresses in `replaced` another process has sockets of its own.
    pub(super) fn close(&mut self, replaced: &[SocketAddr]) {
        for listener in self.0.iter().filter(|listener| replaced.contains(&listener.address)) {
            listener.closing.prepare_replacement(&listener.sockets);
        }
        self.0.clear();
    }
}

impl OpenListener {
    /// Starts a listener task on each worker. If there are more sockets than workers, some workers get several, because connections
    /// are queued in each; if there are fewer, workers share them.
    fn open(&self, workers: &[WorkerHandle]) -> io::Result<()> {
        for number in 0..self.sockets.len().max(workers.len()) {
            let socket = self.sockets[number % self.sockets.len()].try_clone()?;
            let worker = &workers[number % workers.len()];
            let guard = worker.runtime.enter();
            let listener = Listener::new(socket, self.config_sender.subscribe(), self.closing.clone())?;
            drop(guard);
            let context = worker.context.clone();
            worker.runtime.spawn(context.listener_tasks.clone().track_future(listener.run(context)));
        }
        Ok(())
    }
}

impl BoundListeners {
    /// The sockets of all listeners.
    pub(super) fn sockets(&self) -> impl Iterator<Item = &TcpListener> {
        self.0.iter().flat_map(|bound| &bound.sockets)
    }
}

impl Key {
    fn fits(&self, socket: &TcpListener) -> bool {
        let is_wildcard = self.address.is_ipv6() && self.address.ip().is_unspecified();
        is_at(socket, self.address)
            && (!is_wildcard || SockRef::from(socket).only_v6().is_ok_and(|only_v6| only_v6 == self.only_v6))
    }

    fn is_among(&self, sockets: &[TcpListener]) -> bool {
        sockets.iter().any(|socket| is_at(socket, self.address))
    }
}

fn is_at(socket: &TcpListener, address: SocketAddr) -> bool {
    socket.local_addr().is_ok_and(|other| other == address)
}

/// Whether sockets at these addresses can conflict. `[::]` may accept IPv4 too.
fn overlap(one: SocketAddr, other: SocketAddr) -> bool {
    one.port() != 0
        && one.port() == other.port()
        && (one.ip() == other.ip() || one.ip().is_unspecified() || other.ip().is_unspecified())
}

/// Error text for `address`, which is configured at `key`.
pub(super) fn cannot_bind(address: SocketAddr, key: &str) -> String {
    let root = rustix::process::geteuid().is_root();
    let note = match address.port() {
        1..1024 if !root => "; opening a port below 1024 requires root or CAP_NET_BIND_SERVICE: restart",
        _ => "",
    };
    format!("{address} cannot be bound ({key}){note}")
}

fn keys(listeners: &[config::Listener]) -> Vec<Key> {
    let number = |index: usize| {
        let address = listeners[index].address;
        listeners[..index].iter().filter(|other| other.address == address).count()
    };
    let key = |(index, listener): (usize, &config::Listener)| Key {
        address: listener.address,
        number: number(index),
        only_v6: listener::is_only_v6(listener, listeners),
    };
    listeners.iter().enumerate().map(key).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    fn bound(text: &str, only_v6: bool) -> TcpListener {
        listener::bind(address(text), only_v6, 1, false).unwrap().remove(0)
    }

    #[test]
    fn addresses_overlap_on_one_port_if_one_is_unspecified() {
        for (one, other, expected) in [
            ("127.0.0.1:143", "0.0.0.0:143", true),
            ("[::]:143", "127.0.0.1:143", true),
            ("[::]:143", "0.0.0.0:143", true),
            ("127.0.0.1:143", "127.0.0.1:143", true),
            ("127.0.0.1:143", "127.0.0.2:143", false),
            ("127.0.0.1:143", "0.0.0.0:993", false),
            ("127.0.0.1:0", "0.0.0.0:0", false),
        ] {
            assert_eq!(overlap(address(one), address(other)), expected, "{one} {other}");
            assert_eq!(overlap(address(other), address(one)), expected, "{other} {one}");
        }
    }

    #[test]
    fn inherited_socket_must_accept_the_same_versions_of_ip() {
        for only_v6 in [false, true] {
            let socket = bound("[::]:0", only_v6);
            let key = |only_v6| Key { address: socket.local_addr().unwrap(), number: 0, only_v6 };
            assert!(key(only_v6).fits(&socket) && !key(!only_v6).fits(&socket));
        }
        // A specific address accepts one version in either case.
        let socket = bound("[::1]:0", false);
        assert!(Key { address: socket.local_addr().unwrap(), number: 0, only_v6: true }.fits(&socket));
    }

    #[test]
    fn wildcard_address_is_bound_while_a_specific_one_listens() {
        let narrow = bound("127.0.0.1:0", false);
        listener::listen(std::slice::from_ref(&narrow)).unwrap();
        let mut wide = narrow.local_addr().unwrap();
        wide.set_ip(std::net::Ipv4Addr::UNSPECIFIED.into());
        assert_eq!(listener::bind(wide, false, 2, false).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        assert!(ListenerSet::default().share_overlapping(wide, std::slice::from_ref(&narrow), &[]));
        let sockets = listener::bind(wide, false, 2, true).unwrap();
        listener::listen(&sockets).unwrap();
        assert!(!ListenerSet::default().share_overlapping(address("127.0.0.1:1"), &sockets, &[]));
    }
}
