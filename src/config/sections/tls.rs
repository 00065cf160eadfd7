//! `tls`: certificates and session ticket keys; and how TLS starts on listeners and towards servers.

use std::path::PathBuf;

use serde::{Deserialize, Deserializer};
use serde_yaml::Value;

use crate::config::error::Located;
use crate::config::yaml::{Scalar, Section, scalar};

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct TlsSection {
    certificates: Vec<Value>,
    ticket_keys: Option<Vec<PathBuf>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct CertificateSection {
    cert: PathBuf,
    key: PathBuf,
    ocsp: Option<PathBuf>,
}

/// A certificate and its key.
#[derive(Debug, Clone)]
pub struct Certificate {
    /// PEM file of the certificate chain.
    pub cert: Located<PathBuf>,
    /// PEM file of the private key.
    pub key: Located<PathBuf>,
    /// DER file of an OCSP response for the certificate.
    pub ocsp: Option<Located<PathBuf>>,
}

/// How TLS starts on a connection.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TlsMode {
    /// With the first byte (port 993).
    Implicit,
    /// After the command STARTTLS (port 143). No credentials are sent before.
    StartTls,
    /// Never: passwords are sent in clear.
    #[default]
    None,
}

impl TlsMode {
    /// The word in the configuration.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Implicit => "implicit",
            Self::StartTls => "starttls",
            Self::None => "none",
        }
    }
}

/// A version of TLS.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum TlsVersion {
    /// TLS 1.2 (RFC 5246).
    #[default]
    Tls12,
    /// TLS 1.3 (RFC 8446).
    Tls13,
}

/// Without quotes, YAML reads a version as a number, which is accepted too.
impl Scalar for TlsVersion {
    fn expected() -> String {
        "a TLS version, \"1.2\" or \"1.3\"".to_owned()
    }

    fn from_text(text: &str) -> Option<Self> {
        match text {
            "1.2" => Some(Self::Tls12),
            "1.3" => Some(Self::Tls13),
            _ => None,
        }
    }
}

impl<'de> Deserialize<'de> for TlsVersion {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        scalar(deserializer)
    }
}

impl TlsSection {
    /// Returns the certificates and the files of ticket keys.
    pub(super) fn check(self, section: &mut Section<'_>) -> (Vec<Certificate>, Vec<Located<PathBuf>>) {
        let mut certificates = Vec::new();
        for (index, item) in self.certificates.into_iter().enumerate() {
            let mut section = section.child(&format!("certificates[{index}]"));
            if let Some(raw) = section.read::<CertificateSection>(item) {
                certificates.push(Certificate {
                    cert: section.file("cert", &raw.cert),
                    key: section.file("key", &raw.key),
                    ocsp: section.optional_file("ocsp", raw.ocsp.as_deref()),
                });
            }
        }
        (certificates, self.ticket_keys.map(|files| check_ticket_keys(section, &files)).unwrap_or_default())
    }
}

fn check_ticket_keys(section: &mut Section<'_>, files: &[PathBuf]) -> Vec<Located<PathBuf>> {
    if files.is_empty() {
        section.problem(
            "ticket_keys",
            "at least one file is required; without this key, the process generates its own secret",
        );
    }
    let key = |index: usize| format!("ticket_keys[{index}]");
    for (index, file) in files.iter().enumerate() {
        if files[..index].contains(file) {
            section.problem(&key(index), "duplicate file");
        }
    }
    files.iter().enumerate().map(|(index, file)| section.file(&key(index), file)).collect()
}
