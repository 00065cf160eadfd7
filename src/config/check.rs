//! The rules between keys: names that must be declared, addresses given once, and a proxy pointed at itself.
//!
//! `servers`, `routes` and `limits` check their own sections. Called by `config::parse`.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_yaml::Value;

use super::error::Help;
use super::file::{
    AlpnWord, CertificateMap, CertificateUserWord, File, FormatWord, LevelWord, ListenerMap, SniWord, TlsWord,
};
use super::guard::guard;
use super::limits::{bounded, limits, seconds};
use super::locate::child;
use super::oauth::{delegations, issuers};
use super::policy::policy;
use super::read::Reader;
use super::routes::routes;
use super::servers::backend;
use super::users::users;
use super::{
    Backend, Certificate, CertificateUser, ClientCertificates, Config, Host, Level, Listener, Located, LogConfig,
    LogFormat, Network, ResolverConfig, RunAs, Server, TlsMode, TlsVersion, is_local,
};
use crate::identity::{Mechanism, Mechanisms};

/// The whole file. `None`, or problems in `reader`: it is no configuration.
pub(super) fn config(reader: &mut Reader<'_>, file: &Path, value: Value) -> Option<Config> {
    let folder = file.parent().unwrap_or(Path::new(""));
    let written: File = reader.read("", value)?;
    let listeners = listeners(reader, folder, written.listeners);
    let certificates = certificates(reader, folder, written.tls.certificates);
    let ticket_keys = written.tls.ticket_keys.map(|files| ticket_keys(reader, folder, &files)).unwrap_or_default();
    let wants_tls = listeners.iter().any(|listener| listener.tls != TlsMode::None);
    if wants_tls && certificates.is_empty() && !reader.blamed("tls") {
        reader.problem("tls.certificates", "a listener speaks TLS, so at least one certificate is needed");
    }
    let mut names = Vec::new();
    let mut backends = Vec::new();
    for (name, value) in written.backends {
        // Others were told, and taken out, before.
        let Value::String(name) = name else { continue };
        names.push(name.clone());
        backends.extend(backend(reader, folder, name, value));
    }
    if names.is_empty() && !reader.blamed("backends") {
        reader.problem("backends", "at least one backend is needed");
    }
    pointed_at_itself(reader, &listeners, &backends);
    delegated_in_vain(reader, &listeners, &backends);
    let routes = routes(reader, folder, &names, written.routes);
    let control = written.admin.control.map(|path| folder.join(path));
    // A Unix socket's name has 108 bytes, its end included (unix(7)).
    if control.as_ref().is_some_and(|path| path.as_os_str().len() > 90) {
        reader.problem("admin.control", "the path is too long for a Unix socket: at most 90 bytes");
    }
    let ends_in_digits =
        |path: &PathBuf| path.extension().is_some_and(|end| end.as_encoded_bytes().iter().all(u8::is_ascii_digit));
    if control.as_ref().is_some_and(ends_in_digits) {
        reader
            .problem("admin.control", "a name that ends in a process id is for sockets that processes make themselves");
    }
    let state_file = written.state_file.map(|path| folder.join(path));
    if state_file.as_ref().is_some_and(|path| path.file_name().is_none()) {
        reader.problem("state_file", "expected the path of a file, like /var/lib/vestibule/state.json");
    }
    let run_as = written.run_as.map(|map| RunAs {
        user: run_as_name(reader, "run_as.user", map.user),
        group: map.group.map(|group| run_as_name(reader, "run_as.group", group)),
    });
    let admin = written.admin.address.and_then(|text| socket_address(reader, "admin.address", &text, "127.0.0.1:9143"));
    let addresses: Vec<SocketAddr> = listeners.iter().map(|listener| listener.address).collect();
    if let Some(address) = admin
        && let Some(own) = addresses.iter().find(|own| same_place(**own, address) || takes(**own, address, &addresses))
    {
        reader.problem(
            "admin.address",
            match *own == address {
                true => format!("{address} is a listener's address already"),
                false => format!("{address} and {own}, a listener's address, overlap: one of them could not be bound"),
            },
        );
    }
    let servers = written.resolver.servers.iter().enumerate().filter_map(|(index, text)| {
        socket_address(reader, &format!("resolver.servers[{index}]"), text, "127.0.0.1:53")
    });
    let servers = servers.collect();
    let timeout = bounded(reader, "resolver.timeout", written.resolver.timeout, Duration::from_secs(3), seconds(1, 60));
    let (naming, master_networks) = users(reader, written.users);
    let limits = limits(reader, &written.limits);
    let guard = guard(reader, written.access, &written.limits);
    let policy = written.policy.and_then(|map| policy(reader, folder, map));
    Some(Config {
        file: file.to_owned(),
        listeners,
        certificates,
        ticket_keys,
        backends,
        routes,
        naming,
        master_networks,
        token_issuers: issuers(reader, written.oauth).into(),
        limits,
        admission: guard,
        policy,
        admin,
        control,
        state_file,
        run_as,
        log: LogConfig { format: format(written.log.format), level: level(written.log.level) },
        resolver: ResolverConfig { servers, timeout },
        warnings: reader.take_warnings(),
    })
}

fn run_as_name(reader: &mut Reader<'_>, key: &str, name: String) -> Located<String> {
    if name.is_empty() || name.contains(['\0', ':', '/']) {
        reader.problem(key, "expected a name, like vestibule");
    }
    Located { value: name, location: reader.location(key) }
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

fn listeners(reader: &mut Reader<'_>, folder: &Path, items: Vec<Value>) -> Vec<Listener> {
    if items.is_empty() && !reader.blamed("listeners") {
        reader.problem("listeners", "at least one listener is needed");
    }
    let mut listeners: Vec<Listener> = Vec::new();
    for (index, item) in items.into_iter().enumerate() {
        let key = format!("listeners[{index}]");
        let Some(written) = reader.read::<ListenerMap>(&key, item) else { continue };
        let address_key = child(&key, "address");
        let Some(address) = socket_address(reader, &address_key, &written.address, "[::]:993") else { continue };
        if let Some(other) = listeners.iter().map(|other| other.address).find(|other| same_place(*other, address)) {
            reader.problem(
                &address_key,
                match other == address {
                    true => format!("{address} is another listener's address already"),
                    false => format!(
                        "{address} and {other}, another listener's address, overlap: one of them could not be bound"
                    ),
                },
            );
        }
        let tls = match written.tls {
            TlsWord::Implicit => TlsMode::Implicit,
            TlsWord::StartTls => TlsMode::StartTls,
            TlsWord::None => TlsMode::None,
        };
        let mechanisms = written.mechanisms.map(|names| mechanisms(reader, &child(&key, "mechanisms"), &names));
        let of_tls =
            [("tls_min", written.tls_min.is_some()), ("sni", written.sni.is_some()), ("alpn", written.alpn.is_some())];
        for (name, given) in of_tls {
            if given && tls == TlsMode::None {
                reader.problem(&child(&key, name), "has no effect with tls: none");
            }
        }
        let tls_min = written.tls_min.map_or(TlsVersion::Tls12, |word| word.0);
        let strict_sni = written.sni == Some(SniWord::Strict);
        let strict_alpn = written.alpn != Some(AlpnWord::Any);
        let client_certificates = written.client_certificates.map(|map| {
            let key = child(&key, "client_certificates");
            if tls == TlsMode::None {
                reader.problem(&key, "has no effect with tls: none");
            }
            ClientCertificates {
                ca: located(reader, folder, &child(&key, "ca"), &map.ca),
                required: map.required,
                user: match map.user {
                    CertificateUserWord::SanEmail => CertificateUser::SanEmail,
                    CertificateUserWord::SanDns => CertificateUser::SanDns,
                    CertificateUserWord::CommonName => CertificateUser::CommonName,
                },
                may_act_for: delegations(reader, &child(&key, "may_act_for"), map.may_act_for),
            }
        });
        let proxy_protocol = written.proxy_protocol.map(|map| {
            let key = child(&child(&key, "proxy_protocol"), "from");
            if map.from.is_empty() {
                reader.problem(&key, "at least one network is needed, or nobody is let in");
            }
            networks(reader, &key, &map.from)
        });
        let location = reader.location(&address_key);
        listeners.push(Listener {
            address,
            tls,
            mechanisms,
            tls_min,
            strict_sni,
            strict_alpn,
            client_certificates,
            proxy_protocol,
            location,
        });
    }
    listeners
}

/// Those that can be read.
pub(super) fn networks(reader: &mut Reader<'_>, key: &str, texts: &[String]) -> Vec<Network> {
    let mut networks = Vec::new();
    for (index, text) in texts.iter().enumerate() {
        match Network::parse(text) {
            Some(network) => networks.push(network),
            None => reader.problem(&format!("{key}[{index}]"), "expected a network, like 10.0.0.0/8"),
        }
    }
    networks
}

/// Ways to log in, by their SASL names; `login` is the command too.
fn mechanisms(reader: &mut Reader<'_>, key: &str, names: &[String]) -> Mechanisms {
    if names.is_empty() {
        reader.problem(key, "at least one mechanism is needed, or nobody can log in");
    }
    let mut mechanisms = Mechanisms::default();
    for (index, name) in names.iter().enumerate() {
        match Mechanism::by_sasl_name(name.as_bytes()) {
            Some(Mechanism::SaslLogin) => {
                mechanisms = mechanisms.with(Mechanism::SaslLogin).with(Mechanism::Login);
            }
            Some(mechanism) => mechanisms = mechanisms.with(mechanism),
            None => {
                let known: Vec<String> = Mechanism::ALL
                    .into_iter()
                    .map(|known| known.sasl_name().to_ascii_lowercase())
                    .filter(|name| !name.is_empty())
                    .collect();
                let known: Vec<&str> = known.iter().map(String::as_str).collect();
                let message = format!("{name:?} is no mechanism that can be offered");
                reader.problem_with_help(&format!("{key}[{index}]"), message, Some(Help::suggest(name, &known)));
            }
        }
    }
    mechanisms
}

fn certificates(reader: &mut Reader<'_>, folder: &Path, items: Vec<Value>) -> Vec<Certificate> {
    let mut certificates = Vec::new();
    for (index, item) in items.into_iter().enumerate() {
        let key = format!("tls.certificates[{index}]");
        if let Some(written) = reader.read::<CertificateMap>(&key, item) {
            certificates.push(Certificate {
                cert: located(reader, folder, &child(&key, "cert"), &written.cert),
                key: located(reader, folder, &child(&key, "key"), &written.key),
                ocsp: written.ocsp.map(|path| located(reader, folder, &child(&key, "ocsp"), &path)),
            });
        }
    }
    certificates
}

fn ticket_keys(reader: &mut Reader<'_>, folder: &Path, files: &[PathBuf]) -> Vec<Located<PathBuf>> {
    if files.is_empty() {
        reader.problem(
            "tls.ticket_keys",
            "at least one file is needed; without the key the process makes its own secret",
        );
    }
    let key = |index: usize| format!("tls.ticket_keys[{index}]");
    for (index, file) in files.iter().enumerate() {
        if files[..index].contains(file) {
            reader.problem(&key(index), "the same file stands in this list already");
        }
    }
    files.iter().enumerate().map(|(index, file)| located(reader, folder, &key(index), file)).collect()
}

/// Relative paths count from the configuration file's folder.
pub(super) fn located(reader: &Reader<'_>, folder: &Path, key: &str, path: &Path) -> Located<PathBuf> {
    Located { value: folder.join(path), location: reader.location(key) }
}

/// Without a backend that takes an authzid, every login on behalf of another user is refused, listed or not.
fn delegated_in_vain(reader: &mut Reader<'_>, listeners: &[Listener], backends: &[Backend]) {
    if backends.iter().any(|backend| backend.authzid) || reader.blamed("backends") {
        return;
    }
    for (index, listener) in listeners.iter().enumerate() {
        if listener.client_certificates.as_ref().is_some_and(|wanted| !wanted.may_act_for.is_empty()) {
            let key = format!("listeners[{index}].client_certificates.may_act_for");
            reader.problem(&key, "has no effect: no backend has authzid: allow");
        }
    }
}

/// A server that is one of our own listeners would feed every login back to us.
fn pointed_at_itself(reader: &mut Reader<'_>, listeners: &[Listener], backends: &[Backend]) {
    let addresses: Vec<SocketAddr> = listeners.iter().map(|listener| listener.address).collect();
    for server in backends.iter().flat_map(|backend| &backend.servers) {
        let Server::Address { name, host: Host::Ip(ip), port, location, .. } = server else { continue };
        let target = SocketAddr::new(ip.to_canonical(), *port);
        if let Some(own) = addresses.iter().find(|own| takes(**own, target, &addresses) && is_own(**own, target)) {
            let message = format!("{name} is the listener {own} of this proxy: it would connect to itself");
            reader.problem(&location.key, message);
        }
    }
}

/// Whether two sockets of one address family cannot both be bound.
fn same_place(one: SocketAddr, other: SocketAddr) -> bool {
    one.is_ipv4() == other.is_ipv4() && (takes(one, other, &[]) || takes(other, one, &[]))
}

/// `own` takes connections to `target`; an unspecified one only those to addresses of this machine.
fn is_own(own: SocketAddr, target: SocketAddr) -> bool {
    !own.ip().is_unspecified() || is_local(target.ip())
}

/// Whether what is bound to `own` also takes `other`, an address and port that may be unspecified too. `[::]` takes
/// IPv4 unless one of `listeners` does so on its port, see `Listener::bind`. Port 0 takes a free port.
fn takes(own: SocketAddr, other: SocketAddr, listeners: &[SocketAddr]) -> bool {
    let (ip, port) = (own.ip().to_canonical(), own.port());
    if port == 0 || port != other.port() {
        return false;
    }
    let same_family = ip.is_ipv4() == other.ip().to_canonical().is_ipv4();
    let with_ipv4 = || !listeners.iter().any(|other| other.is_ipv4() && other.port() == port);
    ip == other.ip().to_canonical() || ip.is_unspecified() && (same_family || ip.is_ipv6() && with_ipv4())
}

/// An IP address and a port.
pub(super) fn socket_address(reader: &mut Reader<'_>, key: &str, text: &str, example: &str) -> Option<SocketAddr> {
    let parsed = text.parse().ok();
    if parsed.is_none() {
        reader.problem(key, format!("expected an address and a port, like {example:?}, found {text:?}"));
    }
    parsed
}
