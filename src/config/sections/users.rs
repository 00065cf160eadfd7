//! `users`: which spellings are one user, and networks of master logins.

use serde::Deserialize;

use crate::config::network::Network;
use crate::config::yaml::Section;
use crate::identity::{LogName, NamingRules, UnicodeRule};

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct UsersSection {
    case: Case,
    unicode: UnicodeRule,
    separators: Option<String>,
    default_domain: Option<String>,
    detail: Option<String>,
    server: ServerName,
    log: LogName,
    masters: MastersSection,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct MastersSection {
    separator: Option<String>,
    networks: Option<Vec<String>>,
}

/// Letter case of names in lookups, from A to Z.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Case {
    #[default]
    Lower,
    Keep,
}

/// The name that servers receive.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum ServerName {
    #[default]
    AsSent,
    Normalised,
}

impl UsersSection {
    /// Returns the rules for names, and the networks from which master logins are accepted; `None` means from everywhere.
    pub(super) fn check(self, section: &mut Section<'_>) -> (NamingRules, Option<Vec<Network>>) {
        let separators = self.separators.unwrap_or_default();
        if separators.chars().any(|char| char == '@' || char.is_alphanumeric() || char.is_control()) {
            section.problem("separators", "expected punctuation characters that stand for @, like \"%\"");
        }
        let default_domain = self.default_domain.map(|domain| domain.trim_start_matches('@').to_owned());
        if default_domain.as_deref().is_some_and(|domain| !is_domain(domain)) {
            section.problem("default_domain", "expected a domain, like example.org");
        }
        let detail = check_separator(section, "detail", self.detail);
        let master_separator = check_separator(section, "masters.separator", self.masters.separator);
        if master_separator.is_some() && master_separator == detail {
            section.problem("masters.separator", "must differ from users.detail");
        }
        let server_normalised = self.server == ServerName::Normalised;
        if let (true, Some(domain), Some(separator)) = (server_normalised, &default_domain, master_separator)
            && domain.contains(separator)
        {
            section.problem(
                "masters.separator",
                "must not occur in users.default_domain, which server: normalised appends to names",
            );
        }
        let networks = self.masters.networks.map(|texts| section.networks("masters.networks", &texts));
        let naming = NamingRules {
            lower_case: self.case == Case::Lower,
            unicode: self.unicode,
            separators: separators.chars().collect(),
            default_domain: default_domain.map(Into::into),
            detail,
            server_normalised,
            log: self.log,
            master_separator,
        };
        (naming, networks)
    }
}

fn is_domain(text: &str) -> bool {
    !text.is_empty() && !text.contains(|char: char| char == '@' || char.is_whitespace() || char.is_control())
}

/// A single character that separates the parts of a name.
fn check_separator(section: &mut Section<'_>, name: &str, text: Option<String>) -> Option<char> {
    let text = text?;
    let mut chars = text.chars();
    match (chars.next(), chars.next()) {
        (Some(char), None) if char != '@' && char.is_ascii_punctuation() => Some(char),
        _ => {
            section.problem(name, "expected one punctuation character other than @");
            None
        }
    }
}
