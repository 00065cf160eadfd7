//! The entries of the registry, and a linked list of entries for each hash of a user name. Two users may share a hash, so that
//! every search compares names.

use std::collections::HashMap;
use std::num::NonZeroU32;
use std::sync::Arc;

use slab::Slab;

use super::cancel::CancelSignal;
use super::{SessionInfo, SessionState};
use crate::backend::Server;

/// Free slots that are never given back.
const SPARE: usize = 256;

/// Position of an entry. The value is one more than the index in the slab, so that `Option<Key>` takes four bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Key(NonZeroU32);

impl Key {
    fn new(index: usize) -> Self {
        // More than 4 billion sessions do not fit a machine.
        Self(u32::try_from(index + 1).ok().and_then(NonZeroU32::new).unwrap_or(NonZeroU32::MAX))
    }

    fn index(self) -> usize {
        self.0.get() as usize - 1
    }
}

/// The entry of one session or login.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) info: SessionInfo,
    /// Absent until a server is chosen.
    pub(super) server: Option<Arc<Server>>,
    pub(super) cancel_signal: Arc<CancelSignal>,
    /// Seconds from the start of the process to the registration.
    pub(super) registered_at: u32,
    pub(super) state: SessionState,
    next: Option<Key>,
    previous: Option<Key>,
}

impl Entry {
    pub(super) fn new(info: SessionInfo, cancel_signal: Arc<CancelSignal>, registered_at: u32) -> Self {
        let (server, state, next, previous) = (None, SessionState::LoggingIn, None, None);
        Self { info, server, cancel_signal, registered_at, state, next, previous }
    }

    /// Whether the login was accepted by another server of the backend of `server`, which has not closed the connection.
    pub(super) fn is_served_instead_of(&self, server: &Server) -> bool {
        let is_served = matches!(self.state, SessionState::Accepted | SessionState::Established);
        let is_other = |other: &Arc<Server>| other.backend == server.backend && other.name != server.name;
        is_served && self.server.as_ref().is_some_and(is_other)
    }

    pub(super) fn is_on(&self, filter: impl Fn(&Server) -> bool) -> bool {
        self.server.as_ref().is_some_and(|server| filter(server))
    }
}

#[derive(Debug, Default)]
pub(super) struct Entries {
    slab: Slab<Entry>,
    /// The first entry of each list, by the hash of the name.
    first: HashMap<u64, Key>,
    /// Entries removed since the memory was last given back.
    removed: usize,
}

impl Entries {
    pub(super) fn get(&self, key: Key) -> Option<&Entry> {
        self.slab.get(key.index())
    }

    pub(super) fn get_mut(&mut self, key: Key) -> Option<&mut Entry> {
        self.slab.get_mut(key.index())
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Entry> {
        self.slab.iter().map(|(_, entry)| entry)
    }

    /// Entries of `user`, whose name has this hash.
    pub(super) fn of_user<'a>(&'a self, hash: u64, user: impl AsRef<str> + 'a) -> impl Iterator<Item = &'a Entry> {
        let mut key = self.first.get(&hash).copied();
        std::iter::from_fn(move || {
            let entry = self.get(key?)?;
            key = entry.next;
            Some(entry)
        })
        .filter(move |entry| &*entry.info.user == user.as_ref())
    }

    pub(super) fn insert(&mut self, entry: Entry, hash: u64) -> Key {
        let key = Key::new(self.slab.insert(entry));
        self.link(key, hash);
        key
    }

    /// Moves an entry whose user was renamed to another list.
    pub(super) fn relink(&mut self, key: Key, from: u64, to: u64) {
        self.unlink(key, from);
        self.link(key, to);
    }

    pub(super) fn remove(&mut self, key: Key, hash: u64) {
        self.unlink(key, hash);
        self.slab.try_remove(key.index());
        self.shrink();
    }

    /// Puts an entry that is in no list at the front of the list of its hash.
    fn link(&mut self, key: Key, hash: u64) {
        let first = self.first.insert(hash, key);
        if let Some(entry) = self.get_mut(key) {
            (entry.next, entry.previous) = (first, None);
        }
        if let Some(next) = first.and_then(|first| self.get_mut(first)) {
            next.previous = Some(key);
        }
    }

    /// Removes an entry from the list of its hash.
    fn unlink(&mut self, key: Key, hash: u64) {
        let Some(entry) = self.get(key) else { return };
        let (next, previous) = (entry.next, entry.previous);
        match (previous.and_then(|previous| self.get_mut(previous)), next) {
            (Some(before), _) => before.next = next,
            (None, Some(next)) => drop(self.first.insert(hash, next)),
            (None, None) => drop(self.first.remove(&hash)),
        }
        if let Some(after) = next.and_then(|next| self.get_mut(next)) {
            after.previous = previous;
        }
    }

    /// Gives memory back after a peak, up to the last slot in use. The time this takes grows with the number of slots, so it
    /// is done when 1/64 of them have been freed, and when the last entry has been removed.
    fn shrink(&mut self) {
        self.removed += 1;
        if !self.slab.is_empty() && self.removed < self.slab.capacity() / 64 {
            return;
        }
        self.removed = 0;
        if self.slab.len() * 4 + SPARE < self.slab.capacity() {
            self.slab.shrink_to_fit();
        }
        if self.first.len() * 4 + SPARE < self.first.capacity() {
            self.first.shrink_to(self.first.len() * 2);
        }
    }

    #[cfg(test)]
    pub(super) fn list_count(&self) -> usize {
        self.first.len()
    }

    /// Slots for entries and for lists.
    #[cfg(test)]
    pub(super) fn capacity(&self) -> (usize, usize) {
        (self.slab.capacity(), self.first.capacity())
    }
}
