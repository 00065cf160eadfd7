//! The command `demo`: two small mailbox servers, a certificate, a configuration, and the real proxy.
//!
//! The proxy takes the same path as with the command `run`: the configuration is written to a folder and loaded from there.

pub(crate) mod imap_server;
mod items;
pub(crate) mod mailbox;
mod once;

use std::fmt::Write as _;
use std::fs::{self, OpenOptions};
use std::io::Write as _;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context as _;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair, KeyUsagePurpose};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use self::mailbox::Mailbox;
use crate::cli::DemoOptions;
use crate::config;
use crate::logging;
use crate::process::signals::Signals;
use crate::server;
use crate::server::Running;

/// Backend, user and password of each mailbox server.
const MAILBOXES: [(&str, &str, &str); 2] =
    [("shard-a", "alice@example.org", "wonderland"), ("shard-b", "bob@example.net", "builder")];

/// Runs the demo until SIGINT or SIGTERM, or with `--once` until each user has read a message.
///
/// # Errors
/// The folder cannot be written, or a port cannot be bound.
pub(crate) async fn run(options: DemoOptions) -> anyhow::Result<()> {
    let stop = CancellationToken::new();
    let mut servers = Vec::new();
    for (name, user, password) in MAILBOXES {
        let socket = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.context("a mailbox server")?;
        servers.push(socket.local_addr()?);
        let mailbox = Arc::new(Mailbox::new(name, user, password));
        tokio::spawn(imap_server::serve(socket, mailbox, stop.clone()));
    }
    let folder = Folder::create(options.folder.clone())?;
    folder.write_certificates()?;
    let file = folder.write_configuration(&options, &servers)?;
    let config = config::load(&file)?;
    logging::install(&config.log);
    let mut signals = Signals::new().context("signal handlers could not be installed")?;
    let running = server::start(config, Vec::new()).await?;
    println!("{}", introduction(&folder, &running, &servers));
    if options.once {
        once::read_both(&running, &folder.path("ca.pem")).await?;
    } else {
        signals.stop().await;
    }
    running.stop().await;
    stop.cancel();
    Ok(())
}

/// The folder that contains the demo's files.
struct Folder(PathBuf);

impl Folder {
    fn create(requested: Option<PathBuf>) -> anyhow::Result<Self> {
        let path =
            requested.unwrap_or_else(|| std::env::temp_dir().join(format!("vestibule-demo-{}", std::process::id())));
        let created = fs::DirBuilder::new().recursive(true).mode(0o700).create(&path);
        created.with_context(|| format!("the folder {} cannot be created", path.display()))?;
        Ok(Self(path))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    fn write(&self, name: &str, content: &str) -> anyhow::Result<PathBuf> {
        let path = self.path(name);
        let mut options = OpenOptions::new();
        options.create(true).truncate(true).write(true).mode(0o600);
        let written = options.open(&path).and_then(|mut file| file.write_all(content.as_bytes()));
        written.with_context(|| format!("{} cannot be written", path.display()))?;
        Ok(path)
    }

    /// Creates a certificate authority, and a certificate by it for the loopback names of this machine.
    fn write_certificates(&self) -> anyhow::Result<()> {
        let mut authority = CertificateParams::new(Vec::new())?;
        authority.distinguished_name.push(DnType::CommonName, "Vestibule demo authority");
        authority.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let authority = CertifiedIssuer::self_signed(authority, KeyPair::generate()?)?;
        let names = ["localhost", "127.0.0.1", "::1"].map(str::to_owned);
        let key = KeyPair::generate()?;
        // The name differs from the issuer's, because OpenSSL treats equal names as a self-signed certificate.
        let mut certificate = CertificateParams::new(names.to_vec())?;
        certificate.distinguished_name.push(DnType::CommonName, "localhost");
        let certificate = certificate.signed_by(&key, &authority)?;
        self.write("ca.pem", &authority.pem())?;
        self.write("cert.pem", &certificate.pem())?;
        self.write("key.pem", &key.serialize_pem())?;
        Ok(())
    }

    fn write_configuration(&self, options: &DemoOptions, servers: &[SocketAddr]) -> anyhow::Result<PathBuf> {
        self.write("users.txt", "# user              backend\nalice@example.org   shard-a\n")?;
        let text = format!(
            "# Written by `vestibule demo`. Every key is explained in config/reference.yaml.\n\
             listeners:\n\
             \x20 - {{address: \"127.0.0.1:{tls}\", tls: implicit}}\n\
             \x20 - {{address: \"127.0.0.1:{starttls}\", tls: starttls}}\n\
             tls:\n\
             \x20 certificates:\n\
             \x20   - {{cert: cert.pem, key: key.pem}}\n\
             backends:\n\
             \x20 shard-a: {{servers: [\"{a}\"]}}    # alice's mailbox\n\
             \x20 shard-b: {{servers: [\"{b}\"]}}    # bob's\n\
             routes:\n\
             \x20 - table: users.txt                # alice by name\n\
             \x20 - domain: {{example.net: shard-b}}   # bob by his domain\n\
             admin:\n\
             \x20 address: \"127.0.0.1:{admin}\"\n\
             limits:\n\
             \x20 drain: 1s\n",
            tls = free_port(options.tls_port),
            starttls = free_port(options.starttls_port),
            admin = free_port(options.admin_port),
            a = servers[0],
            b = servers[1],
        );
        self.write("vestibule.yaml", &text)
    }
}

/// Returns the port, or 0 (any port) if it is in use.
fn free_port(requested: u16) -> u16 {
    std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, requested)).map_or(0, |_| requested)
}

fn introduction(folder: &Folder, running: &Running, servers: &[SocketAddr]) -> String {
    let [tls, starttls] = [0, 1].map(|index| running.listeners()[index].port());
    let admin = running.admin().map_or(0, |address| address.port());
    let ca = folder.path("ca.pem");
    let mut text = String::new();
    let mut print = |line: std::fmt::Arguments<'_>| {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{line}");
    };
    print(format_args!("Vestibule is running in front of two mailbox servers:\n"));
    for ((name, user, _), server) in MAILBOXES.iter().zip(servers) {
        print(format_args!("  {user:<18} -> Vestibule -> {name} ({server})"));
    }
    print(format_args!("\nRead a message of each user; the header X-Served-By says which server it came from:\n"));
    for (_, user, password) in MAILBOXES {
        print(format_args!("  {}", curl(&ca, tls, user, password)));
    }
    print(format_args!("\nTalk to it by hand (type: a LOGIN alice@example.org wonderland):\n"));
    print(format_args!(
        "  openssl s_client -quiet -crlf -CAfile {} -starttls imap -connect localhost:{starttls}",
        ca.display()
    ));
    print(format_args!("\nSee the sessions in the metrics:\n"));
    print(format_args!(
        "  curl -s http://127.0.0.1:{admin}/metrics | grep -E '^vestibule_(logins|connections|backend_sessions|bytes)'"
    ));
    print(format_args!("\nShow the configuration, and explain the route of a user:\n"));
    let configuration = folder.path("vestibule.yaml");
    print(format_args!("  cat {}", configuration.display()));
    print(format_args!("  {} route --config {} alice@example.org", program().display(), configuration.display()));
    print(format_args!("\nCtrl-C ends it."));
    text
}

fn curl(ca: &Path, port: u16, user: &str, password: &str) -> String {
    let ca = ca.display();
    format!("curl -s --cacert {ca} --user {user}:{password} 'imaps://localhost:{port}/INBOX;UID=1'")
}

fn program() -> PathBuf {
    std::env::current_exe().unwrap_or_else(|_| "vestibule".into())
}
