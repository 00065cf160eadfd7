//! `login_with`, `unavailable_texts`, `limit_texts` and `empty_password` of a backend: in which form its servers are sent a
//! password, and how their answers are understood.

use serde::Deserialize;

use super::locate::child;
use super::read::Reader;
use super::values::Words;
use crate::identity::LoginWith;

/// Texts in one list.
const MAX_TEXTS: usize = 50;
/// Bytes of one text.
const MAX_TEXT: usize = 200;

/// How a backend's servers are sent passwords, and how their answers are understood.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LoginRules {
    /// The form in which a password is sent. Default automatic.
    pub login_with: LoginWith,
    /// Texts of a NO without a response code that mean an outage, in lower case.
    pub unavailable_texts: Vec<String>,
    /// Texts of a NO without a response code that mean a limit of the user, in lower case.
    pub limit_texts: Vec<String>,
    /// Whether a login with an empty password is passed to a server. Default no.
    pub allow_empty_password: bool,
}

/// `login_with`.
#[derive(Debug, Clone, Copy, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum LoginWithWord {
    /// The client's command if the server has it, else the other one.
    #[default]
    Automatic,
    /// AUTHENTICATE PLAIN.
    Plain,
    /// LOGIN.
    Login,
    /// The client's command and no other.
    AsClient,
}

impl From<LoginWithWord> for LoginWith {
    fn from(word: LoginWithWord) -> Self {
        match word {
            LoginWithWord::Automatic => Self::Automatic,
            LoginWithWord::Plain => Self::Plain,
            LoginWithWord::Login => Self::Login,
            LoginWithWord::AsClient => Self::AsClient,
        }
    }
}

/// `empty_password`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum EmptyPasswordWord {
    /// The proxy refuses the login itself.
    #[default]
    Refuse,
    /// The server decides.
    Allow,
}

/// Checks a list of texts; absent: none.
pub(super) fn texts(reader: &mut Reader<'_>, backend: &str, name: &str, written: Option<Words>) -> Vec<String> {
    let Some(Words { words, is_list }) = written else { return Vec::new() };
    let key = child(backend, name);
    if words.len() > MAX_TEXTS {
        reader.problem(&key, format!("expected at most {MAX_TEXTS} texts, found {}", words.len()));
    }
    for (index, text) in words.iter().enumerate() {
        // A text of spaces would be found in every answer.
        if text.trim().is_empty() || text.len() > MAX_TEXT || text.chars().any(char::is_control) {
            let place = if is_list { format!("{key}[{index}]") } else { key.clone() };
            reader.problem(
                &place,
                format!("expected a part of a server's answer: 1 to {MAX_TEXT} bytes, no control characters"),
            );
        }
    }
    words.iter().map(|text| text.to_lowercase()).collect()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::config::parse;

    fn with(more: &str) -> String {
        format!(
            "listeners: [{{address: '127.0.0.1:1143', tls: none}}]\n\
             backends: {{a: {{servers: ['192.0.2.1:143'], {more}}}}}\nroutes: [{{default: a}}]\n"
        )
    }

    #[test]
    fn keys_defaults_and_mistakes() {
        let config = parse(Path::new("v.yaml"), &with("tls: none")).unwrap();
        assert_eq!(config.backends[0].login_rules, LoginRules::default());
        let text =
            with("login_with: as-client, unavailable_texts: [Über LAST, x], limit_texts: Full, empty_password: allow");
        let expected = LoginRules {
            login_with: LoginWith::AsClient,
            unavailable_texts: vec!["über last".to_owned(), "x".to_owned()],
            limit_texts: vec!["full".to_owned()],
            allow_empty_password: true,
        };
        assert_eq!(parse(Path::new("v.yaml"), &text).unwrap().backends[0].login_rules, expected);
        let part = "expected a part of a server's answer: 1 to 200 bytes, no control characters";
        for (more, expected) in [
            (
                "login_with: scram",
                "backends.a.login_with: expected one of automatic, plain, login, as-client".to_owned(),
            ),
            ("unavailable_texts: [ok, ' ']", format!("backends.a.unavailable_texts[1]: {part}")),
            ("limit_texts: ''", format!("backends.a.limit_texts: {part}")),
            (
                &format!("limit_texts: [{}]", ["x"; 51].join(", ")),
                "backends.a.limit_texts: expected at most 50 texts, found 51".to_owned(),
            ),
            ("empty_password: yes", "backends.a.empty_password: expected one of refuse, allow".to_owned()),
        ] {
            let report = parse(Path::new("v.yaml"), &with(more)).unwrap_err();
            let mistakes: Vec<String> = report.problems().iter().map(ToString::to_string).collect();
            assert_eq!(mistakes.len(), 1, "{mistakes:?}");
            assert!(
                mistakes[0].starts_with("v.yaml:2:") && mistakes[0].ends_with(&format!(": {expected}")),
                "{mistakes:?}"
            );
        }
    }
}
