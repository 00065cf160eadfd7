//! The client of `demo --once`, which does once what a user of the demo would type.

use std::net::Ipv4Addr;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context as _, bail};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::{IpAddr, ServerName};
use tokio_rustls::rustls::{ClientConfig, RootCertStore};

use super::MAILBOXES;
use crate::server::Running;

/// Logs in as each user, reads the first message, and prints which server delivered it; then prints the metrics of the logins.
pub(super) async fn read_both(running: &Running, ca: &Path) -> anyhow::Result<()> {
    for (name, user, password) in MAILBOXES {
        let served_by = served_by(running.listeners()[0].port(), ca, user, password).await?;
        println!("{user}: the first message was served by {served_by}");
        if served_by != name {
            bail!("{user} belongs to {name}");
        }
    }
    for line in running.metrics().render().lines().filter(|line| line.starts_with("vestibule_logins_total")) {
        if !line.ends_with(" 0") {
            println!("{line}");
        }
    }
    Ok(())
}

async fn served_by(port: u16, ca: &Path, user: &str, password: &str) -> anyhow::Result<String> {
    let mut roots = RootCertStore::empty();
    for certificate in rustls_pemfile::certs(&mut &std::fs::read(ca)?[..]) {
        roots.add(certificate?)?;
    }
    let config = ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
    let socket = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await?;
    let name = ServerName::IpAddress(IpAddr::from(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST)));
    let mut stream = BufReader::new(TlsConnector::from(Arc::new(config)).connect(name, socket).await?);
    let commands = format!(
        "a LOGIN {user} {password}\r\nb SELECT INBOX\r\nc FETCH 1 BODY[HEADER.FIELDS (X-Served-By)]\r\nd LOGOUT\r\n"
    );
    stream.write_all(commands.as_bytes()).await?;
    stream.flush().await?;
    let mut served_by = None;
    let mut line = String::new();
    loop {
        line.clear();
        if stream.read_line(&mut line).await? == 0 || line.starts_with("d OK") {
            return served_by.with_context(|| format!("{user} could not read a message"));
        }
        if let Some(name) = line.strip_prefix("X-Served-By: ") {
            served_by = Some(name.trim().to_owned());
        }
    }
}
