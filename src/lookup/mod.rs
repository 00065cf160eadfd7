//! Building blocks of requests to directories and to the authentication policy service: an HTTP client with limits, hedged requests,
//! a thread for lookups, DNS.

pub(crate) mod dns;
pub(crate) mod hedge;
pub(crate) mod http_client;
mod limited_http;
pub(crate) mod tcp_liveness;
pub(crate) mod thread;
