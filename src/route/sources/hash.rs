//! Routes every user by a hash of the user name: by rendezvous hashing, with which adding or removing a backend moves only the users of
//! that backend, or by the algorithm of Dovecot's director.

use std::sync::Arc;

use super::director::Ring;
use crate::config::{Config, HashShare, HashStyle};
use crate::rendezvous;
use crate::route::LookupResult;
use crate::route::decision::RouteDecision;

/// The backends that all users are distributed to.
#[derive(Debug)]
pub(in crate::route) enum Hash {
    Rendezvous(Vec<Share>),
    Director(Ring),
}

/// A backend and its weight.
#[derive(Debug)]
pub(in crate::route) struct Share {
    name: String,
    weight: u32,
    decision: Arc<RouteDecision>,
}

impl Hash {
    /// The hash uses the names of the backends, so that their order does not matter.
    pub(in crate::route) fn new(config: &Config, style: HashStyle, shares: &[HashShare]) -> Self {
        match style {
            HashStyle::Director => Self::Director(Ring::new(shares)),
            HashStyle::Vestibule => Self::Rendezvous(
                shares
                    .iter()
                    .map(|share| Share {
                        name: config.backends[share.backend.0].name.clone(),
                        weight: share.weight,
                        decision: RouteDecision::backend(share.backend).into(),
                    })
                    .collect(),
            ),
        }
    }

    /// Finds every user.
    pub(in crate::route) fn lookup(&self, user: &str) -> LookupResult {
        let decision = match self {
            Self::Director(ring) => ring.lookup(user),
            Self::Rendezvous(shares) => {
                let score = |share: &Share| rendezvous::score(user.as_bytes(), share.name.as_bytes(), share.weight);
                shares.iter().max_by(|a, b| score(a).total_cmp(&score(b))).map(|share| &share.decision)
            }
        };
        decision.cloned().map_or(LookupResult::Unknown, LookupResult::Found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::BackendId;

    fn share(index: usize, weight: u32) -> Share {
        let name = ["shard-a", "shard-b", "shard-c"][index].to_owned();
        Share { name, weight, decision: RouteDecision::backend(BackendId(index)).into() }
    }

    #[test]
    fn shares_follow_weights_whatever_the_order() {
        let hash = Hash::Rendezvous(vec![share(0, 1), share(1, 1), share(2, 2)]);
        let reordered = Hash::Rendezvous(vec![share(2, 2), share(0, 1), share(1, 1)]);
        let mut seen = [0_u32; 3];
        for user in 0..2000 {
            let user = format!("user{user}");
            let LookupResult::Found(decision) = hash.lookup(&user) else { panic!("{user} must be found") };
            assert_eq!(reordered.lookup(&user), LookupResult::Found(decision.clone()));
            let RouteDecision::Destination(destination) = &*decision else { panic!() };
            seen[destination.backend.0] += 1;
        }
        for (share, expected) in seen.into_iter().zip([500, 500, 1000]) {
            assert!(share.abs_diff(expected) < 100, "{seen:?}");
        }
    }
}
