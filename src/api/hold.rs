//! An answer that is not over until whoever reads it goes away: as long, a user's logins wait.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};

use hyper::body::{Body, Bytes, Frame};

use super::commands::HoldEverywhere;

/// One line, and then nothing; dropped when the connection is.
pub(super) struct Held {
    line: Option<Bytes>,
    _hold: HoldEverywhere,
}

impl Held {
    pub(super) fn new(line: Bytes, hold: HoldEverywhere) -> Self {
        Self { line: Some(line), _hold: hold }
    }
}

impl Body for Held {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        // Never woken: the connection notices its end by reading.
        self.line.take().map_or(Poll::Pending, |line| Poll::Ready(Some(Ok(Frame::data(line)))))
    }
}
