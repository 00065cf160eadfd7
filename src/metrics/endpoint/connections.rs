//! The bounded table of open connections to the admin endpoint.
//!
//! A new connection is always accepted. If the table is full, or the client's address has reached its limit, the oldest connection
//! without a complete request is closed; if all have sent a request, the oldest one.

use std::collections::VecDeque;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio_util::sync::CancellationToken;

/// Maximum number of open connections. A scraper and a health check need one each.
const MAX_CONNECTIONS: usize = 64;
/// Maximum number of open connections of one client address.
const MAX_OF_ADDRESS: usize = 32;

/// The table. Clones share it.
#[derive(Debug, Clone, Default)]
pub(super) struct ConnectionTable {
    /// The entries, from the oldest to the newest.
    open: Arc<Mutex<VecDeque<Entry>>>,
}

#[derive(Debug)]
struct Entry {
    address: IpAddr,
    /// Whether the head of a request is complete.
    has_request: bool,
    /// Closes the connection, and identifies the entry.
    close: Arc<CancellationToken>,
}

impl ConnectionTable {
    /// Adds a connection, and closes another one if a limit is reached.
    pub(super) fn add(&self, address: IpAddr) -> OpenConnection {
        let address = address.to_canonical();
        let close = Arc::new(CancellationToken::new());
        let mut open = self.lock();
        let of_address = open.iter().filter(|entry| entry.address == address).count();
        let evicted = if of_address >= MAX_OF_ADDRESS {
            eviction_candidate(&open, |entry| entry.address == address)
        } else if open.len() >= MAX_CONNECTIONS {
            eviction_candidate(&open, |_| true)
        } else {
            None
        };
        if let Some(entry) = evicted.and_then(|index| open.remove(index)) {
            entry.close.cancel();
        }
        open.push_back(Entry { address, has_request: false, close: close.clone() });
        drop(open);
        OpenConnection { table: self.clone(), close }
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<Entry>> {
        // No operation under the lock can panic between two changes.
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Index of the oldest eligible connection without a complete request, or else of the oldest eligible one.
fn eviction_candidate(open: &VecDeque<Entry>, is_eligible: impl Fn(&Entry) -> bool) -> Option<usize> {
    let oldest =
        |has_request: bool| open.iter().position(|entry| is_eligible(entry) && entry.has_request == has_request);
    oldest(false).or_else(|| oldest(true))
}

/// An open connection; it leaves the table when dropped.
#[derive(Debug)]
pub(super) struct OpenConnection {
    table: ConnectionTable,
    close: Arc<CancellationToken>,
}

impl OpenConnection {
    /// Completes when the connection must be closed in favor of a newer one.
    pub(super) async fn evicted(&self) {
        self.close.cancelled().await;
    }

    /// Marks the connection as one whose request is complete: those without a request are evicted first.
    pub(super) fn mark_request_received(&self) {
        if let Some(entry) = self.table.lock().iter_mut().find(|entry| Arc::ptr_eq(&entry.close, &self.close)) {
            entry.has_request = true;
        }
    }
}

impl Drop for OpenConnection {
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

    fn is_open(connection: &OpenConnection) -> bool {
        !connection.close.is_cancelled()
    }

    #[test]
    fn full_table_closes_the_oldest_connection_without_a_request() {
        let table = ConnectionTable::default();
        let open: Vec<OpenConnection> =
            (0..MAX_CONNECTIONS).map(|index| table.add(address(u8::try_from(index).unwrap()))).collect();
        assert!(open.iter().all(is_open));
        open[0].mark_request_received();
        let new = table.add(address(200));
        assert!(is_open(&open[0]) && !is_open(&open[1]) && is_open(&open[2]) && is_open(&new));
        assert_eq!(table.lock().len(), MAX_CONNECTIONS);

        // If all have sent a request, the oldest is closed.
        open.iter().chain([&new]).for_each(OpenConnection::mark_request_received);
        let newest = table.add(address(201));
        assert!(!is_open(&open[0]) && is_open(&open[2]) && is_open(&newest));
    }

    #[test]
    fn address_at_its_limit_closes_its_own_oldest_connection() {
        let table = ConnectionTable::default();
        let other = table.add(address(1));
        let open: Vec<OpenConnection> = (0..MAX_OF_ADDRESS).map(|_| table.add(address(2))).collect();
        let new = table.add("::ffff:192.0.2.2".parse().unwrap());
        assert!(is_open(&other) && !is_open(&open[0]) && is_open(&open[1]) && is_open(&new));
        assert_eq!(table.lock().len(), MAX_OF_ADDRESS + 1);
    }

    #[test]
    fn closed_connection_leaves_the_table() {
        let table = ConnectionTable::default();
        let open: Vec<OpenConnection> = (0..MAX_OF_ADDRESS).map(|_| table.add(address(1))).collect();
        drop(open);
        assert_eq!(table.lock().len(), 0);
        let evicted = table.add(address(1));
        let others: Vec<OpenConnection> = (0..MAX_OF_ADDRESS).map(|_| table.add(address(1))).collect();
        assert!(!is_open(&evicted));
        drop(evicted);
        assert_eq!(table.lock().len(), others.len(), "dropping an evicted connection removes no other entry");
    }
}
