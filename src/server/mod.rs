//! The server: builds everything from a configuration before it binds anything, starts, reloads and stops.
//!
//! A [`Snapshot`] is everything built from one configuration, as one immutable value. [`Running`] owns what outlives a
//! configuration: the workers, the listening sockets (`listener_set`) and the session registry.

mod listener_set;
mod server_state;
mod state_file;

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::Context as _;
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use self::listener_set::{BoundListeners, ListenerSet};
pub use self::server_state::{BeforeRetirement, StateChange, StateChanged, UnknownServer};
use self::state_file::Loaded;
use crate::admission::connection_limit::ConnectionLimit;
use crate::backend::ListenerAddresses;
use crate::backend::state_override::StoredOverride;
use crate::config::{self, Config};
use crate::listener::{self, WorkerContext};
use crate::logging;
use crate::metrics::Metrics;
use crate::metrics::endpoint::AdminEndpoint;
use crate::process::drain::{Drain, DrainMode};
use crate::process::workers::Worker;
use crate::session::SessionPoller;
use crate::session_registry::SessionRegistry;
use crate::snapshot::{ListenerConfig, Snapshot};

/// Timeout for the end of all listener tasks when the process stops.
const LISTENERS_DEADLINE: Duration = Duration::from_secs(2);

/// A running proxy.
pub struct Running {
    current: Mutex<Current>,
    /// Held during a reload, so that reloads run one after the other.
    reloading: Arc<tokio::sync::Mutex<()>>,
    /// Held while administrative states are changed and saved.
    changing_states: tokio::sync::Mutex<()>,
    /// Whether a successor has taken over.
    retired: AtomicBool,
    workers: Vec<WorkerHandle>,
    /// Tasks of all listeners.
    listener_tasks: TaskTracker,
    sessions: Arc<SessionRegistry>,
    drain: Drain,
    background: TaskTracker,
    stop_background: CancellationToken,
}

/// The state that a reload replaces.
struct Current {
    snapshot: Arc<Snapshot>,
    listener_set: ListenerSet,
    /// Cancels the background tasks that were started for this configuration.
    stop: CancellationToken,
    admin: Option<Endpoint>,
    /// Whether the listeners were closed permanently, because the process is stopping or was replaced.
    is_closed: bool,
}

/// The endpoint for metrics and health.
struct Endpoint {
    configured: SocketAddr,
    bound: SocketAddr,
    /// A copy of the listening socket, for a successor.
    copy: OwnedFd,
    stop: CancellationToken,
}

/// A handle to a worker for other threads.
#[derive(Clone)]
struct WorkerHandle {
    runtime: Handle,
    context: WorkerContext,
}

/// The changes made by a reload.
#[derive(Debug, Default)]
pub struct Reloaded {
    /// Addresses at which listeners were opened.
    pub opened: Vec<SocketAddr>,
    /// Addresses at which listeners were closed.
    pub closed: Vec<SocketAddr>,
    /// Keys whose new value requires a restart; the old value stays in use.
    pub unchanged: Vec<&'static str>,
}

/// A built configuration whose ports are bound. Nothing is served yet.
pub struct Bound {
    snapshot: Arc<Snapshot>,
    opening: BoundListeners,
    admin: Option<(AdminEndpoint, OwnedFd)>,
    drain: Drain,
    /// Addresses of inherited sockets that the configuration does not use.
    unused: Vec<SocketAddr>,
    /// Administrative states that a predecessor has handed over.
    states: Option<Vec<StoredOverride>>,
}

/// Builds everything from a configuration and binds nothing.
///
/// # Errors
/// A [`config::Report`] of the configuration's problems.
pub fn prepare(config: Config) -> anyhow::Result<Prepared> {
    Ok(Prepared(Arc::new(Snapshot::build(config, None)?)))
}

/// A built configuration.
pub struct Prepared(Arc<Snapshot>);

impl Prepared {
    /// Binds all listeners. A socket in `inherited` is used if it fits a configured address, and closed otherwise. Must be called
    /// on a runtime.
    ///
    /// # Errors
    /// An address cannot be bound.
    pub fn bind(self, mut inherited: Vec<TcpListener>) -> anyhow::Result<Bound> {
        let (snapshot, drain) = (self.0, Drain::default());
        let listener_set = ListenerSet::default();
        let opening = listener_set.bind(&snapshot.config, &mut inherited, &[])?;
        let admin = bind_admin(&snapshot, &drain, &listener_set, &mut inherited, &[])?;
        let mut unused: Vec<SocketAddr> = inherited.iter().filter_map(|socket| socket.local_addr().ok()).collect();
        unused.sort_unstable();
        unused.dedup();
        for address in &unused {
            tracing::warn!(%address, "inherited socket closed: no listener is configured at its address");
        }
        Ok(Bound { snapshot, opening, admin, drain, unused, states: None })
    }
}

impl Bound {
    /// Addresses of inherited sockets that the configuration does not use.
    pub fn unused(&self) -> &[SocketAddr] {
        &self.unused
    }

    /// Uses the administrative states of a predecessor instead of those in the state file.
    #[must_use]
    pub fn with_states(self, states: Option<Vec<StoredOverride>>) -> Self {
        Self { states, ..self }
    }

    /// Changes the owner of the listening sockets. The kernel allows addresses to overlap only for sockets of the same user, and
    /// they do overlap when a reload changes a listener's address.
    ///
    /// # Errors
    /// The process is not run by root.
    pub fn give_to(&self, (user, group): (u32, u32)) -> io::Result<()> {
        let listeners = self.opening.sockets().map(AsFd::as_fd);
        let mut all = listeners.chain(self.admin.iter().map(|(_, copy)| copy.as_fd()));
        all.try_for_each(|socket| std::os::unix::fs::fchown(socket, Some(user), Some(group)))
    }

    /// Starts the workers and listeners. When this returns, connections are served.
    ///
    /// # Errors
    /// The system has no threads or descriptors for the workers.
    pub fn start(self) -> anyhow::Result<Running> {
        let Self { snapshot, opening, admin, drain, states, .. } = self;
        restore_states(&snapshot, states);
        let (background, stop_background) = (TaskTracker::new(), CancellationToken::new());
        let connection_limit = Arc::new(ConnectionLimit::default());
        let (mut workers, listener_tasks) = (Vec::new(), TaskTracker::new());
        for _ in 0..snapshot.config.limits.workers {
            let worker =
                start_worker(&snapshot, &drain, &connection_limit, &listener_tasks, (&background, &stop_background));
            workers.push(worker.context("a worker could not be started")?);
        }
        let stop = stop_background.child_token();
        let running = Running {
            sessions: snapshot.session_registry.clone(),
            current: Mutex::new(Current {
                snapshot: snapshot.clone(),
                listener_set: ListenerSet::default(),
                stop: stop.clone(),
                admin: None,
                is_closed: false,
            }),
            reloading: Arc::default(),
            changing_states: tokio::sync::Mutex::default(),
            retired: AtomicBool::new(false),
            workers,
            listener_tasks,
            drain,
            background,
            stop_background,
        };
        let measured = snapshot.admission.clone();
        let memory = measured.clone();
        snapshot
            .metrics
            .measure_admission(move || measured.sizes().labelled().to_vec(), move || memory.prelogin_memory());
        let mut current = running.lock();
        running.start_background(&snapshot, &stop, current.listener_set.addresses_with(&snapshot.config, &opening));
        current.listener_set.swap(&snapshot, opening, &running.workers).context("a listener could not be started")?;
        current.admin = admin.map(|admin| running.run_admin(&snapshot, admin));
        log_warnings(&snapshot.config);
        for (address, configured) in current.listener_set.addresses().iter().zip(&snapshot.config.listeners) {
            tracing::info!(%address, tls = configured.tls.as_str(), "listening");
        }
        drop(current);
        Ok(running)
    }
}

/// Builds, binds and starts in one step, for the demo and for tests.
///
/// # Errors
/// As [`prepare`], [`Prepared::bind`] and [`Bound::start`].
pub async fn start(config: Config, inherited: Vec<TcpListener>) -> anyhow::Result<Running> {
    prepare(config)?.bind(inherited)?.start()
}

fn log_warnings(config: &Config) {
    for warning in &config.warnings {
        tracing::warn!("{warning}");
    }
}

/// Restores the administrative states before the first login is routed.
fn restore_states(snapshot: &Snapshot, handed_over: Option<Vec<StoredOverride>>) {
    let loaded = match (handed_over, &snapshot.config.state_file) {
        (Some(states), _) => Loaded::States(states),
        (None, Some(file)) => state_file::load(file),
        (None, None) => Loaded::States(Vec::new()),
    };
    snapshot.metrics.state_file_failed(loaded == Loaded::Damaged);
    let states = match loaded {
        Loaded::States(states) => states,
        Loaded::Damaged => Vec::new(),
    };
    for StoredOverride { backend, server, set } in &states {
        let (state, by, since) = (set.state.as_str(), &set.by, set.since());
        tracing::info!(backend, server, state, by, since, reason = set.reason, "server state restored");
    }
    snapshot.backends.state_overrides().replace(&states);
}

/// Binds the endpoint for metrics and health, and copies its socket here so that nothing can fail after a configuration has been
/// replaced. The address may overlap with that of open listeners and of sockets in `others`.
fn bind_admin(
    snapshot: &Snapshot,
    drain: &Drain,
    listener_set: &ListenerSet,
    inherited: &mut Vec<TcpListener>,
    others: &[&OwnedFd],
) -> anyhow::Result<Option<(AdminEndpoint, OwnedFd)>> {
    let Some(address) = snapshot.config.admin else { return Ok(None) };
    let fits = |socket: &mut TcpListener| socket.local_addr().is_ok_and(|bound| bound == address);
    let socket = inherited.extract_if(.., fits).next();
    let bind = || {
        let sharing = listener_set.share_overlapping(address, inherited, others);
        let sockets = listener::bind(address, false, 1, sharing)?;
        listener::listen(&sockets)?;
        sockets.into_iter().next().ok_or_else(|| io::Error::other("no socket"))
    };
    let bound = socket.map_or_else(bind, Ok);
    let bound =
        bound.and_then(|socket| AdminEndpoint::new(socket, snapshot.metrics.clone(), drain.announced().clone()));
    let bound = bound.and_then(|admin| admin.copy().map(|copy| (admin, copy)));
    Ok(Some(bound.with_context(|| listener_set::cannot_bind(address, "admin.address"))?))
}

/// Starts a worker, which ends when the server stops.
fn start_worker(
    snapshot: &Snapshot,
    drain: &Drain,
    connection_limit: &Arc<ConnectionLimit>,
    listener_tasks: &TaskTracker,
    (background, stop): (&TaskTracker, &CancellationToken),
) -> io::Result<WorkerHandle> {
    let worker = Worker::new()?;
    let guard = worker.enter();
    let context = WorkerContext {
        connection_limit: connection_limit.clone(),
        drain: drain.clone(),
        poller: Arc::new(SessionPoller::new(snapshot.metrics.parked_sessions())?),
        listener_tasks: listener_tasks.clone(),
    };
    drop(guard);
    let handle = WorkerHandle { runtime: worker.handle(), context: context.clone() };
    let (over, stop, running) = (drain.over().clone(), stop.clone(), background.token());
    worker.start(async move {
        let closing = async {
            tokio::select! {
                () = over.cancelled() => {}
                () = stop.cancelled() => {}
            }
        };
        context.poller.run(closing).await;
        // Unparked sessions end on this thread, and the stop waits for them.
        stop.cancelled().await;
        drop(running);
    })?;
    Ok(handle)
}

/// The addresses as a log field; `None` if there are none.
fn listed(addresses: &[SocketAddr]) -> Option<String> {
    (!addresses.is_empty()).then(|| addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "))
}

impl Running {
    /// Reads the file again, builds everything, and then replaces the configuration in use. Established sessions are not affected;
    /// each keeps the settings it began with. After an error the old configuration stays in use as a whole.
    ///
    /// # Errors
    /// A [`config::Report`] of the file's problems, or an address that cannot be bound.
    pub async fn reload(&self, file: &Path) -> anyhow::Result<Reloaded> {
        let _one = self.reloading.lock().await;
        let result = self.replace(file).await;
        self.lock().snapshot.metrics.reloaded(result.is_ok());
        match &result {
            Ok(reloaded) => {
                let Reloaded { opened, closed, unchanged } = reloaded;
                let (opened, closed) = (listed(opened), listed(closed));
                tracing::info!(file = %file.display(), opened, closed, "configuration loaded");
                log_warnings(&self.snapshot().config);
                for key in unchanged {
                    tracing::warn!("{key} has changed: restart to apply it");
                }
            }
            Err(error) => {
                for line in format!("{error:#}").lines() {
                    tracing::error!("{line}; the old configuration stays in use");
                }
            }
        }
        result
    }

    /// Prevents reloads until the guard is dropped; `None` if a reload is in progress.
    pub(crate) fn block_reloads(&self) -> Option<tokio::sync::OwnedMutexGuard<()>> {
        self.reloading.clone().try_lock_owned().ok()
    }

    async fn replace(&self, file: &Path) -> anyhow::Result<Reloaded> {
        let before = self.lock().snapshot.clone();
        let (file, previous) = (file.to_owned(), before.clone());
        // Reading tables of millions of lines takes seconds, so it must not block a thread that serves.
        let built = tokio::task::spawn_blocking(move || Snapshot::build(config::load(&file)?, Some(&previous)));
        let snapshot = Arc::new(built.await.context("the configuration could not be built")??);
        let mut current = self.lock();
        // A stop may have begun while the configuration was built; listeners must not be opened again.
        anyhow::ensure!(!current.is_closed, "this process is stopping or was replaced");
        let moved = current.admin.as_ref().map(|admin| admin.configured) != snapshot.config.admin;
        let endpoint: Vec<&OwnedFd> = current.admin.iter().map(|admin| &admin.copy).collect();
        let opening = current.listener_set.bind(&snapshot.config, &mut Vec::new(), &endpoint)?;
        let admin = match moved {
            true => bind_admin(&snapshot, &self.drain, &current.listener_set, &mut Vec::new(), &endpoint)?,
            false => None,
        };
        let stop = self.stop_background.child_token();
        before.metrics.retire(&snapshot.metrics);
        self.start_background(&snapshot, &stop, current.listener_set.addresses_with(&snapshot.config, &opening));
        let change = match current.listener_set.swap(&snapshot, opening, &self.workers) {
            Ok(change) => change,
            Err(error) => {
                stop.cancel();
                return Err(error).context("a listener could not be started");
            }
        };
        // Ends the background tasks of the old configuration; those of the new one have been started.
        std::mem::replace(&mut current.stop, stop).cancel();
        current.snapshot = snapshot.clone();
        snapshot.admission.reconfigure(&snapshot.config.admission);
        logging::set_level(&snapshot.config.log);
        if moved {
            let admin = admin.map(|admin| self.run_admin(&snapshot, admin));
            if let Some(before) = std::mem::replace(&mut current.admin, admin) {
                before.stop.cancel();
            }
        }
        drop(current);
        before.backends.remove_stale_metrics(&snapshot.backends);
        before.router.retire(&snapshot.router);
        if let Some(policy) = &before.auth_policy {
            policy.retire();
        }
        let mut unchanged = Vec::new();
        for (key, is_same) in [
            ("limits.workers", before.config.limits.workers == snapshot.config.limits.workers),
            ("log.format", before.config.log.format == snapshot.config.log.format),
            ("admin.control", before.config.control == snapshot.config.control),
            ("run_as", before.config.run_as == snapshot.config.run_as),
        ] {
            if !is_same {
                unchanged.push(key);
            }
        }
        Ok(Reloaded { opened: change.opened, closed: change.closed, unchanged })
    }

    /// Starts the background tasks of a configuration, which end at `stop`.
    fn start_background(&self, snapshot: &Arc<Snapshot>, stop: &CancellationToken, own: Vec<SocketAddr>) {
        snapshot.backends.start_discovery(&ListenerAddresses::new(own), &self.background, stop);
        snapshot.backends.start_checks(&snapshot.limits, &self.background, stop);
        snapshot.router.start(&snapshot.metrics, &Handle::current(), &self.background, stop);
        if let Some(tls) = &snapshot.tls {
            tls.start(&snapshot.metrics, &Handle::current(), &self.background, stop);
        }
    }

    fn run_admin(&self, snapshot: &Snapshot, (admin, copy): (AdminEndpoint, OwnedFd)) -> Endpoint {
        let (bound, stop) = (admin.address(), self.stop_background.child_token());
        tracing::info!(address = %bound, "metrics and health");
        self.background.spawn(admin.run(stop.clone()));
        Endpoint { configured: snapshot.config.admin.unwrap_or(bound), bound, copy, stop }
    }

    /// Addresses of the listeners, in the order of the configuration, with the port that the system chose for port 0.
    pub fn listeners(&self) -> Vec<SocketAddr> {
        self.lock().listener_set.addresses()
    }

    /// Address of the endpoint for metrics and health.
    pub fn admin(&self) -> Option<SocketAddr> {
        self.lock().admin.as_ref().map(|admin| admin.bound)
    }

    /// The snapshot in use.
    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.lock().snapshot.clone()
    }

    /// The metrics of the snapshot in use.
    pub fn metrics(&self) -> Arc<Metrics> {
        self.lock().snapshot.metrics.clone()
    }

    /// The registry of sessions.
    pub fn sessions(&self) -> &Arc<SessionRegistry> {
        &self.sessions
    }

    /// Copies of all listening sockets, for a process that takes them over.
    ///
    /// # Errors
    /// The system has no descriptors for them.
    pub fn sockets(&self) -> io::Result<Vec<OwnedFd>> {
        let current = self.lock();
        let mut copies = current.listener_set.copies()?;
        if let Some(admin) = &current.admin {
            copies.push(admin.copy.try_clone()?);
        }
        Ok(copies)
    }

    /// Announces the stop to readiness checks and waits for `limits.ready_delay`, or until `hurry` completes, while connections are
    /// still accepted.
    pub async fn announce_stop(&self, hurry: impl Future<Output = ()>) {
        self.drain.announce();
        let delay = self.snapshot().limits.ready_delay;
        if delay.is_zero() {
            return;
        }
        let seconds = delay.as_secs_f64();
        tracing::info!(seconds, "stopping: /ready fails, connections are still accepted for limits.ready_delay");
        tokio::select! {
            () = tokio::time::sleep(delay) => {}
            () = hurry => tracing::info!("stopping immediately"),
        }
    }

    /// Stops: accepts no more connections, sends BYE to clients that have not logged in, and gives relayed sessions the configured
    /// grace time, or until `hurry` completes. Returns the number of sessions that were ended.
    pub async fn drain(&self, hurry: impl Future<Output = ()>) -> usize {
        self.shut_down(hurry, DrainMode::Stop, &[]).await
    }

    /// Stops because a successor serves on the same sockets, or on other sockets at the addresses in `replaced`. Differs from
    /// [`Running::drain`] in that clients that are logging in may complete the login.
    pub async fn retire(&self, replaced: &[SocketAddr], hurry: impl Future<Output = ()>) -> usize {
        self.set_retired();
        if let Some(admin) = self.lock().admin.take() {
            admin.stop.cancel();
        }
        // The cached answers of this process age while it waits for its sessions; those of the successor are newer.
        self.snapshot().router.stop_writing_files();
        self.shut_down(hurry, DrainMode::Retire, replaced).await
    }

    async fn shut_down(&self, hurry: impl Future<Output = ()>, mode: DrainMode, replaced: &[SocketAddr]) -> usize {
        let grace = self.grace();
        self.metrics().draining();
        {
            let mut current = self.lock();
            current.is_closed = true;
            current.listener_set.close(replaced);
        }
        // Listener tasks accept the connections that are queued in their sockets, and the drain waits for those sessions too.
        self.listener_tasks.close();
        if tokio::time::timeout(LISTENERS_DEADLINE, self.listener_tasks.wait()).await.is_err() {
            tracing::warn!("listeners do not end; queued connections are reset");
        }
        tracing::info!(sessions = self.drain.open_sessions(), grace_seconds = grace.as_secs(), "draining");
        let over = self.drain.over().clone();
        let (sessions, stopped) = (self.sessions.clone(), self.stop_background.clone());
        self.background.spawn(async move {
            // All sessions may end by themselves before the grace time is over.
            if stopped.run_until_cancelled(over.cancelled()).await.is_some() {
                sessions.close();
            }
        });
        let forced = self.drain.run(grace, hurry, mode).await;
        self.stop_background.cancel();
        self.background.close();
        self.background.wait().await;
        if forced > 0 {
            tracing::warn!(forced, "sessions were ended by the stop");
        }
        tracing::info!("stopped");
        forced
    }

    /// Stops without grace time, for the demo and for tests.
    pub async fn stop(self) {
        self.drain(std::future::ready(())).await;
    }

    /// Maximum duration of a drain, reported to systemd.
    pub fn grace(&self) -> Duration {
        self.lock().snapshot.limits.drain
    }

    fn lock(&self) -> MutexGuard<'_, Current> {
        // No code panics between two changes under this lock.
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
