//! The order of events: rounds of CPU measurements over all peers, then memory, peer by peer.

use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use clap::Parser;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::peers::{self, Peer, Running, Standin};
use crate::report::{Figures, Idle, Report};
use crate::ROLE;
use crate::account;
use crate::certificate;
use crate::load;

/// Compares Vestibule with nginx mail, HAProxy and Dovecot's login proxy on this machine.
#[derive(Debug, Parser)]
struct Options {
    /// One short round: to see that everything runs, not to quote.
    #[arg(long)]
    quick: bool,
    /// Only these, of nginx,haproxy,dovecot,vestibule.
    #[arg(long, value_delimiter = ',')]
    peers: Vec<String>,
    /// Only these, of login,noop,bulk,idle.
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Rounds of CPU measurements; the table shows their medians.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Writes the table to benches/RESULTS.md.
    #[arg(long)]
    record: bool,
    /// The program to measure.
    #[arg(long, default_value = env!("CARGO_BIN_EXE_vestibule"))]
    vestibule: PathBuf,
    /// What cargo tells every benchmark.
    #[arg(long, hide = true)]
    bench: bool,
}

impl Options {
    fn wants(&self, what: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|only| only == what)
    }

    fn count(&self, full: usize, quick: usize) -> usize {
        if self.quick { quick } else { full }
    }

    fn peers(&self) -> Vec<Peer> {
        let wanted = |peer: &Peer| self.peers.is_empty() || self.peers.iter().any(|name| name == peer.name());
        Peer::ALL.into_iter().filter(wanted).collect()
    }
}

/// Of each figure in a round: short ones, for what disturbs a machine comes and goes.
const SAMPLES: usize = 3;
/// Niceness of a proxy that gets the CPU before its clients do.
const AHEAD: i32 = -20;

/// Everything the measurements need.
struct Scene {
    options: Options,
    folder: tempfile::TempDir,
    standin: Standin,
    /// Ends with its standard input.
    _standin: Child,
}

pub(crate) fn run() -> anyhow::Result<()> {
    let options = Options::parse();
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum })?;
    let scene = Scene::new(options)?;
    let peers = scene.options.peers();
    ensure!(!peers.is_empty(), "no such peer");
    let mut report = Report::new(&peers, &scene.options.vestibule);
    let rounds = if scene.options.quick { 1 } else { scene.options.rounds };
    for round in 1..=rounds {
        for &peer in &peers {
            eprintln!("round {round} of {rounds}: {}", peer.name());
            let result = scene.cpu(peer, report.figures(peer));
            report.fail_on(peer, result);
        }
    }
    if scene.options.wants("idle") {
        let mut emptied = Vec::new();
        for &peer in &peers {
            for tls in [false, true] {
                if tls && !peer.can_encrypt_to_servers() {
                    continue;
                }
                eprintln!("idle sessions: {}, {} server leg", peer.name(), if tls { "TLS" } else { "plain" });
                let result = scene.idle(peer, tls, report.figures(peer));
                let result = result.map(|after| emptied.extend(after.map(|after| (peer, after))));
                report.fail_on(peer, result);
            }
        }
        for (peer, after) in emptied {
            let given_back = after.join().map_err(|_| anyhow::anyhow!("a thread panicked"))?;
            report.figures(peer).given_back.push(given_back);
        }
    }
    let text = report.render(&scene.options.vestibule);
    println!("{text}");
    if scene.options.record {
        std::fs::write(Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/RESULTS.md"), text)?;
    }
    ensure!(!report.failed(), "a peer failed: see above");
    Ok(())
}

impl Scene {
    fn new(options: Options) -> anyhow::Result<Self> {
        let folder = tempfile::tempdir()?;
        // Dovecot's login processes run as users of their own and must get to their sockets.
        std::fs::set_permissions(folder.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
        certificate::write(folder.path())?;
        let mut child = Command::new(std::env::current_exe()?)
            .env(ROLE, "standin")
            .arg(folder.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let mut line = String::new();
        BufReader::new(child.stdout.take().context("no output")?).read_line(&mut line)?;
        let ports: Vec<u16> = line.split_whitespace().map(str::parse).collect::<Result<_, _>>()?;
        let [plain, tls, directory] = ports[..] else { bail!("the stand-in said {line:?}") };
        Ok(Self { options, folder, standin: Standin { plain, tls, directory }, _standin: child })
    }

    fn start(&self, peer: Peer, server_tls: bool) -> anyhow::Result<Running> {
        peers::start(peer, &self.options.vestibule, self.folder.path(), self.standin, server_tls)
    }

    fn load(&self, address: SocketAddr, tls: bool) -> anyhow::Result<Load> {
        Load::start(address, tls, self.folder.path())
    }

    fn cpu(&self, peer: Peer, figures: &mut Figures) -> anyhow::Result<()> {
        let running = self.start(peer, false)?;
        let mut clients = self.load(running.tls, true)?;
        let mut measure = |command: &str| -> anyhow::Result<(f64, String)> {
            let (before, load_before) = (account::cpu(running.pid()), account::rough_cpu(clients.pid()));
            let answer = clients.ask(command)?;
            let used = (account::cpu(running.pid()) - before).as_secs_f64();
            figures.load_share.push((account::rough_cpu(clients.pid()) - load_before).as_secs_f64() / used);
            Ok((used, answer))
        };
        if self.options.wants("login") {
            let count = self.options.count(400, 200);
            measure("login 100 full")?;
            for _ in 0..SAMPLES {
                figures.login.push(measure(&format!("login {count} full"))?.0 / count as f64);
                let (used, answer) = measure(&format!("login {count} resumed"))?;
                // Workers that do not share their tickets resume by chance: that is no figure.
                if answer == count.to_string() {
                    figures.resumed.push(used / count as f64);
                }
            }
        }
        if self.options.wants("noop") {
            let count = self.options.count(4000, 1000);
            // A tenth of a second each, and dearer by half where the kernel wakes the peers on the other core.
            for _ in 0..3 * SAMPLES {
                let (used, answer) = measure(&format!("noop {count}"))?;
                figures.noop.push(used / count as f64);
                let (p50, p99) = two(&answer)?;
                figures.noop_p50.push(p50 / 1e6);
                figures.noop_p99.push(p99 / 1e6);
            }
            // Each with new connections: which worker has which of them is chance, and decides much.
            for _ in 0..SAMPLES {
                let (_, answer) = measure(&format!("beside {}", self.options.count(2, 1)))?;
                figures.beside_p99.push(two(&answer)?.1 / 1e6);
            }
            // Clients and server are other machines in earnest, and take no CPU from the proxy.
            if account::renice(running.pid(), AHEAD).is_ok() {
                for _ in 0..SAMPLES {
                    let (_, answer) = measure(&format!("beside {}", self.options.count(2, 1)))?;
                    figures.beside_ahead_p99.push(two(&answer)?.1 / 1e6);
                }
                account::renice(running.pid(), 0)?;
            }
        }
        if self.options.wants("bulk") {
            let mib = self.options.count(384, 128);
            let gigabytes = mib as f64 * 1.048_576e-3;
            for _ in 0..SAMPLES {
                figures.down.push(measure(&format!("down {mib}"))?.0 / gigabytes);
                figures.up.push(measure(&format!("up {mib}"))?.0 / gigabytes);
            }
            let mut plain = self.load(running.plain, false)?;
            for _ in 0..SAMPLES {
                let before = account::cpu(running.pid());
                plain.ask(&format!("down {mib}"))?;
                figures.plain_down.push((account::cpu(running.pid()) - before).as_secs_f64() / gigabytes);
            }
        }
        Ok(())
    }

    /// Where the server leg is plain: the share given back is measured a minute after, while others are at work. They
    /// disturb no count of memory.
    fn idle(&self, peer: Peer, server_tls: bool, figures: &mut Figures) -> anyhow::Result<Option<JoinHandle<f64>>> {
        let running = self.start(peer, server_tls)?;
        let mut clients = self.load(running.tls, true)?;
        // What the first sessions allocate once and for all is no cost of a session.
        clients.ask("login 50 full")?;
        thread::sleep(Duration::from_secs(3));
        let base = account::memory(running.pid());
        let steps: &[usize] = if self.options.quick { &[200, 800] } else { &[1000, 4000, 9000] };
        let mut peak = base;
        for &count in steps {
            clients.ask(&format!("open {count}"))?;
            thread::sleep(Duration::from_secs(6));
            peak = account::memory(running.pid());
            let bytes = (peak - base) / count as f64;
            eprintln!("  {count}: {bytes:.0} bytes each");
            figures.idle.push(Idle { count, server_tls, bytes });
        }
        if server_tls {
            return Ok(None);
        }
        clients.ask("close")?;
        let wait = Duration::from_secs(self.options.count(60, 10) as u64);
        Ok(Some(thread::spawn(move || {
            thread::sleep(wait);
            (peak - account::memory(running.pid())) / (peak - base)
        })))
    }
}

fn two(answer: &str) -> anyhow::Result<(f64, f64)> {
    let (first, second) = answer.split_once(' ').context("two figures")?;
    Ok((first.parse()?, second.parse()?))
}

/// The clients' process. It ends when this drops.
struct Load {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Load {
    fn start(address: SocketAddr, tls: bool, folder: &Path) -> anyhow::Result<Self> {
        let mut child = Command::new(std::env::current_exe()?)
            .env(ROLE, "load")
            .args(load::arguments(address, tls, folder))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let (input, output) = (child.stdin.take().context("no input")?, child.stdout.take().context("no output")?);
        Ok(Self { child, input, output: BufReader::new(output) })
    }

    fn pid(&self) -> u32 {
        self.child.id()
    }

    fn ask(&mut self, command: &str) -> anyhow::Result<String> {
        writeln!(self.input, "{command}")?;
        let mut line = String::new();
        self.output.read_line(&mut line)?;
        let answer =
            line.trim_end().strip_prefix("ok").with_context(|| format!("the clients failed at {command:?}"))?;
        Ok(answer.trim().to_owned())
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
