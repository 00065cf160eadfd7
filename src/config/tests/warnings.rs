//! Settings that are allowed but seldom meant, and the keys of listeners and backends that came with them.

use super::*;

#[test]
fn settings_that_are_seldom_meant_are_warned_of() {
    let text = MINIMAL.replace("servers: ['192.0.2.1:143']", "servers: ['192.0.2.1:143'], client_info: none");
    let config = parse(Path::new("v.yaml"), &text).unwrap();
    let warnings: Vec<String> = config.warnings.iter().map(ToString::to_string).collect();
    assert_eq!(warnings.len(), 1, "{warnings:?}");
    assert!(
        warnings[0].starts_with("v.yaml:2:44: backends.a.client_info: with none the servers see the proxy"),
        "{warnings:?}"
    );
    assert!(warnings[0].contains("login_trusted_networks"), "{warnings:?}");
    assert_eq!(parse(Path::new("v.yaml"), MINIMAL).unwrap().warnings, []);
}

#[test]
fn a_bound_parameter_in_quotes_is_a_mistake() {
    let with_query = |query: &str| {
        let route = format!("[{{sql: {{url: 'sqlite:users.db', query: \"{query}\"}}}}]");
        parse(Path::new("v.yaml"), &MINIMAL.replace("[{default: a}]", &route))
    };
    let report = with_query("SELECT b FROM u WHERE n = '%{user}'").unwrap_err().to_string();
    assert!(report.contains("sql.query: %{user} is within quotes"), "{report}");
    assert!(report.contains("WHERE name = %{user}"), "{report}");
    assert!(with_query("SELECT b FROM u WHERE n = %{user} AND t = 'mail'").is_ok());
}

#[test]
fn source_addresses_and_alpn() {
    let text = MINIMAL.replace("servers: [", "source_addresses: [192.0.2.9, '2001:db8::9'], servers: [");
    let config = parse(Path::new("v.yaml"), &text).unwrap();
    assert_eq!(config.backends[0].source_addresses.len(), 2);
    assert!(config.listeners[0].strict_alpn);
    let text = MINIMAL
        .replace("servers: [", "source_addresses: [10.0.0.0/8, 0.0.0.0, 192.0.2.9, '::ffff:192.0.2.9'], servers: [");
    let found = mistakes(&text);
    assert_eq!(found.len(), 3, "{found:?}");
    assert!(found[0].contains("source_addresses[0]: expected an IP address"), "{found:?}");
    assert!(found[1].contains("0.0.0.0 is not an address that a connection can come from"), "{found:?}");
    assert!(found[2].contains("source_addresses[3]: the same address"), "{found:?}");
    let found = mistakes(&MINIMAL.replace("tls: none", "tls: none, alpn: any"));
    assert!(found[0].contains("alpn: has no effect with tls: none"), "{found:?}");
}
