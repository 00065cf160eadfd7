//! What a source is asked. Made by `session` for a login, and by the command `route`.

use std::net::SocketAddr;
use std::sync::Arc;

use crate::identity::Credentials;

/// A question to a source.
#[derive(Debug, Clone)]
pub struct LookupRequest {
    /// The user's routing name.
    pub user: Arc<str>,
    /// Who asks. Absent where the answer is kept for others: it may depend on nothing but the user then.
    pub login_context: Option<Arc<LoginContext>>,
}

/// One login attempt, for sources that decide by more than the user.
#[derive(Debug)]
pub struct LoginContext {
    /// The client.
    pub client: SocketAddr,
    /// Where it connected to.
    pub listener: SocketAddr,
    /// Whether both addresses are those of a PROXY header.
    pub is_proxied: bool,
    /// One id in our log and the source's.
    pub session: Box<str>,
    /// What is known of its TLS.
    pub tls: Option<LoginTls>,
    /// How many logins it has tried on this connection, this one included.
    pub attempt: u32,
    /// What it brought.
    pub credentials: Credentials,
}

/// A client's TLS.
#[derive(Debug)]
pub struct LoginTls {
    /// As log records write it: `TLSv1.3`.
    pub version: &'static str,
    /// As rustls writes it: `TLS13_AES_128_GCM_SHA256`.
    pub cipher: Option<&'static str>,
    /// Whether the listener asks for certificates.
    pub asks_certificate: bool,
    /// The client's, verified, in DER.
    pub certificate: Option<Box<[u8]>>,
}
