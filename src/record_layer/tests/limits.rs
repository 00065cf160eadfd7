//! Tests of the limit of records that one key may seal.

use super::*;

#[test]
fn key_is_updated_or_exhausted_at_its_limit() {
    let (mut ours, mut theirs) = channel_pair(Version::Tls13);
    let limit = Cipher::Aes128Gcm.confidentiality_limit();
    for end in [&mut ours.sealer.keys_for_test(), &mut theirs.opener.keys_for_test()] {
        end.set_sequence_for_test(limit - 64);
    }
    assert!(ours.sealer.wants_key_update());
    let mut bytes = Vec::new();
    ours.sealer.key_update(&mut bytes).unwrap();
    assert!(!ours.sealer.wants_key_update());
    bytes.extend(sealed(&mut ours, b"new keys"));
    assert_eq!(opened(&mut theirs, &bytes).unwrap().0, b"new keys");
    let (mut ours, mut theirs) = channel_pair(Version::Tls12);
    ours.sealer.keys_for_test().set_sequence_for_test(limit - 1);
    theirs.opener.keys_for_test().set_sequence_for_test(limit - 1);
    let mut bytes = sealed(&mut ours, b"last");
    assert_eq!(ours.sealer.seal(&mut [0; 64], 1), Err(Exhausted));
    ours.sealer.close(AlertCode::CLOSE_NOTIFY, &mut bytes);
    assert_eq!(opened(&mut theirs, &bytes).unwrap(), (b"last".to_vec(), vec![Opened::Closed]));
}

#[test]
fn key_limit_covers_records_of_every_kind() {
    // RFC 8446 section 5.5: 2^24.5 records of AES-GCM; ChaCha20-Poly1305 is limited only by the sequence numbers.
    for cipher in [Cipher::Aes128Gcm, Cipher::Aes256Gcm] {
        assert!((1 << 20..=1 << 24).contains(&cipher.confidentiality_limit()), "{cipher:?}");
    }
    assert_eq!(Cipher::Chacha20Poly1305.confidentiality_limit(), u64::MAX);
    let limit = Cipher::Aes128Gcm.confidentiality_limit();
    // A relay round of 64 records fits between the request for a key update and the limit.
    let (mut ours, _) = channel_pair(Version::Tls13);
    ours.sealer.keys_for_test().set_sequence_for_test(limit - 65);
    assert!(!ours.sealer.wants_key_update());
    for _ in 0..64 {
        ours.sealer.seal(&mut [0; 64], 1).unwrap();
    }
    assert!(ours.sealer.wants_key_update());
    ours.sealer.key_update(&mut Vec::new()).unwrap();
    ours.sealer.seal(&mut [0; 64], 1).unwrap();
    // TLS 1.2 has no KeyUpdate: replies that a peer requests count towards the limit, and the connection ends there.
    let (mut ours, _) = channel_pair(Version::Tls12);
    ours.sealer.keys_for_test().set_sequence_for_test(limit - 1);
    let mut out = Vec::new();
    ours.sealer.decline_renegotiation(&mut out).unwrap();
    let length = out.len();
    assert_eq!(ours.sealer.decline_renegotiation(&mut out), Err(Exhausted));
    assert_eq!((ours.sealer.seal(&mut [0; 64], 1), out.len()), (Err(Exhausted), length));
}
