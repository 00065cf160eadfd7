//! Operators' commands: administrative states across reloads and restarts, and moves of users.

use std::path::Path;
use std::time::Duration;

use vestibule::admin_state::AdminState;
use vestibule::api::views::ServerStatus;
use vestibule::cli::explain::explain;
use vestibule::config;
use vestibule::identity::UserName;
use vestibule::server::{self, Running, StateChange};
use vestibule::snapshot::Snapshot;

use crate::support::*;

/// A directory with a configuration and a table, and a proxy that uses them.
struct Fixture {
    folder: tempfile::TempDir,
    proxy: Running,
}

impl Fixture {
    async fn new(text: &str, table: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("users.txt"), table).unwrap();
        let proxy = started(folder.path(), text).await;
        Self { folder, proxy }
    }

    /// Stops the proxy and starts another with the same files.
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

    /// Returns the servers in the order of the configuration, as `BACKEND STATE by OPERATOR: REASON`.
    fn states(&self) -> Vec<String> {
        let line = |server: &ServerStatus| match &server.set {
            Some(set) => {
                format!("{} {} by {}: {:?}", server.backend, server.state.as_str(), set.by, set.reason.as_deref())
            }
            None => format!("{} {}", server.backend, server.state.as_str()),
        };
        operations(&self.proxy).status().servers.iter().map(line).collect()
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
async fn administrative_state_survives_a_restart() {
    let good = ScriptedServer::new(ACCEPTS_ALICE).await;
    let name = good.address.to_string();
    let backends = format!("only: {{servers: ['{name}'], check: off}}");
    let text = configuration(&backends, "routes: [{default: only}]\nstate_file: state.json");
    let fixture = Fixture::new(&text, "").await;
    assert!(fixture.login().await.starts_with("a OK"));
    assert_eq!(fixture.set(&name, Some(AdminState::Drain)).await.unwrap().saved, Ok(()));
    assert!(fixture.login().await.starts_with("a NO [UNAVAILABLE]"));
    // The command `route` reads the state file too.
    let snapshot = Snapshot::build(config::load(&fixture.folder.path().join("vestibule.yaml")).unwrap(), None).unwrap();
    let explained = explain(&snapshot, &UserName::new(b"alice").unwrap()).await.text;
    assert!(explained.contains(&format!("no logins: {name} (state drain, set by root at 20")), "{explained}");
    let fixture = fixture.restart(&text).await;
    assert!(fixture.login().await.starts_with("a NO [UNAVAILABLE]"), "still drained");
    assert_eq!(fixture.states(), ["only drain by root: Some(\"new disks\")"]);
    assert_eq!(metric(&fixture.proxy, "vestibule_server_state", &[]), 1.0);
    fixture.set(&name, None).await.unwrap();
    let fixture = fixture.restart(&text).await;
    assert!(fixture.login().await.starts_with("a OK"));
    fixture.proxy.stop().await;
}

#[tokio::test]
async fn damaged_state_file_does_not_prevent_the_start() {
    let good = ScriptedServer::new(ACCEPTS_ALICE).await;
    let backends = format!("only: {{servers: ['{}'], check: off}}", good.address);
    let text = configuration(&backends, "routes: [{default: only}]\nstate_file: state.json");
    let fixture = Fixture::new(&text, "").await;
    let file = fixture.folder.path().join("state.json");
    std::fs::write(&file, "{\"version\":1,\"sta").unwrap();
    let fixture = fixture.restart(&text).await;
    assert!(fixture.login().await.starts_with("a OK"));
    assert_eq!(metric(&fixture.proxy, "vestibule_state_file_failed", &[]), 1.0);
    assert!(!file.exists() && fixture.folder.path().join("state.json.damaged").exists());
    fixture.set(&good.address.to_string(), Some(AdminState::Drain)).await.unwrap();
    assert_eq!(metric(&fixture.proxy, "vestibule_state_file_failed", &[]), 0.0);
    // A state file that cannot be written is reported.
    std::fs::create_dir(fixture.folder.path().join("state.json.new")).unwrap();
    let saved = fixture.set(&good.address.to_string(), Some(AdminState::Down)).await.unwrap().saved;
    assert!(saved.unwrap_err().contains("state.json cannot be written"));
    assert_eq!(metric(&fixture.proxy, "vestibule_state_file_failed", &[]), 1.0);
    fixture.proxy.stop().await;
}

#[tokio::test]
async fn administrative_state_survives_the_removal_of_its_server() {
    let both = configuration(
        "a: {servers: ['127.0.0.1:1', '127.0.0.1:2'], check: off}, b: {servers: ['127.0.0.1:1'], check: off}",
        "routes: [{default: a}]",
    );
    let one = configuration("a: {servers: ['127.0.0.1:2'], check: off}", "routes: [{default: a}]");
    let fixture = Fixture::new(&both, "").await;
    let set = " by root: Some(\"new disks\")";
    fixture.set("b/127.0.0.1:1", Some(AdminState::Down)).await.unwrap();
    assert_eq!(fixture.states(), ["a up".to_owned(), "a up".to_owned(), format!("b down{set}")]);
    fixture.set("127.0.0.1:1", Some(AdminState::Drain)).await.unwrap();
    let drained = [format!("a drain{set}"), "a up".to_owned(), format!("b drain{set}")];
    assert_eq!(fixture.states(), drained);
    fixture.reload(&one).await;
    let unused = operations(&fixture.proxy).status().unused_states;
    assert_eq!(unused.iter().map(|stored| &*stored.backend).collect::<Vec<_>>(), ["a", "b"]);
    fixture.reload(&both).await;
    assert_eq!(fixture.states(), drained);
    // A state can also be reset while its server is not configured.
    fixture.reload(&one).await;
    fixture.set("b/127.0.0.1:1", None).await.unwrap();
    fixture.reload(&both).await;
    assert_eq!(fixture.states()[2], "b up");
    for (server, state, expected) in [
        (
            "127.0.0.1:9",
            Some(AdminState::Drain),
            "unknown server \"127.0.0.1:9\": expected one of 127.0.0.1:1, 127.0.0.1:2",
        ),
        ("c/127.0.0.1:1", Some(AdminState::Drain), "unknown server"),
        ("127.0.0.1:9", None, "unknown server"),
    ] {
        let error = fixture.set(server, state).await.unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
    fixture.proxy.stop().await;
}

#[tokio::test]
async fn move_reads_a_table_that_was_just_written() {
    let (old, new) = (ScriptedServer::new(ACCEPTS_ALICE).await, ScriptedServer::new(ACCEPTS_ALICE).await);
    let backends =
        format!("a: {{servers: ['{}'], check: off}}, b: {{servers: ['{}'], check: off}}", old.address, new.address);
    let fixture = Fixture::new(&configuration(&backends, "routes: [{table: users.txt}]"), "alice a\n").await;
    let mut before = Client::connect(fixture.proxy.listeners()[0]).await;
    assert!(before.command("a LOGIN alice secret").await.starts_with("a OK"));
    // The same file with new content, as after `cp users.new users.txt`. No wait is needed, because the move reads the file.
    std::fs::write(fixture.folder.path().join("users.txt"), "alice b\n").unwrap();
    let moved = with_timeout("the move", operations(&fixture.proxy).move_user("alice", "b", Duration::ZERO)).await;
    assert_eq!(moved.unwrap_or_else(|error| panic!("{error:#}")).ended, 1);
    before.assert_closed().await;
    assert!(fixture.login().await.starts_with("a OK"));
    assert_eq!((old.connections(), new.connections()), (1, 1));
    fixture.proxy.stop().await;
}

#[tokio::test]
async fn move_without_a_changed_route_fails_and_accepts_logins_again() {
    let good = ScriptedServer::new(ACCEPTS_ALICE).await;
    let backends =
        format!("a: {{servers: ['{}'], check: off}}, b: {{servers: ['127.0.0.1:1'], check: off}}", good.address);
    let routes = "routes: [{table: users.txt}, {default: b}]";
    let fixture = Fixture::new(&configuration(&backends, routes), "alice a\n").await;
    let failed = async |user: &str, backend: &str| {
        let moved =
            with_timeout("the move", operations(&fixture.proxy).move_user(user, backend, Duration::from_millis(300)))
                .await;
        format!("{:#}", moved.unwrap_err())
    };
    let error = failed("alice", "b").await;
    assert!(error.contains("route \"table\" names backend a, not b"), "{error}");
    let error = failed("bob", "a").await;
    assert!(error.contains("route \"default\" names backend b, not a"), "{error}");
    std::fs::write(fixture.folder.path().join("users.txt"), "alice a\nbob\n").unwrap();
    let error = failed("alice", "b").await;
    assert!(error.contains("users.txt:2: expected \"user backend\", found one word"), "{error}");
    assert!(failed("alice", "c").await.contains("no backend is declared as \"c\""));
    assert!(fixture.login().await.starts_with("a OK"), "the hold has ended");
    fixture.proxy.stop().await;
}

#[tokio::test]
async fn move_waits_for_the_route_to_change() {
    let backends = "a: {servers: ['127.0.0.1:1'], check: off}, b: {servers: ['127.0.0.1:1'], check: off}";
    let fixture = Fixture::new(&configuration(backends, "routes: [{table: users.txt}]"), "alice a\n").await;
    let moving = operations(&fixture.proxy).move_user("alice", "b", TIMEOUT / 2);
    // A reload changes the routes while the move waits.
    let change = async {
        eventually("the hold", || fixture.proxy.sessions().is_on_hold("alice")).await;
        fixture.reload(&configuration(backends, "routes: [{default: b}]")).await;
    };
    let (moved, ()) = with_timeout("the move", async { tokio::join!(moving, change) }).await;
    assert_eq!(moved.unwrap().backend, "b");
    fixture.proxy.stop().await;
}

#[tokio::test]
async fn state_change_during_a_retirement_is_refused_unless_forwarded() {
    let backends = "a: {servers: ['127.0.0.1:1', '127.0.0.1:2'], check: off}";
    let fixture = Fixture::new(&configuration(backends, "routes: [{default: a}]\nstate_file: state.json"), "").await;
    fixture.set("127.0.0.1:1", Some(AdminState::Drain)).await.unwrap();
    let retirement = fixture.proxy.before_retirement(TIMEOUT).await.unwrap();
    assert!(fixture.proxy.before_retirement(Duration::ZERO).await.is_err(), "only one retirement at a time");
    // A change during the retirement waits, and is refused.
    let mut change = Box::pin(fixture.set("127.0.0.1:2", Some(AdminState::Down)));
    assert!(tokio::time::timeout(Duration::from_millis(20), &mut change).await.is_err());
    let states = retirement.retire();
    assert_eq!(states.iter().map(|stored| &*stored.server).collect::<Vec<_>>(), ["127.0.0.1:1"]);
    assert!(
        with_timeout("the change", change).await.unwrap_err().to_string().contains("this process has been replaced")
    );
    assert_eq!(fixture.proxy.states(), states);
    // A change that the successor forwards is carried out, but the state file belongs to the successor.
    let file = fixture.folder.path().join("state.json");
    let before = std::fs::read(&file).unwrap();
    let (server, state, by) = ("127.0.0.1:2".to_owned(), Some(AdminState::Down), "root".to_owned());
    let change = StateChange { server, state, by, is_forwarded: true, ..StateChange::default() };
    with_timeout("the change", fixture.proxy.set_server(change)).await.unwrap();
    assert_eq!(fixture.states()[1], "a down by root: None");
    assert_eq!(std::fs::read(&file).unwrap(), before);
    fixture.proxy.stop().await;
}
