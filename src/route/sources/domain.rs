//! Routes by the part of the user name after its last `@`.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::config::BackendId;
use crate::route::LookupResult;
use crate::route::decision::RouteDecision;

/// The backend of each domain.
#[derive(Debug)]
pub(in crate::route) struct Domains(BTreeMap<String, Arc<RouteDecision>>);

impl Domains {
    /// Expects `domains` in lower case.
    pub(in crate::route) fn new(domains: &BTreeMap<String, BackendId>) -> Self {
        Self(
            domains.iter().map(|(domain, backend)| (domain.clone(), RouteDecision::backend(*backend).into())).collect(),
        )
    }

    /// A user name without `@`, or with an undeclared domain, is unknown.
    pub(in crate::route) fn lookup(&self, user: &str) -> LookupResult {
        let decision = user.rsplit_once('@').and_then(|(_, domain)| self.0.get(domain));
        decision.cloned().map_or(LookupResult::Unknown, LookupResult::Found)
    }

    pub(in crate::route) fn len(&self) -> usize {
        self.0.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn domain_follows_the_last_at_sign() {
        let domains = Domains::new(&BTreeMap::from([("a.test".into(), BackendId(0)), ("b.test".into(), BackendId(1))]));
        let found = |index| LookupResult::Found(RouteDecision::backend(BackendId(index)).into());
        assert_eq!(domains.lookup("alice@a.test"), found(0));
        assert_eq!(domains.lookup("odd@a.test@b.test"), found(1));
        for unknown in ["alice", "alice@c.test", "alice@", "a.test"] {
            assert_eq!(domains.lookup(unknown), LookupResult::Unknown, "{unknown}");
        }
    }
}
