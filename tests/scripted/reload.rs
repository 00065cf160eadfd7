//! A configuration takes another's place: nobody notices, and a bad one changes nothing.

use std::net::SocketAddr;

use vestibule::server::Running;

use crate::support::*;

/// The proxy on a file that can be written again.
struct Scene {
    folder: tempfile::TempDir,
    proxy: Running,
}

impl Scene {
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

async fn greeting(address: SocketAddr) -> bool {
    Client::connect_only(address).await.line().await.starts_with("* OK")
}

#[tokio::test]
async fn logins_go_where_the_new_configuration_says_and_sessions_stay() {
    let (one, two) = (ScriptedServer::new(ACCEPTS_ALICE).await, ScriptedServer::new(ACCEPTS_ALICE).await);
    let to = |server: &ScriptedServer| {
        configuration(
            &format!("backends: {{only: {{servers: ['{}'], check: off}}}}", server.address),
            "routes: [{default: only}]",
        )
    };
    let scene = Scene::new(&to(&one)).await;
    let mut before = Client::connect(scene.address()).await;
    assert!(before.command("a LOGIN alice secret").await.starts_with("a OK"));
    let mut waiting = Client::connect(scene.address()).await;
    for _ in 0..20 {
        scene.reload(&to(&two)).await.unwrap();
    }
    let mut after = Client::connect(scene.address()).await;
    assert!(after.command("a LOGIN bob secret").await.starts_with("a NO"), "its script knows only alice");
    assert_eq!((one.connections(), two.connections()), (1, 1));
    assert_eq!(before.command("b NOOP").await, "b OK relayed");
    // Who has been connected since before the reloads is routed by the last, too. One server a user: the first session ends.
    assert!(waiting.command("a LOGIN alice secret").await.starts_with("a OK"));
    assert_eq!((one.connections(), two.connections()), (1, 2));
    before.assert_closed().await;
    assert_eq!(metric(&scene.proxy, "vestibule_reloads_total", &["loaded"]), 20.0);
    assert_eq!(metric(&scene.proxy, "vestibule_backend_sessions", &[]), 1.0, "counts go on");
    drop((before, waiting, after));
    eventually("the end", || metric(&scene.proxy, "vestibule_connections", &[]) == 0.0).await;
    scene.proxy.stop().await;
}

/// A configuration holds the routes, and they the connections to directories.
#[tokio::test]
async fn an_established_session_keeps_no_old_configuration() {
    let server = ScriptedServer::new(ACCEPTS_ALICE).await;
    let text = |more: &str| {
        let backends = format!("backends: {{only: {{servers: ['{}'], check: off}}}}", server.address);
        configuration(&backends, &format!("routes: [{{default: only}}]\n{more}"))
    };
    let scene = Scene::new(&text("")).await;
    let mut session = Client::connect(scene.address()).await;
    assert!(session.command("a LOGIN alice secret").await.starts_with("a OK"));
    let before = std::sync::Arc::downgrade(&scene.proxy.snapshot());
    scene.reload(&text("log: {level: warn}")).await.unwrap();
    eventually("the end of the old configuration", || before.strong_count() == 0).await;
    assert_eq!(session.command("b NOOP").await, "b OK relayed");
    scene.proxy.stop().await;
}

#[tokio::test]
async fn a_bad_file_keeps_everything_and_says_what_is_wrong() {
    let server = ScriptedServer::new(ACCEPTS_ALICE).await;
    let backends = format!("backends: {{only: {{servers: ['{}'], check: off}}}}", server.address);
    let good = configuration(&backends, "routes: [{default: only}]");
    let scene = Scene::new(&good).await;
    for (bad, said) in [
        (configuration(&backends, "routes: [{default: onyl}]"), "vestibule.yaml:4:"),
        (configuration(&backends, "routes: [{table: absent.txt}]"), "absent.txt: No such file"),
        (
            configuration(&backends, "routes: [{default: only}]\ntls: {certificates: [{cert: a.pem, key: b.pem}]}"),
            "a.pem",
        ),
        ("listeners: [".to_owned(), "invalid YAML"),
    ] {
        let error = scene.reload(&bad).await.unwrap_err().to_string();
        assert!(error.contains(said), "{error}");
        assert_eq!(metric(&scene.proxy, "vestibule_reload_failed", &[]), 1.0);
        let mut client = Client::connect(scene.address()).await;
        assert!(client.command("a LOGIN alice secret").await.starts_with("a OK"));
    }
    scene.reload(&good).await.unwrap();
    assert_eq!(metric(&scene.proxy, "vestibule_reload_failed", &[]), 0.0);
    scene.proxy.stop().await;
}

#[tokio::test]
async fn listeners_come_and_go() {
    let backends = "backends: {only: {servers: ['127.0.0.1:1'], check: off}}\nroutes: [{default: only}]";
    let with = |listeners: &str| format!("listeners: [{listeners}]\nlimits: {{workers: 2}}\n{backends}");
    let plain = "{address: '127.0.0.1:0', tls: none}";
    let scene = Scene::new(&with(plain)).await;
    let first = scene.address();
    // Another one behind, and one before it: what stays keeps its port.
    let added = scene.reload(&with(&format!("{plain}, {{address: '127.0.0.2:0', tls: none}}"))).await.unwrap();
    let second = added.opened[0];
    assert_eq!(scene.proxy.listeners(), [first, second]);
    assert!(greeting(first).await && greeting(second).await);
    let mut open = Client::connect(second).await;
    let swapped = scene.reload(&with("{address: '127.0.0.2:0', tls: none, mechanisms: [login]}")).await.unwrap();
    assert_eq!((swapped.opened, swapped.closed), (Vec::new(), vec![first]));
    eventually("a closed port", || std::net::TcpStream::connect(first).is_err()).await;
    assert_eq!(open.command("a NOOP").await, "a OK NOOP completed.", "who is in stays");
    let mut client = Client::connect_only(second).await;
    assert!(!client.line().await.contains("AUTH=PLAIN"), "as the new configuration has it");
    // An address that cannot be had: nothing changes.
    let taken = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = taken.local_addr().unwrap();
    let error = scene.reload(&with(&format!("{{address: '{address}', tls: none}}"))).await.unwrap_err();
    assert!(format!("{error:#}").contains("cannot be bound (listeners[0].address)"), "{error:#}");
    assert!(greeting(second).await);
    scene.proxy.stop().await;
}

#[tokio::test]
async fn the_cap_of_sessions_follows() {
    let backends = "backends: {only: {servers: ['127.0.0.1:1'], check: off}}\nroutes: [{default: only}]";
    let with = |most: usize| {
        format!("listeners: [{{address: '127.0.0.1:0', tls: none}}]\nlimits: {{sessions: {most}}}\n{backends}")
    };
    let scene = Scene::new(&with(2)).await;
    let (_one, _two) = (Client::connect(scene.address()).await, Client::connect(scene.address()).await);
    assert!(Client::connect_only(scene.address()).await.line().await.starts_with("* BYE [UNAVAILABLE]"));
    scene.reload(&with(3)).await.unwrap();
    let _three = Client::connect(scene.address()).await;
    scene.reload(&with(1)).await.unwrap();
    assert!(Client::connect_only(scene.address()).await.line().await.starts_with("* BYE [UNAVAILABLE]"));
    scene.proxy.stop().await;
}

/// A server that takes everybody, and then says who it takes the session for with every line.
async fn marking() -> SocketAddr {
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
                    let said = line.line().await;
                    if said.is_empty() {
                        return;
                    }
                    line.send(format!("{user} {said}\r\n")).await;
                }
            });
        }
    });
    address
}

/// Speaks until `over`, and checks every byte; says how many lines that were.
async fn speaks(mut client: Client, user: String, over: tokio_util::sync::CancellationToken) -> usize {
    let mut lines = 0;
    while !over.is_cancelled() {
        assert_eq!(client.command(&format!("line {lines}")).await, format!("{user} line {lines}"));
        lines += 1;
    }
    lines
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hundred_reloads_lose_no_session_and_no_byte() {
    let servers = [marking().await, marking().await];
    // Each with another order of backends and other users' shares, and now and then a second listener.
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
    let scene = Scene::new(&text(1)).await;
    let over = tokio_util::sync::CancellationToken::new();
    let mut speaking = Vec::new();
    let mut join = async |number: usize| {
        let user = format!("user{number}");
        let mut client = Client::connect(scene.address()).await;
        assert!(client.command(&format!("a LOGIN {user} secret")).await.starts_with("a OK"));
        speaking.push(tokio::spawn(speaks(client, user, over.clone())));
    };
    for number in 0..20 {
        join(number).await;
    }
    for turn in 0..100 {
        scene.reload(&text(turn)).await.unwrap();
        // Others come meanwhile.
        if turn.is_multiple_of(5) {
            join(100 + turn).await;
        }
    }
    assert_eq!(metric(&scene.proxy, "vestibule_reloads_total", &["loaded"]), 100.0);
    over.cancel();
    for speaker in speaking {
        assert!(with_timeout("a speaker", speaker).await.unwrap() > 0);
    }
    eventually("the end", || {
        metric(&scene.proxy, "vestibule_connections", &[]) == 0.0
            && metric(&scene.proxy, "vestibule_backend_sessions", &[]) == 0.0
    })
    .await;
    scene.proxy.stop().await;
}
