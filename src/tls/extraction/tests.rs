//! Extraction of connections whose peer requests TLS answers: both roles, both versions, every split of the records.

use std::future::poll_fn;
use std::sync::{Arc, LazyLock};
use std::task::Poll;

use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, ReadBuf, duplex};
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio_rustls::rustls::version::{TLS12, TLS13};
use tokio_rustls::rustls::{ClientConfig, ClientConnection, RootCertStore, ServerConfig, SupportedProtocolVersion};
use tokio_rustls::{TlsAcceptor, TlsConnector, TlsStream};

use super::*;
use crate::record_layer::{Channel, ContentType, Opened, Role, Version, record_length};

const LOGIN: &[u8] = b"a LOGIN alice secret\r\n";
const NEXT: &[u8] = b"b NOOP\r\n";
const REPLY: &[u8] = b"a OK done\r\n";

/// One thing that the peer sends.
#[derive(Debug, Clone, Copy)]
enum Sent {
    Data(&'static [u8]),
    /// A KeyUpdate that requests an answer in TLS 1.3, or a renegotiation in TLS 1.2.
    Request,
    /// A `Request` in two records.
    SplitRequest,
}

use Sent::{Data, Request, SplitRequest};

/// A connection after its handshake: the near end uses rustls, the peer a channel of the record layer.
struct Pair {
    near: TlsStream<RecordStream<DuplexStream>>,
    secrets: Arc<TrafficSecrets>,
    peer: Channel,
    socket: DuplexStream,
}

struct Configs {
    server: ServerConfig,
    client: ClientConfig,
}

fn configs(version: &'static SupportedProtocolVersion) -> Configs {
    let generated = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
    let key = PrivateKeyDer::try_from(generated.signing_key.serialize_der()).unwrap();
    let certificate: CertificateDer<'static> = generated.cert.der().clone();
    let mut roots = RootCertStore::empty();
    roots.add(certificate.clone()).unwrap();
    let mut server = ServerConfig::builder_with_protocol_versions(&[version])
        .with_no_client_auth()
        .with_single_cert(vec![certificate], key)
        .unwrap();
    let mut client =
        ClientConfig::builder_with_protocol_versions(&[version]).with_root_certificates(roots).with_no_client_auth();
    (server.enable_secret_extraction, client.enable_secret_extraction) = (true, true);
    Configs { server, client }
}

static CONFIGS: LazyLock<[Configs; 2]> = LazyLock::new(|| [configs(&TLS13), configs(&TLS12)]);

impl Pair {
    async fn new(version: Version, near_role: Role) -> Self {
        let configs = &CONFIGS[usize::from(version == Version::Tls12)];
        let (server_secrets, client_secrets) = (Arc::<TrafficSecrets>::default(), Arc::<TrafficSecrets>::default());
        let (mut server, mut client) = (configs.server.clone(), configs.client.clone());
        (server.key_log, client.key_log) = (server_secrets.clone(), client_secrets.clone());
        let (server_end, client_end) = duplex(1 << 16);
        let (server, client) = tokio::join!(
            TlsAcceptor::from(Arc::new(server)).accept(RecordStream::new(server_end)),
            TlsConnector::from(Arc::new(client))
                .connect(ServerName::try_from("localhost").unwrap(), RecordStream::new(client_end)),
        );
        let (server, mut client) = (TlsStream::Server(server.unwrap()), TlsStream::Client(client.unwrap()));
        // The client reads the session tickets of TLS 1.3, so that they are not in its buffers.
        let drained = poll_fn(|context| {
            let mut space = [0; 16];
            assert!(poll_read(&mut client, context, &mut ReadBuf::new(&mut space)).is_pending());
            Poll::Ready(())
        });
        drained.await;
        let (near, secrets, far, far_secrets) = match near_role {
            Role::Server => (server, server_secrets, client, client_secrets),
            Role::Client => (client, client_secrets, server, server_secrets),
        };
        let far = extract(far, &far_secrets).await.unwrap();
        assert!(far.records.is_empty() && far.plaintext.is_empty());
        Self { near, secrets, peer: far.channel, socket: far.socket }
    }

    fn records(&mut self, version: Version, near_role: Role, flight: &[Sent]) -> Vec<u8> {
        let mut out = Vec::new();
        for sent in flight {
            match (sent, version) {
                (Data(data), _) => self.peer.sealer.seal_for_test(ContentType::Data, data, &mut out),
                (Request, Version::Tls13) => self.peer.sealer.request_key_update_for_test(&mut out),
                (SplitRequest, Version::Tls13) => self.peer.sealer.split_key_update_for_test(2, &mut out),
                (Request | SplitRequest, Version::Tls12) => {
                    let message = match near_role {
                        Role::Server => client_hello(),
                        Role::Client => vec![0; 4],
                    };
                    let first = if matches!(sent, Request) { message.len() } else { 2 };
                    for part in [&message[..first], &message[first..]].into_iter().filter(|part| !part.is_empty()) {
                        self.peer.sealer.seal_for_test(ContentType::Handshake, part, &mut out);
                    }
                }
            }
        }
        out
    }
}

/// A ClientHello without the header of its record.
fn client_hello() -> Vec<u8> {
    let name = ServerName::try_from("localhost").unwrap();
    let mut connection = ClientConnection::new(Arc::new(CONFIGS[1].client.clone()), name).unwrap();
    let mut records = Vec::new();
    connection.write_tls(&mut records).unwrap();
    records.split_off(5)
}

/// Sends `flight`. Only its first `split` bytes arrive before the near end waits for more or has read [`LOGIN`]. Then the connection is
/// extracted, reads the rest, and replies. Returns the length of the records.
async fn assert_extractable(version: Version, role: Role, flight: &[Sent], split: Option<usize>) -> usize {
    let case = format!("{version:?} {role:?} {flight:?} {split:?}");
    let mut pair = Pair::new(version, role).await;
    let records = pair.records(version, role, flight);
    let (first, rest) = records.split_at(split.unwrap_or(records.len()));
    let mut rest = Some(rest);
    pair.socket.write_all(first).await.unwrap();
    let mut data = Vec::new();
    while !data.starts_with(LOGIN) {
        let read = poll_fn(|context| {
            let mut space = [0; 4096];
            let mut buffer = ReadBuf::new(&mut space);
            let read = poll_read(&mut pair.near, context, &mut buffer);
            data.extend_from_slice(buffer.filled());
            Poll::Ready(read)
        });
        match read.await {
            Poll::Ready(read) => read.unwrap(),
            Poll::Pending => pair.socket.write_all(rest.take().expect(&case)).await.unwrap(),
        }
    }
    let mut near = extract(pair.near, &pair.secrets).await.expect(&case);
    pair.socket.write_all(rest.unwrap_or_default()).await.unwrap();
    data.extend(&near.plaintext);
    let expected: Vec<u8> =
        flight.iter().flat_map(|sent| if let Data(data) = sent { data.to_vec() } else { Vec::new() }).collect();
    let mut out = Vec::new();
    while data.len() < expected.len() {
        for event in open(&mut near.channel, &mut near.records, &mut data, &case) {
            match event {
                Opened::KeyUpdateRequested => near.channel.sealer.key_update(&mut out).unwrap(),
                Opened::Renegotiation => near.channel.sealer.decline_renegotiation(&mut out).unwrap(),
                _ => {}
            }
        }
        if data.len() < expected.len() {
            near.socket.read_buf(&mut near.records).await.unwrap();
        }
    }
    assert_eq!(data, expected, "{case}");
    near.channel.sealer.seal_for_test(ContentType::Data, REPLY, &mut out);
    near.socket.write_all(&out).await.unwrap();
    let (mut received, mut reply, mut answers) = (Vec::new(), Vec::new(), 0);
    while reply.len() < REPLY.len() {
        pair.socket.read_buf(&mut received).await.unwrap();
        answers += open(&mut pair.peer, &mut received, &mut reply, &case).len();
    }
    assert_eq!(reply, REPLY, "{case}");
    assert!(answers > 0, "{case}: no answer");
    records.len()
}

/// Opens the complete records in `received`, appends their data to `data`, and returns the other events.
fn open(channel: &mut Channel, received: &mut Vec<u8>, data: &mut Vec<u8>, case: &str) -> Vec<Opened> {
    let mut events = Vec::new();
    while let Some(length) = record_length(received).unwrap().filter(|length| *length <= received.len()) {
        let mut record: Vec<u8> = received.drain(..length).collect();
        match channel.opener.open(&mut record).unwrap_or_else(|violation| panic!("{case}: {violation}")) {
            Opened::Data(range) => data.extend_from_slice(&record[range]),
            event => events.push(event),
        }
    }
    events
}

async fn assert_extractable_at_every_split(version: Version, role: Role, flight: &[Sent]) {
    let length = assert_extractable(version, role, flight, None).await;
    for split in 0..length {
        assert_extractable(version, role, flight, Some(split)).await;
    }
}

/// rustls sends its pending answer before the extraction, and the channel answers later requests.
#[tokio::test]
async fn tls_requests_around_a_login_are_answered_at_every_split() {
    for role in [Role::Server, Role::Client] {
        let flight = [Request, Request, Data(&LOGIN[..7]), Request, Data(&LOGIN[7..]), Request, Data(NEXT)];
        assert_extractable_at_every_split(Version::Tls13, role, &flight).await;
        // rustls accepts one request for a renegotiation, and the channel several.
        assert_extractable_at_every_split(Version::Tls12, role, &[Request, Data(LOGIN), Data(NEXT)]).await;
        assert_extractable_at_every_split(
            Version::Tls12,
            role,
            &[Data(LOGIN), Request, Data(NEXT), Request, Data(NEXT)],
        )
        .await;
    }
}

/// A record that completes a login may be followed by the first part of a handshake message.
#[tokio::test]
async fn handshake_message_that_begins_with_the_login_is_not_lost() {
    for role in [Role::Server, Role::Client] {
        for version in [Version::Tls13, Version::Tls12] {
            assert_extractable_at_every_split(version, role, &[Data(LOGIN), SplitRequest, Data(NEXT)]).await;
        }
    }
}

/// A peer may wait for the answer before it sends more.
#[tokio::test]
async fn tls_request_before_the_login_is_answered_at_once() {
    for (version, role) in [Version::Tls13, Version::Tls12]
        .into_iter()
        .flat_map(|version| [(version, Role::Server), (version, Role::Client)])
    {
        let mut pair = Pair::new(version, role).await;
        let records = pair.records(version, role, &[Request]);
        pair.socket.write_all(&records).await.unwrap();
        let read = poll_fn(|context| {
            Poll::Ready(poll_read(&mut pair.near, context, &mut ReadBuf::new(&mut [0; 16])).is_pending())
        });
        assert!(read.await, "{version:?} {role:?}");
        let mut answer = Vec::new();
        let read = tokio::time::timeout(std::time::Duration::from_secs(20), pair.socket.read_buf(&mut answer)).await;
        assert!(read.expect("an answer").unwrap() > 0);
        assert_eq!(open(&mut pair.peer, &mut answer, &mut Vec::new(), "at once"), [Opened::Nothing]);
    }
}

/// Each request follows data, so the limit of records without data is not reached. Only one answer waits at a time.
#[tokio::test]
async fn unread_tls_answers_do_not_accumulate_before_the_login() {
    let mut pair = Pair::new(Version::Tls13, Role::Server).await;
    let (mut written, mut blocked) = (0, 0);
    // The peer does not read, so the socket is full after some answers.
    while blocked < 3 {
        let records = pair.records(Version::Tls13, Role::Server, &[Request, Data(b"x")]);
        pair.socket.write_all(&records).await.unwrap();
        // Ready at once, or after a pause that follows many small records.
        poll_fn(|context| poll_read(&mut pair.near, context, &mut ReadBuf::new(&mut [0; 16]))).await.unwrap();
        written += 1;
        assert!(written < 10_000, "the socket buffer never fills");
        blocked = if pair.near.get_ref().1.wants_write() { blocked + 1 } else { 0 };
    }
    let mut answers = Vec::with_capacity(1 << 17);
    // At most one answer is in the send buffer of rustls, and one waits to be moved there.
    let taken = pair.socket.read_buf(&mut answers).await.unwrap();
    extract(pair.near, &pair.secrets).await.unwrap();
    pair.socket.read_to_end(&mut answers).await.unwrap();
    assert!(answers.len() - taken < 100, "{taken} {}", answers.len());
}
