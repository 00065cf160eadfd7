//! `login_with`, `unavailable_texts`, `limit_texts` and `empty_password` of a backend: how passwords are sent to its servers,
//! and how their refusals are understood.

use serde::Deserialize;

use crate::config::yaml::{OneOrMany, Section};
use crate::identity::LoginWith;

/// Maximum number of texts in one list.
const MAX_TEXTS: usize = 50;
/// Maximum length of one text in bytes.
const MAX_TEXT: usize = 200;

/// How passwords are sent to the servers of a backend, and how their refusals are understood.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LoginRules {
    /// The command in which a password is sent.
    pub login_with: LoginWith,
    /// Texts, in lower case, that mean an outage in a NO without a response code.
    pub unavailable_texts: Vec<String>,
    /// Texts, in lower case, that mean that the user has reached a limit in a NO without a response code.
    pub limit_texts: Vec<String>,
    /// What happens to a login with an empty password.
    pub empty_password: EmptyPassword,
}

/// What happens to a login with an empty password.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EmptyPassword {
    /// The proxy refuses it.
    #[default]
    Refuse,
    /// The proxy sends it, and the server decides.
    Allow,
}

/// Checks a list of texts and converts them to lower case.
pub(super) fn check_texts(section: &mut Section<'_>, name: &str, texts: Option<OneOrMany>) -> Vec<String> {
    let Some(texts) = texts else { return Vec::new() };
    let with_keys = texts.with_keys(name);
    if with_keys.len() > MAX_TEXTS {
        section.problem(name, format!("expected at most {MAX_TEXTS} texts, got {}", with_keys.len()));
    }
    for (key, text) in &with_keys {
        // A text of spaces would match every response.
        if text.trim().is_empty() || text.len() > MAX_TEXT || text.chars().any(char::is_control) {
            section.problem(
                key,
                format!("expected a part of a server's response: 1 to {MAX_TEXT} bytes, no control characters"),
            );
        }
    }
    with_keys.iter().map(|(_, text)| text.to_lowercase()).collect()
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
    fn login_rules_have_defaults_and_bounds() {
        let config = parse(Path::new("v.yaml"), &with("tls: none")).unwrap();
        assert_eq!(config.backends[0].login_rules, LoginRules::default());
        let text =
            with("login_with: as-client, unavailable_texts: [Über LAST, x], limit_texts: Full, empty_password: allow");
        let expected = LoginRules {
            login_with: LoginWith::AsClient,
            unavailable_texts: vec!["über last".to_owned(), "x".to_owned()],
            limit_texts: vec!["full".to_owned()],
            empty_password: EmptyPassword::Allow,
        };
        assert_eq!(parse(Path::new("v.yaml"), &text).unwrap().backends[0].login_rules, expected);
        let part = "expected a part of a server's response: 1 to 200 bytes, no control characters";
        for (more, expected) in [
            (
                "login_with: scram",
                "backends.a.login_with: unknown value: expected automatic, plain, login or as-client".to_owned(),
            ),
            ("unavailable_texts: [ok, ' ']", format!("backends.a.unavailable_texts[1]: {part}")),
            ("limit_texts: ''", format!("backends.a.limit_texts: {part}")),
            (
                &format!("limit_texts: [{}]", ["x"; 51].join(", ")),
                "backends.a.limit_texts: expected at most 50 texts, got 51".to_owned(),
            ),
            ("empty_password: yes", "backends.a.empty_password: unknown value: expected refuse or allow".to_owned()),
        ] {
            let report = parse(Path::new("v.yaml"), &with(more)).unwrap_err();
            let problems: Vec<String> = report.problems().iter().map(ToString::to_string).collect();
            assert_eq!(problems.len(), 1, "{problems:?}");
            assert!(
                problems[0].starts_with("v.yaml:2:") && problems[0].ends_with(&format!(": {expected}")),
                "{problems:?}"
            );
        }
    }
}
