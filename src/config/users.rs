//! `users`: what users are called, and who may log in as whom. Called by `check`.

use super::Network;
use super::check::networks;
use super::read::Reader;
use super::users_file::{CaseWord, LogNameWord, ServerNameWord, UnicodeWord, UsersMap};
use crate::identity::{LogName, NamingRules, UnicodeRule};

/// The rules for names, and the networks that logins on behalf of others may come from.
pub(super) fn users(reader: &mut Reader<'_>, written: UsersMap) -> (NamingRules, Option<Vec<Network>>) {
    let separators = written.separators.unwrap_or_default();
    if separators.chars().any(|char| char == '@' || char.is_alphanumeric() || char.is_control()) {
        reader.problem("users.separators", "expected punctuation, like \"%\": these characters stand for @");
    }
    let default_domain = written.default_domain.map(|domain| domain.trim_start_matches('@').to_owned());
    if let Some(domain) = &default_domain
        && (domain.is_empty() || domain.contains(|char: char| char == '@' || char.is_whitespace() || char.is_control()))
    {
        reader.problem("users.default_domain", "expected a domain, like example.org");
    }
    let detail = one(reader, "users.detail", written.detail);
    let master_separator = one(reader, "users.masters.separator", written.masters.separator);
    if master_separator.is_some() && master_separator == detail {
        reader.problem("users.masters.separator", "is what begins a detail already");
    }
    if written.server == ServerNameWord::Normalised
        && default_domain.as_ref().zip(master_separator).is_some_and(|(domain, separator)| domain.contains(separator))
    {
        reader.problem("users.masters.separator", "occurs in users.default_domain, which servers are given");
    }
    let networks = written.masters.networks.map(|texts| networks(reader, "users.masters.networks", &texts));
    let naming = NamingRules {
        lower_case: written.case == CaseWord::Lower,
        unicode: match written.unicode {
            UnicodeWord::Keep => UnicodeRule::Keep,
            UnicodeWord::Refuse => UnicodeRule::Refuse,
            UnicodeWord::Precis => UnicodeRule::Precis,
        },
        separators: separators.chars().collect(),
        default_domain: default_domain.map(Into::into),
        detail,
        server_normalised: written.server == ServerNameWord::Normalised,
        log: match written.log {
            LogNameWord::AsSent => LogName::AsSent,
            LogNameWord::Normalised => LogName::Normalised,
            LogNameWord::Hashed => LogName::Hashed,
        },
        master_separator,
    };
    (naming, networks)
}

/// One character that is no part of a name otherwise.
fn one(reader: &mut Reader<'_>, key: &str, text: Option<String>) -> Option<char> {
    let text = text?;
    let mut chars = text.chars();
    match (chars.next(), chars.next()) {
        (Some(char), None) if char != '@' && char.is_ascii_punctuation() => Some(char),
        _ => {
            reader.problem(key, "expected one punctuation character other than @");
            None
        }
    }
}
