//! The threads that serve sessions: one a core, each with a runtime of its own.
//!
//! A session lives on the thread that accepted it, and so do its sockets and its timers: nothing of it crosses threads,
//! no thread has to be woken for it, and no lock is waited for. The kernel shares new connections out among the workers'
//! listening sockets. What is not about one session (DNS, metrics, signals) runs elsewhere. Called by `server`.

use std::future::Future;
use std::io;
use std::thread;

use tokio::runtime::{Builder, EnterGuard, Handle, Runtime};

/// Tasks run between two looks for new events: beside sessions that move much, the others are kept waiting by so many
/// turns of them (`relay`, a tenth of a millisecond each).
const EVENT_INTERVAL: u32 = 4;

/// A worker that has not begun yet.
pub(crate) struct Worker(Runtime);

impl Worker {
    /// Makes the runtime.
    ///
    /// # Errors
    /// The system has no descriptors for it.
    pub(crate) fn new() -> io::Result<Self> {
        Builder::new_current_thread().enable_all().event_interval(EVENT_INTERVAL).build().map(Self)
    }

    /// To spawn onto the worker from elsewhere.
    pub(crate) fn handle(&self) -> Handle {
        self.0.handle().clone()
    }

    /// What is registered while the guard lives is registered here.
    pub(crate) fn enter(&self) -> EnterGuard<'_> {
        self.0.enter()
    }

    /// Starts the thread. It ends when `serve` does, and with it all that was spawned.
    ///
    /// # Errors
    /// The system has no thread to give.
    pub(crate) fn start(self, serve: impl Future<Output = ()> + Send + 'static) -> io::Result<()> {
        thread::Builder::new().name("worker".to_owned()).spawn(move || self.0.block_on(serve)).map(drop)
    }
}
