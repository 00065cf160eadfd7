//! Route every user by a hash of the name: a backend more or less moves only its own share (see `rendezvous`), or where
//! Dovecot's director had it.

use std::sync::Arc;

use super::director::Ring;
use crate::config::{Config, HashShare, HashStyle};
use crate::rendezvous;
use crate::route::LookupResult;
use crate::route::decision::RouteDecision;

/// Backends that share all users.
#[derive(Debug)]
pub(in crate::route) enum Hash {
    Rendezvous(Vec<Share>),
    Director(Ring),
}

/// One backend's claim.
#[derive(Debug)]
pub(in crate::route) struct Share {
    name: String,
    weight: u32,
    target: Arc<RouteDecision>,
}

impl Hash {
    /// Backends count by their names, so their order does not matter.
    pub(in crate::route) fn new(config: &Config, style: HashStyle, shares: &[HashShare]) -> Self {
        match style {
            HashStyle::Director => Self::Director(Ring::new(shares)),
            HashStyle::Vestibule => Self::Rendezvous(
                shares
                    .iter()
                    .map(|share| Share {
                        name: config.backends[share.backend.0].name.clone(),
                        weight: share.weight,
                        target: RouteDecision::backend(share.backend).into(),
                    })
                    .collect(),
            ),
        }
    }

    /// Knows every user.
    pub(in crate::route) fn lookup(&self, user: &str) -> LookupResult {
        let target = match self {
            Self::Director(ring) => ring.lookup(user),
            Self::Rendezvous(shares) => {
                let score = |share: &Share| rendezvous::score(user.as_bytes(), share.name.as_bytes(), share.weight);
                shares.iter().max_by(|a, b| score(a).total_cmp(&score(b))).map(|share| &share.target)
            }
        };
        target.cloned().map_or(LookupResult::Unknown, LookupResult::Found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::BackendId;

    fn share(index: usize, weight: u32) -> Share {
        let name = ["shard-a", "shard-b", "shard-c"][index].to_owned();
        Share { name, weight, target: RouteDecision::backend(BackendId(index)).into() }
    }

    #[test]
    fn order_does_not_matter_and_all_get_their_share() {
        let one = Hash::Rendezvous(vec![share(0, 1), share(1, 1), share(2, 2)]);
        let other = Hash::Rendezvous(vec![share(2, 2), share(0, 1), share(1, 1)]);
        let mut seen = [0_u32; 3];
        for user in 0..2000 {
            let user = format!("user{user}");
            let LookupResult::Found(target) = one.lookup(&user) else { panic!("{user} is unknown") };
            assert_eq!(other.lookup(&user), LookupResult::Found(target.clone()));
            let RouteDecision::Destination(place) = &*target else { panic!() };
            seen[place.backend.0] += 1;
        }
        for (share, expected) in seen.into_iter().zip([500, 500, 1000]) {
            assert!(share.abs_diff(expected) < 100, "{seen:?}");
        }
    }
}
