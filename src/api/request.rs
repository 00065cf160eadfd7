//! One connection to the control socket: checks the client's user, reads the request, and writes the response.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::header::{CONNECTION, HeaderValue, UPGRADE};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::upgrade::OnUpgrade;
use hyper::{Method, Request, Response as HttpResponse, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde_json::json;
use tokio::net::UnixStream;
use tokio::time::timeout;

use super::body::{HoldBody, LinesBody};
use super::commands::{Caller, ServerCommand};
use super::context::ControlContext;
use super::message::{Command, Response, Scope, encode};
use super::succession::{connection, hand_over, launch};

/// Maximum size of a command.
const MAX_COMMAND: usize = 64 * 1024;
/// Timeout of the head of a request, and of its body.
const REQUEST_DEADLINE: Duration = Duration::from_secs(10);

type Body = UnsyncBoxBody<Bytes, Infallible>;

/// Serves one connection.
pub(super) async fn serve(socket: UnixStream, context: Arc<ControlContext>) {
    let Some(peer) = trusted_peer(&socket, &context.trusted) else { return };
    let service = service_fn(move |request: Request<Incoming>| {
        let (context, peer) = (context.clone(), peer.clone());
        async move { Ok::<_, Infallible>(handle(request, peer, context).await) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(REQUEST_DEADLINE)
        .serve_connection(TokioIo::new(socket), service)
        .with_upgrades();
    if let Err(error) = connection.await {
        tracing::debug!(%error, "a connection to the control socket failed");
    }
}

/// The process at the other end of a connection.
#[derive(Debug, Clone)]
struct Peer {
    /// Process id, if the system reports it.
    pid: Option<u32>,
    /// Name of its user.
    user: String,
}

fn trusted_peer(socket: &UnixStream, trusted: &[u32]) -> Option<Peer> {
    let peer = match socket.peer_cred() {
        Ok(peer) if trusted.contains(&peer.uid()) => peer,
        Ok(peer) => {
            tracing::warn!(uid = peer.uid(), "control connection refused: the client runs as another user");
            return None;
        }
        Err(error) => {
            tracing::warn!(%error, "control connection refused: the client's user is unknown");
            return None;
        }
    };
    let pid = peer.pid().and_then(|pid| u32::try_from(pid).ok()).filter(|pid| *pid != 0);
    Some(Peer { pid, user: user_name(peer.uid()) })
}

fn user_name(uid: u32) -> String {
    let user = nix::unistd::User::from_uid(nix::unistd::Uid::from_raw(uid)).ok().flatten();
    user.map_or_else(|| format!("uid {uid}"), |user| user.name)
}

async fn handle(mut request: Request<Incoming>, peer: Peer, context: Arc<ControlContext>) -> HttpResponse<Body> {
    if request.method() != Method::POST {
        return failure("only POST is supported");
    }
    let scope = Scope::of_path(request.uri().path());
    let is_upgrade = request.headers().get(UPGRADE).is_some_and(|token| token == connection::PROTOCOL);
    let upgrade = hyper::upgrade::on(&mut request);
    let body = Limited::new(request.into_body(), MAX_COMMAND).collect();
    let command = match timeout(REQUEST_DEADLINE, body).await {
        Ok(Ok(body)) => serde_json::from_slice(&body.to_bytes()),
        Ok(Err(error)) => return failure(error.to_string()),
        Err(_) => return failure("timeout while reading the command"),
    };
    let command = match command {
        Ok(command) => command,
        Err(error) => return failure(format!("invalid command: {error}")),
    };
    let requester = Requester { pid: peer.pid, upgrade: is_upgrade.then_some(upgrade) };
    run(command, requester, &Caller { scope, user: peer.user }, context).await
}

/// What a handover needs of its request.
struct Requester {
    pid: Option<u32>,
    /// The connection after the HTTP upgrade, if the request asks for it.
    upgrade: Option<OnUpgrade>,
}

async fn run(
    command: Command,
    requester: Requester,
    caller: &Caller,
    context: Arc<ControlContext>,
) -> HttpResponse<Body> {
    // Released with the response: a hold lasts longer, and the command that ends it must not wait for a permit. An upgrade
    // does not wait for slow commands either. The semaphore is never closed.
    let _permit = match command {
        Command::HandOver { .. } | Command::Upgrade { .. } => None,
        _ => context.command_permits.acquire().await.ok(),
    };
    if let Some(refusal) = context.refusal(&command, caller) {
        return whole(&refusal);
    }
    tracing::info!(%command, user = caller.user, "command received");
    let response = match command {
        Command::HandOver { pid } => {
            let Some(upgrade) = requester.upgrade else {
                return failure(format!("a handover requires the HTTP upgrade to {}", connection::PROTOCOL));
            };
            return start_hand_over(requester.pid.unwrap_or(pid), upgrade, context.clone()).await;
        }
        Command::Upgrade { timeout } => return start_upgrade(timeout, context.clone()),
        Command::Hold { user } => return hold(&context, caller, &user).await,
        Command::Reload => Ok(reload(&context).await),
        Command::Status => Ok(context.status(caller).await),
        Command::Sessions { user } => context.sessions(caller, user).await,
        Command::Kick { user } => context.kick(caller, user).await,
        Command::Server { name, state, over, reason, sudo_user } => {
            context.set_server(caller, ServerCommand { name, state, over, reason, sudo_user }).await
        }
        Command::Move { user, backend, wait } => context.move_user(caller, &user, &backend, wait).await,
    };
    match response {
        Ok(response) => whole(&response),
        Err(error) => failure(format!("{error:#}")),
    }
}

/// Grants the listening sockets to a successor, if no other process is taking over.
async fn start_hand_over(successor: u32, upgrade: OnUpgrade, context: Arc<ControlContext>) -> HttpResponse<Body> {
    // A successor that this process has started may connect before the launcher has reported its process id.
    let _ = timeout(launch::LAUNCH_DEADLINE, context.succession.launched()).await;
    match context.succession.grant(successor) {
        Ok(grant) => {
            let connections = context.connections.clone();
            connections.spawn(hand_over::serve(upgrade, grant, context));
            switching_protocols()
        }
        Err(refusal) => {
            tracing::info!(successor, %refusal, "handover refused");
            failure(refusal.to_string())
        }
    }
}

fn start_upgrade(timeout: f64, context: Arc<ControlContext>) -> HttpResponse<Body> {
    match Duration::try_from_secs_f64(timeout) {
        Ok(timeout) => HttpResponse::new(LinesBody(launch::begin(context, timeout)).boxed_unsync()),
        Err(error) => failure(format!("invalid timeout: {error}")),
    }
}

async fn hold(context: &ControlContext, caller: &Caller, user: &str) -> HttpResponse<Body> {
    match context.hold(caller, user).await {
        Ok((hold, ended)) => {
            let text = format!("{user}: {ended} sessions ended, new logins wait");
            let response = Response { data: json!({"ended": ended}), ..Response::success(text) };
            HttpResponse::new(HoldBody::new(encode(&response), hold).boxed_unsync())
        }
        Err(error) => failure(format!("{error:#}")),
    }
}

async fn reload(context: &ControlContext) -> Response {
    if let Some(refusal) = context.succession.reload_refusal() {
        return Response::failure(refusal);
    }
    match context.running.reload(&context.file).await {
        Ok(reloaded) => {
            let notes =
                reloaded.unchanged.iter().map(|key| format!("\n{key} has changed: it takes effect after a restart"));
            Response::success(format!("{} loaded{}", context.file.display(), notes.collect::<String>()))
        }
        Err(error) => Response::failure(format!("{error:#}").trim_end().to_owned()),
    }
}

fn switching_protocols() -> HttpResponse<Body> {
    let mut response = HttpResponse::new(Full::default().boxed_unsync());
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    response.headers_mut().insert(CONNECTION, HeaderValue::from_static("upgrade"));
    response.headers_mut().insert(UPGRADE, HeaderValue::from_static(connection::PROTOCOL));
    response
}

fn failure(text: impl Into<String>) -> HttpResponse<Body> {
    whole(&Response::failure(text))
}

fn whole(response: &Response) -> HttpResponse<Body> {
    HttpResponse::new(Full::new(encode(response)).boxed_unsync())
}
