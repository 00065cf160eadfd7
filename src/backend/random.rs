//! Random numbers for balancing and jitter.

use std::hash::{BuildHasher as _, RandomState};

/// A random number from 0 up to, but not including, 1. The standard library's random state is unpredictable enough for this.
pub(super) fn random_fraction() -> f64 {
    let bits = RandomState::new().hash_one(0_u8);
    #[expect(clippy::cast_precision_loss, reason = "53 bits fit an f64 exactly")]
    let fraction = (bits >> 11) as f64 / (1_u64 << 53) as f64;
    fraction
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn random_fractions_are_spread_over_the_interval() {
        let drawn: Vec<f64> = (0..1000).map(|_| random_fraction()).collect();
        assert!(drawn.iter().all(|fraction| (0.0..1.0).contains(fraction)));
        let lower = drawn.iter().filter(|fraction| **fraction < 0.5).count();
        // Six standard deviations: fails by chance once in 500 million runs.
        assert!((400..600).contains(&lower), "{lower} of 1000 in the lower half");
    }
}
