//! The sockets that a relay accepts: TCP, and pipes in memory in tests.

use std::io::{self, IoSliceMut};

use tokio::io::{AsyncRead, AsyncWrite, Interest};
use tokio::net::TcpStream;

use super::pipe::Pipe;

/// What a leg needs from a socket beyond reading and writing.
pub(crate) trait Socket: AsyncRead + AsyncWrite + Unpin {
    /// Reads bytes that have arrived into several buffers.
    ///
    /// # Errors
    /// `WouldBlock`: no bytes have arrived.
    fn try_read_vectored(&self, buffers: &mut [IoSliceMut<'_>]) -> io::Result<usize>;

    /// Moves bytes that have arrived into the pipe. Returns 0 at the end of the stream.
    ///
    /// # Errors
    /// `WouldBlock`: no bytes have arrived. Any other error: this socket does not support it.
    fn try_read_to_pipe(&self, pipe: &Pipe) -> io::Result<usize>;

    /// Sends bytes from the pipe.
    ///
    /// # Errors
    /// `WouldBlock`: the peer accepts none at present.
    fn try_write_from_pipe(&self, pipe: &Pipe, length: usize) -> io::Result<usize>;
}

impl Socket for TcpStream {
    fn try_read_vectored(&self, buffers: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        self.try_read_vectored(buffers)
    }

    fn try_read_to_pipe(&self, pipe: &Pipe) -> io::Result<usize> {
        self.try_io(Interest::READABLE, || pipe.read_from(self))
    }

    fn try_write_from_pipe(&self, pipe: &Pipe, length: usize) -> io::Result<usize> {
        self.try_io(Interest::WRITABLE, || pipe.write_to(self, length))
    }
}
