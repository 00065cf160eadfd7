//! Test of every limit at its minimum and maximum, set by reloads while clients log in: nothing panics or hangs, and an open session
//! continues.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use tokio::net::TcpListener;

use crate::support::{Client, LineStream, metric, with_timeout};

/// Each key with valid values, including minimum and maximum, and one that is rejected because it is less than the minimum.
const LIMITS: &[(&str, &[&str], &str)] = &[
    ("proxy_header", &["100ms", "1s", "1m"], "0s"),
    ("handshake", &["1s", "5m"], "0s"),
    ("login", &["1s", "1h"], "0s"),
    ("lookup", &["100ms", "1s", "5m"], "0s"),
    ("connect", &["100ms", "1s", "5m"], "0s"),
    ("server_login", &["100ms", "1s", "10m"], "0s"),
    ("half_close", &["1s", "1h"], "0s"),
    ("stall", &["10s", "1day"], "0s"),
    ("max_disconnect_delay", &["off", "1s", "1h"], "0s"),
    ("drain", &["100ms", "1s", "7days"], "0s"),
    ("idle", &["off", "30m", "30days"], "0s"),
    ("keepalive", &["off", "10s", "1day"], "0s"),
    ("line", &["1KiB", "16MiB"], "1"),
    ("literal", &["256", "16MiB"], "1"),
    ("untagged_bytes", &["1KiB", "16MiB"], "0"),
    ("untagged_lines", &["1", "100000"], "0"),
    ("bad_commands", &["1", "1000"], "0"),
    ("failed_logins", &["1", "1000"], "0"),
    ("sessions", &["1", "10000000"], "0"),
    ("handshakes", &["1", "1000000"], "0"),
    ("before_login", &["1", "10000000"], "0"),
    ("sessions_per_address", &["off", "1", "10000000"], "0"),
    ("sessions_per_user", &["off", "1", "10000000"], "0"),
    ("sessions_per_user_and_address", &["off", "1", "10000000"], "0"),
    (
        "networks",
        &["[]", "[{network: 127.0.0.0/8, sessions: 1}]", "[{network: '::/0', sessions: 10000000}]"],
        "[{network: '::/0', sessions: 0}]",
    ),
    ("connection_rate", &["off", "1/1s", "1/1day", "1000000/1s"], "0/1s"),
    ("login_rate_per_address", &["off", "1/1s", "1/1day", "1000000/1s"], "0/1s"),
    ("login_rate_per_user", &["off", "1/1s", "1/1day", "1000000/1s"], "0/1s"),
    ("tracked", &["1000", "10000000"], "0"),
    ("failed_login_delay", &["off", "100ms", "1s"], "0s"),
    ("failed_login_delay_max", &["1s", "1m"], "0s"),
];

/// A server that accepts every login and answers further commands.
async fn mailbox() -> std::net::SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((socket, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut line = LineStream::new(socket);
                // The proxy may close the connection at any step.
                let _ = line.try_send("* OK [CAPABILITY IMAP4rev1] x\r\n").await;
                line.line().await;
                let _ = line.try_send("L OK [CAPABILITY IMAP4rev1] in\r\n").await;
                while let Some(tag) = line.line().await.split(' ').next().filter(|tag| !tag.is_empty()) {
                    let _ = line.try_send(&format!("{tag} OK relayed\r\n")).await;
                }
            });
        }
    });
    address
}

#[tokio::test]
async fn limits_at_minimum_and_maximum_work_under_load() {
    let server = mailbox().await;
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("vestibule.yaml");
    let write = |limits: &str| {
        let text = format!(
            "listeners: [{{address: '127.0.0.1:0', tls: none}}]\nlimits: {{workers: 2, {limits}}}\n\
             backends: {{only: {{servers: ['{server}'], check: off, balance: round-robin}}}}\nroutes: [{{default: only}}]\n"
        );
        std::fs::write(&file, text).unwrap();
    };
    write("");
    let proxy = vestibule::server::start(vestibule::config::load(&file).unwrap(), Vec::new()).await.unwrap();
    let address = proxy.listeners()[0];
    let mut open = Client::connect(address).await;
    assert!(open.command("a LOGIN alice secret").await.starts_with("a OK"));
    let (stop, attempts) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let clients: Vec<_> =
        (0..4).map(|number| tokio::spawn(log_in_repeatedly(address, number, stop.clone(), attempts.clone()))).collect();
    for (key, values, too_low) in LIMITS {
        for value in *values {
            write(&format!("{key}: {value}"));
            with_timeout("a reload", proxy.reload(&file))
                .await
                .unwrap_or_else(|error| panic!("{key}: {value}: {error:#}"));
            let before = attempts.load(Ordering::SeqCst);
            with_timeout("clients", async {
                while attempts.load(Ordering::SeqCst) < before + 8 {
                    tokio::task::yield_now().await;
                    tokio::time::sleep(std::time::Duration::from_millis(1)).await;
                }
            })
            .await;
            assert_eq!(open.command("b NOOP").await, "b OK relayed", "{key}: {value}");
        }
        write(&format!("{key}: {too_low}"));
        let error = with_timeout("a reload", proxy.reload(&file)).await.unwrap_err().to_string();
        assert!(error.contains(&format!("limits.{key}")) && error.contains("expected"), "{key}: {error}");
        write("");
        with_timeout("a reload", proxy.reload(&file)).await.unwrap();
    }
    stop.store(true, Ordering::SeqCst);
    for client in clients {
        with_timeout("a client", client).await.unwrap();
    }
    assert_eq!(metric(&proxy, "vestibule_panics_total", &[]), 0.0);
    let mut after = Client::connect(address).await;
    assert!(after.command("a LOGIN zoe secret").await.starts_with("a OK"));
    proxy.stop().await;
}

/// Logs in repeatedly and ignores the results. An attempt ends with an answer or with the connection.
async fn log_in_repeatedly(
    address: std::net::SocketAddr,
    number: usize,
    stop: Arc<AtomicBool>,
    attempts: Arc<AtomicUsize>,
) {
    while !stop.load(Ordering::SeqCst) {
        let mut client = Client::connect_only(address).await;
        if client.line().await.starts_with("* OK") {
            let _ = client.try_send(&format!("a LOGIN u{number} secret\r\n")).await;
            if client.line().await.starts_with("a OK") {
                let _ = client.try_send("b NOOP\r\n").await;
                client.line().await;
            }
        }
        attempts.fetch_add(1, Ordering::SeqCst);
    }
}
