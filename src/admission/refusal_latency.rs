//! How servers refuse a password, so that a refusal without a server takes as long and reads the same.
//!
//! Servers delay the answer to a wrong password, each by its own rule. An unknown user is treated like a user of one of the backends, always
//! the same one, and refused after a duration drawn afresh for each attempt from the last ones of that backend, moved a little. So
//! neither one answer nor many show whether a server was asked.

use std::collections::BTreeMap;
use std::hash::{BuildHasher as _, RandomState};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::refusal_wording::Wording;
use crate::admission::AddressBlock;

/// How many of the last durations are remembered of each backend.
const REMEMBERED: usize = 32;
/// Longer ones are outages, not answers.
const LONGEST: Duration = Duration::from_secs(30);

/// The last refusals of each backend, by its name. Reloads add backends, and a name is kept until the process ends.
#[derive(Debug, Default)]
pub struct RefusalLatency {
    /// Its key is random, so that no client can foresee which backend a user is like.
    hasher: RandomState,
    backends: Mutex<BTreeMap<Arc<str>, Ring>>,
}

#[derive(Debug, Default)]
struct Ring {
    /// At most one of each client, so that a client whom the servers delay does not delay the refusals of others.
    durations: Vec<(AddressBlock, Duration)>,
    next: usize,
    wording: Wording,
}

impl Ring {
    fn add(&mut self, client: AddressBlock, took: Duration) {
        if let Some((_, known)) = self.durations.iter_mut().find(|(of, _)| *of == client) {
            *known = took;
            return;
        }
        match self.durations.get_mut(self.next) {
            Some(old) => *old = (client, took),
            None => self.durations.push((client, took)),
        }
        self.next = (self.next + 1) % REMEMBERED;
    }
}

impl RefusalLatency {
    /// A server of `backend` refused a password that `client` sent after `took`.
    pub(crate) fn add(&self, backend: &Arc<str>, client: AddressBlock, took: Duration) {
        self.lock().entry(backend.clone()).or_default().add(client, took.min(LONGEST));
    }

    /// A server of `backend` refused a password of `user` that `client` sent with this answer, without the tag.
    pub(crate) fn observe_answer(&self, backend: &Arc<str>, user: &str, client: AddressBlock, answer: &[u8]) {
        let user = self.hasher.hash_one(user);
        self.lock().entry(backend.clone()).or_default().wording.observe(user, client, answer);
    }

    /// The answer of the backend `routed`, or else of the one that `user` is like, without the tag; `None` while it is not
    /// known.
    pub(crate) fn answer(&self, routed: Option<&str>, user: &str) -> Option<Arc<[u8]>> {
        let backends = self.lock();
        let of_routed = routed.and_then(|routed| backends.get(routed)).and_then(|ring| ring.wording.common());
        of_routed.or_else(|| self.like(&backends, user)?.wording.common())
    }

    /// The highest hash wins, so that a new backend takes its share of users and the others stay as they were.
    fn like<'a>(&self, backends: &'a BTreeMap<Arc<str>, Ring>, user: &str) -> Option<&'a Ring> {
        let like = backends.iter().max_by_key(|(backend, _)| self.hasher.hash_one((user, backend)));
        like.map(|(_, ring)| ring)
    }

    /// A duration like the last ones of the backend `routed`, or, if there are none, of the backend that `user` is like; zero
    /// if no server has refused a password yet. `random` decides which duration.
    pub(crate) fn draw(&self, routed: Option<&str>, user: &str, random: u64) -> Duration {
        let backends = self.lock();
        let of_routed = routed.and_then(|routed| backends.get(routed)).filter(|ring| !ring.durations.is_empty());
        let ring = of_routed.or_else(|| self.like(&backends, user));
        // A copy: sorting is not done under the lock.
        let mut durations: Vec<Duration> =
            ring.map(|ring| ring.durations.iter().map(|(_, took)| *took).collect()).unwrap_or_default();
        drop(backends);
        durations.sort_unstable();
        drawn(&durations, random)
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<Arc<str>, Ring>> {
        // No change of a ring can panic halfway.
        self.backends.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A random number for [`RefusalLatency::draw`], which no client can foresee.
pub(crate) fn random() -> u64 {
    RandomState::new().hash_one(0_u8)
}

/// Draws one of `sorted` and moves it towards its neighbour, by up to a sixteenth, so that two clusters stay two. Of equal ones, or of
/// only one, it is moved by up to a 256th, so that the same duration does not repeat to the microsecond.
fn drawn(sorted: &[Duration], random: u64) -> Duration {
    let Some(last) = sorted.len().checked_sub(1) else { return Duration::ZERO };
    // The high half chooses, the low half moves.
    let (choice, by) = ((random >> 32) as usize % sorted.len(), (random & 0xffff_ffff) as u32);
    let chosen = sorted[choice];
    let neighbour = if choice == last { sorted[last.saturating_sub(1)] } else { sorted[choice + 1] };
    let gap = chosen.abs_diff(neighbour);
    let width = if gap.is_zero() { chosen / 256 } else { gap.min(chosen / 16) };
    let moved = width.mul_f64(f64::from(by) / f64::from(u32::MAX));
    if neighbour > chosen { chosen + moved } else { chosen.saturating_sub(moved) }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::net::IpAddr;

    use super::*;

    /// The client of this number.
    fn client(number: u32) -> AddressBlock {
        AddressBlock::of(IpAddr::from(number.to_be_bytes()))
    }

    /// Splitmix64.
    struct Seeded(u64);

    impl Seeded {
        fn next(&mut self) -> u64 {
            self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut mixed = self.0;
            mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            mixed ^ (mixed >> 31)
        }

        fn fraction(&mut self) -> f64 {
            (self.next() >> 11) as f64 / (1_u64 << 53) as f64
        }
    }

    #[test]
    fn only_the_last_are_drawn_from() {
        let refusals = RefusalLatency::default();
        let (mut random, shard) = (Seeded(1), Arc::from("a"));
        assert_eq!(refusals.draw(None, "x", random.next()), Duration::ZERO);
        for seconds in 0..100 {
            refusals.add(&shard, client(seconds), Duration::from_secs(seconds.into()));
        }
        assert!((0..1000).all(|_| refusals.draw(None, "x", random.next()) <= LONGEST));
        for milliseconds in 500..500 + REMEMBERED as u64 {
            refusals.add(&shard, client(milliseconds as u32), Duration::from_millis(milliseconds));
        }
        let range = Duration::from_millis(500)..Duration::from_millis(500 + REMEMBERED as u64);
        let draws: Vec<Duration> = (0..10_000).map(|_| refusals.draw(None, "x", random.next())).collect();
        assert!(draws.iter().all(|draw| range.contains(draw)));
        let whole: BTreeSet<u128> = draws.iter().map(Duration::as_millis).collect();
        assert!(whole.len() >= REMEMBERED - 1, "all of them are drawn: {}", whole.len());
    }

    #[test]
    fn every_attempt_is_drawn_afresh() {
        let refusals = RefusalLatency::default();
        refusals.add(&Arc::from("a"), client(1), Duration::from_secs(2));
        let mut random = Seeded(2);
        let draws: BTreeSet<Duration> = (0..100).map(|_| refusals.draw(None, "x", random.next())).collect();
        assert!(draws.len() > 95, "one sample, {} durations", draws.len());
        assert!(draws.iter().all(|draw| (1990..=2000).contains(&draw.as_millis())), "{draws:?}");
    }

    #[test]
    fn a_client_whom_the_servers_delay_does_not_delay_others() {
        let (refusals, shard) = (RefusalLatency::default(), Arc::from("a"));
        for number in 0..8 {
            refusals.add(&shard, client(number), Duration::from_millis(100));
        }
        for network in ["2001:db8::1", "2001:db8::2"] {
            let attacker = AddressBlock::of(network.parse().unwrap());
            (0..REMEMBERED).for_each(|_| refusals.add(&shard, attacker, Duration::from_secs(3)));
        }
        let mut random = Seeded(7);
        let late = (0..900).filter(|_| refusals.draw(None, "x", random.next()) > Duration::from_secs(1)).count();
        assert!((50..150).contains(&late), "one sample of nine is the attacker's: {late} of 900");
        refusals.add(&shard, AddressBlock::of("2001:db8::3".parse().unwrap()), Duration::from_millis(100));
        assert!((0..900).all(|_| refusals.draw(None, "x", random.next()) < Duration::from_secs(1)));
    }

    #[test]
    fn a_routed_user_is_refused_like_others_of_its_backend() {
        let refusals = RefusalLatency::default();
        let (fast, slow): (Arc<str>, Arc<str>) = (Arc::from("fast"), Arc::from("slow"));
        refusals.add(&fast, client(1), Duration::from_secs(1));
        refusals.add(&slow, client(1), Duration::from_secs(5));
        for (backend, answer) in [(&fast, b"NO fast"), (&slow, b"NO slow")] {
            refusals.observe_answer(backend, "alice", client(1), answer);
            refusals.observe_answer(backend, "bob", client(2), answer);
        }
        for number in 0..50 {
            let user = format!("user{number}");
            assert!(refusals.draw(Some("fast"), &user, 0) <= Duration::from_secs(1));
            assert!(refusals.draw(Some("slow"), &user, 0) > Duration::from_secs(4));
            assert_eq!(refusals.answer(Some("slow"), &user).as_deref(), Some(&b"NO slow"[..]));
            assert_eq!(refusals.draw(Some("new"), &user, 0), refusals.draw(None, &user, 0), "it has no samples");
        }
    }

    /// Otherwise the delays of an unknown user would vary as those of no real user do.
    #[test]
    fn an_unknown_user_is_like_a_user_of_one_backend() {
        let refusals = RefusalLatency::default();
        for (backend, seconds) in [("fast", 1), ("slow", 5)] {
            for number in 0..REMEMBERED {
                refusals.add(&Arc::from(backend), client(number as u32), Duration::from_secs(seconds));
            }
        }
        let mut random = Seeded(6);
        let mut slow = 0;
        for number in 0..200 {
            let user = format!("user{number}");
            let draws: BTreeSet<bool> =
                (0..50).map(|_| refusals.draw(None, &user, random.next()) > Duration::from_secs(3)).collect();
            assert_eq!(draws.len(), 1, "{user}");
            slow += u32::from(draws.contains(&true));
        }
        assert!((50..150).contains(&slow), "users are like both: {slow} of 200");
    }

    /// The largest distance between two empirical distributions (Kolmogorov-Smirnov).
    fn distance(one: &mut [Duration], other: &mut [Duration]) -> f64 {
        one.sort_unstable();
        other.sort_unstable();
        let share = |of: &[Duration], at: Duration| of.partition_point(|it| *it <= at) as f64 / of.len() as f64;
        let all = one.iter().chain(other.iter());
        all.map(|at| (share(one, *at) - share(other, *at)).abs()).fold(0.0, f64::max)
    }

    /// Wrong passwords and unknown users take turns, as a stream of logins would have them: their delays must have one distribution.
    #[test]
    fn unknown_users_are_refused_like_wrong_passwords() {
        let mut random = Seeded(3);
        type Latency = fn(f64) -> f64;
        let servers: [(&str, Latency); 3] = [
            ("a fixed delay and some noise", |at| 2.0 + 0.01 * at * at),
            ("none, and a doubling penalty", |at| 0.003 + 0.002 * at + f64::from(1_u32 << (at * 4.0) as u32)),
            ("two clusters", |at| if at < 0.5 { 0.01 + 0.01 * at } else { 3.0 + 0.1 * at }),
        ];
        for (name, latency) in servers {
            let (refusals, shard) = (RefusalLatency::default(), Arc::from("a"));
            let mut taken = || Duration::from_secs_f64(latency(random.fraction()));
            let mut clients = (0..).map(client);
            let mut add = |took| refusals.add(&shard, clients.next().unwrap(), took);
            for _ in 0..REMEMBERED {
                add(taken());
            }
            let (mut wrong, mut unknown) = (Vec::new(), Vec::new());
            for _ in 0..4000 {
                let took = taken();
                add(took);
                wrong.push(took);
            }
            let mut random = Seeded(4);
            let mut again = Seeded(5);
            for _ in 0..4000 {
                add(Duration::from_secs_f64(latency(again.fraction())));
                unknown.push(refusals.draw(None, "x", random.next()));
            }
            let distance = distance(&mut wrong, &mut unknown);
            // Two samples of 4000 of one distribution are 0.03 apart at most in 95 of 100 cases.
            assert!(distance < 0.06, "{name}: {distance}");
        }
    }
}
