//! Settings of listeners.

use super::*;

#[test]
fn tls_settings_are_checked() {
    let listeners = |first: &str, tls: &str| {
        let listener = format!("listeners: [{{address: '127.0.0.1:993', tls: implicit, {first}}}]");
        format!(
            "{listener}\n{}tls: {{certificates: [{{cert: c, key: k}}], {tls}}}\n",
            MINIMAL.split_once('\n').unwrap().1
        )
    };
    for (settings, tls_min, sni) in [
        ("", TlsVersion::Tls12, SniPolicy::Any),
        ("tls_min: '1.3', sni: strict", TlsVersion::Tls13, SniPolicy::Strict),
        ("tls_min: 1.3, sni: any", TlsVersion::Tls13, SniPolicy::Any),
        ("tls_min: 1.2", TlsVersion::Tls12, SniPolicy::Any),
    ] {
        let config = parse(Path::new("v.yaml"), &listeners(settings, "")).unwrap();
        let listener = &config.listeners[0];
        assert_eq!((listener.tls_min, listener.sni), (tls_min, sni), "{settings}");
    }
    assert_eq!(
        problems(&listeners("tls_min: '1.1', sni: strickt", "ticket_keys: [a, b, a]")),
        [
            "v.yaml:1:55: listeners[0].tls_min: expected a TLS version, \"1.2\" or \"1.3\"",
            "v.yaml:1:71: listeners[0].sni: unknown value: expected any or strict; did you mean `strict`?",
            "v.yaml:4:62: tls.ticket_keys[2]: duplicate file",
        ]
    );
    assert_eq!(
        problems(&listeners("tls_min: 1.0", "ticket_keys: []")),
        [
            "v.yaml:1:55: listeners[0].tls_min: expected a TLS version, \"1.2\" or \"1.3\", got a number with a fraction",
            "v.yaml:4:42: tls.ticket_keys: at least one file is required; without this key, the process generates its own secret",
        ]
    );
    let plain = edited("tls: none", "tls: none, tls_min: '1.2', sni: any");
    assert_eq!(
        problems(&plain),
        [
            "v.yaml:1:52: listeners[0].tls_min: has no effect with tls: none",
            "v.yaml:1:68: listeners[0].sni: has no effect with tls: none",
        ]
    );
}

#[test]
fn alpn_requires_tls() {
    assert_eq!(parse(Path::new("v.yaml"), MINIMAL).unwrap().listeners[0].alpn, AlpnPolicy::Strict);
    let found = problems(&edited("tls: none", "tls: none, alpn: any"));
    assert!(found[0].contains("alpn: has no effect with tls: none"), "{found:?}");
}

#[test]
fn mechanisms_are_checked() {
    let found = problems(&edited("tls: none", "tls: none, mechanisms: [plian, plain]"));
    assert_eq!(found, ["v.yaml:1:65: listeners[0].mechanisms[0]: unknown mechanism \"plian\"; did you mean `plain`?"]);
}

#[test]
fn proxy_protocol_networks_are_checked() {
    let listener = |setting: &str| edited("tls: none}", &format!("tls: none, proxy_protocol: {setting}}}"));
    let config = parse(Path::new("v.yaml"), &listener("{from: [10.0.0.0/8, '2001:db8::1']}")).unwrap();
    let networks = config.listeners[0].proxy_protocol.as_ref().unwrap();
    assert!(networks[0].contains("10.1.2.3".parse().unwrap()) && networks.len() == 2);
    assert_eq!(
        problems(&listener("{from: [balancer.internal]}")),
        ["v.yaml:1:76: listeners[0].proxy_protocol.from[0]: expected a network, like 10.0.0.0/8"]
    );
    assert_eq!(
        problems(&listener("{from: []}")),
        [
            "v.yaml:1:69: listeners[0].proxy_protocol.from: at least one network is required; without any, no client can connect"
        ]
    );
    assert_eq!(problems(&listener("{}")), ["v.yaml:1:52: listeners[0].proxy_protocol: missing key `from`"]);
    assert_eq!(
        with("limits: {proxy_header: 2m}\n"),
        ["v.yaml:4:10: limits.proxy_header: expected a duration from 100ms to 1m"]
    );
}
