//! The admin HTTP endpoint: `/metrics` for Prometheus, `/health` (the process runs) and `/ready` (it accepts sessions).
//!
//! The endpoint uses plain HTTP without authentication, so it must listen on a loopback or management address. It accepts only GET and HEAD,
//! and cannot change anything. A connection is closed after one response. Silent or slow clients cannot block others ([`connections`]).

mod connections;

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
use tokio::time;
use tokio_util::sync::CancellationToken;

use self::connections::{ConnectionTable, OpenConnection};
use crate::metrics::Metrics;

/// Timeout of a request's head.
const HEAD_TIMEOUT: Duration = Duration::from_secs(5);
/// Timeout of a whole connection, in which the client must send the head and read the response.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(20);
/// Maximum size of a request's head.
const MAX_HEAD: usize = 16 << 10;
/// The text format of Prometheus.
const METRICS_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// The admin endpoint on its listening socket.
#[derive(Debug)]
pub(crate) struct AdminEndpoint {
    socket: TcpListener,
    address: SocketAddr,
    state: Arc<State>,
}

#[derive(Debug)]
struct State {
    metrics: Arc<Metrics>,
    /// Cancelled when the process stops accepting sessions.
    stopping: CancellationToken,
}

impl AdminEndpoint {
    /// An endpoint on a listening socket. It responds while [`AdminEndpoint::run`] runs, and `/ready` fails after `stopping` is cancelled.
    ///
    /// # Errors
    /// The system cannot register the socket.
    pub(crate) fn new(
        socket: net::TcpListener,
        metrics: Arc<Metrics>,
        stopping: CancellationToken,
    ) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        let socket = TcpListener::from_std(socket)?;
        let address = socket.local_addr()?;
        Ok(Self { socket, address, state: Arc::new(State { metrics, stopping }) })
    }

    /// Duplicates the listening socket.
    ///
    /// # Errors
    /// The process has no free descriptor.
    pub(crate) fn copy(&self) -> io::Result<OwnedFd> {
        self.socket.as_fd().try_clone_to_owned()
    }

    /// The bound address.
    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Serves requests until `stop` is cancelled.
    pub(crate) async fn run(self, stop: CancellationToken) {
        let table = ConnectionTable::default();
        let accept = async {
            loop {
                match self.socket.accept().await {
                    Ok((socket, peer)) => {
                        let served = serve(socket, table.add(peer.ip()), self.state.clone());
                        let stop = stop.clone();
                        tokio::spawn(async move { stop.run_until_cancelled(served).await });
                        // Yield, so that a request that arrived with its connection is read before later connections can evict it.
                        tokio::task::yield_now().await;
                    }
                    Err(error) => {
                        tracing::error!(%error, "the admin endpoint could not accept a connection");
                        time::sleep(Duration::from_millis(100)).await;
                    }
                }
            }
        };
        stop.run_until_cancelled(accept).await;
    }
}

async fn serve(socket: TcpStream, connection: OpenConnection, state: Arc<State>) {
    let service = service_fn(|request: Request<Incoming>| {
        connection.mark_request_received();
        let response = respond(request.method(), request.uri().path(), &state);
        async move { Ok::<_, Infallible>(response) }
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_buf_size(MAX_HEAD)
        .keep_alive(false)
        .serve_connection(TokioIo::new(socket), service);
    tokio::select! {
        served = time::timeout(CONNECTION_TIMEOUT, served) => match served {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::debug!(%error, "an admin connection failed"),
            Err(_) => tracing::debug!("an admin connection took too long"),
        },
        () = connection.evicted() => tracing::debug!("an admin connection was closed in favor of a newer one"),
    }
}

fn respond(method: &Method, path: &str, state: &State) -> Response<Full<Bytes>> {
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
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;
    use crate::metrics::Names;

    #[test]
    fn status_depends_on_path_method_and_draining() {
        let state = State { metrics: Arc::new(Metrics::new(&Names::default())), stopping: CancellationToken::new() };
        let status = |method: Method, path: &str| respond(&method, path, &state).status().as_u16();
        assert_eq!(status(Method::GET, "/metrics"), 200);
        assert_eq!(status(Method::HEAD, "/health"), 200);
        assert_eq!(status(Method::GET, "/ready"), 200);
        assert_eq!(status(Method::POST, "/metrics"), 405);
        assert_eq!(status(Method::GET, "/"), 404);
        state.stopping.cancel();
        assert_eq!((status(Method::GET, "/ready"), status(Method::GET, "/health")), (503, 200));
    }

    #[tokio::test]
    async fn silent_and_slow_clients_do_not_delay_a_response() {
        const TIMEOUT: Duration = Duration::from_secs(10);
        let socket = net::TcpListener::bind("127.0.0.1:0").unwrap();
        let metrics = Arc::new(Metrics::new(&Names::default()));
        let admin = AdminEndpoint::new(socket, metrics, CancellationToken::new()).unwrap();
        let (address, stop) = (admin.address(), CancellationToken::new());
        let running = tokio::spawn(admin.run(stop.clone()));
        let mut hostile = Vec::new();
        for sent in ["", "GET /health HTTP/1.1\r\nHost: ", "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"] {
            for _ in 0..100 {
                let mut client = TcpStream::connect(address).await.unwrap();
                client.write_all(sent.as_bytes()).await.unwrap();
                hostile.push(client);
            }
            for path in ["/health", "/ready", "/metrics"] {
                let exchange = async {
                    let mut client = TcpStream::connect(address).await.unwrap();
                    client.write_all(format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n").as_bytes()).await.unwrap();
                    let mut response = String::new();
                    client.read_to_string(&mut response).await.unwrap();
                    response
                };
                let response = time::timeout(TIMEOUT, exchange).await.unwrap();
                assert!(response.starts_with("HTTP/1.1 200 OK\r\n"), "{path} after {sent:?}: {response}");
            }
        }
        stop.cancel();
        running.await.unwrap();
    }
}
