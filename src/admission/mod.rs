//! Admission control: decides by address, user name and time who may connect and try to log in, without touching a socket.
//!
//! | question | method | decided by |
//! |---|---|---|
//! | may this address connect? | [`AdmissionControl::admit`] | `access`, rates, and the sessions of the address and its network |
//! | which connection is shed when too many have not logged in? | [`AdmissionControl::enter_prelogin_queue`] | `prelogin_policy`: the oldest without complete credentials |
//! | may a buffer grow before the login? | [`MemoryCharge::resize`] | one budget for all; the connection that has sent most is shed |
//! | may this client try to log in? | [`AdmissionControl::check_login_rate`] | the rates of its address and of the users named |
//! | how long is a refusal delayed? | [`AdmissionControl::record_failed_login`] | the failures of the user from this address |
//! | may this user have one more session? | [`ConnectionCount::count_user`] | the sessions of the user, in all and from this address |
//!
//! There is one [`AdmissionControl`] for the life of the process: a reload replaces its rules ([`AdmissionControl::reconfigure`]) and
//! keeps its state. Its memory is bounded whatever clients do: rates are stored in tables of fixed size (`table`), and only connections
//! with a permit of `limits.sessions` are counted. Addresses and names are stored as 64 bits of a keyed hash, so that clients can
//! neither aim at another client's table entry nor leave readable data in memory. The module writes no logs and counts no events; its
//! callers do.

mod access;
pub(crate) mod connection_limit;
mod counts;
mod failures;
mod prelogin_policy;
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
use self::counts::{CountSlot, Counts};
use self::failures::Failures;
pub(crate) use self::prelogin_policy::MemoryBudgetExceeded;
use self::prelogin_queue::PreloginQueue;
pub(crate) use self::prelogin_queue::{MemoryCharge, PreloginTicket, ShedReason};
use self::rate::Bucket;
use self::table::{Table, TableValue};
use crate::config;

/// A user is known at an address for this long after a login from there.
const KNOWN_FOR: Duration = Duration::from_secs(24 * 3600);

/// Rules and state of admission control.
#[derive(Debug)]
pub struct AdmissionControl {
    /// Keyed at random for this process.
    hasher: RandomState,
    began: Instant,
    rules: RwLock<Arc<Rules>>,
    prelogin_queue: Arc<PreloginQueue>,
    sessions: Mutex<Counts>,
    connections: Mutex<Table<Bucket>>,
    address_logins: Mutex<Table<Bucket>>,
    user_logins: Mutex<Table<Bucket>>,
    failures: Mutex<Table<Failures>>,
    known: Mutex<Table<Expiry>>,
}

/// The configuration, prepared for lookups.
#[derive(Debug)]
struct Rules {
    config: config::AdmissionConfig,
    access: AccessList,
    networks: Networks<u32>,
    handshakes: Arc<Semaphore>,
}

impl Rules {
    fn new(config: &config::AdmissionConfig, before: Option<&Self>) -> Self {
        let unchanged = before.filter(|before| before.config.handshakes == config.handshakes);
        Self {
            access: AccessList::new(&config.access),
            networks: Networks::new(config.networks.iter().copied()),
            handshakes: unchanged
                .map_or_else(|| Arc::new(Semaphore::new(config.handshakes)), |before| before.handshakes.clone()),
            config: config.clone(),
        }
    }
}

/// Limit or list because of which a connection is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ConnectionRefused {
    /// `access` denies the address.
    Denied,
    /// The address exceeds `limits.connection_rate`.
    Rate,
    /// The address has reached `limits.sessions_per_address`.
    Address,
    /// The network has reached its limit in `limits.networks`.
    Network,
    /// `limits.before_login` is reached, and no connection can be shed.
    BeforeLogin,
}

/// Limit because of which a login is refused for now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LoginThrottled {
    /// The address exceeds `limits.login_rate_per_address`.
    AddressRate,
    /// The user exceeds `limits.login_rate_per_user`.
    UserRate,
    /// The user has reached `limits.sessions_per_user`.
    User,
    /// The user has reached `limits.sessions_per_user_and_address` at this address.
    UserAndAddress,
}

/// The counts that include one connection; dropping it removes the connection from them.
#[derive(Debug)]
pub struct ConnectionCount {
    admission: Arc<AdmissionControl>,
    address: Option<CountSlot>,
    network: Option<CountSlot>,
    user: Option<CountSlot>,
    user_and_address: Option<CountSlot>,
}

/// Number of entries in each table of [`AdmissionControl`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Sizes {
    /// Connections that have not logged in.
    pub before_login: usize,
    /// TLS handshakes in progress.
    pub handshakes: usize,
    /// Addresses, networks, users and pairs with sessions that are counted.
    pub sessions: usize,
    /// Addresses with a connection rate.
    pub connections: usize,
    /// Addresses with a login rate.
    pub address_logins: usize,
    /// Users with a login rate.
    pub user_logins: usize,
    /// Users and addresses of failed logins.
    pub failures: usize,
    /// Users known at an address.
    pub known: usize,
}

impl Sizes {
    /// The numbers with their metric labels.
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

/// What a 64-bit key is the hash of; the variant is part of the hash.
#[derive(Hash)]
enum Key<'a> {
    Address(AddressBlock),
    Network(AddressBlock),
    User(&'a str),
    UserAtAddress(AddressBlock, &'a str),
}

/// Addresses that are treated as one client: an IPv4 address, or an IPv6 /64.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum AddressBlock {
    V4(u32),
    V6(u64),
    /// An IPv4 network of the configuration: length and bits of its prefix.
    V4Network(u8, u32),
    /// An IPv6 network of the configuration: length and bits of its prefix.
    V6Network(u8, u128),
}

impl AddressBlock {
    pub(crate) fn of(address: IpAddr) -> Self {
        match address.to_canonical() {
            IpAddr::V4(v4) => Self::V4(v4.to_bits()),
            IpAddr::V6(v6) => Self::V6((v6.to_bits() >> 64) as u64),
        }
    }

    /// The network with a prefix of `length` bits that contains `address`.
    fn network(address: IpAddr, length: u8) -> Self {
        match address.to_canonical() {
            IpAddr::V4(v4) => Self::V4Network(length, v4.to_bits().checked_shr(32 - u32::from(length)).unwrap_or(0)),
            IpAddr::V6(v6) => Self::V6Network(length, v6.to_bits().checked_shr(128 - u32::from(length)).unwrap_or(0)),
        }
    }
}

/// Time at which an entry expires, in microseconds since [`AdmissionControl::began`].
#[derive(Debug, Clone, Copy, Default)]
struct Expiry(u64);

impl TableValue for Expiry {
    fn retention_priority(self, now: u64) -> u64 {
        self.0.saturating_sub(now)
    }
}

impl AdmissionControl {
    /// Starts with empty tables. Times passed to other methods must not be earlier than `began`.
    pub fn new(config: &config::AdmissionConfig, began: Instant) -> Self {
        Self {
            hasher: RandomState::new(),
            began,
            rules: RwLock::new(Arc::new(Rules::new(config, None))),
            prelogin_queue: Arc::new(PreloginQueue::new(config.before_login, config.before_login_memory)),
            sessions: Mutex::default(),
            connections: Mutex::new(Table::new(config.tracked)),
            address_logins: Mutex::new(Table::new(config.tracked)),
            user_logins: Mutex::new(Table::new(config.tracked)),
            failures: Mutex::new(Table::new(config.tracked)),
            known: Mutex::new(Table::new(config.tracked)),
        }
    }

    /// Replaces the rules for all connections and logins from now on. Open connections stay, and leave the counts that include them; a
    /// session that began while a limit was off is not counted for it. If `limits.tracked` changes, rates and failures start empty.
    pub fn reconfigure(&self, config: &config::AdmissionConfig) {
        let before = self.rules();
        if before.config.tracked != config.tracked {
            *lock(&self.connections) = Table::new(config.tracked);
            *lock(&self.address_logins) = Table::new(config.tracked);
            *lock(&self.user_logins) = Table::new(config.tracked);
            *lock(&self.failures) = Table::new(config.tracked);
            *lock(&self.known) = Table::new(config.tracked);
        }
        self.prelogin_queue.set_limits(config.before_login, config.before_login_memory);
        let rules = Arc::new(Rules::new(config, Some(&before)));
        *self.rules.write().unwrap_or_else(PoisonError::into_inner) = rules;
    }

    /// Decides whether `client` may connect. The caller already holds a permit of `limits.sessions`.
    ///
    /// # Errors
    /// The limit or list that refuses the connection, which must be closed.
    pub fn admit(self: &Arc<Self>, now: Instant, client: IpAddr) -> Result<ConnectionCount, ConnectionRefused> {
        let rules = self.rules();
        let config = &rules.config;
        let mut count = self.uncounted();
        match rules.access.decide(client) {
            AccessDecision::Denied => return Err(ConnectionRefused::Denied),
            AccessDecision::Exempt => return Ok(count),
            AccessDecision::Limited => {}
        }
        let address = self.key(&Key::Address(AddressBlock::of(client)));
        if !self.take_token(&self.connections, config.connection_rate, address, now) {
            return Err(ConnectionRefused::Rate);
        }
        if let Some(limit) = config.sessions_per_address {
            count.address = Some(lock(&self.sessions).increment(address, limit).ok_or(ConnectionRefused::Address)?);
        }
        if let Some((limit, length)) = rules.networks.find(client) {
            let network = self.key(&Key::Network(AddressBlock::network(client, length)));
            // The lock must be released before `?` drops `count`, which takes it too.
            let slot = lock(&self.sessions).increment(network, limit);
            count.network = Some(slot.ok_or(ConnectionRefused::Network)?);
        }
        Ok(count)
    }

    /// A count that includes the connection nowhere yet, for a connection whose PROXY header has not been read.
    pub fn uncounted(self: &Arc<Self>) -> ConnectionCount {
        ConnectionCount { admission: self.clone(), address: None, network: None, user: None, user_and_address: None }
    }

    /// Adds a connection to those that have not logged in. At the limit another connection is shed, and the new one waits
    /// until that one has closed ([`PreloginTicket::admitted`]).
    ///
    /// # Errors
    /// [`ConnectionRefused::BeforeLogin`]: no connection can be shed.
    pub fn enter_prelogin_queue(&self, now: Instant) -> Result<PreloginTicket, ConnectionRefused> {
        self.prelogin_queue.enter(now).ok_or(ConnectionRefused::BeforeLogin)
    }

    /// Bytes of `limits.before_login_memory` in use.
    pub fn prelogin_memory(&self) -> usize {
        self.prelogin_queue.memory()
    }

    /// Decides whether `client` may try to log in, and counts the attempt. `users` are routing names: first the user whose password is
    /// tried, then the owner of the requested mailbox if that is another user; none if the credentials name no user. Guesses at a
    /// master user's password therefore share one limit, whichever mailboxes they name.
    ///
    /// A user known at an address has a separate bucket there, so that neither other clients at that address nor password guessing from
    /// elsewhere lock the user out.
    ///
    /// # Errors
    /// The rate that is exceeded.
    pub fn check_login_rate(
        &self,
        now: Instant,
        client: IpAddr,
        users: &[impl AsRef<str>],
    ) -> Result<(), LoginThrottled> {
        let rules = self.rules();
        let config = &rules.config;
        let (per_address, per_user) = (config.login_rate_per_address, config.login_rate_per_user);
        if per_address.is_none() && per_user.is_none() || rules.access.decide(client) == AccessDecision::Exempt {
            return Ok(());
        }
        let block = AddressBlock::of(client);
        let user_key = |user: &str| self.key(&Key::UserAtAddress(block, user));
        let clock = self.clock(now);
        let known = users.first().map(|user| user_key(user.as_ref()));
        let known =
            known.filter(|key| lock(&self.known).get(*key).is_some_and(|until| until.retention_priority(clock) > 0));
        let address = known.unwrap_or_else(|| self.key(&Key::Address(block)));
        if !self.take_token(&self.address_logins, per_address, address, now) {
            return Err(LoginThrottled::AddressRate);
        }
        for user in users {
            let user = user.as_ref();
            let bucket = if known.is_some() { user_key(user) } else { self.key(&Key::User(user)) };
            if !self.take_token(&self.user_logins, per_user, bucket, now) {
                return Err(LoginThrottled::UserRate);
            }
        }
        Ok(())
    }

    /// Records a failed login of `client`; `users` as in [`AdmissionControl::check_login_rate`]. Returns how long after the command the
    /// reply is sent: of two users the longer delay.
    pub fn record_failed_login(&self, now: Instant, client: IpAddr, users: &[impl AsRef<str>]) -> Duration {
        let rules = self.rules();
        let Some(first_delay) = rules.config.failed_login_delay else { return Duration::ZERO };
        if rules.access.decide(client) == AccessDecision::Exempt {
            return Duration::ZERO;
        }
        let (block, clock) = (AddressBlock::of(client), self.clock(now));
        let mut keys: Vec<u64> = users.iter().map(|user| self.key(&Key::UserAtAddress(block, user.as_ref()))).collect();
        if keys.is_empty() {
            keys.push(self.key(&Key::Address(block)));
        }
        let mut failures = lock(&self.failures);
        let counts = keys.iter().map(|key| failures.update(*key, clock, |failures| failures.increment(clock)));
        let count = counts.max().unwrap_or_default();
        failures::delay(count, first_delay, rules.config.failed_login_delay_max, self.hasher.hash_one((&keys, clock)))
    }

    /// Records a login of `client`; `users` as in [`AdmissionControl::check_login_rate`]. The failures of these users at this address are
    /// removed, and the user whose password was right is known there.
    pub fn record_login(&self, now: Instant, client: IpAddr, users: &[impl AsRef<str>]) {
        let rules = self.rules();
        let config = &rules.config;
        let block = AddressBlock::of(client);
        let user_key = |user: &str| self.key(&Key::UserAtAddress(block, user));
        if config.failed_login_delay.is_some() {
            let mut failures = lock(&self.failures);
            for user in users {
                failures.remove(user_key(user.as_ref()));
            }
        }
        if config.login_rate_per_address.is_some() || config.login_rate_per_user.is_some() {
            let until = self.clock(now + KNOWN_FOR);
            if let Some(user) = users.first() {
                lock(&self.known).update(user_key(user.as_ref()), self.clock(now), |_| (Expiry(until), ()));
            }
        }
    }

    /// The permits of `limits.handshakes`.
    pub fn handshake_permits(&self) -> Arc<Semaphore> {
        self.rules().handshakes.clone()
    }

    /// Returns the current number of entries of each table.
    pub fn sizes(&self) -> Sizes {
        let rules = self.rules();
        Sizes {
            before_login: self.prelogin_queue.len(),
            handshakes: rules.config.handshakes.saturating_sub(rules.handshakes.available_permits()),
            sessions: lock(&self.sessions).len(),
            connections: lock(&self.connections).len(),
            address_logins: lock(&self.address_logins).len(),
            user_logins: lock(&self.user_logins).len(),
            failures: lock(&self.failures).len(),
            known: lock(&self.known).len(),
        }
    }

    fn take_token(&self, table: &Mutex<Table<Bucket>>, rate: Option<config::Rate>, key: u64, now: Instant) -> bool {
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
    /// Counts the connection as a session of `user`, a routing name.
    ///
    /// # Errors
    /// The limit that is reached. The connection stays in the counts of its address and network.
    pub fn count_user(&mut self, client: IpAddr, user: &str) -> Result<(), LoginThrottled> {
        let rules = self.admission.rules();
        let (per_user, per_user_and_address) =
            (rules.config.sessions_per_user, rules.config.sessions_per_user_and_address);
        if per_user.is_none() && per_user_and_address.is_none() || rules.access.decide(client) == AccessDecision::Exempt
        {
            return Ok(());
        }
        let mut sessions = lock(&self.admission.sessions);
        if let Some(limit) = per_user {
            let key = self.admission.key(&Key::User(user));
            self.user = Some(sessions.increment(key, limit).ok_or(LoginThrottled::User)?);
        }
        if let Some(limit) = per_user_and_address {
            let key = self.admission.key(&Key::UserAtAddress(AddressBlock::of(client), user));
            let slot = sessions.increment(key, limit);
            if slot.is_none() {
                self.user.take().into_iter().for_each(|slot| sessions.decrement(slot));
            }
            self.user_and_address = Some(slot.ok_or(LoginThrottled::UserAndAddress)?);
        }
        Ok(())
    }

    /// Removes the connection from all counts, because its session has ended although the connection may stay open.
    pub fn release(&mut self) {
        let slots = [self.address.take(), self.network.take(), self.user.take(), self.user_and_address.take()];
        if slots.iter().any(Option::is_some) {
            let mut sessions = lock(&self.admission.sessions);
            slots.into_iter().flatten().for_each(|slot| sessions.decrement(slot));
        }
    }
}

impl Drop for ConnectionCount {
    fn drop(&mut self) {
        self.release();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A poisoned lock is safe: no critical section of this module can panic halfway through a change.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
