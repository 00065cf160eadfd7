//! The clients. Each line on standard input is a command, which they answer with a line of figures.
//!
//! | command | action | answer |
//! |---|---|---|
//! | `login COUNT full\|resumed` | connect, TLS, LOGIN, LOGOUT, close, in two threads | number of resumed TLS sessions |
//! | `noop COUNT` | NOOPs on one connection | p50 and p99 in microseconds |
//! | `beside SECONDS` | NOOPs for a time, while two other connections download | p50 and p99 |
//! | `down MIB`, `up MIB` | a FETCH or an APPEND of half the size on each of two connections | none |
//! | `open COUNT` | log in until this number of sessions is idle | none |
//! | `close` | close the idle sessions | none |
//!
//! The clients check every response of a server; an unexpected one ends the program with an error.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use tokio_rustls::rustls::pki_types::ServerName;
use tokio_rustls::rustls::{ClientConfig, ClientConnection, HandshakeKind, StreamOwned};

use crate::certificate;

const MIB: usize = 1 << 20;
const THREADS: usize = 2;
/// Threads that open idle sessions: the greeting of nginx waits 40 ms for the delayed acknowledgement of the client.
const OPENERS: usize = 8;
/// Timeout of each read and write.
const TIMEOUT: Duration = Duration::from_secs(60);

/// The address and the kind of connection to a proxy.
#[derive(Clone)]
struct Target {
    address: SocketAddr,
    tls: bool,
    folder: PathBuf,
}

pub(crate) fn run() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, address, tls, folder] = &arguments[..] else { bail!("usage: ADDRESS tls|plain FOLDER") };
    let target = Target { address: address.parse()?, tls: tls == "tls", folder: folder.into() };
    let mut idle = Vec::new();
    for line in std::io::stdin().lines() {
        let line = line?;
        let mut words = line.split(' ');
        let command = words.next().unwrap_or_default();
        let count: usize = words.next().map_or(Ok(0), str::parse)?;
        let answer = match command {
            "login" => logins(&target, count, words.next() == Some("resumed"))?,
            "noop" => noops(&mut Connection::open(&target, None)?, |done, _| done < count)?,
            "beside" => noops_during_downloads(&target, Duration::from_secs(count as u64))?,
            "down" => on_each_thread(&target, move |connection| connection.fetch(count / THREADS))?,
            "up" => on_each_thread(&target, move |connection| connection.append(count / THREADS))?,
            "open" => open_idle(&target, &mut idle, count)?,
            "close" => {
                idle.clear();
                String::new()
            }
            other => bail!("unknown command {other:?}"),
        };
        println!("ok {answer}");
    }
    Ok(())
}

fn logins(target: &Target, count: usize, resumed: bool) -> anyhow::Result<String> {
    let counted = Arc::new(AtomicUsize::new(0));
    let threads: Vec<_> = (0..THREADS)
        .map(|_| {
            let (target, counted) = (target.clone(), counted.clone());
            thread::spawn(move || -> anyhow::Result<()> {
                let config = certificate::client(&target.folder, resumed)?;
                // The first connection receives the ticket.
                Connection::open(&target, Some(config.clone()))?.log_out()?;
                for _ in 0..count / THREADS {
                    let mut connection = Connection::open(&target, Some(config.clone()))?;
                    if connection.handshake == Some(HandshakeKind::Resumed) {
                        counted.fetch_add(1, Ordering::Relaxed);
                    }
                    connection.log_out()?;
                }
                Ok(())
            })
        })
        .collect();
    join(threads)?;
    Ok(counted.load(Ordering::Relaxed).to_string())
}

fn join(threads: Vec<thread::JoinHandle<anyhow::Result<()>>>) -> anyhow::Result<String> {
    for thread in threads {
        thread.join().map_err(|_| anyhow::anyhow!("a thread panicked"))??;
    }
    Ok(String::new())
}

fn noops(connection: &mut Connection, continues: impl Fn(usize, Duration) -> bool) -> anyhow::Result<String> {
    let mut times = Vec::new();
    let all = Instant::now();
    while continues(times.len(), all.elapsed()) {
        let began = Instant::now();
        connection.command("n NOOP", "n OK")?;
        times.push(began.elapsed());
    }
    times.sort_unstable();
    let micros = |share: usize| times[times.len() * share / 100].as_secs_f64() * 1e6;
    Ok(format!("{:.1} {:.1}", micros(50), micros(99)))
}

fn noops_during_downloads(target: &Target, time: Duration) -> anyhow::Result<String> {
    let stop = Arc::new(AtomicBool::new(false));
    let threads: Vec<_> = (0..THREADS)
        .map(|_| {
            let (target, stop) = (target.clone(), stop.clone());
            thread::spawn(move || -> anyhow::Result<()> {
                let mut connection = Connection::open(&target, None)?;
                while !stop.load(Ordering::Relaxed) {
                    connection.fetch(16)?;
                }
                Ok(())
            })
        })
        .collect();
    let answer = noops(&mut Connection::open(target, None)?, |done, passed| done < 20 || passed < time);
    stop.store(true, Ordering::Relaxed);
    join(threads)?;
    answer
}

fn on_each_thread(
    target: &Target,
    work: impl Fn(&mut Connection) -> anyhow::Result<()> + Clone + Send + 'static,
) -> anyhow::Result<String> {
    let threads: Vec<_> = (0..THREADS)
        .map(|_| {
            let (target, work) = (target.clone(), work.clone());
            thread::spawn(move || work(&mut Connection::open(&target, None)?))
        })
        .collect();
    join(threads)
}

fn open_idle(target: &Target, idle: &mut Vec<Connection>, count: usize) -> anyhow::Result<String> {
    let config = certificate::client(&target.folder, false)?;
    let missing = count.saturating_sub(idle.len());
    let threads: Vec<_> = (0..OPENERS)
        .map(|opener| {
            let (target, config) = (target.clone(), config.clone());
            let share = missing / OPENERS + usize::from(opener < missing % OPENERS);
            thread::spawn(move || -> anyhow::Result<Vec<Connection>> {
                let mut opened = Vec::new();
                for _ in 0..share {
                    let mut connection = Connection::open(&target, Some(config.clone()))?;
                    connection.command("i IDLE", "+")?;
                    opened.push(connection);
                }
                Ok(opened)
            })
        })
        .collect();
    for thread in threads {
        idle.extend(thread.join().map_err(|_| anyhow::anyhow!("a thread panicked"))??);
    }
    Ok(String::new())
}

trait Stream: Read + Write + Send {}
impl<S: Read + Write + Send> Stream for S {}

/// A connection that has logged in.
struct Connection {
    stream: BufReader<Box<dyn Stream>>,
    handshake: Option<HandshakeKind>,
}

impl Connection {
    fn open(target: &Target, config: Option<Arc<ClientConfig>>) -> anyhow::Result<Self> {
        static USERS: AtomicUsize = AtomicUsize::new(0);
        /// Number of user names to use repeatedly; without the variable all names differ.
        static NAMES: LazyLock<usize> = LazyLock::new(|| {
            std::env::var("VESTIBULE_BENCH_NAMES").ok().and_then(|names| names.parse().ok()).unwrap_or(usize::MAX)
        });
        let socket = TcpStream::connect(target.address).context("connect")?;
        socket.set_nodelay(true)?;
        socket.set_read_timeout(Some(TIMEOUT))?;
        socket.set_write_timeout(Some(TIMEOUT))?;
        let mut handshake = None;
        let stream: Box<dyn Stream> = if target.tls {
            let config = config.map_or_else(|| certificate::client(&target.folder, false), Ok)?;
            let connection = ClientConnection::new(config, ServerName::try_from(certificate::NAME)?)?;
            let mut stream = StreamOwned::new(connection, socket);
            stream.conn.complete_io(&mut stream.sock).context("TLS handshake")?;
            handshake = stream.conn.handshake_kind();
            Box::new(stream)
        } else {
            Box::new(socket)
        };
        let capacity = if target.tls { 512 } else { 256 * 1024 };
        let mut opened = Self { stream: BufReader::with_capacity(capacity, stream), handshake };
        opened.line("* OK")?;
        let user = USERS.fetch_add(1, Ordering::Relaxed) % *NAMES;
        opened.command(&format!("a LOGIN user{user:06}@example.org secret"), "a OK")?;
        Ok(opened)
    }

    fn command(&mut self, command: &str, expected: &str) -> anyhow::Result<()> {
        self.send(format!("{command}\r\n").as_bytes())?;
        loop {
            let line = self.any_line()?;
            if line.starts_with(expected) {
                return Ok(());
            }
            ensure!(line.starts_with("* "), "unexpected response {line:?} to {command:?}");
        }
    }

    fn log_out(&mut self) -> anyhow::Result<()> {
        self.command("z LOGOUT", "z OK")
    }

    fn fetch(&mut self, mib: usize) -> anyhow::Result<()> {
        self.send(format!("f FETCH {mib} BODY[]\r\n").as_bytes())?;
        let line = self.line("* 1 FETCH")?;
        ensure!(line.contains(&format!("{{{}}}", mib * MIB)), "{line:?}");
        let mut left = mib * MIB;
        let mut buffer = vec![0; 256 * 1024];
        while left > 0 {
            let wanted = left.min(buffer.len());
            let read = self.stream.read(&mut buffer[..wanted])?;
            ensure!(read > 0, "the connection ended {left} bytes early");
            ensure!(buffer[0] == b'x' && buffer[read - 1] == b'x', "unexpected bytes in the literal");
            left -= read;
        }
        self.line(")")?;
        self.line("f OK").map(drop)
    }

    fn append(&mut self, mib: usize) -> anyhow::Result<()> {
        self.send(format!("u APPEND INBOX {{{}}}\r\n", mib * MIB).as_bytes())?;
        self.line("+")?;
        let block = vec![b'y'; 256 * 1024];
        for _ in 0..mib * 4 {
            self.send(&block)?;
        }
        self.send(b"\r\n")?;
        self.line("u OK").map(drop)
    }

    fn send(&mut self, bytes: &[u8]) -> anyhow::Result<()> {
        self.stream.get_mut().write_all(bytes)?;
        Ok(self.stream.get_mut().flush()?)
    }

    fn line(&mut self, expected: &str) -> anyhow::Result<String> {
        let line = self.any_line()?;
        ensure!(line.starts_with(expected), "got {line:?}, expected {expected:?}");
        Ok(line)
    }

    fn any_line(&mut self) -> anyhow::Result<String> {
        let mut line = String::new();
        ensure!(self.stream.read_line(&mut line)? > 0, "the connection ended");
        Ok(line)
    }
}

/// The arguments of the client process for a target.
pub(crate) fn arguments(address: SocketAddr, tls: bool, folder: &Path) -> [String; 3] {
    [address.to_string(), if tls { "tls" } else { "plain" }.to_owned(), folder.display().to_string()]
}
