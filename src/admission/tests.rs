//! The guard as a whole.

use proptest::prelude::*;

use super::*;
use crate::config::{AccessConfig, Network, Rate};

fn rate(events: u32, seconds: u64) -> Option<Rate> {
    Some(Rate { events, per: Duration::from_secs(seconds) })
}

fn network(text: &str) -> Network {
    Network::parse(text).unwrap()
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn guard(config: &config::AdmissionConfig) -> (Arc<AdmissionControl>, Instant) {
    let began = Instant::now();
    (Arc::new(AdmissionControl::new(config, began)), began)
}

fn pass(guard: &Arc<AdmissionControl>, now: Instant, client: &str) -> Result<ConnectionCount, ConnectionRefused> {
    guard.admit(now, ip(client))
}

#[test]
fn a_pass_is_small() {
    assert!(size_of::<ConnectionCount>() <= 24, "{}", size_of::<ConnectionCount>());
}

#[test]
fn sessions_of_an_address_are_counted_and_ipv6_by_64_bits() {
    let (guard, now) = guard(&config::AdmissionConfig { sessions_per_address: Some(2), ..Default::default() });
    let first = pass(&guard, now, "192.0.2.1").unwrap();
    let _second = pass(&guard, now, "::ffff:192.0.2.1").unwrap();
    assert_eq!(pass(&guard, now, "192.0.2.1").unwrap_err(), ConnectionRefused::Address);
    let _neighbour = pass(&guard, now, "192.0.2.2").unwrap();
    drop(first);
    let _third = pass(&guard, now, "192.0.2.1").unwrap();
    let _household = [pass(&guard, now, "2001:db8::1").unwrap(), pass(&guard, now, "2001:db8::ffff:2").unwrap()];
    assert_eq!(pass(&guard, now, "2001:db8::3").unwrap_err(), ConnectionRefused::Address);
    assert!(pass(&guard, now, "2001:db8:0:1::3").is_ok());
}

#[test]
fn a_network_has_its_own_limit_and_the_narrowest_counts() {
    let config = config::AdmissionConfig {
        networks: vec![(network("192.0.2.0/24"), 2), (network("192.0.2.128/25"), 1)],
        sessions_per_address: Some(1),
        ..Default::default()
    };
    let (guard, now) = guard(&config);
    let _narrow = pass(&guard, now, "192.0.2.200").unwrap();
    assert_eq!(pass(&guard, now, "192.0.2.201").unwrap_err(), ConnectionRefused::Network);
    let wide = [pass(&guard, now, "192.0.2.1").unwrap(), pass(&guard, now, "192.0.2.2").unwrap()];
    assert_eq!(pass(&guard, now, "192.0.2.3").unwrap_err(), ConnectionRefused::Network);
    drop(wide);
    assert!(pass(&guard, now, "192.0.2.3").is_ok(), "who was turned away holds nothing of its address");
}

#[test]
fn connections_come_at_a_rate() {
    let (guard, now) = guard(&config::AdmissionConfig { connection_rate: rate(3, 30), ..Default::default() });
    for _ in 0..3 {
        pass(&guard, now, "192.0.2.1").unwrap();
    }
    assert_eq!(pass(&guard, now, "192.0.2.1").unwrap_err(), ConnectionRefused::Rate);
    assert!(pass(&guard, now, "192.0.2.2").is_ok());
    assert!(pass(&guard, now + Duration::from_secs(10), "192.0.2.1").is_ok());
}

#[test]
fn nothing_limits_whom_the_operator_exempts() {
    let config = config::AdmissionConfig {
        access: AccessConfig { exempt: vec![network("10.0.0.0/8")], ..AccessConfig::default() },
        sessions_per_address: Some(1),
        connection_rate: rate(1, 60),
        login_rate_per_address: rate(1, 60),
        login_rate_per_user: rate(1, 60),
        sessions_per_user: Some(1),
        sessions_per_user_and_address: Some(1),
        ..Default::default()
    };
    let (guard, now) = guard(&config);
    let webmail = ip("10.0.0.1");
    let mut inside = Vec::new();
    for _ in 0..10 {
        let mut pass = guard.admit(now, webmail).unwrap();
        guard.check_login_rate(now, webmail, &["alice"]).unwrap();
        pass.count_user(webmail, "alice").unwrap();
        assert_eq!(guard.record_failed_login(now, webmail, &["alice"]), Duration::ZERO);
        inside.push(pass);
    }
}

#[test]
fn logins_come_at_a_rate_by_address_and_by_user() {
    let config = config::AdmissionConfig {
        login_rate_per_address: rate(3, 30),
        login_rate_per_user: rate(2, 30),
        ..Default::default()
    };
    let (guard, now) = guard(&config);
    let (here, there) = (ip("192.0.2.1"), ip("198.51.100.1"));
    for user in ["a", "b", "c"] {
        assert_eq!(guard.check_login_rate(now, here, &[user]), Ok(()));
    }
    assert_eq!(guard.check_login_rate(now, here, &["d"]), Err(LoginThrottled::AddressRate));
    assert_eq!(guard.check_login_rate(now, there, &["a"]), Ok(()));
    assert_eq!(guard.check_login_rate(now, there, &["a"]), Err(LoginThrottled::UserRate));
    assert_eq!(guard.check_login_rate(now, there, &["e"]), Ok(()));
    assert_eq!(guard.check_login_rate(now + Duration::from_secs(15), there, &["a"]), Ok(()));
}

/// Neither a neighbour behind the same address nor strangers who guess keep a user out who has just logged in there.
#[test]
fn an_address_that_has_just_logged_in_well_is_not_punished_for_its_neighbours() {
    let config = config::AdmissionConfig {
        login_rate_per_address: rate(2, 60),
        login_rate_per_user: rate(2, 60),
        ..Default::default()
    };
    let (guard, now) = guard(&config);
    let (here, there) = (ip("192.0.2.1"), ip("198.51.100.1"));
    assert_eq!(guard.check_login_rate(now, here, &["alice"]), Ok(()));
    guard.record_login(now, here, &["alice"]);
    assert_eq!(guard.check_login_rate(now, here, &["guess-1"]), Ok(()));
    assert_eq!(guard.check_login_rate(now, here, &["guess-2"]), Err(LoginThrottled::AddressRate));
    assert_eq!(guard.check_login_rate(now, there, &["alice"]), Ok(()));
    assert_eq!(guard.check_login_rate(now, there, &["alice"]), Err(LoginThrottled::UserRate));
    assert_eq!(guard.check_login_rate(now, here, &["alice"]), Ok(()));
    assert_eq!(guard.check_login_rate(now, here, &["alice"]), Ok(()));
    assert_eq!(
        guard.check_login_rate(now, here, &["alice"]),
        Err(LoginThrottled::AddressRate),
        "it has a bucket of its own, not none"
    );
    let later = now + KNOWN_FOR + Duration::from_secs(61);
    assert_eq!(guard.check_login_rate(later, here, &["guess-3"]), Ok(()));
    assert_eq!(guard.check_login_rate(later, here, &["alice"]), Ok(()));
    assert_eq!(guard.check_login_rate(later, here, &["alice"]), Err(LoginThrottled::AddressRate), "for a while only");
}

#[test]
fn sessions_of_a_user_are_counted_in_all_and_by_address() {
    let config = config::AdmissionConfig {
        sessions_per_user: Some(3),
        sessions_per_user_and_address: Some(2),
        ..Default::default()
    };
    let (guard, now) = guard(&config);
    let session = |client: &str, user: &str| {
        let mut pass = pass(&guard, now, client).unwrap();
        pass.count_user(ip(client), user).map(|()| pass)
    };
    let first = session("192.0.2.1", "alice").unwrap();
    let _second = session("192.0.2.1", "alice").unwrap();
    assert_eq!(session("192.0.2.1", "alice").unwrap_err(), LoginThrottled::UserAndAddress);
    let _third = session("192.0.2.2", "alice").unwrap();
    assert_eq!(session("192.0.2.3", "alice").unwrap_err(), LoginThrottled::User);
    assert!(session("192.0.2.1", "bob").is_ok());
    drop(first);
    assert!(session("192.0.2.3", "alice").is_ok(), "who was refused holds nothing of the user");
}

#[test]
fn failures_are_answered_later_and_later_until_one_succeeds() {
    let (guard, now) = guard(&config::AdmissionConfig::default());
    let client = ip("192.0.2.1");
    let seconds = |user: &str| guard.record_failed_login(now, client, &[user]).as_secs_f64();
    let about = |found: f64, expected: f64| assert!((found / expected - 1.0).abs() <= 0.201, "{found} {expected}");
    for expected in [1.0, 2.0, 4.0, 8.0, 15.0, 15.0] {
        about(seconds("alice"), expected);
    }
    about(seconds("bob"), 1.0);
    about(guard.record_failed_login(now, ip("192.0.2.2"), &["alice"]).as_secs_f64(), 1.0);
    guard.record_login(now, client, &["alice"]);
    about(seconds("alice"), 1.0);
}

/// NamingRules another mailbox each time is no way around the limits of a master user.
#[test]
fn guesses_at_a_master_users_password_share_one_limit_over_all_mailboxes() {
    let config = config::AdmissionConfig { login_rate_per_user: rate(3, 60), ..Default::default() };
    let (guard, now) = guard(&config);
    let (here, there) = (ip("192.0.2.1"), ip("198.51.100.1"));
    for number in 0..3 {
        assert_eq!(guard.check_login_rate(now, here, &["admin", &format!("mailbox-{number}")]), Ok(()));
    }
    assert_eq!(guard.check_login_rate(now, here, &["admin", "mailbox-3"]), Err(LoginThrottled::UserRate));
    assert_eq!(
        guard.check_login_rate(now, there, &["admin", "mailbox-4"]),
        Err(LoginThrottled::UserRate),
        "from everywhere"
    );
    assert_eq!(guard.check_login_rate(now, there, &["admin"]), Err(LoginThrottled::UserRate), "in every form");
    // And the mailbox is counted for, too.
    for master in ["one", "two", "three"] {
        assert_eq!(guard.check_login_rate(now, here, &[master, "alice"]), Ok(()));
    }
    assert_eq!(guard.check_login_rate(now, here, &["four", "alice"]), Err(LoginThrottled::UserRate));
    // An administrator who has just logged in is not locked out by those who guess from elsewhere.
    guard.record_login(now, there, &["admin", "bob"]);
    assert_eq!(guard.check_login_rate(now, there, &["admin", "alice"]), Ok(()));
    assert_eq!(guard.check_login_rate(now, there, &["bob"]), Ok(()));
    assert_eq!(guard.sizes().known, 1, "the mailbox's user has proven nothing");
}

#[test]
fn failures_of_a_master_user_are_answered_later_over_all_mailboxes() {
    let (guard, now) = guard(&config::AdmissionConfig::default());
    let client = ip("192.0.2.1");
    let about = |users: &[&str], expected: f64| {
        let found = guard.record_failed_login(now, client, users).as_secs_f64();
        assert!((found / expected - 1.0).abs() <= 0.201, "{users:?}: {found} {expected}");
    };
    for (mailbox, expected) in [("a", 1.0), ("b", 2.0), ("c", 4.0), ("d", 8.0)] {
        about(&["admin", mailbox], expected);
    }
    about(&["alice"], 1.0);
    about(&["root", "alice"], 2.0);
    guard.record_login(now, client, &["admin", "a"]);
    about(&["admin", "a"], 1.0);
    about(&["d"], 2.0);
    // Credentials without a user count for the address.
    about(&[], 1.0);
    about(&[], 2.0);
}

#[test]
fn a_new_configuration_replaces_rules_and_nothing_that_is_remembered() {
    let old =
        config::AdmissionConfig { sessions_per_address: Some(2), connection_rate: rate(4, 60), ..Default::default() };
    let (guard, now) = guard(&old);
    let inside = [pass(&guard, now, "192.0.2.1").unwrap(), pass(&guard, now, "192.0.2.1").unwrap()];
    guard.reconfigure(&config::AdmissionConfig { sessions_per_address: Some(3), ..old.clone() });
    let third = pass(&guard, now, "192.0.2.1").unwrap();
    assert_eq!(pass(&guard, now, "192.0.2.1").unwrap_err(), ConnectionRefused::Address);
    assert_eq!(
        pass(&guard, now, "192.0.2.1").unwrap_err(),
        ConnectionRefused::Rate,
        "of all that came before and after"
    );
    // Off: those inside still count down, and nobody new is counted.
    guard.reconfigure(&config::AdmissionConfig::default());
    let uncounted: Vec<ConnectionCount> = (0..5).map(|_| pass(&guard, now, "192.0.2.1").unwrap()).collect();
    drop(inside);
    guard.reconfigure(&config::AdmissionConfig { sessions_per_address: Some(2), ..Default::default() });
    let again = pass(&guard, now, "192.0.2.1").unwrap();
    assert_eq!(pass(&guard, now, "192.0.2.1").unwrap_err(), ConnectionRefused::Address, "the third and the new one");
    drop((third, again, uncounted));
    assert_eq!(guard.sizes().sessions, 0);
}

#[test]
fn turns_for_handshakes_are_the_same_as_long_as_their_number_is() {
    let (guard, _) = guard(&config::AdmissionConfig::default());
    let before = guard.handshake_permits();
    guard.reconfigure(&config::AdmissionConfig { before_login: 5, ..Default::default() });
    assert!(Arc::ptr_eq(&before, &guard.handshake_permits()));
    guard.reconfigure(&config::AdmissionConfig { handshakes: 5, ..Default::default() });
    assert_eq!(guard.handshake_permits().available_permits(), 5);
}

/// A million addresses, each with a connection, a login and a failure.
#[test]
fn a_flood_of_addresses_is_remembered_in_bounded_memory() {
    let config = config::AdmissionConfig {
        tracked: 8192,
        connection_rate: rate(10, 60),
        login_rate_per_address: rate(10, 60),
        login_rate_per_user: rate(10, 60),
        sessions_per_address: Some(10),
        ..Default::default()
    };
    let (guard, now) = guard(&config);
    for number in 0..1_000_000u32 {
        let client = IpAddr::V6(std::net::Ipv6Addr::from_bits((0x2001_0db8 << 96) | u128::from(number) << 64));
        let (pass, ticket) = (guard.admit(now, client).unwrap(), guard.enter_prelogin_queue(now).unwrap());
        guard.check_login_rate(now, client, &[number.to_string()]).unwrap();
        guard.record_failed_login(now, client, &["alice"]);
        guard.record_login(now, client, &["bob"]);
        drop((pass, ticket));
    }
    let expected = Sizes {
        before_login: 0,
        handshakes: 0,
        sessions: 0,
        connections: 8192,
        address_logins: 8192,
        user_logins: 8192,
        failures: 8192,
        known: 8192,
    };
    assert_eq!(guard.sizes(), expected);
}

#[derive(Debug, Clone)]
enum Step {
    Comes(u8),
    LogsIn(prop::sample::Index, u8),
    Goes(prop::sample::Index),
    Reload(Option<u32>, Option<u32>, Option<u32>, bool),
}

fn step() -> impl Strategy<Value = Step> {
    let limit = || prop::option::of(1u32..4);
    prop_oneof![
        4 => (0u8..4).prop_map(Step::Comes),
        3 => (any::<prop::sample::Index>(), 0u8..3).prop_map(|(which, user)| Step::LogsIn(which, user)),
        3 => any::<prop::sample::Index>().prop_map(Step::Goes),
        1 => (limit(), limit(), limit(), any::<bool>()).prop_map(|(a, b, c, d)| Step::Reload(a, b, c, d)),
    ]
}

proptest! {
    /// Sessions come, log in and go in any order, limits come and go between: at the end nothing is left, and while limits
    /// stood from the first session on, nobody was over them.
    #[test]
    fn counts_return_to_nothing_across_reloads(steps in prop::collection::vec(step(), 0..200)) {
        let mut config = config::AdmissionConfig {
            sessions_per_address: Some(2),
            sessions_per_user: Some(3),
            sessions_per_user_and_address: Some(2),
            ..Default::default()
        };
        let (guard, now) = guard(&config);
        let address = |number: u8| ip(&format!("192.0.2.{number}"));
        let mut inside: Vec<(u8, Option<u8>, ConnectionCount)> = Vec::new();
        let mut reloaded = false;
        for step in steps {
            match step {
                Step::Comes(client) => {
                    if let Ok(pass) = guard.admit(now, address(client)) {
                        inside.push((client, None, pass));
                    }
                }
                Step::LogsIn(which, user) if !inside.is_empty() => {
                    let which = which.index(inside.len());
                    let (client, as_user, pass) = &mut inside[which];
                    if as_user.is_none() && pass.count_user(address(*client), &user.to_string()).is_ok() {
                        *as_user = Some(user);
                    }
                }
                Step::Goes(which) if !inside.is_empty() => drop(inside.remove(which.index(inside.len()))),
                Step::Reload(by_address, by_user, by_pair, network_too) => {
                    reloaded = true;
                    config.sessions_per_address = by_address;
                    config.sessions_per_user = by_user;
                    config.sessions_per_user_and_address = by_pair;
                    config.networks = if network_too { vec![(network("192.0.2.0/30"), 3)] } else { Vec::new() };
                    guard.reconfigure(&config);
                }
                Step::LogsIn(..) | Step::Goes(_) => {}
            }
            if !reloaded {
                for one in 0..4 {
                    prop_assert!(inside.iter().filter(|(client, ..)| *client == one).count() <= 2);
                    prop_assert!(inside.iter().filter(|(_, user, _)| *user == Some(one)).count() <= 3);
                }
            }
        }
        drop(inside);
        prop_assert_eq!(guard.sizes().sessions, 0);
    }
}
