//! What clients are offered before login, from what the servers offer. Pure.

use crate::identity::{Mechanism, Mechanisms};
use crate::protocol::imap::capability::{Extensions, ServerCapabilities};

/// The offer until a check has reached a server.
pub(super) const PASSWORDS_ONLY: ServerCapabilities =
    ServerCapabilities { mechanisms: Mechanisms::PASSWORDS, extensions: Extensions::NONE };

/// Offers of one backend's servers.
pub(super) struct BackendOffers {
    /// Whether the proxy has credentials of its own for the backend, which a client with a certificate needs.
    pub(super) has_credentials: bool,
    /// Offers of the servers that checks have reached.
    pub(super) servers: Vec<ServerCapabilities>,
}

/// What every known server can do. A password can be sent in any form that the server has; a certificate requires the
/// proxy's own credentials for the backend. Extensions are offered only after a check has reached a server.
pub(super) fn common(backends: impl Iterator<Item = BackendOffers>) -> ServerCapabilities {
    let mut mechanisms: Mechanisms = Mechanism::ALL.into_iter().collect();
    let mut extensions = Extensions::ALL;
    let mut is_any_known = false;
    for BackendOffers { has_credentials, servers } in backends {
        for offer in servers {
            is_any_known = true;
            mechanisms = mechanisms.and(usable(offer.mechanisms).with(Mechanism::External));
            extensions = extensions.and(offer.extensions);
        }
        if !has_credentials {
            let others = Mechanism::ALL.into_iter().filter(|mechanism| *mechanism != Mechanism::External);
            mechanisms = mechanisms.and(others.collect());
        }
    }
    // With no mechanism at all, clients could not even learn why they cannot log in.
    if !is_any_known || !mechanisms.iter().any(|mechanism| mechanism != Mechanism::External) {
        mechanisms = Mechanisms::PASSWORDS.or(mechanisms.and(Mechanisms::default().with(Mechanism::External)));
    }
    ServerCapabilities { mechanisms, extensions: if is_any_known { extensions } else { Extensions::NONE } }
}

/// The mechanisms that clients can use with a server that offers these.
fn usable(offered: Mechanisms) -> Mechanisms {
    let relayed: Mechanisms = offered.iter().filter(|mechanism| mechanism.is_relayed()).collect();
    let has_passwords = offered.has(Mechanism::Login) || offered.has(Mechanism::SaslPlain);
    if has_passwords { relayed.or(Mechanisms::PASSWORDS) } else { relayed }
}

/// An offer as one number, which can be replaced atomically: mechanisms in the low half, extensions in the high half.
pub(super) fn pack(offer: ServerCapabilities) -> u64 {
    u64::from(offer.mechanisms.to_bits()) | u64::from(offer.extensions.to_bits()) << 32
}

/// The offer that [`pack`] was given.
pub(super) fn unpack(bits: u64) -> ServerCapabilities {
    let (mechanisms, extensions) = (Mechanisms::from_bits(bits as u16), Extensions::from_bits((bits >> 32) as u32));
    ServerCapabilities { mechanisms, extensions }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn offer(mechanisms: &[Mechanism], extensions: u32) -> ServerCapabilities {
        ServerCapabilities {
            mechanisms: mechanisms.iter().copied().collect(),
            extensions: Extensions::from_bits(extensions),
        }
    }

    fn common_of<const N: usize>(backends: [(bool, Vec<ServerCapabilities>); N]) -> ServerCapabilities {
        let backends = backends.into_iter();
        common(backends.map(|(has_credentials, servers)| BackendOffers { has_credentials, servers }))
    }

    #[test]
    fn offer_is_what_all_servers_have() {
        let one = offer(&[Mechanism::SaslPlain, Mechanism::XOauth2, Mechanism::ScramSha256], 0b0111);
        let other = offer(&[Mechanism::Login, Mechanism::XOauth2], 0b1101);
        let both = common_of([(false, vec![one]), (true, vec![other])]);
        assert_eq!(both.mechanisms, Mechanisms::PASSWORDS.with(Mechanism::XOauth2));
        assert_eq!(both.extensions, Extensions::from_bits(0b0101));
        assert_eq!(unpack(pack(both)), both);
        let with_certificates = common_of([(true, vec![one, other])]);
        assert!(with_certificates.mechanisms.has(Mechanism::External));
        let nothing_in_common = common_of([(false, vec![offer(&[Mechanism::XOauth2], 1), offer(&[], 0)])]);
        assert_eq!(nothing_in_common, PASSWORDS_ONLY);
    }

    #[test]
    fn offer_without_known_servers_has_passwords_only() {
        assert_eq!(common_of([(false, Vec::new())]), PASSWORDS_ONLY);
        let known = offer(&[Mechanism::SaslPlain], 1);
        let one_unknown = common_of([(false, vec![known]), (false, Vec::new())]);
        assert_eq!(one_unknown.extensions, known.extensions, "a server that cannot be reached restricts nothing");
    }
}
