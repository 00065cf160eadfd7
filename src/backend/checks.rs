//! Asks servers whether they are well, and what they offer before login, so that clients are offered just that.
//!
//! One task a backend, a check a server every `interval`, give or take a tenth, so that neither many servers nor many
//! proxies are asked in step. One connection serves both questions. A server that is down by the operator's word is left
//! alone. What the results mean is `health`'s matter. Called by `Backends::watch`.

use std::collections::HashMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{self, Instant};

use super::connect;
use super::dial::dial;
use super::health::Depth;
use super::request::{Fault, Outcome, Purpose, Request, Seen};
use super::server::ServerState;
use super::{Backend, Backends, Group, Server, chance};
use crate::admin_state::AdminState;
use crate::config::{self, BackendId, CheckKind, Limits, Problem};
use crate::deadline::Deadline;
use crate::failure::Reason;
use crate::identity::{PasswordLogin, Secret, ServerLogin, UserName};
use crate::metrics::CheckMetrics;
use crate::protocol::imap::client_id::ClientId;
use crate::protocol::imap::tag::Tag;

/// Servers of an SRV record come and go: they are looked for this often.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// A backend's checks, ready for use.
#[derive(Debug)]
pub(super) struct HealthChecker {
    check: config::Check,
    account: Option<(UserName, Secret)>,
}

impl HealthChecker {
    /// Reads the password of the account that logs in.
    pub(super) fn build(check: &config::Check) -> Result<Self, Problem> {
        let account = match &check.kind {
            CheckKind::Login { account, password } => {
                let password = password.read_secret()?;
                Some((account.clone(), Secret::new(password.as_bytes().to_vec())))
            }
            CheckKind::Tcp | CheckKind::Tls | CheckKind::Imap => None,
        };
        Ok(Self { check: check.clone(), account })
    }
}

/// What is next for one server.
struct CheckSchedule {
    /// Of which server: another may get the same name.
    state: Arc<ServerState>,
    due: Instant,
    under_way: Option<AbortHandle>,
    metrics: CheckMetrics,
}

impl CheckSchedule {
    fn is_under_way(&self) -> bool {
        self.under_way.as_ref().is_some_and(|check| !check.is_finished())
    }
}

impl Drop for CheckSchedule {
    fn drop(&mut self) {
        // The server is gone: nothing more is to be told of it.
        if let Some(check) = &self.under_way {
            check.abort();
        }
    }
}

/// Checks the backend's servers again and again.
pub(super) async fn follow(backends: Arc<Backends>, backend: Arc<Backend>, limits: Arc<Limits>) {
    let Some(watch) = &backend.watch else { return };
    let kind = watch.check.kind.as_str();
    let own = backend.metrics.backend(backend.id.0);
    let mut courses: HashMap<Arc<str>, CheckSchedule> = HashMap::new();
    // Whatever is under way ends with this.
    let mut running = JoinSet::new();
    let comes_and_goes = backend.groups.iter().any(|group| group.service.is_some());
    loop {
        let servers: Vec<Arc<Server>> = backend.groups.iter().flat_map(Group::current).collect();
        courses.retain(|name, course| {
            let is_it = |server: &Arc<Server>| Arc::ptr_eq(&server.state, &course.state);
            let stays = servers.iter().any(is_it);
            if !stays && !servers.iter().any(|server| server.name == *name) {
                // A check may have ended after its series did.
                own.forget_server(name);
            }
            stays
        });
        let now = Instant::now();
        let mut next = now + if comes_and_goes { LOOK_AGAIN } else { watch.check.interval };
        for server in servers {
            let course = courses.entry(server.name.clone()).or_insert_with(|| CheckSchedule {
                state: server.state.clone(),
                due: now,
                under_way: None,
                metrics: own.checks(&server.name, kind),
            });
            if course.due > now {
                next = next.min(course.due);
            } else if server.admin_state() == AdminState::Down {
                next = next.min(now + LOOK_AGAIN);
            } else if !course.is_under_way() {
                course.due = now + watch.check.interval.mul_f64(0.9 + 0.2 * chance());
                next = next.min(course.due);
                let metrics = course.metrics.clone();
                let (backends, backend, limits) = (backends.clone(), backend.clone(), limits.clone());
                course.under_way = Some(running.spawn(async move {
                    check(&backend, &server, &limits, &metrics).await;
                    backends.consider_offers();
                }));
            }
        }
        tokio::select! {
            Some(_) = running.join_next() => {}
            () = time::sleep_until(next) => {}
        }
    }
}

async fn check(backend: &Backend, server: &Arc<Server>, limits: &Limits, metrics: &CheckMetrics) {
    let Some(watch) = &backend.watch else { return };
    let began = Instant::now();
    let timeout = watch.check.timeout;
    let result = asked(backend, server, purpose(&watch.check.kind), watch.account.as_ref(), limits, timeout).await;
    if let Err(failed) = &result
        && failed.is_local
    {
        // The server was not asked: what is known of it stays.
        let (backend, server, detail) = (&backend.name, &server.name, &failed.detail);
        return tracing::warn!(%backend, %server, %detail, "this machine cannot check the server");
    }
    metrics.checked(result.is_ok(), began.elapsed());
    let depth = match watch.check.kind {
        CheckKind::Tcp | CheckKind::Tls => Depth::Connection,
        CheckKind::Imap | CheckKind::Login { .. } => Depth::Dialogue,
    };
    match &result {
        Ok(seen) => {
            if let Some(ends) = seen.certificate_ends {
                metrics.certificate(ends);
            }
            server.offers(seen.offer);
            // Without a login a server may leave it out.
            if seen.unauthenticate || watch.account.is_some() {
                server.set_unauthenticate(seen.unauthenticate);
            }
            server.checked(Ok(()), depth);
        }
        Err(CheckFailure { detail, .. }) => {
            tracing::debug!(backend = %backend.name, server = %server.name, %detail, "check failed");
            // A server that cannot be asked restricts nobody.
            server.offers(None);
            server.checked(Err(detail), depth);
        }
    }
}

/// A check that failed.
#[derive(Debug)]
struct CheckFailure {
    /// A sentence for the operator.
    detail: String,
    /// Whether the cause is in this machine.
    is_local: bool,
    reason: Option<Reason>,
}

impl From<Fault> for CheckFailure {
    fn from(fault: Fault) -> Self {
        Self { is_local: fault.is_local(), reason: Some(fault.reason), detail: fault.detail }
    }
}

impl From<&str> for CheckFailure {
    fn from(detail: &str) -> Self {
        Self { detail: detail.to_owned(), is_local: false, reason: None }
    }
}

/// `None`: the check is over when the connection stands.
fn purpose(kind: &CheckKind) -> Option<Purpose> {
    match kind {
        CheckKind::Tcp => None,
        CheckKind::Tls => Some(Purpose::CheckTls),
        CheckKind::Imap | CheckKind::Login { .. } => Some(Purpose::Check),
    }
}

impl Backends {
    /// Connects to every server that is to speak TLS; returns those with which that fails, and why. A server that cannot
    /// be reached within `timeout` is left out.
    pub async fn tls_faults(
        self: Arc<Self>,
        limits: &Arc<Limits>,
        timeout: Duration,
    ) -> Vec<(BackendId, Arc<str>, String)> {
        let mut looks = JoinSet::new();
        for backend in self.list.iter().filter(|backend| backend.tls.is_some()).cloned() {
            let limits = limits.clone();
            looks.spawn(async move {
                let known = async {
                    let mut servers = Vec::new();
                    for group in &backend.groups {
                        servers.extend(group.first_known().await);
                    }
                    servers
                };
                let servers = time::timeout(timeout, known).await.unwrap_or_default();
                let mut looks = JoinSet::new();
                for server in servers {
                    let (backend, limits) = (backend.clone(), limits.clone());
                    looks.spawn(async move {
                        let detail = tls_fault(&backend, &server, &limits, timeout).await?;
                        Some((backend.id, server.name.clone(), detail))
                    });
                }
                looks.join_all().await
            });
        }
        looks.join_all().await.into_iter().flatten().flatten().collect()
    }
}

/// Why TLS with `server` fails. `None`: it succeeds, or the server cannot be reached.
async fn tls_fault(backend: &Backend, server: &Arc<Server>, limits: &Limits, timeout: Duration) -> Option<String> {
    let failed = asked(backend, server, Some(Purpose::CheckTls), None, limits, timeout).await.err()?;
    let is_tls = matches!(failed.reason, Some(Reason::ServerTls | Reason::StartTlsUnavailable));
    is_tls.then_some(failed.detail)
}

/// Connects to the server and looks at it.
async fn asked(
    backend: &Backend,
    server: &Arc<Server>,
    purpose: Option<Purpose>,
    account: Option<&(UserName, Secret)>,
    limits: &Limits,
    timeout: Duration,
) -> Result<Seen, CheckFailure> {
    let deadline = Deadline::after(timeout);
    let Some(purpose) = purpose else {
        dial(backend, server, deadline).await?;
        return Ok(Seen::default());
    };
    let nothing = ClientId::default();
    let tag = Tag::new(b"check").ok_or("no tag")?;
    let nobody = SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0));
    let login = account.map(|(user, password)| ServerLogin::Password(PasswordLogin { user, authzid: None, password }));
    let request = Request {
        login,
        mechanism: None,
        purpose,
        tag: &tag,
        client_id: &nothing,
        client: nobody,
        listener: nobody,
        tls: None,
        session_id: "check",
        limits,
        deadline: None,
    };
    match connect::login(backend, server, &request, deadline).await {
        Outcome::Seen(seen) => Ok(seen),
        Outcome::Unavailable(fault) => Err(fault.into()),
        Outcome::Refused { .. } => Err("the server refused the login of the check's account".into()),
        Outcome::Referred(_) => Err("the server sends the check's account elsewhere".into()),
        Outcome::Accepted(_) | Outcome::Challenged(..) => Err("the server answered what it was not asked".into()),
    }
}
