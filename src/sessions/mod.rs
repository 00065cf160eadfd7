//! Who is logged in where, and how a session is told to end.
//!
//! Every login takes a [`Seat`] on the server it is about to use and keeps it as long as the session lives: so the operator
//! can end the sessions of a user or of a server, and a user whose mailbox must be served by one server at a time is never on
//! two. A session that is told to end ([`Call`]) is not ended here: it hears it wherever it is, in its task or in the
//! waiting room, and ends in order. This room knows one process; what several machines must agree on would be asked at
//! [`Sessions::take`] and [`Sessions::hold`]. Called by `session` and `server`.

use std::collections::HashMap;
use std::hash::{BuildHasher as _, RandomState};
use std::net::IpAddr;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use futures_util::task::AtomicWaker;
use slab::Slab;
use tokio::sync::Notify;

use crate::backend::Server;

/// No seat.
const NONE: u32 = u32::MAX;

/// Why a session is told to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Why {
    /// The process stops, and the grace time is over.
    Stopped = 1,
    /// The operator ends this user's sessions.
    Kicked = 2,
    /// The user is served by another server from now on.
    Moved = 3,
    /// The operator takes the server out of service.
    Drained = 4,
}

impl Why {
    fn from_bits(bits: u8) -> Option<Self> {
        [Self::Stopped, Self::Kicked, Self::Moved, Self::Drained].into_iter().find(|why| *why as u8 == bits)
    }
}

/// How a session hears that it shall end: once, and for good.
#[derive(Debug, Default)]
pub struct Call {
    why: AtomicU8,
    waker: AtomicWaker,
}

impl Call {
    /// Ready when the session has been told to end. One waker is kept, the last.
    pub fn poll(&self, context: &Context<'_>) -> Poll<Why> {
        self.waker.register(context.waker());
        self.why().map_or(Poll::Pending, Poll::Ready)
    }

    /// Whether, and why, the session has been told to end.
    pub fn why(&self) -> Option<Why> {
        Why::from_bits(self.why.load(Ordering::Acquire))
    }

    fn tell(&self, why: Why) {
        // The first reason stays.
        if self.why.compare_exchange(0, why as u8, Ordering::AcqRel, Ordering::Acquire).is_ok() {
            self.waker.wake();
        }
    }
}

/// Who takes a seat.
#[derive(Debug, Clone)]
pub struct Guest {
    /// As routes know the user.
    pub user: Arc<str>,
    /// Where the client is.
    pub client: IpAddr,
    /// The session's name in log records.
    pub session: [u8; 16],
}

/// What the operator sees of a session.
#[derive(Debug, Clone)]
pub struct Seen {
    /// Who.
    pub guest: Guest,
    /// Where.
    pub server: Arc<Server>,
    /// For how long.
    pub age: Duration,
    /// How far it is.
    pub stage: Stage,
}

/// How far a session is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// The login is under way.
    LoggingIn,
    /// The login is done.
    Settled,
    /// The server has closed its connection; only the client is still there.
    CutOff,
}

/// Why there is no seat.
#[derive(Debug, PartialEq, Eq)]
pub enum NoSeat {
    /// New logins of the user wait: [`Sessions::hold`].
    Held,
    /// The user has sessions on other servers of the backend, which have been told to end.
    Elsewhere,
}

/// All logged-in sessions of the process.
#[derive(Debug)]
pub struct Sessions {
    inside: Mutex<Inside>,
    /// Of this process alone, so that nobody can choose names that collide.
    hasher: RandomState,
    /// Somebody has left, or a hold has ended.
    left: Notify,
    begun: Instant,
}

#[derive(Debug, Default)]
struct Inside {
    taken: Slab<Taken>,
    /// The first seat of each user, by the hash of the name.
    users: HashMap<u64, u32>,
    held: HashMap<Arc<str>, usize>,
    closed: bool,
    /// Seats given back since the room was last made smaller.
    left: usize,
}

#[derive(Debug)]
struct Taken {
    guest: Guest,
    server: Arc<Server>,
    call: Arc<Call>,
    /// Seconds after the process began.
    since: u32,
    stage: Stage,
    /// Other seats of the same hash.
    next: u32,
    previous: u32,
}

/// A place on a server, until dropped.
#[derive(Debug)]
pub struct Seat {
    sessions: Arc<Sessions>,
    call: Arc<Call>,
    key: u32,
}

impl Seat {
    /// Where the session hears that it shall end.
    pub fn call(&self) -> &Arc<Call> {
        &self.call
    }

    /// The login is done.
    pub fn settle(&self) {
        self.set(Stage::Settled);
    }

    /// There is no connection to the server any more: nobody who must be alone waits for this session from now on.
    pub fn cut_off(&self) {
        self.set(Stage::CutOff);
        self.sessions.left.notify_waiters();
    }

    fn set(&self, stage: Stage) {
        if let Some(taken) = self.sessions.lock().taken.get_mut(self.key as usize) {
            taken.stage = stage;
        }
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut inside = self.sessions.lock();
        let Some(taken) = inside.taken.try_remove(self.key as usize) else { return };
        if let Some(previous) = inside.taken.get_mut(taken.previous as usize) {
            previous.next = taken.next;
        } else {
            let hash = self.sessions.hasher.hash_one(&*taken.guest.user);
            if taken.next == NONE {
                inside.users.remove(&hash);
            } else {
                inside.users.insert(hash, taken.next);
            }
        }
        if let Some(next) = inside.taken.get_mut(taken.next as usize) {
            next.previous = taken.previous;
        }
        inside.shrink();
        drop(inside);
        self.sessions.left.notify_waiters();
    }
}

/// New logins of a user wait as long as this is held.
#[derive(Debug)]
pub struct Hold {
    sessions: Arc<Sessions>,
    user: Arc<str>,
}

impl Drop for Hold {
    fn drop(&mut self) {
        let mut inside = self.sessions.lock();
        if let Some(count) = inside.held.get_mut(&self.user) {
            *count -= 1;
            if *count == 0 {
                inside.held.remove(&self.user);
            }
        }
        drop(inside);
        self.sessions.left.notify_waiters();
    }
}

impl Default for Sessions {
    fn default() -> Self {
        let (inside, hasher, left) = (Mutex::default(), RandomState::new(), Notify::new());
        Self { inside, hasher, left, begun: Instant::now() }
    }
}

impl Sessions {
    /// Takes a seat on `server`. With `alone` the user must have none on another server of its backend: those that are there
    /// are told to end, and the caller waits ([`Sessions::changed`]) and asks again.
    ///
    /// # Errors
    /// [`NoSeat`].
    pub fn take(self: &Arc<Self>, guest: Guest, server: &Arc<Server>, alone: bool) -> Result<Seat, NoSeat> {
        let mut inside = self.lock();
        if inside.held.contains_key(&guest.user) {
            return Err(NoSeat::Held);
        }
        let hash = self.hasher.hash_one(&*guest.user);
        let first = inside.users.get(&hash).copied().unwrap_or(NONE);
        if alone {
            let is_elsewhere = |taken: &&Taken| {
                taken.server.backend == server.backend
                    && taken.server.name != server.name
                    && taken.stage != Stage::CutOff
            };
            let elsewhere: Vec<Arc<Call>> =
                inside.of(first, &guest.user).filter(is_elsewhere).map(|taken| taken.call.clone()).collect();
            if !elsewhere.is_empty() {
                drop(inside);
                elsewhere.iter().for_each(|call| call.tell(Why::Moved));
                return Err(NoSeat::Elsewhere);
            }
        }
        let call = Arc::new(Call::default());
        if inside.closed {
            call.tell(Why::Stopped);
        }
        let since = u32::try_from(self.begun.elapsed().as_secs()).unwrap_or(u32::MAX);
        let (server, call_kept) = (server.clone(), call.clone());
        let taken =
            Taken { guest, server, call: call_kept, since, stage: Stage::LoggingIn, next: first, previous: NONE };
        // More than 4 billion sessions would not fit a machine.
        let key = u32::try_from(inside.taken.insert(taken)).unwrap_or(NONE);
        if let Some(next) = inside.taken.get_mut(first as usize) {
            next.previous = key;
        }
        inside.users.insert(hash, key);
        Ok(Seat { sessions: self.clone(), call, key })
    }

    /// New logins of `user` get no seat until the hold drops.
    pub fn hold(self: &Arc<Self>, user: Arc<str>) -> Hold {
        *self.lock().held.entry(user.clone()).or_insert(0) += 1;
        Hold { sessions: self.clone(), user }
    }

    /// Whether new logins of `user` wait.
    pub fn is_held(&self, user: &str) -> bool {
        self.lock().held.contains_key(user)
    }

    /// Waits until `condition` holds, which is asked again whenever somebody leaves or a hold ends.
    pub async fn changed(&self, mut condition: impl FnMut(&Self) -> bool) {
        loop {
            let mut left = std::pin::pin!(self.left.notified());
            // Whoever leaves from here on is heard of.
            left.as_mut().enable();
            if condition(self) {
                return;
            }
            left.await;
        }
    }

    /// Tells sessions of `user` to end; says how many there are.
    pub fn end_user(&self, user: &str, why: Why) -> usize {
        let calls: Vec<Arc<Call>> = {
            let inside = self.lock();
            let first = inside.users.get(&self.hasher.hash_one(user)).copied().unwrap_or(NONE);
            inside.of(first, user).map(|taken| taken.call.clone()).collect()
        };
        calls.iter().for_each(|call| call.tell(why));
        calls.len()
    }

    /// Sessions and logins under way of `user`.
    pub fn of_user(&self, user: &str) -> Vec<Seen> {
        let inside = self.lock();
        let first = inside.users.get(&self.hasher.hash_one(user)).copied().unwrap_or(NONE);
        inside.of(first, user).map(|taken| self.seen(taken)).collect()
    }

    /// Tells up to `most` sessions, of those that `which` picks and that have not been told before, to end. Says how many were
    /// told, and how many are left to be.
    pub fn end_some(&self, most: usize, why: Why, which: impl Fn(&Server) -> bool) -> (usize, usize) {
        let mut calls = Vec::new();
        let mut left = 0;
        for (_, taken) in &self.lock().taken {
            if which(&taken.server) && taken.call.why().is_none() {
                if calls.len() < most {
                    calls.push(taken.call.clone());
                } else {
                    left += 1;
                }
            }
        }
        calls.iter().for_each(|call| call.tell(why));
        (calls.len(), left)
    }

    /// Sessions on the servers that `which` picks, told to end or not.
    pub fn count(&self, which: impl Fn(&Server) -> bool) -> usize {
        self.lock().taken.iter().filter(|(_, taken)| which(&taken.server)).count()
    }

    /// Tells all to end, and whoever still takes a seat at once.
    pub fn close(&self) {
        self.lock().closed = true;
        self.end_some(usize::MAX, Why::Stopped, |_| true);
    }

    /// Up to `most` sessions.
    pub fn list(&self, most: usize) -> Vec<Seen> {
        self.lock().taken.iter().take(most).map(|(_, taken)| self.seen(taken)).collect()
    }

    fn seen(&self, taken: &Taken) -> Seen {
        let age = self.begun.elapsed().saturating_sub(Duration::from_secs(taken.since.into()));
        Seen { guest: taken.guest.clone(), server: taken.server.clone(), age, stage: taken.stage }
    }

    fn lock(&self) -> MutexGuard<'_, Inside> {
        // Nothing in here panics halfway through a change.
        self.inside.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inside {
    /// The seats of `user`, from the first of its hash on.
    fn of<'a>(&'a self, first: u32, user: &'a str) -> impl Iterator<Item = &'a Taken> {
        let mut key = first;
        std::iter::from_fn(move || {
            let taken = self.taken.get(key as usize)?;
            key = taken.next;
            Some(taken)
        })
        .filter(move |taken| &*taken.guest.user == user)
    }

    /// After a peak; as far as the last place in use. That takes a step for each place, so it is done once for every 64th
    /// of them given back, and when the last is.
    fn shrink(&mut self) {
        const SPARE: usize = 256;
        self.left += 1;
        if !self.taken.is_empty() && self.left < self.taken.capacity() / 64 {
            return;
        }
        self.left = 0;
        if self.taken.len() * 4 + SPARE < self.taken.capacity() {
            self.taken.shrink_to_fit();
        }
        if self.users.len() * 4 + SPARE < self.users.capacity() {
            self.users.shrink_to(self.users.len() * 2);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;

    use futures_util::task::noop_waker;
    use tokio::time::timeout;

    use super::*;

    fn guest(user: &str) -> Guest {
        Guest { user: user.into(), client: IpAddr::from([192, 0, 2, 1]), session: [b'x'; 16] }
    }

    fn server(name: &str) -> Arc<Server> {
        Arc::new(Server::named("shard", name))
    }

    fn users(sessions: &Sessions) -> Vec<String> {
        sessions.list(100).iter().map(|seen| seen.guest.user.to_string()).collect()
    }

    #[test]
    fn seats_are_given_back_in_any_order() {
        let sessions = Arc::new(Sessions::default());
        let (one, two) = (server("a"), server("b"));
        let mut seats: Vec<Seat> =
            (0..9).map(|number| sessions.take(guest(["x", "y", "z"][number % 3]), &one, false).unwrap()).collect();
        let other = sessions.take(guest("x"), &two, false).unwrap();
        assert_eq!(sessions.of_user("x").len(), 4);
        // From the middle, the front and the end of a user's chain.
        for place in [3, 0, 4] {
            seats.remove(place);
        }
        assert_eq!((sessions.of_user("x").len(), sessions.of_user("y").len(), sessions.of_user("z").len()), (1, 3, 3));
        assert_eq!(sessions.count(|server| *server.name == *"b"), 1);
        drop(other);
        drop(seats);
        assert!(users(&sessions).is_empty());
        assert!(sessions.lock().users.is_empty());
    }

    #[test]
    fn who_must_be_alone_waits_until_the_others_are_gone() {
        let sessions = Arc::new(Sessions::default());
        let (one, two) = (server("a"), server("b"));
        let first = sessions.take(guest("x"), &one, true).unwrap();
        let second = sessions.take(guest("x"), &one, true).unwrap();
        let bystander = sessions.take(guest("y"), &one, true).unwrap();
        assert_eq!(sessions.take(guest("x"), &two, true).unwrap_err(), NoSeat::Elsewhere);
        assert_eq!((first.call().why(), second.call().why()), (Some(Why::Moved), Some(Why::Moved)));
        assert_eq!(bystander.call().why(), None);
        drop(first);
        assert_eq!(sessions.take(guest("x"), &two, true).unwrap_err(), NoSeat::Elsewhere);
        drop(second);
        let moved = sessions.take(guest("x"), &two, true).unwrap();
        assert_eq!(sessions.of_user("x")[0].server.name, two.name);
        // Nor does anybody wait for one that its server has left.
        moved.cut_off();
        assert!(sessions.take(guest("x"), &one, true).is_ok());
        assert_eq!(sessions.end_user("x", Why::Kicked), 1, "it can still be told to end");
        let moved = sessions.take(guest("x"), &two, true).unwrap();
        // Another backend is another matter.
        let elsewhere = Arc::new(Server::named("other", "a"));
        assert!(sessions.take(guest("x"), &elsewhere, true).is_ok());
        assert_eq!(moved.call().why(), None);
    }

    #[tokio::test]
    async fn a_hold_keeps_new_logins_out_until_it_ends() {
        let sessions = Arc::new(Sessions::default());
        let one = server("a");
        let (hold, again) = (sessions.hold("x".into()), sessions.hold("x".into()));
        assert_eq!(sessions.take(guest("x"), &one, false).unwrap_err(), NoSeat::Held);
        assert!(sessions.take(guest("y"), &one, false).is_ok());
        drop(hold);
        assert!(sessions.is_held("x"));
        let mut free = pin!(sessions.changed(|sessions| !sessions.is_held("x")));
        assert!(timeout(Duration::ZERO, &mut free).await.is_err());
        drop(again);
        free.await;
        assert!(sessions.take(guest("x"), &one, false).is_ok());
    }

    #[test]
    fn a_call_wakes_and_keeps_its_first_reason() {
        let sessions = Arc::new(Sessions::default());
        let seat = sessions.take(guest("x"), &server("a"), false).unwrap();
        let waker = noop_waker();
        let context = Context::from_waker(&waker);
        assert_eq!(seat.call().poll(&context), Poll::Pending);
        assert_eq!(sessions.end_user("x", Why::Kicked), 1);
        sessions.close();
        assert_eq!(seat.call().poll(&context), Poll::Ready(Why::Kicked));
        let late = sessions.take(guest("y"), &server("a"), false).unwrap();
        assert_eq!(late.call().why(), Some(Why::Stopped), "who comes after the end is told at once");
    }

    #[test]
    fn a_server_is_emptied_bit_by_bit() {
        let sessions = Arc::new(Sessions::default());
        let (one, two) = (server("a"), server("b"));
        let seats: Vec<Seat> =
            (0..10).map(|number| sessions.take(guest(&format!("u{number}")), &one, false).unwrap()).collect();
        let stays = sessions.take(guest("z"), &two, false).unwrap();
        let on_one = |server: &Server| *server.name == *"a";
        assert_eq!(sessions.end_some(4, Why::Drained, on_one), (4, 6));
        assert_eq!(sessions.end_some(4, Why::Drained, on_one), (4, 2));
        assert_eq!(sessions.end_some(4, Why::Drained, on_one), (2, 0));
        assert_eq!(seats.iter().filter(|seat| seat.call().why() == Some(Why::Drained)).count(), 10);
        assert_eq!(stays.call().why(), None);
    }

    #[test]
    fn places_go_back_after_a_peak_whoever_stays() {
        let sessions = Arc::new(Sessions::default());
        let one = server("a");
        let mut seats: Vec<Seat> =
            (0..5000).map(|number| sessions.take(guest(&format!("u{number}")), &one, false).unwrap()).collect();
        seats.truncate(100);
        let places = || {
            let inside = sessions.lock();
            (inside.taken.capacity(), inside.users.capacity())
        };
        // Who left last may have had the last place; the next to leave see to it.
        (0..100).for_each(|_| drop(sessions.take(guest("late"), &one, false).unwrap()));
        assert!(places().0 < 1000 && places().1 < 1000, "{:?}", places());
        (0..5000).for_each(|number| seats.push(sessions.take(guest(&format!("u{number}")), &one, false).unwrap()));
        drop(seats);
        assert!(places().0 < 300 && places().1 < 300, "{:?}", places());
    }

    #[test]
    fn a_seat_is_small() {
        assert!(size_of::<Taken>() <= 96, "{}", size_of::<Taken>());
        assert!(size_of::<Call>() <= 32 && size_of::<Seat>() <= 24);
    }
}
