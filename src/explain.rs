//! The command `route`: which route answers for a user, which backend, which server now, and why.
//!
//! Uses the same code as a login and connects to no mailbox server. It knows nothing of the running process, so a
//! server that the running process takes for dead is still listed where it belongs. Called by `main`.

use std::fmt::Write as _;

use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::backend::OwnAddresses;
use crate::config::Config;
use crate::identity::UserName;
use crate::route::Answer;
use crate::server::Live;

/// The text for `user`, and whether a backend was found.
pub async fn explain(config: &Config, live: &Live, user: &UserName) -> (String, bool) {
    let mut text = format!("user     {user}\nasked as {}\n", user.routing_key());
    let mut found = None;
    for step in live.router.explain(user).await {
        let answer = match step.answer {
            Answer::Found(backend) => {
                found = Some(backend);
                format!("found: {}", config.backends[backend.0].name)
            }
            Answer::Unknown => "does not know the user".to_owned(),
            Answer::Failed(reason) => format!("failed: {reason}"),
        };
        line(&mut text, format_args!("route    {}: {answer} ({} µs)", step.route, step.took.as_micros()));
    }
    let Some(backend) = found else {
        text.push_str("backend  none: the login is refused\n");
        return (text, false);
    };
    let backend = live.backends.backend(backend);
    line(&mut text, format_args!("backend  {}", backend.name));
    let (tasks, stop) = (TaskTracker::new(), CancellationToken::new());
    let own = OwnAddresses::new(config.listeners.iter().map(|listener| listener.address).collect());
    live.backends.start(&own, &tasks, &stop);
    let wait = config.resolver.timeout * 3;
    let servers = timeout(wait, backend.candidates(&user.routing_key())).await.unwrap_or_default();
    for (rank, server) in servers.iter().enumerate() {
        let addresses = timeout(wait, server.addresses()).await.unwrap_or_default();
        let addresses: Vec<String> = addresses.iter().map(ToString::to_string).collect();
        let resolved = if addresses.is_empty() { "no address known".to_owned() } else { addresses.join(", ") };
        let place = if rank == 0 { "first" } else { "next" };
        line(&mut text, format_args!("server   {place}: {} ({resolved})", server.name));
    }
    if servers.is_empty() {
        text.push_str("server   none known: logins get NO [UNAVAILABLE]\n");
    }
    stop.cancel();
    (text, true)
}

fn line(text: &mut String, content: std::fmt::Arguments<'_>) {
    // Writing to a String cannot fail.
    let _ = writeln!(text, "{content}");
}
