//! The program: runs the command of the command line, and turns its result into an exit code.

pub mod preflight;
mod run;

use std::fs::File;
use std::io::Write as _;
use std::os::fd::AsFd as _;
use std::path::Path;
use std::process::ExitCode;

use anyhow::Context as _;

use self::run::StartMode;
use crate::api::client::NotPermitted;
use crate::api::control_socket::ControlSocketError;
use crate::api::succession::launch::{self, REPORT_ON_STDIN, REPORT_VARIABLE};
use crate::cli::explain::Outcome;
use crate::cli::{self, Command, explain, operate};
use crate::config::{self, Report};
use crate::identity::UserName;
use crate::process::privileges;
use crate::snapshot::Snapshot;
use crate::{demo, logging};

/// Exit codes of sysexits.h, which systemd and scripts distinguish.
const EX_USAGE: u8 = 64;
const EX_SOFTWARE: u8 = 70;
const EX_NOPERM: u8 = 77;
const EX_CONFIG: u8 = 78;

/// Runs the command of the command line, reports its error, and returns the exit code of the process.
pub fn run() -> ExitCode {
    let command = cli::parse();
    let is_run = matches!(command, Command::Run { .. });
    match dispatch(command) {
        Ok(code) => {
            logging::flush();
            code
        }
        Err(error) => {
            let text = if error.is::<Report>() { format!("{error}") } else { format!("vestibule: {error:#}\n") };
            if is_run {
                report_to_predecessor(&text);
            }
            logging::print_last_error(&text);
            ExitCode::from(exit_code(&error))
        }
    }
}

fn exit_code(error: &anyhow::Error) -> u8 {
    if error.is::<Report>() {
        EX_CONFIG
    } else if error.is::<NotPermitted>()
        || error.downcast_ref::<ControlSocketError>().is_some_and(ControlSocketError::is_permission)
    {
        EX_NOPERM
    } else {
        EX_SOFTWARE
    }
}

/// Sends the error of a failed start to the predecessor, if `vestibule upgrade` started this process.
fn report_to_predecessor(text: &str) {
    if std::env::var(REPORT_VARIABLE).is_ok_and(|value| value == REPORT_ON_STDIN)
        && let Ok(stdin) = std::io::stdin().as_fd().try_clone_to_owned()
    {
        // The error is also logged, so a failed write is ignored.
        let _ = File::from(stdin).write_all(text.as_bytes());
    }
}

fn dispatch(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Run { .. } if launch::is_launcher() => {
            launch::launch().context("the successor could not be started")?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Run { config, replace } => {
            let runtime = runtime()?;
            let mode = if replace { StartMode::ReplaceRunning } else { StartMode::New };
            let result = runtime.block_on(run::run(&config, mode));
            // A cancelled start does not wait for the tables that it was reading.
            runtime.shutdown_background();
            result
        }
        Command::Check { config, offline } => check(&config, offline),
        Command::Route { config, diff: Some(new), users: Some(users), .. } => diff(&config, &new, &users),
        Command::Route { config, user, .. } => route(&config, &user.unwrap_or_default()),
        Command::Demo(options) => {
            runtime()?.block_on(demo::run(options))?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Operate(command) => runtime()?.block_on(operate::run(command)),
    }
}

fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build().context("the runtime could not be started")
}

/// Builds everything and binds nothing. Warnings are printed to standard error and do not change the exit code.
fn check(file: &Path, offline: bool) -> anyhow::Result<ExitCode> {
    let snapshot = build(file)?;
    let identity = privileges::resolve(&snapshot.config)?;
    let mut warnings = snapshot.config.warnings.clone();
    warnings.extend(preflight::cache_file_warnings(&snapshot.config, identity.as_ref())?);
    if !offline {
        warnings.extend(runtime()?.block_on(preflight::server_warnings(&snapshot)));
    }
    for warning in Report::new(warnings).problems() {
        eprintln!("warning: {warning}");
    }
    println!(
        "{}: ok ({} listeners, {} backends, {} routes)",
        file.display(),
        snapshot.config.listeners.len(),
        snapshot.config.backends.len(),
        snapshot.config.routes.len()
    );
    Ok(ExitCode::SUCCESS)
}

fn route(file: &Path, user: &str) -> anyhow::Result<ExitCode> {
    let snapshot = build(file)?;
    let user = match UserName::new(user.as_bytes()) {
        Ok(user) => user,
        Err(error) => {
            eprintln!("vestibule: {error}");
            return Ok(ExitCode::from(EX_USAGE));
        }
    };
    let explanation = runtime()?.block_on(explain::explain(&snapshot, &user));
    print!("{}", explanation.text);
    Ok(match explanation.outcome {
        Outcome::Routed => ExitCode::SUCCESS,
        Outcome::Refused => ExitCode::FAILURE,
    })
}

/// Lists the users whose routes differ between two configurations.
fn diff(old: &Path, new: &Path, users: &Path) -> anyhow::Result<ExitCode> {
    let (old, new) = (build(old)?, build(new)?);
    let names = std::fs::read(users).with_context(|| users.display().to_string())?;
    let out = std::io::stdout().lock();
    let moved = runtime()?.block_on(explain::diff(&old, &new, &names, out))?;
    Ok(if moved == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn build(file: &Path) -> anyhow::Result<Snapshot> {
    Ok(Snapshot::build(config::load(file)?, None)?)
}
