//! Tests of reloads and of the metrics of a server.

use std::path::Path;
use std::time::Duration;

use super::health::FailureKind;
use super::server::PermitKind;
use super::*;
use crate::admin_state::AdminState;
use crate::config::Config;
use crate::metrics::Names;

fn configured(servers: &str) -> Config {
    let text = format!(
        "listeners: [{{address: '127.0.0.1:1143', tls: none}}]\nbackends: {{b: {{servers: [{servers}]}}}}\nroutes: [{{default: b}}]\n"
    );
    config::parse(Path::new("v.yaml"), &text).unwrap()
}

fn metrics() -> Arc<Metrics> {
    Arc::new(Metrics::new(&Names { backends: vec!["b".into()], ..Names::default() }))
}

fn take(server: &Server) -> Option<ServerPermit> {
    ServerPermit::try_take(server, PermitKind::Session)
}

#[test]
fn reload_keeps_the_state_of_servers_and_applies_new_settings() {
    let metrics = metrics();
    let old = Backends::build(&configured("'192.0.2.1:143', '192.0.2.2:143'"), &metrics, None).unwrap();
    let servers = old.list()[0].servers();
    let permit = take(&servers[0]).unwrap();
    servers[0].record_failure(FailureKind::Refused, "connection refused");
    servers[1].set_admin_state(Some(AdminState::Drain));
    let changed = "{address: '192.0.2.1:143', max_sessions: 1, state: drain}, '192.0.2.2:143'";
    let new = Backends::build(&configured(changed), &metrics, Some(&old)).unwrap();
    let servers = new.list()[0].servers();
    assert_eq!(servers[0].sessions(), 1);
    assert!(!servers[0].is_available(), "the failure is not forgotten");
    assert_eq!((servers[0].max_sessions(), servers[0].admin_state()), (Some(1), AdminState::Drain));
    assert!(take(&servers[0]).is_none(), "the permit from before the reload counts against max_sessions");
    assert_eq!(servers[1].admin_state(), AdminState::Drain, "an override takes precedence over the configured state");
    servers[1].set_admin_state(None);
    assert_eq!(servers[1].admin_state(), AdminState::Up);
    drop(permit.established());
    assert_eq!(servers[0].sessions(), 0);
}

#[test]
fn server_gauges_follow_health_state_and_sessions() {
    let metrics = metrics();
    let backends = Backends::build(&configured("'192.0.2.1:143'"), &metrics, None).unwrap();
    let server = &backends.list()[0].servers()[0];
    let expect = |expected: [(&str, &str); 4]| {
        let text = metrics.render();
        for (name, value) in expected {
            let sample = format!("vestibule_server_{name}{{backend=\"b\",server=\"192.0.2.1:143\"}} {value}");
            assert!(text.lines().any(|line| line == sample), "{sample}\n{text}");
        }
    };
    server.update_gauges();
    expect([("up", "1"), ("breaker", "0"), ("state", "0"), ("sessions", "0")]);
    let permit = take(server).unwrap();
    expect([("up", "1"), ("breaker", "0"), ("state", "0"), ("sessions", "0")]);
    let session = permit.established();
    expect([("up", "1"), ("breaker", "0"), ("state", "0"), ("sessions", "1")]);
    server.record_failure(FailureKind::Refused, "connection refused");
    expect([("up", "0"), ("breaker", "2"), ("state", "0"), ("sessions", "1")]);
    server.record_answer();
    server.set_admin_state(Some(AdminState::Down));
    expect([("up", "0"), ("breaker", "0"), ("state", "2"), ("sessions", "1")]);
    server.set_admin_state(Some(AdminState::Drain));
    expect([("up", "1"), ("breaker", "0"), ("state", "1"), ("sessions", "1")]);
    drop(session);
    expect([("up", "1"), ("breaker", "0"), ("state", "1"), ("sessions", "0")]);
}

#[test]
fn forgotten_server_has_no_metrics() {
    let metrics = metrics();
    let backends = Backends::build(&configured("'192.0.2.1:143'"), &metrics, None).unwrap();
    let server = &backends.list()[0].servers()[0];
    let checks = metrics.backend(0).checks(&server.name, "imap");
    checks.checked(true, Duration::from_millis(1));
    checks.certificate(4_000_000_000);
    assert!(metrics.render().contains("server=\"192.0.2.1:143\""));
    metrics.backend(0).forget_server(&server.name);
    assert!(!metrics.render().contains("server=\"192.0.2.1:143\""), "{}", metrics.render());
}
