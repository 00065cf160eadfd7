//! Route by the part of the user name behind its last `@`.

use std::collections::BTreeMap;

use super::Answer;
use crate::config::BackendId;

/// Domains and their backends.
#[derive(Debug)]
pub(super) struct Domains(BTreeMap<String, BackendId>);

impl Domains {
    /// `domains` are in lower case already.
    pub(super) fn new(domains: BTreeMap<String, BackendId>) -> Self {
        Self(domains)
    }

    /// A name without `@`, or with an undeclared domain, is unknown.
    pub(super) fn lookup(&self, key: &str) -> Answer {
        key.rsplit_once('@')
            .and_then(|(_, domain)| self.0.get(domain))
            .map_or(Answer::Unknown, |backend| Answer::Found(*backend))
    }

    /// Number of domains.
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_at_sign_counts() {
        let domains = Domains::new(BTreeMap::from([("a.test".into(), BackendId(0)), ("b.test".into(), BackendId(1))]));
        assert_eq!(domains.lookup("alice@a.test"), Answer::Found(BackendId(0)));
        assert_eq!(domains.lookup("odd@a.test@b.test"), Answer::Found(BackendId(1)));
        for unknown in ["alice", "alice@c.test", "alice@", "a.test"] {
            assert_eq!(domains.lookup(unknown), Answer::Unknown, "{unknown}");
        }
    }
}
