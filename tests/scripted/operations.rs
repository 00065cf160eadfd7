//! What operators do: states of servers that outlive reloads and restarts, and moves of users.

use std::path::Path;
use std::time::Duration;

use vestibule::admin_state::AdminState;
use vestibule::cli::explain::explain;
use vestibule::config;
use vestibule::identity::UserName;
use vestibule::server::{self, Running, StateChange};
use vestibule::snapshot::Snapshot;

use crate::support::*;

/// A folder with a configuration and a table, and the proxy on them.
struct Scene {
    folder: tempfile::TempDir,
    proxy: Running,
}

impl Scene {
    async fn new(text: &str, table: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("users.txt"), table).unwrap();
        let proxy = started(folder.path(), text).await;
        Self { folder, proxy }
    }

    /// Stops the proxy and starts another one on the same files.
    async fn restart(self, text: &str) -> Self {
        self.proxy.stop().await;
        Self { proxy: started(self.folder.path(), text).await, folder: self.folder }
    }

    async fn reload(&self, text: &str) {
        let file = self.folder.path().join("vestibule.yaml");
        std::fs::write(&file, text).unwrap();
        with_timeout("a reload", self.proxy.reload(&file)).await.unwrap();
    }

    async fn set(&self, server: &str, state: Option<AdminState>) -> anyhow::Result<server::StateChanged> {
        let reason = state.map(|_| "new disks".to_owned());
        let (server, state, by) = (server.to_owned(), state, "root".to_owned());
        self.proxy.set_server(StateChange { server, state, over: None, by, reason, is_forwarded: false }).await
    }

    /// Servers in the order of the configuration, as `NAME STATE by OPERATOR: REASON`.
    fn states(&self) -> Vec<String> {
        let shown = |server: &server::views::ServerStatus| match &server.set {
            Some(set) => {
                format!("{} {} by {}: {:?}", server.backend, server.state.as_str(), set.by, set.reason.as_deref())
            }
            None => format!("{} {}", server.backend, server.state.as_str()),
        };
        self.proxy.status().servers.iter().map(shown).collect()
    }

    async fn login(&self) -> String {
        Client::connect(self.proxy.listeners()[0]).await.command("a LOGIN alice secret").await
    }
}

async fn started(folder: &Path, text: &str) -> Running {
    let file = folder.join("vestibule.yaml");
    std::fs::write(&file, text).unwrap();
    server::start(config::load(&file).unwrap(), Vec::new()).await.unwrap()
}

fn configuration(backends: &str, more: &str) -> String {
    format!(
        "listeners: [{{address: '127.0.0.1:0', tls: none}}]\nlimits: {{workers: 1}}\nbackends: {{{backends}}}\n{more}\n"
    )
}

#[tokio::test]
async fn a_server_in_maintenance_stays_so_over_a_restart() {
    let good = ScriptedServer::new(ACCEPTS_ALICE).await;
    let name = good.address.to_string();
    let backends = format!("only: {{servers: ['{name}'], check: off}}");
    let text = configuration(&backends, "routes: [{default: only}]\nstate_file: state.json");
    let scene = Scene::new(&text, "").await;
    assert!(scene.login().await.starts_with("a OK"));
    assert_eq!(scene.set(&name, Some(AdminState::Drain)).await.unwrap().saved, Ok(()));
    assert!(scene.login().await.starts_with("a NO [UNAVAILABLE]"));
    // The command `route` knows of it too.
    let snapshot = Snapshot::build(config::load(&scene.folder.path().join("vestibule.yaml")).unwrap(), None).unwrap();
    let (explained, _) = explain(&snapshot, &UserName::new(b"alice").unwrap()).await;
    assert!(explained.contains(&format!("no logins: {name} (state drain, set by root at 20")), "{explained}");
    let scene = scene.restart(&text).await;
    assert!(scene.login().await.starts_with("a NO [UNAVAILABLE]"), "still drained");
    assert_eq!(scene.states(), ["only drain by root: Some(\"new disks\")"]);
    assert_eq!(metric(&scene.proxy, "vestibule_server_state", &[]), 1.0);
    scene.set(&name, None).await.unwrap();
    let scene = scene.restart(&text).await;
    assert!(scene.login().await.starts_with("a OK"));
    scene.proxy.stop().await;
}

#[tokio::test]
async fn a_damaged_state_file_does_not_prevent_the_start() {
    let good = ScriptedServer::new(ACCEPTS_ALICE).await;
    let backends = format!("only: {{servers: ['{}'], check: off}}", good.address);
    let text = configuration(&backends, "routes: [{default: only}]\nstate_file: state.json");
    let scene = Scene::new(&text, "").await;
    let file = scene.folder.path().join("state.json");
    std::fs::write(&file, "{\"version\":1,\"sta").unwrap();
    let scene = scene.restart(&text).await;
    assert!(scene.login().await.starts_with("a OK"));
    assert_eq!(metric(&scene.proxy, "vestibule_state_file_failed", &[]), 1.0);
    assert!(!file.exists() && scene.folder.path().join("state.json.damaged").exists());
    scene.set(&good.address.to_string(), Some(AdminState::Drain)).await.unwrap();
    assert_eq!(metric(&scene.proxy, "vestibule_state_file_failed", &[]), 0.0);
    // And one that cannot be written is reported.
    std::fs::create_dir(scene.folder.path().join("state.json.new")).unwrap();
    let saved = scene.set(&good.address.to_string(), Some(AdminState::Down)).await.unwrap().saved;
    assert!(saved.unwrap_err().contains("state.json cannot be written"));
    assert_eq!(metric(&scene.proxy, "vestibule_state_file_failed", &[]), 1.0);
    scene.proxy.stop().await;
}

#[tokio::test]
async fn a_server_that_comes_back_by_reload_has_its_state() {
    let both = configuration(
        "a: {servers: ['127.0.0.1:1', '127.0.0.1:2'], check: off}, b: {servers: ['127.0.0.1:1'], check: off}",
        "routes: [{default: a}]",
    );
    let one = configuration("a: {servers: ['127.0.0.1:2'], check: off}", "routes: [{default: a}]");
    let scene = Scene::new(&both, "").await;
    let set = " by root: Some(\"new disks\")";
    scene.set("b/127.0.0.1:1", Some(AdminState::Down)).await.unwrap();
    assert_eq!(scene.states(), ["a up".to_owned(), "a up".to_owned(), format!("b down{set}")]);
    scene.set("127.0.0.1:1", Some(AdminState::Drain)).await.unwrap();
    let drained = [format!("a drain{set}"), "a up".to_owned(), format!("b drain{set}")];
    assert_eq!(scene.states(), drained);
    scene.reload(&one).await;
    let unused = scene.proxy.status().unused_states;
    assert_eq!(unused.iter().map(|stored| &*stored.backend).collect::<Vec<_>>(), ["a", "b"]);
    scene.reload(&both).await;
    assert_eq!(scene.states(), drained);
    // A state can also be reset while its server is not there.
    scene.reload(&one).await;
    scene.set("b/127.0.0.1:1", None).await.unwrap();
    scene.reload(&both).await;
    assert_eq!(scene.states()[2], "b up");
    for (server, state, said) in [
        (
            "127.0.0.1:9",
            Some(AdminState::Drain),
            "no server is called \"127.0.0.1:9\"; known: 127.0.0.1:1, 127.0.0.1:2",
        ),
        ("c/127.0.0.1:1", Some(AdminState::Drain), "no server is called"),
        ("127.0.0.1:9", None, "no server is called"),
    ] {
        let error = scene.set(server, state).await.unwrap_err().to_string();
        assert!(error.contains(said), "{error}");
    }
    scene.proxy.stop().await;
}

#[tokio::test]
async fn a_move_reads_the_table_that_has_just_been_written() {
    let (old, new) = (ScriptedServer::new(ACCEPTS_ALICE).await, ScriptedServer::new(ACCEPTS_ALICE).await);
    let backends =
        format!("a: {{servers: ['{}'], check: off}}, b: {{servers: ['{}'], check: off}}", old.address, new.address);
    let scene = Scene::new(&configuration(&backends, "routes: [{table: users.txt}]"), "alice a\n").await;
    let mut before = Client::connect(scene.proxy.listeners()[0]).await;
    assert!(before.command("a LOGIN alice secret").await.starts_with("a OK"));
    // As `cp users.new users.txt` does it: the same file, with new content. Without any wait, for the file is read at once.
    std::fs::write(scene.folder.path().join("users.txt"), "alice b\n").unwrap();
    let moved = with_timeout("the move", scene.proxy.move_user("alice", "b", Duration::ZERO)).await;
    assert_eq!(moved.unwrap_or_else(|error| panic!("{error:#}")).ended, 1);
    before.assert_closed().await;
    assert!(scene.login().await.starts_with("a OK"));
    assert_eq!((old.connections(), new.connections()), (1, 1));
    scene.proxy.stop().await;
}

#[tokio::test]
async fn a_move_that_the_routes_do_not_follow_fails_and_lets_the_user_in() {
    let good = ScriptedServer::new(ACCEPTS_ALICE).await;
    let backends =
        format!("a: {{servers: ['{}'], check: off}}, b: {{servers: ['127.0.0.1:1'], check: off}}", good.address);
    let routes = "routes: [{table: users.txt}, {default: b}]";
    let scene = Scene::new(&configuration(&backends, routes), "alice a\n").await;
    let failed = async |user: &str, backend: &str| {
        let moved = with_timeout("the move", scene.proxy.move_user(user, backend, Duration::from_millis(300))).await;
        format!("{:#}", moved.unwrap_err())
    };
    let error = failed("alice", "b").await;
    assert!(error.contains("the routes say a, not b (route \"table\" answers)"), "{error}");
    let error = failed("bob", "a").await;
    assert!(error.contains("the routes say b, not a (route \"default\" answers)"), "{error}");
    std::fs::write(scene.folder.path().join("users.txt"), "alice a\nbob\n").unwrap();
    let error = failed("alice", "b").await;
    assert!(error.contains("users.txt:2: expected \"user backend\", found one word"), "{error}");
    assert!(failed("alice", "c").await.contains("no backend is declared as \"c\""));
    assert!(scene.login().await.starts_with("a OK"), "the hold has ended");
    scene.proxy.stop().await;
}

#[tokio::test]
async fn a_move_waits_until_a_changed_route_is_there() {
    let backends = "a: {servers: ['127.0.0.1:1'], check: off}, b: {servers: ['127.0.0.1:1'], check: off}";
    let scene = Scene::new(&configuration(backends, "routes: [{table: users.txt}]"), "alice a\n").await;
    let moving = scene.proxy.move_user("alice", "b", TIMEOUT / 2);
    // The routes change while it waits, and by a reload.
    let change = async {
        eventually("the hold", || scene.proxy.sessions().is_on_hold("alice")).await;
        scene.reload(&configuration(backends, "routes: [{default: b}]")).await;
    };
    let (moved, ()) = with_timeout("the move", async { tokio::join!(moving, change) }).await;
    assert_eq!(moved.unwrap().backend, "b");
    scene.proxy.stop().await;
}

#[tokio::test]
async fn a_state_is_set_before_the_retirement_or_by_the_successor() {
    let backends = "a: {servers: ['127.0.0.1:1', '127.0.0.1:2'], check: off}";
    let scene = Scene::new(&configuration(backends, "routes: [{default: a}]\nstate_file: state.json"), "").await;
    scene.set("127.0.0.1:1", Some(AdminState::Drain)).await.unwrap();
    let retirement = scene.proxy.before_retirement(TIMEOUT).await.unwrap();
    assert!(scene.proxy.before_retirement(Duration::ZERO).await.is_err(), "one at a time");
    // A change that is in progress when the successor takes over waits, and is refused.
    let mut change = Box::pin(scene.set("127.0.0.1:2", Some(AdminState::Down)));
    assert!(tokio::time::timeout(Duration::from_millis(20), &mut change).await.is_err());
    let states = retirement.retire();
    assert_eq!(states.iter().map(|stored| &*stored.server).collect::<Vec<_>>(), ["127.0.0.1:1"]);
    assert!(
        with_timeout("the change", change).await.unwrap_err().to_string().contains("this process has been replaced")
    );
    assert_eq!(scene.proxy.states(), states);
    // What the successor passes on is carried out, and the file is the successor's.
    let file = scene.folder.path().join("state.json");
    let before = std::fs::read(&file).unwrap();
    let (server, state, by) = ("127.0.0.1:2".to_owned(), Some(AdminState::Down), "root".to_owned());
    let change = StateChange { server, state, by, is_forwarded: true, ..StateChange::default() };
    with_timeout("the change", scene.proxy.set_server(change)).await.unwrap();
    assert_eq!(scene.states()[1], "a down by root: None");
    assert_eq!(std::fs::read(&file).unwrap(), before);
    scene.proxy.stop().await;
}
