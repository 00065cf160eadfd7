//! Who may come in and try: each defence by its name.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use vestibule::server::Running;

use crate::support::*;

/// A server that believes everybody.
const TAKES_ALL: &str = "
    S: * OK [CAPABILITY IMAP4rev1] good
    C: *
    S: L OK [CAPABILITY IMAP4rev1] in
    ...
";

/// A server that believes nobody.
const TAKES_NOBODY: &str = "
    S: * OK [CAPABILITY IMAP4rev1] good
    C: *
    S: L NO [AUTHENTICATIONFAILED] no
    ...
";

/// Users of good.test belong to a server with this script; others are unknown.
async fn with_server(script: &str, more: &str) -> (Running, ScriptedServer) {
    let server = ScriptedServer::new(script).await;
    let text = format!(
        "backends: {{only: {{servers: ['{}']}}}}\nroutes: [{{domain: {{good.test: only}}}}]\n{more}\n",
        server.address
    );
    (proxy(&text).await, server)
}

/// A connection from another address of this machine; nothing is read.
async fn from(source: &str, proxy: &Running) -> Client {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind(SocketAddr::new(source.parse().unwrap(), 0)).unwrap();
    LineStream::new(with_timeout("a connection", socket.connect(proxy.listeners()[0])).await.unwrap())
}

/// One that is greeted.
async fn greeted(source: &str, proxy: &Running) -> Client {
    let mut client = from(source, proxy).await;
    let line = client.line().await;
    assert!(line.starts_with("* OK"), "{line}");
    client
}

async fn refused(source: &str, proxy: &Running, bye: &str) {
    let mut client = from(source, proxy).await;
    let line = client.line().await;
    assert!(line.starts_with(bye), "{line}");
    client.assert_closed().await;
}

fn entries(proxy: &Running, table: &str) -> f64 {
    metric(proxy, "vestibule_admission_entries", &[&format!("table=\"{table}\"")])
}

fn turned_away(proxy: &Running, reason: &str) -> f64 {
    metric(proxy, "vestibule_connections_refused_total", &[&format!("reason=\"{reason}\"")])
}

#[tokio::test]
async fn when_too_many_have_not_logged_in_the_oldest_is_shed_and_never_one_that_has() {
    let (proxy, _server) = with_server(TAKES_ALL, "limits: {before_login: 2}").await;
    let mut logged_in = greeted("127.0.0.1", &proxy).await;
    assert!(logged_in.command("a LOGIN alice@good.test x").await.starts_with("a OK"));
    assert_eq!(entries(&proxy, "before_login"), 0.0, "who is logged in has left the lobby");
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
async fn a_login_under_way_is_not_cut_by_shedding() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let proxy = proxy(&format!(
        "backends: {{only: {{servers: ['{}']}}}}\nroutes: [{{default: only}}]\nlimits: {{before_login: 2}}\n",
        listener.local_addr().unwrap()
    ))
    .await;
    let mut client = greeted("127.0.0.1", &proxy).await;
    client.send("a LOGIN alice secret\r\n").await;
    let mut server = LineStream::new(with_timeout("the server's turn", listener.accept()).await.unwrap().0);
    // The client came first, and each of the others takes the place of the one before it.
    let mut crowd = Vec::new();
    for _ in 0..4 {
        crowd.push(greeted("127.0.0.1", &proxy).await);
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
async fn a_flood_of_silent_connections_keeps_nobody_out() {
    let (proxy, _server) = with_server(TAKES_ALL, "limits: {before_login: 10}").await;
    let mut flood = Vec::new();
    for _ in 0..200 {
        flood.push(from("127.0.0.2", &proxy).await);
    }
    // All came before the client, as far as the proxy knows: in the kernel's queues they may overtake each other.
    eventually("the flood", || metric(&proxy, "vestibule_connections_total", &[]) == 200.0).await;
    let mut client = greeted("127.0.0.1", &proxy).await;
    assert!(client.command("a LOGIN alice@good.test x").await.starts_with("a OK"));
    eventually("the flood to be shed", || metric(&proxy, "vestibule_connections", &[]) <= 11.0).await;
    assert!(metric(&proxy, "vestibule_failures_total", &["reason=\"shed\""]) >= 190.0);
    proxy.stop().await;
}

#[tokio::test]
async fn handshakes_wait_for_their_turn_and_silence_takes_none() {
    let certificates = Certificates::new();
    let text = format!(
        "listeners: [{{address: '127.0.0.1:0', tls: implicit}}]\n{}backends: {{a: {{servers: ['192.0.2.1:143']}}}}\n\
         routes: [{{default: a}}]\nlimits: {{handshakes: 1}}\n",
        certificates.section(),
    );
    let proxy = start(&text).await;
    let mut silent = Vec::new();
    for _ in 0..5 {
        silent.push(from("127.0.0.1", &proxy).await);
    }
    let greeting = |socket: TcpStream| async { LineStream::new(certificates.encrypt(socket).await).line().await };
    let socket = TcpStream::connect(proxy.listeners()[0]).await.unwrap();
    assert!(greeting(socket).await.starts_with("* OK"), "silence took the only turn");
    // Half a hello takes the turn, until it is gone.
    silent[0].stream.write_all(&[0x16]).await.unwrap();
    eventually("a handshake", || entries(&proxy, "handshakes") == 1.0).await;
    let socket = TcpStream::connect(proxy.listeners()[0]).await.unwrap();
    let mut waiting = std::pin::pin!(greeting(socket));
    tokio::select! {
        greeting = &mut waiting => panic!("{greeting} out of turn"),
        () = tokio::time::sleep(Duration::from_millis(300)) => {}
    }
    drop(silent);
    assert!(waiting.await.starts_with("* OK"));
    proxy.stop().await;
}

#[tokio::test]
async fn an_address_has_so_many_sessions_and_so_has_a_network() {
    let limits = "limits: {sessions_per_address: 2, networks: [{network: 127.0.1.0/24, sessions: 3}]}";
    let (proxy, _server) = with_server(TAKES_ALL, limits).await;
    let first = greeted("127.0.0.1", &proxy).await;
    let mut second = greeted("127.0.0.1", &proxy).await;
    assert!(second.command("a LOGIN alice@good.test x").await.starts_with("a OK"));
    refused("127.0.0.1", &proxy, "* BYE [UNAVAILABLE] Too many connections from your address").await;
    assert_eq!(turned_away(&proxy, "sessions_per_address"), 1.0);
    let mut network = Vec::new();
    for source in ["127.0.1.1", "127.0.1.2", "127.0.1.3"] {
        network.push(greeted(source, &proxy).await);
    }
    refused("127.0.1.4", &proxy, "* BYE [UNAVAILABLE] Too many connections from your network").await;
    assert_eq!(turned_away(&proxy, "sessions_per_network"), 1.0);
    drop((first, second, network));
    eventually("all to leave", || entries(&proxy, "sessions") == 0.0).await;
    greeted("127.0.0.1", &proxy).await;
    proxy.stop().await;
}

#[tokio::test]
async fn an_address_comes_at_a_rate_and_who_is_exempt_does_not() {
    let rules = "limits: {connection_rate: 3/1h}\naccess: {exempt: [127.0.0.9]}";
    let (proxy, _server) = with_server(TAKES_ALL, rules).await;
    for _ in 0..3 {
        greeted("127.0.0.1", &proxy).await;
    }
    refused("127.0.0.1", &proxy, "* BYE [UNAVAILABLE] Too many connections in a short time").await;
    assert_eq!(turned_away(&proxy, "connection_rate"), 1.0);
    greeted("127.0.0.2", &proxy).await;
    for _ in 0..10 {
        greeted("127.0.0.9", &proxy).await;
    }
    assert_eq!(entries(&proxy, "connection_rate"), 2.0);
    proxy.stop().await;
}

#[tokio::test]
async fn networks_that_are_denied_or_not_allowed_get_no_greeting() {
    let (proxy, _server) =
        with_server(TAKES_ALL, "access: {allow: [127.0.0.0/24], deny: [127.0.0.8/29], exempt: [127.0.0.9]}").await;
    greeted("127.0.0.1", &proxy).await;
    greeted("127.0.0.9", &proxy).await;
    refused("127.0.0.10", &proxy, "* BYE Connections from your address are not allowed").await;
    refused("127.0.5.1", &proxy, "* BYE Connections from your address are not allowed").await;
    assert_eq!(turned_away(&proxy, "denied"), 2.0);
    proxy.stop().await;
}

#[tokio::test]
async fn a_user_has_so_many_sessions_in_all_and_from_an_address() {
    let limits = "limits: {sessions_per_user: 2, sessions_per_user_and_address: 1}";
    let (proxy, _server) = with_server(TAKES_ALL, limits).await;
    let mut first = greeted("127.0.0.1", &proxy).await;
    assert!(first.command("a LOGIN alice@good.test x").await.starts_with("a OK"));
    let mut other = greeted("127.0.0.1", &proxy).await;
    let said = other.command("a LOGIN Alice@good.test x").await;
    assert_eq!(said, "a NO [LIMIT] Too many connections of this user from your address.");
    assert!(other.command("b LOGIN bob@good.test x").await.starts_with("b OK"));
    let mut second = greeted("127.0.0.2", &proxy).await;
    assert!(second.command("a LOGIN alice@good.test x").await.starts_with("a OK"));
    let mut third = greeted("127.0.0.3", &proxy).await;
    assert_eq!(third.command("a LOGIN alice@good.test x").await, "a NO [LIMIT] Too many connections of this user.");
    assert_eq!(metric(&proxy, "vestibule_logins_total", &["outcome=\"limited\""]), 2.0);
    assert_eq!(metric(&proxy, "vestibule_failures_total", &["reason=\"session_limit\""]), 2.0);
    drop(first);
    eventually("the first to leave", || metric(&proxy, "vestibule_backend_sessions", &[]) == 2.0).await;
    assert!(third.command("b LOGIN alice@good.test x").await.starts_with("b OK"));
    proxy.stop().await;
}

/// Otherwise a stranger who keeps trying would lock the user out.
#[tokio::test]
async fn wrong_passwords_take_no_session_of_a_user() {
    let (proxy, _server) = with_server(TAKES_NOBODY, "limits: {sessions_per_user: 1}").await;
    let mut stranger = greeted("127.0.0.2", &proxy).await;
    for tag in ["a", "b"] {
        let said = stranger.command(&format!("{tag} LOGIN alice@good.test x")).await;
        assert!(said.starts_with(&format!("{tag} NO [AUTHENTICATIONFAILED]")), "{said}");
    }
    assert_eq!(entries(&proxy, "sessions"), 0.0);
    proxy.stop().await;
}

#[tokio::test]
async fn guesses_come_at_a_rate_and_do_not_keep_out_who_is_known_there() {
    let limits = "limits: {login_rate_per_address: 4/1h, login_rate_per_user: 2/1h}";
    let (proxy, server) = with_server(TAKES_ALL, limits).await;
    let mut alice = greeted("127.0.0.1", &proxy).await;
    assert!(alice.command("a LOGIN alice@good.test x").await.starts_with("a OK"));
    let mut guesser = greeted("127.0.0.1", &proxy).await;
    for user in ["u1", "u2", "u3"] {
        assert!(guesser.command(&format!("g LOGIN {user} x")).await.starts_with("g NO [AUTHENTICATIONFAILED]"));
    }
    let asked = server.connections();
    let said = guesser.command("h LOGIN bob@good.test x").await;
    assert_eq!(said, "h NO [LIMIT] Too many logins from your address, wait a little.");
    assert_eq!(server.connections(), asked, "no server was troubled");
    let mut again = greeted("127.0.0.1", &proxy).await;
    assert!(again.command("a LOGIN alice@good.test x").await.starts_with("a OK"));
    // By user, from everywhere: where she is known she has tries of her own.
    let mut elsewhere = greeted("127.0.0.2", &proxy).await;
    assert!(elsewhere.command("a LOGIN carol@bad.test x").await.starts_with("a NO [AUTH"));
    assert!(elsewhere.command("b LOGIN carol@bad.test x").await.starts_with("b NO [AUTH"));
    assert_eq!(elsewhere.command("c LOGIN carol@bad.test x").await, "c NO [LIMIT] Too many logins, wait a little.");
    assert_eq!(metric(&proxy, "vestibule_failures_total", &["reason=\"login_rate\""]), 2.0);
    proxy.stop().await;
}

#[tokio::test]
async fn who_goes_on_beyond_the_rate_is_disconnected() {
    let limits = "limits: {login_rate_per_address: 1/1h, failed_logins: 3, failed_login_delay: 20s, failed_login_delay_max: 20s}";
    let (proxy, _server) = with_server(TAKES_ALL, limits).await;
    let mut alice = greeted("127.0.0.1", &proxy).await;
    assert!(alice.command("a LOGIN alice@good.test x").await.starts_with("a OK"));
    let mut client = greeted("127.0.0.1", &proxy).await;
    let began = Instant::now();
    for _ in 0..3 {
        assert!(client.command("a LOGIN bob@good.test x").await.starts_with("a NO [LIMIT]"));
    }
    assert!(client.line().await.starts_with("* BYE"));
    assert!(began.elapsed() < Duration::from_secs(10), "nobody waits for a limit");
    proxy.stop().await;
}

/// Unknown users, wrong passwords and names that cannot be: all as late, and later each time.
#[tokio::test]
async fn failed_logins_are_answered_late_and_alike() {
    let limits = "limits: {failed_login_delay: 200ms, failed_login_delay_max: 400ms}";
    let (proxy, _server) = with_server(TAKES_NOBODY, limits).await;
    for user in ["alice@good.test", "nobody@bad.test", "\"\\\\\\\"@\""] {
        let mut client = greeted("127.0.0.1", &proxy).await;
        for least in [160, 320, 320] {
            let began = Instant::now();
            let said = client.command(&format!("a LOGIN {user} x")).await;
            assert!(said.starts_with("a NO [AUTHENTICATIONFAILED]"), "{said}");
            let took = began.elapsed();
            assert!(took >= Duration::from_millis(least), "{user}: {took:?}");
        }
    }
    assert_eq!(entries(&proxy, "failed_logins"), 3.0);
    proxy.stop().await;
}

#[tokio::test]
async fn a_late_answer_holds_no_server_and_ends_with_the_process() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let proxy = proxy(&format!(
        "backends: {{only: {{servers: ['{}']}}}}\nroutes: [{{default: only}}]\n\
         limits: {{failed_login_delay: 30s, failed_login_delay_max: 30s}}\n",
        listener.local_addr().unwrap()
    ))
    .await;
    let mut client = greeted("127.0.0.1", &proxy).await;
    client.send("a LOGIN alice secret\r\n").await;
    let mut server = LineStream::new(with_timeout("the server's turn", listener.accept()).await.unwrap().0);
    server.send("* OK [CAPABILITY IMAP4rev1] x\r\n").await;
    server.line().await;
    server.send("L NO [AUTHENTICATIONFAILED] no\r\n").await;
    // Some say LOGOUT first.
    while !server.line().await.is_empty() {}
    with_timeout("the stop", proxy.stop()).await;
    assert!(client.line().await.starts_with("a NO [AUTHENTICATIONFAILED]"));
    assert!(client.line().await.starts_with("* BYE"));
}

/// The rules are new, what is remembered is not, and sessions of before count down as they should.
#[tokio::test]
async fn a_reload_replaces_limits_and_forgets_nobody() {
    let server = ScriptedServer::new(TAKES_ALL).await;
    let (address, folder) = (server.address, tempfile::tempdir().unwrap());
    let with = |limits: &str| {
        format!(
            "listeners: [{{address: '127.0.0.1:0', tls: none}}]\nbackends: {{only: {{servers: ['{address}'], check: off}}}}\n\
             routes: [{{domain: {{good.test: only}}}}]\nlimits: {{{limits}}}\n"
        )
    };
    let proxy = start(&with("sessions_per_address: 2")).await;
    let reload = async |limits: &str| {
        let file = folder.path().join("vestibule.yaml");
        std::fs::write(&file, with(limits)).unwrap();
        with_timeout("a reload", proxy.reload(&file)).await
    };
    let mut first = greeted("127.0.0.1", &proxy).await;
    assert!(first.command("a LOGIN alice@good.test x").await.starts_with("a OK"));
    let second = greeted("127.0.0.1", &proxy).await;
    refused("127.0.0.1", &proxy, "* BYE [UNAVAILABLE] Too many connections from your address").await;
    reload("sessions_per_address: 3").await.unwrap();
    let third = greeted("127.0.0.1", &proxy).await;
    refused("127.0.0.1", &proxy, "* BYE [UNAVAILABLE] Too many connections from your address").await;
    reload("sessions_per_address: 0").await.unwrap_err();
    refused("127.0.0.1", &proxy, "* BYE [UNAVAILABLE] Too many connections from your address").await;
    reload("sessions_per_address: off").await.unwrap();
    let fourth = greeted("127.0.0.1", &proxy).await;
    drop((first, second, third, fourth));
    eventually("all to leave", || entries(&proxy, "sessions") == 0.0).await;
    eventually("all to leave", || metric(&proxy, "vestibule_connections", &[]) == 0.0).await;
    proxy.stop().await;
}
