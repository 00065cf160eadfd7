//! Session tickets: the listeners that accept them, shared keys, and client certificates.

use super::*;

#[tokio::test]
async fn ticket_is_valid_only_for_the_same_policy() {
    let folder = Folder::new();
    folder.certificate("a", &["localhost"], 1, &PKCS_ECDSA_P256_SHA256);
    folder.ticket_key("secret", 1);
    let _ = write_authority(&folder.path("ca.pem"));
    let _ = write_authority(&folder.path("other-ca.pem"));
    let listeners = [
        "sni: any",
        "tls_min: '1.2'",
        "tls_min: '1.3'",
        "client_certificates: {ca: ca.pem}",
        "client_certificates: {ca: ca.pem}",
        "client_certificates: {ca: other-ca.pem}",
        "client_certificates: {ca: ca.pem, required: true}",
    ];
    for options in ["", "ticket_keys: [secret]"] {
        let tls = folder.build(&listeners, &["a"], options);
        for versions in [&[&TLS13][..], &[&TLS12]] {
            for (from, to, resumes) in [
                (0, 0, true),
                (0, 1, true),
                (0, 2, false),
                (2, 0, false),
                (2, 2, true),
                (0, 3, false),
                (3, 0, false),
                (3, 4, true),
                (3, 5, false),
                (3, 6, false),
                (0, 6, false),
            ] {
                let case = format!("{options} {versions:?} {from} {to}");
                let client = Client::new(ALL_SCHEMES, versions);
                let (Ok(first), second) =
                    (client.connect(&tls, from, "localhost").await, client.connect(&tls, to, "localhost").await)
                else {
                    assert!(
                        versions == [&TLS12] && from == 2,
                        "{case}: only a TLS 1.2 client is refused by the first listener"
                    );
                    continue;
                };
                assert_eq!(first, HandshakeKind::Full, "{case}");
                match second {
                    Ok(second) => assert_eq!(second == HandshakeKind::Resumed, resumes, "{case}"),
                    // The listener requires a client certificate or a version that the client does not have.
                    Err(error) => assert!(to == 6 || versions == [&TLS12] && to == 2, "{case}: {error}"),
                }
            }
        }
    }
}

#[tokio::test]
async fn resumed_session_keeps_the_client_certificate_and_anonymous_clients_are_refused() {
    let folder = Folder::new();
    folder.certificate("a", &["localhost"], 1, &PKCS_ECDSA_P256_SHA256);
    let issuer = write_authority(&folder.path("ca.pem"));
    let required = "client_certificates: {ca: ca.pem, required: true, user: san-dns}";
    let tls = folder.build(&["sni: any", required], &["a"], "");
    let client = Client::unrestricted().with_certificate(&issuer);
    assert_eq!(client.connect(&tls, 1, "localhost").await.unwrap(), HandshakeKind::Full);
    assert_eq!(client.connect(&tls, 1, "localhost").await.unwrap(), HandshakeKind::Resumed);
    let anonymous = Client::unrestricted();
    assert_eq!(anonymous.connect(&tls, 0, "localhost").await.unwrap(), HandshakeKind::Full);
    anonymous.connect(&tls, 1, "localhost").await.unwrap_err();
}

#[test]
fn expired_client_certificate_identifies_no_user() {
    let folder = Folder::new();
    folder.certificate("a", &["localhost"], 1, &PKCS_ECDSA_P256_SHA256);
    let _ = write_authority(&folder.path("ca.pem"));
    let tls = folder.build(&["client_certificates: {ca: ca.pem, user: san-dns}"], &["a"], "");
    let user_of_certificate_until = |year: i32| {
        let mut params = CertificateParams::new(["alice.test".to_owned()]).unwrap();
        params.not_after = rcgen::date_time_ymd(year, 1, 1);
        let certificate = params.self_signed(&KeyPair::generate().unwrap()).unwrap();
        tls.certificate_user(0, certificate.der()).map(|owner| owner.as_str().to_owned())
    };
    assert_eq!(user_of_certificate_until(2100).as_deref(), Some("alice.test"));
    assert_eq!(user_of_certificate_until(2020), None);
}

#[tokio::test]
async fn ticket_stays_valid_after_a_reload() {
    let folder = Folder::new();
    folder.certificate("a", &["localhost"], 1, &PKCS_ECDSA_P256_SHA256);
    let config = folder.config(&["sni: any"], &["a"], "");
    let first = expect_built(DownstreamTls::build(&config, None));
    for versions in [&[&TLS13][..], &[&TLS12]] {
        let client = Client::new(ALL_SCHEMES, versions);
        client.connect(&first, 0, "localhost").await.unwrap();
        // The reload changes the index of the listener, and adds another listener.
        let changed = folder.config(&["tls_min: '1.3'", "sni: strict"], &["a"], "");
        let second = expect_built(DownstreamTls::build(&changed, Some(&first)));
        assert_eq!(client.connect(&second, 1, "localhost").await.unwrap(), HandshakeKind::Resumed);
        let other = expect_built(DownstreamTls::build(&config, None));
        assert_eq!(
            client.connect(&other, 0, "localhost").await.unwrap(),
            HandshakeKind::Full,
            "another process generates other keys"
        );
    }
}

#[tokio::test]
async fn ticket_keys_are_shared_between_machines_and_rotate() {
    let folder = Folder::new();
    // The two machines have different certificates for the same name.
    folder.certificate("a", &["localhost"], 1, &PKCS_ECDSA_P256_SHA256);
    folder.certificate("b", &["localhost"], 2, &PKCS_ECDSA_P256_SHA256);
    folder.ticket_key("one", 1);
    folder.ticket_key("two", 2);
    let first = folder.build(&["sni: any"], &["a"], "ticket_keys: [one, two]");
    let second = folder.build(&["sni: any"], &["b"], "ticket_keys: [two, one]");
    let third = folder.build(&["sni: any"], &["b"], "ticket_keys: [two]");
    for versions in [&[&TLS13][..], &[&TLS12]] {
        let client = Client::new(ALL_SCHEMES, versions);
        client.connect(&first, 0, "localhost").await.unwrap();
        assert_eq!(client.connect(&second, 0, "localhost").await.unwrap(), HandshakeKind::Resumed);
    }
    // `third` cannot open the ticket of `first`; `first` can open the ticket of `third`, which is sealed with key `two`.
    let client = Client::new(ALL_SCHEMES, &[&TLS13]);
    client.connect(&first, 0, "localhost").await.unwrap();
    assert_eq!(client.connect(&third, 0, "localhost").await.unwrap(), HandshakeKind::Full);
    assert_eq!(client.connect(&first, 0, "localhost").await.unwrap(), HandshakeKind::Resumed);

    // Rotation: key `one` becomes the second key, and a new key becomes the first.
    let (metrics, client) = (metrics(), Client::new(ALL_SCHEMES, &[&TLS13]));
    client.connect(&first, 0, "localhost").await.unwrap();
    let check_files = || (0..2).for_each(|_| first.tickets.check_files(&metrics));
    folder.ticket_key("two", 3);
    fs::copy(folder.path("one"), folder.path("two")).unwrap();
    folder.ticket_key("one", 4);
    check_files();
    assert_eq!(client.connect(&first, 0, "localhost").await.unwrap(), HandshakeKind::Resumed);
    fs::write(folder.path("one"), "short").unwrap();
    check_files();
    assert!(metrics.render().contains("vestibule_ticket_keys_load_failed 1"));
    assert_eq!(
        client.connect(&first, 0, "localhost").await.unwrap(),
        HandshakeKind::Resumed,
        "the old keys stay in use"
    );
    folder.ticket_key("one", 5);
    folder.ticket_key("two", 6);
    check_files();
    assert!(metrics.render().contains("vestibule_ticket_keys_load_failed 0"));
    assert_eq!(
        client.connect(&first, 0, "localhost").await.unwrap(),
        HandshakeKind::Full,
        "the key of the ticket has been removed"
    );
}

#[test]
fn early_data_is_never_accepted() {
    let folder = Folder::new();
    folder.certificate("a", &["localhost"], 1, &PKCS_ECDSA_P256_SHA256);
    let tls = folder.build(&["sni: any"], &["a"], "");
    assert_eq!(tls.acceptors[0].config.max_early_data_size, 0);
}
