//! Rules between sections: addresses that overlap, a server that is the proxy itself, keys without effect.

use std::net::SocketAddr;

use super::local_address::is_local;
use super::yaml::Section;
use super::{Authzid, Config, Host, Server, TlsMode};

/// Checks all rules; `root` is the whole file.
pub(super) fn check(root: &mut Section<'_>, config: &Config) {
    let addresses: Vec<SocketAddr> = config.listeners.iter().map(|listener| listener.address).collect();
    check_certificates(root, config);
    check_listener_addresses(root, config);
    check_admin_address(root, config, &addresses);
    check_servers(root, config, &addresses);
    check_delegations(root, config);
}

fn check_certificates(root: &mut Section<'_>, config: &Config) {
    let needs_certificate = config.listeners.iter().any(|listener| listener.tls != TlsMode::None);
    if needs_certificate && config.certificates.is_empty() && !root.has_problem_below("tls") {
        root.problem("tls.certificates", "at least one certificate is required, because a listener uses TLS");
    }
}

fn check_listener_addresses(root: &mut Section<'_>, config: &Config) {
    for (index, listener) in config.listeners.iter().enumerate() {
        let address = listener.address;
        let others = config.listeners[..index].iter().map(|other| other.address);
        if let Some(other) = others.into_iter().find(|other| cannot_both_be_bound(*other, address)) {
            let message = overlap(address, other, "another listener");
            root.problem(&listener.location.key, message);
        }
    }
}

fn check_admin_address(root: &mut Section<'_>, config: &Config, listeners: &[SocketAddr]) {
    let Some(address) = config.admin else { return };
    let overlaps =
        |listener: &&SocketAddr| cannot_both_be_bound(**listener, address) || accepts(**listener, address, listeners);
    if let Some(listener) = listeners.iter().find(overlaps) {
        root.problem("admin.address", overlap(address, *listener, "a listener"));
    }
}

fn overlap(address: SocketAddr, other: SocketAddr, owner: &str) -> String {
    if address == other {
        format!("{address} is already the address of {owner}")
    } else {
        format!("{address} overlaps with {other}, the address of {owner}: they cannot both be bound")
    }
}

/// A server that is one of the proxy's own listeners would send every login back to the proxy.
fn check_servers(root: &mut Section<'_>, config: &Config, listeners: &[SocketAddr]) {
    for server in config.backends.iter().flat_map(|backend| &backend.servers) {
        let Server::Address { name, host: Host::Ip(ip), port, location, .. } = server else { continue };
        let target = SocketAddr::new(ip.to_canonical(), *port);
        let is_target = |own: &&SocketAddr| accepts(**own, target, listeners) && is_own(**own, target);
        if let Some(own) = listeners.iter().find(is_target) {
            let message = format!("{name} is the listener {own} of this proxy, which would connect to itself");
            root.problem(&location.key, message);
        }
    }
}

/// Without a backend that accepts an authzid, every login on behalf of another user is refused, whether delegated or not.
fn check_delegations(root: &mut Section<'_>, config: &Config) {
    if config.backends.iter().any(|backend| backend.authzid == Authzid::Allow) || root.has_problem_below("backends") {
        return;
    }
    for listener in &config.listeners {
        if listener.client_certificates.as_ref().is_some_and(|it| !it.may_act_for.is_empty()) {
            let listener = listener.location.key.trim_end_matches(".address");
            let key = format!("{listener}.client_certificates.may_act_for");
            root.problem(&key, "has no effect: no backend has authzid: allow");
        }
    }
}

/// Whether two sockets of one address family cannot both be bound.
fn cannot_both_be_bound(one: SocketAddr, other: SocketAddr) -> bool {
    one.is_ipv4() == other.is_ipv4() && (accepts(one, other, &[]) || accepts(other, one, &[]))
}

/// Whether connections to `target` reach the listener `own`: an unspecified address means those of this machine.
fn is_own(own: SocketAddr, target: SocketAddr) -> bool {
    !own.ip().is_unspecified() || is_local(target.ip())
}

/// Whether a socket that is bound to `own` also accepts connections to `other`, which may be unspecified too. `[::]`
/// accepts IPv4 unless one of `listeners` does so on its port, see `Listener::bind`. Port 0 means a free port.
fn accepts(own: SocketAddr, other: SocketAddr, listeners: &[SocketAddr]) -> bool {
    let (ip, port) = (own.ip().to_canonical(), own.port());
    if port == 0 || port != other.port() {
        return false;
    }
    let same_family = ip.is_ipv4() == other.ip().to_canonical().is_ipv4();
    let with_ipv4 = || !listeners.iter().any(|other| other.is_ipv4() && other.port() == port);
    ip == other.ip().to_canonical() || ip.is_unspecified() && (same_family || ip.is_ipv6() && with_ipv4())
}
