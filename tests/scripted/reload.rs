//! Reloads: sessions continue, new logins use the new configuration, and an invalid file changes nothing.

use std::net::SocketAddr;

use vestibule::server::Running;

use crate::support::*;

/// A proxy with a configuration file that can be replaced.
struct Fixture {
    folder: tempfile::TempDir,
    proxy: Running,
}

impl Fixture {
    async fn new(text: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("vestibule.yaml");
        std::fs::write(&file, text).unwrap();
        let proxy = vestibule::server::start(vestibule::config::load(&file).unwrap(), Vec::new()).await.unwrap();
        Self { folder, proxy }
    }

    async fn reload(&self, text: &str) -> anyhow::Result<vestibule::server::Reloaded> {
        let file = self.folder.path().join("vestibule.yaml");
        std::fs::write(&file, text).unwrap();
        with_timeout("a reload", self.proxy.reload(&file)).await
    }

    fn address(&self) -> SocketAddr {
        self.proxy.listeners()[0]
    }
}

fn configuration(backends: &str, more: &str) -> String {
    format!("listeners: [{{address: '127.0.0.1:0', tls: none}}]\nlimits: {{workers: 2}}\n{backends}\n{more}")
}

async fn is_greeted(address: SocketAddr) -> bool {
    Client::connect_only(address).await.line().await.starts_with("* OK")
}

#[tokio::test]
async fn logins_follow_the_new_configuration_and_sessions_continue() {
    let (one, two) = (ScriptedServer::new(ACCEPTS_ALICE).await, ScriptedServer::new(ACCEPTS_ALICE).await);
    let to = |server: &ScriptedServer| {
        configuration(
            &format!("backends: {{only: {{servers: ['{}'], check: off}}}}", server.address),
            "routes: [{default: only}]",
        )
    };
    let fixture = Fixture::new(&to(&one)).await;
    let mut before = Client::connect(fixture.address()).await;
    assert!(before.command("a LOGIN alice secret").await.starts_with("a OK"));
    let mut waiting = Client::connect(fixture.address()).await;
    for _ in 0..20 {
        fixture.reload(&to(&two)).await.unwrap();
    }
    let mut after = Client::connect(fixture.address()).await;
    assert!(after.command("a LOGIN bob secret").await.starts_with("a NO"), "the server accepts only alice");
    assert_eq!((one.connections(), two.connections()), (1, 1));
    assert_eq!(before.command("b NOOP").await, "b OK relayed");
    // A client that connected before the reloads is routed by the last configuration too. A user has only one server, so the
    // first session ends.
    assert!(waiting.command("a LOGIN alice secret").await.starts_with("a OK"));
    assert_eq!((one.connections(), two.connections()), (1, 2));
    before.assert_closed().await;
    assert_eq!(metric(&fixture.proxy, "vestibule_reloads_total", &["loaded"]), 20.0);
    assert_eq!(metric(&fixture.proxy, "vestibule_backend_sessions", &[]), 1.0, "counters survive reloads");
    drop((before, waiting, after));
    eventually("the end", || metric(&fixture.proxy, "vestibule_connections", &[]) == 0.0).await;
    fixture.proxy.stop().await;
}

/// An old configuration would keep its routes and their connections to directories.
#[tokio::test]
async fn established_session_does_not_keep_the_old_configuration() {
    let server = ScriptedServer::new(ACCEPTS_ALICE).await;
    let text = |more: &str| {
        let backends = format!("backends: {{only: {{servers: ['{}'], check: off}}}}", server.address);
        configuration(&backends, &format!("routes: [{{default: only}}]\n{more}"))
    };
    let fixture = Fixture::new(&text("")).await;
    let mut session = Client::connect(fixture.address()).await;
    assert!(session.command("a LOGIN alice secret").await.starts_with("a OK"));
    let before = std::sync::Arc::downgrade(&fixture.proxy.snapshot());
    fixture.reload(&text("log: {level: warn}")).await.unwrap();
    eventually("the end of the old configuration", || before.strong_count() == 0).await;
    assert_eq!(session.command("b NOOP").await, "b OK relayed");
    fixture.proxy.stop().await;
}

#[tokio::test]
async fn invalid_file_is_reported_and_changes_nothing() {
    let server = ScriptedServer::new(ACCEPTS_ALICE).await;
    let backends = format!("backends: {{only: {{servers: ['{}'], check: off}}}}", server.address);
    let good = configuration(&backends, "routes: [{default: only}]");
    let fixture = Fixture::new(&good).await;
    for (text, expected) in [
        (configuration(&backends, "routes: [{default: onyl}]"), "vestibule.yaml:4:"),
        (configuration(&backends, "routes: [{table: absent.txt}]"), "absent.txt: No such file"),
        (
            configuration(&backends, "routes: [{default: only}]\ntls: {certificates: [{cert: a.pem, key: b.pem}]}"),
            "a.pem",
        ),
        ("listeners: [".to_owned(), "invalid YAML"),
    ] {
        let error = fixture.reload(&text).await.unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
        assert_eq!(metric(&fixture.proxy, "vestibule_reload_failed", &[]), 1.0);
        let mut client = Client::connect(fixture.address()).await;
        assert!(client.command("a LOGIN alice secret").await.starts_with("a OK"));
    }
    fixture.reload(&good).await.unwrap();
    assert_eq!(metric(&fixture.proxy, "vestibule_reload_failed", &[]), 0.0);
    fixture.proxy.stop().await;
}

#[tokio::test]
async fn listeners_are_opened_and_closed() {
    let backends = "backends: {only: {servers: ['127.0.0.1:1'], check: off}}\nroutes: [{default: only}]";
    let with = |listeners: &str| format!("listeners: [{listeners}]\nlimits: {{workers: 2}}\n{backends}");
    let plain = "{address: '127.0.0.1:0', tls: none}";
    let fixture = Fixture::new(&with(plain)).await;
    let first = fixture.address();
    // A listener that remains keeps its port, regardless of its position.
    let added = fixture.reload(&with(&format!("{plain}, {{address: '127.0.0.2:0', tls: none}}"))).await.unwrap();
    let second = added.opened[0];
    assert_eq!(fixture.proxy.listeners(), [first, second]);
    assert!(is_greeted(first).await && is_greeted(second).await);
    let mut open = Client::connect(second).await;
    let swapped = fixture.reload(&with("{address: '127.0.0.2:0', tls: none, mechanisms: [login]}")).await.unwrap();
    assert_eq!((swapped.opened, swapped.closed), (Vec::new(), vec![first]));
    eventually("a closed port", || std::net::TcpStream::connect(first).is_err()).await;
    assert_eq!(open.command("a NOOP").await, "a OK NOOP completed.", "open connections continue");
    let mut client = Client::connect_only(second).await;
    assert!(!client.line().await.contains("AUTH=PLAIN"), "the new mechanisms apply");
    // An address in use: nothing changes.
    let taken = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = taken.local_addr().unwrap();
    let error = fixture.reload(&with(&format!("{{address: '{address}', tls: none}}"))).await.unwrap_err();
    assert!(format!("{error:#}").contains("cannot be bound (listeners[0].address)"), "{error:#}");
    assert!(is_greeted(second).await);
    fixture.proxy.stop().await;
}

#[tokio::test]
async fn limit_of_sessions_follows_the_configuration() {
    let backends = "backends: {only: {servers: ['127.0.0.1:1'], check: off}}\nroutes: [{default: only}]";
    let with = |limit: usize| {
        format!("listeners: [{{address: '127.0.0.1:0', tls: none}}]\nlimits: {{sessions: {limit}}}\n{backends}")
    };
    let fixture = Fixture::new(&with(2)).await;
    let (_one, _two) = (Client::connect(fixture.address()).await, Client::connect(fixture.address()).await);
    assert!(Client::connect_only(fixture.address()).await.line().await.starts_with("* BYE [UNAVAILABLE]"));
    fixture.reload(&with(3)).await.unwrap();
    let _three = Client::connect(fixture.address()).await;
    fixture.reload(&with(1)).await.unwrap();
    assert!(Client::connect_only(fixture.address()).await.line().await.starts_with("* BYE [UNAVAILABLE]"));
    fixture.proxy.stop().await;
}

/// A server that accepts every user, and answers each line with the user's name and the line.
async fn echo_server() -> SocketAddr {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((socket, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut line = LineStream::new(socket);
                line.send("* OK [CAPABILITY IMAP4rev1] x\r\n").await;
                let login = line.line().await;
                let user = login.split('"').nth(1).unwrap_or_default().to_owned();
                line.send("L OK [CAPABILITY IMAP4rev1] in\r\n").await;
                loop {
                    let received = line.line().await;
                    if received.is_empty() {
                        return;
                    }
                    line.send(format!("{user} {received}\r\n")).await;
                }
            });
        }
    });
    address
}

/// Sends lines until `stop` is cancelled, and checks every byte of the answers. Returns the number of lines.
async fn send_lines(mut client: Client, user: String, stop: tokio_util::sync::CancellationToken) -> usize {
    let mut lines = 0;
    while !stop.is_cancelled() {
        assert_eq!(client.command(&format!("line {lines}")).await, format!("{user} line {lines}"));
        lines += 1;
    }
    lines
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hundred_reloads_lose_no_session_and_no_byte() {
    let servers = [echo_server().await, echo_server().await];
    // Each configuration has another order of backends and another distribution of users; every third has a second listener.
    let text = |turn: usize| {
        let backends = format!(
            "backends: {{a: {{servers: ['{}'], check: off, balance: round-robin}}, b: {{servers: ['{}'], check: off, balance: round-robin}}}}",
            servers[turn % 2],
            servers[(turn + 1) % 2]
        );
        let second = if turn.is_multiple_of(3) { ", {address: '127.0.0.2:0', tls: none}" } else { "" };
        let routes = if turn.is_multiple_of(2) { "[{hash: [a, b]}]" } else { "[{default: b}]" };
        format!(
            "listeners: [{{address: '127.0.0.1:0', tls: none}}{second}]\nlimits: {{workers: 2}}\n{backends}\nroutes: {routes}\n"
        )
    };
    let fixture = Fixture::new(&text(1)).await;
    let stop = tokio_util::sync::CancellationToken::new();
    let mut clients = Vec::new();
    let mut connect = async |number: usize| {
        let user = format!("user{number}");
        let mut client = Client::connect(fixture.address()).await;
        assert!(client.command(&format!("a LOGIN {user} secret")).await.starts_with("a OK"));
        clients.push(tokio::spawn(send_lines(client, user, stop.clone())));
    };
    for number in 0..20 {
        connect(number).await;
    }
    for turn in 0..100 {
        fixture.reload(&text(turn)).await.unwrap();
        // More clients connect during the reloads.
        if turn.is_multiple_of(5) {
            connect(100 + turn).await;
        }
    }
    assert_eq!(metric(&fixture.proxy, "vestibule_reloads_total", &["loaded"]), 100.0);
    stop.cancel();
    for client in clients {
        assert!(with_timeout("a client", client).await.unwrap() > 0);
    }
    eventually("the end", || {
        metric(&fixture.proxy, "vestibule_connections", &[]) == 0.0
            && metric(&fixture.proxy, "vestibule_backend_sessions", &[]) == 0.0
    })
    .await;
    fixture.proxy.stop().await;
}
