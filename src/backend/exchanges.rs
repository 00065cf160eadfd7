//! Logins at one server that have a connection there and no place: SASL exchanges that wait for their client.
//!
//! There are at most as many of them as the server may have sessions. One more ends the oldest, so a flood of exchanges
//! pushes out itself: a client that means it has answered long before its exchange is the oldest.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio_util::sync::CancellationToken;

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
    /// Adds an exchange, and ends the oldest if there are more than `most` then.
    pub(super) fn enter(&self, most: Option<u32>) -> Exchange {
        let mut pending = self.lock();
        let exchange = Exchange { number: pending.next, ended: CancellationToken::new() };
        pending.next += 1;
        pending.by_age.insert(exchange.number, exchange.ended.clone());
        let mut oldest = None;
        if most.is_some_and(|most| pending.by_age.len() > most.max(1) as usize) {
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
        let without_limit: Vec<Exchange> = (0..100).map(|_| exchanges.enter(None)).collect();
        assert!(without_limit.iter().all(|exchange| !exchange.ended.is_cancelled()));
        without_limit.iter().chain([&first, &third, &fourth, &_fifth]).for_each(|exchange| exchanges.leave(exchange));
        assert!(exchanges.lock().by_age.is_empty());
    }
}
