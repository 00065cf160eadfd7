//! The addresses of this proxy's listeners, to which it must not connect as a client.

use std::net::SocketAddr;
use std::sync::Arc;

use crate::config::is_local;

/// Addresses of this proxy's listeners. A connection to one of them would be a loop.
#[derive(Debug, Clone, Default)]
pub struct ListenerAddresses(Arc<Vec<SocketAddr>>);

impl ListenerAddresses {
    /// Wraps the addresses that the listeners are bound to.
    pub fn new(listeners: Vec<SocketAddr>) -> Self {
        Self(Arc::new(listeners))
    }

    /// Whether one of the listeners receives connections to `address`.
    pub fn contains(&self, address: SocketAddr) -> bool {
        let ip = address.ip().to_canonical();
        self.0.iter().any(|own| {
            own.port() == address.port() && (own.ip().to_canonical() == ip || own.ip().is_unspecified() && is_local(ip))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listener_addresses_contain_all_addresses_of_a_wildcard() {
        let own = ListenerAddresses::new(vec!["0.0.0.0:143".parse().unwrap(), "127.0.0.1:993".parse().unwrap()]);
        for ours in ["127.0.0.1:143", "127.0.0.2:143", "127.0.0.1:993", "[::ffff:127.0.0.1]:993"] {
            assert!(own.contains(ours.parse().unwrap()), "{ours}");
        }
        // 192.0.2.0/24 is reserved for documentation, so no machine has it.
        for other in ["192.0.2.1:143", "127.0.0.1:144", "127.0.0.2:993"] {
            assert!(!own.contains(other.parse().unwrap()), "{other}");
        }
    }
}
