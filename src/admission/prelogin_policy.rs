//! Decides which connections that have not logged in may stay and which are shed, without a lock, a socket or a clock.
//!
//! `max_connections` is a hard limit. A connection counts until it has logged in or is closed, also after it has been shed; a new
//! connection that arrives before then waits for it to close ([`Arrival::Waiting`]). At the limit, a new connection sheds:
//!
//! 1. the oldest connection without complete credentials;
//! 2. otherwise the connection whose login has taken longest, if that is more than [`LOGIN_GRACE`];
//! 3. otherwise the oldest waiting connection, so that a flood of connections displaces its own;
//! 4. otherwise none, and the new connection is refused: if a burst of logins shed logins that make progress, none would finish.
//!
//! All connections share one memory budget. When it is exhausted, the connection that holds most memory is shed, the oldest of equals; a
//! connection that would itself hold most is refused the growth. "Most" compares the bytes that the client has sent, not the copies that
//! a login makes of them, so clients that hold much memory cannot lock out a client that needs little.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

/// A login may take this long before its connection can be shed.
pub(super) const LOGIN_GRACE: Duration = Duration::from_secs(10);
/// One part in `RESERVE` of the memory budget is left free for growth while shed connections still hold their memory.
const RESERVE: usize = 8;

/// Number of a connection, in order of arrival.
pub(super) type ConnectionId = u64;

/// The connections that have not logged in, and the limits for them.
#[derive(Debug)]
pub(super) struct PreloginPolicy {
    max_connections: usize,
    memory_budget: usize,
    next_id: ConnectionId,
    connections: BTreeMap<ConnectionId, Connection>,
    /// Connections that wait to be admitted.
    waiting: BTreeSet<ConnectionId>,
    /// Admitted connections without complete credentials that can be shed.
    idle: BTreeSet<ConnectionId>,
    /// Connections that are logging in, by the start of the login, and can be shed.
    logging_in: BTreeSet<(Instant, ConnectionId)>,
    /// Connections that hold memory and can be shed, by [`HeldMemory::sent`]; the last one holds most.
    by_memory: BTreeSet<(usize, Reverse<ConnectionId>)>,
    /// Number of connections that have been shed and have not closed yet.
    shed: usize,
    memory: usize,
    /// Bytes of `memory` that shed connections hold.
    shed_memory: usize,
}

#[derive(Debug)]
struct Connection {
    progress: Progress,
    is_shed: bool,
    held: HeldMemory,
}

/// Memory that a connection holds of the budget.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct HeldMemory {
    /// All bytes, copies included.
    pub(super) bytes: usize,
    /// Bytes of these that the client has sent, each counted once.
    pub(super) sent: usize,
}

/// The budget `limits.before_login_memory` is exhausted, and no connection holds more than this one would.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("limits.before_login_memory is exhausted")]
pub struct MemoryBudgetExceeded;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Progress {
    Waiting,
    Idle,
    LoggingIn(Instant),
}

/// Decision about a new connection.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Arrival {
    Admitted(ConnectionId),
    /// It is admitted when a shed connection has closed.
    Waiting(ConnectionId),
    /// All other connections are logging in.
    Refused,
}

impl PreloginPolicy {
    pub(super) fn new(max_connections: usize, memory_budget: usize) -> Self {
        Self {
            max_connections: max_connections.max(1),
            memory_budget,
            next_id: 0,
            connections: BTreeMap::new(),
            waiting: BTreeSet::new(),
            idle: BTreeSet::new(),
            logging_in: BTreeSet::new(),
            by_memory: BTreeSet::new(),
            shed: 0,
            memory: 0,
            shed_memory: 0,
        }
    }

    /// Changes the limits. Connections over a lower limit are shed when the next connection arrives. Returns the connections that are
    /// admitted now.
    pub(super) fn set_limits(&mut self, max_connections: usize, memory_budget: usize) -> Vec<ConnectionId> {
        (self.max_connections, self.memory_budget) = (max_connections.max(1), memory_budget);
        self.admit_waiting()
    }

    /// Number of admitted connections, shed ones included.
    pub(super) fn admitted(&self) -> usize {
        self.connections.len() - self.waiting.len()
    }

    /// Bytes of the budget in use.
    pub(super) fn memory(&self) -> usize {
        self.memory
    }

    /// Adds a new connection. The caller closes the connections that are appended to `shed`.
    pub(super) fn enter(&mut self, now: Instant, shed: &mut Vec<ConnectionId>) -> Arrival {
        // Connections that stay, connections that will be admitted, and the new one.
        while self.admitted() - self.shed + self.waiting.len() + 1 > self.max_connections {
            if let Some(id) = self.next_to_shed(now) {
                self.mark_shed(id);
                shed.push(id);
            } else if let Some(id) = self.waiting.pop_first() {
                // A waiting connection neither counts as admitted nor holds memory.
                self.connections.remove(&id);
                shed.push(id);
            } else {
                return Arrival::Refused;
            }
        }
        let id = self.next_id;
        self.next_id += 1;
        let is_admitted = self.admitted() < self.max_connections;
        let progress = if is_admitted { Progress::Idle } else { Progress::Waiting };
        self.connections.insert(id, Connection { progress, is_shed: false, held: HeldMemory::default() });
        if is_admitted {
            self.idle.insert(id);
            Arrival::Admitted(id)
        } else {
            self.waiting.insert(id);
            Arrival::Waiting(id)
        }
    }

    /// Removes a connection that has closed or logged in. Returns the connections that are admitted now.
    pub(super) fn leave(&mut self, id: ConnectionId) -> Vec<ConnectionId> {
        let Some(connection) = self.connections.remove(&id) else { return Vec::new() };
        self.memory -= connection.held.bytes;
        if connection.is_shed {
            self.shed -= 1;
            self.shed_memory -= connection.held.bytes;
        } else {
            self.remove_from_lists(id, &connection);
        }
        self.admit_waiting()
    }

    /// The connection has sent complete credentials.
    pub(super) fn login_begun(&mut self, id: ConnectionId, now: Instant) {
        self.set_progress(id, Progress::LoggingIn(now));
    }

    /// The login was answered, or waits for the client.
    pub(super) fn login_ended(&mut self, id: ConnectionId) {
        self.set_progress(id, Progress::Idle);
    }

    /// Sets the memory that a connection holds. The caller closes the connections that are appended to `shed`.
    ///
    /// # Errors
    /// The connection may not grow; its memory is unchanged. A smaller amount is always granted.
    pub(super) fn charge(
        &mut self,
        id: ConnectionId,
        held: HeldMemory,
        shed: &mut Vec<ConnectionId>,
    ) -> Result<(), MemoryBudgetExceeded> {
        let Some(connection) = self.connections.get(&id) else { return Ok(()) };
        let before = connection.held;
        let wanted = self.memory - before.bytes + held.bytes;
        if held.bytes > before.bytes {
            if connection.is_shed || wanted > self.memory_budget {
                return Err(MemoryBudgetExceeded);
            }
            let victims = self.victims(id, held, wanted - self.shed_memory).ok_or(MemoryBudgetExceeded)?;
            victims.iter().for_each(|victim| self.mark_shed(*victim));
            shed.extend(victims);
        }
        self.memory = wanted;
        let Some(connection) = self.connections.get_mut(&id) else { return Ok(()) };
        connection.held = held;
        if connection.is_shed {
            self.shed_memory = self.shed_memory - before.bytes + held.bytes;
        } else {
            self.by_memory.remove(&(before.sent, Reverse(id)));
            if held.bytes > 0 {
                self.by_memory.insert((held.sent, Reverse(id)));
            }
        }
        Ok(())
    }

    /// Connections to shed so that `id` may hold `held`, if the connections that are not shed would then hold `staying` bytes. `None`
    /// if no other connection holds more than this one would, or if shedding those that do frees too little.
    fn victims(&self, id: ConnectionId, held: HeldMemory, mut staying: usize) -> Option<Vec<ConnectionId>> {
        let available = self.memory_budget - self.memory_budget / RESERVE;
        let mut largest = self.by_memory.iter().rev().filter(|(_, Reverse(other))| *other != id);
        let mut victims = Vec::new();
        while staying > available {
            let (_, Reverse(victim)) = largest.next().filter(|largest| **largest > (held.sent, Reverse(id)))?;
            staying -= self.connections.get(victim).map_or(0, |connection| connection.held.bytes);
            victims.push(*victim);
        }
        Some(victims)
    }

    fn next_to_shed(&self, now: Instant) -> Option<ConnectionId> {
        let oldest_login = || {
            let (began, id) = self.logging_in.first()?;
            (now.saturating_duration_since(*began) > LOGIN_GRACE).then_some(*id)
        };
        self.idle.first().copied().or_else(oldest_login)
    }

    /// The connection still counts, and keeps its memory, until it leaves.
    fn mark_shed(&mut self, id: ConnectionId) {
        let Some(mut connection) = self.connections.remove(&id) else { return };
        self.remove_from_lists(id, &connection);
        self.shed += 1;
        self.shed_memory += connection.held.bytes;
        connection.is_shed = true;
        self.connections.insert(id, connection);
    }

    /// Removes the connection from the lists of those that wait or can be shed.
    fn remove_from_lists(&mut self, id: ConnectionId, connection: &Connection) {
        self.remove_progress(id, connection.progress);
        self.by_memory.remove(&(connection.held.sent, Reverse(id)));
    }

    fn remove_progress(&mut self, id: ConnectionId, progress: Progress) {
        match progress {
            Progress::Waiting => self.waiting.remove(&id),
            Progress::Idle => self.idle.remove(&id),
            Progress::LoggingIn(began) => self.logging_in.remove(&(began, id)),
        };
    }

    fn set_progress(&mut self, id: ConnectionId, progress: Progress) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        let before = std::mem::replace(&mut connection.progress, progress);
        if connection.is_shed {
            return;
        }
        self.remove_progress(id, before);
        match progress {
            Progress::Waiting => self.waiting.insert(id),
            Progress::Idle => self.idle.insert(id),
            Progress::LoggingIn(began) => self.logging_in.insert((began, id)),
        };
    }

    /// Admits the connections that have waited longest while the limit allows it.
    fn admit_waiting(&mut self) -> Vec<ConnectionId> {
        let mut admitted = Vec::new();
        while self.admitted() < self.max_connections
            && let Some(id) = self.waiting.first().copied()
        {
            self.set_progress(id, Progress::Idle);
            admitted.push(id);
        }
        admitted
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MIB: usize = 1 << 20;

    /// Adds a connection and checks which connections are shed for it.
    fn enter(policy: &mut PreloginPolicy, now: Instant, expected: &[ConnectionId]) -> Arrival {
        let mut shed = Vec::new();
        let arrival = policy.enter(now, &mut shed);
        assert_eq!(shed, expected);
        arrival
    }

    #[test]
    fn oldest_connection_without_credentials_is_shed_first_and_counts_until_it_leaves() {
        let (mut policy, now) = (PreloginPolicy::new(2, MIB), Instant::now());
        assert_eq!(enter(&mut policy, now, &[]), Arrival::Admitted(0));
        assert_eq!(enter(&mut policy, now, &[]), Arrival::Admitted(1));
        assert_eq!(enter(&mut policy, now, &[0]), Arrival::Waiting(2));
        assert_eq!(policy.admitted(), 2, "the limit is hard");
        assert_eq!(enter(&mut policy, now, &[1]), Arrival::Waiting(3));
        assert_eq!(enter(&mut policy, now, &[2]), Arrival::Waiting(4), "a flood displaces its own connections");
        assert_eq!(policy.leave(1), [3]);
        assert!(policy.leave(2).is_empty());
        assert_eq!(policy.leave(0), [4]);
        assert_eq!(policy.admitted(), 2);
    }

    #[test]
    fn login_in_progress_is_shed_last_and_only_after_the_grace_period() {
        let (mut policy, now) = (PreloginPolicy::new(3, MIB), Instant::now());
        for id in 0..3 {
            assert_eq!(enter(&mut policy, now, &[]), Arrival::Admitted(id));
        }
        policy.login_begun(1, now + Duration::from_secs(2));
        policy.login_begun(0, now + Duration::from_secs(1));
        assert_eq!(
            enter(&mut policy, now + Duration::from_secs(60), &[2]),
            Arrival::Waiting(3),
            "it has no credentials"
        );
        assert_eq!(policy.leave(2), [3]);
        policy.login_begun(3, now + Duration::from_secs(5));
        assert_eq!(
            enter(&mut policy, now + Duration::from_secs(11), &[]),
            Arrival::Refused,
            "all logins make progress"
        );
        assert_eq!(
            enter(&mut policy, now + Duration::from_secs(12), &[0]),
            Arrival::Waiting(4),
            "its login has taken longest"
        );
        policy.login_ended(3);
        assert_eq!(
            enter(&mut policy, now + Duration::from_secs(12), &[3]),
            Arrival::Waiting(5),
            "its login has been refused"
        );
        assert_eq!(policy.admitted(), 3);
    }

    #[test]
    fn waiting_connection_that_leaves_is_replaced_by_the_next() {
        let (mut policy, now) = (PreloginPolicy::new(1, MIB), Instant::now());
        assert_eq!(enter(&mut policy, now, &[]), Arrival::Admitted(0));
        assert_eq!(enter(&mut policy, now, &[0]), Arrival::Waiting(1));
        assert!(policy.leave(1).is_empty());
        assert_eq!(enter(&mut policy, now, &[]), Arrival::Waiting(2), "connection 0 has not left yet");
        assert_eq!(policy.leave(0), [2]);
    }

    #[test]
    fn changed_limits_apply_from_the_next_connection() {
        let (mut policy, now) = (PreloginPolicy::new(10, MIB), Instant::now());
        for id in 0..10 {
            assert_eq!(enter(&mut policy, now, &[]), Arrival::Admitted(id));
        }
        assert!(policy.set_limits(3, MIB).is_empty());
        assert_eq!(enter(&mut policy, now, &[0, 1, 2, 3, 4, 5, 6, 7]), Arrival::Waiting(10));
        assert_eq!(policy.set_limits(20, MIB), [10]);
    }

    fn held(bytes: usize) -> HeldMemory {
        HeldMemory { bytes, sent: bytes }
    }

    #[test]
    fn connection_with_most_memory_is_shed_for_smaller_ones() {
        let (mut policy, now) = (PreloginPolicy::new(100, MIB), Instant::now());
        for id in 0..30 {
            assert_eq!(enter(&mut policy, now, &[]), Arrival::Admitted(id));
        }
        let mut shed = Vec::new();
        let large = MIB * 7 / 8 / 14;
        assert!((0..14).all(|id| policy.charge(id, held(large), &mut shed).is_ok()));
        assert!(policy.charge(14, held(large + 1), &mut shed).is_err(), "it would hold most itself");
        assert!(shed.is_empty());
        assert!(policy.charge(15, held(4096), &mut shed).is_ok(), "as a client with a long token needs");
        assert_eq!(std::mem::take(&mut shed), [0], "the oldest of equals");
        assert!(policy.charge(16, held(4096), &mut shed).is_ok());
        assert!(shed.is_empty(), "memory of shed connections will be free soon");
        assert!(policy.charge(0, held(large * 2), &mut shed).is_err(), "it has been shed");
        assert!(policy.charge(17, held(large), &mut shed).is_ok(), "it is as large as the largest, and younger");
        assert_eq!(std::mem::take(&mut shed), [1]);
        for id in 2..30 {
            policy.charge(id, held(0), &mut shed).unwrap();
        }
        assert_eq!(policy.memory(), 2 * large, "shed connections still hold it");
        policy.leave(0);
        policy.leave(1);
        assert_eq!(policy.memory(), 0);
    }

    #[test]
    fn credential_copies_do_not_make_a_connection_the_largest() {
        let (mut policy, now) = (PreloginPolicy::new(100, MIB), Instant::now());
        for _ in 0..10 {
            enter(&mut policy, now, &[]);
        }
        let mut shed = Vec::new();
        assert!((0..7).all(|id| policy.charge(id, held(MIB / 8), &mut shed).is_ok()));
        assert!(policy.charge(9, HeldMemory { bytes: MIB / 8, sent: MIB / 40 }, &mut shed).is_ok());
        assert_eq!(shed, [0]);
    }

    #[test]
    fn refused_charge_sheds_no_connection() {
        let (mut policy, now) = (PreloginPolicy::new(100, 1600), Instant::now());
        for _ in 0..4 {
            enter(&mut policy, now, &[]);
        }
        let mut shed = Vec::new();
        assert!(policy.charge(0, held(600), &mut shed).is_ok() && policy.charge(1, held(300), &mut shed).is_ok());
        assert!(policy.charge(2, held(300), &mut shed).is_ok());
        // 1400 bytes may stay: without the largest there would be 600 and these.
        assert!(policy.charge(3, HeldMemory { bytes: 900, sent: 400 }, &mut shed).is_err());
        assert!(shed.is_empty(), "the other connections hold less than this one would: {shed:?}");
        assert!(policy.charge(3, HeldMemory { bytes: 400, sent: 400 }, &mut shed).is_ok());
        assert_eq!(shed, [0]);
        // Without the only one that has sent more, there would still be 1440 bytes.
        let (mut policy, mut shed) = (PreloginPolicy::new(100, 1600), Vec::new());
        for id in 0..4 {
            enter(&mut policy, now, &[]);
            let sizes = [(150, 150), (400, 100), (400, 100), (0, 0)];
            let (bytes, sent) = sizes[id as usize];
            assert!(policy.charge(id, HeldMemory { bytes, sent }, &mut shed).is_ok());
        }
        assert!(policy.charge(3, HeldMemory { bytes: 640, sent: 120 }, &mut shed).is_err());
        assert!(shed.is_empty(), "{shed:?}");
    }

    #[test]
    fn memory_of_a_shed_connection_is_not_free_until_it_leaves() {
        let (mut policy, now, mut shed) = (PreloginPolicy::new(100, 1600), Instant::now(), Vec::new());
        for (id, size) in [600, 300, 300, 0].into_iter().enumerate() {
            enter(&mut policy, now, &[]);
            assert!(policy.charge(id as ConnectionId, held(size), &mut shed).is_ok());
        }
        assert!(policy.charge(3, held(400), &mut shed).is_ok());
        assert_eq!(shed, [0]);
        assert!(policy.charge(3, HeldMemory { bytes: 500, sent: 100 }, &mut shed).is_err());
        assert_eq!(shed, [0]);
    }

    #[derive(Debug, Clone)]
    enum Operation {
        Enter,
        Leave(prop::sample::Index),
        Begin(prop::sample::Index),
        End(prop::sample::Index),
        Charge(prop::sample::Index, usize, usize),
        Limit(usize, usize),
    }

    fn operation() -> impl Strategy<Value = Operation> {
        let index = any::<prop::sample::Index>;
        prop_oneof![
            6 => Just(Operation::Enter),
            3 => index().prop_map(Operation::Leave),
            2 => index().prop_map(Operation::Begin),
            1 => index().prop_map(Operation::End),
            4 => (index(), 0usize..400, 1usize..4).prop_map(|(which, bytes, divisor)| Operation::Charge(which, bytes, divisor)),
            1 => (1usize..12, 800usize..2000).prop_map(|(limit, budget)| Operation::Limit(limit, budget)),
        ]
    }

    proptest! {
        /// The limits hold, a connection waits only while a shed one has not left, and nothing remains at the end.
        #[test]
        fn limits_hold(operations in prop::collection::vec(operation(), 0..300)) {
            let (mut policy, mut now) = (PreloginPolicy::new(8, 1000), Instant::now());
            let (mut limit, mut budget, mut lowered) = (8, 1000, false);
            let (mut open, mut shedding): (Vec<ConnectionId>, Vec<ConnectionId>) = (Vec::new(), Vec::new());
            for operation in operations {
                now += Duration::from_secs(1);
                let mut shed = Vec::new();
                let pick = |which: prop::sample::Index| (!open.is_empty()).then(|| open[which.index(open.len())]);
                match operation {
                    Operation::Enter => match policy.enter(now, &mut shed) {
                        Arrival::Admitted(id) | Arrival::Waiting(id) => open.push(id),
                        Arrival::Refused => prop_assert!(policy.idle.is_empty() && policy.waiting.is_empty()),
                    },
                    Operation::Leave(which) => if let Some(id) = pick(which) {
                        policy.leave(id);
                        open.retain(|other| *other != id);
                        shedding.retain(|other| *other != id);
                    },
                    Operation::Begin(which) => if let Some(id) = pick(which).filter(|id| !policy.waiting.contains(id)) {
                        policy.login_begun(id, now);
                    },
                    Operation::End(which) => if let Some(id) = pick(which).filter(|id| !policy.waiting.contains(id)) {
                        policy.login_ended(id);
                    },
                    Operation::Charge(which, bytes, divisor) => if let Some(id) = pick(which).filter(|id| !policy.waiting.contains(id)) {
                        let _ = policy.charge(id, HeldMemory { bytes, sent: bytes / divisor }, &mut shed);
                        prop_assert!(!shed.contains(&id));
                    },
                    Operation::Limit(new_limit, new_budget) => {
                        lowered |= new_limit < limit || new_budget < budget;
                        (limit, budget) = (new_limit, new_budget);
                        policy.set_limits(limit, budget);
                    }
                }
                for id in shed {
                    prop_assert!(open.contains(&id) && !shedding.contains(&id));
                    shedding.push(id);
                }
                prop_assert!(policy.waiting.len() <= shedding.len() || lowered);
                if !lowered {
                    prop_assert!(policy.admitted() <= limit && policy.memory() <= budget);
                }
                prop_assert_eq!(policy.connections.values().map(|connection| connection.held.bytes).sum::<usize>(), policy.memory());
            }
            for id in open {
                policy.leave(id);
            }
            prop_assert_eq!((policy.admitted(), policy.memory(), policy.shed, policy.shed_memory), (0, 0, 0, 0));
            prop_assert!(policy.by_memory.is_empty() && policy.idle.is_empty() && policy.logging_in.is_empty());
        }
    }
}
