//! Who may come in and try: decided by addresses, names and the time, without a socket.
//!
//! | question | asked | answered |
//! |---|---|---|
//! | may this address connect? | [`Guard::admit`] | by `access`, rates, and how many sessions it and its network have |
//! | who goes when too many have not logged in? | [`Guard::lobby`], [`PreloginTicket::shed`] | the oldest connection without complete credentials |
//! | may a buffer grow before the login? | [`Charge::resize`] | by a budget for all; the connection that has sent most is shed |
//! | may it try to log in? | [`Guard::may_try`] | by the rates of its address and of the users named |
//! | how late is a failure answered? | [`Guard::failed`] | later with each of the same user from the same address |
//! | may this user have one more session? | [`ConnectionCount::take_for`] | by how many there are, in all and from this address |
//!
//! The guard lives as long as the process; a new configuration replaces its rules ([`Guard::reconfigure`]) and not what it
//! remembers. Its memory does not depend on who comes: rates are kept in tables of fixed size (`table`), sessions are
//! counted once they hold a permit of `limits.sessions`. Addresses and names are kept as 64 bits of a keyed hash: nobody
//! outside can aim at somebody's place, and nothing that could be read lies around. It logs nothing, and counts nothing that
//! happens: who asks does. Called by `listener` and `session`; built by `server`.

mod access;
pub(crate) mod connection_limit;
mod counts;
mod failures;
mod places;
mod prelogin_queue;
mod rate;
pub(crate) mod refusal_latency;
mod refusal_wording;
mod table;

use std::hash::{BuildHasher as _, Hash, RandomState};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant};

use tokio::sync::Semaphore;

use self::access::{AccessDecision, AccessList, Networks};
use self::counts::{Counts, Slot};
use self::failures::Failures;
use self::prelogin_queue::PreloginQueue;
pub(crate) use self::prelogin_queue::{Charge, OutOfMemory, PreloginTicket, Shed};
use self::rate::Bucket;
use self::table::{Table, Value};
use crate::config;

/// A user who has logged in from an address is known there for so long.
const KNOWN: Duration = Duration::from_secs(24 * 3600);

/// See the module.
#[derive(Debug)]
pub struct Guard {
    /// Of this process alone.
    hasher: RandomState,
    began: Instant,
    rules: RwLock<Arc<Rules>>,
    lobby: Arc<PreloginQueue>,
    sessions: Mutex<Counts>,
    connections: Mutex<Table<Bucket>>,
    address_logins: Mutex<Table<Bucket>>,
    user_logins: Mutex<Table<Bucket>>,
    failures: Mutex<Table<Failures>>,
    known: Mutex<Table<Until>>,
}

/// The configuration, to be looked up.
#[derive(Debug)]
struct Rules {
    config: config::AdmissionConfig,
    door: AccessList,
    networks: Networks<u32>,
    handshakes: Arc<Semaphore>,
}

impl Rules {
    fn new(config: &config::AdmissionConfig, before: Option<&Self>) -> Self {
        let same = before.filter(|before| before.config.handshakes == config.handshakes);
        Self {
            door: AccessList::new(&config.access),
            networks: Networks::new(config.networks.iter().copied()),
            handshakes: same
                .map_or_else(|| Arc::new(Semaphore::new(config.handshakes)), |same| same.handshakes.clone()),
            config: config.clone(),
        }
    }
}

/// Why a connection is not let in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ConnectionRefused {
    /// `access`.
    Denied,
    /// `limits.connection_rate`.
    Rate,
    /// `limits.sessions_per_address`.
    Address,
    /// `limits.networks`.
    Network,
    /// `limits.before_login`: all places are taken by logins under way.
    BeforeLogin,
}

/// Why a user is not let in for now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Limited {
    /// `limits.login_rate_per_address`.
    AddressRate,
    /// `limits.login_rate_per_user`.
    UserRate,
    /// `limits.sessions_per_user`.
    User,
    /// `limits.sessions_per_user_and_address`.
    UserAndAddress,
}

/// What a session counts for, until dropped.
#[derive(Debug)]
pub struct ConnectionCount {
    guard: Arc<Guard>,
    /// Address, network, user, user and address.
    slots: [Slot; 4],
}

/// How much is remembered.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Sizes {
    /// Connections before their login.
    pub before_login: usize,
    /// TLS handshakes under way.
    pub handshakes: usize,
    /// Addresses, networks, users and pairs with sessions that are counted.
    pub sessions: usize,
    /// Addresses whose connections are timed.
    pub connections: usize,
    /// Addresses whose logins are timed.
    pub address_logins: usize,
    /// Users whose logins are timed.
    pub user_logins: usize,
    /// Users and addresses of failed logins.
    pub failures: usize,
    /// Users known at an address.
    pub known: usize,
}

impl Sizes {
    /// Each with its label in metrics.
    pub fn labelled(&self) -> [(&'static str, usize); 8] {
        [
            ("before_login", self.before_login),
            ("handshakes", self.handshakes),
            ("sessions", self.sessions),
            ("connection_rate", self.connections),
            ("login_rate_per_address", self.address_logins),
            ("login_rate_per_user", self.user_logins),
            ("failed_logins", self.failures),
            ("known_users", self.known),
        ]
    }
}

/// What 64 bits stand for; each kind has numbers of its own.
#[derive(Hash)]
enum Key<'a> {
    Address(Block),
    Network(Block),
    User(&'a str),
    Pair(Block, &'a str),
}

/// What one client has of the address space: an IPv4 address, or a /64 of IPv6.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Block {
    V4(u32),
    V6(u64),
    /// A network of the configuration, with the length of its prefix.
    Listed(bool, u8, u128),
}

impl Block {
    pub(crate) fn of(address: IpAddr) -> Self {
        match address.to_canonical() {
            IpAddr::V4(v4) => Self::V4(v4.to_bits()),
            IpAddr::V6(v6) => Self::V6((v6.to_bits() >> 64) as u64),
        }
    }

    fn listed(address: IpAddr, length: u8) -> Self {
        let (is_v4, bits, width) = match address.to_canonical() {
            IpAddr::V4(v4) => (true, u128::from(v4.to_bits()), 32),
            IpAddr::V6(v6) => (false, v6.to_bits(), 128),
        };
        Self::Listed(is_v4, length, bits.checked_shr(width - u32::from(length)).unwrap_or(0))
    }
}

/// Microseconds on the guard's clock.
#[derive(Debug, Clone, Copy, Default)]
struct Until(u64);

impl Value for Until {
    fn worth(self, now: u64) -> u64 {
        self.0.saturating_sub(now)
    }
}

impl Guard {
    /// Remembers nothing yet. Times handed in later are not before `began`.
    pub fn new(config: &config::AdmissionConfig, began: Instant) -> Self {
        Self {
            hasher: RandomState::new(),
            began,
            rules: RwLock::new(Arc::new(Rules::new(config, None))),
            lobby: Arc::new(PreloginQueue::new(config.before_login, config.before_login_memory)),
            sessions: Mutex::default(),
            connections: Mutex::new(Table::new(config.tracked)),
            address_logins: Mutex::new(Table::new(config.tracked)),
            user_logins: Mutex::new(Table::new(config.tracked)),
            failures: Mutex::new(Table::new(config.tracked)),
            known: Mutex::new(Table::new(config.tracked)),
        }
    }

    /// New rules for all that come from now on. Sessions inside stay, and count down as they counted up; a session that began
    /// while a limit was off is not counted for it. Where `limits.tracked` is another, rates and failures begin anew.
    pub fn reconfigure(&self, config: &config::AdmissionConfig) {
        let before = self.rules();
        if before.config.tracked != config.tracked {
            *lock(&self.connections) = Table::new(config.tracked);
            *lock(&self.address_logins) = Table::new(config.tracked);
            *lock(&self.user_logins) = Table::new(config.tracked);
            *lock(&self.failures) = Table::new(config.tracked);
            *lock(&self.known) = Table::new(config.tracked);
        }
        self.lobby.set_limits(config.before_login, config.before_login_memory);
        let rules = Arc::new(Rules::new(config, Some(&before)));
        *self.rules.write().unwrap_or_else(PoisonError::into_inner) = rules;
    }

    /// Whether `client` may connect. Whoever asks holds a permit of `limits.sessions` already.
    ///
    /// # Errors
    /// Why not; the connection is to be closed.
    pub fn admit(self: &Arc<Self>, now: Instant, client: IpAddr) -> Result<ConnectionCount, ConnectionRefused> {
        let rules = self.rules();
        let config = &rules.config;
        let mut pass = self.pass();
        match rules.door.standing(client) {
            AccessDecision::Denied => return Err(ConnectionRefused::Denied),
            AccessDecision::Exempt => return Ok(pass),
            AccessDecision::Limited => {}
        }
        let address = self.key(&Key::Address(Block::of(client)));
        if !self.take(&self.connections, config.connection_rate, address, now) {
            return Err(ConnectionRefused::Rate);
        }
        if let Some(limit) = config.sessions_per_address {
            pass.slots[0] = lock(&self.sessions).enter(address, limit).ok_or(ConnectionRefused::Address)?;
        }
        if let Some((limit, length)) = rules.networks.find(client) {
            let network = self.key(&Key::Network(Block::listed(client, length)));
            // Taken out first: a pass that is dropped locks the counts too.
            let slot = lock(&self.sessions).enter(network, limit);
            pass.slots[1] = slot.ok_or(ConnectionRefused::Network)?;
        }
        Ok(pass)
    }

    /// A pass that counts for no address: of a connection that has yet to say whose it is.
    pub fn pass(self: &Arc<Self>) -> ConnectionCount {
        ConnectionCount { guard: self.clone(), slots: [Slot::NONE; 4] }
    }

    /// A place among the connections that have not logged in. If all are taken, another connection is shed, and the new one waits
    /// until that one is gone ([`PreloginTicket::admitted`]).
    ///
    /// # Errors
    /// [`ConnectionRefused::BeforeLogin`]: no connection can be shed.
    pub fn lobby(&self, now: Instant) -> Result<PreloginTicket, ConnectionRefused> {
        self.lobby.enter(now).ok_or(ConnectionRefused::BeforeLogin)
    }

    /// Bytes of `limits.before_login_memory` in use.
    pub fn memory_before_login(&self) -> usize {
        self.lobby.memory()
    }

    /// Whether `client` may try to log in. `users` are those the attempt counts for, by their routing names: first the one whose password
    /// is tried, then the one whose mailbox is asked for, if that is another; none if the credentials name no user. So guesses at a
    /// master user's password share one limit, whichever mailboxes they name.
    ///
    /// A user known at an address has a bucket there, so that neither neighbours nor those who guess the password from elsewhere lock
    /// the user out.
    ///
    /// # Errors
    /// Which rate is exceeded.
    pub fn may_try(&self, now: Instant, client: IpAddr, users: &[impl AsRef<str>]) -> Result<(), Limited> {
        let rules = self.rules();
        let config = &rules.config;
        let (per_address, per_user) = (config.login_rate_per_address, config.login_rate_per_user);
        if per_address.is_none() && per_user.is_none() || rules.door.standing(client) == AccessDecision::Exempt {
            return Ok(());
        }
        let block = Block::of(client);
        let pair = |user: &str| self.key(&Key::Pair(block, user));
        let clock = self.clock(now);
        let known = users.first().map(|user| pair(user.as_ref()));
        let known = known.filter(|pair| lock(&self.known).get(*pair).is_some_and(|until| until.worth(clock) > 0));
        let address = known.unwrap_or_else(|| self.key(&Key::Address(block)));
        if !self.take(&self.address_logins, per_address, address, now) {
            return Err(Limited::AddressRate);
        }
        for user in users {
            let user = user.as_ref();
            let bucket = if known.is_some() { pair(user) } else { self.key(&Key::User(user)) };
            if !self.take(&self.user_logins, per_user, bucket, now) {
                return Err(Limited::UserRate);
            }
        }
        Ok(())
    }

    /// `client` has failed to log in; `users` as for [`Guard::may_try`]. Returns how long after the command the client is answered:
    /// the longer delay of two users.
    pub fn failed(&self, now: Instant, client: IpAddr, users: &[impl AsRef<str>]) -> Duration {
        let rules = self.rules();
        let Some(first) = rules.config.failed_login_delay else { return Duration::ZERO };
        if rules.door.standing(client) == AccessDecision::Exempt {
            return Duration::ZERO;
        }
        let (block, clock) = (Block::of(client), self.clock(now));
        let mut keys: Vec<u64> = users.iter().map(|user| self.key(&Key::Pair(block, user.as_ref()))).collect();
        if keys.is_empty() {
            keys.push(self.key(&Key::Address(block)));
        }
        let mut failures = lock(&self.failures);
        let numbers = keys.iter().map(|key| failures.update(*key, clock, |failures| failures.another(clock)));
        let number = numbers.max().unwrap_or_default();
        failures::delay(number, first, rules.config.failed_login_delay_max, self.hasher.hash_one((&keys, clock)))
    }

    /// `client` has logged in; `users` as for [`Guard::may_try`]. Their failures from there are forgotten, and the user whose password
    /// was right is known there.
    pub fn succeeded(&self, now: Instant, client: IpAddr, users: &[impl AsRef<str>]) {
        let rules = self.rules();
        let config = &rules.config;
        let block = Block::of(client);
        let pair = |user: &str| self.key(&Key::Pair(block, user));
        if config.failed_login_delay.is_some() {
            let mut failures = lock(&self.failures);
            for user in users {
                failures.remove(pair(user.as_ref()));
            }
        }
        if config.login_rate_per_address.is_some() || config.login_rate_per_user.is_some() {
            let until = self.clock(now + KNOWN);
            if let Some(user) = users.first() {
                lock(&self.known).update(pair(user.as_ref()), self.clock(now), |_| (Until(until), ()));
            }
        }
    }

    /// A permit of it is a turn for a handshake.
    pub fn handshakes(&self) -> Arc<Semaphore> {
        self.rules().handshakes.clone()
    }

    /// How much is remembered just now.
    pub fn sizes(&self) -> Sizes {
        let rules = self.rules();
        Sizes {
            before_login: self.lobby.len(),
            handshakes: rules.config.handshakes.saturating_sub(rules.handshakes.available_permits()),
            sessions: lock(&self.sessions).len(),
            connections: lock(&self.connections).len(),
            address_logins: lock(&self.address_logins).len(),
            user_logins: lock(&self.user_logins).len(),
            failures: lock(&self.failures).len(),
            known: lock(&self.known).len(),
        }
    }

    fn take(&self, table: &Mutex<Table<Bucket>>, rate: Option<config::Rate>, key: u64, now: Instant) -> bool {
        let clock = self.clock(now);
        rate.is_none_or(|rate| lock(table).update(key, clock, |bucket| bucket.take(rate, clock)))
    }

    fn rules(&self) -> Arc<Rules> {
        self.rules.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn key(&self, key: &Key<'_>) -> u64 {
        self.hasher.hash_one(key)
    }

    fn clock(&self, now: Instant) -> u64 {
        u64::try_from(now.saturating_duration_since(self.began).as_micros()).unwrap_or(u64::MAX / 4)
    }
}

impl ConnectionCount {
    /// The session belongs to `user` from now on, by its routing name.
    ///
    /// # Errors
    /// Which limit is reached; the session still counts for its address.
    pub fn take_for(&mut self, client: IpAddr, user: &str) -> Result<(), Limited> {
        let rules = self.guard.rules();
        let (per_user, per_pair) = (rules.config.sessions_per_user, rules.config.sessions_per_user_and_address);
        if per_user.is_none() && per_pair.is_none() || rules.door.standing(client) == AccessDecision::Exempt {
            return Ok(());
        }
        let mut sessions = lock(&self.guard.sessions);
        if let Some(limit) = per_user {
            let key = self.guard.key(&Key::User(user));
            self.slots[2] = sessions.enter(key, limit).ok_or(Limited::User)?;
        }
        if let Some(limit) = per_pair {
            let key = self.guard.key(&Key::Pair(Block::of(client), user));
            let Some(slot) = sessions.enter(key, limit) else {
                sessions.leave(std::mem::replace(&mut self.slots[2], Slot::NONE));
                return Err(Limited::UserAndAddress);
            };
            self.slots[3] = slot;
        }
        Ok(())
    }

    /// The session has ended, although its connection may stay: it counts for no limit any more.
    pub fn release(&mut self) {
        let slots = std::mem::replace(&mut self.slots, [Slot::NONE; 4]);
        if slots.iter().any(|slot| *slot != Slot::NONE) {
            let mut sessions = lock(&self.guard.sessions);
            for slot in slots {
                sessions.leave(slot);
            }
        }
    }
}

impl Drop for ConnectionCount {
    fn drop(&mut self) {
        self.release();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing in this room panics halfway through a change.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
