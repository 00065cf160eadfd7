//! The command `route`: which route answers for a user, which backend, which server now, and why; and who would move
//! between two configurations.
//!
//! Uses the same code as a login and connects to no mailbox server. It knows nothing of the running process but
//! the states in the state file, so a server that the running process takes for dead is still listed where it belongs. Called by `main`.

use std::fmt::Write as _;

use tokio::runtime::Handle;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::backend::ListenerAddresses;
use crate::identity::UserName;
use crate::route::{LookupOrigin, LookupRequest, LookupResult, RouteDecision, ServerChoice};
use crate::snapshot::Snapshot;

/// The text for `user`, and whether a server would be asked to log the user in.
pub async fn explain(snapshot: &Snapshot, user: &UserName) -> (String, bool) {
    let mut text = format!("user     {user}\n");
    let names = match snapshot.config.naming.names(user) {
        Ok(names) => names,
        Err(refused) => {
            line(&mut text, format_args!("refused  {refused}"));
            return (text, false);
        }
    };
    line(&mut text, format_args!("asked as {}", names.routing));
    let (tasks, stop) = (TaskTracker::new(), CancellationToken::new());
    snapshot.router.start_read_only(&Handle::current());
    let question = LookupRequest { user: names.routing, login_context: None };
    let mut found = None;
    for step in snapshot.router.explain(&question).await {
        let answer = match &step.result {
            LookupResult::Found(target) => {
                found = Some(target.clone());
                format!("found: {}", describe(snapshot, target))
            }
            LookupResult::Unknown => "does not know the user".to_owned(),
            LookupResult::Failed(reason) => format!("failed: {reason}"),
        };
        let origin = match step.origin {
            LookupOrigin::Memory => String::new(),
            LookupOrigin::Directory => ", asked now".to_owned(),
            LookupOrigin::Cache(age) => format!(", kept for {} s", age.as_secs()),
            LookupOrigin::Stale(age) => format!(", stale: kept for {} s, and its source is down", age.as_secs()),
        };
        line(&mut text, format_args!("route    {}: {answer} ({} µs{origin})", step.route, step.duration.as_micros()));
    }
    let Some(target) = found else {
        text.push_str("backend  none: the login is refused\n");
        return (text, false);
    };
    let RouteDecision::Destination(place) = &*target else {
        text.push_str("backend  none: the route itself answers the login\n");
        return (text, false);
    };
    line(&mut text, format_args!("login as {}", place.user.as_ref().unwrap_or(&names.server)));
    let backend = snapshot.backends.backend(place.backend);
    line(&mut text, format_args!("backend  {}", backend.name));
    if let Err(error) = snapshot.read_states() {
        line(&mut text, format_args!("states   unknown: {error}"));
    }
    let own = ListenerAddresses::new(snapshot.config.listeners.iter().map(|listener| listener.address).collect());
    snapshot.backends.start_discovery(&own, &tasks, &stop);
    let wait = snapshot.config.resolver.timeout * 3;
    let servers = timeout(wait, snapshot.servers(place, &place.mailbox(&question.user))).await.unwrap_or_default();
    match place.server {
        ServerChoice::Any => {
            line(&mut text, format_args!("balance  {}: {}", backend.balance.as_str(), backend.balance.decided_by()));
        }
        ServerChoice::Server(_) | ServerChoice::Address(_) => {
            text.push_str("balance  none: the route names the server\n")
        }
    }
    for (rank, server) in servers.iter().enumerate() {
        let addresses = timeout(wait, server.addresses()).await.unwrap_or_default();
        let addresses: Vec<String> = addresses.iter().map(ToString::to_string).collect();
        let resolved = if addresses.is_empty() { "no address known".to_owned() } else { addresses.join(", ") };
        let rank = if rank == 0 { "first" } else { "next" };
        let weight = if server.weight() == 1 { String::new() } else { format!(", weight {}", server.weight()) };
        let most = server.max_sessions().map(|most| format!(", {most} sessions at most")).unwrap_or_default();
        line(&mut text, format_args!("server   {rank}: {} ({resolved}){weight}{most}", server.name));
    }
    for server in backend.servers().iter().filter(|server| !server.takes_logins()) {
        let set =
            server.state_override().map(|set| format!(", set by {} at {}", set.by, set.since())).unwrap_or_default();
        line(
            &mut text,
            format_args!("server   no logins: {} (state {}{set})", server.name, server.admin_state().as_str()),
        );
    }
    if servers.is_empty() {
        text.push_str("server   none known: logins get NO [UNAVAILABLE]\n");
    }
    stop.cancel();
    (text, true)
}

/// Writes a line for every user in `users` (the first word of each line) whom the second configuration sends elsewhere, and
/// a summary. Says how many there are. A user whom either cannot place for now counts as moved: nobody could tell.
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
        // Comments of a table, its domains and its rest are no users.
        if word.is_empty() || word.starts_with(b"#") || word.starts_with(b"@") || word == b"*" {
            continue;
        }
        let Ok(user) = UserName::new(word) else {
            writeln!(out, "{}: no user name", word.escape_ascii())?;
            continue;
        };
        compared += 1;
        let (before, after) = (place(old, &user).await, place(new, &user).await);
        if before != after {
            moved += 1;
            writeln!(out, "{user}: {before} -> {after}")?;
        }
    }
    writeln!(out, "{moved} of {compared} users would move")?;
    Ok(moved)
}

/// Where a user belongs, in the words of `explain`.
async fn place(snapshot: &Snapshot, user: &UserName) -> String {
    let names = match snapshot.config.naming.names(user) {
        Ok(names) => names,
        Err(refused) => return refused.to_string(),
    };
    let question = LookupRequest { user: names.routing, login_context: None };
    match timeout(snapshot.limits.lookup, snapshot.router.route(&question, &snapshot.metrics)).await {
        Ok(Ok(routed)) => describe(snapshot, &routed.decision),
        Ok(Err(error)) => error.to_string(),
        Err(_) => "no answer".to_owned(),
    }
}

fn describe(snapshot: &Snapshot, target: &RouteDecision) -> String {
    match target {
        RouteDecision::Destination(place) => {
            let mut text = snapshot.backends.backend(place.backend).name.to_string();
            let at = match &place.server {
                ServerChoice::Any => None,
                ServerChoice::Server(server) => Some(server.to_string()),
                ServerChoice::Address(address) => Some(address.to_string()),
            };
            for (name, value) in [
                ("server", at.as_deref()),
                ("user", place.user.as_ref().map(UserName::as_str)),
                ("credentials", place.credentials.as_ref().map(|_| "of the route's")),
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
