//! Which server of a backend comes first for a user, and which next. Pure.
//!
//! Servers that are available come before those that are failing, a lower SRV priority before a higher (RFC 2782), and
//! among equals rendezvous hashing of the user's name decides by weight: a user's sessions meet on one server while it
//! is up, which storage that several servers share needs (two Dovecots on one mailbox damage its index).

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
}

/// Positions of `candidates` in the order in which they are to be tried for `user`.
pub(super) fn order(user: &str, candidates: &[Candidate<'_>]) -> Vec<usize> {
    let score = |index: &usize| {
        let candidate = &candidates[*index];
        rendezvous::score(user.as_bytes(), candidate.name.as_bytes(), candidate.weight)
    };
    let rank = |index: &usize| (!candidates[*index].available, candidates[*index].priority);
    let mut order: Vec<usize> = (0..candidates.len()).collect();
    order.sort_by(|a, b| rank(a).cmp(&rank(b)).then_with(|| score(b).total_cmp(&score(a))));
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    fn candidate(name: &str, priority: u16, available: bool) -> Candidate<'_> {
        Candidate { name, weight: 1, priority, available }
    }

    #[test]
    fn availability_comes_before_priority_before_hash() {
        let candidates = [
            candidate("down", 0, false),
            candidate("spare", 20, true),
            candidate("a", 10, true),
            candidate("b", 10, true),
        ];
        let mut first = [0; 4];
        for user in 0..100 {
            let order = order(&format!("user{user}"), &candidates);
            first[order[0]] += 1;
            assert_eq!(&order[2..], [1, 0], "spare, then what is down");
        }
        assert!(first[2] > 30 && first[3] > 30 && first[2] + first[3] == 100, "{first:?}");
    }

    #[test]
    fn a_user_returns_to_its_server_after_an_outage() {
        let up = [candidate("a", 0, true), candidate("b", 0, true), candidate("c", 0, true)];
        let before = order("alice", &up);
        let mut outage = up;
        outage[before[0]].available = false;
        let during = order("alice", &outage);
        assert_eq!(during, [before[1], before[2], before[0]], "the others keep their order");
        assert_eq!(order("alice", &up), before);
    }
}
