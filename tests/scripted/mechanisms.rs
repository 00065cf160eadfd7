//! What passes between client and server without being understood: tokens, what servers offer, what they are told of the
//! client, and where they send it.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use tokio::net::{TcpListener, TcpStream};
use vestibule::server::Running;

use crate::support::{
    Certificates, Client, LineStream, ScriptedServer, eventually, metric, proxy, start, with_timeout,
};

const UNAVAILABLE: &str = "a NO [UNAVAILABLE] The mailbox is temporarily unavailable, try again later.";

#[tokio::test]
async fn a_token_of_64_kib_arrives_whole() {
    let token = "t0ken.".repeat(11_000)[..65_536].to_owned();
    for (name, message) in [
        ("XOAUTH2", format!("user=alice\x01auth=Bearer {token}\x01\x01")),
        ("OAUTHBEARER", format!("n,a=alice,\x01host=h\x01port=993\x01auth=Bearer {token}\x01\x01")),
    ] {
        let encoded = STANDARD.encode(message);
        for sasl_ir in ["SASL-IR ", ""] {
            // Longer than a server's command line: it waits to be asked for.
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
async fn what_servers_offer_and_what_of_it_is_offered() {
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
    // Set by hand: what the operator says, whatever servers do.
    assert!(greeting(3).await.contains("IDLE MOVE AUTH=OAUTHBEARER AUTH=SCRAM-SHA-256 LOGINDISABLED]"));
}

#[tokio::test]
async fn all_that_dovecot_is_told_and_whether_it_believes_it() {
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
        // Dovecot 2.3 answers so whether or not it trusts.
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
async fn a_proxy_that_may_have_no_other_behind_it_is_refused() {
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

/// A server that refers everybody to `place`.
fn referring(place: &str) -> String {
    format!("S: * OK [CAPABILITY IMAP4rev1] x\nC: *\nS: L NO [REFERRAL imap://alice@{place}/] there\n...")
}

#[tokio::test]
async fn referrals_have_an_end() {
    let mut listeners = Vec::new();
    for _ in 0..4 {
        listeners.push(TcpListener::bind("127.0.0.1:0").await.unwrap());
    }
    let places: Vec<String> = listeners.iter().map(|listener| listener.local_addr().unwrap().to_string()).collect();
    let backends: Vec<String> =
        places.iter().enumerate().map(|(at, place)| format!("b{at}: {{servers: ['{place}']}}")).collect();
    let text = format!("backends: {{{}}}\nroutes: [{{default: b0}}]\n", backends.join(", "));
    // In a circle of two; and the third of a chain, which the fourth would end well.
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
    // From the second on it is two steps.
    let shorter = proxy(&text.replace("default: b0", "default: b1")).await;
    let mut client = Client::connect(shorter.listeners()[0]).await;
    assert_eq!(client.command("a LOGIN alice secret").await, "a OK [CAPABILITY IMAP4rev1 IDLE] in");
    eventually("the session", || metric(&shorter, "vestibule_backend_sessions_total", &["backend=\"b3\""]) == 1.0)
        .await;
}

#[tokio::test]
async fn referrals_in_a_circle() {
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

/// A proxy that relays XOAUTH2 and SCRAM to a server that the test plays.
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

/// A client that has sent its first message, and the server that has got it.
async fn begun(proxy: &Running, listener: &TcpListener, mechanism: &str, message: &str) -> (Client, Client) {
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

async fn all_sessions_ended(proxy: &Running) {
    eventually("the end of the session", || metric(proxy, "vestibule_connections", &[]) == 0.0).await;
}

const XOAUTH2: (&str, &str) = ("XOAUTH2", "user=alice\x01auth=Bearer wrong\x01\x01");
const BEARER: (&str, &str) = ("OAUTHBEARER", "n,a=alice,\x01auth=Bearer wrong\x01\x01");
/// `{"status":"401"}`
const TOKEN_REFUSED: &str = "+ eyJzdGF0dXMiOiI0MDEifQ==";

#[tokio::test]
async fn a_refused_token_is_a_failed_login_however_the_exchange_ends() {
    let (proxy, listener) = relaying("").await;
    let mut expected = 0.0;
    for (mechanism, message) in [XOAUTH2, BEARER] {
        for ending in ["the client leaves", "the client cancels", "the client answers", "the server leaves"] {
            let (mut client, mut server) = begun(&proxy, &listener, mechanism, message).await;
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
            all_sessions_ended(&proxy).await;
            assert_eq!(logins(&proxy, "refused"), expected, "{mechanism}, once, when {ending}");
        }
    }
    for other in ["unavailable", "abandoned", "accepted"] {
        assert_eq!(logins(&proxy, other), 0.0, "{other}");
    }
    proxy.stop().await;
}

#[tokio::test]
async fn a_client_that_leaves_with_a_refused_token_does_not_avoid_the_delay() {
    // A fifth less at random.
    let delay = std::time::Duration::from_millis(240);
    let (proxy, listener) = relaying("failed_login_delay: 300ms").await;
    let (mechanism, message) = XOAUTH2;
    for _ in 0..2 {
        let began = std::time::Instant::now();
        let (mut client, mut server) = begun(&proxy, &listener, mechanism, message).await;
        server.send(format!("{TOKEN_REFUSED}\r\n")).await;
        assert_eq!(client.line().await, TOKEN_REFUSED);
        assert!(began.elapsed() >= delay, "{:?}", began.elapsed());
    }
    proxy.stop().await;
}

#[tokio::test]
async fn a_login_that_ends_without_an_answer_is_counted() {
    let (proxy, listener) = relaying("login: 2s").await;
    // The client leaves, or is silent until limits.login, after the server's first message.
    for (abandoned, is_leaving) in [(1.0, true), (2.0, false)] {
        let (mut client, mut server) = begun(&proxy, &listener, "SCRAM-SHA-256", "n,,n=alice,r=nonce").await;
        server.send("+ cj1ub25jZTEscz1zYWx0LGk9NDA5Ng==\r\n").await;
        assert!(client.line().await.starts_with("+ "));
        if is_leaving {
            drop(client);
        } else {
            assert!(client.line().await.starts_with("* BYE "));
        }
        eventually("the count", || logins(&proxy, "abandoned") == abandoned).await;
        assert_eq!(logins(&proxy, "refused"), 0.0, "nothing was refused");
    }
    all_sessions_ended(&proxy).await;
    assert_eq!(
        metric(&proxy, "vestibule_logins_total", &["outcome=\"abandoned\"", "backend=\"only\""]),
        2.0,
        "for the backend whose server was asked"
    );
    proxy.stop().await;
}

#[tokio::test]
async fn a_forged_server_signature_proves_nothing() {
    // The signature, base64 of "v=Zm9yZ2Vk", comes before any proof of the client, in SCRAM and in a mechanism that has none.
    const FORGED: &str = "+ dj1abTl5WjJWaw==";
    let (proxy, listener) = relaying("").await;
    for (count, (mechanism, message)) in [("SCRAM-SHA-256", "n,,n=alice,r=nonce"), XOAUTH2].into_iter().enumerate() {
        let (mut client, mut server) = begun(&proxy, &listener, mechanism, message).await;
        server.send(format!("{FORGED}\r\n")).await;
        assert_eq!(client.line().await, FORGED, "the client gets it as it is, and can see that it is forged");
        assert_eq!(proxy.snapshot().backends.list()[0].servers()[0].sessions(), 0, "it takes no place: {mechanism}");
        client.send("*\r\n").await;
        assert_eq!(server.line().await, "*");
        server.send("L BAD aborted\r\n").await;
        assert_eq!(client.line().await, "a BAD aborted");
        assert_eq!(client.command("b NOOP").await, "b OK NOOP completed.", "the client is not logged in");
        assert_eq!((logins(&proxy, "accepted"), logins(&proxy, "refused")), (0.0, count as f64 + 1.0));
    }
    // Every byte of the real one arrives too, whatever it is, and the server's word counts, not its signature.
    let (mut client, mut server) = begun(&proxy, &listener, "SCRAM-SHA-256", "n,,n=alice,r=nonce").await;
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
