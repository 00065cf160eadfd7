//! Turns the results of a process and its predecessors into text and JSON.

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

    fn problem(&self) -> Option<String> {
        let error = self.result.as_ref().err()?;
        Some(format!("the predecessor with process id {} could not be queried: {error}", self.pid))
    }
}

/// The errors among `results`, as sentences.
pub(super) fn problems<T>(results: &[PredecessorResult<T>]) -> Vec<String> {
    results.iter().filter_map(PredecessorResult::problem).collect()
}

/// The response to `status`. Sessions of all processes are counted together.
pub(super) fn status(mut own: ProcessStatus, others: &[PredecessorResult<ProcessStatus>]) -> Response {
    let mut predecessors = Vec::new();
    let mut lines = String::new();
    for other in others {
        let Some(status) = other.value() else { continue };
        add_sessions(&mut own, status);
        predecessors.push(json!({"pid": other.pid, "version": status.version, "sessions": status.sessions}));
        let _ = writeln!(lines, "predecessor {} (version {}): {} sessions", other.pid, status.version, status.sessions);
    }
    let mut text = format!("version   {}\n", own.version);
    for address in &own.listeners {
        let _ = writeln!(text, "listener  {address}");
    }
    for server in &own.servers {
        let _ = writeln!(text, "server    {}", server_line(server));
    }
    for StoredOverride { backend, server, set } in &own.unused_states {
        let (state, set_by) = (set.state.as_str(), set_by(set));
        let _ = writeln!(text, "no server {backend} {server}: {state}, not in the configuration; {set_by}");
    }
    text.push_str(&lines);
    let _ = write!(text, "sessions  {}", own.sessions);
    let mut data = json!(own);
    data["predecessors"] = Value::Array(predecessors);
    Response { ok: true, text, data, notes: problems(others) }
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

fn server_line(server: &ServerStatus) -> String {
    let ServerStatus { backend, server: name, state, up, sessions, unauthenticate, last_error, set } = server;
    let (state, health) = (state.as_str(), if *up { "answers" } else { "failing" });
    let warning = if *unauthenticate { ", has UNAUTHENTICATE: disable it there" } else { "" };
    let mut line = format!("{backend} {name}: {state}, {health}, {sessions} sessions{warning}");
    if let Some(set) = set {
        let _ = write!(line, "; {}", set_by(set));
    }
    if let Some(error) = last_error {
        let _ = write!(line, "; last error {} s ago: {}", error.seconds_ago, error.text);
    }
    line
}

fn set_by(set: &StateOverride) -> String {
    let reason = set.reason.as_deref().map(|reason| format!(": {reason}")).unwrap_or_default();
    format!("set by {} at {}{reason}", set.by, set.since())
}

/// The response to `sessions`. Sessions of predecessors are marked as such.
pub(super) fn sessions(mut own: SessionList, others: Vec<PredecessorResult<SessionList>>) -> Response {
    let mut notes = problems(&others);
    for other in others {
        let Ok(list) = other.result else { continue };
        own.left_out += list.left_out;
        let pid = Some(other.pid);
        own.sessions.extend(list.sessions.into_iter().map(|session| SessionView { predecessor: pid, ..session }));
    }
    if own.left_out > 0 {
        notes.push(format!("{} more sessions are not listed", own.left_out));
    }
    let text = own.sessions.iter().map(session_line).collect::<Vec<_>>().join("\n");
    Response { ok: true, text, data: json!(own.sessions), notes }
}

/// The response to `move`.
pub(super) fn moved(user: &str, result: &MoveResult) -> Response {
    let text = format!("{user}: {} sessions ended, now at {}", result.ended, result.backend);
    Response { data: json!(result), ..Response::success(text) }
}

fn session_line(view: &SessionView) -> String {
    let state = match view {
        SessionView { cut_off: true, .. } => " cut off",
        SessionView { settled: false, .. } => " logging in",
        _ => "",
    };
    let SessionView { user, client, session, backend, server, seconds, .. } = view;
    let (backend, server) = (backend.as_deref().unwrap_or("-"), server.as_deref().unwrap_or("-"));
    let predecessor = view.predecessor.map(|pid| format!(" (predecessor {pid})")).unwrap_or_default();
    format!("{user} {client} {backend} {server} {seconds} s{state} {session}{predecessor}")
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
        let response = status(own, &[first, second, silent]);
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
            "server    a x: drain, answers, 111 sessions, has UNAUTHENTICATE: disable it there; set by root at \
             1970-01-01T00:00:00Z: disks; last error 7 s ago: refused\n",
            "server    a y: up, answers, 2 sessions\n",
            "predecessor 2 (version 1.0): 15 sessions\n",
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
        assert_eq!(session_line(&accepted), "alice 192.0.2.1 - - 7 s logging in id");
        let list = |left_out| SessionList { sessions: vec![view.clone()], left_out };
        let response = sessions(list(0), vec![PredecessorResult { pid: 5, result: Ok(list(2)) }]);
        assert_eq!(response.text, "alice 192.0.2.1 a x 7 s id\nalice 192.0.2.1 a x 7 s id (predecessor 5)");
        assert_eq!((response.data[0].get("predecessor"), &response.data[1]["predecessor"]), (None, &json!(5)));
        assert_eq!(response.notes, ["2 more sessions are not listed"]);
    }
}
