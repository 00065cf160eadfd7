//! The session registry: which user is logged in, or is logging in, on which server, and how a session is cancelled.
//!
//! A login registers before it is routed ([`Sessions::take`]), names its server when one is chosen ([`SessionHandle::place`]), and
//! keeps its [`SessionHandle`] as long as the session lives. So the operator can end the sessions and logins of a user at any step,
//! and a user whose mailbox must be served by one server at a time is never established on two: when a server has accepted
//! a login ([`SessionHandle::accept`]), the user's accepted sessions on other servers of the backend are cancelled, and the login
//! waits until it is alone ([`SessionHandle::is_alone`]). Until then it has no effect on other sessions, because nothing has shown
//! yet that the client is the user. Of two logins that different servers accept, the one accepted last stays: each waits
//! only for those accepted before it and ends when it is cancelled itself, so no two wait for each other.
//!
//! A cancelled session is not ended here: its task or the waiting room sees the [`CancelSignal`] and ends it in order. This module
//! knows one process; several machines would have to agree at [`Sessions::take`], [`SessionHandle::accept`] and [`Sessions::hold`].

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
use crate::generations::{Generation, Generations};

/// No seat.
const NONE: u32 = u32::MAX;

/// Why a session is told to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum CancelReason {
    /// The process stops, and the grace time is over.
    Stopped = 1,
    /// The operator ends this user's sessions.
    Kicked = 2,
    /// The user is served by another server from now on.
    Moved = 3,
    /// The operator takes the server out of service.
    Drained = 4,
    /// Another server of the backend has accepted a later login of the user.
    Replaced = 5,
}

impl CancelReason {
    fn from_bits(bits: u8) -> Option<Self> {
        [Self::Stopped, Self::Kicked, Self::Moved, Self::Drained, Self::Replaced]
            .into_iter()
            .find(|why| *why as u8 == bits)
    }
}

/// How a session hears that it shall end: once, and for good.
#[derive(Debug, Default)]
pub struct CancelSignal {
    why: AtomicU8,
    waker: AtomicWaker,
}

impl CancelSignal {
    /// Ready when the session has been told to end. One waker is kept, the last.
    pub fn poll(&self, context: &Context<'_>) -> Poll<CancelReason> {
        self.waker.register(context.waker());
        self.why().map_or(Poll::Pending, Poll::Ready)
    }

    /// Whether, and why, the session has been told to end.
    pub fn why(&self) -> Option<CancelReason> {
        CancelReason::from_bits(self.why.load(Ordering::Acquire))
    }

    /// Waits until the session is cancelled.
    pub async fn cancelled(&self) -> CancelReason {
        std::future::poll_fn(|context| self.poll(context)).await
    }

    /// Cancels the session. The first reason stays: whether this was the first.
    fn tell(&self, why: CancelReason) -> bool {
        let is_first = self.why.compare_exchange(0, why as u8, Ordering::AcqRel, Ordering::Acquire).is_ok();
        if is_first {
            self.waker.wake();
        }
        is_first
    }
}

/// Who takes a seat.
#[derive(Debug, Clone)]
pub struct SessionInfo {
    /// The name in the routes; once a server is chosen, the name of the mailbox.
    pub user: Arc<str>,
    /// Where the client is.
    pub client: IpAddr,
    /// The session's name in log records.
    pub session: [u8; 16],
}

/// What the operator sees of a session.
#[derive(Debug, Clone)]
pub struct RegisteredSession {
    /// Who.
    pub guest: SessionInfo,
    /// The server; absent until one is chosen.
    pub server: Option<Arc<Server>>,
    /// For how long.
    pub age: Duration,
    /// How far it is.
    pub stage: SessionState,
}

/// How far a session is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SessionState {
    /// The login is under way: no server has accepted it.
    LoggingIn,
    /// A server has accepted the login, and the client has not been answered yet.
    Accepted,
    /// The login is done.
    Settled,
    /// The server has closed its connection; only the client is still there.
    CutOff,
}

/// Why a login may not go on as it was routed.
#[derive(Debug, PartialEq, Eq)]
pub enum RegisterError {
    /// New logins under this name wait: [`Sessions::hold`].
    Held(Arc<str>),
    /// The user was held, or the configuration replaced, since the routes were asked: the answer may be out of date.
    Outdated,
}

/// All logins under way and established sessions of the process.
#[derive(Debug)]
pub struct Sessions {
    inside: Mutex<Inside>,
    /// Of this process alone, so that nobody can choose names that collide.
    hasher: RandomState,
    #[cfg(test)]
    hashes_collide: bool,
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
    /// Each hold, at its begin and its end.
    holds: Generations,
    closed: bool,
    /// Seats given back since the room was last made smaller.
    left: usize,
}

#[derive(Debug)]
struct Taken {
    guest: SessionInfo,
    /// Absent until one is chosen.
    server: Option<Arc<Server>>,
    call: Arc<CancelSignal>,
    /// Seconds after the process began.
    since: u32,
    stage: SessionState,
    /// Other seats of the same hash.
    next: u32,
    previous: u32,
}

impl Taken {
    /// Whether a server has let the user in and has not closed the connection.
    fn is_served(&self) -> bool {
        matches!(self.stage, SessionState::Accepted | SessionState::Settled)
    }

    /// Whether it is served by another server of the backend of `server`.
    fn is_served_instead_of(&self, server: &Server) -> bool {
        let elsewhere = |other: &Arc<Server>| other.backend == server.backend && other.name != server.name;
        self.is_served() && self.server.as_ref().is_some_and(elsewhere)
    }
}

/// The entry of a login or session, until dropped.
#[derive(Debug)]
pub struct SessionHandle {
    sessions: Arc<Sessions>,
    call: Arc<CancelSignal>,
    key: u32,
}

impl SessionHandle {
    /// Where the session hears that it shall end.
    pub fn call(&self) -> &Arc<CancelSignal> {
        &self.call
    }

    /// Names the server that the login is about to use, and the mailbox there. `since`: [`Sessions::generation`] before
    /// the routes were asked. No other session is affected.
    ///
    /// # Errors
    /// The login must be routed again: see [`RegisterError`].
    pub fn place(&self, mailbox: &Arc<str>, server: &Arc<Server>, since: Generation) -> Result<(), RegisterError> {
        let hash = |name: &str| self.sessions.hash(name);
        let mut inside = self.sessions.lock();
        if inside.held.contains_key(mailbox) {
            return Err(RegisterError::Held(mailbox.clone()));
        }
        if !inside.holds.is_current(mailbox, since) {
            return Err(RegisterError::Outdated);
        }
        let Some(taken) = inside.taken.get_mut(self.key as usize) else { return Err(RegisterError::Outdated) };
        taken.server = Some(server.clone());
        if taken.guest.user != *mailbox {
            let before = std::mem::replace(&mut taken.guest.user, mailbox.clone());
            inside.unlink(self.key, hash(&before));
            inside.link(self.key, hash(mailbox));
        }
        Ok(())
    }

    /// The server has accepted the login. With `alone` the user must have no accepted session on another server of the
    /// backend: those that are there are cancelled, and the caller waits until [`SessionHandle::is_alone`].
    pub fn accept(&self, alone: bool) {
        let mut inside = self.sessions.lock();
        let Some(taken) = inside.taken.get_mut(self.key as usize) else { return };
        taken.stage = SessionState::Accepted;
        if alone {
            let elsewhere: Vec<Arc<CancelSignal>> = self.elsewhere(&inside).map(|taken| taken.call.clone()).collect();
            drop(inside);
            tell_all(&elsewhere, CancelReason::Replaced);
        }
    }

    /// Whether the user has no accepted session on another server of the backend.
    pub fn is_alone(&self) -> bool {
        self.elsewhere(&self.sessions.lock()).next().is_none()
    }

    fn elsewhere<'a>(&self, inside: &'a Inside) -> impl Iterator<Item = &'a Taken> {
        let own = inside.taken.get(self.key as usize);
        let own = own.and_then(|own| Some((own.guest.user.clone(), own.server.clone()?)));
        let others = own.map(|(user, server)| {
            let first = inside.first(self.sessions.hash(&user));
            inside.of(first, user).filter(move |taken| taken.is_served_instead_of(&server))
        });
        others.into_iter().flatten()
    }

    /// The login is done.
    pub fn settle(&self) {
        self.set(SessionState::Settled);
    }

    /// There is no connection to the server any more: nobody who must be alone waits for this session from now on.
    pub fn cut_off(&self) {
        self.set(SessionState::CutOff);
        self.sessions.left.notify_waiters();
    }

    fn set(&self, stage: SessionState) {
        if let Some(taken) = self.sessions.lock().taken.get_mut(self.key as usize) {
            taken.stage = stage;
        }
    }
}

impl Drop for SessionHandle {
    fn drop(&mut self) {
        let mut inside = self.sessions.lock();
        let Some(taken) = inside.taken.get(self.key as usize) else { return };
        let hash = self.sessions.hash(&taken.guest.user);
        inside.unlink(self.key, hash);
        inside.taken.remove(self.key as usize);
        inside.shrink();
        drop(inside);
        self.sessions.left.notify_waiters();
    }
}

/// New logins of a user wait as long as this is held.
#[derive(Debug)]
pub struct LoginHold {
    sessions: Arc<Sessions>,
    user: Arc<str>,
}

impl Drop for LoginHold {
    fn drop(&mut self) {
        let mut inside = self.sessions.lock();
        if let Some(count) = inside.held.get_mut(&self.user) {
            *count -= 1;
            if *count == 0 {
                inside.held.remove(&self.user);
            }
        }
        // Routes that were asked during the hold may have answered before the move.
        inside.holds.invalidate(&self.user);
        drop(inside);
        self.sessions.left.notify_waiters();
    }
}

impl Default for Sessions {
    fn default() -> Self {
        let (inside, hasher, left) = (Mutex::default(), RandomState::new(), Notify::new());
        Self {
            inside,
            hasher,
            #[cfg(test)]
            hashes_collide: false,
            left,
            begun: Instant::now(),
        }
    }
}

impl Sessions {
    /// The key of a user's chain. Several users may share one: [`Inside::of`] compares names.
    fn hash(&self, user: &str) -> u64 {
        #[cfg(test)]
        if self.hashes_collide {
            return 0;
        }
        self.hasher.hash_one(user)
    }

    /// The current generation of holds, to be taken before the routes are asked: see [`SessionHandle::place`].
    pub fn generation(&self) -> Generation {
        self.lock().holds.current()
    }

    /// Registers a login that is about to be routed. From here on it can be cancelled.
    ///
    /// # Errors
    /// New logins of the user wait.
    pub fn take(self: &Arc<Self>, guest: SessionInfo) -> Result<SessionHandle, RegisterError> {
        let mut inside = self.lock();
        if inside.held.contains_key(&guest.user) {
            return Err(RegisterError::Held(guest.user));
        }
        let hash = self.hash(&guest.user);
        let call = Arc::new(CancelSignal::default());
        if inside.closed {
            call.tell(CancelReason::Stopped);
        }
        let since = u32::try_from(self.begun.elapsed().as_secs()).unwrap_or(u32::MAX);
        let (stage, kept) = (SessionState::LoggingIn, call.clone());
        let taken = Taken { guest, server: None, call: kept, since, stage, next: NONE, previous: NONE };
        // More than 4 billion sessions would not fit a machine.
        let key = u32::try_from(inside.taken.insert(taken)).unwrap_or(NONE);
        inside.link(key, hash);
        Ok(SessionHandle { sessions: self.clone(), call, key })
    }

    /// New logins of `user` get no seat until the hold drops, and those under way that were routed before are routed again.
    pub fn hold(self: &Arc<Self>, user: Arc<str>) -> LoginHold {
        let mut inside = self.lock();
        *inside.held.entry(user.clone()).or_insert(0) += 1;
        inside.holds.invalidate(&user);
        drop(inside);
        LoginHold { sessions: self.clone(), user }
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

    /// Cancels the sessions and logins of `user`. Returns how many had not been cancelled before.
    pub fn end_user(&self, user: &str, why: CancelReason) -> usize {
        let calls: Vec<Arc<CancelSignal>> = {
            let inside = self.lock();
            let first = inside.first(self.hash(user));
            inside.of(first, user).map(|taken| taken.call.clone()).collect()
        };
        tell_all(&calls, why)
    }

    /// Sessions and logins under way of `user`.
    pub fn of_user(&self, user: &str) -> Vec<RegisteredSession> {
        let inside = self.lock();
        let first = inside.first(self.hash(user));
        inside.of(first, user).map(|taken| self.seen(taken)).collect()
    }

    /// Tells up to `most` sessions, of those that `which` picks and that have not been told before, to end. Says how many were
    /// told, and how many are left to be.
    pub fn end_some(&self, most: usize, why: CancelReason, which: impl Fn(&Server) -> bool) -> (usize, usize) {
        let mut calls = Vec::new();
        let mut left = 0;
        for (_, taken) in &self.lock().taken {
            if taken.server.as_ref().is_some_and(|server| which(server)) && taken.call.why().is_none() {
                if calls.len() < most {
                    calls.push(taken.call.clone());
                } else {
                    left += 1;
                }
            }
        }
        (tell_all(&calls, why), left)
    }

    /// Cancels the logins under way on the servers that `which` picks, and leaves accepted ones.
    pub fn end_logins(&self, why: CancelReason, which: impl Fn(&Server) -> bool) {
        let on_one = |taken: &Taken| taken.server.as_ref().is_some_and(|server| which(server));
        let calls: Vec<Arc<CancelSignal>> = {
            let inside = self.lock();
            let logins =
                inside.taken.iter().filter(|(_, taken)| taken.stage == SessionState::LoggingIn && on_one(taken));
            logins.map(|(_, taken)| taken.call.clone()).collect()
        };
        tell_all(&calls, why);
    }

    /// Sessions on the servers that `which` picks, told to end or not.
    pub fn count(&self, which: impl Fn(&Server) -> bool) -> usize {
        let on_one = |taken: &Taken| taken.server.as_ref().is_some_and(|server| which(server));
        self.lock().taken.iter().filter(|(_, taken)| on_one(taken)).count()
    }

    /// Cancels all sessions and logins, and from now on every new login at once.
    pub fn close(&self) {
        let calls: Vec<Arc<CancelSignal>> = {
            let mut inside = self.lock();
            inside.closed = true;
            inside.taken.iter().map(|(_, taken)| taken.call.clone()).collect()
        };
        tell_all(&calls, CancelReason::Stopped);
    }

    /// Up to `most` sessions.
    pub fn list(&self, most: usize) -> Vec<RegisteredSession> {
        self.lock().taken.iter().take(most).map(|(_, taken)| self.seen(taken)).collect()
    }

    fn seen(&self, taken: &Taken) -> RegisteredSession {
        let age = self.begun.elapsed().saturating_sub(Duration::from_secs(taken.since.into()));
        RegisteredSession { guest: taken.guest.clone(), server: taken.server.clone(), age, stage: taken.stage }
    }

    fn lock(&self) -> MutexGuard<'_, Inside> {
        // Nothing in here panics halfway through a change.
        self.inside.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Cancels sessions. Returns how many had not been cancelled before.
fn tell_all(calls: &[Arc<CancelSignal>], why: CancelReason) -> usize {
    calls.iter().filter(|call| call.tell(why)).count()
}

impl Inside {
    /// The first seat of a hash.
    fn first(&self, hash: u64) -> u32 {
        self.users.get(&hash).copied().unwrap_or(NONE)
    }

    /// The seats of `user`, from the first of its hash on. Names are compared, because two may share a hash.
    fn of<'a>(&'a self, first: u32, user: impl AsRef<str> + 'a) -> impl Iterator<Item = &'a Taken> {
        let mut key = first;
        std::iter::from_fn(move || {
            let taken = self.taken.get(key as usize)?;
            key = taken.next;
            Some(taken)
        })
        .filter(move |taken| &*taken.guest.user == user.as_ref())
    }

    /// Puts an entry that is in no chain in front of its hash's chain.
    fn link(&mut self, key: u32, hash: u64) {
        let first = self.first(hash);
        if let Some(taken) = self.taken.get_mut(key as usize) {
            (taken.next, taken.previous) = (first, NONE);
        }
        if let Some(next) = self.taken.get_mut(first as usize) {
            next.previous = key;
        }
        self.users.insert(hash, key);
    }

    /// Takes an entry out of its hash's chain.
    fn unlink(&mut self, key: u32, hash: u64) {
        let Some(taken) = self.taken.get(key as usize) else { return };
        let (next, previous) = (taken.next, taken.previous);
        if let Some(before) = self.taken.get_mut(previous as usize) {
            before.next = next;
        } else if next == NONE {
            self.users.remove(&hash);
        } else {
            self.users.insert(hash, next);
        }
        if let Some(after) = self.taken.get_mut(next as usize) {
            after.previous = previous;
        }
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
mod tests;
