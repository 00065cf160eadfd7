//! Administrative states of servers: set by operators, kept in the state file, handed to a successor.

use std::collections::BTreeSet;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{Context as _, bail};
use tokio::sync::MutexGuard;
use tokio::time;

use super::{Running, Snapshot, state_file};
use crate::admin_state::AdminState;
use crate::backend::Server;
use crate::backend::state_override::{StateOverride, StoredOverride};
use crate::session_registry::CancelReason;

/// Interval at which sessions of a server are ended while it is drained.
const TICK: Duration = Duration::from_millis(200);

/// A change of a server's administrative state.
#[derive(Debug, Clone, Default)]
pub struct StateChange {
    /// The server's name, for every backend that has it, or `BACKEND/SERVER`.
    pub server: String,
    /// The new state; `None` returns to the configured one.
    pub state: Option<AdminState>,
    /// End the server's sessions, evenly over this number of seconds.
    pub over: Option<f64>,
    /// The operator.
    pub by: String,
    /// The operator's reason.
    pub reason: Option<String>,
    /// Whether this process's successor passes the change on, in which case it is carried out after retirement too.
    pub is_forwarded: bool,
}

/// The result of a [`StateChange`].
#[derive(Debug, PartialEq, Eq)]
pub struct StateChanged {
    /// Sessions on the server, in this process.
    pub sessions: usize,
    /// Whether the state file could be written, if there is one.
    pub saved: Result<(), String>,
}

/// The right to retire a process: see [`Running::before_retirement`].
pub struct BeforeRetirement<'a> {
    running: &'a Running,
    _changing: MutexGuard<'a, ()>,
}

impl BeforeRetirement<'_> {
    /// Marks the process as retired, and returns its administrative states, which only its successor changes from now on.
    pub fn retire(self) -> Vec<StoredOverride> {
        self.running.set_retired();
        self.running.states()
    }
}

impl Running {
    /// Sets or resets a server's administrative state. With `over` its sessions are ended too.
    ///
    /// # Errors
    /// The server is unknown, a text is not a short line, or a successor has taken over.
    pub async fn set_server(&self, change: StateChange) -> anyhow::Result<StateChanged> {
        let state = change.state;
        let over = change.over.map(Duration::try_from_secs_f64).transpose().context("invalid duration")?;
        let set = state.map(|state| StateOverride::new(state, &change.by, change.reason.as_deref())).transpose()?;
        let changing = self.changing_states.lock().await;
        if self.is_retired() && !change.is_forwarded {
            bail!("this process has been replaced: set the state in its successor");
        }
        let snapshot = self.snapshot();
        let all: Vec<Arc<Server>> = snapshot.backends.list().iter().flat_map(|backend| backend.servers()).collect();
        let servers: Vec<Arc<Server>> =
            all.iter().filter(|server| names(&change.server, &server.backend, &server.name)).cloned().collect();
        let states = snapshot.backends.state_overrides();
        let mut targets: BTreeSet<(String, String)> =
            servers.iter().map(|server| (server.backend.to_string(), server.name.to_string())).collect();
        if set.is_none() {
            // A state may be kept for a server that the configuration does not have any more.
            let kept = states.all().into_iter().map(|stored| (stored.backend, stored.server));
            targets.extend(kept.filter(|(backend, server)| names(&change.server, backend, server)));
        }
        if targets.is_empty() {
            let known: BTreeSet<&str> = all.iter().map(|server| &*server.name).collect();
            let known = known.into_iter().collect::<Vec<_>>().join(", ");
            bail!("no server is called {:?}; known: {known}", change.server);
        }
        for (backend, server) in &targets {
            states.set(backend, server, set.clone())?;
            let (state, reason) = (change.state.map_or("as-configured", AdminState::as_str), change.reason.as_deref());
            tracing::info!(backend, server, state, by = change.by, reason, "server state set");
        }
        snapshot.backends.update_gauges();
        if let Some(AdminState::Drain | AdminState::Down) = state {
            // They are routed again; a SASL exchange could wait for its client until long after the drain.
            let is_named = |server: &Server| names(&change.server, &server.backend, &server.name);
            self.sessions().cancel_logins(CancelReason::Drained, is_named);
        }
        let saved = self.save_states().await;
        drop(changing);
        if let (Some(over), Some(AdminState::Drain | AdminState::Down)) = (over, state) {
            for server in servers {
                self.empty(server, over);
            }
        }
        let sessions = self.sessions().count(|server| names(&change.server, &server.backend, &server.name));
        Ok(StateChanged { sessions, saved })
    }

    /// The administrative states that are set, for a successor.
    pub fn states(&self) -> Vec<StoredOverride> {
        self.snapshot().backends.state_overrides().all()
    }

    /// Whether a successor has taken over, so that this process only finishes its sessions.
    pub fn is_retired(&self) -> bool {
        self.retired.load(Ordering::Acquire)
    }

    /// A successor takes over: from now on this process serves what it has, and decides nothing for others.
    pub(super) fn set_retired(&self) {
        self.retired.store(true, Ordering::Release);
    }

    /// Waits for a change of administrative states in progress, and allows none until the result is dropped or used.
    ///
    /// # Errors
    /// The change does not end within `deadline`: the disk of the state file hangs, perhaps.
    pub async fn before_retirement(&self, deadline: Duration) -> io::Result<BeforeRetirement<'_>> {
        let changing = time::timeout(deadline, self.changing_states.lock()).await;
        let changing = changing.map_err(|_| io::Error::other("a change of a server's state does not end"))?;
        Ok(BeforeRetirement { running: self, _changing: changing })
    }

    /// Replaces the administrative states by a predecessor's, which had them when it retired.
    pub async fn adopt_states(&self, states: &[StoredOverride]) {
        let _changing = self.changing_states.lock().await;
        let backends = self.snapshot().backends.clone();
        if backends.state_overrides().all() != states {
            backends.state_overrides().replace(states);
            backends.update_gauges();
        }
        // The predecessor may have had no state file, or another.
        let _ = self.save_states().await;
    }

    /// Writes the state file, if there is one. A retired process leaves it to its successor.
    async fn save_states(&self) -> Result<(), String> {
        let Some(path) = self.snapshot().config.state_file.clone().filter(|_| !self.is_retired()) else {
            return Ok(());
        };
        let (states, shown) = (self.states(), path.clone());
        // Off the thread that serves, because a disk may be slow.
        let saved = tokio::task::spawn_blocking(move || state_file::save(&path, states)).await;
        let saved = saved.map_err(|error| error.to_string()).and_then(|saved| saved.map_err(|error| error.to_string()));
        self.metrics().state_file_failed(saved.is_err());
        saved.map_err(|error| {
            tracing::error!(file = %shown.display(), %error, "the state file cannot be written");
            format!("{} cannot be written: {error}", shown.display())
        })
    }

    /// Ends all sessions of a server evenly, until the server is up again.
    fn empty(&self, server: Arc<Server>, over: Duration) {
        let (sessions, stop) = (self.sessions().clone(), self.stop_background.clone());
        let ticks = (over.as_millis() / TICK.as_millis()).max(1);
        let empty = async move {
            let is_it = |other: &Server| other.backend == server.backend && other.name == server.name;
            let all = sessions.count_uncancelled(is_it);
            for tick in 1..=ticks {
                if server.admin_state() == AdminState::Up {
                    tracing::info!(server = %server.name, "drain cancelled; remaining sessions kept");
                    return;
                }
                let left = sessions.count_uncancelled(is_it);
                let may_be_left = usize::try_from(all as u128 * (ticks - tick) / ticks).unwrap_or(0);
                sessions.cancel_up_to(left.saturating_sub(may_be_left), CancelReason::Drained, is_it);
                if tick < ticks {
                    time::sleep(TICK).await;
                }
            }
            tracing::info!(server = %server.name, "all sessions of the server were ended");
        };
        self.background.spawn(async move { stop.run_until_cancelled(empty).await });
    }
}

impl Snapshot {
    /// Reads the states in the state file, for a command that looks and ends: a file that cannot be read stays where it is.
    ///
    /// # Errors
    /// The file cannot be read, or its content is invalid.
    pub fn read_states(&self) -> Result<(), String> {
        let Some(path) = &self.config.state_file else { return Ok(()) };
        let states = state_file::read(path).map_err(|error| format!("{}: {error}", path.display()))?;
        self.backends.state_overrides().replace(&states);
        Ok(())
    }
}

/// Whether an operator's `SERVER` or `BACKEND/SERVER` names this server. Names of servers have no slash; those of backends may.
fn names(given: &str, backend: &str, server: &str) -> bool {
    given == server || given.rsplit_once('/').is_some_and(|given| given == (backend, server))
}

#[cfg(test)]
mod tests {
    use super::names;

    #[test]
    fn a_server_is_named_alone_or_with_its_backend() {
        assert!(names("h:1", "a", "h:1") && names("h:1", "b", "h:1"));
        assert!(names("a/h:1", "a", "h:1") && !names("a/h:1", "b", "h:1"));
        assert!(names("a/b/h:1", "a/b", "h:1") && !names("b/h:1", "a/b", "h:1"));
        assert!(!names("h", "a", "h:1") && !names("/h:1", "a", "h:1") && !names("", "a", "h:1"));
    }
}
