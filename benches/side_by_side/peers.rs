//! The proxies: their configurations, which are files in `peers/`, and how to start them.

use std::fs::{self, File};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use rustix::process::{Pid, Signal, kill_process};

/// A proxy to measure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Peer {
    Nginx,
    Haproxy,
    Dovecot,
    Vestibule,
}

impl Peer {
    pub(crate) const ALL: [Self; 4] = [Self::Nginx, Self::Haproxy, Self::Dovecot, Self::Vestibule];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Nginx => "nginx",
            Self::Haproxy => "haproxy",
            Self::Dovecot => "dovecot",
            Self::Vestibule => "vestibule",
        }
    }

    fn template(self) -> (&'static str, &'static str) {
        match self {
            Self::Nginx => ("nginx.conf", include_str!("peers/nginx.conf")),
            Self::Haproxy => ("haproxy.cfg", include_str!("peers/haproxy.cfg")),
            Self::Dovecot => ("dovecot.conf", include_str!("peers/dovecot.conf")),
            Self::Vestibule => ("vestibule.yaml", include_str!("peers/vestibule.yaml")),
        }
    }

    /// The configuration text for servers with or without TLS; `None` if the proxy does not support it.
    fn server_tls(self, tls: bool) -> Option<&'static str> {
        match (self, tls) {
            (Self::Nginx, true) => None,
            (Self::Nginx, false) => Some(""),
            (Self::Haproxy, true) => Some("ssl verify none"),
            (Self::Haproxy, false) => Some(""),
            (Self::Dovecot, true) => Some("ssl=any-cert"),
            (Self::Dovecot, false) => Some(""),
            (Self::Vestibule, true) => Some("{mode: implicit, insecure: true}"),
            (Self::Vestibule, false) => Some("none"),
        }
    }

    pub(crate) fn can_encrypt_to_servers(self) -> bool {
        self.server_tls(true).is_some()
    }

    fn command(self, vestibule: &Path, configuration: &Path) -> Command {
        let mut command = Command::new(match self {
            Self::Nginx => Path::new("/usr/sbin/nginx"),
            Self::Haproxy => Path::new("/usr/sbin/haproxy"),
            Self::Dovecot => Path::new("/usr/sbin/dovecot"),
            Self::Vestibule => vestibule,
        });
        match self {
            Self::Nginx => command.arg("-c").arg(configuration),
            Self::Haproxy => command.arg("-db").arg("-f").arg(configuration),
            Self::Dovecot => command.arg("-F").arg("-c").arg(configuration),
            Self::Vestibule => command.arg("run").arg("--config").arg(configuration),
        };
        command
    }

    pub(crate) fn version(self, vestibule: &Path) -> String {
        let mut command = self.command(vestibule, Path::new("/nonexistent"));
        let program = command.get_program().to_owned();
        command = Command::new(program);
        command.arg(if self == Self::Vestibule || self == Self::Dovecot { "--version" } else { "-v" });
        let output = command.output();
        let text = output.map(|output| [output.stdout, output.stderr].concat()).unwrap_or_default();
        String::from_utf8_lossy(&text).lines().next().unwrap_or("not installed").to_owned()
    }
}

/// Ports of the stand-in server.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Standin {
    pub(crate) plain: u16,
    pub(crate) tls: u16,
    pub(crate) directory: u16,
}

/// A running proxy. It ends when this value is dropped.
pub(crate) struct Running {
    child: Child,
    pub(crate) tls: SocketAddr,
    pub(crate) plain: SocketAddr,
}

impl Running {
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = kill_process(Pid::from_child(&self.child), Signal::TERM);
        let deadline = Instant::now() + Duration::from_secs(10);
        while Instant::now() < deadline {
            if matches!(self.child.try_wait(), Ok(Some(_))) {
                return;
            }
            thread::sleep(Duration::from_millis(20));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Starts a proxy for the stand-in server, and returns when it accepts connections.
pub(crate) fn start(
    peer: Peer,
    vestibule: &Path,
    folder: &Path,
    standin: Standin,
    server_tls: bool,
) -> anyhow::Result<Running> {
    let words = peer.server_tls(server_tls).context("the peer does not support TLS to servers")?;
    let (tls, plain, admin) = (free_port()?, free_port()?, free_port()?);
    let (name, template) = peer.template();
    let server = if server_tls { standin.tls } else { standin.plain };
    // A new folder for each start: the previous process may still be removing its files.
    let own = tempfile::Builder::new()
        .prefix(peer.name())
        .permissions(PermissionsExt::from_mode(0o755))
        .tempdir_in(folder)?;
    let own = own.keep();
    for file in ["cert.pem", "key.pem", "both.pem"] {
        fs::copy(folder.join(file), own.join(file))?;
    }
    let folder = own.as_path();
    let mut text = template.replace("@FOLDER@", &folder.display().to_string()).replace("@SERVER_TLS@", words);
    for (word, port) in
        [("TLS", tls), ("PLAIN", plain), ("ADMIN", admin), ("SERVER", server), ("DIRECTORY", standin.directory)]
    {
        text = text.replace(&format!("@{word}@"), &port.to_string());
    }
    let configuration: PathBuf = folder.join(name);
    fs::write(&configuration, text)?;
    fs::create_dir_all(folder.join("dovecot"))?;
    // The log goes to a file, as in production.
    let log = File::create(folder.join(format!("{}.out", peer.name())))?;
    let mut command = peer.command(vestibule, &configuration);
    command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
    let child = command.spawn().with_context(|| format!("{} does not start", peer.name()))?;
    let at = |port| SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let mut running = Running { child, tls: at(tls), plain: at(plain) };
    let deadline = Instant::now() + Duration::from_secs(20);
    while TcpStream::connect(running.tls).is_err() {
        if let Some(status) = running.child.try_wait()? {
            bail!("{} ended after its start ({status}): see {}", peer.name(), folder.display());
        }
        if Instant::now() > deadline {
            bail!("{} does not listen", peer.name());
        }
        thread::sleep(Duration::from_millis(50));
    }
    Ok(running)
}

fn free_port() -> anyhow::Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}
