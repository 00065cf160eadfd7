//! The commands that ask something of the running process: sent, waited for, told. Called by `main`.

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use tokio::time;

use crate::cli::Command as Asked;
use crate::control::client::{ask, begin};
use crate::control::{Answer, Command};

/// sysexits.h EX_CONFIG.
const EX_CONFIG: u8 = 78;
/// How often a server that is being emptied is looked at.
const LOOK: Duration = Duration::from_millis(500);

/// Carries one out. `None`: it is not for the running process.
///
/// # Errors
/// Nobody answers.
pub async fn operate(asked: Asked) -> anyhow::Result<Option<ExitCode>> {
    let code = match asked {
        Asked::Reload { control } => {
            let answer = ask(&control.path, &Command::Reload).await?;
            if answer.ok { told(&answer) } else { told_of(&answer, EX_CONFIG) }
        }
        Asked::Upgrade { timeout, control } => {
            told(&ask(&control.path, &Command::Upgrade { timeout: timeout.as_secs_f64() }).await?)
        }
        Asked::Status { json, control } => shown(&ask(&control.path, &Command::Status).await?, json)?,
        Asked::Sessions { user, json, control } => {
            shown(&ask(&control.path, &Command::Sessions { user }).await?, json)?
        }
        Asked::Kick { user, control } => told(&ask(&control.path, &Command::Kick { user }).await?),
        Asked::Server { server, mode, control } => {
            let command = Command::Server { name: server, mode: mode.word().map(str::to_owned), over: None };
            told(&ask(&control.path, &command).await?)
        }
        Asked::Drain { server, over, control } => drain(&control.path, server, over).await?,
        Asked::Move { user, backend, command, control } => {
            let reply = match command {
                None => None,
                Some(command) => {
                    let reply = begin(&control.path, &Command::Hold { user: user.clone() }).await?;
                    eprintln!("{}", reply.answer.text);
                    if !reply.answer.ok {
                        return Ok(Some(ExitCode::FAILURE));
                    }
                    let done = tokio::task::spawn_blocking(move || {
                        std::process::Command::new("sh").arg("-c").arg(command).status()
                    });
                    let status = done.await?.context("sh cannot be run")?;
                    if !status.success() {
                        eprintln!("the command failed ({status}): {user} is let in again");
                        return Ok(Some(ExitCode::FAILURE));
                    }
                    Some(reply)
                }
            };
            let answer = ask(&control.path, &Command::Move { user, backend }).await?;
            // Until here the user's logins have waited.
            drop(reply);
            told(&answer)
        }
        Asked::Run { .. } | Asked::Check { .. } | Asked::Route { .. } | Asked::Demo(_) => return Ok(None),
    };
    Ok(Some(code))
}

async fn drain(control: &Path, server: String, over: Option<Duration>) -> anyhow::Result<ExitCode> {
    let seconds = over.map(|over| over.as_secs_f64());
    let command = Command::Server { name: server.clone(), mode: Some("drain".to_owned()), over: seconds };
    let answer = ask(control, &command).await?;
    let code = told(&answer);
    if over.is_none() || !answer.ok {
        return Ok(code);
    }
    loop {
        let status = ask(control, &Command::Status).await?;
        let servers = status.data["servers"].as_array().cloned().unwrap_or_default();
        let here = servers.iter().filter(|other| other["server"] == *server);
        let left: u64 = here.filter_map(|other| other["sessions"].as_u64()).sum();
        if left == 0 {
            println!("{server}: no session is left");
            return Ok(code);
        }
        time::sleep(LOOK).await;
    }
}

fn told(answer: &Answer) -> ExitCode {
    told_of(answer, 1)
}

fn told_of(answer: &Answer, failure: u8) -> ExitCode {
    if answer.ok {
        println!("{}", answer.text);
        ExitCode::SUCCESS
    } else {
        eprintln!("vestibule: {}", answer.text);
        ExitCode::from(failure)
    }
}

fn shown(answer: &Answer, json: bool) -> anyhow::Result<ExitCode> {
    if answer.ok && json {
        println!("{}", serde_json::to_string_pretty(&answer.data)?);
        return Ok(ExitCode::SUCCESS);
    }
    Ok(told(answer))
}
