//! The certificates of listeners: loading, selection by the client's SNI, and reloading when their files change.
//!
//! The key must match the certificate; names and expiry are read from the certificate. A renewed certificate replaces the old one only as a
//! whole: if its files are invalid or incomplete, the loaded certificate stays in use, an error is logged, and a gauge is 1 until the files
//! are valid. An OCSP response is stapled while it matches the certificate and has not expired. Otherwise it is omitted, because clients
//! accept a certificate without a response, but not with an expired one.

use std::collections::HashMap;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use tokio_rustls::rustls::pki_types::PrivateKeyDer;
use tokio_rustls::rustls::server::{ClientHello, ResolvesServerCert};
use tokio_rustls::rustls::sign::CertifiedKey;
use tokio_rustls::rustls::{SignatureAlgorithm, SignatureScheme};
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer as _, X509Certificate};

use super::certificate_refusal::{VERSION_1, is_version_1};
use super::ocsp::Response;
use super::{provider, read_certificates};
use crate::config::{Certificate, Config, Problem};
use crate::metrics::Metrics;
use crate::process::file_watch::FileWatch;

/// All configured certificates.
pub(super) struct Certificates {
    watched: Mutex<Vec<WatchedCertificate>>,
    by_name: RwLock<Arc<ByName>>,
}

impl Certificates {
    /// Loads all certificates at `now` (seconds since 1970).
    ///
    /// # Errors
    /// A problem for each unusable certificate, with its location in the configuration.
    pub(super) fn load(config: &Config, now: i64) -> Result<Self, Vec<Problem>> {
        let mut watched = Vec::new();
        let mut problems = Vec::new();
        for certificate in &config.certificates {
            match WatchedCertificate::new(certificate, now) {
                Ok(certificate) => watched.push(certificate),
                Err(LoadError { file, message }) => {
                    let location = match file {
                        FileKind::Cert => Some(&certificate.cert.location),
                        FileKind::Key => Some(&certificate.key.location),
                        FileKind::Ocsp => certificate.ocsp.as_ref().map(|file| &file.location),
                    };
                    problems.push(location.unwrap_or(&certificate.cert.location).problem(message));
                }
            }
        }
        if !problems.is_empty() {
            return Err(problems);
        }
        let by_name = RwLock::new(Arc::new(ByName::new(&watched)));
        Ok(Self { watched: Mutex::new(watched), by_name })
    }

    /// Whether a certificate is valid for this name.
    pub(super) fn has_name(&self, server_name: Option<&str>) -> bool {
        server_name.is_some_and(|name| self.by_name().matching(name).next().is_some())
    }

    fn by_name(&self) -> Arc<ByName> {
        self.by_name.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Sets the gauges, and logs problems that were found while loading.
    pub(super) fn publish(&self, metrics: &Metrics) {
        for certificate in self.watched.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            if let Some(problem) = &certificate.problem {
                tracing::error!("{problem}");
            }
            certificate.publish(metrics);
        }
    }

    /// Checks all files once at `now` (seconds since 1970), and reloads certificates whose files have changed.
    pub(super) fn check_files(&self, metrics: &Metrics, now: i64) {
        let mut watched = self.watched.lock().unwrap_or_else(PoisonError::into_inner);
        let mut changed = false;
        for certificate in watched.iter_mut() {
            let earlier_problem = certificate.problem.clone();
            match certificate.check_files(now) {
                Check::Unchanged => continue,
                Check::Updated => changed = true,
            }
            match &certificate.problem {
                Some(problem) if certificate.problem != earlier_problem => tracing::error!("{problem}"),
                Some(_) => {}
                None => {
                    let expiry = certificate.loaded.expiry;
                    tracing::info!(certificate = %certificate.files.cert.display(), expiry, "certificate loaded");
                }
            }
            certificate.publish(metrics);
        }
        if changed {
            *self.by_name.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(ByName::new(&watched));
        }
    }
}

/// The files of a certificate.
struct Files {
    cert: PathBuf,
    key: PathBuf,
    ocsp: Option<PathBuf>,
}

/// The reason why a file cannot be used. The message begins with the path and never contains parts of a key.
struct LoadError {
    file: FileKind,
    message: String,
}

enum FileKind {
    Cert,
    Key,
    Ocsp,
}

impl LoadError {
    fn new(file: FileKind, path: &Path, message: impl fmt::Display) -> Self {
        Self { file, message: format!("{}: {message}", path.display()) }
    }
}

/// A loaded certificate whose files are checked for changes.
struct WatchedCertificate {
    files: Files,
    watch: FileWatch,
    loaded: Loaded,
    /// The problem that was found when the files were last loaded.
    problem: Option<String>,
}

/// The result of checking the files of a certificate.
enum Check {
    Unchanged,
    /// The certificate or its OCSP response was reloaded, or an attempt failed.
    Updated,
}

impl WatchedCertificate {
    fn new(certificate: &Certificate, now: i64) -> Result<Self, LoadError> {
        let files = Files {
            cert: certificate.cert.value.clone(),
            key: certificate.key.value.clone(),
            ocsp: certificate.ocsp.as_ref().map(|file| file.value.clone()),
        };
        let all = [&files.cert, &files.key].into_iter().chain(&files.ocsp);
        // The watch starts before the files are read, so that a change during the read is noticed.
        let mut watch = FileWatch::new(all.cloned().collect());
        let mut loaded = Loaded::read(&files)?;
        loaded.response = files.read_response()?;
        let problem = loaded.staple(&files, now);
        if problem.is_some() {
            watch.failed();
        }
        Ok(Self { files, watch, loaded, problem })
    }

    /// Reloads changed files, and removes an expired OCSP response.
    fn check_files(&mut self, now: i64) -> Check {
        if self.watch.is_due() {
            self.problem = self.reload(now);
            if self.problem.is_some() {
                self.watch.failed();
            }
            return Check::Updated;
        }
        let is_expired = self.loaded.response.as_ref().is_some_and(|response| response.is_expired(now));
        let is_stapled = self.loaded.key.ocsp.is_some();
        if !(is_expired && is_stapled) {
            return Check::Unchanged;
        }
        self.problem = self.loaded.staple(&self.files, now);
        Check::Updated
    }

    /// Loads the usable files. Returns the problem of the others.
    fn reload(&mut self, now: i64) -> Option<String> {
        let mut loaded = match Loaded::read(&self.files) {
            Ok(loaded) => loaded,
            Err(error) => return Some(format!("{}; the old certificate stays in use", error.message)),
        };
        let read_problem = match self.files.read_response() {
            Ok(response) => {
                loaded.response = response;
                None
            }
            Err(error) => {
                loaded.response = self.loaded.response.take();
                Some(format!("{}; the old response stays in use while it is valid", error.message))
            }
        };
        let staple_problem = loaded.staple(&self.files, now);
        self.loaded = loaded;
        read_problem.or(staple_problem)
    }

    fn publish(&self, metrics: &Metrics) {
        let name = self.files.cert.display().to_string();
        metrics.certificate(&name, self.loaded.expiry);
        metrics.certificate_load_failed(&name, self.problem.is_some());
    }
}

impl Files {
    fn read_response(&self) -> Result<Option<Response>, LoadError> {
        let Some(file) = &self.ocsp else { return Ok(None) };
        let read = fs::read(file).map_err(|error| error.to_string()).and_then(Response::read);
        read.map(Some).map_err(|message| LoadError::new(FileKind::Ocsp, file, message))
    }
}

/// A certificate with its key and OCSP response.
struct Loaded {
    key: Arc<CertifiedKey>,
    names: Vec<String>,
    serial: Vec<u8>,
    /// Seconds since 1970.
    expiry: i64,
    response: Option<Response>,
}

impl Loaded {
    /// Reads the certificate and the key, but not the response.
    fn read(files: &Files) -> Result<Self, LoadError> {
        let cert = |message: String| LoadError::new(FileKind::Cert, &files.cert, message);
        let key = |message: String| LoadError::new(FileKind::Key, &files.key, message);
        let chain = read_certificates(&files.cert).map_err(cert)?;
        let CertificateInfo { names, serial, expiry } = certificate_info(&chain[0]).map_err(cert)?;
        let private = read_key(&files.key).map_err(key)?;
        let certified = CertifiedKey::from_der(chain, private, &provider()).map_err(|error| {
            let file = files.cert.display();
            key(format!("does not match the certificate {file}: {error}"))
        })?;
        Ok(Self { key: Arc::new(certified), names, serial, expiry, response: None })
    }

    /// Staples the OCSP response to the certificate if it is usable. Otherwise returns the reason.
    fn staple(&mut self, files: &Files, now: i64) -> Option<String> {
        let (response, file) = (self.response.as_ref()?, files.ocsp.as_ref()?);
        let rejection = response.rejection(&self.serial, now);
        let mut key = CertifiedKey::clone(&self.key);
        key.ocsp = rejection.is_none().then(|| response.der.clone());
        self.key = Arc::new(key);
        rejection.map(|reason| format!("{}: {reason}; the certificate is sent without it", file.display()))
    }
}

/// Reads the first private key of a PEM file. Error texts never contain parts of the file.
fn read_key(path: &Path) -> Result<PrivateKeyDer<'static>, String> {
    let pem = zeroize::Zeroizing::new(fs::read(path).map_err(|error| error.to_string())?);
    match rustls_pemfile::private_key(&mut &pem[..]) {
        Ok(Some(key)) => Ok(key),
        Ok(None) if pem.windows(15).any(|window| window == b"BEGIN ENCRYPTED") => {
            Err("the private key is encrypted: decrypt it, because a server cannot ask for a passphrase".to_owned())
        }
        Ok(None) => {
            Err("the file contains no private key: expected a block like -----BEGIN PRIVATE KEY-----".to_owned())
        }
        Err(_) => Err("not a PEM file of a private key".to_owned()),
    }
}

struct CertificateInfo {
    /// DNS names in lower case.
    names: Vec<String>,
    serial: Vec<u8>,
    /// Seconds since 1970.
    expiry: i64,
}

fn certificate_info(certificate: &[u8]) -> Result<CertificateInfo, String> {
    let (_, parsed) = X509Certificate::from_der(certificate).map_err(|error| format!("not a certificate: {error}"))?;
    if is_version_1(&parsed) {
        return Err(VERSION_1.to_owned());
    }
    let alternatives = parsed.subject_alternative_name().map_err(|error| error.to_string())?;
    let names = alternatives.into_iter().flat_map(|names| &names.value.general_names).filter_map(|name| match name {
        GeneralName::DNSName(name) => Some(name.to_ascii_lowercase()),
        _ => None,
    });
    let expiry = parsed.validity().not_after.timestamp();
    Ok(CertificateInfo { names: names.collect(), serial: parsed.raw_serial().to_vec(), expiry })
}

/// Certificates by their names. Each list contains at least one certificate and is in order of preference: certificates with elliptic
/// curves before RSA, whose signatures take five times as long, else in the order of the configuration.
struct ByName {
    exact: HashMap<String, Vec<Arc<CertifiedKey>>>,
    /// The key is the part after `*.`, which matches exactly one label (RFC 6125 section 6.4.3).
    wildcard: HashMap<String, Vec<Arc<CertifiedKey>>>,
    /// For clients that send no SNI or an unknown name: the first certificate, and the others with the same first name.
    default: Vec<Arc<CertifiedKey>>,
}

impl ByName {
    fn new(watched: &[WatchedCertificate]) -> Self {
        let (mut exact, mut wildcard) = (HashMap::<_, Vec<_>>::new(), HashMap::<_, Vec<_>>::new());
        for loaded in watched.iter().map(|certificate| &certificate.loaded) {
            for name in &loaded.names {
                let list = match name.strip_prefix("*.") {
                    Some(parent) => wildcard.entry(parent.to_owned()).or_default(),
                    None => exact.entry(name.clone()).or_default(),
                };
                if !list.iter().any(|other| Arc::ptr_eq(other, &loaded.key)) {
                    list.push(loaded.key.clone());
                }
            }
        }
        for list in exact.values_mut().chain(wildcard.values_mut()) {
            list.sort_by_key(|certificate| certificate.key.algorithm() == SignatureAlgorithm::RSA);
        }
        let default = watched.first().map(|first| {
            let with_same_name = first.loaded.names.first().and_then(|name| match name.strip_prefix("*.") {
                Some(parent) => wildcard.get(parent),
                None => exact.get(name),
            });
            with_same_name.cloned().unwrap_or_else(|| vec![first.loaded.key.clone()])
        });
        Self { exact, wildcard, default: default.unwrap_or_default() }
    }

    /// The certificates for a name in lower case, those with the exact name first.
    fn matching(&self, name: &str) -> impl Iterator<Item = &Arc<CertifiedKey>> {
        let wildcard = name.split_once('.').and_then(|(_, parent)| self.wildcard.get(parent));
        self.exact.get(name).into_iter().chain(wildcard).flatten()
    }

    /// The certificate for the name that the client sent, if possible one whose signatures it can verify.
    fn choose(&self, name: Option<&str>, schemes: &[SignatureScheme], strict: bool) -> Option<Arc<CertifiedKey>> {
        let found = name.and_then(|name| first_supported(self.matching(name), schemes));
        if strict { found } else { found.or_else(|| first_supported(self.default.iter(), schemes)) }
    }
}

/// The first certificate that the client supports. If it supports none, the first one, so that rustls reports what is missing.
fn first_supported<'a>(
    mut certificates: impl Iterator<Item = &'a Arc<CertifiedKey>>,
    schemes: &[SignatureScheme],
) -> Option<Arc<CertifiedKey>> {
    let first = certificates.next()?;
    let Some(second) = certificates.next() else { return Some(first.clone()) };
    let mut all = [first, second].into_iter().chain(certificates);
    Some(all.find(|certificate| certificate.key.choose_scheme(schemes).is_some()).unwrap_or(first).clone())
}

/// Chooses among the certificates that are currently loaded.
pub(super) struct Resolver {
    pub(super) certificates: Arc<Certificates>,
    /// Whether a client with an unknown name, or without SNI, gets no certificate.
    pub(super) strict: bool,
}

impl ResolvesServerCert for Resolver {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        // rustls has converted the name to lower case.
        self.certificates.by_name().choose(hello.server_name(), hello.signature_schemes(), self.strict)
    }
}

impl fmt::Debug for Resolver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Resolver").field("strict", &self.strict).finish_non_exhaustive()
    }
}
