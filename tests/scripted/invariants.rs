//! Test of invariants under random operations: clients log in and out while servers die and return, are drained, sessions are kicked,
//! users moved and configurations reloaded.
//!
//! - A user is never served by two servers of a `user-hash` backend at once. The servers check it: for each line of a session, no
//!   other server may have a session of that user that has received a line and that the proxy has not closed. (An accepted login may
//!   wait for sessions on other servers to end, but no line is relayed before that.)
//! - No byte reaches another session: every line contains user, session and number in both directions, and both ends check each.
//! - No login succeeds on a backend that was not the user's at some moment of the login. When a move has returned, the user has no
//!   session on the old backend.
//! - At the end there are no sessions, permits, queued logins or holds left.
//!
//! `VESTIBULE_INVARIANTS_SECONDS` sets the duration, ten seconds by default. `VESTIBULE_INVARIANTS_SEED` repeats the decisions of a
//! run, but not its timing. The seed is printed.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;
use vestibule::admin_state::AdminState;
use vestibule::server::{Running, StateChange};

use crate::support::*;

const BACKENDS: [&str; 2] = ["a", "b"];
const SERVERS: usize = 3;
const USERS: usize = 10;
/// More than users, so that most users have several sessions.
const CLIENTS: usize = 30;
/// Few permits, so that logins are queued while users are moved and servers drained.
const QUEUE: &str = "max_sessions: 5, queue: {length: 30, timeout: 3s}";

/// A pseudo-random generator (xorshift64*).
struct Dice(u64);

impl Dice {
    fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) as usize % end
    }

    fn another(&mut self) -> Self {
        Self((self.below(usize::MAX >> 33) as u64) << 20 | 1)
    }
}

/// A session as its server sees it.
struct ServedSession {
    serial: usize,
    backend: usize,
    server: usize,
    socket: Arc<TcpStream>,
    /// Whether a line of the client has been received.
    is_served: bool,
}

impl ServedSession {
    /// Whether the proxy has not closed the connection.
    fn is_open(&self) -> bool {
        is_open(&self.socket)
    }
}

fn is_open(socket: &TcpStream) -> bool {
    let mut asked = [PollFd::from_borrowed_fd(socket.as_fd(), PollFlags::RDHUP)];
    poll(&mut asked, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).unwrap();
    asked[0].revents().is_empty()
}

/// The state that servers and operator know.
#[derive(Default)]
struct State {
    /// Open sessions of each user.
    open: HashMap<String, Vec<ServedSession>>,
    /// The backends that each user belonged to, in order; both during a move.
    homes: HashMap<String, Vec<Vec<usize>>>,
    violations: Vec<String>,
}

#[derive(Clone, Default)]
struct World(Arc<Mutex<State>>, Arc<Counts>);

#[derive(Default)]
struct Counts {
    serial: AtomicUsize,
    sessions: AtomicUsize,
    lines: AtomicUsize,
    refused: AtomicUsize,
    cut_off: AtomicUsize,
}

impl World {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    fn violation(&self, text: String) {
        self.state().violations.push(text);
    }

    /// A server is about to accept a login. Returns `None` if the proxy has closed the connection.
    fn accept(&self, user: &str, backend: usize, server: usize, socket: &Arc<TcpStream>) -> Option<usize> {
        let mut state = self.state();
        if !is_open(socket) {
            return None;
        }
        let serial = self.1.serial.fetch_add(1, Ordering::SeqCst);
        let session = state.open.entry(user.to_owned()).or_default();
        session.push(ServedSession { serial, backend, server, socket: socket.clone(), is_served: false });
        if !state.homes[user].last().unwrap().contains(&backend) {
            state.violations.push(format!("{user} on backend {backend}, which is not the user's"));
        }
        Some(serial)
    }

    /// A line was received in a session.
    fn served(&self, user: &str, serial: usize) {
        let mut state = self.state();
        let Some(session) = state.open.get_mut(user) else { return };
        let Some(own) = session.iter_mut().find(|session| session.serial == serial) else { return };
        own.is_served = true;
        let (backend, server, own_open) = (own.backend, own.server, own.is_open());
        let is_elsewhere = |session: &&ServedSession| session.backend == backend && session.server != server;
        let other = session.iter().find(|session| is_elsewhere(session) && session.is_served && session.is_open());
        // A line that was received after the proxy had closed the connection does not count.
        if let Some(other) = other.filter(|_| own_open) {
            let violation = format!("{user} served by server {server} of {backend} and by {}", other.server);
            state.violations.push(violation);
        }
    }

    fn ended(&self, user: &str, serial: usize) {
        if let Some(session) = self.state().open.get_mut(user) {
            session.retain(|session| session.serial != serial);
        }
    }
}

/// A mailbox server that can be killed with all its sessions, and return at the same address.
struct Mailboxes {
    world: World,
    backend: usize,
    server: usize,
    address: SocketAddr,
    alive: Option<(CancellationToken, tokio::task::JoinHandle<()>)>,
}

impl Mailboxes {
    async fn new(world: &World, backend: usize, server: usize) -> Self {
        // An address of its own, so that no outgoing connection takes its port while it is dead.
        let address = SocketAddr::new([127, 0, 1, (1 + backend * SERVERS + server) as u8].into(), 0);
        let listener = TcpListener::bind(address).await.unwrap();
        let address = listener.local_addr().unwrap();
        let mut mailboxes = Self { world: world.clone(), backend, server, address, alive: None };
        mailboxes.serve(listener);
        mailboxes
    }

    fn serve(&mut self, listener: TcpListener) {
        let (world, backend, server, dead) = (self.world.clone(), self.backend, self.server, CancellationToken::new());
        let token = dead.clone();
        let serving = tokio::spawn(async move {
            let sessions = tokio_util::task::TaskTracker::new();
            while let Some(Ok((socket, _))) = dead.run_until_cancelled(listener.accept()).await {
                let (world, dead) = (world.clone(), dead.clone());
                sessions.spawn(async move {
                    dead.run_until_cancelled_owned(serve(world, backend, server, socket)).await;
                });
            }
            drop(listener);
            sessions.close();
            sessions.wait().await;
        });
        self.alive = Some((token, serving));
    }

    async fn flap(&mut self) {
        match self.alive.take() {
            Some((dead, serving)) => {
                dead.cancel();
                serving.await.unwrap();
            }
            None => {
                let listener = TcpListener::bind(self.address).await.unwrap();
                self.serve(listener);
            }
        }
    }
}

/// The end of a line; some are long enough to fill buffers.
fn padding(number: usize) -> String {
    "x".repeat(if number % 7 == 3 { 1000 + number * 997 % 40_000 } else { 1 + number % 50 })
}

/// Removes a session from the state when its task ends.
struct EndGuard<'a>(&'a World, &'a str, usize);

impl Drop for EndGuard<'_> {
    fn drop(&mut self) {
        self.0.ended(self.1, self.2);
    }
}

/// A session on its server, until the connection ends. Violations are recorded.
async fn serve(world: World, backend: usize, server: usize, socket: TcpStream) {
    let socket = Arc::new(socket);
    let mut stream = BufReader::new(Shared(socket.clone()));
    let mut line = String::new();
    if stream.get_mut().send("* OK [CAPABILITY IMAP4rev1] x\r\n").await.is_err()
        || read(&mut stream, &mut line).await.is_none()
    {
        return;
    }
    let Some(user) = line.split('"').nth(1).map(str::to_owned) else {
        world.violation(format!("a login as {line:?}"));
        return;
    };
    let Some(serial) = world.accept(&user, backend, server, &socket) else { return };
    let _guard = EndGuard(&world, &user, serial);
    if stream.get_mut().send("L OK [CAPABILITY IMAP4rev1] in\r\n").await.is_err() {
        return;
    }
    let mut session = None;
    for expected in 0_usize.. {
        if read(&mut stream, &mut line).await.is_none() {
            return;
        }
        world.served(&user, serial);
        if line == "z LOGOUT" {
            let _ = stream.get_mut().send("* BYE x\r\nz OK x\r\n").await;
            return;
        }
        let mut words = line.split(' ');
        let (line_user, line_session, number) = (words.next().unwrap_or(""), words.next().unwrap_or(""), words.next());
        let session = session.get_or_insert_with(|| line_session.to_owned());
        let is_right = line_user == user && line_session == session && number == Some(&expected.to_string());
        if !is_right || words.next() != Some(padding(expected).as_str()) || words.next().is_some() {
            let begin: String = line.chars().take(80).collect();
            world.violation(format!("a session of {user} ({session}) received {begin:?}, expected number {expected}"));
            return;
        }
        let answer = format!("{user} {session} {expected} {backend} {serial} {}\r\n", padding(expected + 1));
        if stream.get_mut().send(&answer).await.is_err() {
            return;
        }
    }
}

/// A socket whose state can be read while a task reads its data.
struct Shared(Arc<TcpStream>);

impl Shared {
    async fn send(&mut self, text: &str) -> std::io::Result<()> {
        let mut rest = text.as_bytes();
        while !rest.is_empty() {
            self.0.writable().await?;
            match self.0.try_write(rest) {
                Ok(written) => rest = &rest[written..],
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

impl tokio::io::AsyncRead for Shared {
    fn poll_read(
        self: std::pin::Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
        to: &mut tokio::io::ReadBuf<'_>,
    ) -> std::task::Poll<std::io::Result<()>> {
        loop {
            std::task::ready!(self.0.poll_read_ready(context))?;
            match self.0.try_read(to.initialize_unfilled()) {
                Ok(read) => {
                    to.advance(read);
                    return std::task::Poll::Ready(Ok(()));
                }
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(error) => return std::task::Poll::Ready(Err(error)),
            }
        }
    }
}

/// A line without its end; `None` at the end of the stream.
async fn read<S: tokio::io::AsyncRead + Unpin>(stream: &mut BufReader<S>, line: &mut String) -> Option<()> {
    line.clear();
    let read = stream.read_line(line).await.ok()?;
    if read == 0 || !line.ends_with('\n') {
        return None;
    }
    line.truncate(line.trim_end().len());
    Some(())
}

/// A client that repeatedly logs in, sends lines, is silent, and disconnects.
async fn client(world: World, proxy: SocketAddr, mut dice: Dice, over: CancellationToken) {
    let counts = world.1.clone();
    while !over.is_cancelled() {
        let user = format!("user{}", dice.below(USERS));
        let session = counts.sessions.fetch_add(1, Ordering::SeqCst);
        let began = world.state().homes[&user].len() - 1;
        let socket = with_timeout("a connection", TcpStream::connect(proxy)).await.unwrap();
        let mut stream = BufReader::new(socket);
        let mut line = String::new();
        with_timeout("a greeting", read(&mut stream, &mut line)).await.expect("a greeting");
        stream.get_mut().write_all(format!("a LOGIN {user} secret\r\n").as_bytes()).await.unwrap();
        match with_timeout("an answer", read(&mut stream, &mut line)).await {
            Some(()) if line.starts_with("a OK") => {}
            Some(()) if line.starts_with("a NO [UNAVAILABLE]") || line.starts_with("* BYE [UNAVAILABLE]") => {
                counts.refused.fetch_add(1, Ordering::SeqCst);
                over.run_until_cancelled(tokio::time::sleep(Duration::from_millis(dice.below(50) as u64))).await;
                continue;
            }
            // The session was ended before the login was answered.
            None => continue,
            Some(()) => {
                world.violation(format!("a login of {user} was answered {line:?}"));
                return;
            }
        }
        let allowed: Vec<usize> = world.state().homes[&user][began..].concat();
        let lines = dice.below(60);
        for number in 0..lines {
            let line_sent = format!("{user} {session} {number} {}\r\n", padding(number));
            let answered = async {
                stream.get_mut().write_all(line_sent.as_bytes()).await.ok()?;
                read(&mut stream, &mut line).await
            };
            if with_timeout("a line", answered).await.is_none() {
                counts.cut_off.fetch_add(1, Ordering::SeqCst);
                break;
            }
            if line.starts_with("* BYE") {
                counts.cut_off.fetch_add(1, Ordering::SeqCst);
                break;
            }
            let words: Vec<&str> = line.split(' ').collect();
            let expected = [user.as_str(), &session.to_string(), &number.to_string()];
            let backend = words.get(3).and_then(|backend| backend.parse().ok());
            if words[..3.min(words.len())] != expected || words.get(5) != Some(&padding(number + 1).as_str()) {
                let begin: String = line.chars().take(80).collect();
                world.violation(format!("session {session} of {user} received {begin:?}, expected number {number}"));
                return;
            }
            if !backend.is_some_and(|backend| allowed.contains(&backend)) {
                world.violation(format!("{user} was accepted on backend {backend:?}, allowed were {allowed:?}"));
                return;
            }
            counts.lines.fetch_add(1, Ordering::SeqCst);
            // A pause, sometimes long enough for the session to be parked.
            let pause = if dice.below(100) == 0 { 2500 } else { dice.below(20) as u64 };
            over.run_until_cancelled(tokio::time::sleep(Duration::from_millis(pause))).await;
        }
        if dice.below(2) == 0 && stream.get_mut().write_all(b"z LOGOUT\r\n").await.is_ok() {
            let mut rest = Vec::new();
            let _ = with_timeout("the end after LOGOUT", stream.read_to_end(&mut rest)).await;
        }
    }
}

/// The operator, who changes the configuration and the state of servers and users.
struct Operator {
    world: World,
    folder: tempfile::TempDir,
    proxy: Running,
    servers: Vec<Mailboxes>,
    /// The backend of each user.
    homes: [usize; USERS],
    reloads: usize,
}

impl Operator {
    async fn new(world: &World) -> Self {
        let mut servers = Vec::new();
        for backend in 0..BACKENDS.len() {
            for server in 0..SERVERS {
                servers.push(Mailboxes::new(world, backend, server).await);
            }
        }
        let homes: [usize; USERS] = std::array::from_fn(|user| user % BACKENDS.len());
        for (user, home) in homes.iter().enumerate() {
            world.state().homes.insert(format!("user{user}"), vec![vec![*home]]);
        }
        let folder = tempfile::tempdir().unwrap();
        write_files(&folder, &servers, &homes, 0);
        let config = vestibule::config::load(&folder.path().join("vestibule.yaml")).unwrap();
        let proxy = vestibule::server::start(config, Vec::new()).await.unwrap();
        Self { world: world.clone(), folder, proxy, servers, homes, reloads: 0 }
    }

    async fn reload(&mut self) {
        self.reloads += 1;
        write_files(&self.folder, &self.servers, &self.homes, self.reloads);
        let file = self.folder.path().join("vestibule.yaml");
        with_timeout("a reload", self.proxy.reload(&file)).await.unwrap_or_else(|error| panic!("{error:#}"));
    }

    /// Moves a user as docs/operations.md describes: first the table, then the command.
    async fn relocate(&mut self, user: usize) {
        let (old, new) = (self.homes[user], 1 - self.homes[user]);
        let name = format!("user{user}");
        self.world.state().homes.get_mut(&name).unwrap().push(vec![old, new]);
        self.homes[user] = new;
        self.reload().await;
        let moved = with_timeout("a move", operations(&self.proxy).move_user(&name, BACKENDS[new], TIMEOUT / 2)).await;
        assert_eq!(moved.unwrap_or_else(|error| panic!("{error:#}")).backend, BACKENDS[new]);
        let mut state = self.world.state();
        state.homes.get_mut(&name).unwrap().push(vec![new]);
        let is_left = state
            .open
            .get(&name)
            .is_some_and(|session| session.iter().any(|session| session.backend == old && session.is_open()));
        if is_left {
            state.violations.push(format!("{name} is still on backend {old} after the move"));
        }
    }

    async fn disturb(&mut self, dice: &mut Dice) -> &'static str {
        let server = dice.below(self.servers.len());
        let name = self.servers[server].address.to_string();
        match dice.below(10) {
            0..3 => {
                // At most one server of a backend is dead, because otherwise most logins would fail.
                let backend = self.servers[server].backend;
                let dead = self.servers.iter().position(|other| other.backend == backend && other.alive.is_none());
                self.servers[dead.unwrap_or(server)].flap().await;
                "flaps"
            }
            3 => {
                self.reset_states().await;
                self.set_state(&name, AdminState::Drain, Some(dice.below(3) as f64 / 10.0)).await;
                "drains"
            }
            4..6 => {
                self.set_state(
                    &name,
                    [AdminState::Up, AdminState::Up, AdminState::Up, AdminState::Down][dice.below(4)],
                    None,
                )
                .await;
                "states"
            }
            6 => {
                operations(&self.proxy).kick(&format!("user{}", dice.below(USERS))).await.unwrap();
                "kicks"
            }
            7 => {
                self.reload().await;
                "reloads"
            }
            _ => {
                let user = dice.below(USERS);
                self.relocate(user).await;
                "moves"
            }
        }
    }

    /// Sets all servers to up.
    async fn reset_states(&self) {
        for server in &self.servers {
            self.set_state(&server.address.to_string(), AdminState::Up, None).await;
        }
    }

    async fn set_state(&self, server: &str, state: AdminState, over: Option<f64>) {
        let (server, state, by) = (server.to_owned(), Some(state), "test".to_owned());
        self.proxy
            .set_server(StateChange { server, state, over, by, reason: None, is_forwarded: false })
            .await
            .unwrap();
    }

    /// Sets all servers to up and starts those that are dead.
    async fn reset(&mut self) {
        self.reset_states().await;
        for server in self.servers.iter_mut().filter(|server| server.alive.is_none()) {
            server.flap().await;
        }
    }
}

/// Writes a configuration that differs each time, and the table of users.
fn write_files(folder: &tempfile::TempDir, servers: &[Mailboxes], homes: &[usize; USERS], reload: usize) {
    let table: String =
        homes.iter().enumerate().map(|(user, home)| format!("user{user} {}\n", BACKENDS[*home])).collect();
    let path = folder.path().join("users.txt");
    std::fs::write(&path, table).unwrap();
    let mut text = "listeners: [{address: '127.0.0.1:0', tls: none}]\n".to_owned();
    let _ = writeln!(text, "limits: {{workers: 2, idle: {}m, failed_login_delay: off}}\nbackends:", 30 + reload % 2);
    for at in 0..BACKENDS.len() {
        let backend = (at + reload) % BACKENDS.len();
        let mut addresses: Vec<String> = servers
            .iter()
            .filter(|server| server.backend == backend)
            .map(|server| format!("'{}'", server.address))
            .collect();
        addresses.rotate_left(reload % SERVERS);
        let list = addresses.join(", ");
        let _ =
            writeln!(text, "  {}: {{servers: [{list}], balance: user-hash, check: off, {QUEUE}}}", BACKENDS[backend]);
    }
    let _ = writeln!(text, "routes: [{{table: {}}}]", path.display());
    std::fs::write(folder.path().join("vestibule.yaml"), text).unwrap();
}

fn variable(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{name}: {text:?} is not a number")))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn invariants_hold_under_random_operations() {
    let time = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    let seed = variable("VESTIBULE_INVARIANTS_SEED").unwrap_or(u64::from(time.subsec_nanos()) | 1);
    let length = Duration::from_secs(variable("VESTIBULE_INVARIANTS_SECONDS").unwrap_or(10));
    println!("VESTIBULE_INVARIANTS_SEED={seed}");
    let mut dice = Dice(seed | 1);
    let world = World::default();
    let mut operator = Operator::new(&world).await;
    let over = CancellationToken::new();
    let address = operator.proxy.listeners()[0];
    let clients: Vec<_> =
        (0..CLIENTS).map(|_| tokio::spawn(client(world.clone(), address, dice.another(), over.clone()))).collect();
    let end = Instant::now() + length;
    let mut done: HashMap<&str, usize> = HashMap::new();
    let mut moves_with_a_queue = 0;
    while Instant::now() < end && world.state().violations.is_empty() {
        let queued = metric(&operator.proxy, "vestibule_backend_queue_length", &[]) > 0.0;
        let disturbance = operator.disturb(&mut dice).await;
        *done.entry(disturbance).or_default() += 1;
        moves_with_a_queue += usize::from(queued && disturbance == "moves");
        tokio::time::sleep(Duration::from_millis(dice.below(60) as u64)).await;
    }
    over.cancel();
    for client in clients {
        with_timeout("a client", client).await.unwrap();
    }
    assert_eq!(world.state().violations, Vec::<String>::new());
    let counts = &world.1;
    println!(
        "{done:?}, {moves_with_a_queue} moves with a queue: {} sessions, {} accepted, {} refused, {} cut off, {} lines",
        counts.sessions.load(Ordering::SeqCst),
        counts.serial.load(Ordering::SeqCst),
        counts.refused.load(Ordering::SeqCst),
        counts.cut_off.load(Ordering::SeqCst),
        counts.lines.load(Ordering::SeqCst)
    );
    // Operations that did not happen were not tested.
    assert_eq!(done.len(), 6, "{done:?}");
    assert!(moves_with_a_queue > 0);
    assert!(counts.serial.load(Ordering::SeqCst) > 100 && counts.lines.load(Ordering::SeqCst) > 1000);
    assert!(counts.cut_off.load(Ordering::SeqCst) > 0);
    // Nothing is left, and all users can log in.
    operator.reset().await;
    for gauge in ["vestibule_connections", "vestibule_backend_sessions", "vestibule_server_sessions"] {
        eventually(gauge, || metric(&operator.proxy, gauge, &[]) == 0.0).await;
    }
    assert_eq!(operator.proxy.sessions().count(|_| true), 0);
    eventually("the servers' ends", || world.state().open.values().all(Vec::is_empty)).await;
    for user in 0..USERS {
        let mut client = Client::connect(address).await;
        assert!(client.command(&format!("a LOGIN user{user} secret")).await.starts_with("a OK"), "user{user}");
    }
    operator.proxy.stop().await;
}
