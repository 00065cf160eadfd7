//! Builds backends from the configuration, and takes over what is known about their servers from the previous one.

use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex};

use tokio_rustls::rustls::pki_types::ServerName;

use super::capacity::QueueLength;
use super::credentials::ProxyCredentials;
use super::discovery::Resolver;
use super::health_checker::CheckSettings;
use super::server::{ServerSettings, ServerState};
use super::server_group::ServerGroup;
use super::source_addresses::SourceAddresses;
use super::state_override::StateOverrides;
use super::undeclared_servers::UndeclaredServers;
use super::{Backend, Backends, Server, offer};
use crate::admin_state::AdminState;
use crate::config::{self, BackendId, Config, Host, Problem, TlsMode, Trust};
use crate::metrics::Metrics;
use crate::tls::upstream::UpstreamTls;

impl Backends {
    /// Builds all backends, without connecting to servers or DNS. What is known about servers that remain is taken over
    /// from `previous`.
    ///
    /// # Errors
    /// Every problem with files, server names and the system's resolver configuration.
    pub fn build(config: &Config, metrics: &Arc<Metrics>, previous: Option<&Self>) -> Result<Self, Vec<Problem>> {
        let state_overrides = previous.map(|previous| previous.state_overrides.clone()).unwrap_or_default();
        let mut problems = Vec::new();
        let mut list = Vec::new();
        for (index, backend) in config.backends.iter().enumerate() {
            let previous = previous.and_then(|previous| previous.named(&backend.name));
            match Backend::build(backend, BackendId(index), (metrics, &state_overrides), previous) {
                Ok(backend) => list.push(Arc::new(backend)),
                Err(problem) => problems.push(problem),
            }
        }
        let resolver = match resolver(config, &list) {
            Ok(resolver) => resolver,
            Err(problem) => {
                problems.push(problem);
                None
            }
        };
        if !problems.is_empty() {
            return Err(problems);
        }
        let offer = AtomicU64::new(offer::pack(offer::PASSWORDS_ONLY));
        let backends = Self { list, resolver, offer, state_overrides };
        backends.update_offer();
        Ok(backends)
    }
}

fn resolver(config: &Config, backends: &[Arc<Backend>]) -> Result<Option<Resolver>, Problem> {
    if !backends.iter().any(|backend| backend.needs_dns()) {
        return Ok(None);
    }
    Resolver::build(&config.resolver).map(Some).map_err(|error| {
        let text = format!("servers are given by name, but DNS cannot be used: {error}");
        config.backends[0].location.problem(text)
    })
}

impl Backend {
    fn build(
        config: &config::Backend,
        id: BackendId,
        (metrics, state_overrides): (&Arc<Metrics>, &StateOverrides),
        previous: Option<&Arc<Self>>,
    ) -> Result<Self, Problem> {
        let is_insecure = config.tls.mode != TlsMode::None && matches!(config.tls.trust, Trust::Insecure);
        metrics.backend(id.0).set_insecure(is_insecure);
        let default_settings = ServerSettings::new(&config.balancing, None, AdminState::Up);
        let undeclared = previous.map(|previous| &previous.undeclared_servers);
        let mut backend = Self {
            name: config.name.as_str().into(),
            id,
            source_addresses: SourceAddresses::new(&config.source_addresses),
            tls: UpstreamTls::build(config)?,
            tls_mode: config.tls.mode,
            client_info: config.client_info,
            allows_authzid: config.authzid == config::Authzid::Allow,
            credentials: config.login.as_ref().map(ProxyCredentials::read).transpose()?,
            follows_referrals: config.referrals == config::Referrals::Follow,
            login_rules: config.login_rules.clone(),
            forward: config.forward.clone(),
            balance: config.balancing.balance,
            check_settings: config.balancing.check.as_ref().map(CheckSettings::build).transpose()?.map(Arc::new),
            queue_length: QueueLength::default(),
            queue_limits: config.balancing.queue,
            round_robin_credits: Mutex::default(),
            groups: Vec::new(),
            undeclared_servers: UndeclaredServers::new(default_settings, undeclared),
            metrics: metrics.clone(),
            state_overrides: state_overrides.clone(),
        };
        backend.groups = groups(config, &backend, default_settings, previous)?;
        Ok(backend)
    }

    fn fixed_server(&self, name: &str) -> Option<Arc<Server>> {
        let fixed = self.groups.iter().filter(|group| group.srv_name.is_none());
        fixed.flat_map(ServerGroup::current).find(|server| &*server.name == name)
    }

    fn needs_dns(&self) -> bool {
        self.groups.iter().any(|group| {
            group.srv_name.is_some() || group.current().iter().any(|server| matches!(server.host, Host::Name(_)))
        })
    }
}

/// The groups of a backend: one for each SRV record, and one for all other servers.
fn groups(
    config: &config::Backend,
    backend: &Backend,
    default_settings: ServerSettings,
    previous: Option<&Arc<Backend>>,
) -> Result<Vec<ServerGroup>, Problem> {
    let mut fixed = Vec::new();
    let mut groups = Vec::new();
    for server in &config.servers {
        match server {
            config::Server::Srv { name, max_sessions, state, .. } => {
                let settings = ServerSettings::new(&config.balancing, *max_sessions, *state);
                let previous = previous
                    .and_then(|previous| previous.groups.iter().find(|group| group.srv_name.as_ref() == Some(name)));
                groups.push(ServerGroup::of_srv_record(name.clone(), settings, previous));
            }
            config::Server::Address { name, host, port, weight, max_sessions, state, location } => {
                let tls_name = tls_name(host).map_err(|message| location.problem(message))?;
                let known = previous.and_then(|previous| previous.fixed_server(name));
                let new = || ServerState::new(host, *port, backend.server_metrics(name), backend.state_override(name));
                fixed.push(Arc::new(Server {
                    name: name.as_str().into(),
                    backend: backend.name.clone(),
                    host: host.clone(),
                    port: *port,
                    weight: *weight,
                    priority: 0,
                    tls_name,
                    settings: ServerSettings::new(&config.balancing, *max_sessions, *state),
                    state: known.map_or_else(new, |known| known.state.clone()),
                }));
            }
        }
    }
    groups.push(ServerGroup::fixed(fixed, default_settings));
    Ok(groups)
}

fn tls_name(host: &Host) -> Result<ServerName<'static>, String> {
    match host {
        Host::Ip(ip) => Ok(ServerName::from(*ip)),
        Host::Name(name) => ServerName::try_from(name.clone()).map_err(|_| format!("{name:?} is not a host name")),
    }
}
