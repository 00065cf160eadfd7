//! Listening sockets from another process: from systemd at the start, or from the predecessor.
//!
//! The kernel queues connections as long as any process has the socket open, so none is refused during a handover. Descriptors
//! are sent with SCM_RIGHTS over a Unix socket; the process at the other end must run as a trusted user. This module does not know
//! what a socket is for: the caller matches its address with the configuration.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::net::TcpListener;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    recvmsg, sendmsg, sockopt,
};

/// Number of descriptors in one message. The kernel's limit is 253.
const BATCH: usize = 64;
/// Maximum number of sockets: a large number of ports times workers.
const MAX_SOCKETS: usize = 65_536;

/// Returns the sockets that systemd has opened for this process (`LISTEN_FDS`, sd_listen_fds(3)).
pub(crate) fn from_systemd() -> Vec<TcpListener> {
    let mut given = listenfd::ListenFd::from_env();
    let mut sockets = Vec::new();
    for index in 0..given.len() {
        match given.take_tcp_listener(index) {
            Ok(Some(socket)) => {
                // A retired process may have attached a filter that drops new connections.
                let _ = socket2::SockRef::from(&socket).detach_filter();
                sockets.push(socket);
            }
            Ok(None) => {}
            Err(error) => tracing::warn!(index, %error, "descriptor from systemd ignored: not a listening TCP socket"),
        }
    }
    sockets
}

/// Sends `sockets`: their number first, then the descriptors. Blocks.
///
/// # Errors
/// The connection fails, or the user of the other process is not in `trusted`.
pub(crate) fn send(stream: &UnixStream, sockets: &[OwnedFd], trusted: &[u32]) -> io::Result<()> {
    check_user(stream, trusted)?;
    let count = u32::try_from(sockets.len()).map_err(io::Error::other)?.to_be_bytes();
    sendmsg(stream, &[IoSlice::new(&count)], &mut SendAncillaryBuffer::default(), SendFlags::NOSIGNAL)?;
    let borrowed: Vec<BorrowedFd<'_>> = sockets.iter().map(OwnedFd::as_fd).collect();
    for batch in borrowed.chunks(BATCH) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(BATCH))];
        let mut rights = SendAncillaryBuffer::new(&mut space);
        rights.push(SendAncillaryMessage::ScmRights(batch));
        sendmsg(stream, &[IoSlice::new(b"+")], &mut rights, SendFlags::NOSIGNAL)?;
    }
    Ok(())
}

/// Receives the sockets that [`send`] sends. Blocks.
///
/// # Errors
/// The connection fails, the user of the other process is not in `trusted`, or it sends something else.
pub(crate) fn receive(stream: &UnixStream, trusted: &[u32]) -> io::Result<Vec<TcpListener>> {
    check_user(stream, trusted)?;
    let invalid = || io::Error::new(io::ErrorKind::InvalidData, "invalid handover of sockets");
    let mut count = [0; 4];
    let mut sockets = Vec::new();
    let mut none = RecvAncillaryBuffer::default();
    let read = recvmsg(stream, &mut [IoSliceMut::new(&mut count)], &mut none, RecvFlags::CMSG_CLOEXEC)?.bytes;
    let expected = u32::from_be_bytes(count) as usize;
    if read != count.len() || expected > MAX_SOCKETS {
        return Err(invalid());
    }
    while sockets.len() < expected {
        let mut byte = [0];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(BATCH))];
        let mut rights = RecvAncillaryBuffer::new(&mut space);
        let read = recvmsg(stream, &mut [IoSliceMut::new(&mut byte)], &mut rights, RecvFlags::CMSG_CLOEXEC)?.bytes;
        let before = sockets.len();
        for message in rights.drain() {
            if let RecvAncillaryMessage::ScmRights(descriptors) = message {
                sockets.extend(descriptors.map(TcpListener::from));
            }
        }
        if read == 0 || sockets.len() == before {
            return Err(invalid());
        }
    }
    Ok(sockets)
}

/// Checks the user of the process at the other end. For the side that connected, this is the user that the other side had when
/// it called `listen`.
fn check_user(stream: &UnixStream, trusted: &[u32]) -> io::Result<()> {
    let other = sockopt::socket_peercred(stream)?.uid.as_raw();
    if trusted.contains(&other) {
        Ok(())
    } else {
        let text = format!("the other process runs as another user (uid {other})");
        Err(io::Error::new(io::ErrorKind::PermissionDenied, text))
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::net::{SocketAddr, TcpStream};

    use super::*;

    fn own() -> [u32; 1] {
        [rustix::process::geteuid().as_raw()]
    }

    #[test]
    fn untrusted_user_neither_receives_nor_sends_sockets() {
        let (one, other) = UnixStream::pair().unwrap();
        let others = [own()[0] + 1];
        assert_eq!(send(&one, &[], &others).unwrap_err().kind(), io::ErrorKind::PermissionDenied);
        assert_eq!(receive(&other, &others).unwrap_err().kind(), io::ErrorKind::PermissionDenied);
    }

    #[test]
    fn received_sockets_continue_to_listen() {
        let (one, other) = UnixStream::pair().unwrap();
        // More than one batch.
        let listeners: Vec<TcpListener> = (0..BATCH + 3).map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect();
        let addresses: Vec<SocketAddr> = listeners.iter().map(|listener| listener.local_addr().unwrap()).collect();
        // Connected before the transfer, accepted after it.
        let _early = TcpStream::connect(addresses[0]).unwrap();
        let sent: Vec<OwnedFd> = listeners.into_iter().map(OwnedFd::from).collect();
        send(&one, &sent, &own()).unwrap();
        drop(sent);
        let received = receive(&other, &own()).unwrap();
        let found: Vec<SocketAddr> = received.iter().map(|listener| listener.local_addr().unwrap()).collect();
        assert_eq!(found, addresses);
        assert!(received[0].accept().is_ok());
    }

    #[test]
    fn invalid_messages_are_refused() {
        for junk in [&b"GET /"[..], b"\0\0", b"\xff\xff\xff\xff", b"\0\0\0\x01+"] {
            let (mut one, other) = UnixStream::pair().unwrap();
            one.write_all(junk).unwrap();
            drop(one);
            assert!(receive(&other, &own()).is_err(), "{junk:?}");
        }
    }
}
