//! Runtime state of a server, which outlives a configuration.

use std::net::SocketAddr;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use tokio::sync::watch;

use super::pending_logins::PendingLogins;
use super::sasl_exchanges::SaslExchanges;
use crate::backend::capacity::Capacity;
use crate::backend::disconnect_spreader::DisconnectSpreader;
use crate::backend::health::{Health, Trial};
use crate::backend::state_override::OverrideCell;
use crate::config::Host;
use crate::metrics::ServerMetrics;
use crate::protocol::imap::backend_login::UnsupportedForms;
use crate::protocol::imap::capability::ServerCapabilities;

/// An error of a login or a check at a server.
#[derive(Debug, Clone)]
pub struct LastError {
    /// Text for the operator, without secrets.
    pub text: Arc<str>,
    /// Time of the error.
    pub at: Instant,
}

/// Everything that is known about a server beyond its configuration.
#[derive(Debug)]
pub(in crate::backend) struct ServerState {
    /// `None` until DNS has answered or failed for the first time.
    pub(super) addresses: watch::Sender<Option<Vec<SocketAddr>>>,
    pub(super) health: Mutex<Health>,
    /// The capabilities before login that the last check has read.
    pub(super) capabilities: Mutex<Option<ServerCapabilities>>,
    /// Whether the server has confirmed that it trusts our ID.
    pub(super) has_trusted_id: AtomicBool,
    /// Whether it was logged that the server no longer trusts our ID.
    pub(super) distrust_logged: AtomicBool,
    /// Whether the server lets a session change its user (RFC 8437).
    pub(super) unauthenticate: AtomicBool,
    /// Forms of login that the server lists but rejects.
    pub(super) unsupported_forms: Mutex<Option<UnsupportedForms>>,
    pub(super) last_error: Mutex<Option<LastError>>,
    pub(super) state_override: OverrideCell,
    pub(super) capacity: Capacity<Self>,
    pub(super) sasl_exchanges: Arc<SaslExchanges>,
    pub(super) pending_logins: PendingLogins,
    disconnects: Mutex<DisconnectSpreader>,
    pub(super) metrics: ServerMetrics,
}

impl ServerState {
    /// The state of a server that was not known before.
    pub(in crate::backend) fn new(
        host: &Host,
        port: u16,
        metrics: ServerMetrics,
        state_override: OverrideCell,
    ) -> Arc<Self> {
        let addresses = match host {
            Host::Ip(ip) => Some(vec![SocketAddr::new(*ip, port)]),
            Host::Name(_) => None,
        };
        Arc::new(Self {
            addresses: watch::Sender::new(addresses),
            health: Mutex::default(),
            capabilities: Mutex::default(),
            has_trusted_id: AtomicBool::new(false),
            distrust_logged: AtomicBool::new(false),
            unauthenticate: AtomicBool::new(false),
            unsupported_forms: Mutex::default(),
            last_error: Mutex::default(),
            state_override,
            capacity: Capacity::default(),
            sasl_exchanges: Arc::default(),
            pending_logins: PendingLogins::default(),
            disconnects: Mutex::default(),
            metrics,
        })
    }

    /// Ends a trial. If it had no result, the next login may try the server.
    pub(super) fn end_trial(&self, trial: Trial) {
        let mut health = self.health();
        health.end_trial(trial);
        self.metrics.set_breaker(health.breaker());
    }

    pub(super) fn disconnects(&self) -> MutexGuard<'_, DisconnectSpreader> {
        // Nothing in there panics halfway through a change.
        self.disconnects.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn health(&self) -> MutexGuard<'_, Health> {
        // After a panic elsewhere the fields are still valid, whatever their values.
        self.health.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
