//! What `asked` does around a directory, shown with one that answers by a script.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::Semaphore;

use super::CachedDirectory;
use crate::config::{BackendId, CacheConfig, Located, Location, LookupConfig};
use crate::metrics::{Metrics, Names};
use crate::route::decision::{Declared, RouteDecision};
use crate::route::directory::Directory;
use crate::route::request::LookupRequest;
use crate::route::{LookupOrigin, LookupResult};

const HOUR: Duration = Duration::from_secs(3600);

/// Answers by heart, as often as it is let.
#[derive(Debug, Clone)]
pub(in crate::route) struct Scripted {
    answers: Arc<Mutex<HashMap<String, LookupResult>>>,
    asked: Arc<AtomicUsize>,
    let_through: Arc<Semaphore>,
}

impl Scripted {
    fn new() -> Self {
        let let_through = Arc::new(Semaphore::new(Semaphore::MAX_PERMITS));
        Self { answers: Arc::default(), asked: Arc::default(), let_through }
    }

    pub(in crate::route) async fn ask(&self, question: &LookupRequest) -> LookupResult {
        self.asked.fetch_add(1, Ordering::SeqCst);
        let _leave = self.let_through.acquire().await.unwrap();
        self.answers.lock().unwrap().get(&*question.user).cloned().unwrap_or(LookupResult::Unknown)
    }

    fn says(&self, user: &str, answer: LookupResult) {
        self.answers.lock().unwrap().insert(user.to_owned(), answer);
    }

    fn asked(&self) -> usize {
        self.asked.load(Ordering::SeqCst)
    }
}

fn found(backend: usize) -> LookupResult {
    LookupResult::Found(RouteDecision::backend(BackendId(backend)).into())
}

fn failed() -> LookupResult {
    LookupResult::Failed("down".to_owned())
}

fn question(user: &str) -> LookupRequest {
    LookupRequest { user: user.into(), login_context: None }
}

/// Closed until it is dropped: lookups wait at the directory.
fn gate(scripted: &Scripted) -> tokio::sync::OwnedSemaphorePermit {
    let gate = scripted.let_through.clone().try_acquire_many_owned(u32::MAX >> 4).unwrap();
    scripted.let_through.forget_permits(usize::MAX >> 3);
    gate
}

/// A lookup of `user` that waits at the directory.
async fn in_flight(
    asked: &Arc<CachedDirectory>,
    scripted: &Scripted,
    user: &'static str,
) -> tokio::task::JoinHandle<LookupResult> {
    let (before, asking) = (scripted.asked(), asked.clone());
    let lookup = tokio::spawn(async move { asking.lookup(question(user)).await.0 });
    while scripted.asked() == before {
        tokio::task::yield_now().await;
    }
    lookup
}

fn asked(scripted: &Scripted, connections: usize, cache: bool) -> (Arc<CachedDirectory>, Metrics) {
    let rules = rules(Duration::from_millis(500));
    let (asked, metrics) = built(scripted, Duration::from_millis(300), connections, cache.then_some(rules));
    (Arc::new(asked), metrics)
}

fn rules(ttl: Duration) -> CacheConfig {
    CacheConfig { ttl, negative: HOUR, stale: HOUR, entries: 1000, file: None }
}

fn built(
    scripted: &Scripted,
    timeout: Duration,
    connections: usize,
    cache: Option<CacheConfig>,
) -> (CachedDirectory, Metrics) {
    let metrics = Metrics::new(&Names { routes: vec!["test".to_owned()], ..Names::default() });
    let asking = LookupConfig { timeout, connections, cache, names: std::collections::BTreeMap::new() };
    let directory = Directory::Scripted(scripted.clone());
    let asked = CachedDirectory::new(directory, &asking, Declared::named(["a", "b"]), metrics.route(0).clone());
    (asked, metrics)
}

/// A directory that may take as long as the test does, whose answers are kept for an hour.
fn patient(scripted: &Scripted) -> CachedDirectory {
    built(scripted, Duration::from_secs(60), 8, Some(rules(HOUR))).0
}

#[tokio::test]
async fn a_kept_answer_needs_no_question() {
    let scripted = Scripted::new();
    scripted.says("alice", found(0));
    let (asked, _metrics) = asked(&scripted, 1, true);
    assert_eq!(asked.lookup(question("alice")).await, (found(0), LookupOrigin::Directory));
    scripted.says("alice", found(1));
    let (answer, origin) = asked.lookup(question("alice")).await;
    assert_eq!(answer, found(0));
    assert!(matches!(origin, LookupOrigin::Cache(_)));
    for _ in 0..3 {
        assert_eq!(asked.lookup(question("bob")).await.0, LookupResult::Unknown);
    }
    assert_eq!(scripted.asked(), 2, "alice once, bob once");
}

#[tokio::test]
async fn many_who_ask_for_one_user_ask_once() {
    let scripted = Scripted::new();
    scripted.says("alice", found(0));
    let gate = scripted.let_through.clone().acquire_many_owned(u32::MAX >> 4).await.unwrap();
    scripted.let_through.forget_permits(usize::MAX >> 3);
    let (asked, _metrics) = asked(&scripted, 4, true);
    let waiting: Vec<_> = (0..50)
        .map(|_| {
            let asked = asked.clone();
            tokio::spawn(async move { asked.lookup(question("alice")).await.0 })
        })
        .collect();
    while scripted.asked() == 0 {
        tokio::task::yield_now().await;
    }
    drop(gate);
    for lookup in waiting {
        assert_eq!(lookup.await.unwrap(), found(0));
    }
    assert_eq!(scripted.asked(), 1);
}

#[tokio::test]
async fn a_directory_that_is_down_leaves_stale_answers_and_no_lies() {
    let scripted = Scripted::new();
    scripted.says("alice", found(0));
    let (asked, metrics) = asked(&scripted, 1, true);
    asked.lookup(question("alice")).await;
    scripted.says("alice", failed());
    scripted.says("carol", failed());
    tokio::time::sleep(Duration::from_millis(600)).await;
    // The first finds out, the next does not wait for the same news.
    for asked_by_then in [2, 2] {
        let (answer, origin) = asked.lookup(question("alice")).await;
        assert_eq!(answer, found(0));
        assert!(matches!(origin, LookupOrigin::Stale(_)), "{origin:?}");
        assert_eq!(scripted.asked(), asked_by_then);
    }
    assert_eq!(asked.lookup(question("carol")).await.0, failed(), "unknown would be a lie");
    let text = metrics.render();
    assert!(text.contains("vestibule_route_failing{route=\"test\"} 1"), "{text}");
    assert!(text.contains("vestibule_route_cache_total{route=\"test\",state=\"stale\"} 2"), "{text}");
    scripted.says("carol", found(1));
    assert_eq!(asked.lookup(question("carol")).await.0, found(1));
    assert!(metrics.render().contains("vestibule_route_failing{route=\"test\"} 0"));
}

#[tokio::test]
async fn an_ageing_answer_is_renewed_behind_the_back() {
    let scripted = Scripted::new();
    scripted.says("alice", found(0));
    let (asked, _metrics) = asked(&scripted, 1, true);
    asked.lookup(question("alice")).await;
    scripted.says("alice", found(1));
    tokio::time::sleep(Duration::from_millis(420)).await;
    assert_eq!(asked.lookup(question("alice")).await.0, found(0));
    while asked.lookup(question("alice")).await.0 != found(1) {
        tokio::task::yield_now().await;
    }
    assert_eq!(scripted.asked(), 2);
}

#[tokio::test]
async fn a_directory_that_hangs_fails_in_time_and_says_why() {
    let scripted = Scripted::new();
    let _gate = scripted.let_through.clone().acquire_many_owned(u32::MAX >> 4).await.unwrap();
    scripted.let_through.forget_permits(usize::MAX >> 3);
    let (asked, _metrics) = asked(&scripted, 1, false);
    let lookup = |user: &'static str| {
        let asked = asked.clone();
        tokio::spawn(async move { asked.lookup(question(user)).await.0 })
    };
    let (first, second) = (lookup("alice"), lookup("bob"));
    let mut reasons = Vec::new();
    for answer in [first.await.unwrap(), second.await.unwrap()] {
        let LookupResult::Failed(reason) = answer else { panic!("{answer:?}") };
        reasons.push(reason);
    }
    assert_eq!(reasons[0], "no answer within 300ms");
    assert!(reasons[1].ends_with("of it for a free connection"), "{reasons:?}");
}

#[tokio::test]
async fn an_answer_older_than_a_reload_is_not_kept() {
    let scripted = Scripted::new();
    let old = Arc::new(patient(&scripted));
    old.keep_since("ageing", RouteDecision::backend(BackendId(0)), HOUR / 10 * 9);
    let gate = gate(&scripted);
    for user in ["alice", "ageing"] {
        scripted.says(user, found(0));
    }
    // One user is found, one is unknown, and one answer is renewed ahead of time.
    let (alice, bob) = (in_flight(&old, &scripted, "alice").await, in_flight(&old, &scripted, "bob").await);
    assert_eq!(in_flight(&old, &scripted, "ageing").await.await.unwrap(), found(0));
    let new = Arc::new(patient(&scripted).with_answers_of(Some(&old)));
    new.start(tokio::runtime::Handle::current());
    drop(gate);
    assert_eq!((alice.await.unwrap(), bob.await.unwrap()), (found(0), LookupResult::Unknown));
    // Nobody waits for the renewal; it is over when no lookup is in flight.
    while old.is_asking(8) {
        tokio::task::yield_now().await;
    }
    for user in ["alice", "bob", "ageing"] {
        scripted.says(user, found(1));
    }
    for user in ["alice", "bob"] {
        assert_eq!(new.lookup(question(user)).await, (found(1), LookupOrigin::Directory), "{user}");
    }
    let (_, origin) = new.lookup(question("ageing")).await;
    assert!(matches!(origin, LookupOrigin::Cache(age) if age > HOUR / 2), "not renewed by the old lookup: {origin:?}");
}

#[tokio::test]
async fn an_answer_older_than_a_move_is_not_kept_by_any_configuration() {
    let scripted = Scripted::new();
    let old = Arc::new(patient(&scripted));
    let new = Arc::new(patient(&scripted).with_answers_of(Some(&old)));
    new.start(tokio::runtime::Handle::current());
    let gate = gate(&scripted);
    scripted.says("alice", found(0));
    // A login that still holds the old configuration asks; the user is forgotten in the new one.
    let alice = in_flight(&old, &scripted, "alice").await;
    new.forget("alice");
    drop(gate);
    assert_eq!(alice.await.unwrap(), found(0));
    scripted.says("alice", found(1));
    assert_eq!(new.lookup(question("alice")).await, (found(1), LookupOrigin::Directory));
}

#[tokio::test(start_paused = true)]
async fn a_forgotten_user_does_not_come_back_from_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("cache");
    let scripted = Scripted::new();
    scripted.says("alice", found(0));
    let location = Location::of_file(std::path::Path::new("v.yaml"));
    let file = Located { value: path.clone(), location };
    let with_file = || CacheConfig { file: Some(file.clone()), ..rules(HOUR) };
    let old = Arc::new(built(&scripted, HOUR, 8, Some(with_file())).0);
    let stop = tokio_util::sync::CancellationToken::new();
    let keeping = tokio::spawn(old.clone().keep_file(stop.clone()));
    old.lookup(question("alice")).await;
    let saved = || std::fs::read_to_string(&path).unwrap_or_default();
    while !saved().contains("alice") {
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    let new = built(&scripted, HOUR, 8, Some(with_file())).0.with_answers_of(Some(&old));
    old.forget("alice");
    new.read_file();
    assert_eq!(
        Arc::new(new).lookup(question("alice")).await.1,
        LookupOrigin::Directory,
        "a reload does not read the file"
    );
    old.forget("alice");
    let forgotten = tokio::time::Instant::now();
    while saved().contains("alice") {
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert!(forgotten.elapsed() < Duration::from_secs(30), "sooner than the next regular write");
    // A process with a successor leaves the file to it.
    old.leave_file();
    std::fs::write(&path, "the successor's").unwrap();
    stop.cancel();
    keeping.await.unwrap();
    assert_eq!(saved(), "the successor's");
}
