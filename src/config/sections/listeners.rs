//! `listeners`: ports that clients connect to.

use std::net::SocketAddr;

use serde::Deserialize;
use serde_yaml::Value;

use super::client_certificates::{ClientCertificates, ClientCertificatesSection};
use super::tls::{TlsMode, TlsVersion};
use crate::config::error::Location;
use crate::config::network::Network;
use crate::config::yaml::Section;
use crate::identity::{Mechanism, Mechanisms};

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ListenerSection {
    address: String,
    tls: TlsMode,
    mechanisms: Option<Vec<String>>,
    tls_min: Option<TlsVersion>,
    sni: Option<SniPolicy>,
    alpn: Option<AlpnPolicy>,
    client_certificates: Option<ClientCertificatesSection>,
    proxy_protocol: Option<ProxyProtocolSection>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ProxyProtocolSection {
    from: Vec<String>,
}

/// A port that clients connect to.
#[derive(Debug, Clone)]
pub struct Listener {
    /// Address and port. Port 0 means any free port.
    pub address: SocketAddr,
    /// How TLS starts on its connections.
    pub tls: TlsMode,
    /// Mechanisms offered to clients; `None` means those that the servers of all backends offer.
    pub mechanisms: Option<Mechanisms>,
    /// Oldest accepted version of TLS.
    pub tls_min: TlsVersion,
    /// Server names (SNI) that clients may send.
    pub sni: SniPolicy,
    /// Application protocols (ALPN) that clients may offer.
    pub alpn: AlpnPolicy,
    /// Certificates requested from clients.
    pub client_certificates: Option<ClientCertificates>,
    /// Networks from which every connection starts with a PROXY header; all others are refused. `None` means that
    /// connections have no PROXY header.
    pub proxy_protocol: Option<Vec<Network>>,
    /// Location of the address.
    pub location: Location,
}

/// Server names (SNI) that clients may send.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SniPolicy {
    /// Any name or none: the first certificate is used if no other matches.
    #[default]
    Any,
    /// A name for which there is a certificate.
    Strict,
}

/// Application protocols (ALPN) that clients may offer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AlpnPolicy {
    /// A list that contains `imap`, or none.
    #[default]
    Strict,
    /// Any list of protocols, or none.
    Any,
}

pub(super) fn check(mut section: Section<'_>, items: Vec<Value>) -> Vec<Listener> {
    if items.is_empty() {
        section.consequence("", "at least one listener is required");
    }
    let mut listeners = Vec::new();
    for (index, item) in items.into_iter().enumerate() {
        let mut section = section.child(&format!("[{index}]"));
        let Some(raw) = section.read::<ListenerSection>(item) else { continue };
        listeners.extend(raw.check(&mut section));
    }
    listeners
}

impl ListenerSection {
    fn check(self, section: &mut Section<'_>) -> Option<Listener> {
        let address = section.socket_address("address", &self.address, "[::]:993")?;
        let mechanisms = self.mechanisms.map(|names| check_mechanisms(section, &names));
        if self.tls == TlsMode::None {
            let without_effect = [
                ("tls_min", self.tls_min.is_some()),
                ("sni", self.sni.is_some()),
                ("alpn", self.alpn.is_some()),
                ("client_certificates", self.client_certificates.is_some()),
            ];
            for (name, _) in without_effect.into_iter().filter(|(_, is_set)| *is_set) {
                section.problem(name, "has no effect with tls: none");
            }
        }
        let client_certificates =
            self.client_certificates.map(|it| it.check(&mut section.child("client_certificates")));
        let proxy_protocol = self.proxy_protocol.map(|it| {
            if it.from.is_empty() {
                section.problem(
                    "proxy_protocol.from",
                    "at least one network is required; without any, no client can connect",
                );
            }
            section.networks("proxy_protocol.from", &it.from)
        });
        Some(Listener {
            address,
            tls: self.tls,
            mechanisms,
            tls_min: self.tls_min.unwrap_or_default(),
            sni: self.sni.unwrap_or_default(),
            alpn: self.alpn.unwrap_or_default(),
            client_certificates,
            proxy_protocol,
            location: section.location("address"),
        })
    }
}

/// Mechanisms by their SASL names; `login` also means the command LOGIN.
fn check_mechanisms(section: &mut Section<'_>, names: &[String]) -> Mechanisms {
    if names.is_empty() {
        section.problem("mechanisms", "at least one mechanism is required; without any, no client can log in");
    }
    let mut mechanisms = Mechanisms::default();
    for (index, name) in names.iter().enumerate() {
        match Mechanism::by_sasl_name(name.as_bytes()) {
            Some(Mechanism::SaslLogin) => {
                mechanisms = mechanisms.with(Mechanism::SaslLogin).with(Mechanism::Login);
            }
            Some(mechanism) => mechanisms = mechanisms.with(mechanism),
            None => {
                let names =
                    Mechanism::ALL.into_iter().filter_map(|known| Some(known.sasl_name()?.to_ascii_lowercase()));
                let known: Vec<String> = names.collect();
                section.unknown(&format!("mechanisms[{index}]"), "mechanism", name, &known);
            }
        }
    }
    mechanisms
}
