//! The session registry: which user is logged in, or is logging in, on which server, and how a session is cancelled.
//!
//! A login registers before it is routed ([`SessionRegistry::register`]), names its server when one is chosen
//! ([`SessionHandle::set_server`]), and keeps its [`SessionHandle`] until the session ends. The operator can therefore end the
//! sessions and logins of a user at any step.
//!
//! If the backend serves a user by one server at a time, no user is ever established on two servers. When a server has accepted
//! a login ([`SessionHandle::accept_exclusively`]), the user's accepted sessions on other servers of the backend are cancelled,
//! and the login waits until they have ended ([`SessionHandle::has_sessions_elsewhere`]). Before that the login has no effect on
//! other sessions, because nothing has yet shown that the client is the user. Of two logins that different servers accept, the
//! one accepted last stays. Each waits only for those accepted before it and ends when it is cancelled itself, so that no two
//! logins wait for each other.
//!
//! This module does not end a cancelled session: its task or the idle poller sees the [`CancelSignal`] and ends it. The registry
//! covers one process. Several machines would have to agree in [`SessionRegistry::register`],
//! [`SessionHandle::accept_exclusively`] and [`SessionRegistry::hold`].

mod cancel;
mod entries;

use std::collections::HashMap;
use std::hash::{BuildHasher as _, RandomState};
use std::net::IpAddr;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

use self::cancel::cancel_all;
pub use self::cancel::{CancelReason, CancelSignal};
use self::entries::{Entries, Entry, Key};
use crate::backend::Server;
use crate::generations::{Generation, Generations};

/// What a login registers with.
#[derive(Debug, Clone)]
pub struct SessionInfo {
    /// The routing name of the user; once a server is chosen, the name of the mailbox.
    pub user: Arc<str>,
    /// The client's address.
    pub client: IpAddr,
    /// The session id in log records.
    pub session: [u8; 16],
}

/// What the operator sees of a session.
#[derive(Debug, Clone)]
pub struct RegisteredSession {
    /// What the login registered with.
    pub info: SessionInfo,
    /// The server; absent until one is chosen.
    pub server: Option<Arc<Server>>,
    /// Time since the registration.
    pub age: Duration,
    /// Progress of the session.
    pub state: SessionState,
}

/// Progress of a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SessionState {
    /// No server has accepted the login yet.
    LoggingIn,
    /// A server has accepted the login, and the client has not been answered yet.
    Accepted,
    /// The client has been answered, and bytes are relayed.
    Established,
    /// The server has closed its connection, and the client's is still open.
    ServerClosed,
}

/// Why a login may not continue as it was routed.
#[derive(Debug, PartialEq, Eq)]
pub enum RegisterError {
    /// New logins under this name wait: see [`SessionRegistry::hold`].
    OnHold(Arc<str>),
    /// The user was on hold, or the configuration was replaced, since the routes were queried: their result may be out of date.
    Outdated,
}

/// All logins under way and established sessions of the process.
#[derive(Debug)]
pub struct SessionRegistry {
    inner: Mutex<Inner>,
    /// Random per process, so that no client can choose names that collide.
    hasher: RandomState,
    #[cfg(test)]
    hashes_collide: bool,
    /// Notified when a session ends, loses its server, or a hold ends.
    changes: Notify,
    started: Instant,
}

#[derive(Debug, Default)]
struct Inner {
    entries: Entries,
    /// Number of holds of each user.
    holds: HashMap<Arc<str>, usize>,
    /// Begin and end of each hold.
    hold_changes: Generations,
    closed: bool,
}

impl Default for SessionRegistry {
    fn default() -> Self {
        Self {
            inner: Mutex::default(),
            hasher: RandomState::new(),
            #[cfg(test)]
            hashes_collide: false,
            changes: Notify::new(),
            started: Instant::now(),
        }
    }
}

impl SessionRegistry {
    /// The current generation of holds, to be read before the routes are queried: see [`SessionHandle::set_server`].
    pub fn generation(&self) -> Generation {
        self.lock().hold_changes.current()
    }

    /// Registers a login that is about to be routed. From here on it can be cancelled.
    ///
    /// # Errors
    /// The user is on hold.
    pub fn register(self: &Arc<Self>, info: SessionInfo) -> Result<SessionHandle, RegisterError> {
        let mut inner = self.lock();
        if inner.holds.contains_key(&info.user) {
            return Err(RegisterError::OnHold(info.user));
        }
        let cancel_signal = Arc::new(CancelSignal::default());
        if inner.closed {
            cancel_signal.cancel(CancelReason::Stopped);
        }
        let hash = self.hash(&info.user);
        let registered_at = u32::try_from(self.started.elapsed().as_secs()).unwrap_or(u32::MAX);
        let key = inner.entries.insert(Entry::new(info, cancel_signal.clone(), registered_at), hash);
        Ok(SessionHandle { registry: self.clone(), cancel_signal, key })
    }

    /// Keeps new logins of `user` from registering until the returned hold is dropped. Logins under way that were routed before
    /// are routed again.
    pub fn hold(self: &Arc<Self>, user: Arc<str>) -> LoginHold {
        let mut inner = self.lock();
        *inner.holds.entry(user.clone()).or_insert(0) += 1;
        inner.hold_changes.invalidate(&user);
        drop(inner);
        LoginHold { registry: self.clone(), user }
    }

    /// Whether new logins of `user` wait.
    pub fn is_on_hold(&self, user: &str) -> bool {
        self.lock().holds.contains_key(user)
    }

    /// Waits until `condition` is true. It is checked again whenever a session or a hold ends.
    pub async fn wait_until(&self, mut condition: impl FnMut(&Self) -> bool) {
        loop {
            let mut changed = pin!(self.changes.notified());
            // Before the check, so that no change after it is missed.
            changed.as_mut().enable();
            if condition(self) {
                return;
            }
            changed.await;
        }
    }

    /// Cancels the sessions and logins of `user`. Returns how many had not been cancelled before.
    pub fn cancel_user(&self, user: &str, reason: CancelReason) -> usize {
        let signals = signals_of(self.lock().entries.of_user(self.hash(user), user));
        cancel_all(&signals, reason)
    }

    /// Sessions and logins under way of `user`.
    pub fn of_user(&self, user: &str) -> Vec<RegisteredSession> {
        self.lock().entries.of_user(self.hash(user), user).map(|entry| self.registered(entry)).collect()
    }

    /// Cancels up to `limit` sessions on the servers that `filter` selects. Returns how many were cancelled.
    pub fn cancel_up_to(&self, limit: usize, reason: CancelReason, filter: impl Fn(&Server) -> bool) -> usize {
        let signals = signals_of(self.lock().entries.iter().filter(|entry| is_uncancelled(entry, &filter)).take(limit));
        cancel_all(&signals, reason)
    }

    /// Cancels the logins under way on the servers that `filter` selects, but no accepted ones.
    pub fn cancel_logins(&self, reason: CancelReason, filter: impl Fn(&Server) -> bool) {
        let is_login = |entry: &&Entry| entry.state == SessionState::LoggingIn && entry.is_on(&filter);
        let signals = signals_of(self.lock().entries.iter().filter(is_login));
        cancel_all(&signals, reason);
    }

    /// Number of sessions on the servers that `filter` selects, cancelled or not.
    pub fn count(&self, filter: impl Fn(&Server) -> bool) -> usize {
        self.lock().entries.iter().filter(|entry| entry.is_on(&filter)).count()
    }

    /// Number of sessions on the servers that `filter` selects and that have not been cancelled.
    pub fn count_uncancelled(&self, filter: impl Fn(&Server) -> bool) -> usize {
        self.lock().entries.iter().filter(|entry| is_uncancelled(entry, &filter)).count()
    }

    /// Cancels all sessions and logins, and from now on every new login at once.
    pub fn close(&self) {
        let signals = {
            let mut inner = self.lock();
            inner.closed = true;
            signals_of(inner.entries.iter())
        };
        cancel_all(&signals, CancelReason::Stopped);
    }

    /// Up to `limit` sessions.
    pub fn list(&self, limit: usize) -> Vec<RegisteredSession> {
        self.lock().entries.iter().take(limit).map(|entry| self.registered(entry)).collect()
    }

    fn registered(&self, entry: &Entry) -> RegisteredSession {
        let age = self.started.elapsed().saturating_sub(Duration::from_secs(entry.registered_at.into()));
        RegisteredSession { info: entry.info.clone(), server: entry.server.clone(), age, state: entry.state }
    }

    fn hash(&self, user: &str) -> u64 {
        #[cfg(test)]
        if self.hashes_collide {
            return 0;
        }
        self.hasher.hash_one(user)
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // No code that holds the lock panics halfway through a change.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The entry of a login or session, removed when this is dropped.
#[derive(Debug)]
pub struct SessionHandle {
    registry: Arc<SessionRegistry>,
    cancel_signal: Arc<CancelSignal>,
    key: Key,
}

impl SessionHandle {
    /// The signal that cancels this session.
    pub fn cancel_signal(&self) -> &Arc<CancelSignal> {
        &self.cancel_signal
    }

    /// Names the server that the login is about to use, and the mailbox there. `since` is [`SessionRegistry::generation`] from
    /// before the routes were queried. No other session is affected.
    ///
    /// # Errors
    /// The login must be routed again: see [`RegisterError`].
    pub fn set_server(&self, mailbox: &Arc<str>, server: &Arc<Server>, since: Generation) -> Result<(), RegisterError> {
        let mut inner = self.registry.lock();
        if inner.holds.contains_key(mailbox) {
            return Err(RegisterError::OnHold(mailbox.clone()));
        }
        if !inner.hold_changes.is_current(mailbox, since) {
            return Err(RegisterError::Outdated);
        }
        let Some(entry) = inner.entries.get_mut(self.key) else { return Err(RegisterError::Outdated) };
        entry.server = Some(server.clone());
        if entry.info.user != *mailbox {
            let before = std::mem::replace(&mut entry.info.user, mailbox.clone());
            inner.entries.relink(self.key, self.registry.hash(&before), self.registry.hash(mailbox));
        }
        Ok(())
    }

    /// The server has accepted the login.
    pub fn accept(&self) {
        self.set_state(SessionState::Accepted);
    }

    /// The server has accepted the login, and the user must have no accepted session on another server of the backend: those are
    /// cancelled, and the caller waits while [`SessionHandle::has_sessions_elsewhere`].
    pub fn accept_exclusively(&self) {
        let signals = {
            let mut inner = self.registry.lock();
            let Some(entry) = inner.entries.get_mut(self.key) else { return };
            entry.state = SessionState::Accepted;
            signals_of(self.sessions_elsewhere(&inner))
        };
        cancel_all(&signals, CancelReason::Replaced);
    }

    /// Whether the user has an accepted session on another server of the backend.
    pub fn has_sessions_elsewhere(&self) -> bool {
        self.sessions_elsewhere(&self.registry.lock()).next().is_some()
    }

    fn sessions_elsewhere<'a>(&self, inner: &'a Inner) -> impl Iterator<Item = &'a Entry> {
        let own = inner.entries.get(self.key);
        let own = own.and_then(|own| Some((own.info.user.clone(), own.server.clone()?)));
        let others = own.map(|(user, server)| {
            let hash = self.registry.hash(&user);
            inner.entries.of_user(hash, user).filter(move |entry| entry.is_served_instead_of(&server))
        });
        others.into_iter().flatten()
    }

    /// The client has been answered, and the relay begins.
    pub fn establish(&self) {
        self.set_state(SessionState::Established);
    }

    /// The server has closed its connection: no login has to wait for this session from now on.
    pub fn server_closed(&self) {
        self.set_state(SessionState::ServerClosed);
        self.registry.changes.notify_waiters();
    }

    fn set_state(&self, state: SessionState) {
        if let Some(entry) = self.registry.lock().entries.get_mut(self.key) {
            entry.state = state;
        }
    }
}

impl Drop for SessionHandle {
    fn drop(&mut self) {
        let mut inner = self.registry.lock();
        let Some(entry) = inner.entries.get(self.key) else { return };
        let hash = self.registry.hash(&entry.info.user);
        inner.entries.remove(self.key, hash);
        drop(inner);
        self.registry.changes.notify_waiters();
    }
}

/// A hold of a user's new logins, which ends when this is dropped.
#[derive(Debug)]
pub struct LoginHold {
    registry: Arc<SessionRegistry>,
    user: Arc<str>,
}

impl Drop for LoginHold {
    fn drop(&mut self) {
        let mut inner = self.registry.lock();
        if let Some(count) = inner.holds.get_mut(&self.user) {
            *count -= 1;
            if *count == 0 {
                inner.holds.remove(&self.user);
            }
        }
        // Routes that were queried during the hold may have answered before the move.
        inner.hold_changes.invalidate(&self.user);
        drop(inner);
        self.registry.changes.notify_waiters();
    }
}

fn is_uncancelled(entry: &Entry, filter: impl Fn(&Server) -> bool) -> bool {
    entry.is_on(filter) && entry.cancel_signal.reason().is_none()
}

/// Copies of the signals, because a cancelled session may lock the registry.
fn signals_of<'a>(entries: impl Iterator<Item = &'a Entry>) -> Vec<Arc<CancelSignal>> {
    entries.map(|entry| entry.cancel_signal.clone()).collect()
}

#[cfg(test)]
mod tests;
