//! Moves bytes between two plain sockets with splice(2) through a pipe in the kernel, so that they do not enter this process.
//!
//! It is used only while a transfer runs at full rounds: for a line of text, a read and a write cost less than two splice calls.
//! Each worker has one pipe. What a slow receiver leaves in it is taken out before the turn of another session.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::pipe::{PipeFlags, SpliceFlags, fcntl_setpipe_size, pipe_with, splice};

use super::MAX_ROUND;
use crate::record_layer::MAX_PLAINTEXT;

/// Maximum number of bytes that one call moves, as in a round of TLS records.
const MAX_MOVED: usize = MAX_ROUND * MAX_PLAINTEXT;
/// Size of the pipe, the largest that any process may have. The pipe has a slot for each page, and pages from a network card are
/// seldom full.
const SIZE: usize = 1 << 20;

#[derive(Debug)]
pub(crate) struct Pipe {
    reader: OwnedFd,
    writer: OwnedFd,
}

impl Pipe {
    pub(super) fn new() -> io::Result<Self> {
        let (reader, writer) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        // If the system does not permit this size, a smaller pipe works too.
        let _ = fcntl_setpipe_size(&writer, SIZE);
        Ok(Self { reader, writer })
    }

    /// Moves bytes that have arrived at the socket into the pipe. Returns 0 at the end of the stream.
    pub(super) fn read_from(&self, socket: impl AsFd) -> io::Result<usize> {
        Ok(splice(socket, None, &self.writer, None, MAX_MOVED, SpliceFlags::MOVE | SpliceFlags::NONBLOCK)?)
    }

    /// Moves up to `length` bytes from the pipe to the socket.
    pub(super) fn write_to(&self, socket: impl AsFd, length: usize) -> io::Result<usize> {
        Ok(splice(&self.reader, None, socket, None, length, SpliceFlags::MOVE | SpliceFlags::NONBLOCK)?)
    }

    /// Reads exactly `length` bytes, which are in the pipe, and appends them to `buffer`.
    pub(super) fn drain_to(&self, length: usize, buffer: &mut Vec<u8>) -> io::Result<()> {
        let mut filled = buffer.len();
        buffer.resize(filled + length, 0);
        while filled < buffer.len() {
            match rustix::io::read(&self.reader, &mut buffer[filled..])? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                read => filled += read,
            }
        }
        Ok(())
    }
}
