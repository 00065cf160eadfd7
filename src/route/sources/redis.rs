//! Route by Redis or Valkey: one server, the master that Sentinels name, or a cluster.
//!
//! The value at the user's key, or a field of the hash there, is a text as a line of a table has it (see `target`). No
//! value is an unknown user. Keys are bytes: nothing in a user's name can mean anything there.
//!
//! One connection carries the commands of all lookups. It is replaced when a command on it fails, or is answered earlier over a
//! second one (see `hedge`).

use std::sync::Arc;
use std::time::Duration;

use redis::aio::MultiplexedConnection;
use redis::cluster::{ClusterClient, ClusterClientBuilder};
use redis::cluster_async::ClusterConnection;
use redis::io::tcp::TcpSettings;
use redis::sentinel::{SentinelClientBuilder, SentinelServerType};
use redis::{
    AsyncConnectionConfig, Client, Cmd, ConnectionInfo, ErrorKind, IntoConnectionInfo as _, RedisError,
    ServerErrorKind, TlsCertificates, TlsMode,
};
use zeroize::Zeroizing;

use crate::config::{self, Located, Problem, RedisServers};
use crate::lookup::hedge::{Budget, SharedConnection, Unanswered, hedged};
use crate::lookup::tcp_liveness;
use crate::route::LookupResult;
use crate::route::decision::Declared;
use crate::route::request::LookupRequest;
use crate::template::Template;

/// One command per lookup.
pub(in crate::route) struct Redis {
    client: RedisClient,
    shared: SharedConnection<Connection>,
    /// Held while a connection is established, so that concurrent lookups share it.
    connecting: tokio::sync::Mutex<()>,
    key: Template,
    field: Option<String>,
    declared: Declared,
}

impl std::fmt::Debug for Redis {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The client holds the password.
        f.debug_struct("Redis").field("key", &self.key).finish_non_exhaustive()
    }
}

/// How a connection is established.
enum RedisClient {
    Server(Box<Client>),
    /// The builder, not the client: that would keep connections to Sentinels, which may have fallen silent.
    Sentinel(Box<dyn Fn() -> Result<SentinelClientBuilder, RedisError> + Send + Sync>),
    Cluster(Box<ClusterClient>),
}

/// What a server answers to a command: a value, or an error that another connection would bring too.
type Reply = Result<Option<Vec<u8>>, RedisError>;

/// A connection that is established. Clones are handles of the same connection.
#[derive(Clone)]
enum Connection {
    Server(MultiplexedConnection),
    Cluster(ClusterConnection),
}

impl Redis {
    /// # Errors
    /// A URL that is none, a password file or a `ca` that cannot be read.
    pub(in crate::route) fn build(redis: &config::Redis, declared: &Declared) -> Result<Self, Vec<Problem>> {
        let client = Builder::new(redis).and_then(|builder| builder.client(redis)).map_err(|problem| vec![problem])?;
        Ok(Self {
            client,
            shared: SharedConnection::default(),
            connecting: tokio::sync::Mutex::default(),
            key: redis.key.clone(),
            field: redis.field.clone(),
            declared: declared.clone().with_names(&redis.lookup.names),
        })
    }

    pub(in crate::route) async fn ask(&self, question: &LookupRequest, budget: &Budget) -> LookupResult {
        let key = self.key.fill(&question.user, str::to_owned);
        let command = match &self.field {
            Some(field) => Cmd::hget(key, field),
            None => Cmd::get(key),
        };
        match self.query(&command, budget).await.and_then(|answer| answer) {
            Err(error) => LookupResult::Failed(error.to_string().replace(char::is_control, " ")),
            Ok(None) => LookupResult::Unknown,
            Ok(Some(value)) => match std::str::from_utf8(&value) {
                Ok(text) => LookupResult::from(self.declared.text(text)),
                Err(_) => LookupResult::Failed("the value is not UTF-8".to_owned()),
            },
        }
    }

    /// Closes the connection once no lookup uses it.
    pub(in crate::route) fn retire(&self) {
        self.shared.clear();
    }

    async fn query(&self, command: &Cmd, budget: &Budget) -> Result<Reply, RedisError> {
        let Some(known) = self.shared.current() else { return self.run_once(command, budget).await };
        let first = run(&known, command);
        hedged(first, budget.patience(), self.run_again(&known, command, budget), || self.shared.discard(&known)).await
    }

    /// The only attempt, of a lookup that found no connection.
    async fn run_once(&self, command: &Cmd, budget: &Budget) -> Result<Reply, RedisError> {
        let connection = self.connected(budget, || self.shared.current()).await?;
        run(&connection, command).await.inspect_err(|_| self.shared.discard(&connection))
    }

    /// The second attempt, over another connection than `old`.
    async fn run_again(&self, old: &Arc<Connection>, command: &Cmd, budget: &Budget) -> Result<Reply, RedisError> {
        let connection = self.connected(budget, || self.shared.other_than(old)).await?;
        let mut unanswered = Unanswered { discard: Some(|| self.shared.discard_spare(&connection)) };
        let reply = run(&connection, command).await.inspect_err(|_| self.shared.discard(&connection))?;
        unanswered.discard = None;
        Ok(reply)
    }

    /// The connection that `known` returns, or a new one.
    async fn connected(
        &self,
        budget: &Budget,
        known: impl Fn() -> Option<Arc<Connection>>,
    ) -> Result<Arc<Connection>, RedisError> {
        let _one = budget.connecting(self.connecting.lock()).await;
        if let Some(connection) = known() {
            return Ok(connection);
        }
        let connection = Arc::new(budget.connecting(self.connect()).await?);
        self.shared.put(connection.clone());
        Ok(connection)
    }

    async fn connect(&self) -> Result<Connection, RedisError> {
        // The caller's deadline ends an attempt, and says how far it came.
        let settings = AsyncConnectionConfig::new().set_connection_timeout(None).set_response_timeout(None);
        Ok(match &self.client {
            RedisClient::Server(client) => {
                Connection::Server(client.get_multiplexed_async_connection_with_config(&settings).await?)
            }
            RedisClient::Sentinel(builder) => {
                Connection::Server(builder()?.build()?.get_async_connection_with_config(&settings).await?)
            }
            RedisClient::Cluster(client) => Connection::Cluster(client.get_async_connection().await?),
        })
    }
}

/// Runs a command. The error is one of the connection.
async fn run(connection: &Connection, command: &Cmd) -> Result<Reply, RedisError> {
    let result = match connection.clone() {
        Connection::Server(mut connection) => command.query_async(&mut connection).await,
        Connection::Cluster(mut connection) => command.query_async(&mut connection).await,
    };
    match result {
        Err(error) if !is_answer(&error) => Err(error),
        answer => Ok(answer),
    }
}

/// Whether an error is the server's answer to the command, such as WRONGTYPE: another connection would bring the same.
fn is_answer(error: &RedisError) -> bool {
    let kind = error.kind();
    matches!(kind, ErrorKind::Extension | ErrorKind::Server(ServerErrorKind::ResponseError | ServerErrorKind::NoPerm))
}

/// What every kind of client is built from.
struct Builder<'a> {
    user: Option<&'a str>,
    password: Option<Zeroizing<String>>,
    roots: Option<Vec<u8>>,
    timeout: Duration,
}

impl<'a> Builder<'a> {
    fn new(redis: &'a config::Redis) -> Result<Self, Problem> {
        let password = redis.password.as_ref().map(|file| file.read_secret()).transpose()?;
        let read = |ca: &Located<std::path::PathBuf>| {
            crate::tls::upstream::verified_config(Some(ca), &ca.location)?;
            std::fs::read(&ca.value).map_err(|error| ca.location.problem(error.to_string()))
        };
        let roots = redis.ca.as_ref().map(read).transpose()?;
        Ok(Self { user: redis.user.as_deref(), password, roots, timeout: redis.lookup.timeout })
    }

    fn client(&self, redis: &config::Redis) -> Result<RedisClient, Problem> {
        match &redis.servers {
            RedisServers::Server(url) => {
                let info = self.info(url)?;
                let client = match &self.roots {
                    Some(_) => Client::build_with_tls(info, self.certificates()),
                    None => Client::open(info),
                };
                Ok(RedisClient::Server(client.map_err(|error| self.wrong(url, &error))?.into()))
            }
            RedisServers::Cluster(urls) => {
                let nodes = urls.iter().map(|url| self.info(url)).collect::<Result<Vec<_>, _>>()?;
                let mut builder = ClusterClientBuilder::new(nodes)
                    // Later than the caller's deadline, which ends an attempt.
                    .connection_timeout(2 * self.timeout)
                    .response_timeout(2 * self.timeout)
                    .tcp_settings(tcp_settings());
                if self.roots.is_some() {
                    builder = builder.certs(self.certificates());
                }
                let client = builder.build().map_err(|error| self.wrong(&urls[0], &error))?;
                Ok(RedisClient::Cluster(client.into()))
            }
            RedisServers::Sentinel { urls, master } => {
                let infos = urls.iter().map(|url| self.info(url)).collect::<Result<Vec<_>, _>>()?;
                let is_encrypted = urls.iter().any(|url| url.value.starts_with("rediss://"));
                let (user, password) = (self.user.map(str::to_owned), self.password.clone());
                let (certificates, master) = (self.roots.as_ref().map(|_| self.certificates()), master.clone());
                let builder = move || {
                    let addresses = infos.iter().map(|info| info.addr().clone());
                    let mut builder =
                        SentinelClientBuilder::new(addresses, master.clone(), SentinelServerType::Master)?
                            .set_client_to_redis_tcp_settings(tcp_settings())
                            .set_client_to_sentinel_tcp_settings(tcp_settings())
                            .set_client_to_redis_db(infos[0].redis_settings().db());
                    if let Some(user) = &user {
                        builder = builder.set_client_to_redis_username(user);
                    }
                    if let Some(password) = &password {
                        builder = builder.set_client_to_redis_password(password.as_str());
                    }
                    if is_encrypted {
                        builder = builder.set_client_to_redis_tls_mode(TlsMode::Secure);
                        if let Some(certificates) = &certificates {
                            builder = builder
                                .set_client_to_redis_certificates(certificates.clone())
                                .set_client_to_sentinel_certificates(certificates.clone());
                        }
                    }
                    Ok(builder)
                };
                builder().and_then(SentinelClientBuilder::build).map_err(|error| self.wrong(&urls[0], &error))?;
                Ok(RedisClient::Sentinel(Box::new(builder)))
            }
        }
    }

    fn info(&self, url: &Located<String>) -> Result<ConnectionInfo, Problem> {
        let info = url.value.as_str().into_connection_info().map_err(|error| self.wrong(url, &error))?;
        let mut settings = info.redis_settings().clone();
        if let Some(user) = self.user {
            settings = settings.set_username(user);
        }
        if let Some(password) = &self.password {
            settings = settings.set_password(password.as_str());
        }
        Ok(info.set_redis_settings(settings).set_tcp_settings(tcp_settings()))
    }

    fn certificates(&self) -> TlsCertificates {
        TlsCertificates { client_tls: None, root_cert: self.roots.clone() }
    }

    fn wrong(&self, url: &Located<String>, error: &RedisError) -> Problem {
        url.location.problem(format!("the URL cannot be used: {error}"))
    }
}

fn tcp_settings() -> TcpSettings {
    TcpSettings::default()
        .set_nodelay(true)
        .set_keepalive(tcp_liveness::keepalive())
        .set_user_timeout(tcp_liveness::USER_TIMEOUT)
}
