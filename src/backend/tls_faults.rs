//! Finds servers whose TLS does not work, for warnings of `vestibule check`.

use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time;

use super::probe::{FailureCause, Probe, probe};
use super::{Backend, Backends, Server};
use crate::config::{BackendId, Limits};

/// A server with which TLS does not work.
#[derive(Debug)]
pub struct TlsFault {
    /// Backend of the server.
    pub backend: BackendId,
    /// Name of the server.
    pub server: Arc<str>,
    /// Text for the operator.
    pub detail: String,
}

impl Backends {
    /// Connects to every server that is used with TLS, and returns those with which TLS fails. A server that cannot be
    /// reached within `timeout` is left out.
    pub async fn tls_faults(self: Arc<Self>, limits: &Arc<Limits>, timeout: Duration) -> Vec<TlsFault> {
        let mut probes = JoinSet::new();
        for backend in self.list.iter().filter(|backend| backend.tls.is_some()) {
            probes.spawn(faults_of_backend(backend.clone(), limits.clone(), timeout));
        }
        probes.join_all().await.into_iter().flatten().collect()
    }
}

async fn faults_of_backend(backend: Arc<Backend>, limits: Arc<Limits>, timeout: Duration) -> Vec<TlsFault> {
    let servers = time::timeout(timeout, backend.known_servers()).await.unwrap_or_default();
    let mut probes = JoinSet::new();
    for server in servers {
        let (backend, limits) = (backend.clone(), limits.clone());
        probes.spawn(async move { fault_of_server(&backend, server, &limits, timeout).await });
    }
    probes.join_all().await.into_iter().flatten().collect()
}

async fn fault_of_server(
    backend: &Backend,
    server: Arc<Server>,
    limits: &Limits,
    timeout: Duration,
) -> Option<TlsFault> {
    let failure = probe(backend, &server, &Probe::Tls, limits, timeout).await.err()?;
    let is_tls = failure.cause == FailureCause::Tls;
    is_tls.then(|| TlsFault { backend: backend.id, server: server.name.clone(), detail: failure.detail })
}
