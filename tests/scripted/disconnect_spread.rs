//! Delayed disconnects after a server dies: clients are disconnected one after another, and active ones at once.

use std::time::Duration;

use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio::time::Instant;
use vestibule::server::Running;

use crate::support::*;

const SESSIONS: usize = 40;

/// A server that accepts every login, and closes all connections when `dies` is cancelled.
struct MortalServer {
    address: std::net::SocketAddr,
    dies: tokio_util::sync::CancellationToken,
}

impl MortalServer {
    async fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (address, dies) = (listener.local_addr().unwrap(), tokio_util::sync::CancellationToken::new());
        let token = dies.clone();
        tokio::spawn(token.clone().run_until_cancelled_owned(async move {
            while let Ok((socket, _)) = listener.accept().await {
                tokio::spawn(token.clone().run_until_cancelled_owned(serve(LineStream::new(socket))));
            }
        }));
        Self { address, dies }
    }
}

async fn serve(mut line: LineStream<tokio::net::TcpStream>) {
    line.send("* OK [CAPABILITY IMAP4rev1] x\r\n").await;
    line.line().await;
    line.send("L OK [CAPABILITY IMAP4rev1] in\r\n").await;
    loop {
        let command = line.line().await;
        let answer = match command.as_str() {
            "" => return,
            "z LOGOUT" => "* BYE x\r\nz OK x\r\n",
            _ => "b OK done\r\n",
        };
        line.send(answer).await;
        if command == "z LOGOUT" {
            return;
        }
    }
}

/// Logs in [`SESSIONS`] users and waits until their sessions are parked.
async fn park_sessions(proxy: &Running) -> Vec<Client> {
    let mut clients = Vec::new();
    for number in 0..SESSIONS {
        let mut client = Client::connect(proxy.listeners()[0]).await;
        assert!(client.command(&format!("a LOGIN user{number} secret")).await.starts_with("a OK"));
        clients.push(client);
    }
    eventually("parked sessions", || metric(proxy, "vestibule_parked_sessions", &[]) == SESSIONS as f64).await;
    clients
}

/// A proxy, its only server, and sessions that are parked.
async fn with_parked_sessions(more: &str) -> (Running, MortalServer, Vec<Client>) {
    let server = MortalServer::new().await;
    let text = format!(
        "backends: {{only: {{servers: ['{}']}}}}\nroutes: [{{default: only}}]\nlimits: {{{more}}}",
        server.address
    );
    let proxy = proxy(&text).await;
    let clients = park_sessions(&proxy).await;
    (proxy, server, clients)
}

fn pending_disconnects(proxy: &Running) -> f64 {
    metric(proxy, "vestibule_server_disconnects_pending", &[])
}

#[tokio::test]
async fn clients_of_a_dead_server_are_disconnected_one_by_one() {
    let (proxy, server, clients) = with_parked_sessions("max_disconnect_delay: 3s").await;
    let started = Instant::now();
    server.dies.cancel();
    let mut closing = JoinSet::new();
    for mut client in clients {
        closing.spawn(async move {
            client.assert_closed().await;
            started.elapsed()
        });
    }
    eventually("pending disconnects", || pending_disconnects(&proxy) > SESSIONS as f64 / 2.0).await;
    // They no longer count as sessions of the server, although their clients are still connected.
    eventually("no session on the server", || metric(&proxy, "vestibule_server_sessions", &[]) == 0.0).await;
    assert!(metric(&proxy, "vestibule_connections", &[]) > SESSIONS as f64 / 2.0);
    let mut times = with_timeout("all ends", closing.join_all()).await;
    times.sort();
    // 40 in three seconds: one every 75 ms. On a busy machine they may be later, but never earlier.
    for (index, time) in times.iter().enumerate().skip(2) {
        assert!(*time >= Duration::from_millis(75 * index as u64 - 75), "{index}: {time:?}");
    }
    eventually("the end", || metric(&proxy, "vestibule_connections", &[]) == 0.0).await;
    assert_eq!(pending_disconnects(&proxy), 0.0);
    assert_eq!(metric(&proxy, "vestibule_failures_total", &["reason=\"server_gone\""]), (SESSIONS - 2) as f64);
    proxy.stop().await;
}

#[tokio::test]
async fn client_that_sends_leaves_or_is_kicked_is_disconnected_at_once() {
    let (proxy, server, mut clients) = with_parked_sessions("max_disconnect_delay: 1h").await;
    server.dies.cancel();
    // Although the maximum is an hour, the minimum rate disconnects the last client after four seconds.
    eventually("pending disconnects", || pending_disconnects(&proxy) >= (SESSIONS - 10) as f64).await;
    let before = pending_disconnects(&proxy);
    let mut sender = clients.pop().unwrap();
    sender.send("b NOOP\r\n").await;
    sender.assert_closed().await;
    drop(clients.pop());
    assert_eq!(operations(&proxy).kick("user37").await.unwrap(), 1);
    let mut kicked = clients.pop().unwrap();
    kicked.assert_closed().await;
    eventually("three fewer", || pending_disconnects(&proxy) <= before - 3.0).await;
    drop((clients, sender, kicked));
    eventually("the end", || metric(&proxy, "vestibule_connections", &[]) == 0.0).await;
    assert_eq!(pending_disconnects(&proxy), 0.0);
    proxy.stop().await;
}

#[tokio::test]
async fn session_ended_by_its_client_is_closed_at_once() {
    let (proxy, server, mut clients) = with_parked_sessions("max_disconnect_delay: 1h").await;
    // All sessions end at the same time, but because the clients log out.
    for client in &mut clients {
        client.send("z LOGOUT\r\n").await;
    }
    for client in &mut clients {
        assert_eq!(client.line().await, "* BYE x");
        assert_eq!(client.line().await, "z OK x");
        client.assert_closed().await;
    }
    assert_eq!(metric(&proxy, "vestibule_failures_total", &["reason=\"server_gone\""]), 0.0);
    assert_eq!(pending_disconnects(&proxy), 0.0);
    drop(server);
    proxy.stop().await;
}

#[tokio::test]
async fn max_disconnect_delay_off_disconnects_all_clients_at_once() {
    let (proxy, server, mut clients) = with_parked_sessions("max_disconnect_delay: off").await;
    server.dies.cancel();
    for client in &mut clients {
        client.assert_closed().await;
    }
    assert_eq!(metric(&proxy, "vestibule_failures_total", &["reason=\"server_gone\""]), 0.0);
    proxy.stop().await;
}

#[tokio::test]
async fn user_of_a_delayed_disconnect_may_log_in_at_once() {
    let (dying, other) = (MortalServer::new().await, MortalServer::new().await);
    let proxy = proxy(&format!(
        "backends: {{only: {{servers: ['{}', '{}']}}}}\nroutes: [{{default: only}}]\n\
         limits: {{max_disconnect_delay: 1h, sessions_per_user: 1, sessions_per_user_and_address: 1}}\n",
        dying.address, other.address
    ))
    .await;
    let mut clients = park_sessions(&proxy).await;
    let server = format!("server=\"{}\"", dying.address);
    let on_dying = || metric(&proxy, "vestibule_server_sessions", &[&server]);
    let closed = on_dying() as usize;
    assert!(closed > 4 && closed < SESSIONS, "{closed}");
    dying.dies.cancel();
    eventually("no session on the server that died", || on_dying() == 0.0).await;
    assert!(pending_disconnects(&proxy) > 0.0);
    let (mut accepted, mut limited) = (0, 0);
    for number in 0..SESSIONS {
        let mut client = Client::connect(proxy.listeners()[0]).await;
        let answer = client.command(&format!("a LOGIN user{number} secret")).await;
        accepted += usize::from(answer.starts_with("a OK"));
        limited += usize::from(answer.starts_with("a NO [LIMIT]"));
        clients.push(client);
    }
    assert_eq!((accepted, limited), (closed, SESSIONS - closed));
    proxy.stop().await;
}
