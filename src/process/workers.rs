//! The threads that serve sessions: one per core, each with its own runtime.
//!
//! A session stays on the thread that accepted it, with its sockets and timers. So it never waits for another thread or for a
//! lock. The kernel distributes new connections over the workers' listening sockets. Everything that does not belong to one
//! session (DNS, metrics, signals) runs on other threads.

use std::future::Future;
use std::io;
use std::thread;

use tokio::runtime::{Builder, EnterGuard, Handle, Runtime};

/// Number of tasks that run between two polls for events. While some sessions move much data, the others wait for this number of
/// their rounds (see `relay`), a tenth of a millisecond each.
const EVENT_INTERVAL: u32 = 4;

/// A worker whose thread has not been started.
pub(crate) struct Worker(Runtime);

impl Worker {
    /// Creates the runtime.
    ///
    /// # Errors
    /// The system has no descriptors for it.
    pub(crate) fn new() -> io::Result<Self> {
        Builder::new_current_thread().enable_all().event_interval(EVENT_INTERVAL).build().map(Self)
    }

    /// A handle that spawns tasks on the worker from other threads.
    pub(crate) fn handle(&self) -> Handle {
        self.0.handle().clone()
    }

    /// Registers sockets and timers with this worker's runtime while the guard exists.
    pub(crate) fn enter(&self) -> EnterGuard<'_> {
        self.0.enter()
    }

    /// Starts the thread, which ends when `serve` does, together with all tasks that were spawned on it.
    ///
    /// # Errors
    /// The system cannot create a thread.
    pub(crate) fn start(self, serve: impl Future<Output = ()> + Send + 'static) -> io::Result<()> {
        thread::Builder::new().name("worker".to_owned()).spawn(move || self.0.block_on(serve)).map(drop)
    }
}
