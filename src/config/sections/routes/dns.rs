//! `dns`: TXT or SRV records.

use std::net::SocketAddr;

use serde_yaml::Value;

use super::Route;
use super::lookup::{LookupConfig, RouteReader, lookup_section};
use crate::template::Template;

lookup_section! {
    DnsSection {
        txt: Option<String>,
        srv: Option<String>,
        #[serde(default)]
        servers: Vec<String>,
    }
}

/// A source that consists of DNS records.
#[derive(Debug, Clone, PartialEq)]
pub struct Dns {
    /// The query for a user.
    pub query: DnsQuery,
    /// Name servers; if empty, those of `resolver`.
    pub servers: Vec<SocketAddr>,
    /// How it is queried.
    pub lookup: LookupConfig,
}

/// The query for a user: type and name of the record.
#[derive(Debug, Clone, PartialEq)]
pub enum DnsQuery {
    /// A TXT record that contains the backend.
    Txt(Template),
    /// An SRV record whose target with the lowest priority is looked up in `names`.
    Srv(Template),
}

pub(super) fn check(mut reader: RouteReader<'_>, value: Value) -> Option<Route> {
    let mut raw: DnsSection = reader.section.read(value)?;
    let lookup = raw.take_lookup();
    let lookup = reader.lookup(lookup);
    let query = match (raw.txt, raw.srv) {
        (Some(txt), None) => DnsQuery::Txt(reader.template_with_user("txt", &txt)?),
        (None, Some(srv)) => {
            if lookup.names.is_empty() {
                reader.problem("names", "is required for targets of SRV records, like {mail1.internal: BACKEND}");
            }
            DnsQuery::Srv(reader.template_with_user("srv", &srv)?)
        }
        _ => {
            reader.problem("", "expected exactly one of txt, srv");
            return None;
        }
    };
    let servers = reader.section.name_servers(&raw.servers);
    Some(Route::Dns(Box::new(Dns { query, servers, lookup })))
}
