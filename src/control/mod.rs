//! What the operator's commands ask of the running process: a Unix socket that only its own user (and root) may open.
//!
//! One HTTP request a command, JSON both ways ([`Command`], [`Answer`]); `client` is the other end. Who may open the socket may
//! do everything here, so it is readable by its owner alone, and made so before it has its name. This room understands
//! commands; what they do is `server`'s. Called by `main`. Each process also answers at a socket of its own, where its successor
//! forwards commands to it (`predecessors`).

pub mod client;
mod commands;
mod exclusion;
mod hold;
mod predecessors;
mod report;

use std::convert::Infallible;
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use http_body_util::{BodyExt as _, Either, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, mpsc};

use self::client::Scope;
use self::commands::{Caller, ServerCommand};
use self::exclusion::Exclusion;
use self::hold::Held;
use crate::inherit;
use crate::server::Running;

/// Maximum number of open connections. Each user who is moved keeps one open: see [`exclusion::MAX_HELD`].
const MAX_CONNECTIONS: usize = 1024;
/// Maximum number of commands that are carried out at a time; others wait.
const MAX_COMMANDS: usize = 64;
/// A command is a few words.
const MAX_COMMAND: usize = 64 * 1024;
/// For a request's head.
const HEAD_DEADLINE: Duration = Duration::from_secs(10);

/// What can be asked for.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Command {
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
    /// Set a server's mode.
    Server {
        /// As configured, in every backend that has it; or `BACKEND/SERVER`.
        name: String,
        /// `up`, `drain`, `down`; `None`: as configured.
        mode: Option<String>,
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
    /// Send the listening sockets to a successor, which waits at this path.
    HandOver {
        /// Beside our own socket.
        path: PathBuf,
    },
    /// Send the administrative states of servers to a successor.
    States,
    /// The successor serves: stop accepting, let sessions end by themselves within the grace time, and go.
    Retire {
        /// Of the successor.
        pid: u32,
    },
    /// Start a successor, the program as it lies on the disk now, which will ask for the above.
    Upgrade,
}

/// What comes back.
#[derive(Debug, Serialize, Deserialize)]
pub struct Answer {
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

/// What only `main` can do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wish {
    /// Stop gently: a successor with this process id serves.
    Retire(u32),
    /// Start a successor.
    Upgrade,
}

/// The bound socket.
#[derive(Debug)]
pub struct Control {
    socket: UnixListener,
    path: PathBuf,
    /// The socket's own name, which no successor takes: see `predecessors`.
    own: PathBuf,
}

impl Drop for Control {
    fn drop(&mut self) {
        // Whatever the result: a name without a process is removed by whoever finds it.
        let _ = fs::remove_file(&self.own);
    }
}

impl Control {
    /// Binds beside `path` and takes its place, also another process's.
    ///
    /// # Errors
    /// What the system says.
    pub fn bind(path: &Path) -> io::Result<Self> {
        let own = beside(path, std::process::id());
        let _ = fs::remove_file(&own);
        let socket = UnixListener::bind(&own)?;
        fs::set_permissions(&own, fs::Permissions::from_mode(0o600))?;
        let mut second = own.clone().into_os_string();
        second.push(".new");
        let _ = fs::remove_file(&second);
        fs::hard_link(&own, &second)?;
        fs::rename(&second, path)?;
        Ok(Self { socket, path: path.to_owned(), own })
    }

    /// Answers commands for ever; what only `main` can do goes to `wishes`.
    pub async fn run(self, running: Arc<Running>, file: PathBuf, wishes: mpsc::Sender<Wish>) {
        let permits = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        let path = self.path.clone();
        let (commands, exclusion) = (Semaphore::new(MAX_COMMANDS), Exclusion::default());
        let desk = Arc::new(Desk { running, file, path, wishes, commands, exclusion });
        loop {
            // The semaphore is never closed.
            let Ok(permit) = permits.clone().acquire_owned().await else { return };
            match self.socket.accept().await {
                Ok((socket, _)) => {
                    let desk = desk.clone();
                    tokio::spawn(async move {
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
}

/// A name of this process's own in the folder of `path`.
pub(crate) fn beside(path: &Path, pid: u32) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{pid}"));
    name.into()
}

struct Desk {
    running: Arc<Running>,
    file: PathBuf,
    path: PathBuf,
    wishes: mpsc::Sender<Wish>,
    commands: Semaphore,
    exclusion: Exclusion,
}

type Body = Either<Full<Bytes>, Held>;

async fn serve(socket: UnixStream, desk: Arc<Desk>) {
    let user = user_of(&socket);
    let service = service_fn(move |request: Request<Incoming>| {
        let (desk, user) = (desk.clone(), user.clone());
        async move { Ok::<_, Infallible>(Response::new(answer(request, &desk, user).await)) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_DEADLINE)
        .serve_connection(TokioIo::new(socket), service);
    if let Err(error) = connection.await {
        tracing::debug!(%error, "a command's connection failed");
    }
}

/// The user at the other end, for the record of who set a server's state.
fn user_of(socket: &UnixStream) -> String {
    let Ok(uid) = socket.peer_cred().map(|peer| peer.uid()) else { return "unknown".to_owned() };
    let user = nix::unistd::User::from_uid(nix::unistd::Uid::from_raw(uid)).ok().flatten();
    user.map_or_else(|| format!("uid {uid}"), |user| user.name)
}

async fn answer(request: Request<Incoming>, desk: &Desk, user: String) -> Body {
    if request.method() != Method::POST {
        return whole(&Answer::failed("only POST"));
    }
    let scope = if request.uri().path() == Scope::Process.path() { Scope::Process } else { Scope::All };
    let caller = Caller { scope, user };
    let command = match Limited::new(request.into_body(), MAX_COMMAND).collect().await {
        Ok(body) => serde_json::from_slice(&body.to_bytes()),
        Err(error) => return whole(&Answer::failed(error.to_string())),
    };
    let command: Command = match command {
        Ok(command) => command,
        Err(error) => return whole(&Answer::failed(format!("invalid command: {error}"))),
    };
    // Given back with the answer: a hold lasts longer, and the command that ends it must get through. Never closed.
    let _permit = desk.commands.acquire().await;
    if let Some(refusal) = desk.refusal(&command, &caller) {
        return whole(&refusal);
    }
    if let Command::Hold { user } = &command {
        return match desk.hold(&caller, user).await {
            Ok((hold, ended)) => {
                let text = format!("{user}: {ended} sessions ended, new logins wait");
                let answer = Answer { data: json!({"ended": ended}), ..Answer::done(text) };
                Either::Right(Held::new(encoded(&answer), hold))
            }
            Err(error) => whole(&Answer::failed(format!("{error:#}"))),
        };
    }
    tracing::info!(?command, user = caller.user, "command received");
    whole(&obey(command, desk, &caller).await)
}

fn whole(answer: &Answer) -> Body {
    Either::Left(Full::new(encoded(answer)))
}

/// One line.
fn encoded(answer: &Answer) -> Bytes {
    // Strings and JSON values can always be written.
    let mut line = serde_json::to_vec(answer).unwrap_or_default();
    line.push(b'\n');
    line.into()
}

async fn obey(command: Command, desk: &Desk, caller: &Caller) -> Answer {
    let running = &desk.running;
    let answer = match command {
        Command::Reload => match running.reload(&desk.file).await {
            Ok(reloaded) => {
                let notes = reloaded.unchanged.iter().map(|key| format!("\n{key} has changed, which takes a restart"));
                Ok(Answer::done(format!("{} loaded{}", desk.file.display(), notes.collect::<String>())))
            }
            Err(error) => Ok(Answer::failed(format!("{error:#}").trim_end().to_owned())),
        },
        Command::Status => Ok(desk.status(caller).await),
        Command::Sessions { user } => desk.sessions(caller, user).await,
        Command::Kick { user } => desk.kick(caller, user).await,
        Command::Server { name, mode, over, reason, sudo_user } => {
            desk.set_server(caller, ServerCommand { name, mode, over, reason, sudo_user }).await
        }
        Command::Move { user, backend, wait } => desk.move_user(caller, &user, &backend, wait).await,
        Command::Hold { .. } => Ok(Answer::failed("hold is answered while it lasts")),
        Command::HandOver { path } => match desk.exclusion.hand_over(Instant::now()) {
            Ok(()) => Ok(hand_over(running, &desk.path, &path).await),
            Err(excluded) => Ok(Answer::failed(excluded.to_string())),
        },
        Command::States => Ok(Answer { data: json!(running.states()), ..Answer::done("") }),
        Command::Retire { pid } => {
            // From the answer on the successor decides, so nothing that comes later may be decided here.
            running.set_retired();
            let answer = wish(desk, Wish::Retire(pid), "retiring").await;
            Ok(Answer { data: json!(running.states()), ..answer })
        }
        Command::Upgrade => Ok(wish(desk, Wish::Upgrade, "a successor is being started; see its log").await),
    };
    answer.unwrap_or_else(|error| Answer::failed(format!("{error:#}")))
}

async fn wish(desk: &Desk, wish: Wish, text: &str) -> Answer {
    match desk.wishes.send(wish).await {
        Ok(()) => Answer::done(text),
        Err(_) => Answer::failed("the process is stopping already"),
    }
}

async fn hand_over(running: &Running, own: &Path, to: &Path) -> Answer {
    // Anywhere else somebody else could be waiting.
    if to.parent() != own.parent() {
        return Answer::failed("a successor waits beside our own socket");
    }
    let sockets = match running.sockets() {
        Ok(sockets) => sockets,
        Err(error) => return Answer::failed(format!("sockets cannot be copied: {error}")),
    };
    let (count, to) = (sockets.len(), to.to_owned());
    let sent = tokio::task::spawn_blocking(move || {
        let stream = std::os::unix::net::UnixStream::connect(to)?;
        stream.set_write_timeout(Some(HEAD_DEADLINE))?;
        inherit::send(&stream, &sockets)
    });
    match sent.await {
        Ok(Ok(())) => Answer::done(format!("{count} listening sockets handed over")),
        Ok(Err(error)) => Answer::failed(format!("the successor could not be reached: {error}")),
        Err(error) => Answer::failed(error.to_string()),
    }
}
