//! Reads and checks the answers of sources.
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
//! Answers are untrusted: a backend must be declared, and names must be valid user names. An invalid answer fails the lookup,
//! so that no later source is used instead.

use std::collections::{BTreeMap, HashMap};

use super::decision::{Destination, IssuedCredentials, RouteDecision, ServerChoice};
use super::password_verification::PasswordVerification;
use crate::config::{BackendId, Config};
use crate::identity::{Secret, UserName};

/// Maximum length in bytes of a text for the client, which becomes one line of a reply.
const MAX_TEXT: usize = 200;
/// Maximum length in characters of an invalid value in a log message.
const MAX_QUOTED: usize = 64;
/// Fields that contain a text for the client.
const TEXT_FIELDS: [&str; 2] = ["refuse", "maintenance"];
const DEFAULT_TEXT: &str = "Login is not possible.";

/// The fields of an answer; empty fields count as absent.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct AnswerFields<'a> {
    pub(super) backend: Option<&'a str>,
    pub(super) server: Option<&'a str>,
    pub(super) user: Option<&'a str>,
    pub(super) master: Option<&'a str>,
    pub(super) password: Option<&'a str>,
    pub(super) refuse: Option<&'a str>,
    pub(super) maintenance: Option<&'a str>,
}

impl<'a> AnswerFields<'a> {
    /// Sets the field of this name; unknown names are ignored.
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

/// The backends of a configuration by name, which answers are checked against.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct DeclaredBackends {
    /// Names in the configuration, indexed by [`BackendId`].
    names: Vec<Box<str>>,
    /// The same names, and the names of `backend_names`.
    by_name: HashMap<Box<str>, BackendId>,
}

impl DeclaredBackends {
    pub(super) fn new(config: &Config) -> Self {
        Self::of(config.backends.iter().map(|backend| backend.name.as_str().into()).collect())
    }

    fn of(names: Vec<Box<str>>) -> Self {
        let by_name = names.iter().enumerate().map(|(index, name)| (name.clone(), BackendId(index))).collect();
        Self { names, by_name }
    }

    /// Adds the names that a directory uses for backends.
    pub(super) fn with_directory_names(mut self, names: &BTreeMap<String, BackendId>) -> Self {
        self.by_name.extend(names.iter().map(|(name, backend)| (name.as_str().into(), *backend)));
        self
    }

    /// The name of a backend in the configuration.
    pub(super) fn name(&self, backend: BackendId) -> Option<&str> {
        self.names.get(backend.0).map(AsRef::as_ref)
    }

    #[cfg(test)]
    pub(super) fn named<const N: usize>(names: [&str; N]) -> Self {
        Self::of(names.into_iter().map(Into::into).collect())
    }

    /// Checks an answer in named fields. Returns `None` if all fields are empty: the source does not know the user.
    ///
    /// # Errors
    /// A message for the log: what is invalid in the answer.
    pub(super) fn check_fields(&self, fields: AnswerFields<'_>) -> Result<Option<RouteDecision>, String> {
        if let Some(text) = fields.refuse {
            return Ok(Some(RouteDecision::Refuse(client_text(text))));
        }
        if let Some(text) = fields.maintenance {
            return Ok(Some(RouteDecision::Maintenance(client_text(text))));
        }
        let Some(name) = fields.backend else {
            let others = [fields.server, fields.user, fields.master, fields.password];
            return match others.iter().all(Option::is_none) {
                true => Ok(None),
                false => Err("the answer names no backend".to_owned()),
            };
        };
        let user = |name: &str, field: &str| {
            UserName::new(name.as_bytes()).map_err(|error| format!("the answer's {field}: {error}"))
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
            backend: self.find(name)?,
            server: fields.server.map_or(ServerChoice::Any, |server| ServerChoice::Server(server.into())),
            user: fields.user.map(|name| user(name, "user")).transpose()?,
            credentials,
            verification: PasswordVerification::Unverified,
        })))
    }

    /// Checks an answer in one text (see the module documentation). Returns `None` if the text is blank.
    ///
    /// # Errors
    /// The same as of [`DeclaredBackends::check_fields`].
    pub(super) fn check_text(&self, text: &str) -> Result<Option<RouteDecision>, String> {
        let mut fields = AnswerFields::default();
        for (name, value) in named_values(text)? {
            fields.set(name, value);
        }
        self.check_fields(fields)
    }

    /// Checks an answer whose values were computed from a user name. They are never parsed as syntax, and must be values that a text can
    /// contain: not empty, and without white space. Returns `None` if the only value is an empty backend name.
    ///
    /// # Errors
    /// The same as of [`DeclaredBackends::check_fields`].
    pub(super) fn check_values(&self, values: &[(&str, &str)]) -> Result<Option<RouteDecision>, String> {
        if let [("backend", "")] = values {
            return Ok(None);
        }
        let mut fields = AnswerFields::default();
        for &(name, value) in values {
            if TEXT_FIELDS.contains(&name) {
                fields.set(name, or_default_text(value));
                continue;
            }
            if value.is_empty() || value.contains(|char: char| char.is_whitespace() || char.is_control()) {
                return Err(format!("invalid value of {name} for this user name: {}", quoted(value)));
            }
            fields.set(name, value);
        }
        self.check_fields(fields)
    }

    /// Finds the declared backend of this name.
    ///
    /// # Errors
    /// A message for the log: the name is unknown.
    pub(super) fn find(&self, name: &str) -> Result<BackendId, String> {
        self.by_name.get(name).copied().ok_or_else(|| {
            let mut known: Vec<&str> = self.by_name.keys().map(AsRef::as_ref).collect();
            known.sort_unstable();
            format!("no backend is declared as {}; declared: {}", quoted(name), known.join(", "))
        })
    }
}

/// Parses the text form of an answer into names and values of its fields, in order. A blank text has none.
///
/// # Errors
/// A word that is not a field.
pub(super) fn named_values(text: &str) -> Result<Vec<(&'static str, &str)>, String> {
    let text = text.trim();
    for field in TEXT_FIELDS {
        if let Some(value) = text.strip_prefix(field).and_then(|rest| rest.strip_prefix(':')) {
            return Ok(vec![(field, or_default_text(value))]);
        }
    }
    let mut words = text.split_ascii_whitespace();
    let mut values: Vec<_> = words.next().map(|name| ("backend", name)).into_iter().collect();
    for word in words {
        values.push(match word.split_once('=') {
            Some(("server", value)) if !value.is_empty() => ("server", value),
            Some(("user", value)) if !value.is_empty() => ("user", value),
            _ => return Err(format!("expected server=HOST:PORT or user=NAME, found {}", quoted(word))),
        });
    }
    Ok(values)
}

/// Whether the text form of an answer contains a text for the client.
pub(super) fn is_client_text(answer: &str) -> bool {
    let answer = answer.trim_start();
    TEXT_FIELDS.iter().any(|field| answer.strip_prefix(field).is_some_and(|rest| rest.starts_with(':')))
}

fn or_default_text(text: &str) -> &str {
    let text = text.trim();
    if text.is_empty() { DEFAULT_TEXT } else { text }
}

/// Makes one line that can be sent to a client: printable ASCII, without a leading bracket that could begin a response code.
pub(super) fn client_text(text: &str) -> Box<str> {
    let clean = text.chars().map(|char| if char.is_ascii() && !char.is_ascii_control() { char } else { '?' });
    let clean: String = clean.take(MAX_TEXT).collect();
    clean.trim_start_matches(['[', ' ']).into()
}

/// Quotes and truncates a value for the log.
fn quoted(value: &str) -> String {
    let short: String = value.chars().take(MAX_QUOTED).collect();
    format!("{short:?}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn declared() -> DeclaredBackends {
        DeclaredBackends::named(["shard-a", "shard-b"])
    }

    #[test]
    fn text_form_is_parsed() {
        let declared = declared();
        assert_eq!(declared.check_text(" shard-b "), Ok(Some(RouteDecision::backend(BackendId(1)))));
        assert_eq!(declared.check_text("  "), Ok(None));
        let Ok(Some(RouteDecision::Destination(destination))) =
            declared.check_text("shard-a server=10.0.0.1:143 user=alice.b")
        else {
            panic!()
        };
        assert_eq!(destination.server, ServerChoice::Server("10.0.0.1:143".into()));
        assert_eq!(destination.user.unwrap().as_str(), "alice.b");
        assert_eq!(
            declared.check_text("refuse: Gone. Ask us."),
            Ok(Some(RouteDecision::Refuse("Gone. Ask us.".into())))
        );
        assert_eq!(
            declared.check_text("maintenance:"),
            Ok(Some(RouteDecision::Maintenance("Login is not possible.".into())))
        );
    }

    #[test]
    fn invalid_answer_is_an_error() {
        let declared = declared();
        for (text, part) in [
            ("shard-c", "no backend is declared as \"shard-c\"; declared: shard-a, shard-b"),
            ("shard-a shard-b", "expected server=HOST:PORT"),
            ("shard-a user=", "expected server=HOST:PORT"),
            ("shard-a password=x", "expected server=HOST:PORT"),
            ("shard-a\nx", "expected"),
        ] {
            let error = declared.check_text(text).unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        }
        let only = |name: &str, value: &'static str| {
            let mut fields = AnswerFields::default();
            fields.set(name, value);
            declared.check_fields(fields)
        };
        assert!(only("user", "alice").is_err() && only("master", "x").is_err());
        assert_eq!(only("backend", ""), Ok(None));
        assert_eq!(only("other", "x"), Ok(None));
    }

    #[test]
    fn values_from_a_user_name_are_never_parsed_as_syntax() {
        let declared = declared();
        let check = |user: &str| declared.check_values(&[("backend", "shard-a"), ("user", user)]);
        let Ok(Some(RouteDecision::Destination(destination))) = check("a=b@x,server=y;*)(uid=*") else { panic!() };
        assert_eq!(
            (destination.server, destination.user.unwrap().as_str()),
            (ServerChoice::Any, "a=b@x,server=y;*)(uid=*")
        );
        for hostile in ["", "u server=y", "u\tserver=y", "u\u{a0}v", "u\u{2028}v", "u\nv", "u\0v", &"x".repeat(513)] {
            assert!(check(hostile).unwrap_err().contains("user"), "{hostile:?}");
        }
        for hostile in [" ", "refuse: x", "shard-a user=root", "shard-c"] {
            assert!(declared.check_values(&[("backend", hostile)]).is_err(), "{hostile:?}");
        }
        assert_eq!(declared.check_values(&[("backend", "")]), Ok(None));
        assert!(declared.check_values(&[("backend", ""), ("user", "alice")]).is_err());
        let refused = |text| declared.check_values(&[("refuse", text)]);
        assert_eq!(refused(" "), Ok(Some(RouteDecision::Refuse("Login is not possible.".into()))));
        assert_eq!(refused("a\r\nb"), Ok(Some(RouteDecision::Refuse("a??b".into()))));
    }

    #[test]
    fn client_text_is_one_harmless_line() {
        let hostile = "[ALERT] a\r\nb OK \u{202e}x".to_owned() + &"y".repeat(1000);
        let Ok(Some(RouteDecision::Refuse(text))) = declared().check_text(&format!("refuse: {hostile}")) else {
            panic!()
        };
        assert!(text.starts_with("ALERT] a??b OK ?x") && text.len() <= MAX_TEXT, "{text}");
    }

    #[test]
    fn answer_with_a_password_has_a_secret() {
        let fields = AnswerFields {
            backend: Some("shard-a"),
            master: Some("root"),
            password: Some("pw"),
            ..AnswerFields::default()
        };
        let decision = declared().check_fields(fields).unwrap().unwrap();
        assert!(decision.has_secret() && !format!("{decision:?}").contains("pw\""));
        assert!(!RouteDecision::backend(BackendId(0)).has_secret());
        let master_only = AnswerFields { backend: Some("shard-a"), master: Some("root"), ..AnswerFields::default() };
        assert!(declared().check_fields(master_only).is_err());
    }
}
