//! A service that is asked before each login and told how it ended, in the words of weakforced, as Dovecot speaks them.
//!
//! `POST ?command=allow` with `login`, `remote`, `pwhash`, `protocol`, `tls`, `device_id` and `session_id`; the answer's
//! `status` is -1: deny, 0: go on, more: go on after so many seconds. `POST ?command=report` says the same with `success` and
//! `policy_reject`, later and beside the login, which does not wait for it.
//!
//! The password never leaves: `pwhash` is SHA-256 of the nonce, the login, a zero byte and the password, of which only the
//! first `hash_bits` are told, so that the service can tell one wrong password tried a hundred times from a hundred tried
//! once, and nobody can tell the password. Where a login has none, `pwhash` is empty. Called by `session`; built by `server`.

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

/// Connections that are kept.
const CONNECTIONS: usize = 8;
/// Reports under way; those beyond are dropped, and counted as failed.
const REPORTS: usize = 1024;
/// Failure of a request whose thread did not report its timeout.
const NOT_RESPONDING: &str = "no answer within policy.timeout: the thread of the policy service does not respond";
/// No delay is longer.
const LONGEST: Duration = Duration::from_secs(30);

/// See the module.
#[derive(Debug)]
pub struct Policy {
    client: HttpClient,
    allow: Uri,
    report: Uri,
    nonce: Zeroizing<Vec<u8>>,
    hash_bits: usize,
    timeout: Duration,
    fail_open: bool,
    reports: Arc<Semaphore>,
    /// Started with the first request. `None`: the system cannot start a thread, and requests run on the caller's.
    thread: OnceLock<Option<LookupThread>>,
}

/// What is said of a login, as it goes over the wire.
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

/// How it ended.
#[derive(Serialize)]
struct Told<'a> {
    #[serde(flatten)]
    attempt: &'a Attempt,
    success: bool,
    policy_reject: bool,
}

#[derive(Deserialize)]
struct Said {
    status: i64,
}

/// What the service says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Go on, after this time.
    Allowed(Duration),
    /// Refuse it like a wrong password.
    Denied,
    /// It did not answer, and the configuration says that nobody gets in without.
    Unavailable,
}

impl Policy {
    /// `None` where none is configured.
    ///
    /// # Errors
    /// A URL that is none, a file that cannot be read.
    pub fn build(config: &Config) -> Result<Option<Arc<Self>>, Vec<Problem>> {
        let Some(policy) = &config.policy else { return Ok(None) };
        Self::of(policy).map(|built| Some(Arc::new(built))).map_err(|problem| vec![problem])
    }

    fn of(policy: &config::Policy) -> Result<Self, Problem> {
        let mut headers = HeaderMap::new();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        let mut secret = |name: HeaderName, location: &config::Location, text: Zeroizing<String>| {
            let mut value = HeaderValue::try_from(text.as_str())
                .map_err(|_| location.problem("what is in the file cannot stand in a header"))?;
            value.set_sensitive(true);
            headers.insert(name, value);
            Ok(())
        };
        if let Some(file) = &policy.password {
            let password = file.read_secret()?;
            let pair = Zeroizing::new(format!("{}:{}", policy.user, *password));
            secret(
                AUTHORIZATION,
                &file.location,
                Zeroizing::new(format!("Basic {}", STANDARD.encode(pair.as_bytes()))),
            )?;
        }
        if let Some(file) = &policy.api_key {
            secret(HeaderName::from_static("x-api-key"), &file.location, file.read_secret()?)?;
        }
        let client = HttpClient::build(&policy.url, policy.ca.as_ref(), headers, CONNECTIONS)?;
        let command = |name: &str| {
            format!("{}?command={name}", policy.url.value)
                .parse()
                .map_err(|error| policy.url.location.problem(format!("the URL cannot be used: {error}")))
        };
        Ok(Self {
            allow: command("allow")?,
            report: command("report")?,
            client,
            nonce: Zeroizing::new(policy.nonce.read_secret()?.as_bytes().to_vec()),
            hash_bits: policy.hash_bits as usize,
            timeout: policy.timeout,
            fail_open: policy.fail_open,
            reports: Arc::new(Semaphore::new(REPORTS)),
            thread: OnceLock::new(),
        })
    }

    /// Closes connections that are not in use: another configuration holds.
    pub fn retire(&self) {
        self.client.retire();
    }

    /// What is said of a login; `device` is what the client says of itself.
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

    /// Asks whether it may be tried.
    pub async fn allow(self: &Arc<Self>, attempt: &Attempt, metrics: &Metrics) -> Verdict {
        let answer = self.ask_on_thread(attempt).await;
        let (verdict, counted) = match answer {
            Ok(status) => read(status),
            Err(error) => {
                let error = tls::explained(error);
                tracing::warn!(session = attempt.session_id, %error, "the policy service did not answer");
                let verdict = if self.fail_open { Verdict::Allowed(Duration::ZERO) } else { Verdict::Unavailable };
                (verdict, PolicyAnswer::Failed)
            }
        };
        metrics.policy(PolicyCommand::Allow, counted);
        verdict
    }

    /// Asks on the thread of the policy service. If this future is dropped, the request is cancelled.
    async fn ask_on_thread(self: &Arc<Self>, attempt: &Attempt) -> Result<i64, String> {
        let thread = self.thread();
        if thread.is_some_and(LookupThread::is_stalled) {
            return Err(NOT_RESPONDING.to_owned());
        }
        let (policy, attempt) = (self.clone(), attempt.clone());
        let request = async move {
            let budget = Budget::of(policy.timeout);
            match budget.limit(policy.ask(&policy.allow, &attempt, &budget, Repeat::IfUnanswered)).await {
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

    /// Tells how it ended, in a task of its own.
    pub fn report(self: &Arc<Self>, attempt: Attempt, success: bool, denied: bool, metrics: &Arc<Metrics>) {
        let Ok(permit) = self.reports.clone().try_acquire_owned() else {
            metrics.policy(PolicyCommand::Report, PolicyAnswer::Failed);
            return;
        };
        let (policy, metrics) = (self.clone(), metrics.clone());
        self.runtime().spawn(async move {
            let told = Told { attempt: &attempt, success, policy_reject: denied };
            let budget = Budget::of(policy.timeout);
            // The service counts each report that it receives, so that a report is not repeated.
            let report = policy.ask(&policy.report, &told, &budget, Repeat::Never);
            let taken = matches!(budget.limit(report).await, Ok(Ok(_)));
            let counted = if taken { PolicyAnswer::Allowed } else { PolicyAnswer::Failed };
            metrics.policy(PolicyCommand::Report, counted);
            drop(permit);
        });
    }

    /// The status of the answer. The error is a sentence for the operator.
    async fn ask(&self, command: &Uri, said: &impl Serialize, budget: &Budget, repeat: Repeat) -> Result<i64, String> {
        let body = serde_json::to_vec(said).map_err(|error| error.to_string())?;
        let request = self.client.request_to(command.clone(), Method::POST, body)?;
        let (head, body) = self.client.fetch(request, budget, repeat).await?;
        if head.status != StatusCode::OK {
            return Err(format!("the service answers {}", head.status));
        }
        // serde's own message would repeat what it could not read.
        let said = serde_json::from_slice::<Said>(&body);
        said.map(|said| said.status).map_err(|_| "the answer is no JSON object with a status".to_owned())
    }
}

fn read(status: i64) -> (Verdict, PolicyAnswer) {
    match u64::try_from(status) {
        Err(_) => (Verdict::Denied, PolicyAnswer::Denied),
        Ok(0) => (Verdict::Allowed(Duration::ZERO), PolicyAnswer::Allowed),
        Ok(seconds) => (Verdict::Allowed(Duration::from_secs(seconds).min(LONGEST)), PolicyAnswer::Delayed),
    }
}

/// As Dovecot has it: the first `bits` of the digest as a number, in hexadecimal digits of whole bytes; 0: all of it.
fn pwhash(nonce: &[u8], login: &str, password: &[u8], bits: usize) -> String {
    let mut context = Context::new(&SHA256);
    for part in [nonce, login.as_bytes(), &[0], password] {
        context.update(part);
    }
    let digest = context.finish();
    let mut kept = digest.as_ref().to_vec();
    if bits > 0 {
        kept.truncate(bits.div_ceil(8));
        let shift = kept.len() * 8 - bits.min(kept.len() * 8);
        let mut carried = 0u8;
        for byte in &mut kept {
            let value = u16::from(carried) << 8 | u16::from(*byte);
            carried = *byte;
            *byte = (value >> shift) as u8;
        }
    }
    kept.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whole digests by `printf 'noncealice\0secret' | sha256sum`.
    #[test]
    fn only_the_first_bits_of_a_salted_hash_are_told() {
        let all = pwhash(b"nonce", "alice", b"secret", 0);
        assert_eq!(all, "d525ffa945844a81c8787545b30c7ce6b396cf0ccae99a8b6a06f9b880986186");
        let first = u16::from_str_radix(&all[..4], 16).unwrap();
        assert_eq!(pwhash(b"nonce", "alice", b"secret", 16), format!("{first:04x}"));
        assert_eq!(pwhash(b"nonce", "alice", b"secret", 12), format!("{:04x}", first >> 4));
        assert_eq!(pwhash(b"nonce", "alice", b"secret", 9), format!("{:04x}", first >> 7));
        assert_eq!(pwhash(b"nonce", "alice", b"secret", 8), format!("{:02x}", first >> 8));
        assert_eq!(pwhash(b"nonce", "alice", b"secret", 3), format!("{:02x}", first >> 13));
        assert_eq!(pwhash(b"nonce", "alice", b"secret", 256), all);
        assert_ne!(pwhash(b"nonce", "alic", b"esecret", 0), all, "the zero byte parts them");
        assert_ne!(pwhash(b"other", "alice", b"secret", 0), all);
    }

    #[test]
    fn what_a_status_means() {
        assert_eq!(read(-1), (Verdict::Denied, PolicyAnswer::Denied));
        assert_eq!(read(0), (Verdict::Allowed(Duration::ZERO), PolicyAnswer::Allowed));
        assert_eq!(read(3), (Verdict::Allowed(Duration::from_secs(3)), PolicyAnswer::Delayed));
        assert_eq!(read(i64::MAX), (Verdict::Allowed(LONGEST), PolicyAnswer::Delayed));
    }
}
