//! The registry: chains of users, cancellation, holds, and which of two servers keeps a user.

use std::pin::pin;

use futures_util::task::noop_waker;
use tokio::time::timeout;

use super::*;

fn guest(user: &str) -> SessionInfo {
    SessionInfo { user: user.into(), client: IpAddr::from([192, 0, 2, 1]), session: [b'x'; 16] }
}

fn server(name: &str) -> Arc<Server> {
    Arc::new(Server::named("shard", name))
}

/// A login of `user` that is under way on `server`.
fn login(sessions: &Arc<Sessions>, user: &str, server: &Arc<Server>) -> SessionHandle {
    let since = sessions.generation();
    let seat = sessions.take(guest(user)).unwrap();
    seat.place(&user.into(), server, since).unwrap();
    seat
}

/// A session of `user` that `server` has accepted.
fn session(sessions: &Arc<Sessions>, user: &str, server: &Arc<Server>) -> SessionHandle {
    let seat = login(sessions, user, server);
    seat.accept(true);
    assert!(seat.is_alone());
    seat.settle();
    seat
}

fn users(sessions: &Sessions) -> Vec<String> {
    sessions.list(100).iter().map(|seen| seen.guest.user.to_string()).collect()
}

#[test]
fn seats_are_given_back_in_any_order() {
    let sessions = Arc::new(Sessions::default());
    let (one, two) = (server("a"), server("b"));
    let mut seats: Vec<SessionHandle> =
        (0..9).map(|number| login(&sessions, ["x", "y", "z"][number % 3], &one)).collect();
    let other = login(&sessions, "x", &two);
    assert_eq!(sessions.of_user("x").len(), 4);
    // From the middle, the front and the end of a user's chain.
    for place in [3, 0, 4] {
        seats.remove(place);
    }
    assert_eq!((sessions.of_user("x").len(), sessions.of_user("y").len(), sessions.of_user("z").len()), (1, 3, 3));
    assert_eq!(sessions.count(|server| *server.name == *"b"), 1);
    drop(other);
    drop(seats);
    assert!(users(&sessions).is_empty());
    assert!(sessions.lock().users.is_empty());
}

#[test]
fn users_whose_hashes_collide_are_different_users() {
    let sessions = Arc::new(Sessions { hashes_collide: true, ..Sessions::default() });
    let (one, two) = (server("a"), server("b"));
    let (alice, bob, carol) =
        (session(&sessions, "alice", &one), session(&sessions, "bob", &one), login(&sessions, "carol", &one));
    assert_eq!(sessions.lock().users.len(), 1, "all are in one chain");
    // A login elsewhere moves its own user only, and is alone whatever sessions the others have.
    let moved = login(&sessions, "bob", &two);
    moved.accept(true);
    assert!(!moved.is_alone());
    assert_eq!((alice.call().why(), bob.call().why(), carol.call().why()), (None, Some(CancelReason::Replaced), None));
    drop(bob);
    assert!(moved.is_alone());
    // So do a kick, the list, and a hold.
    assert_eq!(sessions.end_user("nobody", CancelReason::Kicked), 0);
    assert_eq!(sessions.end_user("alice", CancelReason::Kicked), 1);
    assert_eq!((moved.call().why(), carol.call().why()), (None, None));
    assert_eq!((sessions.of_user("carol").len(), sessions.of_user("dave").len()), (1, 0));
    let hold = sessions.hold("alice".into());
    assert!(sessions.take(guest("alice")).is_err() && sessions.take(guest("carol")).is_ok());
    drop(hold);
    // A new name within the chain, and removal from its middle.
    let since = sessions.generation();
    carol.place(&"dave".into(), &two, since).unwrap();
    assert_eq!((sessions.of_user("carol").len(), sessions.of_user("dave").len()), (0, 1));
    drop(moved);
    assert_eq!(
        (sessions.of_user("alice").len(), sessions.of_user("bob").len(), sessions.of_user("dave").len()),
        (1, 0, 1)
    );
    drop((alice, carol));
    assert!(sessions.lock().users.is_empty());
}

#[test]
fn a_login_has_no_effect_on_other_sessions_until_a_server_accepts_it() {
    let sessions = Arc::new(Sessions::default());
    let (one, two) = (server("a"), server("b"));
    let (first, second) = (session(&sessions, "x", &one), session(&sessions, "x", &one));
    let bystander = session(&sessions, "y", &one);
    let attack = login(&sessions, "x", &two);
    assert_eq!((first.call().why(), second.call().why()), (None, None), "nothing is proven yet");
    drop(attack);
    let moved = login(&sessions, "x", &two);
    moved.accept(true);
    assert_eq!((first.call().why(), second.call().why()), (Some(CancelReason::Replaced), Some(CancelReason::Replaced)));
    assert_eq!(bystander.call().why(), None);
    drop(first);
    assert!(!moved.is_alone());
    drop(second);
    assert!(moved.is_alone());
    assert_eq!(sessions.of_user("x")[0].server.as_ref().unwrap().name, two.name);
    // A session whose server has closed its connection is not waited for, but can still be cancelled.
    moved.cut_off();
    let back = login(&sessions, "x", &one);
    back.accept(true);
    assert!(back.is_alone());
    assert_eq!(moved.call().why(), None);
    assert_eq!(sessions.end_user("x", CancelReason::Kicked), 2);
    assert_eq!(sessions.end_user("x", CancelReason::Kicked), 0, "both are cancelled already");
    // Another backend has its own servers.
    let there = session(&sessions, "x", &one);
    let elsewhere = login(&sessions, "x", &Arc::new(Server::named("other", "a")));
    elsewhere.accept(true);
    assert!(elsewhere.is_alone());
    assert_eq!(there.call().why(), None);
}

#[test]
fn of_two_servers_that_accept_a_user_the_last_to_accept_keeps_it() {
    let sessions = Arc::new(Sessions::default());
    let servers = [server("a"), server("b"), server("c")];
    let old = session(&sessions, "x", &servers[2]);
    // In both orders of arrival and of acceptance.
    for order in [[0, 1], [1, 0]] {
        let logins = [login(&sessions, "x", &servers[0]), login(&sessions, "x", &servers[1])];
        let [loser, winner] = order.map(|at| &logins[at]);
        loser.accept(true);
        assert_eq!((loser.call().why(), loser.is_alone()), (None, false), "it waits for the old session");
        winner.accept(true);
        assert_eq!((loser.call().why(), winner.call().why()), (Some(CancelReason::Replaced), None));
        assert!(!loser.is_alone() && !winner.is_alone(), "neither is established");
    }
    drop(old);
    let (first, second) = (login(&sessions, "x", &servers[0]), login(&sessions, "x", &servers[1]));
    let third = login(&sessions, "x", &servers[0]);
    first.accept(true);
    second.accept(true);
    third.accept(true);
    assert_eq!(
        [&first, &second, &third].map(|seat| seat.call().why()),
        [Some(CancelReason::Replaced), Some(CancelReason::Replaced), None]
    );
    drop(second);
    assert!(third.is_alone(), "the first is on the same server");
}

#[test]
fn a_server_that_need_not_be_alone_leaves_others() {
    let sessions = Arc::new(Sessions::default());
    let there = session(&sessions, "x", &server("a"));
    login(&sessions, "x", &server("b")).accept(false);
    assert_eq!(there.call().why(), None);
}

#[tokio::test]
async fn a_hold_keeps_new_logins_out_until_it_ends() {
    let sessions = Arc::new(Sessions::default());
    let (hold, again) = (sessions.hold("x".into()), sessions.hold("x".into()));
    assert_eq!(sessions.take(guest("x")).unwrap_err(), RegisterError::Held("x".into()));
    assert!(sessions.take(guest("y")).is_ok());
    drop(hold);
    assert!(sessions.is_held("x"));
    let mut free = pin!(sessions.changed(|sessions| !sessions.is_held("x")));
    assert!(timeout(Duration::ZERO, &mut free).await.is_err());
    drop(again);
    free.await;
    assert!(sessions.take(guest("x")).is_ok());
}

#[test]
fn a_login_that_was_routed_before_a_hold_is_routed_again() {
    let sessions = Arc::new(Sessions::default());
    let one = server("a");
    // A login is registered under its own name while the routes are asked, so that a hold reaches it.
    let since = sessions.generation();
    let routing = sessions.take(guest("x")).unwrap();
    drop(sessions.hold("x".into()));
    assert_eq!(sessions.end_user("x", CancelReason::Moved), 1);
    assert_eq!(routing.place(&"x".into(), &one, since).unwrap_err(), RegisterError::Outdated);
    drop(routing);
    // The mailbox may have another name, which only the routes know.
    let alias = sessions.take(guest("alias")).unwrap();
    let since = sessions.generation();
    let hold = sessions.hold("x".into());
    assert_eq!(alias.place(&"x".into(), &one, since).unwrap_err(), RegisterError::Held("x".into()));
    let during = sessions.generation();
    drop(hold);
    assert_eq!(alias.place(&"x".into(), &one, since).unwrap_err(), RegisterError::Outdated);
    assert_eq!(alias.place(&"x".into(), &one, during).unwrap_err(), RegisterError::Outdated, "the answer may be old");
    assert_eq!(alias.place(&"x".into(), &one, sessions.generation()), Ok(()));
    assert_eq!((sessions.of_user("alias").len(), sessions.of_user("x").len()), (0, 1));
    drop(alias);
    assert!(sessions.lock().users.is_empty() && users(&sessions).is_empty());
}

#[test]
fn a_call_wakes_and_keeps_its_first_reason() {
    let sessions = Arc::new(Sessions::default());
    let seat = session(&sessions, "x", &server("a"));
    let routing = sessions.take(guest("w")).unwrap();
    let waker = noop_waker();
    let context = Context::from_waker(&waker);
    assert_eq!(seat.call().poll(&context), Poll::Pending);
    assert_eq!(sessions.end_user("x", CancelReason::Kicked), 1);
    sessions.close();
    assert_eq!(seat.call().poll(&context), Poll::Ready(CancelReason::Kicked));
    assert_eq!(routing.call().why(), Some(CancelReason::Stopped), "a login without a server is cancelled too");
    let late = sessions.take(guest("y")).unwrap();
    assert_eq!(late.call().why(), Some(CancelReason::Stopped), "and so is one that comes after the end");
}

#[test]
fn a_server_is_emptied_bit_by_bit() {
    let sessions = Arc::new(Sessions::default());
    let (one, two) = (server("a"), server("b"));
    let seats: Vec<SessionHandle> = (0..10).map(|number| login(&sessions, &format!("u{number}"), &one)).collect();
    let stays = login(&sessions, "z", &two);
    let routing = sessions.take(guest("w")).unwrap();
    let on_one = |server: &Server| *server.name == *"a";
    let accepted = session(&sessions, "y", &two);
    sessions.end_logins(CancelReason::Drained, |server| *server.name == *"b");
    assert_eq!((stays.call().why(), accepted.call().why()), (Some(CancelReason::Drained), None));
    drop((stays, accepted));
    let stays = login(&sessions, "z", &two);
    assert_eq!(sessions.end_some(4, CancelReason::Drained, on_one), (4, 6));
    assert_eq!(sessions.end_some(4, CancelReason::Drained, on_one), (4, 2));
    assert_eq!(sessions.end_some(4, CancelReason::Drained, on_one), (2, 0));
    assert_eq!(seats.iter().filter(|seat| seat.call().why() == Some(CancelReason::Drained)).count(), 10);
    assert_eq!((stays.call().why(), routing.call().why()), (None, None));
    assert_eq!(sessions.count(|_| true), 11, "a login without a server is on none");
}

#[test]
fn places_go_back_after_a_peak_whoever_stays() {
    let sessions = Arc::new(Sessions::default());
    let mut seats: Vec<SessionHandle> =
        (0..5000).map(|number| sessions.take(guest(&format!("u{number}"))).unwrap()).collect();
    seats.truncate(100);
    let places = || {
        let inside = sessions.lock();
        (inside.taken.capacity(), inside.users.capacity())
    };
    // The session that ended last may have had the last place; later ends shrink the registry.
    (0..100).for_each(|_| drop(sessions.take(guest("late")).unwrap()));
    assert!(places().0 < 1000 && places().1 < 1000, "{:?}", places());
    (0..5000).for_each(|number| seats.push(sessions.take(guest(&format!("u{number}"))).unwrap()));
    drop(seats);
    assert!(places().0 < 300 && places().1 < 300, "{:?}", places());
}

#[test]
fn a_seat_is_small() {
    assert!(size_of::<Taken>() <= 96, "{}", size_of::<Taken>());
    assert!(size_of::<CancelSignal>() <= 32 && size_of::<SessionHandle>() <= 24);
}
