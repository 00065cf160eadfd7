//! Merges the results of this process and its predecessors into the responses to `status`, `sessions` and `move`.

use std::fmt::Write as _;

use serde_json::{Value, json};

use super::message::Response;
use super::views::{MoveResult, ProcessStatus, ServerStatus, SessionList, SessionView};
use crate::backend::state_override::{StateOverride, StoredOverride};

/// The result of a command in one predecessor.
pub(super) struct PredecessorResult<T> {
    /// Process id of the predecessor.
    pub(super) pid: u32,
    pub(super) result: Result<T, String>,
}

impl<T> PredecessorResult<T> {
    pub(super) fn value(&self) -> Option<&T> {
        self.result.as_ref().ok()
    }

    fn query_error(&self) -> Option<String> {
        let error = self.result.as_ref().err()?;
        Some(format!("the predecessor with process id {} could not be queried: {error}", self.pid))
    }
}

/// The errors among `results`, as sentences.
pub(super) fn query_errors<T>(results: &[PredecessorResult<T>]) -> Vec<String> {
    results.iter().filter_map(PredecessorResult::query_error).collect()
}

/// The response to `status`. Sessions of all processes are counted together.
pub(super) fn status_response(mut own: ProcessStatus, predecessors: &[PredecessorResult<ProcessStatus>]) -> Response {
    let own_servers = own.servers.len();
    for predecessor in predecessors.iter().filter_map(PredecessorResult::value) {
        add_sessions(&mut own, predecessor);
    }
    let merged = own;
    let text = status_text(&merged, own_servers, predecessors);
    Response { data: status_data(&merged, predecessors), notes: query_errors(predecessors), ..Response::success(text) }
}

/// The text of the response to `status`. The first `own_servers` servers are those of this process.
fn status_text(
    merged: &ProcessStatus,
    own_servers: usize,
    predecessors: &[PredecessorResult<ProcessStatus>],
) -> String {
    let mut rows = vec![("version", merged.version.clone())];
    rows.extend(merged.listeners.iter().map(|address| ("listener", address.clone())));
    for (index, server) in merged.servers.iter().enumerate() {
        let note = if index < own_servers { "" } else { " (predecessors only)" };
        rows.push(("server", describe_server(server, note)));
    }
    for StoredOverride { backend, server, set: state_override } in &merged.unused_states {
        let (state, author) = (state_override.state.as_str(), describe_override(state_override));
        rows.push(("unused", format!("{backend} {server}: {state}, but there is no such server; {author}")));
    }
    for predecessor in predecessors {
        let Some(ProcessStatus { version, sessions, .. }) = predecessor.value() else { continue };
        rows.push(("predecessor", format!("{} (version {version}): {sessions} sessions", predecessor.pid)));
    }
    rows.push(("sessions", merged.sessions.to_string()));
    rows.iter().map(|(label, value)| format!("{label:<13}{value}")).collect::<Vec<_>>().join("\n")
}

/// The JSON of the response to `status`.
fn status_data(merged: &ProcessStatus, predecessors: &[PredecessorResult<ProcessStatus>]) -> Value {
    let predecessor_data = |predecessor: &PredecessorResult<ProcessStatus>| {
        let ProcessStatus { version, sessions, .. } = predecessor.value()?;
        Some(json!({"pid": predecessor.pid, "version": version, "sessions": sessions}))
    };
    let mut data = json!(merged);
    data["predecessors"] = predecessors.iter().filter_map(predecessor_data).collect();
    data
}

/// Adds the sessions of a predecessor to those of this process. A server that only the predecessor has is added if it has sessions.
fn add_sessions(own: &mut ProcessStatus, predecessor: &ProcessStatus) {
    own.sessions += predecessor.sessions;
    for server in &predecessor.servers {
        let is_same = |own: &&mut ServerStatus| own.backend == server.backend && own.server == server.server;
        match own.servers.iter_mut().find(is_same) {
            Some(own) => own.sessions += server.sessions,
            None if server.sessions > 0 => own.servers.push(server.clone()),
            None => {}
        }
    }
}

/// Describes a server in one line, with `note` after its name.
fn describe_server(server: &ServerStatus, note: &str) -> String {
    let ServerStatus { backend, server: name, state, up, sessions, unauthenticate, last_error, set: state_override } =
        server;
    let (state, health) = (state.as_str(), if *up { "healthy" } else { "failing" });
    let warning = if *unauthenticate { ", advertises UNAUTHENTICATE: disable it on the server" } else { "" };
    let mut line = format!("{backend} {name}{note}: {state}, {health}, {sessions} sessions{warning}");
    if let Some(state_override) = state_override {
        let _ = write!(line, "; {}", describe_override(state_override));
    }
    if let Some(error) = last_error {
        let _ = write!(line, "; last error {} s ago: {}", error.seconds_ago, error.text);
    }
    line
}

/// Describes who set a state, when, and why.
fn describe_override(state_override: &StateOverride) -> String {
    let reason = state_override.reason.as_deref().map(|reason| format!(": {reason}")).unwrap_or_default();
    format!("set by {} at {}{reason}", state_override.by, state_override.since())
}

/// The response to `sessions`. Sessions of predecessors are marked as such.
pub(super) fn sessions_response(mut own: SessionList, predecessors: Vec<PredecessorResult<SessionList>>) -> Response {
    let mut notes = query_errors(&predecessors);
    for predecessor in predecessors {
        let Ok(list) = predecessor.result else { continue };
        own.left_out += list.left_out;
        let pid = Some(predecessor.pid);
        own.sessions.extend(list.sessions.into_iter().map(|session| SessionView { predecessor: pid, ..session }));
    }
    if own.left_out > 0 {
        notes.push(format!("{} more sessions are not listed", own.left_out));
    }
    let text = own.sessions.iter().map(describe_session).collect::<Vec<_>>().join("\n");
    Response { data: json!(own.sessions), notes, ..Response::success(text) }
}

/// The response to `move`.
pub(super) fn move_response(user: &str, result: &MoveResult) -> Response {
    let text = format!("{user}: {} sessions ended, now routed to {}", result.ended, result.backend);
    Response { data: json!(result), ..Response::success(text) }
}

/// Describes a session in one line, with the field names of the log.
fn describe_session(view: &SessionView) -> String {
    let state = match view {
        SessionView { cut_off: true, .. } => "server-closed",
        SessionView { settled: false, .. } => "logging-in",
        _ => "established",
    };
    let SessionView { user, client, session, backend, server, seconds, .. } = view;
    let (backend, server) = (backend.as_deref().unwrap_or("-"), server.as_deref().unwrap_or("-"));
    let predecessor = view.predecessor.map(|pid| format!(" (predecessor {pid})")).unwrap_or_default();
    format!(
        "{user} client={client} backend={backend} server={server} age={seconds}s state={state} \
         session={session}{predecessor}"
    )
}

#[cfg(test)]
mod tests {
    use super::super::views::ServerError;
    use super::*;
    use crate::admin_state::AdminState;

    fn server(name: &str, sessions: usize) -> ServerStatus {
        let (backend, server, state) = ("a".to_owned(), name.to_owned(), AdminState::Up);
        ServerStatus { backend, server, state, up: true, sessions, unauthenticate: false, last_error: None, set: None }
    }

    fn process(pid: u32, servers: Vec<ServerStatus>) -> ProcessStatus {
        let sessions = servers.iter().map(|server| server.sessions).sum();
        let (version, file, listeners) = ("1.0".to_owned(), "v.yaml".to_owned(), vec!["[::]:993".to_owned()]);
        ProcessStatus { version, pid, file, listeners, servers, unused_states: Vec::new(), sessions }
    }

    #[test]
    fn sessions_of_all_processes_are_counted() {
        let mut own = process(3, vec![server("x", 1), server("y", 2)]);
        own.servers[0].state = AdminState::Drain;
        own.servers[0].set =
            Some(StateOverride { state: AdminState::Drain, by: "root".into(), since: 0, reason: Some("disks".into()) });
        own.servers[0].unauthenticate = true;
        own.servers[0].last_error = Some(ServerError { seconds_ago: 7, text: "refused".into() });
        let second = PredecessorResult {
            pid: 2,
            result: Ok(process(2, vec![server("x", 10), server("gone", 5), server("idle", 0)])),
        };
        let first = PredecessorResult { pid: 1, result: Ok(process(1, vec![server("x", 100)])) };
        let silent = PredecessorResult { pid: 9, result: Err("no response within 5s".to_owned()) };
        let response = status_response(own, &[first, second, silent]);
        assert_eq!(response.data["sessions"], 118);
        let servers: Vec<(&str, u64)> = response.data["servers"]
            .as_array()
            .unwrap()
            .iter()
            .map(|server| (server["server"].as_str().unwrap(), server["sessions"].as_u64().unwrap()))
            .collect();
        assert_eq!(servers, [("x", 111), ("y", 2), ("gone", 5)]);
        assert_eq!(response.data["predecessors"][1], json!({"pid": 2, "version": "1.0", "sessions": 15}));
        assert_eq!(response.notes, ["the predecessor with process id 9 could not be queried: no response within 5s"]);
        for line in [
            "server       a x: drain, healthy, 111 sessions, advertises UNAUTHENTICATE: disable it on the server; set by \
             root at 1970-01-01T00:00:00Z: disks; last error 7 s ago: refused\n",
            "server       a y: up, healthy, 2 sessions\n",
            "server       a gone (predecessors only): up, healthy, 5 sessions\n",
            "predecessor  2 (version 1.0): 15 sessions\n",
        ] {
            assert!(response.text.contains(line), "{}", response.text);
        }
    }

    #[test]
    fn sessions_of_predecessors_are_marked() {
        let view = SessionView {
            user: "alice".into(),
            client: "192.0.2.1".into(),
            session: "id".into(),
            backend: Some("a".into()),
            server: Some("x".into()),
            seconds: 7,
            settled: true,
            cut_off: false,
            predecessor: None,
        };
        let accepted = SessionView { backend: None, server: None, settled: false, ..view.clone() };
        let line = "alice client=192.0.2.1 backend=- server=- age=7s state=logging-in session=id";
        assert_eq!(describe_session(&accepted), line);
        let list = |left_out| SessionList { sessions: vec![view.clone()], left_out };
        let response = sessions_response(list(0), vec![PredecessorResult { pid: 5, result: Ok(list(2)) }]);
        let line = "alice client=192.0.2.1 backend=a server=x age=7s state=established session=id";
        assert_eq!(response.text, format!("{line}\n{line} (predecessor 5)"));
        assert_eq!((response.data[0].get("predecessor"), &response.data[1]["predecessor"]), (None, &json!(5)));
        assert_eq!(response.notes, ["2 more sessions are not listed"]);
    }
}
