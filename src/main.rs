//! The `vestibule` program: arguments, logging, configuration, then the library.

mod allocator;

use std::path::Path;
use std::process::ExitCode;

use anyhow::Context as _;
use vestibule::cli::{self, Command};
use vestibule::config::{self, Report};
use vestibule::identity::UserName;
use vestibule::metrics::Metrics;
use vestibule::server::{self, Live, Running};
use vestibule::shutdown::{Asked, Signals};
use vestibule::{demo, explain, limits, logging};

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
        Command::Run { config } => runtime()?.block_on(run(&config)),
        Command::Check { config } => check(&config),
        Command::Route { config, diff: Some(new), users: Some(users), .. } => diff(&config, &new, &users),
        Command::Route { config, user, .. } => route(&config, &user.unwrap_or_default()),
        Command::Demo(options) => {
            runtime()?.block_on(demo::run(options))?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build().context("no runtime")
}

async fn run(file: &Path) -> anyhow::Result<ExitCode> {
    let config = config::load(file)?;
    logging::install(&config.log);
    limits::prepare(config.limits.sessions);
    let mut signals = Signals::new().context("signal handlers")?;
    let running = server::start(config, Vec::new()).await?;
    count_panics(&running.metrics());
    notify(&running, sd_notify::NotifyState::Ready);
    while signals.next().await == Asked::Reload {
        // What was wrong is logged, and a gauge says so.
        let _ = running.reload(file).await;
    }
    notify(&running, sd_notify::NotifyState::Stopping);
    running.drain(signals.stop()).await;
    Ok(ExitCode::SUCCESS)
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
