//! Route by Redis or Valkey: one server, the master that Sentinels name, or a cluster.
//!
//! The value at the user's key, or a field of the hash there, is a text as a line of a table has it (see `target`). No
//! value is an unknown user. Keys are bytes: nothing in a user's name can mean anything there.

use redis::aio::{ConnectionManager, ConnectionManagerConfig, MultiplexedConnection};
use redis::cluster::{ClusterClient, ClusterClientBuilder};
use redis::cluster_async::ClusterConnection;
use redis::sentinel::{SentinelClient, SentinelClientBuilder, SentinelServerType};
use redis::{Client, Cmd, ConnectionInfo, IntoConnectionInfo as _, RedisError, TlsCertificates, TlsMode};
use tokio::sync::{Mutex, OnceCell};
use zeroize::Zeroizing;

use super::Answer;
use super::directory::answer;
use super::question::Question;
use super::target::Declared;
use crate::config::{self, Config, Located, Problem, RedisPlace};
use crate::template::Template;

/// A command a user.
pub(super) struct Redis {
    way: Way,
    key: Template,
    field: Option<String>,
    declared: Declared,
}

impl std::fmt::Debug for Redis {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // What is connected to holds the password.
        f.debug_struct("Redis").field("key", &self.key).finish_non_exhaustive()
    }
}

/// How to get there; every way carries many commands at a time over one connection.
enum Way {
    /// Connects again by itself.
    Server { client: Client, settings: ConnectionManagerConfig, connected: OnceCell<ConnectionManager> },
    /// The master may be another after every error.
    Sentinel { client: Mutex<SentinelClient>, connected: Mutex<Option<MultiplexedConnection>> },
    /// Follows the cluster by itself.
    Cluster { client: ClusterClient, connected: OnceCell<ClusterConnection> },
}

impl Redis {
    /// # Errors
    /// A URL that is none, a password file or a `ca` that cannot be read.
    pub(super) fn build(config: &Config, redis: &config::Redis, declared: &Declared) -> Result<Self, Vec<Problem>> {
        let way =
            Builder::new(config, redis).and_then(|builder| builder.way(redis)).map_err(|problem| vec![problem])?;
        Ok(Self {
            way,
            key: redis.key.clone(),
            field: redis.field.clone(),
            declared: declared.clone().with_names(&redis.asking.names),
        })
    }

    pub(super) async fn ask(&self, question: &Question) -> Answer {
        let key = self.key.fill(&question.user, str::to_owned);
        let command = match &self.field {
            Some(field) => Cmd::hget(key, field),
            None => Cmd::get(key),
        };
        match self.way.query(&command).await {
            Err(error) => Answer::Failed(error.to_string().replace(char::is_control, " ")),
            Ok(None) => Answer::Unknown,
            Ok(Some(value)) => match std::str::from_utf8(&value) {
                Ok(text) => answer(self.declared.text(text)),
                Err(_) => Answer::Failed("the value is not UTF-8".to_owned()),
            },
        }
    }
}

impl Way {
    async fn query(&self, command: &Cmd) -> Result<Option<Vec<u8>>, RedisError> {
        match self {
            Self::Server { client, settings, connected } => {
                let connect = || ConnectionManager::new_with_config(client.clone(), settings.clone());
                let mut connection = connected.get_or_try_init(connect).await?.clone();
                command.query_async(&mut connection).await
            }
            Self::Cluster { client, connected } => {
                let mut connection = connected.get_or_try_init(|| client.get_async_connection()).await?.clone();
                command.query_async(&mut connection).await
            }
            Self::Sentinel { client, connected } => {
                let known = connected.lock().await.clone();
                if let Some(mut connection) = known
                    && let Ok(value) = command.query_async(&mut connection).await
                {
                    return Ok(value);
                }
                let mut connection = client.lock().await.get_async_connection().await?;
                let value = command.query_async(&mut connection).await?;
                *connected.lock().await = Some(connection);
                Ok(value)
            }
        }
    }
}

/// What all ways need to be told.
struct Builder<'a> {
    config: &'a Config,
    user: Option<&'a str>,
    password: Option<Zeroizing<String>>,
    roots: Option<Vec<u8>>,
    timeout: std::time::Duration,
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

    fn way(&self, redis: &config::Redis) -> Result<Way, Problem> {
        match &redis.place {
            RedisPlace::Server(url) => {
                let info = self.info(url)?;
                let client = match &self.roots {
                    Some(_) => Client::build_with_tls(info, self.certificates()),
                    None => Client::open(info),
                };
                let client = client.map_err(|error| self.wrong(url, &error))?;
                let settings = ConnectionManagerConfig::new()
                    .set_number_of_retries(0)
                    .set_connection_timeout(Some(self.timeout))
                    .set_response_timeout(Some(self.timeout));
                Ok(Way::Server { client, settings, connected: OnceCell::new() })
            }
            RedisPlace::Cluster(urls) => {
                let nodes = urls.iter().map(|url| self.info(url)).collect::<Result<Vec<_>, _>>()?;
                let mut builder =
                    ClusterClientBuilder::new(nodes).connection_timeout(self.timeout).response_timeout(self.timeout);
                if self.roots.is_some() {
                    builder = builder.certs(self.certificates());
                }
                let client = builder.build().map_err(|error| self.wrong(&urls[0], &error))?;
                Ok(Way::Cluster { client, connected: OnceCell::new() })
            }
            RedisPlace::Sentinel { urls, master } => {
                let infos = urls.iter().map(|url| self.info(url)).collect::<Result<Vec<_>, _>>()?;
                let encrypted = urls.iter().any(|url| url.value.starts_with("rediss://"));
                let addresses = infos.iter().map(|info| info.addr().clone());
                let mut builder = SentinelClientBuilder::new(addresses, master.clone(), SentinelServerType::Master)
                    .map_err(|error| self.wrong(&urls[0], &error))?;
                builder = builder.set_client_to_redis_db(infos[0].redis_settings().db());
                if let Some(user) = self.user {
                    builder = builder.set_client_to_redis_username(user);
                }
                if let Some(password) = &self.password {
                    builder = builder.set_client_to_redis_password(password.as_str());
                }
                if encrypted {
                    builder = builder.set_client_to_redis_tls_mode(TlsMode::Secure);
                    if self.roots.is_some() {
                        builder = builder
                            .set_client_to_redis_certificates(self.certificates())
                            .set_client_to_sentinel_certificates(self.certificates());
                    }
                }
                let client = builder.build().map_err(|error| self.wrong(&urls[0], &error))?;
                Ok(Way::Sentinel { client: Mutex::new(client), connected: Mutex::default() })
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
        Ok(info.set_redis_settings(settings))
    }

    fn certificates(&self) -> TlsCertificates {
        TlsCertificates { client_tls: None, root_cert: self.roots.clone() }
    }

    fn wrong(&self, url: &Located<String>, error: &RedisError) -> Problem {
        self.config.problem(&url.place, format!("the URL cannot be used: {error}"))
    }
}
