//! Which server of a backend comes first for a login, and which next. Pure: counts, chance and turns are handed in.
//!
//! Servers that are available come before those that are failing, a lower SRV priority before a higher (RFC 2782), and
//! among equals the backend's `balance` decides. `user-hash` is the default: a user's sessions meet on one server while
//! it is up, which storage that several servers share needs (two Dovecots on one mailbox damage its index). The other
//! balances are for storage that does not mind. Servers that are drained or down are no candidates at all. Called by
//! `backend` for each login.

use crate::config::Balance;
use crate::rendezvous;

/// What the choice depends on.
#[derive(Debug, Clone, Copy)]
pub(super) struct Candidate<'a> {
    /// The server's name as configured: part of the hash.
    pub name: &'a str,
    /// Share among servers of the same priority.
    pub weight: u32,
    /// Lower is asked first.
    pub priority: u16,
    /// See `health`.
    pub available: bool,
    /// Sessions it has, logins under way included.
    pub sessions: u32,
    /// How much of its weight counts just now: less than 1 for a while after a recovery (`slow_start`).
    pub ramp: f64,
}

impl Candidate<'_> {
    fn share(&self) -> f64 {
        f64::from(self.weight) * self.ramp
    }

    /// How full it would be with one more.
    fn load(&self) -> f64 {
        (f64::from(self.sessions) + 1.0) / f64::from(self.weight)
    }
}

/// What a choice takes along from the one before it, and from chance.
pub(super) struct SelectionState<'a> {
    /// The next number from 0 up to 1.
    pub chance: &'a mut dyn FnMut() -> f64,
    /// How far each candidate is behind its share, for `round-robin`; as long as the candidates.
    pub credits: &'a mut [f64],
}

/// Positions of `candidates` in the order in which they are to be tried for `user`.
pub(super) fn order(
    balance: Balance,
    user: &str,
    candidates: &[Candidate<'_>],
    luck: &mut SelectionState<'_>,
) -> Vec<usize> {
    let rank = |index: &usize| (!candidates[*index].available, candidates[*index].priority);
    let mut order: Vec<usize> = (0..candidates.len()).collect();
    order.sort_by_key(rank);
    for (position, equals) in order.chunk_by_mut(|a, b| rank(a) == rank(b)).enumerate() {
        match balance {
            Balance::UserHash => by_hash(user, candidates, equals),
            Balance::BoundedHash { factor } => by_bounded_hash(factor, user, candidates, equals),
            Balance::LeastSessions => by_sessions(candidates, equals, luck.chance),
            Balance::RoundRobin => by_turn(candidates, equals, luck.credits, position == 0),
        }
    }
    order
}

/// Rendezvous hashing. A slow start has no say: it would send a user's sessions to two servers.
fn by_hash(user: &str, candidates: &[Candidate<'_>], equals: &mut [usize]) {
    let score = |index: &usize| {
        let candidate = &candidates[*index];
        rendezvous::score(user.as_bytes(), candidate.name.as_bytes(), candidate.weight)
    };
    equals.sort_by(|a, b| score(b).total_cmp(&score(a)));
}

/// The same, but whoever has `factor` times its fair share of the sessions already comes behind those who have not
/// (Mirrokni, Thorup and Zadimoghaddam, 2016).
fn by_bounded_hash(factor: f64, user: &str, candidates: &[Candidate<'_>], equals: &mut [usize]) {
    by_hash(user, candidates, equals);
    let total: f64 = equals.iter().map(|index| f64::from(candidates[*index].sessions)).sum::<f64>() + 1.0;
    let shares: f64 = equals.iter().map(|index| candidates[*index].share()).sum();
    let is_full = |index: &usize| {
        let candidate = &candidates[*index];
        f64::from(candidate.sessions) >= (factor * total * candidate.share() / shares).ceil()
    };
    // Stable: among the full ones, and among the others, the user's own order stays.
    equals.sort_by_key(is_full);
}

/// Of two drawn by weight the one with fewer sessions for its weight; then the others, the emptiest first.
///
/// Drawing two keeps machines that do not know of each other's logins from all running to the same empty server
/// (Mitzenmacher, 2001). One in its slow start is empty, and would win each time it is drawn: it takes part in a growing
/// share of draws only.
fn by_sessions(candidates: &[Candidate<'_>], equals: &mut [usize], chance: &mut dyn FnMut() -> f64) {
    let sits_out: Vec<bool> =
        equals.iter().map(|index| candidates[*index].ramp).map(|ramp| ramp < 1.0 && chance() >= ramp).collect();
    let playing: Vec<usize> =
        equals.iter().zip(&sits_out).filter_map(|(index, sits_out)| (!sits_out).then_some(*index)).collect();
    let is_behind = |index: &usize| !playing.is_empty() && !playing.contains(index);
    equals.sort_by(|a, b| {
        let load = |index: &usize| candidates[*index].load();
        is_behind(a).cmp(&is_behind(b)).then(load(a).total_cmp(&load(b)))
    });
    let players = if playing.is_empty() { equals.len() } else { playing.len() };
    let first = drawn(candidates, &equals[..players], None, chance());
    let second = drawn(candidates, &equals[..players], Some(first), chance());
    let load = |position: usize| candidates[equals[position]].load();
    let winner = if load(second) < load(first) { second } else { first };
    equals[..=winner].rotate_right(1);
}

/// The position of one of `equals`, by weight, `but` one of them. Where there is no other, that one.
fn drawn(candidates: &[Candidate<'_>], equals: &[usize], but: Option<usize>, chance: f64) -> usize {
    let weight = |position: usize| f64::from(candidates[equals[position]].weight);
    let positions = || (0..equals.len()).filter(|position| Some(*position) != but);
    let mut left = chance * positions().map(weight).sum::<f64>();
    let mut last = but.unwrap_or(0);
    for position in positions() {
        last = position;
        left -= weight(position);
        if left < 0.0 {
            break;
        }
    }
    last
}

/// Smooth weighted turns: everybody earns its weight, the richest has the turn and pays what all have earned.
fn by_turn(candidates: &[Candidate<'_>], equals: &mut [usize], credits: &mut [f64], is_turn: bool) {
    if is_turn {
        for index in &*equals {
            credits[*index] += candidates[*index].share();
        }
    }
    equals.sort_by(|a, b| credits[*b].total_cmp(&credits[*a]));
    if let Some(first) = equals.first().filter(|_| is_turn) {
        credits[*first] -= equals.iter().map(|index| candidates[*index].share()).sum::<f64>();
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn candidate(name: &str, priority: u16, available: bool) -> Candidate<'_> {
        Candidate { name, weight: 1, priority, available, sessions: 0, ramp: 1.0 }
    }

    /// A chance that repeats itself in each run.
    fn chances() -> impl FnMut() -> f64 {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        move || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 11) as f64 / (1_u64 << 53) as f64
        }
    }

    fn hashed(user: &str, candidates: &[Candidate<'_>]) -> Vec<usize> {
        order(Balance::UserHash, user, candidates, &mut SelectionState { chance: &mut || 0.5, credits: &mut [] })
    }

    /// `logins` of distinct users, whose sessions stay.
    fn fill(balance: Balance, candidates: &mut [Candidate<'_>], logins: u32) {
        let (mut chance, mut credits) = (chances(), vec![0.0; candidates.len()]);
        for user in 0..logins {
            let mut luck = SelectionState { chance: &mut chance, credits: &mut credits };
            let first = order(balance, &format!("user{user}"), candidates, &mut luck)[0];
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
    fn availability_comes_before_priority_before_balance() {
        let candidates = [
            candidate("down", 0, false),
            candidate("spare", 20, true),
            candidate("a", 10, true),
            candidate("b", 10, true),
        ];
        for balance in ALL {
            let (mut first, mut chance, mut credits) = ([0; 4], chances(), [0.0; 4]);
            for user in 0..100 {
                let mut luck = SelectionState { chance: &mut chance, credits: &mut credits };
                let order = order(balance, &format!("user{user}"), &candidates, &mut luck);
                first[order[0]] += 1;
                assert_eq!(&order[2..], [1, 0], "spare, then what is down");
            }
            assert!(first[2] > 30 && first[3] > 30 && first[2] + first[3] == 100, "{balance:?} {first:?}");
        }
    }

    #[test]
    fn a_user_returns_to_its_server_after_an_outage() {
        let up = [candidate("a", 0, true), candidate("b", 0, true), candidate("c", 0, true)];
        let before = hashed("alice", &up);
        let mut outage = up;
        outage[before[0]].available = false;
        let during = hashed("alice", &outage);
        assert_eq!(during, [before[1], before[2], before[0]], "the others keep their order");
        assert_eq!(hashed("alice", &up), before);
    }

    #[test]
    fn turns_alternate() {
        let candidates = weighted(&[1, 1]);
        let mut credits = [0.0; 2];
        let mut turn = || {
            order(
                Balance::RoundRobin,
                "alice",
                &candidates,
                &mut SelectionState { chance: &mut || 0.5, credits: &mut credits },
            )
        };
        let turns: Vec<Vec<usize>> = (0..4).map(|_| turn()).collect();
        assert_eq!(turns, [[0, 1], [1, 0], [0, 1], [1, 0]], "and the other one is next");
    }

    #[test]
    fn of_two_drawn_the_emptier_one_wins() {
        let mut candidates = weighted(&[1, 1, 1]);
        (candidates[0].sessions, candidates[1].sessions, candidates[2].sessions) = (9, 5, 7);
        let pick = |first: f64, second: f64| {
            let mut draws = [first, second].into_iter();
            let mut chance = || draws.next().unwrap();
            order(
                Balance::LeastSessions,
                "",
                &candidates,
                &mut SelectionState { chance: &mut chance, credits: &mut [] },
            )
        };
        // Drawn are positions among the candidates from the emptiest on: 1, 2, 0.
        assert_eq!(pick(0.9, 0.9), [2, 1, 0], "0 and 2 were drawn");
        assert_eq!(pick(0.9, 0.1), [1, 2, 0], "0 and 1");
        assert_eq!(pick(0.1, 0.1), [1, 2, 0], "1 and 2");
    }

    #[test]
    fn one_that_comes_back_empty_is_not_overrun() {
        for (balance, bound) in [(Balance::LeastSessions, 13), (Balance::RoundRobin, 10)] {
            let mut candidates = weighted(&[1, 1]);
            (candidates[0].sessions, candidates[1].ramp) = (1000, 0.1);
            fill(balance, &mut candidates, 100);
            let taken = candidates[1].sessions;
            assert!((5..=bound).contains(&taken), "{balance:?}: {taken} of a hundred");
            candidates[1].ramp = 1.0;
            fill(balance, &mut candidates, 100);
            assert!(candidates[1].sessions >= taken + 50, "{balance:?}");
        }
        // Stickiness counts for more.
        let mut candidates = weighted(&[1, 1]);
        let before: Vec<_> = (0..50).map(|user| hashed(&format!("user{user}"), &candidates)).collect();
        candidates[1].ramp = 0.1;
        let after: Vec<_> = (0..50).map(|user| hashed(&format!("user{user}"), &candidates)).collect();
        assert_eq!(before, after);
    }

    #[test]
    fn nobody_is_a_valid_choice() {
        for balance in ALL {
            let mut luck = SelectionState { chance: &mut || 0.0, credits: &mut [] };
            assert!(order(balance, "alice", &[], &mut luck).is_empty());
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        #[test]
        fn everybody_is_tried_once(
            servers in proptest::collection::vec((1_u32..20, 0_u16..3, any::<bool>(), 0_u32..50, 0.1_f64..=1.0), 1..8),
            balance in 0..4_usize, draws in proptest::collection::vec(0.0_f64..1.0, 32),
        ) {
            let candidates: Vec<Candidate<'_>> = servers.iter().map(|(weight, priority, available, sessions, ramp)| {
                Candidate { name: "same", weight: *weight, priority: *priority, available: *available, sessions: *sessions, ramp: *ramp }
            }).collect();
            let mut draws = draws.into_iter();
            let mut luck = SelectionState { chance: &mut || draws.next().unwrap_or(0.0), credits: &mut vec![0.0; servers.len()] };
            let mut order = order(ALL[balance], "alice", &candidates, &mut luck);
            let rank = |index: &usize| (!candidates[*index].available, candidates[*index].priority);
            prop_assert!(order.is_sorted_by_key(rank), "{order:?}");
            order.sort_unstable();
            prop_assert_eq!(order, (0..servers.len()).collect::<Vec<_>>());
        }

        #[test]
        fn shares_follow_weights(weights in proptest::collection::vec(1_u32..5, 2..=5)) {
            let sum: u32 = weights.iter().sum();
            // How far off chance may be; turns leave nothing to it.
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
        fn a_bound_is_kept_after_every_login(
            weights in proptest::collection::vec(1_u32..5, 2..=5), factor in 1.05_f64..2.0,
        ) {
            let mut candidates = weighted(&weights);
            let sum: f64 = weights.iter().map(|weight| f64::from(*weight)).sum();
            for user in 0..300 {
                let mut luck = SelectionState { chance: &mut || 0.5, credits: &mut [] };
                let user = format!("user{user}");
                let first = order(Balance::BoundedHash { factor }, &user, &candidates, &mut luck)[0];
                candidates[first].sessions += 1;
                let total: u32 = candidates.iter().map(|candidate| candidate.sessions).sum();
                let bound = (factor * f64::from(total) * f64::from(candidates[first].weight) / sum).ceil();
                prop_assert!(f64::from(candidates[first].sessions) <= bound, "{candidates:?}");
            }
        }

        #[test]
        fn a_hash_moves_only_whom_it_must(weights in proptest::collection::vec(1_u32..5, 3..=5), gone in 0..3_usize) {
            // Without any load the bounded hash is the plain one.
            for balance in [Balance::UserHash, Balance::BoundedHash { factor: 1.25 }] {
                let all = weighted(&weights);
                let mut fewer = all.clone();
                fewer[gone].available = false;
                for user in 0..200 {
                    let user = format!("user{user}");
                    let first = |candidates: &[Candidate<'_>]| {
                        order(balance, &user, candidates, &mut SelectionState { chance: &mut || 0.5, credits: &mut [] })[0]
                    };
                    let (before, after) = (first(&all), first(&fewer));
                    prop_assert!(before == after || before == gone, "{user} moved from {before} to {after}");
                }
            }
        }
    }
}
