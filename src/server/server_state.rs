//! Changes of servers' administrative states: set by operators, saved in the state file, handed to a successor.

use std::collections::BTreeSet;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{Context as _, bail};
use thiserror::Error;
use tokio::sync::MutexGuard;
use tokio::time;

use super::{Running, Snapshot, state_file};
use crate::admin_state::AdminState;
use crate::backend::Server;
use crate::backend::state_override::{StateOverride, StoredOverride};
use crate::session_registry::CancelReason;

/// Interval at which sessions of a server are ended during a drain.
const DRAIN_INTERVAL: Duration = Duration::from_millis(200);

/// A change of a server's administrative state.
#[derive(Debug, Clone, Default)]
pub struct StateChange {
    /// The server's name, for all backends that have it, or `BACKEND/SERVER`.
    pub server: String,
    /// The new state; `None` returns to the configured one.
    pub state: Option<AdminState>,
    /// End the server's sessions, spread evenly over this number of seconds.
    pub over: Option<f64>,
    /// Name of the operator.
    pub by: String,
    /// The operator's reason.
    pub reason: Option<String>,
    /// Whether a successor forwards the change. A forwarded change is carried out even if this process has been replaced.
    pub is_forwarded: bool,
}

/// The result of a [`StateChange`].
#[derive(Debug, PartialEq, Eq)]
pub struct StateChanged {
    /// Number of sessions on the server in this process.
    pub sessions: usize,
    /// Whether the state file was written. `Ok` if none is configured.
    pub saved: Result<(), String>,
}

/// No server has this name.
#[derive(Debug, Error)]
#[error("unknown server {name:?}: expected one of {known}")]
pub struct UnknownServer {
    name: String,
    known: String,
}

/// The right to retire this process: see [`Running::before_retirement`]. No administrative state changes while it exists.
pub struct BeforeRetirement<'a> {
    running: &'a Running,
    _changing: MutexGuard<'a, ()>,
}

impl BeforeRetirement<'_> {
    /// Marks the process as retired, and returns its administrative states. From now on only its successor changes them.
    pub fn retire(self) -> Vec<StoredOverride> {
        self.running.set_retired();
        self.running.states()
    }
}

impl Running {
    /// Sets or resets a server's administrative state. With [`StateChange::over`] the server's sessions are ended too.
    ///
    /// # Errors
    /// The server is unknown ([`UnknownServer`]), the reason or the operator's name is invalid, or a successor has taken over.
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
        let servers: Vec<Arc<Server>> = all
            .iter()
            .filter(|server| matches_server(&change.server, &server.backend, &server.name))
            .cloned()
            .collect();
        let states = snapshot.backends.state_overrides();
        let mut targets: BTreeSet<(String, String)> =
            servers.iter().map(|server| (server.backend.to_string(), server.name.to_string())).collect();
        if set.is_none() {
            // An override can also be reset while its server is not in the configuration.
            let stored = states.all().into_iter().map(|stored| (stored.backend, stored.server));
            targets.extend(stored.filter(|(backend, server)| matches_server(&change.server, backend, server)));
        }
        if targets.is_empty() {
            let known: BTreeSet<&str> = all.iter().map(|server| &*server.name).collect();
            let known = known.into_iter().collect::<Vec<_>>().join(", ");
            return Err(UnknownServer { name: change.server, known }.into());
        }
        for (backend, server) in &targets {
            states.set(backend, server, set.clone())?;
            let (state, reason) = (change.state.map_or("as-configured", AdminState::as_str), change.reason.as_deref());
            tracing::info!(backend, server, state, by = change.by, reason, "server state set");
        }
        snapshot.backends.update_gauges();
        if let Some(AdminState::Drain | AdminState::Down) = state {
            // These logins are routed again. Without this a SASL exchange could still wait for its client long after the drain.
            let is_named = |server: &Server| matches_server(&change.server, &server.backend, &server.name);
            self.sessions().cancel_logins(CancelReason::Drained, is_named);
        }
        let saved = self.save_states().await;
        drop(changing);
        if let (Some(over), Some(AdminState::Drain | AdminState::Down)) = (over, state) {
            for server in servers {
                self.end_sessions(server, over);
            }
        }
        let sessions = self.sessions().count(|server| matches_server(&change.server, &server.backend, &server.name));
        Ok(StateChanged { sessions, saved })
    }

    /// Returns the administrative states that operators have set.
    pub fn states(&self) -> Vec<StoredOverride> {
        self.snapshot().backends.state_overrides().all()
    }

    /// Whether a successor has taken over, so that this process only finishes its sessions.
    pub fn is_retired(&self) -> bool {
        self.retired.load(Ordering::Acquire)
    }

    /// Marks this process as retired: it finishes its sessions, and its successor decides about server states.
    pub(super) fn set_retired(&self) {
        self.retired.store(true, Ordering::Release);
    }

    /// Waits for a change of administrative states in progress, and blocks changes until the result is dropped or used.
    ///
    /// # Errors
    /// The change does not end within `deadline`, for example because the disk of the state file hangs.
    pub async fn before_retirement(&self, deadline: Duration) -> io::Result<BeforeRetirement<'_>> {
        let changing = time::timeout(deadline, self.changing_states.lock()).await;
        let changing = changing.map_err(|_| io::Error::other("a change of a server's state does not end"))?;
        Ok(BeforeRetirement { running: self, _changing: changing })
    }

    /// Replaces the administrative states by those that the predecessor had when it retired.
    pub async fn adopt_states(&self, states: &[StoredOverride]) {
        let _changing = self.changing_states.lock().await;
        let backends = self.snapshot().backends.clone();
        if backends.state_overrides().all() != states {
            backends.state_overrides().replace(states);
            backends.update_gauges();
        }
        // The predecessor may have had another state file or none.
        let _ = self.save_states().await;
    }

    /// Writes the state file, if one is configured. A retired process does not, because the file belongs to its successor.
    async fn save_states(&self) -> Result<(), String> {
        let Some(path) = self.snapshot().config.state_file.clone().filter(|_| !self.is_retired()) else {
            return Ok(());
        };
        let (states, shown) = (self.states(), path.clone());
        // On a blocking thread, because a disk may be slow.
        let saved = tokio::task::spawn_blocking(move || state_file::save(&path, states)).await;
        let saved = saved.map_err(|error| error.to_string()).and_then(|saved| saved.map_err(|error| error.to_string()));
        self.metrics().state_file_failed(saved.is_err());
        saved.map_err(|error| {
            tracing::error!(file = %shown.display(), %error, "the state file cannot be written");
            format!("{} cannot be written: {error}", shown.display())
        })
    }

    /// Ends all sessions of a server, spread evenly over `over`. Stops if the server is set up again.
    fn end_sessions(&self, server: Arc<Server>, over: Duration) {
        let (sessions, stop) = (self.sessions().clone(), self.stop_background.clone());
        let ticks = (over.as_millis() / DRAIN_INTERVAL.as_millis()).max(1);
        let end = async move {
            let is_drained = |other: &Server| other.backend == server.backend && other.name == server.name;
            let all = sessions.count_uncancelled(is_drained);
            for tick in 1..=ticks {
                if server.admin_state() == AdminState::Up {
                    tracing::info!(server = %server.name, "drain cancelled; remaining sessions kept");
                    return;
                }
                let left = sessions.count_uncancelled(is_drained);
                let target = usize::try_from(all as u128 * (ticks - tick) / ticks).unwrap_or(0);
                sessions.cancel_up_to(left.saturating_sub(target), CancelReason::Drained, is_drained);
                if tick < ticks {
                    time::sleep(DRAIN_INTERVAL).await;
                }
            }
            tracing::info!(server = %server.name, "all sessions of the drained server have been ended");
        };
        self.background.spawn(async move { stop.run_until_cancelled(end).await });
    }
}

impl Snapshot {
    /// Applies the states in the state file, for a command that does not serve. Unlike at the start of the proxy, an invalid file is
    /// not moved aside.
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

/// Whether `SERVER` or `BACKEND/SERVER` in a command matches this server. Server names contain no slash, but backend names may.
fn matches_server(given: &str, backend: &str, server: &str) -> bool {
    given == server || given.rsplit_once('/').is_some_and(|given| given == (backend, server))
}

#[cfg(test)]
mod tests {
    use super::matches_server;

    #[test]
    fn server_matches_by_name_alone_or_with_its_backend() {
        assert!(matches_server("h:1", "a", "h:1") && matches_server("h:1", "b", "h:1"));
        assert!(matches_server("a/h:1", "a", "h:1") && !matches_server("a/h:1", "b", "h:1"));
        assert!(matches_server("a/b/h:1", "a/b", "h:1") && !matches_server("b/h:1", "a/b", "h:1"));
        assert!(
            !matches_server("h", "a", "h:1") && !matches_server("/h:1", "a", "h:1") && !matches_server("", "a", "h:1")
        );
    }
}
