//! Route every user by a hash of the name: a backend more or less moves only its own share (see `rendezvous`).

use super::Answer;
use crate::config::{BackendId, Config};
use crate::rendezvous;

/// Backends that share all users.
#[derive(Debug)]
pub(super) struct Hash(Vec<(String, BackendId)>);

impl Hash {
    /// Backends count by their names, so their order does not matter.
    pub(super) fn new(config: &Config, backends: &[BackendId]) -> Self {
        Self(backends.iter().map(|id| (config.backends[id.0].name.clone(), *id)).collect())
    }

    /// Knows every user.
    pub(super) fn lookup(&self, key: &str) -> Answer {
        let score = |name: &str| rendezvous::score(key.as_bytes(), name.as_bytes(), 1);
        self.0
            .iter()
            .max_by(|a, b| score(&a.0).total_cmp(&score(&b.0)))
            .map_or(Answer::Unknown, |(_, backend)| Answer::Found(*backend))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn order_does_not_matter_and_all_get_a_share() {
        let names = ["shard-a", "shard-b", "shard-c"];
        let entry = |index: usize| (names[index].to_owned(), BackendId(index));
        let one = Hash(vec![entry(0), entry(1), entry(2)]);
        let other = Hash(vec![entry(2), entry(0), entry(1)]);
        let mut seen = [false; 3];
        for user in 0..100 {
            let key = format!("user{user}");
            let Answer::Found(backend) = one.lookup(&key) else { panic!("{key} is unknown") };
            assert_eq!(other.lookup(&key), Answer::Found(backend));
            seen[backend.0] = true;
        }
        assert_eq!(seen, [true; 3]);
    }
}
