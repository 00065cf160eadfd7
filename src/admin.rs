//! The operator's HTTP endpoint: `/metrics` for Prometheus, `/health` (the process runs), `/ready` (it takes sessions).
//!
//! Plain HTTP without authentication, so it belongs on a loopback or management address; it answers GET and HEAD and
//! changes nothing. Called by `server`.

use std::convert::Infallible;
use std::io;
use std::net::{self, SocketAddr};
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{ALLOW, CONTENT_TYPE};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use crate::metrics::Metrics;

/// A scraper needs one; more than this is a mistake or an attack.
const MAX_CONNECTIONS: usize = 64;
/// For the request's head, and so for an idle kept-alive connection too.
const HEAD_DEADLINE: Duration = Duration::from_secs(30);
/// The text format of Prometheus.
const METRICS_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// The endpoint.
#[derive(Debug)]
pub struct Admin {
    socket: TcpListener,
    address: SocketAddr,
    state: Arc<State>,
}

#[derive(Debug)]
struct State {
    metrics: Arc<Metrics>,
    /// Whether sessions are to be sent elsewhere.
    stopping: CancellationToken,
}

impl Admin {
    /// An endpoint on a socket that listens; it answers once [`Admin::run`] runs, and is not ready from `stopping` on.
    ///
    /// # Errors
    /// The system cannot register the socket.
    pub fn new(socket: net::TcpListener, metrics: Arc<Metrics>, stopping: CancellationToken) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        let socket = TcpListener::from_std(socket)?;
        let address = socket.local_addr()?;
        Ok(Self { socket, address, state: Arc::new(State { metrics, stopping }) })
    }

    /// A copy of the socket.
    ///
    /// # Errors
    /// The system has no descriptor for it.
    pub fn copy(&self) -> io::Result<OwnedFd> {
        self.socket.as_fd().try_clone_to_owned()
    }

    /// As bound.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Serves until `stop`.
    pub async fn run(self, stop: CancellationToken) {
        let permits = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        let accept = async {
            loop {
                // The semaphore is never closed.
                let Ok(permit) = permits.clone().acquire_owned().await else { return };
                match self.socket.accept().await {
                    Ok((socket, _)) => {
                        let served = serve(socket, self.state.clone());
                        let stop = stop.clone();
                        tokio::spawn(async move {
                            stop.run_until_cancelled(served).await;
                            drop(permit);
                        });
                    }
                    Err(error) => {
                        tracing::error!(%error, "the admin endpoint could not accept a connection");
                        tokio::time::sleep(Duration::from_millis(100)).await;
                    }
                }
            }
        };
        stop.run_until_cancelled(accept).await;
    }
}

async fn serve(socket: TcpStream, state: Arc<State>) {
    let service = service_fn(move |request: Request<Incoming>| {
        let response = answer(request.method(), request.uri().path(), &state);
        async move { Ok::<_, Infallible>(response) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_DEADLINE)
        .serve_connection(TokioIo::new(socket), service);
    if let Err(error) = connection.await {
        tracing::debug!(%error, "an admin connection failed");
    }
}

fn answer(method: &Method, path: &str, state: &State) -> Response<Full<Bytes>> {
    if !matches!(*method, Method::GET | Method::HEAD) {
        let mut response = text(StatusCode::METHOD_NOT_ALLOWED, "only GET and HEAD\n");
        response.headers_mut().insert(ALLOW, hyper::header::HeaderValue::from_static("GET, HEAD"));
        return response;
    }
    match path {
        "/metrics" => {
            let mut response = text(StatusCode::OK, state.metrics.render());
            response.headers_mut().insert(CONTENT_TYPE, hyper::header::HeaderValue::from_static(METRICS_TYPE));
            response
        }
        "/health" => text(StatusCode::OK, "ok\n"),
        "/ready" if state.stopping.is_cancelled() => text(StatusCode::SERVICE_UNAVAILABLE, "draining\n"),
        "/ready" => text(StatusCode::OK, "ok\n"),
        _ => text(StatusCode::NOT_FOUND, "there is /metrics, /health and /ready\n"),
    }
}

fn text(status: StatusCode, body: impl Into<Bytes>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, hyper::header::HeaderValue::from_static("text/plain; charset=utf-8"));
    response
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::Names;

    #[test]
    fn each_path_has_its_answer() {
        let state = State { metrics: Arc::new(Metrics::new(&Names::default())), stopping: CancellationToken::new() };
        let status = |method: Method, path: &str| answer(&method, path, &state).status().as_u16();
        assert_eq!(status(Method::GET, "/metrics"), 200);
        assert_eq!(status(Method::HEAD, "/health"), 200);
        assert_eq!(status(Method::GET, "/ready"), 200);
        assert_eq!(status(Method::POST, "/metrics"), 405);
        assert_eq!(status(Method::GET, "/"), 404);
        state.stopping.cancel();
        assert_eq!((status(Method::GET, "/ready"), status(Method::GET, "/health")), (503, 200));
    }
}
