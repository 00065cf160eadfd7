//! Client of an authentication policy service, such as weakforced, that is queried before each login and receives its result.
//!
//! The protocol is that of weakforced as Dovecot uses it. `POST ?command=allow` sends `login`, `remote`, `pwhash`, `protocol`, `tls`,
//! `device_id` and `session_id`; the response's `status` is -1 to refuse the login, 0 to allow it, or the number of seconds to delay it.
//! `POST ?command=report` sends the same with `success` and `policy_reject`, in a task that the login does not wait for.
//!
//! The password is never sent. `pwhash` is SHA-256 of the nonce, the login, a zero byte and the password, and only its first `hash_bits`
//! bits are sent: the service can distinguish one wrong password tried a hundred times from a hundred passwords tried once, but the bits
//! do not identify the password. If the login has no password, `pwhash` is empty.

use std::net::IpAddr;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use aws_lc_rs::digest::{Context, SHA256};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue};
use hyper::{Method, StatusCode, Uri};
use serde::{Deserialize, Serialize};
use tokio::runtime::Handle;
use tokio::sync::Semaphore;
use tokio_util::task::AbortOnDropHandle;
use zeroize::Zeroizing;

use crate::config::{self, Config, Problem};
use crate::deadline::Deadline;
use crate::identity::Credentials;
use crate::lookup::hedge::Budget;
use crate::lookup::http_client::{HttpClient, Repeat};
use crate::lookup::thread::{GRACE, LookupThread};
use crate::metrics::{Metrics, PolicyAnswer, PolicyCommand};
use crate::tls;

/// Maximum number of idle connections.
const MAX_IDLE_CONNECTIONS: usize = 8;
/// Maximum number of reports in progress; further reports are dropped and counted as failed.
const MAX_REPORTS: usize = 1024;
/// Failure of a request whose thread did not report its timeout.
const NOT_RESPONDING: &str = "no answer within policy.timeout: the thread of the policy service does not respond";
/// Longest delay that the service can impose.
const MAX_DELAY: Duration = Duration::from_secs(30);

/// A client of the configured service.
#[derive(Debug)]
pub struct AuthPolicy {
    client: HttpClient,
    allow_url: Uri,
    report_url: Uri,
    nonce: Zeroizing<Vec<u8>>,
    hash_bits: usize,
    timeout: Duration,
    fail_open: bool,
    reports: Arc<Semaphore>,
    /// Started with the first request. `None` if the system cannot start a thread; requests then run on the caller's runtime.
    thread: OnceLock<Option<LookupThread>>,
}

/// A login attempt, in the fields of the protocol.
#[derive(Debug, Clone, Serialize)]
pub struct Attempt {
    login: String,
    pwhash: String,
    remote: IpAddr,
    protocol: &'static str,
    tls: bool,
    device_id: String,
    session_id: String,
}

/// Result of a login attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LoginResult {
    /// The server accepted the credentials.
    Success,
    /// The login failed.
    Failure,
    /// The policy service refused the login, and no server was contacted.
    RejectedByPolicy,
}

#[derive(Serialize)]
struct Report<'a> {
    #[serde(flatten)]
    attempt: &'a Attempt,
    success: bool,
    policy_reject: bool,
}

#[derive(Deserialize)]
struct Response {
    status: i64,
}

/// Decision about a login attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PolicyDecision {
    /// The login continues after this delay.
    Allowed(Duration),
    /// The login is refused like one with a wrong password.
    Denied,
    /// The service did not answer, and `policy.on_failure` is `deny`.
    Unavailable,
}

impl AuthPolicy {
    /// Builds the configured client; `None` if no service is configured.
    ///
    /// # Errors
    /// An invalid URL, or a file that cannot be read.
    pub fn build(config: &Config) -> Result<Option<Arc<Self>>, Vec<Problem>> {
        let Some(policy) = &config.policy else { return Ok(None) };
        Self::new(policy).map(|policy| Some(Arc::new(policy))).map_err(|problem| vec![problem])
    }

    fn new(policy: &config::Policy) -> Result<Self, Problem> {
        let mut headers = HeaderMap::new();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        let mut secret = |name: HeaderName, location: &config::Location, text: Zeroizing<String>| {
            let mut value = HeaderValue::try_from(text.as_str())
                .map_err(|_| location.problem("the content of the file is not a valid header value"))?;
            value.set_sensitive(true);
            headers.insert(name, value);
            Ok(())
        };
        if let Some(file) = &policy.password {
            let password = file.read_secret()?;
            let user_and_password = Zeroizing::new(format!("{}:{}", policy.user, *password));
            secret(
                AUTHORIZATION,
                &file.location,
                Zeroizing::new(format!("Basic {}", STANDARD.encode(user_and_password.as_bytes()))),
            )?;
        }
        if let Some(file) = &policy.api_key {
            secret(HeaderName::from_static("x-api-key"), &file.location, file.read_secret()?)?;
        }
        let client = HttpClient::build(&policy.url, policy.ca.as_ref(), headers, MAX_IDLE_CONNECTIONS)?;
        let command = |name: &str| {
            format!("{}?command={name}", policy.url.value)
                .parse()
                .map_err(|error| policy.url.location.problem(format!("invalid URL: {error}")))
        };
        Ok(Self {
            allow_url: command("allow")?,
            report_url: command("report")?,
            client,
            nonce: Zeroizing::new(policy.nonce.read_secret()?.as_bytes().to_vec()),
            hash_bits: policy.hash_bits as usize,
            timeout: policy.timeout,
            fail_open: policy.on_failure == config::OnFailure::Allow,
            reports: Arc::new(Semaphore::new(MAX_REPORTS)),
            thread: OnceLock::new(),
        })
    }

    /// Closes idle connections, because a new configuration has replaced this one.
    pub fn retire(&self) {
        self.client.retire();
    }

    /// Describes a login attempt; `device` is the client's own description (IMAP ID).
    pub fn attempt(
        &self,
        credentials: &Credentials,
        client: IpAddr,
        tls: bool,
        device: String,
        session: &str,
    ) -> Attempt {
        let login = credentials.user.as_str();
        let hashed = |password: &[u8]| pwhash(&self.nonce, login, password, self.hash_bits);
        Attempt {
            login: login.to_owned(),
            pwhash: credentials.password().map(|password| hashed(password.expose())).unwrap_or_default(),
            remote: client,
            protocol: "imap",
            tls,
            device_id: device,
            session_id: session.to_owned(),
        }
    }

    /// Queries the service whether the login may be tried.
    pub async fn allow(self: &Arc<Self>, attempt: &Attempt, metrics: &Metrics) -> PolicyDecision {
        let status = self.query_on_thread(attempt).await;
        let (decision, counted) = match status {
            Ok(status) => decision_of(status),
            Err(error) => {
                let error = tls::explain_error(error);
                tracing::warn!(session = attempt.session_id, %error, "the policy service did not answer");
                let decision =
                    if self.fail_open { PolicyDecision::Allowed(Duration::ZERO) } else { PolicyDecision::Unavailable };
                (decision, PolicyAnswer::Failed)
            }
        };
        metrics.policy(PolicyCommand::Allow, counted);
        decision
    }

    /// Sends the request on the thread of the policy service. Dropping the future cancels the request.
    async fn query_on_thread(self: &Arc<Self>, attempt: &Attempt) -> Result<i64, String> {
        let thread = self.thread();
        if thread.is_some_and(LookupThread::is_stalled) {
            return Err(NOT_RESPONDING.to_owned());
        }
        let (policy, attempt) = (self.clone(), attempt.clone());
        let request = async move {
            let budget = Budget::of(policy.timeout);
            match budget.limit(policy.post(&policy.allow_url, &attempt, &budget, Repeat::IfUnanswered)).await {
                Ok(answer) => answer,
                Err(expired) if expired.is_connecting => {
                    Err("no answer within policy.timeout: the connection was not established".to_owned())
                }
                Err(_) => Err("no answer within policy.timeout".to_owned()),
            }
        };
        let request = AbortOnDropHandle::new(self.runtime().spawn(request));
        match Deadline::after(self.timeout + GRACE).limit(request).await {
            Ok(answer) => answer.unwrap_or_else(|_| Err("the request was aborted".to_owned())),
            Err(_) => {
                thread.inspect(|thread| thread.set_stalled());
                Err(NOT_RESPONDING.to_owned())
            }
        }
    }

    fn thread(&self) -> Option<&LookupThread> {
        let start = || {
            LookupThread::start("policy")
                .inspect_err(|error| tracing::error!(%error, "no thread for requests to the policy service"))
                .ok()
        };
        self.thread.get_or_init(start).as_ref()
    }

    fn runtime(&self) -> Handle {
        self.thread().map_or_else(Handle::current, |thread| thread.handle().clone())
    }

    /// Reports the result of a login attempt, in a separate task.
    pub fn report(self: &Arc<Self>, attempt: Attempt, result: LoginResult, metrics: &Arc<Metrics>) {
        let Ok(permit) = self.reports.clone().try_acquire_owned() else {
            metrics.policy(PolicyCommand::Report, PolicyAnswer::Failed);
            return;
        };
        let (policy, metrics) = (self.clone(), metrics.clone());
        self.runtime().spawn(async move {
            let (success, policy_reject) = (result == LoginResult::Success, result == LoginResult::RejectedByPolicy);
            let report = Report { attempt: &attempt, success, policy_reject };
            let budget = Budget::of(policy.timeout);
            // The service counts every report it receives, so a report must not be sent twice.
            let request = policy.post(&policy.report_url, &report, &budget, Repeat::Never);
            let is_received = matches!(budget.limit(request).await, Ok(Ok(_)));
            let counted = if is_received { PolicyAnswer::Allowed } else { PolicyAnswer::Failed };
            metrics.policy(PolicyCommand::Report, counted);
            drop(permit);
        });
    }

    /// Returns the status in the response. The error is a message for the operator.
    async fn post(&self, url: &Uri, body: &impl Serialize, budget: &Budget, repeat: Repeat) -> Result<i64, String> {
        let body = serde_json::to_vec(body).map_err(|error| error.to_string())?;
        let request = self.client.request_to(url.clone(), Method::POST, body)?;
        let (head, body) = self.client.fetch(request, budget, repeat).await?;
        if head.status != StatusCode::OK {
            return Err(format!("the service responded {}", head.status));
        }
        // The error of serde is not used, because it would quote the response.
        let response = serde_json::from_slice::<Response>(&body);
        response
            .map(|response| response.status)
            .map_err(|_| "the response is not a JSON object with a status".to_owned())
    }
}

fn decision_of(status: i64) -> (PolicyDecision, PolicyAnswer) {
    match u64::try_from(status) {
        Err(_) => (PolicyDecision::Denied, PolicyAnswer::Denied),
        Ok(0) => (PolicyDecision::Allowed(Duration::ZERO), PolicyAnswer::Allowed),
        Ok(seconds) => (PolicyDecision::Allowed(Duration::from_secs(seconds).min(MAX_DELAY)), PolicyAnswer::Delayed),
    }
}

/// Computes `pwhash` like Dovecot: the first `bits` bits of the digest as a number in hexadecimal digits of whole bytes; 0 means the whole
/// digest.
fn pwhash(nonce: &[u8], login: &str, password: &[u8], bits: usize) -> String {
    let mut context = Context::new(&SHA256);
    for part in [nonce, login.as_bytes(), &[0], password] {
        context.update(part);
    }
    let digest = context.finish();
    let mut prefix = digest.as_ref().to_vec();
    if bits > 0 {
        prefix.truncate(bits.div_ceil(8));
        let shift = prefix.len() * 8 - bits.min(prefix.len() * 8);
        let mut carried = 0u8;
        for byte in &mut prefix {
            let value = u16::from(carried) << 8 | u16::from(*byte);
            carried = *byte;
            *byte = (value >> shift) as u8;
        }
    }
    prefix.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The digest was computed by `printf 'noncealice\0secret' | sha256sum`.
    #[test]
    fn pwhash_is_the_first_bits_of_a_salted_hash() {
        let all = pwhash(b"nonce", "alice", b"secret", 0);
        assert_eq!(all, "d525ffa945844a81c8787545b30c7ce6b396cf0ccae99a8b6a06f9b880986186");
        let first = u16::from_str_radix(&all[..4], 16).unwrap();
        assert_eq!(pwhash(b"nonce", "alice", b"secret", 16), format!("{first:04x}"));
        assert_eq!(pwhash(b"nonce", "alice", b"secret", 12), format!("{:04x}", first >> 4));
        assert_eq!(pwhash(b"nonce", "alice", b"secret", 9), format!("{:04x}", first >> 7));
        assert_eq!(pwhash(b"nonce", "alice", b"secret", 8), format!("{:02x}", first >> 8));
        assert_eq!(pwhash(b"nonce", "alice", b"secret", 3), format!("{:02x}", first >> 13));
        assert_eq!(pwhash(b"nonce", "alice", b"secret", 256), all);
        assert_ne!(pwhash(b"nonce", "alic", b"esecret", 0), all, "the zero byte separates login and password");
        assert_ne!(pwhash(b"other", "alice", b"secret", 0), all);
    }

    #[test]
    fn status_is_mapped_to_a_decision() {
        assert_eq!(decision_of(-1), (PolicyDecision::Denied, PolicyAnswer::Denied));
        assert_eq!(decision_of(0), (PolicyDecision::Allowed(Duration::ZERO), PolicyAnswer::Allowed));
        assert_eq!(decision_of(3), (PolicyDecision::Allowed(Duration::from_secs(3)), PolicyAnswer::Delayed));
        assert_eq!(decision_of(i64::MAX), (PolicyDecision::Allowed(MAX_DELAY), PolicyAnswer::Delayed));
    }
}
