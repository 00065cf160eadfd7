//! The tables: medians, and ratios to the peers that the targets name.

use std::fmt::Write as _;
use std::path::Path;
use std::process::Command;

use crate::peers::Peer;

/// Memory per session for one number of idle sessions.
pub(crate) struct Idle {
    pub(crate) count: usize,
    pub(crate) server_tls: bool,
    pub(crate) bytes: f64,
}

/// The figures of a peer: in seconds, one value per sample.
#[derive(Default)]
pub(crate) struct Figures {
    pub(crate) login: Vec<f64>,
    pub(crate) resumed: Vec<f64>,
    pub(crate) down: Vec<f64>,
    pub(crate) up: Vec<f64>,
    pub(crate) plain_down: Vec<f64>,
    pub(crate) noop: Vec<f64>,
    pub(crate) noop_p50: Vec<f64>,
    pub(crate) noop_p99: Vec<f64>,
    pub(crate) beside_p99: Vec<f64>,
    pub(crate) beside_ahead_p99: Vec<f64>,
    pub(crate) idle: Vec<Idle>,
    pub(crate) given_back: Vec<f64>,
    /// CPU of the clients, as a multiple of the proxy's.
    pub(crate) load_share: Vec<f64>,
    failure: Option<String>,
}

/// A row of the first table: name, factor of the unit, number of decimals, values.
type Row = (&'static str, f64, usize, fn(&Figures) -> &[f64]);

const ROWS: [Row; 12] = [
    ("full login, µs CPU", 1e6, 0, |of| &of.login),
    ("resumed login, µs CPU", 1e6, 0, |of| &of.resumed),
    ("GB down, s CPU", 1.0, 2, |of| &of.down),
    ("GB up, s CPU", 1.0, 2, |of| &of.up),
    ("GB down, no TLS, s CPU", 1.0, 2, |of| &of.plain_down),
    ("NOOP, µs CPU", 1e6, 1, |of| &of.noop),
    ("NOOP p50, µs", 1e6, 0, |of| &of.noop_p50),
    ("NOOP p99, µs", 1e6, 0, |of| &of.noop_p99),
    ("NOOP p99 beside two downloads, µs", 1e6, 0, |of| &of.beside_p99),
    ("the same, the proxy ahead of its clients, µs", 1e6, 0, |of| &of.beside_ahead_p99),
    ("given back after the peak, %", 100.0, 0, |of| &of.given_back),
    ("CPU of the clients / of the proxy", 1.0, 1, |of| &of.load_share),
];

/// A target: name, peer to compare with, maximum ratio, values.
type Target = (&'static str, Peer, f64, fn(&Figures) -> &[f64]);

const TARGETS: [Target; 7] = [
    ("full login", Peer::Nginx, 0.4, |of| &of.login),
    ("GB down", Peer::Haproxy, 0.5, |of| &of.down),
    ("GB up", Peer::Haproxy, 0.5, |of| &of.up),
    ("NOOP", Peer::Nginx, 0.9, |of| &of.noop),
    ("NOOP p99", Peer::Nginx, 1.0, |of| &of.noop_p99),
    ("NOOP p99 beside two downloads", Peer::Nginx, 1.0, |of| &of.beside_p99),
    ("the same, the proxy ahead of its clients", Peer::Nginx, 1.0, |of| &of.beside_ahead_p99),
];

/// The figures and versions of all peers.
pub(crate) struct Report {
    peers: Vec<(Peer, Figures)>,
    versions: Vec<String>,
}

impl Report {
    pub(crate) fn new(peers: &[Peer], vestibule: &Path) -> Self {
        Self {
            peers: peers.iter().map(|peer| (*peer, Figures::default())).collect(),
            versions: peers.iter().map(|peer| peer.version(vestibule)).collect(),
        }
    }

    pub(crate) fn figures(&mut self, peer: Peer) -> &mut Figures {
        let found = self.peers.iter_mut().find(|(each, _)| *each == peer);
        &mut found.expect("every peer that is measured is in the report").1
    }

    pub(crate) fn fail_on(&mut self, peer: Peer, result: anyhow::Result<()>) {
        if let Err(error) = result {
            eprintln!("{} FAILED: {error:#}", peer.name());
            self.figures(peer).failure = Some(format!("{error:#}"));
        }
    }

    pub(crate) fn failed(&self) -> bool {
        self.peers.iter().any(|(_, figures)| figures.failure.is_some())
    }

    pub(crate) fn render(&self, vestibule: &Path) -> String {
        let mut text = String::from("# Side by side\n\nWritten by `benches/run --record`.\n\n");
        self.machine(&mut text, vestibule);
        self.absolute(&mut text);
        self.memory(&mut text);
        self.targets(&mut text);
        text.push_str(include_str!("how_to_read.md"));
        text
    }

    fn machine(&self, text: &mut String, vestibule: &Path) {
        let model = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let model = model.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or(": unknown");
        let cores = std::thread::available_parallelism().map_or(0, usize::from);
        let _ = writeln!(
            text,
            "Machine:{}; {cores} cores; Linux {}.",
            &model.trim_start()[1..],
            output_of("uname", &["-r"])
        );
        let _ = writeln!(
            text,
            "Commit {}, {}.",
            output_of("git", &["rev-parse", "--short", "HEAD"]),
            output_of("date", &["-I"])
        );
        let _ = writeln!(text, "Programs: {}.", self.versions.join("; "));
        let size = std::fs::metadata(vestibule).map_or(0, |file| file.len()) >> 20;
        let _ = writeln!(text, "The measured vestibule is {size} MiB on disk, with its line tables.\n");
        for (peer, figures) in &self.peers {
            if let Some(failure) = &figures.failure {
                let _ = writeln!(text, "**{} failed: {failure}**\n", peer.name());
            }
        }
    }

    fn header(&self, text: &mut String, first: &str) {
        let _ = write!(text, "| {first} |");
        for (peer, _) in &self.peers {
            let _ = write!(text, " {} |", peer.name());
        }
        let _ = writeln!(text, "\n|---|{}", "---|".repeat(self.peers.len()));
    }

    fn absolute(&self, text: &mut String) {
        self.header(text, "median of the rounds");
        for (name, factor, digits, values) in ROWS {
            if self.peers.iter().all(|(_, figures)| values(figures).is_empty()) {
                continue;
            }
            let _ = write!(text, "| {name} |");
            for (_, figures) in &self.peers {
                let _ = match median(values(figures)) {
                    Some(value) => write!(text, " {:.digits$} |", value * factor),
                    None => write!(text, " – |"),
                };
            }
            text.push('\n');
        }
        text.push('\n');
    }

    fn memory(&self, text: &mut String) {
        let mut rows: Vec<(bool, usize)> = Vec::new();
        for idle in self.peers.iter().flat_map(|(_, figures)| &figures.idle) {
            if !rows.contains(&(idle.server_tls, idle.count)) {
                rows.push((idle.server_tls, idle.count));
            }
        }
        rows.sort_unstable();
        if rows.is_empty() {
            return;
        }
        self.header(text, "bytes an idle TLS session");
        for (server_tls, count) in rows {
            let _ = write!(text, "| {count} sessions, {} server leg |", if server_tls { "TLS" } else { "plain" });
            for (_, figures) in &self.peers {
                let found = figures.idle.iter().find(|idle| idle.server_tls == server_tls && idle.count == count);
                let _ = match found {
                    Some(idle) => write!(text, " {:.0} |", idle.bytes),
                    None => write!(text, " – |"),
                };
            }
            text.push('\n');
        }
        text.push('\n');
    }

    fn targets(&self, text: &mut String) {
        let of = |peer: Peer| self.peers.iter().find(|(each, _)| *each == peer).map(|(_, figures)| figures);
        let Some(ours) = of(Peer::Vestibule) else { return };
        text.push_str("| target | of | at most | measured | |\n|---|---|---|---|---|\n");
        for (name, peer, most, values) in TARGETS {
            let Some(theirs) = of(peer).and_then(|figures| median(values(figures))) else { continue };
            let Some(own) = median(values(ours)) else { continue };
            verdict(text, name, peer.name(), most, own / theirs);
        }
        for (server_tls, most) in [(false, 1200.0), (true, 1600.0)] {
            let name = if server_tls { "bytes an idle session, TLS on both legs" } else { "bytes an idle session" };
            let largest = ours.idle.iter().filter(|idle| idle.server_tls == server_tls).map(|idle| idle.bytes);
            if let Some(largest) = largest.reduce(f64::max) {
                verdict(text, name, "–", most, largest);
            }
        }
        if let Some(kept) = median(&ours.given_back).map(|given| 1.0 - given) {
            verdict(text, "share of the peak kept after a minute", "–", 0.1, kept);
        }
        text.push('\n');
    }
}

fn verdict(text: &mut String, name: &str, peer: &str, most: f64, measured: f64) {
    let digits = if measured >= 10.0 { 0 } else { 2 };
    let met = if measured <= most { "met" } else { "**missed**" };
    let _ = writeln!(text, "| {name} | {peer} | {most} | {measured:.digits$} | {met} |");
}

fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_unstable_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => None,
        odd if odd % 2 == 1 => Some(sorted[middle]),
        _ => Some((sorted[middle - 1] + sorted[middle]) / 2.0),
    }
}

fn output_of(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output();
    output.map_or_else(|_| "unknown".to_owned(), |output| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}
