//! The handover connection after the HTTP upgrade: JSON messages, one per line, and the transfer of the listening sockets.
//!
//! The parent module documents the order of the messages. [`FromPredecessor::Refused`] may be sent instead of any message of the
//! predecessor. If the connection is closed before the last message, the handover has failed.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::UnixStream;
use tokio::task::spawn_blocking;

use crate::backend::state_override::StoredOverride;
use crate::process::socket_handover;

/// Protocol name and version in the `Upgrade` header.
pub(in crate::api) const PROTOCOL: &str = "vestibule-hand-over/1";
/// Maximum length of a message. More than `MAX_OVERRIDES` administrative states need, which a test checks.
const MAX_MESSAGE_BYTES: u64 = 8 * 1024 * 1024;
/// Maximum length of a message before the sockets are transferred.
const MAX_FIRST_MESSAGE_BYTES: u64 = 4 * 1024;
/// Size of the read buffer after the sockets are transferred.
const READ_BUFFER_BYTES: usize = 8 * 1024;
/// Timeout of the transfer of all sockets, and of a message that the other side sends at once.
pub(super) const TRANSFER_TIMEOUT: Duration = Duration::from_secs(10);
/// Timeout from [`FromPredecessor::Go`] to [`FromSuccessor::Serving`].
pub(super) const SERVING_TIMEOUT: Duration = Duration::from_secs(10);

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "step", rename_all = "kebab-case")]
pub(super) enum FromSuccessor {
    /// Requests the listening sockets.
    #[serde(rename = "send")]
    RequestSockets,
    /// Requests permission to start, after everything is bound and privileges are dropped.
    Ready { version: String },
    /// The successor serves connections.
    Serving {
        /// Addresses of transferred sockets that the successor does not use.
        #[serde(default)]
        unused: Vec<SocketAddr>,
    },
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "step", rename_all = "kebab-case")]
pub(super) enum FromPredecessor {
    /// Permission to start.
    Go {
        /// Administrative states of servers.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        states: Vec<StoredOverride>,
    },
    /// The predecessor retires.
    Retiring {
        /// Final administrative states of servers: from now on only the successor changes them.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        states: Vec<StoredOverride>,
    },
    /// The predecessor continues, and the successor must not start.
    Refused {
        #[serde(rename = "text")]
        reason: String,
    },
}

/// One end of a handover connection.
pub(super) struct HandoverConnection {
    stream: BufReader<UnixStream>,
    max_message_bytes: u64,
}

impl HandoverConnection {
    pub(super) fn new(stream: UnixStream) -> Self {
        // Reads byte by byte, because the sockets may follow a message and must not be lost in the buffer.
        Self { stream: BufReader::with_capacity(1, stream), max_message_bytes: MAX_FIRST_MESSAGE_BYTES }
    }

    pub(super) async fn write(&mut self, message: &impl Serialize) -> io::Result<()> {
        let mut line = serde_json::to_vec(message)?;
        line.push(b'\n');
        with_timeout(TRANSFER_TIMEOUT, self.stream.write_all(&line)).await
    }

    /// Reads the next message. Not cancellation-safe: the connection must not be used after the future was dropped.
    pub(super) async fn read<T: DeserializeOwned>(&mut self, timeout: Duration) -> io::Result<T> {
        let read = async {
            let mut line = Vec::new();
            let length = (&mut self.stream).take(self.max_message_bytes).read_until(b'\n', &mut line).await?;
            match line.pop() {
                Some(b'\n') => Ok(serde_json::from_slice(&line)?),
                Some(_) if length as u64 == self.max_message_bytes => {
                    let text = format!("the handover message exceeds {} bytes", self.max_message_bytes);
                    Err(io::Error::new(io::ErrorKind::InvalidData, text))
                }
                _ => {
                    let text = "the other process closed the handover connection";
                    Err(io::Error::new(io::ErrorKind::UnexpectedEof, text))
                }
            }
        };
        with_timeout(timeout, read).await
    }

    pub(super) async fn send_sockets(self, sockets: Vec<OwnedFd>, trusted: Vec<u32>) -> io::Result<Self> {
        self.with_blocking_socket(move |stream| socket_handover::send(stream, &sockets, &trusted))
            .await
            .map(|(connection, ())| connection)
    }

    pub(super) async fn receive_sockets(self, trusted: Vec<u32>) -> io::Result<(Self, Vec<TcpListener>)> {
        self.with_blocking_socket(move |stream| socket_handover::receive(stream, &trusted)).await
    }

    /// Runs `operation`, which transfers the sockets, on a blocking thread. After it reads are buffered, because only messages
    /// follow.
    async fn with_blocking_socket<T: Send + 'static>(
        self,
        operation: impl FnOnce(&std::os::unix::net::UnixStream) -> io::Result<T> + Send + 'static,
    ) -> io::Result<(Self, T)> {
        let stream = self.stream.into_inner().into_std()?;
        let transferred = spawn_blocking(move || {
            stream.set_nonblocking(false)?;
            stream.set_read_timeout(Some(TRANSFER_TIMEOUT))?;
            stream.set_write_timeout(Some(TRANSFER_TIMEOUT))?;
            let result = operation(&stream)?;
            stream.set_nonblocking(true)?;
            Ok::<_, io::Error>((stream, result))
        });
        let (stream, result) = transferred.await.map_err(io::Error::other)??;
        let stream = BufReader::with_capacity(READ_BUFFER_BYTES, UnixStream::from_std(stream)?);
        Ok((Self { stream, max_message_bytes: MAX_MESSAGE_BYTES }, result))
    }
}

async fn with_timeout<T>(timeout: Duration, future: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    tokio::time::timeout(timeout, future).await.unwrap_or_else(|_| {
        let text = format!("the handover timed out after {}", humantime::format_duration(timeout));
        Err(io::Error::new(io::ErrorKind::TimedOut, text))
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::admin_state::AdminState;
    use crate::backend::state_override::{MAX_OVERRIDES, StateOverride};

    fn connections() -> (HandoverConnection, HandoverConnection) {
        let (one, other) = UnixStream::pair().unwrap();
        (HandoverConnection::new(one), HandoverConnection::new(other))
    }

    #[test]
    fn messages_keep_their_json() {
        let request = serde_json::to_value(FromSuccessor::RequestSockets).unwrap();
        assert_eq!(request, json!({"step": "send"}));
        let refused = serde_json::to_value(FromPredecessor::Refused { reason: "not now".to_owned() }).unwrap();
        assert_eq!(refused, json!({"step": "refused", "text": "not now"}));
    }

    #[tokio::test]
    async fn messages_and_sockets_are_received_separately() {
        let (mut successor, mut predecessor) = connections();
        let own = vec![rustix::process::geteuid().as_raw()];
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        successor.write(&FromSuccessor::RequestSockets).await.unwrap();
        assert_eq!(predecessor.read::<FromSuccessor>(TRANSFER_TIMEOUT).await.unwrap(), FromSuccessor::RequestSockets);
        let mut predecessor = predecessor.send_sockets(vec![listener.into()], own.clone()).await.unwrap();
        let set = StateOverride::new(AdminState::Drain, "root", Some("new disks")).unwrap();
        let drained = StoredOverride { backend: "a".to_owned(), server: "h:1".to_owned(), set };
        let go = FromPredecessor::Go { states: vec![drained; MAX_OVERRIDES] };
        let retiring = FromPredecessor::Retiring { states: Vec::new() };
        let (mut successor, sockets) = successor.receive_sockets(own).await.unwrap();
        assert_eq!(sockets[0].local_addr().unwrap(), address);
        let writing = async {
            predecessor.write(&go).await.unwrap();
            predecessor.write(&retiring).await.unwrap();
        };
        let reading = async {
            assert_eq!(successor.read::<FromPredecessor>(TRANSFER_TIMEOUT).await.unwrap(), go);
            assert_eq!(successor.read::<FromPredecessor>(TRANSFER_TIMEOUT).await.unwrap(), retiring);
        };
        tokio::join!(writing, reading);
    }

    #[tokio::test(start_paused = true)]
    async fn missing_and_oversized_messages_are_errors() {
        let (one, mut other) = connections();
        let error = other.read::<FromSuccessor>(TRANSFER_TIMEOUT).await.unwrap_err();
        assert_eq!(error.to_string(), "the handover timed out after 10s");
        drop(one);
        let (mut one, mut other) = connections();
        one.stream.write_all(&vec![b'x'; MAX_FIRST_MESSAGE_BYTES as usize + 1]).await.unwrap();
        let read = other.read::<FromSuccessor>(TRANSFER_TIMEOUT).await;
        assert_eq!(read.unwrap_err().to_string(), "the handover message exceeds 4096 bytes");
        let (one, mut other) = connections();
        drop(one);
        let error = other.read::<FromSuccessor>(TRANSFER_TIMEOUT).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }
}
