//! Which server a login uses: breaker, checks, balances, queue and administrative states.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use vestibule::admin_state::AdminState;
use vestibule::backend::Server;
use vestibule::server::Running;

use crate::support::{
    ACCEPTS_ALICE, Certificates, Client, LineStream, ScriptedServer, eventually, metric, proxy, with_timeout,
};

const UNAVAILABLE: &str = "a NO [UNAVAILABLE] The mailbox is temporarily unavailable, try again later.";
/// The order is that of user-hash, but a user may have sessions on two servers.
const NOT_STICKY: &str = "balance: {kind: bounded-hash, factor: 10}";
const BALANCES: [&str; 4] = ["user-hash", "bounded-hash", "least-sessions", "round-robin"];

/// A server that accepts every login, and that can be stopped, started and silenced.
struct ControlledServer {
    address: SocketAddr,
    /// Whether connections are accepted but not greeted.
    silent: Arc<AtomicBool>,
    connections: Arc<AtomicUsize>,
    logins: Arc<AtomicUsize>,
    accepting: Mutex<JoinHandle<()>>,
}

impl ControlledServer {
    async fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let server = Self {
            address: listener.local_addr().unwrap(),
            silent: Arc::default(),
            connections: Arc::default(),
            logins: Arc::default(),
            accepting: Mutex::new(tokio::spawn(async {})),
        };
        server.serve(listener);
        server
    }

    fn serve(&self, listener: TcpListener) {
        let (silent, connections, logins) = (self.silent.clone(), self.connections.clone(), self.logins.clone());
        *self.accepting.lock().unwrap() = tokio::spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                connections.fetch_add(1, Ordering::SeqCst);
                tokio::spawn(serve(LineStream::new(socket), silent.load(Ordering::SeqCst), logins.clone()));
            }
        });
    }

    /// Refuses connections from now on.
    async fn stop(&self) {
        let accepting = {
            let mut accepting = self.accepting.lock().unwrap();
            accepting.abort();
            std::mem::replace(&mut *accepting, tokio::spawn(async {}))
        };
        // The socket is closed when the task has ended.
        let _ = accepting.await;
    }

    async fn start(&self) {
        self.serve(TcpListener::bind(self.address).await.unwrap());
    }

    fn set_silent(&self, silent: bool) {
        self.silent.store(silent, Ordering::SeqCst);
    }

    fn connections(&self) -> usize {
        self.connections.load(Ordering::SeqCst)
    }

    fn logins(&self) -> usize {
        self.logins.load(Ordering::SeqCst)
    }
}

async fn serve(mut line: Client, silent: bool, logins: Arc<AtomicUsize>) {
    if silent {
        line.line().await;
        return;
    }
    line.send("* OK [CAPABILITY IMAP4rev1 AUTH=XOAUTH2] x\r\n").await;
    loop {
        let line_read = line.line().await;
        let Some((tag, command)) = line_read.split_once(' ') else { return };
        let answer = match command.split(' ').next() {
            Some("LOGIN") => {
                logins.fetch_add(1, Ordering::SeqCst);
                format!("{tag} OK [CAPABILITY IMAP4rev1] in\r\n")
            }
            _ => format!("{tag} OK done\r\n"),
        };
        line.send(answer).await;
    }
}

/// A proxy with two servers in one backend. The first is the one that user-hash selects for alice.
async fn pair(balancing: &str, more: &str) -> (Running, ControlledServer, ControlledServer) {
    let (one, other) = (ControlledServer::new().await, ControlledServer::new().await);
    let text = format!(
        "backends: {{pair: {{servers: ['{}', '{}'], {balancing}}}}}\nroutes: [{{default: pair}}]\n{more}",
        one.address, other.address
    );
    let proxy = proxy(&text).await;
    let backend = proxy.snapshot().backends.named("pair").unwrap().clone();
    let first = with_timeout("the order", backend.candidates("alice")).await[0].name.to_string();
    if first == one.address.to_string() { (proxy, one, other) } else { (proxy, other, one) }
}

fn server(proxy: &Running, server: &ControlledServer) -> Arc<Server> {
    let servers = proxy.snapshot().backends.list()[0].servers();
    servers.into_iter().find(|found| *found.name == *server.address.to_string()).unwrap()
}

fn up(proxy: &Running, server: &ControlledServer) -> f64 {
    metric(proxy, "vestibule_server_up", &[&server.address.to_string()])
}

/// A session of alice.
async fn session(proxy: &Running) -> Client {
    let mut client = Client::connect(proxy.listeners()[0]).await;
    assert_eq!(client.command("a LOGIN alice secret").await, "a OK [CAPABILITY IMAP4rev1] in");
    client
}

/// A login of alice that has been sent, but not answered yet.
async fn send_login(proxy: &Running) -> Client {
    let mut client = Client::connect(proxy.listeners()[0]).await;
    client.send("a LOGIN alice secret\r\n").await;
    client
}

fn queue_length(proxy: &Running) -> f64 {
    metric(proxy, "vestibule_backend_queue_length", &[])
}

#[tokio::test]
async fn breaker_opens_at_a_refused_connection_and_a_check_closes_it() {
    let (proxy, first, other) = pair("check: {interval: 100ms}", "").await;
    session(&proxy).await;
    assert_eq!(first.logins(), 1);
    first.stop().await;
    session(&proxy).await;
    assert_eq!((other.logins(), up(&proxy, &first)), (1, 0.0), "the client does not notice the fault");
    first.start().await;
    eventually("the recovery of the server", || up(&proxy, &first) == 1.0).await;
    session(&proxy).await;
    assert_eq!((first.logins(), other.logins()), (2, 1), "alice uses her server again");
}

#[tokio::test]
async fn checks_detect_a_hanging_server_before_any_login() {
    let (proxy, first, other) = pair("check: {interval: 100ms, timeout: 100ms, fall: 2}", "").await;
    first.set_silent(true);
    eventually("the checks", || up(&proxy, &first) == 0.0).await;
    assert_eq!(
        metric(&proxy, "vestibule_server_breaker", &[&first.address.to_string()]),
        0.0,
        "no login has failed there"
    );
    session(&proxy).await;
    assert_eq!((first.logins(), other.logins(), up(&proxy, &other)), (0, 1, 1.0));
    let failed = ["kind=\"imap\"", "outcome=\"failed\"", &first.address.to_string()];
    assert!(metric(&proxy, "vestibule_server_checks_total", &failed) >= 2.0);
    first.set_silent(false);
    eventually("the recovery of the server", || up(&proxy, &first) == 1.0).await;
    session(&proxy).await;
    assert_eq!(first.logins(), 1);
}

#[tokio::test]
async fn checks_update_the_offered_mechanisms() {
    let (proxy, _first, _other) = pair("check: {interval: 100ms}", "").await;
    let is_offered = || async {
        let mut client = Client::connect_only(proxy.listeners()[0]).await;
        client.line().await.contains("AUTH=XOAUTH2")
    };
    with_timeout("the offer", async { while !is_offered().await {} }).await;
}

#[tokio::test]
async fn breaker_opens_after_failures_in_a_row() {
    let (proxy, first, other) = pair("check: off, breaker: {failures: 3}", "limits: {connect: 200ms}\n").await;
    first.set_silent(true);
    for logins in 1..=3 {
        assert_eq!(up(&proxy, &first), 1.0);
        session(&proxy).await;
        assert_eq!((first.connections(), other.logins()), (logins, logins));
    }
    assert_eq!(up(&proxy, &first), 0.0);
    session(&proxy).await;
    assert_eq!(first.connections(), 3, "the server is skipped");
}

#[tokio::test]
async fn failing_server_is_tried_by_one_login_at_a_time() {
    let (proxy, first, other) = pair(NOT_STICKY, "limits: {connect: 2s}\n").await;
    first.stop().await;
    session(&proxy).await;
    assert_eq!(up(&proxy, &first), 0.0);
    first.set_silent(true);
    first.start().await;
    let there = server(&proxy, &first);
    eventually("the end of the pause", || there.is_available()).await;
    let mut trial = send_login(&proxy).await;
    eventually("the trial", || first.connections() == 1).await;
    assert_eq!(metric(&proxy, "vestibule_server_breaker", &[&first.address.to_string()]), 1.0);
    for _ in 0..8 {
        session(&proxy).await;
    }
    assert_eq!((first.connections(), other.logins()), (1, 9), "no other login tries the server");
    assert_eq!(trial.line().await, "a OK [CAPABILITY IMAP4rev1] in", "the login succeeds on the other server");
    assert_eq!(other.logins(), 10);
    first.set_silent(false);
    eventually("the end of the pause", || there.is_available()).await;
    session(&proxy).await;
    assert_eq!((first.logins(), up(&proxy, &first)), (1, 1.0));
}

#[tokio::test]
async fn breaker_ignores_faults_that_clients_can_cause() {
    let dies = ScriptedServer::new("S: * OK [CAPABILITY IMAP4rev1] x\nC: *").await;
    let text = format!(
        "backends: {{only: {{servers: ['{}'], breaker: {{failures: 1}}}}}}\nroutes: [{{default: only}}]\n",
        dies.address
    );
    let proxy = proxy(&text).await;
    for tried in 1..=3 {
        assert_eq!(Client::connect(proxy.listeners()[0]).await.command("a LOGIN alice secret").await, UNAVAILABLE);
        assert_eq!(dies.connections(), tried);
        assert_eq!(metric(&proxy, "vestibule_server_up", &[]), 1.0);
    }
}

#[tokio::test]
async fn server_that_dies_before_its_answer_fails_no_login() {
    let (closes_at_once, greeted) = ("", "S: * OK [CAPABILITY IMAP4rev1] x");
    let login_read = "S: * OK [CAPABILITY IMAP4rev1] x\nC: *";
    for balance in BALANCES {
        // With user-hash the login stays with a server that may have received it, because it may have caused the fault.
        let scripts: &[&str] =
            if balance == "user-hash" { &[closes_at_once] } else { &[closes_at_once, greeted, login_read] };
        for broken in scripts {
            let (bad, good) = (ScriptedServer::new(broken).await, ScriptedServer::new(ACCEPTS_ALICE).await);
            let servers = format!("'{}', '{}'", bad.address, good.address);
            let text = format!(
                "backends: {{pair: {{servers: [{servers}], balance: {balance}}}}}\nroutes: [{{default: pair}}]\n"
            );
            let proxy = proxy(&text).await;
            for login in 1..=4 {
                let mut client = Client::connect(proxy.listeners()[0]).await;
                let answer = client.command("a LOGIN alice secret").await;
                assert_eq!(answer, "a OK [CAPABILITY IMAP4rev1 IDLE] in", "{balance} {broken}");
                assert_eq!(good.connections(), login);
            }
        }
    }
}

#[tokio::test]
async fn refused_password_is_not_tried_on_another_server_with_any_balance() {
    let refuse = "S: * OK [CAPABILITY IMAP4rev1] x\nC: *\nS: L NO [AUTHENTICATIONFAILED] Wrong.";
    for balance in BALANCES {
        let (one, other) = (ScriptedServer::new(refuse).await, ScriptedServer::new(refuse).await);
        let servers = format!("'{}', '{}'", one.address, other.address);
        let text =
            format!("backends: {{pair: {{servers: [{servers}], balance: {balance}}}}}\nroutes: [{{default: pair}}]\n");
        let proxy = proxy(&text).await;
        let mut client = Client::connect(proxy.listeners()[0]).await;
        assert_eq!(client.command("a LOGIN alice wrong").await, "a NO [AUTHENTICATIONFAILED] Wrong.");
        assert_eq!(one.connections() + other.connections(), 1, "{balance}");
        let taken = proxy.snapshot().backends.list()[0].servers().iter().map(|server| server.sessions()).sum::<u32>();
        assert_eq!(taken, 0, "the permit is returned");
    }
}

#[tokio::test]
async fn round_robin_and_least_sessions_share_sessions_evenly() {
    for balance in ["round-robin", "least-sessions"] {
        let (proxy, one, other) = pair(&format!("balance: {balance}"), "").await;
        // `pair` has used one turn.
        let mut sessions = Vec::new();
        for _ in 0..6 {
            sessions.push(session(&proxy).await);
        }
        assert_eq!((one.logins(), other.logins()), (3, 3), "{balance}");
    }
}

#[tokio::test]
async fn slow_start_limits_logins_of_a_recovered_server() {
    for (slow, expected) in [("slow_start: 1h, ", 0..=2), ("", 5..=7)] {
        let (proxy, first, _other) = pair(&format!("{slow}balance: round-robin, check: {{interval: 100ms}}"), "").await;
        first.stop().await;
        session(&proxy).await;
        session(&proxy).await;
        assert_eq!(up(&proxy, &first), 0.0, "one of two turns was on the failed server");
        first.start().await;
        eventually("the recovery of the server", || up(&proxy, &first) == 1.0).await;
        let before = first.logins();
        for _ in 0..12 {
            session(&proxy).await;
        }
        let taken = first.logins() - before;
        assert!(expected.contains(&taken), "{slow:?}: {taken} of 12");
    }
}

#[tokio::test]
async fn queue_serves_logins_in_order_and_is_bounded() {
    let server = ControlledServer::new().await;
    let text = format!(
        "backends: {{only: {{servers: [{{address: '{}', max_sessions: 1}}], queue: {{length: 2, timeout: 10s}}}}}}\nroutes: [{{default: only}}]\n",
        server.address
    );
    let proxy = proxy(&text).await;
    let first = session(&proxy).await;
    let mut second = send_login(&proxy).await;
    eventually("the second in the queue", || queue_length(&proxy) == 1.0).await;
    let mut third = send_login(&proxy).await;
    eventually("the third in the queue", || queue_length(&proxy) == 2.0).await;
    assert_eq!(send_login(&proxy).await.line().await, UNAVAILABLE, "the queue is full");
    assert_eq!(metric(&proxy, "vestibule_failures_total", &["reason=\"servers_full\""]), 1.0);
    assert_eq!((server.connections(), up(&proxy, &server)), (1, 1.0), "a full server is alive");
    drop(first);
    assert_eq!(second.line().await, "a OK [CAPABILITY IMAP4rev1] in");
    assert_eq!((server.logins(), queue_length(&proxy)), (2, 1.0), "one permit, one login");
    assert_eq!(metric(&proxy, "vestibule_server_sessions", &[]), 1.0);
    drop(second);
    assert_eq!(third.line().await, "a OK [CAPABILITY IMAP4rev1] in");
    assert_eq!(queue_length(&proxy), 0.0);
    drop(third);
    eventually("the permit", || proxy.snapshot().backends.list()[0].servers()[0].sessions() == 0).await;
}

#[tokio::test]
async fn queue_timeout_refuses_the_login_and_leaves_no_waiter() {
    let server = ControlledServer::new().await;
    let text = format!(
        "backends: {{only: {{servers: ['{}'], max_sessions: 1, queue: {{length: 1, timeout: 200ms}}}}}}\nroutes: [{{default: only}}]\n",
        server.address
    );
    let proxy = proxy(&text).await;
    let first = session(&proxy).await;
    assert_eq!(send_login(&proxy).await.line().await, UNAVAILABLE);
    assert_eq!(queue_length(&proxy), 0.0);
    drop(first);
    eventually("the permit", || proxy.snapshot().backends.list()[0].servers()[0].sessions() == 0).await;
    session(&proxy).await;
}

#[tokio::test]
async fn full_server_is_skipped_unless_the_balance_is_sticky() {
    for (balance, tries_next) in
        [("user-hash", false), ("bounded-hash", true), ("least-sessions", true), ("round-robin", true)]
    {
        let balancing = format!("balance: {balance}, max_sessions: 1, queue: {{length: 0}}");
        let (proxy, one, other) = pair(&balancing, "").await;
        let _first = session(&proxy).await;
        let mut second = send_login(&proxy).await;
        let expected = if tries_next { "a OK [CAPABILITY IMAP4rev1] in" } else { UNAVAILABLE };
        assert_eq!(second.line().await, expected, "{balance}");
        assert_eq!(one.logins() + other.logins(), if tries_next { 2 } else { 1 }, "{balance}");
        assert_eq!(send_login(&proxy).await.line().await, UNAVAILABLE, "{balance}: both servers are full");
    }
}

#[tokio::test]
async fn drained_server_keeps_its_sessions_and_receives_no_logins() {
    let (proxy, first, other) = pair(NOT_STICKY, "").await;
    let mut old = session(&proxy).await;
    let there = server(&proxy, &first);
    there.set_admin_state(Some(AdminState::Drain));
    let address = first.address.to_string();
    assert_eq!((metric(&proxy, "vestibule_server_state", &[&address]), up(&proxy, &first)), (1.0, 1.0));
    session(&proxy).await;
    assert_eq!((first.logins(), other.logins()), (1, 1));
    assert_eq!(old.command("b NOOP").await, "b OK done", "the session continues");
    there.set_admin_state(Some(AdminState::Down));
    assert_eq!((metric(&proxy, "vestibule_server_state", &[&address]), up(&proxy, &first)), (2.0, 0.0));
    session(&proxy).await;
    // It is not used even if there is no other server.
    server(&proxy, &other).set_admin_state(Some(AdminState::Drain));
    assert_eq!(send_login(&proxy).await.line().await, UNAVAILABLE);
    assert_eq!(metric(&proxy, "vestibule_failures_total", &["reason=\"no_server\""]), 1.0);
    there.set_admin_state(None);
    session(&proxy).await;
    assert_eq!((first.logins(), other.logins(), up(&proxy, &first)), (2, 2, 1.0));
}

#[tokio::test]
async fn server_configured_as_down_receives_no_checks_and_no_logins() {
    let (down, up) = (ControlledServer::new().await, ControlledServer::new().await);
    let text = format!(
        "backends: {{pair: {{servers: [{{address: '{}', state: down}}, '{}'], check: {{interval: 100ms}}}}}}\nroutes: [{{default: pair}}]\n",
        down.address, up.address
    );
    let proxy = proxy(&text).await;
    eventually("checks", || up.connections() >= 3).await;
    session(&proxy).await;
    assert_eq!((down.connections(), up.logins()), (0, 1), "neither checks nor logins");
    server(&proxy, &down).set_admin_state(Some(AdminState::Up));
    eventually("a check", || down.connections() > 0).await;
}

#[tokio::test]
async fn login_check_logs_an_account_in_and_out() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("password"), "hunter2\n").unwrap();
    let dialogue = |answer: &str| {
        format!(
            "S: * OK [CAPABILITY IMAP4rev1] x\nC: L LOGIN \"probe\" \"hunter2\"\nS: L {answer}\nC: Q LOGOUT\nS: * BYE x\nS: Q OK x"
        )
    };
    for (answer, outcome) in
        [("OK [CAPABILITY IMAP4rev1] in", "passed"), ("NO [AUTHENTICATIONFAILED] x", "failed"), ("BAD x", "failed")]
    {
        let server = ScriptedServer::new(&dialogue(answer)).await;
        let check = format!(
            "{{kind: login, interval: 100ms, fall: 2, account: probe, password_file: {}}}",
            folder.path().join("password").display()
        );
        let text = format!(
            "backends: {{only: {{servers: ['{}'], check: {check}}}}}\nroutes: [{{default: only}}]\n",
            server.address
        );
        let proxy = proxy(&text).await;
        let counted = |outcome: &str| {
            let labels = ["kind=\"login\"".to_owned(), format!("outcome=\"{outcome}\"")];
            metric(&proxy, "vestibule_server_checks_total", &[&labels[0], &labels[1]])
        };
        eventually("checks", || counted(outcome) >= 3.0).await;
        assert_eq!(counted("passed") + counted("failed"), counted(outcome), "{answer}");
        assert_eq!(metric(&proxy, "vestibule_server_up", &[]), f64::from(outcome == "passed"), "{answer}");
        assert_eq!(metric(&proxy, "vestibule_logins_total", &[]), 0.0, "checks do not count as logins");
    }
}

#[tokio::test]
async fn checks_test_connection_certificate_and_greeting() {
    let (certificates, other_certificates) = (Certificates::new(), Certificates::new());
    let starttls = "S: * OK [CAPABILITY IMAP4rev1 STARTTLS] x\nC: S STARTTLS\nS: S OK go\n!TLS\n...";
    for (kind, mode, script, ca, passes) in [
        ("tcp", "implicit", "...", &certificates, true),
        ("tls", "implicit", "!TLS\n...", &certificates, true),
        ("tls", "implicit", "!TLS\n...", &other_certificates, false),
        ("tls", "implicit", "...", &certificates, false),
        ("tls", "starttls", starttls, &certificates, true),
        ("tls", "starttls", starttls, &other_certificates, false),
        ("tls", "starttls", "S: * OK [CAPABILITY IMAP4rev1] no tls\n...", &certificates, false),
        ("imap", "implicit", "!TLS\nS: * OK [CAPABILITY IMAP4rev1] x\n...", &certificates, true),
        ("imap", "implicit", "!TLS\n...", &certificates, false),
    ] {
        let server = ScriptedServer::with_tls(script, &certificates).await;
        let ca = ca.path("ca.pem");
        let text = format!(
            "backends: {{only: {{servers: ['{}'], tls: {{mode: {mode}, ca: {}}}, check: {{kind: {kind}, interval: 100ms, timeout: 500ms, fall: 1}}}}}}\nroutes: [{{default: only}}]\n",
            server.address,
            ca.display()
        );
        let proxy = proxy(&text).await;
        let outcome = if passes { "outcome=\"passed\"" } else { "outcome=\"failed\"" };
        eventually(&format!("{kind} {mode} {script}"), || {
            metric(&proxy, "vestibule_server_checks_total", &[&format!("kind=\"{kind}\""), outcome]) >= 2.0
        })
        .await;
        assert_eq!(metric(&proxy, "vestibule_server_up", &[]), f64::from(passes), "{kind} {mode} {script}");
        let expiry = metric(&proxy, "vestibule_server_certificate_expiry_timestamp_seconds", &[]);
        // The certificates of the tests expire in the year 4096.
        assert_eq!(expiry > 60e9, passes && kind != "tcp", "{kind} {mode} {script}: {expiry}");
        proxy.stop().await;
    }
}

#[tokio::test]
async fn failing_server_is_used_if_there_is_no_other() {
    let server = ControlledServer::new().await;
    server.stop().await;
    let text = format!("backends: {{only: {{servers: ['{}']}}}}\nroutes: [{{default: only}}]\n", server.address);
    let proxy = proxy(&text).await;
    assert_eq!(send_login(&proxy).await.line().await, UNAVAILABLE);
    assert_eq!(up(&proxy, &server), 0.0);
    server.start().await;
    let before = std::time::Instant::now();
    session(&proxy).await;
    assert!(before.elapsed() < Duration::from_secs(1), "within the pause of the breaker");
    assert_eq!(up(&proxy, &server), 1.0);
}
