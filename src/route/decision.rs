//! What a source may say of a user: a place, or a verdict. And how sources write it down.
//!
//! A directory answers with named fields (columns, attributes, JSON), or with one text (a line of a table, a value in
//! Redis, a TXT record):
//!
//! ```text
//! shard-a
//! shard-a server=10.0.0.11:143 user=alice.b
//! refuse: The account was closed.
//! maintenance: Your mailbox is being moved.
//! ```
//!
//! Whatever it says is untrusted: a backend must be declared, names must be names, and what does not fit makes the
//! look-up fail, so that no later source is asked in its stead. Called by the sources of `route`.

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use super::LookupResult;
use super::password_verification::PasswordVerification;
use crate::config::{BackendId, Config};
use crate::identity::{Secret, UserName};

/// Longest text of a verdict, in bytes: it becomes one line of a reply.
const MAX_TEXT: usize = 200;
/// What of a directory's wrong value goes to the log.
const MAX_SHOWN: usize = 64;

/// A source's answer for a user it knows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RouteDecision {
    /// Log in there.
    Destination(Destination),
    /// The login is refused for good: NO `[CONTACTADMIN]` with this text.
    Refuse(Box<str>),
    /// The source checked the password, and it was wrong: NO `[AUTHENTICATIONFAILED]`.
    WrongPassword(WrongPassword),
    /// The login is refused for now: NO `[UNAVAILABLE]` with this text.
    Maintenance(Box<str>),
    /// The source decides by the client's password, and the mechanism of the login carries none.
    PasswordNeeded,
}

/// Where a mailbox is, and how to log in there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Destination {
    /// A declared backend.
    pub backend: BackendId,
    /// Where within it.
    pub server: ServerChoice,
    /// The user's name there, instead of the one normalisation gave.
    pub user: Option<UserName>,
    /// Credentials to log in with there, instead of the client's own. Used only for a client whose identity is verified:
    /// otherwise any password would open the mailbox.
    pub credentials: Option<IssuedCredentials>,
    /// Whether the source has verified the client's password.
    pub verification: PasswordVerification,
}

impl Destination {
    /// What tells one mailbox from others: its user's name there, or the one that was routed.
    pub fn mailbox(&self, routed: &Arc<str>) -> Arc<str> {
        self.user.as_ref().map_or_else(|| routed.clone(), |user| user.as_str().into())
    }
}

/// Where within a backend.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum ServerChoice {
    /// Any server, as the backend chooses.
    #[default]
    Any,
    /// The server of this name in the configuration, and no other.
    Server(Box<str>),
    /// An address that the route's configuration allows, where no server is declared.
    Address(SocketAddr),
}

/// A wrong password, in a source's words.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct WrongPassword {
    /// What the client is told; absent: what everybody is told.
    pub text: Option<Box<str>>,
    /// When the client may try again.
    pub next_attempt: NextAttempt,
}

/// When a client whose password was wrong may try again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NextAttempt {
    /// On the same connection, after the reply, which is sent after this delay.
    After(Duration),
    /// On another connection: this one is closed after the reply.
    OnNewConnection,
}

impl Default for NextAttempt {
    fn default() -> Self {
        Self::After(Duration::ZERO)
    }
}

/// Credentials a source hands out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IssuedCredentials {
    /// A master user; none: the user's own name.
    pub master: Option<UserName>,
    /// The password that belongs to it.
    pub password: Secret,
}

impl RouteDecision {
    /// A backend, and nothing said beyond it.
    pub fn backend(backend: BackendId) -> Self {
        Self::Destination(Destination {
            backend,
            server: ServerChoice::Any,
            user: None,
            credentials: None,
            verification: PasswordVerification::Unverified,
        })
    }

    /// Whether it holds a secret, which no file may keep.
    pub fn is_secret(&self) -> bool {
        matches!(self, Self::Destination(Destination { credentials: Some(_), .. }))
    }
}

/// A checked answer of a directory.
impl From<Result<Option<RouteDecision>, String>> for LookupResult {
    fn from(checked: Result<Option<RouteDecision>, String>) -> Self {
        match checked {
            Ok(Some(decision)) => Self::Found(decision.into()),
            Ok(None) => Self::Unknown,
            Err(reason) => Self::Failed(reason),
        }
    }
}

/// The fields a directory may answer with; empty ones count as absent.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Fields<'a> {
    pub(super) backend: Option<&'a str>,
    pub(super) server: Option<&'a str>,
    pub(super) user: Option<&'a str>,
    pub(super) master: Option<&'a str>,
    pub(super) password: Option<&'a str>,
    pub(super) refuse: Option<&'a str>,
    pub(super) maintenance: Option<&'a str>,
}

impl<'a> Fields<'a> {
    /// By the name of a field; a name that is none is left out.
    pub(super) fn set(&mut self, name: &str, value: &'a str) {
        let field = match name {
            "backend" => &mut self.backend,
            "server" => &mut self.server,
            "user" => &mut self.user,
            "master" => &mut self.master,
            "password" => &mut self.password,
            "refuse" => &mut self.refuse,
            "maintenance" => &mut self.maintenance,
            _ => return,
        };
        *field = Some(value).filter(|value| !value.is_empty());
    }
}

/// The backends of a configuration by name: what answers are checked against.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Declared {
    own: Vec<Box<str>>,
    by_name: HashMap<Box<str>, BackendId>,
}

impl Declared {
    pub(super) fn new(config: &Config) -> Self {
        Self::of(config.backends.iter().map(|backend| backend.name.as_str().into()).collect())
    }

    fn of(own: Vec<Box<str>>) -> Self {
        let by_name = own.iter().enumerate().map(|(index, name)| (name.clone(), BackendId(index))).collect();
        Self { own, by_name }
    }

    /// With what a directory calls them, beside their own names.
    pub(super) fn with_names(mut self, names: &BTreeMap<String, BackendId>) -> Self {
        self.by_name.extend(names.iter().map(|(name, backend)| (name.as_str().into(), *backend)));
        self
    }

    /// What a backend is called here.
    pub(super) fn name(&self, backend: BackendId) -> Option<&str> {
        self.own.get(backend.0).map(AsRef::as_ref)
    }

    #[cfg(test)]
    pub(super) fn named<const N: usize>(names: [&str; N]) -> Self {
        Self::of(names.into_iter().map(Into::into).collect())
    }

    /// The target in `fields`; `None` where they hold nothing: the source does not know the user.
    ///
    /// # Errors
    /// A sentence for the log: what in the answer is wrong.
    pub(super) fn fields(&self, fields: Fields<'_>) -> Result<Option<RouteDecision>, String> {
        if let Some(text) = fields.refuse {
            return Ok(Some(RouteDecision::Refuse(sentence(text))));
        }
        if let Some(text) = fields.maintenance {
            return Ok(Some(RouteDecision::Maintenance(sentence(text))));
        }
        let Some(name) = fields.backend else {
            let rest = [fields.server, fields.user, fields.master, fields.password];
            return match rest.iter().all(Option::is_none) {
                true => Ok(None),
                false => Err("the answer names no backend".to_owned()),
            };
        };
        let user = |name: &str, what: &str| {
            UserName::new(name.as_bytes()).map_err(|error| format!("the answer's {what}: {error}"))
        };
        let credentials = match (fields.master, fields.password) {
            (None, None) => None,
            (Some(_), None) => return Err("the answer has a master user without a password".to_owned()),
            (master, Some(password)) => Some(IssuedCredentials {
                master: master.map(|name| user(name, "master")).transpose()?,
                password: Secret::new(password.as_bytes().to_vec()),
            }),
        };
        Ok(Some(RouteDecision::Destination(Destination {
            backend: self.backend(name)?,
            server: fields.server.map_or(ServerChoice::Any, |server| ServerChoice::Server(server.into())),
            user: fields.user.map(|name| user(name, "user")).transpose()?,
            credentials,
            verification: PasswordVerification::Unverified,
        })))
    }

    /// The target in one text, see the module's text; `None` where it is blank.
    ///
    /// # Errors
    /// As [`Declared::fields`].
    pub(super) fn text(&self, text: &str) -> Result<Option<RouteDecision>, String> {
        let mut fields = Fields::default();
        for (name, value) in named_values(text)? {
            fields.set(name, value);
        }
        self.fields(fields)
    }

    /// The target in values that were computed from a user name. They are values whatever is in them, and must be what a text can
    /// hold: not empty, and without white space. `None` if there is only the name of the backend, and it is empty.
    ///
    /// # Errors
    /// As [`Declared::fields`].
    pub(super) fn values(&self, values: &[(&str, &str)]) -> Result<Option<RouteDecision>, String> {
        if let [("backend", "")] = values {
            return Ok(None);
        }
        let mut fields = Fields::default();
        for &(name, value) in values {
            if is_verdict(name) {
                fields.set(name, reason(value));
                continue;
            }
            if value.is_empty() || value.contains(|char: char| char.is_whitespace() || char.is_control()) {
                return Err(format!("invalid value of {name} for this user name: {}", shown(value)));
            }
            fields.set(name, value);
        }
        self.fields(fields)
    }

    /// The declared backend of this name.
    ///
    /// # Errors
    /// There is none.
    pub(super) fn backend(&self, name: &str) -> Result<BackendId, String> {
        self.by_name.get(name).copied().ok_or_else(|| {
            let mut known: Vec<&str> = self.by_name.keys().map(AsRef::as_ref).collect();
            known.sort_unstable();
            format!("no backend is declared as {}; declared: {}", shown(name), known.join(", "))
        })
    }
}

/// Reads the syntax of a target's text: the names of its fields and their values, in order. No field: the text is blank.
///
/// # Errors
/// A word that is not a field.
pub(super) fn named_values(text: &str) -> Result<Vec<(&'static str, &str)>, String> {
    let text = text.trim();
    for verdict in VERDICTS {
        if let Some(words) = text.strip_prefix(verdict).and_then(|rest| rest.strip_prefix(':')) {
            return Ok(vec![(verdict, reason(words))]);
        }
    }
    let mut words = text.split_ascii_whitespace();
    let mut values: Vec<_> = words.next().map(|name| ("backend", name)).into_iter().collect();
    for word in words {
        values.push(match word.split_once('=') {
            Some(("server", value)) if !value.is_empty() => ("server", value),
            Some(("user", value)) if !value.is_empty() => ("user", value),
            _ => return Err(format!("expected server=HOST:PORT or user=NAME, found {}", shown(word))),
        });
    }
    Ok(values)
}

/// Fields that are a text for the client.
const VERDICTS: [&str; 2] = ["refuse", "maintenance"];

fn is_verdict(name: &str) -> bool {
    VERDICTS.contains(&name)
}

/// The text of a verdict, which may be left out.
fn reason(words: &str) -> &str {
    let words = words.trim();
    if words.is_empty() { "Login is not possible." } else { words }
}

/// One line that a client may be shown: printable ASCII, and no bracket in front that would pass for a response code.
pub(super) fn sentence(text: &str) -> Box<str> {
    let clean = text.chars().map(|char| if char.is_ascii() && !char.is_ascii_control() { char } else { '?' });
    let clean: String = clean.take(MAX_TEXT).collect();
    clean.trim_start_matches(['[', ' ']).into()
}

/// A directory's value for the log: quoted, and not longer than a line.
fn shown(value: &str) -> String {
    let short: String = value.chars().take(MAX_SHOWN).collect();
    format!("{short:?}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn declared() -> Declared {
        Declared::named(["shard-a", "shard-b"])
    }

    #[test]
    fn one_text_says_it_all() {
        let declared = declared();
        assert_eq!(declared.text(" shard-b "), Ok(Some(RouteDecision::backend(BackendId(1)))));
        assert_eq!(declared.text("  "), Ok(None));
        let Ok(Some(RouteDecision::Destination(place))) = declared.text("shard-a server=10.0.0.1:143 user=alice.b")
        else {
            panic!()
        };
        assert_eq!(place.server, ServerChoice::Server("10.0.0.1:143".into()));
        assert_eq!(place.user.unwrap().as_str(), "alice.b");
        assert_eq!(declared.text("refuse: Gone. Ask us."), Ok(Some(RouteDecision::Refuse("Gone. Ask us.".into()))));
        assert_eq!(
            declared.text("maintenance:"),
            Ok(Some(RouteDecision::Maintenance("Login is not possible.".into())))
        );
    }

    #[test]
    fn what_does_not_fit_is_an_error() {
        let declared = declared();
        for (text, part) in [
            ("shard-c", "no backend is declared as \"shard-c\"; declared: shard-a, shard-b"),
            ("shard-a shard-b", "expected server=HOST:PORT"),
            ("shard-a user=", "expected server=HOST:PORT"),
            ("shard-a password=x", "expected server=HOST:PORT"),
            ("shard-a\nx", "expected"),
        ] {
            let error = declared.text(text).unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        }
        let only = |name: &str, value: &'static str| {
            let mut fields = Fields::default();
            fields.set(name, value);
            declared.fields(fields)
        };
        assert!(only("user", "alice").is_err() && only("master", "x").is_err());
        assert_eq!(only("backend", ""), Ok(None));
        assert_eq!(only("other", "x"), Ok(None));
    }

    #[test]
    fn values_of_a_user_name_are_never_syntax() {
        let declared = declared();
        let of = |user: &str| declared.values(&[("backend", "shard-a"), ("user", user)]);
        let Ok(Some(RouteDecision::Destination(place))) = of("a=b@x,server=y;*)(uid=*") else { panic!() };
        assert_eq!((place.server, place.user.unwrap().as_str()), (ServerChoice::Any, "a=b@x,server=y;*)(uid=*"));
        for hostile in ["", "u server=y", "u\tserver=y", "u\u{a0}v", "u\u{2028}v", "u\nv", "u\0v", &"x".repeat(513)] {
            assert!(of(hostile).unwrap_err().contains("user"), "{hostile:?}");
        }
        for hostile in [" ", "refuse: x", "shard-a user=root", "shard-c"] {
            assert!(declared.values(&[("backend", hostile)]).is_err(), "{hostile:?}");
        }
        assert_eq!(declared.values(&[("backend", "")]), Ok(None));
        assert!(declared.values(&[("backend", ""), ("user", "alice")]).is_err());
        let refused = |text| declared.values(&[("refuse", text)]);
        assert_eq!(refused(" "), Ok(Some(RouteDecision::Refuse("Login is not possible.".into()))));
        assert_eq!(refused("a\r\nb"), Ok(Some(RouteDecision::Refuse("a??b".into()))));
    }

    #[test]
    fn a_verdict_is_one_harmless_line() {
        let hostile = "[ALERT] a\r\nb OK \u{202e}x".to_owned() + &"y".repeat(1000);
        let Ok(Some(RouteDecision::Refuse(text))) = declared().text(&format!("refuse: {hostile}")) else { panic!() };
        assert!(text.starts_with("ALERT] a??b OK ?x") && text.len() <= MAX_TEXT, "{text}");
    }

    #[test]
    fn fields_with_a_password_are_secret() {
        let fields =
            Fields { backend: Some("shard-a"), master: Some("root"), password: Some("pw"), ..Fields::default() };
        let target = declared().fields(fields).unwrap().unwrap();
        assert!(target.is_secret() && !format!("{target:?}").contains("pw\""));
        assert!(!RouteDecision::backend(BackendId(0)).is_secret());
        let alone = Fields { backend: Some("shard-a"), master: Some("root"), ..Fields::default() };
        assert!(declared().fields(alone).is_err());
    }
}
