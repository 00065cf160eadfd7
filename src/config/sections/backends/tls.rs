//! `tls` of a backend: TLS towards its servers.

use std::net::IpAddr;
use std::path::PathBuf;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;

use super::server::is_host;
use crate::config::error::Located;
use crate::config::sections::tls::TlsMode;
use crate::config::yaml::{OneOrMany, Section, Shorthand, WordOrMap};

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct UpstreamTlsSection {
    mode: TlsMode,
    ca: Option<PathBuf>,
    server_name: Option<String>,
    pin: Option<OneOrMany>,
    insecure: Option<bool>,
}

impl Shorthand for UpstreamTlsSection {
    const EXPECTED: &'static str = "none, starttls, implicit, or a map with mode and ca, server_name, pin or insecure";
}

/// TLS towards the servers of a backend.
#[derive(Debug, Clone)]
pub struct UpstreamTlsConfig {
    /// How TLS starts towards the servers.
    pub mode: TlsMode,
    /// Which certificates are accepted.
    pub trust: Trust,
    /// The name that certificates must contain, instead of the server's host.
    pub server_name: Option<String>,
}

/// Which certificates of servers are accepted.
#[derive(Debug, Clone)]
pub enum Trust {
    /// Those that lead to a root certificate of the system.
    System,
    /// Those that lead to a root certificate in this PEM file.
    Ca(Located<PathBuf>),
    /// Those whose public key has one of these SHA-256 digests (of the SubjectPublicKeyInfo).
    Pin(Vec<[u8; 32]>),
    /// All certificates, without verification.
    Insecure,
}

impl UpstreamTlsConfig {
    pub(super) fn validate(section: &mut Section<'_>, raw: Option<WordOrMap<TlsMode, UpstreamTlsSection>>) -> Self {
        let raw = match raw {
            Some(WordOrMap::Map(map)) => map,
            Some(WordOrMap::Word(mode)) => UpstreamTlsSection::with_mode(mode),
            None => UpstreamTlsSection::with_mode(TlsMode::default()),
        };
        let is_insecure = raw.insecure.unwrap_or(false);
        let trusts = [("ca", raw.ca.is_some()), ("pin", raw.pin.is_some()), ("insecure", is_insecure)];
        let trusts: Vec<&str> = trusts.into_iter().filter_map(|(name, is_set)| is_set.then_some(name)).collect();
        if trusts.len() > 1 {
            section.problem("", format!("{} exclude each other", trusts.join(" and ")));
        }
        if raw.mode == TlsMode::None
            && let Some(name) = trusts.first().copied().or(raw.server_name.as_ref().map(|_| "server_name"))
        {
            section.problem(name, "has no effect with mode: none");
        }
        let server_name = raw.server_name;
        if let Some(name) = server_name.as_deref().filter(|name| !is_host(name) && name.parse::<IpAddr>().is_err()) {
            section.problem("server_name", format!("expected a host name, got {name:?}"));
        }
        let trust = match (is_insecure, raw.pin, raw.ca) {
            (true, ..) => Trust::Insecure,
            (false, Some(pins), _) => Trust::Pin(check_pins(section, &pins)),
            (false, None, Some(ca)) => Trust::Ca(section.file("ca", &ca)),
            (false, None, None) => Trust::System,
        };
        Self { mode: raw.mode, trust, server_name }
    }
}

impl UpstreamTlsSection {
    fn with_mode(mode: TlsMode) -> Self {
        Self { mode, ca: None, server_name: None, pin: None, insecure: None }
    }
}

fn check_pins(section: &mut Section<'_>, pins: &OneOrMany) -> Vec<[u8; 32]> {
    let mut digests = Vec::new();
    let pins = pins.with_keys("pin");
    if pins.is_empty() {
        section.consequence("pin", "at least one pin is required");
    }
    for (key, pin) in pins {
        let digest = pin.strip_prefix("sha256:").and_then(|digest| STANDARD.decode(digest).ok());
        match digest.and_then(|digest| <[u8; 32]>::try_from(digest).ok()) {
            Some(digest) => digests.push(digest),
            None => section.problem(&key, "expected sha256: and 44 characters of base64"),
        }
    }
    digests
}
