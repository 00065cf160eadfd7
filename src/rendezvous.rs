//! Rendezvous hashing: the same key picks the same candidate, and a candidate more or less moves only its own share.
//!
//! Every candidate gets a score from the key and its own name; the highest wins (Thaler and Ravishankar, 1998, in the
//! weighted form). No table, no state, no order: two machines with the same names agree without talking. The hash is
//! SipHash-2-4 with a fixed key, so results stay the same over versions, machines and restarts; changing it would move
//! users. Called by `route::hash` (users to backends) and `backend::select` (users to servers).

use std::hash::Hasher;

use siphasher::sip::SipHasher24;

/// The score of `candidate` for `key`: higher is better, doubling the weight doubles the share of keys won.
pub(crate) fn score(key: &[u8], candidate: &[u8], weight: u32) -> f64 {
    let mut hasher = SipHasher24::new_with_keys(0x7665_7374_6962_756c, 0x656d_6169_6c21);
    hasher.write(candidate);
    // A byte that no name holds keeps ("ab", "c") and ("a", "bc") apart.
    hasher.write_u8(0);
    hasher.write(key);
    // The upper 53 bits as a fraction in (0, 1): never 0, whose logarithm is infinite.
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
    fn a_new_candidate_moves_only_its_own_share() {
        let mut moved = 0;
        for key in 0..10_000 {
            let before = winner(key, &[("a", 1), ("b", 1), ("c", 1)]);
            let after = winner(key, &[("a", 1), ("b", 1), ("c", 1), ("d", 1)]);
            if before != after {
                assert_eq!(after, 3, "a user moved between two old candidates");
                moved += 1;
            }
        }
        assert!((2_200..2_800).contains(&moved), "{moved} of 10000 moved");
    }

    #[test]
    fn the_scores_are_those_of_the_first_release() {
        // Users are where these figures put them; a change here moves mailboxes.
        let picks: Vec<usize> = (0..12).map(|key| winner(key, &[("shard-a", 1), ("shard-b", 1)])).collect();
        assert_eq!(picks, PICKS);
    }

    const PICKS: [usize; 12] = [0, 0, 0, 1, 1, 1, 1, 1, 1, 0, 0, 1];
}
