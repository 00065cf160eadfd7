//! Route by a database: PostgreSQL, MySQL or MariaDB, SQLite.
//!
//! The query is the operator's; what it is told of the user is bound, never pasted. Its columns are called as the fields
//! of an answer (see `target`). No row, or a row of nothing but NULL, is an unknown user; a second row is a failure, as
//! nobody could say which counts.

use std::fmt::Display;
use std::str::FromStr as _;

use futures_util::TryStreamExt as _;
use sqlx::mysql::{MySqlConnectOptions, MySqlPoolOptions, MySqlSslMode};
use sqlx::postgres::{PgConnectOptions, PgPoolOptions, PgSslMode};
use sqlx::sqlite::{SqliteConnectOptions, SqlitePoolOptions};
use sqlx::{
    AssertSqlSafe, Column as _, ConnectOptions as _, Database, Decode, MySql, MySqlPool, PgPool, Pool, Postgres, Row,
    Sqlite, SqlitePool, Type, TypeInfo as _,
};
use tokio::sync::OnceCell;

use super::Answer;
use super::directory::answer;
use super::question::Question;
use super::target::{Declared, Fields};
use crate::config::{self, ANSWER_FIELDS, Config, Problem};
use crate::template::Variable;

/// A question a user, over a pool that connects when it is first asked.
#[derive(Debug)]
pub(super) struct Sql {
    options: Options,
    connections: u32,
    pool: OnceCell<Connected>,
    query: String,
    variables: Vec<Variable>,
    declared: Declared,
}

/// Where the database is; passwords in them never print.
#[derive(Debug, Clone)]
enum Options {
    Postgres(Box<PgConnectOptions>),
    MySql(Box<MySqlConnectOptions>),
    Sqlite(Box<SqliteConnectOptions>),
}

#[derive(Debug)]
enum Connected {
    Postgres(PgPool),
    MySql(MySqlPool),
    Sqlite(SqlitePool),
}

impl Sql {
    /// # Errors
    /// A URL that is none, a password file or a `ca` that cannot be read.
    pub(super) fn build(config: &Config, sql: &config::Sql, declared: &Declared) -> Result<Self, Vec<Problem>> {
        let options = options(config, sql).map_err(|problem| vec![problem])?;
        let (query, variables) = sql.query.bind(|before| match options {
            Options::Postgres(_) => format!("${}", before + 1),
            Options::MySql(_) | Options::Sqlite(_) => "?".to_owned(),
        });
        let connections = u32::try_from(sql.asking.connections).unwrap_or(u32::MAX);
        let declared = declared.clone().with_names(&sql.asking.names);
        Ok(Self { options, connections, pool: OnceCell::new(), query, variables, declared })
    }

    pub(super) async fn ask(&self, question: &Question) -> Answer {
        let values = self.variables.iter().map(|variable| variable.of(&question.user).to_owned()).collect();
        // The pool belongs to the runtime that asks first, which is the one all questions run on.
        let read = match self.pool.get_or_init(|| async { self.connect() }).await {
            Connected::Postgres(pool) => self.rows(pool, values).await,
            Connected::MySql(pool) => self.rows(pool, values).await,
            Connected::Sqlite(pool) => self.rows(pool, values).await,
        };
        match read {
            Err(reason) => Answer::Failed(reason),
            Ok(None) => Answer::Unknown,
            Ok(Some(row)) => {
                let mut fields = Fields::default();
                for (name, value) in &row {
                    fields.set(name, value);
                }
                answer(self.declared.fields(fields))
            }
        }
    }

    fn connect(&self) -> Connected {
        match self.options.clone() {
            Options::Postgres(options) => {
                Connected::Postgres(PgPoolOptions::new().max_connections(self.connections).connect_lazy_with(*options))
            }
            Options::MySql(options) => {
                Connected::MySql(MySqlPoolOptions::new().max_connections(self.connections).connect_lazy_with(*options))
            }
            Options::Sqlite(options) => Connected::Sqlite(
                SqlitePoolOptions::new().max_connections(self.connections).connect_lazy_with(*options),
            ),
        }
    }

    /// Names and values of the only row.
    async fn rows<D: Dialect>(
        &self,
        pool: &Pool<D>,
        values: Vec<String>,
    ) -> Result<Option<Vec<(&'static str, String)>>, String>
    where
        for<'a> &'a Pool<D>: sqlx::Executor<'a, Database = D>,
        for<'a> D::Arguments: sqlx::IntoArguments<D>,
        for<'a> String: sqlx::Encode<'a, D> + Type<D> + Decode<'a, D>,
        usize: sqlx::ColumnIndex<D::Row>,
    {
        let mut query = sqlx::query::<D>(AssertSqlSafe(self.query.clone()));
        for value in values {
            query = query.bind(value);
        }
        let mut rows = query.fetch(pool);
        let Some(row) = rows.try_next().await.map_err(|error| told(&error))? else { return Ok(None) };
        if rows.try_next().await.map_err(|error| told(&error))?.is_some() {
            return Err("the query answers more than one row".to_owned());
        }
        let mut read = Vec::new();
        for (index, column) in row.columns().iter().enumerate() {
            let Some(name) = ANSWER_FIELDS.iter().find(|field| column.name().eq_ignore_ascii_case(field)) else {
                continue;
            };
            if let Some(value) = D::text(&row, index)? {
                read.push((*name, value));
            }
        }
        let known = row
            .columns()
            .iter()
            .any(|column| ANSWER_FIELDS.iter().any(|field| column.name().eq_ignore_ascii_case(field)));
        if known { Ok(Some(read)) } else { Err(format!("no column is called as one of {}", ANSWER_FIELDS.join(", "))) }
    }
}

/// What differs between databases: which columns are text although their type has another name.
trait Dialect: Database {
    const TEXT_BY_OTHER_NAMES: &'static [&'static str];

    /// The text in a column, NULL as nothing.
    fn text(row: &Self::Row, index: usize) -> Result<Option<String>, String>
    where
        for<'a> String: Decode<'a, Self> + Type<Self>,
        usize: sqlx::ColumnIndex<Self::Row>,
    {
        match row.try_get::<Option<String>, _>(index) {
            Ok(value) => Ok(value),
            Err(sqlx::Error::ColumnDecode { .. }) => {
                let column = &row.columns()[index];
                let kind = column.type_info().name();
                if Self::TEXT_BY_OTHER_NAMES.iter().any(|text| kind.eq_ignore_ascii_case(text)) {
                    return row.try_get_unchecked(index).map_err(|error| told(&error));
                }
                Err(format!("the column {} is {kind}: cast it to text in the query", column.name()))
            }
            Err(error) => Err(told(&error)),
        }
    }
}

impl Dialect for Postgres {
    const TEXT_BY_OTHER_NAMES: &'static [&'static str] = &["citext"];
}

impl Dialect for MySql {
    const TEXT_BY_OTHER_NAMES: &'static [&'static str] = &["VARBINARY", "BINARY", "BLOB", "ENUM"];
}

impl Dialect for Sqlite {
    const TEXT_BY_OTHER_NAMES: &'static [&'static str] = &["BLOB"];
}

fn options(config: &Config, sql: &config::Sql) -> Result<Options, Problem> {
    let url = &sql.url.value;
    let password = sql.password.as_ref().map(|file| file.read_secret(config)).transpose()?;
    if let Some(ca) = &sql.ca {
        // What the library would only tell when it connects.
        crate::tls::client::verified(config, Some(ca), &ca.place)?;
    }
    let ca = sql.ca.as_ref().map(|ca| &ca.value);
    let wrong =
        |error: sqlx::Error| config.problem(&sql.url.place, format!("the URL cannot be used: {}", told(&error)));
    if url.starts_with("postgres") {
        let mut options = PgConnectOptions::from_str(url).map_err(wrong)?.application_name("vestibule");
        if let Some(ca) = ca {
            options = options.ssl_mode(PgSslMode::VerifyFull).ssl_root_cert(ca);
        }
        if let Some(password) = password {
            options = options.password(&password);
        }
        return Ok(Options::Postgres(Box::new(options.disable_statement_logging())));
    }
    if url.starts_with("sqlite") {
        let options = SqliteConnectOptions::from_str(url).map_err(wrong)?.read_only(true);
        return Ok(Options::Sqlite(Box::new(options.disable_statement_logging())));
    }
    let url = url.replacen("mariadb://", "mysql://", 1);
    let mut options = MySqlConnectOptions::from_str(&url).map_err(wrong)?;
    if let Some(ca) = ca {
        options = options.ssl_mode(MySqlSslMode::VerifyIdentity).ssl_ca(ca);
    }
    if let Some(password) = password {
        options = options.password(&password);
    }
    Ok(Options::MySql(Box::new(options.disable_statement_logging())))
}

/// One line for the log.
fn told(error: &impl Display) -> String {
    error.to_string().replace(char::is_control, " ")
}
