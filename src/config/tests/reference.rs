//! The shipped configurations: all are valid, and the reference states every key and the defaults.

use std::collections::BTreeSet;

use regex::Regex;
use serde_yaml::{Mapping, Value};

use super::*;

/// Keys whose values in reference.yaml and routes.yaml are examples, not defaults.
const EXAMPLES: &[&str] = &[
    "admin",
    "admin.address",
    "admin.control",
    "backends.shard-a.login",
    "backends.shard-a.login.master",
    "backends.shard-a.servers[1].weight",
    "backends.shard-a.servers[3].max_sessions",
    "backends.shard-b.tls",
    "backends.shard-b.tls.ca",
    "backends.shard-b.tls.server_name",
    "listeners[1].client_certificates",
    "listeners[1].client_certificates.may_act_for",
    "listeners[1].mechanisms",
    "listeners[1].proxy_protocol",
    "oauth",
    "oauth[0].audience",
    "policy",
    "policy.password_file",
    "routes[1].domain.a.test",
    "routes[1].domain.b.test",
    "routes[3].sql.ca",
    "routes[3].sql.names",
    "routes[3].sql.names.mail1.internal",
    "routes[3].sql.password_file",
    "routes[4].ldap.attributes.backend",
    "routes[4].ldap.attributes.refuse",
    "routes[4].ldap.ca",
    "routes[5].redis.ca",
    "routes[5].redis.user",
    "routes[6].dns.servers",
    "routes[7].http.ca",
    "routes[7].http.headers",
    "routes[7].http.headers.X-Api",
    "routes[7].http.token_file",
    "routes[8].hash.backends.shard-a",
    "routes[8].hash.backends.shard-b",
    "routes[8].hash.backends.shard-b.weight",
    "run_as",
    "run_as.group",
    "state_file",
    "tls.ticket_keys",
    "users",
    "users.masters",
    "users.masters.networks",
];

/// Optional maps that the files contain only as comments, or in a shorter form.
const COMMENTED: [&str; 8] =
    ["client_certificates", "proxy_protocol", "ticket_keys", "login", "policy", "oauth", "run_as", "state_file"];

fn shipped(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("config").join(name)
}

/// The text of a shipped file, in which the optional maps are not comments.
fn activated(name: &str) -> String {
    let mut text = fs::read_to_string(shipped(name)).unwrap();
    for key in COMMENTED {
        let Some(at) = Regex::new(&format!("(?m)^ *# {key}:")).unwrap().find(&text) else { continue };
        let indent = text[at.start()..].find('#').unwrap();
        let block = Regex::new(&format!("^ {{{indent}}}#   .*\n")).unwrap();
        let mut end = at.start() + text[at.start()..].find('\n').unwrap() + 1;
        while let Some(line) = block.find(&text[end..]) {
            end += line.end();
        }
        let lines = text[at.start()..end].lines();
        let lines: String = lines.map(|line| format!("{}{}\n", &line[..indent], &line[indent + 2..])).collect();
        text.replace_range(at.start()..end, &lines);
    }
    // Delegations require a backend that allows them.
    let backends = Regex::new("(?m)^backends:.*\n").unwrap();
    match text.contains(" may_act_for:") {
        true => backends.replace(&text, "$0  delegating: {servers: ['192.0.2.1:143'], authzid: allow}\n").into_owned(),
        false => text,
    }
}

fn tree(name: &str) -> Value {
    serde_yaml::from_str(&activated(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

/// Calls `visit` with each map below `value` and its path.
fn for_each_map(path: &str, value: &mut Value, visit: &mut impl FnMut(&str, &mut Mapping)) {
    match value {
        Value::Mapping(map) => {
            visit(path, map);
            for (key, value) in map.iter_mut() {
                for_each_map(&format!("{path}.{}", key.as_str().unwrap()), value, visit);
            }
        }
        Value::Sequence(items) => {
            for (index, item) in items.iter_mut().enumerate() {
                for_each_map(&format!("{path}[{index}]"), item, visit);
            }
        }
        _ => {}
    }
}

/// Debug output of the configuration, without locations; `None` if it is invalid.
fn parsed(value: &Value) -> Option<String> {
    let config = parse(Path::new("v.yaml"), &serde_yaml::to_string(value).unwrap()).ok()?;
    let shown = format!("{config:?}");
    Some(Regex::new(r"location: Location \{[^}]*\}").unwrap().replace_all(&shown, "").into_owned())
}

#[test]
fn minimal_configuration_has_all_defaults() {
    let config = parse(Path::new("v.yaml"), MINIMAL).unwrap();
    assert_eq!(config.limits, Limits::default());
    assert_eq!(config.admission, AdmissionConfig::default());
    assert_eq!(config.backends[0].client_info, ClientInfo::Id);
    assert_eq!(config.backends[0].authzid, Authzid::Refuse);
    assert_eq!(config.backends[0].login_rules, LoginRules::default());
    assert_eq!(config.log, LogConfig { format: LogFormat::Text, level: Level::Info });
    assert_eq!(config.resolver, ResolverConfig::default());
    assert_eq!(config.admin, None);
}

#[test]
fn shipped_configurations_are_valid() {
    let mut files = 0;
    for entry in fs::read_dir(shipped("")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "yaml") {
            load(&path).unwrap_or_else(|report| panic!("{report}"));
            files += 1;
        }
    }
    assert!(files >= 4, "{files} files found");
}

/// Removes each key in turn. The configuration must not change, unless the key is a required one or an example.
#[test]
fn reference_states_the_defaults() {
    let mut examples = BTreeSet::new();
    let mut defaults = BTreeSet::new();
    for name in ["reference.yaml", "routes.yaml"] {
        let whole = tree(name);
        let expected =
            parsed(&whole).unwrap_or_else(|| panic!("{name} is invalid: {}", problems(&activated(name)).join("\n")));
        let mut keys = Vec::new();
        for_each_map("", &mut whole.clone(), &mut |path, map| {
            keys.extend(map.keys().map(|key| (path.to_owned(), key.clone())));
        });
        for (path, key) in keys {
            let mut changed = whole.clone();
            for_each_map("", &mut changed, &mut |at, map| {
                if at == path {
                    map.remove(&key);
                }
            });
            let full = format!("{path}.{}", key.as_str().unwrap());
            match parsed(&changed) {
                None => {}
                Some(found) if found == expected => {
                    defaults.insert(full);
                }
                Some(_) => {
                    examples.insert(full.trim_start_matches('.').to_owned());
                }
            }
        }
    }
    assert!(defaults.len() > 80, "{defaults:?}");
    let listed: BTreeSet<String> = EXAMPLES.iter().map(|key| (*key).to_owned()).collect();
    let wrong: Vec<_> = examples.difference(&listed).collect();
    assert_eq!(wrong, [""; 0], "the stated values are not the defaults");
    let stale: Vec<_> = listed.difference(&examples).collect();
    assert_eq!(stale, [""; 0], "the stated values are the defaults, not examples");
}

#[test]
fn reference_states_the_default_factor() {
    let text = fs::read_to_string(shipped("reference.yaml")).unwrap();
    let comment = Regex::new(r"# balance: (\{kind: bounded-hash, factor: [^}]*\})").unwrap();
    let balance = |value: &str| {
        let text = edited("143']}}", &format!("143'], balance: {value}}}}}"));
        parse(Path::new("v.yaml"), &text).unwrap().backends[0].balancing.balance
    };
    assert_eq!(balance(&comment.captures(&text).unwrap()[1]), balance("bounded-hash"));
}

/// The keys that an unknown key's error message lists, at each map of the shipped files and of `more`.
fn known_keys(more: &[&str]) -> BTreeSet<String> {
    let mut keys = BTreeSet::new();
    let mut collect = |text: &str| {
        let Err(report) = parse(Path::new("v.yaml"), text) else { return };
        for problem in report.problems() {
            if let ("unknown key", Some(Help::Known(known))) = (problem.message.as_str(), &problem.help) {
                keys.extend(known.iter().cloned());
            }
        }
    };
    for name in ["reference.yaml", "routes.yaml"] {
        let mut value = tree(name);
        for_each_map("", &mut value, &mut |_, map| {
            map.insert("unknown_key_of_test".into(), "x".into());
        });
        collect(&serde_yaml::to_string(&value).unwrap());
    }
    more.iter().for_each(|text| collect(text));
    keys
}

#[test]
fn reference_mentions_every_key() {
    let text = ["reference.yaml", "routes.yaml"].map(|name| fs::read_to_string(shipped(name)).unwrap()).concat();
    let balance = edited("143']}}", "143'], balance: {unknown_key_of_test: 1}}}");
    let networks = format!("{MINIMAL}limits: {{networks: [{{unknown_key_of_test: 1}}]}}\n");
    let keys = known_keys(&[&balance, &networks]);
    assert!(keys.len() > 90, "{keys:?}");
    for key in keys {
        // Only at the start of a word: `server_login:` does not mention `login`.
        let is_mentioned = text
            .match_indices(&format!("{key}:"))
            .any(|(at, _)| !text[..at].ends_with(|before: char| before.is_ascii_alphanumeric() || before == '_'));
        assert!(is_mentioned, "neither reference.yaml nor routes.yaml mentions {key}");
    }
}
