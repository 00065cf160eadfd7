//! TLS records of an established connection: some sealed with the right key, with any content and type, and some raw. Data is opened
//! unchanged and once; every other record is handled or is a violation.

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use tokio_rustls::rustls::ConnectionTrafficSecrets;
use tokio_rustls::rustls::crypto::cipher::{AeadKey, Iv};
use vestibule::record_layer::{Channel, Keys, MAX_PLAINTEXT, Opened, Role, Version, record_length};

const KEY: [u8; 32] = [7; 32];
const IV: [u8; 12] = [9; 12];
const SECRET: [u8; 48] = [3; 48];

/// The first byte selects the TLS version and the role. Records follow: a type, how it is sealed, two bytes of length, the content.
pub fn run(input: &[u8]) {
    let Some((&choice, mut rest)) = input.split_first() else { return };
    let (tls13, server) = (choice & 1 != 0, choice & 2 != 0);
    let version = if tls13 { Version::Tls13 } else { Version::Tls12 };
    let role = if server { Role::Server } else { Role::Client };
    let mut channel = Channel::new(version, role, keys(version), keys(version));
    let key = LessSafeKey::new(UnboundKey::new(&AES_256_GCM, &KEY).expect("a key"));
    let mut sequence = 0;
    while let [kind, how, high, low, behind @ ..] = rest {
        let (kind, how) = (*kind, *how);
        let length = usize::from(u16::from_be_bytes([*high, *low])).min(behind.len());
        let (content, behind) = behind.split_at(length);
        rest = behind;
        let mut record = match how {
            // Raw, so that the header can have any value.
            0 => content.to_vec(),
            padding => seal(&key, version, sequence, kind, usize::from(padding - 1), content),
        };
        let Ok(Some(length)) = record_length(&record) else { return };
        if length > record.len() {
            return;
        }
        let opened = channel.opener.open(&mut record[..length]);
        sequence += 1;
        match opened {
            Ok(Opened::Data(range)) => {
                assert!(how != 0, "an unsealed record is not data");
                assert!(range.len() <= MAX_PLAINTEXT);
                // A type of zero is padding, so the last byte before it is the type.
                if kind != 0 {
                    assert_eq!((kind, &record[range]), (23, content));
                }
            }
            Ok(Opened::Nothing) => {}
            Ok(Opened::KeyUpdateRequested) => {
                assert!(tls13);
                channel.sealer.key_update(&mut Vec::new()).expect("a key update is sealed");
            }
            Ok(Opened::Renegotiation) => {
                assert!(!tls13);
                channel.sealer.decline_renegotiation(&mut Vec::new()).expect("an alert is sealed");
            }
            Ok(Opened::Closed) => {
                assert_eq!(channel.opener.open(&mut record[..length]), Ok(Opened::Closed), "the channel stays closed");
                return;
            }
            Err(violation) => {
                if let Some(alert) = violation.alert() {
                    let mut out = Vec::new();
                    channel.sealer.close(alert, &mut out);
                    assert_eq!(record_length(&out), Ok(Some(out.len())), "a complete record");
                }
                return;
            }
        }
        if channel.can_suspend() {
            channel = channel.suspend().resume();
        }
    }
}

fn keys(version: Version) -> Keys {
    let secrets = ConnectionTrafficSecrets::Aes256Gcm { key: AeadKey::from(KEY), iv: Iv::from(IV) };
    let secret = if version == Version::Tls13 { &SECRET[..] } else { &[] };
    Keys::new(&secrets, 0, secret).expect("a supported cipher")
}

/// Seals a record with any content. KeyUpdates are not implemented: a record after a KeyUpdate does not authenticate.
fn seal(key: &LessSafeKey, version: Version, sequence: u64, kind: u8, padding: usize, content: &[u8]) -> Vec<u8> {
    let mut sealed = content.to_vec();
    let mut nonce = IV;
    let (outer, explicit): (u8, &[u8]) = match version {
        Version::Tls13 => {
            sealed.push(kind);
            sealed.resize(sealed.len() + padding, 0);
            (23, &[])
        }
        Version::Tls12 => (kind, &sequence.to_be_bytes()),
    };
    let length = explicit.len() + sealed.len() + 16;
    let mut record = vec![outer, 3, 3];
    record.extend_from_slice(&u16::try_from(length).unwrap_or(u16::MAX).to_be_bytes());
    let aad = match version {
        Version::Tls13 => {
            nonce.iter_mut().skip(4).zip(sequence.to_be_bytes()).for_each(|(byte, number)| *byte ^= number);
            record.clone()
        }
        Version::Tls12 => {
            nonce[4..].copy_from_slice(explicit);
            let mut aad = sequence.to_be_bytes().to_vec();
            aad.extend_from_slice(&[outer, 3, 3]);
            aad.extend_from_slice(&u16::try_from(sealed.len()).unwrap_or(u16::MAX).to_be_bytes());
            aad
        }
    };
    key.seal_in_place_append_tag(Nonce::assume_unique_for_key(nonce), Aad::from(aad), &mut sealed).expect("sealing");
    record.extend_from_slice(explicit);
    record.extend_from_slice(&sealed);
    record
}
