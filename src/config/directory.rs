//! Checked values of routes that ask a directory: what `config` hands to the sources of `route`.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use super::{BackendId, Located};
use crate::template::Template;

/// What an answer may say: names of columns, keys of JSON, and keys of `ldap.attributes`.
pub const ANSWER_FIELDS: [&str; 7] = ["backend", "server", "user", "master", "password", "refuse", "maintenance"];

/// What all directories have in common.
#[derive(Debug, Clone, PartialEq)]
pub struct LookupConfig {
    /// Of one question. Default 2 s.
    pub timeout: Duration,
    /// Questions, and connections, at a time. Default 8.
    pub connections: usize,
    /// `None`: every login is a question.
    pub cache: Option<CacheConfig>,
    /// What the directory calls a backend, where that is not its name here.
    pub names: BTreeMap<String, BackendId>,
}

/// How long answers are kept.
#[derive(Debug, Clone, PartialEq)]
pub struct CacheConfig {
    /// Of a user that was found. Default 1 min.
    pub ttl: Duration,
    /// Of a user that is unknown. Default 10 s.
    pub negative: Duration,
    /// How much longer an answer is good while the directory is down. Default 1 h.
    pub stale: Duration,
    /// Users at most. Default 100,000.
    pub entries: usize,
    /// Where answers are written for the next start; absent: nowhere.
    pub file: Option<Located<PathBuf>>,
}

/// `sql`.
#[derive(Debug, Clone, PartialEq)]
pub struct Sql {
    /// `postgres://`, `mysql://` or `sqlite://`.
    pub url: Located<String>,
    /// A file with the password.
    pub password: Option<Located<PathBuf>>,
    /// Columns are called as the fields of an answer.
    pub query: Template,
    /// PEM file of roots, instead of the system's; TLS is demanded then.
    pub ca: Option<Located<PathBuf>>,
    /// In common.
    pub lookup: LookupConfig,
}

/// `ldap`.
#[derive(Debug, Clone, PartialEq)]
pub struct Ldap {
    /// `ldap://` or `ldaps://`.
    pub url: Located<String>,
    /// StartTLS before anything is said.
    pub starttls: bool,
    /// PEM file of roots, instead of the system's.
    pub ca: Option<Located<PathBuf>>,
    /// Whom to bind as; absent: nobody.
    pub bind: Option<String>,
    /// A file with the password.
    pub password: Option<Located<PathBuf>>,
    /// Where to search.
    pub base: Template,
    /// How deep.
    pub scope: LdapScope,
    /// What for; values are escaped (RFC 4515).
    pub filter: Template,
    /// Fields of an answer, and the attributes they stand in.
    pub attributes: BTreeMap<String, String>,
    /// In common.
    pub lookup: LookupConfig,
}

/// `ldap.scope`, RFC 4511 section 4.5.1.2.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LdapScope {
    /// The base alone.
    Base,
    /// What is directly below it.
    One,
    /// It and everything below.
    Sub,
}

/// `http`.
#[derive(Debug, Clone, PartialEq)]
pub struct Http {
    /// `http://` or `https://`.
    pub url: Located<String>,
    /// What is spoken.
    pub style: HttpStyle,
    /// PEM file of roots, instead of the system's.
    pub ca: Option<Located<PathBuf>>,
    /// Sent with every question.
    pub headers: BTreeMap<String, String>,
    /// A file with a bearer token.
    pub token: Option<Located<PathBuf>>,
    /// Whether the source is told the password, and says whether it is right.
    pub password: bool,
    /// Whether `style: nginx-auth-http` is told the client's whole certificate.
    pub client_certificate: bool,
    /// The backend of addresses in `networks`.
    pub backend: Option<BackendId>,
    /// Addresses the source may name although no server is declared there.
    pub networks: Vec<Network>,
    /// In common.
    pub lookup: LookupConfig,
}

/// `http.style`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HttpStyle {
    /// A JSON object each way.
    Json,
    /// The headers of nginx's mail module.
    NginxAuthHttp,
}

/// `redis`.
#[derive(Debug, Clone, PartialEq)]
pub struct Redis {
    /// Where.
    pub servers: RedisServers,
    /// Whom to log in as (ACL), where that is not `default`.
    pub user: Option<String>,
    /// A file with the password.
    pub password: Option<Located<PathBuf>>,
    /// PEM file of roots, instead of the system's.
    pub ca: Option<Located<PathBuf>>,
    /// The key of a user.
    pub key: Template,
    /// A field of the hash at the key; absent: the key's own value.
    pub field: Option<String>,
    /// In common.
    pub lookup: LookupConfig,
}

/// Which Redis.
#[derive(Debug, Clone, PartialEq)]
pub enum RedisServers {
    /// One server: `redis://` or `rediss://`.
    Server(Located<String>),
    /// The master that Sentinels name.
    Sentinel {
        /// URLs of Sentinels.
        urls: Vec<Located<String>>,
        /// What they call it.
        master: String,
    },
    /// A cluster, by some of its servers.
    Cluster(Vec<Located<String>>),
}

/// `dns`.
#[derive(Debug, Clone, PartialEq)]
pub struct Dns {
    /// What is asked.
    pub query: DnsQuery,
    /// Name servers; none: those of `resolver`.
    pub servers: Vec<SocketAddr>,
    /// In common.
    pub lookup: LookupConfig,
}

/// `dns.txt` or `dns.srv`.
#[derive(Debug, Clone, PartialEq)]
pub enum DnsQuery {
    /// The text names the backend.
    Txt(Template),
    /// The target with the lowest priority is looked up in `names`.
    Srv(Template),
}

/// An address and how many of its first bits count.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Network {
    address: IpAddr,
    bits: u8,
}

impl Network {
    /// `10.0.0.0/8`, `2001:db8::/32`, or one address.
    pub fn parse(text: &str) -> Option<Self> {
        let (address, bits) = match text.split_once('/') {
            Some((address, bits)) => (address, Some(bits)),
            None => (text, None),
        };
        let address: IpAddr = address.parse().ok()?;
        let most = if address.is_ipv4() { 32 } else { 128 };
        let bits = match bits {
            None => most,
            // `parse` alone would take "+8".
            Some(bits) if bits.bytes().all(|byte| byte.is_ascii_digit()) => bits.parse().ok()?,
            Some(_) => return None,
        };
        (bits <= most).then_some(Self { address, bits })
    }

    /// The address as written, and how many of its first bits count.
    pub fn parts(&self) -> (IpAddr, u8) {
        (self.address, self.bits)
    }

    /// Whether `address` is in it; an IPv4 address in IPv6 clothes counts as IPv4.
    pub fn contains(&self, address: IpAddr) -> bool {
        let prefix = |bits: u128, width: u32| bits.checked_shr(width - u32::from(self.bits)).unwrap_or(0);
        match (self.address.to_canonical(), address.to_canonical()) {
            (IpAddr::V4(own), IpAddr::V4(other)) if self.address.is_ipv4() => {
                prefix(u128::from(own.to_bits()), 32) == prefix(u128::from(other.to_bits()), 32)
            }
            (IpAddr::V6(own), IpAddr::V6(other)) => prefix(own.to_bits(), 128) == prefix(other.to_bits(), 128),
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks_contain_their_addresses() {
        for (network, inside, outside) in [
            ("10.0.0.0/8", "10.255.0.1", "11.0.0.0"),
            ("192.0.2.7", "192.0.2.7", "192.0.2.6"),
            ("192.0.2.128/25", "::ffff:192.0.2.200", "192.0.2.1"),
            ("2001:db8::/32", "2001:db8:ffff::1", "2001:db9::"),
        ] {
            let network = Network::parse(network).unwrap();
            assert!(network.contains(inside.parse().unwrap()), "{network:?} {inside}");
            assert!(!network.contains(outside.parse().unwrap()), "{network:?} {outside}");
        }
        assert!(Network::parse("0.0.0.0/0").unwrap().contains("203.0.113.1".parse().unwrap()));
        assert!(!Network::parse("0.0.0.0/0").unwrap().contains("2001:db8::1".parse().unwrap()));
        for wrong in ["10.0.0.0/33", "10.0.0/8", "::/129", "10.0.0.0/+8", "10.0.0.0/", "mail.internal"] {
            assert_eq!(Network::parse(wrong), None, "{wrong}");
        }
    }
}
