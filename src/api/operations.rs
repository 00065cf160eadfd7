//! The operations on one running process and its users: status, list of sessions, kick, hold, move.
//!
//! They return typed values ([`super::views`]) and know nothing of other processes: `commands` adds those of predecessors.
//! Changes of server states are [`Running::set_server`].

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use tokio::time::{self, Instant, timeout};

use super::views::{MoveResult, ProcessStatus, ServerError, ServerStatus, SessionList, SessionView};
use crate::identity::UserName;
use crate::route::{LookupRequest, RouteDecision, RouteError};
use crate::server::Running;
use crate::session_registry::{CancelReason, LoginHold, RegisteredSession, SessionState};
use crate::snapshot::Snapshot;

/// Timeout for cancelled sessions to end. A session that takes longer is stuck in the kernel.
const CANCEL_DEADLINE: Duration = Duration::from_secs(30);
/// First and longest pause between two lookups while the routes do not name the new backend.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const MAX_PAUSE: Duration = Duration::from_secs(1);
/// Maximum number of sessions in a list.
const MAX_LISTED: usize = 10_000;

/// New logins of a user wait until this is dropped. It holds each name under which the user's sessions may be registered.
#[derive(Debug)]
pub struct UserHold(#[expect(dead_code, reason = "held for its Drop")] Vec<LoginHold>);

impl UserHold {
    /// Keeps the user out for the rest of the process's life.
    fn forget(self) {
        std::mem::forget(self);
    }
}

/// The operations on a running process.
#[derive(Clone, Copy)]
pub struct Operations<'a> {
    running: &'a Running,
}

impl<'a> Operations<'a> {
    /// The operations on `running`.
    pub fn new(running: &'a Running) -> Self {
        Self { running }
    }

    /// Returns the state of the process: listeners, servers and the number of sessions.
    pub fn status(self) -> ProcessStatus {
        let snapshot = self.running.snapshot();
        let mut servers = Vec::new();
        for backend in snapshot.backends.list() {
            servers.extend(backend.servers().iter().map(|server| ServerStatus {
                backend: backend.name.to_string(),
                server: server.name.to_string(),
                state: server.admin_state(),
                up: server.is_available(),
                sessions: server.sessions() as usize,
                unauthenticate: server.has_unauthenticate(),
                last_error: server.last_error().map(|error| ServerError {
                    seconds_ago: error.at.elapsed().as_secs(),
                    text: error.text.to_string(),
                }),
                set: server.state_override(),
            }));
        }
        let mut unused_states = self.running.states();
        unused_states.retain(|stored| {
            !servers.iter().any(|server| server.backend == stored.backend && server.server == stored.server)
        });
        ProcessStatus {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            file: snapshot.config.file.display().to_string(),
            listeners: self.running.listeners().iter().map(ToString::to_string).collect(),
            servers,
            unused_states,
            sessions: self.running.sessions().count(|_| true),
        }
    }

    /// Lists the sessions of a user, or of all users.
    ///
    /// # Errors
    /// The user name is invalid.
    pub async fn list_sessions(self, user: Option<&str>) -> anyhow::Result<SessionList> {
        let registry = self.running.sessions();
        let (sessions, total): (Vec<RegisteredSession>, usize) = match user {
            None => (registry.list(MAX_LISTED), registry.count(|_| true)),
            Some(user) => {
                let names = self.registered_names(user).await?;
                let mut sessions: Vec<RegisteredSession> =
                    names.iter().flat_map(|name| registry.of_user(name)).collect();
                let total = sessions.len();
                sessions.truncate(MAX_LISTED);
                (sessions, total)
            }
        };
        let left_out = total.saturating_sub(sessions.len());
        Ok(SessionList { sessions: sessions.iter().map(session_view).collect(), left_out })
    }

    /// Ends a user's sessions and returns their number. The user may log in again at once.
    ///
    /// # Errors
    /// The user name is invalid.
    pub async fn kick(self, user: &str) -> anyhow::Result<usize> {
        let registry = self.running.sessions();
        // First under the name that is known without a lookup, because the routes may take a while.
        let name = lookup_request(&self.running.snapshot(), user)?.user;
        let ended = registry.cancel_user(&name, CancelReason::Kicked);
        let names = self.registered_names(user).await?;
        Ok(ended + names.iter().map(|name| registry.cancel_user(name, CancelReason::Kicked)).sum::<usize>())
    }

    /// Delays a user's new logins, ends the user's sessions, waits until they have ended, and returns their number.
    ///
    /// # Errors
    /// The user name is invalid, or a session does not end.
    pub async fn hold(self, user: &str) -> anyhow::Result<(UserHold, usize)> {
        let registry = self.running.sessions();
        // First under the name that is known without a lookup, because the routes may take a while.
        let name = lookup_request(&self.running.snapshot(), user)?.user;
        let mut holds = vec![registry.hold(name.clone())];
        let mut ended = registry.cancel_user(&name, CancelReason::Moved);
        let names = self.registered_names(user).await?;
        holds.extend(names.iter().map(|name| registry.hold(name.clone())));
        ended += names.iter().map(|name| registry.cancel_user(name, CancelReason::Moved)).sum::<usize>();
        let all_ended = registry.wait_until(|registry| {
            names.iter().all(|name| {
                // A login that was registered just before the hold is cancelled too.
                registry.cancel_user(name, CancelReason::Moved);
                registry.of_user(name).is_empty()
            })
        });
        timeout(CANCEL_DEADLINE, all_ended)
            .await
            .context("the user's sessions do not end; new logins are accepted again")?;
        Ok((UserHold(holds), ended))
    }

    /// As [`Operations::hold`], for this process's successor. A retired process never accepts the user again, because its
    /// routes may be out of date: clients that are still connected here reconnect, to the successor.
    ///
    /// # Errors
    /// As [`Operations::hold`].
    pub async fn hold_for_successor(self, user: &str) -> anyhow::Result<(UserHold, usize)> {
        let (hold, ended) = self.hold(user).await?;
        if self.running.is_retired() {
            hold.forget();
            return Ok((UserHold(Vec::new()), ended));
        }
        Ok((hold, ended))
    }

    /// Moves a user: ends the user's sessions and delays new logins until the routes name `backend`.
    ///
    /// # Errors
    /// The backend is unknown, the user name is invalid, or the routes do not name `backend` within `wait`. In the last case the
    /// sessions have been ended.
    pub async fn move_user(self, user: &str, backend: &str, wait: Duration) -> anyhow::Result<MoveResult> {
        self.check_backend(backend)?;
        let (_hold, ended) = self.hold(user).await?;
        self.wait_for_route(user, backend, wait).await.with_context(|| format!("{ended} sessions were ended"))?;
        Ok(MoveResult { ended, backend: backend.to_owned() })
    }

    /// Checks that a backend is configured.
    ///
    /// # Errors
    /// It is not.
    pub fn check_backend(self, backend: &str) -> anyhow::Result<()> {
        match self.running.snapshot().backends.named(backend) {
            Some(_) => Ok(()),
            None => bail!("no backend is declared as {backend:?}"),
        }
    }

    /// Waits until the routes name `backend` for a user. Each attempt reads changed files, and discards cached answers.
    ///
    /// # Errors
    /// The routes do not name `backend` within `wait`. The error contains their last answer.
    pub async fn wait_for_route(self, user: &str, backend: &str, wait: Duration) -> anyhow::Result<()> {
        let deadline = Instant::now() + wait;
        let mut pause = FIRST_PAUSE;
        loop {
            let error = match self.check_route(user, backend).await {
                Ok(()) => return Ok(()),
                Err(error) => error,
            };
            if Instant::now() >= deadline {
                return Err(error.context(format!("the routes do not name {backend} after {wait:.0?}")));
            }
            time::sleep_until(deadline.min(Instant::now() + pause)).await;
            pause = MAX_PAUSE.min(pause * 2);
        }
    }

    async fn check_route(self, user: &str, backend: &str) -> anyhow::Result<()> {
        // The newest configuration, not that at the beginning of the move: a reload may be how the routes change.
        let snapshot = self.running.snapshot();
        let request = lookup_request(&snapshot, user)?;
        let refreshed = timeout(snapshot.limits.lookup, snapshot.router.refresh(&snapshot.metrics)).await;
        let refreshed = refreshed.unwrap_or_else(|_| Err("a table is still being written or read".to_owned()));
        snapshot.router.forget(&request.user);
        let routed = timeout(snapshot.limits.lookup, snapshot.router.route(&request, &snapshot.metrics)).await;
        let answer = match routed {
            Err(_) => "the routes do not answer within limits.lookup".to_owned(),
            Ok(Err(RouteError::Unknown)) => "no route knows the user".to_owned(),
            Ok(Err(error)) => error.to_string(),
            Ok(Ok(routed)) => match &*routed.decision {
                RouteDecision::Destination(destination) => {
                    let named = &snapshot.backends.backend(destination.backend).name;
                    if **named == *backend {
                        return Ok(());
                    }
                    format!("route {:?} names backend {named}, not {backend}: change the route first", routed.route)
                }
                RouteDecision::PasswordNeeded => {
                    format!("route {:?} decides by the user's password, so its decision is unknown", routed.route)
                }
                RouteDecision::Refuse(_) | RouteDecision::WrongPassword(_) | RouteDecision::Maintenance(_) => {
                    format!("route {:?} refuses the user", routed.route)
                }
            },
        };
        match refreshed {
            Ok(()) => bail!(answer),
            Err(error) => bail!("{answer}; {error}"),
        }
    }

    /// The names under which a user's sessions may be registered: the routed name, and the mailbox name if routes replace it.
    async fn registered_names(self, user: &str) -> anyhow::Result<Vec<Arc<str>>> {
        let snapshot = self.running.snapshot();
        let request = lookup_request(&snapshot, user)?;
        let mut names = vec![request.user.clone()];
        let routed = timeout(snapshot.limits.lookup, snapshot.router.route(&request, &snapshot.metrics)).await;
        if let Ok(Ok(routed)) = routed
            && let RouteDecision::Destination(destination) = &*routed.decision
        {
            let mailbox = destination.mailbox(&request.user);
            if mailbox != request.user {
                names.push(mailbox);
            }
        }
        Ok(names)
    }
}

fn session_view(session: &RegisteredSession) -> SessionView {
    SessionView {
        user: session.info.user.to_string(),
        client: session.info.client.to_string(),
        session: String::from_utf8_lossy(&session.info.session).into_owned(),
        backend: session.server.as_ref().map(|server| server.backend.to_string()),
        server: session.server.as_ref().map(|server| server.name.to_string()),
        seconds: session.age.as_secs(),
        settled: matches!(session.state, SessionState::Established | SessionState::ServerClosed),
        cut_off: session.state == SessionState::ServerClosed,
        predecessor: None,
    }
}

fn lookup_request(snapshot: &Snapshot, user: &str) -> anyhow::Result<LookupRequest> {
    let name = UserName::new(user.as_bytes())?;
    let names = snapshot.config.naming.names(&name).map_err(|refused| anyhow::anyhow!("{refused}"))?;
    Ok(LookupRequest { user: names.routing, login_context: None })
}
