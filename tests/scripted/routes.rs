//! Routes with scripted HTTP services: the requests they receive, and the effect of their answers.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

use crate::support::{ACCEPTS_ALICE, Client, LineStream, ScriptedServer, start};

const UNAVAILABLE: &str = "a NO [UNAVAILABLE] The mailbox is temporarily unavailable, try again later.";
const FAILED: &str = "a NO [AUTHENTICATIONFAILED] no";

/// An HTTP/1.1 service: `answer` maps a request, head and body, to the bytes of a response.
pub(super) struct Service {
    pub(super) address: SocketAddr,
    requests: Arc<Mutex<Vec<String>>>,
}

impl Service {
    pub(super) async fn new(answer: impl Fn(&str) -> String + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let requests: Arc<Mutex<Vec<String>>> = Arc::default();
        let (seen, answer) = (requests.clone(), Arc::new(answer));
        tokio::spawn(async move {
            while let Ok((mut socket, _)) = listener.accept().await {
                let (seen, answer) = (seen.clone(), answer.clone());
                tokio::spawn(async move {
                    while let Some(request) = read_request(&mut socket).await {
                        let response = answer(&request);
                        seen.lock().unwrap().push(request);
                        if socket.write_all(response.as_bytes()).await.is_err() {
                            return;
                        }
                    }
                });
            }
        });
        Self { address, requests }
    }

    fn last_request(&self) -> String {
        self.requests.lock().unwrap().last().cloned().unwrap_or_default()
    }
}

async fn read_request(socket: &mut TcpStream) -> Option<String> {
    let mut bytes = Vec::new();
    loop {
        let text = String::from_utf8_lossy(&bytes).into_owned();
        if let Some((head, body)) = text.split_once("\r\n\r\n") {
            let length = head
                .to_lowercase()
                .split("content-length: ")
                .nth(1)
                .map_or(0, |rest| rest.lines().next().unwrap_or_default().parse::<usize>().unwrap());
            if body.len() >= length {
                return Some(text);
            }
        }
        if socket.read_buf(&mut bytes).await.ok()? == 0 {
            return None;
        }
    }
}

pub(super) fn json(body: &str) -> String {
    format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len())
}

/// A mailbox server that accepts the password "handed out" and refuses everything else; it records the commands it receives.
async fn server() -> (SocketAddr, Arc<Mutex<Vec<String>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let commands: Arc<Mutex<Vec<String>>> = Arc::default();
    let seen = commands.clone();
    tokio::spawn(async move {
        while let Ok((socket, _)) = listener.accept().await {
            let seen = seen.clone();
            tokio::spawn(async move {
                let mut line = LineStream::new(socket);
                let mechanisms = "AUTH=XOAUTH2 AUTH=OAUTHBEARER AUTH=SCRAM-SHA-256 AUTH=SCRAM-SHA-1";
                line.send(format!("* OK [CAPABILITY IMAP4rev1 SASL-IR {mechanisms}] x\r\n")).await;
                let command = line.line().await;
                let accepted = command.ends_with("\"handed out\"");
                seen.lock().unwrap().push(command);
                let answer = if accepted { "L OK [CAPABILITY IMAP4rev1] in" } else { "L NO [AUTHENTICATIONFAILED] no" };
                line.send(format!("{answer}\r\n")).await;
                line.line().await;
            });
        }
    });
    (address, commands)
}

fn configuration(server: SocketAddr, route: &str) -> String {
    format!(
        "listeners: [{{address: '127.0.0.1:0', tls: none, \
         mechanisms: [plain, login, xoauth2, oauthbearer, scram-sha-1, scram-sha-256]}}]\n\
         backends: {{only: {{servers: ['{server}'], authzid: allow}}}}\n\
         routes: [{{http: {route}}}]\nlimits: {{failed_logins: 100}}\n"
    )
}

fn authenticate(mechanism: &str, message: &str) -> String {
    format!("a AUTHENTICATE {mechanism} {}", STANDARD.encode(message))
}

const WITHOUT_PASSWORD: [(&str, &str); 4] = [
    ("XOAUTH2", "user=alice\x01auth=Bearer garbage\x01\x01"),
    ("OAUTHBEARER", "n,a=alice,\x01auth=Bearer garbage\x01\x01"),
    ("SCRAM-SHA-1", "n,,n=alice,r=nonce"),
    ("SCRAM-SHA-256", "n,,n=alice,r=nonce"),
];

/// The service accepts every request that contains no wrong password, also one without a password.
#[tokio::test]
async fn issued_password_is_used_only_if_the_clients_was_confirmed() {
    let service = Service::new(|request| match request.contains("\"password\":\"wrong\"") {
        true => "HTTP/1.1 401 Unauthorized\r\ncontent-length: 0\r\n\r\n".to_owned(),
        false => json("{\"backend\": \"only\", \"password\": \"handed out\"}"),
    })
    .await;
    let (address, commands) = server().await;
    let proxy =
        start(&configuration(address, &format!("{{url: 'http://{}/', password: true}}", service.address))).await;
    let mut client = Client::connect(proxy.listeners()[0]).await;
    for (mechanism, message) in WITHOUT_PASSWORD {
        assert_eq!(client.command(&authenticate(mechanism, message)).await, FAILED, "{mechanism}");
        assert!(!service.last_request().contains("\"password\""), "{mechanism}");
        let relayed = commands.lock().unwrap().last().cloned().unwrap();
        assert!(relayed.starts_with(&format!("L AUTHENTICATE {mechanism}")), "the server decides: {relayed}");
    }
    // The confirmed password identifies the user, not another user.
    let sent = commands.lock().unwrap().len();
    assert!(client.command("a LOGIN alice wrong").await.starts_with("a NO [AUTHENTICATIONFAILED]"));
    assert_eq!(commands.lock().unwrap().len(), sent, "no server is contacted");
    // The server does not offer PLAIN, the only mechanism with which it could decide whether alice may act for bob.
    assert_eq!(client.command(&authenticate("PLAIN", "bob\0alice\0secret")).await, UNAVAILABLE);
    assert!(commands.lock().unwrap().iter().all(|command| !command.contains("handed out")));
    assert!(client.command("a LOGIN alice secret").await.starts_with("a OK"));
}

#[tokio::test]
async fn issued_password_of_a_route_that_does_not_verify_is_not_used() {
    let service = Service::new(|_| json("{\"backend\": \"only\", \"password\": \"handed out\"}")).await;
    let (address, commands) = server().await;
    for cache in ["cache: off", "cache: {ttl: 1m}"] {
        let route = format!("{{url: 'http://{}/', {cache}}}", service.address);
        let proxy = start(&configuration(address, &route)).await;
        let mut client = Client::connect(proxy.listeners()[0]).await;
        for (mechanism, message) in WITHOUT_PASSWORD {
            assert_eq!(client.command(&authenticate(mechanism, message)).await, FAILED, "{cache} {mechanism}");
        }
        assert_eq!(client.command("a LOGIN alice secret").await, FAILED, "{cache}");
    }
    assert!(commands.lock().unwrap().iter().all(|command| !command.contains("handed out")));
}

#[tokio::test]
async fn nginx_auth_server_receives_only_logins_with_passwords() {
    let server_address = server().await;
    let (address, commands) = server_address;
    let service = Service::new(move |_| {
        format!(
            "HTTP/1.1 200 OK\r\nauth-status: OK\r\nauth-server: 127.0.0.1\r\nauth-port: {}\r\nauth-pass: handed out\r\n\
             content-length: 0\r\n\r\n",
            address.port()
        )
    })
    .await;
    let route = format!("{{url: 'http://{}/', style: nginx-auth-http}}", service.address);
    let proxy = start(&configuration(address, &route)).await;
    let mut client = Client::connect(proxy.listeners()[0]).await;
    for (mechanism, message) in WITHOUT_PASSWORD {
        assert_eq!(client.command(&authenticate(mechanism, message)).await, UNAVAILABLE, "{mechanism}");
    }
    assert!(service.requests.lock().unwrap().is_empty() && commands.lock().unwrap().is_empty());
    let metrics = proxy.metrics().render();
    assert!(!metrics.contains("vestibule_route_failing{route=\"http\"} 1"), "clients cannot mark a route as failing");
    assert!(client.command("a LOGIN alice secret").await.starts_with("a OK"));
}

#[tokio::test]
async fn answer_without_a_known_key_fails_the_lookup() {
    let (address, commands) = server().await;
    let service = Service::new(|request| match request {
        other if other.contains("empty@") => json("{}"),
        other if other.contains("other@") => json("{\"shard\": \"only\", \"status\": \"ok\"}"),
        _ => json("{\"backend\": null, \"status\": \"unknown\"}"),
    })
    .await;
    let text = configuration(address, &format!("{{url: 'http://{}/', cache: off}}", service.address));
    let proxy = start(&text.replace("]\nlimits", ", {default: only}]\nlimits")).await;
    let mut client = Client::connect(proxy.listeners()[0]).await;
    for user in ["empty@a.test", "other@a.test"] {
        assert_eq!(client.command(&format!("a LOGIN {user} secret")).await, UNAVAILABLE, "{user}");
    }
    assert!(commands.lock().unwrap().is_empty(), "the next route must not be used");
    assert_eq!(client.command("a LOGIN unknown@a.test secret").await, FAILED, "the next route knows every user");
}

/// `user=$1` with a user name that contains the syntax of a field, which must not choose the server.
#[tokio::test]
async fn user_name_cannot_add_fields_to_the_answer_of_a_regex() {
    let (main, other) = (ScriptedServer::new(ACCEPTS_ALICE).await, ScriptedServer::new(ACCEPTS_ALICE).await);
    let proxy = start(&format!(
        "listeners: [{{address: '127.0.0.1:0', tls: none}}]\n\
         backends:\n  shard-a: {{servers: ['{0}', '{1}']}}\n  shard-b: {{servers: ['{0}']}}\n\
         routes:\n  - regex: [{{match: '^to-(.*)@b$', to: '$1 user=alice'}}, {{match: '^(.*)@x$', to: 'shard-a user=$1'}}]\n",
        main.address, other.address
    ))
    .await;
    let mut client = Client::connect(proxy.listeners()[0]).await;
    for name in [
        format!("u2@a.test server={}@x", other.address),
        "alice user=bob@x".to_owned(),
        "alice\u{a0}b@x".to_owned(),
        "to-shard-b server=s@b".to_owned(),
        "to-refuse: x@b".to_owned(),
        "@x".to_owned(),
    ] {
        let literal = format!("a LOGIN {{{}+}}\r\n{name} secret", name.len());
        assert_eq!(client.command(&literal).await, UNAVAILABLE, "{name}");
    }
    assert_eq!(main.connections() + other.connections(), 0);
    assert!(client.command("a LOGIN alice@x secret").await.starts_with("a OK"));
    assert_eq!(main.connections() + other.connections(), 1);
    proxy.stop().await;
}
