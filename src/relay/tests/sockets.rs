//! Tests of the relay over real sockets: every pair of plain and TLS legs, bulk data past a slow reader, key changes, invalid
//! records.

use std::sync::Arc;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

use super::super::*;
use super::counters;
use crate::record_layer::{Channel, Cipher, Keys, MAX_PLAINTEXT, Opened, Role, Version, record_length};

const SIZE: usize = 12 << 20;
const LIMITS: Limits = Limits { idle: None, half_close: Duration::from_secs(60), stall: Duration::from_secs(300) };

/// The peer of a leg.
struct Peer {
    socket: TcpStream,
    channel: Option<Channel>,
    received: Vec<u8>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Plain,
    Tls(Version, Cipher),
}

const KINDS: [Kind; 4] = [
    Kind::Plain,
    Kind::Tls(Version::Tls13, Cipher::Aes128Gcm),
    Kind::Tls(Version::Tls12, Cipher::Aes256Gcm),
    Kind::Tls(Version::Tls12, Cipher::Chacha20Poly1305),
];

async fn connected() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (near, peer) = tokio::join!(TcpStream::connect(listener.local_addr().unwrap()), listener.accept());
    (near.unwrap(), peer.unwrap().0)
}

async fn leg(kind: Kind) -> (Leg<TcpStream>, Peer) {
    let (near, peer) = connected().await;
    let Kind::Tls(version, cipher) = kind else {
        return (Leg::plain(near), Peer { socket: peer, channel: None, received: Vec::new() });
    };
    let keys = |byte: u8| Keys::from_secret(cipher, &[byte; 32][..]).unwrap();
    let ours = Channel::new(version, Role::Server, keys(1), keys(2));
    let theirs = Channel::new(version, Role::Client, keys(2), keys(1));
    (Leg::tls(near, ours, Vec::new()), Peer { socket: peer, channel: Some(theirs), received: Vec::new() })
}

impl Peer {
    async fn send(&mut self, data: &[u8]) {
        for part in data.chunks(MAX_PLAINTEXT) {
            let record = match &mut self.channel {
                None => part.to_vec(),
                Some(channel) => {
                    let layout = channel.sealer.layout();
                    let mut record = vec![0; layout.prefix];
                    record.extend_from_slice(part);
                    record.resize(record.len() + layout.suffix, 0);
                    let length = channel.sealer.seal(&mut record, part.len()).unwrap();
                    record.truncate(length);
                    record
                }
            };
            self.socket.write_all(&record).await.unwrap();
        }
    }

    /// The next piece of data; empty at the end.
    async fn receive(&mut self) -> Vec<u8> {
        loop {
            if let Some(channel) = &mut self.channel
                && let Some(length) = record_length(&self.received).unwrap()
                && length <= self.received.len()
            {
                let mut record: Vec<u8> = self.received.drain(..length).collect();
                match channel.opener.open(&mut record).unwrap() {
                    Opened::Data(range) => return record[range].to_vec(),
                    Opened::Closed => return Vec::new(),
                    _ => continue,
                }
            }
            let mut buffer = vec![0; 200_000];
            let read = self.socket.read(&mut buffer).await.unwrap();
            assert!(read > 0 || self.channel.is_none(), "end of the stream without close_notify");
            buffer.truncate(read);
            if self.channel.is_none() {
                return buffer;
            }
            self.received.extend(buffer);
        }
    }

    async fn finish(&mut self) {
        if let Some(channel) = &mut self.channel {
            let mut last = Vec::new();
            channel.sealer.close(crate::record_layer::AlertCode::CLOSE_NOTIFY, &mut last);
            self.socket.write_all(&last).await.unwrap();
        }
        self.socket.shutdown().await.unwrap();
    }
}

fn start(client: Leg<TcpStream>, server: Leg<TcpStream>) -> JoinHandle<(RelayEvent, BytesMoved)> {
    let mut relay = Relay::new(client, server, Buffered::default(), counters(), LIMITS);
    tokio::spawn(async move {
        let event = relay.run(None).await;
        // As a session does.
        let _ = tokio::time::timeout(Duration::from_secs(2), relay.close()).await;
        (event, relay.moved())
    })
}

fn noise(length: usize) -> Arc<Vec<u8>> {
    Arc::new((0..length as u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 24) as u8).collect())
}

#[tokio::test]
async fn bulk_data_past_a_slow_reader_is_unchanged_between_all_kinds_of_legs() {
    let data = noise(SIZE);
    for client_kind in KINDS {
        for server_kind in KINDS {
            let (client_leg, mut client) = leg(client_kind).await;
            let (server_leg, mut server) = leg(server_kind).await;
            let relay = start(client_leg, server_leg);
            let sent = data.clone();
            let server = tokio::spawn(async move {
                server.send(&sent).await;
                let mut received = Vec::new();
                while received.len() < SIZE {
                    received.extend(server.receive().await);
                }
                server.finish().await;
                assert!(server.receive().await.is_empty());
                received
            });
            // The client begins to read when the sender can send no more, and pauses after each quarter.
            let mut received = Vec::new();
            while received.len() < SIZE {
                if received.len() % (SIZE / 4) < 100_000 {
                    for _ in 0..50 {
                        tokio::task::yield_now().await;
                    }
                }
                received.extend(client.receive().await);
            }
            assert!(received == *data, "down: {client_kind:?} {server_kind:?}");
            client.send(&data).await;
            assert!(client.receive().await.is_empty());
            client.finish().await;
            assert!(server.await.unwrap() == *data, "up: {client_kind:?} {server_kind:?}");
            let (event, moved) = relay.await.unwrap();
            assert_eq!(
                (event, moved),
                (RelayEvent::Ended(RelayEnd::Server), BytesMoved { to_client: SIZE as u64, to_server: SIZE as u64 })
            );
        }
    }
}

#[tokio::test]
async fn keys_may_change_at_any_time_on_both_sides() {
    let kind = KINDS[1];
    let (client_leg, mut client) = leg(kind).await;
    let (server_leg, mut server) = leg(kind).await;
    let relay = start(client_leg, server_leg);
    for round in 0..20_u8 {
        for (from, to) in [(true, false), (false, true)] {
            let (sender, receiver) = if from { (&mut client, &mut server) } else { (&mut server, &mut client) };
            assert_ne!(from, to);
            let mut update = Vec::new();
            sender.channel.as_mut().unwrap().sealer.key_update(&mut update).unwrap();
            sender.socket.write_all(&update).await.unwrap();
            sender.send(&[round; 3000]).await;
            let mut received = Vec::new();
            while received.len() < 3000 {
                received.extend(receiver.receive().await);
            }
            assert_eq!(received, [round; 3000]);
        }
    }
    client.finish().await;
    assert!(server.receive().await.is_empty());
    server.finish().await;
    assert_eq!(relay.await.unwrap().0, RelayEvent::Ended(RelayEnd::Client));
}

#[tokio::test]
async fn invalid_record_ends_the_session_with_an_alert_after_earlier_data() {
    for invalid_server in [false, true] {
        let (client_leg, mut client) = leg(KINDS[1]).await;
        let (server_leg, mut server) = leg(KINDS[1]).await;
        let relay = start(client_leg, server_leg);
        let (violator, other) = if invalid_server { (&mut server, &mut client) } else { (&mut client, &mut server) };
        violator.send(b"* still valid\r\n").await;
        violator.socket.write_all(&[&[23, 3, 3, 0, 40][..], &[7; 40]].concat()).await.unwrap();
        assert_eq!(other.receive().await, b"* still valid\r\n");
        assert!(other.receive().await.is_empty(), "the other side is closed with a close_notify");
        let mut record = Vec::new();
        violator.socket.read_to_end(&mut record).await.unwrap();
        let violation = violator.channel.as_mut().unwrap().opener.open(&mut record).unwrap_err();
        assert_eq!(violation, Violation::AlertReceived(crate::record_layer::AlertCode(20)));
        let end = if invalid_server { RelayEnd::ServerTls } else { RelayEnd::ClientTls };
        assert_eq!(relay.await.unwrap().0, RelayEvent::Ended(end(Violation::BadRecord)));
    }
}

#[tokio::test]
async fn parked_relay_continues_with_its_keys() {
    let (client_leg, mut client) = leg(KINDS[1]).await;
    let (server_leg, mut server) = leg(KINDS[2]).await;
    let buffered = Buffered { to_client: b"* first\r\n".to_vec(), to_server: Vec::new() };
    let mut relay = Relay::new(client_leg, server_leg, buffered, counters(), LIMITS);
    for round in 0..3_u64 {
        assert_eq!(relay.run(Some(Duration::from_millis(1))).await, RelayEvent::Silent);
        assert_eq!(relay.moved(), BytesMoved { to_client: 9 + 6 * round, to_server: 6 * round });
        let resting = relay.park().unwrap();
        client.send(b"a NOOP").await;
        server.send(b"* OK..").await;
        resting.client.socket.set_nonblocking(true).unwrap();
        relay = resting.unpark(LIMITS, counters()).unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn stalled_peer_ends_the_session() {
    let (client_leg, client) = leg(Kind::Plain).await;
    let (server_leg, mut server) = leg(Kind::Plain).await;
    let relay = start(client_leg, server_leg);
    let sender = tokio::spawn(async move {
        let piece = vec![b'x'; 1 << 20];
        while server.socket.write_all(&piece).await.is_ok() {}
    });
    assert_eq!(relay.await.unwrap().0, RelayEvent::Ended(RelayEnd::ClientStalled));
    drop(client);
    sender.await.unwrap();
}

/// The memory of a session besides its sockets, while it moves bytes and while it is parked. A larger size is more memory for every
/// session of every user.
#[tokio::test]
async fn sizes_are_bounded() {
    let (client, _peer) = leg(KINDS[1]).await;
    let (server, _peer) = leg(KINDS[1]).await;
    let mut relay = Relay::new(client, server, Buffered::default(), counters(), LIMITS);
    assert!(size_of_val(&relay) <= 480, "relay: {}", size_of_val(&relay));
    let running = size_of_val(&relay.run(None));
    assert!(running <= 320, "future of its run: {running}");
    assert!(size_of::<ParkedRelay>() <= 80, "parked: {}", size_of::<ParkedRelay>());
}
