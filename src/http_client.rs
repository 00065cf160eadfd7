//! An HTTP client for one service: HTTP/1.1 or 2, connections that are kept, roots and headers of its own.
//!
//! It knows nothing of what is asked; deadlines are its callers'. Connects when it is first used. Called by `route`
//! and `policy`.

use std::path::PathBuf;
use std::time::Duration;

use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::header::HeaderMap;
use hyper::{Method, Request, Response, Uri};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use tokio::sync::OnceCell;
use tokio_rustls::rustls::ClientConfig;
use zeroize::Zeroizing;

use crate::config::{Config, Located, Problem};
use crate::tls;

/// An answer has no business being longer.
pub const MAX_BODY: usize = 64 * 1024;
/// A connection that nobody has used for this long is closed.
const IDLE: Duration = Duration::from_secs(60);

/// See the module.
pub struct HttpClient {
    url: Uri,
    headers: HeaderMap,
    tls: Option<ClientConfig>,
    connections: usize,
    client: OnceCell<Client<HttpsConnector<HttpConnector>, Full<Bytes>>>,
}

impl std::fmt::Debug for HttpClient {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Headers may hold what only the service shall know.
        f.debug_struct("HttpClient").field("url", &self.url).finish_non_exhaustive()
    }
}

impl HttpClient {
    /// For the service at `url`, whose certificate leads to a root in `ca` or in the system. `headers` go with every request;
    /// `connections` are kept while nobody needs them.
    ///
    /// # Errors
    /// A URL that is none, a `ca` that cannot be read.
    pub fn build(
        config: &Config,
        url: &Located<String>,
        ca: Option<&Located<PathBuf>>,
        headers: HeaderMap,
        connections: usize,
    ) -> Result<Self, Problem> {
        let parsed = url.value.parse::<Uri>();
        let parsed = parsed.map_err(|error| config.problem(&url.place, format!("the URL cannot be used: {error}")))?;
        let tls = (parsed.scheme_str() == Some("https"))
            .then(|| tls::client::verified(config, ca, &url.place))
            .transpose()?;
        Ok(Self { url: parsed, headers, tls, connections, client: OnceCell::new() })
    }

    /// As configured.
    pub fn url(&self) -> &Uri {
        &self.url
    }

    /// A request to the service's own URL.
    ///
    /// # Errors
    /// A sentence for the operator.
    pub fn request(&self, method: Method, body: Vec<u8>) -> Result<Request<Full<Bytes>>, String> {
        self.request_to(self.url.clone(), method, body)
    }

    /// A request to another path of it.
    ///
    /// # Errors
    /// A sentence for the operator.
    pub fn request_to(&self, url: Uri, method: Method, body: Vec<u8>) -> Result<Request<Full<Bytes>>, String> {
        let request = Request::builder().method(method).uri(url).body(Full::from(body));
        let mut request = request.map_err(|error| error.to_string())?;
        request.headers_mut().extend(self.headers.clone());
        Ok(request)
    }

    /// Sends it, and waits for the head of the answer.
    ///
    /// # Errors
    /// A sentence for the operator: what failed, and what caused it.
    pub async fn send(&self, request: Request<Full<Bytes>>) -> Result<Response<Incoming>, String> {
        let client = self.client.get_or_init(|| async { self.connect() }).await;
        client.request(request).await.map_err(|error| chain(&error))
    }

    fn connect(&self) -> Client<HttpsConnector<HttpConnector>, Full<Bytes>> {
        let mut tcp = HttpConnector::new();
        tcp.enforce_http(false);
        tcp.set_nodelay(true);
        let builder = HttpsConnectorBuilder::new();
        // Without TLS in the URL this configuration is never used.
        let tls = self.tls.clone().unwrap_or_else(tls::client::nobody);
        let connector = builder.with_tls_config(tls).https_or_http().enable_http1().enable_http2().wrap_connector(tcp);
        Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .timer(TokioTimer::new())
            .pool_idle_timeout(IDLE)
            .pool_max_idle_per_host(self.connections)
            .build(connector)
    }
}

/// The body of an answer, up to [`MAX_BODY`].
///
/// # Errors
/// A sentence for the operator.
pub async fn body(body: Incoming) -> Result<Zeroizing<Vec<u8>>, String> {
    let read = Limited::new(body, MAX_BODY).collect().await;
    read.map(|body| Zeroizing::new(body.to_bytes().to_vec())).map_err(|error| format!("the answer's body: {error}"))
}

/// An error and what caused it, in one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        text = format!("{text}: {inner}");
        cause = inner.source();
    }
    text.replace(char::is_control, " ")
}
