//! An HTTP client for one service: HTTP/1.1 or HTTP/2, persistent connections, its own root certificates and headers.
//!
//! It connects for the first request. The caller sets deadlines. [`Repeat`] decides whether a request without an answer
//! over an existing connection is sent once more over a new one.

use std::path::PathBuf;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::header::HeaderMap;
use hyper::http::response::Parts;
use hyper::{Method, Request, Uri};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::{HttpConnector, capture_connection};
use hyper_util::rt::{TokioExecutor, TokioTimer};
use tokio_rustls::rustls::ClientConfig;
use zeroize::Zeroizing;

use crate::config::{Located, Problem};
use crate::lookup::hedge::{Budget, DiscardUnlessAnswered, SharedConnection, hedged};
use crate::lookup::limited_http::LimitedConnector;
use crate::lookup::tcp_liveness;
use crate::tls;

/// Maximum length of a response body.
pub(crate) const MAX_BODY: usize = 64 * 1024;
/// Maximum size of the read buffer of an HTTP/1 connection, which limits the response head.
const MAX_BUFFER: usize = 64 * 1024;
/// A connection that has been idle for this long is closed.
const IDLE_TIMEOUT: Duration = Duration::from_secs(60);
/// An HTTP/2 connection is closed if a PING is not answered within this time.
const PING_TIMEOUT: Duration = Duration::from_secs(10);

/// A client for one service.
pub(crate) struct HttpClient {
    url: Uri,
    headers: HeaderMap,
    tls: Option<ClientConfig>,
    connections: usize,
    pools: SharedConnection<Pool>,
}

/// Connections to the service. A pool of which one connection has failed is replaced as a whole.
struct Pool {
    client: Client<LimitedConnector<HttpsConnector<HttpConnector>>, Full<Bytes>>,
    /// Whether a connection has carried an answer: only then a connection may be idle.
    has_answered: AtomicBool,
}

/// When a request over an existing connection is sent once more over a new one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Repeat {
    /// If the connection fails, or after half of the remaining time without an answer (see `hedge`). The service may receive the
    /// request twice.
    IfUnanswered,
    /// If the connection fails before a response begins. For requests that count as login attempts: a slow service must
    /// not count an attempt twice.
    IfConnectionFails,
    Never,
}

/// Error of a request.
struct RequestError {
    text: String,
    /// Whether a response had begun.
    is_answered: bool,
}

/// A response with its whole body.
type Response = (Parts, Zeroizing<Vec<u8>>);

impl std::fmt::Debug for HttpClient {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The headers may contain secrets.
        f.debug_struct("HttpClient").field("url", &self.url).finish_non_exhaustive()
    }
}

impl HttpClient {
    /// Creates a client for the service at `url`, whose certificate is verified with the roots in `ca` or those of the system. `headers`
    /// are added to every request; at most `connections` stay open while idle.
    ///
    /// # Errors
    /// An invalid URL, or a `ca` that cannot be read.
    pub(crate) fn build(
        url: &Located<String>,
        ca: Option<&Located<PathBuf>>,
        headers: HeaderMap,
        connections: usize,
    ) -> Result<Self, Problem> {
        let parsed = url.value.parse::<Uri>();
        let parsed = parsed.map_err(|error| url.location.problem(format!("invalid URL: {error}")))?;
        let tls = (parsed.scheme_str() == Some("https"))
            .then(|| tls::upstream::verified_config(ca, &url.location))
            .transpose()?;
        Ok(Self { url: parsed, headers, tls, connections, pools: SharedConnection::default() })
    }

    pub(crate) fn url(&self) -> &Uri {
        &self.url
    }

    /// Creates a request to the URL of the service.
    ///
    /// # Errors
    /// A message for the operator.
    pub(crate) fn request(&self, method: Method, body: Vec<u8>) -> Result<Request<Full<Bytes>>, String> {
        self.request_to(self.url.clone(), method, body)
    }

    /// Creates a request to another URL of the service.
    ///
    /// # Errors
    /// A message for the operator.
    pub(crate) fn request_to(&self, url: Uri, method: Method, body: Vec<u8>) -> Result<Request<Full<Bytes>>, String> {
        let request = Request::builder().method(method).uri(url).body(Full::from(body));
        let mut request = request.map_err(|error| error.to_string())?;
        request.headers_mut().extend(self.headers.clone());
        Ok(request)
    }

    /// Sends a request and reads the response, up to [`MAX_BODY`]. The caller ends it at the deadline of `budget`.
    ///
    /// # Errors
    /// A message for the operator: the failure and its causes.
    pub(crate) async fn fetch(
        &self,
        request: Request<Full<Bytes>>,
        budget: &Budget,
        repeat: Repeat,
    ) -> Result<Response, String> {
        let pool = self.current_pool();
        let is_reused = pool.has_answered.load(Ordering::Relaxed);
        let answer = match repeat {
            Repeat::IfUnanswered if is_reused => {
                let second = self.exchange_again(&pool, request.clone(), budget);
                let first = exchange(&pool, request.clone(), budget);
                hedged(first, budget.patience(), second, || self.pools.discard(&pool)).await
            }
            Repeat::IfConnectionFails if is_reused => match self.exchange_once(&pool, request.clone(), budget).await {
                Err(error) if !error.is_answered => self.exchange_once(&self.current_pool(), request, budget).await,
                other => other,
            },
            _ => self.exchange_once(&pool, request, budget).await,
        };
        answer.map_err(|error| error.text)
    }

    /// Closes all idle connections.
    pub(crate) fn retire(&self) {
        self.pools.clear();
    }

    /// Sends the request once over `pool`. If this fails or is dropped, the pool is discarded, because no second attempt could show that
    /// its connections are dead.
    async fn exchange_once(
        &self,
        pool: &Arc<Pool>,
        request: Request<Full<Bytes>>,
        budget: &Budget,
    ) -> Result<Response, RequestError> {
        let mut on_drop = DiscardUnlessAnswered { discard: Some(|| self.pools.discard(pool)) };
        let answer = exchange(pool, request, budget).await?;
        on_drop.discard = None;
        Ok(answer)
    }

    /// Makes the second attempt, over other connections than those of `old`.
    async fn exchange_again(
        &self,
        old: &Arc<Pool>,
        request: Request<Full<Bytes>>,
        budget: &Budget,
    ) -> Result<Response, RequestError> {
        let pool = self.pools.other_than(old).unwrap_or_else(|| self.put_pool());
        let mut on_drop = DiscardUnlessAnswered { discard: Some(|| self.pools.discard_spare(&pool)) };
        let answer = exchange(&pool, request, budget).await.inspect_err(|_| self.pools.discard(&pool))?;
        on_drop.discard = None;
        Ok(answer)
    }

    fn current_pool(&self) -> Arc<Pool> {
        self.pools.current().unwrap_or_else(|| self.put_pool())
    }

    fn put_pool(&self) -> Arc<Pool> {
        let pool = Arc::new(self.new_pool());
        self.pools.put(pool.clone());
        pool
    }

    fn new_pool(&self) -> Pool {
        let mut tcp = HttpConnector::new();
        tcp.enforce_http(false);
        tcp.set_nodelay(true);
        tcp.set_keepalive(Some(tcp_liveness::IDLE));
        tcp.set_keepalive_interval(Some(tcp_liveness::INTERVAL));
        tcp.set_keepalive_retries(Some(tcp_liveness::RETRIES));
        tcp.set_tcp_user_timeout(Some(tcp_liveness::USER_TIMEOUT));
        let builder = HttpsConnectorBuilder::new();
        // Never used if the URL does not use TLS.
        let tls = self.tls.clone().unwrap_or_else(tls::upstream::config_without_roots);
        let connector = builder.with_tls_config(tls).https_or_http().enable_http1().enable_http2().wrap_connector(tcp);
        let client = Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .timer(TokioTimer::new())
            .pool_idle_timeout(IDLE_TIMEOUT)
            .pool_max_idle_per_host(self.connections)
            .http2_keep_alive_interval(tcp_liveness::IDLE)
            .http2_keep_alive_timeout(PING_TIMEOUT)
            .http2_keep_alive_while_idle(true)
            .http1_max_buf_size(MAX_BUFFER)
            .build(LimitedConnector(connector));
        Pool { client, has_answered: AtomicBool::new(false) }
    }
}

async fn exchange(pool: &Pool, mut request: Request<Full<Bytes>>, budget: &Budget) -> Result<Response, RequestError> {
    let mut connection = capture_connection(&mut request);
    let mut response = pin!(pool.client.request(request));
    let response = tokio::select! {
        biased;
        response = &mut response => response,
        () = budget.connecting(async { drop(connection.wait_for_connection_metadata().await) }) => response.await,
    };
    let (head, body) =
        response.map_err(|error| RequestError { text: with_causes(&error), is_answered: false })?.into_parts();
    let body = read_body(body).await.map_err(|text| RequestError { text, is_answered: true })?;
    pool.has_answered.store(true, Ordering::Relaxed);
    Ok((head, body))
}

/// Reads the body of a response, up to [`MAX_BODY`].
async fn read_body(body: Incoming) -> Result<Zeroizing<Vec<u8>>, String> {
    let collected = Limited::new(body, MAX_BODY).collect().await;
    collected.map(|body| Zeroizing::new(body.to_bytes().to_vec())).map_err(|error| format!("response body: {error}"))
}

/// Formats an error and its causes as one line.
fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        text = format!("{text}: {inner}");
        cause = inner.source();
    }
    text.replace(char::is_control, " ")
}
