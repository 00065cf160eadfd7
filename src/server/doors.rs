//! Which ports are open, and which configuration a connection to each is served with.
//!
//! A listening socket outlives configurations: connections wait in it while one takes the place of another. So a listener
//! that stays keeps its sockets and is only handed the new [`Desk`]; one that is new is bound before anything else changes;
//! one that is gone is closed. Sockets may also come from outside: from systemd, or from the process before this one.
//! Called by `server`.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Arc;

use anyhow::Context as _;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::{Desk, Live, Workplace};
use crate::config::{self, Config};
use crate::listener::{self, Listener};

/// What tells listeners apart: the address as configured, and the how-manieth with it (port 0 may stand more than once).
type Key = (SocketAddr, usize);

/// An open port.
#[derive(Debug)]
struct Door {
    key: Key,
    /// As bound.
    address: SocketAddr,
    /// At least one; workers have copies.
    sockets: Vec<TcpListener>,
    desk: watch::Sender<Desk>,
    closed: CancellationToken,
}

impl Drop for Door {
    fn drop(&mut self) {
        self.closed.cancel();
    }
}

/// All open ports, in the configuration's order.
#[derive(Debug, Default)]
pub(super) struct Doors(Vec<Door>);

/// Ports to be opened, bound already.
pub(super) struct Opening(Vec<(usize, SocketAddr, Vec<TcpListener>)>);

/// What has changed.
#[derive(Debug, Default)]
pub(super) struct Change {
    pub(super) opened: Vec<SocketAddr>,
    pub(super) closed: Vec<SocketAddr>,
}

impl Doors {
    /// Binds what `config` has and is not open yet. Nothing is changed.
    ///
    /// # Errors
    /// The first address that cannot be bound.
    pub(super) fn bind(&self, config: &Config, inherited: &mut Vec<TcpListener>) -> anyhow::Result<Opening> {
        let mut opening = Vec::new();
        for (index, (listener, key)) in config.listeners.iter().zip(keys(&config.listeners)).enumerate() {
            if self.0.iter().any(|door| door.key == key) {
                continue;
            }
            let fits = |socket: &mut TcpListener| socket.local_addr().is_ok_and(|address| address == listener.address);
            let mut sockets: Vec<TcpListener> = inherited.extract_if(.., fits).collect();
            if sockets.is_empty() {
                sockets = listener::bind(listener, &config.listeners, config.limits.workers)
                    .with_context(|| format!("{} cannot be bound ({})", listener.address, listener.place.key))?;
            }
            let address = sockets[0].local_addr().context("a socket without an address")?;
            opening.push((index, address, sockets));
        }
        Ok(Opening(opening))
    }

    /// Addresses as they will be bound, in the order of `config`.
    pub(super) fn addresses_with(&self, config: &Config, opening: &Opening) -> Vec<SocketAddr> {
        let opened = |index| opening.0.iter().find(|(at, ..)| *at == index).map(|(_, address, _)| *address);
        let stays = |key: &Key| self.0.iter().find(|door| door.key == *key).map(|door| door.address);
        let keys = keys(&config.listeners);
        keys.iter().enumerate().filter_map(|(index, key)| opened(index).or_else(|| stays(key))).collect()
    }

    /// From now on connections are served with `live`; new ports are opened at `workplaces`, those that are gone closed.
    ///
    /// # Errors
    /// The system has no room for a socket. What is open then stays open.
    pub(super) fn swap(&mut self, live: &Arc<Live>, opening: Opening, workplaces: &[Workplace]) -> io::Result<Change> {
        let mut change = Change::default();
        let mut opened = Vec::new();
        for (index, address, sockets) in opening.0 {
            let key = keys(&live.config.listeners)[index];
            let desk = watch::Sender::new(Desk { live: live.clone(), index });
            let door = Door { key, address, sockets, desk, closed: CancellationToken::new() };
            door.open(workplaces)?;
            change.opened.push(address);
            opened.push(door);
        }
        let mut before = std::mem::take(&mut self.0);
        for (index, key) in keys(&live.config.listeners).into_iter().enumerate() {
            if let Some(at) = before.iter().position(|door| door.key == key) {
                let door = before.swap_remove(at);
                door.desk.send_replace(Desk { live: live.clone(), index });
                self.0.push(door);
            } else if let Some(at) = opened.iter().position(|door| door.key == key) {
                self.0.push(opened.swap_remove(at));
            }
        }
        change.closed.extend(before.iter().map(|door| door.address));
        Ok(change)
    }

    /// As bound, in the configuration's order.
    pub(super) fn addresses(&self) -> Vec<SocketAddr> {
        self.0.iter().map(|door| door.address).collect()
    }

    /// Copies of all listening sockets, for a process that takes them over.
    ///
    /// # Errors
    /// The system has no descriptors for them.
    pub(super) fn copies(&self) -> io::Result<Vec<OwnedFd>> {
        self.0.iter().flat_map(|door| &door.sockets).map(|socket| socket.as_fd().try_clone_to_owned()).collect()
    }

    /// Closes all.
    pub(super) fn close(&mut self) {
        self.0.clear();
    }
}

impl Door {
    /// A listener at each workplace; where there are more sockets than workplaces, some have several, for connections wait
    /// in each. Where there are fewer, they share.
    fn open(&self, workplaces: &[Workplace]) -> io::Result<()> {
        for number in 0..self.sockets.len().max(workplaces.len()) {
            let socket = self.sockets[number % self.sockets.len()].try_clone()?;
            let workplace = &workplaces[number % workplaces.len()];
            let guard = workplace.runtime.enter();
            let listener = Listener::new(socket, self.desk.subscribe(), self.closed.clone())?;
            drop(guard);
            workplace.runtime.spawn(listener.run(workplace.house.clone()));
        }
        Ok(())
    }
}

fn keys(listeners: &[config::Listener]) -> Vec<Key> {
    let addresses: Vec<SocketAddr> = listeners.iter().map(|listener| listener.address).collect();
    let before = |index: usize| addresses[..index].iter().filter(|other| **other == addresses[index]).count();
    (0..addresses.len()).map(|index| (addresses[index], before(index))).collect()
}
