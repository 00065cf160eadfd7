//! Access lists: the narrowest listed network that contains an address decides. A lookup takes one hash lookup for each prefix length.

use std::collections::HashMap;
use std::net::IpAddr;

use crate::config::{AccessConfig, Network};

/// A map from networks to values.
#[derive(Debug)]
pub(super) struct Networks<T> {
    by_prefix: HashMap<Prefix, T>,
    /// Prefix lengths that occur, longest first.
    lengths: Vec<(Family, u8)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Family {
    V4,
    V6,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Prefix {
    family: Family,
    length: u8,
    bits: u128,
}

impl Prefix {
    fn of(address: IpAddr, length: u8) -> Self {
        let (family, bits, width) = match address {
            IpAddr::V4(v4) => (Family::V4, u128::from(v4.to_bits()), 32),
            IpAddr::V6(v6) => (Family::V6, v6.to_bits(), 128),
        };
        let bits = bits.checked_shr(width - u32::from(length)).unwrap_or(0);
        Self { family, length, bits }
    }
}

impl<T: Copy> Networks<T> {
    /// If a network is listed twice, the later value counts.
    pub(super) fn new(listed: impl IntoIterator<Item = (Network, T)>) -> Self {
        let mut networks = Self { by_prefix: HashMap::new(), lengths: Vec::new() };
        for (network, value) in listed {
            let (address, length) = network.parts();
            let prefix = Prefix::of(address, length);
            if !networks.lengths.contains(&(prefix.family, length)) {
                networks.lengths.push((prefix.family, length));
            }
            networks.by_prefix.insert(prefix, value);
        }
        networks.lengths.sort_unstable_by(|one, other| other.cmp(one));
        networks
    }

    /// The value of the narrowest network that contains `address`, and the length of that network's prefix.
    pub(super) fn find(&self, address: IpAddr) -> Option<(T, u8)> {
        let address = address.to_canonical();
        let family = if address.is_ipv4() { Family::V4 } else { Family::V6 };
        let lengths = self.lengths.iter().filter(|(of, _)| *of == family);
        lengths.map(|(_, length)| Prefix::of(address, *length)).find_map(|prefix| {
            let value = self.by_prefix.get(&prefix)?;
            Some((*value, prefix.length))
        })
    }
}

/// What `access` decides about an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum AccessDecision {
    Denied,
    Limited,
    Exempt,
}

/// The section `access`, prepared for lookups.
#[derive(Debug)]
pub(super) struct AccessList {
    listed: Networks<AccessDecision>,
    exempt: Networks<()>,
    /// Decision about addresses in no listed network.
    default: AccessDecision,
}

impl AccessList {
    pub(super) fn new(access: &AccessConfig) -> Self {
        let allowed = access.allow.iter().map(|network| (*network, AccessDecision::Limited));
        let denied = access.deny.iter().map(|network| (*network, AccessDecision::Denied));
        Self {
            // The later value counts, which is `deny` if a network is in both lists.
            listed: Networks::new(allowed.chain(denied)),
            exempt: Networks::new(access.exempt.iter().map(|network| (*network, ()))),
            default: if access.allow.is_empty() { AccessDecision::Limited } else { AccessDecision::Denied },
        }
    }

    pub(super) fn decide(&self, client: IpAddr) -> AccessDecision {
        let exempt = self.exempt.find(client);
        match (self.listed.find(client), exempt) {
            // An exempt network also overrides `deny`, unless the denied network is at least as narrow.
            (Some((AccessDecision::Denied, denied)), Some(((), exempt))) if exempt > denied => AccessDecision::Exempt,
            (Some((AccessDecision::Denied, _)), _) => AccessDecision::Denied,
            (_, Some(_)) => AccessDecision::Exempt,
            (Some((decision, _)), None) => decision,
            (None, None) => self.default,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr};

    use proptest::prelude::*;

    use super::*;

    fn access(allow: &[&str], deny: &[&str], exempt: &[&str]) -> AccessList {
        let networks = |texts: &[&str]| texts.iter().map(|text| Network::parse(text).unwrap()).collect();
        AccessList::new(&AccessConfig { allow: networks(allow), deny: networks(deny), exempt: networks(exempt) })
    }

    #[test]
    fn the_narrowest_network_decides() {
        use AccessDecision::{Denied, Exempt, Limited};
        for (door, client, expected) in [
            (access(&[], &[], &[]), "192.0.2.1", Limited),
            (access(&[], &["192.0.2.0/24"], &[]), "192.0.2.1", Denied),
            (access(&[], &["192.0.2.0/24"], &[]), "::ffff:192.0.2.1", Denied),
            (access(&[], &["192.0.2.0/24"], &[]), "192.0.3.1", Limited),
            (access(&["10.0.0.0/8"], &[], &[]), "192.0.2.1", Denied),
            (access(&["10.0.0.0/8"], &[], &[]), "2001:db8::1", Denied),
            (access(&["10.0.0.0/8"], &["0.0.0.0/0"], &[]), "10.9.9.9", Limited),
            (access(&["10.0.0.0/8"], &["10.1.0.0/16"], &[]), "10.1.2.3", Denied),
            (access(&["10.1.2.3", "10.0.0.0/8"], &["10.1.0.0/16"], &[]), "10.1.2.3", Limited),
            (access(&["10.0.0.0/8"], &["10.0.0.0/8"], &[]), "10.1.2.3", Denied),
            (access(&["10.0.0.0/8"], &[], &["192.0.2.7"]), "192.0.2.7", Exempt),
            (access(&[], &["192.0.2.0/24"], &["192.0.2.7"]), "192.0.2.7", Exempt),
            (access(&[], &["192.0.2.7"], &["192.0.2.0/24"]), "192.0.2.7", Denied),
            (access(&[], &["2001:db8:1::/48"], &["2001:db8::/32"]), "2001:db8:1::1", Denied),
            (access(&[], &[], &["::/0"]), "192.0.2.1", Limited),
        ] {
            assert_eq!(door.decide(client.parse().unwrap()), expected, "{client} {door:?}");
        }
    }

    fn address() -> impl Strategy<Value = IpAddr> {
        // Few bits, so that networks meet.
        prop_oneof![
            (0u32..16).prop_map(|bits| IpAddr::V4(Ipv4Addr::from_bits(bits << 28))),
            (0u128..16).prop_map(|bits| IpAddr::V6(Ipv6Addr::from_bits(bits << 124))),
        ]
    }

    proptest! {
        #[test]
        fn as_one_by_one(listed in prop::collection::vec((address(), 0u8..6), 0..12), client in address()) {
            let listed: Vec<(Network, u8)> =
                listed.iter().map(|(address, bits)| (Network::parse(&format!("{address}/{bits}")).unwrap(), *bits)).collect();
            let narrowest = listed.iter().filter(|(network, _)| network.contains(client)).map(|(_, bits)| *bits).max();
            prop_assert_eq!(Networks::new(listed).find(client), narrowest.map(|bits| (bits, bits)));
        }
    }
}
