//! The measurements: rounds of CPU time with all peers, then memory, one peer after the other.

use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use clap::Parser;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::ROLE;
use crate::account;
use crate::certificate;
use crate::load;
use crate::peers::{self, Peer, Running, Standin};
use crate::report::{Figures, Idle, Report};

/// Compares Vestibule with nginx mail, HAProxy and Dovecot's login proxy on this machine.
#[derive(Debug, Parser)]
struct Options {
    /// Run one short round, to check that everything works; the figures are not meaningful.
    #[arg(long)]
    quick: bool,
    /// Measure only these peers: nginx,haproxy,dovecot,vestibule.
    #[arg(long, value_delimiter = ',')]
    peers: Vec<String>,
    /// Run only these measurements: login,noop,bulk,idle.
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Number of rounds of CPU measurements; the table shows the medians.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Write the tables to benches/RESULTS.md.
    #[arg(long)]
    record: bool,
    /// The Vestibule program to measure.
    #[arg(long, default_value = env!("CARGO_BIN_EXE_vestibule"))]
    vestibule: PathBuf,
    /// Passed by cargo to every benchmark; ignored.
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

/// Samples of each figure in a round. They are short, because disturbances of the machine are temporary.
const SAMPLES: usize = 3;
/// Niceness of a proxy that has priority over its clients.
const PRIORITY_NICENESS: i32 = -20;

/// The stand-in server, certificates and options that all measurements use.
struct Benchmark {
    options: Options,
    folder: tempfile::TempDir,
    standin: Standin,
    /// The process ends when its standard input closes.
    _standin: Child,
}

pub(crate) fn run() -> anyhow::Result<()> {
    let options = Options::parse();
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum })?;
    let benchmark = Benchmark::new(options)?;
    let peers = benchmark.options.peers();
    ensure!(!peers.is_empty(), "--peers names no known peer");
    let mut report = Report::new(&peers, &benchmark.options.vestibule);
    let rounds = if benchmark.options.quick { 1 } else { benchmark.options.rounds };
    for round in 1..=rounds {
        for &peer in &peers {
            eprintln!("round {round} of {rounds}: {}", peer.name());
            let result = benchmark.cpu(peer, report.figures(peer));
            report.fail_on(peer, result);
        }
    }
    if benchmark.options.wants("idle") {
        let mut memory_checks = Vec::new();
        for &peer in &peers {
            for tls in [false, true] {
                if tls && !peer.can_encrypt_to_servers() {
                    continue;
                }
                eprintln!("idle sessions: {}, {} server leg", peer.name(), if tls { "TLS" } else { "plain" });
                let result = benchmark.idle(peer, tls, report.figures(peer));
                let result = result.map(|after| memory_checks.extend(after.map(|after| (peer, after))));
                report.fail_on(peer, result);
            }
        }
        for (peer, after) in memory_checks {
            let given_back = after.join().map_err(|_| anyhow::anyhow!("a thread panicked"))?;
            report.figures(peer).given_back.push(given_back);
        }
    }
    let text = report.render(&benchmark.options.vestibule);
    println!("{text}");
    if benchmark.options.record {
        std::fs::write(Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/RESULTS.md"), text)?;
    }
    ensure!(!report.failed(), "a peer failed: see above");
    Ok(())
}

impl Benchmark {
    fn new(options: Options) -> anyhow::Result<Self> {
        let folder = tempfile::tempdir()?;
        // The login processes of Dovecot run as other users and need access to their sockets.
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
        let [plain, tls, directory] = ports[..] else { bail!("unexpected output of the stand-in server: {line:?}") };
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
            let answer = clients.request(command)?;
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
                // If workers do not share tickets, resumption depends on chance: discard the sample.
                if answer == count.to_string() {
                    figures.resumed.push(used / count as f64);
                }
            }
        }
        if self.options.wants("noop") {
            let count = self.options.count(4000, 1000);
            // A sample takes a tenth of a second, and costs half as much again if the kernel wakes the peer on the other core.
            for _ in 0..3 * SAMPLES {
                let (used, answer) = measure(&format!("noop {count}"))?;
                figures.noop.push(used / count as f64);
                let (p50, p99) = two_figures(&answer)?;
                figures.noop_p50.push(p50 / 1e6);
                figures.noop_p99.push(p99 / 1e6);
            }
            // Each sample has new connections, because their random assignment to workers has a large effect.
            for _ in 0..SAMPLES {
                let (_, answer) = measure(&format!("beside {}", self.options.count(2, 1)))?;
                figures.beside_p99.push(two_figures(&answer)?.1 / 1e6);
            }
            // In production, clients and servers are other machines and use no CPU time of the proxy.
            if account::renice(running.pid(), PRIORITY_NICENESS).is_ok() {
                for _ in 0..SAMPLES {
                    let (_, answer) = measure(&format!("beside {}", self.options.count(2, 1)))?;
                    figures.beside_ahead_p99.push(two_figures(&answer)?.1 / 1e6);
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
                plain.request(&format!("down {mib}"))?;
                figures.plain_down.push((account::cpu(running.pid()) - before).as_secs_f64() / gigabytes);
            }
        }
        Ok(())
    }

    /// Measures the memory of idle sessions. With a plaintext server leg, it also returns a thread that measures the share of
    /// memory released after a minute, at the same time as later measurements, which do not affect it.
    fn idle(&self, peer: Peer, server_tls: bool, figures: &mut Figures) -> anyhow::Result<Option<JoinHandle<f64>>> {
        let running = self.start(peer, server_tls)?;
        let mut clients = self.load(running.tls, true)?;
        // Run logins first, so that one-time allocations are not counted as a cost of sessions.
        clients.request("login 50 full")?;
        thread::sleep(Duration::from_secs(3));
        let base = account::memory(running.pid());
        let steps: &[usize] = if self.options.quick { &[200, 800] } else { &[1000, 4000, 9000] };
        let mut peak = base;
        for &count in steps {
            clients.request(&format!("open {count}"))?;
            thread::sleep(Duration::from_secs(6));
            peak = account::memory(running.pid());
            let bytes = (peak - base) / count as f64;
            eprintln!("  {count} sessions: {bytes:.0} bytes per session");
            figures.idle.push(Idle { count, server_tls, bytes });
        }
        if server_tls {
            return Ok(None);
        }
        clients.request("close")?;
        let wait = Duration::from_secs(self.options.count(60, 10) as u64);
        Ok(Some(thread::spawn(move || {
            thread::sleep(wait);
            (peak - account::memory(running.pid())) / (peak - base)
        })))
    }
}

fn two_figures(answer: &str) -> anyhow::Result<(f64, f64)> {
    let (first, second) = answer.split_once(' ').context("expected two figures")?;
    Ok((first.parse()?, second.parse()?))
}

/// The process of the clients. It ends when this value is dropped.
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

    fn request(&mut self, command: &str) -> anyhow::Result<String> {
        writeln!(self.input, "{command}")?;
        let mut line = String::new();
        self.output.read_line(&mut line)?;
        let answer =
            line.trim_end().strip_prefix("ok").with_context(|| format!("the clients failed to run {command:?}"))?;
        Ok(answer.trim().to_owned())
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
