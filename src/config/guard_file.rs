//! `access`, `policy` and the items of `limits.networks` as written: a part of `file`, which is long enough.

use std::path::PathBuf;

use serde::Deserialize;

use super::values::DurationText;

/// An item of `limits.networks`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct NetworkMap {
    /// Like 192.0.2.0/24.
    pub(super) network: String,
    /// Open connections from there.
    pub(super) sessions: i64,
}

/// `access`; see [`super::AccessConfig`].
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct AccessMap {
    /// Who may come in.
    pub(super) allow: Vec<String>,
    /// Who may not.
    pub(super) deny: Vec<String>,
    /// To whom limits and delays do not apply.
    pub(super) exempt: Vec<String>,
}

/// `policy`; see [`super::Policy`].
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct PolicyMap {
    /// `http://` or `https://`; `?command=…` is added.
    pub(super) url: String,
    /// PEM file of root certificates.
    #[serde(default)]
    pub(super) ca: Option<PathBuf>,
    /// Whom it knows us as.
    #[serde(default)]
    pub(super) user: Option<String>,
    /// A file with the password (HTTP Basic).
    #[serde(default)]
    pub(super) password_file: Option<PathBuf>,
    /// A file with the key (X-API-Key).
    #[serde(default)]
    pub(super) api_key_file: Option<PathBuf>,
    /// A file with the salt of password hashes.
    pub(super) nonce_file: PathBuf,
    /// How many bits of a hash are told.
    #[serde(default)]
    pub(super) hash_bits: Option<i64>,
    /// Of one question.
    #[serde(default)]
    pub(super) timeout: Option<DurationText>,
    /// What its silence means.
    #[serde(default)]
    pub(super) on_failure: OnFailureWord,
}

/// `policy.on_failure`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum OnFailureWord {
    /// Logins go on.
    #[default]
    Allow,
    /// They do not.
    Deny,
}
