//! Logins at one server that have a connection there and no place: SASL exchanges that wait for their client.
//!
//! There are at most [`MAX_EXCHANGES`] of them, and no more than the server may have sessions. One more ends the oldest, so a
//! flood of exchanges ends its own: the client of a real login has answered long before its exchange is the oldest.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio_util::sync::CancellationToken;

/// Maximum number of exchanges at one server. Each occupies a login process there, of which Dovecot has 100 by default.
const MAX_EXCHANGES: u32 = 32;

/// The exchanges of one server.
#[derive(Debug, Default)]
pub(super) struct Exchanges(Mutex<Pending>);

#[derive(Debug, Default)]
struct Pending {
    by_age: BTreeMap<u64, CancellationToken>,
    next: u64,
}

/// One of them; to be given to [`Exchanges::leave`].
#[derive(Debug)]
pub(super) struct Exchange {
    number: u64,
    ended: CancellationToken,
}

impl Exchanges {
    /// Adds an exchange at a server with this limit of sessions, and ends the oldest if there are too many then.
    pub(super) fn enter(&self, max_sessions: Option<u32>) -> Exchange {
        let most = max_sessions.map_or(MAX_EXCHANGES, |most| most.clamp(1, MAX_EXCHANGES));
        let mut pending = self.lock();
        let exchange = Exchange { number: pending.next, ended: CancellationToken::new() };
        pending.next += 1;
        pending.by_age.insert(exchange.number, exchange.ended.clone());
        let mut oldest = None;
        if pending.by_age.len() > most as usize {
            oldest = pending.by_age.pop_first();
        }
        drop(pending);
        if let Some((_, oldest)) = oldest {
            oldest.cancel();
        }
        exchange
    }

    /// Removes an exchange.
    pub(super) fn leave(&self, exchange: &Exchange) {
        self.lock().by_age.remove(&exchange.number);
    }

    fn lock(&self) -> MutexGuard<'_, Pending> {
        // Nothing in here panics halfway through a change.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Exchange {
    /// Waits until newer ones have taken its turn.
    pub(super) async fn ended(&self) {
        self.ended.cancelled().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_too_many_ends_the_oldest() {
        let exchanges = Exchanges::default();
        let [first, second, third] = [(); 3].map(|()| exchanges.enter(Some(3)));
        exchanges.leave(&second);
        let fourth = exchanges.enter(Some(3));
        assert!([&first, &third, &fourth].iter().all(|exchange| !exchange.ended.is_cancelled()));
        let _fifth = exchanges.enter(Some(3));
        assert!(first.ended.is_cancelled() && !third.ended.is_cancelled() && !fourth.ended.is_cancelled());
        [&first, &third, &fourth, &_fifth].into_iter().for_each(|exchange| exchanges.leave(exchange));
        assert!(exchanges.lock().by_age.is_empty());
    }

    #[test]
    fn a_server_has_32_exchanges_at_most_whatever_its_limit_of_sessions() {
        for max_sessions in [None, Some(10_000)] {
            let exchanges = Exchanges::default();
            let entered: Vec<Exchange> = (0..40).map(|_| exchanges.enter(max_sessions)).collect();
            let ended = entered.iter().filter(|exchange| exchange.ended.is_cancelled()).count();
            assert_eq!((ended, exchanges.lock().by_age.len()), (8, 32), "{max_sessions:?}");
            assert!(entered[..8].iter().all(|exchange| exchange.ended.is_cancelled()), "the oldest end");
        }
    }
}
