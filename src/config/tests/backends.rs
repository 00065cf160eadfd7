//! Settings of backends.

use super::*;

#[test]
fn balancing_settings_are_checked() {
    let found = |more: &str| problems(&edited("143']}}", &format!("143'], {more}}}}}")));
    for (more, expected) in [
        (
            "balance: fair",
            "2:44: backends.a.balance: unknown value: expected user-hash, bounded-hash, least-sessions or round-robin",
        ),
        ("balance: {kind: round-robin, factor: 2}", "2:73: backends.a.balance.factor: requires kind: bounded-hash"),
        (
            "balance: {kind: bounded-hash, factor: 1}",
            "2:74: backends.a.balance.factor: expected a number from 1.01 to 10",
        ),
        ("check: pop3", "2:44: backends.a.check: unknown value: expected off, tcp, tls, imap or login"),
        ("check: tls", "2:44: backends.a.check: kind tls requires TLS, but the backend has tls: none"),
        ("check: {account: probe}", "2:52: backends.a.check.account: requires kind: login"),
        ("check: {kind: login, password_file: p}", "2:44: backends.a.check: kind: login requires the key `account`"),
        ("check: {interval: 0s}", "2:52: backends.a.check.interval: expected a duration from 100ms to 1day"),
        ("check: {rise: 0}", "2:52: backends.a.check.rise: expected a number from 1 to 1000"),
        (
            "slow_start: 30s",
            "2:44: backends.a.slow_start: has no effect with balance: user-hash, which serves a user from one server",
        ),
        ("breaker: {failures: 0}", "2:54: backends.a.breaker.failures: expected a number from 1 to 1000"),
        ("max_sessions: 0", "2:44: backends.a.max_sessions: expected a number from 1 to 10000000"),
        ("queue: {length: -1}", "2:52: backends.a.queue.length: expected a number from 0 to 1000000"),
    ] {
        assert_eq!(found(more), [format!("v.yaml:{expected}")], "{more}");
    }
    let found = problems(&edited("'192.0.2.1:143'", "{address: '192.0.2.1:143', state: dwon}"));
    assert_eq!(
        found,
        ["v.yaml:2:53: backends.a.servers[0].state: unknown value: expected up, drain or down; did you mean `down`?"]
    );
}

#[test]
fn balancing_settings_have_defaults() {
    let config = parse(Path::new("v.yaml"), MINIMAL).unwrap();
    let balancing = &config.backends[0].balancing;
    assert_eq!((balancing.balance, balancing.slow_start, balancing.failures), (Balance::UserHash, None, 3));
    let check = balancing.check.as_ref().unwrap();
    assert_eq!((check.kind.as_str(), check.interval, check.rise, check.fall), ("imap", Duration::from_secs(10), 2, 3));
    assert!(matches!(config.backends[0].servers[0], Server::Address { max_sessions: None, state: AdminState::Up, .. }));
    let text = edited(
        "143']}}",
        "143', {address: '192.0.2.2:143', max_sessions: 2, state: drain}], max_sessions: 7, check: off}}",
    );
    let config = parse(Path::new("v.yaml"), &text).unwrap();
    assert!(config.backends[0].balancing.check.is_none());
    assert!(matches!(
        config.backends[0].servers[0],
        Server::Address { max_sessions: Some(7), state: AdminState::Up, .. }
    ));
    assert!(matches!(
        config.backends[0].servers[1],
        Server::Address { max_sessions: Some(2), state: AdminState::Drain, .. }
    ));
}

#[test]
fn servers_are_read_in_all_forms() {
    let servers = "['10.0.0.11:143', '[2001:db8::1]:143', 'Mail-A2.internal:143', {address: 'm:1', weight: 2}, {srv: _imap._tcp.shard-a.internal}]";
    let config = parse(Path::new("v.yaml"), &edited("['192.0.2.1:143']", servers)).unwrap();
    let hosts: Vec<String> = config.backends[0]
        .servers
        .iter()
        .map(|server| match server {
            Server::Address { host: Host::Ip(ip), port, weight, .. } => format!("{ip} {port} {weight}"),
            Server::Address { host: Host::Name(name), port, weight, .. } => format!("{name} {port} {weight}"),
            Server::Srv { name, .. } => format!("srv {name}"),
        })
        .collect();
    assert_eq!(
        hosts,
        ["10.0.0.11 143 1", "2001:db8::1 143 1", "mail-a2.internal 143 1", "m 1 2", "srv _imap._tcp.shard-a.internal"]
    );
}

#[test]
fn client_info_none_is_warned_about() {
    let text = edited("servers: ['192.0.2.1:143']", "servers: ['192.0.2.1:143'], client_info: none");
    let config = parse(Path::new("v.yaml"), &text).unwrap();
    let warnings: Vec<String> = config.warnings.iter().map(ToString::to_string).collect();
    assert_eq!(warnings.len(), 1, "{warnings:?}");
    assert!(
        warnings[0]
            .starts_with("v.yaml:2:44: backends.a.client_info: with client_info: none, the servers see the proxy"),
        "{warnings:?}"
    );
    assert!(warnings[0].contains("login_trusted_networks"), "{warnings:?}");
    assert_eq!(parse(Path::new("v.yaml"), MINIMAL).unwrap().warnings, []);
}

#[test]
fn source_addresses_are_checked() {
    let text = edited("servers: [", "source_addresses: [192.0.2.9, '2001:db8::9'], servers: [");
    let config = parse(Path::new("v.yaml"), &text).unwrap();
    assert_eq!(config.backends[0].source_addresses.len(), 2);
    let text =
        edited("servers: [", "source_addresses: [10.0.0.0/8, 0.0.0.0, 192.0.2.9, '::ffff:192.0.2.9'], servers: [");
    let found = problems(&text);
    assert_eq!(found.len(), 3, "{found:?}");
    assert!(found[0].contains("source_addresses[0]: expected an IP address"), "{found:?}");
    assert!(found[1].contains("0.0.0.0 is not a valid source address"), "{found:?}");
    assert!(found[2].contains("source_addresses[3]: duplicate address"), "{found:?}");
}
