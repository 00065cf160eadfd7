//! What an operator can ask of a running proxy beside a reload: who is logged in, out with a user, a server out of service, a
//! user to another backend. Called by `control`.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use serde_json::json;
use tokio::time::{self, timeout};

use super::{Live, Running};
use crate::backend::Server;
use crate::config::Mode;
use crate::control::Answer;
use crate::identity::UserName;
use crate::route::{Question, RouteError, Target};
use crate::sessions::{Hold, Seen, Stage, Why};

/// Sessions that were told to end are waited for so long; what takes longer is stuck in the kernel.
const GONE: Duration = Duration::from_secs(30);
/// How often some of a server's sessions are ended while it is emptied.
const TICK: Duration = Duration::from_millis(200);
/// Sessions listed at most.
const LISTED: usize = 10_000;

/// A user who was moved.
#[derive(Debug)]
pub struct UserMoved {
    /// Sessions that were ended.
    pub ended: usize,
    /// Where the user belongs now.
    pub backend: String,
}

/// A user's new logins wait, under each name the user has, until this drops.
#[derive(Debug)]
pub struct UserHold(#[expect(dead_code, reason = "held for its end")] Vec<Hold>);

impl Running {
    /// How things are: listeners, servers, sessions.
    pub fn status(&self) -> Answer {
        let live = self.live();
        let mut text = format!("version   {}\n", env!("CARGO_PKG_VERSION"));
        let mut servers = Vec::new();
        for address in self.listeners() {
            text.push_str(&format!("listener  {address}\n"));
        }
        for backend in live.backends.list() {
            for server in backend.servers() {
                let (mode, up, sessions) = (server.mode().as_str(), server.is_available(), server.sessions());
                let state = if up { "answers" } else { "failing" };
                let error = server.last_error().map(|error| (error.at.elapsed().as_secs(), error.text));
                let last_error = error.as_ref().map(|(age, text)| format!("; last error {age} s ago: {text}"));
                let unauthenticate = server.has_unauthenticate();
                let warning = if unauthenticate { ", has UNAUTHENTICATE: disable it there" } else { "" };
                text.push_str(&format!(
                    "server    {} {}: {mode}, {state}, {sessions} sessions{warning}{}\n",
                    backend.name,
                    server.name,
                    last_error.unwrap_or_default()
                ));
                servers.push(json!({
                    "backend": &*backend.name, "server": &*server.name, "mode": mode, "up": up, "sessions": sessions,
                    "unauthenticate": unauthenticate,
                    "last_error": error.map(|(age, text)| json!({"seconds_ago": age, "text": &*text})),
                }));
            }
        }
        let sessions = self.sessions().count(|_| true);
        text.push_str(&format!("sessions  {sessions}"));
        let listeners: Vec<String> = self.listeners().iter().map(ToString::to_string).collect();
        let data = json!({
            "version": env!("CARGO_PKG_VERSION"), "pid": std::process::id(), "file": live.config.file,
            "listeners": listeners, "servers": servers, "sessions": sessions,
        });
        Answer { ok: true, text, data }
    }

    /// Who is logged in.
    ///
    /// # Errors
    /// That is no user name.
    pub async fn who(&self, user: Option<&str>) -> anyhow::Result<Answer> {
        let seen: Vec<Seen> = match user {
            None => self.sessions().list(LISTED),
            Some(user) => {
                let names = self.names(user).await?;
                names.iter().flat_map(|name| self.sessions().of_user(name)).collect()
            }
        };
        let lines = seen.iter().map(|seen| {
            let Seen { guest, server, age, stage } = seen;
            let (backend, server) = server.as_ref().map_or(("-", "-"), |server| (&*server.backend, &*server.name));
            let state = match stage {
                Stage::LoggingIn | Stage::Accepted => " logging in",
                Stage::Settled => "",
                Stage::CutOff => " cut off",
            };
            let session = String::from_utf8_lossy(&guest.session);
            format!("{} {} {backend} {server} {} s{state} {session}", guest.user, guest.client, age.as_secs())
        });
        let text = lines.collect::<Vec<_>>().join("\n");
        let data = seen.iter().map(|seen| {
            json!({
                "user": &*seen.guest.user, "client": seen.guest.client.to_string(),
                "session": String::from_utf8_lossy(&seen.guest.session),
                "backend": seen.server.as_ref().map(|server| &*server.backend),
                "server": seen.server.as_ref().map(|server| &*server.name), "seconds": seen.age.as_secs(),
                "settled": matches!(seen.stage, Stage::Settled | Stage::CutOff),
                "cut_off": seen.stage == Stage::CutOff,
            })
        });
        let data = data.collect();
        Ok(Answer { ok: true, text, data })
    }

    /// Ends a user's sessions; says how many there were. The user may come back at once.
    ///
    /// # Errors
    /// That is no user name.
    pub async fn kick(&self, user: &str) -> anyhow::Result<usize> {
        // Under the name that is known at once: the routes may take a while to answer.
        let ended = self.sessions().end_user(&question(&self.live(), user)?.user, Why::Kicked);
        let names = self.names(user).await?;
        Ok(ended + names.iter().map(|name| self.sessions().end_user(name, Why::Kicked)).sum::<usize>())
    }

    /// Sets what is wanted of a server, in every backend that has it; with `over` its sessions are ended too, evenly over so
    /// many seconds. Says how many there are.
    ///
    /// # Errors
    /// No such server, or no such mode.
    pub fn set_server(&self, name: &str, mode: Option<&str>, over: Option<f64>) -> anyhow::Result<usize> {
        let mode = match mode {
            None => None,
            Some("up") => Some(Mode::Up),
            Some("drain") => Some(Mode::Drain),
            Some("down") => Some(Mode::Down),
            Some(other) => bail!("{other:?} is no mode: up, drain or down"),
        };
        let over = over.map(Duration::try_from_secs_f64).transpose().context("that is no duration")?;
        let live = self.live();
        let all: Vec<Arc<Server>> = live.backends.list().iter().flat_map(|backend| backend.servers()).collect();
        let servers: Vec<Arc<Server>> = all.iter().filter(|server| *server.name == *name).cloned().collect();
        if servers.is_empty() {
            let known: BTreeSet<&str> = all.iter().map(|server| &*server.name).collect();
            bail!("no server is called {name:?}; known: {}", known.into_iter().collect::<Vec<_>>().join(", "));
        }
        for server in &servers {
            server.set_mode(mode);
        }
        if let Some(Mode::Drain | Mode::Down) = mode {
            // They are routed again; a SASL exchange could wait for its client until long after the drain.
            self.sessions().end_logins(Why::Drained, |server| *server.name == *name);
        }
        if let (Some(over), Some(Mode::Drain | Mode::Down)) = (over, mode) {
            for server in servers {
                self.empty(server, over);
            }
        }
        Ok(self.sessions().count(|server| *server.name == *name))
    }

    /// Ends all sessions of a server, evenly; until it is wanted again.
    fn empty(&self, server: Arc<Server>, over: Duration) {
        let (sessions, stop) = (self.sessions().clone(), self.stop_background.clone());
        let ticks = (over.as_millis() / TICK.as_millis()).max(1);
        let empty = async move {
            let is_it = |other: &Server| other.backend == server.backend && other.name == server.name;
            let (_, all) = sessions.end_some(0, Why::Drained, is_it);
            for tick in 1..=ticks {
                if server.mode() == Mode::Up {
                    tracing::info!(server = %server.name, "its sessions are left alone again");
                    return;
                }
                let (_, left) = sessions.end_some(0, Why::Drained, is_it);
                let may_be_left = usize::try_from(all as u128 * (ticks - tick) / ticks).unwrap_or(0);
                sessions.end_some(left.saturating_sub(may_be_left), Why::Drained, is_it);
                if tick < ticks {
                    time::sleep(TICK).await;
                }
            }
            tracing::info!(server = %server.name, "its sessions were told to end");
        };
        self.background.spawn(async move { stop.run_until_cancelled(empty).await });
    }

    /// Keeps new logins of a user waiting, ends the sessions, and waits until they are gone. Says how many there were.
    ///
    /// # Errors
    /// That is no user name, or a session does not end.
    pub async fn hold(&self, user: &str) -> anyhow::Result<(UserHold, usize)> {
        let sessions = self.sessions();
        // Under the name that is known at once: the routes may take a while to answer.
        let name = question(&self.live(), user)?.user;
        let mut holds = vec![sessions.hold(name.clone())];
        let mut ended = sessions.end_user(&name, Why::Moved);
        let names = self.names(user).await?;
        holds.extend(names.iter().map(|name| sessions.hold(name.clone())));
        ended += names.iter().map(|name| sessions.end_user(name, Why::Moved)).sum::<usize>();
        let gone = self.sessions().changed(|sessions| {
            names.iter().all(|name| {
                // Who came in just before the hold is told too.
                sessions.end_user(name, Why::Moved);
                sessions.of_user(name).is_empty()
            })
        });
        timeout(GONE, gone).await.context("sessions do not end; new logins are let in again")?;
        Ok((UserHold(holds), ended))
    }

    /// Holds, routes afresh, and lets the user in again: from then on the new place holds, and no session is at the old one.
    ///
    /// # Errors
    /// No such backend or user name, or the routes do not say that the user belongs to `backend`: the sessions are ended all
    /// the same.
    pub async fn move_user(&self, user: &str, backend: &str) -> anyhow::Result<UserMoved> {
        if self.live().backends.named(backend).is_none() {
            bail!("no backend is declared as {backend:?}");
        }
        let (hold, ended) = self.hold(user).await?;
        let live = self.live();
        let question = question(&live, user)?;
        live.router.forget(&question.user);
        let found = timeout(live.limits.lookup, live.router.route(&question, &live.metrics)).await;
        drop(hold);
        let target = match found.context("the routes do not answer in time")? {
            Ok(routed) => routed.target,
            Err(RouteError::Unknown) => bail!("no route knows the user"),
            Err(error) => bail!("{error}"),
        };
        let Target::Place(place) = &*target else { bail!("the routes turn the user away") };
        let now = live.backends.backend(place.backend).name.to_string();
        if now != backend {
            bail!("the routes say {now}, not {backend}: change them first; {ended} sessions were ended");
        }
        Ok(UserMoved { ended, backend: now })
    }

    /// Names under which a user's sessions may be known: as routed, and as the mailbox is called where routes say otherwise.
    async fn names(&self, user: &str) -> anyhow::Result<Vec<Arc<str>>> {
        let live = self.live();
        let question = question(&live, user)?;
        let mut names = vec![question.user.clone()];
        let found = timeout(live.limits.lookup, live.router.route(&question, &live.metrics)).await;
        if let Ok(Ok(routed)) = found
            && let Target::Place(place) = &*routed.target
        {
            let mailbox = place.mailbox(&question.user);
            if mailbox != question.user {
                names.push(mailbox);
            }
        }
        Ok(names)
    }
}

fn question(live: &Live, user: &str) -> anyhow::Result<Question> {
    let name = UserName::new(user.as_bytes())?;
    let names = live.config.naming.names(&name).map_err(|refused| anyhow::anyhow!("{refused}"))?;
    Ok(Question { user: names.routing, visitor: None })
}
