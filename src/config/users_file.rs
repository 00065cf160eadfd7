//! `users` as written: a part of `file`.

use serde::Deserialize;

/// `users`.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct UsersMap {
    /// Letters from A to Z.
    pub(super) case: CaseWord,
    /// Characters beyond ASCII.
    pub(super) unicode: UnicodeWord,
    /// Characters that stand for `@`.
    pub(super) separators: Option<String>,
    /// Of names without one.
    pub(super) default_domain: Option<String>,
    /// What begins a detail.
    pub(super) detail: Option<String>,
    /// What servers are given.
    pub(super) server: ServerNameWord,
    /// What log records say.
    pub(super) log: LogNameWord,
    /// Logins on behalf of others.
    pub(super) masters: MastersMap,
}

/// `users.masters`.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct MastersMap {
    /// Between the user and the master user.
    pub(super) separator: Option<String>,
    /// From where such logins may come; absent: from everywhere.
    pub(super) networks: Option<Vec<String>>,
}

/// `users.case`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum CaseWord {
    #[default]
    Lower,
    Keep,
}

/// `users.unicode`.
#[derive(Debug, Clone, Copy, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum UnicodeWord {
    #[default]
    Keep,
    Refuse,
    Precis,
}

/// `users.server`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum ServerNameWord {
    #[default]
    AsSent,
    Normalised,
}

/// `users.log`.
#[derive(Debug, Clone, Copy, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum LogNameWord {
    #[default]
    AsSent,
    Normalised,
    Hashed,
}
