//! Tests of caching, merging and limiting, with a scripted directory.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::Semaphore;

use super::CachedDirectory;
use crate::config::{BackendId, CacheConfig, Located, Location, LookupConfig};
use crate::metrics::{Metrics, Names};
use crate::route::answer::DeclaredBackends;
use crate::route::decision::RouteDecision;
use crate::route::directory::Directory;
use crate::route::request::LookupRequest;
use crate::route::{LookupOrigin, LookupResult};

const HOUR: Duration = Duration::from_secs(3600);

/// A directory with fixed results, whose queries can be blocked.
#[derive(Debug, Clone)]
pub(in crate::route) struct Scripted {
    results: Arc<Mutex<HashMap<String, LookupResult>>>,
    queries: Arc<AtomicUsize>,
    permits: Arc<Semaphore>,
}

impl Scripted {
    fn new() -> Self {
        let permits = Arc::new(Semaphore::new(Semaphore::MAX_PERMITS));
        Self { results: Arc::default(), queries: Arc::default(), permits }
    }

    pub(in crate::route) async fn query(&self, request: &LookupRequest) -> LookupResult {
        self.queries.fetch_add(1, Ordering::SeqCst);
        let _permit = self.permits.acquire().await.unwrap();
        self.results.lock().unwrap().get(&*request.user).cloned().unwrap_or(LookupResult::Unknown)
    }

    fn set_result(&self, user: &str, result: LookupResult) {
        self.results.lock().unwrap().insert(user.to_owned(), result);
    }

    fn queries(&self) -> usize {
        self.queries.load(Ordering::SeqCst)
    }
}

fn found(backend: usize) -> LookupResult {
    LookupResult::Found(RouteDecision::backend(BackendId(backend)).into())
}

fn failed() -> LookupResult {
    LookupResult::Failed("down".to_owned())
}

fn request(user: &str) -> LookupRequest {
    LookupRequest { user: user.into(), login_context: None }
}

/// Blocks queries until it is dropped.
fn block(scripted: &Scripted) -> tokio::sync::OwnedSemaphorePermit {
    let blocked = scripted.permits.clone().try_acquire_many_owned(u32::MAX >> 4).unwrap();
    scripted.permits.forget_permits(usize::MAX >> 3);
    blocked
}

/// Starts a lookup of `user`, and waits until its query has begun.
async fn in_flight(
    directory: &Arc<CachedDirectory>,
    scripted: &Scripted,
    user: &'static str,
) -> tokio::task::JoinHandle<LookupResult> {
    let (before, directory) = (scripted.queries(), directory.clone());
    let lookup = tokio::spawn(async move { directory.lookup(request(user)).await.0 });
    while scripted.queries() == before {
        tokio::task::yield_now().await;
    }
    lookup
}

fn directory(scripted: &Scripted, connections: usize, has_cache: bool) -> (Arc<CachedDirectory>, Metrics) {
    let cache = cache_config(Duration::from_millis(500));
    let (directory, metrics) = build(scripted, Duration::from_millis(300), connections, has_cache.then_some(cache));
    (Arc::new(directory), metrics)
}

fn cache_config(ttl: Duration) -> CacheConfig {
    CacheConfig { ttl, negative: HOUR, stale: HOUR, entries: 1000, file: None }
}

fn build(
    scripted: &Scripted,
    timeout: Duration,
    connections: usize,
    cache: Option<CacheConfig>,
) -> (CachedDirectory, Metrics) {
    let metrics = Metrics::new(&Names { routes: vec!["test".to_owned()], ..Names::default() });
    let lookup = LookupConfig { timeout, connections, cache, names: std::collections::BTreeMap::new() };
    let directory = Directory::Scripted(scripted.clone());
    let directory =
        CachedDirectory::new(directory, &lookup, DeclaredBackends::named(["a", "b"]), metrics.route(0).clone());
    (directory, metrics)
}

/// A directory with a long timeout and a cache of an hour.
fn slow_directory(scripted: &Scripted) -> CachedDirectory {
    build(scripted, Duration::from_secs(60), 8, Some(cache_config(HOUR))).0
}

#[tokio::test]
async fn cached_result_needs_no_query() {
    let scripted = Scripted::new();
    scripted.set_result("alice", found(0));
    let (directory, _metrics) = directory(&scripted, 1, true);
    assert_eq!(directory.lookup(request("alice")).await, (found(0), LookupOrigin::Directory));
    scripted.set_result("alice", found(1));
    let (result, origin) = directory.lookup(request("alice")).await;
    assert_eq!(result, found(0));
    assert!(matches!(origin, LookupOrigin::Cache(_)));
    for _ in 0..3 {
        assert_eq!(directory.lookup(request("bob")).await.0, LookupResult::Unknown);
    }
    assert_eq!(scripted.queries(), 2, "one query for alice, one for bob");
}

#[tokio::test]
async fn concurrent_lookups_of_one_user_share_a_query() {
    let scripted = Scripted::new();
    scripted.set_result("alice", found(0));
    let blocked = scripted.permits.clone().acquire_many_owned(u32::MAX >> 4).await.unwrap();
    scripted.permits.forget_permits(usize::MAX >> 3);
    let (directory, _metrics) = directory(&scripted, 4, true);
    let waiting: Vec<_> = (0..50)
        .map(|_| {
            let directory = directory.clone();
            tokio::spawn(async move { directory.lookup(request("alice")).await.0 })
        })
        .collect();
    while scripted.queries() == 0 {
        tokio::task::yield_now().await;
    }
    drop(blocked);
    for lookup in waiting {
        assert_eq!(lookup.await.unwrap(), found(0));
    }
    assert_eq!(scripted.queries(), 1);
}

#[tokio::test]
async fn failing_directory_leaves_stale_results_in_use_and_unknown_users_fail() {
    let scripted = Scripted::new();
    scripted.set_result("alice", found(0));
    let (directory, metrics) = directory(&scripted, 1, true);
    directory.lookup(request("alice")).await;
    scripted.set_result("alice", failed());
    scripted.set_result("carol", failed());
    tokio::time::sleep(Duration::from_millis(600)).await;
    // The first lookup queries the directory; the next one backs off.
    for queries in [2, 2] {
        let (result, origin) = directory.lookup(request("alice")).await;
        assert_eq!(result, found(0));
        assert!(matches!(origin, LookupOrigin::Stale(_)), "{origin:?}");
        assert_eq!(scripted.queries(), queries);
    }
    assert_eq!(directory.lookup(request("carol")).await.0, failed(), "the user must not count as unknown");
    let text = metrics.render();
    assert!(text.contains("vestibule_route_failing{route=\"test\"} 1"), "{text}");
    assert!(text.contains("vestibule_route_cache_total{route=\"test\",state=\"stale\"} 2"), "{text}");
    scripted.set_result("carol", found(1));
    assert_eq!(directory.lookup(request("carol")).await.0, found(1));
    assert!(metrics.render().contains("vestibule_route_failing{route=\"test\"} 0"));
}

#[tokio::test]
async fn ageing_entry_is_renewed_in_the_background() {
    let scripted = Scripted::new();
    scripted.set_result("alice", found(0));
    let (directory, _metrics) = directory(&scripted, 1, true);
    directory.lookup(request("alice")).await;
    scripted.set_result("alice", found(1));
    tokio::time::sleep(Duration::from_millis(420)).await;
    assert_eq!(directory.lookup(request("alice")).await.0, found(0));
    while directory.lookup(request("alice")).await.0 != found(1) {
        tokio::task::yield_now().await;
    }
    assert_eq!(scripted.queries(), 2);
}

#[tokio::test]
async fn directory_that_hangs_fails_lookups_in_time_with_the_reason() {
    let scripted = Scripted::new();
    let _blocked = scripted.permits.clone().acquire_many_owned(u32::MAX >> 4).await.unwrap();
    scripted.permits.forget_permits(usize::MAX >> 3);
    let (directory, _metrics) = directory(&scripted, 1, false);
    let lookup = |user: &'static str| {
        let directory = directory.clone();
        tokio::spawn(async move { directory.lookup(request(user)).await.0 })
    };
    let (first, second) = (lookup("alice"), lookup("bob"));
    let mut reasons = Vec::new();
    for result in [first.await.unwrap(), second.await.unwrap()] {
        let LookupResult::Failed(reason) = result else { panic!("{result:?}") };
        reasons.push(reason);
    }
    assert_eq!(reasons[0], "no answer within 300ms");
    assert!(reasons[1].ends_with("of it for a free connection"), "{reasons:?}");
}

#[tokio::test]
async fn result_older_than_a_reload_is_not_cached() {
    let scripted = Scripted::new();
    let old = Arc::new(slow_directory(&scripted));
    old.insert_with_age("ageing", RouteDecision::backend(BackendId(0)), HOUR / 10 * 9);
    let blocked = block(&scripted);
    for user in ["alice", "ageing"] {
        scripted.set_result(user, found(0));
    }
    // One user is found, one is unknown, and one entry is renewed.
    let (alice, bob) = (in_flight(&old, &scripted, "alice").await, in_flight(&old, &scripted, "bob").await);
    assert_eq!(in_flight(&old, &scripted, "ageing").await.await.unwrap(), found(0));
    let new = Arc::new(slow_directory(&scripted).with_cache_of(Some(&old)));
    new.start(tokio::runtime::Handle::current());
    drop(blocked);
    assert_eq!((alice.await.unwrap(), bob.await.unwrap()), (found(0), LookupResult::Unknown));
    // The renewal has ended when no query is in progress.
    while old.is_querying(8) {
        tokio::task::yield_now().await;
    }
    for user in ["alice", "bob", "ageing"] {
        scripted.set_result(user, found(1));
    }
    for user in ["alice", "bob"] {
        assert_eq!(new.lookup(request(user)).await, (found(1), LookupOrigin::Directory), "{user}");
    }
    let (_, origin) = new.lookup(request("ageing")).await;
    assert!(matches!(origin, LookupOrigin::Cache(age) if age > HOUR / 2), "not renewed by the old lookup: {origin:?}");
}

#[tokio::test]
async fn result_older_than_a_move_is_not_cached_by_any_configuration() {
    let scripted = Scripted::new();
    let old = Arc::new(slow_directory(&scripted));
    let new = Arc::new(slow_directory(&scripted).with_cache_of(Some(&old)));
    new.start(tokio::runtime::Handle::current());
    let blocked = block(&scripted);
    scripted.set_result("alice", found(0));
    // A login with the old configuration starts a lookup; the user is forgotten in the new one.
    let alice = in_flight(&old, &scripted, "alice").await;
    new.forget("alice");
    drop(blocked);
    assert_eq!(alice.await.unwrap(), found(0));
    scripted.set_result("alice", found(1));
    assert_eq!(new.lookup(request("alice")).await, (found(1), LookupOrigin::Directory));
}

#[tokio::test(start_paused = true)]
async fn forgotten_user_is_not_restored_from_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("cache");
    let scripted = Scripted::new();
    scripted.set_result("alice", found(0));
    let location = Location::of_file(std::path::Path::new("v.yaml"));
    let file = Located { value: path.clone(), location };
    let with_file = || CacheConfig { file: Some(file.clone()), ..cache_config(HOUR) };
    let old = Arc::new(build(&scripted, HOUR, 8, Some(with_file())).0);
    let stop = tokio_util::sync::CancellationToken::new();
    let writing = tokio::spawn(old.clone().write_cache_file_regularly(stop.clone()));
    old.lookup(request("alice")).await;
    let saved = || std::fs::read_to_string(&path).unwrap_or_default();
    while !saved().contains("alice") {
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    let new = build(&scripted, HOUR, 8, Some(with_file())).0.with_cache_of(Some(&old));
    old.forget("alice");
    new.read_cache_file();
    assert_eq!(
        Arc::new(new).lookup(request("alice")).await.1,
        LookupOrigin::Directory,
        "a reload does not read the file"
    );
    old.forget("alice");
    let forgotten = tokio::time::Instant::now();
    while saved().contains("alice") {
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert!(forgotten.elapsed() < Duration::from_secs(30), "sooner than the next regular write");
    // A process with a successor does not write the file.
    old.stop_writing_cache_file();
    std::fs::write(&path, "the successor's").unwrap();
    stop.cancel();
    writing.await.unwrap();
    assert_eq!(saved(), "the successor's");
}
