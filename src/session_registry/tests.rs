//! The registry: chains of users, cancellation, holds, and which of two servers keeps a user.

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

/// A login of `user` that is under way on `server`.
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
    registry.list(100).iter().map(|seen| seen.info.user.to_string()).collect()
}

#[test]
fn seats_are_given_back_in_any_order() {
    let registry = Arc::new(SessionRegistry::default());
    let (one, two) = (server("a"), server("b"));
    let mut handles: Vec<SessionHandle> =
        (0..9).map(|number| login(&registry, ["x", "y", "z"][number % 3], &one)).collect();
    let other = login(&registry, "x", &two);
    assert_eq!(registry.of_user("x").len(), 4);
    // From the middle, the front and the end of a user's chain.
    for place in [3, 0, 4] {
        handles.remove(place);
    }
    assert_eq!((registry.of_user("x").len(), registry.of_user("y").len(), registry.of_user("z").len()), (1, 3, 3));
    assert_eq!(registry.count(|server| *server.name == *"b"), 1);
    drop(other);
    drop(handles);
    assert!(users(&registry).is_empty());
    assert!(registry.lock().entries.lists() == 0);
}

#[test]
fn users_whose_hashes_collide_are_different_users() {
    let registry = Arc::new(SessionRegistry { hashes_collide: true, ..SessionRegistry::default() });
    let (one, two) = (server("a"), server("b"));
    let (alice, bob, carol) =
        (session(&registry, "alice", &one), session(&registry, "bob", &one), login(&registry, "carol", &one));
    assert_eq!(registry.lock().entries.lists(), 1, "all are in one chain");
    // A login elsewhere moves its own user only, and is alone whatever registry the others have.
    let moved = login(&registry, "bob", &two);
    moved.accept_exclusively();
    assert!(moved.has_sessions_elsewhere());
    assert_eq!(
        (alice.cancel_signal().reason(), bob.cancel_signal().reason(), carol.cancel_signal().reason()),
        (None, Some(CancelReason::Replaced), None)
    );
    drop(bob);
    assert!(!moved.has_sessions_elsewhere());
    // So do a kick, the list, and a hold.
    assert_eq!(registry.cancel_user("nobody", CancelReason::Kicked), 0);
    assert_eq!(registry.cancel_user("alice", CancelReason::Kicked), 1);
    assert_eq!((moved.cancel_signal().reason(), carol.cancel_signal().reason()), (None, None));
    assert_eq!((registry.of_user("carol").len(), registry.of_user("dave").len()), (1, 0));
    let hold = registry.hold("alice".into());
    assert!(registry.register(info("alice")).is_err() && registry.register(info("carol")).is_ok());
    drop(hold);
    // A new name within the chain, and removal from its middle.
    let since = registry.generation();
    carol.set_server(&"dave".into(), &two, since).unwrap();
    assert_eq!((registry.of_user("carol").len(), registry.of_user("dave").len()), (0, 1));
    drop(moved);
    assert_eq!(
        (registry.of_user("alice").len(), registry.of_user("bob").len(), registry.of_user("dave").len()),
        (1, 0, 1)
    );
    drop((alice, carol));
    assert!(registry.lock().entries.lists() == 0);
}

#[test]
fn a_login_has_no_effect_on_other_sessions_until_a_server_accepts_it() {
    let registry = Arc::new(SessionRegistry::default());
    let (one, two) = (server("a"), server("b"));
    let (first, second) = (session(&registry, "x", &one), session(&registry, "x", &one));
    let bystander = session(&registry, "y", &one);
    let attack = login(&registry, "x", &two);
    assert_eq!(
        (first.cancel_signal().reason(), second.cancel_signal().reason()),
        (None, None),
        "nothing is proven yet"
    );
    drop(attack);
    let moved = login(&registry, "x", &two);
    moved.accept_exclusively();
    assert_eq!(
        (first.cancel_signal().reason(), second.cancel_signal().reason()),
        (Some(CancelReason::Replaced), Some(CancelReason::Replaced))
    );
    assert_eq!(bystander.cancel_signal().reason(), None);
    drop(first);
    assert!(moved.has_sessions_elsewhere());
    drop(second);
    assert!(!moved.has_sessions_elsewhere());
    assert_eq!(registry.of_user("x")[0].server.as_ref().unwrap().name, two.name);
    // A session whose server has closed its connection is not waited for, but can still be cancelled.
    moved.server_closed();
    let back = login(&registry, "x", &one);
    back.accept_exclusively();
    assert!(!back.has_sessions_elsewhere());
    assert_eq!(moved.cancel_signal().reason(), None);
    assert_eq!(registry.cancel_user("x", CancelReason::Kicked), 2);
    assert_eq!(registry.cancel_user("x", CancelReason::Kicked), 0, "both are cancelled already");
    // Another backend has its own servers.
    let there = session(&registry, "x", &one);
    let elsewhere = login(&registry, "x", &Arc::new(Server::named("other", "a")));
    elsewhere.accept_exclusively();
    assert!(!elsewhere.has_sessions_elsewhere());
    assert_eq!(there.cancel_signal().reason(), None);
}

#[test]
fn of_two_servers_that_accept_a_user_the_last_to_accept_keeps_it() {
    let registry = Arc::new(SessionRegistry::default());
    let servers = [server("a"), server("b"), server("c")];
    let old = session(&registry, "x", &servers[2]);
    // In both orders of arrival and of acceptance.
    for order in [[0, 1], [1, 0]] {
        let logins = [login(&registry, "x", &servers[0]), login(&registry, "x", &servers[1])];
        let [loser, winner] = order.map(|at| &logins[at]);
        loser.accept_exclusively();
        assert_eq!(
            (loser.cancel_signal().reason(), !loser.has_sessions_elsewhere()),
            (None, false),
            "it waits for the old session"
        );
        winner.accept_exclusively();
        assert_eq!(
            (loser.cancel_signal().reason(), winner.cancel_signal().reason()),
            (Some(CancelReason::Replaced), None)
        );
        assert!(loser.has_sessions_elsewhere() && winner.has_sessions_elsewhere(), "neither is established");
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
fn a_server_that_need_not_be_alone_leaves_others() {
    let registry = Arc::new(SessionRegistry::default());
    let there = session(&registry, "x", &server("a"));
    login(&registry, "x", &server("b")).accept();
    assert_eq!(there.cancel_signal().reason(), None);
}

#[tokio::test]
async fn a_hold_keeps_new_logins_out_until_it_ends() {
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
fn a_login_that_was_routed_before_a_hold_is_routed_again() {
    let registry = Arc::new(SessionRegistry::default());
    let one = server("a");
    // A login is registered under its own name while the routes are asked, so that a hold reaches it.
    let since = registry.generation();
    let routing = registry.register(info("x")).unwrap();
    drop(registry.hold("x".into()));
    assert_eq!(registry.cancel_user("x", CancelReason::Moved), 1);
    assert_eq!(routing.set_server(&"x".into(), &one, since).unwrap_err(), RegisterError::Outdated);
    drop(routing);
    // The mailbox may have another name, which only the routes know.
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
        "the answer may be old"
    );
    assert_eq!(alias.set_server(&"x".into(), &one, registry.generation()), Ok(()));
    assert_eq!((registry.of_user("alias").len(), registry.of_user("x").len()), (0, 1));
    drop(alias);
    assert!(registry.lock().entries.lists() == 0 && users(&registry).is_empty());
}

#[test]
fn a_call_wakes_and_keeps_its_first_reason() {
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
    assert_eq!(late.cancel_signal().reason(), Some(CancelReason::Stopped), "and so is one that comes after the end");
}

#[test]
fn a_server_is_emptied_bit_by_bit() {
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
    assert_eq!(registry.count(|_| true), 11, "a login without a server is on none");
}

#[test]
fn places_go_back_after_a_peak_whoever_stays() {
    let registry = Arc::new(SessionRegistry::default());
    let mut handles: Vec<SessionHandle> =
        (0..5000).map(|number| registry.register(info(&format!("u{number}"))).unwrap()).collect();
    handles.truncate(100);
    let capacity = || registry.lock().entries.capacity();
    // The session that ended last may have had the last place; later ends shrink the registry.
    (0..100).for_each(|_| drop(registry.register(info("late")).unwrap()));
    assert!(capacity().0 < 1000 && capacity().1 < 1000, "{:?}", capacity());
    (0..5000).for_each(|number| handles.push(registry.register(info(&format!("u{number}"))).unwrap()));
    drop(handles);
    assert!(capacity().0 < 300 && capacity().1 < 300, "{:?}", capacity());
}

#[test]
fn a_seat_is_small() {
    assert!(size_of::<Entry>() <= 96, "{}", size_of::<Entry>());
    assert!(size_of::<CancelSignal>() <= 32 && size_of::<SessionHandle>() <= 24);
}
