//! Cancellation of a session from outside. A signal carries the first reason only, and does not end the session itself: the
//! session's task, or the idle poller if it is parked, sees the signal and ends the session in order.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::task::{Context, Poll};

use futures_util::task::AtomicWaker;

/// Why a session or a login is cancelled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum CancelReason {
    /// The process stops, and the grace period is over.
    Stopped = 1,
    /// The operator ends the user's sessions.
    Kicked = 2,
    /// The operator moves the user to another backend.
    Moved = 3,
    /// The operator drains the server.
    Drained = 4,
    /// Another server of the backend has accepted a later login of the user.
    Replaced = 5,
}

impl CancelReason {
    fn from_code(code: u8) -> Option<Self> {
        [Self::Stopped, Self::Kicked, Self::Moved, Self::Drained, Self::Replaced]
            .into_iter()
            .find(|reason| *reason as u8 == code)
    }
}

/// The signal that ends a session. It cannot be withdrawn, and its reason does not change.
#[derive(Debug, Default)]
pub struct CancelSignal {
    /// The code of the reason, or 0.
    code: AtomicU8,
    waker: AtomicWaker,
}

impl CancelSignal {
    /// Ready when the session has been cancelled. Only the waker of the last call is kept.
    pub fn poll(&self, context: &Context<'_>) -> Poll<CancelReason> {
        self.waker.register(context.waker());
        self.reason().map_or(Poll::Pending, Poll::Ready)
    }

    /// Why the session has been cancelled, if it has.
    pub fn reason(&self) -> Option<CancelReason> {
        CancelReason::from_code(self.code.load(Ordering::Acquire))
    }

    /// Waits until the session is cancelled.
    pub async fn cancelled(&self) -> CancelReason {
        std::future::poll_fn(|context| self.poll(context)).await
    }

    /// Cancels the session. Returns whether it had not been cancelled before.
    pub(super) fn cancel(&self, reason: CancelReason) -> bool {
        let is_first = self.code.compare_exchange(0, reason as u8, Ordering::AcqRel, Ordering::Acquire).is_ok();
        if is_first {
            self.waker.wake();
        }
        is_first
    }
}

/// Cancels sessions. Returns how many had not been cancelled before.
pub(super) fn cancel_all(signals: &[Arc<CancelSignal>], reason: CancelReason) -> usize {
    signals.iter().filter(|signal| signal.cancel(reason)).count()
}
