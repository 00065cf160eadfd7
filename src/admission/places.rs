//! Which connections may stay before their login, and which must go: decisions without a lock, a socket or a clock.
//!
//! The number of places is a hard limit. A connection keeps its place until it has logged in or is closed, also while it is being
//! shed; a new connection that arrives in the meantime waits for that place ([`Entered::Waits`]). Which connection is shed when all
//! places are taken:
//!
//! 1. the oldest connection without complete credentials;
//! 2. else the login that has been under way longest, if that is more than [`LOGIN_GRACE`];
//! 3. else the oldest connection that waits for a place, so that a flood pushes out itself;
//! 4. else none, and the new connection is refused: shedding logins that make progress would let a rush of clients starve itself.
//!
//! Memory is one budget for all. When it runs short, the connection that holds most goes, of equals the oldest; a connection that would
//! itself hold most is refused its growth. What counts here is what the client has sent, and not the copies that a login makes of it. So
//! a client that needs little cannot be kept out by clients that hold much.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

/// A login under way may take this long before its connection can be shed.
pub(super) const LOGIN_GRACE: Duration = Duration::from_secs(10);
/// This part of the memory budget is kept for growth while connections that are being shed still hold their share.
const RESERVE: usize = 8;

/// A connection before its login, by the order of arrival.
pub(super) type Number = u64;

#[derive(Debug)]
pub(super) struct Places {
    most: usize,
    budget: usize,
    next: Number,
    members: BTreeMap<Number, Member>,
    /// Members that wait for a place.
    entering: BTreeSet<Number>,
    /// Members with a place that have not sent complete credentials, and may be shed.
    idle: BTreeSet<Number>,
    /// Members with a login under way, by its begin, that may be shed.
    logging_in: BTreeSet<(Instant, Number)>,
    /// Members that hold memory and may be shed, by [`Held::sent`]; the last holds most.
    by_memory: BTreeSet<(usize, Reverse<Number>)>,
    /// Members with a place that are being shed.
    leaving: usize,
    memory: usize,
    leaving_memory: usize,
}

#[derive(Debug)]
struct Member {
    stage: Stage,
    leaving: bool,
    held: Held,
}

/// What a connection holds of the budget.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Held {
    /// Bytes of memory.
    pub(super) bytes: usize,
    /// Bytes of these that the client has sent, each counted once.
    pub(super) sent: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Entering,
    Idle,
    LoggingIn(Instant),
}

/// The answer to a new connection.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Entered {
    /// It has a place.
    Inside(Number),
    /// It gets a place when a connection that is being shed has closed.
    Waits(Number),
    /// All places are taken by logins under way.
    Refused,
}

impl Places {
    pub(super) fn new(most: usize, budget: usize) -> Self {
        Self {
            most: most.max(1),
            budget,
            next: 0,
            members: BTreeMap::new(),
            entering: BTreeSet::new(),
            idle: BTreeSet::new(),
            logging_in: BTreeSet::new(),
            by_memory: BTreeSet::new(),
            leaving: 0,
            memory: 0,
            leaving_memory: 0,
        }
    }

    /// Other limits from now on. Members over a lower limit are shed when the next connection comes. Returns who has a place now.
    pub(super) fn set_limits(&mut self, most: usize, budget: usize) -> Vec<Number> {
        (self.most, self.budget) = (most.max(1), budget);
        self.admit()
    }

    /// Connections with a place.
    pub(super) fn inside(&self) -> usize {
        self.members.len() - self.entering.len()
    }

    /// Bytes of the budget in use.
    pub(super) fn memory(&self) -> usize {
        self.memory
    }

    /// A new connection. The connections in `shed` must be closed.
    pub(super) fn enter(&mut self, now: Instant, shed: &mut Vec<Number>) -> Entered {
        // With a place, promised a place, and the new one.
        while self.inside() - self.leaving + self.entering.len() + 1 > self.most {
            if let Some(number) = self.next_to_go(now) {
                self.must_go(number);
                shed.push(number);
            } else if let Some(number) = self.entering.pop_first() {
                // It has neither a place nor memory.
                self.members.remove(&number);
                shed.push(number);
            } else {
                return Entered::Refused;
            }
        }
        let number = self.next;
        self.next += 1;
        let has_place = self.inside() < self.most;
        let stage = if has_place { Stage::Idle } else { Stage::Entering };
        self.members.insert(number, Member { stage, leaving: false, held: Held::default() });
        if has_place {
            self.idle.insert(number);
            Entered::Inside(number)
        } else {
            self.entering.insert(number);
            Entered::Waits(number)
        }
    }

    /// The connection is gone, or logged in. Returns who has a place now.
    pub(super) fn leave(&mut self, number: Number) -> Vec<Number> {
        let Some(member) = self.members.remove(&number) else { return Vec::new() };
        self.memory -= member.held.bytes;
        if member.leaving {
            self.leaving -= 1;
            self.leaving_memory -= member.held.bytes;
        } else {
            self.forget(number, &member);
        }
        self.admit()
    }

    /// The connection has sent complete credentials.
    pub(super) fn login_begun(&mut self, number: Number, now: Instant) {
        self.become_stage(number, Stage::LoggingIn(now));
    }

    /// The login was answered, or waits for the client.
    pub(super) fn login_ended(&mut self, number: Number) {
        self.become_stage(number, Stage::Idle);
    }

    /// The connection holds this of the budget now. `false`: it may not, and what it held before is left. The connections in
    /// `shed` must be closed.
    pub(super) fn charge(&mut self, number: Number, held: Held, shed: &mut Vec<Number>) -> bool {
        let Some(member) = self.members.get(&number) else { return true };
        let before = member.held;
        let wanted = self.memory - before.bytes + held.bytes;
        if held.bytes > before.bytes {
            // A connection that must go gets nothing more.
            if member.leaving {
                return false;
            }
            if wanted > self.budget {
                return false;
            }
            let Some(victims) = self.victims(number, held, wanted - self.leaving_memory) else { return false };
            victims.iter().for_each(|victim| self.must_go(*victim));
            shed.extend(victims);
        }
        self.memory = wanted;
        let Some(member) = self.members.get_mut(&number) else { return true };
        member.held = held;
        if member.leaving {
            self.leaving_memory = self.leaving_memory - before.bytes + held.bytes;
        } else {
            self.by_memory.remove(&(before.sent, Reverse(number)));
            if held.bytes > 0 {
                self.by_memory.insert((held.sent, Reverse(number)));
            }
        }
        true
    }

    /// The connections that must go so that `number` may hold `held`, if the connections that stay would hold `staying` bytes.
    /// `None`: they hold less than that one would, or not enough.
    fn victims(&self, number: Number, held: Held, mut staying: usize) -> Option<Vec<Number>> {
        let most = self.budget - self.budget / RESERVE;
        let mut largest = self.by_memory.iter().rev().filter(|(_, Reverse(other))| *other != number);
        let mut victims = Vec::new();
        while staying > most {
            let (_, Reverse(victim)) = largest.next().filter(|largest| **largest > (held.sent, Reverse(number)))?;
            staying -= self.members.get(victim).map_or(0, |member| member.held.bytes);
            victims.push(*victim);
        }
        Some(victims)
    }

    fn next_to_go(&self, now: Instant) -> Option<Number> {
        let oldest_login = || {
            let (began, number) = self.logging_in.first()?;
            (now.saturating_duration_since(*began) > LOGIN_GRACE).then_some(*number)
        };
        self.idle.first().copied().or_else(oldest_login)
    }

    /// The member keeps its place and its memory until it leaves.
    fn must_go(&mut self, number: Number) {
        let Some(mut member) = self.members.remove(&number) else { return };
        self.forget(number, &member);
        self.leaving += 1;
        self.leaving_memory += member.held.bytes;
        member.leaving = true;
        self.members.insert(number, member);
    }

    /// From the lists of those that may be shed, or wait for a place.
    fn forget(&mut self, number: Number, member: &Member) {
        match member.stage {
            Stage::Entering => self.entering.remove(&number),
            Stage::Idle => self.idle.remove(&number),
            Stage::LoggingIn(began) => self.logging_in.remove(&(began, number)),
        };
        self.by_memory.remove(&(member.held.sent, Reverse(number)));
    }

    fn become_stage(&mut self, number: Number, stage: Stage) {
        let Some(member) = self.members.get_mut(&number) else { return };
        let before = std::mem::replace(&mut member.stage, stage);
        if member.leaving {
            return;
        }
        match before {
            Stage::Entering => self.entering.remove(&number),
            Stage::Idle => self.idle.remove(&number),
            Stage::LoggingIn(began) => self.logging_in.remove(&(began, number)),
        };
        match stage {
            Stage::Entering => self.entering.insert(number),
            Stage::Idle => self.idle.insert(number),
            Stage::LoggingIn(began) => self.logging_in.insert((began, number)),
        };
    }

    /// Gives free places to those that wait longest.
    fn admit(&mut self) -> Vec<Number> {
        let mut admitted = Vec::new();
        while self.inside() < self.most
            && let Some(number) = self.entering.first().copied()
        {
            self.become_stage(number, Stage::Idle);
            admitted.push(number);
        }
        admitted
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MIB: usize = 1 << 20;

    /// Enters, and expects those to be shed.
    fn enter(places: &mut Places, now: Instant, expected: &[Number]) -> Entered {
        let mut shed = Vec::new();
        let entered = places.enter(now, &mut shed);
        assert_eq!(shed, expected);
        entered
    }

    #[test]
    fn the_oldest_without_credentials_goes_first_and_keeps_its_place_until_it_is_gone() {
        let (mut places, now) = (Places::new(2, MIB), Instant::now());
        assert_eq!(enter(&mut places, now, &[]), Entered::Inside(0));
        assert_eq!(enter(&mut places, now, &[]), Entered::Inside(1));
        assert_eq!(enter(&mut places, now, &[0]), Entered::Waits(2));
        assert_eq!(places.inside(), 2, "a hard limit");
        assert_eq!(enter(&mut places, now, &[1]), Entered::Waits(3));
        assert_eq!(enter(&mut places, now, &[2]), Entered::Waits(4), "a flood pushes out itself");
        assert_eq!(places.leave(1), [3]);
        assert!(places.leave(2).is_empty());
        assert_eq!(places.leave(0), [4]);
        assert_eq!(places.inside(), 2);
    }

    #[test]
    fn logins_under_way_are_shed_last_and_not_at_once() {
        let (mut places, now) = (Places::new(3, MIB), Instant::now());
        for number in 0..3 {
            assert_eq!(enter(&mut places, now, &[]), Entered::Inside(number));
        }
        places.login_begun(1, now + Duration::from_secs(2));
        places.login_begun(0, now + Duration::from_secs(1));
        assert_eq!(enter(&mut places, now + Duration::from_secs(60), &[2]), Entered::Waits(3), "without credentials");
        assert_eq!(places.leave(2), [3]);
        places.login_begun(3, now + Duration::from_secs(5));
        assert_eq!(enter(&mut places, now + Duration::from_secs(11), &[]), Entered::Refused, "all make progress");
        assert_eq!(enter(&mut places, now + Duration::from_secs(12), &[0]), Entered::Waits(4), "the longest login");
        places.login_ended(3);
        assert_eq!(enter(&mut places, now + Duration::from_secs(12), &[3]), Entered::Waits(5), "refused a moment ago");
        assert_eq!(places.inside(), 3);
    }

    #[test]
    fn a_connection_that_gives_up_waiting_leaves_its_place_to_the_next() {
        let (mut places, now) = (Places::new(1, MIB), Instant::now());
        assert_eq!(enter(&mut places, now, &[]), Entered::Inside(0));
        assert_eq!(enter(&mut places, now, &[0]), Entered::Waits(1));
        assert!(places.leave(1).is_empty());
        assert_eq!(enter(&mut places, now, &[]), Entered::Waits(2), "one is leaving already");
        assert_eq!(places.leave(0), [2]);
    }

    #[test]
    fn other_limits_hold_from_the_next_connection_on() {
        let (mut places, now) = (Places::new(10, MIB), Instant::now());
        for number in 0..10 {
            assert_eq!(enter(&mut places, now, &[]), Entered::Inside(number));
        }
        assert!(places.set_limits(3, MIB).is_empty());
        assert_eq!(enter(&mut places, now, &[0, 1, 2, 3, 4, 5, 6, 7]), Entered::Waits(10));
        assert_eq!(places.set_limits(20, MIB), [10]);
    }

    fn held(bytes: usize) -> Held {
        Held { bytes, sent: bytes }
    }

    #[test]
    fn the_largest_holder_goes_and_small_ones_are_served() {
        let (mut places, now) = (Places::new(100, MIB), Instant::now());
        for number in 0..30 {
            assert_eq!(enter(&mut places, now, &[]), Entered::Inside(number));
        }
        let mut shed = Vec::new();
        let large = MIB * 7 / 8 / 14;
        assert!((0..14).all(|number| places.charge(number, held(large), &mut shed)));
        assert!(!places.charge(14, held(large + 1), &mut shed), "it would hold most itself");
        assert!(shed.is_empty());
        assert!(places.charge(15, held(4096), &mut shed), "a client with a long token");
        assert_eq!(std::mem::take(&mut shed), [0], "of equals the oldest");
        assert!(places.charge(16, held(4096), &mut shed));
        assert!(shed.is_empty(), "what is leaving is free soon");
        assert!(!places.charge(0, held(large * 2), &mut shed), "it must go");
        assert!(places.charge(17, held(large), &mut shed), "as large as the largest, and younger");
        assert_eq!(std::mem::take(&mut shed), [1]);
        for number in 2..30 {
            places.charge(number, held(0), &mut shed);
        }
        assert_eq!(places.memory(), 2 * large, "of those who are leaving");
        places.leave(0);
        places.leave(1);
        assert_eq!(places.memory(), 0);
    }

    #[test]
    fn copies_of_credentials_do_not_make_a_client_the_largest() {
        let (mut places, now) = (Places::new(100, MIB), Instant::now());
        for _ in 0..10 {
            enter(&mut places, now, &[]);
        }
        let mut shed = Vec::new();
        assert!((0..7).all(|number| places.charge(number, held(MIB / 8), &mut shed)));
        assert!(places.charge(9, Held { bytes: MIB / 8, sent: MIB / 40 }, &mut shed));
        assert_eq!(shed, [0]);
    }

    #[test]
    fn a_connection_that_is_refused_memory_sheds_no_other() {
        let (mut places, now) = (Places::new(100, 1600), Instant::now());
        for _ in 0..4 {
            enter(&mut places, now, &[]);
        }
        let mut shed = Vec::new();
        assert!(places.charge(0, held(600), &mut shed) && places.charge(1, held(300), &mut shed));
        assert!(places.charge(2, held(300), &mut shed));
        // 1400 bytes may stay: without the largest there would be 600 and these.
        assert!(!places.charge(3, Held { bytes: 900, sent: 400 }, &mut shed));
        assert!(shed.is_empty(), "the others hold less than this one would: {shed:?}");
        assert!(places.charge(3, Held { bytes: 400, sent: 400 }, &mut shed));
        assert_eq!(shed, [0]);
        // Without the only one that has sent more, there would still be 1440 bytes.
        let (mut places, mut shed) = (Places::new(100, 1600), Vec::new());
        for number in 0..4 {
            enter(&mut places, now, &[]);
            let sizes = [(150, 150), (400, 100), (400, 100), (0, 0)];
            let (bytes, sent) = sizes[number as usize];
            assert!(places.charge(number, Held { bytes, sent }, &mut shed));
        }
        assert!(!places.charge(3, Held { bytes: 640, sent: 120 }, &mut shed));
        assert!(shed.is_empty(), "{shed:?}");
    }

    #[test]
    fn memory_of_a_connection_that_is_being_shed_is_not_free_yet() {
        let (mut places, now, mut shed) = (Places::new(100, 1600), Instant::now(), Vec::new());
        for (number, size) in [600, 300, 300, 0].into_iter().enumerate() {
            enter(&mut places, now, &[]);
            assert!(places.charge(number as Number, held(size), &mut shed));
        }
        assert!(places.charge(3, held(400), &mut shed));
        assert_eq!(shed, [0]);
        assert!(!places.charge(3, Held { bytes: 500, sent: 100 }, &mut shed));
        assert_eq!(shed, [0]);
    }

    #[derive(Debug, Clone)]
    enum Step {
        Enter,
        Leave(prop::sample::Index),
        Begin(prop::sample::Index),
        End(prop::sample::Index),
        Charge(prop::sample::Index, usize, usize),
        Limit(usize, usize),
    }

    fn step() -> impl Strategy<Value = Step> {
        let index = any::<prop::sample::Index>;
        prop_oneof![
            6 => Just(Step::Enter),
            3 => index().prop_map(Step::Leave),
            2 => index().prop_map(Step::Begin),
            1 => index().prop_map(Step::End),
            4 => (index(), 0usize..400, 1usize..4).prop_map(|(which, bytes, divisor)| Step::Charge(which, bytes, divisor)),
            1 => (1usize..12, 800usize..2000).prop_map(|(most, budget)| Step::Limit(most, budget)),
        ]
    }

    proptest! {
        /// Never more inside than there are places, nor more memory than the budget; a connection waits only while another one is being shed; and at
        /// the end nothing is left.
        #[test]
        fn limits_hold(steps in prop::collection::vec(step(), 0..300)) {
            let (mut places, mut now) = (Places::new(8, 1000), Instant::now());
            let (mut most, mut budget, mut lowered) = (8, 1000, false);
            let (mut there, mut shedding): (Vec<Number>, Vec<Number>) = (Vec::new(), Vec::new());
            for step in steps {
                now += Duration::from_secs(1);
                let mut shed = Vec::new();
                let pick = |which: prop::sample::Index| (!there.is_empty()).then(|| there[which.index(there.len())]);
                match step {
                    Step::Enter => match places.enter(now, &mut shed) {
                        Entered::Inside(number) | Entered::Waits(number) => there.push(number),
                        Entered::Refused => prop_assert!(places.idle.is_empty() && places.entering.is_empty()),
                    },
                    Step::Leave(which) => if let Some(number) = pick(which) {
                        places.leave(number);
                        there.retain(|other| *other != number);
                        shedding.retain(|other| *other != number);
                    },
                    Step::Begin(which) => if let Some(number) = pick(which).filter(|number| !places.entering.contains(number)) {
                        places.login_begun(number, now);
                    },
                    Step::End(which) => if let Some(number) = pick(which).filter(|number| !places.entering.contains(number)) {
                        places.login_ended(number);
                    },
                    Step::Charge(which, bytes, divisor) => if let Some(number) = pick(which).filter(|number| !places.entering.contains(number)) {
                        places.charge(number, Held { bytes, sent: bytes / divisor }, &mut shed);
                        prop_assert!(!shed.contains(&number));
                    },
                    Step::Limit(new_most, new_budget) => {
                        lowered |= new_most < most || new_budget < budget;
                        (most, budget) = (new_most, new_budget);
                        places.set_limits(most, budget);
                    }
                }
                for number in shed {
                    prop_assert!(there.contains(&number) && !shedding.contains(&number));
                    shedding.push(number);
                }
                prop_assert!(places.entering.len() <= shedding.len() || lowered);
                if !lowered {
                    prop_assert!(places.inside() <= most && places.memory() <= budget);
                }
                prop_assert_eq!(places.members.values().map(|member| member.held.bytes).sum::<usize>(), places.memory());
            }
            for number in there {
                places.leave(number);
            }
            prop_assert_eq!((places.inside(), places.memory(), places.leaving, places.leaving_memory), (0, 0, 0, 0));
            prop_assert!(places.by_memory.is_empty() && places.idle.is_empty() && places.logging_in.is_empty());
        }
    }
}
