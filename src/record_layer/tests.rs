//! Tests of the record layer with the records of RFC 8448, and with rustls as the peer in every suite and both roles.

use std::io::{Read, Write};
use std::sync::{Arc, Mutex};

use proptest::prelude::*;
use tokio_rustls::rustls::crypto::CryptoProvider;
use tokio_rustls::rustls::crypto::aws_lc_rs::{self, cipher_suite as suite};
use tokio_rustls::rustls::pki_types::{PrivateKeyDer, ServerName};
use tokio_rustls::rustls::{
    CipherSuite, ClientConfig, ClientConnection, Connection, KeyLog, RootCertStore, ServerConfig, ServerConnection,
    SupportedCipherSuite,
};

use super::*;

mod limits;

const SUITES: [SupportedCipherSuite; 6] = [
    suite::TLS13_AES_128_GCM_SHA256,
    suite::TLS13_AES_256_GCM_SHA384,
    suite::TLS13_CHACHA20_POLY1305_SHA256,
    suite::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256,
    suite::TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384,
    suite::TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256,
];

#[derive(Debug, Default)]
struct TrafficSecrets(Mutex<(Vec<u8>, Vec<u8>)>);

impl KeyLog for TrafficSecrets {
    fn log(&self, label: &str, _random: &[u8], secret: &[u8]) {
        let mut secrets = self.0.lock().unwrap();
        match label {
            "CLIENT_TRAFFIC_SECRET_0" => secrets.0 = secret.to_vec(),
            "SERVER_TRAFFIC_SECRET_0" => secrets.1 = secret.to_vec(),
            _ => {}
        }
    }
}

/// Connects a client and a server of rustls in memory, and returns them with the traffic secrets from the key log.
fn rustls_pair(suite: SupportedCipherSuite) -> (Connection, Connection, Arc<TrafficSecrets>) {
    let provider = Arc::new(CryptoProvider { cipher_suites: vec![suite], ..aws_lc_rs::default_provider() });
    let certificate = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
    let key = PrivateKeyDer::try_from(certificate.signing_key.serialize_der()).unwrap();
    let mut roots = RootCertStore::empty();
    roots.add(certificate.cert.der().clone()).unwrap();
    let secrets = Arc::new(TrafficSecrets::default());
    let version = [suite.version()];
    let mut server = ServerConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&version)
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certificate.cert.der().clone()], key)
        .unwrap();
    server.enable_secret_extraction = true;
    server.key_log = secrets.clone();
    let mut client = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&version)
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    client.enable_secret_extraction = true;
    let name = ServerName::try_from("localhost").unwrap();
    let mut client = Connection::from(ClientConnection::new(Arc::new(client), name).unwrap());
    let mut server = Connection::from(ServerConnection::new(Arc::new(server)).unwrap());
    while client.is_handshaking() || server.is_handshaking() || client.wants_write() || server.wants_write() {
        transfer(&mut client, &mut server);
        transfer(&mut server, &mut client);
    }
    (client, server, secrets)
}

fn transfer(from: &mut Connection, to: &mut Connection) {
    let bytes = output(from);
    input(to, &bytes);
}

fn output(from: &mut Connection) -> Vec<u8> {
    let mut bytes = Vec::new();
    while from.wants_write() {
        from.write_tls(&mut bytes).unwrap();
    }
    bytes
}

fn input(to: &mut Connection, mut bytes: &[u8]) {
    while !bytes.is_empty() {
        to.read_tls(&mut bytes).unwrap();
        to.process_new_packets().unwrap();
    }
}

fn plaintext(of: &mut Connection) -> Vec<u8> {
    let mut bytes = Vec::new();
    // WouldBlock marks the end of the received plaintext.
    let _ = of.reader().read_to_end(&mut bytes);
    bytes
}

/// Extracts the secrets of a connection from rustls and creates its channel.
fn take_over(connection: Connection, role: Role, secrets: &TrafficSecrets) -> Channel {
    let version = match connection.protocol_version() {
        Some(tokio_rustls::rustls::ProtocolVersion::TLSv1_3) => Version::Tls13,
        _ => Version::Tls12,
    };
    let extracted = connection.dangerous_extract_secrets().unwrap();
    let (client, server) = secrets.0.lock().unwrap().clone();
    let (send, receive) = if role == Role::Client { (client, server) } else { (server, client) };
    let receive = Keys::new(&extracted.rx.1, extracted.rx.0, &receive).unwrap();
    Channel::new(version, role, receive, Keys::new(&extracted.tx.1, extracted.tx.0, &send).unwrap())
}

/// A channel in `role` and its rustls peer.
fn connect(suite: SupportedCipherSuite, role: Role) -> (Channel, Connection) {
    let (client, server, secrets) = rustls_pair(suite);
    match role {
        Role::Client => (take_over(client, role, &secrets), server),
        Role::Server => (take_over(server, role, &secrets), client),
    }
}

fn sealed(channel: &mut Channel, data: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    for part in data.chunks(MAX_PLAINTEXT) {
        let layout = channel.sealer.layout();
        let mut record = vec![0xee; layout.prefix];
        record.extend_from_slice(part);
        record.resize(record.len() + layout.suffix, 0xee);
        let length = channel.sealer.seal(&mut record, part.len()).unwrap();
        assert_eq!(length, record.len());
        out.extend_from_slice(&record);
    }
    out
}

/// Opens all records of `bytes`. Returns the data and the other events.
fn opened(channel: &mut Channel, mut bytes: &[u8]) -> Result<(Vec<u8>, Vec<Opened>), Violation> {
    let (mut data, mut events) = (Vec::new(), Vec::new());
    while let Some(length) = record_length(bytes)? {
        let mut record = bytes[..length].to_vec();
        bytes = &bytes[length..];
        match channel.opener.open(&mut record)? {
            Opened::Data(range) => data.extend_from_slice(&record[range]),
            Opened::Nothing => {}
            event => events.push(event),
        }
    }
    Ok((data, events))
}

fn hex(text: &str) -> Vec<u8> {
    let digits: String = text.split_whitespace().collect();
    (0..digits.len()).step_by(2).map(|at| u8::from_str_radix(&digits[at..at + 2], 16).unwrap()).collect()
}

/// Application secrets and records of RFC 8448 section 3, "Simple 1-RTT Handshake".
mod rfc8448 {
    use super::*;

    const CLIENT_SECRET: &str = "9e40646ce79a7f9dc05af8889bce6552875afa0b06df0087f792ebb7c17504a5";
    const SERVER_SECRET: &str = "a11af9f05531f856ad47116b45a950328204b4f44bfb6b3a4b4f1f3fcb631643";
    const CLIENT_DATA: &str = "1703030043a23f7054b62c94d0affafe8228ba55cbefacea42f914aa66bcab3f2b9819a8a5b46b395bd54a9a20441e\
        2b62974e1f5a6292a2977014bd1e3deae63aeebb21694915e4";
    const SERVER_DATA: &str = "17030300432e937e11ef4ac740e538ad36005fc4a46932fc3225d05f82aa1b36e30efaf97d90e6dffc602dcb501a59a8\
        fcc49c4bf2e5f0a21c0047c2abf332540dd032e167c2955d";
    const CLIENT_ALERT: &str = "1703030013c9872760655666b74d7ff1153efd6db6d0b0e3";
    const SERVER_ALERT: &str = "1703030013b58fd67166ebf599d24720cfbe7efa7a8864a9";

    fn keys(secret: &str, sequence: u64) -> Keys {
        let mut keys = Keys::from_secret(Cipher::Aes128Gcm, &hex(secret)).unwrap();
        for _ in 0..sequence {
            keys.count_record().unwrap();
        }
        keys
    }

    /// The server's first record under these keys is a ticket, so its data have sequence number 1.
    fn channel(role: Role) -> Channel {
        match role {
            Role::Client => Channel::new(Version::Tls13, role, keys(SERVER_SECRET, 1), keys(CLIENT_SECRET, 0)),
            Role::Server => Channel::new(Version::Tls13, role, keys(CLIENT_SECRET, 0), keys(SERVER_SECRET, 1)),
        }
    }

    #[test]
    fn sealed_records_equal_those_of_the_rfc() {
        let data: Vec<u8> = (0..50).collect();
        for (role, record, alert) in
            [(Role::Client, CLIENT_DATA, CLIENT_ALERT), (Role::Server, SERVER_DATA, SERVER_ALERT)]
        {
            let mut channel = channel(role);
            assert_eq!(sealed(&mut channel, &data), hex(record));
            let mut out = Vec::new();
            channel.sealer.close(AlertCode::CLOSE_NOTIFY, &mut out);
            assert_eq!(out, hex(alert));
        }
    }

    #[test]
    fn records_of_the_rfc_are_opened() {
        let data: Vec<u8> = (0..50).collect();
        for (role, record, alert) in
            [(Role::Server, CLIENT_DATA, CLIENT_ALERT), (Role::Client, SERVER_DATA, SERVER_ALERT)]
        {
            let both = [hex(record), hex(alert)].concat();
            assert_eq!(opened(&mut channel(role), &both).unwrap(), (data.clone(), vec![Opened::Closed]));
        }
    }
}

#[test]
fn every_suite_interoperates_with_rustls_in_both_directions() {
    for suite in SUITES {
        for role in [Role::Client, Role::Server] {
            let (mut channel, mut peer) = connect(suite, role);
            for round in 0..3_u8 {
                let data: Vec<u8> = (0..40_000_u32).map(|at| (at % 251) as u8 ^ round).collect();
                input(&mut peer, &sealed(&mut channel, &data[..12_000]));
                assert!(plaintext(&mut peer) == data[..12_000], "{suite:?} {role:?}");
                peer.writer().write_all(&data).unwrap();
                let (got, events) = opened(&mut channel, &output(&mut peer)).unwrap();
                assert!(got == data && events.is_empty(), "{suite:?} {role:?}");
                channel = channel.suspend().resume();
            }
            peer.send_close_notify();
            assert_eq!(opened(&mut channel, &output(&mut peer)).unwrap().1, [Opened::Closed]);
            assert!(!channel.can_suspend());
            let mut out = Vec::new();
            channel.sealer.close(AlertCode::CLOSE_NOTIFY, &mut out);
            peer.read_tls(&mut &out[..]).unwrap();
            assert!(peer.process_new_packets().unwrap().peer_has_closed());
            assert_eq!(channel.sealer.seal(&mut [0; 64], 1), Err(Exhausted));
        }
    }
}

#[test]
fn key_updates_of_either_side_change_the_keys() {
    for suite in &SUITES[..3] {
        for role in [Role::Client, Role::Server] {
            let (mut channel, mut peer) = connect(*suite, role);
            for _ in 0..5 {
                // The peer updates its keys and requests an update.
                peer.refresh_traffic_keys().unwrap();
                peer.writer().write_all(b"after").unwrap();
                let (got, events) = opened(&mut channel, &output(&mut peer)).unwrap();
                assert_eq!((got, events), (b"after".to_vec(), vec![Opened::KeyUpdateRequested]));
                let mut out = Vec::new();
                channel.sealer.key_update(&mut out).unwrap();
                out.extend(sealed(&mut channel, b"updated"));
                // This end updates its keys without a request.
                channel.sealer.key_update(&mut out).unwrap();
                out.extend(sealed(&mut channel, b" twice"));
                input(&mut peer, &out);
                assert_eq!(plaintext(&mut peer), b"updated twice");
                channel = channel.suspend().resume();
            }
        }
    }
}

#[test]
fn key_updates_before_the_extraction_are_recovered() {
    let (mut client, mut server, secrets) = rustls_pair(SUITES[0]);
    for _ in 0..7 {
        client.refresh_traffic_keys().unwrap();
        transfer(&mut client, &mut server);
        server.writer().write_all(b"x").unwrap();
        transfer(&mut server, &mut client);
        plaintext(&mut client);
    }
    let mut channel = take_over(server, Role::Server, &secrets);
    client.refresh_traffic_keys().unwrap();
    client.writer().write_all(b"client data").unwrap();
    assert_eq!(opened(&mut channel, &output(&mut client)).unwrap().0, b"client data");
    let mut out = Vec::new();
    channel.sealer.key_update(&mut out).unwrap();
    out.extend(sealed(&mut channel, b"server data"));
    input(&mut client, &out);
    assert_eq!(plaintext(&mut client), b"server data");
}

#[test]
fn key_update_with_an_unknown_secret_ends_the_connection() {
    let (mut client, server, secrets) = rustls_pair(SUITES[0]);
    secrets.0.lock().unwrap().0[0] ^= 1;
    let mut channel = take_over(server, Role::Server, &secrets);
    client.refresh_traffic_keys().unwrap();
    assert_eq!(opened(&mut channel, &output(&mut client)), Err(Violation::UnexpectedMessage));
}

#[test]
fn record_with_a_changed_bit_is_refused() {
    for suite in SUITES {
        let (mut channel, mut peer) = connect(suite, Role::Server);
        peer.writer().write_all(b"a1 NOOP\r\n").unwrap();
        let record = output(&mut peer);
        for bit in 0..record.len() * 8 {
            let mut changed = record.clone();
            changed[bit / 8] ^= 1 << (bit % 8);
            // A changed length would give other record boundaries, so the bytes are opened as one record.
            assert!(channel.opener.open(&mut changed).is_err(), "{suite:?}: bit {bit}");
        }
        assert_eq!(opened(&mut channel, &record).unwrap().0, b"a1 NOOP\r\n");
    }
}

/// A server channel and its client channel, to send records that rustls never sends.
fn channel_pair(version: Version) -> (Channel, Channel) {
    let keys = |byte: u8| Keys::from_secret(Cipher::Aes128Gcm, &[byte; 32]).unwrap();
    (Channel::new(version, Role::Server, keys(1), keys(2)), Channel::new(version, Role::Client, keys(2), keys(1)))
}

/// Seals `inner`, which ends with its type and padding, as one TLS 1.3 record.
fn record_13(from: &mut Channel, inner: &[u8]) -> Vec<u8> {
    let keys = from.sealer.keys_for_test();
    let mut content = inner.to_vec();
    let length = (inner.len() + TAG_LENGTH) as u16;
    let header = [23, 3, 3, length.to_be_bytes()[0], length.to_be_bytes()[1]];
    let aad = ::aws_lc_rs::aead::Aad::from(header);
    let tag = keys.aead().seal_in_place_separate_tag(super::keys::nonce(keys.nonce()), aad, &mut content).unwrap();
    keys.count_record().unwrap();
    [&header[..], &content, tag.as_ref()].concat()
}

#[test]
fn tls_13_records_not_allowed_after_the_handshake_are_refused() {
    use Violation::{AlertReceived, IllegalValue, Malformed, RecordOverflow, UnexpectedMessage};
    let too_long = [vec![b'x'; MAX_PLAINTEXT + 1], vec![23]].concat();
    let padded_too_long = [vec![b'x', 23], vec![0; MAX_PLAINTEXT]].concat();
    let cases: &[(&[u8], Violation)] = &[
        (&[0, 0, 0], UnexpectedMessage),                // padding alone
        (&[1, 20], UnexpectedMessage),                  // a protected change-cipher-spec
        (&[22], UnexpectedMessage),                     // an empty handshake fragment
        (&[1, 0, 0, 0, 22], UnexpectedMessage),         // ClientHello
        (&[4, 0, 0, 1, 0, 22], UnexpectedMessage),      // a ticket from a client
        (&[13, 0, 0, 1, 0, 22], UnexpectedMessage),     // CertificateRequest
        (&[24, 0, 0, 2, 0, 0, 22], Malformed),          // KeyUpdate of two bytes
        (&[24, 0, 0, 1, 2, 22], IllegalValue),          // KeyUpdate with an unknown request
        (&[24, 0, 0, 1, 0, 24, 22], UnexpectedMessage), // a message after a KeyUpdate
        (&[2, 40, 21], AlertReceived(AlertCode(40))),
        (&[1, 40, 21], AlertReceived(AlertCode(40))),
        (&[2, 21], Malformed),
        (&[3, 0, 21], IllegalValue),
        (&too_long, RecordOverflow),
        (&padded_too_long, RecordOverflow),
    ];
    for (inner, violation) in cases {
        let (mut ours, mut theirs) = channel_pair(Version::Tls13);
        let record = record_13(&mut theirs, inner);
        assert_eq!(opened(&mut ours, &record), Err(*violation), "{:?}", &inner[inner.len().saturating_sub(8)..]);
    }
    let (mut ours, _) = channel_pair(Version::Tls13);
    assert_eq!(opened(&mut ours, &[20, 3, 3, 0, 1, 1]), Err(UnexpectedMessage));
    assert_eq!(opened(&mut ours, &[21, 3, 3, 0, 2, 1, 0]), Err(UnexpectedMessage));
    assert_eq!(opened(&mut ours, b"a1 LOGOUT\r\n"), Err(Violation::NotTls));
    assert_eq!(record_length(&[23, 3, 3, 0x48, 1]), Err(RecordOverflow));
    assert_eq!(record_length(&[23, 3, 3, 0x48]), Ok(None));
}

#[test]
fn padding_is_removed_and_empty_records_are_limited() {
    let (mut ours, mut theirs) = channel_pair(Version::Tls13);
    let padded = record_13(&mut theirs, &[b"hello".as_slice(), &[23], &[0; 999]].concat());
    assert_eq!(opened(&mut ours, &padded).unwrap().0, b"hello");
    for _ in 0..32 {
        assert_eq!(opened(&mut ours, &record_13(&mut theirs, &[23, 0, 0])).unwrap(), (vec![], vec![]));
    }
    assert_eq!(opened(&mut ours, &record_13(&mut theirs, &[1, 23])).unwrap().0, [1]);
    for _ in 0..32 {
        opened(&mut ours, &record_13(&mut theirs, &[23])).unwrap();
    }
    assert_eq!(opened(&mut ours, &record_13(&mut theirs, &[23])), Err(Violation::TooManyWithoutData));
}

/// Every record costs the receiver time, so those without data must be limited.
#[test]
fn records_without_data_of_every_kind_are_limited() {
    let control: [(Version, Role, ContentType, &[u8]); 6] = [
        (Version::Tls13, Role::Client, ContentType::Handshake, &[4, 0, 0, 1, 9]),
        (Version::Tls13, Role::Server, ContentType::Alert, &[1, 90]),
        (Version::Tls12, Role::Server, ContentType::Handshake, &[1, 0, 0, 1, 0]),
        (Version::Tls12, Role::Client, ContentType::Handshake, &[0, 0, 0, 0]),
        (Version::Tls12, Role::Client, ContentType::Alert, &[1, 90]),
        (Version::Tls12, Role::Server, ContentType::Data, &[]),
    ];
    let keys = |byte: u8| Keys::from_secret(Cipher::Aes128Gcm, &[byte; 32]).unwrap();
    for (version, role, kind, content) in control {
        let mut ours = Channel::new(version, role, keys(1), keys(2));
        let mut theirs = Channel::new(version, Role::Server, keys(2), keys(1));
        for round in 0..=32 {
            let mut record = Vec::new();
            theirs.sealer.seal_for_test(kind, content, &mut record);
            assert_eq!(
                opened(&mut ours, &record).err(),
                (round == 32).then_some(Violation::TooManyWithoutData),
                "{content:?}"
            );
        }
    }
    let (mut ours, mut theirs) = channel_pair(Version::Tls13);
    for round in 0..=32 {
        let mut record = Vec::new();
        theirs.sealer.request_key_update_for_test(&mut record);
        assert_eq!(
            opened(&mut ours, &record).err(),
            (round == 32).then_some(Violation::TooManyWithoutData),
            "KeyUpdate"
        );
    }
}

#[test]
fn handshake_messages_may_be_split_but_not_interleaved() {
    let ticket = [&[4, 0, 0, 200][..], &[9; 200]].concat();
    for cut in 1..ticket.len() {
        let (mut theirs, mut ours) = channel_pair(Version::Tls13);
        let first = record_13(&mut theirs, &[&ticket[..cut], &[22]].concat());
        let second = record_13(&mut theirs, &[&ticket[cut..], &[24, 0, 0, 1, 1, 22]].concat());
        assert_eq!(opened(&mut ours, &first).unwrap(), (vec![], vec![]));
        assert!(!ours.can_suspend());
        assert_eq!(opened(&mut ours, &second).unwrap().1, [Opened::KeyUpdateRequested], "cut at {cut}");
        assert!(ours.can_suspend());
    }
    let (mut theirs, mut ours) = channel_pair(Version::Tls13);
    opened(&mut ours, &record_13(&mut theirs, &[&ticket[..50], &[22]].concat())).unwrap();
    let between = record_13(&mut theirs, b"data\x17");
    assert_eq!(opened(&mut ours, &between), Err(Violation::UnexpectedMessage));
}

#[test]
fn tls_12_renegotiation_is_declined_and_warnings_are_ignored() {
    let (mut ours, mut theirs) = channel_pair(Version::Tls12);
    let mut out = Vec::new();
    theirs.sealer.seal_for_test(ContentType::Handshake, &[1, 0, 0, 1, 0], &mut out);
    theirs.sealer.decline_renegotiation(&mut out).unwrap();
    assert_eq!(opened(&mut ours, &out).unwrap().1, [Opened::Renegotiation]);
    let mut answer = Vec::new();
    ours.sealer.decline_renegotiation(&mut answer).unwrap();
    assert_eq!(opened(&mut theirs, &answer).unwrap(), (vec![], vec![]));
    answer.clear();
    ours.sealer.seal_for_test(ContentType::Handshake, &[0, 0, 0, 0], &mut answer);
    assert_eq!(opened(&mut theirs, &answer).unwrap().1, [Opened::Renegotiation]);
    answer.clear();
    ours.sealer.seal_for_test(ContentType::Handshake, &[24, 0, 0, 1, 0], &mut answer);
    assert_eq!(opened(&mut theirs, &answer), Err(Violation::UnexpectedMessage));
    assert_eq!(ours.sealer.key_update(&mut answer), Err(Exhausted));
}

#[test]
fn stored_channel_is_small_and_resumes_unchanged() {
    assert!(size_of::<StoredKeys<16, 32>>() <= 160, "{}", size_of::<StoredKeys<16, 32>>());
    assert!(size_of::<StoredKeys>() <= 224, "{}", size_of::<StoredKeys>());
    // Both variants are resumed unchanged.
    for suite in SUITES {
        let (mut channel, mut peer) = connect(suite, Role::Server);
        for _ in 0..2 {
            let stored = channel.suspend();
            let short = suite.tls13().is_some_and(|suite| suite.common.suite == CipherSuite::TLS13_AES_128_GCM_SHA256);
            if suite.tls13().is_some() {
                assert_eq!(matches!(stored, StoredChannel::Short(_)), short, "{suite:?}");
            }
            channel = stored.resume();
            peer.writer().write_all(b"data after resuming").unwrap();
            let mut record = output(&mut peer);
            let Ok(Opened::Data(range)) = channel.opener.open(&mut record) else { panic!("{suite:?}") };
            assert_eq!(&record[range], b"data after resuming");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Data of any length are received, with key updates between any two pieces.
    #[test]
    fn records_of_rustls_are_opened_with_key_updates_anywhere(
        suite in 0..SUITES.len(),
        pieces in prop::collection::vec((0..3_usize, prop::collection::vec(any::<u8>(), 0..40_000)), 1..6),
    ) {
        let suite = SUITES[suite];
        let (mut channel, mut peer) = connect(suite, Role::Server);
        let mut sent = Vec::new();
        let mut bytes = Vec::new();
        for (updates, piece) in pieces {
            for _ in 0..updates {
                if suite.tls13().is_some() {
                    peer.refresh_traffic_keys().unwrap();
                }
            }
            for part in piece.chunks(30_000) {
                peer.writer().write_all(part).unwrap();
                bytes.extend(output(&mut peer));
            }
            sent.extend(piece);
        }
        let (got, _) = opened(&mut channel, &bytes).unwrap();
        prop_assert!(got == sent);
    }

    /// Random bytes never authenticate, and never cause a panic.
    #[test]
    fn random_bytes_are_refused(version in any::<bool>(), bytes in prop::collection::vec(any::<u8>(), 0..600)) {
        let (mut channel, _) = channel_pair(if version { Version::Tls13 } else { Version::Tls12 });
        let mut record = [&[23, 3, 3, 0, 0][..], &bytes].concat();
        prop_assert!(channel.opener.open(&mut record).is_err());
    }

    /// Messages have the same effect for every split over records.
    #[test]
    fn handshake_messages_do_not_depend_on_the_split(cuts in prop::collection::vec(1..64_usize, 0..8)) {
        let stream = [&[4, 0, 0, 30][..], &[7; 30], &[4, 0, 0, 0], &[24, 0, 0, 1, 1]].concat();
        let (mut theirs, mut ours) = channel_pair(Version::Tls13);
        let mut rest = &stream[..];
        let mut events = Vec::new();
        for cut in cuts.into_iter().chain([stream.len()]) {
            let (part, remaining) = rest.split_at(cut.min(rest.len()));
            rest = remaining;
            if !part.is_empty() {
                events.extend(opened(&mut ours, &record_13(&mut theirs, &[part, &[22]].concat())).unwrap().1);
            }
        }
        prop_assert_eq!(events, [Opened::KeyUpdateRequested]);
    }
}
