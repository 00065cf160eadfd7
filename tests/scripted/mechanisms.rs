//! Relayed mechanisms, capabilities that servers advertise, the ID for servers, and referrals.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use tokio::net::{TcpListener, TcpStream};
use vestibule::server::Running;

use crate::support::{
    Certificates, Client, LineStream, ScriptedServer, eventually, metric, proxy, start, with_timeout,
};

const UNAVAILABLE: &str = "a NO [UNAVAILABLE] The mailbox is temporarily unavailable, try again later.";

#[tokio::test]
async fn token_of_64_kib_is_relayed_completely() {
    let token = "t0ken.".repeat(11_000)[..65_536].to_owned();
    for (name, message) in [
        ("XOAUTH2", format!("user=alice\x01auth=Bearer {token}\x01\x01")),
        ("OAUTHBEARER", format!("n,a=alice,\x01host=h\x01port=993\x01auth=Bearer {token}\x01\x01")),
    ] {
        let encoded = STANDARD.encode(message);
        for sasl_ir in ["SASL-IR ", ""] {
            // The message exceeds a server's command line, so it is sent after a continuation request.
            let sent = format!("C: L AUTHENTICATE {name}\nS: +\nC: {encoded}");
            let server = ScriptedServer::new(&format!(
                "S: * OK [CAPABILITY IMAP4rev1 {sasl_ir}AUTH={name}] x\n{sent}\nS: L OK [CAPABILITY IMAP4rev1] in\n..."
            ))
            .await;
            let proxy = start(&format!(
                "listeners: [{{address: '127.0.0.1:0', tls: none, mechanisms: [{}]}}]\n\
                 backends: {{only: {{servers: ['{}']}}}}\nroutes: [{{default: only}}]\n",
                name.to_lowercase(),
                server.address
            ))
            .await;
            for initial in [true, false] {
                let mut client = Client::connect(proxy.listeners()[0]).await;
                if initial {
                    client.send(format!("a AUTHENTICATE {name} {encoded}\r\n")).await;
                } else {
                    assert_eq!(client.command(&format!("a AUTHENTICATE {name}")).await, "+");
                    client.send(format!("{encoded}\r\n")).await;
                }
                let answer = client.line().await;
                assert!(answer == "a OK [CAPABILITY IMAP4rev1] in", "{name} {sasl_ir}{initial}: {answer:.200}");
            }
        }
    }
}

#[tokio::test]
async fn greeting_advertises_what_servers_support() {
    let certificates = Certificates::new();
    let server = ScriptedServer::new(
        "S: * OK [CAPABILITY IMAP4rev1 STARTTLS LOGIN-REFERRALS LITERAL+ SASL-IR IDLE MOVE AUTH=PLAIN AUTH=SCRAM-SHA-1 \
         AUTH=SCRAM-SHA-256 AUTH=SCRAM-SHA-256-PLUS AUTH=GSSAPI AUTH=CRAM-MD5 AUTH=XOAUTH2] x\n...",
    )
    .await;
    let proxy = start(&format!(
        "listeners:\n- {{address: '127.0.0.1:0', tls: implicit}}\n- {{address: '127.0.0.1:0', tls: none}}\n\
         - {{address: '127.0.0.1:0', tls: starttls}}\n\
         - {{address: '127.0.0.1:0', tls: none, mechanisms: [scram-sha-256, oauthbearer]}}\n\
         {}backends: {{only: {{servers: ['{}'], check: {{interval: 100ms}}}}}}\nroutes: [{{default: only}}]\n",
        certificates.section(),
        server.address
    ))
    .await;
    let greeting = async |listener: usize| LineStream::connect_only(proxy.listeners()[listener]).await.line().await;
    with_timeout("the offer", async { while !greeting(1).await.contains("SCRAM") {} }).await;
    let offered = "IMAP4rev1 SASL-IR LITERAL+ ID ENABLE IDLE MOVE AUTH=PLAIN AUTH=LOGIN AUTH=XOAUTH2 AUTH=SCRAM-SHA-1";
    assert_eq!(greeting(1).await, format!("* OK [CAPABILITY {offered}] Vestibule ready."));
    let socket = TcpStream::connect(proxy.listeners()[0]).await.unwrap();
    let inside_tls = LineStream::new(certificates.encrypt(socket).await).line().await;
    assert_eq!(inside_tls, format!("* OK [CAPABILITY {offered}] Vestibule ready."));
    assert!(greeting(2).await.contains("IDLE MOVE STARTTLS LOGINDISABLED]"), "before TLS no way to log in");
    // Mechanisms in the configuration are offered whether servers support them or not.
    assert!(greeting(3).await.contains("IDLE MOVE AUTH=OAUTHBEARER AUTH=SCRAM-SHA-256 LOGINDISABLED]"));
}

#[tokio::test]
async fn id_describes_the_client_and_trust_is_reported() {
    let certificates = Certificates::new();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let proxy = start(&format!(
        "listeners: [{{address: '127.0.0.1:0', tls: implicit}}]\n{}backends: {{only: {{servers: ['{}'], \
         forward: {{site: north, rack: '7'}}}}}}\nroutes: [{{default: only}}]\n",
        certificates.section(),
        listener.local_addr().unwrap()
    ))
    .await;
    for (said, ttl, answer, trusted) in [
        // Dovecot 2.3 sends this answer to trusted and untrusted clients.
        ("", 6, "ID completed.", -1.0),
        ("", 6, "Trusted ID completed.", 1.0),
        ("b ID (\"name\" \"a proxy\" \"x-proxy-ttl\" \"3\")\r\n", 2, "ID completed.", 0.0),
        ("b ID (\"x-proxy-ttl\" \"1\" \"x-client-transport\" \"forged\")\r\n", 0, "trusted id completed.", 1.0),
    ] {
        let socket = TcpStream::connect(proxy.listeners()[0]).await.unwrap();
        let client_port = socket.local_addr().unwrap().port();
        let mut client = LineStream::new(certificates.encrypt(socket).await);
        client.line().await;
        client.send(format!("{said}a LOGIN alice secret\r\n")).await;
        let mut server = LineStream::new(with_timeout("the proxy", listener.accept()).await.unwrap().0);
        server.send("* OK [CAPABILITY IMAP4rev1 ID] x\r\n").await;
        let id = server.line().await;
        let session = id.split('"').skip_while(|word| *word != "x-session-id").nth(2).unwrap().to_owned();
        assert!(session.len() >= 12, "{id}");
        let own = if said.contains("a proxy") { "\"name\" \"a proxy\" " } else { "" };
        assert_eq!(
            id,
            format!(
                "I ID ({own}\"x-session-id\" \"{session}\" \"x-originating-ip\" \"127.0.0.1\" \
                 \"x-originating-port\" \"{client_port}\" \"x-connected-ip\" \"127.0.0.1\" \"x-connected-port\" \"{}\" \
                 \"x-proxy-ttl\" \"{ttl}\" \"x-client-transport\" \"TLS\" \"x-connected-name\" \"localhost\" \
                 \"x-forward-rack\" \"7\" \"x-forward-site\" \"north\")",
                proxy.listeners()[0].port()
            )
        );
        server.line().await;
        server.send(format!("I OK {answer}\r\nL OK [CAPABILITY IMAP4rev1] in\r\n")).await;
        while !client.line().await.starts_with("a OK") {}
        assert_eq!(metric(&proxy, "vestibule_server_trusts_id", &[]), trusted, "{answer}");
    }
}

#[tokio::test]
async fn proxy_with_exhausted_ttl_is_refused() {
    let server = ScriptedServer::new(crate::support::ACCEPTS_ALICE).await;
    let text = format!(
        "backends: {{only: {{servers: ['{}']}}}}
routes: [{{default: only}}]
",
        server.address
    );
    let proxy = proxy(&text).await;
    let mut client = Client::connect(proxy.listeners()[0]).await;
    client.send("i ID (\"x-proxy-ttl\" \"0\")\r\n").await;
    while client.line().await != "i OK ID completed." {}
    assert_eq!(client.command("a LOGIN alice secret").await, UNAVAILABLE);
    assert_eq!(metric(&proxy, "vestibule_failures_total", &["reason=\"proxy_loop\""]), 1.0);
    assert_eq!(server.connections(), 0);
}

/// A server that refers every user to `address`.
fn referring(address: &str) -> String {
    format!("S: * OK [CAPABILITY IMAP4rev1] x\nC: *\nS: L NO [REFERRAL imap://alice@{address}/] there\n...")
}

#[tokio::test]
async fn referral_chain_is_limited() {
    let mut listeners = Vec::new();
    for _ in 0..4 {
        listeners.push(TcpListener::bind("127.0.0.1:0").await.unwrap());
    }
    let places: Vec<String> = listeners.iter().map(|listener| listener.local_addr().unwrap().to_string()).collect();
    let backends: Vec<String> =
        places.iter().enumerate().map(|(at, place)| format!("b{at}: {{servers: ['{place}']}}")).collect();
    let text = format!("backends: {{{}}}\nroutes: [{{default: b0}}]\n", backends.join(", "));
    // A chain of three referrals, of which the last would lead to a server that accepts the login.
    let mut at = listeners.into_iter();
    let mut next = |script: &str| ScriptedServer::on_listener(at.next().unwrap(), script);
    let servers = [
        next(&referring(&places[1])),
        next(&referring(&places[2])),
        next(&referring(&places[3])),
        next(crate::support::ACCEPTS_ALICE),
    ];
    let chain = proxy(&text).await;
    assert_eq!(Client::connect(chain.listeners()[0]).await.command("a LOGIN alice secret").await, UNAVAILABLE);
    assert_eq!(servers.each_ref().map(ScriptedServer::connections), [1, 1, 1, 0]);
    assert_eq!(metric(&chain, "vestibule_failures_total", &["reason=\"referral\""]), 1.0);
    // A chain of two referrals, from the second server.
    let shorter = proxy(&text.replace("default: b0", "default: b1")).await;
    let mut client = Client::connect(shorter.listeners()[0]).await;
    assert_eq!(client.command("a LOGIN alice secret").await, "a OK [CAPABILITY IMAP4rev1 IDLE] in");
    eventually("the session", || metric(&shorter, "vestibule_backend_sessions_total", &["backend=\"b3\""]) == 1.0)
        .await;
}

#[tokio::test]
async fn referral_loop_is_detected() {
    let (one, other) =
        (TcpListener::bind("127.0.0.1:0").await.unwrap(), TcpListener::bind("127.0.0.1:0").await.unwrap());
    let (first, second) = (one.local_addr().unwrap().to_string(), other.local_addr().unwrap().to_string());
    let servers =
        [ScriptedServer::on_listener(one, &referring(&second)), ScriptedServer::on_listener(other, &referring(&first))];
    let text =
        format!("backends: {{a: {{servers: ['{first}']}}, b: {{servers: ['{second}']}}}}\nroutes: [{{default: a}}]\n");
    let proxy = proxy(&text).await;
    assert_eq!(Client::connect(proxy.listeners()[0]).await.command("a LOGIN alice secret").await, UNAVAILABLE);
    assert_eq!(servers.each_ref().map(ScriptedServer::connections), [1, 1]);
    assert_eq!(metric(&proxy, "vestibule_failures_total", &["reason=\"referral\""]), 1.0);
}

/// Starts a proxy that relays XOAUTH2 and SCRAM to a server that the test implements.
async fn relaying(limits: &str) -> (Running, TcpListener) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let proxy = start(&format!(
        "listeners: [{{address: '127.0.0.1:0', tls: none, mechanisms: [login, xoauth2, oauthbearer, scram-sha-256]}}]\n\
         limits: {{workers: 1, {limits}}}\n\
         backends: {{only: {{servers: ['{}'], check: off}}}}\nroutes: [{{default: only}}]\n",
        listener.local_addr().unwrap()
    ))
    .await;
    (proxy, listener)
}

/// Returns a client that has sent its first message, and the server that has received it.
async fn start_exchange(proxy: &Running, listener: &TcpListener, mechanism: &str, message: &str) -> (Client, Client) {
    let mut client = Client::connect(proxy.listeners()[0]).await;
    client.send(format!("a AUTHENTICATE {mechanism} {}\r\n", STANDARD.encode(message))).await;
    let mut server = LineStream::new(with_timeout("the proxy", listener.accept()).await.unwrap().0);
    server.send("* OK [CAPABILITY IMAP4rev1 SASL-IR AUTH=XOAUTH2 AUTH=OAUTHBEARER AUTH=SCRAM-SHA-256] x\r\n").await;
    assert!(server.line().await.starts_with(&format!("L AUTHENTICATE {mechanism} ")));
    (client, server)
}

fn logins(proxy: &Running, outcome: &str) -> f64 {
    metric(proxy, "vestibule_logins_total", &[&format!("outcome=\"{outcome}\"")])
}

async fn wait_until_no_connection_is_open(proxy: &Running) {
    eventually("the end of the session", || metric(proxy, "vestibule_connections", &[]) == 0.0).await;
}

const XOAUTH2: (&str, &str) = ("XOAUTH2", "user=alice\x01auth=Bearer wrong\x01\x01");
const BEARER: (&str, &str) = ("OAUTHBEARER", "n,a=alice,\x01auth=Bearer wrong\x01\x01");
/// The challenge `{"status":"401"}`.
const TOKEN_REFUSED: &str = "+ eyJzdGF0dXMiOiI0MDEifQ==";

#[tokio::test]
async fn refused_token_is_a_failed_login_however_the_exchange_ends() {
    let (proxy, listener) = relaying("").await;
    let mut expected = 0.0;
    for (mechanism, message) in [XOAUTH2, BEARER] {
        for ending in ["the client leaves", "the client cancels", "the client answers", "the server leaves"] {
            let (mut client, mut server) = start_exchange(&proxy, &listener, mechanism, message).await;
            server.send(format!("{TOKEN_REFUSED}\r\n")).await;
            assert_eq!(client.line().await, TOKEN_REFUSED);
            expected += 1.0;
            assert_eq!(logins(&proxy, "refused"), expected, "{mechanism}, counted before {ending}");
            match ending {
                "the client leaves" => {}
                "the client cancels" => {
                    client.send("*\r\n").await;
                    assert_eq!(server.line().await, "*");
                    server.send("L BAD aborted\r\n").await;
                    assert_eq!(client.line().await, "a BAD aborted");
                }
                "the client answers" => {
                    client.send("AQ==\r\n").await;
                    assert_eq!(server.line().await, "AQ==");
                    server.send("L NO [AUTHENTICATIONFAILED] No.\r\n").await;
                    assert_eq!(client.line().await, "a NO [AUTHENTICATIONFAILED] No.");
                }
                _ => {
                    drop(server);
                    client.send("AQ==\r\n").await;
                    assert!(client.line().await.starts_with("a NO [AUTHENTICATIONFAILED] "));
                }
            }
            drop(client);
            wait_until_no_connection_is_open(&proxy).await;
            assert_eq!(logins(&proxy, "refused"), expected, "{mechanism}, once, when {ending}");
        }
    }
    for other in ["unavailable", "abandoned", "accepted"] {
        assert_eq!(logins(&proxy, other), 0.0, "{other}");
    }
    proxy.stop().await;
}

#[tokio::test]
async fn disconnecting_after_a_refused_token_does_not_avoid_the_delay() {
    // The delay is randomly up to a fifth shorter.
    let delay = std::time::Duration::from_millis(240);
    let (proxy, listener) = relaying("failed_login_delay: 300ms").await;
    let (mechanism, message) = XOAUTH2;
    for _ in 0..2 {
        let began = std::time::Instant::now();
        let (mut client, mut server) = start_exchange(&proxy, &listener, mechanism, message).await;
        server.send(format!("{TOKEN_REFUSED}\r\n")).await;
        assert_eq!(client.line().await, TOKEN_REFUSED);
        assert!(began.elapsed() >= delay, "{:?}", began.elapsed());
    }
    proxy.stop().await;
}

#[tokio::test]
async fn login_without_an_answer_is_counted_as_abandoned() {
    let (proxy, listener) = relaying("login: 2s").await;
    // After the server's first message the client disconnects, or is silent until limits.login.
    for (abandoned, is_leaving) in [(1.0, true), (2.0, false)] {
        let (mut client, mut server) = start_exchange(&proxy, &listener, "SCRAM-SHA-256", "n,,n=alice,r=nonce").await;
        server.send("+ cj1ub25jZTEscz1zYWx0LGk9NDA5Ng==\r\n").await;
        assert!(client.line().await.starts_with("+ "));
        if is_leaving {
            drop(client);
        } else {
            assert!(client.line().await.starts_with("* BYE "));
        }
        eventually("the count", || logins(&proxy, "abandoned") == abandoned).await;
        assert_eq!(logins(&proxy, "refused"), 0.0, "no login was refused");
    }
    wait_until_no_connection_is_open(&proxy).await;
    assert_eq!(
        metric(&proxy, "vestibule_logins_total", &["outcome=\"abandoned\"", "backend=\"only\""]),
        2.0,
        "for the backend whose server was asked"
    );
    proxy.stop().await;
}

#[tokio::test]
async fn forged_server_signature_does_not_log_in() {
    // The signature, base64 of "v=Zm9yZ2Vk", precedes the client's proof in SCRAM, and does not exist in XOAUTH2.
    const FORGED: &str = "+ dj1abTl5WjJWaw==";
    let (proxy, listener) = relaying("").await;
    for (count, (mechanism, message)) in [("SCRAM-SHA-256", "n,,n=alice,r=nonce"), XOAUTH2].into_iter().enumerate() {
        let (mut client, mut server) = start_exchange(&proxy, &listener, mechanism, message).await;
        server.send(format!("{FORGED}\r\n")).await;
        assert_eq!(client.line().await, FORGED, "the client receives it unchanged, and can detect the forgery");
        assert_eq!(proxy.snapshot().backends.list()[0].servers()[0].sessions(), 0, "it takes no place: {mechanism}");
        client.send("*\r\n").await;
        assert_eq!(server.line().await, "*");
        server.send("L BAD aborted\r\n").await;
        assert_eq!(client.line().await, "a BAD aborted");
        assert_eq!(client.command("b NOOP").await, "b OK NOOP completed.", "the client is not logged in");
        assert_eq!((logins(&proxy, "accepted"), logins(&proxy, "refused")), (0.0, count as f64 + 1.0));
    }
    // A signature after the client's proof is relayed unchanged too, and only the server's answer decides.
    let (mut client, mut server) = start_exchange(&proxy, &listener, "SCRAM-SHA-256", "n,,n=alice,r=nonce").await;
    for challenge in ["+ cj1ub25jZTEscz1zYWx0LGk9NDA5Ng==", FORGED] {
        server.send(format!("{challenge}\r\n")).await;
        assert_eq!(client.line().await, challenge);
        client.send("cHJvb2Y=\r\n").await;
        assert_eq!(server.line().await, "cHJvb2Y=");
    }
    server.send("L NO [AUTHENTICATIONFAILED] No.\r\n").await;
    assert_eq!(client.line().await, "a NO [AUTHENTICATIONFAILED] No.");
    assert_eq!(logins(&proxy, "accepted"), 0.0);
    proxy.stop().await;
}
