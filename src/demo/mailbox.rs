//! A mailbox in memory: the messages and flags of one user's INBOX.

use std::sync::{Mutex, MutexGuard, PoisonError};

use imap_codec::imap_types::flag::{Flag, StoreType};

/// Which header fields are returned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Selection {
    Named,
    AllOthers,
}

/// A message, whose UID is its position, counted from 1.
#[derive(Debug, Clone)]
pub(super) struct Message {
    /// Header and body, with lines that end with CRLF.
    pub(super) text: String,
    flags: Vec<Flag<'static>>,
}

impl Message {
    /// Splits the text into the header, with the empty line after it, and the body.
    pub(super) fn split(&self) -> (&str, &str) {
        let end = self.text.find("\r\n\r\n").map_or(self.text.len(), |at| at + 4);
        self.text.split_at(end)
    }

    /// Returns the first line of a header field's value.
    pub(super) fn field(&self, name: &str) -> Option<&str> {
        self.split().0.lines().find_map(|line| {
            let (key, value) = line.split_once(':')?;
            key.eq_ignore_ascii_case(name).then(|| value.trim())
        })
    }

    /// Returns the header fields in the selection, with an empty line after them.
    pub(super) fn fields(&self, names: &[String], selection: Selection) -> String {
        let wanted = |line: &&str| {
            let key = line.split(':').next().unwrap_or_default();
            !line.is_empty()
                && names.iter().any(|name| name.eq_ignore_ascii_case(key)) == (selection == Selection::Named)
        };
        let lines: String = self.split().0.lines().filter(wanted).map(|line| format!("{line}\r\n")).collect();
        lines + "\r\n"
    }

    /// The flags, each of which occurs once.
    pub(super) fn flags(&self) -> &[Flag<'static>] {
        &self.flags
    }

    /// Whether the message was read.
    pub(super) fn is_seen(&self) -> bool {
        self.flags.contains(&Flag::Seen)
    }

    /// Adds, removes or replaces flags.
    pub(super) fn store(&mut self, kind: StoreType, flags: &[Flag<'static>]) {
        self.flags.retain(|flag| kind == StoreType::Add || kind == StoreType::Remove && !flags.contains(flag));
        if kind != StoreType::Remove {
            for flag in flags {
                if !self.flags.contains(flag) {
                    self.flags.push(flag.clone());
                }
            }
        }
    }
}

/// The user and mailbox of a server.
#[derive(Debug)]
pub(crate) struct Mailbox {
    /// Name of the server in the greeting and in a header field of each message.
    pub server: String,
    /// The only user who may log in.
    pub user: String,
    /// The user's password.
    pub password: String,
    messages: Mutex<Vec<Message>>,
}

impl Mailbox {
    /// Creates a mailbox with three messages for `user`.
    pub(crate) fn new(server: &str, user: &str, password: &str) -> Self {
        let texts = [
            ("Welcome", format!("This mailbox lives on {server}.\r\n")),
            ("How you got here", format!("The proxy read your name, found {server}, and logged in there for you.\r\n")),
            ("Nothing is lost", "Flags you set stay until the demo ends.\r\n".to_owned()),
        ];
        let messages = texts.iter().enumerate().map(|(index, (subject, body))| Message {
            text: format!(
                "Date: Mon, 23 Nov 2026 12:0{index}:00 +0000\r\nFrom: Vestibule <demo@vestibule.example>\r\nTo: {user}\r\n\
                 Subject: {subject}\r\nMessage-ID: <{index}.{server}@vestibule.example>\r\nX-Served-By: {server}\r\n\
                 MIME-Version: 1.0\r\nContent-Type: text/plain; charset=us-ascii\r\n\r\n{body}"
            ),
            flags: Vec::new(),
        });
        Self {
            server: server.to_owned(),
            user: user.to_owned(),
            password: password.to_owned(),
            messages: Mutex::new(messages.collect()),
        }
    }

    /// The messages, locked.
    pub(super) fn messages(&self) -> MutexGuard<'_, Vec<Message>> {
        self.messages.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn message_has_parts_and_flags() {
        let mailbox = Mailbox::new("shard-a", "alice", "x");
        let mut messages = mailbox.messages();
        assert_eq!(messages[0].field("x-served-by"), Some("shard-a"));
        assert_eq!(messages[0].split().1, "This mailbox lives on shard-a.\r\n");
        assert_eq!(messages[0].fields(&["subject".into()], Selection::Named), "Subject: Welcome\r\n\r\n");
        assert!(!messages[0].fields(&["subject".into()], Selection::AllOthers).contains("Welcome"));
        messages[0].store(StoreType::Add, &[Flag::Seen, Flag::Flagged]);
        messages[0].store(StoreType::Remove, &[Flag::Flagged]);
        assert!(messages[0].is_seen());
        assert_eq!(messages[0].flags(), [Flag::Seen]);
        messages[0].store(StoreType::Replace, &[]);
        assert!(messages[0].flags().is_empty());
    }
}
