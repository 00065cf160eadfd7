//! A client's login as it is to be made on a server.

use std::net::SocketAddr;

use crate::config::Limits;
use crate::deadline::Deadline;
use crate::identity::{Mechanism, ServerLogin};
use crate::protocol::imap::client_id::ClientId;
use crate::protocol::imap::tag::Tag;
use crate::stream::TlsInfo;

/// A client's login as it is to be made on a server.
#[derive(Debug)]
pub(crate) struct Request<'a> {
    /// Credentials for the server.
    pub login: ServerLogin<'a>,
    /// The command that the client used.
    pub mechanism: Mechanism,
    /// The client's tag, under which the server's answer is returned.
    pub tag: &'a Tag,
    /// The client.
    pub client: ClientDetails<'a>,
    /// Deadlines and sizes.
    pub limits: &'a Limits,
    /// When the login must be over, whichever servers are tried.
    pub deadline: Deadline,
}

/// What a server may learn about a client, by PROXY header or ID.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ClientDetails<'a> {
    /// Address of the client.
    pub address: SocketAddr,
    /// Address that the client connected to.
    pub listener: SocketAddr,
    /// The client's TLS connection, if it uses TLS.
    pub tls: Option<&'a TlsInfo>,
    /// The session's id, which appears in the server's log too.
    pub session_id: &'a str,
    /// ID fields that the client has sent.
    pub id: &'a ClientId,
}

/// On whose behalf a connection to a server is made.
#[derive(Debug, Clone, Copy)]
pub(super) enum Origin<'a> {
    Client(ClientDetails<'a>),
    /// The connection is a check of the proxy itself.
    Proxy,
}
