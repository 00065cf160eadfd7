//! The connection of a handover after the HTTP upgrade: messages of one JSON line each, and the listening sockets.
//!
//! The parent module has the order of the messages. [`FromPredecessor::Refused`] may replace each message of the predecessor.
//! A connection that is closed earlier is a handover that has failed.

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

/// The token of the HTTP upgrade, with the version of what follows it.
pub(in crate::api) const PROTOCOL: &str = "vestibule-hand-over/1";
/// Maximum length of a message. The maximum number of administrative states needs less.
const MAX_MESSAGE: u64 = 8 * 1024 * 1024;
/// Maximum length of a message before the sockets are transferred.
const MAX_FIRST_MESSAGE: u64 = 4 * 1024;
/// Size of the read buffer after the sockets are transferred.
const BUFFER: usize = 8 * 1024;
/// Timeout of transferring all sockets, and of a message that the other side sends without waiting.
pub(super) const TRANSFER_DEADLINE: Duration = Duration::from_secs(10);
/// Timeout from [`FromPredecessor::Go`] to [`FromSuccessor::Serving`].
pub(super) const SERVING_DEADLINE: Duration = Duration::from_secs(10);

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "step", rename_all = "kebab-case")]
pub(super) enum FromSuccessor {
    /// Asks for the listening sockets.
    Send,
    /// Asks for permission to start. Nothing is left that could fail except the start itself.
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
    Refused { text: String },
}

/// One end of the connection of a handover.
pub(super) struct HandOverConnection {
    stream: BufReader<UnixStream>,
    max_message: u64,
}

impl HandOverConnection {
    pub(super) fn new(stream: UnixStream) -> Self {
        // Reads byte by byte, because the sockets may follow a message and must not be lost in the buffer.
        Self { stream: BufReader::with_capacity(1, stream), max_message: MAX_FIRST_MESSAGE }
    }

    pub(super) async fn write(&mut self, message: &impl Serialize) -> io::Result<()> {
        let mut line = serde_json::to_vec(message)?;
        line.push(b'\n');
        in_time(TRANSFER_DEADLINE, self.stream.write_all(&line)).await
    }

    /// Reads the next message. Not cancellation-safe: the connection must not be used after the future was dropped.
    pub(super) async fn read<T: DeserializeOwned>(&mut self, deadline: Duration) -> io::Result<T> {
        let read = async {
            let mut line = Vec::new();
            let length = (&mut self.stream).take(self.max_message).read_until(b'\n', &mut line).await?;
            match line.pop() {
                Some(b'\n') => Ok(serde_json::from_slice(&line)?),
                Some(_) if length as u64 == self.max_message => {
                    Err(io::Error::new(io::ErrorKind::InvalidData, "the message is too long"))
                }
                _ => Err(io::ErrorKind::UnexpectedEof.into()),
            }
        };
        in_time(deadline, read).await
    }

    pub(super) async fn send_sockets(self, sockets: Vec<OwnedFd>, trusted: Vec<u32>) -> io::Result<Self> {
        self.transfer(move |stream| socket_handover::send(stream, &sockets, &trusted))
            .await
            .map(|(connection, ())| connection)
    }

    pub(super) async fn receive_sockets(self, trusted: Vec<u32>) -> io::Result<(Self, Vec<TcpListener>)> {
        self.transfer(move |stream| socket_handover::receive(stream, &trusted)).await
    }

    /// Runs `transfer` on a blocking thread. After it no more sockets follow.
    async fn transfer<T: Send + 'static>(
        self,
        transfer: impl FnOnce(&std::os::unix::net::UnixStream) -> io::Result<T> + Send + 'static,
    ) -> io::Result<(Self, T)> {
        let stream = self.stream.into_inner().into_std()?;
        let transferred = spawn_blocking(move || {
            stream.set_nonblocking(false)?;
            stream.set_read_timeout(Some(TRANSFER_DEADLINE))?;
            stream.set_write_timeout(Some(TRANSFER_DEADLINE))?;
            let result = transfer(&stream)?;
            stream.set_nonblocking(true)?;
            Ok::<_, io::Error>((stream, result))
        });
        let (stream, result) = transferred.await.map_err(io::Error::other)??;
        let stream = BufReader::with_capacity(BUFFER, UnixStream::from_std(stream)?);
        Ok((Self { stream, max_message: MAX_MESSAGE }, result))
    }
}

async fn in_time<T>(deadline: Duration, future: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    tokio::time::timeout(deadline, future).await.unwrap_or_else(|_| {
        let text = format!("no response within {}", humantime::format_duration(deadline));
        Err(io::Error::new(io::ErrorKind::TimedOut, text))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admin_state::AdminState;
    use crate::backend::state_override::{MAX_OVERRIDES, StateOverride};

    fn connections() -> (HandOverConnection, HandOverConnection) {
        let (one, other) = UnixStream::pair().unwrap();
        (HandOverConnection::new(one), HandOverConnection::new(other))
    }

    #[tokio::test]
    async fn messages_and_sockets_are_received_separately() {
        let (mut successor, mut predecessor) = connections();
        let own = vec![rustix::process::geteuid().as_raw()];
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        successor.write(&FromSuccessor::Send).await.unwrap();
        assert_eq!(predecessor.read::<FromSuccessor>(TRANSFER_DEADLINE).await.unwrap(), FromSuccessor::Send);
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
            assert_eq!(successor.read::<FromPredecessor>(TRANSFER_DEADLINE).await.unwrap(), go);
            assert_eq!(successor.read::<FromPredecessor>(TRANSFER_DEADLINE).await.unwrap(), retiring);
        };
        tokio::join!(writing, reading);
    }

    #[tokio::test(start_paused = true)]
    async fn missing_and_oversized_messages_are_errors() {
        let (one, mut other) = connections();
        let error = other.read::<FromSuccessor>(TRANSFER_DEADLINE).await.unwrap_err();
        assert_eq!(error.to_string(), "no response within 10s");
        drop(one);
        let (mut one, mut other) = connections();
        one.stream.write_all(&vec![b'x'; MAX_FIRST_MESSAGE as usize + 1]).await.unwrap();
        let read = other.read::<FromSuccessor>(TRANSFER_DEADLINE).await;
        assert_eq!(read.unwrap_err().to_string(), "the message is too long");
        let (one, mut other) = connections();
        drop(one);
        let error = other.read::<FromSuccessor>(TRANSFER_DEADLINE).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }
}
