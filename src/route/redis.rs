//! Route by Redis or Valkey: one server, the master that Sentinels name, or a cluster.
//!
//! The value at the user's key, or a field of the hash there, is a text as a line of a table has it (see `target`). No
//! value is an unknown user. Keys are bytes: nothing in a user's name can mean anything there.
//!
//! One connection carries the commands of all lookups. It is replaced as soon as a command on it fails or gets no answer.

use std::sync::{Arc, Mutex, PoisonError};
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

use super::Answer;
use super::directory::answer;
use super::question::Question;
use super::target::Declared;
use crate::config::{self, Config, Located, Problem, RedisPlace};
use crate::hedge::{Budget, hedged};
use crate::tcp_liveness;
use crate::template::Template;

/// One command per lookup.
pub(super) struct Redis {
    client: RedisClient,
    shared: Mutex<Option<Shared>>,
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

/// The connection in use. Clones are handles of the same connection.
#[derive(Clone)]
struct Shared {
    /// Tells one connection from the next.
    identity: Arc<()>,
    connection: Connection,
}

#[derive(Clone)]
enum Connection {
    Server(MultiplexedConnection),
    Cluster(ClusterConnection),
}

impl Redis {
    /// # Errors
    /// A URL that is none, a password file or a `ca` that cannot be read.
    pub(super) fn build(config: &Config, redis: &config::Redis, declared: &Declared) -> Result<Self, Vec<Problem>> {
        let client =
            Builder::new(config, redis).and_then(|builder| builder.client(redis)).map_err(|problem| vec![problem])?;
        Ok(Self {
            client,
            shared: Mutex::default(),
            connecting: tokio::sync::Mutex::default(),
            key: redis.key.clone(),
            field: redis.field.clone(),
            declared: declared.clone().with_names(&redis.asking.names),
        })
    }

    pub(super) async fn ask(&self, question: &Question, budget: &Budget) -> Answer {
        let key = self.key.fill(&question.user, str::to_owned);
        let command = match &self.field {
            Some(field) => Cmd::hget(key, field),
            None => Cmd::get(key),
        };
        match self.query(&command, budget).await.and_then(|answer| answer) {
            Err(error) => Answer::Failed(error.to_string().replace(char::is_control, " ")),
            Ok(None) => Answer::Unknown,
            Ok(Some(value)) => match std::str::from_utf8(&value) {
                Ok(text) => answer(self.declared.text(text)),
                Err(_) => Answer::Failed("the value is not UTF-8".to_owned()),
            },
        }
    }

    /// Closes the connection once no lookup uses it.
    pub(super) fn retire(&self) {
        *self.lock() = None;
    }

    async fn query(&self, command: &Cmd, budget: &Budget) -> Result<Result<Option<Vec<u8>>, RedisError>, RedisError> {
        let known = self.lock().clone();
        let Some(known) = known else { return self.run(self.connected(budget).await?, command).await };
        let old = known.clone();
        let fresh = async {
            self.discard(&old);
            self.run(self.connected(budget).await?, command).await
        };
        hedged(self.run(known, command), budget.patience(), fresh).await
    }

    /// The outer error is one of the connection. It is then used no more, and neither is one whose answer was not awaited.
    async fn run(&self, mut shared: Shared, command: &Cmd) -> Result<Result<Option<Vec<u8>>, RedisError>, RedisError> {
        let used = shared.clone();
        let mut unanswered = Unanswered { redis: self, shared: Some(&used) };
        let result = match &mut shared.connection {
            Connection::Server(connection) => command.query_async(connection).await,
            Connection::Cluster(connection) => command.query_async(connection).await,
        };
        match result {
            Err(error) if !is_answer(&error) => Err(error),
            answer => {
                unanswered.shared = None;
                Ok(answer)
            }
        }
    }

    /// The connection in use, or a new one.
    async fn connected(&self, budget: &Budget) -> Result<Shared, RedisError> {
        let _one = budget.connecting(self.connecting.lock()).await;
        if let Some(shared) = self.lock().clone() {
            return Ok(shared);
        }
        let connection = budget.connecting(self.connect()).await?;
        let shared = Shared { identity: Arc::default(), connection };
        *self.lock() = Some(shared.clone());
        Ok(shared)
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

    fn discard(&self, shared: &Shared) {
        let mut current = self.lock();
        if current.as_ref().is_some_and(|current| Arc::ptr_eq(&current.identity, &shared.identity)) {
            *current = None;
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Shared>> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Discards a connection when it drops: the command on it failed, or its answer was given up.
struct Unanswered<'a> {
    redis: &'a Redis,
    shared: Option<&'a Shared>,
}

impl Drop for Unanswered<'_> {
    fn drop(&mut self) {
        if let Some(shared) = self.shared {
            self.redis.discard(shared);
        }
    }
}

/// Whether an error is the server's answer to the command, such as WRONGTYPE: another connection would bring the same.
fn is_answer(error: &RedisError) -> bool {
    let kind = error.kind();
    matches!(kind, ErrorKind::Extension | ErrorKind::Server(ServerErrorKind::ResponseError | ServerErrorKind::NoPerm))
}

/// What every kind of client is built from.
struct Builder<'a> {
    config: &'a Config,
    user: Option<&'a str>,
    password: Option<Zeroizing<String>>,
    roots: Option<Vec<u8>>,
    timeout: Duration,
}

impl<'a> Builder<'a> {
    fn new(config: &'a Config, redis: &'a config::Redis) -> Result<Self, Problem> {
        let password = redis.password.as_ref().map(|file| file.read_secret(config)).transpose()?;
        let read = |ca: &Located<std::path::PathBuf>| {
            crate::tls::client::verified(config, Some(ca), &ca.place)?;
            std::fs::read(&ca.value).map_err(|error| config.problem(&ca.place, error.to_string()))
        };
        let roots = redis.ca.as_ref().map(read).transpose()?;
        Ok(Self { config, user: redis.user.as_deref(), password, roots, timeout: redis.asking.timeout })
    }

    fn client(&self, redis: &config::Redis) -> Result<RedisClient, Problem> {
        match &redis.place {
            RedisPlace::Server(url) => {
                let info = self.info(url)?;
                let client = match &self.roots {
                    Some(_) => Client::build_with_tls(info, self.certificates()),
                    None => Client::open(info),
                };
                Ok(RedisClient::Server(client.map_err(|error| self.wrong(url, &error))?.into()))
            }
            RedisPlace::Cluster(urls) => {
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
            RedisPlace::Sentinel { urls, master } => {
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
        self.config.problem(&url.place, format!("the URL cannot be used: {error}"))
    }
}

fn tcp_settings() -> TcpSettings {
    TcpSettings::default()
        .set_nodelay(true)
        .set_keepalive(tcp_liveness::keepalive())
        .set_user_timeout(tcp_liveness::USER_TIMEOUT)
}
