//! The command `run`: starts the proxy, and runs until it is stopped or replaced.
//!
//! SIGTERM and SIGINT cancel the start at any point, and its temporary files are removed.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use crate::api::context::RetireRequest;
use crate::api::control_server::ControlServer;
use crate::api::control_socket::{self, IfListening, PathState, PendingSocket, PublishedSocket};
use crate::api::succession::state::Succession;
use crate::api::succession::take_over::Predecessor;
use crate::app::preflight;
use crate::config;
use crate::deadline;
use crate::logging;
use crate::metrics::Metrics;
use crate::process::privileges::{self, Identity};
use crate::process::rlimits;
use crate::process::signals::{MainRequest, Signals};
use crate::process::socket_handover;
use crate::server::{self, Prepared, Running};
use anyhow::Context as _;
use sd_notify::NotifyState;
use tokio::sync::mpsc;
use tokio::task::spawn_blocking;

/// Time for responses to commands to be sent when the process ends.
const RESPONSES_DEADLINE: Duration = Duration::from_secs(2);

/// What happens if another process already listens at the control path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum StartMode {
    /// The start fails.
    New,
    /// This process takes over from it.
    ReplaceRunning,
}

pub(crate) async fn run(config_path: &Path, mode: StartMode) -> anyhow::Result<ExitCode> {
    let mut signals = Signals::new().context("signal handlers could not be installed")?;
    let started = tokio::select! {
        started = start(config_path, mode) => started?,
        () = signals.stop() => {
            tracing::info!("stopped before the start was complete");
            return Ok(ExitCode::SUCCESS);
        }
    };
    detach_stdin();
    serve(config_path, started, signals).await
}

/// Replaces standard input by `/dev/null`. If `vestibule upgrade` started this process, standard input is the socket from which the
/// predecessor reads the error of a failed start; closing it shows that the start has succeeded.
fn detach_stdin() {
    if let Ok(null) = std::fs::File::open("/dev/null") {
        let _ = rustix::stdio::dup2_stdin(null);
    }
}

struct Started {
    running: Arc<Running>,
    control: Option<ControlServer>,
}

/// The validated configuration and what was built from it, before any socket is bound.
struct Plan {
    prepared: Prepared,
    control_path: Option<PathBuf>,
    /// The user and group of `run_as`.
    identity: Option<Identity>,
}

impl Plan {
    /// Reads and builds everything. Blocks, because tables of millions of lines take seconds.
    fn build(config_path: &Path) -> anyhow::Result<Self> {
        let config = config::load(config_path)?;
        logging::install(&config.log);
        rlimits::prepare(config.limits.sessions);
        deadline::watch_for_pauses().context("the thread that detects pauses of this process could not be started")?;
        let (control_path, identity) = (config.control.clone(), privileges::resolve(&config)?);
        for warning in preflight::cache_file_warnings(&config, identity.as_ref())? {
            tracing::warn!("{warning}");
        }
        Ok(Self { prepared: server::prepare(config)?, control_path, identity })
    }

    /// Returns the users whose control sockets may be replaced, and whose processes are trusted.
    fn trusted_users(&self) -> Vec<u32> {
        let user = self.identity.as_ref().map(Identity::uid);
        [0, rustix::process::geteuid().as_raw()].into_iter().chain(user).collect()
    }
}

/// Starts the proxy: reads, builds, binds, drops privileges, serves, takes over. The order matters:
///
/// 1. Everything is built before anything is bound, so that an invalid configuration changes nothing.
/// 2. Everything is bound before privileges are dropped.
/// 3. The control socket is published as late as possible (except by [`ControlSocket::publish_as_root`]), and before the predecessor
///    retires. If a later step fails, the predecessor takes its path back.
async fn start(config_path: &Path, mode: StartMode) -> anyhow::Result<Started> {
    let path = config_path.to_owned();
    let plan = spawn_blocking(move || Plan::build(&path)).await.context("the configuration could not be built")??;
    let trusted = plan.trusted_users();
    let replaced = process_to_replace(plan.control_path.as_deref(), &trusted, mode)?;
    if let Some(identity) = &plan.identity {
        identity.check()?;
    }
    let mut sockets = socket_handover::from_systemd();
    let mut predecessor = None;
    if let Some(path) = replaced {
        let (found, received) = Predecessor::take_over(path, trusted.clone()).await?;
        sockets.extend(received);
        predecessor = Some(found);
    }
    let bound = plan.prepared.bind(sockets)?;
    let new_identity = plan.identity.as_ref().filter(|identity| identity.is_change());
    let control = match &plan.control_path {
        Some(path) => Some(ControlSocket::bind(path, new_identity, predecessor.as_ref(), &trusted)?),
        None => None,
    };
    if let Some(identity) = new_identity {
        bound.give_to(identity.owner()).context("the listening sockets could not be given to the user of run_as")?;
    }
    if let Some(identity) = &plan.identity {
        identity.assume()?;
        rlimits::forbid_core_dumps();
    }
    let states = match &mut predecessor {
        Some(predecessor) => predecessor.request_permission().await?,
        None => None,
    };
    let unused_addresses = bound.unused().to_vec();
    let running = Arc::new(bound.with_states(states).start()?);
    count_panics(&running.metrics());
    logging::count_dropped_lines(running.metrics().log_lines_dropped());
    let published = control.map(|control| control.publish(predecessor.as_ref(), &trusted)).transpose()?;
    let control = published.map(ControlServer::new).transpose().context("the control socket cannot be used")?;
    // Operators may have changed states since `request_permission`. No command is served before they are adopted.
    if let Some(predecessor) = predecessor
        && let Some(states) = predecessor.report_serving(unused_addresses).await?
    {
        running.adopt_states(&states).await;
    }
    Ok(Started { running, control })
}

/// The control socket during the start.
enum ControlSocket {
    Pending(PendingSocket),
    Published(PublishedSocket),
}

impl ControlSocket {
    /// Binds the socket under a temporary name. Publishes it at once if that needs root privileges.
    fn bind(
        path: &Path,
        new_identity: Option<&Identity>,
        predecessor: Option<&Predecessor>,
        trusted: &[u32],
    ) -> anyhow::Result<Self> {
        let pending = PendingSocket::bind(path, new_identity.map(Identity::owner))?;
        match new_identity {
            Some(identity) if !may_write_directory(identity, path)? => {
                Self::publish_as_root(pending, path, predecessor, trusted)
            }
            _ => Ok(Self::Pending(pending)),
        }
    }

    /// Publishes the socket before privileges are dropped, because the user of `run_as` may not create files in its directory.
    fn publish_as_root(
        pending: PendingSocket,
        path: &Path,
        predecessor: Option<&Predecessor>,
        trusted: &[u32],
    ) -> anyhow::Result<Self> {
        let directory = control_socket::directory(path).display();
        anyhow::ensure!(
            predecessor.is_none(),
            "{directory}, the directory of admin.control, must be writable by the user of run_as to replace a running process"
        );
        tracing::warn!(
            "{directory}, the directory of admin.control, is not writable by the user of run_as: this process cannot be upgraded \
             or replaced"
        );
        Ok(Self::Published(pending.publish(IfListening::Fail, trusted)?))
    }

    /// Publishes the socket, unless that has happened already.
    fn publish(self, predecessor: Option<&Predecessor>, trusted: &[u32]) -> anyhow::Result<PublishedSocket> {
        let pending = match self {
            Self::Pending(pending) => pending,
            Self::Published(published) => return Ok(published),
        };
        let if_listening = match predecessor {
            Some(predecessor) => {
                predecessor.check_time()?;
                IfListening::Replace
            }
            None => IfListening::Fail,
        };
        Ok(pending.publish(if_listening, trusted)?)
    }
}

/// Returns the control path of a running process, if there is one.
fn process_to_replace<'a>(
    control_path: Option<&'a Path>,
    trusted: &[u32],
    mode: StartMode,
) -> anyhow::Result<Option<&'a Path>> {
    let may_replace = mode == StartMode::ReplaceRunning;
    let Some(path) = control_path else {
        anyhow::ensure!(
            !may_replace,
            "--replace requires admin.control, the path of the running process's control socket"
        );
        return Ok(None);
    };
    if control_socket::path_state(path, trusted)? != PathState::Listening {
        return Ok(None);
    }
    anyhow::ensure!(may_replace, "another process already answers at {}: replace it with --replace", path.display());
    Ok(Some(path))
}

/// Whether the user of `run_as` may create files in the directory of the control socket at `path`.
fn may_write_directory(identity: &Identity, path: &Path) -> anyhow::Result<bool> {
    let directory = control_socket::directory(path);
    control_socket::may_write(directory, identity.uid(), &identity.groups()?)
        .with_context(|| format!("cannot read {}, the directory of admin.control", directory.display()))
}

async fn serve(config_path: &Path, started: Started, mut signals: Signals) -> anyhow::Result<ExitCode> {
    let Started { running, control } = started;
    notify(&[NotifyState::Ready, NotifyState::Status(&format!("{} listeners", running.listeners().len()))]);
    let succession = Succession::default();
    let (retire, mut retirements) = mpsc::channel(1);
    let connections = control.as_ref().map(ControlServer::connections).unwrap_or_default();
    if let Some(control) = control {
        tokio::spawn(control.run(running.clone(), config_path.to_owned(), succession.clone(), retire.clone()));
    }
    loop {
        tokio::select! {
            request = signals.next() => match request {
                MainRequest::Reload => reload(&running, &succession, config_path),
                MainRequest::Stop => {
                    succession.stop();
                    notify(&[NotifyState::Stopping, NotifyState::Status("stopping")]);
                    running.announce_stop(signals.stop()).await;
                    running.drain(signals.stop()).await;
                    break;
                }
            },
            Some(RetireRequest { successor, unused, received }) = retirements.recv() => {
                tracing::info!(successor, "a successor has taken over");
                // The successor sets the status.
                notify(&[NotifyState::MainPid(successor)]);
                // The successor does not wait for the notification.
                let _ = received.send(());
                running.retire(&unused, signals.stop()).await;
                break;
            }
        }
    }
    // The operator who started an upgrade must receive the response.
    connections.close();
    let _ = tokio::time::timeout(RESPONSES_DEADLINE, connections.wait()).await;
    Ok(ExitCode::SUCCESS)
}

/// Reloads in the background, so that signals and commands are handled during the reload.
fn reload(running: &Arc<Running>, succession: &Succession, config_path: &Path) {
    if let Some(refusal) = succession.reload_refusal() {
        tracing::error!("reload refused: {refusal}");
        return;
    }
    let (running, config_path) = (running.clone(), config_path.to_owned());
    tokio::spawn(async move {
        // `Running::reload` logs its errors, and sets a gauge.
        let _ = running.reload(&config_path).await;
    });
}

/// Installs a panic hook that counts panics and logs their location. A panic ends only its task.
fn count_panics(metrics: &Metrics) {
    let panics = metrics.panics();
    std::panic::set_hook(Box::new(move |info| {
        panics.inc();
        // Without the panic's message, because it may contain data from a peer.
        let place = info.location().map(ToString::to_string).unwrap_or_default();
        tracing::error!(%place, "a task panicked: this is a bug in Vestibule, please report it");
        logging::flush_at_panic();
    }));
}

fn notify(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::warn!(%error, "systemd could not be notified");
    }
}
