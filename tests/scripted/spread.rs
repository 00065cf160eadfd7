//! A server dies under its sessions: their clients are closed one after another, and whoever has better to do is not kept.

use std::time::Duration;

use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio::time::Instant;
use vestibule::server::Running;

use crate::support::*;

const SESSIONS: usize = 40;

/// A server that lets everybody in, and drops all connections when it is told to die.
struct Mortal {
    address: std::net::SocketAddr,
    dies: tokio_util::sync::CancellationToken,
}

impl Mortal {
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
        let said = line.line().await;
        let answer = match said.as_str() {
            "" => return,
            "z LOGOUT" => "* BYE x\r\nz OK x\r\n",
            _ => "b OK done\r\n",
        };
        line.send(answer).await;
        if said == "z LOGOUT" {
            return;
        }
    }
}

/// The proxy, its only server, and sessions that have been silent for long enough to be put aside.
async fn scene(more: &str) -> (Running, Mortal, Vec<Client>) {
    let server = Mortal::new().await;
    let text = format!(
        "backends: {{only: {{servers: ['{}']}}}}\nroutes: [{{default: only}}]\nlimits: {{{more}}}",
        server.address
    );
    let proxy = proxy(&text).await;
    let mut clients = Vec::new();
    for number in 0..SESSIONS {
        let mut client = Client::connect(proxy.listeners()[0]).await;
        assert!(client.command(&format!("a LOGIN user{number} secret")).await.starts_with("a OK"));
        clients.push(client);
    }
    eventually("silence", || metric(&proxy, "vestibule_parked_sessions", &[]) == SESSIONS as f64).await;
    (proxy, server, clients)
}

fn kept(proxy: &Running) -> f64 {
    metric(proxy, "vestibule_server_disconnects_pending", &[])
}

#[tokio::test]
async fn clients_of_a_server_that_dies_are_closed_one_by_one() {
    let (proxy, server, clients) = scene("max_disconnect_delay: 3s").await;
    let began = Instant::now();
    server.dies.cancel();
    let mut closing = JoinSet::new();
    for mut client in clients {
        closing.spawn(async move {
            client.assert_closed().await;
            began.elapsed()
        });
    }
    eventually("clients that are kept", || kept(&proxy) > SESSIONS as f64 / 2.0).await;
    // The server has none of them any more, though they are still connected.
    eventually("no session on the server", || metric(&proxy, "vestibule_server_sessions", &[]) == 0.0).await;
    assert!(metric(&proxy, "vestibule_connections", &[]) > SESSIONS as f64 / 2.0);
    let mut times = with_timeout("all ends", closing.join_all()).await;
    times.sort();
    // 40 over three seconds: each 75 ms after the one before. A busy machine makes them later, never earlier.
    for (place, time) in times.iter().enumerate().skip(2) {
        assert!(*time >= Duration::from_millis(75 * place as u64 - 75), "{place}: {time:?}");
    }
    eventually("the end", || metric(&proxy, "vestibule_connections", &[]) == 0.0).await;
    assert_eq!(kept(&proxy), 0.0);
    assert_eq!(metric(&proxy, "vestibule_failures_total", &["reason=\"server_gone\""]), (SESSIONS - 2) as f64);
    proxy.stop().await;
}

#[tokio::test]
async fn who_speaks_leaves_or_is_told_to_is_not_kept() {
    let (proxy, server, mut clients) = scene("max_disconnect_delay: 1h").await;
    server.dies.cancel();
    // With an hour for all, the last of them would be here for four seconds.
    eventually("clients that are kept", || kept(&proxy) >= (SESSIONS - 10) as f64).await;
    let before = kept(&proxy);
    let mut speaker = clients.pop().unwrap();
    speaker.send("b NOOP\r\n").await;
    speaker.assert_closed().await;
    drop(clients.pop());
    assert_eq!(proxy.kick("user37").await.unwrap(), 1);
    let mut kicked = clients.pop().unwrap();
    kicked.assert_closed().await;
    eventually("three fewer", || kept(&proxy) <= before - 3.0).await;
    drop((clients, speaker, kicked));
    eventually("the end", || metric(&proxy, "vestibule_connections", &[]) == 0.0).await;
    assert_eq!(kept(&proxy), 0.0);
    proxy.stop().await;
}

#[tokio::test]
async fn ends_that_were_asked_for_are_passed_on_at_once() {
    let (proxy, server, mut clients) = scene("max_disconnect_delay: 1h").await;
    // All at once, but at their own wish.
    for client in &mut clients {
        client.send("z LOGOUT\r\n").await;
    }
    for client in &mut clients {
        assert_eq!(client.line().await, "* BYE x");
        assert_eq!(client.line().await, "z OK x");
        client.assert_closed().await;
    }
    assert_eq!(metric(&proxy, "vestibule_failures_total", &["reason=\"server_gone\""]), 0.0);
    assert_eq!(kept(&proxy), 0.0);
    drop(server);
    proxy.stop().await;
}

#[tokio::test]
async fn nobody_is_kept_where_that_is_off() {
    let (proxy, server, mut clients) = scene("max_disconnect_delay: off").await;
    server.dies.cancel();
    for client in &mut clients {
        client.assert_closed().await;
    }
    assert_eq!(metric(&proxy, "vestibule_failures_total", &["reason=\"server_gone\""]), 0.0);
    proxy.stop().await;
}

#[tokio::test]
async fn a_user_whose_session_was_cut_off_may_log_in_at_once() {
    let (dying, other) = (Mortal::new().await, Mortal::new().await);
    let proxy = proxy(&format!(
        "backends: {{only: {{servers: ['{}', '{}']}}}}\nroutes: [{{default: only}}]\n\
         limits: {{max_disconnect_delay: 1h, sessions_per_user: 1, sessions_per_user_and_address: 1}}\n",
        dying.address, other.address
    ))
    .await;
    let mut clients = Vec::new();
    for number in 0..SESSIONS {
        let mut client = Client::connect(proxy.listeners()[0]).await;
        assert!(client.command(&format!("a LOGIN user{number} secret")).await.starts_with("a OK"));
        clients.push(client);
    }
    eventually("silence", || metric(&proxy, "vestibule_parked_sessions", &[]) == SESSIONS as f64).await;
    let server = format!("server=\"{}\"", dying.address);
    let on_dying = || metric(&proxy, "vestibule_server_sessions", &[&server]);
    let cut_off = on_dying() as usize;
    assert!(cut_off > 4 && cut_off < SESSIONS, "{cut_off}");
    dying.dies.cancel();
    eventually("no session on the server that died", || on_dying() == 0.0).await;
    assert!(kept(&proxy) > 0.0);
    let (mut accepted, mut limited) = (0, 0);
    for number in 0..SESSIONS {
        let mut client = Client::connect(proxy.listeners()[0]).await;
        let said = client.command(&format!("a LOGIN user{number} secret")).await;
        accepted += usize::from(said.starts_with("a OK"));
        limited += usize::from(said.starts_with("a NO [LIMIT]"));
        clients.push(client);
    }
    assert_eq!((accepted, limited), (cut_off, SESSIONS - cut_off));
    proxy.stop().await;
}
