//! Route by a service that is asked over HTTP/1.1 or 2, with connections that are kept.
//!
//! `style: json` posts an object with the user, and with what is known of the login_context where answers are not kept, and
//! reads one whose keys are the fields of an answer (see `target`), at least one of them; 404 says that the user is unknown, 401 and 403 that
//! the password is wrong. `style: nginx-auth-http` speaks the headers of nginx's mail module (see `auth_http`), so that an
//! auth server written for it serves here as it is. Whatever else comes is a failure; a body over `http_client::MAX_BODY` is one too.

use std::borrow::Cow;
use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use http_body_util::Full;
use hyper::body::Bytes;
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue};
use hyper::{Method, Request, StatusCode};
use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use super::auth_http::{self, Verdict};
use crate::config::{self, ANSWER_FIELDS, BackendId, Config, Host, HttpStyle, Network, Problem, Server};
use crate::identity::{Proof, UserName};
use crate::lookup::hedge::Budget;
use crate::lookup::http_client::{HttpClient, Repeat};
use crate::route::LookupResult;
use crate::route::decision::{
    Declared, Destination, Fields, IssuedCredentials, RouteDecision, ServerChoice, WrongPassword,
};
use crate::route::password_verification::{PasswordVerification, SentPassword};
use crate::route::request::{LoginContext, LookupRequest};

/// A request a user.
pub(in crate::route) struct Http {
    client: HttpClient,
    style: HttpStyle,
    password: bool,
    client_certificate: bool,
    /// Servers by their addresses: how nginx's protocol names them.
    servers: HashMap<SocketAddr, (BackendId, Box<str>)>,
    backend: Option<BackendId>,
    networks: Vec<Network>,
    declared: Declared,
}

impl std::fmt::Debug for Http {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Headers may hold what only the service shall know.
        f.debug_struct("Http").field("url", self.client.url()).field("style", &self.style).finish_non_exhaustive()
    }
}

/// What `style: json` sends.
#[derive(Serialize)]
struct Asked<'a> {
    user: &'a str,
    protocol: &'static str,
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    login_context: Option<AskedBy<'a>>,
}

#[derive(Serialize)]
struct AskedBy<'a> {
    client: IpAddr,
    client_port: u16,
    listener: SocketAddr,
    session: &'a str,
    mechanism: &'static str,
    tls: Option<String>,
    attempt: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    login: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    password: Option<&'a str>,
}

/// What `style: json` reads; other keys are left alone.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Said {
    backend: Option<String>,
    server: Option<String>,
    user: Option<String>,
    master: Option<String>,
    password: Option<Zeroizing<String>>,
    refuse: Option<String>,
    maintenance: Option<String>,
}

impl Http {
    /// # Errors
    /// A URL that is none, a token file or a `ca` that cannot be read.
    pub(in crate::route) fn build(
        config: &Config,
        http: &config::Http,
        declared: &Declared,
    ) -> Result<Self, Vec<Problem>> {
        let told = |problem| vec![problem];
        let mut headers = HeaderMap::new();
        for (name, value) in &http.headers {
            // The configuration was checked for what a header may be.
            if let (Ok(name), Ok(mut value)) = (HeaderName::try_from(name), HeaderValue::try_from(value)) {
                value.set_sensitive(true);
                headers.insert(name, value);
            }
        }
        if let Some(file) = &http.token {
            let token = file.read_secret().map_err(told)?;
            let mut value = HeaderValue::try_from(format!("Bearer {}", *token))
                .map_err(|_| told(file.location.problem("the token cannot stand in a header")))?;
            value.set_sensitive(true);
            headers.insert(AUTHORIZATION, value);
        }
        let client = HttpClient::build(&http.url, http.ca.as_ref(), headers, http.lookup.connections);
        Ok(Self {
            client: client.map_err(told)?,
            style: http.style,
            password: http.password,
            client_certificate: http.client_certificate,
            servers: servers(config),
            backend: http.backend,
            networks: http.networks.clone(),
            declared: declared.clone().with_names(&http.lookup.names),
        })
    }

    pub(in crate::route) async fn ask(&self, question: &LookupRequest, budget: &Budget) -> LookupResult {
        let asked = match self.style {
            HttpStyle::Json => self.ask_json(question, budget).await,
            HttpStyle::NginxAuthHttp => self.ask_nginx(question, budget).await,
        };
        asked.unwrap_or_else(LookupResult::Failed)
    }

    /// Closes all connections that are not in use.
    pub(in crate::route) fn retire(&self) {
        self.client.retire();
    }

    async fn ask_json(&self, question: &LookupRequest, budget: &Budget) -> Result<LookupResult, String> {
        let credentials = question.login_context.as_deref().map(|login_context| &login_context.credentials);
        let sent = credentials.filter(|_| self.password).and_then(SentPassword::of);
        let request = self.json(question, sent.as_ref())?;
        let repeat = if sent.is_some() { Repeat::IfConnectionFails } else { Repeat::IfUnanswered };
        let (head, body) = self.client.fetch(request, budget, repeat).await?;
        Ok(self.read_json(head.status, &body, sent))
    }

    async fn ask_nginx(&self, question: &LookupRequest, budget: &Budget) -> Result<LookupResult, String> {
        // The command `route` has no password to ask with.
        let login_context =
            question.login_context.as_ref().ok_or("this style is asked with a client's password only")?;
        if matches!(login_context.credentials.proof, Proof::Message { .. }) {
            return Ok(LookupResult::Found(RouteDecision::PasswordNeeded.into()));
        }
        let sent = SentPassword::of(&login_context.credentials);
        loop {
            let (head, _) =
                self.client.fetch(self.nginx(question, login_context)?, budget, Repeat::IfConnectionFails).await?;
            let said = auth_http::answer(&head.headers);
            match said.map_err(|error| format!("{error} ({})", head.status))? {
                Verdict::Good { address, user, login } => {
                    let identity = sent.map(SentPassword::confirmed).unwrap_or_default();
                    return Ok(self.place(address, user, login, identity));
                }
                Verdict::WrongPassword(denied) => {
                    return Ok(LookupResult::Found(RouteDecision::WrongPassword(denied).into()));
                }
                // The route's `timeout` ends it.
                Verdict::AskAgain(wait) => tokio::time::sleep(wait).await,
            }
        }
    }

    fn json(&self, question: &LookupRequest, sent: Option<&SentPassword<'_>>) -> Result<Request<Full<Bytes>>, String> {
        let login_context = question.login_context.as_deref();
        let password = sent.map(|password| std::str::from_utf8(password.expose())).transpose();
        let asked = Asked {
            user: &question.user,
            protocol: "imap",
            login_context: login_context
                .map(|login_context| {
                    Ok::<_, String>(AskedBy {
                        client: login_context.client.ip().to_canonical(),
                        client_port: login_context.client.port(),
                        listener: login_context.listener,
                        session: &login_context.session,
                        mechanism: login_context.credentials.mechanism.as_str(),
                        // This field has an underscore: `TLSv1_3`.
                        tls: login_context.tls.as_ref().map(|tls| tls.version.replace('.', "_")),
                        attempt: login_context.attempt,
                        login: self.password.then(|| login_context.credentials.user.as_str()),
                        password: password.map_err(|_| "the password is not UTF-8, which JSON needs".to_owned())?,
                    })
                })
                .transpose()?,
        };
        let body = serde_json::to_vec(&asked).map_err(|error| error.to_string())?;
        let mut request = self.client.request(Method::POST, body)?;
        request.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        Ok(request)
    }

    fn nginx(&self, question: &LookupRequest, login_context: &LoginContext) -> Result<Request<Full<Bytes>>, String> {
        let mut request = self.client.request(Method::GET, Vec::new())?;
        request.headers_mut().extend(auth_http::question(question, login_context, self.client_certificate)?);
        Ok(request)
    }

    fn read_json(&self, status: StatusCode, body: &[u8], sent: Option<SentPassword<'_>>) -> LookupResult {
        match status {
            StatusCode::NOT_FOUND | StatusCode::NO_CONTENT => return LookupResult::Unknown,
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN if self.password => {
                return LookupResult::Found(RouteDecision::WrongPassword(WrongPassword::default()).into());
            }
            StatusCode::OK => {}
            other => return LookupResult::Failed(format!("the service answers {other}")),
        }
        // serde's own message would repeat what it could not read.
        // And it would take a list for an object.
        let said = body.trim_ascii_start().starts_with(b"{").then(|| serde_json::from_slice::<Said>(body).ok());
        let Some(said) = said.flatten() else {
            return LookupResult::Failed("the answer is no JSON object with text fields".to_owned());
        };
        if !has_known_key(body) {
            return LookupResult::Failed(format!("the answer has none of the keys {}", ANSWER_FIELDS.join(", ")));
        }
        let fields = [
            ("backend", said.backend.as_deref()),
            ("server", said.server.as_deref()),
            ("user", said.user.as_deref()),
            ("master", said.master.as_deref()),
            ("password", said.password.as_ref().map(|password| password.as_str())),
            ("refuse", said.refuse.as_deref()),
            ("maintenance", said.maintenance.as_deref()),
        ];
        let mut read = Fields::default();
        for (name, value) in fields {
            read.set(name, value.unwrap_or_default());
        }
        LookupResult::from(self.declared.fields(read).map(|target| target.map(|target| self.verified(target, sent))))
    }

    /// A service that verifies passwords and received none has verified nothing: the credentials it hands out are not used.
    fn verified(&self, mut target: RouteDecision, sent: Option<SentPassword<'_>>) -> RouteDecision {
        if let RouteDecision::Destination(place) = &mut target {
            match sent {
                Some(sent) => place.verification = sent.confirmed(),
                None if self.password => place.credentials = None,
                None => {}
            }
        }
        target
    }

    /// The place that an auth server of nginx's names by its address.
    fn place(
        &self,
        address: SocketAddr,
        user: Option<UserName>,
        credentials: Option<IssuedCredentials>,
        verification: PasswordVerification,
    ) -> LookupResult {
        let (backend, server) = match (self.servers.get(&address), self.backend) {
            (Some((backend, server)), _) => (*backend, ServerChoice::Server(server.clone())),
            (None, Some(backend)) if self.networks.iter().any(|network| network.contains(address.ip())) => {
                (backend, ServerChoice::Address(address))
            }
            (None, _) => {
                return LookupResult::Failed(format!(
                    "the answer names {address}, which is no declared server and in no network of this route"
                ));
            }
        };
        LookupResult::Found(Arc::new(RouteDecision::Destination(Destination {
            backend,
            server,
            user,
            credentials,
            verification,
        })))
    }
}

/// Whether a JSON object has a key of an answer, whatever its value. One without any is the answer of another service.
fn has_known_key(object: &[u8]) -> bool {
    let keys = serde_json::from_slice::<HashMap<Cow<'_, str>, IgnoredAny>>(object);
    keys.is_ok_and(|keys| ANSWER_FIELDS.iter().any(|field| keys.contains_key(*field)))
}

/// The servers that are configured by an address.
pub(in crate::route) fn servers(config: &Config) -> HashMap<SocketAddr, (BackendId, Box<str>)> {
    let mut servers = HashMap::new();
    for (index, backend) in config.backends.iter().enumerate() {
        for server in &backend.servers {
            if let Server::Address { name, host: Host::Ip(ip), port, .. } = server {
                let address = SocketAddr::new(ip.to_canonical(), *port);
                servers.entry(address).or_insert_with(|| (BackendId(index), name.as_str().into()));
            }
        }
    }
    servers
}
