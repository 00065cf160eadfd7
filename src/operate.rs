//! The commands that ask the running process: sent, waited for, printed. Called by `main`.

use std::fmt::Write as _;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use serde_json::Value;
use tokio::time;

use crate::cli::{Command as Asked, ServerMode};
use crate::control::client::{Reply, ask, begin};
use crate::control::{Answer, Command};

/// sysexits.h EX_CONFIG.
const EX_CONFIG: u8 = 78;
/// Interval at which the sessions of a server that is being drained are counted.
const LOOK: Duration = Duration::from_millis(500);

/// Timeout of the state of a process, for which predecessors are asked.
const STATUS: Duration = Duration::from_secs(15);
/// Timeout of a command about a user or a server, for which directories are asked too.
const COMMAND: Duration = Duration::from_secs(60);
/// Timeout of a move without the wait for the routes.
const MOVE: Duration = Duration::from_secs(120);

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
        Asked::Upgrade { control } => printed(&ask(&control.path, &Command::Upgrade).await?),
        Asked::Status { json, control } => shown(&ask_within(STATUS, &control.path, &Command::Status).await?, json)?,
        Asked::Sessions { user, json, control } => {
            shown(&ask_within(COMMAND, &control.path, &Command::Sessions { user }).await?, json)?
        }
        Asked::Kick { user, control } => printed(&ask_within(COMMAND, &control.path, &Command::Kick { user }).await?),
        Asked::Server { server, mode, reason, control } => {
            printed(&ask_within(COMMAND, &control.path, &set_server(server, mode, None, reason)).await?)
        }
        Asked::Drain { server, over, reason, control } => drain(&control.path, server, over, reason).await?,
        Asked::Move { user, backend, command, timeout, control } => {
            move_user(&control.path, user, backend, command, timeout).await?
        }
        Asked::Run { .. } | Asked::Check { .. } | Asked::Route { .. } | Asked::Demo(_) => return Ok(None),
    };
    Ok(Some(code))
}

async fn ask_within(time: Duration, control: &Path, command: &Command) -> anyhow::Result<Answer> {
    within(time, control, ask(control, command)).await
}

async fn within<T>(
    time: Duration,
    control: &Path,
    asking: impl Future<Output = anyhow::Result<T>>,
) -> anyhow::Result<T> {
    let asked = time::timeout(time, asking).await;
    asked.with_context(|| format!("the process at {} does not answer within {time:?}", control.display()))?
}

fn set_server(name: String, mode: ServerMode, over: Option<f64>, reason: Option<String>) -> Command {
    // Only a hint: whoever may open the socket may claim any name.
    let sudo_user = std::env::var("SUDO_USER").ok().filter(|user| !user.is_empty());
    Command::Server { name, mode: mode.word().map(str::to_owned), over, reason, sudo_user }
}

async fn drain(
    control: &Path,
    server: String,
    over: Option<Duration>,
    reason: Option<String>,
) -> anyhow::Result<ExitCode> {
    let seconds = over.map(|over| over.as_secs_f64());
    let command = set_server(server.clone(), ServerMode::Drain, seconds, reason);
    let answer = ask_within(COMMAND, control, &command).await?;
    let code = printed(&answer);
    if over.is_none() || !answer.ok {
        return Ok(code);
    }
    loop {
        let status = ask_within(STATUS, control, &Command::Status).await?;
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
        let reply = within(MOVE, control, begin(control, &Command::Hold { user: user.clone() })).await?;
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
    let answer = ask_within(MOVE.saturating_add(timeout), control, &moving).await?;
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

/// `text` without characters that a terminal acts on or that turn the direction of writing, for user names and server texts are
/// chosen by others. The escapes are JSON's, so that JSON stays the same document.
fn printable(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for char in text.chars() {
        let turns = matches!(char, '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
        if (char.is_control() && char != '\n') || turns {
            // All of them are below U+10000. Writing to a string cannot fail.
            let _ = write!(shown, "\\u{:04x}", u32::from(char));
        } else {
            shown.push(char);
        }
    }
    shown
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_is_printed_cannot_command_a_terminal() {
        assert_eq!(
            printable("alice\u{1b}[2J\u{7f}\u{9b}31m\u{202e}x\ty\nz"),
            "alice\\u001b[2J\\u007f\\u009b31m\\u202ex\\u0009y\nz"
        );
        assert_eq!(printable("Grüße 漢字 🙂"), "Grüße 漢字 🙂");
        let value = json!({"user": "a\u{9b}b\u{202e}"});
        let text = printable(&serde_json::to_string_pretty(&value).unwrap());
        assert_eq!(serde_json::from_str::<Value>(&text).unwrap(), value);
    }

    #[test]
    fn sessions_are_counted_by_server_and_by_backend() {
        let of = |backend: &str, server: &str, sessions: u64| json!({"backend": backend, "server": server, "sessions": sessions});
        let status = json!({"servers": [of("a", "h:1", 1), of("b", "h:1", 2), of("a", "h:2", 4)]});
        let counted = ["h:1", "b/h:1", "a/h:2", "b/h:2"].map(|given| sessions_of(&status, given));
        assert_eq!(counted, [3, 2, 4, 0]);
        assert_eq!(sessions_of(&json!({}), "h:1"), 0);
    }
}
