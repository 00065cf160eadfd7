//! Every way in which files of a certificate are replaced while clients connect.

use std::os::unix::fs::symlink;

use super::*;

/// Two sets of files with one name: `cert` is in use, `next` is what replaces it.
struct Renewal {
    folder: Folder,
    tls: DownstreamTls,
    metrics: Metrics,
    client: Client,
    before: CertificateDer<'static>,
    after: CertificateDer<'static>,
}

impl Renewal {
    fn new() -> Self {
        let folder = Folder::new();
        let before = folder.certificate("cert", &["mail.test"], 1, false);
        let after = folder.certificate("next", &["mail.test"], 2, false);
        let tls = folder.build(&[""], &["cert"], "");
        Self { folder, tls, metrics: metrics(), client: Client::able(), before, after }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path(name)
    }

    /// Two looks: a change is loaded once it rests.
    fn look(&self) {
        (0..2).for_each(|_| self.tls.certificates.check_files(&self.metrics, now()));
    }

    /// What a client is shown, and whether the gauge says that files cannot be used.
    async fn shown(&self) -> (CertificateDer<'static>, bool) {
        let text = self.metrics.render();
        let gauge = text.lines().find(|line| line.starts_with("vestibule_certificate_load_failed{"));
        (self.client.shown(&self.tls, "mail.test").await.certificate, gauge.is_some_and(|line| line.ends_with(" 1")))
    }

    async fn old_in_use(&self) {
        self.look();
        assert!(self.shown().await == (self.before.clone(), true));
    }

    async fn new_in_use(&self) {
        self.look();
        assert!(self.shown().await == (self.after.clone(), false));
    }
}

#[tokio::test]
async fn a_certificate_and_its_key_may_be_replaced_one_after_the_other() {
    for (first, second) in [("", "-key"), ("-key", "")] {
        let renewal = Renewal::new();
        let rename = |part: &str| {
            fs::rename(renewal.path(&format!("next{part}.pem")), renewal.path(&format!("cert{part}.pem"))).unwrap();
        };
        rename(first);
        renewal.old_in_use().await;
        rename(second);
        renewal.new_in_use().await;
    }
}

#[tokio::test]
async fn half_written_and_unreadable_files_change_nothing() {
    for part in ["", "-key"] {
        let renewal = Renewal::new();
        let (file, whole) =
            (renewal.path(&format!("cert{part}.pem")), fs::read(renewal.path(&format!("next{part}.pem"))));
        let whole = whole.unwrap();
        for length in [0, 10, whole.len() / 2, whole.len() - 10] {
            fs::write(&file, &whole[..length]).unwrap();
            renewal.old_in_use().await;
        }
        // Removed, a folder of that name, and a link that leads nowhere or to itself.
        fs::remove_file(&file).unwrap();
        renewal.old_in_use().await;
        fs::create_dir(&file).unwrap();
        renewal.old_in_use().await;
        fs::remove_dir(&file).unwrap();
        for target in [PathBuf::from("nowhere"), file.clone()] {
            symlink(target, &file).unwrap();
            renewal.old_in_use().await;
            fs::remove_file(&file).unwrap();
        }
        // Created again, and complete with the other file.
        for part in ["", "-key"] {
            fs::copy(renewal.path(&format!("next{part}.pem")), renewal.path(&format!("cert{part}.pem"))).unwrap();
        }
        renewal.new_in_use().await;
    }
}

#[tokio::test]
async fn a_swapped_link_replaces_both_files_at_once() {
    let folder = Folder::new();
    for version in ["1", "2"] {
        fs::create_dir(folder.path(version)).unwrap();
    }
    let before = folder.certificate("1/cert", &["mail.test"], 1, false);
    let after = folder.certificate("2/cert", &["mail.test"], 2, false);
    symlink("1", folder.path("live")).unwrap();
    let tls = folder.build(&[""], &["live/cert"], "");
    let client = Client::able();
    let renewal = Renewal { folder, tls, metrics: metrics(), client, before, after };
    // As Kubernetes does: a new link takes the old one's name.
    symlink("2", renewal.path("new")).unwrap();
    fs::rename(renewal.path("new"), renewal.path("live")).unwrap();
    renewal.new_in_use().await;
    // To a folder that is not there yet.
    symlink("3", renewal.path("new")).unwrap();
    fs::rename(renewal.path("new"), renewal.path("live")).unwrap();
    renewal.look();
    assert!(renewal.shown().await == (renewal.after.clone(), true));
}

#[tokio::test]
async fn other_permissions_are_not_another_certificate() {
    let renewal = Renewal::new();
    for mode in [0o600, 0o400, 0o644] {
        fs::set_permissions(renewal.path("cert-key.pem"), fs::Permissions::from_mode(mode)).unwrap();
        renewal.look();
        assert!(renewal.shown().await == (renewal.before.clone(), false), "{mode:o}");
    }
}
