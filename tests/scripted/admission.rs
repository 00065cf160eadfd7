//! Admission: limits of connections, logins and sessions, rates, access lists, and delays of failed logins.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use vestibule::server::Running;

use crate::support::*;

/// A server that accepts every login.
const ACCEPTS_ALL: &str = "
    S: * OK [CAPABILITY IMAP4rev1] good
    C: *
    S: L OK [CAPABILITY IMAP4rev1] in
    ...
";

/// A server that refuses every login.
const REFUSES_ALL: &str = "
    S: * OK [CAPABILITY IMAP4rev1] good
    C: *
    S: L NO [AUTHENTICATIONFAILED] no
    ...
";

/// Starts a proxy that routes users of good.test to a server with this script; other users are unknown.
async fn proxy_with_server(script: &str, more: &str) -> (Running, ScriptedServer) {
    let server = ScriptedServer::new(script).await;
    let text = format!(
        "backends: {{only: {{servers: ['{}']}}}}\nroutes: [{{domain: {{good.test: only}}}}]\n{more}\n",
        server.address
    );
    (proxy(&text).await, server)
}

/// Connects from a loopback address, without reading the greeting.
async fn connect_from(source: &str, proxy: &Running) -> Client {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind(SocketAddr::new(source.parse().unwrap(), 0)).unwrap();
    LineStream::new(with_timeout("a connection", socket.connect(proxy.listeners()[0])).await.unwrap())
}

/// Connects and reads the greeting.
async fn greeted(source: &str, proxy: &Running) -> Client {
    let mut client = connect_from(source, proxy).await;
    let line = client.line().await;
    assert!(line.starts_with("* OK"), "{line}");
    client
}

/// Connects, and expects to be refused with this BYE.
async fn assert_refused(source: &str, proxy: &Running, bye: &str) {
    let mut client = connect_from(source, proxy).await;
    let line = client.line().await;
    assert!(line.starts_with(bye), "{line}");
    client.assert_closed().await;
}

fn entries(proxy: &Running, table: &str) -> f64 {
    metric(proxy, "vestibule_admission_entries", &[&format!("table=\"{table}\"")])
}

fn refused_connections(proxy: &Running, reason: &str) -> f64 {
    metric(proxy, "vestibule_connections_refused_total", &[&format!("reason=\"{reason}\"")])
}

#[tokio::test]
async fn oldest_connection_before_login_is_shed_and_never_a_session() {
    let (proxy, _server) = proxy_with_server(ACCEPTS_ALL, "limits: {before_login: 2}").await;
    let mut logged_in = greeted("127.0.0.1", &proxy).await;
    assert!(logged_in.command("a LOGIN alice@good.test x").await.starts_with("a OK"));
    assert_eq!(entries(&proxy, "before_login"), 0.0, "a session does not count as a connection before login");
    let mut oldest = greeted("127.0.0.1", &proxy).await;
    let mut second = greeted("127.0.0.1", &proxy).await;
    let mut third = greeted("127.0.0.1", &proxy).await;
    assert!(oldest.line().await.starts_with("* BYE [UNAVAILABLE] "));
    oldest.assert_closed().await;
    for (client, tag) in [(&mut second, "b"), (&mut third, "c")] {
        assert!(client.command(&format!("{tag} LOGIN alice@good.test x")).await.starts_with(&format!("{tag} OK")));
    }
    logged_in.send("d NOOP\r\n").await;
    eventually("the session to end", || metric(&proxy, "vestibule_failures_total", &["reason=\"shed\""]) == 1.0).await;
    assert_eq!(metric(&proxy, "vestibule_backend_sessions", &[]), 3.0);
    proxy.stop().await;
}

#[tokio::test]
async fn login_in_progress_is_not_shed() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let proxy = proxy(&format!(
        "backends: {{only: {{servers: ['{}']}}}}\nroutes: [{{default: only}}]\nlimits: {{before_login: 2}}\n",
        listener.local_addr().unwrap()
    ))
    .await;
    let mut client = greeted("127.0.0.1", &proxy).await;
    client.send("a LOGIN alice secret\r\n").await;
    let mut server = LineStream::new(with_timeout("the connection to the server", listener.accept()).await.unwrap().0);
    // The client was first, and each new connection sheds the one before it.
    let mut others = Vec::new();
    for _ in 0..4 {
        others.push(greeted("127.0.0.1", &proxy).await);
    }
    server.send("* OK [CAPABILITY IMAP4rev1] x\r\n").await;
    server.line().await;
    server.send("L OK [CAPABILITY IMAP4rev1] in\r\n").await;
    assert!(client.line().await.starts_with("a OK"));
    server.send("* 1 EXISTS\r\n").await;
    assert_eq!(client.line().await, "* 1 EXISTS");
    proxy.stop().await;
}

#[tokio::test]
async fn flood_of_silent_connections_locks_out_no_client() {
    let (proxy, _server) = proxy_with_server(ACCEPTS_ALL, "limits: {before_login: 10}").await;
    let mut flood = Vec::new();
    for _ in 0..200 {
        flood.push(connect_from("127.0.0.2", &proxy).await);
    }
    // All must be accepted before the client, because connections may overtake each other in the queues of the kernel.
    eventually("the flood", || metric(&proxy, "vestibule_connections_total", &[]) == 200.0).await;
    let mut client = greeted("127.0.0.1", &proxy).await;
    assert!(client.command("a LOGIN alice@good.test x").await.starts_with("a OK"));
    eventually("the flood to be shed", || metric(&proxy, "vestibule_connections", &[]) <= 11.0).await;
    assert!(metric(&proxy, "vestibule_failures_total", &["reason=\"shed\""]) >= 190.0);
    proxy.stop().await;
}

#[tokio::test]
async fn handshakes_wait_for_permits_and_silent_clients_take_none() {
    let certificates = Certificates::new();
    let text = format!(
        "listeners: [{{address: '127.0.0.1:0', tls: implicit}}]\n{}backends: {{a: {{servers: ['192.0.2.1:143']}}}}\n\
         routes: [{{default: a}}]\nlimits: {{handshakes: 1}}\n",
        certificates.section(),
    );
    let proxy = start(&text).await;
    let mut silent = Vec::new();
    for _ in 0..5 {
        silent.push(connect_from("127.0.0.1", &proxy).await);
    }
    let greeting = |socket: TcpStream| async { LineStream::new(certificates.encrypt(socket).await).line().await };
    let socket = TcpStream::connect(proxy.listeners()[0]).await.unwrap();
    assert!(greeting(socket).await.starts_with("* OK"), "a silent client must not take the only permit");
    // A client with half a ClientHello holds the permit until it disconnects.
    silent[0].stream.write_all(&[0x16]).await.unwrap();
    eventually("a handshake", || entries(&proxy, "handshakes") == 1.0).await;
    let socket = TcpStream::connect(proxy.listeners()[0]).await.unwrap();
    let mut waiting = std::pin::pin!(greeting(socket));
    tokio::select! {
        greeting = &mut waiting => panic!("{greeting} without a permit"),
        () = tokio::time::sleep(Duration::from_millis(300)) => {}
    }
    drop(silent);
    assert!(waiting.await.starts_with("* OK"));
    proxy.stop().await;
}

#[tokio::test]
async fn sessions_of_an_address_and_of_a_network_are_limited() {
    let limits = "limits: {sessions_per_address: 2, networks: [{network: 127.0.1.0/24, sessions: 3}]}";
    let (proxy, _server) = proxy_with_server(ACCEPTS_ALL, limits).await;
    let first = greeted("127.0.0.1", &proxy).await;
    let mut second = greeted("127.0.0.1", &proxy).await;
    assert!(second.command("a LOGIN alice@good.test x").await.starts_with("a OK"));
    assert_refused("127.0.0.1", &proxy, "* BYE [UNAVAILABLE] Too many connections from your address").await;
    assert_eq!(refused_connections(&proxy, "sessions_per_address"), 1.0);
    let mut network = Vec::new();
    for source in ["127.0.1.1", "127.0.1.2", "127.0.1.3"] {
        network.push(greeted(source, &proxy).await);
    }
    assert_refused("127.0.1.4", &proxy, "* BYE [UNAVAILABLE] Too many connections from your network").await;
    assert_eq!(refused_connections(&proxy, "sessions_per_network"), 1.0);
    drop((first, second, network));
    eventually("all connections to end", || entries(&proxy, "sessions") == 0.0).await;
    greeted("127.0.0.1", &proxy).await;
    proxy.stop().await;
}

#[tokio::test]
async fn connections_of_an_address_are_limited_by_rate_unless_exempt() {
    let rules = "limits: {connection_rate: 3/1h}\naccess: {exempt: [127.0.0.9]}";
    let (proxy, _server) = proxy_with_server(ACCEPTS_ALL, rules).await;
    for _ in 0..3 {
        greeted("127.0.0.1", &proxy).await;
    }
    assert_refused("127.0.0.1", &proxy, "* BYE [UNAVAILABLE] Too many connections in a short time").await;
    assert_eq!(refused_connections(&proxy, "connection_rate"), 1.0);
    greeted("127.0.0.2", &proxy).await;
    for _ in 0..10 {
        greeted("127.0.0.9", &proxy).await;
    }
    assert_eq!(entries(&proxy, "connection_rate"), 2.0);
    proxy.stop().await;
}

#[tokio::test]
async fn denied_networks_get_no_greeting() {
    let (proxy, _server) =
        proxy_with_server(ACCEPTS_ALL, "access: {allow: [127.0.0.0/24], deny: [127.0.0.8/29], exempt: [127.0.0.9]}")
            .await;
    greeted("127.0.0.1", &proxy).await;
    greeted("127.0.0.9", &proxy).await;
    assert_refused("127.0.0.10", &proxy, "* BYE Connections from your address are not allowed").await;
    assert_refused("127.0.5.1", &proxy, "* BYE Connections from your address are not allowed").await;
    assert_eq!(refused_connections(&proxy, "denied"), 2.0);
    proxy.stop().await;
}

#[tokio::test]
async fn sessions_of_a_user_are_limited_in_total_and_by_address() {
    let limits = "limits: {sessions_per_user: 2, sessions_per_user_and_address: 1}";
    let (proxy, _server) = proxy_with_server(ACCEPTS_ALL, limits).await;
    let mut first = greeted("127.0.0.1", &proxy).await;
    assert!(first.command("a LOGIN alice@good.test x").await.starts_with("a OK"));
    let mut other = greeted("127.0.0.1", &proxy).await;
    let reply = other.command("a LOGIN Alice@good.test x").await;
    assert_eq!(reply, "a NO [LIMIT] Too many connections of this user from your address.");
    assert!(other.command("b LOGIN bob@good.test x").await.starts_with("b OK"));
    let mut second = greeted("127.0.0.2", &proxy).await;
    assert!(second.command("a LOGIN alice@good.test x").await.starts_with("a OK"));
    let mut third = greeted("127.0.0.3", &proxy).await;
    assert_eq!(third.command("a LOGIN alice@good.test x").await, "a NO [LIMIT] Too many connections of this user.");
    assert_eq!(metric(&proxy, "vestibule_logins_total", &["outcome=\"limited\""]), 2.0);
    assert_eq!(metric(&proxy, "vestibule_failures_total", &["reason=\"session_limit\""]), 2.0);
    drop(first);
    eventually("the first session to end", || metric(&proxy, "vestibule_backend_sessions", &[]) == 2.0).await;
    assert!(third.command("b LOGIN alice@good.test x").await.starts_with("b OK"));
    proxy.stop().await;
}

/// Otherwise an attacker could lock a user out by guessing passwords.
#[tokio::test]
async fn wrong_passwords_do_not_count_as_sessions() {
    let (proxy, _server) = proxy_with_server(REFUSES_ALL, "limits: {sessions_per_user: 1}").await;
    let mut attacker = greeted("127.0.0.2", &proxy).await;
    for tag in ["a", "b"] {
        let reply = attacker.command(&format!("{tag} LOGIN alice@good.test x")).await;
        assert!(reply.starts_with(&format!("{tag} NO [AUTHENTICATIONFAILED]")), "{reply}");
    }
    assert_eq!(entries(&proxy, "sessions"), 0.0);
    proxy.stop().await;
}

#[tokio::test]
async fn guesses_are_limited_by_rate_and_do_not_lock_out_known_users() {
    let limits = "limits: {login_rate_per_address: 4/1h, login_rate_per_user: 2/1h}";
    let (proxy, server) = proxy_with_server(ACCEPTS_ALL, limits).await;
    let mut alice = greeted("127.0.0.1", &proxy).await;
    assert!(alice.command("a LOGIN alice@good.test x").await.starts_with("a OK"));
    let mut guesser = greeted("127.0.0.1", &proxy).await;
    for user in ["u1", "u2", "u3"] {
        assert!(guesser.command(&format!("g LOGIN {user} x")).await.starts_with("g NO [AUTHENTICATIONFAILED]"));
    }
    let connections = server.connections();
    let reply = guesser.command("h LOGIN bob@good.test x").await;
    assert_eq!(reply, "h NO [LIMIT] Too many logins from your address, wait a little.");
    assert_eq!(server.connections(), connections, "no server is contacted");
    let mut again = greeted("127.0.0.1", &proxy).await;
    assert!(again.command("a LOGIN alice@good.test x").await.starts_with("a OK"));
    // The limit of a user applies to all addresses at which the user is not known.
    let mut elsewhere = greeted("127.0.0.2", &proxy).await;
    assert!(elsewhere.command("a LOGIN carol@bad.test x").await.starts_with("a NO [AUTH"));
    assert!(elsewhere.command("b LOGIN carol@bad.test x").await.starts_with("b NO [AUTH"));
    assert_eq!(elsewhere.command("c LOGIN carol@bad.test x").await, "c NO [LIMIT] Too many logins, wait a little.");
    assert_eq!(metric(&proxy, "vestibule_failures_total", &["reason=\"login_rate\""]), 2.0);
    proxy.stop().await;
}

#[tokio::test]
async fn client_that_keeps_exceeding_the_rate_is_disconnected() {
    let limits = "limits: {login_rate_per_address: 1/1h, failed_logins: 3, failed_login_delay: 20s, failed_login_delay_max: 20s}";
    let (proxy, _server) = proxy_with_server(ACCEPTS_ALL, limits).await;
    let mut alice = greeted("127.0.0.1", &proxy).await;
    assert!(alice.command("a LOGIN alice@good.test x").await.starts_with("a OK"));
    let mut client = greeted("127.0.0.1", &proxy).await;
    let began = Instant::now();
    for _ in 0..3 {
        assert!(client.command("a LOGIN bob@good.test x").await.starts_with("a NO [LIMIT]"));
    }
    assert!(client.line().await.starts_with("* BYE"));
    assert!(began.elapsed() < Duration::from_secs(10), "a limit is reported without delay");
    proxy.stop().await;
}

/// Unknown users, wrong passwords and invalid names: all are refused with the same, growing delay.
#[tokio::test]
async fn failed_logins_are_delayed_equally() {
    let limits = "limits: {failed_login_delay: 200ms, failed_login_delay_max: 400ms}";
    let (proxy, _server) = proxy_with_server(REFUSES_ALL, limits).await;
    for user in ["alice@good.test", "unknown@bad.test", "\"\\\\\\\"@\""] {
        let mut client = greeted("127.0.0.1", &proxy).await;
        for min in [160, 320, 320] {
            let began = Instant::now();
            let reply = client.command(&format!("a LOGIN {user} x")).await;
            assert!(reply.starts_with("a NO [AUTHENTICATIONFAILED]"), "{reply}");
            let took = began.elapsed();
            assert!(took >= Duration::from_millis(min), "{user}: {took:?}");
        }
    }
    assert_eq!(entries(&proxy, "failed_logins"), 3.0);
    proxy.stop().await;
}

#[tokio::test]
async fn delayed_reply_holds_no_server_connection_and_ends_with_the_process() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let proxy = proxy(&format!(
        "backends: {{only: {{servers: ['{}']}}}}\nroutes: [{{default: only}}]\n\
         limits: {{failed_login_delay: 30s, failed_login_delay_max: 30s}}\n",
        listener.local_addr().unwrap()
    ))
    .await;
    let mut client = greeted("127.0.0.1", &proxy).await;
    client.send("a LOGIN alice secret\r\n").await;
    let mut server = LineStream::new(with_timeout("the connection to the server", listener.accept()).await.unwrap().0);
    server.send("* OK [CAPABILITY IMAP4rev1] x\r\n").await;
    server.line().await;
    server.send("L NO [AUTHENTICATIONFAILED] no\r\n").await;
    // The proxy may send LOGOUT first.
    while !server.line().await.is_empty() {}
    with_timeout("the stop", proxy.stop()).await;
    assert!(client.line().await.starts_with("a NO [AUTHENTICATIONFAILED]"));
    assert!(client.line().await.starts_with("* BYE"));
}

/// A reload replaces the rules and keeps the counts, which existing sessions leave when they end.
#[tokio::test]
async fn reload_replaces_limits_and_keeps_counts() {
    let server = ScriptedServer::new(ACCEPTS_ALL).await;
    let (address, folder) = (server.address, tempfile::tempdir().unwrap());
    let config = |limits: &str| {
        format!(
            "listeners: [{{address: '127.0.0.1:0', tls: none}}]\nbackends: {{only: {{servers: ['{address}'], check: off}}}}\n\
             routes: [{{domain: {{good.test: only}}}}]\nlimits: {{{limits}}}\n"
        )
    };
    let proxy = start(&config("sessions_per_address: 2")).await;
    let reload = async |limits: &str| {
        let file = folder.path().join("vestibule.yaml");
        std::fs::write(&file, config(limits)).unwrap();
        with_timeout("a reload", proxy.reload(&file)).await
    };
    let mut first = greeted("127.0.0.1", &proxy).await;
    assert!(first.command("a LOGIN alice@good.test x").await.starts_with("a OK"));
    let second = greeted("127.0.0.1", &proxy).await;
    assert_refused("127.0.0.1", &proxy, "* BYE [UNAVAILABLE] Too many connections from your address").await;
    reload("sessions_per_address: 3").await.unwrap();
    let third = greeted("127.0.0.1", &proxy).await;
    assert_refused("127.0.0.1", &proxy, "* BYE [UNAVAILABLE] Too many connections from your address").await;
    reload("sessions_per_address: 0").await.unwrap_err();
    assert_refused("127.0.0.1", &proxy, "* BYE [UNAVAILABLE] Too many connections from your address").await;
    reload("sessions_per_address: off").await.unwrap();
    let fourth = greeted("127.0.0.1", &proxy).await;
    drop((first, second, third, fourth));
    eventually("all connections to end", || entries(&proxy, "sessions") == 0.0).await;
    eventually("all connections to end", || metric(&proxy, "vestibule_connections", &[]) == 0.0).await;
    proxy.stop().await;
}
