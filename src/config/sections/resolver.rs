//! `resolver`: DNS servers.

use std::net::SocketAddr;
use std::time::Duration;

use serde::Deserialize;

use crate::config::yaml::{DurationText, Section, seconds};

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct ResolverSection {
    servers: Vec<String>,
    timeout: Option<DurationText>,
}

/// How DNS is queried.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ResolverConfig {
    /// Name servers; if empty, those of the system.
    pub servers: Vec<SocketAddr>,
    /// Timeout of one query to one server.
    pub timeout: Duration,
}

impl Default for ResolverConfig {
    fn default() -> Self {
        Self { servers: Vec::new(), timeout: Duration::from_secs(3) }
    }
}

impl ResolverSection {
    pub(super) fn check(self, section: &mut Section<'_>) -> ResolverConfig {
        ResolverConfig {
            servers: section.name_servers(&self.servers),
            timeout: section.duration("timeout", self.timeout, ResolverConfig::default().timeout, seconds(1, 60)),
        }
    }
}
