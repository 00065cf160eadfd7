//! The text with which servers refuse passwords, so that a refusal without a server has the same text.

use std::sync::Arc;

use crate::admission::AddressBlock;

/// The wording of one backend's refusals.
#[derive(Debug, Default)]
pub(super) struct Wording {
    last: Option<Refusal>,
    /// The last reply that two different users received in succession: it names neither of them.
    common: Option<Arc<[u8]>>,
    /// Whether refusals of more than one client have been observed.
    has_several_clients: bool,
}

/// One refusal.
#[derive(Debug)]
struct Refusal {
    /// Hash of the user.
    user: u64,
    client: AddressBlock,
    reply: Box<[u8]>,
}

impl Wording {
    /// Records the reply, without the tag, with which a server refused a password that `client` sent for `user`.
    ///
    /// A reply becomes common if two users from different clients receive it in succession, so that an attacker with two accounts cannot
    /// replace it. If there is no common reply yet, or all users come from one address (webmail), two users of one client are enough.
    pub(super) fn observe(&mut self, user: u64, client: AddressBlock, reply: &[u8]) {
        if let Some(last) = &self.last {
            self.has_several_clients |= last.client != client;
            let is_other_client = last.client != client || !self.has_several_clients || self.common.is_none();
            let is_common = last.user != user && is_other_client && *last.reply == *reply;
            if is_common && self.common.as_deref() != Some(reply) {
                self.common = Some(reply.into());
            }
        }
        match &mut self.last {
            Some(last) if *last.reply == *reply => (last.user, last.client) = (user, client),
            last => *last = Some(Refusal { user, client, reply: reply.into() }),
        }
    }

    /// The reply for unknown users.
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
        wording.common().map(|reply| reply.to_vec())
    }

    #[test]
    fn reply_is_common_once_two_users_have_received_it() {
        // From one address, as with webmail, and from several.
        for several in [0, 1] {
            let mut wording = Wording::default();
            wording.observe(1, client(1), b"NO alice, no");
            wording.observe(1, client(1 + several), b"NO alice, no");
            assert_eq!(common(&wording), None, "replies to one user may name the user");
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
    fn one_client_cannot_replace_the_common_reply() {
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
    fn site_behind_one_address_follows_its_servers() {
        let mut wording = Wording::default();
        for reply in [&b"NO denied"[..], b"NO refused"] {
            wording.observe(1, client(1), reply);
            wording.observe(2, client(1), reply);
            assert_eq!(common(&wording), Some(reply.to_vec()));
        }
    }
}
