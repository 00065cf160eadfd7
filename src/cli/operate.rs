//! The commands that ask the running process: sent, waited for, printed. Called by `main`.

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use serde_json::Value;
use tokio::time;

use crate::admin_state::AdminState;
use crate::api::client::{Reply, ask, begin, printable};
use crate::api::{Answer, Command};
use crate::cli::Command as Asked;

/// sysexits.h EX_CONFIG.
const EX_CONFIG: u8 = 78;
/// Interval at which the sessions of a server that is being drained are counted.
const LOOK: Duration = Duration::from_millis(500);

/// Carries one out. `None`: it is not for the running process.
///
/// # Errors
/// No process answers.
pub async fn operate(asked: Asked) -> anyhow::Result<Option<ExitCode>> {
    let code = match asked {
        Asked::Reload { control } => {
            let answer = ask(&control.path, &Command::Reload).await?;
            if answer.ok { printed(&answer) } else { printed_or(&answer, EX_CONFIG) }
        }
        Asked::Upgrade { timeout, control } => {
            printed(&ask(&control.path, &Command::Upgrade { timeout: timeout.as_secs_f64() }).await?)
        }
        Asked::Status { json, control } => shown(&ask(&control.path, &Command::Status).await?, json)?,
        Asked::Sessions { user, json, control } => {
            shown(&ask(&control.path, &Command::Sessions { user }).await?, json)?
        }
        Asked::Kick { user, control } => printed(&ask(&control.path, &Command::Kick { user }).await?),
        Asked::Server { server, state, reason, control } => {
            printed(&ask(&control.path, &set_server(server, state.0, None, reason)).await?)
        }
        Asked::Drain { server, over, reason, control } => drain(&control.path, server, over, reason).await?,
        Asked::Move { user, backend, command, timeout, control } => {
            move_user(&control.path, user, backend, command, timeout).await?
        }
        Asked::Run { .. } | Asked::Check { .. } | Asked::Route { .. } | Asked::Demo(_) => return Ok(None),
    };
    Ok(Some(code))
}

fn set_server(name: String, state: Option<AdminState>, over: Option<f64>, reason: Option<String>) -> Command {
    // Only a hint: whoever may open the socket may claim any name.
    let sudo_user = std::env::var("SUDO_USER").ok().filter(|user| !user.is_empty());
    Command::Server { name, state, over, reason, sudo_user }
}

async fn drain(
    control: &Path,
    server: String,
    over: Option<Duration>,
    reason: Option<String>,
) -> anyhow::Result<ExitCode> {
    let seconds = over.map(|over| over.as_secs_f64());
    let command = set_server(server.clone(), Some(AdminState::Drain), seconds, reason);
    let answer = ask(control, &command).await?;
    let code = printed(&answer);
    if over.is_none() || !answer.ok {
        return Ok(code);
    }
    loop {
        let status = ask(control, &Command::Status).await?;
        if !status.ok || !status.notes.is_empty() {
            let text = format!("sessions on {server} cannot be counted");
            return Ok(printed(&Answer { ok: false, text, ..status }));
        }
        if sessions_of(&status.data, &server) == 0 {
            println!("{}: no session is left", printable(&server));
            return Ok(code);
        }
        time::sleep(LOOK).await;
    }
}

/// Sessions in a status of the servers that `SERVER` or `BACKEND/SERVER` names.
fn sessions_of(status: &Value, given: &str) -> u64 {
    let servers = status["servers"].as_array().map(Vec::as_slice).unwrap_or_default();
    let named = |server: &&Value| {
        let (backend, name) = (server["backend"].as_str().unwrap_or_default(), server["server"].as_str());
        name.is_some_and(|name| given == name || given == format!("{backend}/{name}"))
    };
    servers.iter().filter(named).filter_map(|server| server["sessions"].as_u64()).sum()
}

async fn move_user(
    control: &Path,
    user: String,
    backend: String,
    command: Option<String>,
    timeout: Duration,
) -> anyhow::Result<ExitCode> {
    let mut held: Option<Reply> = None;
    if let Some(command) = command {
        let reply = begin(control, &Command::Hold { user: user.clone() }).await?;
        if !reply.answer.ok {
            return Ok(printed(&reply.answer));
        }
        eprintln!("{}", printable(&reply.answer.text));
        eprintln!("running {}", printable(&command));
        let run = move || std::process::Command::new("sh").arg("-c").arg(command).status();
        let status = tokio::task::spawn_blocking(run).await?.context("sh cannot be run")?;
        if !status.success() {
            eprintln!("vestibule: the command failed ({status}): {} is let in again", printable(&user));
            return Ok(ExitCode::FAILURE);
        }
        if !reply.is_open() {
            eprintln!(
                "vestibule: the process ended while the command ran: {} may have logged in meanwhile",
                printable(&user)
            );
            return Ok(ExitCode::FAILURE);
        }
        held = Some(reply);
    }
    eprintln!("waiting until the routes name {}, at most {}", printable(&backend), humantime::format_duration(timeout));
    let wait = Some(timeout.as_secs_f64());
    let moving = Command::Move { user: user.clone(), backend: backend.clone(), wait };
    let answer = ask(control, &moving).await?;
    let Some(held) = held else { return Ok(printed(&answer)) };
    if !answer.ok {
        return Ok(printed(&answer));
    }
    let ended = |answer: &Answer| answer.data["ended"].as_u64().unwrap_or_default();
    let text = format!("{user}: {} sessions ended, now at {backend}", ended(&held.answer) + ended(&answer));
    let code = printed(&Answer { text, ..answer });
    // The user's logins have waited from the first command until here.
    drop(held);
    Ok(code)
}

fn printed(answer: &Answer) -> ExitCode {
    printed_or(answer, 1)
}

fn printed_or(answer: &Answer, failure: u8) -> ExitCode {
    for note in &answer.notes {
        eprintln!("vestibule: {}", printable(note));
    }
    if answer.ok {
        println!("{}", printable(&answer.text));
        ExitCode::SUCCESS
    } else {
        eprintln!("vestibule: {}", printable(&answer.text));
        ExitCode::from(failure)
    }
}

fn shown(answer: &Answer, json: bool) -> anyhow::Result<ExitCode> {
    if answer.ok && json {
        let text = serde_json::to_string_pretty(&answer.data)?;
        return Ok(printed(&Answer { ok: true, text, data: Value::Null, notes: answer.notes.clone() }));
    }
    Ok(printed(answer))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn sessions_are_counted_by_server_and_by_backend() {
        let of = |backend: &str, server: &str, sessions: u64| json!({"backend": backend, "server": server, "sessions": sessions});
        let status = json!({"servers": [of("a", "h:1", 1), of("b", "h:1", 2), of("a", "h:2", 4)]});
        let counted = ["h:1", "b/h:1", "a/h:2", "b/h:2"].map(|given| sessions_of(&status, given));
        assert_eq!(counted, [3, 2, 4, 0]);
        assert_eq!(sessions_of(&json!({}), "h:1"), 0);
    }
}
