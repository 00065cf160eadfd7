//! Tests of the verification of certificates, and of the explanations of refusals.

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair, date_time_ymd,
};
use rustls_pemfile::certs;
use tokio_rustls::rustls::pki_types::pem::PemObject as _;

use super::super::certificate_refusal::explain;
use super::*;

/// 2026-01-01.
const NOW: u64 = 1_767_225_600;
/// Created by `openssl x509 -req -signkey` without extensions.
pub(in super::super) const VERSION_1_PEM: &str = "-----BEGIN CERTIFICATE-----
MIIBJTCBywIUZkcldSCtq316WQqWSnTT/mZylHUwCgYIKoZIzj0EAwIwFDESMBAG
A1UEAwwJbG9jYWxob3N0MCAXDTI2MTEyNzEwNTgyOFoYDzIxMjYxMTAzMTA1ODI4
WjAUMRIwEAYDVQQDDAlsb2NhbGhvc3QwWTATBgcqhkjOPQIBBggqhkjOPQMBBwNC
AARmIkXmqi5C/Zm+jUe6wSAwEDb8gH3F6U5juklCEkENQZq9xuE+/T/TdHxFwXOp
EF0afK96Nw8XV34jVy/1o9zRMAoGCCqGSM49BAMCA0kAMEYCIQDxXMMgTCTWfhII
xEPO8Tt4nARIWD6/51eKXSrE4s57zwIhAPNdNydaHxuAvtqay1oB2VMb6OrF/Toy
z/VSEpJTCkBM
-----END CERTIFICATE-----
";

/// A CA certificate as plain `openssl req -x509` creates it, with or without names.
fn self_signed(
    names: &[&str],
    years: [i32; 2],
    change: impl FnOnce(&mut CertificateParams),
) -> CertificateDer<'static> {
    let mut params = CertificateParams::new(names.iter().map(ToString::to_string).collect::<Vec<_>>()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, "mail.test");
    (params.not_before, params.not_after) = (date_time_ymd(years[0], 1, 1), date_time_ymd(years[1], 1, 1));
    change(&mut params);
    params.self_signed(&KeyPair::generate().unwrap()).unwrap().der().clone()
}

fn verifier(certificates: &[CertificateDer<'static>]) -> Arc<RootVerifier> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates {
        roots.add(certificate.clone()).unwrap();
    }
    RootVerifier::new(roots, certificates).unwrap()
}

/// Verifies a server's certificate. The error is the explanation for the operator.
async fn verify(verifier: &dyn ServerCertVerifier, certificate: &CertificateDer<'_>, name: &str) -> Result<(), String> {
    let now = UnixTime::since_unix_epoch(std::time::Duration::from_secs(NOW));
    let name = ServerName::try_from(name.to_owned()).unwrap();
    let (result, refusal) =
        with_refusal(async { verifier.verify_server_cert(certificate, &[], &name, &[], now) }).await;
    assert_eq!(result.is_err(), refusal.is_some());
    result.map(drop).map_err(|_| refusal.unwrap())
}

#[tokio::test]
async fn certificate_in_the_trusted_file_is_trusted_without_a_chain() {
    let named = self_signed(&["mail.test", "127.0.0.1"], [2025, 2030], |_| {});
    let unnamed = self_signed(&[], [2025, 2030], |_| {});
    let both = verifier(&[named.clone(), unnamed.clone()]);
    for name in ["mail.test", "127.0.0.1"] {
        assert_eq!(verify(&*both, &named, name).await, Ok(()), "{name}");
    }
    assert_eq!(
        verify(&*both, &unnamed, "MAIL.test").await,
        Ok(()),
        "the common name is used if there are no alternative names"
    );
    // Another certificate with the same names is not trusted.
    let other = self_signed(&["mail.test"], [2025, 2030], |_| {});
    let error = verify(&*both, &other, "mail.test").await.unwrap_err();
    assert!(error.contains("pin: \"sha256:"), "{error}");
}

#[tokio::test]
async fn certificate_in_the_trusted_file_needs_a_valid_name_date_and_purpose() {
    let other = self_signed(&["other.test", "*.wild.test"], [2025, 2030], |_| {});
    let expired = self_signed(&["mail.test"], [2020, 2025], |_| {});
    let future = self_signed(&["mail.test"], [2027, 2030], |_| {});
    let client = self_signed(&["mail.test"], [2025, 2030], |params| {
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    });
    let unnamed = self_signed(&[], [2025, 2030], |_| {});
    let all = verifier(&[other.clone(), expired.clone(), future.clone(), client.clone(), unnamed.clone()]);
    for (certificate, name, words) in [
        (
            &other,
            "mail.test",
            "the certificate is valid for other.test, *.wild.test, not for mail.test: set tls.server_name",
        ),
        (&expired, "mail.test", "the certificate expired on 2025-01-01T00:00:00Z, 365 days ago"),
        (&future, "mail.test", "the certificate is not valid before 2027-01-01T00:00:00Z: check the clock"),
        (&client, "mail.test", "the extended key usage of the certificate does not allow TLS servers"),
        (
            &unnamed,
            "10.0.0.1",
            "the certificate is not valid for 10.0.0.1: it contains no name (its common name mail.test is ignored)",
        ),
    ] {
        let error = verify(&*all, certificate, name).await.unwrap_err();
        assert!(error.starts_with(words), "{error}");
        assert!(error.contains("if you have verified that this is the server's key"), "{error}");
    }
}

#[tokio::test]
async fn refusal_of_an_untrusted_certificate_contains_its_pin() {
    let mut authority = CertificateParams::new(Vec::new()).unwrap();
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    authority.distinguished_name.push(DnType::CommonName, "Evil\n\u{1b}[31m Authority");
    let authority = CertifiedIssuer::self_signed(authority, KeyPair::generate().unwrap()).unwrap();
    let key = KeyPair::generate().unwrap();
    let mut issued = CertificateParams::new(vec!["mail.test".to_owned()]).unwrap();
    issued.distinguished_name = rcgen::DistinguishedName::new();
    let issued = issued.signed_by(&key, &authority).unwrap().der().clone();
    let lone = self_signed(&["mail.test"], [2025, 2030], |_| {});
    let lone_leaf = self_signed(&["mail.test"], [2025, 2030], |params| params.is_ca = IsCa::NoCa);
    let unrelated = verifier(&[self_signed(&["x.test"], [2025, 2030], |_| {})]);
    let error = verify(&*unrelated, &issued, "mail.test").await.unwrap_err();
    assert!(error.contains("was issued by CN=") && error.contains("Authority, which is not trusted"), "{error}");
    assert!(!error.contains(char::is_control), "{error:?}");
    for certificate in [&lone, &lone_leaf] {
        let error = verify(&*unrelated, certificate, "mail.test").await.unwrap_err();
        assert!(
            error.starts_with("the certificate is self-signed and not trusted: to trust it, set tls.ca to its file"),
            "{error}"
        );
        // The verifier accepts the printed pin.
        let pin = error.split("sha256:").nth(1).unwrap().trim_end_matches('"');
        use base64::Engine as _;
        let pin: [u8; 32] = base64::engine::general_purpose::STANDARD.decode(pin).unwrap().try_into().unwrap();
        assert_eq!(
            verify(&*KeyVerifier::new(AcceptedKeys::Pinned(vec![pin])), certificate, "anything.test").await,
            Ok(())
        );
    }
    let error = verify(&*KeyVerifier::new(AcceptedKeys::Pinned(vec![[0; 32]])), &lone, "mail.test").await.unwrap_err();
    assert!(error.starts_with("the server's key matches none of the configured pins; if you"), "{error}");
    assert_eq!(verify(&*KeyVerifier::new(AcceptedKeys::Any), &lone, "mail.test").await, Ok(()));
}

#[tokio::test]
async fn version_1_certificate_is_explained_even_if_it_is_in_the_trusted_file() {
    let certificate = CertificateDer::from_pem_slice(VERSION_1_PEM.as_bytes()).unwrap();
    assert_eq!(certs(&mut VERSION_1_PEM.as_bytes()).next().unwrap().unwrap(), certificate);
    let error = Error::InvalidCertificate(CertificateError::BadEncoding);
    let words = explain(&error, &certificate, Peer::Client, NOW);
    assert!(words.starts_with("the certificate is X.509 version 1, which TLS libraries refuse"), "{words}");
    assert!(words.contains("subjectAltName") && !words.contains("pin"), "{words}");
}

#[tokio::test]
async fn client_certificate_in_the_trusted_file_is_trusted() {
    let known = self_signed(&["alice.test"], [2025, 2030], |_| {});
    let expired = self_signed(&["bob.test"], [2020, 2025], |_| {});
    let server = self_signed(&["carol.test"], [2025, 2030], |params| {
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    });
    let other = self_signed(&["alice.test"], [2025, 2030], |_| {});
    let trusted = [known.clone(), expired.clone(), server.clone()];
    let mut roots = RootCertStore::empty();
    trusted.iter().for_each(|certificate| roots.add(certificate.clone()).unwrap());
    let clients = ClientRootVerifier::new(roots, &trusted, CertificatePresence::Required).unwrap();
    let now = UnixTime::since_unix_epoch(std::time::Duration::from_secs(NOW));
    for (certificate, words) in [
        (&known, None),
        (&expired, Some("the certificate expired")),
        (&server, Some("the extended key usage of the certificate does not allow TLS clients")),
        (&other, Some("the certificate is self-signed and not listed in client_certificates.ca")),
    ] {
        let (result, refusal) = with_refusal(async { clients.verify_client_cert(certificate, &[], now) }).await;
        assert_eq!(result.is_ok(), words.is_none(), "{refusal:?}");
        assert!(words.is_none_or(|words| refusal.unwrap().starts_with(words)));
    }
}
