//! Tests of admission control as a whole.

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

fn admission_control(config: &config::AdmissionConfig) -> (Arc<AdmissionControl>, Instant) {
    let began = Instant::now();
    (Arc::new(AdmissionControl::new(config, began)), began)
}

fn admit(admission: &Arc<AdmissionControl>, now: Instant, client: &str) -> Result<ConnectionCount, ConnectionRefused> {
    admission.admit(now, ip(client))
}

#[test]
fn connection_count_is_small() {
    assert!(size_of::<ConnectionCount>() <= 24, "{}", size_of::<ConnectionCount>());
}

#[test]
fn sessions_are_counted_by_ipv4_address_and_ipv6_prefix() {
    let (admission, now) =
        admission_control(&config::AdmissionConfig { sessions_per_address: Some(2), ..Default::default() });
    let first = admit(&admission, now, "192.0.2.1").unwrap();
    let _second = admit(&admission, now, "::ffff:192.0.2.1").unwrap();
    assert_eq!(admit(&admission, now, "192.0.2.1").unwrap_err(), ConnectionRefused::Address);
    let _neighbour = admit(&admission, now, "192.0.2.2").unwrap();
    drop(first);
    let _third = admit(&admission, now, "192.0.2.1").unwrap();
    let _same_prefix =
        [admit(&admission, now, "2001:db8::1").unwrap(), admit(&admission, now, "2001:db8::ffff:2").unwrap()];
    assert_eq!(admit(&admission, now, "2001:db8::3").unwrap_err(), ConnectionRefused::Address);
    assert!(admit(&admission, now, "2001:db8:0:1::3").is_ok());
}

#[test]
fn narrowest_network_limits_its_sessions() {
    let config = config::AdmissionConfig {
        networks: vec![(network("192.0.2.0/24"), 2), (network("192.0.2.128/25"), 1)],
        sessions_per_address: Some(1),
        ..Default::default()
    };
    let (admission, now) = admission_control(&config);
    let _narrow = admit(&admission, now, "192.0.2.200").unwrap();
    assert_eq!(admit(&admission, now, "192.0.2.201").unwrap_err(), ConnectionRefused::Network);
    let wide = [admit(&admission, now, "192.0.2.1").unwrap(), admit(&admission, now, "192.0.2.2").unwrap()];
    assert_eq!(admit(&admission, now, "192.0.2.3").unwrap_err(), ConnectionRefused::Network);
    drop(wide);
    assert!(admit(&admission, now, "192.0.2.3").is_ok(), "a refused connection does not count for its address");
}

#[test]
fn connections_of_an_address_are_limited_by_rate() {
    let (admission, now) =
        admission_control(&config::AdmissionConfig { connection_rate: rate(3, 30), ..Default::default() });
    for _ in 0..3 {
        admit(&admission, now, "192.0.2.1").unwrap();
    }
    assert_eq!(admit(&admission, now, "192.0.2.1").unwrap_err(), ConnectionRefused::Rate);
    assert!(admit(&admission, now, "192.0.2.2").is_ok());
    assert!(admit(&admission, now + Duration::from_secs(10), "192.0.2.1").is_ok());
}

#[test]
fn exempt_addresses_have_no_limits() {
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
    let (admission, now) = admission_control(&config);
    let webmail = ip("10.0.0.1");
    let mut connections = Vec::new();
    for _ in 0..10 {
        let mut count = admission.admit(now, webmail).unwrap();
        admission.check_login_rate(now, webmail, &["alice"]).unwrap();
        count.count_user(webmail, "alice").unwrap();
        assert_eq!(admission.record_failed_login(now, webmail, &["alice"]), Duration::ZERO);
        connections.push(count);
    }
}

#[test]
fn logins_are_limited_by_address_and_by_user() {
    let config = config::AdmissionConfig {
        login_rate_per_address: rate(3, 30),
        login_rate_per_user: rate(2, 30),
        ..Default::default()
    };
    let (admission, now) = admission_control(&config);
    let (here, there) = (ip("192.0.2.1"), ip("198.51.100.1"));
    for user in ["a", "b", "c"] {
        assert_eq!(admission.check_login_rate(now, here, &[user]), Ok(()));
    }
    assert_eq!(admission.check_login_rate(now, here, &["d"]), Err(LoginThrottled::AddressRate));
    assert_eq!(admission.check_login_rate(now, there, &["a"]), Ok(()));
    assert_eq!(admission.check_login_rate(now, there, &["a"]), Err(LoginThrottled::UserRate));
    assert_eq!(admission.check_login_rate(now, there, &["e"]), Ok(()));
    assert_eq!(admission.check_login_rate(now + Duration::from_secs(15), there, &["a"]), Ok(()));
}

/// Neither other clients at an address nor password guessing from elsewhere lock out a user who has logged in from there.
#[test]
fn known_user_is_not_limited_by_other_clients() {
    let config = config::AdmissionConfig {
        login_rate_per_address: rate(2, 60),
        login_rate_per_user: rate(2, 60),
        ..Default::default()
    };
    let (admission, now) = admission_control(&config);
    let (here, there) = (ip("192.0.2.1"), ip("198.51.100.1"));
    assert_eq!(admission.check_login_rate(now, here, &["alice"]), Ok(()));
    admission.record_login(now, here, &["alice"]);
    assert_eq!(admission.check_login_rate(now, here, &["guess-1"]), Ok(()));
    assert_eq!(admission.check_login_rate(now, here, &["guess-2"]), Err(LoginThrottled::AddressRate));
    assert_eq!(admission.check_login_rate(now, there, &["alice"]), Ok(()));
    assert_eq!(admission.check_login_rate(now, there, &["alice"]), Err(LoginThrottled::UserRate));
    assert_eq!(admission.check_login_rate(now, here, &["alice"]), Ok(()));
    assert_eq!(admission.check_login_rate(now, here, &["alice"]), Ok(()));
    assert_eq!(
        admission.check_login_rate(now, here, &["alice"]),
        Err(LoginThrottled::AddressRate),
        "the user has a separate bucket, not none"
    );
    let later = now + KNOWN_FOR + Duration::from_secs(61);
    assert_eq!(admission.check_login_rate(later, here, &["guess-3"]), Ok(()));
    assert_eq!(admission.check_login_rate(later, here, &["alice"]), Ok(()));
    assert_eq!(
        admission.check_login_rate(later, here, &["alice"]),
        Err(LoginThrottled::AddressRate),
        "the user is no longer known"
    );
}

#[test]
fn sessions_of_a_user_are_counted_in_total_and_by_address() {
    let config = config::AdmissionConfig {
        sessions_per_user: Some(3),
        sessions_per_user_and_address: Some(2),
        ..Default::default()
    };
    let (admission, now) = admission_control(&config);
    let session = |client: &str, user: &str| {
        let mut count = admit(&admission, now, client).unwrap();
        count.count_user(ip(client), user).map(|()| count)
    };
    let first = session("192.0.2.1", "alice").unwrap();
    let _second = session("192.0.2.1", "alice").unwrap();
    assert_eq!(session("192.0.2.1", "alice").unwrap_err(), LoginThrottled::UserAndAddress);
    let _third = session("192.0.2.2", "alice").unwrap();
    assert_eq!(session("192.0.2.3", "alice").unwrap_err(), LoginThrottled::User);
    assert!(session("192.0.2.1", "bob").is_ok());
    drop(first);
    assert!(session("192.0.2.3", "alice").is_ok(), "a refused session does not count for its user");
}

#[test]
fn failures_are_delayed_longer_and_longer_until_a_login() {
    let (admission, now) = admission_control(&config::AdmissionConfig::default());
    let client = ip("192.0.2.1");
    let seconds = |user: &str| admission.record_failed_login(now, client, &[user]).as_secs_f64();
    let about = |found: f64, expected: f64| assert!((found / expected - 1.0).abs() <= 0.201, "{found} {expected}");
    for expected in [1.0, 2.0, 4.0, 8.0, 15.0, 15.0] {
        about(seconds("alice"), expected);
    }
    about(seconds("bob"), 1.0);
    about(admission.record_failed_login(now, ip("192.0.2.2"), &["alice"]).as_secs_f64(), 1.0);
    admission.record_login(now, client, &["alice"]);
    about(seconds("alice"), 1.0);
}

/// An attacker cannot evade the limits of a master user by naming another mailbox in each attempt.
#[test]
fn guesses_at_a_master_password_share_one_limit_across_mailboxes() {
    let config = config::AdmissionConfig { login_rate_per_user: rate(3, 60), ..Default::default() };
    let (admission, now) = admission_control(&config);
    let (here, there) = (ip("192.0.2.1"), ip("198.51.100.1"));
    for number in 0..3 {
        assert_eq!(admission.check_login_rate(now, here, &["admin", &format!("mailbox-{number}")]), Ok(()));
    }
    assert_eq!(admission.check_login_rate(now, here, &["admin", "mailbox-3"]), Err(LoginThrottled::UserRate));
    assert_eq!(
        admission.check_login_rate(now, there, &["admin", "mailbox-4"]),
        Err(LoginThrottled::UserRate),
        "also from another address"
    );
    assert_eq!(
        admission.check_login_rate(now, there, &["admin"]),
        Err(LoginThrottled::UserRate),
        "also without a mailbox"
    );
    // The attempts count for the mailbox, too.
    for master in ["one", "two", "three"] {
        assert_eq!(admission.check_login_rate(now, here, &[master, "alice"]), Ok(()));
    }
    assert_eq!(admission.check_login_rate(now, here, &["four", "alice"]), Err(LoginThrottled::UserRate));
    // Guesses from elsewhere do not lock out an administrator who has just logged in.
    admission.record_login(now, there, &["admin", "bob"]);
    assert_eq!(admission.check_login_rate(now, there, &["admin", "alice"]), Ok(()));
    assert_eq!(admission.check_login_rate(now, there, &["bob"]), Ok(()));
    assert_eq!(admission.sizes().known, 1, "the password of the mailbox's user was not verified");
}

#[test]
fn failures_of_a_master_user_share_one_delay_across_mailboxes() {
    let (admission, now) = admission_control(&config::AdmissionConfig::default());
    let client = ip("192.0.2.1");
    let about = |users: &[&str], expected: f64| {
        let found = admission.record_failed_login(now, client, users).as_secs_f64();
        assert!((found / expected - 1.0).abs() <= 0.201, "{users:?}: {found} {expected}");
    };
    for (mailbox, expected) in [("a", 1.0), ("b", 2.0), ("c", 4.0), ("d", 8.0)] {
        about(&["admin", mailbox], expected);
    }
    about(&["alice"], 1.0);
    about(&["root", "alice"], 2.0);
    admission.record_login(now, client, &["admin", "a"]);
    about(&["admin", "a"], 1.0);
    about(&["d"], 2.0);
    // Failures without a user name count for the address.
    about(&[], 1.0);
    about(&[], 2.0);
}

#[test]
fn reload_replaces_rules_and_keeps_state() {
    let old =
        config::AdmissionConfig { sessions_per_address: Some(2), connection_rate: rate(4, 60), ..Default::default() };
    let (admission, now) = admission_control(&old);
    let open = [admit(&admission, now, "192.0.2.1").unwrap(), admit(&admission, now, "192.0.2.1").unwrap()];
    admission.reconfigure(&config::AdmissionConfig { sessions_per_address: Some(3), ..old.clone() });
    let third = admit(&admission, now, "192.0.2.1").unwrap();
    assert_eq!(admit(&admission, now, "192.0.2.1").unwrap_err(), ConnectionRefused::Address);
    assert_eq!(
        admit(&admission, now, "192.0.2.1").unwrap_err(),
        ConnectionRefused::Rate,
        "connections before and after the reload count"
    );
    // With the limit off, counted connections leave the count, and new ones are not counted.
    admission.reconfigure(&config::AdmissionConfig::default());
    let uncounted: Vec<ConnectionCount> = (0..5).map(|_| admit(&admission, now, "192.0.2.1").unwrap()).collect();
    drop(open);
    admission.reconfigure(&config::AdmissionConfig { sessions_per_address: Some(2), ..Default::default() });
    let again = admit(&admission, now, "192.0.2.1").unwrap();
    assert_eq!(
        admit(&admission, now, "192.0.2.1").unwrap_err(),
        ConnectionRefused::Address,
        "the third connection and the new one count"
    );
    drop((third, again, uncounted));
    assert_eq!(admission.sizes().sessions, 0);
}

#[test]
fn handshake_permits_are_kept_while_their_number_is_unchanged() {
    let (admission, _) = admission_control(&config::AdmissionConfig::default());
    let before = admission.handshake_permits();
    admission.reconfigure(&config::AdmissionConfig { before_login: 5, ..Default::default() });
    assert!(Arc::ptr_eq(&before, &admission.handshake_permits()));
    admission.reconfigure(&config::AdmissionConfig { handshakes: 5, ..Default::default() });
    assert_eq!(admission.handshake_permits().available_permits(), 5);
}

/// A million addresses, each with a connection, a failed login and a login.
#[test]
fn flood_of_addresses_uses_bounded_memory() {
    let config = config::AdmissionConfig {
        tracked: 8192,
        connection_rate: rate(10, 60),
        login_rate_per_address: rate(10, 60),
        login_rate_per_user: rate(10, 60),
        sessions_per_address: Some(10),
        ..Default::default()
    };
    let (admission, now) = admission_control(&config);
    for number in 0..1_000_000u32 {
        let client = IpAddr::V6(std::net::Ipv6Addr::from_bits((0x2001_0db8 << 96) | u128::from(number) << 64));
        let (count, ticket) = (admission.admit(now, client).unwrap(), admission.enter_prelogin_queue(now).unwrap());
        admission.check_login_rate(now, client, &[number.to_string()]).unwrap();
        admission.record_failed_login(now, client, &["alice"]);
        admission.record_login(now, client, &["bob"]);
        drop((count, ticket));
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
    assert_eq!(admission.sizes(), expected);
}

#[derive(Debug, Clone)]
enum Operation {
    Connect(u8),
    LogIn(prop::sample::Index, u8),
    Close(prop::sample::Index),
    Reload(Option<u32>, Option<u32>, Option<u32>, bool),
}

fn operation() -> impl Strategy<Value = Operation> {
    let limit = || prop::option::of(1u32..4);
    prop_oneof![
        4 => (0u8..4).prop_map(Operation::Connect),
        3 => (any::<prop::sample::Index>(), 0u8..3).prop_map(|(which, user)| Operation::LogIn(which, user)),
        3 => any::<prop::sample::Index>().prop_map(Operation::Close),
        1 => (limit(), limit(), limit(), any::<bool>()).prop_map(|(a, b, c, d)| Operation::Reload(a, b, c, d)),
    ]
}

proptest! {
    /// Connections open, log in and close in any order, with reloads in between: no counts remain at the end, and until the first reload
    /// no limit is exceeded.
    #[test]
    fn counts_return_to_zero_across_reloads(operations in prop::collection::vec(operation(), 0..200)) {
        let mut config = config::AdmissionConfig {
            sessions_per_address: Some(2),
            sessions_per_user: Some(3),
            sessions_per_user_and_address: Some(2),
            ..Default::default()
        };
        let (admission, now) = admission_control(&config);
        let address = |number: u8| ip(&format!("192.0.2.{number}"));
        let mut connections: Vec<(u8, Option<u8>, ConnectionCount)> = Vec::new();
        let mut reloaded = false;
        for operation in operations {
            match operation {
                Operation::Connect(client) => {
                    if let Ok(count) = admission.admit(now, address(client)) {
                        connections.push((client, None, count));
                    }
                }
                Operation::LogIn(which, user) if !connections.is_empty() => {
                    let which = which.index(connections.len());
                    let (client, as_user, count) = &mut connections[which];
                    if as_user.is_none() && count.count_user(address(*client), &user.to_string()).is_ok() {
                        *as_user = Some(user);
                    }
                }
                Operation::Close(which) if !connections.is_empty() => drop(connections.remove(which.index(connections.len()))),
                Operation::Reload(by_address, by_user, by_user_and_address, has_network) => {
                    reloaded = true;
                    config.sessions_per_address = by_address;
                    config.sessions_per_user = by_user;
                    config.sessions_per_user_and_address = by_user_and_address;
                    config.networks = if has_network { vec![(network("192.0.2.0/30"), 3)] } else { Vec::new() };
                    admission.reconfigure(&config);
                }
                Operation::LogIn(..) | Operation::Close(_) => {}
            }
            if !reloaded {
                for number in 0..4 {
                    prop_assert!(connections.iter().filter(|(client, ..)| *client == number).count() <= 2);
                    prop_assert!(connections.iter().filter(|(_, user, _)| *user == Some(number)).count() <= 3);
                }
            }
        }
        drop(connections);
        prop_assert_eq!(admission.sizes().sessions, 0);
    }
}
