//! Routes by Redis or Valkey: one server, the master that Sentinels name, or a cluster.
//!
//! The value at the user's key, or a field of the hash there, is an answer in text form (see `answer`). A missing value means an unknown
//! user. Keys are bytes, so user names need no escaping.
//!
//! All lookups share one connection. It is replaced when a command on it fails, or when a second connection answers earlier (see
//! `hedge`).

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
use crate::lookup::hedge::{Budget, DiscardUnlessAnswered, SharedConnection, hedged};
use crate::lookup::tcp_liveness;
use crate::route::LookupResult;
use crate::route::answer::DeclaredBackends;
use crate::route::request::LookupRequest;
use crate::template::Template;

/// A Redis service that receives one command per lookup.
pub(in crate::route) struct Redis {
    client: RedisClient,
    shared: SharedConnection<Connection>,
    /// Held while a connection is established, so that concurrent lookups share it.
    connecting: tokio::sync::Mutex<()>,
    key: Template,
    field: Option<String>,
    declared: DeclaredBackends,
}

impl std::fmt::Debug for Redis {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The client contains the password.
        f.debug_struct("Redis").field("key", &self.key).finish_non_exhaustive()
    }
}

/// How a connection is established.
enum RedisClient {
    Server(Box<Client>),
    /// Creates a new client for each connection, because a client keeps connections to Sentinels, which may be dead.
    Sentinel(Box<dyn Fn() -> Result<SentinelClientBuilder, RedisError> + Send + Sync>),
    Cluster(Box<ClusterClient>),
}

/// Reply to a command: a value, or an error that does not depend on the connection.
type Reply = Result<Option<Vec<u8>>, RedisError>;

/// An established connection. Clones are handles of the same connection.
#[derive(Clone)]
enum Connection {
    Server(MultiplexedConnection),
    Cluster(ClusterConnection),
}

impl Redis {
    /// # Errors
    /// An invalid URL, or a password file or `ca` that cannot be read.
    pub(in crate::route) fn build(redis: &config::Redis, declared: &DeclaredBackends) -> Result<Self, Vec<Problem>> {
        let client =
            ClientBuilder::new(redis).and_then(|builder| builder.client(redis)).map_err(|problem| vec![problem])?;
        Ok(Self {
            client,
            shared: SharedConnection::default(),
            connecting: tokio::sync::Mutex::default(),
            key: redis.key.clone(),
            field: redis.field.clone(),
            declared: declared.clone().with_directory_names(&redis.lookup.names),
        })
    }

    pub(in crate::route) async fn query(&self, request: &LookupRequest, budget: &Budget) -> LookupResult {
        let key = self.key.fill(&request.user, str::to_owned);
        let command = match &self.field {
            Some(field) => Cmd::hget(key, field),
            None => Cmd::get(key),
        };
        match self.run(&command, budget).await.and_then(|reply| reply) {
            Err(error) => LookupResult::Failed(error.to_string().replace(char::is_control, " ")),
            Ok(None) => LookupResult::Unknown,
            Ok(Some(value)) => match std::str::from_utf8(&value) {
                Ok(text) => LookupResult::from(self.declared.check_text(text)),
                Err(_) => LookupResult::Failed("the value is not UTF-8".to_owned()),
            },
        }
    }

    /// Closes the connection once no lookup uses it.
    pub(in crate::route) fn retire(&self) {
        self.shared.clear();
    }

    async fn run(&self, command: &Cmd, budget: &Budget) -> Result<Reply, RedisError> {
        let Some(current) = self.shared.current() else { return self.run_once(command, budget).await };
        let first = run_on(&current, command);
        hedged(first, budget.patience(), self.run_again(&current, command, budget), || self.shared.discard(&current))
            .await
    }

    /// Runs the command once, on a new connection or one that another lookup has established.
    async fn run_once(&self, command: &Cmd, budget: &Budget) -> Result<Reply, RedisError> {
        let connection = self.connection_or_new(budget, || self.shared.current()).await?;
        run_on(&connection, command).await.inspect_err(|_| self.shared.discard(&connection))
    }

    /// Makes the second attempt, on another connection than `old`.
    async fn run_again(&self, old: &Arc<Connection>, command: &Cmd, budget: &Budget) -> Result<Reply, RedisError> {
        let connection = self.connection_or_new(budget, || self.shared.other_than(old)).await?;
        let mut on_drop = DiscardUnlessAnswered { discard: Some(|| self.shared.discard_spare(&connection)) };
        let reply = run_on(&connection, command).await.inspect_err(|_| self.shared.discard(&connection))?;
        on_drop.discard = None;
        Ok(reply)
    }

    /// Returns the connection that `existing` returns, or establishes one.
    async fn connection_or_new(
        &self,
        budget: &Budget,
        existing: impl Fn() -> Option<Arc<Connection>>,
    ) -> Result<Arc<Connection>, RedisError> {
        let _lock = budget.connecting(self.connecting.lock()).await;
        if let Some(connection) = existing() {
            return Ok(connection);
        }
        let connection = Arc::new(budget.connecting(self.connect()).await?);
        self.shared.put(connection.clone());
        Ok(connection)
    }

    async fn connect(&self) -> Result<Connection, RedisError> {
        // The deadline of the caller ends the attempt, and reports its stage.
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

/// Runs a command. The outer error is that of the connection.
async fn run_on(connection: &Connection, command: &Cmd) -> Result<Reply, RedisError> {
    let result = match connection.clone() {
        Connection::Server(mut connection) => command.query_async(&mut connection).await,
        Connection::Cluster(mut connection) => command.query_async(&mut connection).await,
    };
    match result {
        Err(error) if !is_reply(&error) => Err(error),
        reply => Ok(reply),
    }
}

/// Whether an error is the server's reply to the command, such as WRONGTYPE, which would be the same on another connection.
fn is_reply(error: &RedisError) -> bool {
    let kind = error.kind();
    matches!(kind, ErrorKind::Extension | ErrorKind::Server(ServerErrorKind::ResponseError | ServerErrorKind::NoPerm))
}

/// Settings for all kinds of clients.
struct ClientBuilder<'a> {
    user: Option<&'a str>,
    password: Option<Zeroizing<String>>,
    roots: Option<Vec<u8>>,
    timeout: Duration,
}

impl<'a> ClientBuilder<'a> {
    fn new(redis: &'a config::Redis) -> Result<Self, Problem> {
        let password = redis.password.as_ref().map(|file| file.read_secret()).transpose()?;
        let read_ca = |ca: &Located<std::path::PathBuf>| {
            crate::tls::upstream::verified_config(Some(ca), &ca.location)?;
            std::fs::read(&ca.value).map_err(|error| ca.location.problem(error.to_string()))
        };
        let roots = redis.ca.as_ref().map(read_ca).transpose()?;
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
                Ok(RedisClient::Server(client.map_err(|error| self.invalid_url(url, &error))?.into()))
            }
            RedisServers::Cluster(urls) => {
                let nodes = urls.iter().map(|url| self.info(url)).collect::<Result<Vec<_>, _>>()?;
                let mut builder = ClusterClientBuilder::new(nodes)
                    // Longer than the deadline of the caller, which ends the attempt.
                    .connection_timeout(2 * self.timeout)
                    .response_timeout(2 * self.timeout)
                    .tcp_settings(tcp_settings());
                if self.roots.is_some() {
                    builder = builder.certs(self.certificates());
                }
                let client = builder.build().map_err(|error| self.invalid_url(&urls[0], &error))?;
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
                builder().and_then(SentinelClientBuilder::build).map_err(|error| self.invalid_url(&urls[0], &error))?;
                Ok(RedisClient::Sentinel(Box::new(builder)))
            }
        }
    }

    fn info(&self, url: &Located<String>) -> Result<ConnectionInfo, Problem> {
        let info = url.value.as_str().into_connection_info().map_err(|error| self.invalid_url(url, &error))?;
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

    fn invalid_url(&self, url: &Located<String>, error: &RedisError) -> Problem {
        url.location.problem(format!("invalid URL: {error}"))
    }
}

fn tcp_settings() -> TcpSettings {
    TcpSettings::default()
        .set_nodelay(true)
        .set_keepalive(tcp_liveness::keepalive())
        .set_user_timeout(tcp_liveness::USER_TIMEOUT)
}
