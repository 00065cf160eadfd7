//! Session tickets: what seals them, and where one of them is good.
//!
//! A ticket is good at listeners of the same policy only, its [`Scope`]: rustls takes from it who the client is, and asks
//! nothing again (CVE-2025-23419). Without key files each scope has a secret of the process's own, which rustls changes
//! every six hours, and which outlives a reload of the configuration ([`Tickets::build`] takes the older ones over).
//! With key files, a key for each scope is derived from each (HKDF, RFC 5869), so that machines that share the files
//! take each other's tickets, and the first file's key seals new ones by AES-256-GCM. How old a ticket is stands in it,
//! sealed: the age limit holds whoever forgets to change the files. Called by `server`.

use std::collections::HashMap;
use std::fmt;
use std::fs::File;
use std::io::Read as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{SystemTime, UNIX_EPOCH};

use aws_lc_rs::aead::{AES_256_GCM, Aad, NONCE_LEN, Nonce, RandomizedNonceKey};
use aws_lc_rs::hkdf::{self, HKDF_SHA256, Salt};
use tokio_rustls::rustls::crypto::aws_lc_rs::Ticketer;
use tokio_rustls::rustls::server::ProducesTickets;
use zeroize::Zeroizing;

use crate::config::{Config, Located, Problem, TlsVersion};
use crate::metrics::Metrics;
use crate::process::file_watch::FileWatch;

/// Seconds a ticket is good for; rustls' own tickets live as long.
const LIFETIME: u32 = 12 * 60 * 60;
/// Seconds that the clocks of machines which share keys may differ.
const SKEW: u64 = 60;
/// Bytes of randomness that a key file must hold: as much as the key derived from it.
const LEAST: usize = 32;
/// A key file is no larger.
const MOST: usize = 4096;
/// Random bytes have more different values among any 32 of them: what has fewer is a placeholder.
const LEAST_VALUES: usize = 8;
/// Tells which key sealed a ticket.
const NAME: usize = 16;

/// The policy that a ticket belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Scope {
    /// The oldest version spoken.
    pub(super) min: TlsVersion,
    /// Where certificates of clients are asked for.
    pub(super) clients: Option<Clients>,
}

/// Certificates of clients, as far as a ticket speaks for one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Clients {
    pub(super) required: bool,
    /// SHA-256 of the roots they were checked against.
    pub(super) roots: [u8; 32],
}

impl Scope {
    /// The same on every machine, and another for each scope.
    fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![match self.min {
            TlsVersion::Tls12 => 2,
            TlsVersion::Tls13 => 3,
        }];
        if let Some(clients) = &self.clients {
            bytes.push(clients.required.into());
            bytes.extend(clients.roots);
        }
        bytes
    }
}

/// What seals the tickets of all scopes.
pub(super) enum Tickets {
    /// TrafficSecrets of the process's own.
    Own(HashMap<Scope, Arc<dyn ProducesTickets>>),
    /// Keys from files.
    Shared(Shared),
}

/// Keys from files.
pub(super) struct Shared {
    files: Vec<PathBuf>,
    rings: HashMap<Scope, Arc<Ring>>,
    /// And what was wrong when they were last loaded.
    watch: Mutex<(FileWatch, Option<String>)>,
}

impl Tickets {
    /// Makes, reads, or takes over from `previous`, what the scopes need.
    ///
    /// # Errors
    /// Every key file that cannot be used; or there is no randomness.
    pub(super) fn build(
        config: &Config,
        scopes: impl Iterator<Item = Scope>,
        previous: Option<&Self>,
    ) -> Result<Self, Vec<Problem>> {
        if config.ticket_keys.is_empty() {
            let mut own = HashMap::new();
            for scope in scopes {
                let kept = match previous {
                    Some(Self::Own(previous)) => previous.get(&scope).cloned(),
                    _ => None,
                };
                let ticketer = kept.map_or_else(Ticketer::new, Ok).map_err(|error| {
                    vec![config.certificates[0].cert.location.problem(format!("no session tickets: {error}"))]
                })?;
                own.insert(scope, ticketer);
            }
            return Ok(Self::Own(own));
        }
        let files: Vec<PathBuf> = config.ticket_keys.iter().map(|file| file.value.clone()).collect();
        let watch = FileWatch::new(files.clone());
        let mut secrets = Vec::new();
        let mut problems = Vec::new();
        for Located { value, location } in &config.ticket_keys {
            match read(value) {
                Ok(secret) => secrets.push(secret),
                Err(message) => problems.push(location.problem(format!("{}: {message}", value.display()))),
            }
        }
        if !problems.is_empty() {
            return Err(problems);
        }
        let mut rings = HashMap::new();
        for scope in scopes {
            let ring = Ring::new(&secrets, &scope)
                .ok_or_else(|| vec![config.ticket_keys[0].location.problem("no key could be derived")])?;
            rings.insert(scope, Arc::new(ring));
        }
        Ok(Self::Shared(Shared { files, rings, watch: Mutex::new((watch, None)) }))
    }

    /// Of one of the scopes given to [`Tickets::build`]; of another one: none are made.
    pub(super) fn of(&self, scope: &Scope) -> Option<Arc<dyn ProducesTickets>> {
        match self {
            Self::Own(own) => own.get(scope).cloned(),
            Self::Shared(shared) => shared.rings.get(scope).map(|ring| ring.clone() as Arc<dyn ProducesTickets>),
        }
    }

    /// Looks at the files once, and loads them if they have changed: all of them, or none.
    pub(super) fn look(&self, metrics: &Metrics) {
        let Self::Shared(shared) = self else { return };
        let mut state = shared.watch.lock().unwrap_or_else(PoisonError::into_inner);
        let (watch, trouble) = &mut *state;
        if !watch.is_due() {
            return;
        }
        match shared.reload() {
            Ok(()) => {
                tracing::info!(files = shared.files.len(), "ticket keys loaded");
                *trouble = None;
            }
            Err(message) => {
                watch.failed();
                // Said once, not at every try.
                if trouble.as_ref() != Some(&message) {
                    tracing::error!("{message}; the old ticket keys stay in use");
                }
                *trouble = Some(message);
            }
        }
        metrics.ticket_keys_load_failed(trouble.is_some());
    }
}

impl Shared {
    fn reload(&self) -> Result<(), String> {
        let secrets = self
            .files
            .iter()
            .map(|file| read(file).map_err(|message| format!("{}: {message}", file.display())))
            .collect::<Result<Vec<_>, _>>()?;
        let mut fresh = Vec::new();
        for (scope, ring) in &self.rings {
            fresh.push((ring, Keys::derive(&secrets, scope).ok_or("no key could be derived")?));
        }
        for (ring, keys) in fresh {
            *ring.0.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(keys);
        }
        Ok(())
    }
}

/// The secret in a file. Error texts never show what is in it.
fn read(path: &Path) -> Result<Zeroizing<Vec<u8>>, String> {
    let file = File::open(path).map_err(|error| error.to_string())?;
    let mode = file.metadata().map_err(|error| error.to_string())?.mode();
    if mode & 0o007 != 0 {
        return Err(format!("is open to everybody on this machine (mode {:03o}): chmod 600 it", mode & 0o777));
    }
    let mut bytes = Zeroizing::new(Vec::with_capacity(MOST + 1));
    file.take(MOST as u64 + 1).read_to_end(&mut bytes).map_err(|error| error.to_string())?;
    let length = secret(&bytes)?;
    bytes.truncate(length);
    Ok(bytes)
}

/// How many of the bytes are the secret: a text is one without its line end.
fn secret(bytes: &[u8]) -> Result<usize, String> {
    if bytes.len() > MOST {
        return Err(format!("is over {MOST} bytes: not a ticket key"));
    }
    let text = bytes.trim_ascii_end();
    let is_text = text.iter().all(u8::is_ascii_graphic);
    let is_hex = text.iter().all(u8::is_ascii_hexdigit);
    let (secret, randomness) = match (is_text, is_hex) {
        (true, true) => (text, text.len() / 2),
        (true, false) => (text, text.len() * 3 / 4),
        (false, _) => (bytes, bytes.len()),
    };
    if randomness < LEAST {
        let made = "make one by: openssl rand -base64 48";
        return Err(format!("holds {randomness} bytes of randomness at most, {LEAST} are needed; {made}"));
    }
    let mut found = [false; 256];
    secret.iter().for_each(|byte| found[usize::from(*byte)] = true);
    if found.iter().filter(|found| **found).count() < LEAST_VALUES {
        return Err("is not random: it repeats a few bytes".to_owned());
    }
    Ok(secret.len())
}

/// The keys of a scope, which change while connections use them.
struct Ring(RwLock<Arc<Keys>>);

/// The keys of a scope: at least one; the first seals.
struct Keys(Vec<Key>);

struct Key {
    name: [u8; NAME],
    seals: RandomizedNonceKey,
}

impl Ring {
    fn new(secrets: &[Zeroizing<Vec<u8>>], scope: &Scope) -> Option<Self> {
        Some(Self(RwLock::new(Arc::new(Keys::derive(secrets, scope)?))))
    }

    fn keys(&self) -> Arc<Keys> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Keys {
    fn derive(secrets: &[Zeroizing<Vec<u8>>], scope: &Scope) -> Option<Self> {
        secrets.iter().map(|secret| Key::derive(secret, scope)).collect::<Option<Vec<_>>>().map(Self)
    }

    /// Name, nonce, and sealed with its tag: the seconds since 1970, and what rustls wants to know again.
    fn seal(&self, plain: &[u8], now: u64) -> Option<Vec<u8>> {
        let key = self.0.first()?;
        let mut sealed = Vec::with_capacity(size_of::<u64>() + plain.len() + AES_256_GCM.tag_len());
        sealed.extend(now.to_be_bytes());
        sealed.extend(plain);
        let nonce = key.seals.seal_in_place_append_tag(Aad::from(key.name), &mut sealed).ok()?;
        Some([&key.name, nonce.as_ref().as_slice(), &sealed].concat())
    }

    /// Nothing of what a client sends for a ticket is believed before its tag is right.
    fn open(&self, ticket: &[u8], now: u64) -> Option<Vec<u8>> {
        let (name, rest) = ticket.split_first_chunk::<NAME>()?;
        let (nonce, sealed) = rest.split_first_chunk::<NONCE_LEN>()?;
        let key = self.0.iter().find(|key| key.name == *name)?;
        let mut sealed = sealed.to_vec();
        let nonce = Nonce::assume_unique_for_key(*nonce);
        let plain = key.seals.open_in_place(nonce, Aad::from(*name), &mut sealed).ok()?;
        let (made, plain) = plain.split_first_chunk()?;
        let made = u64::from_be_bytes(*made);
        let is_good = now <= made.saturating_add(LIFETIME.into()) && made <= now.saturating_add(SKEW);
        is_good.then(|| plain.to_vec())
    }
}

impl Key {
    fn derive(secret: &[u8], scope: &Scope) -> Option<Self> {
        let secret = Salt::new(HKDF_SHA256, b"vestibule session tickets").extract(secret);
        let mut key = Zeroizing::new([0; 32]);
        let mut name = [0; NAME];
        for (what, out) in [(b"key ".as_slice(), key.as_mut_slice()), (b"name", &mut name)] {
            let length = Length(out.len());
            secret.expand(&[what, &scope.bytes()], length).and_then(|bytes| bytes.fill(out)).ok()?;
        }
        Some(Self { name, seals: RandomizedNonceKey::new(&AES_256_GCM, key.as_slice()).ok()? })
    }
}

/// Bytes asked of HKDF.
#[derive(Clone, Copy)]
struct Length(usize);

impl hkdf::KeyType for Length {
    fn len(&self) -> usize {
        self.0
    }
}

impl ProducesTickets for Ring {
    fn enabled(&self) -> bool {
        true
    }

    fn lifetime(&self) -> u32 {
        LIFETIME
    }

    fn encrypt(&self, plain: &[u8]) -> Option<Vec<u8>> {
        self.keys().seal(plain, now())
    }

    fn decrypt(&self, ticket: &[u8]) -> Option<Vec<u8>> {
        self.keys().open(ticket, now())
    }
}

impl fmt::Debug for Ring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ticket keys from files")
    }
}

/// Seconds since 1970.
fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    const SCOPE: Scope = Scope { min: TlsVersion::Tls12, clients: None };

    fn keys(secrets: &[u8], scope: &Scope) -> Keys {
        let secrets: Vec<_> = secrets.iter().map(|byte| Zeroizing::new(vec![*byte; 32])).collect();
        Keys::derive(&secrets, scope).unwrap()
    }

    #[test]
    fn the_first_key_seals_and_all_open() {
        let before = keys(&[1], &SCOPE);
        let ticket = before.seal(b"session", 1000).unwrap();
        assert_eq!(
            keys(&[2, 1], &SCOPE).open(&ticket, 1000).unwrap(),
            b"session",
            "another machine, a newer key first"
        );
        let newer = keys(&[2, 1], &SCOPE).seal(b"session", 1000).unwrap();
        assert_eq!(before.open(&newer, 1000), None);
        assert!(keys(&[3, 2], &SCOPE).open(&newer, 1000).is_some());
        assert_eq!(keys(&[3, 2], &SCOPE).open(&ticket, 1000), None, "a key that was taken out opens nothing");
        assert_ne!(before.seal(b"session", 1000).unwrap(), ticket, "nonces are random");
    }

    #[test]
    fn a_scope_does_not_open_what_another_sealed() {
        let clients = |required, root| Some(Clients { required, roots: [root; 32] });
        let mut scopes = Vec::new();
        for min in [TlsVersion::Tls12, TlsVersion::Tls13] {
            for clients in [None, clients(false, 1), clients(true, 1), clients(true, 2)] {
                scopes.push(Scope { min, clients });
            }
        }
        for one in &scopes {
            let ticket = keys(&[1], one).seal(b"session", 0).unwrap();
            for other in &scopes {
                assert_eq!(keys(&[1], other).open(&ticket, 0).is_some(), one == other, "{one:?} {other:?}");
            }
        }
    }

    #[test]
    fn tickets_grow_old() {
        let keys = keys(&[1], &SCOPE);
        let ticket = keys.seal(b"session", 100_000).unwrap();
        let life = u64::from(LIFETIME);
        for (now, good) in [
            (100_000, true),
            (100_000 + life, true),
            (100_001 + life, false),
            (100_000 - SKEW, true),
            (99_999 - SKEW, false),
            (0, false),
            (u64::MAX, false),
        ] {
            assert_eq!(keys.open(&ticket, now).is_some(), good, "{now}");
        }
    }

    #[test]
    fn an_altered_or_cut_ticket_is_none() {
        let keys = keys(&[1], &SCOPE);
        let ticket = keys.seal(b"session", 0).unwrap();
        for at in 0..ticket.len() {
            let mut altered = ticket.clone();
            altered[at] ^= 1;
            assert_eq!(keys.open(&altered, 0), None, "byte {at}");
            assert_eq!(keys.open(&ticket[..at], 0), None, "cut at {at}");
        }
    }

    #[test]
    fn files_that_hold_no_secret_are_told() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("key");
        let said = |bytes: &[u8], mode: u32| {
            fs::write(&path, bytes).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            read(&path).map(|secret| secret.len())
        };
        let random: Vec<u8> = (0..=255).collect();
        let hex = "0123456789abcdef".repeat(4);
        let base64 = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOP+";
        assert_eq!(said(&random[..32], 0o600), Ok(32));
        assert_eq!(said(&random[..32], 0o640), Ok(32));
        assert_eq!(said(format!("{hex}\n").as_bytes(), 0o400), Ok(64));
        assert_eq!(said(format!("{base64}\r\n").as_bytes(), 0o600), Ok(43));
        let wrong: [(&[u8], u32, &str); 8] = [
            (&random[..32], 0o644, "is open to everybody on this machine (mode 644): chmod 600 it"),
            (&random[..32], 0o601, "is open to everybody on this machine (mode 601): chmod 600 it"),
            (&random[..31], 0o600, "holds 31 bytes of randomness at most, 32 are needed"),
            (&hex.as_bytes()[..62], 0o600, "holds 31 bytes of randomness at most"),
            (&base64.as_bytes()[..42], 0o600, "holds 31 bytes of randomness at most"),
            (b"", 0o600, "holds 0 bytes of randomness at most"),
            (&[7; 64], 0o600, "is not random"),
            (&[7; 4097], 0o600, "is over 4096 bytes"),
        ];
        for (bytes, mode, expected) in wrong {
            let error = said(bytes, mode).unwrap_err();
            assert!(error.starts_with(expected), "{error}");
        }
    }
}
