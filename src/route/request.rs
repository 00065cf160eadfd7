//! What a route lookup is made with: the user, and the login if the source decides by it.

use std::net::SocketAddr;
use std::sync::Arc;

use crate::identity::Credentials;

/// Input of a lookup.
#[derive(Debug, Clone)]
pub struct LookupRequest {
    /// The user's routing name.
    pub user: Arc<str>,
    /// The login attempt. `None` if the result is cached, because it must then depend on the user alone.
    pub login_context: Option<Arc<LoginContext>>,
}

/// One login attempt, for sources that decide by more than the user name.
#[derive(Debug)]
pub struct LoginContext {
    /// Address of the client.
    pub client: SocketAddr,
    /// Address that the client connected to.
    pub listener: SocketAddr,
    /// Whether both addresses come from a PROXY header.
    pub is_proxied: bool,
    /// Session id, for the logs of Vestibule and the source.
    pub session: Box<str>,
    /// TLS parameters of the client's connection; `None` without TLS.
    pub tls: Option<LoginTls>,
    /// Number of this attempt on its connection, starting from 1.
    pub attempt: u32,
    /// Credentials that the client sent.
    pub credentials: Credentials,
}

/// TLS parameters of a client's connection.
#[derive(Debug)]
pub struct LoginTls {
    /// Version, as in log records: `TLSv1.3`.
    pub version: &'static str,
    /// Cipher suite, as rustls spells it: `TLS13_AES_128_GCM_SHA256`.
    pub cipher: Option<&'static str>,
    /// Whether the listener requests client certificates.
    pub asks_certificate: bool,
    /// The verified client certificate, in DER.
    pub certificate: Option<Box<[u8]>>,
}
