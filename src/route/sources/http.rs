//! Routes by an HTTP service, over persistent HTTP/1.1 or HTTP/2 connections.
//!
//! `style: json` posts an object with the user, and with the login attempt if results are not cached, and expects an object with at
//! least one field of an answer (see `answer`). Status 404 means an unknown user, 401 and 403 a wrong password. `style: nginx-auth-http`
//! uses the protocol of nginx's mail module (see `auth_http`), so that existing auth servers can be used. Every other response, and a
//! body over `http_client::MAX_BODY`, fails the lookup.

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

use super::auth_http::{self, AuthResult, ClientCertificate};
use crate::config::{self, ANSWER_FIELDS, BackendId, Config, Host, HttpStyle, Network, Problem, Server};
use crate::identity::{Proof, UserName};
use crate::lookup::hedge::Budget;
use crate::lookup::http_client::{HttpClient, Repeat};
use crate::route::LookupResult;
use crate::route::answer::{AnswerFields, DeclaredBackends};
use crate::route::decision::{Destination, IssuedCredentials, RouteDecision, ServerChoice, WrongPassword};
use crate::route::password_verification::{PasswordVerification, SentPassword};
use crate::route::request::{LoginContext, LookupRequest};

/// A service that receives one request per lookup.
pub(in crate::route) struct Http {
    client: HttpClient,
    style: HttpStyle,
    /// Whether the service receives and verifies passwords.
    verifies_passwords: bool,
    client_certificate: ClientCertificate,
    /// Servers by address, because nginx's protocol names servers by address.
    servers: HashMap<SocketAddr, (BackendId, Box<str>)>,
    backend: Option<BackendId>,
    /// Networks of addresses that the service may name although no server has them.
    networks: Vec<Network>,
    declared: DeclaredBackends,
}

impl std::fmt::Debug for Http {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The headers may contain secrets.
        f.debug_struct("Http").field("url", self.client.url()).field("style", &self.style).finish_non_exhaustive()
    }
}

/// Body of a request with `style: json`.
#[derive(Serialize)]
struct JsonRequest<'a> {
    user: &'a str,
    protocol: &'static str,
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    login: Option<JsonLogin<'a>>,
}

#[derive(Serialize)]
struct JsonLogin<'a> {
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

/// Body of a response with `style: json`; other keys are ignored.
#[derive(Default, Deserialize)]
#[serde(default)]
struct JsonResponse {
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
    /// An invalid URL, or a token file or `ca` that cannot be read.
    pub(in crate::route) fn build(
        config: &Config,
        http: &config::Http,
        declared: &DeclaredBackends,
    ) -> Result<Self, Vec<Problem>> {
        let problems = |problem| vec![problem];
        let mut headers = HeaderMap::new();
        for (name, value) in &http.headers {
            // The configuration check has validated names and values.
            if let (Ok(name), Ok(mut value)) = (HeaderName::try_from(name), HeaderValue::try_from(value)) {
                value.set_sensitive(true);
                headers.insert(name, value);
            }
        }
        if let Some(file) = &http.token {
            let token = file.read_secret().map_err(problems)?;
            let mut value = HeaderValue::try_from(format!("Bearer {}", *token))
                .map_err(|_| problems(file.location.problem("the token is not a valid header value")))?;
            value.set_sensitive(true);
            headers.insert(AUTHORIZATION, value);
        }
        let client = HttpClient::build(&http.url, http.ca.as_ref(), headers, http.lookup.connections);
        Ok(Self {
            client: client.map_err(problems)?,
            style: http.style,
            verifies_passwords: http.password,
            client_certificate: match http.client_certificate {
                true => ClientCertificate::Whole,
                false => ClientCertificate::PropertiesOnly,
            },
            servers: servers(config),
            backend: http.backend,
            networks: http.networks.clone(),
            declared: declared.clone().with_directory_names(&http.lookup.names),
        })
    }

    pub(in crate::route) async fn query(&self, request: &LookupRequest, budget: &Budget) -> LookupResult {
        let result = match self.style {
            HttpStyle::Json => self.query_json(request, budget).await,
            HttpStyle::NginxAuthHttp => self.query_nginx(request, budget).await,
        };
        result.unwrap_or_else(LookupResult::Failed)
    }

    /// Closes all idle connections.
    pub(in crate::route) fn retire(&self) {
        self.client.retire();
    }

    async fn query_json(&self, request: &LookupRequest, budget: &Budget) -> Result<LookupResult, String> {
        let credentials = request.login_context.as_deref().map(|login| &login.credentials);
        let sent = credentials.filter(|_| self.verifies_passwords).and_then(SentPassword::of);
        let request = self.json_request(request, sent.as_ref())?;
        let repeat = if sent.is_some() { Repeat::IfConnectionFails } else { Repeat::IfUnanswered };
        let (head, body) = self.client.fetch(request, budget, repeat).await?;
        Ok(self.read_json(head.status, &body, sent))
    }

    async fn query_nginx(&self, request: &LookupRequest, budget: &Budget) -> Result<LookupResult, String> {
        // The command `route` has no password.
        let login = request.login_context.as_ref().ok_or("this style needs the password of a client")?;
        if matches!(login.credentials.proof, Proof::Message { .. }) {
            return Ok(LookupResult::Found(RouteDecision::PasswordNeeded.into()));
        }
        let sent = SentPassword::of(&login.credentials);
        loop {
            let (head, _) =
                self.client.fetch(self.nginx_request(request, login)?, budget, Repeat::IfConnectionFails).await?;
            let result = auth_http::parse_response(&head.headers);
            match result.map_err(|error| format!("{error} ({})", head.status))? {
                AuthResult::Accepted { address, user, credentials } => {
                    let verification = sent.map(SentPassword::confirmed).unwrap_or_default();
                    return Ok(self.destination(address, user, credentials, verification));
                }
                AuthResult::WrongPassword(wrong_password) => {
                    return Ok(LookupResult::Found(RouteDecision::WrongPassword(wrong_password).into()));
                }
                // Until the timeout of the route.
                AuthResult::RetryAfter(wait) => tokio::time::sleep(wait).await,
            }
        }
    }

    fn json_request(
        &self,
        lookup: &LookupRequest,
        sent: Option<&SentPassword<'_>>,
    ) -> Result<Request<Full<Bytes>>, String> {
        let password = sent.map(|password| std::str::from_utf8(password.expose())).transpose();
        let password = password.map_err(|_| "JSON cannot contain the password, which is not UTF-8".to_owned())?;
        let login = lookup.login_context.as_deref().map(|login| JsonLogin {
            client: login.client.ip().to_canonical(),
            client_port: login.client.port(),
            listener: login.listener,
            session: &login.session,
            mechanism: login.credentials.mechanism.as_str(),
            tls: login.tls.as_ref().map(|tls| tls.version.replace('.', "_")),
            attempt: login.attempt,
            login: self.verifies_passwords.then(|| login.credentials.user.as_str()),
            password,
        });
        let body = JsonRequest { user: &lookup.user, protocol: "imap", login };
        let body = serde_json::to_vec(&body).map_err(|error| error.to_string())?;
        let mut request = self.client.request(Method::POST, body)?;
        request.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        Ok(request)
    }

    fn nginx_request(&self, lookup: &LookupRequest, login: &LoginContext) -> Result<Request<Full<Bytes>>, String> {
        let mut request = self.client.request(Method::GET, Vec::new())?;
        request.headers_mut().extend(auth_http::request_headers(lookup, login, self.client_certificate)?);
        Ok(request)
    }

    fn read_json(&self, status: StatusCode, body: &[u8], sent: Option<SentPassword<'_>>) -> LookupResult {
        match status {
            StatusCode::NOT_FOUND | StatusCode::NO_CONTENT => return LookupResult::Unknown,
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN if self.verifies_passwords => {
                return LookupResult::Found(RouteDecision::WrongPassword(WrongPassword::default()).into());
            }
            StatusCode::OK => {}
            other => return LookupResult::Failed(format!("the service responded {other}")),
        }
        // serde would also accept a list. Its error is not used, because it would quote the response.
        let response =
            body.trim_ascii_start().starts_with(b"{").then(|| serde_json::from_slice::<JsonResponse>(body).ok());
        let Some(response) = response.flatten() else {
            return LookupResult::Failed("the answer is not a JSON object with text fields".to_owned());
        };
        if !has_known_key(body) {
            return LookupResult::Failed(format!("the answer has none of the keys {}", ANSWER_FIELDS.join(", ")));
        }
        let fields = [
            ("backend", response.backend.as_deref()),
            ("server", response.server.as_deref()),
            ("user", response.user.as_deref()),
            ("master", response.master.as_deref()),
            ("password", response.password.as_ref().map(|password| password.as_str())),
            ("refuse", response.refuse.as_deref()),
            ("maintenance", response.maintenance.as_deref()),
        ];
        let mut answer = AnswerFields::default();
        for (name, value) in fields {
            answer.set(name, value.unwrap_or_default());
        }
        LookupResult::from(
            self.declared
                .check_fields(answer)
                .map(|decision| decision.map(|decision| self.with_verification(decision, sent))),
        )
    }

    /// Records that the service has verified the password that was sent. If it verifies passwords and received none, its credentials must
    /// not be used.
    fn with_verification(&self, mut decision: RouteDecision, sent: Option<SentPassword<'_>>) -> RouteDecision {
        if let RouteDecision::Destination(destination) = &mut decision {
            match sent {
                Some(sent) => destination.verification = sent.confirmed(),
                None if self.verifies_passwords => destination.credentials = None,
                None => {}
            }
        }
        decision
    }

    /// The destination at the address that an auth server for nginx has named.
    fn destination(
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
                    "the answer names {address}, which is neither a declared server nor in a network of this route"
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

/// Whether a JSON object has a field of an answer, whatever its value. An object without any comes from another kind of service.
fn has_known_key(object: &[u8]) -> bool {
    let keys = serde_json::from_slice::<HashMap<Cow<'_, str>, IgnoredAny>>(object);
    keys.is_ok_and(|keys| ANSWER_FIELDS.iter().any(|field| keys.contains_key(*field)))
}

/// The servers that are configured by an IP address.
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
