//! What `asked` does around a directory, shown with one that answers by a script.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::Semaphore;

use super::asked::Asked;
use super::directory::Directory;
use super::question::Question;
use super::target::{Declared, Target};
use super::{Answer, Origin};
use crate::config::{Asking, BackendId, Cache};
use crate::metrics::{Metrics, Names};

/// Answers by heart, as often as it is let.
#[derive(Debug, Clone)]
pub(super) struct Scripted {
    answers: Arc<Mutex<HashMap<String, Answer>>>,
    asked: Arc<AtomicUsize>,
    let_through: Arc<Semaphore>,
}

impl Scripted {
    fn new() -> Self {
        let let_through = Arc::new(Semaphore::new(Semaphore::MAX_PERMITS));
        Self { answers: Arc::default(), asked: Arc::default(), let_through }
    }

    pub(super) async fn ask(&self, question: &Question) -> Answer {
        self.asked.fetch_add(1, Ordering::SeqCst);
        let _leave = self.let_through.acquire().await.unwrap();
        self.answers.lock().unwrap().get(&*question.user).cloned().unwrap_or(Answer::Unknown)
    }

    fn says(&self, user: &str, answer: Answer) {
        self.answers.lock().unwrap().insert(user.to_owned(), answer);
    }

    fn asked(&self) -> usize {
        self.asked.load(Ordering::SeqCst)
    }
}

fn found(backend: usize) -> Answer {
    Answer::Found(Target::backend(BackendId(backend)).into())
}

fn failed() -> Answer {
    Answer::Failed("down".to_owned())
}

fn question(user: &str) -> Question {
    Question { user: user.into(), visitor: None }
}

fn asked(scripted: &Scripted, connections: usize, cache: bool) -> (Arc<Asked>, Metrics) {
    let metrics = Metrics::new(&Names { routes: vec!["test".to_owned()], ..Names::default() });
    let rules = Cache {
        ttl: Duration::from_millis(500),
        negative: Duration::from_secs(3600),
        stale: Duration::from_secs(3600),
        entries: 1000,
        file: None,
    };
    let asking = Asking {
        timeout: Duration::from_millis(300),
        connections,
        cache: cache.then_some(rules),
        names: std::collections::BTreeMap::new(),
    };
    let directory = Directory::Scripted(scripted.clone());
    let asked = Asked::new(directory, &asking, Declared::named(["a", "b"]), metrics.route(0).clone());
    (Arc::new(asked), metrics)
}

#[tokio::test]
async fn a_kept_answer_needs_no_question() {
    let scripted = Scripted::new();
    scripted.says("alice", found(0));
    let (asked, _metrics) = asked(&scripted, 1, true);
    assert_eq!(asked.lookup(question("alice")).await, (found(0), Origin::Asked));
    scripted.says("alice", found(1));
    let (answer, origin) = asked.lookup(question("alice")).await;
    assert_eq!(answer, found(0));
    assert!(matches!(origin, Origin::Cache(_)));
    for _ in 0..3 {
        assert_eq!(asked.lookup(question("bob")).await.0, Answer::Unknown);
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
        assert!(matches!(origin, Origin::Stale(_)), "{origin:?}");
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
        let Answer::Failed(reason) = answer else { panic!("{answer:?}") };
        reasons.push(reason);
    }
    assert_eq!(reasons[0], "no answer within 300ms");
    assert!(reasons[1].ends_with("of it for a free connection"), "{reasons:?}");
}
