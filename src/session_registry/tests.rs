//! Tests of the session registry: lists of users, cancellation, holds, and which of two servers keeps a user.

use std::pin::pin;
use std::task::{Context, Poll};

use futures_util::task::noop_waker;
use tokio::time::timeout;

use super::*;

fn info(user: &str) -> SessionInfo {
    SessionInfo { user: user.into(), client: IpAddr::from([192, 0, 2, 1]), session: [b'x'; 16] }
}

fn server(name: &str) -> Arc<Server> {
    Arc::new(Server::named("shard", name))
}

/// A login of `user` on `server` that has not been accepted.
fn login(registry: &Arc<SessionRegistry>, user: &str, server: &Arc<Server>) -> SessionHandle {
    let since = registry.generation();
    let handle = registry.register(info(user)).unwrap();
    handle.set_server(&user.into(), server, since).unwrap();
    handle
}

/// A session of `user` that `server` has accepted.
fn session(registry: &Arc<SessionRegistry>, user: &str, server: &Arc<Server>) -> SessionHandle {
    let handle = login(registry, user, server);
    handle.accept_exclusively();
    assert!(!handle.has_sessions_elsewhere());
    handle.establish();
    handle
}

fn users(registry: &SessionRegistry) -> Vec<String> {
    registry.list(100).iter().map(|session| session.info.user.to_string()).collect()
}

#[test]
fn entries_are_removed_in_any_order() {
    let registry = Arc::new(SessionRegistry::default());
    let (one, two) = (server("a"), server("b"));
    let mut handles: Vec<SessionHandle> =
        (0..9).map(|number| login(&registry, ["x", "y", "z"][number % 3], &one)).collect();
    let other = login(&registry, "x", &two);
    assert_eq!(registry.of_user("x").len(), 4);
    // From the middle, the front and the end of the list of a user.
    for index in [3, 0, 4] {
        handles.remove(index);
    }
    assert_eq!((registry.of_user("x").len(), registry.of_user("y").len(), registry.of_user("z").len()), (1, 3, 3));
    assert_eq!(registry.count(|server| *server.name == *"b"), 1);
    drop(other);
    drop(handles);
    assert!(users(&registry).is_empty());
    assert_eq!(registry.lock().entries.list_count(), 0);
}

#[test]
fn users_whose_hashes_collide_are_different_users() {
    let registry = Arc::new(SessionRegistry { hashes_collide: true, ..SessionRegistry::default() });
    let (one, two) = (server("a"), server("b"));
    let (alice, bob, carol) =
        (session(&registry, "alice", &one), session(&registry, "bob", &one), login(&registry, "carol", &one));
    assert_eq!(registry.lock().entries.list_count(), 1, "all are in one list");
    // A login on another server ends sessions of its own user only, and does not wait for those of others.
    let moved = login(&registry, "bob", &two);
    moved.accept_exclusively();
    assert!(moved.has_sessions_elsewhere());
    assert_eq!(
        (alice.cancel_signal().reason(), bob.cancel_signal().reason(), carol.cancel_signal().reason()),
        (None, Some(CancelReason::Replaced), None)
    );
    drop(bob);
    assert!(!moved.has_sessions_elsewhere());
    // A kick, the list and a hold concern one user only, too.
    assert_eq!(registry.cancel_user("unknown", CancelReason::Kicked), 0);
    assert_eq!(registry.cancel_user("alice", CancelReason::Kicked), 1);
    assert_eq!((moved.cancel_signal().reason(), carol.cancel_signal().reason()), (None, None));
    assert_eq!((registry.of_user("carol").len(), registry.of_user("dave").len()), (1, 0));
    let hold = registry.hold("alice".into());
    assert!(registry.register(info("alice")).is_err() && registry.register(info("carol")).is_ok());
    drop(hold);
    // Rename within the list, and removal from its middle.
    let since = registry.generation();
    carol.set_server(&"dave".into(), &two, since).unwrap();
    assert_eq!((registry.of_user("carol").len(), registry.of_user("dave").len()), (0, 1));
    drop(moved);
    assert_eq!(
        (registry.of_user("alice").len(), registry.of_user("bob").len(), registry.of_user("dave").len()),
        (1, 0, 1)
    );
    drop((alice, carol));
    assert_eq!(registry.lock().entries.list_count(), 0);
}

#[test]
fn login_has_no_effect_on_other_sessions_until_a_server_accepts_it() {
    let registry = Arc::new(SessionRegistry::default());
    let (one, two) = (server("a"), server("b"));
    let (first, second) = (session(&registry, "x", &one), session(&registry, "x", &one));
    let other_user = session(&registry, "y", &one);
    let unaccepted = login(&registry, "x", &two);
    assert_eq!(
        (first.cancel_signal().reason(), second.cancel_signal().reason()),
        (None, None),
        "no server has accepted the login"
    );
    drop(unaccepted);
    let moved = login(&registry, "x", &two);
    moved.accept_exclusively();
    assert_eq!(
        (first.cancel_signal().reason(), second.cancel_signal().reason()),
        (Some(CancelReason::Replaced), Some(CancelReason::Replaced))
    );
    assert_eq!(other_user.cancel_signal().reason(), None);
    drop(first);
    assert!(moved.has_sessions_elsewhere());
    drop(second);
    assert!(!moved.has_sessions_elsewhere());
    assert_eq!(registry.of_user("x")[0].server.as_ref().unwrap().name, two.name);
    // No login waits for a session whose server has closed, but it can still be cancelled.
    moved.server_closed();
    let back = login(&registry, "x", &one);
    back.accept_exclusively();
    assert!(!back.has_sessions_elsewhere());
    assert_eq!(moved.cancel_signal().reason(), None);
    assert_eq!(registry.cancel_user("x", CancelReason::Kicked), 2);
    assert_eq!(registry.cancel_user("x", CancelReason::Kicked), 0, "both have been cancelled");
    // Sessions on another backend are not affected.
    let there = session(&registry, "x", &one);
    let elsewhere = login(&registry, "x", &Arc::new(Server::named("other", "a")));
    elsewhere.accept_exclusively();
    assert!(!elsewhere.has_sessions_elsewhere());
    assert_eq!(there.cancel_signal().reason(), None);
}

#[test]
fn server_that_accepts_a_user_last_keeps_the_user() {
    let registry = Arc::new(SessionRegistry::default());
    let servers = [server("a"), server("b"), server("c")];
    let old = session(&registry, "x", &servers[2]);
    // In both orders of registration and acceptance.
    for order in [[0, 1], [1, 0]] {
        let logins = [login(&registry, "x", &servers[0]), login(&registry, "x", &servers[1])];
        let [replaced, later] = order.map(|index| &logins[index]);
        replaced.accept_exclusively();
        assert_eq!(
            (replaced.cancel_signal().reason(), replaced.has_sessions_elsewhere()),
            (None, true),
            "it waits for the old session"
        );
        later.accept_exclusively();
        assert_eq!(
            (replaced.cancel_signal().reason(), later.cancel_signal().reason()),
            (Some(CancelReason::Replaced), None)
        );
        assert!(replaced.has_sessions_elsewhere() && later.has_sessions_elsewhere(), "neither is established");
    }
    drop(old);
    let (first, second) = (login(&registry, "x", &servers[0]), login(&registry, "x", &servers[1]));
    let third = login(&registry, "x", &servers[0]);
    first.accept_exclusively();
    second.accept_exclusively();
    third.accept_exclusively();
    assert_eq!(
        [&first, &second, &third].map(|handle| handle.cancel_signal().reason()),
        [Some(CancelReason::Replaced), Some(CancelReason::Replaced), None]
    );
    drop(second);
    assert!(!third.has_sessions_elsewhere(), "the first is on the same server");
}

#[test]
fn login_that_is_not_exclusive_leaves_other_sessions() {
    let registry = Arc::new(SessionRegistry::default());
    let there = session(&registry, "x", &server("a"));
    login(&registry, "x", &server("b")).accept();
    assert_eq!(there.cancel_signal().reason(), None);
}

#[tokio::test]
async fn hold_prevents_new_logins_until_it_ends() {
    let registry = Arc::new(SessionRegistry::default());
    let (hold, again) = (registry.hold("x".into()), registry.hold("x".into()));
    assert_eq!(registry.register(info("x")).unwrap_err(), RegisterError::OnHold("x".into()));
    assert!(registry.register(info("y")).is_ok());
    drop(hold);
    assert!(registry.is_on_hold("x"));
    let mut free = pin!(registry.wait_until(|registry| !registry.is_on_hold("x")));
    assert!(timeout(Duration::ZERO, &mut free).await.is_err());
    drop(again);
    free.await;
    assert!(registry.register(info("x")).is_ok());
}

#[test]
fn login_routed_before_a_hold_is_routed_again() {
    let registry = Arc::new(SessionRegistry::default());
    let one = server("a");
    // A login is registered under its own name while the routes are queried, so that a hold cancels it.
    let since = registry.generation();
    let routing = registry.register(info("x")).unwrap();
    drop(registry.hold("x".into()));
    assert_eq!(registry.cancel_user("x", CancelReason::Moved), 1);
    assert_eq!(routing.set_server(&"x".into(), &one, since).unwrap_err(), RegisterError::Outdated);
    drop(routing);
    // The mailbox may have another name, which is known only after the lookup.
    let alias = registry.register(info("alias")).unwrap();
    let since = registry.generation();
    let hold = registry.hold("x".into());
    assert_eq!(alias.set_server(&"x".into(), &one, since).unwrap_err(), RegisterError::OnHold("x".into()));
    let during = registry.generation();
    drop(hold);
    assert_eq!(alias.set_server(&"x".into(), &one, since).unwrap_err(), RegisterError::Outdated);
    assert_eq!(
        alias.set_server(&"x".into(), &one, during).unwrap_err(),
        RegisterError::Outdated,
        "the lookup may be older than the move"
    );
    assert_eq!(alias.set_server(&"x".into(), &one, registry.generation()), Ok(()));
    assert_eq!((registry.of_user("alias").len(), registry.of_user("x").len()), (0, 1));
    drop(alias);
    assert!(registry.lock().entries.list_count() == 0 && users(&registry).is_empty());
}

#[test]
fn cancel_signal_wakes_and_keeps_its_first_reason() {
    let registry = Arc::new(SessionRegistry::default());
    let handle = session(&registry, "x", &server("a"));
    let routing = registry.register(info("w")).unwrap();
    let waker = noop_waker();
    let context = Context::from_waker(&waker);
    assert_eq!(handle.cancel_signal().poll(&context), Poll::Pending);
    assert_eq!(registry.cancel_user("x", CancelReason::Kicked), 1);
    registry.close();
    assert_eq!(handle.cancel_signal().poll(&context), Poll::Ready(CancelReason::Kicked));
    assert_eq!(
        routing.cancel_signal().reason(),
        Some(CancelReason::Stopped),
        "a login without a server is cancelled too"
    );
    let late = registry.register(info("y")).unwrap();
    assert_eq!(
        late.cancel_signal().reason(),
        Some(CancelReason::Stopped),
        "a login that registers after the close is cancelled at once"
    );
}

#[test]
fn sessions_of_a_server_are_cancelled_in_steps() {
    let registry = Arc::new(SessionRegistry::default());
    let (one, two) = (server("a"), server("b"));
    let handles: Vec<SessionHandle> = (0..10).map(|number| login(&registry, &format!("u{number}"), &one)).collect();
    let stays = login(&registry, "z", &two);
    let routing = registry.register(info("w")).unwrap();
    let on_one = |server: &Server| *server.name == *"a";
    let accepted = session(&registry, "y", &two);
    registry.cancel_logins(CancelReason::Drained, |server| *server.name == *"b");
    assert_eq!(
        (stays.cancel_signal().reason(), accepted.cancel_signal().reason()),
        (Some(CancelReason::Drained), None)
    );
    drop((stays, accepted));
    let stays = login(&registry, "z", &two);
    for (cancelled, remaining) in [(4, 6), (4, 2), (2, 0)] {
        assert_eq!(registry.cancel_up_to(4, CancelReason::Drained, on_one), cancelled);
        assert_eq!(registry.count_uncancelled(on_one), remaining);
    }
    assert_eq!(
        handles.iter().filter(|handle| handle.cancel_signal().reason() == Some(CancelReason::Drained)).count(),
        10
    );
    assert_eq!((stays.cancel_signal().reason(), routing.cancel_signal().reason()), (None, None));
    assert_eq!(registry.count(|_| true), 11, "a login without a server is not counted");
}

#[test]
fn memory_is_given_back_after_a_peak() {
    let registry = Arc::new(SessionRegistry::default());
    let mut handles: Vec<SessionHandle> =
        (0..5000).map(|number| registry.register(info(&format!("u{number}"))).unwrap()).collect();
    handles.truncate(100);
    let capacity = || registry.lock().entries.capacity();
    // If the session that ended last had the last slot, the registry shrinks when later sessions end.
    (0..100).for_each(|_| drop(registry.register(info("late")).unwrap()));
    assert!(capacity().0 < 1000 && capacity().1 < 1000, "{:?}", capacity());
    (0..5000).for_each(|number| handles.push(registry.register(info(&format!("u{number}"))).unwrap()));
    drop(handles);
    assert!(capacity().0 < 300 && capacity().1 < 300, "{:?}", capacity());
}

#[test]
fn entries_are_small() {
    assert!(size_of::<Entry>() <= 96, "{}", size_of::<Entry>());
    assert!(size_of::<CancelSignal>() <= 32 && size_of::<SessionHandle>() <= 24);
}
