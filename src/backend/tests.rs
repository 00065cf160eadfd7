//! What a server keeps over a change of the configuration, and what it takes from the new one.

use std::path::Path;

use super::*;
use crate::admin_state::AdminState;
use crate::metrics::Names;

fn configured(servers: &str) -> Config {
    let text = format!(
        "listeners: [{{address: '127.0.0.1:1143', tls: none}}]\nbackends: {{b: {{servers: [{servers}]}}}}\nroutes: [{{default: b}}]\n"
    );
    config::parse(Path::new("v.yaml"), &text).unwrap()
}

fn names() -> Names {
    Names { backends: vec!["b".into()], ..Names::default() }
}

#[test]
fn what_is_learnt_stays_and_what_is_configured_changes() {
    let metrics = Arc::new(Metrics::new(&names()));
    let old = Backends::build(&configured("'192.0.2.1:143', '192.0.2.2:143'"), &metrics, None).unwrap();
    let servers = old.list()[0].servers();
    let slot = ServerPermit::take(&servers[0]).unwrap();
    servers[0].failed(health::FailureKind::Refused, "nobody there");
    servers[1].set_admin_state(Some(AdminState::Drain));
    let again = "{address: '192.0.2.1:143', max_sessions: 1, state: drain}, '192.0.2.2:143'";
    let new = Backends::build(&configured(again), &metrics, Some(&old)).unwrap();
    let servers = new.list()[0].servers();
    assert_eq!((servers[0].sessions(), servers[0].is_available()), (1, false));
    assert_eq!((servers[0].max_sessions(), servers[0].admin_state()), (Some(1), AdminState::Drain));
    assert!(ServerPermit::take(&servers[0]).is_none(), "the place that is taken counts");
    assert_eq!(servers[1].admin_state(), AdminState::Drain, "the operator's word goes over the configuration's");
    servers[1].set_admin_state(None);
    assert_eq!(servers[1].admin_state(), AdminState::Up);
    drop(slot.established());
    assert_eq!(servers[0].sessions(), 0);
}

#[test]
fn the_gauges_of_a_server_say_how_it_is() {
    let metrics = Arc::new(Metrics::new(&names()));
    let backends = Backends::build(&configured("'192.0.2.1:143'"), &metrics, None).unwrap();
    let server = &backends.list()[0].servers()[0];
    let shown = |name: &str| {
        let sample = format!("vestibule_server_{name}{{backend=\"b\",server=\"192.0.2.1:143\"}} ");
        metrics.render().lines().find_map(|line| line.strip_prefix(&sample).map(str::to_owned)).unwrap()
    };
    let all = || (shown("up"), shown("breaker"), shown("state"), shown("sessions"));
    let expect = |up: &str, breaker: &str, state: &str, sessions: &str| {
        assert_eq!(all(), (up.into(), breaker.into(), state.into(), sessions.into()));
    };
    server.show();
    expect("1", "0", "0", "0");
    let slot = ServerPermit::take(server).unwrap();
    expect("1", "0", "0", "0");
    let session = slot.established();
    expect("1", "0", "0", "1");
    server.failed(health::FailureKind::Refused, "nobody there");
    expect("0", "2", "0", "1");
    server.answered();
    server.set_admin_state(Some(AdminState::Down));
    expect("0", "0", "2", "1");
    server.set_admin_state(Some(AdminState::Drain));
    expect("1", "0", "1", "1");
    drop(session);
    expect("1", "0", "1", "0");
    let checks = metrics.backend(0).checks(&server.name, "imap");
    checks.checked(true, std::time::Duration::from_millis(1));
    checks.certificate(4_000_000_000);
    assert!(metrics.render().contains("server=\"192.0.2.1:143\""));
    metrics.backend(0).forget_server(&server.name);
    assert!(!metrics.render().contains("server=\"192.0.2.1:143\""), "{}", metrics.render());
}

#[test]
fn the_domain_of_a_service() {
    assert_eq!(service_domain("_imap._tcp.shard-a.internal"), "shard-a.internal");
    assert_eq!(service_domain("_imaps._tcp.example.org."), "example.org");
    assert_eq!(service_domain("example.org"), "example.org");
}

#[test]
fn chance_is_a_fraction() {
    let drawn: Vec<f64> = (0..1000).map(|_| chance()).collect();
    assert!(drawn.iter().all(|chance| (0.0..1.0).contains(chance)));
    let lower = drawn.iter().filter(|chance| **chance < 0.5).count();
    assert!((400..600).contains(&lower), "{lower} of 1000 in the lower half");
}
