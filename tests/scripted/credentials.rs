//! Credentials that are invalid or claim another identity: delegation, separators, two names in one message, tokens.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair, SanType};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, RootCertStore};
use vestibule::server::Running;

use crate::support::*;

/// Scripts of a server that accepts every login, and of one that refuses every login.
const ACCEPTS: &str =
    "S: * OK [CAPABILITY IMAP4rev1 SASL-IR AUTH=PLAIN] x\nC: *\nS: L OK [CAPABILITY IMAP4rev1] in\n...";
const REFUSES: &str =
    "S: * OK [CAPABILITY IMAP4rev1 SASL-IR AUTH=PLAIN] x\nC: *\nS: L NO [AUTHENTICATIONFAILED] no\n...";

fn failures(proxy: &Running, reason: &str) -> f64 {
    metric(proxy, "vestibule_failures_total", &[&format!("reason=\"{reason}\"")])
}

fn plain(authzid: &str, authcid: &str) -> String {
    format!("AUTHENTICATE PLAIN {}", STANDARD.encode(format!("{authzid}\0{authcid}\0secret")))
}

/// The certificate authority of the clients.
struct ClientAuthority {
    ca: CertifiedIssuer<'static, KeyPair>,
}

impl ClientAuthority {
    fn new() -> Self {
        let mut ca = CertificateParams::new(Vec::new()).unwrap();
        ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        ca.distinguished_name.push(DnType::CommonName, "users");
        Self { ca: CertifiedIssuer::self_signed(ca, KeyPair::generate().unwrap()).unwrap() }
    }

    /// A connection with a client certificate for `email`, after the greeting.
    async fn client(&self, proxy: &Running, server: &Certificates, email: &str) -> LineStream<TlsStream<TcpStream>> {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.subject_alt_names = vec![SanType::Rfc822Name(email.try_into().unwrap())];
        let certificate = params.signed_by(&key, &self.ca).unwrap();
        let mut roots = RootCertStore::empty();
        let ca = std::fs::read(server.path("ca.pem")).unwrap();
        for root in rustls_pemfile::certs(&mut &ca[..]) {
            roots.add(root.unwrap()).unwrap();
        }
        let chain: Vec<CertificateDer<'static>> = vec![certificate.der().clone()];
        let key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
        let config = ClientConfig::builder().with_root_certificates(roots).with_client_auth_cert(chain, key).unwrap();
        let socket = TcpStream::connect(proxy.listeners()[0]).await.unwrap();
        let connector = TlsConnector::from(Arc::new(config));
        let name = ServerName::try_from("localhost").unwrap();
        let mut client = LineStream::new(with_timeout("a handshake", connector.connect(name, socket)).await.unwrap());
        assert!(client.line().await.starts_with("* OK"));
        client
    }
}

/// The proxy's own credentials open every mailbox, so the servers would not refuse what the certificate does not allow.
#[tokio::test]
async fn certificate_opens_another_mailbox_only_if_it_is_listed() {
    let (authority, certificates) = (ClientAuthority::new(), Certificates::new());
    let server = ScriptedServer::new(ACCEPTS).await;
    std::fs::write(certificates.path("users-ca.pem"), authority.ca.pem()).unwrap();
    std::fs::write(certificates.path("master"), "master secret").unwrap();
    let with = |listed: &str| {
        format!(
            "listeners: [{{address: '127.0.0.1:0', tls: implicit, mechanisms: [external], client_certificates: {{ca: {}{listed}}}}}]\n\
             {}backends: {{only: {{servers: ['{}'], authzid: allow, login: {{master: proxy, password_file: {}}}}}}}\n\
             routes: [{{domain: {{good.test: only}}}}]\n",
            certificates.path("users-ca.pem").display(),
            certificates.section(),
            server.address,
            certificates.path("master").display(),
        )
    };
    let command = |authzid: &str| format!("a AUTHENTICATE EXTERNAL {}", STANDARD.encode(authzid));
    let refusal = "a NO [AUTHORIZATIONFAILED] Logging in on behalf of another user is not allowed.";
    let proxy = start(&with("")).await;
    for mailbox in ["bob@good.test", "someone@unknown.test"] {
        let mut alice = authority.client(&proxy, &certificates, "alice@good.test").await;
        assert_eq!(
            alice.command(&command(mailbox)).await,
            refusal,
            "the answer is the same whether or not the mailbox exists"
        );
    }
    assert_eq!(
        (server.connections(), failures(&proxy, "authzid_refused")),
        (0, 2.0),
        "the logins were not sent to the server"
    );
    let mut alice = authority.client(&proxy, &certificates, "alice@good.test").await;
    assert!(alice.command(&command("ALICE@good.test")).await.starts_with("a OK"), "another spelling of the same name");
    let listed = ", may_act_for: [{certificate: webmail@good.test, users: ['*@good.test']}]";
    let proxy = start(&with(listed)).await;
    let mut webmail = authority.client(&proxy, &certificates, "webmail@good.test").await;
    assert!(webmail.command(&command("bob@good.test")).await.starts_with("a OK"));
    for (owner, mailbox) in [("webmail@good.test", "bob@other.test"), ("alice@good.test", "bob@good.test")] {
        let mut client = authority.client(&proxy, &certificates, owner).await;
        assert_eq!(client.command(&command(mailbox)).await, refusal, "{owner} {mailbox}");
    }
}

#[tokio::test]
async fn guesses_at_a_master_password_are_limited_over_all_mailboxes() {
    let server = ScriptedServer::new(REFUSES).await;
    let proxy = proxy(&format!(
        "backends: {{only: {{servers: ['{}'], authzid: allow}}}}\nroutes: [{{default: only}}]\n\
         users: {{masters: {{separator: '*'}}}}\nlimits: {{login_rate_per_user: 3/1h, failed_logins: 100}}\n",
        server.address
    ))
    .await;
    let mut client = Client::connect(proxy.listeners()[0]).await;
    for command in ["LOGIN a*admin x".to_owned(), plain("b", "admin"), "LOGIN c*Admin x".to_owned()] {
        let answer = client.command(&format!("a {command}")).await;
        assert!(answer.starts_with("a NO [AUTHENTICATIONFAILED]"), "{answer}");
    }
    let connections = server.connections();
    for command in ["LOGIN d*admin x".to_owned(), plain("e", "ADMIN"), "LOGIN admin x".to_owned()] {
        assert_eq!(client.command(&format!("a {command}")).await, "a NO [LIMIT] Too many logins, wait a little.");
    }
    assert_eq!(server.connections(), connections, "the logins were not sent to the server");
}

/// A server with the same separator would split the name, and open another mailbox than the one that was routed.
#[tokio::test]
async fn user_name_with_a_separator_that_was_not_split_is_refused() {
    let server = ScriptedServer::new(ACCEPTS).await;
    let xoauth2 = STANDARD.encode("user=alice*admin\x01auth=Bearer t\x01\x01");
    let proxy = start(&format!(
        "listeners: [{{address: '127.0.0.1:0', tls: none, mechanisms: [login, plain, xoauth2]}}]\n\
         backends: {{only: {{servers: ['{}'], authzid: allow}}}}\nroutes: [{{default: only}}]\n\
         users: {{masters: {{separator: '*'}}}}\n",
        server.address
    ))
    .await;
    for command in [
        "LOGIN *admin x",
        "LOGIN alice* x",
        "LOGIN \"alice *admin\" x",
        "LOGIN a*b*admin x",
        &plain("bob", "alice*admin"),
        &plain("alice*x", "admin"),
        &format!("AUTHENTICATE XOAUTH2 {xoauth2}"),
    ] {
        let answer = Client::connect(proxy.listeners()[0]).await.command(&format!("a {command}")).await;
        assert_eq!(answer, "a NO [AUTHENTICATIONFAILED] Authentication failed.", "{command}");
    }
    assert_eq!((server.connections(), failures(&proxy, "name_refused")), (0, 7.0));
}

/// PRECIS maps a full-width asterisk to `*`, at which the server would split the normalised name.
#[tokio::test]
async fn separator_that_appears_only_after_normalisation_is_refused() {
    let server = ScriptedServer::new(ACCEPTS).await;
    for sent_as in ["normalised", "as-sent"] {
        let proxy = start(&format!(
            "listeners: [{{address: '127.0.0.1:0', tls: none, mechanisms: [login, plain, xoauth2]}}]\n\
             backends: {{only: {{servers: ['{}'], authzid: allow}}}}\nroutes: [{{default: only}}]\n\
             users: {{unicode: precis, server: {sent_as}, masters: {{separator: '*'}}}}\n",
            server.address
        ))
        .await;
        let xoauth2 = STANDARD.encode("user=alice\u{ff0a}admin\x01auth=Bearer t\x01\x01");
        for command in [
            "LOGIN \"alice\u{ff0a}admin\" x",
            "LOGIN \"bob*alice\u{ff0a}admin\" x",
            &plain("", "alice\u{ff0a}admin"),
            &plain("bob", "alice\u{ff0a}admin"),
            &plain("alice\u{ff0a}x", "admin"),
            &format!("AUTHENTICATE XOAUTH2 {xoauth2}"),
        ] {
            let answer = Client::connect(proxy.listeners()[0]).await.command(&format!("a {command}")).await;
            assert_eq!(answer, "a NO [AUTHENTICATIONFAILED] Authentication failed.", "{sent_as}: {command}");
        }
        assert_eq!((server.connections(), failures(&proxy, "name_refused")), (0, 6.0), "{sent_as}");
    }
}

#[tokio::test]
async fn server_receives_both_names_of_a_login_normalised() {
    let server = ScriptedServer::new(&format!(
        "S: * OK [CAPABILITY IMAP4rev1 SASL-IR AUTH=PLAIN] x\nC: L {}\nS: L OK [CAPABILITY IMAP4rev1] in\n...",
        plain("alice", "admin")
    ))
    .await;
    let proxy = proxy(&format!(
        "backends: {{only: {{servers: ['{}'], authzid: allow}}}}\nroutes: [{{default: only}}]\n\
         users: {{unicode: precis, server: normalised}}\n",
        server.address
    ))
    .await;
    let mut client = Client::connect(proxy.listeners()[0]).await;
    let answer = client.command(&format!("a {}", plain("\u{ff21}lice", "\u{ff21}dmin"))).await;
    assert!(answer.starts_with("a OK"), "{answer}");
}

/// A route could compose such a name from parts of the user name.
#[tokio::test]
async fn route_user_with_the_separator_is_not_sent_to_a_server() {
    let server = ScriptedServer::new(ACCEPTS).await;
    let proxy = proxy(&format!(
        "backends: {{only: {{servers: ['{}']}}}}\n\
         routes: [{{regex: [{{match: '^(.*)@(.*)$', to: 'only user=$1*$2'}}]}}]\n\
         users: {{masters: {{separator: '*'}}}}\n",
        server.address
    ))
    .await;
    let answer = Client::connect(proxy.listeners()[0]).await.command("a LOGIN alice@good.test x").await;
    assert!(answer.starts_with("a NO [UNAVAILABLE]"), "{answer}");
    assert_eq!((server.connections(), failures(&proxy, "lookup_failed")), (0, 1.0));
}

/// Servers differ in which of two users they use, so the proxy could route by one and the server open the other.
#[tokio::test]
async fn message_with_two_users_is_not_sent_to_a_server() {
    let server = ScriptedServer::new(
        "S: * OK [CAPABILITY IMAP4rev1 SASL-IR AUTH=XOAUTH2 AUTH=OAUTHBEARER AUTH=SCRAM-SHA-1] x\n...",
    )
    .await;
    let proxy = start(&format!(
        "listeners: [{{address: '127.0.0.1:0', tls: none, mechanisms: [xoauth2, oauthbearer, scram-sha-1]}}]\n\
         backends: {{only: {{servers: ['{}']}}}}\nroutes: [{{default: only}}]\n",
        server.address
    ))
    .await;
    for (mechanism, message) in [
        ("XOAUTH2", "user=alice\x01auth=Bearer t\x01user=bob\x01\x01"),
        ("XOAUTH2", "user=alice\x01user=bob\x01auth=Bearer t\x01\x01"),
        ("OAUTHBEARER", "n,a=alice,\x01auth=Bearer t\x01user=bob\x01\x01"),
        ("SCRAM-SHA-1", "n,,n=alice,r=x,n=bob"),
    ] {
        let message = STANDARD.encode(message);
        let mut client = Client::connect(proxy.listeners()[0]).await;
        let answer = client.command(&format!("a AUTHENTICATE {mechanism} {message}")).await;
        assert!(answer.starts_with("a BAD Invalid credentials"), "{mechanism}: {answer}");
    }
    assert_eq!(server.connections(), 0);
}

#[tokio::test]
async fn invalid_credentials_are_failed_logins_of_the_address() {
    let proxy = proxy(
        "backends: {only: {servers: ['127.0.0.1:1']}}\nroutes: [{default: only}]\n\
         limits: {login_rate_per_address: 4/1h, login_rate_per_user: 1/1h, failed_logins: 6, failed_login_delay: 100ms}\n",
    )
    .await;
    let mut client = Client::connect(proxy.listeners()[0]).await;
    let started = Instant::now();
    for command in ["LOGIN \"\" pw", "LOGIN \"a\x07b\" pw", &plain("", ""), "LOGIN \" a\" pw"] {
        let answer = client.command(&format!("a {command}")).await;
        assert_eq!(answer, "a NO [AUTHENTICATIONFAILED] Authentication failed.", "{command}");
    }
    // The delays are 100, 200, 400 and 800 ms, with a jitter of a fifth.
    assert!(started.elapsed() > Duration::from_millis(1100), "each answer has a longer delay: {:?}", started.elapsed());
    assert_eq!(failures(&proxy, "invalid_credentials"), 4.0);
    for _ in 0..2 {
        let answer = client.command("a LOGIN \"\" pw").await;
        assert_eq!(answer, "a NO [LIMIT] Too many logins from your address, wait a little.");
    }
    assert_eq!(client.line().await, "* BYE Too many failed logins.");
    client.assert_closed().await;
}

#[tokio::test]
async fn token_without_a_user_name_is_routed_by_its_claim() {
    let part = |text: &str| URL_SAFE_NO_PAD.encode(text);
    let token = |payload: &str| format!("{}.{}.{}", part(r#"{"alg":"RS256"}"#), part(payload), part("signature"));
    let bearer =
        |authzid: &str, token: &str| STANDARD.encode(format!("n,{authzid},\x01host=h\x01auth=Bearer {token}\x01\x01"));
    let good = token(r#"{"iss":"https://login.test","email":"alice@good.test","aud":"imap"}"#);
    let server = ScriptedServer::new(&format!(
        "S: * OK [CAPABILITY IMAP4rev1 SASL-IR AUTH=OAUTHBEARER] x\nC: L AUTHENTICATE OAUTHBEARER {}\n\
         S: L OK [CAPABILITY IMAP4rev1] in\n...",
        bearer("a=alice@good.test", &good)
    ))
    .await;
    let with = |oauth: &str| {
        format!(
            "listeners: [{{address: '127.0.0.1:0', tls: none, mechanisms: [oauthbearer]}}]\n\
             backends: {{only: {{servers: ['{}']}}}}\nroutes: [{{domain: {{good.test: only}}}}]\n{oauth}",
            server.address
        )
    };
    let issuer = "oauth: [{issuer: 'https://login.test', audience: imap}]\n";
    let failed = "a NO [AUTHENTICATIONFAILED] Authentication failed.";
    let ask = async |proxy: &Running, token: &str| {
        let mut client = Client::connect(proxy.listeners()[0]).await;
        client.command(&format!("a AUTHENTICATE OAUTHBEARER {}", bearer("", token))).await
    };
    let unconfigured = start(&with("")).await;
    assert_eq!(ask(&unconfigured, &good).await, failed);
    assert_eq!((server.connections(), failures(&unconfigured, "invalid_credentials")), (0, 1.0));
    let proxy = start(&with(issuer)).await;
    assert_eq!(ask(&proxy, &good).await, "a OK [CAPABILITY IMAP4rev1] in");
    for other in [
        "opaque".to_owned(),
        token(r#"{"iss":"https://other.test","email":"alice@good.test","aud":"imap"}"#),
        token(r#"{"iss":"https://login.test","email":"alice@good.test","aud":"smtp"}"#),
        token(r#"{"iss":"https://login.test","email":"alice@good.test","email":"bob@good.test","aud":"imap"}"#),
        token(r#"{"iss":"https://login.test","email":"someone@unknown.test","aud":"imap"}"#),
    ] {
        assert_eq!(ask(&proxy, &other).await, failed, "{other}");
    }
    assert_eq!(server.connections(), 1);
}

/// A server that refuses alternately at once and late: within one connection, unknown users are refused both ways.
#[tokio::test]
async fn delay_of_unknown_users_is_sampled_for_each_attempt() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let turn = Arc::new(AtomicUsize::new(0));
    tokio::spawn(async move {
        while let Ok((socket, _)) = listener.accept().await {
            let is_late = turn.fetch_add(1, Ordering::SeqCst) % 2 == 1;
            tokio::spawn(async move {
                let mut server = LineStream::new(socket);
                server.send("* OK [CAPABILITY IMAP4rev1] x\r\n").await;
                server.line().await;
                // This is the latency of the server; the test does not wait for a condition here.
                tokio::time::sleep(Duration::from_millis(if is_late { 250 } else { 0 })).await;
                server.send("L NO [AUTHENTICATIONFAILED] no\r\n").await;
                server.line().await;
            });
        }
    });
    let proxy = proxy(&format!(
        "backends: {{only: {{servers: ['{address}']}}}}\nroutes: [{{domain: {{good.test: only}}}}]\nlimits: {{failed_logins: 100}}\n"
    ))
    .await;
    // Only one sample of each client address is used.
    for number in 1..=10 {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind(SocketAddr::from(([127, 0, 1, number], 0))).unwrap();
        let mut client = LineStream::new(socket.connect(proxy.listeners()[0]).await.unwrap());
        client.line().await;
        assert!(client.command("a LOGIN alice@good.test x").await.starts_with("a NO"));
    }
    let mut client = Client::connect(proxy.listeners()[0]).await;
    let mut late = Vec::new();
    for _ in 0..24 {
        let started = Instant::now();
        assert!(client.command("a LOGIN someone@unknown.test x").await.starts_with("a NO"));
        late.push(started.elapsed() >= Duration::from_millis(200));
    }
    assert!(late.contains(&true) && late.contains(&false), "{late:?}");
}

/// The texts of refusals differ between servers; that of an unknown user must not be distinguishable.
#[tokio::test]
async fn unknown_user_is_refused_with_the_text_of_a_server() {
    let server = ScriptedServer::new(
        "S: * OK [CAPABILITY IMAP4rev1] x\nC: *\nS: L NO Login failed: authentication failure\n...",
    )
    .await;
    let proxy = proxy(&format!(
        "backends: {{only: {{servers: ['{}']}}}}\nroutes: [{{domain: {{good.test: only}}}}]\nlimits: {{failed_logins: 100}}\n",
        server.address
    ))
    .await;
    let mut client = Client::connect(proxy.listeners()[0]).await;
    let known = client.command("a LOGIN alice@good.test x").await;
    assert_eq!(client.command("a LOGIN bob@good.test x").await, known);
    assert_eq!(known, "a NO [AUTHENTICATIONFAILED] Login failed: authentication failure");
    assert_eq!(client.command("a LOGIN someone@unknown.test x").await, known);
    assert_eq!(client.command("a LOGIN carol@good.test \"\"").await, known, "an empty password");
    proxy.stop().await;
}

/// New versions of Outlook send every value of their ID as a literal, and LOGIN directly after it.
#[tokio::test]
async fn outlook_id_with_literals_and_login_in_one_write_are_accepted() {
    let server = ScriptedServer::new(
        "S: * OK [CAPABILITY IMAP4rev1 ID] x\nC: *\nC: L LOGIN \"alice\" \"secret\"\nS: I OK x\nS: L OK [CAPABILITY IMAP4rev1] in\n...",
    )
    .await;
    let proxy =
        proxy(&format!("backends: {{only: {{servers: ['{}']}}}}\nroutes: [{{default: only}}]\n", server.address)).await;
    let mut client = Client::connect(proxy.listeners()[0]).await;
    client
        .send(
            "A1 ID (\"name\" {17+}\r\nMicrosoft Outlook \"version\" {1+}\r\n1 \"os\" {1+}\r\nw \"os-version\" {1+}\r\n1 \
             \"vendor\" {1+}\r\nm)\r\nA2 LOGIN {5+}\r\nalice {6+}\r\nsecret\r\n",
        )
        .await;
    assert_eq!(client.line().await, "* ID (\"name\" \"Vestibule\")");
    assert_eq!(client.line().await, "A1 OK ID completed.");
    assert_eq!(client.line().await, "A2 OK [CAPABILITY IMAP4rev1] in");
}
