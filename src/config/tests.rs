//! Configurations that are right, and what is said of those that are not.

use std::path::Path;

use super::*;
use crate::admin_state::AdminState;

mod warnings;

const MINIMAL: &str = "\
listeners: [{address: '127.0.0.1:1143', tls: none}]
backends: {a: {servers: ['192.0.2.1:143']}}
routes: [{default: a}]
";

#[track_caller]
fn mistakes(text: &str) -> Vec<String> {
    let report = parse(Path::new("v.yaml"), text).expect_err("the configuration has a mistake");
    report.problems().iter().map(ToString::to_string).collect()
}

/// `MINIMAL` and more.
#[track_caller]
fn with(more: &str) -> Vec<String> {
    mistakes(&format!("{MINIMAL}{more}"))
}

#[test]
fn the_least_configuration_has_all_defaults() {
    let config = parse(Path::new("v.yaml"), MINIMAL).unwrap();
    assert_eq!(config.limits, Limits::default());
    assert_eq!(config.backends[0].client_info, ClientInfo::Id);
    assert!(!config.backends[0].authzid);
    assert_eq!(config.log, LogConfig { format: LogFormat::Text, level: Level::Info });
    assert_eq!(config.admin, None);
}

#[test]
fn every_shipped_configuration_is_right() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("config");
    let mut files = 0;
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "yaml") {
            load(&path).unwrap_or_else(|report| panic!("{report}"));
            files += 1;
        }
    }
    assert!(files >= 4, "{files} files found");
}

#[test]
fn the_reference_names_every_key_and_its_default() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("config");
    let path = folder.join("reference.yaml");
    let text = [&path, &folder.join("routes.yaml")].map(|path| fs::read_to_string(path).unwrap()).concat();
    let source = [
        include_str!("file.rs"),
        include_str!("guard_file.rs"),
        include_str!("oauth.rs"),
        include_str!("routes/maps.rs"),
    ]
    .concat();
    let keys: Vec<&str> = source
        .lines()
        .filter_map(|line| {
            // In `directory!` fields have no visibility of their own.
            let line = line.trim();
            let line = line.strip_prefix("pub(super) ").unwrap_or(line);
            line.split_once(": ").map(|(key, _)| key.trim_start_matches("r#"))
        })
        .filter(|key| key.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_'))
        .collect();
    assert!(keys.len() > 90, "{keys:?}");
    for key in keys {
        // At the start of a word: `server_login:` does not mention `login`.
        let mentioned = text
            .match_indices(&format!("{key}:"))
            .any(|(at, _)| !text[..at].ends_with(|before: char| before.is_ascii_alphanumeric() || before == '_'));
        assert!(mentioned, "neither reference.yaml nor routes.yaml mentions {key}");
    }
    let shown = load(&path).unwrap();
    assert_eq!(shown.limits, Limits::default(), "the reference shows the defaults");
    assert_eq!(shown.admission, AdmissionConfig::default(), "the reference shows the defaults");
}

#[test]
fn unknown_keys_get_the_nearest_known_one() {
    assert_eq!(with("limts: {}\n"), ["v.yaml:4:1: limts: unknown key; did you mean `limits`?"]);
    assert_eq!(with("limits: {conect: 1s}\n"), ["v.yaml:4:10: limits.conect: unknown key; did you mean `connect`?"]);
    let said = mistakes(
        "listeners: [{adress: '[::]:143', tls: none}]\nbackends: {a: {servers: ['192.0.2.1:1']}}\nroutes: [{default: a}]\n",
    );
    assert_eq!(said, ["v.yaml:1:14: listeners[0].adress: unknown key; did you mean `address`?"], "not also missing");
}

#[test]
fn paths_that_the_program_could_not_use_are_refused() {
    // Another process beside `control` has its own socket at `control.7`.
    for (key, wrong, said) in [
        ("admin: {control", "/run/vestibule/control.7", "admin.control: a name that ends in a process id"),
        ("admin: {control", &*format!("/{}", "x".repeat(90)), "admin.control: the path is too long"),
        ("state_file", "/var/lib/..", "state_file: expected the path of a file"),
    ] {
        let text = format!("{key}: {wrong}{}\n", if key.contains('{') { "}" } else { "" });
        assert!(with(&text)[0].contains(said), "{:?}", with(&text));
    }
    let good = format!("{MINIMAL}admin: {{control: /run/vestibule.2/control}}\nstate_file: state.json\n");
    parse(Path::new("v.yaml"), &good).unwrap();
}

#[test]
fn all_mistakes_are_listed_at_once() {
    let said = mistakes(
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
        "v.yaml:2:5: listeners[0].address: expected a text, found a number",
        "v.yaml:3:5: listeners[0].tls: expected one of implicit, starttls, none; did you mean `implicit`?",
        "v.yaml:4:5: listeners[1].address: expected an address and a port, like \"[::]:993\", found \"localhost:143\"",
        "v.yaml:8:15: backends.shard-a.servers[0]: expected host:port, like 10.0.0.11:143, [2001:db8::1]:143 or mail.internal:143, found \"10.0.0.1\"",
        "v.yaml:8:27: backends.shard-a.servers[1]: expected host:port, like 10.0.0.11:143, [2001:db8::1]:143 or mail.internal:143, found \"mail:0\"",
        "v.yaml:8:56: backends.shard-a.servers[2].weight: expected a number from 1 to 1000",
        "v.yaml:8:68: backends.shard-a.servers[3]: the key `address` is missing (or `srv`)",
        "v.yaml:8:81: backends.shard-a.servers[4]: the same server stands in this backend already",
        "v.yaml:9:23: backends.shard-a.tls.insecure: has no effect with mode none",
        "v.yaml:10:5: backends.shard-a.colour: unknown key: expected servers, tls, source_addresses, client_info, authzid, login, referrals, login_with, unavailable_texts, limit_texts, empty_password, forward, balance, check, slow_start, breaker, max_sessions or queue",
        "v.yaml:12:5: routes[0].default: no backend is declared as \"shard-b\"; did you mean `shard-a`?",
        "v.yaml:14:5: routes[2]: expected exactly one of table, domain, regex, hash, default, sql, ldap, http, redis, dns",
        "v.yaml:15:10: limits.idle: expected off or a duration from 30m to 30days",
        "v.yaml:15:21: limits.line: expected a size from 1024 to 16777216 bytes",
        "v.yaml:15:30: limits.bad_commands: expected a number from 1 to 1000",
        "v.yaml:15:48: limits.connect: expected a duration with its unit, like 10s or 30m, found a text of another form",
        "v.yaml:16:9: admin.address: expected an address and a port, like \"127.0.0.1:9143\", found \":9143\"",
    ];
    for line in expected {
        assert!(said.iter().any(|other| other == line), "{line}\nis missing in\n{}", said.join("\n"));
    }
    assert_eq!(said.len(), expected.len(), "{}", said.join("\n"));
}

#[test]
fn tls_of_listeners() {
    let listeners = |first: &str, tls: &str| {
        let listener = format!("listeners: [{{address: '127.0.0.1:993', tls: implicit, {first}}}]");
        format!(
            "{listener}\n{}tls: {{certificates: [{{cert: c, key: k}}], {tls}}}\n",
            MINIMAL.split_once('\n').unwrap().1
        )
    };
    for (written, tls_min, strict_sni) in [
        ("", TlsVersion::Tls12, false),
        ("tls_min: '1.3', sni: strict", TlsVersion::Tls13, true),
        ("tls_min: 1.3, sni: any", TlsVersion::Tls13, false),
        ("tls_min: 1.2", TlsVersion::Tls12, false),
    ] {
        let config = parse(Path::new("v.yaml"), &listeners(written, "")).unwrap();
        let listener = &config.listeners[0];
        assert_eq!((listener.tls_min, listener.strict_sni), (tls_min, strict_sni), "{written}");
    }
    assert_eq!(
        mistakes(&listeners("tls_min: '1.1', sni: strickt", "ticket_keys: [a, b, a]")),
        [
            "v.yaml:1:55: listeners[0].tls_min: expected a version of TLS, \"1.2\" or \"1.3\", found a text of another form",
            "v.yaml:1:71: listeners[0].sni: expected one of any, strict; did you mean `strict`?",
            "v.yaml:4:62: tls.ticket_keys[2]: the same file stands in this list already",
        ]
    );
    assert_eq!(
        mistakes(&listeners("tls_min: 1.0", "ticket_keys: []")),
        [
            "v.yaml:1:55: listeners[0].tls_min: expected a version of TLS, \"1.2\" or \"1.3\", found a number with a fraction",
            "v.yaml:4:42: tls.ticket_keys: at least one file is needed; without the key the process makes its own secret",
        ]
    );
    let plain = MINIMAL.replace("tls: none", "tls: none, tls_min: '1.2', sni: any");
    assert_eq!(
        mistakes(&plain),
        [
            "v.yaml:1:52: listeners[0].tls_min: has no effect with tls: none",
            "v.yaml:1:68: listeners[0].sni: has no effect with tls: none",
        ]
    );
}

#[test]
fn care_of_servers_has_rules() {
    let of = |more: &str| mistakes(&MINIMAL.replace("143']}}", &format!("143'], {more}}}}}")));
    for (more, expected) in [
        (
            "balance: fair",
            "2:44: backends.a.balance: expected one of user-hash, bounded-hash, least-sessions, round-robin",
        ),
        (
            "balance: {kind: round-robin, factor: 2}",
            "2:73: backends.a.balance.factor: has an effect with bounded-hash only",
        ),
        (
            "balance: {kind: bounded-hash, factor: 1}",
            "2:74: backends.a.balance.factor: expected a number from 1.01 to 10",
        ),
        ("check: pop3", "2:44: backends.a.check: expected one of tcp, tls, imap, login"),
        ("check: tls", "2:44: backends.a.check: there is no TLS to check: the backend has tls none"),
        ("check: {account: probe}", "2:52: backends.a.check.account: has an effect with kind login only"),
        ("check: {kind: login, password_file: p}", "2:44: backends.a.check: a login needs the key `account`"),
        ("check: {interval: 0s}", "2:52: backends.a.check.interval: expected a duration from 100ms to 1day"),
        ("check: {rise: 0}", "2:52: backends.a.check.rise: expected a number from 1 to 1000"),
        (
            "slow_start: 30s",
            "2:44: backends.a.slow_start: has no effect with balance user-hash: a user's sessions meet on one server",
        ),
        ("breaker: {failures: 0}", "2:54: backends.a.breaker.failures: expected a number from 1 to 1000"),
        ("max_sessions: 0", "2:44: backends.a.max_sessions: expected a number from 1 to 10000000"),
        ("queue: {length: -1}", "2:52: backends.a.queue.length: expected a number from 0 to 1000000"),
    ] {
        assert_eq!(of(more), [format!("v.yaml:{expected}")], "{more}");
    }
    let said = mistakes(&MINIMAL.replace("'192.0.2.1:143'", "{address: '192.0.2.1:143', state: dwon}"));
    assert_eq!(
        said,
        ["v.yaml:2:53: backends.a.servers[0].state: expected one of up, drain, down; did you mean `down`?"]
    );
}

#[test]
fn care_of_servers_has_defaults() {
    let config = parse(Path::new("v.yaml"), MINIMAL).unwrap();
    let care = &config.backends[0].balancing;
    assert_eq!((care.balance, care.slow_start, care.failures), (Balance::UserHash, None, 3));
    let check = care.check.as_ref().unwrap();
    assert_eq!((check.kind.as_str(), check.interval, check.rise, check.fall), ("imap", Duration::from_secs(10), 2, 3));
    assert!(matches!(config.backends[0].servers[0], Server::Address { max_sessions: None, state: AdminState::Up, .. }));
    let text = MINIMAL.replace(
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
fn a_key_that_stands_twice_is_told_with_both_places() {
    assert_eq!(with("routes: []\n"), ["v.yaml:4:1: routes: the key stands twice; the first time in line 3"]);
    let backend = MINIMAL.replace("143']}}", "143']}, a: {tls: none}}");
    assert_eq!(mistakes(&backend), ["v.yaml:2:45: backends.a: the key stands twice; the first time in line 2"]);
}

#[test]
fn a_key_that_stands_twice_hides_nothing() {
    let said = with("routes: [{default: z}]\ncolour: red\nlog: {level: info, level: loud}\n");
    let keys: Vec<&str> = said.iter().map(|line| line.split(": ").nth(1).unwrap()).collect();
    assert_eq!(keys, ["routes", "colour", "log.level"], "{said:?}");
}

#[test]
fn values_that_may_be_secrets_are_not_shown() {
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
        let said = with(text).join("\n");
        assert!(!said.contains("hunter2"), "{said}");
    }
}

#[test]
fn contradictions() {
    let tls = |tls: &str| mistakes(&MINIMAL.replace("143']}}", &format!("143'], tls: {tls}}}}}")));
    assert!(
        tls("{mode: implicit, ca: x, insecure: true}")[0]
            .contains("backends.a.tls: ca and insecure exclude each other")
    );
    assert!(tls("{mode: starttls, pin: abc}")[0].contains("backends.a.tls.pin: expected sha256:"));
    assert!(
        tls("{mode: starttls, server_name: 'a b'}")[0].contains("backends.a.tls.server_name: expected a host name")
    );
    assert!(
        tls("no")[0].contains("backends.a.tls: expected one of implicit, starttls, none"),
        "YAML 1.1 would read false"
    );
    assert!(tls("false")[0].contains("found true or false"));
    let need = mistakes(&MINIMAL.replace("tls: none}", "tls: implicit}"));
    assert_eq!(need, ["v.yaml:1:1: tls.certificates: a listener speaks TLS, so at least one certificate is needed"]);
    let after = mistakes(&MINIMAL.replace("[{default: a}]", "[{default: a}, {table: x}]"));
    assert!(after[0].contains("routes[1]: is never asked"), "{after:?}");
    let twice = mistakes(&MINIMAL.replace("tls: none}]", "tls: none}, {address: '127.0.0.1:1143', tls: none}]"));
    assert!(
        twice[0].contains("listeners[1].address: 127.0.0.1:1143 is another listener's address already"),
        "{twice:?}"
    );
}

#[test]
fn a_proxy_pointed_at_itself() {
    let loops = |listener: &str, server: &str| {
        let text = MINIMAL.replace("127.0.0.1:1143", listener).replace("192.0.2.1:143", server);
        parse(Path::new("v.yaml"), &text).is_err()
    };
    assert!(loops("127.0.0.1:1143", "127.0.0.1:1143"));
    assert!(loops("0.0.0.0:1143", "127.0.0.1:1143"));
    assert!(loops("[::]:1143", "127.0.0.1:1143"));
    assert!(loops("127.0.0.1:1143", "[::ffff:127.0.0.1]:1143"));
    assert!(!loops("127.0.0.1:1143", "127.0.0.1:1144"));
    assert!(!loops("[::]:1143", "192.0.2.1:1143"));
    assert!(!loops("0.0.0.0:1143", "[::1]:1143"), "0.0.0.0 takes IPv4 only");
    assert!(!loops("127.0.0.1:0", "127.0.0.1:143"));
}

#[test]
fn servers_in_every_form() {
    let servers = "['10.0.0.11:143', '[2001:db8::1]:143', 'Mail-A2.internal:143', {address: 'm:1', weight: 2}, {srv: _imap._tcp.shard-a.internal}]";
    let config = parse(Path::new("v.yaml"), &MINIMAL.replace("['192.0.2.1:143']", servers)).unwrap();
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
fn files_that_are_no_configuration() {
    let folder = tempfile::tempdir().unwrap();
    let said = |content: &[u8]| {
        let path = folder.path().join("v.yaml");
        fs::write(&path, content).unwrap();
        load(&path).unwrap_err().to_string()
    };
    assert!(said(b"").contains("the file is empty"));
    assert!(said(b"# nothing\n").contains("the file is empty"));
    assert!(said(b"\xff\xfe").contains("not UTF-8 at byte 0"));
    assert!(said(b"a: [\n").contains("not YAML"));
    assert!(said(b"a:\n\t- b\n").contains("not YAML"));
    assert!(said(b"- a\n").contains("expected a map, found a list"));
    assert!(said(&vec![b'#'; 17 << 20]).contains("over 16 MiB"));
    assert!(load(folder.path()).unwrap_err().to_string().contains("directory"));
    assert!(
        load(&folder.path().join("absent.yaml")).unwrap_err().to_string().contains("absent.yaml:1:1: No such file")
    );
    let bomb = "a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b]\nd: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c]\ne: &e [*d,*d,*d,*d,*d,*d,*d,*d,*d]\nf: &f [*e,*e,*e,*e,*e,*e,*e,*e,*e]\ng: [*f,*f,*f,*f,*f,*f,*f,*f,*f]\n";
    assert!(said(bomb.as_bytes()).contains("v.yaml:"));
}

#[test]
fn paths_count_from_the_files_folder() {
    let text = MINIMAL.replace("{default: a}", "{table: users.txt}");
    let config = parse(Path::new("/etc/vestibule/v.yaml"), &text).unwrap();
    let Route::Table(table) = &config.routes[0] else { panic!("a table") };
    assert_eq!(table.value, Path::new("/etc/vestibule/users.txt"));
    assert_eq!((table.location.line, table.location.key.as_str()), (3, "routes[0].table"));
}

/// A key with nothing behind it, such as `tls:` over lines that are commented out, must not mean its default.
#[test]
fn keys_without_a_value() {
    for (tls, key) in [
        ("tls: ", "backends.a.tls"),
        ("tls: {mode: implicit, pin: }", "backends.a.tls.pin"),
        ("tls: {mode: implicit, ca: ~}", "backends.a.tls.ca"),
        ("authzid: ", "backends.a.authzid"),
    ] {
        let said = mistakes(&MINIMAL.replace("143']}}", &format!("143'], {tls}}}}}")));
        assert_eq!(said.len(), 1, "{said:?}");
        assert!(said[0].ends_with(&format!(" {key}: has no value: give it one, or remove the key")), "{said:?}");
    }
    assert_eq!(with("limits: {connect: }\n").len(), 1);
    parse(Path::new("v.yaml"), &format!("{MINIMAL}limits:\n")).expect("a section without keys has all defaults");
}

#[test]
fn one_mistake_is_told_once() {
    let listeners = "[{address: '127.0.0.1:1143', tls: none}]";
    let servers = "{a: {servers: ['192.0.2.1:143']}}";
    for (text, only) in [
        (MINIMAL.replace(listeners, "5"), "v.yaml:1:1: listeners: expected a list, found a number"),
        (MINIMAL.replace(servers, "[a]"), "v.yaml:2:1: backends: expected a map, found a list"),
        (MINIMAL.replace(servers, "{a: 5}"), "v.yaml:2:12: backends.a: expected a map, found a number"),
        (MINIMAL.replace("[{default: a}]", "{default: a}"), "v.yaml:3:1: routes: expected a list, found a map"),
        (MINIMAL.replace("default: a", "domain: [a]"), "v.yaml:3:11: routes[0].domain: expected a map, found a list"),
        (
            MINIMAL.replace("tls: none", "tls: implicit") + "tls: {certificates: {cert: a, key: b}}\n",
            "v.yaml:4:7: tls.certificates: expected a list, found a map",
        ),
        (
            MINIMAL.replace("'192.0.2.1:143'", "{adress: 'm:1'}"),
            "v.yaml:2:27: backends.a.servers[0].adress: unknown key; did you mean `address`?",
        ),
        (
            MINIMAL.replace("default: a", "domain: {1.5: a, b.test: a}"),
            "v.yaml:3:20: routes[0].domain.1.5: a key must be a text: put it in quotes",
        ),
    ] {
        assert_eq!(mistakes(&text), [only]);
    }
}

#[test]
fn a_mistake_does_not_hide_those_beside_it() {
    let text = MINIMAL.replace("['192.0.2.1:143']", "'192.0.2.1:143', tls: {mode: implicit, ca: x, insecure: true}");
    assert_eq!(
        mistakes(&text),
        [
            "v.yaml:2:16: backends.a.servers: expected a list, found a text of another form",
            "v.yaml:2:42: backends.a.tls: ca and insecure exclude each other",
        ]
    );
}

#[test]
fn values_without_a_meaning() {
    let tls = |tls: &str| mistakes(&MINIMAL.replace("143']}}", &format!("143'], tls: {tls}}}}}")));
    assert_eq!(tls("{mode: implicit, pin: []}"), ["v.yaml:2:66: backends.a.tls.pin: at least one pin is needed"]);
    assert_eq!(tls("{mode: implicit, pin: [x, y]}").len(), 2, "each with its place");
    let domains = |domains: &str| mistakes(&MINIMAL.replace("default: a", &format!("domain: {domains}")));
    assert!(domains("{}")[0].contains("routes[0].domain: at least one domain is needed"));
    assert_eq!(domains("{'': a, 'a b': a, 'x@y': a, '*': a, '@ok.test': a}").len(), 4);
    let server = |server: &str| mistakes(&MINIMAL.replace("'192.0.2.1:143'", server));
    assert!(server("'0.0.0.0:1'")[0].contains("0.0.0.0 is no address a server can have"));
    assert!(server("'mail:+143'")[0].contains("expected host:port"));
    assert!(server("'mail:143', 'Mail.:143'")[0].contains("servers[1]: the same server stands"));
}

#[test]
fn addresses_that_overlap_could_not_be_bound() {
    let said = |listeners: &[&str], admin: &str| {
        let listeners = listeners.iter().map(|address| format!("{{address: '{address}', tls: none}}"));
        let listeners = listeners.collect::<Vec<_>>().join(", ");
        let text = MINIMAL.replace("{address: '127.0.0.1:1143', tls: none}", &listeners);
        parse(Path::new("v.yaml"), &format!("{text}admin: {{address: '{admin}'}}\n")).err().map(|said| said.to_string())
    };
    let other = "127.0.0.1:9143";
    for listeners in [["0.0.0.0:1", "127.0.0.1:1"], ["127.0.0.1:1", "0.0.0.0:1"], ["[::]:1", "[::1]:1"]] {
        assert!(said(&listeners, other).expect("they overlap").contains("listeners[1].address: "), "{listeners:?}");
    }
    for listeners in
        [["[::]:1", "127.0.0.1:1"], ["[::]:1", "0.0.0.0:1"], ["0.0.0.0:1", "127.0.0.1:2"], ["0.0.0.0:0"; 2]]
    {
        assert_eq!(said(&listeners, other), None, "{listeners:?}");
    }
    assert!(said(&["[::]:9143"], other).expect("[::] takes IPv4 too").contains("admin.address: "));
    assert_eq!(said(&["[::]:9143", "127.0.0.2:9143"], other), None, "[::] leaves IPv4 to the other");
}

#[test]
fn texts_with_a_twist() {
    let limts = ["v.yaml:4:1: limts: unknown key; did you mean `limits`?"];
    assert_eq!(mistakes(&format!("\u{feff}{MINIMAL}limts: {{}}\n")), limts, "a byte order mark");
    assert_eq!(mistakes(&format!("{MINIMAL}limts: {{}}\n").replace('\n', "\r\n")), limts);
    assert_eq!(with("---\n"), ["v.yaml:4:1: a second document begins here (---), a configuration is one"]);
    assert_eq!(with("log:\n\tlevel: info\n").len(), 1);
    assert!(with("log:\n\tlevel: info\n")[0].ends_with("indent with spaces: YAML allows no tab there"));
    assert!(mistakes(&"[".repeat(100_000))[0].contains("too many maps and lists in each other"));
    assert_eq!(with("\"a\\nb\": 1\n")[0].lines().count(), 1, "a problem is one line");
    let dotted = MINIMAL.replace("']}}", "']}, a.servers: {servers: ['192.0.2.1:143']}}");
    assert_eq!(parse(Path::new("v.yaml"), &dotted).unwrap().backends.len(), 2, "a dot is part of a name");
}

#[test]
fn more_mistakes_than_anybody_reads() {
    let domains: String = (0..1000).map(|number| format!("d{number}.test: b, ")).collect();
    let said = mistakes(&MINIMAL.replace("default: a", &format!("domain: {{{domains}}}")));
    assert_eq!(said.len(), 201);
    assert!(said[200].ends_with("there are more mistakes than these 200"), "{}", said[200]);
}

#[test]
fn balancers_are_networks() {
    let listener = |setting: &str| MINIMAL.replace("tls: none}", &format!("tls: none, proxy_protocol: {setting}}}"));
    let config = parse(Path::new("v.yaml"), &listener("{from: [10.0.0.0/8, '2001:db8::1']}")).unwrap();
    let networks = config.listeners[0].proxy_protocol.as_ref().unwrap();
    assert!(networks[0].contains("10.1.2.3".parse().unwrap()) && networks.len() == 2);
    assert_eq!(
        mistakes(&listener("{from: [balancer.internal]}")),
        ["v.yaml:1:76: listeners[0].proxy_protocol.from[0]: expected a network, like 10.0.0.0/8"]
    );
    assert_eq!(
        mistakes(&listener("{from: []}")),
        ["v.yaml:1:69: listeners[0].proxy_protocol.from: at least one network is needed, or nobody is let in"]
    );
    assert_eq!(mistakes(&listener("{}")), ["v.yaml:1:52: listeners[0].proxy_protocol: the key `from` is missing"]);
    assert_eq!(
        with("limits: {proxy_header: 2m}\n"),
        ["v.yaml:4:10: limits.proxy_header: expected a duration from 100ms to 1m"]
    );
}

#[test]
fn a_delay_of_the_stop_may_be_none() {
    let delay = |text: &str| parse(Path::new("v.yaml"), &format!("{MINIMAL}{text}")).unwrap().limits.ready_delay;
    assert_eq!((delay(""), delay("limits: {ready_delay: 0s}\n")), (Duration::ZERO, Duration::ZERO));
    assert_eq!(delay("limits: {ready_delay: 10s}\n"), Duration::from_secs(10));
    assert_eq!(
        with("limits: {ready_delay: 2h}\n"),
        ["v.yaml:4:10: limits.ready_delay: expected a duration from 0s to 1h"]
    );
}
