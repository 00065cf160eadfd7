//! The commands before login, and the verbs of other protocols.

use super::arguments::Arguments;
use crate::protocol::imap::client_id;
use crate::protocol::imap::framing::LiteralLimits;

/// Verbs of HTTP and SMTP.
const FOREIGN_VERBS: [&str; 16] = [
    "GET", "POST", "HEAD", "PUT", "DELETE", "OPTIONS", "CONNECT", "TRACE", "PATCH", "PRI", "EHLO", "HELO", "LHLO",
    "MAIL", "RCPT", "DATA",
];

/// The commands of RFC 3501 sections 6.1 and 6.2, and the extensions that hold before login.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Command {
    Authenticate,
    Capability,
    Enable,
    Id,
    Login,
    Logout,
    Noop,
    StartTls,
}

impl Command {
    /// Finds the command of this name, in any letter case.
    pub(super) fn named(word: &[u8]) -> Option<Self> {
        let commands = [
            ("AUTHENTICATE", Self::Authenticate),
            ("CAPABILITY", Self::Capability),
            ("ENABLE", Self::Enable),
            ("ID", Self::Id),
            ("LOGIN", Self::Login),
            ("LOGOUT", Self::Logout),
            ("NOOP", Self::Noop),
            ("STARTTLS", Self::StartTls),
        ];
        commands.into_iter().find(|(name, _)| word.eq_ignore_ascii_case(name.as_bytes())).map(|(_, command)| command)
    }
}

/// Returns the limits of the literals of a command that begins with `command`.
pub(super) fn literals(command: &[u8]) -> LiteralLimits {
    let mut arguments = Arguments::new(command);
    arguments.word();
    match Command::named(arguments.word()) {
        Some(Command::Id) => client_id::LITERALS,
        _ => LiteralLimits::FEW,
    }
}

/// Whether a line with these first two words is HTTP or SMTP. If an IMAP command follows the verb, the verb is a tag.
pub(super) fn is_foreign(first: &[u8], second: &[u8]) -> bool {
    FOREIGN_VERBS.iter().any(|verb| first.eq_ignore_ascii_case(verb.as_bytes())) && Command::named(second).is_none()
}
