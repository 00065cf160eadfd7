//! Detects addresses of this machine, to refuse a server that is one of the proxy's own listeners. Sends no packets.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket};

/// Whether the address belongs to this machine, which is the case if a socket can be bound to it.
///
/// Machines that share an address (VRRP) often permit binding to any address (`ip_nonlocal_bind`). On these, the address
/// must also be the source address that the system would choose to reach it. This misses secondary addresses, so that a
/// loop may remain undetected; the opposite error would refuse every server that uses a listener's port.
pub fn is_local(address: IpAddr) -> bool {
    let address = address.to_canonical();
    if address.is_loopback() {
        return true;
    }
    UdpSocket::bind((address, 0)).is_ok() && (!any_address_can_be_bound(address) || is_source_address(address))
}

/// Tries to bind a documentation address, which no machine has (RFC 5737, RFC 3849).
fn any_address_can_be_bound(like: IpAddr) -> bool {
    let documentation: IpAddr = match like {
        IpAddr::V4(_) => Ipv4Addr::new(192, 0, 2, 1).into(),
        IpAddr::V6(_) => Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1).into(),
    };
    UdpSocket::bind((documentation, 0)).is_ok()
}

/// Connecting a UDP socket selects its source address and sends no packet.
fn is_source_address(address: IpAddr) -> bool {
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
    fn loopback_addresses_are_local_and_documentation_addresses_are_not() {
        for local in ["127.0.0.1", "127.0.0.2", "::1", "::ffff:127.0.0.1"] {
            assert!(is_local(local.parse().unwrap()), "{local}");
        }
        for foreign in ["192.0.2.7", "198.51.100.1", "2001:db8::7"] {
            assert!(!is_local(foreign.parse().unwrap()), "{foreign}");
        }
    }
}
