//! Connects to a server, up to the point before its greeting: TCP, PROXY header, implicit TLS.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::time;

use super::fault::Fault;
use super::request::Origin;
use super::source_addresses::{describe_local_fault, local_fault};
use super::{Backend, Server};
use crate::config::{ClientInfo, TlsMode};
use crate::deadline::Deadline;
use crate::failure::Reason;
use crate::protocol::proxy_protocol::{self, ClientTlsInfo};
use crate::stream::{Encrypted, Stream};
use crate::tls::extraction::TrafficSecrets;

/// Opens a connection on which the server's greeting, or its answer to STARTTLS, comes next.
pub(super) async fn dial(
    backend: &Backend,
    server: &Server,
    origin: Origin<'_>,
    deadline: Deadline,
) -> Result<(Stream, SocketAddr), Fault> {
    let (mut socket, address) = connect(backend, server, deadline).await?;
    send_proxy_header(&mut socket, &proxy_header(backend, origin), deadline).await?;
    let stream = match backend.tls_mode {
        TlsMode::Implicit => encrypt(backend, server, socket, deadline).await?,
        TlsMode::None | TlsMode::StartTls => Stream::Plain(socket),
    };
    Ok((stream, address))
}

/// Connects to the first address that answers. Each address gets an equal share of the remaining time.
pub(super) async fn connect(
    backend: &Backend,
    server: &Server,
    deadline: Deadline,
) -> Result<(TcpStream, SocketAddr), Fault> {
    let addresses = deadline.limit(server.addresses()).await.unwrap_or_default();
    let mut server_fault = None;
    let mut machine_fault = None;
    for (tried, address) in addresses.iter().enumerate() {
        let left = deadline.due().saturating_duration_since(time::Instant::now());
        let share = left / u32::try_from(addresses.len() - tried).unwrap_or(u32::MAX);
        match Deadline::after(share).limit(backend.source_addresses.connect(*address)).await {
            Ok(Ok(socket)) => {
                // If it fails, replies are late but not lost.
                let _ = socket.set_nodelay(true);
                return Ok((socket, *address));
            }
            // On a machine without IPv6 the server's IPv4 address may still work, so the loop goes on.
            Ok(Err(error)) => match local_fault(&error) {
                Some(reason) => {
                    let detail = describe_local_fault(reason, *address, &error);
                    machine_fault = Some(Fault::of_this_machine(backend, reason, detail));
                }
                None => server_fault = Some(connect_fault(*address, &error)),
            },
            Err(_) => {
                let detail = format!("{address}: no connection within the deadline");
                server_fault = Some(Fault::of_server(Reason::Connect, detail));
            }
        }
    }
    let unknown = || Fault::of_server(Reason::Resolve, "no address is known for the server");
    Err(server_fault.or(machine_fault).unwrap_or_else(unknown))
}

fn connect_fault(address: SocketAddr, error: &io::Error) -> Fault {
    let detail = format!("{address}: {error}");
    match error.kind() {
        io::ErrorKind::ConnectionRefused => Fault::connection_refused(detail),
        _ => Fault::of_server(Reason::Connect, detail),
    }
}

/// The PROXY header for the connection; empty if the backend's servers get none.
fn proxy_header(backend: &Backend, origin: Origin<'_>) -> Vec<u8> {
    match (backend.client_info, origin) {
        (ClientInfo::ProxyV1, Origin::Proxy) => proxy_protocol::LOCAL_V1.to_vec(),
        (ClientInfo::ProxyV2, Origin::Proxy) => proxy_protocol::local_v2(),
        (ClientInfo::ProxyV1, Origin::Client(client)) => proxy_protocol::header_v1(client.address, client.listener),
        (ClientInfo::ProxyV2, Origin::Client(client)) => {
            let tls = client.tls.map(|tls| ClientTlsInfo {
                version: tls.version.as_str(),
                server_name: tls.server_name.as_deref(),
                alpn: tls.alpn,
                certificate: tls.certificate,
            });
            proxy_protocol::header_v2(client.address, client.listener, tls.as_ref())
        }
        (ClientInfo::Id | ClientInfo::None, _) => Vec::new(),
    }
}

async fn send_proxy_header(socket: &mut TcpStream, header: &[u8], deadline: Deadline) -> Result<(), Fault> {
    if header.is_empty() {
        return Ok(());
    }
    match deadline.limit(socket.write_all(header)).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => Err(Fault::of_server(Reason::Connect, error)),
        Err(_) => Err(Fault::of_server(Reason::Connect, "the PROXY header was not accepted within the deadline")),
    }
}

/// Makes a TLS handshake that verifies the server's certificate, if the backend has TLS.
pub(super) async fn encrypt(
    backend: &Backend,
    server: &Server,
    socket: TcpStream,
    deadline: Deadline,
) -> Result<Stream, Fault> {
    let Some(tls) = &backend.tls else { return Ok(Stream::Plain(socket)) };
    let secrets = Arc::new(TrafficSecrets::default());
    match deadline.limit(tls.connect(socket, &server.tls_name, secrets.clone())).await {
        Ok(Ok(tls)) => Ok(Stream::Tls(Box::new(Encrypted { tls, secrets }))),
        Ok(Err(error)) => Err(Fault::of_server(Reason::ServerTls, error)),
        Err(_) => Err(Fault::of_server(Reason::ServerTls, "no TLS handshake within the deadline")),
    }
}
