//! Runs the operators' commands in this process and in its predecessors.
//!
//! A command that a successor forwards applies to this process alone: the successor asks each of its predecessors itself.

use std::time::Duration;

use anyhow::{Context as _, bail};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::json;

use super::client::OpenResponse;
use super::context::ControlContext;
use super::message::{Command, Response, Scope};
use super::operations::UserHold;
use super::predecessors::{self, HOLD_DEADLINE, SHORT_DEADLINE};
use super::report::{self, PredecessorResult};
use super::succession::state::HoldPermit;
use super::views::{MoveResult, ProcessStatus};
use crate::admin_state::AdminState;
use crate::server::{StateChange, StateChanged, UnknownServer};

/// How long a move waits for the routes by default.
const MOVE_WAIT: Duration = Duration::from_secs(10);
const MAX_MOVE_WAIT: Duration = Duration::from_secs(3600);

/// The caller of a command.
#[derive(Debug, Clone)]
pub(super) struct Caller {
    pub(super) scope: Scope,
    /// The user of the process that sent the command.
    pub(super) user: String,
}

/// A hold of a user in this process and its predecessors. New logins of the user wait until it is dropped.
pub(super) struct HoldEverywhere {
    _own: UserHold,
    _permit: Option<HoldPermit>,
    /// The hold in a predecessor ends when its connection is closed.
    _predecessors: Vec<OpenResponse>,
}

/// The fields of [`Command::Server`].
pub(super) struct ServerCommand {
    pub(super) name: String,
    pub(super) state: Option<AdminState>,
    pub(super) over: Option<f64>,
    pub(super) reason: Option<String>,
    pub(super) sudo_user: Option<String>,
}

/// The data of responses to [`Command::Kick`] and [`Command::Hold`].
#[derive(Debug, Default, Deserialize)]
struct EndedSessions {
    ended: usize,
}

/// The data of a response to [`Command::Server`].
#[derive(Debug, Deserialize)]
struct ServerResult {
    sessions: usize,
    /// Whether the process has the server.
    #[serde(default = "ServerResult::is_known_by_default")]
    known: bool,
}

impl ServerResult {
    fn is_known_by_default() -> bool {
        true
    }
}

impl ControlContext {
    /// Returns a refusal if this process has been replaced and the command must go to its successor. Reloads, upgrades and
    /// handovers are refused by `Succession`.
    pub(super) fn refusal(&self, command: &Command, caller: &Caller) -> Option<Response> {
        let is_change = matches!(
            command,
            Command::Kick { .. } | Command::Server { .. } | Command::Move { .. } | Command::Hold { .. }
        );
        let refusal = self.succession.retired().filter(|_| is_change && caller.scope == Scope::AllProcesses)?;
        Some(Response::failure(format!("{refusal} at {}", self.path.display())))
    }

    pub(super) async fn status(&self, caller: &Caller) -> Response {
        report::status_response(self.operations().status(), &self.query_predecessors(caller, &Command::Status).await)
    }

    pub(super) async fn sessions(&self, caller: &Caller, user: Option<String>) -> anyhow::Result<Response> {
        let own = self.operations().list_sessions(user.as_deref()).await?;
        if caller.scope == Scope::ThisProcess {
            // The successor needs the whole list with its counter to merge it with its own.
            return Ok(Response { data: json!(own), ..Response::success("") });
        }
        Ok(report::sessions_response(own, self.query_predecessors(caller, &Command::Sessions { user }).await))
    }

    pub(super) async fn kick(&self, caller: &Caller, user: String) -> anyhow::Result<Response> {
        let own = self.operations().kick(&user).await?;
        let command = Command::Kick { user: user.clone() };
        let others = self.query_predecessors::<EndedSessions>(caller, &command).await;
        let ended = own + others.iter().filter_map(PredecessorResult::value).map(|other| other.ended).sum::<usize>();
        let response =
            Response { data: json!({"ended": ended}), ..Response::success(format!("{user}: {ended} sessions ended")) };
        Ok(with_query_errors(response, &report::query_errors(&others)))
    }

    pub(super) async fn set_server(&self, caller: &Caller, command: ServerCommand) -> anyhow::Result<Response> {
        let ServerCommand { name, state, over, reason, sudo_user } = command;
        let by = match &sudo_user {
            Some(sudo_user) => format!("{sudo_user} (as {})", caller.user),
            None => caller.user.clone(),
        };
        let is_forwarded = caller.scope == Scope::ThisProcess;
        let change = StateChange { server: name.clone(), state, over, by, reason: reason.clone(), is_forwarded };
        let own = self.running.set_server(change).await;
        let command = Command::Server { name: name.clone(), state, over, reason, sudo_user };
        let others = self.query_predecessors::<ServerResult>(caller, &command).await;
        // A server may exist only here, or only in a predecessor's configuration.
        let is_known_elsewhere = others.iter().filter_map(PredecessorResult::value).any(|other| other.known);
        let (own, known) = match own {
            Ok(own) => (own, true),
            Err(error) if error.is::<UnknownServer>() && (is_forwarded || is_known_elsewhere) => {
                (StateChanged { sessions: 0, saved: Ok(()) }, is_known_elsewhere)
            }
            Err(error) => return Err(error),
        };
        let elsewhere = others.iter().filter_map(PredecessorResult::value).map(|other| other.sessions);
        let sessions = own.sessions + elsewhere.sum::<usize>();
        let state = state.map_or("as configured", AdminState::as_str);
        let data = json!({"sessions": sessions, "known": known});
        let mut response =
            Response { data, ..Response::success(format!("{name}: {state}; {sessions} sessions there")) };
        if let Err(error) = own.saved {
            response.notes.push(format!("the state is lost when this process ends: {error}"));
        }
        Ok(with_query_errors(response, &report::query_errors(&others)))
    }

    /// Delays a user's new logins and ends the user's sessions, in all processes. Returns the number of sessions ended.
    pub(super) async fn hold(&self, caller: &Caller, user: &str) -> anyhow::Result<(HoldEverywhere, usize)> {
        if caller.scope == Scope::ThisProcess {
            let (own, ended) = self.operations().hold_for_successor(user).await?;
            return Ok((HoldEverywhere { _own: own, _permit: None, _predecessors: Vec::new() }, ended));
        }
        let command = Command::Hold { user: user.to_owned() };
        let permit = self.succession.hold()?;
        // Detects a predecessor that hangs before any session is ended.
        let statuses = self.query_predecessors::<ProcessStatus>(caller, &Command::Status).await;
        if let Some(error) = report::query_errors(&statuses).first() {
            bail!("{error}");
        }
        // Concurrently, so that a client that is disconnected here does not log in to a predecessor.
        let (own, others) =
            tokio::join!(self.operations().hold(user), predecessors::send_all(&self.path, &command, HOLD_DEADLINE));
        let (own, mut ended) = own?;
        let mut held = Vec::new();
        for other in others {
            match other.result.and_then(OpenResponse::into_success) {
                Ok(open) => {
                    let there: EndedSessions = serde_json::from_value(open.response.data.clone()).unwrap_or_default();
                    ended += there.ended;
                    held.push(open);
                }
                Err(error) => {
                    bail!("the predecessor with process id {} may still serve sessions of the user: {error}", other.pid)
                }
            }
        }
        Ok((HoldEverywhere { _own: own, _permit: Some(permit), _predecessors: held }, ended))
    }

    pub(super) async fn move_user(
        &self,
        caller: &Caller,
        user: &str,
        backend: &str,
        wait: Option<f64>,
    ) -> anyhow::Result<Response> {
        let wait = wait.map(Duration::try_from_secs_f64).transpose().context("invalid timeout")?;
        let wait = wait.unwrap_or(MOVE_WAIT).min(MAX_MOVE_WAIT);
        self.operations().check_backend(backend)?;
        let (hold, ended) = self.hold(caller, user).await?;
        let routed = self.operations().wait_for_route(user, backend, wait).await;
        drop(hold);
        routed.with_context(|| format!("{ended} sessions were ended"))?;
        Ok(report::move_response(user, &MoveResult { ended, backend: backend.to_owned() }))
    }

    /// Sends `command` to all predecessors, unless it applies to this process alone, and returns the data of their responses.
    async fn query_predecessors<T: DeserializeOwned>(
        &self,
        caller: &Caller,
        command: &Command,
    ) -> Vec<PredecessorResult<T>> {
        if caller.scope == Scope::ThisProcess || self.running.is_retired() {
            return Vec::new();
        }
        // For these commands a predecessor routes the user to find the user's other names, which may query a directory.
        let routing = match command {
            Command::Sessions { user: Some(_) } | Command::Kick { .. } => self.running.snapshot().limits.lookup,
            _ => Duration::ZERO,
        };
        let responses = predecessors::send_all(&self.path, command, SHORT_DEADLINE + routing).await;
        let parse = |open: OpenResponse| {
            serde_json::from_value(open.response.data).map_err(|error| format!("unexpected response: {error}"))
        };
        let result = |result: Result<OpenResponse, String>| result.and_then(OpenResponse::into_success).and_then(parse);
        responses.into_iter().map(|other| PredecessorResult { pid: other.pid, result: result(other.result) }).collect()
    }
}

/// Adds the errors of predecessors to a response, which then is a failure because the command was not carried out in all processes.
fn with_query_errors(response: Response, errors: &[String]) -> Response {
    if errors.is_empty() {
        return response;
    }
    Response { ok: false, text: format!("{}; but {}", response.text, errors.join("; ")), ..response }
}
