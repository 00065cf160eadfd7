//! Connections before their login, in the order in which they came. When the room is full, who has waited longest goes.
//!
//! A flood pushes out itself first of all: a client that means it logs in long before its turn to go has come. Who logs in
//! leaves the lobby and can no longer be told to go. A connection whose complete login is under way is shed last.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio_util::sync::CancellationToken;

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Lobby(Mutex<Waiting>);

#[derive(Debug, Default)]
struct Waiting {
    /// By whether a complete login is under way, then by age.
    by_age: BTreeMap<(bool, u64), CancellationToken>,
    next: u64,
}

/// A place in the lobby, until dropped.
#[derive(Debug)]
pub struct Ticket {
    lobby: Arc<Lobby>,
    number: u64,
    shed: CancellationToken,
}

impl Lobby {
    /// One more; whoever is too many by that is told to go, and counts no longer.
    pub(super) fn enter(self: &Arc<Self>, room: usize) -> Ticket {
        let shed = CancellationToken::new();
        let mut waiting = self.lock();
        let number = waiting.next;
        waiting.next += 1;
        waiting.by_age.insert((false, number), shed.clone());
        let mut goes = Vec::new();
        while waiting.by_age.len() > room.max(1) {
            goes.extend(waiting.by_age.pop_first().map(|(_, oldest)| oldest));
        }
        drop(waiting);
        for oldest in goes {
            oldest.cancel();
        }
        Ticket { lobby: self.clone(), number, shed }
    }

    /// How many are in it.
    pub(super) fn len(&self) -> usize {
        self.lock().by_age.len()
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        // Nothing in here panics halfway through a change.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Ticket {
    /// Ready when the connection is to go, and from then on.
    pub async fn shed(&self) {
        self.shed.cancelled().await;
    }

    /// A login with complete credentials is under way.
    pub fn login_begun(&self) {
        self.set_order(true);
    }

    /// It is over.
    pub fn login_ended(&self) {
        self.set_order(false);
    }

    fn set_order(&self, has_login: bool) {
        let mut waiting = self.lobby.lock();
        // One that was told to go is not counted any more.
        if let Some(shed) = waiting.by_age.remove(&(!has_login, self.number)) {
            waiting.by_age.insert((has_login, self.number), shed);
        }
    }

    /// The same signal, for a caller that cannot borrow the ticket.
    pub fn shed_signal(&self) -> CancellationToken {
        self.shed.clone()
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let mut waiting = self.lobby.lock();
        for has_login in [false, true] {
            waiting.by_age.remove(&(has_login, self.number));
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_oldest_goes_and_who_has_left_does_not() {
        let lobby = Arc::new(Lobby::default());
        let first = lobby.enter(2);
        let logged_in = lobby.enter(2);
        let told = logged_in.shed.clone();
        drop(logged_in);
        let second = lobby.enter(2);
        assert!(!first.shed.is_cancelled());
        let third = lobby.enter(2);
        assert_eq!([&first, &second, &third].map(|ticket| ticket.shed.is_cancelled()), [true, false, false]);
        assert!(!told.is_cancelled());
        assert_eq!(lobby.len(), 2);
        drop((first, second, third));
        assert_eq!(lobby.len(), 0);
    }

    #[test]
    fn a_login_under_way_goes_last() {
        let lobby = Arc::new(Lobby::default());
        let logging_in = lobby.enter(2);
        logging_in.login_begun();
        let silent = [lobby.enter(2), lobby.enter(2), lobby.enter(2)];
        assert!(!logging_in.shed.is_cancelled() && silent[0].shed.is_cancelled() && silent[1].shed.is_cancelled());
        assert_eq!(lobby.len(), 2);
        logging_in.login_ended();
        let _late = lobby.enter(2);
        assert!(logging_in.shed.is_cancelled(), "it is the oldest again");
        drop(logging_in);
        assert_eq!(lobby.len(), 2);
    }

    #[test]
    fn a_smaller_room_is_made_at_the_next_door() {
        let lobby = Arc::new(Lobby::default());
        let tickets: Vec<Ticket> = (0..10).map(|_| lobby.enter(10)).collect();
        let last = lobby.enter(3);
        let told: Vec<bool> = tickets.iter().map(|ticket| ticket.shed.is_cancelled()).collect();
        assert_eq!(told.iter().filter(|told| **told).count(), 8);
        assert!(told[..8].iter().all(|told| *told) && !last.shed.is_cancelled());
    }

    proptest! {
        /// Never more than there is room for, and always the oldest goes.
        #[test]
        fn in_order(room in 1usize..10, steps in prop::collection::vec(any::<Option<prop::sample::Index>>(), 0..200)) {
            let lobby = Arc::new(Lobby::default());
            let mut inside: Vec<Ticket> = Vec::new();
            for step in steps {
                match step {
                    Some(which) if !inside.is_empty() => drop(inside.remove(which.index(inside.len()))),
                    _ => inside.push(lobby.enter(room)),
                }
                prop_assert!(lobby.len() <= room);
                let told = inside.iter().filter(|ticket| ticket.shed.is_cancelled()).count();
                prop_assert!(inside[..told].iter().all(|ticket| ticket.shed.is_cancelled()));
                prop_assert_eq!(lobby.len(), inside.len() - told);
            }
        }
    }
}
