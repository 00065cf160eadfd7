//! Everything a session asks or uses, as one immutable value: built whole, swapped whole. A login takes the one that holds
//! then. An established session keeps its [`SessionSettings`] alone, so that nothing else of an old configuration, such as
//! connections to directories, stays in use for as long as a session lasts.

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

/// See the module.
pub struct Snapshot {
    /// What it was built from.
    pub config: Config,
    /// Who belongs where.
    pub router: Router,
    /// The servers.
    pub backends: Arc<Backends>,
    /// What clients are shown; absent where every listener is plain.
    pub tls: Option<DownstreamTls>,
    /// Who is logged in where. The process's, not this configuration's.
    pub session_registry: Arc<SessionRegistry>,
    /// How long servers take to refuse a login. The process's too.
    pub refusal_latency: Arc<RefusalLatency>,
    /// Deadlines and caps.
    pub limits: Arc<Limits>,
    /// Who may come in and try. The process's too.
    pub admission: Arc<AdmissionControl>,
    /// Who else is asked.
    pub auth_policy: Option<Arc<AuthPolicy>>,
    /// Warnings about unexpected PROXY headers, one for each listener.
    pub proxy_header_warnings: Vec<WarningLimit>,
    /// What is counted.
    pub metrics: Arc<Metrics>,
    /// What an established session keeps.
    pub session_settings: Arc<SessionSettings>,
}

/// What an established session needs of a configuration.
#[derive(Debug)]
pub struct SessionSettings {
    /// Deadlines and caps.
    pub limits: Arc<Limits>,
    /// Counters and gauges.
    pub metrics: Arc<Metrics>,
}

impl Snapshot {
    /// Builds everything and binds nothing: certificates, tables, roots. What outlives a configuration is taken over from
    /// `previous`: counts, what is known of servers, kept answers, and a table that has not changed.
    ///
    /// # Errors
    /// All problems of all rooms.
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
                // Its rules are replaced when this configuration is, see `Running::reload`.
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

    /// Ways to log in that the listener at this place offers just now.
    pub fn mechanisms(&self, listener: usize) -> Mechanisms {
        self.config.listeners[listener].mechanisms.unwrap_or_else(|| self.backends.offer().mechanisms)
    }

    /// Whether a login on behalf of another user may come from there.
    pub fn allows_masters_from(&self, client: IpAddr) -> bool {
        let networks = self.config.master_networks.as_ref();
        networks.is_none_or(|networks| networks.iter().any(|network| network.contains(client)))
    }

    /// Whose mailboxes the owners of client certificates may open at the listener at this place.
    pub fn delegations(&self, listener: usize) -> &[Delegation] {
        self.config.listeners[listener].client_certificates.as_ref().map_or(&[], |wanted| &wanted.may_act_for)
    }

    /// The servers to try for `user` in this place, in order; waits for DNS only while it has never answered.
    pub async fn servers(&self, place: &Destination, user: &str) -> Vec<Arc<Server>> {
        let backend = self.backends.backend(place.backend);
        match &place.server {
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

/// What connections are served with from now on.
#[derive(Clone)]
pub struct ListenerConfig {
    /// The configuration, built.
    pub snapshot: Arc<Snapshot>,
    /// The listener's place in it.
    pub index: usize,
}

impl std::fmt::Debug for ListenerConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ListenerConfig").field("index", &self.index).finish_non_exhaustive()
    }
}
