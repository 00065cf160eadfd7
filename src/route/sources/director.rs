//! The hash ring of Dovecot's director, so that users keep their hosts when Vestibule replaces a director.
//!
//! As in Dovecot 2.3 (src/director/mail-host.c, src/lib-mail/mail-user-hash.c), a host has as many points on a 32-bit ring as it has
//! vhosts, 100 by default, each the first four bytes of MD5("host-number"). A user's point is the first four bytes of the MD5 of the
//! lower-cased name, or 1 if they are 0; the user belongs to the host at the next point, and the first point follows the last one.
//! tests/real compares the result with a real director.

use std::sync::Arc;

use md5::{Digest as _, Md5};

use crate::config::HashShare;
use crate::route::decision::RouteDecision;

/// Points of a backend of weight 1: the default number of vhosts of a host.
const POINTS_PER_WEIGHT: u32 = 100;

/// The points in ascending order, each with its backend.
#[derive(Debug)]
pub(in crate::route) struct Ring(Vec<(u32, Arc<RouteDecision>)>);

impl Ring {
    pub(in crate::route) fn new(shares: &[HashShare]) -> Self {
        let mut points = Vec::new();
        for share in shares {
            let decision: Arc<RouteDecision> = RouteDecision::backend(share.backend).into();
            for host in &share.hosts {
                let numbers = 0..share.weight * POINTS_PER_WEIGHT;
                points.extend(numbers.map(|number| (point(&format!("{host}-{number}")), decision.clone())));
            }
        }
        points.sort_by_key(|(point, _)| *point);
        Self(points)
    }

    pub(in crate::route) fn lookup(&self, user: &str) -> Option<&Arc<RouteDecision>> {
        // Only ASCII letters: Dovecot's %L leaves all other letters unchanged.
        let user = point(&user.to_ascii_lowercase()).max(1);
        let next = self.0.partition_point(|(point, _)| *point < user);
        self.0.get(next).or(self.0.first()).map(|(_, decision)| decision)
    }
}

/// The first four bytes of the MD5 of a text.
fn point(text: &str) -> u32 {
    let digest = Md5::digest(text.as_bytes());
    digest.iter().take(4).fold(0, |point, byte| point << 8 | u32::from(*byte))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::BackendId;

    fn ring() -> Ring {
        let share = |index: usize, weight: u32| HashShare {
            backend: BackendId(index),
            weight,
            hosts: vec![format!("10.0.0.{}", index + 1)],
        };
        Ring::new(&[share(0, 1), share(1, 1), share(2, 2)])
    }

    #[test]
    fn point_is_the_beginning_of_the_md5() {
        // RFC 1321 appendix A.5: MD5("abc") is 90015098…
        assert_eq!(point("abc"), 0x9001_5098);
    }

    #[test]
    fn case_does_not_matter_and_weights_do() {
        let ring = ring();
        let mut seen = [0_u32; 3];
        for user in 0..4000 {
            let decision = ring.lookup(&format!("user{user}@example.org")).unwrap();
            assert_eq!(ring.lookup(&format!("USER{user}@Example.ORG")), Some(decision));
            let RouteDecision::Destination(destination) = &**decision else { panic!() };
            seen[destination.backend.0] += 1;
        }
        assert!(seen[0] > 600 && seen[1] > 600 && seen[2] > 1500, "{seen:?}");
    }

    #[test]
    fn first_point_follows_the_last() {
        let decision = |index| Arc::new(RouteDecision::backend(BackendId(index)));
        let user = point("alice");
        let ring = Ring(vec![(1, decision(0)), (user - 1, decision(1))]);
        assert_eq!(ring.lookup("alice"), Some(&decision(0)));
        let ring = Ring(vec![(1, decision(0)), (user, decision(1)), (user, decision(2))]);
        assert_eq!(ring.lookup("Alice"), Some(&decision(1)), "a point equal to the user's counts");
    }

    #[test]
    fn non_ascii_letters_keep_their_case() {
        let decision = |index| Arc::new(RouteDecision::backend(BackendId(index)));
        let user = point("z\u{d6}e");
        let ring = Ring(vec![(user - 1, decision(1)), (user, decision(0))]);
        assert_eq!(ring.lookup("Z\u{d6}E"), Some(&decision(0)));
    }
}
