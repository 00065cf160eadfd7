//! A connection to a server, before a word of IMAP: TCP, PROXY header, implicit TLS. Called by `connect` and `checks`.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::time::{self, timeout_at};

use super::connect::{Fault, Purpose, Request};
use super::health::Blow;
use super::{Backend, Server, proxy_header};
use crate::config::{ClientInfo, TlsMode};
use crate::failure::Reason;
use crate::stream::{Encrypted, Stream};
use crate::tls::handover::Secrets;

/// Connects and does what comes before the greeting.
pub(super) async fn reach(
    backend: &Backend,
    server: &Server,
    request: &Request<'_>,
    deadline: time::Instant,
) -> Result<(Stream, SocketAddr), Fault> {
    let (socket, address) = dial(server, deadline).await?;
    Ok((open(backend, server, request, socket, deadline).await?, address))
}

/// Connects to the first address that answers; each gets its share of the time left.
pub(super) async fn dial(server: &Server, deadline: time::Instant) -> Result<(TcpStream, SocketAddr), Fault> {
    let addresses = timeout_at(deadline, server.addresses()).await.unwrap_or_default();
    let mut fault = Fault::of_server(Reason::Resolve, "no address is known for the server");
    for (tried, address) in addresses.iter().enumerate() {
        let left = deadline.saturating_duration_since(time::Instant::now());
        let share = left / u32::try_from(addresses.len() - tried).unwrap_or(u32::MAX);
        match time::timeout(share, TcpStream::connect(address)).await {
            Ok(Ok(socket)) => {
                // Where it fails, replies are late and not lost.
                let _ = socket.set_nodelay(true);
                return Ok((socket, *address));
            }
            Ok(Err(error)) => {
                fault = Fault::of_server(Reason::Connect, format!("{address}: {error}"));
                if error.kind() == io::ErrorKind::ConnectionRefused {
                    fault.blow = Some(Blow::Refused);
                }
            }
            Err(_) => {
                fault = Fault::of_server(Reason::Connect, format!("{address}: no connection within the deadline"))
            }
        }
    }
    Err(fault)
}

/// PROXY header and implicit TLS.
async fn open(
    backend: &Backend,
    server: &Server,
    request: &Request<'_>,
    mut socket: TcpStream,
    deadline: time::Instant,
) -> Result<Stream, Fault> {
    let is_session = request.purpose == Purpose::Session;
    let header = match backend.client_info {
        ClientInfo::ProxyV1 if !is_session => proxy_header::LOCAL_1.to_vec(),
        ClientInfo::ProxyV2 if !is_session => proxy_header::local_2(),
        ClientInfo::ProxyV1 => proxy_header::version_1(request.client, request.listener),
        ClientInfo::ProxyV2 => proxy_header::version_2(request.client, request.listener),
        ClientInfo::Id | ClientInfo::None => Vec::new(),
    };
    if !header.is_empty() {
        match timeout_at(deadline, socket.write_all(&header)).await {
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
    deadline: time::Instant,
) -> Result<Stream, Fault> {
    let Some(tls) = &backend.tls else { return Ok(Stream::Plain(socket)) };
    let secrets = Arc::new(Secrets::default());
    match timeout_at(deadline, tls.connect(socket, &server.tls_name, secrets.clone())).await {
        Ok(Ok(tls)) => Ok(Stream::Tls(Box::new(Encrypted { tls, secrets }))),
        Ok(Err(error)) => Err(Fault::of_server(Reason::ServerTls, error)),
        Err(_) => Err(Fault::of_server(Reason::ServerTls, "no TLS handshake within the deadline")),
    }
}
