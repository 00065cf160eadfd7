//! The commands to a running process: sends them, waits for the response, and prints it.

use std::ops::ControlFlow;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use serde_json::Value;
use tokio::time;

use super::OperatorCommand;
use crate::admin_state::AdminState;
use crate::api::client::{OpenResponse, printable, send, send_and_keep_open};
use crate::api::message::{Command, Response};

/// Exit code of a failed reload, from sysexits.h.
const EX_CONFIG: u8 = 78;
/// Interval at which the sessions of a server are counted during a drain.
const COUNT_INTERVAL: Duration = Duration::from_millis(500);

/// Runs a command.
///
/// # Errors
/// No process answers.
pub(crate) async fn run(command: OperatorCommand) -> anyhow::Result<ExitCode> {
    Ok(match command {
        OperatorCommand::Reload { control } => {
            let response = send(&control.path, &Command::Reload).await?;
            print_with_exit_code(&response, EX_CONFIG)
        }
        OperatorCommand::Upgrade { timeout, control } => {
            print(&send(&control.path, &Command::Upgrade { timeout: timeout.as_secs_f64() }).await?)
        }
        OperatorCommand::Status { json, control } => print_data(send(&control.path, &Command::Status).await?, json)?,
        OperatorCommand::Sessions { user, json, control } => {
            print_data(send(&control.path, &Command::Sessions { user }).await?, json)?
        }
        OperatorCommand::Kick { user, control } => print(&send(&control.path, &Command::Kick { user }).await?),
        OperatorCommand::Server { server, state, reason, control } => {
            print(&send(&control.path, &set_server(server, state.0, None, reason)).await?)
        }
        OperatorCommand::Drain { server, over, reason, control } => drain(&control.path, server, over, reason).await?,
        OperatorCommand::Move { user, backend, command, timeout, control } => {
            move_user(&control.path, user, backend, command, timeout).await?
        }
    })
}

fn set_server(name: String, state: Option<AdminState>, over: Option<f64>, reason: Option<String>) -> Command {
    // Only informative: a process that may open the socket can claim any name.
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
    let response = send(control, &command).await?;
    let code = print(&response);
    if over.is_none() || !response.ok {
        return Ok(code);
    }
    loop {
        let status = send(control, &Command::Status).await?;
        if !status.ok || !status.notes.is_empty() {
            let text = format!("the sessions on {server} cannot be counted");
            return Ok(print(&Response { ok: false, text, ..status }));
        }
        if count_sessions(&status.data, &server) == 0 {
            println!("{}: no session is left", printable(&server));
            return Ok(code);
        }
        time::sleep(COUNT_INTERVAL).await;
    }
}

/// Counts the sessions in `status` on the servers that `SERVER` or `BACKEND/SERVER` names.
fn count_sessions(status: &Value, given: &str) -> u64 {
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
    let hold = match command {
        Some(command) => match hold_while(control, &user, command).await? {
            ControlFlow::Continue(hold) => Some(hold),
            ControlFlow::Break(code) => return Ok(code),
        },
        None => None,
    };
    eprintln!("waiting until the routes name {}, at most {}", printable(&backend), humantime::format_duration(timeout));
    let command = Command::Move { user: user.clone(), backend: backend.clone(), wait: Some(timeout.as_secs_f64()) };
    let response = send(control, &command).await?;
    let response = match &hold {
        Some(hold) if response.ok => {
            let ended = ended_sessions(&hold.response) + ended_sessions(&response);
            Response { text: format!("{user}: {ended} sessions ended, now routed to {backend}"), ..response }
        }
        _ => response,
    };
    let code = print(&response);
    // New logins of the user were delayed from the hold until here.
    drop(hold);
    Ok(code)
}

/// Holds the user while `command` runs. Returns the hold, which continues, or the exit code if it failed.
async fn hold_while(
    control: &Path,
    user: &str,
    command: String,
) -> anyhow::Result<ControlFlow<ExitCode, OpenResponse>> {
    let hold = send_and_keep_open(control, &Command::Hold { user: user.to_owned() }).await?;
    if !hold.response.ok {
        return Ok(ControlFlow::Break(print(&hold.response)));
    }
    eprintln!("{}", printable(&hold.response.text));
    eprintln!("running {}", printable(&command));
    let run = move || std::process::Command::new("sh").arg("-c").arg(command).status();
    let status = tokio::task::spawn_blocking(run).await?.context("sh could not be run")?;
    if !status.success() {
        eprintln!("vestibule: the command failed ({status}): new logins of {} are accepted again", printable(user));
        return Ok(ControlFlow::Break(ExitCode::FAILURE));
    }
    if !hold.is_open() {
        eprintln!(
            "vestibule: the running process ended during the command: {} may have logged in since",
            printable(user)
        );
        return Ok(ControlFlow::Break(ExitCode::FAILURE));
    }
    Ok(ControlFlow::Continue(hold))
}

fn ended_sessions(response: &Response) -> u64 {
    response.data["ended"].as_u64().unwrap_or_default()
}

fn print(response: &Response) -> ExitCode {
    print_with_exit_code(response, 1)
}

/// Prints a response, and returns `failure` as exit code if the command failed.
fn print_with_exit_code(response: &Response, failure: u8) -> ExitCode {
    for note in &response.notes {
        eprintln!("vestibule: {}", printable(note));
    }
    if response.ok {
        println!("{}", printable(&response.text));
        ExitCode::SUCCESS
    } else {
        eprintln!("vestibule: {}", printable(&response.text));
        ExitCode::from(failure)
    }
}

/// Prints a response as text, or its data as JSON.
fn print_data(response: Response, json: bool) -> anyhow::Result<ExitCode> {
    if response.ok && json {
        let text = serde_json::to_string_pretty(&response.data)?;
        return Ok(print(&Response { text, ..response }));
    }
    Ok(print(&response))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn sessions_are_counted_by_server_and_by_backend() {
        let server = |backend: &str, server: &str, sessions: u64| json!({"backend": backend, "server": server, "sessions": sessions});
        let status = json!({"servers": [server("a", "h:1", 1), server("b", "h:1", 2), server("a", "h:2", 4)]});
        let counted = ["h:1", "b/h:1", "a/h:2", "b/h:2"].map(|given| count_sessions(&status, given));
        assert_eq!(counted, [3, 2, 4, 0]);
        assert_eq!(count_sessions(&json!({}), "h:1"), 0);
    }
}
