//! SASL exchanges at one server that wait for their client's next response.
//!
//! Such a login has a connection to the server but no permit, so it does not count against `max_sessions`. The number of
//! exchanges is bounded by `max_sessions`, or by [`MAX_EXCHANGES`] if that is less. One more ends the oldest: a flood of
//! exchanges ends its own, because the client of a real login has responded long before its exchange is the oldest.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio_util::sync::CancellationToken;

/// Maximum number of exchanges at one server. Each occupies a login process there, of which Dovecot has 100 by default.
const MAX_EXCHANGES: u32 = 32;

/// The exchanges of one server.
#[derive(Debug, Default)]
pub(super) struct SaslExchanges(Mutex<Pending>);

#[derive(Debug, Default)]
struct Pending {
    by_age: BTreeMap<u64, CancellationToken>,
    next: u64,
}

/// One exchange, until it drops.
#[derive(Debug)]
pub(super) struct SaslExchange {
    exchanges: Arc<SaslExchanges>,
    number: u64,
    displaced: CancellationToken,
}

impl SaslExchanges {
    /// Adds an exchange, and ends the oldest one if there are too many now.
    pub(super) fn enter(self: &Arc<Self>, max_sessions: Option<u32>) -> SaslExchange {
        let limit = max_sessions.map_or(MAX_EXCHANGES, |limit| limit.clamp(1, MAX_EXCHANGES));
        let displaced = CancellationToken::new();
        let mut pending = self.lock();
        let number = pending.next;
        pending.next += 1;
        pending.by_age.insert(number, displaced.clone());
        let oldest = if pending.by_age.len() > limit as usize { pending.by_age.pop_first() } else { None };
        drop(pending);
        if let Some((_, oldest)) = oldest {
            oldest.cancel();
        }
        SaslExchange { exchanges: self.clone(), number, displaced }
    }

    fn lock(&self) -> MutexGuard<'_, Pending> {
        // Nothing in here panics halfway through a change.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl SaslExchange {
    /// Waits until newer exchanges have displaced this one.
    pub(super) async fn displaced(&self) {
        self.displaced.cancelled().await;
    }
}

impl Drop for SaslExchange {
    fn drop(&mut self) {
        self.exchanges.lock().by_age.remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_exchange_too_many_displaces_the_oldest() {
        let exchanges = Arc::new(SaslExchanges::default());
        let [first, second, third] = [(); 3].map(|()| exchanges.enter(Some(3)));
        drop(second);
        let fourth = exchanges.enter(Some(3));
        assert!([&first, &third, &fourth].iter().all(|exchange| !exchange.displaced.is_cancelled()));
        let fifth = exchanges.enter(Some(3));
        assert!(first.displaced.is_cancelled() && !third.displaced.is_cancelled() && !fourth.displaced.is_cancelled());
        drop((first, third, fourth, fifth));
        assert!(exchanges.lock().by_age.is_empty());
    }

    #[test]
    fn exchanges_at_a_server_are_limited_to_32_whatever_max_sessions_is() {
        for max_sessions in [None, Some(10_000)] {
            let exchanges = Arc::new(SaslExchanges::default());
            let entered: Vec<SaslExchange> = (0..40).map(|_| exchanges.enter(max_sessions)).collect();
            let displaced = entered.iter().filter(|exchange| exchange.displaced.is_cancelled()).count();
            assert_eq!((displaced, exchanges.lock().by_age.len()), (8, 32), "{max_sessions:?}");
            assert!(entered[..8].iter().all(|exchange| exchange.displaced.is_cancelled()), "the oldest end");
        }
    }
}
