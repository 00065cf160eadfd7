//! Servers that a route names by address and that the configuration does not list.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio_rustls::rustls::pki_types::ServerName;

use super::server::{ServerSettings, ServerState};
use super::{Backend, Server};
use crate::config::Host;

/// Maximum number of undeclared servers of a backend. Each has its own time series in the metrics.
const MAX_UNDECLARED: usize = 256;

/// The undeclared servers of a backend.
#[derive(Debug)]
pub(super) struct UndeclaredServers {
    settings: ServerSettings,
    by_address: Mutex<HashMap<SocketAddr, Arc<Server>>>,
}

impl UndeclaredServers {
    /// Takes over those of the `previous` configuration.
    pub(super) fn new(settings: ServerSettings, previous: Option<&Self>) -> Self {
        let known = previous.map(|previous| previous.lock().clone()).unwrap_or_default();
        let known = known.into_iter().map(|(address, server)| (address, server.with_settings(settings))).collect();
        Self { settings, by_address: Mutex::new(known) }
    }

    pub(super) fn current(&self) -> Vec<Arc<Server>> {
        self.lock().values().cloned().collect()
    }

    /// The server at `address`, which is added if it is not known yet. `None` if there are too many with sessions.
    pub(super) fn get(&self, backend: &Backend, address: SocketAddr) -> Option<Arc<Server>> {
        let mut known = self.lock();
        if let Some(server) = known.get(&address) {
            return Some(server.clone());
        }
        if known.len() >= MAX_UNDECLARED {
            remove_unused(&mut known, backend);
        }
        if known.len() >= MAX_UNDECLARED {
            tracing::error!(backend = %backend.name, %address, "a route names more servers than {MAX_UNDECLARED} at a time");
            return None;
        }
        let (name, host) = (address.to_string(), Host::Ip(address.ip()));
        let (metrics, state_override) = (backend.server_metrics(&name), backend.state_override(&name));
        let server = Arc::new(Server {
            state: ServerState::new(&host, address.port(), metrics, state_override),
            name: name.into(),
            backend: backend.name.clone(),
            host,
            port: address.port(),
            weight: 1,
            priority: 0,
            tls_name: ServerName::from(address.ip()),
            settings: self.settings,
        });
        known.insert(address, server.clone());
        Some(server)
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<SocketAddr, Arc<Server>>> {
        // Nothing in here panics halfway through a change.
        self.by_address.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn remove_unused(known: &mut HashMap<SocketAddr, Arc<Server>>, backend: &Backend) {
    known.retain(|_, server| {
        let is_used = Arc::strong_count(server) > 1 || server.sessions() > 0;
        if !is_used {
            backend.forget_server(&server.name);
        }
        is_used
    });
}
