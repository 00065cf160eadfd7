//! Puts the rooms together: builds all of a configuration before anything is bound, starts it, stops it.
//!
//! [`Live`] is what a session needs, as one immutable value; each session keeps the one it began with. Called by `main`
//! (`run`, `check`, `route`), by the demo and by the tests.

use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use tokio::runtime::Handle;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::admin::Admin;
use crate::backend::{Backends, OwnAddresses, Server};
use crate::config::{self, Config, Limits, Network, Report};
use crate::guard::Guard;
use crate::identity::{Mechanisms, Naming};
use crate::listener::{self, House, Listener};
use crate::metrics::{Metrics, Names};
use crate::policy::Policy;
use crate::route::{self, At, Place, Router};
use crate::session::{Refusals, Room};
use crate::shutdown::Drain;
use crate::tls::server::ServerTls;
use crate::workers::Worker;

/// Everything a session asks or uses.
pub struct Live {
    /// Who belongs where.
    pub router: Router,
    /// The servers.
    pub backends: Arc<Backends>,
    /// What clients are shown; absent where every listener is plain.
    pub tls: Option<ServerTls>,
    /// What users are called.
    pub naming: Naming,
    /// From where logins on behalf of others may come; `None`: from everywhere.
    pub master_networks: Option<Vec<Network>>,
    /// Ways to log in that each listener offers; `None`: those that the backends have.
    pub mechanisms: Vec<Option<Mechanisms>>,
    /// How long servers take to refuse a login.
    pub refusals: Refusals,
    /// Deadlines and caps.
    pub limits: Arc<Limits>,
    /// Who may come in and try; the same for all configurations of a process.
    pub guard: Arc<Guard>,
    /// Who else is asked.
    pub policy: Option<Arc<Policy>>,
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
        let router = Router::build(config, &metrics);
        let backends = Backends::build(config, &metrics, None);
        let policy = Policy::build(config);
        match (tls, router, backends, policy) {
            (Ok(tls), Ok(router), Ok(backends), Ok(policy)) => {
                let mechanisms = config.listeners.iter().map(|listener| listener.mechanisms).collect();
                Ok(Self {
                    router,
                    backends: Arc::new(backends),
                    tls,
                    naming: config.naming.clone(),
                    master_networks: config.master_networks.clone(),
                    mechanisms,
                    refusals: Refusals::default(),
                    limits: Arc::new(config.limits.clone()),
                    guard: Arc::new(Guard::new(&config.guard, Instant::now())),
                    policy,
                    metrics,
                })
            }
            (tls, router, backends, policy) => {
                let found = [tls.err(), router.err(), backends.err(), policy.err()];
                Err(Report::new(found.into_iter().flatten().flatten().collect()))
            }
        }
    }
}

impl Live {
    /// Ways to log in that the listener at this place offers just now.
    pub fn mechanisms(&self, listener: usize) -> Mechanisms {
        self.mechanisms[listener].unwrap_or_else(|| self.backends.offered())
    }

    /// Whether a login on behalf of another user may come from there.
    pub fn allows_masters_from(&self, client: IpAddr) -> bool {
        self.master_networks.as_ref().is_none_or(|networks| networks.iter().any(|network| network.contains(client)))
    }

    /// The servers to try for `user` in this place, in order; waits for DNS only while it has never answered.
    pub async fn servers(&self, place: &Place, user: &str) -> Vec<Arc<Server>> {
        let backend = self.backends.backend(place.backend);
        match &place.at {
            At::Any => backend.candidates(user).await,
            At::Server(name) => {
                let mut servers = backend.candidates(user).await;
                servers.retain(|server| *server.name == **name);
                servers
            }
            At::Address(address) => backend.at(*address).into_iter().collect(),
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
    let mut sockets = Vec::new();
    for listener in &config.listeners {
        let bound = listener::bind(listener, &config.listeners, config.limits.workers)
            .with_context(|| format!("{} cannot be bound ({})", listener.address, listener.place.key))?;
        sockets.push(bound);
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
    let addresses = sockets.iter().map(|of_listener| of_listener[0].local_addr()).collect::<io::Result<Vec<_>>>()?;
    live.backends.start(&OwnAddresses::new(addresses.clone()), &background, &stop_background);
    if let Some(interval) = config.limits.probe {
        live.backends.clone().probe(interval, live.limits.clone(), &background, &stop_background);
    }
    live.router.start(&live.metrics, &Handle::current(), &background, &stop_background);
    let measured = live.guard.clone();
    live.metrics.measure_guard(move || measured.sizes().labelled().to_vec());
    if let Some(tls) = &live.tls {
        tls.publish(&live.metrics);
    }
    for (address, configured) in addresses.iter().zip(&config.listeners) {
        tracing::info!(%address, tls = ?configured.tls, "listening");
    }
    let starting = Starting {
        live: live.clone(),
        permits: Arc::new(Semaphore::new(config.limits.sessions)),
        drain: drain.clone(),
        stop: stop_background.clone(),
        background: background.clone(),
    };
    for _ in 0..config.limits.workers {
        // One socket of each listener.
        let mine = sockets.iter_mut().filter_map(Vec::pop).zip(&config.listeners).collect();
        starting.worker(mine).context("a worker could not be started")?;
    }
    let admin_address = admin.as_ref().map(Admin::address);
    if let Some(admin) = admin {
        tracing::info!(address = %admin.address(), "metrics and health");
        background.spawn(admin.run(stop_background.clone()));
    }
    Ok(Running { listeners: addresses, admin: admin_address, live, drain, background, stop_background })
}

/// What workers are made of.
struct Starting {
    live: Arc<Live>,
    permits: Arc<Semaphore>,
    drain: Drain,
    stop: CancellationToken,
    background: TaskTracker,
}

impl Starting {
    /// Starts a worker that accepts from `sockets`, and ends when all is stopped.
    fn worker(&self, sockets: Vec<(TcpListener, &config::Listener)>) -> io::Result<()> {
        let worker = Worker::new()?;
        let guard = worker.enter();
        let house = House {
            live: self.live.clone(),
            permits: self.permits.clone(),
            drain: self.drain.clone(),
            room: Arc::new(Room::new(self.live.metrics.silent_sessions())?),
        };
        let listeners = sockets.into_iter().enumerate();
        let listeners: Vec<Listener> = listeners
            .map(|(index, (socket, configured))| Listener::new(index, configured.tls, socket))
            .collect::<io::Result<_>>()?;
        drop(guard);
        let (over, stop, running) = (self.drain.over().clone(), self.stop.clone(), self.background.token());
        worker.start(async move {
            for listener in listeners {
                tokio::spawn(listener.run(house.clone()));
            }
            let closing = async {
                tokio::select! {
                    () = over.cancelled() => {}
                    () = stop.cancelled() => {}
                }
            };
            house.room.run(closing).await;
            // Those let out end on this thread, and the stop waits for them.
            stop.cancelled().await;
            drop(running);
        })
    }
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
