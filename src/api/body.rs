//! Bodies of responses that are sent in parts, or that stay open.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};

use hyper::body::{Body, Bytes, Frame};
use tokio::sync::mpsc;

/// Sends each line as soon as it arrives on the channel, and ends when the sender is dropped.
pub(super) struct LinesBody(pub(super) mpsc::Receiver<Bytes>);

impl Body for LinesBody {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        self.0.poll_recv(context).map(|line| line.map(|line| Ok(Frame::data(line))))
    }
}

/// Sends one line and stays open, so that `guard` is dropped when the client closes the connection.
pub(super) struct HoldBody<G> {
    line: Option<Bytes>,
    _guard: G,
}

impl<G> HoldBody<G> {
    pub(super) fn new(line: Bytes, guard: G) -> Self {
        Self { line: Some(line), _guard: guard }
    }
}

impl<G: Unpin> Body for HoldBody<G> {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        // Without a waker: hyper notices a closed connection because it also reads from it.
        self.line.take().map_or(Poll::Pending, |line| Poll::Ready(Some(Ok(Frame::data(line)))))
    }
}
