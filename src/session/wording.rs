//! How servers word the refusal of a password, so that a refusal without a server reads the same.

use std::sync::Arc;

/// The wording of one backend's refusals.
#[derive(Debug, Default)]
pub(super) struct Wording {
    /// Hash of the last refused user, and the answer.
    last: Option<(u64, Box<[u8]>)>,
    /// The last answer that two different users were given in a row, so that it names neither of them.
    common: Option<Arc<[u8]>>,
}

impl Wording {
    /// A server refused a password of `user` with this answer, without the tag.
    pub(super) fn observe(&mut self, user: u64, answer: &[u8]) {
        match &mut self.last {
            Some((last_user, last)) if **last == *answer => {
                if *last_user != user && self.common.as_deref() != Some(answer) {
                    self.common = Some(answer.into());
                }
                *last_user = user;
            }
            last => *last = Some((user, answer.into())),
        }
    }

    /// The answer to a user whom no server knows.
    pub(super) fn common(&self) -> Option<Arc<[u8]>> {
        self.common.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_common_once_two_users_have_had_it() {
        let mut wording = Wording::default();
        let common = |wording: &Wording| wording.common().map(|answer| answer.to_vec());
        wording.observe(1, b"NO alice, no");
        wording.observe(1, b"NO alice, no");
        assert_eq!(common(&wording), None, "one user's answers may name the user");
        wording.observe(2, b"NO bob, no");
        wording.observe(1, b"NO denied");
        assert_eq!(common(&wording), None);
        wording.observe(2, b"NO denied");
        assert_eq!(common(&wording), Some(b"NO denied".to_vec()));
        wording.observe(2, b"NO your account is locked");
        assert_eq!(common(&wording), Some(b"NO denied".to_vec()));
    }
}
