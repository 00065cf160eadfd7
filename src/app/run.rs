//! `vestibule run`: the order of start-up, and what the process does from then on until it stops.
//!
//! Everything that can fail comes before the control socket is published, and that before a predecessor retires. Until then
//! SIGTERM and SIGINT end the start, whatever it waits for, and temporary files are removed.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use crate::api::place::{self, Occupant, PendingSocket};
use crate::api::predecessor::Predecessor;
use crate::api::{Control, Retire, Succession};
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

/// An answer to a command is waited for this long when the process ends.
const ANSWERS_DEADLINE: std::time::Duration = std::time::Duration::from_secs(2);

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
        // A successor's standard input may be a socket of the process before it, which has nothing to read there any more.
        let _ = rustix::stdio::dup2_stdin(null);
    }
    serve(file, started, signals).await
}

struct Started {
    running: Arc<Running>,
    control: Option<Control>,
}

/// What is known of the process before anything is bound.
struct Plan {
    prepared: Prepared,
    control: Option<PathBuf>,
    identity: Option<Identity>,
}

impl Plan {
    /// Reads and builds everything. Blocks: tables of millions of lines take seconds.
    fn build(file: &Path) -> anyhow::Result<Self> {
        let config = config::load(file)?;
        logging::install(&config.log);
        rlimits::prepare(config.limits.sessions);
        deadline::watch_for_pauses().context("no thread for the pauses of this process")?;
        let (control, identity) = (config.control.clone(), privileges::resolve(&config)?);
        for warning in preflight::cache_file_warnings(&config, identity.as_ref())? {
            tracing::warn!("{warning}");
        }
        Ok(Self { prepared: server::prepare(config)?, control, identity })
    }

    /// Users whose control sockets may be replaced, and whose processes are believed.
    fn trusted(&self) -> Vec<u32> {
        let user = self.identity.as_ref().map(|identity| identity.owner().0);
        [0, rustix::process::geteuid().as_raw()].into_iter().chain(user).collect()
    }
}

async fn start(file: &Path, replace: bool) -> anyhow::Result<Started> {
    let path = file.to_owned();
    let plan = spawn_blocking(move || Plan::build(&path)).await.context("the configuration could not be built")??;
    let trusted = plan.trusted();
    let is_replacing = is_replacing(plan.control.as_deref(), &trusted, replace)?;
    plan.identity.as_ref().map_or(Ok(()), Identity::check)?;
    let mut predecessor = None;
    let mut sockets = socket_handover::of_systemd();
    if is_replacing && let Some(path) = &plan.control {
        let (found, handed_over) = Predecessor::take_over(path, trusted.clone()).await?;
        sockets.extend(handed_over);
        predecessor = Some(found);
    }
    let bound = plan.prepared.bind(sockets)?;
    let changed = plan.identity.as_ref().filter(|identity| identity.is_change());
    let mut pending = match &plan.control {
        Some(path) => Some(PendingSocket::bind(path, changed.map(Identity::owner))?),
        None => None,
    };
    let mut published = None;
    if let (Some(identity), Some(path)) = (changed, &plan.control)
        && must_publish_as_root(identity, path, predecessor.is_some())?
    {
        published = pending.take().map(|pending| pending.publish(false, &trusted)).transpose()?;
    }
    if let Some(identity) = changed {
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
    if let Some(pending) = pending {
        predecessor.as_ref().map_or(Ok(()), Predecessor::check_time)?;
        published = Some(pending.publish(predecessor.is_some(), &trusted)?);
    }
    // Before the predecessor retires: what can fail must fail while it still serves.
    let control = published.map(Control::new).transpose().context("the control socket cannot be used")?;
    // Once more, because an operator may have changed states in the meantime. Commands are answered only after that.
    if let Some(predecessor) = predecessor
        && let Some(states) = predecessor.serving(unused).await?
    {
        running.adopt_states(&states).await;
    }
    Ok(Started { running, control })
}

/// Whether there is a process whose place is to be taken.
fn is_replacing(control: Option<&Path>, trusted: &[u32], replace: bool) -> anyhow::Result<bool> {
    let Some(path) = control else {
        anyhow::ensure!(
            !replace,
            "--replace takes admin.control in the configuration: it is where the running process is asked"
        );
        return Ok(false);
    };
    let is_there = place::occupant(path, trusted)? == Occupant::Process;
    anyhow::ensure!(
        !is_there || replace,
        "another process answers at {} already: take its place with --replace",
        path.display()
    );
    Ok(is_there)
}

/// Whether the control socket must get its name before privileges are dropped, because the user has not the right to give it one.
fn must_publish_as_root(identity: &Identity, path: &Path, is_replacing: bool) -> anyhow::Result<bool> {
    let folder = path.parent().filter(|folder| *folder != Path::new("")).unwrap_or(Path::new("."));
    let shown = folder.display();
    let may_write = place::may_write(folder, identity.owner().0, &identity.groups()?);
    if may_write.with_context(|| shown.to_string())? {
        return Ok(false);
    }
    anyhow::ensure!(
        !is_replacing,
        "{shown}, the folder of admin.control, must be writable by the user of run_as, who takes the socket's name"
    );
    tracing::warn!(
        "{shown}, the folder of admin.control, is not writable by the user of run_as: this process cannot be upgraded"
    );
    Ok(true)
}

async fn serve(file: &Path, started: Started, mut signals: Signals) -> anyhow::Result<ExitCode> {
    let Started { running, control } = started;
    notify(&running, NotifyState::Ready);
    let succession = Succession::default();
    let (retire, mut retirements) = mpsc::channel(1);
    let commands = control.as_ref().map(Control::connections).unwrap_or_default();
    if let Some(control) = control {
        tokio::spawn(control.run(running.clone(), file.to_owned(), succession.clone(), retire.clone()));
    }
    loop {
        tokio::select! {
            asked = signals.next() => match asked {
                MainRequest::Reload => reload(&running, &succession, file),
                MainRequest::Stop => {
                    succession.stop();
                    notify(&running, NotifyState::Stopping);
                    running.announce_stop(signals.stop()).await;
                    running.drain(signals.stop()).await;
                    break;
                }
            },
            Some(Retire { successor, unused, begun }) = retirements.recv() => {
                tracing::info!(successor, "a successor has taken over");
                notify(&running, NotifyState::MainPid(successor));
                // The successor need not wait for it.
                let _ = begun.send(());
                running.retire(&unused, signals.stop()).await;
                break;
            }
        }
    }
    // The operator who asked for an upgrade is to read its answer.
    commands.close();
    let _ = tokio::time::timeout(ANSWERS_DEADLINE, commands.wait()).await;
    Ok(ExitCode::SUCCESS)
}

/// Reloads in the background, so that signals and commands are answered during the reload. Mistakes are logged, and a gauge shows them.
fn reload(running: &Arc<Running>, succession: &Succession, file: &Path) {
    if let Some(refusal) = succession.reload_refusal() {
        return tracing::error!("the configuration was not loaded: {refusal}");
    }
    let (running, file) = (running.clone(), file.to_owned());
    tokio::spawn(async move { drop(running.reload(&file).await) });
}

/// Counts panics, each of which ends one session, and logs where they were.
fn count_panics(metrics: &Metrics) {
    let panics = metrics.panics();
    std::panic::set_hook(Box::new(move |info| {
        panics.inc();
        // The message could hold what a peer sent: the place is enough to find it.
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
