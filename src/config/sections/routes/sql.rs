//! `sql`: a database.

use std::path::PathBuf;

use serde_yaml::Value;

use super::Route;
use super::lookup::{LookupConfig, RouteReader, lookup_section};
use super::sql_query::{Syntax, quoted_variable};
use crate::config::error::Located;
use crate::template::Template;

lookup_section! {
    SqlSection {
        url: String,
        password_file: Option<PathBuf>,
        query: String,
        ca: Option<PathBuf>,
    }
}

/// A source that is an SQL database.
#[derive(Debug, Clone, PartialEq)]
pub struct Sql {
    /// URL that begins with `postgres://`, `mysql://` or `sqlite:`.
    pub url: Located<String>,
    /// File of the password.
    pub password: Option<Located<PathBuf>>,
    /// The query. Its columns are named like the fields of an answer.
    pub query: Template,
    /// PEM file of root certificates, instead of the system's. If set, TLS is required.
    pub ca: Option<Located<PathBuf>>,
    /// How it is queried.
    pub lookup: LookupConfig,
}

pub(super) fn check(mut reader: RouteReader<'_>, value: Value) -> Option<Route> {
    let mut raw: SqlSection = reader.section.read(value)?;
    let lookup = raw.take_lookup();
    let lookup = reader.lookup(lookup);
    let query = reader.template_with_user("query", &raw.query)?;
    let schemes = ["postgres://", "postgresql://", "mysql://", "mariadb://", "sqlite:"];
    let url = reader.url("url", &raw.url, &schemes)?;
    let syntax = match url.value.split(':').next() {
        Some("mysql" | "mariadb") => Syntax::MySql,
        Some("sqlite") => Syntax::Sqlite,
        _ => Syntax::Postgres,
    };
    if let Some(variable) = quoted_variable(&raw.query, syntax) {
        let message = format!(
            "{variable} is within quotes, where the database reads it as text and finds no user: it is a bound parameter, so \
             write it without quotes, like WHERE name = {variable}"
        );
        reader.problem("query", message);
    }
    for (name, file) in [("password_file", &raw.password_file), ("ca", &raw.ca)] {
        if syntax == Syntax::Sqlite && file.is_some() {
            reader.problem(name, "has no effect with SQLite, which is a file");
        }
    }
    Some(Route::Sql(Box::new(Sql {
        url,
        password: reader.file("password_file", raw.password_file.as_deref()),
        query,
        ca: reader.file("ca", raw.ca.as_deref()),
        lookup,
    })))
}
