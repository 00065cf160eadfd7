//! What passes between client and server without being understood: tokens, what servers offer, what they are told of the
//! client, and where they send it.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use tokio::net::{TcpListener, TcpStream};

use crate::support::{Certificates, Client, Line, Scripted, eventually, in_time, metric, proxy, start};

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
            let server = Scripted::new(&format!(
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
                    assert_eq!(client.ask(&format!("a AUTHENTICATE {name}")).await, "+");
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
    let server = Scripted::new(
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
    let greeting = async |listener: usize| Line::silent(proxy.listeners()[listener]).await.line().await;
    in_time("the offer", async { while !greeting(1).await.contains("SCRAM") {} }).await;
    let offered = "IMAP4rev1 SASL-IR LITERAL+ ID ENABLE IDLE MOVE AUTH=PLAIN AUTH=LOGIN AUTH=XOAUTH2 AUTH=SCRAM-SHA-1";
    assert_eq!(greeting(1).await, format!("* OK [CAPABILITY {offered}] Vestibule ready."));
    let socket = TcpStream::connect(proxy.listeners()[0]).await.unwrap();
    let inside_tls = Line::new(certificates.encrypt(socket).await).line().await;
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
        let mut client = Line::new(certificates.encrypt(socket).await);
        client.line().await;
        client.send(format!("{said}a LOGIN alice secret\r\n")).await;
        let mut server = Line::new(in_time("the proxy", listener.accept()).await.unwrap().0);
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
    let server = Scripted::new(crate::support::GOOD).await;
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
    assert_eq!(client.ask("a LOGIN alice secret").await, UNAVAILABLE);
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
    let mut next = |script: &str| Scripted::listening(at.next().unwrap(), script);
    let servers = [
        next(&referring(&places[1])),
        next(&referring(&places[2])),
        next(&referring(&places[3])),
        next(crate::support::GOOD),
    ];
    let chain = proxy(&text).await;
    assert_eq!(Client::connect(chain.listeners()[0]).await.ask("a LOGIN alice secret").await, UNAVAILABLE);
    assert_eq!(servers.each_ref().map(Scripted::connections), [1, 1, 1, 0]);
    assert_eq!(metric(&chain, "vestibule_failures_total", &["reason=\"referral\""]), 1.0);
    // From the second on it is two steps.
    let shorter = proxy(&text.replace("default: b0", "default: b1")).await;
    let mut client = Client::connect(shorter.listeners()[0]).await;
    assert_eq!(client.ask("a LOGIN alice secret").await, "a OK [CAPABILITY IMAP4rev1 IDLE] in");
    eventually("the session", || metric(&shorter, "vestibule_backend_sessions_total", &["backend=\"b3\""]) == 1.0)
        .await;
}

#[tokio::test]
async fn referrals_in_a_circle() {
    let (one, other) =
        (TcpListener::bind("127.0.0.1:0").await.unwrap(), TcpListener::bind("127.0.0.1:0").await.unwrap());
    let (first, second) = (one.local_addr().unwrap().to_string(), other.local_addr().unwrap().to_string());
    let servers = [Scripted::listening(one, &referring(&second)), Scripted::listening(other, &referring(&first))];
    let text =
        format!("backends: {{a: {{servers: ['{first}']}}, b: {{servers: ['{second}']}}}}\nroutes: [{{default: a}}]\n");
    let proxy = proxy(&text).await;
    assert_eq!(Client::connect(proxy.listeners()[0]).await.ask("a LOGIN alice secret").await, UNAVAILABLE);
    assert_eq!(servers.each_ref().map(Scripted::connections), [1, 1]);
    assert_eq!(metric(&proxy, "vestibule_failures_total", &["reason=\"referral\""]), 1.0);
}
