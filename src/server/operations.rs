//! What operators ask of a running process about its users: who is logged in, end a user's sessions, move a user to another
//! backend. `server_state` has what they ask about servers. All of it is about this process alone: `control` asks the predecessors.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use tokio::time::{self, Instant, timeout};

use super::views::{ProcessStatus, ServerError, ServerStatus, SessionList, SessionView};
use super::{Running, Snapshot};
use crate::identity::UserName;
use crate::route::{LookupRequest, RouteDecision, RouteError};
use crate::session_registry::{CancelReason, LoginHold, RegisteredSession, SessionState};

/// Timeout for sessions that are ended to be gone; a session that takes longer is stuck in the kernel.
const GONE: Duration = Duration::from_secs(30);
/// First and longest pause between two looks at the routes while they do not yet name the new backend.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// Maximum number of sessions that are listed.
const LISTED: usize = 10_000;

/// A user who was moved.
#[derive(Debug)]
pub struct UserMoved {
    /// Sessions that were ended.
    pub ended: usize,
    /// The backend that the routes name now.
    pub backend: String,
}

/// New logins of a user wait, under each of the user's names, until this is dropped.
#[derive(Debug)]
pub struct UserHold(#[expect(dead_code, reason = "held for its end")] Vec<LoginHold>);

impl UserHold {
    /// Keeps the user out for the rest of the process's life.
    fn for_good(self) {
        std::mem::forget(self);
    }
}

impl Running {
    /// State of the process: listeners, servers, number of sessions.
    pub fn status(&self) -> ProcessStatus {
        let snapshot = self.snapshot();
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
        let mut unused_states = self.states();
        unused_states.retain(|stored| {
            !servers.iter().any(|server| server.backend == stored.backend && server.server == stored.server)
        });
        ProcessStatus {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            file: snapshot.config.file.display().to_string(),
            listeners: self.listeners().iter().map(ToString::to_string).collect(),
            servers,
            unused_states,
            sessions: self.sessions().count(|_| true),
        }
    }

    /// Sessions of a user, or of all users.
    ///
    /// # Errors
    /// The user name is invalid.
    pub async fn list_sessions(&self, user: Option<&str>) -> anyhow::Result<SessionList> {
        let (seen, all): (Vec<RegisteredSession>, usize) = match user {
            None => (self.sessions().list(LISTED), self.sessions().count(|_| true)),
            Some(user) => {
                let names = self.names(user).await?;
                let mut seen: Vec<RegisteredSession> =
                    names.iter().flat_map(|name| self.sessions().of_user(name)).collect();
                let all = seen.len();
                seen.truncate(LISTED);
                (seen, all)
            }
        };
        let left_out = all.saturating_sub(seen.len());
        let sessions = seen.iter().map(|seen| SessionView {
            user: seen.info.user.to_string(),
            client: seen.info.client.to_string(),
            session: String::from_utf8_lossy(&seen.info.session).into_owned(),
            backend: seen.server.as_ref().map(|server| server.backend.to_string()),
            server: seen.server.as_ref().map(|server| server.name.to_string()),
            seconds: seen.age.as_secs(),
            settled: matches!(seen.state, SessionState::Established | SessionState::ServerClosed),
            cut_off: seen.state == SessionState::ServerClosed,
            predecessor: None,
        });
        Ok(SessionList { sessions: sessions.collect(), left_out })
    }

    /// Ends a user's sessions and returns their number. The user may log in again at once.
    ///
    /// # Errors
    /// The user name is invalid.
    pub async fn kick(&self, user: &str) -> anyhow::Result<usize> {
        // Under the name that is known at once: the routes may take a while to answer.
        let ended = self.sessions().cancel_user(&question(&self.snapshot(), user)?.user, CancelReason::Kicked);
        let names = self.names(user).await?;
        Ok(ended + names.iter().map(|name| self.sessions().cancel_user(name, CancelReason::Kicked)).sum::<usize>())
    }

    /// Keeps new logins of a user waiting, ends the user's sessions, waits until they are gone, and returns their number.
    ///
    /// # Errors
    /// The user name is invalid, or a session does not end.
    pub async fn hold(&self, user: &str) -> anyhow::Result<(UserHold, usize)> {
        let sessions = self.sessions();
        // Under the name that is known at once: the routes may take a while to answer.
        let name = question(&self.snapshot(), user)?.user;
        let mut holds = vec![sessions.hold(name.clone())];
        let mut ended = sessions.cancel_user(&name, CancelReason::Moved);
        let names = self.names(user).await?;
        holds.extend(names.iter().map(|name| sessions.hold(name.clone())));
        ended += names.iter().map(|name| sessions.cancel_user(name, CancelReason::Moved)).sum::<usize>();
        let gone = self.sessions().wait_until(|sessions| {
            names.iter().all(|name| {
                // A login that registered just before the hold is ended too.
                sessions.cancel_user(name, CancelReason::Moved);
                sessions.of_user(name).is_empty()
            })
        });
        timeout(GONE, gone).await.context("sessions do not end; new logins are let in again")?;
        Ok((UserHold(holds), ended))
    }

    /// As [`Running::hold`], on behalf of this process's successor. The user is not let in here again, because the routes of a
    /// retired process may be out of date: clients that are still connected here reconnect, to the successor.
    ///
    /// # Errors
    /// As [`Running::hold`].
    pub async fn hold_for_successor(&self, user: &str) -> anyhow::Result<(UserHold, usize)> {
        let (hold, ended) = self.hold(user).await?;
        if self.is_retired() {
            hold.for_good();
            return Ok((UserHold(Vec::new()), ended));
        }
        Ok((hold, ended))
    }

    /// Moves a user: ends the user's sessions, waits until the routes name `backend`, and lets the user in again.
    ///
    /// # Errors
    /// The backend or the user name is unknown, or the routes do not name `backend` within `wait`. Sessions are ended all the same.
    pub async fn move_user(&self, user: &str, backend: &str, wait: Duration) -> anyhow::Result<UserMoved> {
        self.declared(backend)?;
        let (_hold, ended) = self.hold(user).await?;
        self.routes_name(user, backend, wait).await.with_context(|| format!("{ended} sessions were ended"))?;
        Ok(UserMoved { ended, backend: backend.to_owned() })
    }

    /// Checks that a backend is configured.
    ///
    /// # Errors
    /// It is not.
    pub fn declared(&self, backend: &str) -> anyhow::Result<()> {
        match self.snapshot().backends.named(backend) {
            Some(_) => Ok(()),
            None => bail!("no backend is declared as {backend:?}"),
        }
    }

    /// Waits until the routes name `backend` for a user: reads changed files, forgets cached answers, asks, and asks again.
    ///
    /// # Errors
    /// The routes do not name `backend` within `wait`; the text has the last answer.
    pub async fn routes_name(&self, user: &str, backend: &str, wait: Duration) -> anyhow::Result<()> {
        let due = Instant::now() + wait;
        let mut pause = FIRST_PAUSE;
        loop {
            let error = match self.routes_name_now(user, backend).await {
                Ok(()) => return Ok(()),
                Err(error) => error,
            };
            if Instant::now() >= due {
                return Err(error.context(format!("the routes do not name {backend} after {wait:.0?}")));
            }
            time::sleep_until(due.min(Instant::now() + pause)).await;
            pause = LONGEST_PAUSE.min(pause * 2);
        }
    }

    async fn routes_name_now(&self, user: &str, backend: &str) -> anyhow::Result<()> {
        // Not the configuration that the move began with: a reload may be how the routes change.
        let snapshot = self.snapshot();
        let question = question(&snapshot, user)?;
        let refreshed = timeout(snapshot.limits.lookup, snapshot.router.refresh(&snapshot.metrics)).await;
        let refreshed = refreshed.unwrap_or_else(|_| Err("a table is still being written, or read".to_owned()));
        snapshot.router.forget(&question.user);
        let found = timeout(snapshot.limits.lookup, snapshot.router.route(&question, &snapshot.metrics)).await;
        let answer = match found {
            Err(_) => "the routes do not answer within limits.lookup".to_owned(),
            Ok(Err(RouteError::Unknown)) => "no route knows the user".to_owned(),
            Ok(Err(error)) => error.to_string(),
            Ok(Ok(routed)) => match &*routed.decision {
                RouteDecision::Destination(place) => {
                    let named = &snapshot.backends.backend(place.backend).name;
                    if **named == *backend {
                        return Ok(());
                    }
                    format!(
                        "the routes say {named}, not {backend} (route {:?} answers): change them first",
                        routed.route
                    )
                }
                RouteDecision::PasswordNeeded => {
                    format!(
                        "the routes need the user's password (route {:?} answers): what they say is unknown",
                        routed.route
                    )
                }
                RouteDecision::Refuse(_) | RouteDecision::WrongPassword(_) | RouteDecision::Maintenance(_) => {
                    format!("the routes refuse the user (route {:?} answers)", routed.route)
                }
            },
        };
        match refreshed {
            Ok(()) => bail!(answer),
            Err(wrong) => bail!("{answer}; {wrong}"),
        }
    }

    /// Names under which a user's sessions may be registered: as routes know the user, and the mailbox's if routes rename it.
    async fn names(&self, user: &str) -> anyhow::Result<Vec<Arc<str>>> {
        let snapshot = self.snapshot();
        let question = question(&snapshot, user)?;
        let mut names = vec![question.user.clone()];
        let found = timeout(snapshot.limits.lookup, snapshot.router.route(&question, &snapshot.metrics)).await;
        if let Ok(Ok(routed)) = found
            && let RouteDecision::Destination(place) = &*routed.decision
        {
            let mailbox = place.mailbox(&question.user);
            if mailbox != question.user {
                names.push(mailbox);
            }
        }
        Ok(names)
    }
}

fn question(snapshot: &Snapshot, user: &str) -> anyhow::Result<LookupRequest> {
    let name = UserName::new(user.as_bytes())?;
    let names = snapshot.config.naming.names(&name).map_err(|refused| anyhow::anyhow!("{refused}"))?;
    Ok(LookupRequest { user: names.routing, login_context: None })
}
