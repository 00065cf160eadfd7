//! Tests of sessions that are parked while they are silent: client and server notice nothing.

use vestibule::server::Running;

use crate::support::*;

async fn wait_for_parked(proxy: &Running, sessions: f64) {
    eventually("parked sessions", || metric(proxy, "vestibule_parked_sessions", &[]) == sessions).await;
}

#[tokio::test]
async fn parked_session_continues_for_either_side() {
    let (proxy, mut client, mut server) = tls_session("").await;
    wait_for_parked(&proxy, 1.0).await;
    server.send("* 5 EXISTS\r\n").await;
    assert_eq!(client.line().await, "* 5 EXISTS");
    wait_for_parked(&proxy, 1.0).await;
    client.send("b DONE\r\n").await;
    assert_eq!(server.line().await, "b DONE");
    wait_for_parked(&proxy, 1.0).await;
    assert_eq!(metric(&proxy, "vestibule_backend_sessions", &[]), 1.0);
    drop(server);
    client.assert_closed().await;
    drop(client);
    wait_for_parked(&proxy, 0.0).await;
    eventually("the end", || metric(&proxy, "vestibule_backend_sessions", &[]) == 0.0).await;
    assert_eq!(metric(&proxy, "vestibule_bytes_total", &["to_server"]), 8.0);
    proxy.stop().await;
}

#[tokio::test]
async fn stop_ends_parked_sessions_with_close_notify() {
    let (proxy, mut client, mut server) = tls_session("limits: {drain: 100ms}\n").await;
    wait_for_parked(&proxy, 1.0).await;
    assert_eq!(with_timeout("the stop", proxy.drain(std::future::pending())).await, 1);
    // rustls reports an end without close_notify as an error, which `line` would treat like an end.
    let mut rest = Vec::new();
    let end = tokio::io::AsyncReadExt::read_to_end(&mut client.stream, &mut rest).await;
    assert_eq!(end.unwrap(), 0, "close_notify");
    server.assert_closed().await;
}
