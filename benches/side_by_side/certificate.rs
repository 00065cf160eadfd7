//! The certificate of all peers (ECDSA, P-256), and their TLS settings: TLS 1.3 with AES-128-GCM.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use tokio_rustls::rustls::client::Resumption;
use tokio_rustls::rustls::crypto::CryptoProvider;
use tokio_rustls::rustls::crypto::aws_lc_rs::{self, cipher_suite};
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::{ClientConfig, RootCertStore, ServerConfig, version};

pub(crate) const NAME: &str = "localhost";

/// Writes `cert.pem`, `key.pem`, and `both.pem` for HAProxy.
pub(crate) fn write(folder: &Path) -> anyhow::Result<()> {
    let made = rcgen::generate_simple_self_signed(vec![NAME.to_owned()])?;
    let (certificate, key) = (made.cert.pem(), made.signing_key.serialize_pem());
    fs::write(folder.join("cert.pem"), &certificate)?;
    fs::write(folder.join("key.pem"), &key)?;
    fs::write(folder.join("both.pem"), certificate + &key)?;
    Ok(())
}

fn provider() -> Arc<CryptoProvider> {
    let cipher_suites = vec![cipher_suite::TLS13_AES_128_GCM_SHA256];
    Arc::new(CryptoProvider { cipher_suites, ..aws_lc_rs::default_provider() })
}

fn certificates(folder: &Path) -> anyhow::Result<Vec<CertificateDer<'static>>> {
    let pem = fs::read(folder.join("cert.pem"))?;
    Ok(rustls_pemfile::certs(&mut &pem[..]).collect::<Result<_, _>>()?)
}

/// TLS settings of the clients: each has its own tickets, or none.
pub(crate) fn client(folder: &Path, resume: bool) -> anyhow::Result<Arc<ClientConfig>> {
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(certificates(folder)?);
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&version::TLS13])?
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"imap".to_vec()];
    if !resume {
        config.resumption = Resumption::disabled();
    }
    Ok(Arc::new(config))
}

/// TLS settings of the stand-in server.
pub(crate) fn server(folder: &Path) -> anyhow::Result<Arc<ServerConfig>> {
    let pem = fs::read(folder.join("key.pem"))?;
    let key: PrivateKeyDer<'_> = rustls_pemfile::private_key(&mut &pem[..])?.ok_or(anyhow::anyhow!("no key"))?;
    let config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&version::TLS13])?
        .with_no_client_auth()
        .with_single_cert(certificates(folder)?, key)?;
    Ok(Arc::new(config))
}
