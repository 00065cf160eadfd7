//! Replacement of certificate files while clients connect: in steps, partly written, removed, and through symbolic links.

use std::os::unix::fs::symlink;

use super::*;

/// Two certificates for one name: `cert` is in use, `next` replaces it.
struct Renewal {
    folder: Folder,
    tls: DownstreamTls,
    metrics: Metrics,
    client: Client,
    old: CertificateDer<'static>,
    new: CertificateDer<'static>,
}

impl Renewal {
    fn new() -> Self {
        let folder = Folder::new();
        let old = folder.certificate("cert", &["mail.test"], 1, &PKCS_ECDSA_P256_SHA256);
        let new = folder.certificate("next", &["mail.test"], 2, &PKCS_ECDSA_P256_SHA256);
        let tls = folder.build(&[""], &["cert"], "");
        Self { folder, tls, metrics: metrics(), client: Client::unrestricted(), old, new }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path(name)
    }

    /// Checks the files twice: a change is loaded when the second check finds the same files as the first.
    fn check_files(&self) {
        (0..2).for_each(|_| self.tls.certificates.check_files(&self.metrics, now()));
    }

    /// The certificate that a client receives, and whether the gauge reports unusable files.
    async fn certificate_and_load_failed(&self) -> (CertificateDer<'static>, bool) {
        let text = self.metrics.render();
        let gauge = text.lines().find(|line| line.starts_with("vestibule_certificate_load_failed{"));
        (
            self.client.presented_certificate(&self.tls, "mail.test").await.certificate,
            gauge.is_some_and(|line| line.ends_with(" 1")),
        )
    }

    async fn assert_old_certificate_in_use(&self) {
        self.check_files();
        assert!(self.certificate_and_load_failed().await == (self.old.clone(), true));
    }

    async fn assert_new_certificate_in_use(&self) {
        self.check_files();
        assert!(self.certificate_and_load_failed().await == (self.new.clone(), false));
    }
}

#[tokio::test]
async fn certificate_and_key_can_be_replaced_one_after_the_other() {
    for (first, second) in [("", "-key"), ("-key", "")] {
        let renewal = Renewal::new();
        let rename = |part: &str| {
            fs::rename(renewal.path(&format!("next{part}.pem")), renewal.path(&format!("cert{part}.pem"))).unwrap();
        };
        rename(first);
        renewal.assert_old_certificate_in_use().await;
        rename(second);
        renewal.assert_new_certificate_in_use().await;
    }
}

#[tokio::test]
async fn incomplete_and_unreadable_files_leave_the_old_certificate_in_use() {
    for part in ["", "-key"] {
        let renewal = Renewal::new();
        let (file, whole) =
            (renewal.path(&format!("cert{part}.pem")), fs::read(renewal.path(&format!("next{part}.pem"))));
        let whole = whole.unwrap();
        for length in [0, 10, whole.len() / 2, whole.len() - 10] {
            fs::write(&file, &whole[..length]).unwrap();
            renewal.assert_old_certificate_in_use().await;
        }
        // The file is removed, replaced by a folder, and replaced by a link to a missing file and to itself.
        fs::remove_file(&file).unwrap();
        renewal.assert_old_certificate_in_use().await;
        fs::create_dir(&file).unwrap();
        renewal.assert_old_certificate_in_use().await;
        fs::remove_dir(&file).unwrap();
        for target in [PathBuf::from("missing"), file.clone()] {
            symlink(target, &file).unwrap();
            renewal.assert_old_certificate_in_use().await;
            fs::remove_file(&file).unwrap();
        }
        // Both new files are complete.
        for part in ["", "-key"] {
            fs::copy(renewal.path(&format!("next{part}.pem")), renewal.path(&format!("cert{part}.pem"))).unwrap();
        }
        renewal.assert_new_certificate_in_use().await;
    }
}

#[tokio::test]
async fn symbolic_link_that_is_swapped_replaces_both_files_at_once() {
    let folder = Folder::new();
    for version in ["1", "2"] {
        fs::create_dir(folder.path(version)).unwrap();
    }
    let old = folder.certificate("1/cert", &["mail.test"], 1, &PKCS_ECDSA_P256_SHA256);
    let new = folder.certificate("2/cert", &["mail.test"], 2, &PKCS_ECDSA_P256_SHA256);
    symlink("1", folder.path("current")).unwrap();
    let tls = folder.build(&[""], &["current/cert"], "");
    let client = Client::unrestricted();
    let renewal = Renewal { folder, tls, metrics: metrics(), client, old, new };
    // Kubernetes replaces mounted secrets in this way: it renames a new link to the name of the old one.
    symlink("2", renewal.path("new")).unwrap();
    fs::rename(renewal.path("new"), renewal.path("current")).unwrap();
    renewal.assert_new_certificate_in_use().await;
    // The new link leads to a folder that does not exist yet.
    symlink("3", renewal.path("new")).unwrap();
    fs::rename(renewal.path("new"), renewal.path("current")).unwrap();
    renewal.check_files();
    assert!(renewal.certificate_and_load_failed().await == (renewal.new.clone(), true));
}

#[tokio::test]
async fn permission_change_keeps_the_certificate() {
    let renewal = Renewal::new();
    for mode in [0o600, 0o400, 0o644] {
        fs::set_permissions(renewal.path("cert-key.pem"), fs::Permissions::from_mode(mode)).unwrap();
        renewal.check_files();
        assert!(renewal.certificate_and_load_failed().await == (renewal.old.clone(), false), "{mode:o}");
    }
}
