//! Whether an address is one of this machine's, so that a proxy pointed at itself is found before it runs.
//!
//! Sends nothing. Called by `check`, and by `backend` for addresses that come from DNS.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket};

/// Whether the address is one of this machine's: only then can a socket be bound to it.
///
/// Machines that share an address with others (VRRP) often allow any to be bound (`ip_nonlocal_bind`). There the
/// address must be the one the system itself would speak from to reach it, which misses secondary addresses: to be
/// blind to a loop is the lesser evil, as the other mistake refuses every server on a listener's port.
pub fn is_local(address: IpAddr) -> bool {
    let address = address.to_canonical();
    if address.is_loopback() {
        return true;
    }
    UdpSocket::bind((address, 0)).is_ok() && (!any_can_be_bound(address) || speaks_from(address))
}

/// Tries an address that is nobody's (RFC 5737, RFC 3849).
fn any_can_be_bound(like: IpAddr) -> bool {
    let nobodys: IpAddr = match like {
        IpAddr::V4(_) => Ipv4Addr::new(192, 0, 2, 1).into(),
        IpAddr::V6(_) => Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1).into(),
    };
    UdpSocket::bind((nobodys, 0)).is_ok()
}

/// Connecting a UDP socket picks its source address and sends nothing.
fn speaks_from(address: IpAddr) -> bool {
    let any: IpAddr = match address {
        IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let source = UdpSocket::bind((any, 0)).and_then(|socket| {
        socket.connect((address, 9))?;
        socket.local_addr()
    });
    source.is_ok_and(|source| source.ip() == address)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_is_and_documentation_is_not() {
        for local in ["127.0.0.1", "127.0.0.2", "::1", "::ffff:127.0.0.1"] {
            assert!(is_local(local.parse().unwrap()), "{local}");
        }
        for foreign in ["192.0.2.7", "198.51.100.1", "2001:db8::7"] {
            assert!(!is_local(foreign.parse().unwrap()), "{foreign}");
        }
    }
}
