//! The operators' commands, carried out by this process and, unless a successor asks, by all its predecessors.

use std::time::Duration;

use anyhow::{Context as _, bail};
use serde::de::DeserializeOwned;
use serde_json::json;

use super::client::{Reply, Scope};
use super::predecessors::{self, AT_ONCE, HOLD};
use super::report::{self, From};
use super::succession::Holding;
use super::{Answer, Command, Context};
use crate::admin_state::AdminState;
use crate::server::views::ProcessStatus;
use crate::server::{StateChange, StateChanged, UserHold};

/// How long a move waits for the routes, unless its command says otherwise.
const MOVE_WAIT: Duration = Duration::from_secs(10);
/// The longest that it may wait.
const LONGEST_MOVE_WAIT: Duration = Duration::from_secs(3600);

/// The caller of a command.
#[derive(Debug, Clone)]
pub(super) struct Caller {
    /// Whether the command is about this process alone, or its predecessors too.
    pub(super) scope: Scope,
    /// The user at the other end of the connection.
    pub(super) user: String,
}

/// A user's new logins wait in this process and its predecessors until this is dropped.
pub(super) struct HoldEverywhere {
    _own: UserHold,
    _holding: Option<Holding>,
    /// A hold ends with its connection.
    _predecessors: Vec<Reply>,
}

impl Context {
    /// Why a process that has been replaced must not carry this out: only what its successor passes on still counts here.
    /// `Succession` refuses reloads and upgrades.
    pub(super) fn refusal(&self, command: &Command, caller: &Caller) -> Option<Answer> {
        let is_change = matches!(
            command,
            Command::Kick { .. } | Command::Server { .. } | Command::Move { .. } | Command::Hold { .. }
        );
        let refusal = self.succession.replaced().filter(|_| is_change && caller.scope == Scope::All)?;
        Some(Answer::failed(format!("{refusal} at {}", self.path.display())))
    }

    pub(super) async fn status(&self, caller: &Caller) -> Answer {
        report::status(self.running.status(), &self.values(caller, &Command::Status).await)
    }

    pub(super) async fn sessions(&self, caller: &Caller, user: Option<String>) -> anyhow::Result<Answer> {
        let own = self.running.list_sessions(user.as_deref()).await?;
        if caller.scope == Scope::Process {
            // With the number that was left out, which the predecessor's successor adds up.
            return Ok(Answer { data: json!(own), ..Answer::done("") });
        }
        Ok(report::sessions(own, self.values(caller, &Command::Sessions { user }).await))
    }

    pub(super) async fn kick(&self, caller: &Caller, user: String) -> anyhow::Result<Answer> {
        let own = self.running.kick(&user).await?;
        let others = self.values::<Ended>(caller, &Command::Kick { user: user.clone() }).await;
        let ended: usize =
            own + others.iter().filter_map(|other| Some(other.value.as_ref().ok()?.ended)).sum::<usize>();
        let text = format!("{user}: {ended} sessions ended");
        Ok(unless(report::problems(&others), Answer { data: json!({"ended": ended}), ..Answer::done(text) }))
    }

    pub(super) async fn set_server(&self, caller: &Caller, change: ServerCommand) -> anyhow::Result<Answer> {
        let ServerCommand { name, state, over, reason, sudo_user } = change;
        let by = match &sudo_user {
            Some(sudo_user) => format!("{sudo_user} (as {})", caller.user),
            None => caller.user.clone(),
        };
        let server = name.clone();
        let is_forwarded = caller.scope == Scope::Process;
        let change = StateChange { server, state, over, by, reason: reason.clone(), is_forwarded };
        let own = self.running.set_server(change).await;
        let command = Command::Server { name: name.clone(), state, over, reason, sudo_user };
        let others = self.values::<Sessions>(caller, &command).await;
        // A predecessor may not know the server, or know it alone; an unknown server has no sessions there.
        let known: Vec<usize> = others.iter().filter_map(|other| Some(other.value.as_ref().ok()?.sessions)).collect();
        let own = match own {
            Ok(own) => own,
            Err(error) if known.is_empty() => return Err(error),
            Err(_) => StateChanged { sessions: 0, saved: Ok(()) },
        };
        let unknown = |problem: &String| problem.contains("no server is called");
        let problems: Vec<String> = report::problems(&others).into_iter().filter(|problem| !unknown(problem)).collect();
        let sessions = own.sessions + known.iter().sum::<usize>();
        let state = state.map_or("as configured", AdminState::as_str);
        let text = format!("{name}: {state}; {sessions} sessions there");
        let mut answer = Answer { data: json!({"sessions": sessions}), ..Answer::done(text) };
        if let Err(error) = own.saved {
            answer.notes.push(format!("the state ends with this process: {error}"));
        }
        Ok(unless(problems, answer))
    }

    /// Keeps a user's new logins waiting and ends the sessions, in all processes.
    pub(super) async fn hold(&self, caller: &Caller, user: &str) -> anyhow::Result<(HoldEverywhere, usize)> {
        if caller.scope == Scope::Process {
            let (own, ended) = self.running.hold_for_successor(user).await?;
            return Ok((HoldEverywhere { _own: own, _holding: None, _predecessors: Vec::new() }, ended));
        }
        let command = Command::Hold { user: user.to_owned() };
        let holding = self.succession.hold()?;
        // A predecessor that hangs is noticed before anything is done.
        if let Some(problem) = report::problems(&self.values::<ProcessStatus>(caller, &Command::Status).await).first() {
            bail!("{problem}");
        }
        // At the same time, so that a client that is sent away here does not log in there.
        let (own, others) = tokio::join!(self.running.hold(user), predecessors::ask_all(&self.path, &command, HOLD));
        let (own, mut ended) = own?;
        let mut held = Vec::new();
        for other in others {
            let pid = other.pid;
            let reply = other.reply.and_then(|reply| if reply.answer.ok { Ok(reply) } else { Err(reply.answer.text) });
            match reply {
                Ok(reply) => {
                    let there: Ended = serde_json::from_value(reply.answer.data.clone()).unwrap_or_default();
                    ended += there.ended;
                    held.push(reply);
                }
                Err(error) => {
                    bail!("the predecessor with process id {pid} may still serve sessions of the user: {error}")
                }
            }
        }
        Ok((HoldEverywhere { _own: own, _holding: Some(holding), _predecessors: held }, ended))
    }

    pub(super) async fn move_user(
        &self,
        caller: &Caller,
        user: &str,
        backend: &str,
        wait: Option<f64>,
    ) -> anyhow::Result<Answer> {
        let wait = wait.map(Duration::try_from_secs_f64).transpose().context("invalid timeout")?;
        let wait = wait.unwrap_or(MOVE_WAIT).min(LONGEST_MOVE_WAIT);
        self.running.declared(backend)?;
        let (hold, ended) = self.hold(caller, user).await?;
        let found = self.running.routes_name(user, backend, wait).await;
        drop(hold);
        found.with_context(|| format!("{ended} sessions were ended"))?;
        let text = format!("{user}: {ended} sessions ended, now at {backend}");
        Ok(Answer { data: json!({"ended": ended, "backend": backend}), ..Answer::done(text) })
    }

    /// The values of all predecessors, if the caller asks about them.
    async fn values<T: DeserializeOwned>(&self, caller: &Caller, command: &Command) -> Vec<From<T>> {
        if caller.scope == Scope::Process || self.running.is_retired() {
            return Vec::new();
        }
        // A predecessor routes a user to learn the user's names, which takes as long as a directory does.
        let routing = match command {
            Command::Sessions { user: Some(_) } | Command::Kick { .. } => self.running.snapshot().limits.lookup,
            _ => Duration::ZERO,
        };
        let answered = predecessors::ask_all(&self.path, command, AT_ONCE + routing).await;
        let value = |answer: Answer| match answer.ok {
            true => serde_json::from_value(answer.data).map_err(|error| format!("unexpected answer: {error}")),
            false => Err(answer.text),
        };
        let values = answered.into_iter();
        values.map(|other| From { pid: other.pid, value: other.reply.and_then(|reply| value(reply.answer)) }).collect()
    }
}

/// The answer, or a failure with it and the problems: what was asked for was not done everywhere.
fn unless(problems: Vec<String>, answer: Answer) -> Answer {
    if problems.is_empty() {
        return answer;
    }
    Answer { ok: false, text: format!("{}; but {}", answer.text, problems.join("; ")), ..answer }
}

/// Fields of [`Command::Server`].
pub(super) struct ServerCommand {
    pub(super) name: String,
    pub(super) state: Option<AdminState>,
    pub(super) over: Option<f64>,
    pub(super) reason: Option<String>,
    pub(super) sudo_user: Option<String>,
}

#[derive(Debug, Default, serde::Deserialize)]
struct Ended {
    ended: usize,
}

#[derive(Debug, serde::Deserialize)]
struct Sessions {
    sessions: usize,
}
