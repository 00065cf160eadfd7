//! Moves of users and hand-overs to a successor exclude each other: a successor knows nothing of a user who is held here.
//!
//! A hand-over is refused while a user is held. Once sockets have been handed over no user is held any more, until the successor has
//! taken over (then this process refuses for another reason) or had enough time to.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Time within which a successor that has the sockets takes over.
const TAKE_OVER: Duration = Duration::from_secs(60);

/// Maximum number of users who are held at a time.
pub(super) const MAX_HELD: usize = 500;

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Exclusion(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// One clone for each held user.
    held: Arc<()>,
    handed_over: Option<Instant>,
}

/// A held user. No hand-over begins until this is dropped.
#[derive(Debug)]
pub(super) struct Holding(#[expect(dead_code, reason = "counted")] Arc<()>);

/// The other one is in progress.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Excluded {
    /// A hand-over is in progress.
    #[error("a successor is taking over: try again in a minute")]
    ByHandOver,
    /// A move is in progress.
    #[error("a user is being moved: try again when that is done")]
    ByMove,
    /// [`MAX_HELD`] is reached.
    #[error("{MAX_HELD} users are being moved: try again when some of that is done")]
    TooMany,
}

impl Exclusion {
    /// Before a user is held.
    pub(super) fn hold(&self, now: Instant) -> Result<Holding, Excluded> {
        let state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match state.handed_over {
            Some(begun) if now.saturating_duration_since(begun) < TAKE_OVER => Err(Excluded::ByHandOver),
            _ if Arc::strong_count(&state.held) > MAX_HELD => Err(Excluded::TooMany),
            _ => Ok(Holding(state.held.clone())),
        }
    }

    /// Before sockets are handed over.
    pub(super) fn hand_over(&self, now: Instant) -> Result<(), Excluded> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if Arc::strong_count(&state.held) > 1 {
            return Err(Excluded::ByMove);
        }
        state.handed_over = Some(now);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moves_and_hand_overs_exclude_each_other() {
        let (exclusion, now) = (Exclusion::default(), Instant::now());
        let first = exclusion.hold(now).unwrap();
        let second = exclusion.hold(now).unwrap();
        drop(first);
        assert_eq!(exclusion.hand_over(now), Err(Excluded::ByMove));
        drop(second);
        exclusion.hand_over(now).unwrap();
        assert_eq!(exclusion.hold(now).unwrap_err(), Excluded::ByHandOver);
        exclusion.hand_over(now).unwrap();
        let late = now + TAKE_OVER;
        let mut held =
            vec![exclusion.hold(late).expect("a successor that does not come keeps no user from being moved")];
        (1..MAX_HELD).for_each(|_| held.push(exclusion.hold(late).unwrap()));
        assert_eq!(exclusion.hold(late).unwrap_err(), Excluded::TooMany);
        held.pop();
        assert!(exclusion.hold(late).is_ok());
    }
}
