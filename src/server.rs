//! Puts the rooms together: builds all of a configuration before anything is bound, starts it, stops it.
//!
//! [`Live`] is what a session needs, as one immutable value; each session keeps the one it began with. Called by `main`
//! (`run`, `check`, `route`), by the demo and by the tests.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::admin::Admin;
use crate::backend::{Backends, OwnAddresses};
use crate::config::{Config, Limits, Report};
use crate::listener::{House, Listener};
use crate::metrics::{Metrics, Names};
use crate::route::{self, Router};
use crate::session::Room;
use crate::shutdown::Drain;
use crate::tls::server::ServerTls;

/// Everything a session asks or uses.
pub struct Live {
    /// Who belongs where.
    pub router: Router,
    /// The servers.
    pub backends: Backends,
    /// What clients are shown; absent where every listener is plain.
    pub tls: Option<ServerTls>,
    /// Deadlines and caps.
    pub limits: Limits,
    /// What is counted.
    pub metrics: Arc<Metrics>,
}

impl Live {
    /// Builds everything and binds nothing: certificates, tables, roots.
    ///
    /// # Errors
    /// All problems of all rooms.
    pub fn build(config: &Config) -> Result<Self, Report> {
        let metrics = Arc::new(Metrics::new(&Names {
            listeners: config.listeners.iter().map(|listener| listener.address.to_string()).collect(),
            backends: config.backends.iter().map(|backend| backend.name.clone()).collect(),
            routes: route::labels(&config.routes),
        }));
        let tls = ServerTls::build(config);
        let router = Router::build(config);
        let backends = Backends::build(config, &metrics);
        match (tls, router, backends) {
            (Ok(tls), Ok(router), Ok(backends)) => {
                Ok(Self { router, backends, tls, limits: config.limits.clone(), metrics })
            }
            (tls, router, backends) => {
                let found = [tls.err(), router.err(), backends.err()];
                Err(Report::new(found.into_iter().flatten().flatten().collect()))
            }
        }
    }
}

/// A running proxy.
pub struct Running {
    listeners: Vec<SocketAddr>,
    admin: Option<SocketAddr>,
    live: Arc<Live>,
    drain: Drain,
    background: TaskTracker,
    stop_background: CancellationToken,
}

/// Builds, binds and starts. When this returns, connections are served.
///
/// # Errors
/// A [`Report`] of the configuration's problems, or an address that cannot be bound.
pub async fn start(config: Config) -> anyhow::Result<Running> {
    let live = Arc::new(Live::build(&config)?);
    let mut listeners = Vec::new();
    for (index, listener) in config.listeners.iter().enumerate() {
        let bound = Listener::bind(index, listener, &config.listeners)
            .with_context(|| format!("{} cannot be bound ({})", listener.address, listener.place.key))?;
        listeners.push(bound);
    }
    let drain = Drain::default();
    let background = TaskTracker::new();
    let stop_background = CancellationToken::new();
    let admin = match config.admin {
        None => None,
        Some(address) => Some(
            Admin::bind(address, live.metrics.clone(), drain.begun().clone())
                .await
                .with_context(|| format!("{address} cannot be bound (admin.address)"))?,
        ),
    };
    let addresses: Vec<SocketAddr> = listeners.iter().map(Listener::address).collect();
    live.backends.start(&OwnAddresses::new(addresses.clone()), &background, &stop_background);
    live.router.publish(&live.metrics);
    if let Some(tls) = &live.tls {
        tls.publish(&live.metrics);
    }
    let room = Arc::new(Room::new(live.metrics.silent_sessions()).context("silent sessions cannot be watched")?);
    let (waiting, over, stop) = (room.clone(), drain.over().clone(), stop_background.clone());
    background.spawn(async move {
        let closing = async {
            tokio::select! {
                () = over.cancelled() => {}
                () = stop.cancelled() => {}
            }
        };
        waiting.run(closing).await;
    });
    let permits = Arc::new(Semaphore::new(config.limits.sessions));
    let house = House { live: live.clone(), permits, drain: drain.clone(), room };
    for (listener, configured) in listeners.into_iter().zip(&config.listeners) {
        tracing::info!(address = %listener.address(), tls = ?configured.tls, "listening");
        background.spawn(listener.run(house.clone()));
    }
    let admin_address = admin.as_ref().map(Admin::address);
    if let Some(admin) = admin {
        tracing::info!(address = %admin.address(), "metrics and health");
        background.spawn(admin.run(stop_background.clone()));
    }
    Ok(Running { listeners: addresses, admin: admin_address, live, drain, background, stop_background })
}

impl Running {
    /// The listeners' addresses, in the configuration's order; port 0 has become a real one.
    pub fn listeners(&self) -> &[SocketAddr] {
        &self.listeners
    }

    /// Where metrics are.
    pub fn admin(&self) -> Option<SocketAddr> {
        self.admin
    }

    /// What is counted.
    pub fn metrics(&self) -> &Arc<Metrics> {
        &self.live.metrics
    }

    /// Stops: no new connections, BYE to clients before login, the configured grace to relayed sessions, cut short by
    /// `hurry`. Returns how many sessions had to be ended.
    pub async fn drain(self, hurry: impl Future<Output = ()>) -> usize {
        let grace = self.live.limits.drain;
        self.live.metrics.draining();
        tracing::info!(sessions = self.drain.open_sessions(), grace_seconds = grace.as_secs(), "draining");
        let forced = self.drain.run(grace, hurry).await;
        self.stop_background.cancel();
        self.background.close();
        self.background.wait().await;
        if forced > 0 {
            tracing::warn!(forced, "sessions were ended by the stop");
        }
        tracing::info!("stopped");
        forced
    }

    /// Stops without grace: for the demo and for tests.
    pub async fn stop(self) {
        self.drain(std::future::ready(())).await;
    }

    /// How long a drain may take at most, for systemd.
    pub fn grace(&self) -> Duration {
        self.live.limits.drain
    }
}
