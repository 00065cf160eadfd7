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

pub(crate) async fn run(file: &Path, replace: bool) -> anyhow::Result<ExitCode> {
    let mut signals = Signals::new().context("signal handlers")?;
    let started = tokio::select! {
        started = start(file, replace) => started?,
        () = signals.stop() => {
            tracing::info!("stopped before the start was complete");
            return Ok(ExitCode::SUCCESS);
        }
    };
    if let Ok(null) = std::fs::File::open("/dev/null") {
        // A successor's standard input may be a socket on which its predecessor reads the error of a failed start.
        let _ = rustix::stdio::dup2_stdin(null);
    }
    serve(file, started, signals).await
}

struct Started {
    running: Arc<Running>,
    control: Option<ControlServer>,
}

/// Everything that is built before anything is bound.
struct Plan {
    prepared: Prepared,
    control: Option<PathBuf>,
    identity: Option<Identity>,
}

impl Plan {
    /// Reads and builds everything. Blocks, because tables of millions of lines take seconds.
    fn build(file: &Path) -> anyhow::Result<Self> {
        let config = config::load(file)?;
        logging::install(&config.log);
        rlimits::prepare(config.limits.sessions);
        deadline::watch_for_pauses().context("the thread that detects pauses of this process could not be started")?;
        let (control, identity) = (config.control.clone(), privileges::resolve(&config)?);
        for warning in preflight::cache_file_warnings(&config, identity.as_ref())? {
            tracing::warn!("{warning}");
        }
        Ok(Self { prepared: server::prepare(config)?, control, identity })
    }

    /// Returns the users whose control sockets may be replaced, and whose processes are trusted.
    fn trusted_users(&self) -> Vec<u32> {
        let user = self.identity.as_ref().map(|identity| identity.owner().0);
        [0, rustix::process::geteuid().as_raw()].into_iter().chain(user).collect()
    }
}

/// Starts the proxy: reads, builds, binds, drops privileges, serves, takes over. The order matters:
///
/// 1. Everything is built before anything is bound, so that an invalid configuration changes nothing.
/// 2. Everything is bound before privileges are dropped.
/// 3. Everything that can fail precedes the publication of the control socket, and that precedes the predecessor's retirement.
async fn start(file: &Path, replace: bool) -> anyhow::Result<Started> {
    let path = file.to_owned();
    let plan = spawn_blocking(move || Plan::build(&path)).await.context("the configuration could not be built")??;
    let trusted = plan.trusted_users();
    let replaced = process_to_replace(plan.control.as_deref(), &trusted, replace)?;
    plan.identity.as_ref().map_or(Ok(()), Identity::check)?;
    let mut sockets = socket_handover::from_systemd();
    let mut predecessor = None;
    if let Some(path) = replaced {
        let (found, received) = Predecessor::take_over(path, trusted.clone()).await?;
        sockets.extend(received);
        predecessor = Some(found);
    }
    let bound = plan.prepared.bind(sockets)?;
    let new_identity = plan.identity.as_ref().filter(|identity| identity.is_change());
    let control = match &plan.control {
        Some(path) => {
            let pending = PendingSocket::bind(path, new_identity.map(Identity::owner))?;
            Some(ControlSocket::Pending(pending).publish_as_root(
                path,
                new_identity,
                predecessor.is_some(),
                &trusted,
            )?)
        }
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
        Some(predecessor) => predecessor.ready().await?,
        None => None,
    };
    let unused = bound.unused().to_vec();
    let running = Arc::new(bound.with_states(states).start()?);
    count_panics(&running.metrics());
    logging::count_dropped_lines(running.metrics().log_lines_dropped());
    let published = control.map(|control| control.publish(predecessor.as_ref(), &trusted)).transpose()?;
    let control = published.map(ControlServer::new).transpose().context("the control socket cannot be used")?;
    // Operators may have changed states since `ready`. No command is served before they are adopted.
    if let Some(predecessor) = predecessor
        && let Some(states) = predecessor.serving(unused).await?
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
    /// Publishes the socket before privileges are dropped, if the user of `run_as` may not create files in its directory.
    fn publish_as_root(
        self,
        path: &Path,
        new_identity: Option<&Identity>,
        is_replacing: bool,
        trusted: &[u32],
    ) -> anyhow::Result<Self> {
        match (self, new_identity) {
            (Self::Pending(pending), Some(identity)) if must_publish_as_root(identity, path, is_replacing)? => {
                Ok(Self::Published(pending.publish(IfListening::Fail, trusted)?))
            }
            (socket, _) => Ok(socket),
        }
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
    control: Option<&'a Path>,
    trusted: &[u32],
    replace: bool,
) -> anyhow::Result<Option<&'a Path>> {
    let Some(path) = control else {
        anyhow::ensure!(!replace, "--replace requires admin.control, the path of the running process's control socket");
        return Ok(None);
    };
    if control_socket::path_state(path, trusted)? != PathState::Listening {
        return Ok(None);
    }
    anyhow::ensure!(replace, "another process already answers at {}: replace it with --replace", path.display());
    Ok(Some(path))
}

/// Whether the control socket must be published before privileges are dropped, because the user of `run_as` may not create files
/// in its directory.
fn must_publish_as_root(identity: &Identity, path: &Path, is_replacing: bool) -> anyhow::Result<bool> {
    let directory = control_socket::directory(path);
    let shown = directory.display();
    let may_write = control_socket::may_write(directory, identity.owner().0, &identity.groups()?);
    if may_write.with_context(|| shown.to_string())? {
        return Ok(false);
    }
    anyhow::ensure!(
        !is_replacing,
        "{shown}, the directory of admin.control, must be writable by the user of run_as to replace a running process"
    );
    tracing::warn!(
        "{shown}, the directory of admin.control, is not writable by the user of run_as: this process cannot be upgraded"
    );
    Ok(true)
}

async fn serve(file: &Path, started: Started, mut signals: Signals) -> anyhow::Result<ExitCode> {
    let Started { running, control } = started;
    notify(&running, NotifyState::Ready);
    let succession = Succession::default();
    let (retire, mut retirements) = mpsc::channel(1);
    let connections = control.as_ref().map(ControlServer::connections).unwrap_or_default();
    if let Some(control) = control {
        tokio::spawn(control.run(running.clone(), file.to_owned(), succession.clone(), retire.clone()));
    }
    loop {
        tokio::select! {
            request = signals.next() => match request {
                MainRequest::Reload => reload(&running, &succession, file),
                MainRequest::Stop => {
                    succession.stop();
                    notify(&running, NotifyState::Stopping);
                    running.announce_stop(signals.stop()).await;
                    running.drain(signals.stop()).await;
                    break;
                }
            },
            Some(RetireRequest { successor, unused, received }) = retirements.recv() => {
                tracing::info!(successor, "a successor has taken over");
                notify(&running, NotifyState::MainPid(successor));
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

/// Reloads in the background, so that signals and commands are handled during the reload. Errors are logged, and set a gauge.
fn reload(running: &Arc<Running>, succession: &Succession, file: &Path) {
    if let Some(refusal) = succession.reload_refusal() {
        return tracing::error!("the configuration was not loaded: {refusal}");
    }
    let (running, file) = (running.clone(), file.to_owned());
    tokio::spawn(async move { drop(running.reload(&file).await) });
}

/// Installs a panic hook that counts panics and logs their location. A panic ends one session.
fn count_panics(metrics: &Metrics) {
    let panics = metrics.panics();
    std::panic::set_hook(Box::new(move |info| {
        panics.inc();
        // Without the panic's message, because it may contain data from a peer.
        let place = info.location().map(ToString::to_string).unwrap_or_default();
        tracing::error!(%place, "a session ended in a panic: please report this");
        logging::flush_at_panic();
    }));
}

fn notify(running: &Running, state: NotifyState<'_>) {
    let text = format!("{} listeners", running.listeners().len());
    if let Err(error) = sd_notify::notify(&[state, NotifyState::Status(&text)]) {
        tracing::warn!(%error, "systemd could not be notified");
    }
}
