//! Tests of the relay over pipes in memory, some with paused time. Those in `sockets` use real sockets.

mod sockets;

use futures_util::FutureExt as _;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use tokio::task::JoinHandle;

use super::pipe::Pipe;
use super::*;

impl Socket for DuplexStream {
    fn try_read_vectored(&self, _buffers: &mut [std::io::IoSliceMut<'_>]) -> io::Result<usize> {
        Err(io::ErrorKind::WouldBlock.into())
    }

    fn try_read_to_pipe(&self, _pipe: &Pipe) -> io::Result<usize> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn try_write_from_pipe(&self, _pipe: &Pipe, _length: usize) -> io::Result<usize> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

const LIMITS: Limits = Limits { idle: None, half_close: Duration::from_secs(60), stall: Duration::from_secs(300) };

fn counters() -> ByteCounters {
    let counter = || IntCounter::new("bytes", "bytes").unwrap();
    ByteCounters { to_client: counter(), to_server: counter() }
}

struct Ends {
    client: DuplexStream,
    server: DuplexStream,
    relay: JoinHandle<(RelayEvent, BytesMoved)>,
}

fn start(pipe: usize, limits: Limits, to_client: &[u8], to_server: &[u8]) -> Ends {
    let (client, relay_client) = duplex(pipe);
    let (server, relay_server) = duplex(pipe);
    let buffered = Buffered { to_client: to_client.to_vec(), to_server: to_server.to_vec() };
    let mut relay = Relay::new(Leg::plain(relay_client), Leg::plain(relay_server), buffered, counters(), limits);
    let relay = tokio::spawn(async move {
        let event = relay.run(None).await;
        (event, relay.moved())
    });
    Ends { client, server, relay }
}

#[tokio::test]
async fn buffered_bytes_go_first() {
    let mut ends = start(64, LIMITS, b"a OK\r\n", b"b NOOP\r\n");
    ends.client.write_all(b"c NOOP\r\n").await.unwrap();
    ends.server.write_all(b"b OK\r\n").await.unwrap();
    ends.client.shutdown().await.unwrap();
    let (mut up, mut down) = (String::new(), String::new());
    ends.server.read_to_string(&mut up).await.unwrap();
    ends.server.shutdown().await.unwrap();
    ends.client.read_to_string(&mut down).await.unwrap();
    assert_eq!((up.as_str(), down.as_str()), ("b NOOP\r\nc NOOP\r\n", "a OK\r\nb OK\r\n"));
    assert_eq!(
        ends.relay.await.unwrap(),
        (RelayEvent::Ended(RelayEnd::Client), BytesMoved { to_client: 12, to_server: 16 })
    );
}

#[tokio::test]
async fn megabyte_through_a_narrow_pipe_is_unchanged() {
    let mut ends = start(7, LIMITS, b"", b"");
    let sent: Vec<u8> = (0..1_000_000_u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let expected = sent.clone();
    let writer = tokio::spawn(async move {
        ends.server.write_all(&sent).await.unwrap();
        ends.server.shutdown().await.unwrap();
        ends.server
    });
    let mut got = Vec::new();
    ends.client.read_to_end(&mut got).await.unwrap();
    assert!(got == expected, "bytes differ");
    drop(ends.client);
    drop(writer.await.unwrap());
    assert_eq!(ends.relay.await.unwrap().0, RelayEvent::Ended(RelayEnd::Server));
}

#[tokio::test]
async fn backpressure_reaches_the_sender() {
    let mut ends = start(16, LIMITS, b"", b"");
    let mut accepted = 0;
    // Duplex (16) + one unsent read (16) + duplex (16): the sender can send no more than that.
    while let Ok(written) = tokio::time::timeout(Duration::from_millis(50), ends.server.write(&[b'x'; 16])).await {
        accepted += written.unwrap();
        assert!(accepted <= 48, "{accepted} bytes accepted for a client that reads nothing");
    }
    let mut got = vec![0; accepted];
    ends.client.read_exact(&mut got).await.unwrap();
    ends.server.write_all(b"more").await.unwrap();
}

#[tokio::test]
async fn last_line_of_a_server_reaches_a_client_that_is_sending() {
    let mut ends = start(1024, LIMITS, b"", b"");
    ends.server.write_all(b"* BYE shutting down\r\n").await.unwrap();
    drop(ends.server);
    ends.client.write_all(b"a NOOP\r\n").await.unwrap();
    let mut got = String::new();
    ends.client.read_to_string(&mut got).await.unwrap();
    assert_eq!(got, "* BYE shutting down\r\n");
    assert_eq!(ends.relay.await.unwrap().0, RelayEvent::Ended(RelayEnd::Server));
}

#[tokio::test(start_paused = true)]
async fn idle_limit_counts_from_the_last_byte() {
    let limits = Limits { idle: Some(Duration::from_secs(1800)), ..LIMITS };
    let mut ends = start(1024, limits, b"", b"");
    let began = Instant::now();
    tokio::time::sleep(Duration::from_secs(1700)).await;
    ends.client.write_all(b"a NOOP\r\n").await.unwrap();
    assert_eq!(ends.relay.await.unwrap().0, RelayEvent::Ended(RelayEnd::Idle));
    assert_eq!(began.elapsed().as_secs(), 3500);
}

#[tokio::test(start_paused = true)]
async fn half_closed_session_ends_after_silence() {
    let mut ends = start(1024, LIMITS, b"", b"");
    ends.client.shutdown().await.unwrap();
    let began = Instant::now();
    assert_eq!(ends.relay.await.unwrap().0, RelayEvent::Ended(RelayEnd::Client));
    assert_eq!(began.elapsed().as_secs(), 60);
}

#[tokio::test(start_paused = true)]
async fn silent_session_lasts_without_an_idle_limit() {
    let mut ends = start(1024, LIMITS, b"", b"");
    tokio::time::sleep(Duration::from_secs(30 * 24 * 3600)).await;
    ends.client.write_all(b"x").await.unwrap();
    assert_eq!(ends.server.read_u8().await.unwrap(), b'x');
}

/// Three records in two pieces, split at every byte, are relayed unchanged.
#[tokio::test]
async fn records_are_reassembled_at_every_split() {
    use crate::record_layer::{Channel, Cipher, Keys, Role, Version};
    let keys = |byte: u8| Keys::from_secret(Cipher::Aes128Gcm, &[byte; 32]).unwrap();
    for version in [Version::Tls13, Version::Tls12] {
        let seal = |stream: &mut Vec<u8>, channel: &mut Channel, text: &[u8]| {
            let layout = channel.sealer.layout();
            let mut record = vec![0; layout.prefix + text.len() + layout.suffix];
            record[layout.prefix..layout.prefix + text.len()].copy_from_slice(text);
            channel.sealer.seal(&mut record, text.len()).unwrap();
            stream.extend(record);
        };
        let mut stream = Vec::new();
        let mut peer = Channel::new(version, Role::Client, keys(2), keys(1));
        for text in [&b"a NOOP\r\n"[..], b"b", b"c FETCH 1:* ALL\r\n"] {
            seal(&mut stream, &mut peer, text);
        }
        for cut in 0..=stream.len() {
            let (mut client, relay_client) = duplex(1024);
            let (mut server, relay_server) = duplex(1024);
            let ours = Channel::new(version, Role::Server, keys(1), keys(2));
            // The bytes that were read before the relay began may end anywhere, too.
            let early = stream[..cut / 2].to_vec();
            let leg = Leg::tls(relay_client, ours, early);
            let mut relay = Relay::new(leg, Leg::plain(relay_server), Buffered::default(), counters(), LIMITS);
            let relay = tokio::spawn(async move { relay.run(None).await });
            client.write_all(&stream[cut / 2..cut]).await.unwrap();
            tokio::task::yield_now().await;
            client.write_all(&stream[cut..]).await.unwrap();
            let mut got = [0; 26];
            server.read_exact(&mut got).await.unwrap();
            assert_eq!(&got, b"a NOOP\r\nbc FETCH 1:* ALL\r\n", "{version:?} split at {cut}");
            relay.abort();
        }
    }
}

/// A peer that requests a TLS reply with every line and never reads one.
async fn flood(version: crate::record_layer::Version, from_server: bool) {
    use crate::record_layer::{Channel, Cipher, ContentType, Keys, Role, Version};
    const PIPE: usize = 256;
    let keys = |byte: u8| Keys::from_secret(Cipher::Aes128Gcm, &[byte; 32]).unwrap();
    let role = if from_server { Role::Client } else { Role::Server };
    let (mut attacker, near) = duplex(PIPE);
    let (mut other, relay_other) = duplex(1 << 20);
    let tls = Leg::tls(near, Channel::new(version, role, keys(1), keys(2)), Vec::new());
    let plain = Leg::plain(relay_other);
    let (client, server) = if from_server { (plain, tls) } else { (tls, plain) };
    let mut relay = Relay::new(client, server, Buffered::default(), counters(), LIMITS);
    let mut theirs = Channel::new(version, role, keys(2), keys(1));
    let mut flood = move || {
        let mut records = Vec::new();
        match version {
            Version::Tls13 => theirs.sealer.request_key_update_for_test(&mut records),
            Version::Tls12 if from_server => {
                theirs.sealer.seal_for_test(ContentType::Handshake, &[0, 0, 0, 0], &mut records);
            }
            Version::Tls12 => theirs.sealer.seal_for_test(ContentType::Handshake, &[1, 0, 0, 0], &mut records),
        }
        theirs.sealer.seal_for_test(ContentType::Data, b"x", &mut records);
        records
    };
    let mut taken = 0;
    let sent = async {
        while let Ok(written) = tokio::time::timeout(Duration::from_secs(1), attacker.write_all(&flood())).await {
            written.unwrap();
            taken += 1;
            assert!(taken < 1000, "{version:?}, server: {from_server}: the peer is still read after {taken} requests");
        }
    };
    tokio::select! {
        () = sent => {}
        event = relay.run(None) => panic!("{event:?}"),
    }
    let leg = if from_server { &relay.server } else { &relay.client };
    assert!(leg.buffered() <= 64, "{version:?}, server: {from_server}: {} bytes kept", leg.buffered());
    // The peer begins to read, and the relay continues.
    let (mut answers, mut bytes) = ([0; PIPE], Vec::new());
    let continues = async {
        let (_, _) = tokio::join!(attacker.read(&mut answers), other.read_buf(&mut bytes));
        attacker.write_all(&[]).await.unwrap();
    };
    tokio::select! {
        () = continues => assert!(bytes.starts_with(b"x")),
        event = relay.run(None) => panic!("{event:?}"),
    }
}

#[tokio::test(start_paused = true)]
async fn peer_that_never_reads_gets_one_tls_reply_and_is_not_read() {
    use crate::record_layer::Version;
    for version in [Version::Tls13, Version::Tls12] {
        flood(version, false).await;
        flood(version, true).await;
    }
}

/// RFC 8446 section 4.6.3: one KeyUpdate answers all requests before it, and is sent before the next data.
#[tokio::test(start_paused = true)]
async fn key_update_requests_in_one_read_get_one_reply_before_data() {
    use crate::record_layer::{Channel, Cipher, Keys, Opened, Role, Version, record_length};
    let keys = |byte: u8| Keys::from_secret(Cipher::Aes128Gcm, &[byte; 32]).unwrap();
    let (mut client, relay_client) = duplex(4096);
    let (_server, relay_server) = duplex(4096);
    let mut theirs = Channel::new(Version::Tls13, Role::Client, keys(2), keys(1));
    let mut early = Vec::new();
    (0..5).for_each(|_| theirs.sealer.request_key_update_for_test(&mut early));
    let leg = Leg::tls(relay_client, Channel::new(Version::Tls13, Role::Server, keys(1), keys(2)), early);
    let buffered = Buffered { to_client: b"a OK\r\n".to_vec(), to_server: Vec::new() };
    let mut relay = Relay::new(leg, Leg::plain(relay_server), buffered, counters(), LIMITS);
    assert!(tokio::time::timeout(Duration::from_secs(1), relay.run(None)).await.is_err());
    let mut got = vec![0; 4096];
    let read = client.read(&mut got).await.unwrap();
    let (mut rest, mut events) = (&mut got[..read], Vec::new());
    while let Some(length) = record_length(rest).unwrap() {
        let (record, behind) = rest.split_at_mut(length);
        events.push(match theirs.opener.open(record).unwrap() {
            Opened::Data(range) => record[range].to_vec(),
            other => format!("{other:?}").into_bytes(),
        });
        rest = behind;
    }
    assert_eq!(events, [b"Nothing".to_vec(), b"a OK\r\n".to_vec()]);
}

/// Runs one poll of a relay whose client has sent `count` records with `payload`, and returns the number of bytes that it relayed.
async fn one_turn(payload: &'static [u8], count: usize) -> usize {
    use crate::record_layer::{Channel, Cipher, ContentType, Keys, Role, Version};
    let keys = |byte: u8| Keys::from_secret(Cipher::Aes128Gcm, &[byte; 32]).unwrap();
    let (mut client, relay_client) = duplex(1 << 21);
    let (mut server, relay_server) = duplex(1 << 21);
    let mut theirs = Channel::new(Version::Tls13, Role::Client, keys(2), keys(1));
    let mut records = Vec::new();
    (0..count).for_each(|_| theirs.sealer.seal_for_test(ContentType::Data, payload, &mut records));
    theirs.sealer.seal_for_test(ContentType::Data, b"end", &mut records);
    client.write_all(&records).await.unwrap();
    let leg = Leg::tls(relay_client, Channel::new(Version::Tls13, Role::Server, keys(1), keys(2)), Vec::new());
    let mut relay = Relay::new(leg, Leg::plain(relay_server), Buffered::default(), counters(), LIMITS);
    let mut run = Box::pin(relay.run(None));
    let polled = futures_util::poll!(&mut run);
    assert!(polled.is_pending(), "{polled:?}");
    let mut got = Vec::new();
    while let Some(Ok(1..)) = server.read_buf(&mut got).now_or_never() {}
    let first_turn = got.len();
    // The relay wakes itself to move the rest.
    let rest = async {
        while !got.ends_with(b"end") {
            server.read_buf(&mut got).await.unwrap();
        }
    };
    tokio::select! {
        () = rest => {}
        event = run => panic!("{event:?}"),
    }
    assert_eq!(got.len(), payload.len() * count + 3);
    first_turn
}

#[tokio::test]
async fn turn_ends_after_a_limited_number_of_records() {
    const COUNT: usize = 20_000;
    let relayed = one_turn(b"x", COUNT).await;
    assert!(relayed < COUNT / 10, "{relayed} records in one turn");
}
