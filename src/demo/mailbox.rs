//! A mailbox in memory: a few messages with flags, one INBOX a user.

use std::sync::{Mutex, MutexGuard, PoisonError};

use imap_codec::imap_types::flag::{Flag, StoreType};

/// One message; its UID is its place, from 1.
#[derive(Debug, Clone)]
pub(super) struct Message {
    /// Header and body, lines ended by CRLF.
    pub(super) text: String,
    flags: Vec<Flag<'static>>,
}

impl Message {
    /// Header with the empty line behind it, and body.
    pub(super) fn split(&self) -> (&str, &str) {
        let end = self.text.find("\r\n\r\n").map_or(self.text.len(), |at| at + 4);
        self.text.split_at(end)
    }

    /// The value of a header field, in the first line it has.
    pub(super) fn field(&self, name: &str) -> Option<&str> {
        self.split().0.lines().find_map(|line| {
            let (key, value) = line.split_once(':')?;
            key.eq_ignore_ascii_case(name).then(|| value.trim())
        })
    }

    /// The lines of some header fields, or of all others, with the empty line behind.
    pub(super) fn fields(&self, names: &[String], among: bool) -> String {
        let wanted = |line: &&str| {
            let key = line.split(':').next().unwrap_or_default();
            !line.is_empty() && names.iter().any(|name| name.eq_ignore_ascii_case(key)) == among
        };
        let lines: String = self.split().0.lines().filter(wanted).map(|line| format!("{line}\r\n")).collect();
        lines + "\r\n"
    }

    /// Each flag once.
    pub(super) fn flags(&self) -> &[Flag<'static>] {
        &self.flags
    }

    /// Whether it was read.
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

/// A server's only user and mailbox.
#[derive(Debug)]
pub(crate) struct Mailbox {
    /// What the greeting and a header of each message call the server.
    pub server: String,
    /// Who may log in.
    pub user: String,
    /// With this.
    pub password: String,
    messages: Mutex<Vec<Message>>,
}

impl Mailbox {
    /// Three messages for `user`.
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
    fn parts_and_flags_of_a_message() {
        let mailbox = Mailbox::new("shard-a", "alice", "x");
        let mut messages = mailbox.messages();
        assert_eq!(messages[0].field("x-served-by"), Some("shard-a"));
        assert_eq!(messages[0].split().1, "This mailbox lives on shard-a.\r\n");
        assert_eq!(messages[0].fields(&["subject".into()], true), "Subject: Welcome\r\n\r\n");
        assert!(!messages[0].fields(&["subject".into()], false).contains("Welcome"));
        messages[0].store(StoreType::Add, &[Flag::Seen, Flag::Flagged]);
        messages[0].store(StoreType::Remove, &[Flag::Flagged]);
        assert!(messages[0].is_seen());
        assert_eq!(messages[0].flags(), [Flag::Seen]);
        messages[0].store(StoreType::Replace, &[]);
        assert!(messages[0].flags().is_empty());
    }
}
