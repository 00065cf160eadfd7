//! One mailbox server: what the configuration (or an SRV record) says of it, and what is learnt of it.
//!
//! The first is as old as the configuration; the second ([`ServerState`]) is handed on to the next one, so that a reload
//! forgets neither who is down nor how many sessions a server has. Called by `backend`.

use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use tokio::sync::watch;
use tokio_rustls::rustls::pki_types::ServerName;

use super::health::Health;
use super::select::Candidate;
use super::{first_known, publish_if_first};
use crate::config::Host;
use crate::identity::Mechanisms;
use crate::imap::backend_login::IdAnswer;
use crate::metrics::ServerMetrics;

/// One mailbox server.
#[derive(Debug)]
pub struct Server {
    /// As configured, or `target:port` of an SRV record: the label of metrics and logs.
    pub name: Arc<str>,
    /// The backend it is one of.
    pub backend: Arc<str>,
    pub(super) host: Host,
    pub(super) port: u16,
    pub(super) weight: u32,
    pub(super) priority: u16,
    pub(super) tls_name: ServerName<'static>,
    pub(super) state: Arc<ServerState>,
}

/// What is learnt of a server; outlives a configuration.
#[derive(Debug)]
pub(super) struct ServerState {
    /// `None` until DNS answered or failed for the first time.
    addresses: watch::Sender<Option<Vec<SocketAddr>>>,
    health: Mutex<Health>,
    /// Ways to log in that it had when it was last asked.
    offer: Mutex<Option<Mechanisms>>,
    /// Whether it was told already that the server does not say that it trusts us.
    distrust_told: AtomicBool,
    metrics: ServerMetrics,
}

impl ServerState {
    /// Of a server that has just been heard of.
    pub(super) fn new(host: &Host, port: u16, metrics: ServerMetrics) -> Arc<Self> {
        let addresses = match host {
            Host::Ip(ip) => Some(vec![SocketAddr::new(*ip, port)]),
            Host::Name(_) => None,
        };
        Arc::new(Self {
            addresses: watch::Sender::new(addresses),
            health: Mutex::default(),
            offer: Mutex::default(),
            distrust_told: AtomicBool::new(false),
            metrics,
        })
    }
}

impl Server {
    /// A server for tests of other rooms.
    #[cfg(test)]
    pub(crate) fn named(backend: &str, name: &str) -> Self {
        let names = crate::metrics::Names { backends: vec![backend.to_owned()], ..Default::default() };
        let host = Host::Ip([127, 0, 0, 1].into());
        let metrics = crate::metrics::Metrics::new(&names).backend(0).server(name);
        Self {
            name: name.into(),
            backend: backend.into(),
            state: ServerState::new(&host, 143, metrics),
            host,
            port: 143,
            weight: 1,
            priority: 0,
            tls_name: ServerName::from(IpAddr::from([127, 0, 0, 1])),
        }
    }

    /// Its gauges.
    pub fn metrics(&self) -> &ServerMetrics {
        &self.state.metrics
    }

    /// Its addresses, the one that answered last in front; waits for DNS only while it has never answered.
    pub async fn addresses(&self) -> Vec<SocketAddr> {
        first_known(&self.state.addresses).await
    }

    /// Whether it comes before failing servers just now.
    pub fn is_available(&self) -> bool {
        self.health().is_available(Instant::now())
    }

    pub(super) fn is_at(&self, host: &str) -> bool {
        let address: Option<IpAddr> = host.parse().ok();
        let resolved = || self.state.addresses.borrow().iter().flatten().any(|known| Some(known.ip()) == address);
        match &self.host {
            Host::Name(name) => name == host || resolved(),
            Host::Ip(ip) => Some(ip.to_canonical()) == address.map(|address| address.to_canonical()),
        }
    }

    pub(super) fn offer(&self) -> Option<Mechanisms> {
        *self.state.offer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn offers(&self, offer: Option<Mechanisms>) {
        *self.state.offer.lock().unwrap_or_else(PoisonError::into_inner) = offer;
    }

    /// What it said to an ID with the client's address in it.
    pub(super) fn answered_id(&self, answer: IdAnswer) {
        let trusts = answer == IdAnswer::Trusted;
        self.state.metrics.set_trusts(trusts);
        if !trusts && !self.state.distrust_told.swap(true, Ordering::Relaxed) {
            tracing::info!(
                server = %self.name,
                "server does not say that it trusts our ID (Dovecot does since 2.4): see login_trusted_networks there"
            );
        }
    }

    /// A session could not use it.
    pub(super) fn failed(&self, error: &str) {
        if self.health().failed(Instant::now()) {
            tracing::warn!(server = %self.name, %error, "server is failing and passed over for a while");
        }
        self.state.metrics.set_up(false);
    }

    /// It answered a login, whichever way.
    pub(super) fn answered(&self) {
        if self.health().answered() {
            tracing::info!(server = %self.name, "server answers again");
            self.state.metrics.set_up(true);
        }
    }

    /// `address` answered: it is tried first from now on.
    pub(super) fn prefer(&self, address: SocketAddr) {
        self.state.addresses.send_if_modified(|known| match known {
            Some(known) if known.first() != Some(&address) => {
                known.sort_by_key(|other| *other != address);
                true
            }
            _ => false,
        });
    }

    pub(super) fn publish(&self, addresses: Vec<SocketAddr>) {
        let first = self.state.addresses.borrow().as_ref().and_then(|known| known.first().copied());
        self.state.addresses.send_replace(Some(addresses));
        if let Some(first) =
            first.filter(|first| self.state.addresses.borrow().as_ref().is_some_and(|now| now.contains(first)))
        {
            self.prefer(first);
        }
    }

    pub(super) fn publish_if_first(&self) {
        publish_if_first(&self.state.addresses);
    }

    pub(super) fn candidate(&self, now: Instant) -> Candidate<'_> {
        Candidate {
            name: &self.name,
            weight: self.weight,
            priority: self.priority,
            available: self.health().is_available(now),
        }
    }

    fn health(&self) -> std::sync::MutexGuard<'_, Health> {
        // A panic elsewhere leaves two plain fields behind, which are valid whatever they hold.
        self.state.health.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
