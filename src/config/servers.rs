//! `backends`: servers, TLS towards them, and what they learn of the client. Called by `check`.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_yaml::Value;

use super::answers::{EmptyPasswordWord, LoginRules, texts};
use super::care::{self, care, max_sessions};
use super::check::located;
use super::file::{
    AuthzidWord, BackendMap, ClientInfoWord, LoginMap, ReferralsWord, Server as ServerWords, ServerMap, TlsMap, TlsWord,
};
use super::locate::child;
use super::read::Reader;
use super::values::TlsEntry;
use super::{Backend, ClientInfo, Host, MasterLogin, Server, TlsMode, Trust, UpstreamTlsConfig};
use crate::identity::UserName;

/// Longer names would be unwieldy labels.
const MAX_NAME: usize = 64;
/// The consequence of `client_info: none`.
const CLIENT_INFO_NONE: &str = "with none the servers see the proxy as the client of every login: Dovecot then counts \
     the failed logins of all users against the proxy's address and delays good ones by up to 15 s; use id, with the \
     proxy in Dovecot's login_trusted_networks, or proxy-v2";
/// RFC 1035 section 2.3.4.
const MAX_HOST: usize = 253;

/// One backend. `None`: it cannot be read at all.
pub(super) fn backend(reader: &mut Reader<'_>, folder: &Path, name: String, value: Value) -> Option<Backend> {
    let key = child("backends", &name);
    if name.is_empty() || name.len() > MAX_NAME || !name.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'#') {
        reader.problem(&key, "the name of a backend has 1 to 64 printable ASCII characters, without space and #");
    }
    let written: BackendMap = reader.read(&key, value)?;
    let mut servers: Vec<Server> = Vec::new();
    let servers_key = child(&key, "servers");
    if written.servers.is_none() && !reader.blamed(&servers_key) {
        reader.problem(&key, "the key `servers` is missing");
    }
    if written.servers.as_ref().is_some_and(Vec::is_empty) {
        reader.problem(&servers_key, "at least one server is needed");
    }
    let default_sessions = max_sessions(reader, &key, written.max_sessions);
    for (index, item) in written.servers.unwrap_or_default().into_iter().enumerate() {
        let key = format!("{key}.servers[{index}]");
        let Some(server) = server(reader, &key, item, default_sessions) else { continue };
        if servers.iter().any(|other| is_same(other, &server)) {
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
    if client_info == ClientInfo::None {
        reader.warning(&child(&key, "client_info"), CLIENT_INFO_NONE);
    }
    let source_addresses = source_addresses(reader, &child(&key, "source_addresses"), &written.source_addresses);
    let authzid = written.authzid == AuthzidWord::Allow;
    let login = written.login.and_then(|login| master_login(reader, folder, &child(&key, "login"), login));
    let follows_referrals = matches!(written.referrals, ReferralsWord::Follow);
    let answers = LoginRules {
        login_with: written.login_with.into(),
        unavailable_texts: texts(reader, &key, "unavailable_texts", written.unavailable_texts),
        limit_texts: texts(reader, &key, "limit_texts", written.limit_texts),
        allow_empty_password: written.empty_password == EmptyPasswordWord::Allow,
    };
    let forward_key = child(&key, "forward");
    check_forward(reader, &forward_key, &written.forward);
    if client_info != ClientInfo::Id && !written.forward.is_empty() {
        reader.problem(&forward_key, "is sent with client_info: id only");
    }
    let care_written = care::Written {
        balance: written.balance,
        check: written.check,
        slow_start: written.slow_start,
        breaker: written.breaker,
        queue: written.queue,
    };
    let care = care(reader, folder, &key, tls.mode, care_written);
    let (forward, location) = (written.forward, reader.location(&key));
    Some(Backend {
        name,
        servers,
        source_addresses,
        tls,
        client_info,
        authzid,
        login,
        follows_referrals,
        login_rules: answers,
        forward,
        balancing: care,
        location,
    })
}

/// Pairs that are sent with ID.
fn check_forward(reader: &mut Reader<'_>, key: &str, forward: &BTreeMap<String, String>) {
    for (name, value) in forward {
        // RFC 2971 section 3.3 has 30 bytes for a key, of which `x-forward-` takes ten.
        let is_key = (1..=20).contains(&name.len()) && name.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'"');
        if !is_key || value.len() > 1024 || !value.bytes().all(|byte| (b' '..0x7f).contains(&byte)) {
            let message = "expected up to 20 characters without spaces, and a value of ASCII text";
            reader.problem(&child(key, name), message);
        }
    }
}

/// IP addresses, each once.
fn source_addresses(reader: &mut Reader<'_>, key: &str, texts: &[String]) -> Vec<IpAddr> {
    let mut addresses = Vec::new();
    for (index, text) in texts.iter().enumerate() {
        let key = format!("{key}[{index}]");
        let Ok(address) = text.parse::<IpAddr>() else {
            reader.problem(&key, "expected an IP address of this machine, like 10.0.0.5");
            continue;
        };
        let address = address.to_canonical();
        if address.is_unspecified() || address.is_multicast() {
            reader.problem(&key, format!("{address} is not an address that a connection can come from"));
        } else if addresses.contains(&address) {
            reader.problem(&key, "the same address is in this list already");
        } else {
            addresses.push(address);
        }
    }
    addresses
}

fn master_login(reader: &mut Reader<'_>, folder: &Path, key: &str, written: LoginMap) -> Option<MasterLogin> {
    let master = match written.master.map(|name| UserName::new(name.as_bytes())).transpose() {
        Ok(master) => master,
        Err(error) => {
            reader.problem(&child(key, "master"), error.to_string());
            return None;
        }
    };
    let password = located(reader, folder, &child(key, "password_file"), &written.password_file);
    Some(MasterLogin { master, password })
}

/// However they are written.
fn is_same(one: &Server, other: &Server) -> bool {
    match (one, other) {
        (Server::Address { host, port, .. }, Server::Address { host: other_host, port: other_port, .. }) => {
            (host, port) == (other_host, other_port)
        }
        (Server::Srv { name, .. }, Server::Srv { name: other, .. }) => name == other,
        _ => false,
    }
}

fn server(reader: &mut Reader<'_>, key: &str, item: Value, default_sessions: Option<u32>) -> Option<Server> {
    let map = match reader.read::<ServerWords>(key, item)? {
        ServerWords::Word(address) => ServerMap { address: Some(address), ..ServerMap::default() },
        ServerWords::Map(map) => map,
    };
    let location = reader.location(key);
    let max_sessions = max_sessions(reader, key, map.max_sessions).or(default_sessions);
    match map {
        ServerMap { address: None, srv: Some(name), weight: None, .. } => {
            let name = name.trim_end_matches('.').to_ascii_lowercase();
            if !name.starts_with('_') || !is_host(&name) {
                reader.problem(&child(key, "srv"), "expected the name of an SRV record, like _imap._tcp.example.org");
                return None;
            }
            Some(Server::Srv { name, max_sessions, state: map.state, location })
        }
        ServerMap { address: Some(name), srv: None, weight, .. } => {
            let weight = u32::try_from(weight.unwrap_or(1)).unwrap_or(0);
            if !(1..=1000).contains(&weight) {
                reader.problem(&child(key, "weight"), "expected a number from 1 to 1000");
            }
            let Some((host, port)) = host_and_port(&name) else {
                let message = "expected host:port, like 10.0.0.11:143, [2001:db8::1]:143 or mail.internal:143";
                reader.problem(key, format!("{message}, found {name:?}"));
                return None;
            };
            if let Host::Ip(ip) = host
                && (ip.to_canonical().is_unspecified() || ip.to_canonical().is_multicast())
            {
                reader.problem(key, format!("{ip} is no address a server can have"));
            }
            Some(Server::Address { name, host, port, weight, max_sessions, state: map.state, location })
        }
        ServerMap { srv: Some(_), address: None, weight: Some(_), .. } => {
            reader.problem(&child(key, "weight"), "weights of servers behind an SRV record stand in the record");
            None
        }
        ServerMap { srv: Some(_), address: Some(_), .. } => {
            reader.problem(key, "address and srv exclude each other");
            None
        }
        ServerMap { srv: None, address: None, .. } => {
            if !reader.blamed(key) {
                reader.problem(key, "the key `address` is missing (or `srv`)");
            }
            None
        }
    }
}

fn host_and_port(text: &str) -> Option<(Host, u16)> {
    if let Ok(address) = text.parse::<SocketAddr>() {
        return (address.port() != 0).then_some((Host::Ip(address.ip()), address.port()));
    }
    let (host, port) = text.rsplit_once(':')?;
    // `parse` alone would take "+143".
    let digits = port.bytes().all(|byte| byte.is_ascii_digit());
    let port = port.parse().ok().filter(|port| digits && *port != 0)?;
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

fn server_tls(reader: &mut Reader<'_>, folder: &Path, key: &str, entry: Option<TlsEntry>) -> UpstreamTlsConfig {
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
        if pins.words.is_empty() && !reader.blamed(&key) {
            reader.problem(&key, "at least one pin is needed");
        }
        let place = |index| if pins.is_list { format!("{key}[{index}]") } else { key.clone() };
        Trust::Pin(
            pins.words.iter().enumerate().filter_map(|(index, pin)| digest(reader, &place(index), pin)).collect(),
        )
    } else if let Some(ca) = map.ca {
        Trust::Ca(located(reader, folder, &child(key, "ca"), &ca))
    } else {
        Trust::System
    };
    UpstreamTlsConfig { mode, trust, server_name: map.server_name }
}

fn digest(reader: &mut Reader<'_>, key: &str, text: &str) -> Option<[u8; 32]> {
    let digest = text.strip_prefix("sha256:").and_then(|digest| STANDARD.decode(digest).ok());
    let digest = digest.and_then(|digest| <[u8; 32]>::try_from(digest).ok());
    if digest.is_none() {
        reader.problem(key, "expected sha256: and 44 characters of base64");
    }
    digest
}
