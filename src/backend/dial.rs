//! A connection to a server, before a word of IMAP: TCP, PROXY header, implicit TLS. Called by `connect` and `checks`.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::time;

use super::health::FailureKind;
use super::request::{Fault, Purpose, Request};
use super::source::{in_words, local_fault};
use super::{Backend, Server};
use crate::config::{ClientInfo, TlsMode};
use crate::deadline::Deadline;
use crate::failure::Reason;
use crate::protocol::proxy_protocol::{self, ClientTlsInfo};
use crate::stream::{Encrypted, Stream};
use crate::tls::handover::Secrets;

/// Connects and does what comes before the greeting.
pub(super) async fn reach(
    backend: &Backend,
    server: &Server,
    request: &Request<'_>,
    deadline: Deadline,
) -> Result<(Stream, SocketAddr), Fault> {
    let (socket, address) = dial(backend, server, deadline).await?;
    Ok((open(backend, server, request, socket, deadline).await?, address))
}

/// Connects to the first address that answers; each gets its share of the time left.
pub(super) async fn dial(
    backend: &Backend,
    server: &Server,
    deadline: Deadline,
) -> Result<(TcpStream, SocketAddr), Fault> {
    let addresses = deadline.limit(server.addresses()).await.unwrap_or_default();
    let mut fault = None;
    let mut lacking = None;
    for (tried, address) in addresses.iter().enumerate() {
        let left = deadline.due().saturating_duration_since(time::Instant::now());
        let share = left / u32::try_from(addresses.len() - tried).unwrap_or(u32::MAX);
        match Deadline::after(share).limit(backend.sources.connect(*address)).await {
            Ok(Ok(socket)) => {
                // If it fails, replies are late and not lost.
                let _ = socket.set_nodelay(true);
                return Ok((socket, *address));
            }
            Ok(Err(error)) => match local_fault(&error) {
                // On a machine without IPv6 the server's IPv4 address may still do.
                Some(reason) => {
                    lacking = Some(Fault::of_this_machine(backend, reason, in_words(reason, *address, &error)));
                }
                None => {
                    let refused = error.kind() == io::ErrorKind::ConnectionRefused;
                    let blow = Some(if refused { FailureKind::Refused } else { FailureKind::Other });
                    fault = Some(Fault { blow, ..Fault::of_server(Reason::Connect, format!("{address}: {error}")) });
                }
            },
            Err(_) => {
                let detail = format!("{address}: no connection within the deadline");
                fault = Some(Fault::of_server(Reason::Connect, detail));
            }
        }
    }
    let unknown = || Fault::of_server(Reason::Resolve, "no address is known for the server");
    Err(fault.or(lacking).unwrap_or_else(unknown))
}

/// PROXY header and implicit TLS.
async fn open(
    backend: &Backend,
    server: &Server,
    request: &Request<'_>,
    mut socket: TcpStream,
    deadline: Deadline,
) -> Result<Stream, Fault> {
    let is_session = request.purpose == Purpose::Session;
    let header = match backend.client_info {
        ClientInfo::ProxyV1 if !is_session => proxy_protocol::LOCAL_V1.to_vec(),
        ClientInfo::ProxyV2 if !is_session => proxy_protocol::local_v2(),
        ClientInfo::ProxyV1 => proxy_protocol::header_v1(request.client, request.listener),
        ClientInfo::ProxyV2 => {
            let tls = request.tls.map(|tls| ClientTlsInfo {
                version: tls.version.as_str(),
                server_name: tls.server_name.as_deref(),
                alpn: tls.alpn,
                certificate: tls.certificate,
            });
            proxy_protocol::header_v2(request.client, request.listener, tls.as_ref())
        }
        ClientInfo::Id | ClientInfo::None => Vec::new(),
    };
    if !header.is_empty() {
        match deadline.limit(socket.write_all(&header)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => return Err(Fault::of_server(Reason::Connect, error)),
            Err(_) => return Err(Fault::of_server(Reason::Connect, "the PROXY header was not taken in time")),
        }
    }
    match backend.mode {
        TlsMode::Implicit => encrypt(backend, server, socket, deadline).await,
        TlsMode::None | TlsMode::StartTls => Ok(Stream::Plain(socket)),
    }
}

/// The handshake, chain and name included.
pub(super) async fn encrypt(
    backend: &Backend,
    server: &Server,
    socket: TcpStream,
    deadline: Deadline,
) -> Result<Stream, Fault> {
    let Some(tls) = &backend.tls else { return Ok(Stream::Plain(socket)) };
    let secrets = Arc::new(Secrets::default());
    match deadline.limit(tls.connect(socket, &server.tls_name, secrets.clone())).await {
        Ok(Ok(tls)) => Ok(Stream::Tls(Box::new(Encrypted { tls, secrets }))),
        Ok(Err(error)) => Err(Fault::of_server(Reason::ServerTls, error)),
        Err(_) => Err(Fault::of_server(Reason::ServerTls, "no TLS handshake within the deadline")),
    }
}
