//! Routes by a database: PostgreSQL, MySQL or MariaDB, or SQLite.
//!
//! The query is configured; parts of the user name are bound as parameters, never inserted into its text. Its columns are named like the
//! fields of an answer (see `answer`). No row, or a row that contains only NULL, means an unknown user; a second row fails the lookup,
//! because it would be ambiguous.
//!
//! Connections are reused without a test query: a connection that has died silently would not answer the test either. Instead
//! a lookup makes a second attempt on a fresh connection (see `hedge`).
//!
//! A server may not notice that the client has closed a connection while it executes a query: PostgreSQL does not while it
//! waits for a lock. The number of open connections is therefore limited, and a connection with an abandoned query
//! counts until the server begins to answer (see [`Connections::row_on`]).
//!
//! A connection whose answer was not read to its end is dropped: to reuse it the library would read the rest of the
//! answer, which may be endless.

use std::fmt::Display;
use std::str::FromStr as _;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::TryStreamExt as _;
use sqlx::mysql::{MySqlConnectOptions, MySqlDatabaseError, MySqlSslMode};
use sqlx::postgres::{PgConnectOptions, PgSslMode};
use sqlx::sqlite::SqliteConnectOptions;
use sqlx::{
    AssertSqlSafe, Column as _, ConnectOptions, Connection, Database, Decode, MySql, Postgres, Row, Sqlite, Type,
    TypeInfo as _,
};
use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::config::{self, ANSWER_FIELDS, Problem};
use crate::lookup::hedge::{Budget, hedged};
use crate::route::LookupResult;
use crate::route::answer::{AnswerFields, DeclaredBackends};
use crate::route::idle_connections::IdleConnections;
use crate::route::request::LookupRequest;
use crate::template::Variable;

/// Timeout for closing a connection properly.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);
/// A connection with an abandoned query counts as open for at most this long.
const MAX_ABANDONED_QUERY: Duration = Duration::from_secs(60);
/// Prefixes of SQLSTATE codes after which another connection may succeed: connection exception, operator intervention, cached plan
/// invalid for the changed table, prepared statement missing.
const CONNECTION_SQLSTATES: [&str; 4] = ["08", "57P", "0A000", "26000"];
/// Error numbers of MySQL and MariaDB with the same meaning: shutdown, statement must be prepared again, killed, idle for too long.
const CONNECTION_MYSQL_ERRORS: [u16; 4] = [1053, 1615, 1927, 4031];

/// A database that receives one query per lookup.
#[derive(Debug)]
pub(in crate::route) struct Sql {
    server: Server,
    query: String,
    variables: Vec<Variable>,
    declared: DeclaredBackends,
}

#[derive(Debug)]
enum Server {
    Postgres(Connections<Postgres>),
    MySql(Connections<MySql>),
    Sqlite(Connections<Sqlite>),
}

/// Connections to one server, established when lookups need them.
struct Connections<D: Dialect> {
    options: Box<<D::Connection as Connection>::Options>,
    idle: IdleConnections<OpenConnection<D::Connection>>,
    /// One permit for each open connection: two for each concurrent lookup, because a lookup can make two attempts.
    permits: Arc<Semaphore>,
}

/// An open connection with its permit.
struct OpenConnection<C: Connection + Send + 'static> {
    connection: C,
    permit: OwnedSemaphorePermit,
    /// Cancelled by the lookup if another connection answers first, which shows that this one is dead.
    dead: CancellationToken,
}

impl<C: Connection + Send + 'static> OpenConnection<C> {
    /// Closes the connection properly; otherwise the server would log an error.
    fn close(self) {
        let Self { connection, permit, .. } = self;
        if let Ok(runtime) = Handle::try_current() {
            // If this fails or takes too long, dropping the connection closes the socket.
            runtime.spawn(async move {
                let _ = timeout(CLOSE_TIMEOUT, connection.close()).await;
                drop(permit);
            });
        }
    }
}

impl<D: Dialect> std::fmt::Debug for Connections<D> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The options contain the password.
        f.debug_struct("Connections").finish_non_exhaustive()
    }
}

/// Names and values of the columns of a row.
type Columns = Vec<(&'static str, String)>;

/// Error of a query.
enum QueryError {
    /// The connection cannot be used any longer.
    Connection(String),
    /// The answer of the server is an error or invalid, which would be the same on another connection.
    Answer(String),
    /// The answer is invalid, and was not read to its end.
    Unread(String),
}

impl Sql {
    /// # Errors
    /// An invalid URL, or a password file or `ca` that cannot be read.
    pub(in crate::route) fn build(sql: &config::Sql, declared: &DeclaredBackends) -> Result<Self, Vec<Problem>> {
        let server = server(sql).map_err(|problem| vec![problem])?;
        let (query, variables) = sql.query.bind(|index| match server {
            Server::Postgres(_) => format!("${}", index + 1),
            Server::MySql(_) | Server::Sqlite(_) => "?".to_owned(),
        });
        let declared = declared.clone().with_directory_names(&sql.lookup.names);
        Ok(Self { server, query, variables, declared })
    }

    pub(in crate::route) async fn query(&self, request: &LookupRequest, budget: &Budget) -> LookupResult {
        let values = self.variables.iter().map(|variable| variable.of(&request.user).to_owned()).collect::<Vec<_>>();
        let row = match &self.server {
            Server::Postgres(connections) => connections.row(&self.query, &values, budget).await,
            Server::MySql(connections) => connections.row(&self.query, &values, budget).await,
            Server::Sqlite(connections) => connections.row(&self.query, &values, budget).await,
        };
        match row {
            Err(reason) => LookupResult::Failed(reason),
            Ok(None) => LookupResult::Unknown,
            Ok(Some(row)) => {
                let mut fields = AnswerFields::default();
                for (name, value) in &row {
                    fields.set(name, value);
                }
                LookupResult::from(self.declared.check_fields(fields))
            }
        }
    }

    /// Closes connections that have been idle for long.
    pub(in crate::route) fn close_expired(&self) {
        match &self.server {
            Server::Postgres(connections) => connections.close_expired(),
            Server::MySql(connections) => connections.close_expired(),
            Server::Sqlite(connections) => connections.close_expired(),
        }
    }

    /// Closes all idle connections, and those in use when their lookup ends.
    pub(in crate::route) fn retire(&self) {
        match &self.server {
            Server::Postgres(connections) => connections.retire(),
            Server::MySql(connections) => connections.retire(),
            Server::Sqlite(connections) => connections.retire(),
        }
    }
}

impl<D: Dialect> Connections<D> {
    fn new(options: <D::Connection as Connection>::Options, limit: usize) -> Self {
        Self {
            options: Box::new(options.disable_statement_logging()),
            idle: IdleConnections::new(limit),
            permits: Arc::new(Semaphore::new(2 * limit)),
        }
    }

    fn close_expired(&self) {
        self.idle.remove_expired(Instant::now()).into_iter().for_each(OpenConnection::close);
    }

    fn retire(&self) {
        self.idle.close().into_iter().for_each(OpenConnection::close);
    }
}

impl<D: Dialect> Drop for Connections<D> {
    fn drop(&mut self) {
        self.retire();
    }
}

impl<D: Dialect> Connections<D>
where
    for<'c> &'c mut D::Connection: sqlx::Executor<'c, Database = D>,
    for<'a> D::Arguments: sqlx::IntoArguments<D>,
    for<'a> String: sqlx::Encode<'a, D> + Type<D> + Decode<'a, D>,
    usize: sqlx::ColumnIndex<D::Row>,
{
    /// Returns the only row, if there is one.
    async fn row(&self, query: &str, values: &[String], budget: &Budget) -> Result<Option<Columns>, String> {
        let began = Instant::now();
        let fresh = async { self.row_on(budget.connecting(self.connect()).await?, query, values).await };
        let Some(connection) = self.idle.take(began) else { return fresh.await? };
        let dead = connection.dead.clone();
        let on_dead = || {
            dead.cancel();
            self.idle.remove_older_than(began);
        };
        hedged(self.row_on(connection, query, values), budget.patience(), fresh, on_dead).await?
    }

    async fn connect(&self) -> Result<OpenConnection<D::Connection>, String> {
        let permit = self.permits.clone().acquire_owned().await.map_err(|error| one_line(&error))?;
        let connection = self.options.connect().await.map_err(|error| one_line(&error))?;
        Ok(OpenConnection { connection, permit, dead: CancellationToken::new() })
    }

    /// Runs the query in a task. If this future is dropped, the task keeps the connection and its permit until the server
    /// answers, for at most [`MAX_ABANDONED_QUERY`]. The outer error is that of the connection, which is then dropped.
    async fn row_on(
        &self,
        mut open: OpenConnection<D::Connection>,
        query: &str,
        values: &[String],
    ) -> Result<Result<Option<Columns>, String>, String> {
        let (mut sender, receiver) = oneshot::channel();
        let (query, values) = (query.to_owned(), values.to_vec());
        tokio::spawn(async move {
            let row = {
                let abandoned = async {
                    sender.closed().await;
                    sleep(MAX_ABANDONED_QUERY).await;
                };
                tokio::select! {
                    row = single_row::<D>(&mut open.connection, &query, &values) => row,
                    () = abandoned => return,
                    () = open.dead.cancelled() => return,
                }
            };
            if let Err((open, Ok(_) | Err(QueryError::Answer(_)))) = sender.send((open, row)) {
                open.close();
            }
        });
        let (open, row) = receiver.await.map_err(|_| "the query was aborted".to_owned())?;
        let result = match row {
            Err(QueryError::Connection(reason)) => return Err(reason),
            Err(QueryError::Unread(reason)) => return Ok(Err(reason)),
            Err(QueryError::Answer(reason)) => Err(reason),
            Ok(row) => Ok(row),
        };
        if let Some(surplus) = self.idle.put(open, Instant::now()) {
            surplus.close();
        }
        Ok(result)
    }
}

/// Runs a query that returns at most one row.
async fn single_row<D: Dialect>(
    connection: &mut D::Connection,
    query: &str,
    values: &[String],
) -> Result<Option<Columns>, QueryError>
where
    for<'c> &'c mut D::Connection: sqlx::Executor<'c, Database = D>,
    for<'a> D::Arguments: sqlx::IntoArguments<D>,
    for<'a> String: sqlx::Encode<'a, D> + Type<D> + Decode<'a, D>,
    usize: sqlx::ColumnIndex<D::Row>,
{
    let mut query = sqlx::query::<D>(AssertSqlSafe(query.to_owned()));
    for value in values {
        query = query.bind(value.clone());
    }
    let mut rows = query.fetch(connection);
    let Some(row) = rows.try_next().await.map_err(query_error)? else { return Ok(None) };
    if rows.try_next().await.map_err(query_error)?.is_some() {
        return Err(QueryError::Unread("the query returned more than one row".to_owned()));
    }
    columns::<D>(&row).map(Some).map_err(QueryError::Answer)
}

/// Selects the columns that are fields of an answer.
fn columns<D: Dialect>(row: &D::Row) -> Result<Columns, String>
where
    for<'a> String: Type<D> + Decode<'a, D>,
    usize: sqlx::ColumnIndex<D::Row>,
{
    let mut columns = Vec::new();
    let mut has_fields = false;
    for (index, column) in row.columns().iter().enumerate() {
        let Some(name) = ANSWER_FIELDS.iter().find(|field| column.name().eq_ignore_ascii_case(field)) else {
            continue;
        };
        has_fields = true;
        if let Some(value) = D::text(row, index)? {
            columns.push((*name, value));
        }
    }
    if has_fields { Ok(columns) } else { Err(format!("the query has no column named {}", ANSWER_FIELDS.join(" or "))) }
}

/// Classifies an error by whether another connection may succeed.
fn query_error(error: sqlx::Error) -> QueryError {
    let text = one_line(&error);
    let sqlx::Error::Database(error) = error else { return QueryError::Connection(text) };
    let is_connection_error = match error.try_downcast_ref::<MySqlDatabaseError>() {
        Some(error) => CONNECTION_MYSQL_ERRORS.contains(&error.number()),
        None => error.code().is_some_and(|code| CONNECTION_SQLSTATES.iter().any(|start| code.starts_with(start))),
    };
    if is_connection_error { QueryError::Connection(text) } else { QueryError::Answer(text) }
}

/// Differences between databases: which types contain text although the library does not decode them as such.
trait Dialect: Database {
    const OTHER_TEXT_TYPES: &'static [&'static str];

    /// The text in a column; `None` for NULL.
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
                if Self::OTHER_TEXT_TYPES.iter().any(|text| kind.eq_ignore_ascii_case(text)) {
                    return row.try_get_unchecked(index).map_err(|error| one_line(&error));
                }
                Err(format!("the column {} is {kind}: cast it to text in the query", column.name()))
            }
            Err(error) => Err(one_line(&error)),
        }
    }
}

impl Dialect for Postgres {
    const OTHER_TEXT_TYPES: &'static [&'static str] = &["citext"];
}

impl Dialect for MySql {
    const OTHER_TEXT_TYPES: &'static [&'static str] = &["VARBINARY", "BINARY", "BLOB", "ENUM"];
}

impl Dialect for Sqlite {
    const OTHER_TEXT_TYPES: &'static [&'static str] = &["BLOB"];
}

fn server(sql: &config::Sql) -> Result<Server, Problem> {
    let limit = sql.lookup.connections;
    let url = &sql.url.value;
    let password = sql.password.as_ref().map(|file| file.read_secret()).transpose()?;
    if let Some(ca) = &sql.ca {
        // Checked here, because the library reads the file only when it connects.
        crate::tls::upstream::verified_config(Some(ca), &ca.location)?;
    }
    let ca = sql.ca.as_ref().map(|ca| &ca.value);
    let invalid_url = |error: sqlx::Error| sql.url.location.problem(format!("invalid URL: {}", one_line(&error)));
    if url.starts_with("postgres") {
        let mut options = PgConnectOptions::from_str(url).map_err(invalid_url)?.application_name("vestibule");
        if let Some(ca) = ca {
            options = options.ssl_mode(PgSslMode::VerifyFull).ssl_root_cert(ca);
        }
        if let Some(password) = password {
            options = options.password(&password);
        }
        return Ok(Server::Postgres(Connections::new(options, limit)));
    }
    if url.starts_with("sqlite") {
        let options = SqliteConnectOptions::from_str(url).map_err(invalid_url)?.read_only(true);
        return Ok(Server::Sqlite(Connections::new(options, limit)));
    }
    let url = url.replacen("mariadb://", "mysql://", 1);
    let mut options = MySqlConnectOptions::from_str(&url).map_err(invalid_url)?;
    if let Some(ca) = ca {
        options = options.ssl_mode(MySqlSslMode::VerifyIdentity).ssl_ca(ca);
    }
    if let Some(password) = password {
        options = options.password(&password);
    }
    Ok(Server::MySql(Connections::new(options, limit)))
}

/// Formats an error as one line for the log.
fn one_line(error: &impl Display) -> String {
    error.to_string().replace(char::is_control, " ")
}
