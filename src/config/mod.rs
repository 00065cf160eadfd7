//! Stub, replaced by the config room.
#![allow(missing_docs)]
use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    time::Duration,
};
#[derive(Debug, Clone)]
pub struct Config {
    pub file: PathBuf,
    pub listeners: Vec<Listener>,
    pub certificates: Vec<Certificate>,
    pub backends: Vec<Backend>,
    pub routes: Vec<Route>,
    pub limits: Limits,
    pub admin: Option<SocketAddr>,
    pub log: Log,
    pub resolver: Resolver,
}
#[derive(Debug, Clone)]
pub struct Listener {
    pub address: SocketAddr,
    pub tls: ListenerTls,
    pub place: Place,
}
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ListenerTls {
    Implicit,
    StartTls,
    None,
}
#[derive(Debug, Clone)]
pub struct Certificate {
    pub cert: Located<PathBuf>,
    pub key: Located<PathBuf>,
}
#[derive(Debug, Clone)]
pub struct Backend {
    pub name: String,
    pub servers: Vec<Server>,
    pub tls: ServerTls,
    pub client_info: ClientInfo,
    pub authzid: bool,
    pub place: Place,
}
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClientInfo {
    Id,
    ProxyV1,
    ProxyV2,
    None,
}
#[derive(Debug, Clone)]
pub enum Server {
    Address { name: String, host: Host, port: u16, weight: u32, place: Place },
    Srv { name: String, place: Place },
}
#[derive(Debug, Clone)]
pub enum Host {
    Ip(IpAddr),
    Name(String),
}
#[derive(Debug, Clone)]
pub struct ServerTls {
    pub mode: TlsMode,
    pub trust: Trust,
    pub server_name: Option<String>,
}
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TlsMode {
    None,
    StartTls,
    Implicit,
}
#[derive(Debug, Clone)]
pub enum Trust {
    System,
    Ca(Located<PathBuf>),
    Pin(Vec<[u8; 32]>),
    Insecure,
}
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BackendId(pub usize);
#[derive(Debug, Clone)]
pub enum Route {
    Table(Located<PathBuf>),
    Domain(BTreeMap<String, BackendId>),
    Hash(Vec<BackendId>),
    Default(BackendId),
}
#[derive(Debug, Clone)]
pub struct Limits {
    pub handshake: Duration,
    pub login: Duration,
    pub lookup: Duration,
    pub connect: Duration,
    pub server_login: Duration,
    pub line: usize,
    pub literal: usize,
    pub bad_commands: u32,
    pub failed_logins: u32,
    pub idle: Option<Duration>,
    pub half_close: Duration,
    pub drain: Duration,
    pub keepalive: Option<Duration>,
    pub sessions: usize,
    pub untagged_lines: usize,
    pub untagged_bytes: usize,
}
#[derive(Debug, Clone)]
pub struct Log {
    pub format: LogFormat,
    pub level: Level,
}
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    Text,
    Json,
}
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Level {
    Error,
    Warn,
    Info,
    Debug,
    Trace,
}
#[derive(Debug, Clone)]
pub struct Resolver {
    pub servers: Vec<SocketAddr>,
    pub timeout: Duration,
}
#[derive(Debug, Clone)]
pub struct Place {
    pub line: usize,
    pub column: usize,
    pub key: String,
}
#[derive(Debug, Clone)]
pub struct Located<T> {
    pub value: T,
    pub place: Place,
}
#[derive(Debug, Clone)]
pub struct Problem {
    pub file: PathBuf,
    pub line: usize,
    pub column: usize,
    pub key: String,
    pub message: String,
    pub help: Option<String>,
}
#[derive(Debug, Clone)]
pub struct Report(pub Vec<Problem>);
impl Report { pub fn new(problems: Vec<Problem>) -> Self { Self(problems) } }
impl std::fmt::Display for Report {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for p in &self.0 {
            writeln!(f, "{}:{}:{}: {}: {}", p.file.display(), p.line, p.column, p.key, p.message)?;
        }
        Ok(())
    }
}
impl std::error::Error for Report {}
impl Config {
    pub fn problem(&self, place: &Place, message: impl Into<String>) -> Problem {
        Problem {
            file: self.file.clone(),
            line: place.line,
            column: place.column,
            key: place.key.clone(),
            message: message.into(),
            help: None,
        }
    }
}
pub fn load(_path: &Path) -> Result<Config, Report> {
    Err(Report(vec![]))
}
pub fn parse(_file: &Path, _text: &str) -> Result<Config, Report> {
    Err(Report(vec![]))
}
