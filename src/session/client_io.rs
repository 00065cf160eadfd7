//! Reading from, writing to and closing the connection of a client that has not logged in.

use std::io;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;
use zeroize::Zeroizing;

use super::log_record::EndedBy;
use super::{CLOSE_TIMEOUT, Session, SessionEnded};
use crate::admission::MemoryBudgetExceeded;
use crate::deadline::Deadline;
use crate::failure::Reason;
use crate::protocol::imap::prelogin::{ByeReason, CloseReason, Prelogin};
use crate::stream::Stream;

/// Size of one read.
const READ: usize = 4096;
/// Maximum time to send BYE to a client whose memory is needed for others.
const SHORT_CLOSE_TIMEOUT: Duration = Duration::from_millis(100);

/// Why the proxy ends a connection: the text for the client and the reason for metrics and logs.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ending {
    pub(super) bye: ByeReason,
    pub(super) reason: Reason,
}

impl Ending {
    pub(super) const SHUTDOWN: Self = Self { bye: ByeReason::Shutdown, reason: Reason::Drain };
    pub(super) const SHED: Self = Self { bye: ByeReason::Shed, reason: Reason::Shed };
    pub(super) const MEMORY: Self = Self { bye: ByeReason::Memory, reason: Reason::ShedForMemory };
    const LOGIN_DEADLINE: Self = Self { bye: ByeReason::LoginDeadline, reason: Reason::LoginDeadline };
}

/// Why nothing was read from a client.
pub(super) enum ReadError {
    /// The client has closed the connection, or it broke.
    Disconnected,
    /// `limits.login` has passed.
    LoginDeadline,
    /// `limits.before_login_memory` is used up.
    OutOfMemory,
    /// A balancer has sent a PROXY header to a listener without `proxy_protocol`.
    ProxyHeader,
}

impl From<MemoryBudgetExceeded> for ReadError {
    fn from(_: MemoryBudgetExceeded) -> Self {
        Self::OutOfMemory
    }
}

impl Session {
    /// Sends the content of `out` and empties it.
    pub(super) async fn send(&mut self, stream: &mut Stream, out: &mut Vec<u8>) -> Result<(), SessionEnded> {
        if out.is_empty() {
            return Ok(());
        }
        let write = async {
            stream.write_all(out).await?;
            stream.flush().await
        };
        // Replies are short: a client that does not accept them within the deadline accepts nothing at all.
        let deadline = self.login_deadline.max(Deadline::after(CLOSE_TIMEOUT));
        let result = tokio::select! {
            biased;
            result = deadline.limit(write) => result,
            // In the middle of a write no BYE can be sent.
            ending = self.termination() => return Err(self.ended(EndedBy::Proxy, ending.reason)),
        };
        // A client that is silent after this has no buffer.
        *out = Vec::new();
        match result {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) => Err(self.ended(EndedBy::Client, Reason::Disconnected)),
            Err(_) => Err(self.ended(EndedBy::Client, Reason::LoginDeadline)),
        }
    }

    /// Reads once. If nothing can be read, the session ends, with a BYE if possible.
    pub(super) async fn receive(&mut self, stream: &mut Stream, prelogin: &mut Prelogin) -> Result<(), SessionEnded> {
        let termination = self.termination();
        let ending = tokio::select! {
            read = self.read(stream, prelogin) => match read {
                Ok(()) => return Ok(()),
                Err(error) => return Err(self.end_after_read_error(error, stream, prelogin).await),
            },
            ending = termination => ending,
        };
        Err(self.end(stream, prelogin, ending).await)
    }

    /// Reads once, within `limits.login` and the memory budget.
    pub(super) async fn read(&mut self, stream: &mut Stream, prelogin: &mut Prelogin) -> Result<(), ReadError> {
        self.memory.resize(prelogin.memory())?;
        let mut buffer = Zeroizing::new(Vec::with_capacity(READ));
        match self.login_deadline.limit(stream.read_buf(&mut *buffer)).await {
            Ok(Ok(read)) if read > 0 => {
                if self.header_detector.observe(&buffer) {
                    return Err(ReadError::ProxyHeader);
                }
                self.memory.resize(prelogin.memory_with(read))?;
                prelogin.input(&buffer);
                Ok(())
            }
            Ok(Err(error)) if is_out_of_memory(error.kind()) => Err(ReadError::OutOfMemory),
            Ok(_) => Err(ReadError::Disconnected),
            Err(_) => Err(ReadError::LoginDeadline),
        }
    }

    /// Ends the session because nothing could be read.
    pub(super) async fn end_after_read_error(
        &mut self,
        error: ReadError,
        stream: &mut Stream,
        prelogin: &Prelogin,
    ) -> SessionEnded {
        let ending = match error {
            ReadError::Disconnected => return self.ended(EndedBy::Client, Reason::Disconnected),
            ReadError::LoginDeadline => Ending::LOGIN_DEADLINE,
            ReadError::OutOfMemory => Ending::MEMORY,
            ReadError::ProxyHeader => {
                self.record_unexpected_proxy_header();
                return SessionEnded;
            }
        };
        self.end(stream, prelogin, ending).await
    }

    /// Ends the session with a BYE, which the client may or may not accept.
    pub(super) async fn end(&mut self, stream: &mut Stream, prelogin: &Prelogin, ending: Ending) -> SessionEnded {
        let mut out = Vec::new();
        prelogin.bye(ending.bye, &mut out);
        let send = async {
            stream.write_all(&out).await?;
            stream.shutdown().await
        };
        let limit = if ending.bye == ByeReason::Memory { SHORT_CLOSE_TIMEOUT } else { CLOSE_TIMEOUT };
        let _ = timeout(limit, send).await;
        self.ended(EndedBy::Proxy, ending.reason)
    }

    /// Records why the session has ended.
    pub(super) fn ended(&mut self, by: EndedBy, reason: Reason) -> SessionEnded {
        self.record.set_ended_by(by);
        self.record.record_failure(reason);
        SessionEnded
    }

    /// Closes the connection because the dialogue with the client requires it; the client has received the reason.
    pub(super) async fn close_as_requested<T>(
        &mut self,
        reason: CloseReason,
        stream: &mut Stream,
    ) -> Result<T, SessionEnded> {
        if let Some(reason) = failure(reason) {
            self.record.record_failure(reason);
        }
        self.record.set_ended_by(EndedBy::Proxy);
        close(stream).await;
        Err(SessionEnded)
    }
}

/// Closes the connection, with a close_notify if it is encrypted.
pub(super) async fn close(stream: &mut Stream) {
    // If that fails or takes too long, the socket closes when the stream is dropped.
    let _ = timeout(CLOSE_TIMEOUT, stream.shutdown()).await;
}

/// Whether a read failed because `limits.before_login_memory` is used up.
pub(super) fn is_out_of_memory(error: io::ErrorKind) -> bool {
    error == io::ErrorKind::OutOfMemory
}

fn failure(reason: CloseReason) -> Option<Reason> {
    match reason {
        CloseReason::Logout => None,
        CloseReason::TooManyBadCommands => Some(Reason::TooManyBadCommands),
        CloseReason::TooManyFailedLogins => Some(Reason::TooManyFailedLogins),
        CloseReason::LineTooLong => Some(Reason::LineTooLong),
        CloseReason::LiteralTooLong => Some(Reason::LiteralTooLong),
        CloseReason::StartTlsInjection => Some(Reason::StartTlsInjection),
        CloseReason::ForeignProtocol => Some(Reason::ForeignProtocol),
        CloseReason::TlsOnPlainPort => Some(Reason::TlsOnPlainPort),
    }
}
