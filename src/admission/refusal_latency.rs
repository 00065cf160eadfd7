//! Samples of how servers refuse passwords, so that a refusal without a server takes as long and has the same text.
//!
//! Servers delay the reply to a wrong password, each by its own rule. An unknown user is treated like a user of one of the backends, always
//! the same one: for each attempt, one of the last latencies of that backend is drawn at random and varied slightly. Therefore
//! neither one reply nor many reveal whether a server was contacted.

use std::collections::BTreeMap;
use std::hash::{BuildHasher as _, RandomState};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::refusal_wording::Wording;
use crate::admission::AddressBlock;

/// Number of samples per backend.
const SAMPLES: usize = 32;
/// Upper limit of a sample: longer latencies are outages.
const MAX_LATENCY: Duration = Duration::from_secs(30);

/// The last refusals of each backend, by its name. Reloads add backends, which stay until the process ends.
#[derive(Debug, Default)]
pub struct RefusalLatency {
    /// Its key is random, so that clients cannot predict which backend a user is assigned to.
    hasher: RandomState,
    backends: Mutex<BTreeMap<Arc<str>, Refusals>>,
}

/// The last refusals of one backend.
#[derive(Debug, Default)]
struct Refusals {
    /// At most one sample per client, so that a client that the servers delay does not delay the refusals of others.
    latencies: Vec<(AddressBlock, Duration)>,
    next: usize,
    wording: Wording,
}

impl Refusals {
    fn add(&mut self, client: AddressBlock, latency: Duration) {
        if let Some((_, known)) = self.latencies.iter_mut().find(|(of, _)| *of == client) {
            *known = latency;
            return;
        }
        match self.latencies.get_mut(self.next) {
            Some(old) => *old = (client, latency),
            None => self.latencies.push((client, latency)),
        }
        self.next = (self.next + 1) % SAMPLES;
    }
}

impl RefusalLatency {
    /// Records that a server of `backend` refused a password of `client` after `latency`.
    pub(crate) fn add(&self, backend: &Arc<str>, client: AddressBlock, latency: Duration) {
        self.lock().entry(backend.clone()).or_default().add(client, latency.min(MAX_LATENCY));
    }

    /// Records the reply, without the tag, with which a server of `backend` refused a password that `client` sent for `user`.
    pub(crate) fn observe_reply(&self, backend: &Arc<str>, user: &str, client: AddressBlock, reply: &[u8]) {
        let user = self.hasher.hash_one(user);
        self.lock().entry(backend.clone()).or_default().wording.observe(user, client, reply);
    }

    /// Returns the common reply of the backend `routed`, or of the backend that `user` is assigned to, without the tag; `None` while it is
    /// not known.
    pub(crate) fn common_reply(&self, routed: Option<&str>, user: &str) -> Option<Arc<[u8]>> {
        let backends = self.lock();
        let of_routed = routed.and_then(|routed| backends.get(routed)).and_then(|refusals| refusals.wording.common());
        of_routed.or_else(|| self.assigned(&backends, user)?.wording.common())
    }

    /// The backend that an unknown user is assigned to, by rendezvous hashing: a new backend moves only its own share of users.
    fn assigned<'a>(&self, backends: &'a BTreeMap<Arc<str>, Refusals>, user: &str) -> Option<&'a Refusals> {
        let highest = backends.iter().max_by_key(|(backend, _)| self.hasher.hash_one((user, backend)));
        highest.map(|(_, refusals)| refusals)
    }

    /// Draws a latency from the samples of the backend `routed`, or, if it has none, of the backend that `user` is assigned to. Returns zero
    /// if there are no samples yet. `random` decides which latency.
    pub(crate) fn draw(&self, routed: Option<&str>, user: &str, random: u64) -> Duration {
        let backends = self.lock();
        let of_routed =
            routed.and_then(|routed| backends.get(routed)).filter(|refusals| !refusals.latencies.is_empty());
        let refusals = of_routed.or_else(|| self.assigned(&backends, user));
        // A copy, which is sorted after the lock is released.
        let mut latencies: Vec<Duration> = refusals
            .map(|refusals| refusals.latencies.iter().map(|(_, latency)| *latency).collect())
            .unwrap_or_default();
        drop(backends);
        latencies.sort_unstable();
        draw_from(&latencies, random)
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<Arc<str>, Refusals>> {
        // A poisoned lock is safe: no critical section can panic halfway through a change.
        self.backends.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Returns a random number for [`RefusalLatency::draw`] that clients cannot predict.
pub(crate) fn random() -> u64 {
    RandomState::new().hash_one(0_u8)
}

/// Draws one of `sorted` and moves it towards its neighbour by up to a sixteenth, so that two clusters remain two. If the neighbour is equal,
/// it is moved by up to a 256th, so that the same latency does not repeat to the microsecond.
fn draw_from(sorted: &[Duration], random: u64) -> Duration {
    let Some(last) = sorted.len().checked_sub(1) else { return Duration::ZERO };
    // The upper half selects the sample, the lower half its variation.
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

    /// Returns a client with the IPv4 address of this number.
    fn client(number: u32) -> AddressBlock {
        AddressBlock::of(IpAddr::from(number.to_be_bytes()))
    }

    /// A SplitMix64 generator.
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
    fn latencies_are_drawn_from_the_last_samples() {
        let refusals = RefusalLatency::default();
        let (mut random, shard) = (Seeded(1), Arc::from("a"));
        assert_eq!(refusals.draw(None, "x", random.next()), Duration::ZERO);
        for seconds in 0..100 {
            refusals.add(&shard, client(seconds), Duration::from_secs(seconds.into()));
        }
        assert!((0..1000).all(|_| refusals.draw(None, "x", random.next()) <= MAX_LATENCY));
        for milliseconds in 500..500 + SAMPLES as u64 {
            refusals.add(&shard, client(milliseconds as u32), Duration::from_millis(milliseconds));
        }
        let range = Duration::from_millis(500)..Duration::from_millis(500 + SAMPLES as u64);
        let draws: Vec<Duration> = (0..10_000).map(|_| refusals.draw(None, "x", random.next())).collect();
        assert!(draws.iter().all(|draw| range.contains(draw)));
        let whole: BTreeSet<u128> = draws.iter().map(Duration::as_millis).collect();
        assert!(whole.len() >= SAMPLES - 1, "every sample is drawn: {}", whole.len());
    }

    #[test]
    fn every_attempt_draws_a_new_latency() {
        let refusals = RefusalLatency::default();
        refusals.add(&Arc::from("a"), client(1), Duration::from_secs(2));
        let mut random = Seeded(2);
        let draws: BTreeSet<Duration> = (0..100).map(|_| refusals.draw(None, "x", random.next())).collect();
        assert!(draws.len() > 95, "one sample, {} durations", draws.len());
        assert!(draws.iter().all(|draw| (1990..=2000).contains(&draw.as_millis())), "{draws:?}");
    }

    #[test]
    fn client_that_the_servers_delay_does_not_delay_others() {
        let (refusals, shard) = (RefusalLatency::default(), Arc::from("a"));
        for number in 0..8 {
            refusals.add(&shard, client(number), Duration::from_millis(100));
        }
        for network in ["2001:db8::1", "2001:db8::2"] {
            let attacker = AddressBlock::of(network.parse().unwrap());
            (0..SAMPLES).for_each(|_| refusals.add(&shard, attacker, Duration::from_secs(3)));
        }
        let mut random = Seeded(7);
        let late = (0..900).filter(|_| refusals.draw(None, "x", random.next()) > Duration::from_secs(1)).count();
        assert!((50..150).contains(&late), "one sample of nine is that of the attacker: {late} of 900");
        refusals.add(&shard, AddressBlock::of("2001:db8::3".parse().unwrap()), Duration::from_millis(100));
        assert!((0..900).all(|_| refusals.draw(None, "x", random.next()) < Duration::from_secs(1)));
    }

    #[test]
    fn routed_user_is_refused_like_others_of_its_backend() {
        let refusals = RefusalLatency::default();
        let (fast, slow): (Arc<str>, Arc<str>) = (Arc::from("fast"), Arc::from("slow"));
        refusals.add(&fast, client(1), Duration::from_secs(1));
        refusals.add(&slow, client(1), Duration::from_secs(5));
        for (backend, answer) in [(&fast, b"NO fast"), (&slow, b"NO slow")] {
            refusals.observe_reply(backend, "alice", client(1), answer);
            refusals.observe_reply(backend, "bob", client(2), answer);
        }
        for number in 0..50 {
            let user = format!("user{number}");
            assert!(refusals.draw(Some("fast"), &user, 0) <= Duration::from_secs(1));
            assert!(refusals.draw(Some("slow"), &user, 0) > Duration::from_secs(4));
            assert_eq!(refusals.common_reply(Some("slow"), &user).as_deref(), Some(&b"NO slow"[..]));
            assert_eq!(
                refusals.draw(Some("new"), &user, 0),
                refusals.draw(None, &user, 0),
                "backend `new` has no samples"
            );
        }
    }

    /// Otherwise the latencies of an unknown user would vary in a way that those of a real user do not.
    #[test]
    fn unknown_user_is_treated_like_a_user_of_one_backend() {
        let refusals = RefusalLatency::default();
        for (backend, seconds) in [("fast", 1), ("slow", 5)] {
            for number in 0..SAMPLES {
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
        assert!((50..150).contains(&slow), "users are assigned to both backends: {slow} of 200");
    }

    /// The largest distance between two empirical distributions (Kolmogorov-Smirnov).
    fn distance(one: &mut [Duration], other: &mut [Duration]) -> f64 {
        one.sort_unstable();
        other.sort_unstable();
        let share = |of: &[Duration], at: Duration| of.partition_point(|it| *it <= at) as f64 / of.len() as f64;
        let all = one.iter().chain(other.iter());
        all.map(|at| (share(one, *at) - share(other, *at)).abs()).fold(0.0, f64::max)
    }

    /// Wrong passwords and unknown users alternate, as in a stream of logins: their latencies must have the same distribution.
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
            for _ in 0..SAMPLES {
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
            // Two samples of 4000 from one distribution differ by at most 0.03 in 95 of 100 cases.
            assert!(distance < 0.06, "{name}: {distance}");
        }
    }
}
