//! Creates DNS resolvers. Sends no queries itself.

use std::net::SocketAddr;
use std::time::Duration;

use hickory_resolver::TokioResolver;
use hickory_resolver::config::{ConnectionConfig, NameServerConfig, ResolverConfig};
use hickory_resolver::net::runtime::TokioRuntimeProvider;

/// Creates a resolver for these name servers (UDP, and TCP for truncated answers), or for those of the system if the list is empty.
/// `timeout` is that of one query to one server.
///
/// # Errors
/// The configuration of the system cannot be read.
pub(crate) fn resolver(servers: &[SocketAddr], timeout: Duration) -> Result<TokioResolver, String> {
    let mut builder = if servers.is_empty() {
        TokioResolver::builder_tokio().map_err(|error| error.to_string())?
    } else {
        let servers = servers.iter().map(|server| name_server(*server)).collect();
        let servers = ResolverConfig::from_parts(None, vec![], servers);
        TokioResolver::builder_with_config(servers, TokioRuntimeProvider::default())
    };
    builder.options_mut().timeout = timeout;
    builder.build().map_err(|error| error.to_string())
}

fn name_server(address: SocketAddr) -> NameServerConfig {
    let connections = [ConnectionConfig::udp(), ConnectionConfig::tcp()].map(|mut connection| {
        connection.port = address.port();
        connection
    });
    NameServerConfig::new(address.ip(), true, connections.into())
}
