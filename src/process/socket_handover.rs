//! Listening sockets that are handed over: by systemd at the start, by a process to its successor while it runs.
//!
//! A socket goes on collecting connections whoever holds it, so none is refused while one process takes another's place.
//! Descriptors travel as SCM_RIGHTS over a Unix socket; the process at the other end must belong to a trusted user. This module
//! knows sockets only: what they are for, their addresses tell. Called by `main` and `control`.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::net::TcpListener;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    recvmsg, sendmsg, sockopt,
};

/// Descriptors of one message; the kernel takes up to 253.
const BATCH: usize = 64;
/// More would be no listening sockets of ours: ports times workers.
const MOST: usize = 65_536;

/// Sockets that systemd has opened for us (`LISTEN_FDS`, sd_listen_fds(3)); none where it has not.
pub(crate) fn of_systemd() -> Vec<TcpListener> {
    let mut given = listenfd::ListenFd::from_env();
    let mut sockets = Vec::new();
    for index in 0..given.len() {
        match given.take_tcp_listener(index) {
            Ok(Some(socket)) => {
                // A process that gave way to its successor may have left a filter that drops new connections.
                let _ = socket2::SockRef::from(&socket).detach_filter();
                sockets.push(socket);
            }
            Ok(None) => {}
            Err(error) => tracing::warn!(index, %error, "systemd gave a descriptor that is no listening TCP socket"),
        }
    }
    sockets
}

/// Sends `sockets` to a successor: their number first, then the descriptors. Blocks.
///
/// # Errors
/// The other end is gone, or belongs to a user that is not in `trusted`.
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

/// What [`send`] sends. Blocks.
///
/// # Errors
/// The other end is gone, belongs to a user that is not in `trusted`, or sends something else.
pub(crate) fn receive(stream: &UnixStream, trusted: &[u32]) -> io::Result<Vec<TcpListener>> {
    check_user(stream, trusted)?;
    let strange = || io::Error::new(io::ErrorKind::InvalidData, "that is no hand-over of sockets");
    let mut count = [0; 4];
    let mut sockets = Vec::new();
    let mut none = RecvAncillaryBuffer::default();
    let read = recvmsg(stream, &mut [IoSliceMut::new(&mut count)], &mut none, RecvFlags::CMSG_CLOEXEC)?.bytes;
    let wanted = u32::from_be_bytes(count) as usize;
    if read != count.len() || wanted > MOST {
        return Err(strange());
    }
    while sockets.len() < wanted {
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
            return Err(strange());
        }
    }
    Ok(sockets)
}

/// Refuses a peer of a user that is not trusted. For the side that connected this is the user that the other side had when it
/// began to listen.
fn check_user(stream: &UnixStream, trusted: &[u32]) -> io::Result<()> {
    let other = sockopt::socket_peercred(stream)?.uid.as_raw();
    if trusted.contains(&other) {
        Ok(())
    } else {
        let text = format!("the other process belongs to another user (uid {other})");
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
    fn sockets_are_neither_given_to_nor_taken_from_a_user_that_is_not_trusted() {
        let (one, other) = UnixStream::pair().unwrap();
        let others = [own()[0] + 1];
        assert_eq!(send(&one, &[], &others).unwrap_err().kind(), io::ErrorKind::PermissionDenied);
        assert_eq!(receive(&other, &others).unwrap_err().kind(), io::ErrorKind::PermissionDenied);
    }

    #[test]
    fn sockets_arrive_and_go_on_listening() {
        let (one, other) = UnixStream::pair().unwrap();
        // More than one batch.
        let listeners: Vec<TcpListener> = (0..BATCH + 3).map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect();
        let addresses: Vec<SocketAddr> = listeners.iter().map(|listener| listener.local_addr().unwrap()).collect();
        // Connected before, accepted after.
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
    fn what_is_no_hand_over_is_refused() {
        for junk in [&b"GET /"[..], b"\0\0", b"\xff\xff\xff\xff", b"\0\0\0\x01+"] {
            let (mut one, other) = UnixStream::pair().unwrap();
            one.write_all(junk).unwrap();
            drop(one);
            assert!(receive(&other, &own()).is_err(), "{junk:?}");
        }
    }
}
