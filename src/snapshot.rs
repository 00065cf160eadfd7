//! One loaded configuration and everything built from it, as one immutable value that a reload replaces as a whole.
//!
//! A login uses the snapshot that is current when it begins. An established session keeps only its [`SessionSettings`], so that
//! nothing else of an old configuration, such as connections to directories, stays in use until the session ends. Values that
//! outlive a configuration are shared with the previous snapshot. A snapshot binds no sockets.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;

use crate::admission::AdmissionControl;
use crate::admission::refusal_latency::RefusalLatency;
use crate::auth_policy::AuthPolicy;
use crate::backend::{Backends, Server};
use crate::config::{Config, Limits, Report};
use crate::identity::{Delegation, Mechanisms};
use crate::logging::warning_limit::WarningLimit;
use crate::metrics::{Metrics, Names};
use crate::route::{self, Destination, Router, ServerChoice};
use crate::session_registry::SessionRegistry;
use crate::tls::downstream::DownstreamTls;

/// Everything that a session uses, built from one configuration.
pub struct Snapshot {
    /// The configuration.
    pub config: Config,
    /// The routes.
    pub router: Router,
    /// The backends and their servers.
    pub backends: Arc<Backends>,
    /// TLS towards clients; absent if no listener uses TLS.
    pub tls: Option<DownstreamTls>,
    /// The sessions and logins of the process, shared by all snapshots.
    pub session_registry: Arc<SessionRegistry>,
    /// Latencies of refused logins, shared by all snapshots.
    pub refusal_latency: Arc<RefusalLatency>,
    /// The section `limits`.
    pub limits: Arc<Limits>,
    /// Limits of connections and logins, shared by all snapshots.
    pub admission: Arc<AdmissionControl>,
    /// The client of the policy service, if one is configured.
    pub auth_policy: Option<Arc<AuthPolicy>>,
    /// Rate limits of the warning about unexpected PROXY headers, one for each listener.
    pub proxy_header_warnings: Vec<WarningLimit>,
    /// The metrics.
    pub metrics: Arc<Metrics>,
    /// The part that an established session keeps.
    pub session_settings: Arc<SessionSettings>,
}

/// The part of a configuration that an established session needs.
#[derive(Debug)]
pub struct SessionSettings {
    /// The section `limits`.
    pub limits: Arc<Limits>,
    /// The metrics.
    pub metrics: Arc<Metrics>,
}

impl Snapshot {
    /// Builds a snapshot: reads certificates, tables and trusted roots. It takes from `previous` what outlives a configuration:
    /// counts, the health of servers, cached lookups, and tables that have not changed.
    ///
    /// # Errors
    /// All problems that the modules have found.
    pub fn build(config: Config, previous: Option<&Self>) -> Result<Self, Report> {
        let names = Names {
            listeners: config.listeners.iter().map(|listener| listener.address.to_string()).collect(),
            backends: config.backends.iter().map(|backend| backend.name.clone()).collect(),
            routes: route::labels(&config.routes),
        };
        let metrics = Arc::new(match previous {
            Some(previous) => previous.metrics.for_names(&names),
            None => Metrics::new(&names),
        });
        let tls = DownstreamTls::build(&config, previous.and_then(|previous| previous.tls.as_ref()));
        let known = previous.map(|previous| (&previous.config, &previous.router));
        let router = Router::build(&config, &metrics, known);
        let backends = Backends::build(&config, &metrics, previous.map(|previous| &*previous.backends));
        let policy = AuthPolicy::build(&config);
        let limits = Arc::new(config.limits.clone());
        match (tls, router, backends, policy) {
            (Ok(tls), Ok(router), Ok(backends), Ok(policy)) => Ok(Self {
                router,
                backends: Arc::new(backends),
                tls,
                session_registry: previous.map(|previous| previous.session_registry.clone()).unwrap_or_default(),
                refusal_latency: previous.map(|previous| previous.refusal_latency.clone()).unwrap_or_default(),
                session_settings: Arc::new(SessionSettings { limits: limits.clone(), metrics: metrics.clone() }),
                limits,
                // `Running::reload` replaces its rules when this configuration takes effect.
                admission: previous.map_or_else(
                    || Arc::new(AdmissionControl::new(&config.admission, Instant::now())),
                    |previous| previous.admission.clone(),
                ),
                auth_policy: policy,
                metrics,
                proxy_header_warnings: config.listeners.iter().map(|_| WarningLimit::default()).collect(),
                config,
            }),
            (tls, router, backends, policy) => {
                let found = [tls.err(), router.err(), backends.err(), policy.err()];
                Err(Report::new(found.into_iter().flatten().flatten().collect()))
            }
        }
    }

    /// The SASL mechanisms that the listener with this index offers at present.
    pub fn mechanisms(&self, listener: usize) -> Mechanisms {
        self.config.listeners[listener].mechanisms.unwrap_or_else(|| self.backends.offer().mechanisms)
    }

    /// Whether this client may log in on behalf of another user.
    pub fn allows_masters_from(&self, client: IpAddr) -> bool {
        let networks = self.config.master_networks.as_ref();
        networks.is_none_or(|networks| networks.iter().any(|network| network.contains(client)))
    }

    /// The mailboxes that owners of client certificates may open at the listener with this index.
    pub fn delegations(&self, listener: usize) -> &[Delegation] {
        self.config.listeners[listener].client_certificates.as_ref().map_or(&[], |wanted| &wanted.may_act_for)
    }

    /// The servers to try for `user` in order. It waits for DNS only until DNS has answered once.
    pub async fn servers(&self, destination: &Destination, user: &str) -> Vec<Arc<Server>> {
        let backend = self.backends.backend(destination.backend);
        match &destination.server {
            ServerChoice::Any => backend.candidates(user).await,
            ServerChoice::Server(name) => {
                let mut servers = backend.candidates(user).await;
                servers.retain(|server| *server.name == **name);
                servers
            }
            ServerChoice::Address(address) => backend.undeclared_server(*address).into_iter().collect(),
        }
    }
}

/// The configuration with which a listener serves new connections.
#[derive(Clone)]
pub struct ListenerConfig {
    /// The snapshot.
    pub snapshot: Arc<Snapshot>,
    /// The index of the listener in it.
    pub index: usize,
}

impl std::fmt::Debug for ListenerConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ListenerConfig").field("index", &self.index).finish_non_exhaustive()
    }
}
