//! Rules between settings.

use super::*;

#[test]
fn contradictory_settings_are_refused() {
    let tls = |tls: &str| problems(&edited("143']}}", &format!("143'], tls: {tls}}}}}")));
    assert!(
        tls("{mode: implicit, ca: x, insecure: true}")[0]
            .contains("backends.a.tls: ca and insecure exclude each other")
    );
    assert!(tls("{mode: starttls, pin: abc}")[0].contains("backends.a.tls.pin: expected sha256:"));
    assert!(
        tls("{mode: starttls, server_name: 'a b'}")[0].contains("backends.a.tls.server_name: expected a host name")
    );
    assert!(
        tls("no")[0].contains("backends.a.tls: unknown value: expected implicit, starttls or none"),
        "YAML 1.1 would read false"
    );
    assert!(tls("false")[0].contains("got true or false"));
    let found = problems(&edited("tls: none}", "tls: implicit}"));
    assert_eq!(
        found,
        ["v.yaml:1:1: tls.certificates: at least one certificate is required, because a listener uses TLS"]
    );
    let found = problems(&edited("[{default: a}]", "[{default: a}, {table: x}]"));
    assert!(found[0].contains("routes[1]: is unreachable"), "{found:?}");
    let found = problems(&edited("tls: none}]", "tls: none}, {address: '127.0.0.1:1143', tls: none}]"));
    assert!(
        found[0].contains("listeners[1].address: 127.0.0.1:1143 is already the address of another listener"),
        "{found:?}"
    );
}

#[test]
fn server_that_is_the_proxy_itself_is_refused() {
    let loops = |listener: &str, server: &str| {
        let text = edited("127.0.0.1:1143", listener).replace("192.0.2.1:143", server);
        parse(Path::new("v.yaml"), &text).is_err()
    };
    assert!(loops("127.0.0.1:1143", "127.0.0.1:1143"));
    assert!(loops("0.0.0.0:1143", "127.0.0.1:1143"));
    assert!(loops("[::]:1143", "127.0.0.1:1143"));
    assert!(loops("127.0.0.1:1143", "[::ffff:127.0.0.1]:1143"));
    assert!(!loops("127.0.0.1:1143", "127.0.0.1:1144"));
    assert!(!loops("[::]:1143", "192.0.2.1:1143"));
    assert!(!loops("0.0.0.0:1143", "[::1]:1143"), "0.0.0.0 accepts IPv4 only");
    assert!(!loops("127.0.0.1:0", "127.0.0.1:143"));
}

#[test]
fn overlapping_addresses_are_refused() {
    let found = |listeners: &[&str], admin: &str| {
        let listeners = listeners.iter().map(|address| format!("{{address: '{address}', tls: none}}"));
        let listeners = listeners.collect::<Vec<_>>().join(", ");
        let text = edited("{address: '127.0.0.1:1143', tls: none}", &listeners);
        parse(Path::new("v.yaml"), &format!("{text}admin: {{address: '{admin}'}}\n"))
            .err()
            .map(|found| found.to_string())
    };
    let other = "127.0.0.1:9143";
    for listeners in [["0.0.0.0:1", "127.0.0.1:1"], ["127.0.0.1:1", "0.0.0.0:1"], ["[::]:1", "[::1]:1"]] {
        assert!(found(&listeners, other).expect("they overlap").contains("listeners[1].address: "), "{listeners:?}");
    }
    for listeners in
        [["[::]:1", "127.0.0.1:1"], ["[::]:1", "0.0.0.0:1"], ["0.0.0.0:1", "127.0.0.1:2"], ["0.0.0.0:0"; 2]]
    {
        assert_eq!(found(&listeners, other), None, "{listeners:?}");
    }
    assert!(found(&["[::]:9143"], other).expect("[::] accepts IPv4 too").contains("admin.address: "));
    assert_eq!(found(&["[::]:9143", "127.0.0.2:9143"], other), None, "127.0.0.2:9143 accepts IPv4 instead of [::]");
}
