//! Decides in which order a login tries a backend's servers. No I/O: counts, random numbers and credits are arguments.
//!
//! Available servers come before failing ones, and a lower SRV priority before a higher one (RFC 2782). Servers that are equal
//! in both form a tier, in which the backend's `balance` decides. `user-hash`, the default, keeps all sessions of a user on one
//! server while it is up. Shared storage needs that: two Dovecot servers that open one mailbox damage its index. The other
//! balances are for storage without that restriction. Servers that are drained or down are not candidates.

use crate::config::Balance;
use crate::rendezvous;

/// The properties of a server that determine its position.
#[derive(Debug, Clone, Copy)]
pub(super) struct Candidate<'a> {
    /// The configured name, which is part of the hash.
    pub name: &'a str,
    /// The configured weight, relative to the servers of the same priority.
    pub weight: u32,
    /// The lowest priority is tried first.
    pub priority: u16,
    /// Whether the server is not failing: see `health`.
    pub is_available: bool,
    /// Number of sessions, logins in progress included.
    pub sessions: u32,
    /// Factor on the weight, less than 1 for a while after a recovery (`slow_start`).
    pub ramp: f64,
}

impl Candidate<'_> {
    fn effective_weight(&self) -> f64 {
        f64::from(self.weight) * self.ramp
    }

    /// Sessions per weight if this login is added. Ignores `ramp`, which `by_sessions` applies to the draw.
    fn load(&self) -> f64 {
        (f64::from(self.sessions) + 1.0) / f64::from(self.weight)
    }
}

/// Inputs that change from login to login: a source of random numbers, and the credits that earlier logins have left.
pub(super) struct SelectionState<'a> {
    /// Returns a random number from 0 up to, but not including, 1.
    pub random: &'a mut dyn FnMut() -> f64,
    /// Credits of each candidate for `round-robin`, which are updated; empty for other balances.
    pub credits: &'a mut [f64],
}

/// Positions of `candidates` in the order in which a login of `user` tries them.
pub(super) fn order(
    balance: Balance,
    user: &str,
    candidates: &[Candidate<'_>],
    state: &mut SelectionState<'_>,
) -> Vec<usize> {
    let rank = |index: &usize| (!candidates[*index].is_available, candidates[*index].priority);
    let mut order: Vec<usize> = (0..candidates.len()).collect();
    order.sort_by_key(rank);
    for (tier_index, tier) in order.chunk_by_mut(|a, b| rank(a) == rank(b)).enumerate() {
        match balance {
            Balance::UserHash => by_hash(user, candidates, tier),
            Balance::BoundedHash { factor } => by_bounded_hash(factor, user, candidates, tier),
            Balance::LeastSessions => by_sessions(candidates, tier, state.random),
            // Only the first tier pays for the turn.
            Balance::RoundRobin if tier_index == 0 => by_turn(candidates, tier, state.credits),
            Balance::RoundRobin => by_credits(tier, state.credits),
        }
    }
    order
}

/// Rendezvous hashing. A slow start is ignored, because it would send the sessions of one user to two servers.
fn by_hash(user: &str, candidates: &[Candidate<'_>], tier: &mut [usize]) {
    let score = |index: &usize| {
        let candidate = &candidates[*index];
        rendezvous::score(user.as_bytes(), candidate.name.as_bytes(), candidate.weight)
    };
    tier.sort_by(|a, b| score(b).total_cmp(&score(a)));
}

/// Rendezvous hashing in which servers with `factor` times their fair share of sessions come after all others
/// (Mirrokni, Thorup and Zadimoghaddam, 2016).
fn by_bounded_hash(factor: f64, user: &str, candidates: &[Candidate<'_>], tier: &mut [usize]) {
    by_hash(user, candidates, tier);
    let total_sessions: f64 = tier.iter().map(|index| f64::from(candidates[*index].sessions)).sum::<f64>() + 1.0;
    let total_weight: f64 = tier.iter().map(|index| candidates[*index].effective_weight()).sum();
    let is_full = |index: &usize| {
        let candidate = &candidates[*index];
        f64::from(candidate.sessions) >= (factor * total_sessions * candidate.effective_weight() / total_weight).ceil()
    };
    // The sort is stable: the user's own order is kept among the full ones and among the others.
    tier.sort_by_key(is_full);
}

/// The less loaded of two servers drawn by weight comes first, then the others by load.
///
/// If the least loaded server always came first, proxies that do not know of each other's logins would all send them there
/// (Mitzenmacher, 2001). A server in its slow start is empty and would win whenever it is drawn, so it takes part in a
/// growing share of the draws only.
fn by_sessions(candidates: &[Candidate<'_>], tier: &mut [usize], random: &mut dyn FnMut() -> f64) {
    let mut draws_exclusion = |ramp: f64| ramp < 1.0 && random() >= ramp;
    let drawable: Vec<usize> = tier.iter().copied().filter(|index| !draws_exclusion(candidates[*index].ramp)).collect();
    let is_excluded = |index: &usize| !drawable.is_empty() && !drawable.contains(index);
    tier.sort_by(|a, b| {
        let load = |index: &usize| candidates[*index].load();
        is_excluded(a).cmp(&is_excluded(b)).then(load(a).total_cmp(&load(b)))
    });
    let drawable_count = if drawable.is_empty() { tier.len() } else { drawable.len() };
    let first = draw(candidates, &tier[..drawable_count], None, random());
    let second = draw(candidates, &tier[..drawable_count], Some(first), random());
    let load = |position: usize| candidates[tier[position]].load();
    let winner = if load(second) < load(first) { second } else { first };
    tier[..=winner].rotate_right(1);
}

/// Draws the position of one of `tier` by weight, other than `excluded` if possible.
fn draw(candidates: &[Candidate<'_>], tier: &[usize], excluded: Option<usize>, random: f64) -> usize {
    let weight = |position: usize| f64::from(candidates[tier[position]].weight);
    let positions = || (0..tier.len()).filter(|position| Some(*position) != excluded);
    let mut left = random * positions().map(weight).sum::<f64>();
    let mut last = excluded.unwrap_or(0);
    for position in positions() {
        last = position;
        left -= weight(position);
        if left < 0.0 {
            break;
        }
    }
    last
}

/// Smooth weighted round robin: every server earns its weight; the server with the most credits comes first and pays the total
/// weight of its tier.
fn by_turn(candidates: &[Candidate<'_>], tier: &mut [usize], credits: &mut [f64]) {
    for index in &*tier {
        credits[*index] += candidates[*index].effective_weight();
    }
    by_credits(tier, credits);
    if let Some(first) = tier.first() {
        credits[*first] -= tier.iter().map(|index| candidates[*index].effective_weight()).sum::<f64>();
    }
}

fn by_credits(tier: &mut [usize], credits: &[f64]) {
    tier.sort_by(|a, b| credits[*b].total_cmp(&credits[*a]));
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn candidate(name: &str, priority: u16, is_available: bool) -> Candidate<'_> {
        Candidate { name, weight: 1, priority, is_available, sessions: 0, ramp: 1.0 }
    }

    /// Random numbers that are the same in each run.
    fn random_numbers() -> impl FnMut() -> f64 {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        move || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 11) as f64 / (1_u64 << 53) as f64
        }
    }

    fn hashed(user: &str, candidates: &[Candidate<'_>]) -> Vec<usize> {
        order(Balance::UserHash, user, candidates, &mut SelectionState { random: &mut || 0.5, credits: &mut [] })
    }

    /// Adds a session for each of `logins` users.
    fn fill(balance: Balance, candidates: &mut [Candidate<'_>], logins: u32) {
        let (mut random, mut credits) = (random_numbers(), vec![0.0; candidates.len()]);
        for user in 0..logins {
            let mut state = SelectionState { random: &mut random, credits: &mut credits };
            let first = order(balance, &format!("user{user}"), candidates, &mut state)[0];
            candidates[first].sessions += 1;
        }
    }

    const NAMES: [&str; 5] = ["a", "b", "c", "d", "e"];
    const ALL: [Balance; 4] =
        [Balance::UserHash, Balance::BoundedHash { factor: 1.25 }, Balance::LeastSessions, Balance::RoundRobin];

    fn weighted(weights: &[u32]) -> Vec<Candidate<'static>> {
        let named = NAMES.into_iter().zip(weights);
        named.map(|(name, weight)| Candidate { weight: *weight, ..candidate(name, 0, true) }).collect()
    }

    #[test]
    fn order_is_by_availability_then_priority_then_balance() {
        let candidates = [
            candidate("failing", 0, false),
            candidate("spare", 20, true),
            candidate("a", 10, true),
            candidate("b", 10, true),
        ];
        for balance in ALL {
            let (mut first, mut random, mut credits) = ([0; 4], random_numbers(), [0.0; 4]);
            for user in 0..100 {
                let mut state = SelectionState { random: &mut random, credits: &mut credits };
                let order = order(balance, &format!("user{user}"), &candidates, &mut state);
                first[order[0]] += 1;
                assert_eq!(&order[2..], [1, 0], "spare, then the failing one");
            }
            assert!(first[2] > 30 && first[3] > 30 && first[2] + first[3] == 100, "{balance:?} {first:?}");
        }
    }

    #[test]
    fn user_returns_to_its_server_after_an_outage() {
        let up = [candidate("a", 0, true), candidate("b", 0, true), candidate("c", 0, true)];
        let before = hashed("alice", &up);
        let mut outage = up;
        outage[before[0]].is_available = false;
        let during = hashed("alice", &outage);
        assert_eq!(during, [before[1], before[2], before[0]], "the others keep their order");
        assert_eq!(hashed("alice", &up), before);
    }

    #[test]
    fn round_robin_alternates() {
        let candidates = weighted(&[1, 1]);
        let mut credits = [0.0; 2];
        let mut turn = || {
            order(
                Balance::RoundRobin,
                "alice",
                &candidates,
                &mut SelectionState { random: &mut || 0.5, credits: &mut credits },
            )
        };
        let turns: Vec<Vec<usize>> = (0..4).map(|_| turn()).collect();
        assert_eq!(turns, [[0, 1], [1, 0], [0, 1], [1, 0]], "the turns alternate");
    }

    #[test]
    fn less_loaded_of_two_drawn_servers_wins() {
        let mut candidates = weighted(&[1, 1, 1]);
        (candidates[0].sessions, candidates[1].sessions, candidates[2].sessions) = (9, 5, 7);
        let pick = |first: f64, second: f64| {
            let mut draws = [first, second].into_iter();
            let mut random = || draws.next().unwrap();
            order(
                Balance::LeastSessions,
                "",
                &candidates,
                &mut SelectionState { random: &mut random, credits: &mut [] },
            )
        };
        // Positions are drawn among the candidates by load: 1, 2, 0.
        assert_eq!(pick(0.9, 0.9), [2, 1, 0], "0 and 2 were drawn");
        assert_eq!(pick(0.9, 0.1), [1, 2, 0], "0 and 1");
        assert_eq!(pick(0.1, 0.1), [1, 2, 0], "1 and 2");
    }

    #[test]
    fn recovered_server_is_not_overrun() {
        for (balance, bound) in [(Balance::LeastSessions, 13), (Balance::RoundRobin, 10)] {
            let mut candidates = weighted(&[1, 1]);
            (candidates[0].sessions, candidates[1].ramp) = (1000, 0.1);
            fill(balance, &mut candidates, 100);
            let taken = candidates[1].sessions;
            assert!((5..=bound).contains(&taken), "{balance:?}: {taken} of 100");
            candidates[1].ramp = 1.0;
            fill(balance, &mut candidates, 100);
            assert!(candidates[1].sessions >= taken + 50, "{balance:?}");
        }
        // With user-hash the user's server takes precedence over the slow start.
        let mut candidates = weighted(&[1, 1]);
        let before: Vec<_> = (0..50).map(|user| hashed(&format!("user{user}"), &candidates)).collect();
        candidates[1].ramp = 0.1;
        let after: Vec<_> = (0..50).map(|user| hashed(&format!("user{user}"), &candidates)).collect();
        assert_eq!(before, after);
    }

    #[test]
    fn order_of_no_candidates_is_empty() {
        for balance in ALL {
            let mut state = SelectionState { random: &mut || 0.0, credits: &mut [] };
            assert!(order(balance, "alice", &[], &mut state).is_empty());
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        #[test]
        fn every_candidate_is_tried_once(
            servers in proptest::collection::vec((1_u32..20, 0_u16..3, any::<bool>(), 0_u32..50, 0.1_f64..=1.0), 1..8),
            balance in 0..4_usize, draws in proptest::collection::vec(0.0_f64..1.0, 32),
        ) {
            let candidates: Vec<Candidate<'_>> = servers.iter().map(|(weight, priority, is_available, sessions, ramp)| {
                Candidate { name: "same", weight: *weight, priority: *priority, is_available: *is_available, sessions: *sessions, ramp: *ramp }
            }).collect();
            let mut draws = draws.into_iter();
            let mut state = SelectionState { random: &mut || draws.next().unwrap_or(0.0), credits: &mut vec![0.0; servers.len()] };
            let mut order = order(ALL[balance], "alice", &candidates, &mut state);
            let rank = |index: &usize| (!candidates[*index].is_available, candidates[*index].priority);
            prop_assert!(order.is_sorted_by_key(rank), "{order:?}");
            order.sort_unstable();
            prop_assert_eq!(order, (0..servers.len()).collect::<Vec<_>>());
        }

        #[test]
        fn shares_follow_weights(weights in proptest::collection::vec(1_u32..5, 2..=5)) {
            let sum: u32 = weights.iter().sum();
            // Tolerated deviation: random balances vary, turns do not.
            for (balance, slack) in [
                (Balance::UserHash, 0.12), (Balance::BoundedHash { factor: 1.25 }, 0.30),
                (Balance::LeastSessions, 0.12), (Balance::RoundRobin, 0.002),
            ] {
                let mut candidates = weighted(&weights);
                fill(balance, &mut candidates, 2000);
                for candidate in &candidates {
                    let fair = 2000.0 * f64::from(candidate.weight) / f64::from(sum);
                    let off = (f64::from(candidate.sessions) - fair).abs();
                    prop_assert!(off <= fair * slack + 20.0 * f64::from(slack > 0.01) + 1.0, "{balance:?} {candidates:?}");
                }
            }
        }

        #[test]
        fn bound_is_kept_after_every_login(
            weights in proptest::collection::vec(1_u32..5, 2..=5), factor in 1.05_f64..2.0,
        ) {
            let mut candidates = weighted(&weights);
            let sum: f64 = weights.iter().map(|weight| f64::from(*weight)).sum();
            for user in 0..300 {
                let mut state = SelectionState { random: &mut || 0.5, credits: &mut [] };
                let user = format!("user{user}");
                let first = order(Balance::BoundedHash { factor }, &user, &candidates, &mut state)[0];
                candidates[first].sessions += 1;
                let total: u32 = candidates.iter().map(|candidate| candidate.sessions).sum();
                let bound = (factor * f64::from(total) * f64::from(candidates[first].weight) / sum).ceil();
                prop_assert!(f64::from(candidates[first].sessions) <= bound, "{candidates:?}");
            }
        }

        #[test]
        fn hash_moves_only_users_of_the_server_that_fails(weights in proptest::collection::vec(1_u32..5, 3..=5), gone in 0..3_usize) {
            // Without sessions the bounded hash equals the plain one.
            for balance in [Balance::UserHash, Balance::BoundedHash { factor: 1.25 }] {
                let all = weighted(&weights);
                let mut fewer = all.clone();
                fewer[gone].is_available = false;
                for user in 0..200 {
                    let user = format!("user{user}");
                    let first = |candidates: &[Candidate<'_>]| {
                        order(balance, &user, candidates, &mut SelectionState { random: &mut || 0.5, credits: &mut [] })[0]
                    };
                    let (before, after) = (first(&all), first(&fewer));
                    prop_assert!(before == after || before == gone, "{user} moved from {before} to {after}");
                }
            }
        }
    }
}
