//! `ldap`: a directory.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::Deserialize;
use serde_yaml::Value;

use super::Route;
use super::lookup::{ANSWER_FIELDS, LookupConfig, RouteReader, lookup_section};
use crate::config::error::{Located, alternatives};
use crate::template::Template;

lookup_section! {
    LdapSection {
        url: String,
        #[serde(default)]
        starttls: bool,
        ca: Option<PathBuf>,
        bind: Option<String>,
        password_file: Option<PathBuf>,
        base: String,
        #[serde(default)]
        scope: LdapScope,
        filter: String,
        attributes: BTreeMap<String, String>,
    }
}

/// A source that is an LDAP directory.
#[derive(Debug, Clone, PartialEq)]
pub struct Ldap {
    /// URL that begins with `ldap://` or `ldaps://`.
    pub url: Located<String>,
    /// Whether TLS is started on the connection before any other operation.
    pub starttls: bool,
    /// PEM file of root certificates, instead of the system's.
    pub ca: Option<Located<PathBuf>>,
    /// Distinguished name to bind as; `None` means an anonymous search.
    pub bind: Option<String>,
    /// File of the password.
    pub password: Option<Located<PathBuf>>,
    /// Base of the search.
    pub base: Template,
    /// Depth of the search.
    pub scope: LdapScope,
    /// Filter of the search; values are escaped (RFC 4515).
    pub filter: Template,
    /// Attributes by the fields of an answer that they contain.
    pub attributes: BTreeMap<String, String>,
    /// How it is queried.
    pub lookup: LookupConfig,
}

/// Depth of a search (RFC 4511 section 4.5.1.2).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LdapScope {
    /// Only the base entry.
    Base,
    /// Only entries directly below the base.
    One,
    /// The base and all entries below it.
    #[default]
    Sub,
}

pub(super) fn check(mut reader: RouteReader<'_>, value: Value) -> Option<Route> {
    let mut raw: LdapSection = reader.section.read(value)?;
    let lookup = raw.take_lookup();
    let lookup = reader.lookup(lookup);
    let url = reader.url("url", &raw.url, &["ldap://", "ldaps://"])?;
    check_connection(&mut reader, &raw);
    check_attributes(&mut reader, &raw.attributes);
    let base = reader.template("base", &raw.base);
    let filter = reader.template("filter", &raw.filter);
    let (base, filter) = (base?, filter?);
    for (name, template, separators) in [("base", &base, &[',', '+', ';'][..]), ("filter", &filter, &['(', ')'])] {
        if !template.has_variables_in_values_only(separators) {
            reader.problem(name, "a variable is allowed only in a value, after `=`, like (mail=%{user})");
        }
    }
    if base.is_constant() && filter.is_constant() {
        reader.problem("filter", "is the same for every user: use %{user}");
    }
    Some(Route::Ldap(Box::new(Ldap {
        url,
        starttls: raw.starttls,
        ca: reader.file("ca", raw.ca.as_deref()),
        bind: raw.bind,
        password: reader.file("password_file", raw.password_file.as_deref()),
        base,
        scope: raw.scope,
        filter,
        attributes: raw.attributes,
        lookup,
    })))
}

fn check_connection(reader: &mut RouteReader<'_>, raw: &LdapSection) {
    let is_plain = raw.url.starts_with("ldap://");
    if raw.starttls && !is_plain {
        reader.problem("starttls", "has no effect with ldaps://, which always uses TLS");
    }
    if raw.ca.is_some() && is_plain && !raw.starttls {
        reader.problem("ca", "has no effect without TLS: use ldaps:// or starttls");
    }
    if raw.bind.is_some() != raw.password_file.is_some() {
        reader.problem("bind", "bind and password_file require each other");
    }
}

fn check_attributes(reader: &mut RouteReader<'_>, attributes: &BTreeMap<String, String>) {
    for field in attributes.keys() {
        if !ANSWER_FIELDS.contains(&field.as_str()) {
            reader.problem(
                &format!("attributes.{field}"),
                format!("unknown field: expected {}", alternatives(&ANSWER_FIELDS)),
            );
        }
    }
    if !["backend", "refuse", "maintenance"].iter().any(|field| attributes.contains_key(*field)) {
        reader.problem("attributes", "at least `backend` is required, like {backend: mailHost}");
    }
}
