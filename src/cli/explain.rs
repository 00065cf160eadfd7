//! The command `route`: shows the routes' decision for a user with the servers in order of preference, and lists the users whose
//! decision differs between two configurations.
//!
//! It runs the code of a login, but connects to no mailbox server. Of the running process it knows only the state file, so that a
//! server that the running process considers dead is listed as if it were alive.

use std::fmt::Write as _;
use std::sync::Arc;
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::backend::{Backend, ListenerAddresses, Server};
use crate::identity::UserName;
use crate::route::{Destination, LookupOrigin, LookupRequest, LookupResult, RouteDecision, ServerChoice};
use crate::snapshot::Snapshot;

/// The result of [`explain`].
#[derive(Debug)]
pub struct Explanation {
    /// The decisions, one line each.
    pub text: String,
    /// What happens to a login of the user.
    pub outcome: Outcome,
}

/// What happens to a login of a user.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// A server is tried.
    Routed,
    /// The login is refused without a server.
    Refused,
}

/// Explains how a login of `user` is routed.
pub async fn explain(snapshot: &Snapshot, user: &UserName) -> Explanation {
    let mut text = format!("user     {user}\n");
    let outcome = match route(snapshot, user, &mut text).await {
        Some(login) => {
            write_login(snapshot, &login, &mut text).await;
            Outcome::Routed
        }
        None => Outcome::Refused,
    };
    Explanation { text, outcome }
}

/// A user for whom the routes name a backend.
struct RoutedLogin {
    user: Arc<str>,
    /// The name for the login on a server.
    server_user: UserName,
    destination: Destination,
}

/// Writes what each route answers. Returns `None` if the login is refused.
async fn route(snapshot: &Snapshot, user: &UserName, text: &mut String) -> Option<RoutedLogin> {
    let names = match snapshot.config.naming.names(user) {
        Ok(names) => names,
        Err(refused) => {
            line(text, format_args!("refused  {refused}"));
            return None;
        }
    };
    line(text, format_args!("routed as {}", names.routing));
    snapshot.router.start_read_only(&Handle::current());
    let request = LookupRequest { user: names.routing, login_context: None };
    let mut decision = None;
    for step in snapshot.router.explain(&request).await {
        let result = match &step.result {
            LookupResult::Found(found) => {
                decision = Some(found.clone());
                format!("found: {}", describe(snapshot, found))
            }
            LookupResult::Unknown => "does not know the user".to_owned(),
            LookupResult::Failed(reason) => format!("failed: {reason}"),
        };
        let origin = match step.origin {
            LookupOrigin::Memory => String::new(),
            LookupOrigin::Directory => ", queried now".to_owned(),
            LookupOrigin::Cache(age) => format!(", cached {} s ago", age.as_secs()),
            LookupOrigin::Stale(age) => format!(", cached {} s ago and stale: its source is down", age.as_secs()),
        };
        line(text, format_args!("route    {}: {result} ({} µs{origin})", step.route, step.duration.as_micros()));
    }
    match decision.as_deref() {
        Some(RouteDecision::Destination(destination)) => {
            let server_user = destination.user.as_ref().unwrap_or(&names.server).clone();
            Some(RoutedLogin { user: request.user, server_user, destination: destination.clone() })
        }
        Some(_) => {
            text.push_str("backend  none: the route itself answers the login\n");
            None
        }
        None => {
            text.push_str("backend  none: the login is refused\n");
            None
        }
    }
}

/// Writes the backend and its servers.
async fn write_login(snapshot: &Snapshot, login: &RoutedLogin, text: &mut String) {
    let destination = &login.destination;
    line(text, format_args!("login as {}", login.server_user));
    let backend = snapshot.backends.backend(destination.backend);
    line(text, format_args!("backend  {}", backend.name));
    if let Err(error) = snapshot.read_states() {
        line(text, format_args!("states   unknown: {error}"));
    }
    let (tasks, stop) = (TaskTracker::new(), CancellationToken::new());
    let own = ListenerAddresses::new(snapshot.config.listeners.iter().map(|listener| listener.address).collect());
    snapshot.backends.start_discovery(&own, &tasks, &stop);
    let wait = snapshot.config.resolver.timeout * 3;
    let mailbox = destination.mailbox(&login.user);
    let servers = timeout(wait, snapshot.servers(destination, &mailbox)).await.unwrap_or_default();
    match destination.server {
        ServerChoice::Any => {
            line(text, format_args!("balance  {}: {}", backend.balance.as_str(), backend.balance.decided_by()));
        }
        ServerChoice::Server(_) | ServerChoice::Address(_) => {
            text.push_str("balance  none: the route names the server\n");
        }
    }
    write_servers(&servers, wait, text).await;
    write_unavailable_servers(backend, text);
    if servers.is_empty() {
        text.push_str("server   none known: logins get NO [UNAVAILABLE]\n");
    }
    stop.cancel();
}

/// Writes the servers in the order in which a login tries them.
async fn write_servers(servers: &[Arc<Server>], wait: Duration, text: &mut String) {
    for (rank, server) in servers.iter().enumerate() {
        let addresses = timeout(wait, server.addresses()).await.unwrap_or_default();
        let addresses: Vec<String> = addresses.iter().map(ToString::to_string).collect();
        let resolved = if addresses.is_empty() { "no address known".to_owned() } else { addresses.join(", ") };
        let rank = if rank == 0 { "first" } else { "next" };
        let weight = if server.weight() == 1 { String::new() } else { format!(", weight {}", server.weight()) };
        let limit = server.max_sessions().map(|limit| format!(", at most {limit} sessions")).unwrap_or_default();
        line(text, format_args!("server   {rank}: {} ({resolved}){weight}{limit}", server.name));
    }
}

/// Writes the servers whose administrative state excludes logins.
fn write_unavailable_servers(backend: &Backend, text: &mut String) {
    for server in backend.servers().iter().filter(|server| !server.takes_logins()) {
        let (state, set) = (server.admin_state().as_str(), server.state_override());
        let set = set.map(|set| format!(", set by {} at {}", set.by, set.since())).unwrap_or_default();
        line(text, format_args!("server   no logins: {} (state {state}{set})", server.name));
    }
}

/// Writes a line for each user in `users` (the first word of each line) whom the second configuration routes elsewhere, and a
/// summary. Returns the number of these users. A user whose lookup fails in only one
/// of them is included.
///
/// # Errors
/// `out` cannot be written.
pub async fn diff(
    old: &Snapshot,
    new: &Snapshot,
    users: &[u8],
    mut out: impl std::io::Write,
) -> std::io::Result<usize> {
    for snapshot in [old, new] {
        snapshot.router.start_read_only(&Handle::current());
    }
    let (mut compared, mut moved) = (0, 0);
    for line in users.split(|byte| *byte == b'\n') {
        let word = line.trim_ascii().split(u8::is_ascii_whitespace).next().unwrap_or_default();
        // Comments, domains and the default of a table are not users.
        if word.is_empty() || word.starts_with(b"#") || word.starts_with(b"@") || word == b"*" {
            continue;
        }
        let Ok(user) = UserName::new(word) else {
            writeln!(out, "{}: invalid user name", word.escape_ascii())?;
            continue;
        };
        compared += 1;
        let (before, after) = (decision(old, &user).await, decision(new, &user).await);
        if before != after {
            moved += 1;
            writeln!(out, "{user}: {before} -> {after}")?;
        }
    }
    writeln!(out, "{moved} of {compared} users would move")?;
    Ok(moved)
}

/// Returns the routes' decision for a user as text.
async fn decision(snapshot: &Snapshot, user: &UserName) -> String {
    let names = match snapshot.config.naming.names(user) {
        Ok(names) => names,
        Err(refused) => return refused.to_string(),
    };
    let request = LookupRequest { user: names.routing, login_context: None };
    match timeout(snapshot.limits.lookup, snapshot.router.route(&request, &snapshot.metrics)).await {
        Ok(Ok(routed)) => describe(snapshot, &routed.decision),
        Ok(Err(error)) => error.to_string(),
        Err(_) => "no answer within limits.lookup".to_owned(),
    }
}

fn describe(snapshot: &Snapshot, decision: &RouteDecision) -> String {
    match decision {
        RouteDecision::Destination(destination) => {
            let mut text = snapshot.backends.backend(destination.backend).name.to_string();
            let server = match &destination.server {
                ServerChoice::Any => None,
                ServerChoice::Server(server) => Some(server.to_string()),
                ServerChoice::Address(address) => Some(address.to_string()),
            };
            for (name, value) in [
                ("server", server.as_deref()),
                ("user", destination.user.as_ref().map(UserName::as_str)),
                ("credentials", destination.credentials.as_ref().map(|_| "of the route")),
            ] {
                if let Some(value) = value {
                    line(&mut text, format_args!(", {name} {value}"));
                    text.pop();
                }
            }
            text
        }
        RouteDecision::Refuse(reason) => format!("NO [CONTACTADMIN] {reason}"),
        RouteDecision::WrongPassword(_) => "NO [AUTHENTICATIONFAILED]".to_owned(),
        RouteDecision::PasswordNeeded => "NO [UNAVAILABLE]: the route decides by the client's password".to_owned(),
        RouteDecision::Maintenance(reason) => format!("NO [UNAVAILABLE] {reason}"),
    }
}

fn line(text: &mut String, content: std::fmt::Arguments<'_>) {
    // Writing to a String cannot fail.
    let _ = writeln!(text, "{content}");
}
