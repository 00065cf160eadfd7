//! The ring of Dovecot's director, so that its users stay where they are when Vestibule takes over.
//!
//! As Dovecot 2.3 has it (src/director/mail-host.c, src/lib-mail/mail-user-hash.c): a host stands at as many points of a
//! 32-bit ring as it has vhosts, 100 by default, each the first four bytes of MD5("host-number"). A user's point is the
//! first four bytes of the MD5 of the lower-cased name, 1 where they are 0; the user belongs to the host at the next
//! point, and behind the last point the first follows. tests/real asks a real director whether that is so.

use std::sync::Arc;

use md5::{Digest as _, Md5};

use crate::config::HashShare;
use crate::route::decision::RouteDecision;

/// vhosts of a weight of 1: what a director's host has by default.
const POINTS_A_WEIGHT: u32 = 100;

/// Points in order, each with its backend.
#[derive(Debug)]
pub(in crate::route) struct Ring(Vec<(u32, Arc<RouteDecision>)>);

impl Ring {
    pub(in crate::route) fn new(shares: &[HashShare]) -> Self {
        let mut points = Vec::new();
        for share in shares {
            let target: Arc<RouteDecision> = RouteDecision::backend(share.backend).into();
            for host in &share.hosts {
                let numbers = 0..share.weight * POINTS_A_WEIGHT;
                points.extend(numbers.map(|number| (point(&format!("{host}-{number}")), target.clone())));
            }
        }
        points.sort_by_key(|(point, _)| *point);
        Self(points)
    }

    pub(in crate::route) fn lookup(&self, user: &str) -> Option<&Arc<RouteDecision>> {
        // ASCII alone: Dovecot's %L leaves all other letters as they are.
        let user = point(&user.to_ascii_lowercase()).max(1);
        let next = self.0.partition_point(|(point, _)| *point < user);
        self.0.get(next).or(self.0.first()).map(|(_, target)| target)
    }
}

/// The first four bytes of the MD5.
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
    fn the_point_of_a_name() {
        // RFC 1321 appendix A.5: MD5("abc") is 90015098…
        assert_eq!(point("abc"), 0x9001_5098);
    }

    #[test]
    fn letters_do_not_matter_and_weights_do() {
        let ring = ring();
        let mut seen = [0_u32; 3];
        for user in 0..4000 {
            let target = ring.lookup(&format!("user{user}@example.org")).unwrap();
            assert_eq!(ring.lookup(&format!("USER{user}@Example.ORG")), Some(target));
            let RouteDecision::Destination(place) = &**target else { panic!() };
            seen[place.backend.0] += 1;
        }
        assert!(seen[0] > 600 && seen[1] > 600 && seen[2] > 1500, "{seen:?}");
    }

    #[test]
    fn behind_the_last_point_the_first_follows() {
        let target = |index| Arc::new(RouteDecision::backend(BackendId(index)));
        let user = point("alice");
        let ring = Ring(vec![(1, target(0)), (user - 1, target(1))]);
        assert_eq!(ring.lookup("alice"), Some(&target(0)));
        let ring = Ring(vec![(1, target(0)), (user, target(1)), (user, target(2))]);
        assert_eq!(ring.lookup("Alice"), Some(&target(1)), "its own point counts");
    }

    #[test]
    fn letters_beyond_ascii_keep_their_case() {
        let target = |index| Arc::new(RouteDecision::backend(BackendId(index)));
        let user = point("z\u{d6}e");
        let ring = Ring(vec![(user - 1, target(1)), (user, target(0))]);
        assert_eq!(ring.lookup("Z\u{d6}E"), Some(&target(0)));
    }
}
