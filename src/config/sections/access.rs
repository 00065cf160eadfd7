//! `access`: networks that may connect, may not, or are exempt from limits.

use serde::Deserialize;

use crate::config::network::Network;
use crate::config::yaml::Section;

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct AccessSection {
    allow: Vec<String>,
    deny: Vec<String>,
    exempt: Vec<String>,
}

/// Networks that may connect. The narrowest network that contains the client decides; of two equal ones, `deny`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AccessConfig {
    /// If any is given, clients outside all of these networks are refused.
    pub allow: Vec<Network>,
    /// Networks whose clients are refused.
    pub deny: Vec<Network>,
    /// Networks whose clients are accepted without limits and delays, such as webmail and monitoring.
    pub exempt: Vec<Network>,
}

impl AccessSection {
    pub(super) fn check(self, section: &mut Section<'_>) -> AccessConfig {
        AccessConfig {
            allow: section.networks("allow", &self.allow),
            deny: section.networks("deny", &self.deny),
            exempt: section.networks("exempt", &self.exempt),
        }
    }
}
