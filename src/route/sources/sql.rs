//! Route by a database: PostgreSQL, MySQL or MariaDB, SQLite.
//!
//! The query is the operator's; what it is told of the user is bound, never pasted. Its columns are called as the fields
//! of an answer (see `target`). No row, or a row of nothing but NULL, is an unknown user; a second row is a failure,
//! because it is not known which one counts.
//!
//! Connections are kept for the next lookup, without a query to test them first: one that has died silently would not
//! answer the test either. Instead a lookup gets a second attempt on a fresh connection (see `hedge`).
//!
//! A server may not notice that the client has closed a connection while it works on a query: PostgreSQL does not while it
//! waits for a lock. The number of open connections is therefore limited, and a connection whose answer was not awaited
//! counts until the server begins to answer (see [`Connections::row_by`]).
//!
//! A connection whose answer was not read to its end is dropped: to use it again the library would read the rest of the
//! answer, which may have no end.

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
use crate::route::decision::{Declared, Fields};
use crate::route::idle::IdleConnections;
use crate::route::request::LookupRequest;
use crate::template::Variable;

/// How long the farewell to a server may take when a connection is closed.
const FAREWELL: Duration = Duration::from_secs(2);
/// How long a connection whose answer was not awaited counts as open at most.
const LONGEST_QUERY: Duration = Duration::from_secs(60);
/// SQLSTATE of errors after which another connection may succeed, by their beginnings: connection exception; operator
/// intervention; the cached plan does not fit the table any more; the prepared statement is gone.
const SQLSTATE_OF_CONNECTION: [&str; 4] = ["08", "57P", "0A000", "26000"];
/// The same of MySQL and MariaDB, by number: shutdown, statement to be prepared again, killed, idle for too long.
const MYSQL_OF_CONNECTION: [u16; 4] = [1053, 1615, 1927, 4031];

/// One query per lookup.
#[derive(Debug)]
pub(in crate::route) struct Sql {
    server: Server,
    query: String,
    variables: Vec<Variable>,
    declared: Declared,
}

#[derive(Debug)]
enum Server {
    Postgres(Connections<Postgres>),
    MySql(Connections<MySql>),
    Sqlite(Connections<Sqlite>),
}

/// Connections to one server. They are established when a lookup needs one.
struct Connections<D: Dialect> {
    options: Box<<D::Connection as Connection>::Options>,
    idle: IdleConnections<Open<D::Connection>>,
    /// One permit for each connection that may be open: two for each lookup, as it may make two attempts.
    permits: Arc<Semaphore>,
}

/// An open connection with its permit.
struct Open<C: Connection + Send + 'static> {
    connection: C,
    permit: OwnedSemaphorePermit,
    /// Cancelled by the lookup if another connection was answered first: this one is dead then.
    dead: CancellationToken,
}

impl<C: Connection + Send + 'static> Open<C> {
    /// Closes the connection with a farewell, without which the server logs an error.
    fn close(self) {
        let Self { connection, permit, .. } = self;
        if let Ok(runtime) = Handle::try_current() {
            // If the farewell fails or takes too long, the socket closes all the same.
            runtime.spawn(async move {
                let _ = timeout(FAREWELL, connection.close()).await;
                drop(permit);
            });
        }
    }
}

impl<D: Dialect> std::fmt::Debug for Connections<D> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The options hold the password.
        f.debug_struct("Connections").finish_non_exhaustive()
    }
}

/// Names and values of a row.
type Columns = Vec<(&'static str, String)>;

/// Why a query gave no row that can be used.
enum Fault {
    /// The connection cannot be used any more.
    Connection(String),
    /// The server's answer, or what it holds, is wrong; another connection would bring the same.
    LookupResult(String),
    /// The answer is wrong, and there is more of it that was not read.
    Unread(String),
}

impl Sql {
    /// # Errors
    /// A URL that is none, a password file or a `ca` that cannot be read.
    pub(in crate::route) fn build(sql: &config::Sql, declared: &Declared) -> Result<Self, Vec<Problem>> {
        let server = server(sql).map_err(|problem| vec![problem])?;
        let (query, variables) = sql.query.bind(|before| match server {
            Server::Postgres(_) => format!("${}", before + 1),
            Server::MySql(_) | Server::Sqlite(_) => "?".to_owned(),
        });
        let declared = declared.clone().with_names(&sql.lookup.names);
        Ok(Self { server, query, variables, declared })
    }

    pub(in crate::route) async fn ask(&self, question: &LookupRequest, budget: &Budget) -> LookupResult {
        let values = self.variables.iter().map(|variable| variable.of(&question.user).to_owned()).collect::<Vec<_>>();
        let read = match &self.server {
            Server::Postgres(connections) => connections.row(&self.query, &values, budget).await,
            Server::MySql(connections) => connections.row(&self.query, &values, budget).await,
            Server::Sqlite(connections) => connections.row(&self.query, &values, budget).await,
        };
        match read {
            Err(reason) => LookupResult::Failed(reason),
            Ok(None) => LookupResult::Unknown,
            Ok(Some(row)) => {
                let mut fields = Fields::default();
                for (name, value) in &row {
                    fields.set(name, value);
                }
                LookupResult::from(self.declared.fields(fields))
            }
        }
    }

    /// Closes connections that have not been used for long.
    pub(in crate::route) fn close_expired(&self) {
        match &self.server {
            Server::Postgres(connections) => connections.close_expired(),
            Server::MySql(connections) => connections.close_expired(),
            Server::Sqlite(connections) => connections.close_expired(),
        }
    }

    /// Closes all connections that are not in use, and those in use once their lookup ends.
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
        self.idle.remove_expired(Instant::now()).into_iter().for_each(Open::close);
    }

    fn retire(&self) {
        self.idle.close().into_iter().for_each(Open::close);
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
    /// Names and values of the only row.
    async fn row(&self, query: &str, values: &[String], budget: &Budget) -> Result<Option<Columns>, String> {
        let began = Instant::now();
        let fresh = async { self.row_by(budget.connecting(self.connect()).await?, query, values).await };
        let Some(connection) = self.idle.take(began) else { return fresh.await? };
        let dead = connection.dead.clone();
        let on_dead = || {
            dead.cancel();
            self.idle.remove_older_than(began);
        };
        hedged(self.row_by(connection, query, values), budget.patience(), fresh, on_dead).await?
    }

    async fn connect(&self) -> Result<Open<D::Connection>, String> {
        let permit = self.permits.clone().acquire_owned().await.map_err(|error| told(&error))?;
        let connection = self.options.connect().await.map_err(|error| told(&error))?;
        Ok(Open { connection, permit, dead: CancellationToken::new() })
    }

    /// Runs the query in a task. If this future is dropped, the task keeps the connection and its permit until the server
    /// answers, for [`LONGEST_QUERY`] at most. The outer error is that of the connection, which is dropped then.
    async fn row_by(
        &self,
        mut open: Open<D::Connection>,
        query: &str,
        values: &[String],
    ) -> Result<Result<Option<Columns>, String>, String> {
        let (mut sender, receiver) = oneshot::channel();
        let (query, values) = (query.to_owned(), values.to_vec());
        tokio::spawn(async move {
            let read = {
                let abandoned = async {
                    sender.closed().await;
                    sleep(LONGEST_QUERY).await;
                };
                tokio::select! {
                    read = read::<D>(&mut open.connection, &query, &values) => read,
                    () = abandoned => return,
                    () = open.dead.cancelled() => return,
                }
            };
            if let Err((open, Ok(_) | Err(Fault::LookupResult(_)))) = sender.send((open, read)) {
                open.close();
            }
        });
        let (open, read) = receiver.await.map_err(|_| "the query was aborted".to_owned())?;
        let result = match read {
            Err(Fault::Connection(reason)) => return Err(reason),
            Err(Fault::Unread(reason)) => return Ok(Err(reason)),
            Err(Fault::LookupResult(reason)) => Err(reason),
            Ok(row) => Ok(row),
        };
        if let Some(surplus) = self.idle.put(open, Instant::now()) {
            surplus.close();
        }
        Ok(result)
    }
}

async fn read<D: Dialect>(
    connection: &mut D::Connection,
    query: &str,
    values: &[String],
) -> Result<Option<Columns>, Fault>
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
    let Some(row) = rows.try_next().await.map_err(fault)? else { return Ok(None) };
    if rows.try_next().await.map_err(fault)?.is_some() {
        return Err(Fault::Unread("the query answers more than one row".to_owned()));
    }
    columns::<D>(&row).map(Some).map_err(Fault::LookupResult)
}

/// The fields of an answer among the columns of a row.
fn columns<D: Dialect>(row: &D::Row) -> Result<Columns, String>
where
    for<'a> String: Type<D> + Decode<'a, D>,
    usize: sqlx::ColumnIndex<D::Row>,
{
    let mut read = Vec::new();
    let mut has_fields = false;
    for (index, column) in row.columns().iter().enumerate() {
        let Some(name) = ANSWER_FIELDS.iter().find(|field| column.name().eq_ignore_ascii_case(field)) else {
            continue;
        };
        has_fields = true;
        if let Some(value) = D::text(row, index)? {
            read.push((*name, value));
        }
    }
    if has_fields { Ok(read) } else { Err(format!("no column is called as one of {}", ANSWER_FIELDS.join(", "))) }
}

/// Whether an error is one of the connection or of the query.
fn fault(error: sqlx::Error) -> Fault {
    let text = told(&error);
    let sqlx::Error::Database(error) = error else { return Fault::Connection(text) };
    let is_of_connection = match error.try_downcast_ref::<MySqlDatabaseError>() {
        Some(error) => MYSQL_OF_CONNECTION.contains(&error.number()),
        None => error.code().is_some_and(|code| SQLSTATE_OF_CONNECTION.iter().any(|start| code.starts_with(start))),
    };
    if is_of_connection { Fault::Connection(text) } else { Fault::LookupResult(text) }
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

fn server(sql: &config::Sql) -> Result<Server, Problem> {
    let limit = sql.lookup.connections;
    let url = &sql.url.value;
    let password = sql.password.as_ref().map(|file| file.read_secret()).transpose()?;
    if let Some(ca) = &sql.ca {
        // What the library would only tell when it connects.
        crate::tls::upstream::verified_config(Some(ca), &ca.location)?;
    }
    let ca = sql.ca.as_ref().map(|ca| &ca.value);
    let wrong = |error: sqlx::Error| sql.url.location.problem(format!("the URL cannot be used: {}", told(&error)));
    if url.starts_with("postgres") {
        let mut options = PgConnectOptions::from_str(url).map_err(wrong)?.application_name("vestibule");
        if let Some(ca) = ca {
            options = options.ssl_mode(PgSslMode::VerifyFull).ssl_root_cert(ca);
        }
        if let Some(password) = password {
            options = options.password(&password);
        }
        return Ok(Server::Postgres(Connections::new(options, limit)));
    }
    if url.starts_with("sqlite") {
        let options = SqliteConnectOptions::from_str(url).map_err(wrong)?.read_only(true);
        return Ok(Server::Sqlite(Connections::new(options, limit)));
    }
    let url = url.replacen("mariadb://", "mysql://", 1);
    let mut options = MySqlConnectOptions::from_str(&url).map_err(wrong)?;
    if let Some(ca) = ca {
        options = options.ssl_mode(MySqlSslMode::VerifyIdentity).ssl_ca(ca);
    }
    if let Some(password) = password {
        options = options.password(&password);
    }
    Ok(Server::MySql(Connections::new(options, limit)))
}

/// One line for the log.
fn told(error: &impl Display) -> String {
    error.to_string().replace(char::is_control, " ")
}
