//! Certificates that clients are shown: read, checked, chosen by what a client asks for, and read again when they change.
//!
//! Chain and key must match; names and expiry are taken from the certificate itself. A renewed certificate takes the
//! place of the old one whole, or not at all: where its files are wrong, or half written, what was loaded before stays in
//! use, the log says why, and a gauge is 1 until they are right. An OCSP response is shown while it is about the
//! certificate and in date, and left out otherwise: clients without it go on, while those shown an old one would not.
//! Called by `server`.

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

/// All certificates.
pub(super) struct Certificates {
    followed: Mutex<Vec<WatchedCertificate>>,
    served: RwLock<Arc<ByName>>,
}

impl Certificates {
    /// Reads all of them, at `now` (seconds since 1970).
    ///
    /// # Errors
    /// Every certificate that cannot be used, with its place in the configuration.
    pub(super) fn read(config: &Config, now: i64) -> Result<Self, Vec<Problem>> {
        let mut followed = Vec::new();
        let mut problems = Vec::new();
        for certificate in &config.certificates {
            match WatchedCertificate::new(certificate, now) {
                Ok(one) => followed.push(one),
                Err(Wrong { which, message }) => {
                    let location = match which {
                        Which::Cert => Some(&certificate.cert.location),
                        Which::Key => Some(&certificate.key.location),
                        Which::Ocsp => certificate.ocsp.as_ref().map(|file| &file.location),
                    };
                    problems.push(location.unwrap_or(&certificate.cert.location).problem(message));
                }
            }
        }
        if !problems.is_empty() {
            return Err(problems);
        }
        let served = RwLock::new(Arc::new(ByName::new(&followed)));
        Ok(Self { followed: Mutex::new(followed), served })
    }

    /// Whether one of the certificates is for this name.
    pub(super) fn knows(&self, server_name: Option<&str>) -> bool {
        server_name.is_some_and(|name| self.served().of(name).next().is_some())
    }

    fn served(&self) -> Arc<ByName> {
        self.served.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Sets the gauges, and logs what is wrong from the start.
    pub(super) fn publish(&self, metrics: &Metrics) {
        for followed in self.followed.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            if let Some(trouble) = &followed.trouble {
                tracing::error!("{trouble}");
            }
            followed.publish(metrics);
        }
    }

    /// Looks at all files once, at `now` (seconds since 1970), and loads those that have changed.
    pub(super) fn look(&self, metrics: &Metrics, now: i64) {
        let mut followed = self.followed.lock().unwrap_or_else(PoisonError::into_inner);
        let mut changed = false;
        for one in followed.iter_mut() {
            let trouble = one.trouble.clone();
            if !one.look(now) {
                continue;
            }
            changed = true;
            match &one.trouble {
                Some(message) if one.trouble != trouble => tracing::error!("{message}"),
                Some(_) => {}
                None => {
                    let expiry = one.loaded.expiry;
                    tracing::info!(certificate = %one.files.cert.display(), expiry, "certificate loaded");
                }
            }
            one.publish(metrics);
        }
        if changed {
            *self.served.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(ByName::new(&followed));
        }
    }
}

/// Where a certificate is.
struct Files {
    cert: PathBuf,
    key: PathBuf,
    ocsp: Option<PathBuf>,
}

/// What cannot be used, and why: the message begins with the file's name, and never shows what is in a key.
struct Wrong {
    which: Which,
    message: String,
}

enum Which {
    Cert,
    Key,
    Ocsp,
}

impl Wrong {
    fn new(which: Which, file: &Path, message: impl fmt::Display) -> Self {
        Self { which, message: format!("{}: {message}", file.display()) }
    }
}

/// A certificate, and what its files were when it was loaded.
struct WatchedCertificate {
    files: Files,
    watch: FileWatch,
    loaded: Loaded,
    /// What is wrong with the files as they are now.
    trouble: Option<String>,
}

impl WatchedCertificate {
    fn new(certificate: &Certificate, now: i64) -> Result<Self, Wrong> {
        let files = Files {
            cert: certificate.cert.value.clone(),
            key: certificate.key.value.clone(),
            ocsp: certificate.ocsp.as_ref().map(|file| file.value.clone()),
        };
        let all = [&files.cert, &files.key].into_iter().chain(&files.ocsp);
        // Ahead of reading: a change meanwhile is a change.
        let mut watch = FileWatch::new(all.cloned().collect());
        let mut loaded = Loaded::read(&files)?;
        loaded.response = files.response()?;
        let trouble = loaded.staple(&files, now);
        if trouble.is_some() {
            watch.failed();
        }
        Ok(Self { files, watch, loaded, trouble })
    }

    /// Whether something was loaded, or tried to be.
    fn look(&mut self, now: i64) -> bool {
        if self.watch.is_due() {
            self.trouble = self.load(now);
            if self.trouble.is_some() {
                self.watch.failed();
            }
            return true;
        }
        let ends = self.loaded.response.as_ref().is_some_and(|response| response.is_over(now));
        let is_shown = self.loaded.key.ocsp.is_some();
        if ends && is_shown {
            self.trouble = self.loaded.staple(&self.files, now);
        }
        ends && is_shown
    }

    /// Takes what can be used of the files; says what cannot.
    fn load(&mut self, now: i64) -> Option<String> {
        let mut loaded = match Loaded::read(&self.files) {
            Ok(loaded) => loaded,
            Err(wrong) => return Some(format!("{}; the old certificate stays in use", wrong.message)),
        };
        let wrong = match self.files.response() {
            Ok(response) => {
                loaded.response = response;
                None
            }
            Err(wrong) => {
                loaded.response = self.loaded.response.take();
                Some(format!("{}; the old response stays in use while it fits", wrong.message))
            }
        };
        let unfit = loaded.staple(&self.files, now);
        self.loaded = loaded;
        wrong.or(unfit)
    }

    fn publish(&self, metrics: &Metrics) {
        let name = self.files.cert.display().to_string();
        metrics.certificate(&name, self.loaded.expiry);
        metrics.certificate_load_failed(&name, self.trouble.is_some());
    }
}

impl Files {
    fn response(&self) -> Result<Option<Response>, Wrong> {
        let Some(file) = &self.ocsp else { return Ok(None) };
        let read = fs::read(file).map_err(|error| error.to_string()).and_then(Response::read);
        read.map(Some).map_err(|message| Wrong::new(Which::Ocsp, file, message))
    }
}

/// One certificate with its key, and what the certificate says of itself.
struct Loaded {
    key: Arc<CertifiedKey>,
    names: Vec<String>,
    serial: Vec<u8>,
    /// Seconds since 1970.
    expiry: i64,
    response: Option<Response>,
}

impl Loaded {
    /// Certificate and key.
    fn read(files: &Files) -> Result<Self, Wrong> {
        let cert = |message: String| Wrong::new(Which::Cert, &files.cert, message);
        let key = |message: String| Wrong::new(Which::Key, &files.key, message);
        let chain = read_certificates(&files.cert).map_err(cert)?;
        let CertificateInfo { names, serial, expiry } = facts(&chain[0]).map_err(cert)?;
        let private = read_key(&files.key).map_err(key)?;
        let certified = CertifiedKey::from_der(chain, private, &provider()).map_err(|error| {
            let file = files.cert.display();
            key(format!("does not fit the certificate {file}: {error}"))
        })?;
        Ok(Self { key: Arc::new(certified), names, serial, expiry, response: None })
    }

    /// Shows the response with the certificate, if it is fit for it; why it is not.
    fn staple(&mut self, files: &Files, now: i64) -> Option<String> {
        let (response, file) = (self.response.as_ref()?, files.ocsp.as_ref()?);
        let unfit = response.unfit(&self.serial, now);
        let mut key = CertifiedKey::clone(&self.key);
        key.ocsp = unfit.is_none().then(|| response.der.clone());
        self.key = Arc::new(key);
        unfit.map(|why| format!("{}: {why}; the certificate is shown without it", file.display()))
    }
}

/// The first private key of a PEM file. Error texts never show what is in it.
fn read_key(path: &Path) -> Result<PrivateKeyDer<'static>, String> {
    let pem = zeroize::Zeroizing::new(fs::read(path).map_err(|error| error.to_string())?);
    match rustls_pemfile::private_key(&mut &pem[..]) {
        Ok(Some(key)) => Ok(key),
        Ok(None) if pem.windows(15).any(|window| window == b"BEGIN ENCRYPTED") => {
            Err("the private key is encrypted: decrypt it, there is nobody to type a passphrase".to_owned())
        }
        Ok(None) => Err("no private key in it: expected a block like -----BEGIN PRIVATE KEY-----".to_owned()),
        Err(_) => Err("not a PEM file of a private key".to_owned()),
    }
}

struct CertificateInfo {
    /// Of DNS, in lower case.
    names: Vec<String>,
    serial: Vec<u8>,
    /// Seconds since 1970.
    expiry: i64,
}

fn facts(certificate: &[u8]) -> Result<CertificateInfo, String> {
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

/// Certificates by the names in them. Each list has at least one, in the order they are tried: those of elliptic curves
/// ahead of RSA, whose signatures cost five times as much, and else as they stand in the configuration.
struct ByName {
    exact: HashMap<String, Vec<Arc<CertifiedKey>>>,
    /// By what follows `*.`, which stands for exactly one label (RFC 6125 section 6.4.3).
    wildcard: HashMap<String, Vec<Arc<CertifiedKey>>>,
    /// For clients that name no server, or none there is a certificate for: the first certificate, and those that share
    /// its first name.
    default: Vec<Arc<CertifiedKey>>,
}

impl ByName {
    fn new(followed: &[WatchedCertificate]) -> Self {
        let (mut exact, mut wildcard) = (HashMap::<_, Vec<_>>::new(), HashMap::<_, Vec<_>>::new());
        for loaded in followed.iter().map(|followed| &followed.loaded) {
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
        let default = followed.first().map(|first| {
            let of_name = first.loaded.names.first().and_then(|name| match name.strip_prefix("*.") {
                Some(parent) => wildcard.get(parent),
                None => exact.get(name),
            });
            of_name.cloned().unwrap_or_else(|| vec![first.loaded.key.clone()])
        });
        Self { exact, wildcard, default: default.unwrap_or_default() }
    }

    /// Those for a name in lower case: the exact ones first.
    fn of(&self, name: &str) -> impl Iterator<Item = &Arc<CertifiedKey>> {
        let wildcard = name.split_once('.').and_then(|(_, parent)| self.wildcard.get(parent));
        self.exact.get(name).into_iter().chain(wildcard).flatten()
    }

    /// The one that a client asks for, and can check.
    fn choose(&self, name: Option<&str>, schemes: &[SignatureScheme], strict: bool) -> Option<Arc<CertifiedKey>> {
        let asked = name.and_then(|name| best(self.of(name), schemes));
        if strict { asked } else { asked.or_else(|| best(self.default.iter(), schemes)) }
    }
}

/// The first that the client can check; where there is none, the first: rustls says what is missing.
fn best<'a>(
    mut certificates: impl Iterator<Item = &'a Arc<CertifiedKey>>,
    schemes: &[SignatureScheme],
) -> Option<Arc<CertifiedKey>> {
    let first = certificates.next()?;
    let Some(second) = certificates.next() else { return Some(first.clone()) };
    let mut all = [first, second].into_iter().chain(certificates);
    Some(all.find(|certificate| certificate.key.choose_scheme(schemes).is_some()).unwrap_or(first).clone())
}

/// Chooses among certificates as they are at the moment.
pub(super) struct Resolver {
    pub(super) certificates: Arc<Certificates>,
    /// Nothing is shown to a client that asks for no server we know.
    pub(super) strict: bool,
}

impl ResolvesServerCert for Resolver {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        // rustls has put the name into lower case.
        self.certificates.served().choose(hello.server_name(), hello.signature_schemes(), self.strict)
    }
}

impl fmt::Debug for Resolver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Resolver").field("strict", &self.strict).finish_non_exhaustive()
    }
}
