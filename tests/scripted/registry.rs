//! Tests of the session registry with concurrent logins: the effect of a login on the user's other sessions, what ends a login that
//! waits, and what a move affects.

use std::net::SocketAddr;
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use tokio::net::{TcpListener, TcpStream};
use vestibule::admin_state::AdminState;
use vestibule::backend::Server;
use vestibule::server::{Running, StateChange};
use vestibule::session_registry::{SessionHandle, SessionInfo};

use crate::support::{Client, LineStream, TIMEOUT, eventually, metric, operations, proxy, start, with_timeout};

pub(super) const UNAVAILABLE: &str = "a NO [UNAVAILABLE] The mailbox is temporarily unavailable, try again later.";
pub(super) const OK: &str = "a OK [CAPABILITY IMAP4rev1] in";
pub(super) const SCRAM: &str =
    "listeners: [{address: '127.0.0.1:0', tls: none, mechanisms: [login, scram-sha-256, xoauth2]}]\n";

/// A server whose replies the test sends itself, one connection at a time.
pub(super) struct ManualServer(TcpListener);

impl ManualServer {
    pub(super) async fn new() -> Self {
        Self(TcpListener::bind("127.0.0.1:0").await.unwrap())
    }

    pub(super) fn address(&self) -> SocketAddr {
        self.0.local_addr().unwrap()
    }

    /// Accepts the next connection of the proxy.
    pub(super) async fn accept(&self) -> TcpStream {
        with_timeout("a connection of the proxy", self.0.accept()).await.unwrap().0
    }

    /// Accepts the next connection of the proxy and reads its login command.
    pub(super) async fn login(&self) -> Client {
        let mut line = LineStream::new(self.accept().await);
        line.send("* OK [CAPABILITY IMAP4rev1 SASL-IR AUTH=SCRAM-SHA-256 AUTH=XOAUTH2] x\r\n").await;
        let command = line.line().await;
        assert!(command.starts_with("L LOGIN") || command.starts_with("L AUTHENTICATE"), "{command}");
        line
    }

    /// Whether the proxy has a connection that has not been accepted yet.
    pub(super) async fn has_pending_connection(&self) -> bool {
        futures_util::poll!(Box::pin(self.0.accept())).is_ready()
    }
}

pub(super) async fn answer(server: &mut Client, text: &str) {
    server.send(format!("L {text}\r\n")).await;
}

pub(super) async fn accept(server: &mut Client) {
    answer(server, "OK [CAPABILITY IMAP4rev1] in").await;
}

/// A client that has sent a login and has no answer yet.
pub(super) async fn login(proxy: &Running) -> Client {
    let mut client = Client::connect(proxy.listeners()[0]).await;
    client.send("a LOGIN alice secret\r\n").await;
    client
}

/// Client and server of an established session of alice.
pub(super) async fn session(proxy: &Running, at: &ManualServer) -> (Client, Client) {
    let mut client = login(proxy).await;
    let mut server = at.login().await;
    accept(&mut server).await;
    assert_eq!(client.line().await, OK);
    (client, server)
}

pub(super) async fn assert_alive((client, server): &mut (Client, Client)) {
    client.send("b NOOP\r\n").await;
    assert_eq!(server.line().await, "b NOOP");
    server.send("b OK done\r\n").await;
    assert_eq!(client.line().await, "b OK done");
}

/// Stops the process while a login waits, and checks that the login ends.
async fn assert_ends_with(proxy: &Running, client: &mut Client) {
    let ended = async {
        assert_eq!(client.line().await, "* BYE [UNAVAILABLE] Server shutting down, connect again.");
        client.assert_closed().await;
    };
    with_timeout("the stop", async { tokio::join!(ended, proxy.drain(std::future::pending())) }).await;
}

#[tokio::test]
async fn login_waiting_before_server_choice_ends_with_a_kick_and_a_stop() {
    let folder = tempfile::tempdir().unwrap();
    let nonce = folder.path().join("nonce");
    std::fs::write(&nonce, "salt\n").unwrap();
    for wait in ["policy", "lookup", "place"] {
        // A policy service or directory that accepts connections and never answers.
        let (silent, server) = (ManualServer::new().await, ManualServer::new().await);
        let url = format!("http://{}/", silent.address());
        let backends = format!(
            "backends: {{only: {{servers: ['{}'], max_sessions: 1, queue: {{timeout: 60s}}}}}}\n",
            server.address()
        );
        let routes = match wait {
            "lookup" => format!("routes: [{{http: {{url: '{url}', style: json, timeout: 30s}}}}]\n"),
            _ => "routes: [{default: only}]\n".to_owned(),
        };
        let policy = match wait {
            "policy" => format!("policy: {{url: '{url}', nonce_file: {}, timeout: 30s}}\n", nonce.display()),
            _ => String::new(),
        };
        let proxy = proxy(&format!("{backends}{routes}{policy}limits: {{lookup: 30s}}\n")).await;
        let _full = if wait == "place" { Some(session(&proxy, &server).await) } else { None };
        let before = proxy.sessions().of_user("alice").len();
        let waiting = async || {
            let client = login(&proxy).await;
            if wait == "place" {
                eventually("the queue", || metric(&proxy, "vestibule_backend_queue_length", &[]) == 1.0).await;
            } else {
                eventually("the login", || proxy.sessions().of_user("alice").len() == before + 1).await;
            }
            client
        };
        let mut client = waiting().await;
        match wait {
            // The kick queries the routes for the user's other names, and waits for the directory that hangs.
            "lookup" => tokio::select! {
                line = client.line() => assert_eq!(line, UNAVAILABLE),
                _ = operations(&proxy).kick("alice") => panic!("the directory has answered"),
            },
            _ => {
                assert_eq!(
                    with_timeout("the kick", operations(&proxy).kick("alice")).await.unwrap(),
                    before + 1,
                    "{wait}"
                );
                assert_eq!(client.line().await, UNAVAILABLE);
            }
        }
        if wait == "place" {
            // The kick has also ended the session that had the permit.
            continue;
        }
        let mut client = waiting().await;
        assert_ends_with(&proxy, &mut client).await;
    }
}

/// Two servers of a `user-hash` backend. The first is the one that alice is hashed to.
pub(super) async fn two_servers(more: &str) -> (Running, ManualServer, ManualServer) {
    let (one, other) = (ManualServer::new().await, ManualServer::new().await);
    let text = format!(
        "backends: {{pair: {{servers: ['{}', '{}']}}}}\nroutes: [{{default: pair}}]\n{more}",
        one.address(),
        other.address()
    );
    let proxy = proxy(&text).await;
    let backend = proxy.snapshot().backends.named("pair").unwrap().clone();
    let first = with_timeout("the order", backend.candidates("alice")).await[0].name.to_string();
    if first == one.address().to_string() { (proxy, one, other) } else { (proxy, other, one) }
}

pub(super) async fn set_state(proxy: &Running, server: &ManualServer, state: AdminState, over: Option<f64>) {
    let (server, state, by) = (server.address().to_string(), Some(state), "test".to_owned());
    proxy.set_server(StateChange { server, state, over, by, ..StateChange::default() }).await.unwrap();
}

/// A registered session of alice that does not end when it is cancelled.
pub(super) fn stuck_session(proxy: &Running, at: &ManualServer) -> SessionHandle {
    let sessions = proxy.sessions();
    let since = sessions.generation();
    let info = SessionInfo { user: "alice".into(), client: [127, 0, 0, 1].into(), session: [b'x'; 16] };
    let handle = sessions.register(info).unwrap();
    let servers: Vec<Arc<Server>> = proxy.snapshot().backends.list()[0].servers();
    let server = servers.iter().find(|server| *server.name == *at.address().to_string()).unwrap();
    handle.set_server(&"alice".into(), server, since).unwrap();
    handle.accept_exclusively();
    handle.establish();
    handle
}

#[tokio::test]
async fn unaccepted_login_ends_no_session() {
    let (proxy, first, other) = two_servers("").await;
    let mut there = session(&proxy, &first).await;
    // The server closes the connection after the password.
    let mut attack = login(&proxy).await;
    drop(first.login().await);
    assert_eq!(attack.line().await, UNAVAILABLE);
    assert!(!other.has_pending_connection().await, "the password was sent to one server only");
    assert_alive(&mut there).await;
    // A wrong password, while the user's server accepts no logins.
    set_state(&proxy, &first, AdminState::Drain, None).await;
    let mut attack = login(&proxy).await;
    let mut server = other.login().await;
    answer(&mut server, "NO [AUTHENTICATIONFAILED] Wrong.").await;
    assert_eq!(attack.line().await, "a NO [AUTHENTICATIONFAILED] Wrong.");
    assert_eq!(metric(&proxy, "vestibule_logins_total", &["outcome=\"refused\""]), 1.0, "it counts as failed");
    assert_alive(&mut there).await;
    // A correct password has no effect either before the server accepts it.
    let mut moved = login(&proxy).await;
    let mut server = other.login().await;
    assert_alive(&mut there).await;
    accept(&mut server).await;
    there.0.assert_closed().await;
    there.1.assert_closed().await;
    assert_eq!(moved.line().await, OK);
    assert_alive(&mut (moved, server)).await;
    proxy.stop().await;
}

#[tokio::test]
async fn accepted_login_waits_for_sessions_elsewhere_or_fails() {
    let (proxy, first, other) = two_servers("limits: {server_login: 1s}\n").await;
    let handle = stuck_session(&proxy, &other);
    let mut client = login(&proxy).await;
    let mut server = first.login().await;
    accept(&mut server).await;
    assert_eq!(client.line().await, UNAVAILABLE);
    server.assert_closed().await;
    assert_eq!(metric(&proxy, "vestibule_failures_total", &["reason=\"moved\""]), 1.0);
    assert!(!other.has_pending_connection().await, "no other server is tried with it");
    // The other session ends during the wait.
    let mut client = login(&proxy).await;
    let mut server = first.login().await;
    accept(&mut server).await;
    eventually("the wait", || proxy.sessions().of_user("alice").len() == 2).await;
    drop(handle);
    assert_eq!(client.line().await, OK);
    assert_alive(&mut (client, server)).await;
    proxy.stop().await;
}

#[tokio::test]
async fn waiting_accepted_login_ends_with_a_kick_and_a_stop() {
    let (proxy, first, other) = two_servers("limits: {server_login: 600s}\n").await;
    let _handle = stuck_session(&proxy, &other);
    let waiting = async || {
        let mut client = login(&proxy).await;
        let mut server = first.login().await;
        accept(&mut server).await;
        eventually("the server's answer", || {
            proxy
                .sessions()
                .of_user("alice")
                .iter()
                .any(|session| session.state == vestibule::session_registry::SessionState::Accepted)
        })
        .await;
        client.send("b NOOP\r\n").await;
        (client, server)
    };
    let (mut client, mut server) = waiting().await;
    assert!(operations(&proxy).kick("alice").await.unwrap() >= 1);
    assert_eq!(client.line().await, UNAVAILABLE);
    server.assert_closed().await;
    let (mut client, mut server) = waiting().await;
    let (client, ()) = tokio::join!(
        async {
            let reply = client.line().await;
            server.assert_closed().await;
            reply
        },
        async {
            proxy.drain(std::future::pending()).await;
        }
    );
    assert_eq!(client, "* BYE [UNAVAILABLE] Server shutting down, connect again.");
}

/// A backend whose server refers users to the two servers of another backend with `user-hash`.
async fn referring() -> (Running, ManualServer, [ManualServer; 2]) {
    let (front, one, other) = (ManualServer::new().await, ManualServer::new().await, ManualServer::new().await);
    let text = format!(
        "backends: {{front: {{servers: ['{}']}}, pair: {{servers: ['{}', '{}']}}}}\nroutes: [{{default: front}}]\n",
        front.address(),
        one.address(),
        other.address()
    );
    (proxy(&text).await, front, [one, other])
}

/// A login of alice that waits for the answer of the server that it was referred to.
async fn referred(proxy: &Running, front: &ManualServer, to: &ManualServer) -> (Client, Client) {
    let client = login(proxy).await;
    let mut server = front.login().await;
    answer(&mut server, &format!("NO [REFERRAL imap://alice@{}/] there", to.address())).await;
    (client, to.login().await)
}

#[tokio::test]
async fn login_accepted_last_is_established_if_different_servers_accept() {
    for first_accepts_first in [true, false] {
        let (proxy, front, [one, other]) = referring().await;
        let (mut early, mut late) = (referred(&proxy, &front, &one).await, referred(&proxy, &front, &other).await);
        let [loser, winner] = if first_accepts_first { [&mut early, &mut late] } else { [&mut late, &mut early] };
        accept(&mut loser.1).await;
        assert_eq!(loser.0.line().await, OK);
        assert_alive(loser).await;
        accept(&mut winner.1).await;
        loser.0.assert_closed().await;
        loser.1.assert_closed().await;
        assert_eq!(winner.0.line().await, OK);
        assert_alive(winner).await;
        proxy.stop().await;
    }
}

#[tokio::test]
async fn referred_login_ends_sessions_only_after_its_acceptance() {
    let (proxy, front, [one, other]) = referring().await;
    let mut there = referred(&proxy, &front, &one).await;
    accept(&mut there.1).await;
    assert_eq!(there.0.line().await, OK);
    let (mut attack, mut server) = referred(&proxy, &front, &other).await;
    answer(&mut server, "NO [AUTHENTICATIONFAILED] Wrong.").await;
    assert_eq!(attack.line().await, "a NO [AUTHENTICATIONFAILED] Wrong.");
    assert_alive(&mut there).await;
    let (mut moved, mut server) = referred(&proxy, &front, &other).await;
    assert_alive(&mut there).await;
    accept(&mut server).await;
    there.0.assert_closed().await;
    assert_eq!(moved.line().await, OK);
    assert_alive(&mut (moved, server)).await;
    proxy.stop().await;
}

#[tokio::test]
async fn login_at_a_drained_server_continues_on_another() {
    let (proxy, first, other) = two_servers("").await;
    let mut client = login(&proxy).await;
    let mut server = first.login().await;
    set_state(&proxy, &first, AdminState::Drain, None).await;
    server.assert_closed().await;
    let mut server = other.login().await;
    accept(&mut server).await;
    assert_eq!(client.line().await, OK);
    proxy.stop().await;
}

/// A client in a SCRAM exchange that has received the first challenge of the server.
async fn exchange(proxy: &Running, at: &ManualServer) -> (Client, Client) {
    let mut client = Client::connect(proxy.listeners()[0]).await;
    let first = STANDARD.encode("n,,n=alice,r=clientnonce");
    client.send(format!("a AUTHENTICATE SCRAM-SHA-256 {first}\r\n")).await;
    let mut server = at.login().await;
    let challenge = STANDARD.encode("r=clientnonceservernonce,s=c2FsdA==,i=4096");
    server.send(format!("+ {challenge}\r\n")).await;
    assert_eq!(client.line().await, format!("+ {challenge}"));
    (client, server)
}

async fn one_server(settings: &str, more: &str) -> (Running, ManualServer) {
    let server = ManualServer::new().await;
    let text = format!(
        "{SCRAM}backends: {{only: {{servers: ['{}'], {settings}}}}}\nroutes: [{{default: only}}]\n{more}",
        server.address()
    );
    (start(&text).await, server)
}

#[tokio::test]
async fn pending_exchange_ends_with_a_kick_a_move_and_a_drain_of_its_server() {
    let (proxy, server) = one_server("balance: user-hash", "").await;
    for way in ["kick", "move", "drain over a time", "drain"] {
        let (mut client, mut there) = exchange(&proxy, &server).await;
        match way {
            "kick" => assert_eq!(operations(&proxy).kick("alice").await.unwrap(), 1),
            "move" => {
                let (_hold, ended) = with_timeout("the hold", operations(&proxy).hold("alice")).await.unwrap();
                assert_eq!(ended, 1);
                assert!(proxy.sessions().of_user("alice").is_empty());
            }
            "drain" => set_state(&proxy, &server, AdminState::Drain, None).await,
            _ => set_state(&proxy, &server, AdminState::Drain, Some(0.0)).await,
        }
        // The next message of the exchange must not be parsed as a command.
        client.send("Yz1iaXdzLHI9\r\n").await;
        assert_eq!(client.line().await, UNAVAILABLE, "{way}");
        assert_eq!(client.line().await, "* BYE [UNAVAILABLE] The login was ended, connect again.");
        client.assert_closed().await;
        there.assert_closed().await;
        assert_eq!(operations(&proxy).kick("alice").await.unwrap(), 0, "the login is not registered any more");
        set_state(&proxy, &server, AdminState::Up, None).await;
    }
    proxy.stop().await;
}

#[tokio::test]
async fn pending_exchange_ends_with_a_stop() {
    let (proxy, server) = one_server("balance: user-hash", "").await;
    let (mut client, mut there) = exchange(&proxy, &server).await;
    let ended = async {
        assert_eq!(client.line().await, "* BYE [UNAVAILABLE] Server shutting down, connect again.");
        client.assert_closed().await;
        there.assert_closed().await;
    };
    let never = std::future::pending();
    assert_eq!(with_timeout("the stop", async { tokio::join!(ended, proxy.drain(never)) }).await.1, 0);
}

#[tokio::test]
async fn pending_exchange_ends_when_shed_and_at_the_deadline() {
    let (proxy, server) = one_server("balance: user-hash", "limits: {before_login: 1}\n").await;
    let (mut client, mut there) = exchange(&proxy, &server).await;
    let _next = Client::connect(proxy.listeners()[0]).await;
    assert!(client.line().await.starts_with("* BYE [UNAVAILABLE] Too many connections without a login"));
    there.assert_closed().await;
    proxy.stop().await;
    let (proxy, server) = one_server("balance: user-hash", "limits: {login: 1s}\n").await;
    let (mut client, mut there) = exchange(&proxy, &server).await;
    assert_eq!(client.line().await, "* BYE Login took too long.");
    there.assert_closed().await;
    proxy.stop().await;
}

#[tokio::test]
async fn exchange_without_credentials_uses_no_server_permit() {
    for balance in ["user-hash", "least-sessions"] {
        let settings = format!("balance: {balance}, max_sessions: 2, queue: {{length: 5, timeout: 30s}}");
        let (proxy, server) = one_server(&settings, "").await;
        let mut pending = Vec::new();
        for _ in 0..20 {
            pending.push(exchange(&proxy, &server).await);
        }
        assert_eq!(proxy.snapshot().backends.list()[0].servers()[0].sessions(), 0);
        // The number of exchanges is limited to max_sessions, so that they do not use up the server's connections.
        for (mut client, mut there) in pending.drain(..18) {
            assert_eq!(client.line().await, UNAVAILABLE);
            there.assert_closed().await;
        }
        let _one = session(&proxy, &server).await;
        let two = session(&proxy, &server).await;
        // An exchange that continues needs a permit before the proof is sent to the server.
        let (mut client, mut there) = pending.pop().unwrap();
        client.send("cHJvb2Y=\r\n").await;
        eventually("the queue", || metric(&proxy, "vestibule_backend_queue_length", &[]) == 1.0).await;
        drop(two);
        assert_eq!(there.line().await, "cHJvb2Y=");
        // The server has verified the proof, and the login keeps its permit.
        there.send("+ dj1zaWduYXR1cmU=\r\n").await;
        assert_eq!(client.line().await, "+ dj1zaWduYXR1cmU=");
        assert_eq!(proxy.snapshot().backends.list()[0].servers()[0].sessions(), 2);
        client.send("\r\n").await;
        assert_eq!(there.line().await, "");
        accept(&mut there).await;
        assert_eq!(client.line().await, OK);
        assert_alive(&mut (client, there)).await;
        drop((pending, _one));
        proxy.stop().await;
    }
}

#[tokio::test]
async fn refused_token_uses_no_server_permit_while_the_client_is_asked() {
    let (proxy, server) = one_server("max_sessions: 1, queue: {length: 0}", "").await;
    let mut client = Client::connect(proxy.listeners()[0]).await;
    let token = STANDARD.encode("user=alice\x01auth=Bearer wrong\x01\x01");
    client.send(format!("a AUTHENTICATE XOAUTH2 {token}\r\n")).await;
    let mut there = server.login().await;
    there.send("+ eyJzdGF0dXMiOiI0MDEifQ==\r\n").await;
    assert_eq!(client.line().await, "+ eyJzdGF0dXMiOiI0MDEifQ==");
    let _session = session(&proxy, &server).await;
    client.send("\r\n").await;
    assert_eq!(there.line().await, "", "the refusal needs no permit");
    answer(&mut there, "NO [AUTHENTICATIONFAILED] No.").await;
    assert_eq!(client.line().await, "a NO [AUTHENTICATIONFAILED] No.");
    // The end of an exchange that the client aborts needs no permit either.
    let (mut client, mut there) = exchange(&proxy, &server).await;
    client.send("*\r\n").await;
    assert_eq!(there.line().await, "*");
    answer(&mut there, "BAD aborted").await;
    assert_eq!(client.line().await, "a BAD aborted");
    proxy.stop().await;
}

/// Two backends with one server each, and a table of users that can be replaced.
struct Scene {
    folder: tempfile::TempDir,
    proxy: Running,
    a: ManualServer,
    b: ManualServer,
}

impl Scene {
    /// `settings` are added to the first backend.
    async fn new(settings: &str, table: &str) -> Self {
        let (folder, a, b) = (tempfile::tempdir().unwrap(), ManualServer::new().await, ManualServer::new().await);
        let text = format!(
            "listeners: [{{address: '127.0.0.1:0', tls: none}}]\nlimits: {{workers: 1}}\n\
             backends: {{a: {{servers: ['{}'], check: off, {settings}}}, b: {{servers: ['{}'], check: off}}}}\n\
             routes: [{{table: {}}}]\n",
            a.address(),
            b.address(),
            folder.path().join("users").display()
        );
        std::fs::write(folder.path().join("vestibule.yaml"), text).unwrap();
        std::fs::write(folder.path().join("users"), table).unwrap();
        let config = vestibule::config::load(&folder.path().join("vestibule.yaml")).unwrap();
        let proxy = vestibule::server::start(config, Vec::new()).await.unwrap();
        Self { folder, proxy, a, b }
    }

    async fn table(&self, table: &str) {
        std::fs::write(self.folder.path().join("users"), table).unwrap();
        with_timeout("a reload", self.proxy.reload(&self.folder.path().join("vestibule.yaml"))).await.unwrap();
    }

    async fn login(&self, user: &str) -> Client {
        let mut client = Client::connect(self.proxy.listeners()[0]).await;
        client.send(format!("a LOGIN {user} secret\r\n")).await;
        client
    }
}

#[tokio::test]
async fn move_reaches_a_queued_login() {
    let scene = Scene::new("max_sessions: 1, queue: {timeout: 60s}", "alice a\nbob a\n").await;
    let mut bob = (scene.login("bob").await, scene.a.login().await);
    accept(&mut bob.1).await;
    assert_eq!(bob.0.line().await, OK);
    let mut alice = scene.login("alice").await;
    eventually("the queue", || metric(&scene.proxy, "vestibule_backend_queue_length", &[]) == 1.0).await;
    scene.table("alice b\nbob a\n").await;
    with_timeout("the move", operations(&scene.proxy).move_user("alice", "b", TIMEOUT / 2)).await.unwrap();
    let mut there = scene.b.login().await;
    accept(&mut there).await;
    assert_eq!(alice.line().await, OK);
    assert_eq!(metric(&scene.proxy, "vestibule_backend_queue_length", &[]), 0.0);
    assert_alive(&mut bob).await;
    scene.proxy.stop().await;
}

#[tokio::test]
async fn queued_login_avoids_a_server_drained_in_the_meantime() {
    let (proxy, first, other) = two_servers("").await;
    proxy.stop().await;
    let servers = format!("servers: ['{}', '{}'], max_sessions: 1", first.address(), other.address());
    let text = format!("backends: {{pair: {{{servers}, queue: {{timeout: 60s}}}}}}\nroutes: [{{default: pair}}]\n");
    let proxy = crate::support::proxy(&text).await;
    let there = session(&proxy, &first).await;
    let mut waiting = login(&proxy).await;
    eventually("the queue", || metric(&proxy, "vestibule_backend_queue_length", &[]) == 1.0).await;
    set_state(&proxy, &first, AdminState::Drain, None).await;
    drop(there);
    let mut server = other.login().await;
    accept(&mut server).await;
    assert_eq!(waiting.line().await, OK);
    assert!(!first.has_pending_connection().await);
    proxy.stop().await;
}

#[tokio::test]
async fn queued_login_is_routed_again_after_a_reload() {
    let scene = Scene::new("max_sessions: 1, queue: {timeout: 60s}", "alice a\nbob a\n").await;
    let mut bob = (scene.login("bob").await, scene.a.login().await);
    accept(&mut bob.1).await;
    assert_eq!(bob.0.line().await, OK);
    let mut alice = scene.login("alice").await;
    eventually("the queue", || metric(&scene.proxy, "vestibule_backend_queue_length", &[]) == 1.0).await;
    scene.table("alice b\nbob a\n").await;
    drop(bob);
    let mut there = scene.b.login().await;
    accept(&mut there).await;
    assert_eq!(alice.line().await, OK);
    assert!(!scene.a.has_pending_connection().await);
    scene.proxy.stop().await;
}

#[tokio::test]
async fn hold_of_a_mailbox_covers_its_aliases_and_blocks_no_other_user() {
    let scene = Scene::new("balance: user-hash", "alice a\nalias a user=alice\nbob a\n").await;
    let (hold, _) = operations(&scene.proxy).hold("alice").await.unwrap();
    let mut alias = scene.login("alias").await;
    // There is one worker, so that a busy loop would block this login.
    let mut bob = scene.login("bob").await;
    accept(&mut scene.a.login().await).await;
    assert_eq!(bob.line().await, OK);
    assert!(!scene.a.has_pending_connection().await);
    let lookups = metric(&scene.proxy, "vestibule_route_lookups_total", &[]);
    assert!(lookups < 10.0, "{lookups} lookups: a login on hold must not query the routes repeatedly");
    drop(hold);
    accept(&mut scene.a.login().await).await;
    assert_eq!(alias.line().await, OK);
    scene.proxy.stop().await;
}

/// An HTTP directory that delays its first answer until `release` is sent.
async fn directory(release: tokio::sync::oneshot::Receiver<()>, queried: Arc<tokio::sync::Notify>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let mut release = Some(release);
    tokio::spawn(async move {
        while let Ok((socket, _)) = listener.accept().await {
            let (mut release, queried) = (release.take(), queried.clone());
            tokio::spawn(async move {
                let mut line = LineStream::new(socket);
                let mut backend = if release.is_some() { "a" } else { "b" };
                loop {
                    let mut length = 0;
                    loop {
                        let header = line.line().await.to_ascii_lowercase();
                        if let Some(value) = header.strip_prefix("content-length:") {
                            length = value.trim().parse().unwrap();
                        }
                        if header.is_empty() {
                            break;
                        }
                    }
                    if length == 0 || line.bytes(length).await.is_none() {
                        return;
                    }
                    if let Some(release) = release.take() {
                        queried.notify_one();
                        let _ = release.await;
                    }
                    let body = format!("{{\"backend\": \"{backend}\"}}");
                    let head =
                        format!("HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {}", body.len());
                    line.send(format!("{head}\r\n\r\n{body}")).await;
                    backend = "b";
                }
            });
        }
    });
    address
}

#[tokio::test]
async fn move_reaches_a_login_during_its_lookup() {
    let (release, released) = tokio::sync::oneshot::channel();
    let queried = Arc::new(tokio::sync::Notify::new());
    let url = format!("http://{}/", directory(released, queried.clone()).await);
    let (a, b) = (ManualServer::new().await, ManualServer::new().await);
    let proxy = proxy(&format!(
        "backends: {{a: {{servers: ['{}']}}, b: {{servers: ['{}']}}}}\nlimits: {{lookup: 30s}}\n\
         routes: [{{http: {{url: '{url}', style: json, timeout: 30s, cache: off}}}}]\n",
        a.address(),
        b.address()
    ))
    .await;
    let mut alice = login(&proxy).await;
    with_timeout("the lookup", queried.notified()).await;
    with_timeout("the move", operations(&proxy).move_user("alice", "b", TIMEOUT / 2)).await.unwrap();
    let mut there = b.login().await;
    // The delayed answer names the old backend and must be ignored.
    release.send(()).unwrap();
    accept(&mut there).await;
    assert_eq!(alice.line().await, OK);
    assert!(!a.has_pending_connection().await);
    proxy.stop().await;
}
