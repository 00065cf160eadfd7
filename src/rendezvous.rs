//! Rendezvous hashing: a key always selects the same candidate, and adding or removing a candidate moves only its own share.
//!
//! Each candidate gets a score from the key and its own name, and the highest score wins (Thaler and Ravishankar, 1998, in
//! the weighted form). It needs no table, state or order: machines with the same names agree without communication. The
//! hash is SipHash-2-4 with a fixed key, so results are the same on all machines, versions and restarts. A different hash
//! would move users.

use std::hash::Hasher;

use siphasher::sip::SipHasher24;

/// The score of `candidate` for `key`. The highest wins; twice the weight wins twice the share of keys.
pub(crate) fn score(key: &[u8], candidate: &[u8], weight: u32) -> f64 {
    let mut hasher = SipHasher24::new_with_keys(0x7665_7374_6962_756c, 0x656d_6169_6c21);
    hasher.write(candidate);
    // A byte that cannot be part of a name separates ("ab", "c") from ("a", "bc").
    hasher.write_u8(0);
    hasher.write(key);
    // The upper 53 bits as a fraction in (0, 1); never 0, because its logarithm is infinite.
    #[expect(clippy::cast_precision_loss, reason = "53 bits fit an f64 exactly")]
    let fraction = ((hasher.finish() >> 11) as f64 + 0.5) / (1_u64 << 53) as f64;
    f64::from(weight) / -fraction.ln()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn winner(key: usize, candidates: &[(&str, u32)]) -> usize {
        let key = format!("user{key}@example.org");
        let scores = candidates.iter().map(|(name, weight)| score(key.as_bytes(), name.as_bytes(), *weight));
        scores.enumerate().max_by(|a, b| a.1.total_cmp(&b.1)).unwrap().0
    }

    #[test]
    fn shares_follow_weights() {
        let mut won = [0_u32; 3];
        for key in 0..30_000 {
            won[winner(key, &[("a", 1), ("b", 1), ("c", 2)])] += 1;
        }
        for (share, expected) in won.into_iter().zip([7_500, 7_500, 15_000]) {
            assert!(share.abs_diff(expected) < expected / 20, "{won:?}");
        }
    }

    #[test]
    fn new_candidate_moves_only_its_own_share() {
        let mut moved = 0;
        for key in 0..10_000 {
            let before = winner(key, &[("a", 1), ("b", 1), ("c", 1)]);
            let after = winner(key, &[("a", 1), ("b", 1), ("c", 1), ("d", 1)]);
            if before != after {
                assert_eq!(after, 3, "the user moved from one old candidate to another");
                moved += 1;
            }
        }
        assert!((2_200..2_800).contains(&moved), "{moved} of 10000 moved");
    }

    #[test]
    fn scores_are_those_of_the_first_release() {
        // A change would move users to servers that do not have their mailboxes.
        let picks: Vec<usize> = (0..12).map(|key| winner(key, &[("shard-a", 1), ("shard-b", 1)])).collect();
        assert_eq!(picks, PICKS);
    }

    const PICKS: [usize; 12] = [0, 0, 0, 1, 1, 1, 1, 1, 1, 0, 0, 1];
}
