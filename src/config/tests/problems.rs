//! Problems are found, reported once, and do not hide each other.

use super::*;

#[test]
fn unknown_key_suggests_the_nearest_known_one() {
    assert_eq!(with("limts: {}\n"), ["v.yaml:4:1: limts: unknown key; did you mean `limits`?"]);
    assert_eq!(with("limits: {conect: 1s}\n"), ["v.yaml:4:10: limits.conect: unknown key; did you mean `connect`?"]);
    let found = problems(
        "listeners: [{adress: '[::]:143', tls: none}]\nbackends: {a: {servers: ['192.0.2.1:1']}}\nroutes: [{default: a}]\n",
    );
    assert_eq!(found, ["v.yaml:1:14: listeners[0].adress: unknown key; did you mean `address`?"], "not also missing");
}

#[test]
fn all_problems_are_reported_at_once() {
    let found = problems(
        "listeners:
  - address: 993
    tls: implict
  - address: localhost:143
    tls: none
backends:
  shard-a:
    servers: ['10.0.0.1', 'mail:0', {address: 'm:143', weight: 0}, {weight: 3}, 'm:143']
    tls: {mode: none, insecure: true}
    colour: red
routes:
  - default: shard-b
  - table: users.txt
  - {hash: [shard-a], default: shard-a}
limits: {idle: 10m, line: 5, bad_commands: -1, connect: fast}
admin: {address: ':9143'}
",
    );
    let expected = [
        "v.yaml:2:5: listeners[0].address: expected a string, got a number",
        "v.yaml:3:5: listeners[0].tls: unknown value: expected implicit, starttls or none; did you mean `implicit`?",
        "v.yaml:4:5: listeners[1].address: expected an address and a port, like \"[::]:993\", got \"localhost:143\"",
        "v.yaml:8:15: backends.shard-a.servers[0]: expected host:port, like 10.0.0.11:143, [2001:db8::1]:143 or mail.internal:143, got \"10.0.0.1\"",
        "v.yaml:8:27: backends.shard-a.servers[1]: expected host:port, like 10.0.0.11:143, [2001:db8::1]:143 or mail.internal:143, got \"mail:0\"",
        "v.yaml:8:56: backends.shard-a.servers[2].weight: expected a number from 1 to 1000",
        "v.yaml:8:68: backends.shard-a.servers[3]: missing key `address` or `srv`",
        "v.yaml:8:81: backends.shard-a.servers[4]: duplicate server",
        "v.yaml:9:23: backends.shard-a.tls.insecure: has no effect with mode: none",
        "v.yaml:10:5: backends.shard-a.colour: unknown key: expected servers, tls, source_addresses, client_info, authzid, login, referrals, login_with, unavailable_texts, limit_texts, empty_password, forward, balance, check, slow_start, breaker, max_sessions or queue",
        "v.yaml:12:5: routes[0].default: unknown backend \"shard-b\"; did you mean `shard-a`?",
        "v.yaml:14:5: routes[2]: expected exactly one of table, domain, regex, hash, default, sql, ldap, http, redis, dns",
        "v.yaml:15:10: limits.idle: expected off or a duration from 30m to 30days",
        "v.yaml:15:21: limits.line: expected a size from 1024 to 16777216 bytes",
        "v.yaml:15:30: limits.bad_commands: expected a number from 1 to 1000",
        "v.yaml:15:48: limits.connect: expected a duration with its unit, like 10s or 30m",
        "v.yaml:16:9: admin.address: expected an address and a port, like \"127.0.0.1:9143\", got \":9143\"",
    ];
    for line in expected {
        assert!(found.iter().any(|other| other == line), "{line}\nis missing in\n{}", found.join("\n"));
    }
    assert_eq!(found.len(), expected.len(), "{}", found.join("\n"));
}

#[test]
fn duplicate_key_is_reported_with_both_lines() {
    assert_eq!(with("routes: []\n"), ["v.yaml:4:1: routes: duplicate key; first defined in line 3"]);
    let backend = edited("143']}}", "143']}, a: {tls: none}}");
    assert_eq!(problems(&backend), ["v.yaml:2:45: backends.a: duplicate key; first defined in line 2"]);
}

#[test]
fn duplicate_key_does_not_hide_other_problems() {
    let found = with("routes: [{default: z}]\ncolour: red\nlog: {level: info, level: loud}\n");
    let keys: Vec<&str> = found.iter().map(|line| line.split(": ").nth(1).unwrap()).collect();
    assert_eq!(keys, ["routes", "colour", "log.level"], "{found:?}");
}

#[test]
fn problems_do_not_contain_values() {
    for text in [
        "admin: {address: {password: hunter2}}\n",
        "limits: {connect: hunter2}\n",
        "limits: hunter2\n",
        "log: {level: hunter2}\n",
        "log: [hunter2]\n",
        "password: hunter2\n",
        "tls: {certificates: [{cert: [hunter2], key: hunter2}]}\n",
        "log: {level: \"a`b`hunter2\"}\n",
        "log: {level: \"a`, expected `hunter2`\"}\n",
        "limits: {line: !!int hunter2}\n",
        "limits: {line: \"hunter2, expected hunter2\"}\n",
        "log: {level: \"hunter2\n",
        "log: {level: *hunter2}\n",
        "log: {level: @hunter2}\n",
    ] {
        let found = with(text).join("\n");
        assert!(!found.contains("hunter2"), "{found}");
    }
}

/// A key without a value, such as `tls:` above lines that are commented out, must not mean its default.
#[test]
fn key_without_a_value_is_refused() {
    for (tls, key) in [
        ("tls: ", "backends.a.tls"),
        ("tls: {mode: implicit, pin: }", "backends.a.tls.pin"),
        ("tls: {mode: implicit, ca: ~}", "backends.a.tls.ca"),
        ("authzid: ", "backends.a.authzid"),
    ] {
        let found = problems(&edited("143']}}", &format!("143'], {tls}}}}}")));
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(found[0].ends_with(&format!(" {key}: has no value; set one or remove the key")), "{found:?}");
    }
    assert_eq!(with("limits: {connect: }\n").len(), 1);
    parse(Path::new("v.yaml"), &format!("{MINIMAL}limits:\n")).expect("a section without keys has all defaults");
}

#[test]
fn problem_is_reported_once() {
    let listeners = "[{address: '127.0.0.1:1143', tls: none}]";
    let servers = "{a: {servers: ['192.0.2.1:143']}}";
    for (text, only) in [
        (edited(listeners, "5"), "v.yaml:1:1: listeners: expected a list, got a number"),
        (edited(servers, "[a]"), "v.yaml:2:1: backends: expected a map, got a list"),
        (edited(servers, "{a: 5}"), "v.yaml:2:12: backends.a: expected a map, got a number"),
        (edited("[{default: a}]", "{default: a}"), "v.yaml:3:1: routes: expected a list, got a map"),
        (edited("default: a", "domain: [a]"), "v.yaml:3:11: routes[0].domain: expected a map, got a list"),
        (
            edited("tls: none", "tls: implicit") + "tls: {certificates: {cert: a, key: b}}\n",
            "v.yaml:4:7: tls.certificates: expected a list, got a map",
        ),
        (
            edited("'192.0.2.1:143'", "{adress: 'm:1'}"),
            "v.yaml:2:27: backends.a.servers[0].adress: unknown key; did you mean `address`?",
        ),
        (
            edited("default: a", "domain: {1.5: a, b.test: a}"),
            "v.yaml:3:20: routes[0].domain.1.5: a key must be a string; put it in quotes",
        ),
    ] {
        assert_eq!(problems(&text), [only]);
    }
}

#[test]
fn problem_does_not_hide_others() {
    let text = edited("['192.0.2.1:143']", "'192.0.2.1:143', tls: {mode: implicit, ca: x, insecure: true}");
    assert_eq!(
        problems(&text),
        [
            "v.yaml:2:16: backends.a.servers: expected a list, got a string",
            "v.yaml:2:42: backends.a.tls: ca and insecure exclude each other",
        ]
    );
}

#[test]
fn invalid_values_are_refused() {
    let tls = |tls: &str| problems(&edited("143']}}", &format!("143'], tls: {tls}}}}}")));
    assert_eq!(tls("{mode: implicit, pin: []}"), ["v.yaml:2:66: backends.a.tls.pin: at least one pin is required"]);
    assert_eq!(tls("{mode: implicit, pin: [x, y]}").len(), 2, "each with its location");
    let domains = |domains: &str| problems(&edited("default: a", &format!("domain: {domains}")));
    assert!(domains("{}")[0].contains("routes[0].domain: at least one domain is required"));
    assert_eq!(domains("{'': a, 'a b': a, 'x@y': a, '*': a, '@ok.test': a}").len(), 4);
    let server = |server: &str| problems(&edited("'192.0.2.1:143'", server));
    assert!(server("'0.0.0.0:1'")[0].contains("0.0.0.0 is not a valid server address"));
    assert!(server("'mail:+143'")[0].contains("expected host:port"));
    assert!(server("'mail:143', 'Mail.:143'")[0].contains("servers[1]: duplicate server"));
}

#[test]
fn number_of_problems_is_limited() {
    let domains: String = (0..1000).map(|number| format!("d{number}.test: b, ")).collect();
    let found = problems(&edited("default: a", &format!("domain: {{{domains}}}")));
    assert_eq!(found.len(), 201);
    assert!(found[200].ends_with("more than 200 problems; the others are not listed"), "{}", found[200]);
}
