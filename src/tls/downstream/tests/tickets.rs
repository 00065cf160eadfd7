//! Session tickets: validity for listeners, shared keys, and client certificates.

use super::*;

#[tokio::test]
async fn ticket_is_valid_only_for_the_same_policy() {
    let folder = Folder::new();
    folder.certificate("a", &["localhost"], 1, false);
    folder.secret("secret", 1);
    let _ = authority(&folder.path("ca.pem"));
    let _ = authority(&folder.path("other-ca.pem"));
    let listeners = [
        "sni: any",
        "tls_min: '1.2'",
        "tls_min: '1.3'",
        "client_certificates: {ca: ca.pem}",
        "client_certificates: {ca: ca.pem}",
        "client_certificates: {ca: other-ca.pem}",
        "client_certificates: {ca: ca.pem, required: true}",
    ];
    for more in ["", "ticket_keys: [secret]"] {
        let tls = folder.build(&listeners, &["a"], more);
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
                let case = format!("{more} {versions:?} {from} {to}");
                let client = Client::new(EVERY, versions);
                let (Ok(first), second) =
                    (client.connect(&tls, from, "localhost").await, client.connect(&tls, to, "localhost").await)
                else {
                    assert!(versions == [&TLS12] && from == 2, "{case}: only TLS 1.2 is refused at the first one");
                    continue;
                };
                assert_eq!(first, HandshakeKind::Full, "{case}");
                match second {
                    Ok(second) => assert_eq!(second == HandshakeKind::Resumed, resumes, "{case}"),
                    // It was asked for a certificate, or a version, that it does not have.
                    Err(error) => assert!(to == 6 || versions == [&TLS12] && to == 2, "{case}: {error}"),
                }
            }
        }
    }
}

#[tokio::test]
async fn resumed_client_keeps_its_certificate_and_others_are_refused() {
    let folder = Folder::new();
    folder.certificate("a", &["localhost"], 1, false);
    let issuer = authority(&folder.path("ca.pem"));
    let required = "client_certificates: {ca: ca.pem, required: true, user: san-dns}";
    let tls = folder.build(&["sni: any", required], &["a"], "");
    let client = Client::able().with_certificate(&issuer);
    assert_eq!(client.connect(&tls, 1, "localhost").await.unwrap(), HandshakeKind::Full);
    assert_eq!(client.connect(&tls, 1, "localhost").await.unwrap(), HandshakeKind::Resumed);
    let anonymous = Client::able();
    assert_eq!(anonymous.connect(&tls, 0, "localhost").await.unwrap(), HandshakeKind::Full);
    anonymous.connect(&tls, 1, "localhost").await.unwrap_err();
}

#[test]
fn expired_certificate_names_no_user() {
    let folder = Folder::new();
    folder.certificate("a", &["localhost"], 1, false);
    let _ = authority(&folder.path("ca.pem"));
    let tls = folder.build(&["client_certificates: {ca: ca.pem, user: san-dns}"], &["a"], "");
    let of = |year: i32| {
        let mut params = CertificateParams::new(["alice.test".to_owned()]).unwrap();
        params.not_after = rcgen::date_time_ymd(year, 1, 1);
        let certificate = params.self_signed(&KeyPair::generate().unwrap()).unwrap();
        tls.certificate_user(0, certificate.der()).map(|owner| owner.as_str().to_owned())
    };
    assert_eq!(of(2100).as_deref(), Some("alice.test"));
    assert_eq!(of(2020), None);
}

#[tokio::test]
async fn tickets_survive_a_reload() {
    let folder = Folder::new();
    folder.certificate("a", &["localhost"], 1, false);
    let config = folder.config(&["sni: any"], &["a"], "");
    let first = built(DownstreamTls::build(&config, None));
    for versions in [&[&TLS13][..], &[&TLS12]] {
        let client = Client::new(EVERY, versions);
        client.connect(&first, 0, "localhost").await.unwrap();
        // The listener has moved to another place, among others.
        let changed = folder.config(&["tls_min: '1.3'", "sni: strict"], &["a"], "");
        let second = built(DownstreamTls::build(&changed, Some(&first)));
        assert_eq!(client.connect(&second, 1, "localhost").await.unwrap(), HandshakeKind::Resumed);
        let other = built(DownstreamTls::build(&config, None));
        assert_eq!(client.connect(&other, 0, "localhost").await.unwrap(), HandshakeKind::Full, "a process of its own");
    }
}

#[tokio::test]
async fn machines_with_shared_keys_accept_each_others_tickets_and_keys_rotate() {
    let folder = Folder::new();
    // The certificates are not even the same, as long as the name is.
    folder.certificate("a", &["localhost"], 1, false);
    folder.certificate("b", &["localhost"], 2, false);
    folder.secret("one", 1);
    folder.secret("two", 2);
    let first = folder.build(&["sni: any"], &["a"], "ticket_keys: [one, two]");
    let second = folder.build(&["sni: any"], &["b"], "ticket_keys: [two, one]");
    let third = folder.build(&["sni: any"], &["b"], "ticket_keys: [two]");
    for versions in [&[&TLS13][..], &[&TLS12]] {
        let client = Client::new(EVERY, versions);
        client.connect(&first, 0, "localhost").await.unwrap();
        assert_eq!(client.connect(&second, 0, "localhost").await.unwrap(), HandshakeKind::Resumed);
    }
    // The ticket of `third` is sealed by a key that `first` knows, the one of `first` is not.
    let client = Client::new(EVERY, &[&TLS13]);
    client.connect(&first, 0, "localhost").await.unwrap();
    assert_eq!(client.connect(&third, 0, "localhost").await.unwrap(), HandshakeKind::Full);
    assert_eq!(client.connect(&first, 0, "localhost").await.unwrap(), HandshakeKind::Resumed);

    // A new key comes, and the oldest goes.
    let (metrics, client) = (metrics(), Client::new(EVERY, &[&TLS13]));
    client.connect(&first, 0, "localhost").await.unwrap();
    let look = || (0..2).for_each(|_| first.tickets.check_files(&metrics));
    folder.secret("two", 3);
    fs::copy(folder.path("one"), folder.path("two")).unwrap();
    folder.secret("one", 4);
    look();
    assert_eq!(client.connect(&first, 0, "localhost").await.unwrap(), HandshakeKind::Resumed);
    fs::write(folder.path("one"), "short").unwrap();
    look();
    assert!(metrics.render().contains("vestibule_ticket_keys_load_failed 1"));
    assert_eq!(client.connect(&first, 0, "localhost").await.unwrap(), HandshakeKind::Resumed, "the old ones stay");
    folder.secret("one", 5);
    folder.secret("two", 6);
    look();
    assert!(metrics.render().contains("vestibule_ticket_keys_load_failed 0"));
    assert_eq!(client.connect(&first, 0, "localhost").await.unwrap(), HandshakeKind::Full, "gone is gone");
}

#[test]
fn early_data_is_never_accepted() {
    let folder = Folder::new();
    folder.certificate("a", &["localhost"], 1, false);
    let tls = folder.build(&["sni: any"], &["a"], "");
    assert_eq!(tls.acceptors[0].config.max_early_data_size, 0);
}
