//! The answers to operators: one process's values and its predecessors', put together as text and JSON.
//!
//! This module is pure; `commands` asks the processes.

use std::fmt::Write as _;

use serde_json::{Value, json};

use super::Answer;
use crate::server::views::{ProcessStatus, ServerStatus, SessionList, SessionView};

/// What a predecessor was asked for, or why it is not known.
pub(super) struct From<T> {
    /// Its process id.
    pub(super) pid: u32,
    /// The value.
    pub(super) value: Result<T, String>,
}

impl<T> From<T> {
    fn problem(&self) -> Option<String> {
        let error = self.value.as_ref().err()?;
        Some(format!("the predecessor with process id {} could not be asked: {error}", self.pid))
    }
}

/// Problems of those that could not be asked.
pub(super) fn problems<T>(others: &[From<T>]) -> Vec<String> {
    others.iter().filter_map(From::problem).collect()
}

/// The state of a process and its predecessors. Sessions are counted together.
pub(super) fn status(mut own: ProcessStatus, others: &[From<ProcessStatus>]) -> Answer {
    let mut predecessors = Vec::new();
    let mut lines = String::new();
    for other in others {
        let Ok(status) = &other.value else { continue };
        own.sessions += status.sessions;
        predecessors.push(json!({"pid": other.pid, "version": status.version, "sessions": status.sessions}));
        let _ = writeln!(lines, "predecessor {} (version {}): {} sessions", other.pid, status.version, status.sessions);
        for server in &status.servers {
            let is_same = |own: &&mut ServerStatus| own.backend == server.backend && own.server == server.server;
            match own.servers.iter_mut().find(is_same) {
                Some(own) => own.sessions += server.sessions,
                // The configuration of this process does not have it any more.
                None if server.sessions > 0 => own.servers.push(server.clone()),
                None => {}
            }
        }
    }
    let mut text = format!("version   {}\n", own.version);
    for address in &own.listeners {
        let _ = writeln!(text, "listener  {address}");
    }
    for server in &own.servers {
        let health = if server.up { "answers" } else { "failing" };
        let ServerStatus { backend, server: name, sessions, .. } = server;
        let state = server.state.as_str();
        let warning = if server.unauthenticate { ", has UNAUTHENTICATE: disable it there" } else { "" };
        let _ = write!(text, "server    {backend} {name}: {state}, {health}, {sessions} sessions{warning}");
        if let Some(set) = &server.set {
            let _ = write!(text, "; set by {} at {}{}", set.by, set.since(), because(set.reason.as_deref()));
        }
        if let Some(error) = &server.last_error {
            let _ = write!(text, "; last error {} s ago: {}", error.seconds_ago, error.text);
        }
        text.push('\n');
    }
    for stored in &own.unused_states {
        let (word, set) = (stored.set.state.as_str(), &stored.set);
        let _ = writeln!(
            text,
            "no server {} {}: {word}, not in the configuration; set by {} at {}{}",
            stored.backend,
            stored.server,
            set.by,
            set.since(),
            because(set.reason.as_deref())
        );
    }
    text.push_str(&lines);
    let _ = write!(text, "sessions  {}", own.sessions);
    let mut data = json!(own);
    data["predecessors"] = Value::Array(predecessors);
    Answer { ok: true, text, data, notes: problems(others) }
}

fn because(reason: Option<&str>) -> String {
    reason.map(|reason| format!(": {reason}")).unwrap_or_default()
}

/// Sessions of a process and its predecessors.
pub(super) fn sessions(mut own: SessionList, others: Vec<From<SessionList>>) -> Answer {
    let mut notes = problems(&others);
    for other in others {
        let Ok(list) = other.value else { continue };
        own.left_out += list.left_out;
        let pid = Some(other.pid);
        own.sessions.extend(list.sessions.into_iter().map(|session| SessionView { predecessor: pid, ..session }));
    }
    if own.left_out > 0 {
        notes.push(format!("{} more sessions are not listed", own.left_out));
    }
    let text = own.sessions.iter().map(line).collect::<Vec<_>>().join("\n");
    Answer { ok: true, text, data: json!(own.sessions), notes }
}

fn line(view: &SessionView) -> String {
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
    use super::*;
    use crate::admin_state::AdminState;
    use crate::backend::state_override::StateOverride;
    use crate::server::views::ServerError;

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
        let second =
            From { pid: 2, value: Ok(process(2, vec![server("x", 10), server("gone", 5), server("idle", 0)])) };
        let first = From { pid: 1, value: Ok(process(1, vec![server("x", 100)])) };
        let silent = From { pid: 9, value: Err("no answer within 5s".to_owned()) };
        let answer = status(own, &[first, second, silent]);
        assert_eq!(answer.data["sessions"], 118);
        let servers: Vec<(&str, u64)> = answer.data["servers"]
            .as_array()
            .unwrap()
            .iter()
            .map(|server| (server["server"].as_str().unwrap(), server["sessions"].as_u64().unwrap()))
            .collect();
        assert_eq!(servers, [("x", 111), ("y", 2), ("gone", 5)]);
        assert_eq!(answer.data["predecessors"][1], json!({"pid": 2, "version": "1.0", "sessions": 15}));
        assert_eq!(answer.notes, ["the predecessor with process id 9 could not be asked: no answer within 5s"]);
        for line in [
            "server    a x: drain, answers, 111 sessions, has UNAUTHENTICATE: disable it there; set by root at \
             1970-01-01T00:00:00Z: disks; last error 7 s ago: refused\n",
            "server    a y: up, answers, 2 sessions\n",
            "predecessor 2 (version 1.0): 15 sessions\n",
        ] {
            assert!(answer.text.contains(line), "{}", answer.text);
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
        assert_eq!(line(&accepted), "alice 192.0.2.1 - - 7 s logging in id");
        let list = |left_out| SessionList { sessions: vec![view.clone()], left_out };
        let answer = sessions(list(0), vec![From { pid: 5, value: Ok(list(2)) }]);
        assert_eq!(answer.text, "alice 192.0.2.1 a x 7 s id\nalice 192.0.2.1 a x 7 s id (predecessor 5)");
        assert_eq!((answer.data[0].get("predecessor"), &answer.data[1]["predecessor"]), (None, &json!(5)));
        assert_eq!(answer.notes, ["2 more sessions are not listed"]);
    }
}
