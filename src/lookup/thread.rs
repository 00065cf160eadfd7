//! A thread with its own runtime, for the requests to one directory or to the policy service.
//!
//! A client library may parse an endless answer without returning to its executor, and no timer on the same thread can
//! end that. On a separate thread, such requests delay neither sessions nor signals, commands and health checks, and
//! use at most one CPU core. The caller waits with a deadline on its own runtime and calls [`LookupThread::set_stalled`]
//! when that expires; new requests then fail at once until the thread runs again.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use std::{io, thread};

use tokio::runtime::{Builder, Handle};
use tokio_util::sync::CancellationToken;

/// Time in which a request must report its own timeout before its thread counts as stalled.
pub(crate) const GRACE: Duration = Duration::from_secs(1);
/// Time after the drop to close connections properly and for queries that are still running.
const LINGER: Duration = Duration::from_secs(62);

/// A running thread, which ends some time after this is dropped.
#[derive(Debug)]
pub(crate) struct LookupThread {
    handle: Handle,
    is_stalled: Arc<AtomicBool>,
    stop: CancellationToken,
}

impl LookupThread {
    /// Starts the thread.
    ///
    /// # Errors
    /// The system cannot start a thread or has no file descriptors for its runtime.
    pub(crate) fn start(name: &str) -> io::Result<Self> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let (handle, stop) = (runtime.handle().clone(), CancellationToken::new());
        let stopped = stop.clone();
        let run = move || {
            runtime.block_on(async {
                stopped.cancelled().await;
                tokio::time::sleep(LINGER).await;
            });
            runtime.shutdown_background();
        };
        thread::Builder::new().name(name.to_owned()).spawn(run)?;
        Ok(Self { handle, is_stalled: Arc::default(), stop })
    }

    /// The runtime of the thread.
    pub(crate) fn handle(&self) -> &Handle {
        &self.handle
    }

    /// Marks the thread as stalled: a request on it did not report its timeout.
    pub(crate) fn set_stalled(&self) {
        if !self.is_stalled.swap(true, Ordering::AcqRel) {
            let is_stalled = self.is_stalled.clone();
            // The task runs as soon as the thread runs tasks again.
            self.handle.spawn(async move { is_stalled.store(false, Ordering::Release) });
        }
    }

    /// Whether the thread has not run any task since [`LookupThread::set_stalled`].
    pub(crate) fn is_stalled(&self) -> bool {
        self.is_stalled.load(Ordering::Acquire)
    }
}

impl Drop for LookupThread {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn stalled_thread_is_used_again_when_it_runs() {
        let thread = LookupThread::start("test").unwrap();
        let (resume, wait) = mpsc::channel::<()>();
        thread.handle().spawn(async move {
            let _ = wait.recv();
        });
        thread.set_stalled();
        assert!(thread.is_stalled());
        resume.send(()).unwrap();
        let (sender, ran) = mpsc::channel();
        thread.handle().spawn(async move { sender.send(()) });
        ran.recv().unwrap();
        assert!(!thread.is_stalled());
    }
}
