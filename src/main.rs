//! The `vestibule` program: arguments, logging, configuration, then the library.

mod allocator;
mod successor;

use std::net::TcpListener;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context as _;
use tokio::sync::mpsc;
use vestibule::cli::{self, Command};
use vestibule::config::{self, Report};
use vestibule::control::client::Predecessor;
use vestibule::control::{Control, Wish};
use vestibule::identity::UserName;
use vestibule::metrics::Metrics;
use vestibule::server::{self, Live, Running};
use vestibule::shutdown::{Asked, Signals};
use vestibule::{demo, explain, inherit, limits, logging, operate, privileges};

/// sysexits.h: what systemd and scripts can tell apart.
const EX_USAGE: u8 = 64;
const EX_SOFTWARE: u8 = 70;
const EX_CONFIG: u8 = 78;

fn main() -> ExitCode {
    let command = cli::parse();
    match dispatch(command) {
        Ok(code) => code,
        Err(error) => {
            let is_config = error.downcast_ref::<Report>().is_some();
            if is_config {
                eprint!("{error}");
            } else {
                eprintln!("vestibule: {error:#}");
            }
            ExitCode::from(if is_config { EX_CONFIG } else { EX_SOFTWARE })
        }
    }
}

fn dispatch(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Run { config, replace } => runtime()?.block_on(run(&config, replace)),
        Command::Check { config } => check(&config),
        Command::Route { config, diff: Some(new), users: Some(users), .. } => diff(&config, &new, &users),
        Command::Route { config, user, .. } => route(&config, &user.unwrap_or_default()),
        Command::Demo(options) => {
            runtime()?.block_on(demo::run(options))?;
            Ok(ExitCode::SUCCESS)
        }
        // What is none of the above asks something of the running process.
        other => Ok(runtime()?.block_on(operate::operate(other))?.unwrap_or(ExitCode::FAILURE)),
    }
}

fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build().context("no runtime")
}

async fn run(file: &Path, replace: bool) -> anyhow::Result<ExitCode> {
    let config = config::load(file)?;
    logging::install(&config.log);
    limits::prepare(config.limits.sessions);
    let mut signals = Signals::new().context("signal handlers")?;
    let (control, run_as) = (config.control.clone(), config.run_as.clone());
    let prepared = server::prepare(config)?;
    let predecessor = predecessor(control.as_deref(), replace).await?;
    let mut sockets = inherit::of_systemd();
    let predecessor = predecessor.map(|(sender, handed_over)| {
        sockets.extend(handed_over);
        sender
    });
    let bound = prepared.bind(sockets)?;
    let control = match &control {
        Some(path) => {
            Some(Control::bind(path).with_context(|| format!("{} cannot be bound (admin.control)", path.display()))?)
        }
        None => None,
    };
    if let Some(run_as) = &run_as {
        privileges::drop_to(run_as)?;
    }
    let states = match &predecessor {
        Some(predecessor) => predecessor.states().await,
        None => None,
    };
    let running = Arc::new(bound.with_states(states).start()?);
    count_panics(&running.metrics());
    notify(&running, sd_notify::NotifyState::Ready);
    // Once more, because an operator may have changed some meanwhile.
    if let Some(predecessor) = predecessor
        && let Some(states) = predecessor.retire().await
    {
        running.adopt_states(&states).await;
    }
    let (wish, mut wishes) = mpsc::channel(1);
    if let Some(control) = control {
        tokio::spawn(control.run(running.clone(), file.to_owned(), wish));
    }
    loop {
        tokio::select! {
            asked = signals.next() => match asked {
                // What was wrong is logged, and a gauge says so.
                Asked::Reload => drop(running.reload(file).await),
                Asked::Stop => {
                    notify(&running, sd_notify::NotifyState::Stopping);
                    running.drain(signals.stop()).await;
                    return Ok(ExitCode::SUCCESS);
                }
            },
            Some(wish) = wishes.recv() => match wish {
                Wish::Upgrade => successor::start(file),
                Wish::Retire(pid) => {
                    tracing::info!(successor = pid, "a successor has taken over");
                    notify(&running, sd_notify::NotifyState::MainPid(pid));
                    running.retire(signals.stop()).await;
                    return Ok(ExitCode::SUCCESS);
                }
            },
        }
    }
}

/// Whose place is to be taken: none, or the one that answers commands where we are to.
async fn predecessor(control: Option<&Path>, replace: bool) -> anyhow::Result<Option<(Predecessor, Vec<TcpListener>)>> {
    let Some(path) = control else {
        anyhow::ensure!(
            !replace,
            "--replace takes admin.control in the configuration: it is where the running process is asked"
        );
        return Ok(None);
    };
    let Some(predecessor) = Predecessor::at(path).await else { return Ok(None) };
    anyhow::ensure!(replace, "another process answers at {} already: take its place with --replace", path.display());
    let sockets = predecessor.sockets().await?;
    Ok(Some((predecessor, sockets)))
}

/// Builds everything and binds nothing.
fn check(file: &Path) -> anyhow::Result<ExitCode> {
    let config = build(file)?.config;
    println!(
        "{}: ok ({} listeners, {} backends, {} routes)",
        file.display(),
        config.listeners.len(),
        config.backends.len(),
        config.routes.len()
    );
    Ok(ExitCode::SUCCESS)
}

fn route(file: &Path, user: &str) -> anyhow::Result<ExitCode> {
    let live = build(file)?;
    let user = match UserName::new(user.as_bytes()) {
        Ok(user) => user,
        Err(error) => {
            eprintln!("vestibule: {error}");
            return Ok(ExitCode::from(EX_USAGE));
        }
    };
    let (text, found) = runtime()?.block_on(explain::explain(&live, &user));
    print!("{text}");
    Ok(if found { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Who would move.
fn diff(old: &Path, new: &Path, users: &Path) -> anyhow::Result<ExitCode> {
    let (old, new) = (build(old)?, build(new)?);
    let names = std::fs::read(users).with_context(|| users.display().to_string())?;
    let out = std::io::stdout().lock();
    let moved = runtime()?.block_on(explain::diff(&old, &new, &names, out))?;
    Ok(if moved == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn build(file: &Path) -> anyhow::Result<Live> {
    Ok(Live::build(config::load(file)?, None)?)
}

/// A panic ends one session; the hook counts it and says where it was.
fn count_panics(metrics: &Metrics) {
    let panics = metrics.panics();
    std::panic::set_hook(Box::new(move |info| {
        panics.inc();
        // The message could hold what a peer sent: the place is enough to find it.
        let place = info.location().map(ToString::to_string).unwrap_or_default();
        tracing::error!(%place, "a session ended in a panic: please report this");
    }));
}

fn notify(running: &Running, state: sd_notify::NotifyState<'_>) {
    let text = format!("{} listeners", running.listeners().len());
    if let Err(error) = sd_notify::notify(&[state, sd_notify::NotifyState::Status(&text)]) {
        tracing::warn!(%error, "systemd could not be notified");
    }
}
