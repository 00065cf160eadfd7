//! What the operator's commands ask of the running process: a Unix socket that only its own user (and root) may open.
//!
//! One HTTP request a command, JSON both ways ([`Command`], [`Answer`]); `client` is the other end. Who may open the socket may
//! do everything here, so it is readable by its owner alone, and made so before it has its name (`place`). This module understands
//! commands; what they do is `commands` and `server`'s. Each process also answers at a socket of its own, where its successor
//! forwards commands to it (`predecessors`). A process takes another's place by the same socket: `hand_over` and `succession` on
//! one side, `predecessor` on the other, `upgrade` to start the other. Called by `main`.

pub(crate) mod client;
mod commands;
mod hand_over;
mod hold;
mod lines;
mod link;
pub(crate) mod place;
pub(crate) mod predecessor;
mod predecessors;
mod report;
mod succession;
pub(crate) mod upgrade;

use std::convert::Infallible;
use std::fmt;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::header::{CONNECTION, HeaderValue, UPGRADE};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::upgrade::OnUpgrade;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Notify, Semaphore, mpsc};
use tokio::time::{MissedTickBehavior, interval, timeout};
use tokio_util::task::TaskTracker;

use self::client::Scope;
use self::commands::{Caller, ServerCommand};
pub(crate) use self::hand_over::Retire;
use self::hold::Held;
use self::lines::Lines;
use self::place::{Occupant, PendingSocket, PublishedName, PublishedSocket};
pub(crate) use self::succession::Succession;
use crate::admin_state::AdminState;
use crate::server::Running;

/// Maximum number of open connections. Each user who is moved keeps one open: see [`succession::MAX_HELD`].
const MAX_CONNECTIONS: usize = 1024;
/// Maximum number of commands that are carried out at a time; others wait.
const MAX_COMMANDS: usize = 64;
/// A command is a few words.
const MAX_COMMAND: usize = 64 * 1024;
/// Timeout of a request's head, and of its body.
const HEAD_DEADLINE: Duration = Duration::from_secs(10);
/// How often the control socket's name is checked. Anyone who may write to its folder can remove it.
const NAME_CHECK: Duration = Duration::from_secs(5);

/// What can be asked for.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) enum Command {
    /// Load the configuration again.
    Reload,
    /// How things are.
    Status,
    /// Who is logged in.
    Sessions {
        /// Only this user's sessions.
        user: Option<String>,
    },
    /// End a user's sessions.
    Kick {
        /// Whose.
        user: String,
    },
    /// Set a server's administrative state.
    Server {
        /// As configured, in every backend that has it; or `BACKEND/SERVER`.
        name: String,
        /// The new state; `None` returns to the configured one.
        state: Option<AdminState>,
        /// End its sessions too, spread over so many seconds.
        over: Option<f64>,
        /// The operator's reason.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        reason: Option<String>,
        /// The user who became the one at the other end of the connection by sudo(8), as that end says.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        sudo_user: Option<String>,
    },
    /// End a user's sessions, route afresh, and let the user in again.
    Move {
        /// Whom.
        user: String,
        /// Where the routes must say the user belongs now.
        backend: String,
        /// Seconds to wait until they do. Default 10.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        wait: Option<f64>,
    },
    /// End a user's sessions and keep new logins waiting as long as the answer is being read.
    Hold {
        /// Whose.
        user: String,
    },
    /// Hand the listening sockets to a successor, on the connection of this request, and retire when it serves. See `link`.
    HandOver {
        /// Process id of the successor, used if the system does not tell.
        pid: u32,
    },
    /// Start a successor from the installed program, and answer when it serves or has failed.
    Upgrade {
        /// Seconds after which a successor that does not serve is ended.
        timeout: f64,
    },
}

/// The command and its arguments, as the log shows them.
impl fmt::Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Reload => f.write_str("reload"),
            Self::Status => f.write_str("status"),
            Self::Sessions { user: None } => f.write_str("sessions"),
            Self::Sessions { user: Some(user) } => write!(f, "sessions {user}"),
            Self::Kick { user } => write!(f, "kick {user}"),
            Self::Server { name, state, over, reason, sudo_user } => {
                write!(f, "server {name} {}", state.map_or("reset", AdminState::as_str))?;
                over.map_or(Ok(()), |seconds| write!(f, " over {seconds} s"))?;
                reason.as_ref().map_or(Ok(()), |reason| write!(f, ", reason: {reason}"))?;
                sudo_user.as_ref().map_or(Ok(()), |user| write!(f, ", sudo user: {user}"))
            }
            Self::Move { user, backend, wait: None } => write!(f, "move {user} to {backend}"),
            Self::Move { user, backend, wait: Some(wait) } => write!(f, "move {user} to {backend} within {wait} s"),
            Self::Hold { user } => write!(f, "hold {user}"),
            Self::HandOver { pid } => write!(f, "hand over to process {pid}"),
            Self::Upgrade { timeout } => write!(f, "upgrade within {timeout} s"),
        }
    }
}

/// A line before the answer to a command that takes long.
#[derive(Debug, Serialize, Deserialize)]
struct Progress {
    progress: String,
}

/// What comes back.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Answer {
    /// Whether it was done.
    pub ok: bool,
    /// For people; several lines, maybe.
    pub text: String,
    /// For programs.
    #[serde(default)]
    pub data: Value,
    /// What operators should know beside, a line each.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
}

impl Answer {
    fn done(text: impl Into<String>) -> Self {
        Self { ok: true, text: text.into(), data: Value::Null, notes: Vec::new() }
    }

    fn failed(text: impl Into<String>) -> Self {
        Self { ok: false, text: text.into(), data: Value::Null, notes: Vec::new() }
    }
}

/// The control socket under its name.
#[derive(Debug)]
pub(crate) struct Control {
    socket: UnixListener,
    name: PublishedName,
    connections: TaskTracker,
    /// Whether it is logged already that the name cannot be restored.
    is_reported: bool,
}

impl Control {
    /// Takes the published socket over. Called on a runtime.
    ///
    /// # Errors
    /// The system has no room to register it.
    pub(crate) fn new(published: PublishedSocket) -> io::Result<Self> {
        let PublishedSocket { socket, name } = published;
        let socket = UnixListener::from_std(socket)?;
        Ok(Self { socket, name, connections: TaskTracker::new(), is_reported: false })
    }

    /// The connections that are open: a process that ends lets them finish first.
    pub(crate) fn connections(&self) -> TaskTracker {
        self.connections.clone()
    }

    /// Answers commands for ever. A successor that serves is reported to `retire`.
    pub(crate) async fn run(
        mut self,
        running: Arc<Running>,
        file: PathBuf,
        succession: Succession,
        retire: mpsc::Sender<Retire>,
    ) {
        let permits = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        let desk = Arc::new(Context {
            running,
            file,
            path: self.name.path().to_owned(),
            succession,
            retire,
            name_lost: Notify::new(),
            connections: self.connections.clone(),
            trusted: vec![0, rustix::process::geteuid().as_raw()],
            commands: Semaphore::new(MAX_COMMANDS),
        });
        let mut check = interval(NAME_CHECK);
        check.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let accept = async {
                // The semaphore is never closed.
                let permit = permits.clone().acquire_owned().await.ok();
                (self.socket.accept().await, permit)
            };
            let (accepted, permit) = tokio::select! {
                accepted = accept => accepted,
                () = desk.name_lost.notified() => {
                    self.restore_name(&desk);
                    continue;
                }
                _ = check.tick() => {
                    self.restore_name(&desk);
                    continue;
                }
            };
            match accepted {
                Ok((socket, _)) => {
                    let desk = desk.clone();
                    self.connections.spawn(async move {
                        serve(socket, desk).await;
                        drop(permit);
                    });
                }
                Err(error) => {
                    tracing::error!(%error, "a command could not be accepted");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }

    /// Binds again if the name is gone, or leads to a process that is: to a successor that failed late, for example.
    fn restore_name(&mut self, desk: &Context) {
        if !desk.succession.keeps_name() || self.name.is_ours() {
            self.is_reported = false;
            return;
        }
        let path = self.name.path().to_owned();
        let restored = match place::occupant(&path, &desk.trusted) {
            Ok(Occupant::Process) => Err("another process listens there".to_owned()),
            Ok(Occupant::Nothing | Occupant::Stale) => {
                self.bind_again(&path, &desk.trusted).map_err(|error| format!("{error:#}"))
            }
            Err(error) => Err(format!("{:#}", anyhow::Error::from(error))),
        };
        match restored {
            Ok(()) => tracing::info!(path = %path.display(), "the control socket was lost, and is restored"),
            Err(error) if !self.is_reported => {
                tracing::error!(path = %path.display(), %error, "the control socket was lost; commands do not reach this process");
                self.is_reported = true;
            }
            Err(_) => {}
        }
    }

    fn bind_again(&mut self, path: &std::path::Path, trusted: &[u32]) -> anyhow::Result<()> {
        let PublishedSocket { socket, name } = PendingSocket::bind(path, None)?.publish(false, trusted)?;
        (self.socket, self.name) = (UnixListener::from_std(socket)?, name);
        Ok(())
    }
}

struct Context {
    running: Arc<Running>,
    file: PathBuf,
    /// The control socket's path, which a successor takes.
    path: PathBuf,
    succession: Succession,
    retire: mpsc::Sender<Retire>,
    /// Notified when a successor has failed that may have taken the control socket's name.
    name_lost: Notify,
    connections: TaskTracker,
    /// Users whose processes may give commands and take over.
    trusted: Vec<u32>,
    /// One permit for each command that may be carried out at a time.
    commands: Semaphore,
}

type Body = UnsyncBoxBody<Bytes, Infallible>;

async fn serve(socket: UnixStream, desk: Arc<Context>) {
    let Some(peer) = trusted_peer(&socket, &desk.trusted) else { return };
    let service = service_fn(move |request: Request<Incoming>| {
        let (desk, peer) = (desk.clone(), peer.clone());
        async move { Ok::<_, Infallible>(answer(request, peer, desk).await) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_DEADLINE)
        .serve_connection(TokioIo::new(socket), service)
        .with_upgrades();
    if let Err(error) = connection.await {
        tracing::debug!(%error, "a command's connection failed");
    }
}

/// The other end of a connection.
#[derive(Debug, Clone)]
struct Peer {
    /// Its process id, if the system tells.
    pid: Option<u32>,
    /// Its user, for the record of who set a server's state.
    user: String,
}

fn trusted_peer(socket: &UnixStream, trusted: &[u32]) -> Option<Peer> {
    let peer = match socket.peer_cred() {
        Ok(peer) if trusted.contains(&peer.uid()) => peer,
        Ok(peer) => {
            tracing::warn!(uid = peer.uid(), "another user's command was refused");
            return None;
        }
        Err(error) => {
            tracing::warn!(%error, "a command's user is unknown: refused");
            return None;
        }
    };
    let pid = peer.pid().and_then(|pid| u32::try_from(pid).ok()).filter(|pid| *pid != 0);
    Some(Peer { pid, user: user_of(peer.uid()) })
}

fn user_of(uid: u32) -> String {
    let user = nix::unistd::User::from_uid(nix::unistd::Uid::from_raw(uid)).ok().flatten();
    user.map_or_else(|| format!("uid {uid}"), |user| user.name)
}

async fn answer(mut request: Request<Incoming>, peer: Peer, desk: Arc<Context>) -> Response<Body> {
    if request.method() != Method::POST {
        return whole(&Answer::failed("only POST"));
    }
    let scope = if request.uri().path() == Scope::Process.path() { Scope::Process } else { Scope::All };
    let is_hand_over = request.headers().get(UPGRADE).is_some_and(|token| token == link::PROTOCOL);
    let upgrade = hyper::upgrade::on(&mut request);
    let body = Limited::new(request.into_body(), MAX_COMMAND).collect();
    let command = match timeout(HEAD_DEADLINE, body).await {
        Ok(Ok(body)) => serde_json::from_slice(&body.to_bytes()),
        Ok(Err(error)) => return whole(&Answer::failed(error.to_string())),
        Err(_) => return whole(&Answer::failed("the command did not come in time")),
    };
    let caller = Caller { scope, user: peer.user };
    match command {
        Ok(Command::HandOver { .. }) if !is_hand_over => {
            whole(&Answer::failed(format!("a hand-over takes the upgrade to {}", link::PROTOCOL)))
        }
        Ok(Command::HandOver { pid }) => grant(peer.pid.unwrap_or(pid), upgrade, desk).await,
        Ok(Command::Upgrade { timeout }) => match Duration::try_from_secs_f64(timeout) {
            Ok(timeout) => {
                tracing::info!(user = caller.user, "an upgrade was asked for");
                Response::new(Lines(upgrade::begin(desk, timeout)).boxed_unsync())
            }
            Err(error) => whole(&Answer::failed(format!("invalid timeout: {error}"))),
        },
        Ok(command) => carry_out(command, &desk, &caller).await,
        Err(error) => whole(&Answer::failed(format!("invalid command: {error}"))),
    }
}

/// Carries out a command that is answered in one line.
async fn carry_out(command: Command, desk: &Context, caller: &Caller) -> Response<Body> {
    // Given back with the answer: a hold lasts longer, and the command that ends it must get through. Never closed.
    let _permit = desk.commands.acquire().await;
    if let Some(refusal) = desk.refusal(&command, caller) {
        return whole(&refusal);
    }
    tracing::info!(command = command.to_string(), user = caller.user, "command received");
    let Command::Hold { user } = command else { return whole(&obey(command, desk, caller).await) };
    match desk.hold(caller, &user).await {
        Ok((hold, ended)) => {
            let text = format!("{user}: {ended} sessions ended, new logins wait");
            let answer = Answer { data: json!({"ended": ended}), ..Answer::done(text) };
            Response::new(Held::new(encoded(&answer), hold).boxed_unsync())
        }
        Err(error) => whole(&Answer::failed(format!("{error:#}"))),
    }
}

/// Answers a successor that asks for a hand-over.
async fn grant(successor: u32, upgrade: OnUpgrade, desk: Arc<Context>) -> Response<Body> {
    // The one that this process has started may be faster than the news of its process id.
    let _ = timeout(upgrade::LAUNCH_DEADLINE, desk.succession.settled()).await;
    match desk.succession.grant(successor) {
        Ok(lease) => {
            let connections = desk.connections.clone();
            connections.spawn(hand_over::serve(upgrade, lease, desk));
            switching()
        }
        Err(refusal) => {
            tracing::info!(successor, %refusal, "a hand-over was refused");
            whole(&Answer::failed(refusal.to_string()))
        }
    }
}

fn switching() -> Response<Body> {
    let mut response = Response::new(Full::default().boxed_unsync());
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    response.headers_mut().insert(CONNECTION, HeaderValue::from_static("upgrade"));
    response.headers_mut().insert(UPGRADE, HeaderValue::from_static(link::PROTOCOL));
    response
}

fn whole(answer: &Answer) -> Response<Body> {
    Response::new(Full::new(encoded(answer)).boxed_unsync())
}

/// One line.
fn encoded(answer: &impl Serialize) -> Bytes {
    // Strings and JSON values can always be written.
    let mut line = serde_json::to_vec(answer).unwrap_or_default();
    line.push(b'\n');
    line.into()
}

async fn obey(command: Command, desk: &Context, caller: &Caller) -> Answer {
    let answer = match command {
        Command::Reload => Ok(reload(desk).await),
        Command::Status => Ok(desk.status(caller).await),
        Command::Sessions { user } => desk.sessions(caller, user).await,
        Command::Kick { user } => desk.kick(caller, user).await,
        Command::Server { name, state, over, reason, sudo_user } => {
            desk.set_server(caller, ServerCommand { name, state, over, reason, sudo_user }).await
        }
        Command::Move { user, backend, wait } => desk.move_user(caller, &user, &backend, wait).await,
        Command::Hold { .. } | Command::HandOver { .. } | Command::Upgrade { .. } => {
            Ok(Answer::failed("the command is not answered in one line"))
        }
    };
    answer.unwrap_or_else(|error| Answer::failed(format!("{error:#}")))
}

async fn reload(desk: &Context) -> Answer {
    if let Some(refusal) = desk.succession.reload_refusal() {
        return Answer::failed(refusal);
    }
    match desk.running.reload(&desk.file).await {
        Ok(reloaded) => {
            let notes = reloaded.unchanged.iter().map(|key| format!("\n{key} has changed, which takes a restart"));
            Answer::done(format!("{} loaded{}", desk.file.display(), notes.collect::<String>()))
        }
        Err(error) => Answer::failed(format!("{error:#}").trim_end().to_owned()),
    }
}
