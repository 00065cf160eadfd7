//! Limits the bytes that an HTTP/1 server may send for one request.
//!
//! hyper skips informational responses (RFC 9110 section 15.2) without limiting their number. A connection is therefore
//! closed when more than [`MAX_RESPONSE`] bytes have arrived since the last write, which is the last part of the request.
//! HTTP/2 is not limited here: it has its own limits, and a connection carries many responses at once.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use futures_util::future::BoxFuture;
use hyper::Uri;
use hyper::rt::{Read, ReadBuf, ReadBufCursor, Write};
use hyper_util::client::legacy::connect::{Connected, Connection};
use tower_service::Service;

/// Maximum number of bytes per request: head, body with the overhead of small chunks, and informational responses.
const MAX_RESPONSE: usize = 512 * 1024;
/// Maximum number of bytes per read.
const MAX_READ: usize = 8 * 1024;

/// Limits the connections of another connector.
#[derive(Debug, Clone)]
pub(super) struct LimitedConnector<C>(pub C);

impl<C> Service<Uri> for LimitedConnector<C>
where
    C: Service<Uri>,
    C::Response: Connection,
    C::Future: Send + 'static,
{
    type Response = LimitedStream<C::Response>;
    type Error = C::Error;
    type Future = BoxFuture<'static, Result<Self::Response, C::Error>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), C::Error>> {
        self.0.poll_ready(context)
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let connecting = self.0.call(uri);
        Box::pin(async move { connecting.await.map(LimitedStream::new) })
    }
}

/// A connection with a limit of bytes per request.
#[derive(Debug)]
pub(super) struct LimitedStream<S> {
    inner: S,
    /// Bytes that may be read before the next write; `None` with HTTP/2.
    left: Option<usize>,
}

impl<S: Connection> LimitedStream<S> {
    fn new(inner: S) -> Self {
        let left = (!inner.connected().is_negotiated_h2()).then_some(MAX_RESPONSE);
        Self { inner, left }
    }
}

impl<S> LimitedStream<S> {
    fn reset_after_write(&mut self, written: &Poll<io::Result<usize>>) {
        if let (Some(left), Poll::Ready(Ok(1..))) = (&mut self.left, written) {
            *left = MAX_RESPONSE;
        }
    }
}

impl<S: Read + Unpin> Read for LimitedStream<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        mut to: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        let Some(left) = &mut this.left else { return Pin::new(&mut this.inner).poll_read(context, to) };
        if *left == 0 {
            return Poll::Ready(Err(io::Error::other("the server sent more than 512 KiB for one request")));
        }
        let space = to.remaining().min(*left).min(MAX_READ);
        // Read into a local buffer first: the cursor of the caller does not show how much was read into it.
        let mut bytes = [0; MAX_READ];
        let mut part = ReadBuf::new(&mut bytes[..space]);
        ready!(Pin::new(&mut this.inner).poll_read(context, part.unfilled()))?;
        *left -= part.filled().len();
        to.put_slice(part.filled());
        Poll::Ready(Ok(()))
    }
}

impl<S: Write + Unpin> Write for LimitedStream<S> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.inner).poll_write(context, bytes);
        self.reset_after_write(&written);
        written
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(context)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.inner).poll_write_vectored(context, parts);
        self.reset_after_write(&written);
        written
    }
}

impl<S: Connection> Connection for LimitedStream<S> {
    fn connected(&self) -> Connected {
        self.inner.connected()
    }
}
