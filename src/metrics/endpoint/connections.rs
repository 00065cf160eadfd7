//! The bounded table of open connections to the admin endpoint.
//!
//! A new connection always gets a place. When the table is full, or one address has all of its places, the connection that has
//! sent no complete request for the longest time is closed for it; if there is none, the oldest.

use std::collections::VecDeque;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio_util::sync::CancellationToken;

/// Maximum number of open connections. A scraper and a health check need one each.
const MAX_CONNECTIONS: usize = 64;
/// Maximum number of open connections of one client address.
const MAX_OF_ADDRESS: usize = 32;

/// The table. The handle is shared.
#[derive(Debug, Clone, Default)]
pub(super) struct Connections {
    /// From the oldest to the newest.
    open: Arc<Mutex<VecDeque<Entry>>>,
}

#[derive(Debug)]
struct Entry {
    address: IpAddr,
    /// Whether the head of a request is complete.
    is_answered: bool,
    /// Ends the connection. Identifies the entry too.
    close: Arc<CancellationToken>,
}

impl Connections {
    /// Adds a connection, and closes another one if there is no place for it.
    pub(super) fn add(&self, address: IpAddr) -> Connection {
        let address = address.to_canonical();
        let close = Arc::new(CancellationToken::new());
        let mut open = self.lock();
        let of_address = open.iter().filter(|entry| entry.address == address).count();
        let evicted = if of_address >= MAX_OF_ADDRESS {
            to_evict(&open, |entry| entry.address == address)
        } else if open.len() >= MAX_CONNECTIONS {
            to_evict(&open, |_| true)
        } else {
            None
        };
        if let Some(entry) = evicted.and_then(|index| open.remove(index)) {
            entry.close.cancel();
        }
        open.push_back(Entry { address, is_answered: false, close: close.clone() });
        drop(open);
        Connection { table: self.clone(), close }
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<Entry>> {
        // No operation under the lock can panic between two changes.
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Index of the oldest connection without a complete request, else of the oldest.
fn to_evict(open: &VecDeque<Entry>, may_go: impl Fn(&Entry) -> bool) -> Option<usize> {
    let oldest = |is_answered: bool| open.iter().position(|entry| may_go(entry) && entry.is_answered == is_answered);
    oldest(false).or_else(|| oldest(true))
}

/// An open connection; it leaves the table when dropped.
#[derive(Debug)]
pub(super) struct Connection {
    table: Connections,
    close: Arc<CancellationToken>,
}

impl Connection {
    /// Completes when the connection must be closed in favor of a newer one.
    pub(super) async fn evicted(&self) {
        self.close.cancelled().await;
    }

    /// The head of a request is complete: the connection is closed only after those without one.
    pub(super) fn is_answered(&self) {
        if let Some(entry) = self.table.lock().iter_mut().find(|entry| Arc::ptr_eq(&entry.close, &self.close)) {
            entry.is_answered = true;
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.table.lock().retain(|entry| !Arc::ptr_eq(&entry.close, &self.close));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(last: u8) -> IpAddr {
        IpAddr::from([192, 0, 2, last])
    }

    fn is_open(connection: &Connection) -> bool {
        !connection.close.is_cancelled()
    }

    #[test]
    fn a_full_table_closes_the_oldest_without_a_request() {
        let table = Connections::default();
        let open: Vec<Connection> =
            (0..MAX_CONNECTIONS).map(|index| table.add(address(u8::try_from(index).unwrap()))).collect();
        assert!(open.iter().all(is_open));
        open[0].is_answered();
        let new = table.add(address(200));
        assert!(is_open(&open[0]) && !is_open(&open[1]) && is_open(&open[2]) && is_open(&new));
        assert_eq!(table.lock().len(), MAX_CONNECTIONS);

        // If all have sent a request, the oldest goes.
        open.iter().chain([&new]).for_each(Connection::is_answered);
        let newest = table.add(address(201));
        assert!(!is_open(&open[0]) && is_open(&open[2]) && is_open(&newest));
    }

    #[test]
    fn an_address_with_too_many_closes_its_own() {
        let table = Connections::default();
        let other = table.add(address(1));
        let open: Vec<Connection> = (0..MAX_OF_ADDRESS).map(|_| table.add(address(2))).collect();
        let new = table.add("::ffff:192.0.2.2".parse().unwrap());
        assert!(is_open(&other) && !is_open(&open[0]) && is_open(&open[1]) && is_open(&new));
        assert_eq!(table.lock().len(), MAX_OF_ADDRESS + 1);
    }

    #[test]
    fn a_closed_connection_gives_its_place_back() {
        let table = Connections::default();
        let open: Vec<Connection> = (0..MAX_OF_ADDRESS).map(|_| table.add(address(1))).collect();
        drop(open);
        assert_eq!(table.lock().len(), 0);
        let evicted = table.add(address(1));
        let others: Vec<Connection> = (0..MAX_OF_ADDRESS).map(|_| table.add(address(1))).collect();
        assert!(!is_open(&evicted));
        drop(evicted);
        assert_eq!(table.lock().len(), others.len(), "the place of an evicted connection belongs to another one");
    }
}
