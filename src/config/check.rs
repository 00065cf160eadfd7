//! The rules between keys: names that must be declared, bounds, contradictions, and a proxy pointed at itself.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_yaml::Value;

use super::file::{
    AuthzidWord, BackendMap, CertificateMap, ClientInfoWord, File, FormatWord, LevelWord, LimitsMap, ListenerMap,
    RouteMap, Server as ServerWords, ServerMap, TlsMap, TlsWord,
};
use super::locate::child;
use super::read::Reader;
use super::report::suggestion;
use super::values::{Size, Span, TlsEntry};
use super::{
    Backend, BackendId, Certificate, ClientInfo, Config, Host, Level, Limits, Listener, ListenerTls, Located, Log,
    LogFormat, Resolver, Route, Server, ServerTls, TlsMode, Trust, is_local,
};

/// Longer names would be unwieldy labels.
const MAX_NAME: usize = 64;
/// RFC 1035 section 2.3.4.
const MAX_HOST: usize = 253;

/// The whole file. `None`, or problems in `reader`: it is no configuration.
pub(super) fn config(reader: &mut Reader<'_>, file: &Path, value: Value) -> Option<Config> {
    let folder = file.parent().unwrap_or(Path::new(""));
    let written: File = reader.read("", value)?;
    let listeners = listeners(reader, written.listeners);
    let certificates = certificates(reader, folder, written.tls.certificates);
    let wants_tls = listeners.iter().any(|listener| listener.tls != ListenerTls::None);
    if wants_tls && certificates.is_empty() {
        reader.problem("tls.certificates", "a listener speaks TLS, so at least one certificate is needed");
    }
    let mut names = Vec::new();
    let mut backends = Vec::new();
    for (name, value) in written.backends {
        let Some(name) = name.as_str().map(str::to_owned) else {
            reader.problem("backends", "the name of a backend must be a text");
            continue;
        };
        names.push(name.clone());
        backends.extend(backend(reader, folder, name, value));
    }
    if names.is_empty() {
        reader.problem("backends", "at least one backend is needed");
    }
    pointed_at_itself(reader, &listeners, &backends);
    let routes = routes(reader, folder, &names, written.routes);
    let admin = written.admin.address.and_then(|text| socket_address(reader, "admin.address", &text, "127.0.0.1:9143"));
    if let Some(address) = admin
        && address.port() != 0
        && listeners.iter().any(|listener| listener.address == address)
    {
        reader.problem("admin.address", format!("{address} is a listener's address already"));
    }
    let servers = written.resolver.servers.iter().enumerate().filter_map(|(index, text)| {
        socket_address(reader, &format!("resolver.servers[{index}]"), text, "127.0.0.1:53")
    });
    let servers = servers.collect();
    let timeout = bounded(reader, "resolver.timeout", written.resolver.timeout, Duration::from_secs(3), seconds(1, 60));
    Some(Config {
        file: file.to_owned(),
        listeners,
        certificates,
        backends,
        routes,
        limits: limits(reader, &written.limits),
        admin,
        log: Log { format: format(written.log.format), level: level(written.log.level) },
        resolver: Resolver { servers, timeout },
    })
}

fn format(word: FormatWord) -> LogFormat {
    match word {
        FormatWord::Text => LogFormat::Text,
        FormatWord::Json => LogFormat::Json,
    }
}

fn level(word: LevelWord) -> Level {
    match word {
        LevelWord::Error => Level::Error,
        LevelWord::Warn => Level::Warn,
        LevelWord::Info => Level::Info,
        LevelWord::Debug => Level::Debug,
        LevelWord::Trace => Level::Trace,
    }
}

fn listeners(reader: &mut Reader<'_>, items: Vec<Value>) -> Vec<Listener> {
    if items.is_empty() {
        reader.problem("listeners", "at least one listener is needed");
    }
    let mut listeners: Vec<Listener> = Vec::new();
    for (index, item) in items.into_iter().enumerate() {
        let key = format!("listeners[{index}]");
        let Some(written) = reader.read::<ListenerMap>(&key, item) else { continue };
        let address_key = child(&key, "address");
        let Some(address) = socket_address(reader, &address_key, &written.address, "[::]:993") else { continue };
        if address.port() != 0 && listeners.iter().any(|other| other.address == address) {
            reader.problem(&address_key, format!("{address} is another listener's address already"));
        }
        let tls = match written.tls {
            TlsWord::Implicit => ListenerTls::Implicit,
            TlsWord::StartTls => ListenerTls::StartTls,
            TlsWord::None => ListenerTls::None,
        };
        listeners.push(Listener { address, tls, place: reader.place(&address_key) });
    }
    listeners
}

fn certificates(reader: &mut Reader<'_>, folder: &Path, items: Vec<Value>) -> Vec<Certificate> {
    let mut certificates = Vec::new();
    for (index, item) in items.into_iter().enumerate() {
        let key = format!("tls.certificates[{index}]");
        if let Some(written) = reader.read::<CertificateMap>(&key, item) {
            certificates.push(Certificate {
                cert: located(reader, folder, &child(&key, "cert"), &written.cert),
                key: located(reader, folder, &child(&key, "key"), &written.key),
            });
        }
    }
    certificates
}

/// Relative paths count from the configuration file's folder.
fn located(reader: &Reader<'_>, folder: &Path, key: &str, path: &Path) -> Located<PathBuf> {
    Located { value: folder.join(path), place: reader.place(key) }
}

fn backend(reader: &mut Reader<'_>, folder: &Path, name: String, value: Value) -> Option<Backend> {
    let key = child("backends", &name);
    if name.is_empty() || name.len() > MAX_NAME || !name.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'#') {
        reader.problem(&key, "the name of a backend has 1 to 64 printable ASCII characters, without space and #");
    }
    let written: BackendMap = reader.read(&key, value)?;
    let mut servers: Vec<Server> = Vec::new();
    if written.servers.is_empty() {
        reader.problem(&child(&key, "servers"), "at least one server is needed");
    }
    for (index, item) in written.servers.into_iter().enumerate() {
        let key = format!("{key}.servers[{index}]");
        let Some(server) = server(reader, &key, item) else { continue };
        if servers.iter().any(|other| server_name(other) == server_name(&server)) {
            reader.problem(&key, "the same server stands in this backend already");
        }
        servers.push(server);
    }
    let tls = server_tls(reader, folder, &child(&key, "tls"), written.tls);
    let client_info = match written.client_info {
        ClientInfoWord::Id => ClientInfo::Id,
        ClientInfoWord::ProxyV1 => ClientInfo::ProxyV1,
        ClientInfoWord::ProxyV2 => ClientInfo::ProxyV2,
        ClientInfoWord::None => ClientInfo::None,
    };
    let authzid = written.authzid == AuthzidWord::Allow;
    Some(Backend { name, servers, tls, client_info, authzid, place: reader.place(&key) })
}

fn server_name(server: &Server) -> &str {
    match server {
        Server::Address { name, .. } | Server::Srv { name, .. } => name,
    }
}

fn server(reader: &mut Reader<'_>, key: &str, item: Value) -> Option<Server> {
    let map = match reader.read::<ServerWords>(key, item)? {
        ServerWords::Word(address) => ServerMap { address: Some(address), weight: None, srv: None },
        ServerWords::Map(map) => map,
    };
    let place = reader.place(key);
    match map {
        ServerMap { address: None, srv: Some(name), weight: None } => {
            let name = name.trim_end_matches('.').to_ascii_lowercase();
            if !name.starts_with('_') || !is_host(&name) {
                reader.problem(&child(key, "srv"), "expected the name of an SRV record, like _imap._tcp.example.org");
                return None;
            }
            Some(Server::Srv { name, place })
        }
        ServerMap { address: Some(name), srv: None, weight } => {
            let weight = weight.unwrap_or(1);
            if !(1..=1000).contains(&weight) {
                reader.problem(&child(key, "weight"), "expected a number from 1 to 1000");
            }
            let Some((host, port)) = host_and_port(&name) else {
                let message = "expected host:port, like 10.0.0.11:143, [2001:db8::1]:143 or mail.internal:143";
                reader.problem(key, format!("{message}, found {name:?}"));
                return None;
            };
            Some(Server::Address { name, host, port, weight, place })
        }
        ServerMap { srv: Some(_), address: None, weight: Some(_) } => {
            reader.problem(&child(key, "weight"), "weights of servers behind an SRV record stand in the record");
            None
        }
        ServerMap { srv: Some(_), address: Some(_), .. } => {
            reader.problem(key, "address and srv exclude each other");
            None
        }
        ServerMap { srv: None, address: None, .. } => {
            reader.problem(key, "the key `address` is missing (or `srv`)");
            None
        }
    }
}

fn host_and_port(text: &str) -> Option<(Host, u16)> {
    if let Ok(address) = text.parse::<SocketAddr>() {
        return (address.port() != 0).then_some((Host::Ip(address.ip()), address.port()));
    }
    let (host, port) = text.rsplit_once(':')?;
    let port = port.parse().ok().filter(|port| *port != 0)?;
    let name = host.trim_end_matches('.').to_ascii_lowercase();
    // What ends in a number is a mistyped address, not a name.
    let address_like = name.rsplit('.').next().is_some_and(|last| last.bytes().all(|byte| byte.is_ascii_digit()));
    (is_host(&name) && !address_like).then_some((Host::Name(name), port))
}

fn is_host(name: &str) -> bool {
    let label = |label: &str| {
        (1..=63).contains(&label.len())
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'))
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    name.len() <= MAX_HOST && name.split('.').all(label)
}

fn server_tls(reader: &mut Reader<'_>, folder: &Path, key: &str, entry: Option<TlsEntry>) -> ServerTls {
    let map = match entry {
        None => TlsMap { mode: TlsWord::None, ca: None, server_name: None, pin: None, insecure: None },
        Some(TlsEntry::Word(mode)) => TlsMap { mode, ca: None, server_name: None, pin: None, insecure: None },
        Some(TlsEntry::Map(map)) => map,
    };
    let mode = match map.mode {
        TlsWord::None => TlsMode::None,
        TlsWord::StartTls => TlsMode::StartTls,
        TlsWord::Implicit => TlsMode::Implicit,
    };
    let insecure = map.insecure.unwrap_or(false);
    let chosen = [("ca", map.ca.is_some()), ("pin", map.pin.is_some()), ("insecure", insecure)];
    let chosen: Vec<&str> = chosen.into_iter().filter_map(|(name, given)| given.then_some(name)).collect();
    if chosen.len() > 1 {
        reader.problem(key, format!("{} exclude each other", chosen.join(" and ")));
    }
    if mode == TlsMode::None
        && let Some(name) = chosen.first().copied().or(map.server_name.as_ref().map(|_| "server_name"))
    {
        reader.problem(&child(key, name), "has no effect with mode none");
    }
    if let Some(name) = map.server_name.as_deref().filter(|name| !is_host(name) && name.parse::<IpAddr>().is_err()) {
        reader.problem(&child(key, "server_name"), format!("expected a host name, found {name:?}"));
    }
    let trust = if insecure {
        Trust::Insecure
    } else if let Some(pins) = map.pin {
        let key = child(key, "pin");
        Trust::Pin(pins.0.iter().filter_map(|pin| self::pin(reader, &key, pin)).collect())
    } else if let Some(ca) = map.ca {
        Trust::Ca(located(reader, folder, &child(key, "ca"), &ca))
    } else {
        Trust::System
    };
    ServerTls { mode, trust, server_name: map.server_name }
}

fn pin(reader: &mut Reader<'_>, key: &str, text: &str) -> Option<[u8; 32]> {
    let digest = text.strip_prefix("sha256:").and_then(|digest| STANDARD.decode(digest).ok());
    let digest = digest.and_then(|digest| <[u8; 32]>::try_from(digest).ok());
    if digest.is_none() {
        reader.problem(key, "expected sha256: and 44 characters of base64");
    }
    digest
}

/// A server that is one of our own listeners would feed every login back to us.
fn pointed_at_itself(reader: &mut Reader<'_>, listeners: &[Listener], backends: &[Backend]) {
    for server in backends.iter().flat_map(|backend| &backend.servers) {
        let Server::Address { name, host: Host::Ip(ip), port, place, .. } = server else { continue };
        let ip = ip.to_canonical();
        let own = listeners.iter().find(|listener| {
            let address = listener.address;
            let same = address.ip().to_canonical() == ip || address.ip().is_unspecified() && is_local(ip);
            address.port() == *port && same
        });
        if let Some(own) = own {
            let message = format!("{name} is the listener {} of this proxy: it would connect to itself", own.address);
            reader.problem(&place.key, message);
        }
    }
}

fn routes(reader: &mut Reader<'_>, folder: &Path, names: &[String], items: Vec<Value>) -> Vec<Route> {
    if items.is_empty() {
        reader.problem("routes", "at least one route is needed, such as {default: BACKEND}");
    }
    let declared: HashMap<&str, BackendId> =
        names.iter().enumerate().map(|(index, name)| (name.as_str(), BackendId(index))).collect();
    let mut routes = Vec::new();
    for (index, item) in items.into_iter().enumerate() {
        let key = format!("routes[{index}]");
        if routes.iter().any(|route| matches!(route, Route::Default(_) | Route::Hash(_))) {
            reader.problem(&key, "is never asked: a route before it knows every user");
        }
        let Some(written) = reader.read::<RouteMap>(&key, item) else { continue };
        routes.extend(route(reader, folder, &declared, &key, written));
    }
    routes
}

fn route(
    reader: &mut Reader<'_>,
    folder: &Path,
    declared: &HashMap<&str, BackendId>,
    key: &str,
    written: RouteMap,
) -> Option<Route> {
    match written {
        RouteMap { table: Some(path), domain: None, hash: None, default: None } => {
            Some(Route::Table(located(reader, folder, &child(key, "table"), &path)))
        }
        RouteMap { domain: Some(domains), table: None, hash: None, default: None } => {
            let key = child(key, "domain");
            let mut known = BTreeMap::new();
            for (domain, name) in domains {
                let place = child(&key, &domain);
                let Some(backend) = declared_backend(reader, declared, &place, &name) else { continue };
                if known.insert(domain.trim_start_matches('@').to_ascii_lowercase(), backend).is_some() {
                    reader.problem(&place, "the same domain in other letter case stands here already");
                }
            }
            Some(Route::Domain(known))
        }
        RouteMap { hash: Some(names), table: None, domain: None, default: None } => {
            let key = child(key, "hash");
            if names.is_empty() {
                reader.problem(&key, "at least one backend is needed");
            }
            let mut backends = Vec::new();
            for (index, name) in names.iter().enumerate() {
                let place = format!("{key}[{index}]");
                let Some(backend) = declared_backend(reader, declared, &place, name) else { continue };
                if backends.contains(&backend) {
                    reader.problem(&place, format!("{name} stands here twice"));
                }
                backends.push(backend);
            }
            Some(Route::Hash(backends))
        }
        RouteMap { default: Some(name), table: None, domain: None, hash: None } => {
            declared_backend(reader, declared, &child(key, "default"), &name).map(Route::Default)
        }
        RouteMap { .. } => {
            reader.problem(key, "expected exactly one of table, domain, hash, default");
            None
        }
    }
}

fn declared_backend(
    reader: &mut Reader<'_>,
    declared: &HashMap<&str, BackendId>,
    key: &str,
    name: &str,
) -> Option<BackendId> {
    let found = declared.get(name).copied();
    if found.is_none() {
        let mut known: Vec<&str> = declared.keys().copied().collect();
        known.sort_unstable();
        reader.problem_with_help(key, format!("no backend is declared as {name:?}"), suggestion(name, &known));
    }
    found
}

fn socket_address(reader: &mut Reader<'_>, key: &str, text: &str, example: &str) -> Option<SocketAddr> {
    let parsed = text.parse().ok();
    if parsed.is_none() {
        reader.problem(key, format!("expected an address and a port, like {example:?}, found {text:?}"));
    }
    parsed
}

fn limits(reader: &mut Reader<'_>, written: &LimitsMap) -> Limits {
    let default = Limits::default();
    let hour = 3600;
    let day = 24 * hour;
    let mut limits = Limits {
        handshake: bounded(reader, "limits.handshake", written.handshake, default.handshake, seconds(1, 300)),
        login: bounded(reader, "limits.login", written.login, default.login, seconds(1, hour)),
        lookup: bounded(reader, "limits.lookup", written.lookup, default.lookup, seconds(0, 300)),
        connect: bounded(reader, "limits.connect", written.connect, default.connect, seconds(0, 300)),
        server_login: bounded(
            reader,
            "limits.server_login",
            written.server_login,
            default.server_login,
            seconds(0, 600),
        ),
        half_close: bounded(reader, "limits.half_close", written.half_close, default.half_close, seconds(1, hour)),
        drain: bounded(reader, "limits.drain", written.drain, default.drain, seconds(0, 7 * day)),
        idle: or_off(reader, "limits.idle", written.idle, default.idle, seconds(1800, 30 * day)),
        keepalive: or_off(reader, "limits.keepalive", written.keepalive, default.keepalive, seconds(10, day)),
        line: size(reader, "limits.line", written.line, default.line, 1024..=16 << 20),
        literal: size(reader, "limits.literal", written.literal, default.literal, 256..=16 << 20),
        untagged_bytes: size(
            reader,
            "limits.untagged_bytes",
            written.untagged_bytes,
            default.untagged_bytes,
            1024..=16 << 20,
        ),
        ..default
    };
    limits.bad_commands = number(reader, "limits.bad_commands", written.bad_commands, limits.bad_commands, 1..=1000);
    limits.failed_logins =
        number(reader, "limits.failed_logins", written.failed_logins, limits.failed_logins, 1..=1000);
    let sessions = number(reader, "limits.sessions", written.sessions, 100_000, 1..=10_000_000);
    let lines = number(reader, "limits.untagged_lines", written.untagged_lines, 64, 1..=100_000);
    (limits.sessions, limits.untagged_lines) = (sessions as usize, lines as usize);
    limits
}

fn seconds(least: u64, most: u64) -> RangeInclusive<Duration> {
    // No deadline is nothing at all: a tenth of a second is what "0 s or more" means.
    let least = if least == 0 { Duration::from_millis(100) } else { Duration::from_secs(least) };
    least..=Duration::from_secs(most)
}

fn bounded(
    reader: &mut Reader<'_>,
    key: &str,
    written: Option<Span>,
    default: Duration,
    bounds: RangeInclusive<Duration>,
) -> Duration {
    let Some(Span(span)) = written else { return default };
    let within = span.filter(|span| bounds.contains(span));
    within.unwrap_or_else(|| {
        let (least, most) = (humantime::format_duration(*bounds.start()), humantime::format_duration(*bounds.end()));
        reader.problem(key, format!("expected a duration from {least} to {most}"));
        default
    })
}

fn or_off(
    reader: &mut Reader<'_>,
    key: &str,
    written: Option<Span>,
    default: Option<Duration>,
    bounds: RangeInclusive<Duration>,
) -> Option<Duration> {
    match written {
        None => default,
        Some(Span(None)) => None,
        Some(Span(Some(span))) if bounds.contains(&span) => Some(span),
        Some(_) => {
            let (least, most) =
                (humantime::format_duration(*bounds.start()), humantime::format_duration(*bounds.end()));
            reader.problem(key, format!("expected off or a duration from {least} to {most}"));
            default
        }
    }
}

fn size(
    reader: &mut Reader<'_>,
    key: &str,
    written: Option<Size>,
    default: usize,
    bounds: RangeInclusive<usize>,
) -> usize {
    match written {
        None => default,
        Some(Size(size)) if bounds.contains(&size) => size,
        Some(_) => {
            reader.problem(key, format!("expected a size from {} to {} bytes", bounds.start(), bounds.end()));
            default
        }
    }
}

fn number(reader: &mut Reader<'_>, key: &str, written: Option<u32>, default: u32, bounds: RangeInclusive<u32>) -> u32 {
    match written {
        None => default,
        Some(number) if bounds.contains(&number) => number,
        Some(_) => {
            reader.problem(key, format!("expected a number from {} to {}", bounds.start(), bounds.end()));
            default
        }
    }
}
