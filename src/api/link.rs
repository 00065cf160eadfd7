//! The connection between a process and its successor, once HTTP has been left: messages of one line, and descriptors.
//!
//! In order: the successor sends [`FromSuccessor::Send`], and receives the listening sockets; it sends
//! [`FromSuccessor::Ready`] when nothing is left that could fail but the start, and waits for [`FromPredecessor::Go`]; it
//! starts, takes the name of the control socket, sends [`FromSuccessor::Serving`], and waits for
//! [`FromPredecessor::Retiring`]. Both answers carry the administrative states of servers: with the first the successor starts,
//! and the second has what operators have changed since. Instead of each answer there may be [`FromPredecessor::Refused`]. A
//! connection that ends earlier is a hand-over that has failed.

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
pub(super) const PROTOCOL: &str = "vestibule-hand-over/1";
/// Maximum length of a message: all administrative states that there can be need less.
const MAX_MESSAGE: u64 = 8 * 1024 * 1024;
/// Maximum length of a message before the descriptors.
const MAX_FIRST_MESSAGE: u64 = 4 * 1024;
/// Size of the read buffer once no descriptors can follow a message.
const BUFFER: usize = 8 * 1024;
/// Timeout of sending or receiving all descriptors, and of one message that is not waited for.
pub(super) const TRANSFER_DEADLINE: Duration = Duration::from_secs(10);

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "step", rename_all = "kebab-case")]
pub(super) enum FromSuccessor {
    Send,
    Ready {
        version: String,
    },
    Serving {
        /// Addresses of sockets that the successor was handed and does not use.
        #[serde(default)]
        unused: Vec<SocketAddr>,
    },
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "step", rename_all = "kebab-case")]
pub(super) enum FromPredecessor {
    Go {
        /// Administrative states of servers.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        states: Vec<StoredOverride>,
    },
    Retiring {
        /// Administrative states of servers, which only the successor changes from now on.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        states: Vec<StoredOverride>,
    },
    Refused {
        text: String,
    },
}

/// One end of the connection.
pub(super) struct Link {
    stream: BufReader<UnixStream>,
    /// Maximum length of a message.
    most: u64,
}

impl Link {
    pub(super) fn new(stream: UnixStream) -> Self {
        // Byte by byte, because descriptors may follow a message.
        Self { stream: BufReader::with_capacity(1, stream), most: MAX_FIRST_MESSAGE }
    }

    pub(super) async fn write(&mut self, message: &impl Serialize) -> io::Result<()> {
        let mut line = serde_json::to_vec(message)?;
        line.push(b'\n');
        in_time(TRANSFER_DEADLINE, self.stream.write_all(&line)).await
    }

    /// The next message. Not to be used again after it was dropped unfinished.
    pub(super) async fn read<T: DeserializeOwned>(&mut self, deadline: Duration) -> io::Result<T> {
        let read = async {
            let mut line = Vec::new();
            let length = (&mut self.stream).take(self.most).read_until(b'\n', &mut line).await?;
            match line.pop() {
                Some(b'\n') => Ok(serde_json::from_slice(&line)?),
                Some(_) if length as u64 == self.most => {
                    Err(io::Error::new(io::ErrorKind::InvalidData, "the message is too long"))
                }
                _ => Err(io::ErrorKind::UnexpectedEof.into()),
            }
        };
        in_time(deadline, read).await
    }

    pub(super) async fn send_sockets(self, sockets: Vec<OwnedFd>, trusted: Vec<u32>) -> io::Result<Self> {
        self.transfer(move |stream| socket_handover::send(stream, &sockets, &trusted)).await.map(|(link, ())| link)
    }

    pub(super) async fn receive_sockets(self, trusted: Vec<u32>) -> io::Result<(Self, Vec<TcpListener>)> {
        self.transfer(move |stream| socket_handover::receive(stream, &trusted)).await
    }

    /// Runs `transfer`, after which no more descriptors come, on a thread of its own.
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
        Ok((Self { stream, most: MAX_MESSAGE }, result))
    }
}

async fn in_time<T>(deadline: Duration, future: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    tokio::time::timeout(deadline, future).await.unwrap_or_else(|_| {
        let text = format!("no answer within {}", humantime::format_duration(deadline));
        Err(io::Error::new(io::ErrorKind::TimedOut, text))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admin_state::AdminState;
    use crate::backend::state_override::{MAX_OVERRIDES, StateOverride};

    fn links() -> (Link, Link) {
        let (one, other) = UnixStream::pair().unwrap();
        (Link::new(one), Link::new(other))
    }

    #[tokio::test]
    async fn messages_and_sockets_do_not_mix() {
        let (mut successor, mut predecessor) = links();
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
    async fn a_message_that_does_not_come_or_does_not_end_is_an_error() {
        let (one, mut other) = links();
        let error = other.read::<FromSuccessor>(TRANSFER_DEADLINE).await.unwrap_err();
        assert_eq!(error.to_string(), "no answer within 10s");
        drop(one);
        let (mut one, mut other) = links();
        one.stream.write_all(&vec![b'x'; MAX_FIRST_MESSAGE as usize + 1]).await.unwrap();
        let read = other.read::<FromSuccessor>(TRANSFER_DEADLINE).await;
        assert_eq!(read.unwrap_err().to_string(), "the message is too long");
        let (one, mut other) = links();
        drop(one);
        let error = other.read::<FromSuccessor>(TRANSFER_DEADLINE).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }
}
