//! What `check` finds beyond the configuration's text: servers with which TLS would fail.
//!
//! Connects to the servers of backends with TLS, within a short time and without a login. A server that cannot be
//! reached is not reported: a configuration may be checked on another machine.

use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::backend::OwnAddresses;
use crate::config::{self, Place, Problem};
use crate::server::Live;

/// Time for one server: DNS, connection and handshake.
const TIMEOUT: Duration = Duration::from_secs(3);

/// A warning for each server with which TLS fails, at its place in the configuration.
pub async fn server_warnings(live: &Live) -> Vec<Problem> {
    let (tasks, stop) = (TaskTracker::new(), CancellationToken::new());
    live.backends.start(&OwnAddresses::default(), &tasks, &stop);
    let faults = Arc::clone(&live.backends).tls_faults(&live.limits, TIMEOUT).await;
    stop.cancel();
    let warning = |(id, server, detail): (config::BackendId, Arc<str>, String)| {
        let backend = &live.config.backends[id.0];
        let message = format!("TLS with {server} fails, and so would every login there: {detail}");
        live.config.problem(place(backend, &server), message)
    };
    faults.into_iter().map(warning).collect()
}

fn place<'a>(backend: &'a config::Backend, server: &str) -> &'a Place {
    let declared = backend.servers.iter().find_map(|declared| match declared {
        config::Server::Address { name, place, .. } => (name == server).then_some(place),
        config::Server::Srv { .. } => None,
    });
    declared.unwrap_or(&backend.place)
}
