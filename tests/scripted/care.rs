//! Servers that die, hang, fill up and are drained: which one a login goes to, and that its client sees nothing of it.

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
/// By the user's name like user-hash, but a user may be on two servers at once: a login leaves the others alone.
const NOT_STICKY: &str = "balance: {kind: bounded-hash, factor: 10}";
const BALANCES: [&str; 4] = ["user-hash", "bounded-hash", "least-sessions", "round-robin"];

/// A mailbox server that everybody may log in to, and that can be stopped, started again and told to be silent.
struct Mailbox {
    address: SocketAddr,
    /// Accepts, and says nothing.
    silent: Arc<AtomicBool>,
    connections: Arc<AtomicUsize>,
    logins: Arc<AtomicUsize>,
    accepting: Mutex<JoinHandle<()>>,
}

impl Mailbox {
    async fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mailbox = Self {
            address: listener.local_addr().unwrap(),
            silent: Arc::default(),
            connections: Arc::default(),
            logins: Arc::default(),
            accepting: Mutex::new(tokio::spawn(async {})),
        };
        mailbox.serve(listener);
        mailbox
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

    /// From now on connections are refused.
    async fn stop(&self) {
        let accepting = {
            let mut accepting = self.accepting.lock().unwrap();
            accepting.abort();
            std::mem::replace(&mut *accepting, tokio::spawn(async {}))
        };
        // When it has ended, the socket is closed.
        let _ = accepting.await;
    }

    async fn start(&self) {
        self.serve(TcpListener::bind(self.address).await.unwrap());
    }

    fn be_silent(&self, silent: bool) {
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
        let said = line.line().await;
        let Some((tag, command)) = said.split_once(' ') else { return };
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

/// Two servers of one backend, in an order in which the first is alice's.
async fn pair(care: &str, more: &str) -> (Running, Mailbox, Mailbox) {
    let (one, other) = (Mailbox::new().await, Mailbox::new().await);
    let text = format!(
        "backends: {{pair: {{servers: ['{}', '{}'], {care}}}}}\nroutes: [{{default: pair}}]\n{more}",
        one.address, other.address
    );
    let proxy = proxy(&text).await;
    let backend = proxy.snapshot().backends.named("pair").unwrap().clone();
    let first = with_timeout("the order", backend.candidates("alice")).await[0].name.to_string();
    if first == one.address.to_string() { (proxy, one, other) } else { (proxy, other, one) }
}

fn server(proxy: &Running, mailbox: &Mailbox) -> Arc<Server> {
    let servers = proxy.snapshot().backends.list()[0].servers();
    servers.into_iter().find(|server| *server.name == *mailbox.address.to_string()).unwrap()
}

fn up(proxy: &Running, mailbox: &Mailbox) -> f64 {
    metric(proxy, "vestibule_server_up", &[&mailbox.address.to_string()])
}

/// A session of alice's that has logged in.
async fn session(proxy: &Running) -> Client {
    let mut client = Client::connect(proxy.listeners()[0]).await;
    assert_eq!(client.command("a LOGIN alice secret").await, "a OK [CAPABILITY IMAP4rev1] in");
    client
}

/// A login that has been sent and not answered yet.
async fn asked(proxy: &Running) -> Client {
    let mut client = Client::connect(proxy.listeners()[0]).await;
    client.send("a LOGIN alice secret\r\n").await;
    client
}

fn queue_length(proxy: &Running) -> f64 {
    metric(proxy, "vestibule_backend_queue_length", &[])
}

#[tokio::test]
async fn a_refused_connection_opens_the_breaker_at_once_and_a_check_closes_it() {
    let (proxy, first, other) = pair("check: {interval: 100ms}", "").await;
    session(&proxy).await;
    assert_eq!(first.logins(), 1);
    first.stop().await;
    session(&proxy).await;
    assert_eq!((other.logins(), up(&proxy, &first)), (1, 0.0), "the client has seen nothing of it");
    first.start().await;
    eventually("the server's return", || up(&proxy, &first) == 1.0).await;
    session(&proxy).await;
    assert_eq!((first.logins(), other.logins()), (2, 1), "alice is at home again");
}

#[tokio::test]
async fn checks_notice_a_server_that_hangs_before_anybody_logs_in() {
    let (proxy, first, other) = pair("check: {interval: 100ms, timeout: 100ms, fall: 2}", "").await;
    first.be_silent(true);
    eventually("the checks", || up(&proxy, &first) == 0.0).await;
    assert_eq!(
        metric(&proxy, "vestibule_server_breaker", &[&first.address.to_string()]),
        0.0,
        "no login was lost on it"
    );
    session(&proxy).await;
    assert_eq!((first.logins(), other.logins(), up(&proxy, &other)), (0, 1, 1.0));
    let failed = ["kind=\"imap\"", "outcome=\"failed\"", &first.address.to_string()];
    assert!(metric(&proxy, "vestibule_server_checks_total", &failed) >= 2.0);
    first.be_silent(false);
    eventually("the server's return", || up(&proxy, &first) == 1.0).await;
    session(&proxy).await;
    assert_eq!(first.logins(), 1);
}

#[tokio::test]
async fn a_check_tells_what_servers_offer() {
    let (proxy, _first, _other) = pair("check: {interval: 100ms}", "").await;
    let offered = || async {
        let mut client = Client::connect_only(proxy.listeners()[0]).await;
        client.line().await.contains("AUTH=XOAUTH2")
    };
    with_timeout("the offer", async { while !offered().await {} }).await;
}

#[tokio::test]
async fn some_failures_in_a_row_open_the_breaker() {
    let (proxy, first, other) = pair("check: off, breaker: {failures: 3}", "limits: {connect: 200ms}\n").await;
    first.be_silent(true);
    for logins in 1..=3 {
        assert_eq!(up(&proxy, &first), 1.0);
        session(&proxy).await;
        assert_eq!((first.connections(), other.logins()), (logins, logins));
    }
    assert_eq!(up(&proxy, &first), 0.0);
    session(&proxy).await;
    assert_eq!(first.connections(), 3, "it is passed over");
}

#[tokio::test]
async fn one_login_at_a_time_tries_a_server_out() {
    let (proxy, first, other) = pair(NOT_STICKY, "limits: {connect: 2s}\n").await;
    first.stop().await;
    session(&proxy).await;
    assert_eq!(up(&proxy, &first), 0.0);
    first.be_silent(true);
    first.start().await;
    let there = server(&proxy, &first);
    eventually("the end of the pause", || there.is_available()).await;
    let mut trial = asked(&proxy).await;
    eventually("the trial", || first.connections() == 1).await;
    assert_eq!(metric(&proxy, "vestibule_server_breaker", &[&first.address.to_string()]), 1.0);
    for _ in 0..8 {
        session(&proxy).await;
    }
    assert_eq!((first.connections(), other.logins()), (1, 9), "nobody else");
    assert_eq!(trial.line().await, "a OK [CAPABILITY IMAP4rev1] in", "and its client has lost nothing");
    assert_eq!(other.logins(), 10);
    first.be_silent(false);
    eventually("the end of the pause", || there.is_available()).await;
    session(&proxy).await;
    assert_eq!((first.logins(), up(&proxy, &first)), (1, 1.0));
}

#[tokio::test]
async fn what_a_client_provokes_opens_no_breaker() {
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
async fn a_server_that_dies_before_its_answer_costs_nobody_a_login() {
    let (at_once, greeted) = ("", "S: * OK [CAPABILITY IMAP4rev1] x");
    let login_read = "S: * OK [CAPABILITY IMAP4rev1] x\nC: *";
    for balance in BALANCES {
        // With user-hash a server that may have the login keeps it: the client may have caused the server's end.
        let ways: &[&str] = if balance == "user-hash" { &[at_once] } else { &[at_once, greeted, login_read] };
        for broken in ways {
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
async fn a_refused_password_is_tried_on_no_other_server_by_any_balance() {
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
        assert_eq!(taken, 0, "its place is free again");
    }
}

#[tokio::test]
async fn turns_and_counts_share_sessions_out() {
    for balance in ["round-robin", "least-sessions"] {
        let (proxy, one, other) = pair(&format!("balance: {balance}"), "").await;
        // To find out which is alice's, a turn was spent.
        let mut sessions = Vec::new();
        for _ in 0..6 {
            sessions.push(session(&proxy).await);
        }
        assert_eq!((one.logins(), other.logins()), (3, 3), "{balance}");
    }
}

#[tokio::test]
async fn a_server_that_comes_back_is_given_little_at_first() {
    for (slow, expected) in [("slow_start: 1h, ", 0..=2), ("", 5..=7)] {
        let (proxy, first, _other) = pair(&format!("{slow}balance: round-robin, check: {{interval: 100ms}}"), "").await;
        first.stop().await;
        session(&proxy).await;
        session(&proxy).await;
        assert_eq!(up(&proxy, &first), 0.0, "one of two turns was there");
        first.start().await;
        eventually("the server's return", || up(&proxy, &first) == 1.0).await;
        let before = first.logins();
        for _ in 0..12 {
            session(&proxy).await;
        }
        let taken = first.logins() - before;
        assert!(expected.contains(&taken), "{slow:?}: {taken} of twelve");
    }
}

#[tokio::test]
async fn logins_wait_for_a_place_in_order_and_not_without_bound() {
    let server = Mailbox::new().await;
    let text = format!(
        "backends: {{only: {{servers: [{{address: '{}', max_sessions: 1}}], queue: {{length: 2, timeout: 10s}}}}}}\nroutes: [{{default: only}}]\n",
        server.address
    );
    let proxy = proxy(&text).await;
    let first = session(&proxy).await;
    let mut second = asked(&proxy).await;
    eventually("the second in the queue", || queue_length(&proxy) == 1.0).await;
    let mut third = asked(&proxy).await;
    eventually("the third in the queue", || queue_length(&proxy) == 2.0).await;
    assert_eq!(asked(&proxy).await.line().await, UNAVAILABLE, "the queue is full");
    assert_eq!(metric(&proxy, "vestibule_failures_total", &["reason=\"servers_full\""]), 1.0);
    assert_eq!((server.connections(), up(&proxy, &server)), (1, 1.0), "a full server is alive");
    drop(first);
    assert_eq!(second.line().await, "a OK [CAPABILITY IMAP4rev1] in");
    assert_eq!((server.logins(), queue_length(&proxy)), (2, 1.0), "one place, one login");
    assert_eq!(metric(&proxy, "vestibule_server_sessions", &[]), 1.0);
    drop(second);
    assert_eq!(third.line().await, "a OK [CAPABILITY IMAP4rev1] in");
    assert_eq!(queue_length(&proxy), 0.0);
    drop(third);
    eventually("the place", || proxy.snapshot().backends.list()[0].servers()[0].sessions() == 0).await;
}

#[tokio::test]
async fn who_waits_too_long_is_refused_and_who_leaves_the_queue_is_forgotten() {
    let server = Mailbox::new().await;
    let text = format!(
        "backends: {{only: {{servers: ['{}'], max_sessions: 1, queue: {{length: 1, timeout: 200ms}}}}}}\nroutes: [{{default: only}}]\n",
        server.address
    );
    let proxy = proxy(&text).await;
    let first = session(&proxy).await;
    assert_eq!(asked(&proxy).await.line().await, UNAVAILABLE);
    assert_eq!(queue_length(&proxy), 0.0);
    drop(first);
    eventually("the place", || proxy.snapshot().backends.list()[0].servers()[0].sessions() == 0).await;
    session(&proxy).await;
}

#[tokio::test]
async fn a_full_server_is_passed_over_unless_the_user_belongs_there() {
    for (balance, goes_on) in
        [("user-hash", false), ("bounded-hash", true), ("least-sessions", true), ("round-robin", true)]
    {
        let care = format!("balance: {balance}, max_sessions: 1, queue: {{length: 0}}");
        let (proxy, one, other) = pair(&care, "").await;
        let _first = session(&proxy).await;
        let mut second = asked(&proxy).await;
        let expected = if goes_on { "a OK [CAPABILITY IMAP4rev1] in" } else { UNAVAILABLE };
        assert_eq!(second.line().await, expected, "{balance}");
        assert_eq!(one.logins() + other.logins(), if goes_on { 2 } else { 1 }, "{balance}");
        assert_eq!(asked(&proxy).await.line().await, UNAVAILABLE, "{balance}: now all are");
    }
}

#[tokio::test]
async fn a_drained_server_keeps_its_sessions_and_gets_no_logins() {
    let (proxy, first, other) = pair(NOT_STICKY, "").await;
    let mut old = session(&proxy).await;
    let there = server(&proxy, &first);
    there.set_admin_state(Some(AdminState::Drain));
    let address = first.address.to_string();
    assert_eq!((metric(&proxy, "vestibule_server_state", &[&address]), up(&proxy, &first)), (1.0, 1.0));
    session(&proxy).await;
    assert_eq!((first.logins(), other.logins()), (1, 1));
    assert_eq!(old.command("b NOOP").await, "b OK done", "the session goes on");
    there.set_admin_state(Some(AdminState::Down));
    assert_eq!((metric(&proxy, "vestibule_server_state", &[&address]), up(&proxy, &first)), (2.0, 0.0));
    session(&proxy).await;
    // Not even where no other is left.
    server(&proxy, &other).set_admin_state(Some(AdminState::Drain));
    assert_eq!(asked(&proxy).await.line().await, UNAVAILABLE);
    assert_eq!(metric(&proxy, "vestibule_failures_total", &["reason=\"no_server\""]), 1.0);
    there.set_admin_state(None);
    session(&proxy).await;
    assert_eq!((first.logins(), other.logins(), up(&proxy, &first)), (2, 2, 1.0));
}

#[tokio::test]
async fn a_server_that_is_down_by_the_configuration_is_left_alone() {
    let (down, up) = (Mailbox::new().await, Mailbox::new().await);
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
async fn an_account_logs_in_and_out_for_a_check() {
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
        assert_eq!(metric(&proxy, "vestibule_logins_total", &[]), 0.0, "nobody's login");
    }
}

#[tokio::test]
async fn checks_of_connection_and_certificate() {
    let (certificates, strangers) = (Certificates::new(), Certificates::new());
    let starttls = "S: * OK [CAPABILITY IMAP4rev1 STARTTLS] x\nC: S STARTTLS\nS: S OK go\n!TLS\n...";
    for (kind, mode, script, ca, passes) in [
        ("tcp", "implicit", "...", &certificates, true),
        ("tls", "implicit", "!TLS\n...", &certificates, true),
        ("tls", "implicit", "!TLS\n...", &strangers, false),
        ("tls", "implicit", "...", &certificates, false),
        ("tls", "starttls", starttls, &certificates, true),
        ("tls", "starttls", starttls, &strangers, false),
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
        let ends = metric(&proxy, "vestibule_server_certificate_expiry_timestamp_seconds", &[]);
        // The test's certificates end in the year 4096.
        assert_eq!(ends > 60e9, passes && kind != "tcp", "{kind} {mode} {script}: {ends}");
        proxy.stop().await;
    }
}

#[tokio::test]
async fn a_login_with_no_other_choice_goes_to_a_server_that_is_failing() {
    let server = Mailbox::new().await;
    server.stop().await;
    let text = format!("backends: {{only: {{servers: ['{}']}}}}\nroutes: [{{default: only}}]\n", server.address);
    let proxy = proxy(&text).await;
    assert_eq!(asked(&proxy).await.line().await, UNAVAILABLE);
    assert_eq!(up(&proxy, &server), 0.0);
    server.start().await;
    let before = std::time::Instant::now();
    session(&proxy).await;
    assert!(before.elapsed() < Duration::from_secs(1), "within its pause");
    assert_eq!(up(&proxy, &server), 1.0);
}
