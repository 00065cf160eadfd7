//! The signals that control the process: SIGTERM and SIGINT stop it, SIGHUP reloads the configuration.

use std::io;

use tokio::signal::unix::{Signal, SignalKind, signal};

/// A request to the main task, sent by a signal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum MainRequest {
    /// SIGTERM or SIGINT.
    Stop,
    /// SIGHUP.
    Reload,
}

/// Handlers of the signals that control the process.
#[derive(Debug)]
pub(crate) struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
}

impl Signals {
    /// Installs the handlers.
    ///
    /// # Errors
    /// The system refuses a handler.
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hangup: signal(SignalKind::hangup())?,
        })
    }

    /// Waits for the next signal.
    pub(crate) async fn next(&mut self) -> MainRequest {
        tokio::select! {
            _ = self.terminate.recv() => MainRequest::Stop,
            _ = self.interrupt.recv() => MainRequest::Stop,
            _ = self.hangup.recv() => MainRequest::Reload,
        }
    }

    /// Waits for the next signal that stops the process.
    pub(crate) async fn stop(&mut self) {
        while self.next().await != MainRequest::Stop {}
    }
}
