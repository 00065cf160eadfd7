//! How servers word the refusal of a password, so that a refusal without a server reads the same.

use std::sync::Arc;

use crate::admission::AddressBlock;

/// The wording of one backend's refusals.
#[derive(Debug, Default)]
pub(super) struct Wording {
    last: Option<Seen>,
    /// The last answer that two different users got in a row, so that it names neither of them.
    common: Option<Arc<[u8]>>,
    /// Refusals of more than one client have been seen.
    has_clients: bool,
}

/// The last refusal.
#[derive(Debug)]
struct Seen {
    /// Hash of the user.
    user: u64,
    client: AddressBlock,
    answer: Box<[u8]>,
}

impl Wording {
    /// A server refused a password of `user` that `client` sent with this answer, without the tag.
    ///
    /// The two users must have come from different clients, so that nobody replaces the common answer with that to two
    /// accounts of his own. If there is no common answer yet, or all users come from one address (webmail), two users of
    /// one client are enough.
    pub(super) fn observe(&mut self, user: u64, client: AddressBlock, answer: &[u8]) {
        if let Some(last) = &self.last {
            self.has_clients |= last.client != client;
            let is_other_client = last.client != client || !self.has_clients || self.common.is_none();
            let is_common = last.user != user && is_other_client && *last.answer == *answer;
            if is_common && self.common.as_deref() != Some(answer) {
                self.common = Some(answer.into());
            }
        }
        match &mut self.last {
            Some(last) if *last.answer == *answer => (last.user, last.client) = (user, client),
            last => *last = Some(Seen { user, client, answer: answer.into() }),
        }
    }

    /// The answer to a user whom no server knows.
    pub(super) fn common(&self) -> Option<Arc<[u8]>> {
        self.common.clone()
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::*;

    fn client(number: u32) -> AddressBlock {
        AddressBlock::of(IpAddr::from(number.to_be_bytes()))
    }

    fn common(wording: &Wording) -> Option<Vec<u8>> {
        wording.common().map(|answer| answer.to_vec())
    }

    #[test]
    fn an_answer_is_common_once_two_users_have_had_it() {
        // From one address, as with webmail, and from several.
        for several in [0, 1] {
            let mut wording = Wording::default();
            wording.observe(1, client(1), b"NO alice, no");
            wording.observe(1, client(1 + several), b"NO alice, no");
            assert_eq!(common(&wording), None, "one user's answers may name the user");
            wording.observe(2, client(1), b"NO bob, no");
            wording.observe(1, client(1 + several), b"NO denied");
            assert_eq!(common(&wording), None);
            wording.observe(2, client(1), b"NO denied");
            assert_eq!(common(&wording), Some(b"NO denied".to_vec()));
            wording.observe(2, client(1 + several), b"NO your account is locked");
            assert_eq!(common(&wording), Some(b"NO denied".to_vec()));
        }
    }

    #[test]
    fn one_client_cannot_replace_the_answer_that_others_get() {
        let mut wording = Wording::default();
        wording.observe(1, client(1), b"NO denied");
        wording.observe(2, client(2), b"NO denied");
        wording.observe(3, client(3), b"NO locked");
        wording.observe(4, client(3), b"NO locked");
        assert_eq!(common(&wording), Some(b"NO denied".to_vec()));
        wording.observe(5, client(4), b"NO locked");
        assert_eq!(common(&wording), Some(b"NO locked".to_vec()));
    }

    #[test]
    fn a_site_behind_one_address_follows_its_servers() {
        let mut wording = Wording::default();
        for answer in [&b"NO denied"[..], b"NO refused"] {
            wording.observe(1, client(1), answer);
            wording.observe(2, client(1), answer);
            assert_eq!(common(&wording), Some(answer.to_vec()));
        }
    }
}
