//! What clients are offered before login, from what each server offers. Pure.

use crate::identity::{Mechanism, Mechanisms};
use crate::protocol::imap::capability::{Extensions, ServerCapabilities};

/// The offer while no server has been seen.
pub(super) const PASSWORDS_ONLY: ServerCapabilities =
    ServerCapabilities { mechanisms: Mechanisms::PASSWORDS, extensions: Extensions::NONE };

/// What every server that has been seen can take, of backends with a login of their own or without: a password can be brought in any
/// form, a certificate needs a login of the backend. Nothing is promised while no server has been seen.
pub(super) fn common(backends: impl Iterator<Item = (bool, Vec<ServerCapabilities>)>) -> ServerCapabilities {
    let passwords = Mechanisms::PASSWORDS;
    let mut mechanisms: Mechanisms = Mechanism::ALL.into_iter().collect();
    let mut extensions = Extensions::ALL;
    let mut seen = false;
    for (has_login, servers) in backends {
        for offer in servers {
            seen = true;
            let takes_passwords = offer.mechanisms.has(Mechanism::Login) || offer.mechanisms.has(Mechanism::SaslPlain);
            let relayed: Mechanisms = offer.mechanisms.iter().filter(|mechanism| mechanism.is_relayed()).collect();
            let can = if takes_passwords { relayed.or(passwords) } else { relayed };
            mechanisms = mechanisms.and(can.with(Mechanism::External));
            extensions = extensions.and(offer.extensions);
        }
        if !has_login {
            let others = Mechanism::ALL.into_iter().filter(|mechanism| *mechanism != Mechanism::External);
            mechanisms = mechanisms.and(others.collect());
        }
    }
    // With no mechanism at all, clients would not even learn why they cannot log in.
    if !seen || !mechanisms.iter().any(|mechanism| mechanism != Mechanism::External) {
        mechanisms = passwords.or(mechanisms.and(Mechanisms::default().with(Mechanism::External)));
    }
    ServerCapabilities { mechanisms, extensions: if seen { extensions } else { Extensions::NONE } }
}

/// An offer as one number, so that it is replaced as a whole: mechanisms in the low half, extensions in the high one.
pub(super) fn packed(offer: ServerCapabilities) -> u64 {
    u64::from(offer.mechanisms.to_bits()) | u64::from(offer.extensions.to_bits()) << 32
}

/// The offer that [`packed`] gave.
pub(super) fn unpacked(bits: u64) -> ServerCapabilities {
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

    #[test]
    fn what_all_servers_have_is_offered() {
        let one = offer(&[Mechanism::SaslPlain, Mechanism::XOauth2, Mechanism::ScramSha256], 0b0111);
        let other = offer(&[Mechanism::Login, Mechanism::XOauth2], 0b1101);
        let both = common([(false, vec![one]), (true, vec![other])].into_iter());
        assert_eq!(both.mechanisms, Mechanisms::PASSWORDS.with(Mechanism::XOauth2));
        assert_eq!(both.extensions, Extensions::from_bits(0b0101));
        assert_eq!(unpacked(packed(both)), both);
        let with_certificates = common([(true, vec![one, other])].into_iter());
        assert!(with_certificates.mechanisms.has(Mechanism::External));
        let none_in_common = common([(false, vec![offer(&[Mechanism::XOauth2], 1), offer(&[], 0)])].into_iter());
        assert_eq!(none_in_common, PASSWORDS_ONLY);
    }

    #[test]
    fn servers_that_were_not_seen_promise_nothing() {
        assert_eq!(common([(false, Vec::new())].into_iter()), PASSWORDS_ONLY);
        let seen = offer(&[Mechanism::SaslPlain], 1);
        let one_unseen = common([(false, vec![seen]), (false, Vec::new())].into_iter());
        assert_eq!(one_unseen.extensions, seen.extensions, "a server that cannot be asked restricts nothing");
    }
}
