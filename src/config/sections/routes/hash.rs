//! `hash`: backends that share all users by consistent hashing.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_yaml::Value;

use super::{DeclaredBackends, Route};
use crate::config::sections::backends::BackendId;
use crate::config::yaml::{OneOrMany, Section, Shorthand, WordOrMap};

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct HashSection {
    #[serde(default)]
    style: HashStyle,
    /// Values are a weight, or [`ShareSection`].
    backends: BTreeMap<String, Value>,
}

impl Shorthand for HashSection {
    const EXPECTED: &'static str = "a list of backends, or a map with backends and style";
}

/// A value of `hash.backends` that is not a number.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct ShareSection {
    weight: Option<i64>,
    host: Option<OneOrMany>,
}

/// Algorithm that distributes users over backends.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HashStyle {
    /// Rendezvous hashing, weighted by share.
    #[default]
    Vestibule,
    /// The hash ring of Dovecot's director.
    Director,
}

/// A backend's share of users.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HashShare {
    /// The backend that has the share.
    pub backend: BackendId,
    /// Weight, from 1 to 1000.
    pub weight: u32,
    /// Addresses of the backend's servers in the director's ring; empty with other styles.
    pub hosts: Vec<String>,
}

/// A backend as written, with its key.
struct Entry {
    key: String,
    name: String,
    share: Option<Value>,
}

pub(super) fn check(
    section: &mut Section<'_>,
    declared: &DeclaredBackends<'_>,
    raw: WordOrMap<Vec<String>, HashSection>,
) -> Route {
    let (style, entries) = entries(raw);
    if entries.is_empty() {
        section.consequence("", "at least one backend is required");
    }
    let mut shares: Vec<HashShare> = Vec::new();
    for Entry { key, name, share } in entries {
        let Some((weight, hosts)) = check_share(&mut section.child(&key), style, share) else { continue };
        let Some(backend) = declared.resolve(section, &key, &name) else { continue };
        if shares.iter().any(|other| other.backend == backend) {
            section.problem(&key, format!("duplicate backend {name:?}"));
        }
        shares.push(HashShare { backend, weight, hosts });
    }
    Route::Hash { style, shares }
}

fn entries(raw: WordOrMap<Vec<String>, HashSection>) -> (HashStyle, Vec<Entry>) {
    match raw {
        WordOrMap::Word(names) => {
            let indexed = names.into_iter().enumerate();
            let entries = indexed.map(|(index, name)| Entry { key: format!("[{index}]"), name, share: None });
            (HashStyle::default(), entries.collect())
        }
        WordOrMap::Map(map) => {
            let entries = map.backends.into_iter();
            let entries =
                entries.map(|(name, share)| Entry { key: format!("backends.{name}"), name, share: Some(share) });
            (map.style, entries.collect())
        }
    }
}

/// Returns the weight and the director's hosts.
fn check_share(section: &mut Section<'_>, style: HashStyle, share: Option<Value>) -> Option<(u32, Vec<String>)> {
    let raw = match share {
        None => ShareSection::default(),
        Some(Value::Number(number)) => {
            let Some(weight) = number.as_i64() else {
                section.problem("weight", "expected a whole number");
                return None;
            };
            ShareSection { weight: Some(weight), host: None }
        }
        Some(value) => section.read(value)?,
    };
    match (style, &raw.host) {
        (HashStyle::Director, None) => {
            section.problem("", "requires `host`: the addresses of its servers in the director's ring");
        }
        (HashStyle::Vestibule, Some(_)) => section.problem("host", "requires style: director"),
        _ => {}
    }
    let weight = section.number("weight", raw.weight, 1, 1..=1000);
    Some((weight, raw.host.map(OneOrMany::into_vec).unwrap_or_default()))
}
