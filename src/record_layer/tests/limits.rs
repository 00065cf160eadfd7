//! How many records one key may seal.

use super::*;

#[test]
fn a_key_seals_no_more_than_it_may() {
    let (mut ours, mut theirs) = twins(Version::Tls13);
    let limit = Cipher::Aes128Gcm.confidentiality_limit();
    for end in [&mut ours.sealer.keys_for_test(), &mut theirs.opener.keys_for_test()] {
        end.jump_for_test(limit - 64);
    }
    assert!(ours.sealer.wants_key_update());
    let mut bytes = Vec::new();
    ours.sealer.key_update(&mut bytes).unwrap();
    assert!(!ours.sealer.wants_key_update());
    bytes.extend(sealed(&mut ours, b"new keys"));
    assert_eq!(opened(&mut theirs, &bytes).unwrap().0, b"new keys");
    let (mut ours, mut theirs) = twins(Version::Tls12);
    ours.sealer.keys_for_test().jump_for_test(limit - 1);
    theirs.opener.keys_for_test().jump_for_test(limit - 1);
    let mut bytes = sealed(&mut ours, b"last");
    assert_eq!(ours.sealer.seal(&mut [0; 64], 1), Err(Exhausted));
    ours.sealer.close(AlertCode::CLOSE_NOTIFY, &mut bytes);
    assert_eq!(opened(&mut theirs, &bytes).unwrap(), (b"last".to_vec(), vec![Opened::Closed]));
}

#[test]
fn every_key_has_a_limit_and_no_record_of_any_kind_goes_beyond_it() {
    // RFC 8446 section 5.5: 2^24.5 records of AES-GCM; ChaCha20-Poly1305 has no limit but the sequence numbers.
    for cipher in [Cipher::Aes128Gcm, Cipher::Aes256Gcm] {
        assert!((1 << 20..=1 << 24).contains(&cipher.confidentiality_limit()), "{cipher:?}");
    }
    assert_eq!(Cipher::Chacha20Poly1305.confidentiality_limit(), u64::MAX);
    let limit = Cipher::Aes128Gcm.confidentiality_limit();
    // A relay round of 64 records fits between the wish for new keys and the limit.
    let (mut ours, _) = twins(Version::Tls13);
    ours.sealer.keys_for_test().jump_for_test(limit - 65);
    assert!(!ours.sealer.wants_key_update());
    for _ in 0..64 {
        ours.sealer.seal(&mut [0; 64], 1).unwrap();
    }
    assert!(ours.sealer.wants_key_update());
    ours.sealer.key_update(&mut Vec::new()).unwrap();
    ours.sealer.seal(&mut [0; 64], 1).unwrap();
    // TLS 1.2 has no new keys: a peer that asks for answers does not get more than the key allows, and the connection ends.
    let (mut ours, _) = twins(Version::Tls12);
    ours.sealer.keys_for_test().jump_for_test(limit - 1);
    let mut out = Vec::new();
    ours.sealer.decline_renegotiation(&mut out).unwrap();
    let length = out.len();
    assert_eq!(ours.sealer.decline_renegotiation(&mut out), Err(Exhausted));
    assert_eq!((ours.sealer.seal(&mut [0; 64], 1), out.len()), (Err(Exhausted), length));
}
