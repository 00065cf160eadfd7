//! Between two plain sockets bytes need not enter this process: splice(2) moves them through a pipe in the kernel.
//!
//! Only while a transfer runs at full rounds: for a line of text the two calls and a copy of a read and a write are cheaper. One pipe a
//! worker; what a slow receiver leaves in it is taken out before another session's turn.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::pipe::{PipeFlags, SpliceFlags, fcntl_setpipe_size, pipe_with, splice};

use super::scratch::ROUND;
use crate::record_layer::MAX_PLAINTEXT;

/// Moved at most in one round, as with the other ways.
const LENGTH: usize = ROUND * MAX_PLAINTEXT;
/// The pipe has a slot for each page, and pages from a network card are seldom full: what any process may have.
const SIZE: usize = 1 << 20;

/// See the module.
#[derive(Debug)]
pub struct Pipe {
    out: OwnedFd,
    into: OwnedFd,
}

impl Pipe {
    pub(super) fn new() -> io::Result<Self> {
        let (out, into) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        // A smaller one works too.
        let _ = fcntl_setpipe_size(&into, SIZE);
        Ok(Self { out, into })
    }

    /// Takes what the socket has. 0: its end.
    pub(super) fn fill(&self, socket: impl AsFd) -> io::Result<usize> {
        Ok(splice(socket, None, &self.into, None, LENGTH, SpliceFlags::MOVE | SpliceFlags::NONBLOCK)?)
    }

    /// Gives the socket up to `length` bytes.
    pub(super) fn empty(&self, socket: impl AsFd, length: usize) -> io::Result<usize> {
        Ok(splice(&self.out, None, socket, None, length, SpliceFlags::MOVE | SpliceFlags::NONBLOCK)?)
    }

    /// Takes `length` bytes out, which are in it, to the end of `to`.
    pub(super) fn take(&self, length: usize, to: &mut Vec<u8>) -> io::Result<()> {
        let mut at = to.len();
        to.resize(at + length, 0);
        while at < to.len() {
            match rustix::io::read(&self.out, &mut to[at..])? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                read => at += read,
            }
        }
        Ok(())
    }
}
