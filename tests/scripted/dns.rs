//! Servers that are configured by name or SRV record, with a name server whose answers change.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex};

use hickory_resolver::proto::op::{Message, MessageType, ResponseCode};
use hickory_resolver::proto::rr::rdata::{A, SRV};
use hickory_resolver::proto::rr::{Name, RData, Record, RecordType};
use tokio::net::UdpSocket;

use crate::support::{ACCEPTS_ALICE, Client, ScriptedServer, eventually, metric, proxy};

type Zone = Arc<Mutex<Option<HashMap<(String, RecordType), Vec<RData>>>>>;

/// A name server that answers from its zone with a time to live of one second, and does not answer without a zone.
struct NameServer {
    address: SocketAddr,
    zone: Zone,
}

impl NameServer {
    async fn new() -> Self {
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let address = socket.local_addr().unwrap();
        let zone: Zone = Arc::new(Mutex::new(Some(HashMap::new())));
        let served_zone = zone.clone();
        tokio::spawn(async move {
            let mut buffer = [0; 4096];
            while let Ok((size, peer)) = socket.recv_from(&mut buffer).await {
                if let Some(answer) = answer(&buffer[..size], &served_zone) {
                    socket.send_to(&answer, peer).await.unwrap();
                }
            }
        });
        Self { address, zone }
    }

    fn set(&self, name: &str, data: Vec<RData>) {
        let kind = data[0].record_type();
        self.zone.lock().unwrap().get_or_insert_default().insert((name.to_owned(), kind), data);
    }

    fn stop_answering(&self) {
        *self.zone.lock().unwrap() = None;
    }
}

fn answer(query: &[u8], zone: &Zone) -> Option<Vec<u8>> {
    let query = Message::from_vec(query).unwrap();
    let question = query.queries[0].clone();
    let zone = zone.lock().unwrap();
    let records = zone.as_ref()?;
    let mut answer = Message::response(query.metadata.id, query.metadata.op_code);
    assert_eq!(answer.metadata.message_type, MessageType::Response);
    let name = question.name().to_ascii().trim_end_matches('.').to_ascii_lowercase();
    answer.metadata.response_code =
        if records.keys().any(|(known, _)| *known == name) { ResponseCode::NoError } else { ResponseCode::NXDomain };
    for data in records.get(&(name, question.query_type())).into_iter().flatten() {
        answer.answers.push(Record::from_rdata(question.name().clone(), 1, data.clone()));
    }
    answer.queries.push(question);
    Some(answer.to_vec().unwrap())
}

fn a(address: IpAddr) -> Vec<RData> {
    let IpAddr::V4(v4) = address else { panic!("an IPv4 address") };
    vec![RData::A(A(v4))]
}

fn srv(priority: u16, port: u16, target: &str) -> RData {
    RData::SRV(SRV::new(priority, 1, port, Name::from_ascii(target).unwrap()))
}

async fn log_in(address: SocketAddr) -> String {
    Client::connect(address).await.command("a LOGIN alice secret").await
}

#[tokio::test]
async fn server_name_is_resolved_again_and_its_last_answer_kept() {
    let dns = NameServer::new().await;
    let server = ScriptedServer::new(ACCEPTS_ALICE).await;
    dns.set("mail.test", a(server.address.ip()));
    let text = format!(
        "backends: {{only: {{servers: ['mail.test:{}']}}}}\nroutes: [{{default: only}}]\nresolver: {{servers: ['{}'], timeout: 1s}}\n",
        server.address.port(),
        dns.address
    );
    let proxy = proxy(&text).await;
    let address = proxy.listeners()[0];
    assert!(log_in(address).await.starts_with("a OK"));
    // The record expires several times while DNS does not answer.
    dns.stop_answering();
    for _ in 0..3 {
        assert!(log_in(address).await.starts_with("a OK"), "the last good answer stays in use");
    }
    // DNS answers again, and the name resolves to an address without a server.
    dns.set("mail.test", a(IpAddr::V4(Ipv4Addr::new(127, 0, 0, 77))));
    let changed = async { while log_in(address).await.starts_with("a OK") {} };
    crate::support::with_timeout("the change of address", changed).await;
    dns.set("mail.test", a(server.address.ip()));
    let changed_back = async { while !log_in(address).await.starts_with("a OK") {} };
    crate::support::with_timeout("the second change", changed_back).await;
}

#[tokio::test]
async fn servers_of_an_srv_record_are_added_and_removed() {
    let dns = NameServer::new().await;
    let (first, spare) = (ScriptedServer::new(ACCEPTS_ALICE).await, ScriptedServer::new(ACCEPTS_ALICE).await);
    dns.set("one.test", a(first.address.ip()));
    dns.set("two.test", a(spare.address.ip()));
    dns.set(
        "_imap._tcp.shard.test",
        vec![srv(10, first.address.port(), "one.test."), srv(20, spare.address.port(), "two.test.")],
    );
    let text = format!(
        "backends: {{only: {{servers: [{{srv: _imap._tcp.shard.test}}]}}}}\nroutes: [{{default: only}}]\nresolver: {{servers: ['{}']}}\n",
        dns.address
    );
    let proxy = proxy(&text).await;
    let address = proxy.listeners()[0];
    for _ in 0..5 {
        assert!(log_in(address).await.starts_with("a OK"));
    }
    assert_eq!((first.connections(), spare.connections()), (5, 0), "the lower priority value comes first");
    dns.set("_imap._tcp.shard.test", vec![srv(10, spare.address.port(), "two.test.")]);
    let gone = format!("server=\"one.test:{}\"", first.address.port());
    eventually("removal of the time series", || !proxy.metrics().render().contains(&gone)).await;
    assert!(log_in(address).await.starts_with("a OK"));
    assert_eq!(spare.connections(), 1);
}

#[tokio::test]
async fn server_name_of_the_proxy_itself_is_not_used() {
    let dns = NameServer::new().await;
    dns.set("self.test", a(IpAddr::V4(Ipv4Addr::LOCALHOST)));
    // The port must be known before the proxy starts, so the test uses one that was free a moment ago.
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let text = format!(
        "listeners: [{{address: '127.0.0.1:{port}', tls: none}}]\nbackends: {{only: {{servers: ['self.test:{port}']}}}}\n\
         routes: [{{default: only}}]\nresolver: {{servers: ['{}']}}\nlimits: {{connect: 500ms}}\n",
        dns.address
    );
    let proxy = crate::support::start(&text).await;
    assert!(log_in(proxy.listeners()[0]).await.starts_with("a NO [UNAVAILABLE]"));
    assert_eq!(metric(&proxy, "vestibule_connections_total", &[]), 1.0, "the proxy did not connect to itself");
    assert!(metric(&proxy, "vestibule_failures_total", &["reason=\"loop\""]) >= 1.0);
}

#[tokio::test]
async fn unknown_server_names_are_answered_with_unavailable() {
    let dns = NameServer::new().await;
    for server in ["'nowhere.test:143'", "{srv: _imap._tcp.nowhere.test}"] {
        let text = format!(
            "backends: {{only: {{servers: [{server}]}}}}\nroutes: [{{default: only}}]\nresolver: {{servers: ['{}']}}\n",
            dns.address
        );
        let proxy = proxy(&text).await;
        assert!(log_in(proxy.listeners()[0]).await.starts_with("a NO [UNAVAILABLE]"), "{server}");
    }
}
